"""Ascend's software on this machine: where its toolkit lies, and the line that prepares a shell for it.

Ground floor: standard library only; reads the file system and the environment, runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOTS = ("/usr/local/Ascend", "/usr/local/npu", "~/Ascend")
PARTS = ("cann", "ascend-toolkit", "ascend-toolkit/latest", "nnae", "nnae/latest", "latest")


@dataclass(frozen=True)
class Cann:
    """What is found of Ascend's software: the scripts to source, and whether this shell already did."""

    toolkit: Path | None
    atb: Path | None
    version: str | None
    sourced: bool

    @property
    def line(self) -> str:
        """The command that prepares a shell; "" when nothing is installed."""
        return " && ".join(f"source {script}" for script in (self.toolkit, self.atb) if script)


def find_cann(roots: tuple[str, ...] = ROOTS, environ: Mapping[str, str] | None = None) -> Cann:
    """Looks for set_env.sh under ASCEND_HOME_PATH (when set) and the usual roots."""
    environ = os.environ if environ is None else environ
    home = environ.get("ASCEND_HOME_PATH", "")
    bases = [Path(root).expanduser() for root in roots]
    places = [Path(home), Path(home).parent] * bool(home) + [base / part for base in bases for part in PARTS]
    toolkit = next((p / "set_env.sh" for p in places if (p / "set_env.sh").is_file()), None)
    beside = [toolkit.resolve().parent.parent, toolkit.resolve().parent.parent.parent] if toolkit else []
    atb = next(
        (p / "nnal/atb/set_env.sh" for p in [*bases, *beside] if (p / "nnal/atb/set_env.sh").is_file()), None
    )
    version = None
    for name in (
        "version.cfg",
        "version.info",
        "ascend_toolkit_install.info",
        "compiler/version.info",
        "runtime/version.info",
    ):
        file = toolkit.parent / name if toolkit else None
        if file is not None and file.is_file():
            for row in file.read_text(errors="replace").splitlines():
                key, _, value = row.partition("=")
                if key.strip().lower() in ("version", "runtime_running_version", "toolkit_running_version"):
                    version = value.strip().strip("[]").rpartition(":")[2] or None
                    break
        if version:
            break
    libraries = environ.get("LD_LIBRARY_PATH", "")
    return Cann(toolkit, atb, version, bool(home) and bool(libraries) and home.rstrip("/") in libraries)
