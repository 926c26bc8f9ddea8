"""A pipeline's directory (model_index.json above its parts) in place of one transformer: Wan 2.2 has two experts.

Which parts are meant, and one action for all of them; sees the readers only.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from polymodal.convert import reading, tree
from polymodal.convert.options import Settings

EXPERTS = ("transformer", "transformer_2")


def parts(source: Path) -> list[str]:
    """The transformers below a directory that holds no weights itself; none for any other directory."""
    names = [name for name in EXPERTS if (source / name).is_dir()]
    own = reading.is_dcp(source) or tree.is_tree(source) or (source / tree.TRACKER).is_file()
    return [] if not names or own or any(source.glob("*.safetensors")) else names


def inside(path: Path, name: str) -> Path:
    """The part of that name, if the path is a pipeline's directory too; else the path."""
    return path / name if (path / name).is_dir() else path


def each(actions: Sequence[Callable[[Settings], object]], how: Settings) -> None:
    """Every action; when there are several, each looks at everything first, so that all are refused or none."""
    if len(actions) > 1 and not how.dry_run:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            look = replace(how, dry_run=True, together=[])
            for act in actions:
                act(look)
    for act in actions:
        act(how)
