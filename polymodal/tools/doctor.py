"""The pre-flight list: is this machine fit to train, and if not, what fixes it.

Each check gives rows: ok, warn or fail, what was found, and the fix (doctor.yaml). Only failures make the
exit code 1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from polymodal.core.errors import PolymodalError
from polymodal.core.redaction import redact
from polymodal.core.terminal import console, say, say_lines, styled
from polymodal.core.text import format_bytes
from polymodal.runtime import device, environment, host
from polymodal.runtime.process_group import DEFAULT_PORT

Verdict = Literal["ok", "warn", "fail"]
FIXES: dict[str, str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    verdict: Verdict
    found: str
    mend: str = ""


def row(what: str, found: str, good: bool, fix: str, otherwise: Verdict = "warn", **facts: object) -> Row:
    """ok, else `otherwise` with the fix of this name. facts: what the fix is filled with."""
    return Row(what, "ok", found) if good else Row(what, otherwise, found, FIXES[fix].format(**facts))


def free(space: host.Space) -> str:
    return f"{format_bytes(space.free)} free of {format_bytes(space.total)}"


def packages() -> Iterator[Row]:
    """The interpreter, and every dependency against the range that this release declares."""
    yield row("python", platform.python_version(), sys.version_info >= (3, 10), "python", "fail")
    try:
        declared = importlib.metadata.requires("polymodal") or []
    except importlib.metadata.PackageNotFoundError:
        yield row("polymodal", "not installed", False, "polymodal", "fail")
        return
    for needed in map(Requirement, declared):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        name, good = f"{needed.name}{needed.specifier}", False
        try:
            found = importlib.metadata.version(needed.name)
            good = needed.specifier.contains(found, prereleases=True)
            found += "" if good else f", {needed.specifier} is needed"
        except importlib.metadata.PackageNotFoundError:
            found = f"missing, {needed.specifier or 'any'} is needed"
        yield row(needed.name, found, good, "package", "fail", name=name)


def devices() -> Iterator[Row]:
    """Accelerators with their names and memory, and Ascend's software."""
    import torch

    for found in device.survey():
        yield Row(*found)  # type: ignore[arg-type]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Row("cpu", "ok", f"{cores} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
    memory = host.memory()
    if memory is not None:
        yield row("memory", free(memory), memory.free >= 4 * host.GIB, "memory")


def backend(name: str, processes: int, seconds: float = 120) -> Row:
    """A sum over `processes` real processes with one backend."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.path.isdir("/sys/class/net/lo"):
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    began = time.perf_counter()
    module = [sys.executable, "-m", "polymodal.tools.backend_probe"]
    commands = [[*module, str(rank), str(processes), port, name] for rank in range(processes)]
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    started = [subprocess.Popen(c, env=environ, stdout=quiet, stderr=pipe, text=True) for c in commands]
    problems = []
    try:
        for process in started:
            try:
                _, errors = process.communicate(timeout=max(1.0, seconds - (time.perf_counter() - began)))
            except subprocess.TimeoutExpired:
                problems.append(f"no answer within {seconds:.0f} s")
                continue
            if process.returncode:
                lines = [line for line in errors.splitlines() if line.strip()]
                problems.append(lines[-1][:200] if lines else f"exit code {process.returncode}")
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    found = f"{processes} processes agree, {time.perf_counter() - began:.1f} s with their start"
    return row(f"all-reduce {name}", problems[0] if problems else found, not problems, "backend", "fail")


def backends() -> Iterator[Row]:
    """A tiny all-reduce on gloo, and on the accelerator's own backend when there is one."""
    import torch.distributed as dist

    if not dist.is_available():
        yield row("torch.distributed", "not in this build of torch", False, "torch.distributed", "fail")
        return
    for name, processes in device.backends():
        yield backend(name, processes)


def shared_memory() -> Iterator[Row]:
    """/dev/shm holds batches from data workers, and the ranks' own exchange."""
    space = host.shared_memory()
    if space is None:
        yield row("/dev/shm", "not on this system", False, "no_shared_memory")
    else:
        yield row("/dev/shm", free(space), space.free >= host.GIB, "shared_memory")


def ports() -> Iterator[Row]:
    """The default rendezvous port, and the one that MASTER_PORT names."""
    wanted = {DEFAULT_PORT: "default"}
    if (named := os.environ.get("MASTER_PORT", "")).isdigit():
        wanted[int(named)] = "MASTER_PORT"
    for port, name in wanted.items():
        good = host.port_free(port)
        found = f"free ({name})" if good else f"in use by {host.port_owner(port) or 'somebody'}"
        yield row(f"port {port}", found, good, "port")


def disks() -> Iterator[Row]:
    """Free space where runs, downloads and temporary files go, and whether they can be written."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hub = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    temporary = tempfile.gettempdir()
    for place, path, least in (("here", ".", 10), ("hub cache", hub, 20), ("temporary", temporary, 2)):
        space = host.space(path)
        if not os.access(space.path, os.W_OK):
            verdict: Verdict = "fail" if path == temporary else "warn"
            yield row(f"disk: {place}", f"not writable ({space.path})", False, "not_writable", verdict)
            continue
        found = f"{free(space)} ({Path(path).expanduser()})"
        yield row(f"disk: {place}", found, space.free >= least * host.GIB, "disk", least=least)


def limits() -> Iterator[Row]:
    """Open files (data workers keep many) and processes."""
    files, processes = host.open_files(), host.process_limit()
    if files is not None:
        good = not 0 < files[0] < 4096
        yield row("open files", f"limit {files[0]}, at most {files[1]}", good, "open_files")
    if processes is not None:
        yield row("processes", f"limit {processes}", processes >= 1024, "processes")


def clock() -> Iterator[Row]:
    """Nodes compare times of files and errors: a wrong clock misleads."""
    now = time.time()
    with tempfile.NamedTemporaryFile(dir="." if os.access(".", os.W_OK) else None, prefix=".clock-") as file:
        skew = os.stat(file.name).st_mtime - now
    utc = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if abs(skew) > 2:
        yield row("clock", f"{utc}; the file server's is {skew:+.0f} s off", False, "file_clock")
        return
    synchronised = host.clock_synchronised()
    counts = (os.environ.get(name, "1") for name in ("NNODES", "PET_NNODES", "SLURM_JOB_NUM_NODES"))
    several = any(count not in ("", "1") for count in counts)
    words = {True: "synchronised", False: "not kept by NTP", None: "cannot be asked"}
    found = f"{utc}, {words[synchronised]}"
    if not several and not synchronised:
        found += "; with several nodes compare `date -u`"
    yield row("clock", found, bool(synchronised) or not several, "clock")


def variables() -> Iterator[Row]:
    """What is set of the documented variables, each against its range."""
    for name, variable in environment.VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            continue
        try:
            variable.check(value)
            yield Row(name, "ok", redact(value))
        except PolymodalError as error:
            yield Row(name, "warn", redact(f"{value}: {error.message}"), redact(error.hint))


def _open_to_others(path: Path) -> str:
    """Why other users could put files into a directory or replace it; "" when they cannot."""
    try:
        status = path.stat()
    except OSError:
        return ""
    if status.st_uid not in (0, os.getuid()):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return f"everybody may write in {path}"
    return ""


UNSAFE = {"torch": "2.6", "pillow": "11.3", "jinja2": "3.1.6"}
"""Releases before these have holes that files can open (weights: CVE-2025-32434; pictures: CVE-2025-48379;
templates: CVE-2025-27516)."""
UNSAFE_VARIABLES = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "DIFFUSERS_TRUST_REMOTE_KERNELS")


def safety() -> Iterator[Row]:
    """What lets others on this machine or on its network act as this user: see docs/security.md."""
    root = os.getuid() == 0
    yield row("user", "root" if root else f"user {os.getuid()}", not root, "root")
    temporary = Path(tempfile.gettempdir())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    for what, place in (("temporary files", temporary), ("hub cache", hub), ("cache", cache / "polymodal")):
        why = _open_to_others(place)
        yield row(what, why or str(place), not why, "open_directory")
    entries = os.environ["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in os.environ else []
    odd = [f"PYTHONPATH has the working directory ({each})" for each in entries if each in (".", os.getcwd())]
    odd += [why for each in sys.path if each and (why := _open_to_others(Path(each)))]
    yield row("modules", odd[0] if odd else "from directories of this user and of root", not odd, "modules")
    os.umask(mask := os.umask(0o077))
    yield row("umask", f"{mask:03o}", bool(mask & 0o002), "umask")
    for name, least in UNSAFE.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            good = Version(found := importlib.metadata.version(name)) >= Version(least)
            yield row(name, f"{found}, safe from {least} on", good, "unsafe", name=name)
    for name in UNSAFE_VARIABLES:
        if os.environ.get(name, "").lower() in ("1", "y", "yes", "true", "on"):
            yield row(name, "set", False, "unsafe_variable", name=name)
    reachable = sorted(host.open_ports())
    shown = ", ".join(map(str, reachable[:8])) + (" ..." if len(reachable) > 8 else "")
    own = str(DEFAULT_PORT), os.environ.get("MASTER_PORT", "")
    good = not any(str(port) in own for port in reachable)
    yield row("ports", f"open: {shown}" if shown else "none open to a network", good, "open_ports")


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
    "Safety": safety,
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
            rows.append(row(name.lower(), why, False, "broken_check", "fail"))
    return found


def show_environment(as_json: bool) -> int:
    """`doctor --env`: the documented variables with range, default, what is set and what it means."""
    listed = environment.VARIABLES.values()
    if as_json:
        facts = [
            {
                "name": variable.name,
                "what": variable.what,
                "range": variable.allowed,
                "default": variable.default,
                "now": redact(os.environ.get(variable.name, "")) or None,
                "set_in": "shell" if variable.shell else "device.env",
            }
            for variable in listed
        ]
        say_lines(json.dumps(facts, indent=2), "\n")
        return 0
    shown = console()
    shown.print("Environment variables for device.env in the recipe; those marked * are set in the shell.")
    for variable in listed:
        words = [variable.allowed, f"default {variable.default}" if variable.default else ""]
        now = os.environ.get(variable.name)
        words.append(f"now {redact(now)}" if now else "")
        mark = "*" if variable.shell else ""
        shown.print(styled((variable.name, "bold"), f"{mark}  {', '.join(filter(None, words))}"))
        shown.print(styled((f"    {variable.what}", "dim")))
    return 0


def main(env: bool = False, as_json: bool = False) -> int:
    """The command: prints the list; 1 when something failed."""
    from rich.table import Table

    if env:
        return show_environment(as_json)
    found = examine()
    verdicts = [row.verdict for rows in found.values() for row in rows]
    failed = verdicts.count("fail")
    if as_json:
        checks = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        say_lines(json.dumps({"ok": not failed, "checks": checks}, indent=2), "\n")
        return 1 if failed else 0
    verdict = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
    table = Table(box=None, padding=(0, 1), show_header=False)
    for options in ({"no_wrap": True}, {"no_wrap": True}, {"overflow": "fold"}):
        table.add_column(**options)  # type: ignore[arg-type]
    for name, rows in found.items():
        if rows:
            table.add_row(styled((name, "bold")), "", "")
        for each in rows:
            found_and_mend = styled(each.found, (f"\n{each.mend}" if each.mend else "", "dim"))
            table.add_row(f"  {each.what}", styled(verdict[each.verdict]), found_and_mend)
    console().print(table)
    warned = verdicts.count("warn")
    say(
        f"{verdicts.count('ok')} ok, {warned} warning{'s' * (warned != 1)}, "
        f"{failed} failure{'s' * (failed != 1)}"
    )
    return 1 if failed else 0
