"""The loss of models that speak: code 0 of every frame as a next token, the others by a code predictor.

The talker's state at a place predicts the codes of the frame at the next one: code 0 (and the end) by its own
head, codes 1..K-1 by the predictor, which reads that state and the codes before. So the loss is of what
generation does. The loss of a step is sum(w nll_0) / sum(w) + c * mean over the K-1 codes of
sum(w nll_k) / sum(w over frames), over the whole global batch; c is the family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from polymodal.core.sample import IGNORE, Batch
from polymodal.core.tensors import to_device
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.objectives.language import LanguageObjective, Rows, Weighting, head_loss, token_weights
from polymodal.recipe import Recipe


def next_frames(codes: Tensor) -> Tensor:
    """Codes [1, T, K] -> [T, K]: of the frame at the next place, IGNORE where there is none."""
    after = torch.nn.functional.pad(codes[0, 1:], (0, 0, 0, 1), value=-1)
    return torch.where(after[:, 1:2] >= 0, after, IGNORE)


class SpeechCodesObjective(LanguageObjective):
    """Output.extra has `predict`: (states [n, D], codes [n, K]) -> what the heads of codes 1..K-1 read,
    [n, K-1, D']; and `heads`, their modules."""

    keys = ("codes", "frames")

    def __init__(self, weighting: Weighting = "per_token", codes_weight: float = 0.3):
        super().__init__(weighting)
        self.codes_weight = codes_weight

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Family) -> SpeechCodesObjective:
        return cls(recipe.train.loss, cast(Any, family).codes_weight)

    def weights(self, batch: Batch) -> dict[str, float]:
        """Those of code 0 and the end, `text`, and those of whole frames, `codes`."""
        terms, codes = super().weights(batch), batch.get("codes")
        own = token_weights(batch, self.weighting)[0]
        total = 0.0 if codes is None else float(own[next_frames(codes)[:, 0] >= 0].sum(dtype=torch.float64))
        return {**terms, "codes": total}

    def shown(self, total: Mapping[str, float]) -> dict[str, float]:
        """`nll/codes`: mean of codes 1..K-1."""
        return {"nll/codes": total["codes"] / total["frames"]} if total.get("frames") else {}

    def text_term(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of all codes, and its logs."""
        loss, logs = super().text_term(output, batch, inverse)
        rows = Rows.of(output, batch, token_weights(batch, self.weighting))
        heads, codes = output.extra["heads"], batch.on_host("codes")
        kept, frames = rows.kept[:0], torch.full((0, len(heads) + 1), IGNORE)
        at = kept
        if codes is not None:
            frames = next_frames(codes)[rows.kept]
            at = (frames[:, 0] >= 0).nonzero()[:, 0]
            frames = frames[at]
        count, device = len(frames), rows.hidden.device
        local = rows.keep[to_device(at, device)]
        if not count:  # every rank and every parameter still takes part
            local = rows.keep.new_zeros(1)
            frames = torch.full((1, len(heads) + 1), IGNORE)
        targets = to_device(frames, device)
        weights = rows.weights[local] * bool(count)
        states = output.extra["predict"](rows.hidden[local], targets.clamp(min=0))
        keep = torch.arange(count, device=device)
        share, total = inverse["codes"] / len(heads), torch.zeros((), device=device)
        for number, head in enumerate(heads):
            term, losses, _ = head_loss(states[:, number], head, targets[:, number + 1], weights, keep)
            loss = loss + self.codes_weight * share * term
            total = total + losses.sum() / len(heads)
        logs |= {"loss": loss.detach(), "codes": total.detach(), "frames": float(count)}
        return loss, logs
