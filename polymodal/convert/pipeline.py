"""A pipeline's directory (model_index.json above its parts) in place of one transformer: Wan 2.2 has two
experts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from polymodal.convert import reading, tree, writing
from polymodal.convert.options import Settings
from polymodal.convert.output import Report

EXPERTS = ("transformer", "transformer_2")


def parts(source: Path) -> list[str]:
    """The transformers below a directory that holds no weights itself; none for any other directory."""
    names = [name for name in EXPERTS if (source / name).is_dir()]
    weights = reading.is_dcp(source) or tree.is_tree(source) or (source / tree.TRACKER).is_file()
    return [] if not names or weights or any(source.glob("*.safetensors")) else names


def inside(path: Path, name: str) -> Path:
    """The part of that name, if the path is a pipeline's directory too; else the path."""
    return path / name if (path / name).is_dir() else path


def each(actions: Sequence[Callable[[Settings], Report]], settings: Settings) -> Iterator[Report]:
    """Every action's report; when there are several, each looks at everything first, so that all are refused
    or none."""
    if len(actions) > 1 and not settings.dry_run:
        with contextlib.redirect_stderr(io.StringIO()):
            planned = [act(replace(settings, dry_run=True)) for act in actions]
        writing.need_space(planned[0].directory, sum(report.bytes for report in planned))
    for act in actions:
        yield act(settings)
