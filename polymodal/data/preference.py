"""Rows that compare answers -> samples: one sample has all sequences that are compared, so that no cut of a
batch parts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaProcessor, Message, Record, Sample, SampleLengths
from polymodal.data.chat import ChatProcessor
from polymodal.data.source import Corpus
from polymodal.recipe import Data, Preference

Pairs = tuple[tuple[int, int, float], ...]


class PreferenceProcessor(ChatProcessor):
    """A ChatProcessor of whole comparisons. Lengths are sums over the sequences of a sample.

    unpaired: of kto, whose records have one answer, its score 0 or 1, and another prompt's answer
    (Mismatched). share: sequences with the same media have them once.
    """

    def __init__(
        self, media: MediaProcessor, data: Data, settings: Preference, unpaired: bool, share: bool = True
    ):
        super().__init__(media, data)
        self.rule, self.min_gap = settings.pairs, settings.min_gap
        self.unpaired, self.share = unpaired, share

    @property
    def fingerprint(self) -> str:
        settings = ("compared", self.unpaired, *(() if self.unpaired else (self.rule, self.min_gap)))
        return f"{super().fingerprint} {settings} {self.share}"

    def chosen(self, record: Record) -> tuple[list[Record], Pairs]:
        """(the conversations that are used, the pairs of them). Raises PolymodalError where there is none."""
        conversations = record.conversations
        if "captions" in record.extra:
            raise PolymodalError(
                "the row compares pictures or clips, which models that generate learn from (diffusion_dpo).",
                "Give rows that compare answers.",
            )
        if self.unpaired:
            if len(record.scores) != 1:
                raise PolymodalError(
                    "kto learns from answers that are good or bad, this row compares several.",
                    "Use train.objective: dpo, or rows of an answer and a label.",
                )
            return conversations, ((0, len(conversations) - 1, 1.0 if record.scores[0] else -1.0),)
        if len(conversations) < 2:
            raise PolymodalError(
                "there is one answer, dpo compares at least two.",
                "Use train.objective: kto for rows of an answer and a label.",
            )
        pairs = ranked_pairs(len(conversations), record.scores, self.rule, self.min_gap)
        if not pairs:
            raise PolymodalError(
                "no two answers differ enough in their scores.",
                "Set data.on_error to skip to leave such rows out, or lower train.preference.min_gap.",
            )
        used = sorted({n for better, worse, _ in pairs for n in (better, worse)})
        place = {n: at for at, n in enumerate(used)}
        return [conversations[n] for n in used], tuple((place[a], place[b], gap) for a, b, gap in pairs)

    def _shares(self, conversations: Sequence[Record]) -> bool:
        media = [each.media for each in conversations]
        return self.share and bool(media[0]) and all(each == media[0] for each in media)

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        found: list[list[Record] | str] = []
        for record in records:
            try:
                found.append(self.chosen(record)[0])
            except PolymodalError as error:
                found.append(str(error))
        flat = [each for own in found if not isinstance(own, str) for each in own]
        measures = iter(super().measure(flat))
        out: list[SampleLengths | str] = []
        for own in found:
            if isinstance(own, str):
                out.append(own)
                continue
            lengths = [next(measures) for _ in own]
            wrong = next((each for each in lengths if isinstance(each, str)), None)
            whole = [each for each in lengths if isinstance(each, SampleLengths)]
            out.append(_joined(whole, self._shares(own)) if wrong is None else wrong)
        return out

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        try:
            conversations, pairs = self.chosen(record)
        except PolymodalError as error:
            raise error.at(record.where) from None
        shared = self._shares(conversations)
        parts = [
            super(PreferenceProcessor, self).sample(each, id, pixels and not (shared and n))
            for n, each in enumerate(conversations)
        ]
        first, tensors = parts[0], {}
        media = {name for stream in self.streams for name in (stream.tensor, stream.sizes)}
        for name in dict.fromkeys(name for part in parts for name in part.tensors):
            values = [part.tensors[name] for part in parts if name in part.tensors]
            if name in media and shared:
                tensors[name] = values[0]
            else:
                tensors[name] = torch.cat(values, dim=1 if name == "position_ids" else 0)
        return replace(
            first,
            tensors=tensors,
            measure=_joined([part.measure for part in parts], shared),
            sequences=tuple(part.measure.tokens for part in parts),
            pairs=pairs,
            shared=shared,
        )

    def pieces(self, record: Record) -> list[Record]:
        raise PolymodalError(f"{record.where}: answers that are compared are not split.", "Drop them.")


def _joined(parts: Sequence[SampleLengths], shared: bool) -> SampleLengths:
    media: dict[str, tuple[int, ...]] = {}
    for part in parts[:1] if shared else parts:
        for stream, lengths in part.media.items():
            media[stream] = (*media.get(stream, ()), *lengths)
    return SampleLengths(sum(part.tokens for part in parts), sum(part.trained for part in parts), media)


def ranked_pairs(count: int, scores: Sequence[float], rule: str, min_gap: float = 0.0) -> Pairs:
    """Pairs (better, worse, gap) of `count` answers with these scores, or in order of preference where there
    are none (the gap is then 1 a place). rule: best_worst, all or adjacent."""
    order = sorted(range(count), key=lambda n: -scores[n]) if scores else list(range(count))
    by_rule = {"best_worst": [(order[0], order[-1])], "adjacent": pairwise(order)}
    pairs = by_rule.get(rule, combinations(order, 2))
    if not scores:
        return tuple((a, b, float(b - a)) for a, b in pairs)
    gaps = ((a, b, float(scores[a] - scores[b])) for a, b in pairs)
    return tuple((a, b, gap) for a, b, gap in gaps if gap > 0 and gap >= min_gap)


class Mismatched(Corpus):
    """A corpus of answers with a label (kto): each record also has the answer of the next record to its own
    prompt, from which the divergence to the reference is estimated."""

    def __init__(self, corpus: Corpus):
        self.__dict__.update(corpus.__dict__)

    def __getitem__(self, i: int) -> Record:  # type: ignore[override]
        own = super().__getitem__(i)
        if len(own.scores) != 1:
            return own
        for step in range(1, len(self)):
            try:
                other = super().__getitem__((int(i) + step) % len(self))
            except PolymodalError:  # is named where that record itself is read
                continue
            prompt, _ = _parted(own)
            answer = tuple(m for m in _parted(other)[1] if all(isinstance(p, str) for p in m.content))
            if answer:
                return replace(own, alternatives=((*prompt, *answer),))
        raise PolymodalError(
            f"{own.where}: there is no other answer to compare with.", "kto needs at least two rows."
        )


def _parted(record: Record) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(messages of the prompt, those of the answer)."""
    at = next(n for n, message in enumerate(record.messages) if message.weight)
    return record.messages[:at], record.messages[at:]
