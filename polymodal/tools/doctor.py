"""The pre-flight list: is this machine fit to train, and if not, what mends it.

Each check answers with rows: ok, warn or fail, what was found, and the mend. Only failures make the exit code
1.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_bytes
from polymodal.runtime import device, environment, host

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    verdict: Verdict
    found: str
    mend: str = ""


def row(what: str, found: str, good: bool, mend: str, otherwise: Verdict = "warn") -> Row:
    """ok without a mend when it is good, else `otherwise` with it."""
    return Row(what, "ok", found) if good else Row(what, otherwise, found, mend)


def free(space: host.Space) -> str:
    return f"{format_bytes(space.free)} free of {format_bytes(space.total)}"


def packages() -> Iterator[Row]:
    """The interpreter, and every dependency against the range that this release declares."""
    from packaging.requirements import Requirement

    yield row(
        "python", platform.python_version(), sys.version_info >= (3, 10), "Use Python 3.10 or newer.", "fail"
    )
    try:
        declared = importlib.metadata.requires("polymodal") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row("polymodal", "fail", "not installed", "Run `pip install -e .` in the repository.")
        return
    for text in declared:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        mend = f"Run `pip install '{needed.name}{needed.specifier}'`."
        try:
            have = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Row(needed.name, "fail", f"missing, {needed.specifier or 'any'} is needed", mend)
            continue
        good = needed.specifier.contains(have, prereleases=True)
        yield row(needed.name, have if good else f"{have}, {needed.specifier} is needed", good, mend, "fail")


def devices() -> Iterator[Row]:
    """Accelerators with their names and memory, and Ascend's software."""
    import torch

    for found in device.survey():
        yield Row(*found)  # type: ignore[arg-type]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Row("cpu", "ok", f"{cores} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    memory = host.memory()
    if memory is not None:
        mend = "Less than 4 GiB: close other programs, or lower data.workers and data.memory_budget."
        yield row("memory", free(memory), memory.free >= 4 * host.GIB, mend)


def backend(name: str, processes: int, seconds: float = 120) -> Row:
    """A sum over `processes` real processes with one backend."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.path.isdir("/sys/class/net/lo"):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    began = time.perf_counter()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "polymodal.tools.backend_probe",
                str(rank),
                str(processes),
                str(port),
                name,
            ],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    problems = []
    try:
        for process in started:
            try:
                _, said = process.communicate(timeout=max(1.0, seconds - (time.perf_counter() - began)))
            except subprocess.TimeoutExpired:
                problems.append(f"no answer within {seconds:.0f} s")
                continue
            if process.returncode:
                lines = [line for line in said.splitlines() if line.strip()]
                problems.append(lines[-1][:200] if lines else f"exit code {process.returncode}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    found = f"{processes} processes agree, {time.perf_counter() - began:.1f} s with their start"
    mend = (
        "See the network interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME), "
        "the driver, and a firewall on the loopback."
    )
    return row(f"all-reduce {name}", problems[0] if problems else found, not problems, mend, "fail")


def backends() -> Iterator[Row]:
    """A tiny all-reduce on gloo, and on the accelerator's own backend when there is one."""
    import torch.distributed as dist

    if not dist.is_available():
        mend = "Install a build of torch with distributed support."
        yield Row("torch.distributed", "fail", "not in this build of torch", mend)
        return
    for name, processes in device.backends():
        yield backend(name, processes)


def shared_memory() -> Iterator[Row]:
    """/dev/shm carries batches from data workers, and the ranks' own exchange."""
    space = host.shared_memory()
    if space is None:
        yield Row("/dev/shm", "warn", "not on this system", "Data workers use slower copies.")
        return
    mend = "Start the container with --ipc=host or --shm-size=16g, or set data.workers to 0."
    yield row("/dev/shm", free(space), space.free >= host.GIB, mend)


def ports() -> Iterator[Row]:
    """The default rendezvous port, and the one that MASTER_PORT names."""
    from polymodal.runtime.process_group import DEFAULT_PORT

    named = os.environ.get("MASTER_PORT", "")
    mend = "Several nodes: end that process or set MASTER_PORT. One node: a free port is chosen by itself."
    for port, name in {
        DEFAULT_PORT: "default",
        **({int(named): "MASTER_PORT"} if named.isdigit() else {}),
    }.items():
        good = host.port_free(port)
        found = f"free ({name})" if good else f"in use by {host.port_owner(port) or 'somebody'}"
        yield row(f"port {port}", found, good, mend)


def disks() -> Iterator[Row]:
    """Free space where runs, downloads and temporary files go, and whether they can be written."""
    hub = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    for title, path, least in (
        ("disk: here", ".", 10),
        ("disk: hub cache", hub, 20),
        ("disk: temporary", tempfile.gettempdir(), 2),
    ):
        space = host.space(path)
        if not os.access(space.path, os.W_OK):
            mend = "Work in a directory that you may write, or set TMPDIR or HF_HOME."
            verdict: Verdict = "fail" if title == "disk: temporary" else "warn"
            yield Row(title, verdict, f"not writable ({space.path})", mend)
            continue
        mend = (
            f"Less than {least} GiB: checkpoints may not fit; free some, or set checkpoint.dir, HF_HOME or "
            "TMPDIR to another disk."
        )
        yield row(title, f"{free(space)} ({Path(path).expanduser()})", space.free >= least * host.GIB, mend)


def limits() -> Iterator[Row]:
    """Open files (data workers keep many) and processes."""
    files = host.open_files()
    if files is not None:
        good = not 0 < files[0] < 4096
        yield row(
            "open files",
            f"limit {files[0]}, at most {files[1]}",
            good,
            "Run `ulimit -n 65536` before starting.",
        )
    processes = host.process_limit()
    if processes is not None:
        mend = "Run `ulimit -u 65536`, or raise the container's --pids-limit."
        yield row("processes", f"limit {processes}", processes >= 1024, mend)


def clock() -> Iterator[Row]:
    """Nodes compare times of files and errors: a wrong clock misleads."""
    now = time.time()
    with tempfile.NamedTemporaryFile(dir="." if os.access(".", os.W_OK) else None, prefix=".clock-") as file:
        skew = os.stat(file.name).st_mtime - now
    utc = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if abs(skew) > 2:
        found = f"{utc}; the file server's is {skew:+.0f} s off"
        yield Row("clock", "warn", found, "Let NTP or chrony set both clocks.")
        return
    synchronised = host.clock_synchronised()
    several = any(
        os.environ.get(name, "1") not in ("", "1") for name in ("NNODES", "PET_NNODES", "SLURM_JOB_NUM_NODES")
    )
    found = (
        f"{utc}, " + {True: "synchronised", False: "not kept by NTP", None: "cannot be asked"}[synchronised]
    )
    if not several and not synchronised:
        found += "; with several nodes compare `date -u`"
    good = bool(synchronised) or not several
    yield row("clock", found, good, "Start NTP or chrony, and compare `date -u` on all nodes.")


def variables() -> Iterator[Row]:
    """What is set of the documented variables, each against its range."""
    for variable in environment.VARIABLES.values():
        value = os.environ.get(variable.name)
        if value is None:
            continue
        try:
            variable.check(value)
        except PolymodalError as error:
            yield Row(variable.name, "warn", f"{value}: {error.message}", error.hint)
        else:
            yield Row(variable.name, "ok", value)


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "Software": packages,
    "Devices": devices,
    "Communication": backends,
    "Shared memory": shared_memory,
    "Ports": ports,
    "Disks": disks,
    "Limits": limits,
    "Clock": clock,
    "Environment": variables,
}


def examine(names: list[str] | None = None) -> dict[str, list[Row]]:
    """All checks (or those of `names`) by group. A check that breaks is itself a failure, never an
    exception."""
    found: dict[str, list[Row]] = {}
    for name in names or CHECKS:
        rows = found[name] = []
        try:
            rows.extend(CHECKS[name]())
        except Exception as error:
            why = f"the check itself failed: {type(error).__name__}: {error}"
            rows.append(Row(name.lower(), "fail", why, "Please report this."))
    return found


def environment_lines() -> Iterator[str]:
    """The documented variables with range, default, what is set and what it means, in rich's markup."""
    from rich.markup import escape

    yield "Environment variables for [bold]device.env[/bold] in the recipe; those marked * are set in the shell."
    for variable in environment.VARIABLES.values():
        now = os.environ.get(variable.name)
        facts = [
            escape(variable.allowed),
            f"default {variable.default}" if variable.default else "",
            f"[green]now {escape(now)}[/green]" if now else "",
        ]
        yield f"[bold]{variable.name}[/bold]{'*' * variable.shell}  {', '.join(fact for fact in facts if fact)}"
        yield f"    [dim]{escape(variable.what)}[/dim]"


def show_environment(as_json: bool) -> int:
    """`doctor --env`."""
    from rich.console import Console

    if as_json:
        listed = [
            {
                "name": v.name,
                "what": v.what,
                "range": v.allowed,
                "default": v.default,
                "now": os.environ.get(v.name),
                "set_in": "shell" if v.shell else "device.env",
            }
            for v in environment.VARIABLES.values()
        ]
        print(json.dumps(listed, indent=2))
        return 0
    console = Console()
    for line in environment_lines():
        console.print(line, highlight=False)
    return 0


def main(env: bool = False, as_json: bool = False) -> int:
    """The command: prints the list; 1 when something failed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if env:
        return show_environment(as_json)
    found = examine()
    verdicts = [row.verdict for rows in found.values() for row in rows]
    failed = verdicts.count("fail")
    if as_json:
        checks = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        print(json.dumps({"ok": not failed, "checks": checks}, indent=2))
        return 1 if failed else 0
    style = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[bold red]FAIL[/bold red]"}
    table = Table(box=None, padding=(0, 1), show_header=False)
    for options in ({"no_wrap": True}, {"no_wrap": True}, {"overflow": "fold"}):
        table.add_column(**options)  # type: ignore[arg-type]
    for name, rows in found.items():
        if rows:
            table.add_row(f"[bold]{name}[/bold]", "", "")
        for each in rows:
            mend = f"\n[dim]{escape(each.mend)}[/dim]" if each.mend else ""
            table.add_row(f"  {escape(each.what)}", style[each.verdict], escape(each.found) + mend)
    console = Console()
    console.print(table)
    console.print(f"{verdicts.count('ok')} ok, {verdicts.count('warn')} warnings, {failed} failures")
    return 1 if failed else 0
