"""The pre-flight list: is this machine fit to train, and if not, what mends it.

Sees the ground floor; the device's own facts come from device.py. Each check answers with one row: ok, warn or fail,
what was found, and the mend. Only failures make the exit code 1.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
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
from polymodal.runtime import device, host

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    verdict: Verdict
    found: str
    mend: str = ""


def packages() -> Iterator[Row]:
    """The interpreter, and every dependency against the range that this release declares."""
    from packaging.requirements import Requirement

    version = platform.python_version()
    yield Row(
        "python",
        "ok" if sys.version_info >= (3, 10) else "fail",
        version,
        "" if sys.version_info >= (3, 10) else "Use Python 3.10 or newer.",
    )
    try:
        declared = importlib.metadata.requires("polymodal") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row("polymodal", "fail", "not installed", "Run `pip install -e .` in the repository.")
        return
    for text in declared:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = str(requirement.specifier)
        try:
            have = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Row(
                requirement.name,
                "fail",
                f"missing, {wanted or 'any'} is needed",
                f"Run `pip install '{requirement.name}{wanted}'`.",
            )
            continue
        if requirement.specifier.contains(have, prereleases=True):
            yield Row(requirement.name, "ok", have)
        else:
            yield Row(
                requirement.name,
                "fail",
                f"{have}, {wanted} is needed",
                f"Run `pip install '{requirement.name}{wanted}'`.",
            )


def devices() -> Iterator[Row]:
    """Accelerators with their names and memory, and Ascend's software."""
    import torch

    for name, verdict, found, mend in device.survey():
        yield Row(name, verdict, found, mend)  # type: ignore[arg-type]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Row("cpu", "ok", f"{cores} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    memory = host.memory()
    if memory is not None:
        low = memory.free < 4 * host.GIB
        yield Row(
            "memory",
            "warn" if low else "ok",
            f"{format_bytes(memory.free)} free of {format_bytes(memory.total)}",
            "Less than 4 GiB: close other programs, or lower data.workers and data.memory_budget."
            if low
            else "",
        )


PROBE = """
import sys, datetime
import torch, torch.distributed as dist
from polymodal.runtime import device
rank, world, port, backend = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = dist.TCPStore("127.0.0.1", port, world, rank == 0, datetime.timedelta(seconds=90))
where = device.find("cpu" if backend == "gloo" else "auto", rank).torch
dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90))
value = torch.full((1024,), rank + 1.0, device=where)
dist.all_reduce(value)
assert value.eq(world * (world + 1) / 2).all(), value
dist.destroy_process_group()
"""


def backend(name: str, processes: int, seconds: float = 120) -> Row:
    """A sum over `processes` real processes with one backend."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.path.isdir("/sys/class/net/lo"):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    began = time.perf_counter()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROBE, str(rank), str(processes), str(port), name],
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
            left = max(1.0, seconds - (time.perf_counter() - began))
            try:
                _, said = process.communicate(timeout=left)
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
    title = f"all-reduce {name}"
    if problems:
        return Row(
            title,
            "fail",
            problems[0],
            "See the network interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME), the driver, and a firewall on the loopback.",
        )
    return Row(
        title, "ok", f"{processes} processes agree, {time.perf_counter() - began:.1f} s with their start"
    )


def backends() -> Iterator[Row]:
    """A tiny all-reduce on gloo, and on the accelerator's own backend when there is one."""
    import torch.distributed as dist

    if not dist.is_available():
        yield Row(
            "torch.distributed",
            "fail",
            "not in this build of torch",
            "Install a build of torch with distributed support.",
        )
        return
    for name, processes in device.backends():
        yield backend(name, processes)


def shared_memory() -> Iterator[Row]:
    """/dev/shm carries batches from data workers, and the ranks' own exchange."""
    space = host.shared_memory()
    if space is None:
        yield Row("/dev/shm", "warn", "not on this system", "Data workers use slower copies.")
        return
    low = space.free < host.GIB
    yield Row(
        "/dev/shm",
        "warn" if low else "ok",
        f"{format_bytes(space.free)} free of {format_bytes(space.total)}",
        "Start the container with --ipc=host or --shm-size=16g, or set data.workers to 0." if low else "",
    )


def ports() -> Iterator[Row]:
    """The default rendezvous port, and the one that MASTER_PORT names."""
    from polymodal.runtime.process_group import DEFAULT_PORT

    named = os.environ.get("MASTER_PORT", "")
    for port, name in {
        **{DEFAULT_PORT: "default"},
        **({int(named): "MASTER_PORT"} if named.isdigit() else {}),
    }.items():
        if host.port_free(port):
            yield Row(f"port {port}", "ok", f"free ({name})")
        else:
            owner = host.port_owner(port) or "somebody"
            yield Row(
                f"port {port}",
                "warn",
                f"in use by {owner}",
                "Several nodes: end that process or set MASTER_PORT. One node: a free port is chosen by itself.",
            )


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
        writable = os.access(space.path, os.W_OK)
        found = f"{format_bytes(space.free)} free of {format_bytes(space.total)} ({Path(path).expanduser()})"
        if not writable:
            yield Row(
                title,
                "fail" if title == "disk: temporary" else "warn",
                f"not writable ({space.path})",
                "Work in a directory that you may write, or set TMPDIR or HF_HOME.",
            )
        elif space.free < least * host.GIB:
            yield Row(
                title,
                "warn",
                found,
                f"Less than {least} GiB: checkpoints may not fit; free some, or set checkpoint.dir, HF_HOME or TMPDIR to another disk.",
            )
        else:
            yield Row(title, "ok", found)


def limits() -> Iterator[Row]:
    """Open files (data workers keep many), and locked memory (network cards register theirs)."""
    files = host.open_files()
    if files is not None:
        low = 0 < files[0] < 4096
        yield Row(
            "open files",
            "warn" if low else "ok",
            f"limit {files[0]}, at most {files[1]}",
            "Run `ulimit -n 65536` before starting." if low else "",
        )
    processes = host.process_limit()
    if processes is not None:
        low = processes < 1024
        yield Row(
            "processes",
            "warn" if low else "ok",
            f"limit {processes}",
            "Run `ulimit -u 65536`, or raise the container's --pids-limit." if low else "",
        )


def clock() -> Iterator[Row]:
    """Nodes compare times of files and errors: a wrong clock misleads."""
    now = time.time()
    with (
        tempfile.NamedTemporaryFile(dir=".", prefix=".clock-")
        if os.access(".", os.W_OK)
        else tempfile.NamedTemporaryFile() as file
    ):
        skew = os.stat(file.name).st_mtime - now
    synchronised = host.clock_synchronised()
    utc = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if abs(skew) > 2:
        yield Row(
            "clock",
            "warn",
            f"{utc}; the file server's is {skew:+.0f} s off",
            "Let NTP or chrony set both clocks.",
        )
        return
    several = any(
        (os.environ.get(name) or "1") != "1" for name in ("NNODES", "PET_NNODES", "SLURM_JOB_NUM_NODES")
    )
    known = {True: "synchronised", False: "not kept by NTP", None: "cannot be asked"}[synchronised]
    if several and not synchronised:
        yield Row(
            "clock", "warn", f"{utc}, {known}", "Start NTP or chrony, and compare `date -u` on all nodes."
        )
    else:
        yield Row(
            "clock",
            "ok",
            f"{utc}, {known}" + ("" if synchronised else "; with several nodes compare `date -u`"),
        )


def environment() -> Iterator[Row]:
    """What is set of the documented variables, each against its range."""
    for variable in device.ENVIRONMENT:
        value = os.environ.get(variable.name)
        if value is None:
            continue
        try:
            if variable.by == "recipe":
                device.checked_variable(variable.name, value)
            elif variable.low is not None and not (
                value.isdigit() and variable.low <= int(value) <= (variable.high or int(value))
            ):
                raise PolymodalError(f"{value} is outside its range, {variable.range}.")
        except PolymodalError as error:
            yield Row(
                variable.name,
                "warn",
                f"{value}: {error.message.removeprefix('device.env: ')}",
                error.hint or f"It means: {variable.what}.",
            )
        else:
            yield Row(variable.name, "ok", value)


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "Software": packages, "Devices": devices, "Communication": backends, "Shared memory": shared_memory, "Ports": ports,
    "Disks": disks, "Limits": limits, "Clock": clock, "Environment": environment,
}  # fmt: skip


def examine(names: list[str] | None = None) -> dict[str, list[Row]]:
    """All checks (or those of `names`) by group. A check that breaks is itself a failure, never an exception."""
    found = {}
    for name in names or CHECKS:
        rows: list[Row] = []
        try:
            rows.extend(CHECKS[name]())
        except Exception as error:
            rows.append(
                Row(
                    name.lower(),
                    "fail",
                    f"the check itself failed: {type(error).__name__}: {error}",
                    "Please report this.",
                )
            )
        found[name] = rows
    return found


def environment_lines() -> Iterator[str]:
    """The documented variables with range, default, what is set and what it means, in rich's markup."""
    from rich.markup import escape

    yield "Environment variables for [bold]device.env[/bold] in the recipe; those marked * are set in the shell."
    for variable in device.ENVIRONMENT:
        now = os.environ.get(variable.name)
        facts = [
            escape(variable.range),
            f"default {variable.default}" if variable.default else "",
            f"[green]now {escape(now)}[/green]" if now else "",
        ]
        yield f"[bold]{variable.name}[/bold]{'*' if variable.by == 'start' else ''}  {', '.join(fact for fact in facts if fact)}"
        yield f"    [dim]{escape(variable.what)}[/dim]"


def main(env: bool = False, as_json: bool = False) -> int:
    """The command: prints the list; 1 when something failed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if env:
        if as_json:
            listed = [
                {
                    "name": v.name,
                    "what": v.what,
                    "range": v.range,
                    "default": v.default,
                    "now": os.environ.get(v.name),
                    "set_in": "shell" if v.by == "start" else "device.env",
                }
                for v in device.ENVIRONMENT
            ]
            print(json.dumps(listed, indent=2))
        else:
            for line in environment_lines():
                console.print(line, highlight=False)
        return 0
    found = examine()
    verdicts = [row.verdict for rows in found.values() for row in rows]
    failed = verdicts.count("fail")
    if as_json:
        print(
            json.dumps(
                {
                    "ok": not failed,
                    "checks": {name: [asdict(row) for row in rows] for name, rows in found.items()},
                },
                indent=2,
            )
        )
        return 1 if failed else 0
    style = {"ok": "[green]ok[/green]", "warn": "[yellow]warn[/yellow]", "fail": "[bold red]FAIL[/bold red]"}
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, rows in found.items():
        if rows:
            table.add_row(f"[bold]{name}[/bold]", "", "")
        for row in rows:
            mend = f"\n[dim]{escape(row.mend)}[/dim]" if row.mend else ""
            table.add_row(f"  {escape(row.what)}", style[row.verdict], escape(row.found) + mend)
    console.print(table)
    console.print(f"{verdicts.count('ok')} ok, {verdicts.count('warn')} warnings, {failed} failures")
    return 1 if failed else 0
