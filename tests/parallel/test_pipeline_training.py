"""Whole training runs under a pipeline: the trainer, its data and its guards do what they do in one process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from polymodal import device, launch
from polymodal import recipe as recipes
from polymodal.data import media
from polymodal.errors import PolymodalError
from polymodal.train import optim, trainer
from tests.models import tiny
from tests.parallel.harness import run

STEPS = 4
PIPELINE = "parallel.pp=2"


@dataclass(frozen=True)
class Job:
    """A run: overrides of the recipe, alike in one process and under a pipeline; scale: of an fp16 loss at the start."""

    name: str
    overrides: tuple[str, ...] = ()
    scale: float | None = None


@dataclass(frozen=True)
class Said:
    """What a rank's run left: bytes of decoded pictures, and the error that ended it."""

    decoded: int
    error: str


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny checkpoint; rows with and without pictures, of one the file is cut short; rows to validate on."""
    root = tmp_path_factory.mktemp("ground")
    tiny.checkpoint("qwen2.5-vl", root / "model")
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
    data = {"max_length": 128, "pack_length": 128, "workers": 0, "on_error": "skip"}
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


def _runs(rank: int, world: int, root: Path, jobs: list[Job]) -> list[Said]:
    return [_run(rank, world, root, job) for job in jobs]


def _run(rank: int, world: int, root: Path, job: Job) -> Said:
    decode, scaler, seen, error = media.image, optim.LossScaler, [0], ""

    def counted(source: Any) -> Any:
        picture = decode(source)
        seen[0] += np.asarray(picture).nbytes
        return picture

    more = [PIPELINE] if world > 1 and not any("parallel." in word for word in job.overrides) else []
    recipe = recipes.load(
        root / "recipe.yaml", [f"checkpoint.dir={root / job.name}-{world}", *more, *job.overrides]
    )
    place = launch.Place(rank, world, rank, world, 0, 1)
    rt = launch.Runtime(place, device.find("cpu", rank), 1)
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


def same(root: Path, name: str, rel: float = 1e-5, keys: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """The metrics of a run under a pipeline, which are those of one process."""
    one, two = lines(root, f"{name}-1"), lines(root, f"{name}-2")
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        wanted = [k for k in a if k in ("step", "loss", "grad_norm", "samples", "tokens", "skipped", *keys)]
        wanted += [k for k in a if k.startswith("validation/")]
        assert {k: b[k] for k in wanted} == pytest.approx({k: a[k] for k in wanted}, rel=rel), name
    return two


def test_only_the_first_stage_decodes_and_all_know_what_is_broken(ground):
    jobs = [Job("plain")]
    ((one,),) = run(1, _runs, 1, ground, jobs)
    (first,), (second,) = run(2, _runs, 2, ground, jobs)
    assert first == one and first.decoded > 0 and not first.error
    assert second.decoded == 0
    found = same(ground, "plain")
    assert found[-1]["samples"] % 16 != 0, "the broken sample was met, and not counted"
