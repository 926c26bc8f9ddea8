"""Load statistics of mixture-of-experts routers, and the balance loss made of them.

A pipeline stage adds its own layers' statistics to those of the stages before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.core.sample import Batch


def router_sums(
    router_logits: Sequence[Tensor], experts_per_token: int, batch: Batch | None = None
) -> Tensor:
    """One [T, E] a layer -> [2, E]: sums over layers of the share of choices that fall on each expert (k in
    all a token, no gradient) and of its mean probability, float32 (float64 for such logits).

    batch: the micro-batch. When its rows are spread over ranks, choices are counted over all of them and
    probabilities are each rank's own part of the mean: the sum of the ranks' balance losses is then the loss,
    as with the text term; rows that only fill up a pack do not count.
    """
    logits = torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in router_logits])
    group = None
    if batch is not None and batch.cut is not None:
        group = batch.cut.context.group
        if batch.cut.filler:
            logits = logits[:, batch["rows"] < batch["labels"].numel() - batch.cut.filler]
    probability = (logits if logits.dtype == torch.float64 else logits.float()).softmax(dim=-1)
    chosen = probability.topk(experts_per_token, dim=-1).indices
    picked = torch.zeros_like(probability).scatter_(2, chosen, 1.0).sum(dim=(0, 1))
    known = torch.cat([picked, picked.new_full((1,), probability.shape[1])])
    if group is not None:
        dist.all_reduce(known, group=group)
    return torch.stack([known[:-1], probability.sum(dim=(0, 1))]) / known[-1]


def balance_loss(sums: Tensor, layers: int) -> Tensor:
    """Load-balance loss of one micro-batch from the sums [2, E] of all its layers.

    E * sum_e (mean share of e) * (mean probability of e), over all layers' tokens together (Fedus et al.
    2021, Switch Transformer, eq. 4-6, summed over the k choices).
    """
    share, probability = sums / layers
    return sums.shape[-1] * (share * probability).sum()


@torch.no_grad()
def expert_choices(router_logits: Sequence[Tensor], experts_per_token: int) -> Tensor:
    """One [T, E] a layer -> [layers, E] float32 (exact to 2^24): how many tokens chose each expert."""
    logits = torch.stack([layer.reshape(-1, layer.shape[-1]) for layer in router_logits])
    chosen = logits.topk(experts_per_token, dim=-1).indices.flatten(1)
    counts = logits.new_zeros(len(logits), logits.shape[-1], dtype=torch.float32)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))


def load_figures(choices: Tensor) -> dict[str, float]:
    """Metrics of choices [layers, E]: the busiest expert's load over its layer's mean, and the share of
    experts that no token chose. Layers without any choice (of other pipeline stages) are left out."""
    layers = choices[choices.sum(dim=1) > 0]
    if not len(layers):
        return {}
    busiest = (layers.max(dim=1).values / layers.mean(dim=1)).max()
    return {"experts/busiest": float(busiest), "experts/idle": float((layers == 0).to(torch.float64).mean())}
