"""One global batch: denominators first, then forward and backward of every micro-batch.

The loss is divided by the global denominators before backward, so every reduction over ranks and
micro-batches is a plain sum and the result does not depend on how the batch was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.data.loader import RankStep, StepStats
from polymodal.models.card import Output
from polymodal.models.family import Family
from polymodal.parallel.memory import before_backward
from polymodal.train.layouts import Layout

Finish = Callable[[Output, Batch], Any]


def bind(model: nn.Module, family: Family) -> None:
    """Make `model(batch, finish)` run the family's stage and then `finish(output, batch)` inside one forward.

    Call it before the model is sharded: the head's weight is then whole while the loss uses it. `finish` is
    chosen per call (loss, validation loss, log-probabilities) and returns tensors in plain containers, where
    FSDP2 finds them to hook the backward pass. Parameter names stay as they are. `model(call)` runs
    `call(model)` instead, inside the same
    hooks: sampling while it trains.
    """

    def forward(batch: Batch | Callable[[nn.Module], Any], finish: Finish | None = None) -> Any:
        if finish is None:
            return batch(model)  # type: ignore[operator]
        return finish(family.stage(model, None, batch), batch)  # type: ignore[arg-type]

    model.forward = forward  # type: ignore[method-assign]


def inverse_weights(
    objective: Any, batches: Sequence[Batch], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """1 / (sum over the global batch) of every term's weights; 0 for a term that has none anywhere."""
    sums: dict[str, float] = {}
    for batch in batches:
        for term, value in objective.weights(batch).items():
            sums[term] = sums.get(term, 0.0) + value
    names = sorted(sums)
    totals = torch.tensor([sums[n] for n in names], dtype=torch.float64)
    if group is not None:
        dist.all_reduce(totals, group=group)
    return {n: (1.0 / t if t > 0 else 0.0) for n, t in zip(names, totals.tolist(), strict=True)}


def drop_broken_samples(step: RankStep, layout: Layout, group: dist.ProcessGroup | None) -> list[Batch]:
    """A step's micro-batches, in which samples that any rank of the group could not read have no weight.

    group: ranks that read the same samples (Layout.same_samples_group), None where there is only one. One of
    them
    alone may fail: by its file system, or because its pipeline stage alone decodes pictures. If each
    continued with what it read, ranks that shard one batch or one model would hold batches of different
    shapes. Corrects step.stats.
    """
    if group is None:
        return step.micro_batches
    known = [flag for batch in step.micro_batches for flag in _broken(batch)]
    broken = torch.tensor(known, dtype=torch.int32)
    dist.all_reduce(broken, dist.ReduceOp.MAX, group=group)
    if broken.tolist() == known:
        return step.micro_batches
    batches, stats = [], step.stats
    by_batch = broken.bool().split([len(b.samples) for b in step.micro_batches])
    for batch, gone in zip(step.micro_batches, by_batch, strict=True):
        whole, lost = layout.without(batch, gone.tolist()) if gone.any() else (batch, StepStats())
        batches.append(whole)
        for count in ("samples", "tokens", "trained", "media"):
            setattr(stats, count, getattr(stats, count) - getattr(lost, count))
        stats.broken += ["another rank that reads the same samples could not read it"] * lost.samples
    return batches


def _broken(batch: Batch) -> tuple[bool, ...]:
    """Which samples of a batch could not be read; none where a broken one stops the run."""
    return batch.groups.get("broken", (False,) * len(batch.samples))


class StepMetrics:
    """Logs of a step, summed over micro-batches and, as one vector on the CPU, over ranks.

    parts: the objective's; extra: further keys; routers: layers with experts, and experts of each, whose
    `choices` are summed too. A pipeline stage logs its own layers, the last ones.
    """

    def __init__(
        self, parts: Sequence[str] = (), extra: Sequence[str] = (), routers: tuple[int, int] = (0, 0)
    ):
        self.choices = torch.zeros(routers, dtype=torch.float64)
        self.keys = ("loss", "balance", *(f"{k}/{p}" for p in parts for k in ("nll", "tokens")), *extra)
        self.values: dict[str, float | Tensor] = {}

    def add(self, logs: dict[str, Any]) -> None:
        for key, value in logs.items():
            self.values[key] = self.values[key] + value if key in self.values else value

    def total(self, group: dist.ProcessGroup | None, norm: Tensor | None = None) -> dict[str, float]:
        """The sums; norm: of the gradients, the same on every rank, becomes "grad_norm". One wait for the
        device."""
        mine = self.values.get("choices") if len(self.choices) else None
        own = [self.values.get(key, 0.0) for key in self.keys]
        found = _on_host([*own, norm if norm is not None else 0.0, *([] if mine is None else [mine])])
        numbers = torch.cat(found[: len(own)])
        table = torch.zeros_like(self.choices)
        if isinstance(mine, Tensor):
            table[-len(mine) :] = found[-1].view(mine.shape)
        vector = torch.cat([numbers, table.flatten()])
        if group is not None:
            dist.all_reduce(vector, group=group)
        self.choices = vector[len(numbers) :].view_as(table)
        alike = {} if norm is None else {"grad_norm": float(found[len(own)])}
        return dict(zip(self.keys, vector[: len(numbers)].tolist(), strict=True)) | alike


def _on_host(values: Sequence[float | Tensor]) -> list[Tensor]:
    """Each flattened, float64 on the host; what is on a device comes in one copy."""
    flat = [value.detach().reshape(-1) if isinstance(value, Tensor) else None for value in values]
    there = [each for each in flat if each is not None and each.device.type != "cpu"]
    if there:
        wide = functools.reduce(torch.promote_types, (each.dtype for each in there))
        whole = torch.cat([each.to(wide) for each in there]).cpu()
        copied = iter(whole.split([len(each) for each in there]))
        flat = [next(copied) if each is not None and each.device.type != "cpu" else each for each in flat]
    return [
        torch.tensor([value], dtype=torch.float64) if each is None else each.to(torch.float64)
        for each, value in zip(flat, values, strict=True)
    ]


class Runner:
    """Runs a rank's micro-batches through a whole model, one after the other.

    A Pipeline (parallel/pipeline.py) has the same `step` and `has_last_stage`.
    """

    has_last_stage = True

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device

    def step(self, batches: Sequence[Batch], finish: Finish, backward: bool = True) -> list[dict[str, Any]]:
        """Forward, and backward, of every micro-batch; returns the logs that `finish` gave."""
        logs = []
        with torch.set_grad_enabled(backward):
            for i, batch in enumerate(batches):
                before_backward(self.model, i == len(batches) - 1)
                loss, entry = self.model(batch.to(self.device), finish)
                if backward:
                    loss.backward()
                logs.append(entry)
        return logs


def forward_backward(
    runner: Any,
    objective: Any,
    batches: Sequence[Batch],
    inverse: dict[str, float],
    tally: StepMetrics,
    scale: float = 1.0,
    backward: bool = True,
) -> None:
    """Gradients of the whole step, accumulated into .grad; logs (the loss unscaled) into the tally, where
    they are
    known. runner: a Runner or a Pipeline; backward: False for validation, without gradients."""

    def finish(output: Output, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        loss, logs = objective.loss(output, batch, inverse)
        return loss * scale if scale != 1.0 else loss, logs

    for logs in runner.step(batches, finish, backward):
        tally.add(logs)
