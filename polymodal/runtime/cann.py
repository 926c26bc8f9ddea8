"""Ascend's software on this machine: its toolkit, and the command that prepares a shell for it.

Standard library only; reads the file system and the environment, runs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOTS = ("/usr/local/Ascend", "/usr/local/npu", "~/Ascend")
PARTS = ("cann", "ascend-toolkit", "ascend-toolkit/latest", "nnae", "nnae/latest", "latest")
VERSION_FILES = (
    "version.cfg",
    "version.info",
    "ascend_toolkit_install.info",
    "compiler/version.info",
    "runtime/version.info",
)


@dataclass(frozen=True)
class Cann:
    """The scripts of Ascend's software that prepare a shell, and whether this shell is prepared."""

    toolkit: Path | None
    atb: Path | None
    version: str | None
    sourced: bool

    @property
    def command(self) -> str:
        """The command that prepares a shell; "" when nothing is installed."""
        return " && ".join(f"source {script}" for script in (self.toolkit, self.atb) if script)


def find_cann(roots: tuple[str, ...] = ROOTS, environ: Mapping[str, str] | None = None) -> Cann:
    """Looks for set_env.sh under ASCEND_HOME_PATH (when set) and the usual roots."""
    environ = os.environ if environ is None else environ
    home = environ.get("ASCEND_HOME_PATH", "")
    bases = [Path(root).expanduser() for root in roots]
    own = [Path(home), Path(home).parent] if home else []
    toolkit = _first_file([*own, *(base / part for base in bases for part in PARTS)], "set_env.sh")
    beside = list(toolkit.resolve().parents[1:3]) if toolkit else []
    atb = _first_file([*bases, *beside], "nnal/atb/set_env.sh")
    sourced = bool(home) and home.rstrip("/") in environ.get("LD_LIBRARY_PATH", "")
    return Cann(toolkit, atb, _version(toolkit.parent) if toolkit else None, sourced)


def _first_file(directories: list[Path], name: str) -> Path | None:
    return next((directory / name for directory in directories if (directory / name).is_file()), None)


def _version(directory: Path) -> str | None:
    """As the toolkit's own files have it: "runtime_running_version=[1.2:8.2.RC1]" -> "8.2.RC1"."""
    line = re.compile(
        r"^\s*(?:(?:runtime|toolkit)_running_)?version\s*=\s*\[?(?:.*:)?([^:\]\s]+)", re.M | re.I
    )
    for name in VERSION_FILES:
        file = directory / name
        if file.is_file() and (match := line.search(file.read_text(errors="replace"))):
            return match[1]
    return None
