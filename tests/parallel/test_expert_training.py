"""Whole training runs with experts spread over ranks: curve, figures of the experts, files and resumes of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polymodal.train.export import export
from tests.bounds import CURVE
from tests.parallel.harness import run
from tests.parallel.training import Job, lines, make, runs, same

pytestmark = pytest.mark.slow
EXPERTS = 32
"""More than a short pack's tokens choose: every step leaves some without any."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    return make(root, "qwen3-vl-moe", length=64, text_config__num_experts=EXPERTS)


@pytest.fixture(scope="module")
def straight(ground) -> Path:
    run(1, runs, 1, ground, [Job("whole")])
    return ground / "whole-1"


def test_the_curve_and_the_load_of_experts(ground, straight):
    run(2, runs, 2, ground, [Job("whole", layout=("parallel.ep=2",))])
    for line in same(ground, "whole"):
        assert 0 < line["experts/idle"] < 1 < line["experts/busiest"] <= EXPERTS


def test_a_run_from_the_command_line_resumes_under_another_ep_and_is_exported(ground, straight):
    place, layout = f"checkpoint.dir={ground / 'resumed'}", ("parallel.ep=2", "parallel.tp=2")
    command = ["train", str(ground / "recipe.yaml"), "--nproc", "2", place, "train.steps=2", *layout]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [sys.executable, "-m", "polymodal", *command], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (said, *_) = run(4, runs, 4, ground, [Job("resumed", (place,), ("parallel.ep=4",))])
    assert not said[0].error
    got, want = lines(ground, "resumed"), lines(ground, "whole-1")
    for key in ("loss", "grad_norm", "experts/idle", "experts/busiest"):
        assert [line[key] for line in got] == pytest.approx([line[key] for line in want], rel=CURVE), key
    one, other = (
        load(export(str(directory), str(directory) + "-export").directory)
        for directory in (straight, ground / "resumed")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-4)


def load(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).state_dict()


def test_adapters_on_experts_resume_under_another_layout_and_are_exported(ground):
    from safetensors.torch import load_file

    lora = ("model.lora={rank: 2, targets: [q_proj, gate_up_proj, experts.down_proj]}", "optim.lr=0.01")
    place = (*lora, f"checkpoint.dir={ground / 'adapters'}")
    run(1, runs, 1, ground, [Job("lora", lora)])
    run(2, runs, 2, ground, [Job("adapters", (*place, "train.steps=2"), ("parallel.ep=2",))])
    (said, *_) = run(4, runs, 4, ground, [Job("adapters", place, ("parallel.ep=4", "parallel.tp=2"))])
    assert not said[0].error
    got, want = lines(ground, "adapters"), lines(ground, "lora-1")
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in want], rel=CURVE)
    made = [export(str(ground / name), str(ground / f"{name}-export")) for name in ("lora-1", "adapters")]
    assert [each.what for each in made] == ["adapter", "adapter"]
    one, other = (load_file(Path(each.directory) / "adapter_model.safetensors") for each in made)
    assert one.keys() == other.keys() and any("experts.base_layer.lora_A" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
