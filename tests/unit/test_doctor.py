"""The pre-flight list: real checks on this machine, and each finding's hint when something is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from polymodal.runtime import cann as cann_module
from polymodal.runtime import environment, host
from polymodal.tools import doctor


def rows(name: str) -> dict[str, doctor.Row]:
    return {row.what: row for row in doctor.examine([name])[name]}


def test_this_environment_is_as_declared():
    found = rows("Software")
    assert {"python", "torch", "transformers", "pydantic"} <= set(found)
    assert [row for row in found.values() if row.verdict == "fail"] == []


def test_a_package_out_of_range_and_a_missing_one_are_failures(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda _: ["torch>=99", "no-such-package-at-all>=1", 'wandb; extra == "wandb"'],
    )
    found = rows("Software")
    assert found["torch"].verdict == "fail" and found["torch"].mend == "Run `pip install 'torch>=99'`."
    assert found["no-such-package-at-all"].found == "missing, >=1 is needed"
    assert "wandb" not in found


def test_two_processes_agree_on_gloo():
    row = doctor.backend("gloo", 2)
    assert row.verdict == "ok" and row.found.startswith("2 processes agree"), row


@pytest.mark.slow
def test_a_backend_that_does_not_work_shows_its_last_line():
    row = doctor.backend("nccl", 1)
    if row.verdict == "ok":
        pytest.skip("has NCCL and a device")
    assert row.verdict == "fail" and row.found and "GLOO_SOCKET_IFNAME" in row.mend


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(host, "shared_memory", lambda: host.Space("/dev/shm", 64 * host.MIB, 60 * host.MIB))
    (row,) = rows("Shared memory").values()
    assert row.verdict == "warn" and row.found == "60.0 MiB free of 64.0 MiB" and "--shm-size=16g" in row.mend


def test_a_taken_port_names_its_owner(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        row = rows("Ports")[f"port {port}"]
        assert row.verdict == "warn" and f"process {os.getpid()}" in row.found
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert rows("Ports")[f"port {port}"].verdict == "ok"


def test_full_disks(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(host, "space", lambda path: host.Space(str(tmp_path), 100 * host.GIB, host.GIB))
    found = rows("Disks")
    assert {row.verdict for row in found.values()} == {"warn"}
    assert "Less than 20 GiB" in found["disk: hub cache"].mend


def test_environment_is_checked_against_the_table(monkeypatch):
    for variable in environment.VARIABLES.values():
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("NODE_RANK", "first")
    found = rows("Environment")
    assert found["TASK_QUEUE_ENABLE"] == doctor.Row("TASK_QUEUE_ENABLE", "ok", "2")
    assert (
        found["HCCL_CONNECT_TIMEOUT"].verdict == "warn"
        and "120 to 7,200" in found["HCCL_CONNECT_TIMEOUT"].found
    )
    assert found["NODE_RANK"].verdict == "warn"
    assert set(found) == {"TASK_QUEUE_ENABLE", "HCCL_CONNECT_TIMEOUT", "NODE_RANK"}


def test_what_is_unsafe_here_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path[1:]])
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    before = os.umask(0o022)
    try:
        found = rows("Safety")
        assert {
            found[what].verdict for what in ("temporary files", "hub cache", "cache", "modules", "umask")
        } == {"ok"}
        assert {found[what].verdict for what in ("torch", "pillow")} == {"ok"}
        os.umask(0)
        for path in (tmp_path, tmp_path / "hub", tmp_path / "modules"):
            path.chmod(0o777)
        monkeypatch.setenv("PYTHONPATH", f".:{tmp_path}/modules")
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        monkeypatch.setattr(doctor, "UNSAFE", {"torch": "99.1"})
        found = rows("Safety")
    finally:
        os.umask(before)
    assert os.umask(before) == before
    for what in (
        "temporary files",
        "hub cache",
        "modules",
        "umask",
        "torch",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    ):
        assert found[what].verdict == "warn" and found[what].mend, what
    assert f"everybody may write in {tmp_path}/hub" in found["hub cache"].found
    tmp_path.chmod(0o1777)  # as /tmp is
    assert rows("Safety")["temporary files"].verdict == "ok"


def test_a_port_that_is_open_to_the_network_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as inner, socket.create_server(("", 0)) as outer:
        ports = [each.getsockname()[1] for each in (inner, outer)]
        assert ports[0] not in host.open_ports() and ports[1] in host.open_ports()
        monkeypatch.setenv("MASTER_PORT", str(ports[1]))
        assert rows("Safety")["ports"].verdict == "warn"


def test_secrets_in_the_environment_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:marked-1@mirror")
    for as_json in (False, True):
        assert doctor.show_environment(as_json) == 0
        out = capsys.readouterr().out
        assert "mirror" in out and "marked-1" not in out
    assert "marked-1" not in rows("Environment")["HF_ENDPOINT"].found


def test_cann_that_is_not_sourced_comes_with_the_line(monkeypatch, tmp_path):
    (tmp_path / "cann").mkdir()
    (tmp_path / "cann/set_env.sh").write_text("")
    monkeypatch.setattr(cann_module.find_cann, "__defaults__", ((str(tmp_path),), {}))
    row = rows("Devices")["CANN"]
    assert row.verdict == "warn" and row.mend == f"Run: source {tmp_path}/cann/set_env.sh"


def test_the_clock_matters_with_several_nodes(monkeypatch):
    monkeypatch.setattr(host, "clock_synchronised", lambda: False)
    monkeypatch.delenv("NNODES", raising=False)
    assert rows("Clock")["clock"].verdict == "ok"
    monkeypatch.setenv("NNODES", "4")
    assert rows("Clock")["clock"].verdict == "warn"


def test_a_check_that_breaks_is_a_failure_not_a_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError("x")
        yield

    monkeypatch.setitem(doctor.CHECKS, "Clock", broken)
    (row,) = rows("Clock").values()
    assert row.verdict == "fail" and "ZeroDivisionError" in row.found


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"Clock": doctor.clock, "Limits": doctor.limits})


def test_exit_code_and_table(monkeypatch, capsys, quick):
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "0 failures" in out and max(map(len, out.splitlines())) <= 80
    monkeypatch.setattr(
        doctor,
        "CHECKS",
        {"Limits": lambda: iter([doctor.Row("open files", "fail", "limit [1]", "Correct [it].")])},
    )
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "limit [1]" in out and "Correct [it]." in out


def test_json(capsys, quick):
    assert doctor.main(as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True and said["checks"]["Clock"][0]["what"] == "clock"


def test_environment_listing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "600")
    assert doctor.main(env=True) == 0
    out = capsys.readouterr().out
    assert (
        "HCCL_EXEC_TIMEOUT  68 to 17,340, default 1800, now 600" in out
        and max(map(len, out.splitlines())) <= 80
    )
    assert doctor.main(env=True, as_json=True) == 0
    said = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert said["HCCL_EXEC_TIMEOUT"]["now"] == "600" and said["MASTER_ADDR"]["set_in"] == "shell"


def test_listing_the_environment_imports_no_torch():
    code = "import sys; from polymodal.tools import doctor; doctor.main(env=True); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
