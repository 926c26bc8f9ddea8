"""Layouts: what differs between models trained on packed text, padded pairs and samples of one shape.

`layout_of` is the one place that reads a family's `layout`; trainer, `check` and `plan` ask the object it
returns.
"""

from __future__ import annotations

from polymodal.models.family import Family
from polymodal.recipe import Recipe
from polymodal.train.layouts.base import DataFacts, Feed, Layout, Section, Workload
from polymodal.train.layouts.packed import Packed
from polymodal.train.layouts.padded import Padded
from polymodal.train.layouts.speech_codes import SpeechCodes
from polymodal.train.layouts.uniform import Uniform

__all__ = [
    "DataFacts",
    "Feed",
    "Layout",
    "Section",
    "Workload",
    "fills_by_tokens",
    "layout_of",
    "objectives_of",
]

LAYOUTS: dict[str, type[Layout]] = {
    "packed": Packed,
    "padded": Padded,
    "speech_codes": SpeechCodes,
    "uniform": Uniform,
}


def objectives_of(family: type[Family]) -> tuple[str, ...]:
    """Objectives that recipes name for models of a family besides its own: dpo, kto, grpo."""
    return tuple(LAYOUTS[family.layout].objectives)


def fills_by_tokens(family: type[Family]) -> bool:
    """Whether micro-batches of such models are filled up to a number of tokens, so that the lengths of
    samples choose data.max_length; else they have a number of samples."""
    return LAYOUTS[family.layout].by_tokens


def layout_of(recipe: Recipe, family: Family) -> Layout:
    """The layout object of a run. Reads no file; raises nothing."""
    return LAYOUTS[family.layout](recipe, family)
