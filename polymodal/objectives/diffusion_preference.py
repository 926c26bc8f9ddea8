"""Preferences between what was generated: Diffusion-DPO over the noised samples of diffusion.py.

The two halves of a pair are neighbours in a micro-batch and have one seed, so that noise, level, dropped
caption and given frame are the same for both, and for the reference, which is asked about the same batch.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import Batch, with_groups
from polymodal.core.tensors import to_device
from polymodal.models.card import Output, Process
from polymodal.models.diffusion import Generation
from polymodal.objectives.diffusion import KINDS, DiffusionObjective
from polymodal.objectives.preference import losses_of, refuse_dropout, swapped
from polymodal.recipe import Diffusion, Preference, Recipe

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "error/chosen",
    "error/rejected",
    "error/chosen_reference",
    "error/rejected_reference",
    "pair_weight",
)
"""Means over pairs in logs."""
BETA = {"flow": 500.0, "discrete": 2000.0}
LEAST = 1e-3
"""Least probability of a pair's scores, which bounds its weight (VideoDPO, arXiv:2412.14167, and its kin)."""
BIN = re.compile(r"\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*-\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True)
class ScoreHistogram:
    """Counts of scores in bins [lower, upper), the last one closed; probabilities are shares of `total`."""

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    counts: tuple[float, ...]
    total: float
    largest: float

    @classmethod
    def read(cls, path: str) -> ScoreHistogram:
        """{bin_width, total_num, max_num, "lower-upper": count}. Bins are found by value, as their names are
        printed floats (0.30000000000000004-0.4). Raises PolymodalError for another file."""
        key, hint = "train.preference.histogram", 'Write {"total_num": 100, "max_num": 9, "0.2-0.3": 9, ...}.'
        file = Path(path).expanduser()
        if not file.is_file():
            raise PolymodalError(f"{key}: {file} does not exist.", "Check the path, or leave it out.")
        content = read_json(file, hint)
        bins = []
        for name, count in content.items() if isinstance(content, dict) else ():
            found = BIN.fullmatch(str(name))
            if found is None and name in ("bin_width", "total_num", "max_num"):
                continue
            edges = tuple(float(edge) for edge in found.groups()) if found else (0.0, 0.0)
            known = isinstance(count, (int, float)) and not isinstance(count, bool) and count >= 0
            if edges[0] >= edges[1] or not known:
                raise PolymodalError(f"{key}: {file} has {name!r}: {count!r}, which is no bin.", hint)
            bins.append((*edges, float(count)))
        if not any(count for *_, count in bins):
            raise PolymodalError(f"{key}: {file} has no bin with a count.", hint)
        lower, upper, counts = zip(*sorted(bins), strict=True)
        total, largest = content.get("total_num") or sum(counts), content.get("max_num") or max(counts)
        return cls(lower, upper, counts, float(total), float(largest))

    def probability(self, score: float) -> float:
        """Share of the samples in the bin of this score; 0 outside of all."""
        at = bisect.bisect_right(self.lower, score) - 1
        last = at == len(self.lower) - 1 and score == self.upper[-1]
        inside = at >= 0 and (score < self.upper[at] or last)
        return self.counts[at] / self.total if inside else 0.0

    def weight(self, scores: tuple[float, float], alpha: float, beta: float | None) -> float:
        """(beta / max(p, LEAST)) ** alpha of a pair, p = sqrt(p(chosen) p(rejected)); beta None: the largest
        probability."""
        p = (self.probability(scores[0]) * self.probability(scores[1])) ** 0.5
        return ((self.largest / self.total if beta is None else beta) / max(p, LEAST)) ** alpha


class DiffusionPreference(DiffusionObjective):
    """Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908), of flow matching Flow-DPO (arXiv:2501.13918):

        -log s(-beta / 2 t ((m_c - m_r) - (ref_c - ref_r)))

    m: mean squared error of the prediction over a sample's elements, of the chosen (c) and the rejected (r)
    sample, ref: the reference's; t = 1, or with time_weight = t the model's timestep. The loss of a step is
    the mean over the pairs of the global batch, times the weight of a pair by the histogram of scores; the
    sft term is m_c with the process' weighting of levels, without that weight.

    Batches bring pairs one after the other, (chosen, rejected, chosen, ...), with equal seeds; and in groups
    `scores`, of each pair (chosen, rejected) or None.
    """

    term = "pairs"
    keys = (*FIGURES, "pairs")
    needs_reference = True

    def __init__(
        self,
        process: Process,
        settings: Diffusion,
        losses: Mapping[str, float],
        preference: Preference,
        histogram: ScoreHistogram | None = None,
    ):
        super().__init__(process, settings)
        self.losses, self.preference, self.histogram = losses, preference, histogram
        self.beta = preference.beta or BETA[process.kind]

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Generation) -> DiffusionPreference:
        settings = recipe.train.preference
        _refuse(recipe)
        histogram = None if settings.histogram is None else ScoreHistogram.read(settings.histogram)
        made = cls(family.process(), recipe.train.diffusion, losses_of(settings), settings, histogram)
        made.kept = family.kept
        return made

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"pairs": float(batch["weight"][0::2].sum(dtype=torch.float64))}

    def prepare(self, actors: Any, batches: Sequence[Batch]) -> list[Batch]:
        """Noised batches with the reference's errors, groups["reference"] [B], where there are actors."""
        noised = super().prepare(actors, batches)
        if actors is None:
            return noised
        return [with_groups(b, reference=r) for b, r in zip(noised, actors.reference(noised), strict=True)]

    def _noised(self, batch: Batch, quantile: int | None) -> Batch:
        factor, made = batch.get("loss_weight"), super()._noised(batch, quantile)
        count = len(batch["weight"]) // 2
        pair = torch.ones(count) if factor is None else factor[0::2].float()
        if self.histogram is not None:
            alpha, beta = self.preference.weight_alpha, self.preference.weight_beta
            scores: Any = batch.groups.get("scores") or (None,) * count
            if None in scores:
                raise PolymodalError(
                    "train.preference.histogram: there are pairs without scores, which it weighs.",
                    "Give every row `score` and `score_rejected`, or leave the histogram out.",
                )
            by_score = torch.tensor([self.histogram.weight(each, alpha, beta) for each in scores])
            pair = pair * by_score
        made.tensors["pair_weight"], made.axes["pair_weight"] = pair, ("batch",)
        return made

    def compared(self, output: Output, batch: Batch) -> Tensor:
        """What the reference is asked: the error of each sample [B]."""
        return self.errors(output, batch)[0]

    def shown(self, total: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step's log from sums over the global batch."""
        names = FIGURES if self.histogram is not None else FIGURES[:-1]
        return {name: total[name] / total["pairs"] for name in names if total["pairs"]}

    def loss(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        errors, _ = self.errors(output, batch)
        chosen, rejected = errors[0::2], errors[1::2]
        reference = batch.groups.get("reference")
        known = torch.zeros_like(errors)
        if reference is not None:
            known = to_device(reference, errors.device).to(errors.dtype)
        scale: Tensor | float = self.beta / 2
        if self.preference.time_weight == "t":
            scale = scale * batch["timestep"][0::2].to(errors.dtype)
        rewards = scale * (known[0::2] - chosen), scale * (known[1::2] - rejected)
        pair, weight = batch["pair_weight"].to(errors.dtype), batch["weight"][0::2].to(errors.dtype)
        value = (
            self.losses.get("sigmoid", 0.0)
            * pair
            * swapped(rewards[0] - rewards[1], self.preference.label_smoothing)
        )
        if "sft" in self.losses:
            value = value + self.losses["sft"] * batch["level_weight"][0::2].to(errors.dtype) * chosen
        counted, count = (value * weight).sum(), weight.sum()
        loss = counted * inverse[self.term]
        logs = {"loss": loss.detach(), "pairs": count}
        parts: list[str] = [batch.groups["kind"]]
        if batch.groups.get("quantile") is not None:
            parts.append(self.parts[len(KINDS) + batch.groups["quantile"]])
        for part in parts:
            logs |= {f"nll/{part}": counted.detach(), f"tokens/{part}": count}
        with torch.no_grad():
            numbers = (
                *rewards,
                rewards[0] - rewards[1],
                (rewards[0] > rewards[1]).to(errors.dtype),
                chosen,
                rejected,
                known[0::2],
                known[1::2],
                pair,
            )
            logs |= {name: (n * weight).sum() for name, n in zip(FIGURES, numbers, strict=True)}
        return loss, logs


def _refuse(recipe: Recipe) -> None:
    """Raise PolymodalError for keys that this objective does not take."""
    settings, losses = recipe.train.preference, losses_of(recipe.train.preference)
    other = [name for name in losses if name not in ("sigmoid", "sft")]
    if other or "sigmoid" not in losses:
        raise PolymodalError(
            f"train.preference.loss = {', '.join(losses) or '{}'}: diffusion_dpo knows sigmoid, and sft "
            "besides.",
            "Write sigmoid, or {sigmoid: 1, sft: 0.1}.",
        )
    plain = Preference()
    of_answers = ("gamma", "desirable_weight", "undesirable_weight", "cache_reference", "pairs")
    for key in of_answers:
        if getattr(settings, key) != getattr(plain, key):
            why = "is for models that answer"
            if key == "cache_reference":
                why = "keeps nothing of use: noise is drawn anew in every epoch"
            elif key == "pairs":
                why = "takes the best and the worst of a row when pictures or clips are compared"
            raise PolymodalError(f"train.preference.{key} {why}.", "Leave it out.")
    if settings.histogram is not None and not settings.weight_alpha:
        raise PolymodalError(
            "train.preference.histogram weighs nothing: train.preference.weight_alpha is 0.",
            "Set weight_alpha, e.g. to 1, or leave histogram out.",
        )
    if settings.histogram is None and (settings.weight_alpha or settings.weight_beta is not None):
        raise PolymodalError(
            "train.preference.weight_alpha and weight_beta weigh pairs by a histogram of scores.",
            "Set train.preference.histogram, or leave them out.",
        )
    if recipe.parallel.pp > 1:
        raise PolymodalError(
            f"parallel.pp = {recipe.parallel.pp}: the reference of diffusion_dpo is asked on ranks that hold "
            "the whole model.",
            "Set parallel.pp to 1; tp, cp and FSDP are free.",
        )
    refuse_dropout(recipe)
