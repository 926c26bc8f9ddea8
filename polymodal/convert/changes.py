"""Small changes to opened tensors on their way: parts left out or taken from elsewhere, copies, rounding.

Sees engine.py and the sources.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.convert import reading, writing
from polymodal.convert.engine import Opened, items_of, renamed, restricted, same_head
from polymodal.convert.family import read_config
from polymodal.convert.source import Box, Source, Union
from polymodal.core.errors import PolymodalError


def only(opened: Opened, prefix: str, what: str) -> Opened:
    """The tensors whose names begin with a prefix."""
    kept = [key for key in opened.source.shapes if key.startswith(prefix)]
    if not kept:
        raise PolymodalError(f"{what} has no tensor under {prefix}*.", "Leave that option out.")
    return opened.but(restricted(opened.source, kept))


def with_language(source: Path, language: Path | None) -> Source | None:
    """A hub checkpoint with what another one holds in its place (the language model); None without another."""
    if language is None:
        return None
    base, _ = reading.hub_files(source)
    other, _ = reading.hub_files(language)
    taken = [key for key in other.shapes if key in base.shapes]
    if not taken:
        raise PolymodalError(
            f"{language} and {source} have no tensor in common.",
            "Give a language model of the same family, under the same names.",
        )
    for key in taken:
        if other.shapes[key] != base.shapes[key]:
            raise PolymodalError(
                f"{key} is {list(other.shapes[key])} in {language}, {list(base.shapes[key])} in {source}.",
                "Give one of the same size.",
            )
    return Union(restricted(base, [key for key in base.shapes if key not in taken]), restricted(other, taken))


def without_head(opened: Opened, known: bool) -> Opened:
    """A tree's tensors without a head that only repeats the embedding, as pipelines need it; facts then say `tied`.

    known: whether the facts come from a config; else a head equal to the embedding is taken for a tied one.
    """
    if opened.table.tie is None or opened.table.tie[1] not in opened.source.shapes:
        return opened
    head, embedding = opened.table.tie
    shapes = opened.source.shapes
    if head not in shapes:
        return opened.but(opened.source, tied=1)
    if known and not opened.facts.get("tied"):
        return opened
    try:
        writing.compare(
            items_of(opened.source, [head]),
            {head: renamed(opened.source, {head: embedding})},
            opened.source,
            1,
        )
    except PolymodalError:
        if known:
            same_head(opened, Path())
        return opened
    return opened.but(restricted(opened.source, [key for key in shapes if key != head]), tied=1)


def language_model(source: Path) -> tuple[Source, dict[str, Any]]:
    """(the language model of a LLaVA checkpoint in fp16, its config): a checkpoint of its own."""
    from transformers import AutoConfig

    flat, _ = reading.hub_files(source)
    prefix = "language_model."
    names = {key.removeprefix(prefix): key for key in flat.shapes if key.startswith(prefix)}
    if not names:
        raise PolymodalError(f"{source} has no tensor under {prefix}*.", "Give a LLaVA checkpoint.")
    read_config(source)
    config = AutoConfig.from_pretrained(str(source)).text_config.to_dict()
    config |= {"dtype": "float16", "architectures": config.get("architectures") or ["LlamaForCausalLM"]}
    return Rounded(renamed(flat, names), "float16"), config


def without(opened: Opened, prefixes: tuple[str, ...]) -> Opened:
    """Without the tensors whose names begin with one of these."""
    return (
        opened.but(
            restricted(opened.source, [key for key in opened.source.shapes if not key.startswith(prefixes)])
        )
        if prefixes
        else opened
    )


def also(source: Source, ties: Mapping[str, str], where: str) -> Source:
    """With copies of tensors under other names: new name -> name."""
    for new, old in ties.items():
        if old not in source.shapes:
            raise PolymodalError(f"{where} has no tensor {old} to copy to {new}.", "Name one that it has.")
    more = {new: old for new, old in ties.items() if new not in source.shapes}
    return Union(source, renamed(source, more)) if more else source


class Rounded:
    """Floating tensors in another type."""

    def __init__(self, source: Source, name: str):
        dtype = getattr(torch, name)
        self.source, self.shapes = source, source.shapes
        self.dtypes = {key: dtype if kind.is_floating_point else kind for key, kind in source.dtypes.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        if self.source.dtypes[key] == self.dtypes[key]:
            return self.source.read(key, box, into)
        values = torch.empty(into.shape, dtype=self.source.dtypes[key])
        self.source.read(key, box, values)
        into.copy_(values)


def size(text: str) -> int:
    """Bytes of "4GB", "500MB" or a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.I)
    if found is None:
        raise PolymodalError(f"{text!r} is not a size.", "Write 4GB or 500MB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
