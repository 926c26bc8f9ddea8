"""Every family's training step on a strict simulated npu: nothing of the host meets the device's tensors, losses and
gradients are the CPU's, and the host waits for the device once a step.

The device is tests/unit/simulated/torch_npu.py; docs/ascend.md has what it cannot show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import CURVE
from tests.models import tiny, tiny_pipelines
from tests.parallel import layouts

ROOT = Path(__file__).parents[2]
QUICK = ("qwen3-vl", "flux")
ALL = (*tiny.NAMES, *tiny.GLM, *tiny.INTERNVL, *tiny.OMNIS, "whisper", *tiny_pipelines.MAKERS)

OF_DIFFUSERS = "transformers/transformer_"
"""Where lines that wait or copy are not ours but of diffusers' forwards."""
OF_MASKS = "parallel/dit_context_parallel"
MASKED_KEYS = ("hunyuan-video", "hunyuan-video-i2v", "open-sora-1.2", "step-video")
"""Beginnings of names whose forwards mask padding of the text: its keys are left out, once read on the host."""
MASKED_ROWS = ("hidream", "hunyuan-video-1.5")
"""Beginnings of names whose forwards in diffusers take rows by masks: their backward passes wait too."""


def simulated(script: str, *arguments: str) -> list[dict]:
    """The lines of JSON that a script of tests/unit/simulated prints."""
    paths = [str(ROOT / "tests/unit/simulated"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND")}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/unit/simulated" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(names) -> None:
    found = {row["name"]: row for row in simulated("families.py", *names)}
    assert list(found) == list(names)
    for name, row in found.items():
        assert row["loss"] == pytest.approx(row["expected"], rel=CURVE), name
        assert row["same"] and row["error"] < 1e-4, (name, row["error"])
        for kind, most in (("waits", 1), ("unpinned", 0)):
            places = {key: key.partition(" ")[2] for key in row[kind]}
            masks = [row[kind][key] for key, place in places.items() if place.startswith(OF_MASKS)]
            assert sum(masks) <= layouts.MICRO_BATCHES * name.startswith(MASKED_KEYS), (name, kind, row[kind])
            ours = {key for key, place in places.items() if not place.startswith((OF_DIFFUSERS, OF_MASKS))}
            if name.startswith(MASKED_ROWS):
                ours = {key for key in ours if places[key]}
            assert sum(row[kind][key] for key in ours) <= most, (name, kind, row[kind])


def test_a_step_on_the_simulated_device():
    check(QUICK)


def test_the_trainer_waits_once_a_step(tmp_path):
    """With its optimizer, clipping, guard and logs over ranks; once weights are read."""
    rows = simulated("run.py", str(tmp_path))
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["device"] for row in rows} == {"npu"}
    for row in rows[1:]:
        assert sum(row["waits"].values()) <= 1 and not row["unpinned"], row


@pytest.mark.slow
def test_a_step_of_every_family_on_the_simulated_device():
    check([name for name in ALL if name not in QUICK])
