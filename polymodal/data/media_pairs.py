"""Rows that compare pictures or clips of one caption, and such pairs in the buckets of clips.py.

Pick-a-Pic (jpg_0, jpg_1, label_0), rows of a chosen and a rejected medium, and several media with scores or
ranks, of which the best and the worst are compared. The preferred medium stands in a Record's `messages`,
the other in its `alternatives`; equal scores are a tie, which is left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record, SampleLengths
from polymodal.data.captions import CAPTIONS, caption_record, media_kind
from polymodal.data.clips import Clips
from polymodal.data.files import IMAGE, VIDEO
from polymodal.data.references import References, first, listed
from polymodal.recipe import Attr, Clip

SEVERAL = ("images", "videos", "media", "image_path", "video_path", "paths")
RANKS = ("ranks", "rank", "ranking")
SCORES = ("scores", "human_preference")
PICTURES = ("jpg_0", "jpg_1")
ANSWERED = (
    "messages",
    "conversations",
    "responses",
    "answers",
    "completions",
    "response",
    "answer",
    "output",
    "completion",
)
"""Columns of rows whose scores are of answers: their media belong to the prompt."""


def compares_media(row: Mapping[str, Any], attr: Attr) -> bool:
    """Whether a row is a caption and pictures or clips of it to choose from."""
    if first(row, attr.prompt, CAPTIONS)[0] is None:
        return False
    if all(row.get(name) is not None for name in PICTURES):
        return row.get("label_0") is not None
    sides = [row.get(attr.chosen or "chosen"), row.get(attr.rejected or "rejected")]
    if all(side is not None for side in sides):
        return all(_is_medium(side) for side in sides)
    if first(row, None, ANSWERED)[0] is not None:
        return False
    several = listed(first(row, attr.images or attr.videos, SEVERAL)[0])
    ranked = first(row, None, (*SCORES, *RANKS))[0] is not None
    return ranked and isinstance(several, list) and len(several) > 1 and all(map(_is_medium, several))


def _is_medium(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(value.get(key) is not None for key in ("bytes", "path", "url"))
    ending = os.path.splitext(value)[1].lower().removeprefix(".") if isinstance(value, str) else ""
    return isinstance(value, bytes) or ending in IMAGE | VIDEO or ending == "gif"


def pair_record(row: Mapping[str, Any], where: str, attr: Attr, references: References) -> Record:
    """The row as a record of two media: the preferred one in `messages`. Raises PolymodalError."""
    media, scores, keys = _ranked(row, attr)
    plain = {k: v for k, v in row.items() if k not in (*keys, *SEVERAL, *PICTURES)}
    found = [
        references.medium(_kind(medium, key), medium, key) for medium, key in zip(media, keys, strict=True)
    ]
    better, worse = (caption_record(plain, where, attr, references, medium) for medium in found)
    return replace(better, alternatives=(worse.messages,), scores=scores)


def _kind(medium: Any, key: str) -> Any:
    """image or video; bytes without a name are a picture."""
    name = medium.get("path") if isinstance(medium, Mapping) else medium
    return media_kind(name, key) if isinstance(name, str) and key not in PICTURES else "image"


def _ranked(row: Mapping[str, Any], attr: Attr) -> tuple[list[Any], tuple[float, ...], list[str]]:
    """([best, worst], their scores or () without any, their columns)."""
    if all(row.get(name) is not None for name in PICTURES):
        label = _number(row["label_0"], "label_0")
        sides = [(row["jpg_0"], label, "jpg_0"), (row["jpg_1"], 1 - label, "jpg_1")]
        best, worst = sorted(sides, key=lambda side: -side[1])
        return [best[0], worst[0]], (best[1], worst[1]), [best[2], worst[2]]
    names = [attr.chosen or "chosen", attr.rejected or "rejected"]
    if all(row.get(name) is not None for name in names):
        scores = [
            first(row, None, own) for own in (("score", "chosen_score"), ("score_rejected", "rejected_score"))
        ]
        known = [_number(score, key) for score, key in scores if score is not None]
        if len(known) == 1:
            raise PolymodalError(
                "the row has a score of one of its two media.",
                "Write both `score` and `score_rejected`, or none.",
            )
        if known and known[0] < known[1]:
            raise PolymodalError(
                f"the chosen medium's score {known[0]:g} is below the rejected one's {known[1]:g}.",
                "Exchange the two columns, or correct the scores.",
            )
        return [row[name] for name in names], tuple(known), names
    several, key = first(row, attr.images or attr.videos, SEVERAL)
    ranks, name = first(row, None, (*SCORES, *RANKS))
    several, ranks = listed(several), listed(ranks)
    if not isinstance(ranks, list) or len(ranks) != len(several):
        raise PolymodalError(
            f"`{name}` is no list of as many numbers as `{key}` has media ({len(several)}).",
            "Write one number for each medium.",
        )
    sign = 1.0 if name in SCORES else -1.0
    numbers = [sign * _number(rank, name) for rank in ranks]
    order = sorted(range(len(numbers)), key=lambda n: -numbers[n])
    at = order[0], order[-1]
    return [several[n] for n in at], tuple(numbers[n] for n in at), [key, key]


def _number(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PolymodalError(f"`{key}` = {str(value)[:40]!r} is no number.", "Write one, e.g. 0.73.")
    return number


class PairClips(Clips):
    """Clips of pairs: both media of a record in one bucket, that of the preferred one; of clips the shorter
    length. A tie, or scores that differ by less than min_gap, has no tokens to learn from."""

    def __init__(
        self, clip: Clip, grid: Any, given: Sequence[str] = (), needed: Sequence[str] = (), min_gap: float = 0
    ):
        super().__init__(clip, grid, given, needed)
        self.min_gap = min_gap
        self.fingerprint += f" pairs {min_gap}"

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        return [
            SampleLengths(0, 0, shape=(0, 0, 0)) if self.tied(record) else measured
            for record, measured in zip(records, super().measure(records), strict=True)
        ]

    def tied(self, record: Record) -> bool:
        if not record.scores:
            return False
        gap = record.scores[0] - record.scores[-1]
        return gap <= 0 or gap < self.min_gap

    def bucket(self, record: Record) -> SampleLengths:
        if len(record.conversations) != 2:
            raise PolymodalError(
                "the row has one picture or clip, diffusion_dpo compares two.",
                'Write {"chosen": "a.png", "rejected": "b.png", "caption": "what was asked for"}.',
            )
        one, other = (super(PairClips, self).bucket(side) for side in record.conversations)
        if (one.shape[0] == 1) != (other.shape[0] == 1):
            raise PolymodalError(
                "a picture is compared with a clip.", "Compare pictures with pictures, clips with clips."
            )
        shape = (min(one.shape[0], other.shape[0]), *one.shape[1:])
        tokens = self.grid.tokens(*shape)
        return SampleLengths(tokens, tokens, shape=shape)
