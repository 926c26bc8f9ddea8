"""Small changes to opened tensors before they are written: parts left out or taken from elsewhere, copies,
rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.convert import reading
from polymodal.convert.engine import Opened, check_tied_head, head_is_embedding
from polymodal.convert.family import read_config
from polymodal.convert.source import Box, Joined, Source, renamed, subset, values
from polymodal.core.errors import PolymodalError


def only(opened: Opened, prefix: str, title: str) -> Opened:
    """The tensors whose names begin with a prefix."""
    kept = [key for key in opened.source.shapes if key.startswith(prefix)]
    if not kept:
        raise PolymodalError(f"{title} has no tensor under {prefix}*.", "Leave that option out.")
    return opened.but(subset(opened.source, kept))


def without(opened: Opened, prefix: str) -> Opened:
    """The tensors whose names do not begin with a prefix."""
    kept = [key for key in opened.source.shapes if not key.startswith(prefix)]
    return opened.but(subset(opened.source, kept))


def with_language(source: Path, language: Path) -> Source:
    """A hub checkpoint with the tensors of another one (the language model) in place of its own."""
    base, other = reading.hub_files(source), reading.hub_files(language)
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
    return Joined(subset(base, [key for key in base.shapes if key not in taken]), subset(other, taken))


def without_head(opened: Opened, known: bool) -> Opened:
    """A tree's tensors without a head that only repeats the embedding, as pipelines need it; the fact `tied`
    is then 1.

    known: whether the facts come from a config; else a head equal to the embedding is taken for a tied one.
    """
    shapes = opened.source.shapes
    if opened.table.embedding not in shapes:
        return opened
    head = opened.table.tie[0]  # type: ignore[index]
    if head not in shapes:
        return opened.but(opened.source, tied=1)
    if known and not opened.facts.get("tied"):
        return opened
    if known:
        check_tied_head(opened, Path())
    elif not head_is_embedding(opened):
        return opened
    return opened.but(subset(opened.source, [key for key in shapes if key != head]), tied=1)


def language_model(source: Path) -> tuple[Source, dict[str, Any]]:
    """(the language model of a LLaVA checkpoint in fp16, its config): a checkpoint of its own."""
    from transformers import AutoConfig

    tensors, prefix = reading.hub_files(source), "language_model."
    names = {key.removeprefix(prefix): key for key in tensors.shapes if key.startswith(prefix)}
    if not names:
        raise PolymodalError(f"{source} has no tensor under {prefix}*.", "Give a LLaVA checkpoint.")
    read_config(source)
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False).text_config.to_dict()
    config |= {"dtype": "float16", "architectures": config.get("architectures") or ["LlamaForCausalLM"]}
    return Rounded(renamed(tensors, names), torch.float16), config


def with_copies(source: Source, copies: Mapping[str, str], where: str) -> Source:
    """With copies of tensors under other names: new name -> name."""
    for new, old in copies.items():
        if old not in source.shapes:
            raise PolymodalError(f"{where} has no tensor {old} to copy to {new}.", "Name one that it has.")
    more = {new: old for new, old in copies.items() if new not in source.shapes}
    return Joined(source, renamed(source, more)) if more else source


class Rounded:
    """Floating-point tensors in another type."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self.source, self.shapes = source, source.shapes
        self.dtypes = {key: dtype if own.is_floating_point else own for key, own in source.dtypes.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        into.copy_(values(self.source, key, box))


def size(text: str) -> int:
    """Bytes of "4GB", "500MB" or a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?", text.strip(), re.I)
    if found is None:
        raise PolymodalError(f"{text!r} is not a size.", "Write 4GB or 500MB.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
