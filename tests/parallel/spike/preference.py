"""A DPO step on a tiny Qwen2-VL with adapters; the reference is the policy without them, or a frozen sharded copy.

Toy pieces of the spike; used by tests only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from polymodal.core.sample import IGNORE, Batch, pack, padding_sample
from polymodal.models import weights
from polymodal.models.card import Output
from polymodal.train.step import bind
from tests.parallel.spike.comparison import (
    fill,
    forward_backward,
    gradients,
    mesh_of,
    shard,
    state_of,
    worst,
)
from tests.parallel.spike.pipelines import adapt, draw_adapters
from tests.parallel.spike.qwen import example, tiny_qwen2_vl

BETA = 0.3


def sample_log_probs(output: Output, batch: Batch) -> Tensor:
    """Sum of the labels' log-probabilities of every sample of the pack: [S]."""
    labels = batch["labels"][0]
    logits = output.head(output.hidden_states[0])
    token = -nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    lengths = batch.segments["text"].diff().to(torch.int64)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return token.new_zeros(len(lengths)).index_add(0, sample, token)


class Dpo:
    """-log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))) (Rafailov et al. 2023), mean over the global batch's pairs.

    groups["pairs"]: ((place of the chosen sample in the pack, place of the rejected one), ...).
    """

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"pairs": float(len(batch.groups["pairs"]))}

    @torch.no_grad()
    def prepare(self, actors: dict[str, Callable[..., Tensor]], batches: Sequence[Batch]) -> list[Batch]:
        out = []
        for batch in batches:
            reference = actors["reference"](batch=batch, finish=sample_log_probs)
            out.append(replace(batch, tensors={**batch.tensors, "reference": reference}))
        return out

    def loss(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        gain = sample_log_probs(output, batch) - batch["reference"]
        pairs = torch.tensor(batch.groups["pairs"], dtype=torch.int64).reshape(-1, 2)
        margin = gain[pairs[:, 0]] - gain[pairs[:, 1]]
        loss = -nn.functional.logsigmoid(BETA * margin).sum() * inverse["pairs"] + gain.sum() * 0
        return loss, {"loss": loss.detach()}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model. peft freezes the adapters meanwhile and frees them all afterwards; FSDP2 follows both."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _packed(*pairs: tuple[int, tuple[int, int] | None]) -> Batch:
    """Chosen and rejected answers side by side; a pack without a pair is filled up with a weightless sample."""
    samples = []
    for id, picture in pairs:
        samples += [example(2 * id, 4 + id, picture), example(2 * id + 1, 7 - id, picture)]
    batch = pack(samples or [padding_sample(rows=4)])
    batch.groups["pairs"] = tuple((place, place + 1) for place in range(0, len(samples), 2))
    return batch


def dpo_fsdp(rank: int) -> dict[str, Any]:
    """Three pairs over two ranks (2 + 1, the second fills up with a weightless pack), pictures on one rank only; float64."""
    family = tiny_qwen2_vl(2)
    base, model = (family.build().double() for _ in range(2))
    adapt(model)
    for part in (base, model):
        weights.initialise(part, family, seed=6)
        bind(part, family)
    fill(model, draw_adapters(model))
    base.requires_grad_(False)
    states = state_of(base), state_of(model)

    objective = Dpo()
    first, second, third = (0, (2, 4)), (1, None), (2, (2, 2))
    everything = objective.prepare({"reference": base}, [_packed(first), _packed(second), _packed(third)])
    loss = forward_backward(model, objective, everything, None)
    grads = gradients(model)
    # the policy as its own reference has no margin
    neutral = forward_backward(model, objective, objective.prepare({"reference": model}, everything), None)
    model.zero_grad(set_to_none=True)

    mesh = mesh_of(rank, dp_shard=2)
    for part, state in zip((base, model), states, strict=True):
        shard(part, family.card, mesh)
        fill(part, state)
    mine = {0: [_packed(first), _packed(third)], 1: [_packed(second), _packed()]}[rank]

    def without_adapters(**kwargs: Any) -> Tensor:
        with adapters_off(model):
            return model(**kwargs)

    out: dict[str, Any] = {
        "pairs": [batch.groups["pairs"] for batch in mine],
        "neutral": neutral,
        "value": loss,
    }
    for name, reference in (("adapters_off", without_adapters), ("frozen", base)):
        batches = objective.prepare({"reference": reference}, mine)
        total = forward_backward(model, objective, batches, mesh.loss_group)
        out[name] = {"loss": abs(total - loss) / loss, "grad": worst(gradients(model), grads)}
        model.zero_grad(set_to_none=True)
    return out
