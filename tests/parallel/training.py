"""Whole training runs in the worlds of harness.py: the same recipe in one process and laid out. Tests only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data import media
from polymodal.runtime import device, process_group
from polymodal.train import optim, trainer
from tests.bounds import CURVE
from tests.models import tiny

STEPS = 4


@dataclass(frozen=True)
class Job:
    """A run: overrides of the recipe everywhere, and where there are several ranks; scale: of an fp16 loss at the start."""

    name: str
    overrides: tuple[str, ...] = ()
    layout: tuple[str, ...] = ("parallel.pp=2",)
    scale: float | None = None


@dataclass(frozen=True)
class Said:
    """What a rank's run left: bytes of decoded pictures, and the error that ended it."""

    decoded: int
    error: str


def make(root: Path, name: str, length: int = 128, **config: Any) -> Path:
    """A tiny checkpoint of `name`, a recipe, and rows to train and to validate on: with and without pictures, of one
    the file is cut short. length: of packs; config: keys of the checkpoint's config. Returns root."""
    tiny.checkpoint(name, root / "model", **config)
    rows = []
    for i in range(24):
        answer = {"role": "assistant", "content": f"It is {i % 7}, " * (1 + i % 3)}
        row: dict[str, Any] = {"messages": [{"role": "user", "content": f"Say number {i % 7}."}, answer]}
        if i % 2:
            file = root / f"{i}.png"
            tiny.picture(24 + 8 * (i % 3), 24, i).save(file)
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
            row["images"] = [str(file)]
        rows.append(row)
    whole = (root / "5.png").read_bytes()
    (root / "5.png").write_bytes(whole[: len(whole) - 40])  # its header is good: only decoding finds out
    (root / "train.json").write_text(json.dumps(rows[:16]))
    (root / "validation.json").write_text(json.dumps(rows[16:]))
    data = {"max_length": length, "pack_length": length, "workers": 0, "on_error": "skip"}
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.json")}], **data},
        "train": {"steps": STEPS, "global_batch_size": 3, "precision": "fp32"},
        "optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": 0}},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def runs(rank: int, world: int, root: Path, jobs: list[Job]) -> list[Said]:
    return [_run(rank, world, root, job) for job in jobs]


def _run(rank: int, world: int, root: Path, job: Job) -> Said:
    decode, scaler, seen, error = media.image, optim.LossScaler, [0], ""

    def counted(source: Any) -> Any:
        picture = decode(source)
        seen[0] += np.asarray(picture).nbytes
        return picture

    words = [f"checkpoint.dir={root / job.name}-{world}", *job.overrides, *(job.layout if world > 1 else ())]
    recipe = recipes.load(root / "recipe.yaml", words)
    process = process_group.ProcessInfo(rank, world, rank, world, 0, 1)
    rt = process_group.Runtime(process, device.find("cpu", rank), 1)
    media.image = counted
    if job.scale is not None:
        optim.LossScaler = partial(scaler, scale=job.scale)  # type: ignore[assignment,misc]
    try:
        made = trainer.Trainer(recipe, rt)
        made.train()
        made.close()
    except PolymodalError as caught:
        error = caught.message
    finally:
        media.image, optim.LossScaler = decode, scaler  # type: ignore[misc]
    return Said(seen[0], error)


def lines(root: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def same(
    root: Path, name: str, rel: float = CURVE, keys: tuple[str, ...] = (), world: int = 2
) -> list[dict[str, float]]:
    """The metrics of a laid out run, which are those of one process."""
    one, two = lines(root, f"{name}-1"), lines(root, f"{name}-{world}")
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        wanted = [k for k in a if k in ("step", "loss", "grad_norm", "samples", "tokens", "skipped", *keys)]
        wanted += [k for k in a if k.startswith(("validation/", "experts/"))]
        assert {k: b[k] for k in wanted} == pytest.approx({k: a[k] for k in wanted}, rel=rel, nan_ok=True), (
            name
        )
    return two
