"""What lies in a run's directory is input too: whatever it holds, what is read is right, or one sentence says why not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint
from polymodal.distributed.checkpoint import Damaged, RunState, Writer
from polymodal.evaluate import run_page
from polymodal.recipe import Monitor
from polymodal.runtime import device
from polymodal.train.monitor import Metrics, Profiler

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
TENSORS = {f"model.{i}": torch.arange(40.0 * i, 40.0 * i + 40) for i in range(3)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with checkpoints of step 1 and 2, whose tensors differ."""
    run = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        tensors = {name: value * step for name, value in TENSORS.items()}
        Writer(run, 2, False, 0, None).save(
            tensors, RunState(step=step, position={"epoch": 0, "window": 0, "step": step})
        )
    return run


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def copied(whole: Path, scratch: Path) -> tuple[Path, Path]:
    """A fresh copy of the run, and its newest checkpoint."""
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    return run, checkpoint.newest(run)


def taken(run: Path) -> Path:
    """What a resumed run takes, as the trainer does: the newest that can be loaded, whose tensors must be right."""
    damaged: list[Path] = []
    while True:
        directory = checkpoint.newest_whole(run, damaged)
        tensors = {name: torch.zeros(40) for name in TENSORS}
        try:
            checkpoint.load(directory, tensors, None)
        except Damaged:
            damaged.append(directory)
            continue
        step = checkpoint.read_state(directory).step
        assert all(torch.equal(tensors[name], value * step) for name, value in TENSORS.items())
        return directory


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_state_is_what_was_written_or_named_as_damaged(whole, scratch, data):
    run, newest = copied(whole, scratch)
    file = newest / "state.json"
    state, content = json.loads(file.read_text()), file.read_bytes()
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from([*state, "another"]))
        state[key] = data.draw(VALUES)
        file.write_text(json.dumps(state))
    else:
        cut = data.draw(st.integers(0, len(content)))
        file.write_bytes(
            content[:cut] + data.draw(st.binary(max_size=6)) + content[cut + data.draw(st.integers(0, 9)) :]
        )
    try:
        read = checkpoint.read_state(newest)
    except Damaged as error:
        assert str(file) in error.message and "\n" not in error.message
        assert taken(run).name == "step-00000001"
    else:
        assert read.step == 2 and all(0 <= value <= 2 for value in read.position.values())
        assert 0 <= read.tokens < 1 << 63 and 0 <= read.samples < 1 << 63
        taken(run)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_other_bytes_are_never_taken_for_weights(whole, scratch, data):
    run, newest = copied(whole, scratch)
    file = newest / data.draw(st.sampled_from(["__0_0.distcp", ".metadata"]))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["bit", "cut", "longer", "zeros", "gone", "of another", "directory"]))
    if change == "bit":
        file.write_bytes(
            content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
        )
    elif change == "cut":
        file.write_bytes(content[:at])
    elif change == "longer":
        file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=9)))
    elif change == "zeros":
        file.write_bytes(content[:at] + bytes(len(content) - at))
    elif change == "of another":
        file.write_bytes((run / "checkpoints/step-00000001" / file.name).read_bytes())
    else:
        file.unlink()
        if change == "directory":
            file.mkdir()
    same = file.is_file() and file.read_bytes() == content
    assert taken(run).name == ("step-00000002" if same else "step-00000001")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=40) | VALUES.map(json.dumps).map(str.encode) | st.dictionaries(
    st.sampled_from(["start", "steps", "ranks", "stacks", "memory", "x"]), VALUES | st.just([0]) | st.integers(1, 1200), max_size=4,
).map(json.dumps).map(str.encode))  # fmt: skip
@example(b"[" * 70_000)
@example(b'{"steps": 2, "start": -7, "ranks": [0, 0, 99]}')
@example(b"\xff\xfe{}")
def test_a_request_for_a_trace_never_ends_a_run(scratch, content):
    for old in scratch.glob("profile.request"):
        old.unlink()
    profiler = Profiler(scratch, None, 0, device.find("cpu"))
    profiler.before(7)
    request = scratch / Profiler.REQUEST
    request.write_bytes(content)
    shared = []
    assert profiler.asked()
    profiler.take(lambda asked: shared.append(asked) or asked)
    assert not request.exists()
    [asked] = shared
    assert asked is None or (asked.start == 8 and 1 <= asked.steps <= 1000)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.integers(1, 9), max_size=6),
    odd=st.lists(st.binary(max_size=12) | VALUES.map(json.dumps).map(str.encode), max_size=3),
    cut=st.integers(0, 60),
    resumed=st.integers(0, 9),
)
@example([1, 2], [b"[" * 100_000, b'{"step": "1"}', b'{"step": true}', b'{"step": 1e999}'], 0, 5)
def test_metrics_of_any_content_go_on_as_one_curve(scratch, steps, odd, cut, resumed):
    run = scratch / "metrics"
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "loss": step / 2}).encode() for step in steps]
    content = b"\n".join([*odd, *lines])
    (run / "metrics.jsonl").write_bytes(content[: max(0, len(content) - cut)])
    before = run_page.read_metrics(run)
    metrics = Metrics(run, Monitor(trackers=[]), "t", {}, resumed)
    metrics.log(resumed + 1, {"loss": 0.25})
    metrics.close()
    after = run_page.read_metrics(run)
    assert after == [*(m for m in before if m["step"] <= resumed), {"step": resumed + 1, "loss": 0.25}]
    assert len((run / "metrics.jsonl").read_bytes().splitlines()) == len(after)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(st.from_regex(r"\A\.?step-[0-9٠-٩a-z\-. ]{0,12}\Z"), max_size=4), files=st.booleans())
def test_directories_of_odd_names_are_no_checkpoints(whole, scratch, names, files):
    run, newest = copied(whole, scratch)
    for name in names:
        path = run / "checkpoints" / name
        if not path.exists():
            path.write_text("x") if files else path.mkdir()
    try:
        assert taken(run) == newest
    except PolymodalError:
        pytest.fail("a whole checkpoint was not found")
