"""Group policy optimization (GRPO, Shao et al. 2024, arXiv:2402.03300) and its kin.

`prepare` has the answers of a step made and scored, and compares those to one prompt with each other; the
loss is then a function of each token's log-probability, differentiated through the chunked head as in
preference.py: one pass for the log-probabilities, a second one with the derivative of the loss as weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import AXES, Batch
from polymodal.core.tensors import to_device
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.objectives.language import LanguageObjective, Rows, head_loss
from polymodal.recipe import Grpo, Recipe, Reward

EPSILON = 1e-4  # added to the standard deviation of a group
COUNTS = ("asked", "answers", "groups", "learned", "generated", "tokens")
OF_ANSWERS = ("reward", "truncated", "lengths", "failed")
OF_GROUPS = ("reward_std", "equal_groups")
OF_TOKENS = ("clip_fraction", "ratio", "kl", "logp_difference")


@dataclass
class Rollout:
    """The answers to a batch of prompts.

    batch: of each prompt one sample, whose sequences are the prompt with each of its answers; labels and
    weights are those of the answers. Of each sequence [S]: total, the sum of rewards (NaN: not to be used);
    values and failed [S, R] of each reward; finished; lengths, tokens of the answer. sampled [T]: the
    log-probability of each label as it was drawn; entropy: sum over drawn tokens.
    """

    batch: Batch
    total: Tensor
    values: Tensor
    failed: Tensor
    finished: Tensor
    lengths: Tensor
    sampled: Tensor
    entropy: float


def advantages(total: Tensor, sizes: Sequence[int], kind: str) -> Tensor:
    """Advantage [S] of each answer in groups of these sizes, float64; 0 in groups whose rewards are equal,
    which is asked of the numbers themselves: what rounding leaves of a standard deviation is no scale.
    total: NaN for answers that are left out, whose advantage is NaN; so is one without another in its group.
    """
    out = torch.full_like(total, math.nan, dtype=torch.float64)
    for places in torch.arange(len(total)).split(list(sizes)):
        known = places[~total[places].isnan()]
        rewards = total[known].double()
        if len(known) < 2:
            continue
        centered = rewards - rewards.mean()
        if (rewards == rewards[0]).all():
            centered = torch.zeros_like(rewards)
        elif kind == "group":
            centered = centered / (rewards.std() + EPSILON)
        elif kind == "rloo":
            centered = centered * len(known) / (len(known) - 1)
        out[known] = centered
    return out


def equal_groups(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of each answer [S] whether all of its group have the same value; NaN does not count."""
    out = torch.zeros(len(values), dtype=torch.bool)
    for places in torch.arange(len(values)).split(list(sizes)):
        known = values[places][~values[places].isnan()]
        out[places] = bool((known == known[:1]).all())
    return out


def overlong(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """What is taken from the reward of answers that nearly reach `longest` (DAPO, Yu et al. 2025,
    arXiv:2503.14476, eq. 13): 0 up to longest - buffer, then linearly to 1."""
    if not buffer:
        return torch.zeros(len(lengths), dtype=torch.float64)
    return ((lengths.double() - (longest - buffer)) / buffer).clamp(0, 1)


@dataclass(frozen=True)
class TokenLosses:
    """Of each token [N]: its loss, with gradient by its log-probability; and, without, the ratio, whether it
    was clipped, and the estimate k3 of the divergence (Schulman 2020)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def token_losses(
    log_probs: Tensor,
    old: Tensor,
    advantage: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    settings: Grpo,
    reference: Tensor | None = None,
) -> TokenLosses:
    """The clipped surrogate of each token. log_probs, old, reference, advantage [N]; sequence [N]: of each
    token its number; lengths [S]: tokens of each.

    ratio: sequence is GSPO's (Zheng et al. 2025, arXiv:2507.18071) in the form whose gradient goes through
    each token. Of the divergence the value is k3; its gradient is that of the divergence itself, ratio *
    (log_probs - reference) for each token's log-probability: the derivative of k3 descends another one.
    """
    apart = log_probs - old
    own = apart
    if settings.ratio == "sequence":
        sums = apart.new_zeros(len(lengths)).index_add(0, sequence, apart.detach())
        mean = (sums / lengths.clamp_min(1))[sequence]
        own = mean + log_probs - log_probs.detach()
    ratio = own.exp()
    high = settings.clip_low if settings.clip_high is None else settings.clip_high
    plain, bounded = ratio * advantage, ratio.clamp(1 - settings.clip_low, 1 + high) * advantage
    gain = torch.minimum(plain, bounded)
    clipped = plain > bounded
    if settings.dual_clip is not None:  # Ye et al. 2020, arXiv:1912.09729
        least = settings.dual_clip * advantage
        clipped = clipped | ((advantage < 0) & (gain < least))
        gain = torch.where(advantage < 0, torch.maximum(gain, least), gain)
    loss, kl = -gain, torch.zeros_like(gain).detach()
    if reference is not None:
        with torch.no_grad():
            gap = reference - log_probs
            kl = torch.expm1(gap) - gap
            slope = -apart.exp() * gap
        if settings.kl and settings.kl_in == "loss":
            loss = loss + settings.kl * (kl + slope * (log_probs - log_probs.detach()))
    return TokenLosses(loss, ratio.detach(), clipped.detach(), kl)


def answer_log_probs(output: Output, batch: Batch, temperature: float) -> tuple[Tensor, Rows]:
    """(log-probabilities [N] of the kept rows at this temperature, without gradient; the rows, whose hidden
    states are divided by it)."""
    assert output.head is not None
    if temperature != 1 and getattr(output.head, "bias", None) is not None:
        raise PolymodalError(
            f"train.grpo.temperature = {temperature}: this model's head has a bias.", "Set it to 1."
        )
    rows = Rows.of(output, batch, batch["weights"])
    if temperature != 1:
        rows = replace(rows, hidden=rows.hidden / temperature)
    with torch.no_grad():
        _, losses, _ = head_loss(rows.hidden.detach(), output.head, rows.labels, rows.weights, rows.keep)
    return -losses.to(torch.promote_types(losses.dtype, torch.float32)), rows


class PolicyObjective(LanguageObjective):
    """What train.grpo and train.rewards name. The loss of a step is a mean over the tokens, or the answers,
    of the global batch (train.grpo.aggregate), whatever the layout."""

    term = "policy"
    parts = ()
    greedy = False
    """Validation: one answer to each prompt, the likeliest tokens, nothing learned."""

    def __init__(
        self,
        settings: Grpo,
        rewards: Sequence[Reward],
        aux_weight: float = 0.0,
        experts_per_token: int = 0,
    ):
        super().__init__("per_token", aux_weight, experts_per_token)
        self.settings = settings
        self.names = tuple(reward.name for reward in rewards)
        own = (f"rewards/{name}{end}" for name in self.names for end in ("", "/count"))
        self.keys = (*COUNTS, *OF_ANSWERS, *OF_GROUPS, *OF_TOKENS, "entropy", *own)

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Family) -> PolicyObjective:
        train = recipe.train
        _refuse(recipe)
        return cls(train.grpo, train.rewards, **family.balance(train.router_aux_loss))

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl > 0

    @property
    def updates(self) -> int:
        """Optimizer updates on the batches of one `prepare`."""
        return self.settings.updates

    def validation(self) -> PolicyObjective:
        made = copy.copy(self)
        made.greedy = True
        return made

    def weights(self, batch: Batch) -> dict[str, float]:
        tokens = (batch["weights"] != 0).reshape(-1)
        count = float(tokens.sum())
        if self.settings.aggregate != "token" and "text" in batch.segments:
            own = tokens.split(batch.segments["text"].diff().tolist())
            count = float(sum(bool(each.any()) for each in own))
        return {"policy": count, **({"balance": float(count > 0)} if self.aux_weight else {})}

    # ---------------------------------------------------------------- before the loss

    def prepare(self, actors: Any, batches: list[Batch]) -> list[Batch]:
        """The prompts' answers as batches, with each token's `advantages`, `sampled`, and where they are
        needed `old` and `reference` [1, T]; answers that are not learned from have no weight.

        actors: None where batches have no data (plan). rollout(batches, greedy) gives a Rollout a batch;
        policy(batches) and reference(batches) the log-probability of each label [T], on the host.
        Collective."""
        if actors is None:
            return batches
        settings, made = self.settings, actors.rollout(batches, self.greedy)
        whole = [each.batch for each in made]
        needs_old = settings.updates > 1 or (settings.kl > 0 and settings.kl_in == "reward")
        old: list[Any] = [None] * len(whole)
        reference: list[Any] = [None] * len(whole)
        if needs_old and not self.greedy:
            old = actors.policy(whole)
        if self.needs_reference and not self.greedy:
            reference = actors.reference(whole)
        return [self._judged(*each) for each in zip(made, old, reference, strict=True)]

    def _judged(self, made: Rollout, old: Tensor | None, reference: Tensor | None) -> Batch:
        settings, batch = self.settings, made.batch
        lengths = batch.segments["text"].diff().to(torch.int64)
        sizes = [len(own) for own in batch.groups.get("sequences", ((1,),) * len(batch.samples))]
        total = made.total - overlong(made.lengths, settings.max_new_tokens, settings.overlong_buffer)
        if old is not None and reference is not None and settings.kl_in == "reward":
            gap = (old - reference).double() * (batch["weights"][0] != 0)
            total = total - settings.kl * torch.stack([own.sum() for own in gap.split(lengths.tolist())])
        known = ~total.isnan()
        if self.greedy:
            advantage, learned = torch.zeros_like(total), known.clone()
        else:
            advantage = advantages(total, sizes, settings.advantage)
            learned = ~advantage.isnan()
        if settings.filter is not None and not self.greedy:
            of = total if settings.filter == "total" else made.values[:, self.names.index(settings.filter)]
            learned &= ~equal_groups(of, sizes)
        if settings.mask_truncated:
            learned &= made.finished
        tensors = dict(batch.tensors)
        tensors["weights"] = batch["weights"] * torch.repeat_interleave(learned, lengths)[None]
        tensors["advantages"] = torch.repeat_interleave(advantage.nan_to_num(0.0), lengths)[None]
        tensors["sampled"] = made.sampled[None]
        for name, values in (("old", old), ("reference", reference)):
            if values is not None:
                tensors[name] = values[None]
        axes = {**batch.axes, **dict.fromkeys(tensors.keys() - batch.tensors.keys(), AXES["weights"])}
        figures = self._figures(made, total, known, learned, sizes)
        groups = {**batch.groups, "figures": figures}
        return replace(batch, tensors=tensors, axes=axes, groups=groups)

    def _figures(
        self, made: Rollout, total: Tensor, known: Tensor, learned: Tensor, sizes: Sequence[int]
    ) -> dict[str, float]:
        """Sums of what is logged of the answers."""
        asked = made.lengths >= 0
        out: dict[str, Any] = {
            "asked": asked.sum(),
            "answers": known.sum(),
            "learned": learned.sum(),
            "reward": total[known].sum(),
            "truncated": (asked & ~made.finished).sum(),
            "lengths": made.lengths[asked].sum(),
            "generated": made.lengths[asked].sum(),
            "failed": made.failed.any(1).sum(),
            "entropy": made.entropy,
        }
        equal, spread, count = equal_groups(total, sizes), 0.0, 0
        for places in torch.arange(len(total)).split(list(sizes)):
            of = total[places][known[places]]
            if len(of) > 1:
                spread, count = spread + float(of.std()), count + 1
        firsts = torch.tensor([0, *sizes[:-1]]).cumsum(0) if sizes else torch.zeros(0, dtype=torch.int64)
        out |= {"reward_std": spread, "groups": count}
        real = [bool(known[a : a + n].sum() > 1) for a, n in zip(firsts.tolist(), sizes, strict=True)]
        out["equal_groups"] = sum(bool(equal[a]) for a, r in zip(firsts.tolist(), real, strict=True) if r)
        for column, name in enumerate(self.names):
            values = made.values[:, column]
            out[f"rewards/{name}"] = values[~values.isnan()].sum()
            out[f"rewards/{name}/count"] = (~values.isnan()).sum()
        return {name: float(value) for name, value in out.items()}

    # ---------------------------------------------------------------- the loss

    def shown(self, total: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step's log from sums over the global batch."""
        out: dict[str, float] = {}

        def put(name: str, key: str, count: float) -> None:
            if count:
                out[name] = total[key] / count

        answers = total["asked"]
        put("reward", "reward", total["answers"])
        for name in self.names:
            put(f"rewards/{name}", f"rewards/{name}", total[f"rewards/{name}/count"])
        put("lengths/answers", "lengths", answers)
        put("truncated", "truncated", answers)
        out["failed"] = total["failed"]
        if self.greedy:
            return out
        put("reward_std", "reward_std", total["groups"])
        put("equal_groups", "equal_groups", total["groups"])
        put("learned", "learned", answers)
        put("entropy", "entropy", total["generated"])
        tokens = total["tokens"]
        for name in OF_TOKENS:
            if name != "kl" or self.needs_reference:
                put(name, name, tokens)
        return out

    def text_term(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Any]]:
        assert output.head is not None
        log_probs, rows = answer_log_probs(output, batch, self.settings.temperature)
        device, wide = rows.hidden.device, log_probs.dtype
        ends = cast(Tensor, batch.host.get("text", batch.segments["text"]))[1:].to(torch.int64)
        sequence = to_device(torch.bucketize(rows.kept, ends, right=True), device)
        lengths = log_probs.new_zeros(len(ends)).index_add(0, sequence, torch.ones_like(log_probs))

        def of(name: str) -> Tensor | None:
            values = batch.get(name)
            return None if values is None else values.reshape(-1)[rows.keep].to(wide)

        old, advantage, reference, sampled = map(of, ("old", "advantages", "reference", "sampled"))
        leaf = log_probs.clone().requires_grad_()
        with torch.enable_grad():
            made = token_losses(
                leaf,
                log_probs if old is None else old,
                torch.zeros_like(log_probs) if advantage is None else advantage,
                sequence,
                lengths,
                self.settings,
                reference,
            )
            each = made.loss
            if self.settings.aggregate == "sequence":
                each = each / lengths[sequence]
            elif self.settings.aggregate == "constant":
                each = each / self.settings.max_new_tokens
            scaled = each.sum() * inverse["policy"]
        value = scaled.detach()
        logs: dict[str, Any] = {"loss": value, "tokens": float(len(log_probs))}
        logs |= batch.groups.get("figures", {})
        logs |= {"clip_fraction": made.clipped.sum(), "ratio": made.ratio.sum(), "kl": made.kl.sum()}
        if sampled is not None:
            logs["logp_difference"] = (sampled - (log_probs if old is None else old)).abs().sum()
        if not torch.is_grad_enabled():
            return value, logs
        (slope,) = torch.autograd.grad(scaled, leaf)
        weights = rows.weights.to(wide).index_copy(0, rows.keep, -slope)
        through, _, _ = head_loss(rows.hidden, output.head, rows.labels, weights, rows.keep)
        return through - through.detach() + value, logs


def _refuse(recipe: Recipe) -> None:
    """Raise PolymodalError for keys that grpo does not take."""
    train, parallel, grpo = recipe.train, recipe.parallel, recipe.train.grpo
    reasons = {
        "pp": "a stage of a pipeline cannot answer alone",
        "cp": "a token that is generated cannot be cut over ranks",
        "tp": "the model is not gathered whole over tensor-parallel ranks to answer",
        "ep": "ranks that hold other experts would wait for each other at every token",
    }
    for key, reason in reasons.items():
        if getattr(parallel, key) > 1:
            raise PolymodalError(
                f"parallel.{key} = {getattr(parallel, key)}: {reason}.",
                f"Set parallel.{key} to 1; with FSDP and dp_replicate the answers are generated on gathered "
                "weights.",
            )
    if recipe.model.attention != "auto":
        raise PolymodalError(
            f"model.attention = {recipe.model.attention}: prompts are read in packs, which it does not part.",
            "Leave it out.",
        )
    if grpo.filter not in (None, "total", *(reward.name for reward in train.rewards)):
        raise PolymodalError(
            f"train.grpo.filter = {grpo.filter} is none of train.rewards.",
            "Use total, or the name of one of them.",
        )
    if grpo.reference is not None and not grpo.kl:
        raise PolymodalError(
            "train.grpo.reference is set, train.grpo.kl is 0: no reference is used.",
            "Set kl, or leave reference out.",
        )
    if grpo.kl_in == "reward" and not grpo.kl:
        raise PolymodalError("train.grpo.kl_in = reward, train.grpo.kl is 0.", "Set kl, or leave kl_in out.")
    if grpo.overlong_buffer >= grpo.max_new_tokens:
        raise PolymodalError(
            f"train.grpo.overlong_buffer = {grpo.overlong_buffer} is not less than max_new_tokens "
            f"({grpo.max_new_tokens}).",
            "Lower it.",
        )
    if train.loss != "per_token":
        raise PolymodalError(
            f"train.loss = {train.loss} is the weighting of next-token loss, train.objective is grpo.",
            "Leave it out; train.grpo.aggregate says what is averaged.",
        )
    if recipe.data.train_on != "assistant":
        raise PolymodalError(
            f"data.train_on = {recipe.data.train_on}: grpo learns from its own answers alone.",
            "Leave it out.",
        )
    if recipe.data.overlong == "split":
        raise PolymodalError("data.overlong = split: a prompt cannot be split.", "Use drop or error.")
    if recipe.model.lora is not None and recipe.model.lora.dropout:
        raise PolymodalError(
            f"model.lora.dropout = {recipe.model.lora.dropout}: it makes noise of the ratio to the policy "
            "that answered.",
            "Set it to 0.",
        )
