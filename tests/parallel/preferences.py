"""Preference rows, a tiny checkpoint and recipes for tests of dpo and kto. Tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.models import tiny


def rows(root: Path, count: int, unpaired: bool = False) -> list[dict[str, Any]]:
    """TRL rows, every other one with a picture; of kto an answer and a label."""
    out: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"Say number {i % 7}."}]}
        if i % 2:
            file = root / f"{i}.png"
            tiny.picture(24 + 8 * (i % 3), 24, i).save(file)
            row["images"] = [str(file)]
        good = [{"role": "assistant", "content": f"It is {i % 7}, " * (1 + i % 3)}]
        bad = [{"role": "assistant", "content": f"A bar {i % 5}."}]
        if unpaired:
            row |= {"completion": good if i % 3 else bad, "label": bool(i % 3)}
        else:
            row |= {"chosen": good, "rejected": bad}
        out.append(row)
    return out


def make(root: Path, name: str = "qwen2.5-vl", length: int = 192, steps: int = 3) -> Path:
    """A tiny checkpoint of `name`, data and recipes dpo.yaml and kto.yaml. Returns root."""
    tiny.checkpoint(name, root / "model")
    tiny.checkpoint(name, root / "other", seed=1)
    for objective in ("dpo", "kto"):
        made = rows(root, 20, objective == "kto")
        (root / f"{objective}.json").write_text(json.dumps(made[:16]))
        (root / f"{objective}-validation.json").write_text(json.dumps(made[16:]))
        recipe = {
            "name": objective,
            "model": {"source": str(root / "model")},
            "data": {
                "datasets": [{"path": str(root / f"{objective}.json")}],
                "max_length": length,
                "pack_length": length,
                "workers": 0,
            },
            "train": {"objective": objective, "steps": steps, "global_batch_size": 3, "precision": "fp32"},
            "optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": 0}},
            "checkpoint": {"dir": str(root / objective)},
            "monitor": {"trackers": []},
        }
        (root / f"{objective}.yaml").write_text(yaml.safe_dump(recipe))
    return root
