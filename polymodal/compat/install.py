"""`polymodal-compat install DIR`: thin files of the documented names, each of which runs its entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import say

ENTRIES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "entries.yaml").read_text(encoding="utf-8"))
MARK = "Written by `polymodal-compat install`"
# Nothing is imported from the file's own directory: a checkout has a megatron/ and a mindspeed_mm/ there.
# Data workers import the file again, under another name than __main__.
TEXT = '''"""{mark}: {name} of the documents, run by polymodal."""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    from polymodal.compat.command import entry

    entry({arguments})
'''


def text(name: str, tree: bool) -> str:
    """The file of an entry."""
    arguments = ", ".join(f'"{word}"' for word in (name, *(["--tree"] if tree else [])))
    return TEXT.format(mark=MARK, name=name, arguments=arguments)


def main(directory: Path, tree: bool, force: bool) -> int:
    """Write them. Raises PolymodalError, before anything is written, where a file has such a name already."""
    others = [name for name in ENTRIES["files"] if not _ours(directory / name)]
    if others and not force:
        raise PolymodalError(
            f"{directory / others[0]} exists already, and was not written by `polymodal-compat install` "
            f"(like {len(others) - 1} others).",
            "Name another directory, or replace them with --force.",
        )
    for name in ENTRIES["files"]:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text(name, tree))
    say(
        f"{directory}: {len(ENTRIES['files'])} files; call the documents' lines from there, e.g. `torchrun "
        "$DISTRIBUTED_ARGS pretrain_vlm.py $GPT_ARGS $MM_ARGS $OUTPUT_ARGS`"
    )
    return 0


def _ours(path: Path) -> bool:
    """Whether a path is free, or holds a file that was installed."""
    if not path.exists():
        return True
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")[: 2 * len(MARK)]
