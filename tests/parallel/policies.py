"""Prompt rows, a tiny checkpoint, a reward and a recipe for tests of grpo. Tests only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.models import tiny

REWARD = {"name": "vowels", "function": "tests.parallel.policies:vowels"}


def vowels(completions: list[str], level: list[int]) -> list[float]:
    """Something that a tiny model's answers differ in; level: a column of the rows."""
    return [
        sum(c in "aeiou" for c in text) / (1 + len(text)) + one
        for text, one in zip(completions, level, strict=True)
    ]


def rows(root: Path, count: int) -> list[dict[str, Any]]:
    """Every other one with a picture."""
    out: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {"problem": "Say a number. " * (1 + i % 3), "answer": str(i % 7), "level": i}
        if i % 2:
            file = root / f"{i}.png"
            tiny.picture(24 + 8 * (i % 3), 24, i).save(file)
            row |= {"images": [str(file)], "problem": f"<image>{row['problem']}"}
        out.append(row)
    return out


def make(root: Path, name: str = "qwen2.5-vl", steps: int = 3, **grpo: Any) -> Path:
    """A tiny checkpoint of `name`, data, another checkpoint and the recipe grpo.yaml. Returns root."""
    tiny.checkpoint(name, root / "model")
    tiny.checkpoint(name, root / "other", seed=1)
    made = rows(root, 20)
    (root / "grpo.json").write_text(json.dumps(made[:16]))
    (root / "grpo-validation.json").write_text(json.dumps(made[16:]))
    recipe = {
        "name": "grpo",
        "model": {"source": str(root / "model")},
        "data": {
            "datasets": [{"path": str(root / "grpo.json")}],
            "max_length": 512,
            "pack_length": 512,
            "workers": 0,
        },
        "train": {
            "objective": "grpo",
            "grpo": {"group": 4, "max_new_tokens": 8, "log_every": 1, **grpo},
            "rewards": [REWARD],
            "steps": steps,
            "global_batch_size": 3,
            "precision": "fp32",
        },
        "optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": 0}},
        "checkpoint": {"dir": str(root / "grpo")},
        "monitor": {"trackers": []},
    }
    (root / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    return root
