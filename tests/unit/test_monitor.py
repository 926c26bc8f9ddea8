"""Guards stop or skip, metrics are one curve after a resume, traces are written when asked in a live run."""

import json
import math
import re
import sys
import types

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import Bar
from polymodal.recipe import LossGuard, Monitor
from polymodal.runtime import device
from polymodal.train.monitor import Guard, Metrics, Profiler, line


def test_nan_stops_with_the_last_losses():
    guard = Guard(LossGuard(), scaled=False)
    assert guard.accept(1, 2.5, 1.0) == (True, "")
    with pytest.raises(
        PolymodalError, match="Step 2: loss nan, gradient norm 1.0; the last losses were 2.5, nan"
    ) as error:
        guard.accept(2, math.nan, 1.0)
    assert "train.guard.nan" in error.value.hint


def test_nan_is_skipped_by_choice_but_not_for_ever():
    guard = Guard(LossGuard(nan="skip", max_skips=3), scaled=False)
    assert guard.accept(1, math.nan, 1.0)[0] is False
    assert guard.accept(2, 1.0, 1.0)[0] is True
    guard.accept(3, 1.0, math.inf)
    guard.accept(4, 1.0, math.inf)
    with pytest.raises(PolymodalError, match="3 steps in a row were skipped"):
        guard.accept(5, 1.0, math.inf)


def test_fp16_overflow_is_skipped_not_fatal():
    assert Guard(LossGuard(), scaled=True).accept(1, 1.0, math.inf)[0] is False


def test_spike_is_measured_against_the_running_mean():
    guard = Guard(LossGuard(spike=5.0), scaled=False)
    for i in range(5):
        assert guard.accept(i, 1.0, 1.0)[0]
    applied, why = guard.accept(6, 1.0, 20.0)
    assert not applied and "over 5.0 x its mean 1" in why
    assert guard.mean == pytest.approx(1.0)


def test_metrics_forget_what_a_resume_does_again(tmp_path):
    metrics = Metrics(tmp_path, Monitor(trackers=[]), "run", {})
    for step in range(1, 6):
        metrics.log(step, {"loss": 1.0 / step})
    metrics.close()
    metrics = Metrics(tmp_path, Monitor(trackers=[]), "run", {}, 3)
    metrics.log(4, {"loss": 9.0})
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4] and lines[-1]["loss"] == 9.0


@pytest.mark.parametrize(
    "end", [b'{"step": 3, "lo', b"\0" * 40, b"\xff\xfe", b"[1]\n", b'{"loss": 1}\n', b'{"step": "4"}\n']
)
def test_lines_that_a_full_disk_or_lost_power_cut_are_left_out(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n' + end)
    metrics = Metrics(tmp_path, Monitor(trackers=[]), "run", {}, 4)
    metrics.log(5, {"loss": 0.125})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 0.5), (2, 0.25), (5, 0.125)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_forgets_what_a_resume_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, range(1, 6)), (3, range(4, 6))):
        metrics = Metrics(tmp_path, Monitor(trackers=["tensorboard"]), "run", {}, done)
        for step in steps:
            metrics.log(step, {"loss": 10.0 * done + step})
        metrics.close()
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(s.step, s.value) for s in scalars] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0)]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    full = Metrics(tmp_path / "full", Monitor(trackers=[]), "run", {})
    with pytest.raises(OSError, match="No space left on device: .*full/metrics.jsonl"):
        full.log(1, {"loss": 1.0})
    full.close()  # says it no second time
    metrics = Metrics(tmp_path, Monitor(trackers=["tensorboard"]), "run", {})
    metrics.log(1, {"loss": 0.5, "bad": math.nan, "text": "no"})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"] and events.Scalars("loss")[0].value == 0.5


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_reported(tmp_path, tracker):
    import importlib.util

    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed here")
    with pytest.raises(PolymodalError, match=f"names {tracker}, which is not installed"):
        Metrics(tmp_path, Monitor(trackers=[tracker]), "run", {})


class Recorder(types.ModuleType):
    """Stands for wandb or mlflow: takes any call and keeps it."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.info = [], types.SimpleNamespace(run_id="abc")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_wandb_gets_one_run_and_its_numbers(tmp_path, monkeypatch):
    wandb = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (3, 4):  # the second time is a resumed run
        metrics = Metrics(tmp_path, Monitor(trackers=["wandb"], project="p"), "run", {"optim": {"lr": 1.0}})
        metrics.log(step, {"loss": 0.5, "loss/text": 0.25, "bad": math.nan, "text": "no"})
        metrics.close()
    assert [name for name, *_ in wandb.calls] == ["init", "log", "finish"] * 2
    (_, _, first), (_, logged, at), _, (_, _, second), *_ = wandb.calls
    assert first == second and len(first.pop("id")) == 32
    assert first == {
        "project": "p", "name": "run", "dir": str(tmp_path), "config": {"optim": {"lr": 1.0}}, "resume": "allow",
    }  # fmt: skip
    assert logged == ({"loss": 0.5, "loss/text": 0.25},) and at == {"step": 3}


def test_mlflow_gets_one_run_and_its_numbers(tmp_path, monkeypatch):
    mlflow = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for step in (3, 4):
        metrics = Metrics(tmp_path, Monitor(trackers=["mlflow"], project="p"), "run", {"name": "run"})
        metrics.log(step, {"loss": 0.5, "loss/text": 0.5, "score@1": 0.25, "bad": math.inf})
        metrics.close()
    assert mlflow.calls == [
        ("set_experiment", ("p",), {}),
        ("start_run", (), {"run_name": "run"}),
        ("log_dict", ({"name": "run"}, "recipe.json"), {}),
        ("log_metrics", ({"loss": 0.5, "loss.text": 0.5, "score_1": 0.25},), {"step": 3}),
        ("end_run", (), {}),
        ("set_experiment", ("p",), {}),
        ("start_run", (), {"run_id": "abc"}),
        ("log_metrics", ({"loss": 0.5, "loss.text": 0.5, "score_1": 0.25},), {"step": 4}),
        ("end_run", (), {}),
    ]


def test_a_live_run_is_traced_on_request(tmp_path):
    profiler = Profiler(tmp_path, None, 0, device.find("cpu"))
    request = tmp_path / Profiler.REQUEST
    profiler.before(1)
    assert not profiler.asked()
    request.write_text(json.dumps({"steps": 2, "ranks": [0]}))
    assert not profiler.asked()  # looked a moment ago
    profiler.POLL = 0
    assert profiler.asked()
    profiler.take(lambda asked: asked)
    written = None
    for step in range(2, 5):
        profiler.before(step)
        torch.randn(8, 8) @ torch.randn(8, 8)
        request.touch() if step == 2 else None
        assert profiler.asked() is (step > 2)  # not in the middle of a trace
        written = profiler.after(step) or written
    assert written is not None and written.name == "steps-2-3-rank-0.json"
    assert json.loads(written.read_text())["traceEvents"]


def test_a_request_that_cannot_be_read_is_removed_and_reported(tmp_path, capsys):
    profiler = Profiler(tmp_path, None, 0, device.find("cpu"))
    (tmp_path / Profiler.REQUEST).write_text('{"step": 1}')
    assert profiler.asked()
    profiler.take(lambda asked: asked)
    assert "profile.request is no request for a trace: step: Extra inputs" in capsys.readouterr().out
    assert not (tmp_path / Profiler.REQUEST).exists()
    profiler.before(1)
    assert profiler.after(1) is None


VALUES = {
    "loss": 1.25, "grad_norm": 0.5, "lr": 2e-5, "seconds": 1.5, "samples_per_second": 21.5, "tokens_per_second": 4000.0,
    "tokens_per_second_device": 500.0, "frames_per_second": 43.0, "memory_gib": 3.0, "mfu": 0.41, "loss/text": 1.1,
    "loss/image": 1.3, "wait_seconds": 0.15,
}  # fmt: skip


def test_the_log_line_has_what_people_compare():
    assert line(7, 100, VALUES) == (
        "step 7/100 | loss 1.2500 (text 1.1000, image 1.3000) | grad norm 0.5 | lr 2e-05 | 1.50 s/it | 21.5 samples/s"
        " | 500 tokens/s/device | 43.0 frames/s | MFU 41.0% | 3.00 GiB | waited 10% for data"
    )
    alone = {k: v for k, v in VALUES.items() if k not in ("loss/image", "mfu", "frames_per_second")}
    said = line(7, 100, {**alone, "wait_seconds": 0.0})
    assert "loss 1.2500 | grad" in said and said.endswith("500 tokens/s/device | 3.00 GiB")


def test_a_terminal_gets_a_bar_with_the_same_numbers_below(monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    progress = Bar("mine", 100, error=False)
    progress.print("a word")
    progress.update(7, below=line(7, 100, VALUES).partition(" | ")[2])
    progress.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    last = said.rpartition("mine ")[2].split("\n")
    assert "7/100" in last[0] and "loss 1.2500 (text" in last[1] and "waited 10%" in " ".join(last)
    assert all(len(row.rstrip("\r")) <= 80 for row in last) and "a word" in said
