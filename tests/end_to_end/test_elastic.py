"""Elastic restart: after a killed process or node, training goes on from the last checkpoint, same curve."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.processes import workers
from tests.end_to_end.test_training import ENVIRONMENT, assert_same, curve, ground, train, words  # noqa: F401

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 40
"""So many that training is not over before this test, on a busy machine, kills something."""
EVERY_STEP = "checkpoint.every=1 checkpoint.keep=100 checkpoint.asynchronous=false"


@pytest.fixture(scope="module")
def straight(ground, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("straight") / "run"
    train(ground, run, f"train.steps={STEPS}")
    return run


def command_of(ground: Path, run: Path, options: str) -> list[str]:  # noqa: F811
    overrides = [f"train.steps={STEPS}", f"checkpoint.dir={run}", *EVERY_STEP.split()]
    return words("train", str(ground / "recipe.yaml"), *options.split(), *overrides)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(what: str, true: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline, f"it did not come: {what}"
        assert any(process.poll() is None for process in processes), f"all ended before {what}"
        time.sleep(0.02)


def newest(run: Path) -> int:
    """Step of the newest whole checkpoint, 0 without one."""
    found = [path.name for path in (run / "checkpoints").glob("step-*")] if run.is_dir() else []
    return max((int(name.removeprefix("step-")) for name in found), default=0)


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    wait_until(f"step {step}", lambda: newest(run) >= step, processes)


def test_a_killed_process_leads_to_a_restart(ground, straight, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    command = command_of(ground, run, "--nproc 2 --restarts 2")
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 3, [process])
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    _, output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "starting again from the newest checkpoint: rank 1 ended with exit code -9" in output
    assert_same(curve(run), curve(straight))
    assert json.loads((run / "summary.json").read_text())["resumed_at"] >= 3


def test_a_killed_node_leads_to_a_smaller_world(ground, straight, tmp_path):  # noqa: F811
    """Two "nodes" of one process; the second loses its process, then dies whole with its agent."""
    run = tmp_path / "run"
    port = free_port()
    nodes = []
    for rank in range(2):
        rendezvous = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ = {**ENVIRONMENT, **rendezvous, "NODE_RANK": str(rank)}
        command = command_of(ground, run, "--nproc 1 --restarts 5 --min-nodes 1")
        log = (tmp_path / f"node{rank}.log").open("w")
        nodes.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True))
    try:
        wait_for_step(run, 2, nodes)
        first = workers(nodes[1].pid)
        os.kill(first[0], signal.SIGKILL)
        wait_until("the second node's new process", lambda: workers(nodes[1].pid) not in ([], first), nodes)
        again = newest(run)  # the first node may have gone on alone until then
        wait_for_step(run, again + 2, nodes)
        os.killpg(nodes[1].pid, signal.SIGKILL)
        assert nodes[0].wait(timeout=300) == 0, (tmp_path / "node0.log").read_text()
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    output = (tmp_path / "node0.log").read_text()
    assert output.count("starting again from the newest checkpoint") >= 2
    assert_same(curve(run), curve(straight))
    assert json.loads((run / "summary.json").read_text())["resumed_at"] >= again + 2


LATE = """
import os, signal, sys, torch.distributed as dist
from datetime import timedelta
from polymodal.runtime import launcher
launcher.enter_child()
if os.environ["NODE"] == "1":  # this node met the other, and dies before its process joins the group
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()
dist.init_process_group("gloo", timeout=timedelta(seconds=600))
print("world", dist.get_world_size(), flush=True)
"""
NODE = """
import os, sys
from polymodal.runtime import launcher, process_group
start = process_group.LaunchRequest(1, int(os.environ["NODE"]), 2, "127.0.0.1", int(os.environ["PORT"]))
raise SystemExit(launcher.run([os.environ["LATE"]], start, restarts=1, min_nodes=1))
"""


def test_a_node_that_dies_before_the_group_is_there_is_not_waited_for(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    (tmp_path / "node.py").write_text(NODE)
    environ = {
        **ENVIRONMENT,
        "PORT": str(free_port()),
        "LATE": str(tmp_path / "late.py"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(tmp_path / "node.py")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, env={**environ, "NODE": node}, **output) for node in "01"]
    try:
        text, _ = both[0].communicate(timeout=200)
        assert both[0].returncode == 0, text
        assert "world 1" in text
        assert "starting again from the newest checkpoint: the number of nodes changed" in text
        assert both[1].wait(timeout=60) == -signal.SIGKILL
    finally:
        for process in both:
            process.kill()
