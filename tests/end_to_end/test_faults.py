"""Faults of machines and of people while a run trains: nothing is lost, nothing hangs, one sentence says what happened."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest

from polymodal.runtime import device, process_group
from polymodal.runtime.lock import DirectoryLock
from tests.end_to_end.processes import children, workers
from tests.end_to_end.test_training import (  # noqa: F401
    ENVIRONMENT,
    assert_same,
    curve,
    ground,
    straight,
    train,
    words,
)

LONG = "train.steps=2000"
"""So many that a run is not over before something is done to it."""


def start(ground: Path, run: Path, *overrides: str, nproc: int = 1, limits: str = "", **environment: str):  # noqa: F811
    """A run whose output goes to `<run>.log`; limits: of the shell that starts it."""
    command = words(
        "train", str(ground / "recipe.yaml"), "--nproc", str(nproc), f"checkpoint.dir={run}", *overrides
    )
    if limits:
        command = ["bash", "-c", f'{limits}; exec "$@"', "-", *command]
    with run.with_suffix(".log").open("w") as log:
        # under nohup SIGHUP is ignored by whom it starts, and a run keeps that
        heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        env = {**ENVIRONMENT, **environment}
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=heard)


def said(run: Path) -> str:
    return run.with_suffix(".log").read_text()


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while f"step {step}/" not in said(run):
        assert process.poll() is None and time.monotonic() < deadline, said(run)
        time.sleep(0.02)


def ended(process: subprocess.Popen, run: Path, code: int, *texts: str) -> str:
    """The output of a run that ends with `code`, one sentence at most, and these words."""
    try:
        process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it hangs: {said(run)}")
    output = said(run)
    assert process.returncode == code, output
    assert "Traceback" not in output and output.count("error:") <= 1, output
    for text in texts:
        assert text in output
    return output


def data_workers(pid: int) -> list[int]:
    """They are forked from a process that the rank started."""
    servers = [c for c in children(pid) if b"forkserver" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return [worker for server in servers for worker in children(server)]


# ---- two at once, and directories that go ----------------------------------------------------------------------------


def test_a_second_run_in_the_directory_of_another_is_refused(ground, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    under_way = run / "checkpoints" / ".step-00000003.tmp"
    under_way.mkdir(parents=True)
    with DirectoryLock(run, "training"):
        failed = train(ground, run, expect=2)
    assert (
        f"{run} is in use by process {os.getpid()} on host" in failed.stderr
        and "Traceback" not in failed.stderr
    )
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints"] and under_way.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_directory_that_is_gone_is_made_anew(ground, tmp_path, how):  # noqa: F811
    run = tmp_path / "run"
    process = start(ground, run, "train.steps=120", "checkpoint.every=40")
    wait_for_step(process, run, 20)
    shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "elsewhere")
    ended(process, run, 0, "was removed or replaced while this process was training. It goes on in")
    assert (run / "checkpoints" / "step-00000120").is_dir() and (run / "recipe.yaml").is_file()
    assert max(curve(run)) == 120
    if how == "renamed":
        with DirectoryLock(run, "training"):
            train(
                ground, tmp_path / "elsewhere", "train.steps=22"
            )  # who renamed it goes on with what is there
    else:
        with DirectoryLock(run, "training"):
            failed = train(ground, run, expect=2)
        assert "is in use by" in failed.stderr


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number, nproc", [(signal.SIGHUP, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_and_ends_the_run(ground, tmp_path, number, nproc):  # noqa: F811
    run = tmp_path / "run"
    process = start(ground, run, LONG, "checkpoint.every=0", nproc=nproc)
    wait_for_step(process, run, 3)
    process.send_signal(number)
    ended(process, run, 0, "as asked; the same command continues from there")
    assert len(list((run / "checkpoints").glob("step-*"))) == 1 and not (run / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, nproc", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_second_signal_ends_it_at_once_also_while_it_saves(ground, tmp_path, number, nproc):  # noqa: F811
    run = tmp_path / "run"
    process = start(ground, run, LONG, "checkpoint.every=1", nproc=nproc)
    wait_for_step(process, run, 3)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.02)
    process.wait(timeout=300)
    assert process.returncode in (0, 130, 128 + number, 128 + signal.SIGKILL) and "Traceback" not in said(
        run
    ), said(run)
    assert "nothing is left to do" in train(ground, run, "train.steps=1").stdout, (
        "what is there can be resumed"
    )


def test_a_second_signal_counts_wherever_it_comes():
    """Python swallows what a signal raises in a callback of the interpreter."""

    class Object:
        pass

    def callback(_):
        signal.raise_signal(signal.SIGTERM)

    rt = process_group.Runtime(process_group.ALONE, device.find("cpu"), 1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    rt.catch_signals()
    try:
        signal.raise_signal(signal.SIGHUP)
        assert rt.signal is signal.SIGHUP
        gone = Object()
        reference = weakref.ref(gone, callback)
        with pytest.raises(KeyboardInterrupt):
            del gone
            assert reference() is None
            time.sleep(60)
    finally:
        process_group.stop(rt)
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_process_that_stands_still_is_not_waited_for(ground, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    process = start(ground, run, LONG, nproc=2, HCCL_EXEC_TIMEOUT="8")
    wait_for_step(process, run, 3)
    still = workers(process.pid)[1]
    os.kill(still, signal.SIGSTOP)
    process.wait(timeout=300)
    assert process.returncode in (2, 128 + signal.SIGKILL), said(run)  # the launcher kills what stands still
    assert "Traceback" not in said(run) and said(run).count("error:") == 1, said(run)
    with pytest.raises(ProcessLookupError):
        os.kill(still, 0)


# ---- limits and files ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_limit_of_file_sizes_names_the_checkpoint(ground, tmp_path):  # noqa: F811
    process = start(ground, tmp_path / "run", limits="ulimit -f 400")
    ended(
        process,
        tmp_path / "run",
        2,
        "step-00000003.tmp could not be written (OSError: [Errno 27] File too large;",
    )


@pytest.mark.slow
def test_few_open_files(ground, tmp_path):  # noqa: F811
    process = start(ground, tmp_path / "enough", "data.workers=2", nproc=2, limits="ulimit -n 64")
    ended(process, tmp_path / "enough", 0)
    process = start(ground, tmp_path / "few", "data.workers=8", limits="ulimit -n 32")
    ended(process, tmp_path / "few", 2, "32 open files are allowed. Raise the limit (`ulimit -n 65536`)")


@pytest.mark.slow
def test_a_log_that_cannot_be_written_does_not_end_a_run(ground, straight, tmp_path):  # noqa: F811
    command = words("train", str(ground / "recipe.yaml"), f"checkpoint.dir={tmp_path / 'run'}")
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, env=ENVIRONMENT, stdout=full, timeout=300).returncode == 0
    assert_same(curve(tmp_path / "run"), curve(straight))


@pytest.mark.slow
def test_a_data_worker_that_is_killed_is_named(ground, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    process = start(ground, run, LONG, "data.workers=1")
    wait_for_step(process, run, 3)
    os.kill(data_workers(process.pid)[0], signal.SIGKILL)
    ended(
        process,
        run,
        2,
        "A data worker (process",
        "was killed by SIGKILL",
        "ran out of memory: lower data.workers",
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "other rows"])
def test_data_that_change_while_they_are_trained_on_are_named(ground, tmp_path, how):  # noqa: F811
    run, file = tmp_path / "run", tmp_path / "train.json"
    shutil.copytree(ground / "images", tmp_path / "images")
    shutil.copy(ground / "train.json", file)
    process = start(ground, run, LONG, f"data.datasets=[{{path: {file}}}]")
    wait_for_step(process, run, 3)
    rows = json.loads(file.read_text())
    file.write_text("[]" if how == "cut" else json.dumps([rows[0]] * 3 + rows))
    ended(
        process,
        run,
        2,
        f"{file}",
        f"Since the run began, {file} was changed.",
        "Put the data back as they were",
    )


CLOCK = """
import time
real, began = time.time, time.monotonic()
time.time = lambda: real() - 3600 * ((time.monotonic() - began) // 0.2)
"""
"""A sitecustomize module: the clock is set back an hour five times a second."""


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_clock_that_is_set_back_changes_nothing(ground, straight, tmp_path, nproc):  # noqa: F811
    run = tmp_path / "run"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOCK)
    paths = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    for steps in (4, 8):
        process = start(
            ground, run, f"train.steps={steps}", "optim.schedule.name=constant", nproc=nproc, PYTHONPATH=paths
        )
        ended(process, run, 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["seconds"] > 0 and row["wait_seconds"] >= 0 for row in rows)


# ---- kill -9, anywhere, at any time ----------------------------------------------------------------------------------

LAYOUTS = {
    "one": (1, []), "fsdp": (2, []), "tp": (2, ["parallel.tp=2"]), "cp": (2, ["parallel.cp=2"]),
    "pp": (2, ["parallel.pp=2", "train.micro_batch_size=1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def longer(ground, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("longer") / "run"
    train(ground, run, "train.steps=16")
    return run


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_anywhere(ground, longer, tmp_path, seed):  # noqa: F811
    """Victim, layout, moment and the layout of the resumed run are drawn; the curve is that of a run left alone."""
    drawn = random.Random(seed)
    run, keys = tmp_path / "run", ["train.steps=16", "checkpoint.every=2", "data.workers=1"]
    name, after = drawn.choice(list(LAYOUTS)), drawn.choice(list(LAYOUTS))
    nproc, layout = LAYOUTS[name]
    victim = drawn.choice(["launcher", "worker", "data worker"])
    process = start(ground, run, *keys, *layout, nproc=nproc)
    wait_for_step(process, run, drawn.randint(1, 12))
    time.sleep(drawn.random() / 4)
    ranks = workers(process.pid) if nproc > 1 else [process.pid]
    made = [pid for rank in ranks for pid in data_workers(rank)]
    if process.poll() is None and ranks and made:
        pid = {"launcher": process.pid, "worker": drawn.choice(ranks), "data worker": drawn.choice(made)}[
            victim
        ]
        os.kill(pid, signal.SIGKILL)
        try:
            process.wait(timeout=200)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"{name}, {victim}: it hangs: {said(run)}")
        output = said(run)
        what = f"{name}, {victim} at {max(curve(run), default=0)}, then {after}: exit code {process.returncode}: {output}"
        alone = pid == process.pid
        assert process.returncode in ((-9,) if alone else (0, 2, 137)), what
        assert "Traceback" not in output and output.count("error:") == (process.returncode not in (0, -9)), (
            what
        )
        deadline = time.monotonic() + 200
        while any(
            Path(f"/proc/{one}/cmdline").exists() and Path(f"/proc/{one}/cmdline").read_bytes()
            for one in [*ranks, *made]
        ):
            assert time.monotonic() < deadline, f"{what}: processes are left"
            time.sleep(0.1)
    nproc, layout = LAYOUTS[after]
    train(ground, run, *keys, *layout, nproc=nproc)
    assert_same(curve(run), curve(longer))
