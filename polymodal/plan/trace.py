"""Runs the step of one rank of any world in this process with shapes only: what it held, computed and sent.

The code is the run's own (job.py) under a pretended process group with fake tensors. Integers alone have
values, so whatever depends on lengths and positions takes its real course.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from polymodal.core.sample import Batch
from polymodal.distributed import collectives, flash_kernels
from polymodal.distributed.mesh import AXES, Mesh, ParallelSizes
from polymodal.models.family import Family
from polymodal.objectives import language
from polymodal.parallel import media, memory
from polymodal.plan.job import Job
from polymodal.plan.pretended import pretended_group
from polymodal.plan.tracker import Sent, Tracker, Usage, replaced
from polymodal.recipe import Recipe
from polymodal.runtime import device as devices
from polymodal.train import optim
from polymodal.train.layouts import Workload

HOSTED = frozenset({"parameters", "gradients", "optimizer", "average"})
"""Kinds of memory that are on the host under parallel.offload of parameters."""
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind on one group, of a micro-batch or of the update."""

    kind: str
    axes: str  # the mesh axes that its ranks differ in: "tp", "dp_shard+cp"
    ranks: tuple[int, ...]
    count: int
    bytes: int  # sum over the calls: the whole tensor, before or after it is cut
    where: str  # forward | backward | update


@dataclass
class Trace:
    """One rank. `usage` is of a whole step; `work`, `traffic` and `moved` of ONE micro-batch and of the
    update. where: forward | backward | update."""

    rank: int
    stage: int
    micro_batches: int  # that were traced; a run with more of them has the same peak
    load: Workload
    usage: Usage
    work: Counter[tuple[str, bool, float, int]]  # (where, half precision, FLOPs, bytes) -> operators
    traffic: list[Traffic]
    moved: Counter[tuple[str, bool]]  # (where, beside the arithmetic) -> bytes between device and host
    chunks: int  # pipeline stages of the rank
    passes: float  # FLOPs of training over those of the forward pass
    saving: int  # bytes of the host while a checkpoint is written in the background

    def flops(self, where: str) -> float:
        return sum(flops * calls for (at, _, flops, _), calls in self.work.items() if at == where)


def trace(
    recipe: Recipe,
    family: Family,
    world: int,
    rank: int,
    load: Workload,
    kind: str = "cpu",
    micro_batches: int = 2,
) -> Trace:
    """Trace a step of `micro_batches` on rank `rank` of `world` processes.

    kind: "cpu" takes the code's paths of a CPU run (what calibration measures), anything else an
    accelerator's. Raises PolymodalError for layouts that training would refuse.
    """
    sizes = ParallelSizes.of(recipe.parallel, world)
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True))
    changes = (*_kernels(kind), *_host_copies(kind, tracker))
    with warnings.catch_warnings(), pretended_group(world, rank), replaced(*changes):
        warnings.simplefilter("ignore")
        mesh = Mesh(sizes, "cpu", rank)
        mesh.device_type = kind  # what `apply` chooses by; the groups themselves are of this process
        job = Job(recipe, family, mesh, load.measure)
        job.shard_batches.gather = partial(_everyone, family, sizes.cp)  # type: ignore[attr-defined]
        if (
            sizes.pp > 1
        ):  # shapes that are sent may be found by a probe of the whole model, which is not the rank's
            for batch in job.objective.prepare(None, [job.layout.example(load)]):
                for cut in job.model.parts[0].stage.cuts:
                    family.carry_spec(batch, cut, job.model.runner.dtype)
        with tracker:
            job.load_all()
            _mark_states(tracker, job)
            for phase, count in (("warm", 1), ("step", micro_batches)):
                tracker.phase = phase
                job.step(partial(_batches, tracker, job, load, count), partial(_backward_done, tracker, job))
        hosted = HOSTED if "parameters" in recipe.parallel.offload else frozenset()
        usage = tracker.usage(("step", "step update"), hosted)
        moved = _of_first_step(tracker.moved)
        if hosted and kind != "cpu":  # reduced gradients, in every backward
            moved["backward", True] += usage.host_parts["gradients"]
        return Trace(
            rank=rank,
            stage=mesh.at["pp"],
            micro_batches=micro_batches,
            load=load,
            usage=usage,
            work=_of_first_step(tracker.work),
            traffic=_traffic(tracker, mesh),
            moved=moved,
            chunks=len(job.model.parts),
            passes=job.model.passes,  # type: ignore[attr-defined]
            saving=job.checkpoint_bytes() if recipe.checkpoint.asynchronous else 0,
        )


def _mark_states(tracker: Tracker, job: Job) -> None:
    """Name what lives from step to step."""
    for model in job.model.models:
        tracker.mark([*model.parameters(), *model.buffers()], "parameters")
    tracker.mark(job.optimizer.state(), "optimizer")
    tracker.mark(job.encoders, "encoders")
    if job.average is not None:
        tracker.mark(job.average.shadow, "average")


def _batches(tracker: Tracker, job: Job, load: Workload, count: int) -> list[Batch]:
    made = [job.layout.example(load) for _ in range(count)]
    tracker.mark([[batch.tensors, batch.segments] for batch in made], "batch")
    return made


def _backward_done(tracker: Tracker, job: Job) -> None:
    tracker.mark([p.grad for p in job.trainable.values()], "gradients")
    tracker.phase += " update"


# ---- what the code asks its device, answered for the one that is planned


def _kernels(kind: str) -> list[tuple[Any, str, Any]]:
    """Replacements that choose kernels and collectives as on such a device."""
    if kind == "cpu":
        return [(collectives, "on_gloo", lambda group: True)]

    def for_half(kernel: Any, kind: str, dtype: torch.dtype, head_dim: int) -> Any:
        return kernel if dtype in HALF and head_dim <= 256 else None

    flash = flash_kernels.Kernel(flash_kernels._flash_forward, flash_kernels._flash_backward)
    return [
        (devices, "packed_attention", partial(for_half, _packed_attention)),
        (flash_kernels, "kernel", partial(for_half, flash)),
        (language, "BLOCK_ELEMENTS", {}),
    ]


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    lengths: Any,
    longest: int,
    causal: bool,
    scale: Any,
) -> Tensor:
    """torch's packed attention: with fake tensors its shapes and what it keeps for backward are known
    everywhere."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = query.shape[1] != key.shape[1]
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )
    return out if isinstance(out, Tensor) else out[0]


def _host_copies(kind: str, tracker: Tracker) -> list[tuple[Any, str, Any]]:
    """Replacements that report to the tracker what goes to the host and back: both are one memory here.

    On an accelerator a tensor that comes back, and a shard that is gathered, is a copy; on a CPU it is not.
    """
    to_host_here, from_host_here = memory.to_host, memory.from_host
    inputs_here = FSDPParam.all_gather_inputs

    def to_host(tensor: Tensor) -> Tensor:
        with tracker.hosting():
            out = to_host_here(tensor)
        tracker.moving(out.nbytes)
        return out

    def from_host(tensor: Tensor, to: torch.device) -> Tensor:
        tracker.moving(tensor.nbytes)
        return from_host_here(tensor, to) if kind == "cpu" else tensor.clone()

    def all_gather_inputs(parameter: FSDPParam) -> list[Tensor]:
        inputs = inputs_here.fget(parameter)  # type: ignore[attr-defined]
        if not parameter.offload_to_cpu:
            return inputs
        own = parameter._sharded_param_data
        tracker.moving(own.nbytes, hidden=True)
        same = own.untyped_storage()._cdata
        return [each.clone() if each.untyped_storage()._cdata == same else each for each in inputs]

    changes: list[tuple[Any, str, Any]] = [
        (memory, "to_host", to_host),
        (memory, "from_host", from_host),
        (optim, "state_to_device", lambda state, device: tracker.put(state, host=False)),
        (optim, "state_to_host", lambda state: tracker.put(state, host=True)),
    ]
    if kind != "cpu":
        changes.append((FSDPParam, "all_gather_inputs", property(all_gather_inputs)))
    return changes


def _everyone(
    family: Family, cp: int, requests: Sequence[media.MediaRequest], group: dist.ProcessGroup
) -> list[list[media.MediaRequest]]:
    """Media requests by rank of the group, when all data-parallel ranks have the same load: ranks that share
    this one's sequence hold the tokens that it does not, in equal parts."""
    mine = group.rank() % cp
    found: list[list[media.MediaRequest]] = [[] for _ in range(group.size())]
    for number, own in enumerate(requests):
        stream = family.streams[number % len(family.streams)]
        total = sum(family.media_tokens(stream, part) for part in own.parts)  # type: ignore[attr-defined]
        rest = np.array_split(np.setdiff1d(np.arange(total), own.tokens), max(1, cp - 1))
        shares = [media.request(own.parts, torch.from_numpy(part)) for part in rest][: cp - 1]
        shares.insert(mine, own)
        for rank in range(group.size()):
            found[rank].append(shares[rank % cp])
    return found


# ---- what was counted, by direction


def _where(phase: str, backward: bool) -> str:
    return "update" if phase.endswith("update") else "backward" if backward else "forward"


def _of_first_step(counts: Counter) -> Counter:
    """The tracker's counts by (where, ...) in place of (phase, in backward, ...)."""
    found: Counter = Counter()
    for (phase, backward, *rest), count in counts.items():
        if phase.startswith("warm"):
            found[(_where(phase, backward), *rest)] += count
    return found


def axes_of(ranks: tuple[int, ...], sizes: ParallelSizes) -> str:
    """Mesh axes in which some ranks differ: "tp", "dp_shard", "dp_shard+cp", "pp"."""
    positions = np.unravel_index(ranks, [getattr(sizes, axis) for axis in AXES])
    return "+".join(axis for axis, at in zip(AXES, positions, strict=True) if len(set(at.tolist())) > 1)


def _sums_gradients(sent: Sent, sizes: ParallelSizes) -> bool:
    """Whether FSDP2 sums gradients by it: over the ranks of a model's shards, or over its replicas."""
    axes = set(axes_of(sent.ranks, sizes).split("+"))
    reduces = sent.kind in ("reduce_scatter", "all_reduce")
    return reduces and bool(axes & {"dp_shard", "dp_replicate"}) and not axes & {"pp", "tp"}


def _traffic(tracker: Tracker, mesh: Mesh) -> list[Traffic]:
    calls: Counter[tuple] = Counter()
    bytes_sent: Counter[tuple] = Counter()
    for sent in tracker.sent:
        if not sent.phase.startswith("warm") or (len(sent.ranks) == 1 and sent.kind not in ("send", "recv")):
            continue
        where = _where(sent.phase, sent.backward)
        if mesh.sizes.pp > 1 and where == "forward" and _sums_gradients(sent, mesh.sizes):
            where = "update"  # a pipeline reduces gradients once a step, after the last micro-batch
        key = sent.kind, axes_of(sent.ranks, mesh.sizes), sent.ranks, where
        calls[key] += 1
        bytes_sent[key] += sent.bytes
    return [
        Traffic(kind, axes, ranks, calls[key], bytes_sent[key], where)
        for key in calls
        for kind, axes, ranks, where in [key]
    ]
