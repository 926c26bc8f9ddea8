"""Next-token loss: three weightings, chunked over the vocabulary, exact under every layout.

The logits of a batch are never whole: the head is multiplied in chunks of rows and the gradients are made in
the forward pass, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from polymodal.core.sample import IGNORE, Batch
from polymodal.core.tensors import to_device
from polymodal.distributed.router_loss import balance_loss, expert_choices, router_sums
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.recipe import Recipe

Weighting = Literal["per_token", "per_sample", "per_micro_batch"]
CHUNK_BYTES = 512 << 20
"""Logits held at a time, in the dtype of the arithmetic."""
BLOCK_ELEMENTS = {"cpu": 1 << 21}
"""Logits computed at a time in float32: few enough for a CPU's cache, 2^24 for other devices' kernels."""


def token_weights(batch: Batch, weighting: Weighting) -> Tensor:
    """Weight of every token's loss before the global normalisation.

    batch: packed, weights [1, T] float32; or padded, weights [B, T], segments["text"] the rows of the
    flattened
    batch. Returns the same shape: w for per_token; w / sum of w in its sample for per_sample; w / sum of w in
    the micro-batch for per_micro_batch.
    """
    weights = batch["weights"]
    if weighting == "per_token":
        return weights
    if weighting == "per_micro_batch":
        return weights / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    lengths = batch.segments["text"].diff()
    numbers = torch.arange(len(lengths), device=weights.device)
    sample = torch.repeat_interleave(numbers, lengths.to(torch.int64), output_size=weights.numel())
    sums = torch.zeros(len(lengths), dtype=weights.dtype, device=weights.device)
    sums.index_add_(0, sample, weights.reshape(-1))
    return weights / sums.clamp_min(torch.finfo(weights.dtype).tiny)[sample].view_as(weights)


class _HeadLoss(torch.autograd.Function):
    """sum_i w_i * (logsumexp(h_i W^T) - h_i W^T[y_i]), vocabulary optionally cut over a process group.

    The gradient of softmax cross entropy, (p - onehot) w, is formed while a chunk's logits exist; backward
    only scales it. A chunk of rows goes over the vocabulary in blocks. Of each block its softmax and the
    logarithm of its sum are kept; what a block's softmax lacks to that of the whole vocabulary is one factor
    a row (Milakov and Gimelshein 2018), and rows are scaled in hidden states, not in logits. The label's own
    column is zero in a block and taken apart, since p - 1 is lost where p is held in 16 bits. hidden [N, D];
    weight [V_local, D]; bias [V_local] or None; labels [N] (global ids); w [N] float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, w, offset, group, rows):
        count, vocabulary = hidden.shape[0], weight.shape[0]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_bias = bias is not None and ctx.needs_input_grad[2]
        needed = need_hidden or need_weight or need_bias
        chunks = -(-count // rows)
        rows = -(-count // chunks)
        block = max(1, BLOCK_ELEMENTS.get(hidden.device.type, 1 << 24) // rows)
        cuts = [(a, min(a + block, vocabulary)) for a in range(0, vocabulary, block)]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        sums = weight.dtype if chunks == 1 else accumulate  # of the weight's gradient
        grad_weight = torch.empty(weight.shape, dtype=sums, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(vocabulary, dtype=accumulate, device=weight.device) if need_bias else None
        losses = torch.empty(count, dtype=accumulate, device=hidden.device)
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            h, y = hidden[part], labels[part] - offset
            mine, y = (y >= 0) & (y < vocabulary), y.clamp(0, vocabulary - 1)
            shares, logs = [], []  # of each block: its softmax, and log of its sum of exponentials
            target = torch.zeros(len(h), dtype=accumulate, device=h.device)
            for a, b in cuts:
                raw = h @ weight[a:b].t() if bias is None else torch.addmm(bias[a:b], h, weight[a:b].t())
                inside = (mine & (y >= a) & (y < b))[:, None]
                column = (y - a).clamp(0, b - a - 1)[:, None]
                target = torch.where(inside[:, 0], raw.gather(1, column)[:, 0].to(accumulate), target)
                peak = raw.amax(dim=1).to(accumulate)
                share = torch.softmax(raw, dim=1, dtype=accumulate)
                logs.append(peak - share.amax(dim=1).log_())  # the largest share is one over the sum
                if needed:
                    share = share.to(hidden.dtype)
                    shares.append(share.scatter_(1, column, share.gather(1, column).masked_fill_(inside, 0)))
            parts = torch.stack(logs, dim=1)
            normal = parts.logsumexp(dim=1)
            target.masked_fill_(~mine, 0)
            if group is not None:
                highest = normal.clone()
                dist.all_reduce(highest, dist.ReduceOp.MAX, group)
                both = torch.stack([(normal - highest).exp_(), target])
                dist.all_reduce(both, dist.ReduceOp.SUM, group)
                normal, target = both[0].log() + highest, both[1]
            losses[part] = normal - target
            if not needed:
                continue
            scale = w[part].to(accumulate)
            factors = (parts - normal[:, None]).exp_().mul_(scale[:, None])
            own = torch.expm1(target - normal).mul_(scale).masked_fill_(~mine, 0)[:, None]
            wide = h.to(accumulate)
            into_hidden = torch.zeros(h.shape, dtype=accumulate, device=h.device)
            for number, ((a, b), share) in enumerate(zip(cuts, shares, strict=True)):
                factor = factors[:, number, None]
                if need_hidden:
                    into_hidden += (share @ weight[a:b]).to(accumulate).mul_(factor)
                if need_weight:
                    scaled = (wide * factor).to(hidden.dtype)
                    if start == 0 and sums == hidden.dtype:
                        torch.mm(share.t(), scaled, out=grad_weight[a:b])
                    elif start == 0:
                        grad_weight[a:b] = share.t() @ scaled
                    elif sums == hidden.dtype:
                        grad_weight[a:b].addmm_(share.t(), scaled)
                    else:
                        grad_weight[a:b] += share.t() @ scaled
                if need_bias:
                    grad_bias[a:b] += share.to(accumulate).t() @ factor[:, 0]
            if need_hidden:
                grad_hidden[part] = into_hidden.addcmul_(own, weight[y].to(accumulate))
            if need_weight:
                # Summed a label first: many small terms would be lost in a 16-bit sum. A label's sum is at
                # its first place among the sorted ones, its other places are zero: their number is not asked.
                labels_in_order = y.sort().values
                label = torch.zeros(h.shape, dtype=accumulate, device=h.device)
                label.index_add_(0, torch.searchsorted(labels_in_order, y), wide * own)
                grad_weight.index_add_(0, labels_in_order, label.to(sums))
            if need_bias:
                grad_bias.index_add_(0, y, own[:, 0])
        if group is not None and need_hidden:
            dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(
            grad_hidden,
            grad_weight.to(weight.dtype) if need_weight else None,
            grad_bias.to(bias.dtype) if need_bias else None,
        )
        ctx.scale = None
        ctx.mark_non_differentiable(losses)
        return (losses * w.to(accumulate)).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        # In place: a copy of the head's gradient costs as much as the head. Once: zero-bubble schedules call
        # this a second time, with the same scale, for the weights.
        if ctx.scale is None:
            for tensor in ctx.saved_tensors:
                if tensor is not None:
                    tensor.data.mul_(grad.to(tensor.dtype))
            ctx.scale = grad
        elif ctx.scale is not grad and not torch.equal(ctx.scale, grad):
            raise RuntimeError("The chunked loss can be differentiated again only with the same scale.")
        return *ctx.saved_tensors, None, None, None, None, None


def kept_rows(labels: Tensor, weights: Tensor) -> Tensor:
    """Indices of the rows that have a label and a weight."""
    return ((labels != IGNORE) & (weights != 0)).nonzero()[:, 0]


def head_loss(
    hidden: Tensor, head: torch.nn.Module, labels: Tensor, weights: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted negative log-likelihood of labels under softmax(head(hidden)), in chunks of rows.

    hidden [T, D] (same on every rank of the head's tensor-parallel group); labels [T] int64 or IGNORE;
    weights [T]; keep [N]: indices of rows with a label and a weight, where they are known. Other rows are not
    multiplied at all. Returns (sum of weighted losses, losses of kept rows [N] float32 or float64, keep).
    """
    keep = kept_rows(labels, weights) if keep is None else keep
    weight, bias = cast(Tensor, head.weight), getattr(head, "bias", None)
    group, offset = None, 0
    if isinstance(weight, DTensor):
        placements = weight.placements
        if any(p.is_shard() for p in placements):
            mesh = weight.device_mesh
            group = mesh.get_group()
            offset = _offset(weight.shape[0], mesh.size(), mesh.get_local_rank())
        weight = weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    hidden = hidden.to(weight.dtype)
    if not torch.is_grad_enabled():  # which needs_input_grad does not tell
        weight, bias = weight.detach(), bias if bias is None else bias.detach()
    rows = max(16, CHUNK_BYTES // max(1, weight.shape[0] * hidden.element_size()))
    if len(keep) == 0:
        # every rank and every parameter still takes part in backward
        parts = [part[:1].sum() * 0 for part in (hidden, weight, bias) if part is not None]
        return sum(parts[1:], parts[0]), hidden.new_zeros(0), keep
    loss, losses = _HeadLoss.apply(
        hidden[keep], weight, bias, labels[keep], weights[keep], offset, group, rows
    )
    return loss, losses, keep


def _offset(size: int, parts: int, rank: int) -> int:
    """First row of a rank's chunk, as torch.chunk cuts."""
    chunk = -(-size // parts)
    return min(size, chunk * rank)


@dataclass(frozen=True)
class Rows:
    """The tokens of this rank in a batch that have a label and a weight, of all its rows.

    hidden [n, D], labels and weights [n]: this rank's rows; keep: indices of those with a label and a
    weight, on the device; kept: the same on the host, numbered in the whole stream.
    """

    hidden: Tensor
    labels: Tensor
    weights: Tensor
    keep: Tensor
    kept: Tensor

    @classmethod
    def of(cls, output: Output, batch: Batch, weights: Tensor) -> Rows:
        """weights: of the whole stream, shaped as the batch's."""
        weights, labels = weights.reshape(-1), batch["labels"].reshape(-1)
        # what is asked of the numbers themselves is asked of their copies on the host: nothing waits for the
        # device
        known = {name: cast(Tensor, batch.on_host(name)).reshape(-1) for name in ("labels", "weights")}
        rows = batch.on_host("rows")
        if rows is not None:  # this rank's rows of the whole stream
            weights, labels = weights[batch["rows"]], labels[batch["rows"]]
            known = {name: values[rows] for name, values in known.items()}
        hidden = output.hidden_states.reshape(-1, output.hidden_states.shape[-1])
        kept = kept_rows(**known)
        keep = to_device(kept, hidden.device)
        return cls(hidden, labels, weights, keep, kept if rows is None else rows[kept])


class LanguageObjective:
    """Weighted next-token loss plus, for experts, the router's balance loss.

    The loss of a step is sum(w * nll) / sum(w) over the whole global batch, whatever the layout: `weights`
    gives this micro-batch's denominators, the caller sums them over the global batch, `loss` multiplies by
    the inverses. The balance loss is declared per micro-batch: a pack's loss depends on that pack alone, a
    step takes their mean.
    """

    term = "text"
    aux_weight = 0.0
    parts: tuple[str, ...] = ("text", "image", "video", "audio", "mixed")
    """Parts of the loss in logs: nll/<part> and tokens/<part>."""
    keys: tuple[str, ...] = ()
    """Further sums in the logs of `loss`, from which `shown` makes figures."""

    def __init__(
        self, weighting: Weighting = "per_token", aux_weight: float = 0.0, experts_per_token: int = 0
    ):
        self.weighting = weighting
        self.aux_weight = aux_weight
        self.experts_per_token = experts_per_token

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Family) -> LanguageObjective:
        return cls(recipe.train.loss, **family.balance(recipe.train.router_aux_loss))

    def weights(self, batch: Batch) -> dict[str, float]:
        """Denominators of this micro-batch's terms; no model is needed."""
        total = float(token_weights(batch, self.weighting).sum(dtype=torch.float64))
        terms = {"text": total}
        if self.aux_weight:
            terms["balance"] = 1.0 if total > 0 else 0.0
        return terms

    def shown(self, total: Mapping[str, float]) -> dict[str, float]:
        """Figures of a step's log from the sums of `keys` over the global batch."""
        return {}

    def validation(self) -> LanguageObjective:
        """What validation measures: the same."""
        return self

    def prepare(self, actors: Any, batches: list[Batch]) -> list[Batch]:
        """Nothing to draw or to precompute for supervised text."""
        return batches

    def loss(self, output: Output, batch: Batch, inverse: dict[str, float]) -> tuple[Tensor, dict[str, Any]]:
        """Scaled loss (a scalar, to be summed over ranks and micro-batches) and logs, sums over tokens.

        Logs: "loss" the scaled text term; "nll/<modality>" and "tokens/<modality>": sums of unweighted losses
        and counts, to be added over ranks; "balance": the scaled router term; "choices": [layers here, E]
        tokens that chose each expert.
        """
        counts = float(cast(Tensor, batch.on_host("weights")).sum()) > 0
        loss, logs = self.text_term(output, batch, inverse)
        if self.aux_weight:
            value = self.balance(output, batch)
            term = value * (inverse["balance"] if counts else 0.0)
            loss = loss + self.aux_weight * term.to(loss.dtype)
            logs["balance"] = term.detach()
        if self.experts_per_token and counts and output.extra["router_logits"]:
            logs["choices"] = expert_choices(output.extra["router_logits"], self.experts_per_token)
        return loss, logs

    def text_term(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss without that of the routers, and its logs."""
        assert output.head is not None
        rows = Rows.of(output, batch, token_weights(batch, self.weighting))
        text, losses, _ = head_loss(rows.hidden, output.head, rows.labels, rows.weights, rows.keep)
        loss = text * inverse["text"]
        return loss, {"loss": loss.detach()} | _by_modality(batch, losses, rows.kept)

    def balance(self, output: Output, batch: Batch) -> Tensor:
        """Router term of one micro-batch: of the layers here and the sums of earlier pipeline stages."""
        sums, layers = output.extra.get("router_sums_before"), output.extra.get("router_layers_before", 0)
        if routers := output.extra["router_logits"]:
            own = router_sums(routers, self.experts_per_token, batch)
            sums, layers = own if sums is None else own + sums, layers + len(routers)
        assert isinstance(sums, Tensor)
        return balance_loss(sums, layers)


def _by_modality(batch: Batch, losses: Tensor, kept: Tensor) -> dict[str, Any]:
    """kept: the rows of the losses in the whole stream, on the host."""
    names = batch.groups.get("modality") or ("text",)
    present = sorted(set(names))
    if len(present) == 1:
        return {f"nll/{present[0]}": losses.sum(), f"tokens/{present[0]}": float(len(losses))}
    ends = cast(Tensor, batch.host.get("text", batch.segments["text"]))[1:].to(torch.int64)
    numbers = torch.tensor([present.index(name) for name in names])
    own = numbers[torch.bucketize(kept, ends, right=True)]
    there, logs = to_device(own, losses.device), dict[str, Any]()
    for number, name in enumerate(present):
        logs[f"nll/{name}"] = torch.where(there == number, losses, 0).sum()
        logs[f"tokens/{name}"] = float((own == number).sum())
    return logs
