"""Training from the command line: one curve whatever kills it, whatever resumes it, on any number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.bounds import CURVE
from tests.end_to_end.processes import workers
from tests.models import tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def words(*args: str) -> list[str]:
    return [sys.executable, "-m", "polymodal", *args]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny checkpoint, pictures, a train file (some rows without a picture) and a validation file."""
    root = tmp_path_factory.mktemp("ground")
    tiny.checkpoint("qwen2.5-vl", root / "model")
    rows = []
    (root / "images").mkdir()
    for i in range(40):
        row = {
            "messages": [
                {"role": "user", "content": f"Say number {i % 7} please."},
                {"role": "assistant", "content": f"It is {i % 7}, " * (1 + i % 3)},
            ]
        }
        if i % 4 == 1:
            tiny.picture(24 + 8 * (i % 3), 24, i).save(root / "images" / f"{i}.png")
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
            row["images"] = [f"images/{i}.png"]
        rows.append(row)
    (root / "train.json").write_text(json.dumps(rows[:32]))
    (root / "validation.json").write_text(json.dumps(rows[32:]))
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {
            "datasets": [{"path": str(root / "train.json")}],
            "max_length": 256,
            "pack_length": 256,
            "workers": 0,
        },
        "train": {"steps": 8, "global_batch_size": 3, "precision": "fp32"},
        "optim": {"lr": 1e-3, "schedule": {"name": "linear", "warmup": 2}},
        "checkpoint": {"every": 3},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def train(
    ground: Path, run: Path, *overrides: str, nproc: int = 1, expect: int = 0
) -> subprocess.CompletedProcess:
    command = words(
        "train", str(ground / "recipe.yaml"), "--nproc", str(nproc), f"checkpoint.dir={run}", *overrides
    )
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def curve(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: (m["loss"], m["grad_norm"]) for m in lines if "loss" in m}


def assert_same(got: dict, want: dict) -> None:
    assert sorted(got) == sorted(want)
    for step in want:
        assert got[step] == pytest.approx(want[step], rel=CURVE), f"step {step}"


@pytest.fixture(scope="module")
def straight(ground, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    train(ground, run, f"data.validation=[{{path: {ground / 'validation.json'}}}]")
    return run


def test_a_run_leaves_what_the_guide_says(straight):
    assert (straight / "recipe.yaml").is_file() and (straight / "summary.json").is_file()
    assert [p.name for p in sorted((straight / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]
    losses = [loss for loss, _ in curve(straight).values()]
    assert len(losses) == 8 and losses[-1] < losses[0]
    last = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 8 and 0 < last["validation/loss"] < 20


def test_two_processes_give_the_same_curve(ground, straight, tmp_path):
    done = train(ground, tmp_path / "run", nproc=2)
    assert_same(curve(tmp_path / "run"), curve(straight))
    assert f"8 steps done: {tmp_path / 'run' / 'checkpoints' / 'step-00000008'}" in done.stdout


@pytest.mark.slow
def test_sequences_cut_over_two_processes_give_the_same_curve_and_counts(ground, straight, tmp_path):
    validation = f"data.validation=[{{path: {ground / 'validation.json'}}}]"
    cut = ("parallel.cp=2", "parallel.ulysses=1", "parallel.balance_media=true")
    train(ground, tmp_path / "run", validation, *cut, nproc=2)
    assert_same(curve(tmp_path / "run"), curve(straight))
    for name in ("samples", "tokens"):
        counts = [
            json.loads((run / "summary.json").read_text())[name] for run in (tmp_path / "run", straight)
        ]
        assert counts[0] == counts[1]
    last = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        for run in (tmp_path / "run", straight)
    ]
    assert last[0]["validation/loss"] == pytest.approx(last[1]["validation/loss"], rel=CURVE)


@pytest.mark.slow
def test_a_pipeline_gives_the_same_curve_and_its_checkpoints_resume_under_other_layouts(
    ground, straight, tmp_path
):
    """Tied weights, an average, validation on the last stage; PP 2 x FSDP2 x 2, then one process, then a V of stages."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    tiny.checkpoint("qwen2-vl", tmp_path / "tied", tied=True)
    common = (
        f"model.source={tmp_path / 'tied'}", "train.global_batch_size=4", "train.ema=0.9", "train.steps=6",
        "optim.schedule.name=constant", "optim.schedule.warmup=0",
        f"data.validation=[{{path: {ground / 'validation.json'}}}]",
    )  # fmt: skip
    train(ground, whole, *common)
    train(ground, run, *common, "train.steps=2", "parallel.pp=2", nproc=4)
    train(ground, run, *common, "train.steps=4", nproc=1)
    v = ("parallel.pp=2", "parallel.pp_schedule=ZBVZeroBubble", "checkpoint.export=true")
    train(ground, run, *common, *v, nproc=2)
    assert_same(curve(run), curve(whole))
    last = [json.loads((r / "metrics.jsonl").read_text().splitlines()[-1]) for r in (run, whole)]
    assert last[0]["validation/loss"] == pytest.approx(last[1]["validation/loss"], rel=CURVE)
    assert (run / "export" / "model.safetensors").is_file()


def test_kill_9_and_resume_on_another_number_of_processes(ground, straight, tmp_path):
    run = tmp_path / "run"
    command = words("train", str(ground / "recipe.yaml"), "--nproc", "2", f"checkpoint.dir={run}")
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "step-00000003").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for pid in (
        *workers(process.pid),
        process.pid,
    ):  # workers first: they end by themselves after their launcher
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()
    train(ground, run, nproc=1)
    assert_same(curve(run), curve(straight))
    assert json.loads((run / "summary.json").read_text())["resumed_at"] in (3, 6)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(ground, straight, tmp_path):
    run = tmp_path / "run"
    command = words(
        "train", str(ground / "recipe.yaml"), "--nproc", "2", f"checkpoint.dir={run}", "checkpoint.every=0"
    )
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    if not (run / "summary.json").exists():  # it was not over by then
        assert "stopped at step" in out
        train(ground, run, nproc=1)
    assert_same(curve(run), curve(straight))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16"])
def test_16_bit_training_learns_and_resumes(ground, straight, tmp_path, precision):
    run = tmp_path / "run"
    train(ground, run, f"train.precision={precision}", "train.steps=4", "optim.schedule.name=constant")
    train(ground, run, f"train.precision={precision}", "train.steps=8", "optim.schedule.name=constant")
    got = [loss for loss, _ in curve(run).values()]
    assert len(got) == 8 and got[-1] < got[0]
    assert got[0] == pytest.approx(curve(straight)[1][0], rel=0.02)


@pytest.mark.slow
def test_weights_only_checkpoints_start_others_but_do_not_resume(ground, tmp_path):
    run, second = tmp_path / "run", tmp_path / "second"
    train(ground, run, "checkpoint.save=weights", "train.steps=2")
    failed = train(ground, run, expect=2)
    assert "holds weights only" in failed.stderr and "checkpoint.init_from" in failed.stderr
    train(ground, second, f"checkpoint.init_from={run}", "train.steps=1")
    assert curve(second)[1][0] < curve(run)[1][0]
    step = run / "checkpoints" / "step-00000002"  # one checkpoint of the run is as good as the run
    train(ground, tmp_path / "third", f"checkpoint.init_from={step}", "train.steps=1")
    assert curve(tmp_path / "third")[1] == curve(second)[1]


@pytest.mark.slow
def test_frozen_towers_and_rates_by_tower(ground, tmp_path):
    import torch

    from polymodal.distributed import checkpoint

    run = tmp_path / "run"
    train(
        ground,
        run,
        "train.freeze=[vision]",
        "optim.groups=[{match: projector, lr: 0.0}]",
        "train.steps=2",
        nproc=2,
    )
    names = dict(checkpoint.read_model(checkpoint.newest(run)))
    assert not any(".blocks." in n for n in names if "visual" in n)
    from safetensors.torch import load_file

    start = load_file(ground / "model" / "model.safetensors")
    merger = [n for n in names if "merger" in n]
    assert merger
    for name in merger:
        key = name if name in start else name.replace("model.visual.", "visual.")
        torch.testing.assert_close(names[name], start[key], rtol=0, atol=0)


@pytest.mark.slow
def test_random_weights_do_not_depend_on_the_layout(ground, tmp_path):
    for nproc in (1, 2):
        train(ground, tmp_path / str(nproc), "model.init=random", "train.steps=2", nproc=nproc)
    assert_same(curve(tmp_path / "2"), curve(tmp_path / "1"))


@pytest.mark.slow
def test_the_saved_recipe_reproduces_the_run(ground, straight, tmp_path):
    again = words("train", str(straight / "recipe.yaml"), f"checkpoint.dir={tmp_path / 'run'}")
    subprocess.run(again, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    assert_same(curve(tmp_path / "run"), curve(straight))


def test_nothing_to_train_on_is_reported(ground, tmp_path):
    failed = train(ground, tmp_path / "run", "data.datasets=[]", expect=2)
    assert "The recipe has no data.datasets." in failed.stderr and "Traceback" not in failed.stderr
