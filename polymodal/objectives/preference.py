"""Preferences between answers: DPO and its kin, and KTO, over the chunked head of language.py.

A loss here is a function of the log-probabilities of whole answers, which are known after the forward pass
only, while the head makes its gradients chunk by chunk from given weights. So the head is multiplied twice:
once without gradient for the log-probabilities, from which the loss and its derivative by each answer's
log-probability follow; then with that derivative as the weights of the answers' tokens. This is the exact
gradient; logits are never whole, and cuts of the vocabulary or the sequence need nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, pack, unpack, with_groups
from polymodal.core.tensors import to_device
from polymodal.models import catalog
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.objectives.language import LanguageObjective, Rows, head_loss
from polymodal.recipe import PREFERENCE, Preference, Recipe

REFERENCE_FREE = ("simpo", "orpo", "sft")
FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "log_probs/chosen",
    "log_probs/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "kl",
)
"""Means over pairs in logs. Of kto `chosen` are desirable and `rejected` undesirable answers."""


@dataclass(frozen=True)
class Answers:
    """Of each pair the preferred answer (c) and the other (r): log-probabilities summed over their tokens, of
    the policy and of the reference (0 without one), and their lengths in tokens; all [P]."""

    c: Tensor
    r: Tensor
    ref_c: Tensor
    ref_r: Tensor
    len_c: Tensor
    len_r: Tensor

    @property
    def delta(self) -> Tensor:
        return (self.c - self.ref_c) - (self.r - self.ref_r)

    @property
    def mean_c(self) -> Tensor:
        return self.c / self.len_c

    @property
    def mean_r(self) -> Tensor:
        return self.r / self.len_r

    @property
    def mean_delta(self) -> Tensor:
        return (self.c - self.ref_c) / self.len_c - (self.r - self.ref_r) / self.len_r


def swapped(d: Tensor, share: float) -> Tensor:
    """Cross entropy where this share of pairs is swapped (conservative DPO, Mitchell 2023)."""
    return -(1 - share) * F.logsigmoid(d) - share * F.logsigmoid(-d)


def _robust(d: Tensor, share: float) -> Tensor:
    """Its unbiased form under swapped labels (Chowdhury et al. 2024, arXiv:2403.00409)."""
    return (share * F.logsigmoid(-d) - (1 - share) * F.logsigmoid(d)) / (1 - 2 * share)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean), mean < 0."""
    mean = mean.clamp_max(-torch.finfo(mean.dtype).tiny)
    return mean - torch.log(-torch.expm1(mean))


LOSSES: Mapping[str, Callable[[Answers, float, float, float], Tensor]] = {
    # DPO (Rafailov et al. 2023, arXiv:2305.18290)
    "sigmoid": lambda a, beta, smooth, gamma: swapped(beta * a.delta, smooth),
    "robust": lambda a, beta, smooth, gamma: _robust(beta * a.delta, smooth),
    # SLiC (Zhao et al. 2023, arXiv:2305.10425)
    "hinge": lambda a, beta, smooth, gamma: F.relu(1 - beta * a.delta),
    # IPO (Azar et al. 2023, arXiv:2310.12036), of means over tokens
    "ipo": lambda a, beta, smooth, gamma: (a.mean_delta - 1 / (2 * beta)) ** 2,
    "sigmoid_norm": lambda a, beta, smooth, gamma: -F.logsigmoid(beta * a.mean_delta),
    # APO (D'Oosterlinck et al. 2024, arXiv:2408.06266)
    "apo_zero": lambda a, beta, smooth, gamma: (
        1 - torch.sigmoid(beta * (a.c - a.ref_c)) + torch.sigmoid(beta * (a.r - a.ref_r))
    ),
    "apo_down": lambda a, beta, smooth, gamma: (
        torch.sigmoid(beta * (a.c - a.ref_c)) + 1 - torch.sigmoid(beta * a.delta)
    ),
    # BCO (Jung et al. 2024, arXiv:2404.04656) with shift 0, as in MPO (Wang et al. 2024, arXiv:2411.10442)
    "bco_pair": lambda a, beta, smooth, gamma: (
        -F.logsigmoid(beta * (a.c - a.ref_c)) - F.logsigmoid(-beta * (a.r - a.ref_r))
    ),
    # SimPO (Meng et al. 2024, arXiv:2405.14734)
    "simpo": lambda a, beta, smooth, gamma: -F.logsigmoid(beta * (a.mean_c - a.mean_r) - gamma),
    # ORPO (Hong et al. 2024, arXiv:2403.07691), likelihood of the answer alone
    "orpo": lambda a, beta, smooth, gamma: (
        -a.mean_c - beta * F.logsigmoid(_log_odds(a.mean_c) - _log_odds(a.mean_r))
    ),
    "sft": lambda a, beta, smooth, gamma: -a.mean_c,
}


def kto(gain: Tensor, z: Tensor, label: Tensor, beta: float, desirable: float, undesirable: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306) of each answer [P]. gain: log-ratio to the reference; z:
    estimated divergence, not differentiated; label: 1 or -1."""
    weight = torch.where(label > 0, desirable, undesirable)
    return weight * (1 - torch.sigmoid(beta * label * (gain - z)))


@dataclass(frozen=True)
class SequenceSums:
    """Of each sequence of a packed batch [S]: sum of its tokens' weighted log-probabilities, and of their
    weights; sequence [N]: of each kept row."""

    log_probs: Tensor
    lengths: Tensor
    sequence: Tensor


def sequence_sums(output: Output, batch: Batch, rows: Rows) -> SequenceSums:
    """Without gradient; over all ranks of a cut sequence, which must all call it."""
    assert output.head is not None
    ends = cast(Tensor, batch.host.get("text", batch.segments["text"]))[1:].to(torch.int64)
    sequence = to_device(torch.bucketize(rows.kept, ends, right=True), rows.hidden.device)
    with torch.no_grad():
        _, losses, _ = head_loss(rows.hidden.detach(), output.head, rows.labels, rows.weights, rows.keep)
        wide = torch.promote_types(losses.dtype, torch.float32)
        losses, weights = losses.to(wide), rows.weights[rows.keep].to(wide)
        both = losses.new_zeros(2, len(ends))
        both.index_add_(1, sequence, torch.stack([-losses * weights, weights]))
        if batch.cut is not None:
            dist.all_reduce(both, group=batch.cut.context.group)
    return SequenceSums(both[0], both[1], sequence)


def losses_of(settings: Preference) -> dict[str, float]:
    """The losses of dpo with their weights."""
    loss = "sigmoid" if settings.loss is None else settings.loss
    return {str(k): v for k, v in loss.items()} if isinstance(loss, dict) else {loss: 1.0}


def reference_of(recipe: Recipe) -> str | None:
    """The checkpoint that a recipe names as the reference; None: the model as it starts."""
    train = recipe.train
    return train.grpo.reference if train.objective == "grpo" else train.preference.reference


def reference_by_adapters(recipe: Recipe) -> bool:
    """Whether the reference is the model with its adapters off: it starts with new adapters, which change
    nothing yet."""
    origin = recipe.checkpoint.init_from
    new = origin is None or catalog.is_whole(origin)
    return recipe.model.lora is not None and reference_of(recipe) is None and new


def needs_copy(recipe: Recipe) -> bool:
    """Whether a second, frozen model is held while it trains."""
    train = recipe.train
    if train.objective == "grpo":
        return train.grpo.kl > 0 and not reference_by_adapters(recipe)
    if train.objective not in PREFERENCE or train.preference.cache_reference or reference_by_adapters(recipe):
        return False
    return train.objective == "kto" or any(name not in REFERENCE_FREE for name in losses_of(train.preference))


class PreferenceObjective(LanguageObjective):
    """What train.preference names. The loss of a step is the mean over the pairs (kto: answers) of the global
    batch, whatever the layout."""

    term = "pairs"
    parts = ()
    keys = (*FIGURES, "pairs", "pairs/chosen", "pairs/rejected")

    def __init__(
        self,
        losses: Mapping[str, float],
        settings: Preference,
        aux_weight: float = 0.0,
        experts_per_token: int = 0,
    ):
        super().__init__("per_token", aux_weight, experts_per_token)
        self.losses, self.settings = losses, settings

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Family) -> PreferenceObjective:
        train, settings = recipe.train, recipe.train.preference
        _refuse(recipe)
        losses = {"kto": 1.0} if train.objective == "kto" else losses_of(settings)
        return cls(losses, settings, **family.balance(train.router_aux_loss))

    @property
    def unpaired(self) -> bool:
        return "kto" in self.losses

    @property
    def needs_reference(self) -> bool:
        return any(name not in REFERENCE_FREE for name in self.losses)

    def beta(self, loss: str) -> float:
        return self.settings.beta or (2.0 if loss == "simpo" else 0.1)

    def weights(self, batch: Batch) -> dict[str, float]:
        pairs = float(sum(map(len, batch.groups.get("pairs", ()))))
        return {"pairs": pairs, **({"balance": float(pairs > 0)} if self.aux_weight else {})}

    def compared(self, output: Output, batch: Batch) -> Tensor:
        """What the reference is asked: log-probabilities of each sequence [S]."""
        return sequence_sums(output, batch, Rows.of(output, batch, batch["weights"])).log_probs

    def prepare(self, actors: Any, batches: list[Batch]) -> list[Batch]:
        """The batches with the reference's log-probabilities of each sequence, groups["reference"] [S].

        Of kto without the mismatched answers, once groups["divergence"] was estimated from them. actors: None
        where batches have no data (plan); reference(batches) and policy(batches) give each batch's sums [S]
        on the host, mean(total [2]) the quotient of sums over the global batch. Collective."""
        if not self.needs_reference or actors is None:
            return batches
        if not self.unpaired:
            return [
                with_groups(b, reference=r) for b, r in zip(batches, actors.reference(batches), strict=True)
            ]
        reference = actors.reference(batches)
        policy = actors.policy([_only(batch, -1) for batch in batches])
        out, total = [], torch.zeros(2, dtype=torch.float64)
        for batch, known, sums in zip(batches, reference, policy, strict=True):
            lengths = batch.groups.get("sequences", ((1,),) * len(batch.samples))
            ends = torch.tensor([len(own) for own in lengths]).cumsum(0)
            first, last = ends - torch.tensor([len(own) for own in lengths]), ends - 1
            real = torch.tensor([bool(pairs) for pairs in batch.groups.get("pairs", ())], dtype=torch.float64)
            gain = (sums - known[last]).to(torch.float64)[: len(real)]
            total += torch.stack([(gain * real).sum(), real.sum()])
            out.append(with_groups(_only(batch, 0), reference=known[first]))
        divergence = max(0.0, actors.mean(total))
        return [with_groups(batch, divergence=divergence) for batch in out]

    def shown(self, total: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step's log from sums over the global batch."""
        out = {}
        for name in FIGURES:
            of = name.partition("/")[2]
            count = total[f"pairs/{of}"] if self.unpaired and of in ("chosen", "rejected") else total["pairs"]
            if count:
                out[name] = total[name] / count
        if self.unpaired:
            out.pop("rewards/margin", None)
            if {"rewards/chosen", "rewards/rejected"} <= out.keys():
                out["rewards/margin"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out

    def text_term(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Any]]:
        assert output.head is not None
        rows = Rows.of(output, batch, batch["weights"])
        sums = sequence_sums(output, batch, rows)
        device, wide = rows.hidden.device, sums.log_probs.dtype
        # every rank of a cut sequence knows the whole value: each counts its share
        share = 1.0 / batch.cut.context.size if batch.cut is not None else 1.0
        pairs = to_device(_pairs(batch), device)
        reference = batch.groups.get("reference")
        known = torch.zeros_like(sums.log_probs)
        if reference is not None:
            known[: len(reference)] = to_device(reference, device).to(wide)
        leaf = sums.log_probs.clone().requires_grad_()
        with torch.enable_grad():
            value, figures = self._value(
                leaf, known, sums.lengths, pairs, batch.groups.get("divergence", 0.0)
            )
        scaled = value * inverse["pairs"]
        logs: dict[str, Any] = {name: number * share for name, number in figures.items()}
        logs |= {"loss": scaled.detach() * share, "pairs": len(pairs) * share}
        if not torch.is_grad_enabled():
            return scaled.detach() * share, logs
        (slope,) = torch.autograd.grad(scaled, leaf)
        weights = rows.weights.to(wide).index_copy(
            0, rows.keep, -slope[sums.sequence] * rows.weights[rows.keep].to(wide)
        )
        through, _, _ = head_loss(rows.hidden, output.head, rows.labels, weights, rows.keep)
        return through - through.detach() + scaled.detach() * share, logs

    def _value(
        self, sums: Tensor, known: Tensor, lengths: Tensor, pairs: Tensor, divergence: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the sum of the loss over pairs, sums of what is logged). pairs [P, 3]."""
        c, r = pairs[:, 0].long(), pairs[:, 1].long()
        if self.unpaired:
            return self._unpaired(sums, known, lengths, c, pairs[:, 2].to(sums.dtype), divergence)
        lengths = lengths.clamp_min(1)
        a = Answers(sums[c], sums[r], known[c], known[r], lengths[c], lengths[r])
        smooth, gamma = self.settings.label_smoothing, self.settings.gamma
        gamma = 1.0 if gamma is None else gamma
        value = sums.sum() * 0
        for name, weight in self.losses.items():
            value = value + weight * LOSSES[name](a, self.beta(name), smooth, gamma).sum()
        with torch.no_grad():
            beta = self.beta(next(iter(self.losses)))
            rewards = beta * (a.c - a.ref_c), beta * (a.r - a.ref_r)
            if not self.needs_reference:
                rewards = beta * a.mean_c, beta * a.mean_r
            gaps = torch.cat([(a.ref_c - a.c) / a.len_c, (a.ref_r - a.r) / a.len_r])
            numbers = (
                *rewards,
                rewards[0] - rewards[1],
                (rewards[0] > rewards[1]).to(sums.dtype),
                a.c,
                a.r,
                a.len_c,
                a.len_r,
                (torch.expm1(gaps) - gaps) / 2 * self.needs_reference,
            )
        return value, {name: number.sum() for name, number in zip(FIGURES, numbers, strict=True)}

    def _unpaired(
        self, sums: Tensor, known: Tensor, lengths: Tensor, own: Tensor, label: Tensor, divergence: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, beta = self.settings, self.beta("kto")
        gain = sums[own] - known[own]
        z = gain.new_tensor(divergence)
        value = kto(gain, z, label, beta, settings.desirable_weight, settings.undesirable_weight).sum()
        with torch.no_grad():
            good = (label > 0).to(sums.dtype)
            out = {"kl": z * len(own), "rewards/accuracy": (gain * label > z * label).to(sums.dtype).sum()}
            for name, of in (("chosen", good), ("rejected", 1 - good)):
                out[f"rewards/{name}"] = (beta * gain * of).sum()
                out[f"log_probs/{name}"] = (sums[own] * of).sum()
                out[f"lengths/{name}"] = (lengths[own] * of).sum()
                out[f"pairs/{name}"] = of.sum()
        return value, out


def _pairs(batch: Batch) -> Tensor:
    """[P, 3]: of each pair its sequences in the batch, and the gap."""
    found, first = [], 0
    for lengths, pairs in zip(batch.groups.get("sequences", ()), batch.groups.get("pairs", ()), strict=True):
        found += [(first + a, first + b, gap) for a, b, gap in pairs]
        first += len(lengths)
    return torch.tensor(found, dtype=torch.float64).view(-1, 3)


def _only(batch: Batch, number: int) -> Batch:
    """A batch of one sequence of each sample, number 0 or -1; all media of a sample belong to it."""
    samples = unpack(batch)
    for sample in samples:
        if len(sample.sequences) < 2:
            continue
        at = sum(sample.sequences[:number])
        length = sample.sequences[number]
        for name in ("input_ids", "labels", "weights", "position_ids"):
            sample.tensors[name] = sample.tensors[name][..., at : at + length]
        sample.sequences, sample.pairs = (length,), tuple((0, 0, label) for _, _, label in sample.pairs)
        sample.shared = False
    return pack(samples)


def _refuse(recipe: Recipe) -> None:
    """Raise PolymodalError for keys that these objectives do not take."""
    train, settings, name = recipe.train, recipe.train.preference, recipe.train.objective
    losses = losses_of(settings)
    for key in ("time_weight", "histogram", "weight_alpha", "weight_beta"):
        if getattr(settings, key) != getattr(Preference(), key):
            raise PolymodalError(
                f"train.preference.{key} is for pictures and clips (diffusion_dpo).", "Leave it out."
            )
    if not losses:
        raise PolymodalError("train.preference.loss names no loss.", "Leave it out for sigmoid.")
    if name == "kto":
        other = ("loss", "label_smoothing", "gamma", "pairs", "min_gap")
        set_ = [key for key in other if getattr(settings, key) != getattr(Preference(), key)]
        if set_:
            raise PolymodalError(
                f"train.preference.{set_[0]} is for pairs, train.objective is kto.",
                "Leave it out, or set train.objective to dpo.",
            )
    else:
        for key, of in (("label_smoothing", ("sigmoid", "robust")), ("gamma", ("simpo",))):
            if getattr(settings, key) and not set(of) & set(losses):
                raise PolymodalError(
                    f"train.preference.{key} is for {' and '.join(of)}, the loss is {', '.join(losses)}.",
                    "Leave it out, or choose such a loss.",
                )
        if (settings.desirable_weight, settings.undesirable_weight) != (1.0, 1.0):
            raise PolymodalError(
                "train.preference.desirable_weight and undesirable_weight are for kto.", "Leave them out."
            )
        if set(losses) <= set(REFERENCE_FREE) and (settings.reference or settings.cache_reference):
            raise PolymodalError(
                f"train.preference.reference: the loss {', '.join(losses)} uses no reference.",
                "Leave reference and cache_reference out.",
            )
    if recipe.parallel.pp > 1 and (name == "kto" or not set(losses) <= set(REFERENCE_FREE)):
        raise PolymodalError(
            f"parallel.pp = {recipe.parallel.pp}: the reference of {name} is asked on ranks that hold the "
            "whole model.",
            "Set parallel.pp to 1; tp, cp and FSDP are free. The losses simpo and orpo need no reference.",
        )
    if train.loss != "per_token":
        raise PolymodalError(
            f"train.loss = {train.loss} is the weighting of next-token loss, train.objective is {name}.",
            "Leave it out; sigmoid_norm, ipo and simpo are means over an answer's tokens.",
        )
    if recipe.data.train_on != "assistant":
        raise PolymodalError(
            f"data.train_on = {recipe.data.train_on}: {name} learns from the answers that are compared "
            "alone.",
            "Leave it out.",
        )
    if recipe.data.overlong == "split":
        raise PolymodalError(
            f"data.overlong = split: answers that {name} compares cannot be split.", "Use drop or error."
        )
    refuse_dropout(recipe)


def refuse_dropout(recipe: Recipe) -> None:
    """Raise PolymodalError for dropout of adapters."""
    if recipe.model.lora is not None and recipe.model.lora.dropout:
        raise PolymodalError(
            f"model.lora.dropout = {recipe.model.lora.dropout}: it makes noise of the ratio to the "
            "reference.",
            "Set it to 0.",
        )
