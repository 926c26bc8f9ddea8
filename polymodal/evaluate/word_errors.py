"""Word and character error rates: edit distance, and what of a text's spelling does not count.

Errors (substitutions, deletions, insertions) are summed over a corpus and divided by the summed length of the
references: a long recording counts for more than a short one. The normalisers are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Normaliser = Callable[[str], str]
Choice = Literal["auto", "english", "basic", "none"]
CHOICES: tuple[Choice, ...] = ("auto", "english", "basic", "none")


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein distance: insertions, deletions, substitutions, each 1.

    A row of the table at a time: what comes from the left is a running minimum of (value - column).
    """
    known: dict[Any, int] = {}
    first, second = (np.array([known.setdefault(x, len(known)) for x in s], np.int64) for s in (a, b))
    columns = np.arange(len(second) + 1)
    row = columns.copy()
    for n, item in enumerate(first, 1):
        above = np.minimum(row[1:] + 1, row[:-1] + (second != item))
        row = np.minimum.accumulate(np.concatenate([[n], above]) - columns) + columns
    return int(row[-1])


@dataclass(frozen=True)
class Errors:
    """Edits, and the length of the reference, in words or characters."""

    edits: int = 0
    length: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """Above 1 where more was inserted than there is. Of an empty reference 0 without edits, else 1."""
        return self.edits / self.length if self.length else float(self.edits > 0)


def word_errors(answer: str, expected: str) -> Errors:
    words = expected.split()
    return Errors(edit_distance(answer.split(), words), len(words))


def character_errors(answer: str, expected: str) -> Errors:
    """Spaces do not count: scripts differ in where they stand."""
    characters = "".join(expected.split())
    return Errors(edit_distance("".join(answer.split()), characters), len(characters))


def normaliser(
    choice: Choice, language: str | None, spelling: Mapping[str, str] | None, unspaced: bool
) -> Normaliser:
    """The normaliser of a language. auto: English has its own, others the basic one (Radford et al. 2022,
    app. C).

    spelling: British -> American, as a checkpoint's normalizer.json has it. unspaced: the language writes no
    spaces between words; its characters are then its words.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if choice == "none":
        return lambda text: text
    if choice == "english" or (choice == "auto" and language == "en"):
        return EnglishTextNormalizer(dict(spelling or {}))
    return BasicTextNormalizer(split_letters=unspaced)
