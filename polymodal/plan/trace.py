"""Runs the step of one rank of any world in this process, with shapes only, and says what it held, did and sent.

Sees every room. The code is the run's own (job.py) under a pretended process group with fake tensors; nothing has
values but integers, so whatever depends on lengths and places takes its real course.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining.schedules import _PipelineSchedule

from polymodal.core.sample import Batch
from polymodal.distributed import flash_kernels
from polymodal.distributed.mesh import AXES, Mesh, ParallelSizes
from polymodal.models.family import Family
from polymodal.objectives import language
from polymodal.parallel import apply as layout
from polymodal.parallel import media, memory
from polymodal.plan.job import Job
from polymodal.plan.pretended import pretended_group
from polymodal.plan.tracker import Sent, Tracker, Usage
from polymodal.recipe import Recipe
from polymodal.runtime import device as devices
from polymodal.train import optim
from polymodal.train.layouts import Workload

CPU = "cpu"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind on one group of a micro-batch or of the update."""

    kind: str
    axes: str  # "tp", "fsdp", ...: the mesh axes that its ranks differ in
    ranks: tuple[int, ...]
    count: int
    bytes: int  # sum over the calls: the whole tensor, before or after it is cut
    where: str  # forward | backward | update


@dataclass
class Trace:
    """One rank. `usage` covers a whole step; `work` and `traffic` are of ONE micro-batch and of the update."""

    rank: int
    stage: int
    micro_batches: int  # that were traced; a run with more of them has the same peak
    usage: Usage
    work: dict[
        str, Counter[tuple[bool, float, int]]
    ]  # forward | backward | update -> (half precision, FLOPs, bytes) -> calls
    traffic: list[Traffic]
    seconds: float
    measure: Any = None  # of one sample
    samples: int = 1  # of a micro-batch
    # (forward | backward | update, beside the arithmetic) -> bytes between device and host
    moved: dict[tuple[str, bool], int] = field(default_factory=dict)
    chunks: tuple[float, ...] = ()  # shares of the rank's work that its virtual stages have, in stage order

    def flops(self, where: str) -> float:
        return sum(flops * calls for (_, flops, _), calls in self.work.get(where, {}).items())


def trace(
    recipe: Recipe,
    family: Family,
    world: int,
    rank: int,
    load: Workload,
    kind: str = CPU,
    micro_batches: int = 2,
) -> Trace:
    """Trace a step of `micro_batches` on rank `rank` of `world` processes.

    kind: "cpu" takes the code's paths of a CPU run (what calibration measures), anything else an accelerator's.
    Raises PolymodalError for layouts that `apply` refuses.
    """
    began = time.perf_counter()
    sizes = ParallelSizes.of(recipe.parallel, world)
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True))
    paths = _paths_of(kind, family, sizes.cp), _hosts(kind, tracker)
    with warnings.catch_warnings(), pretended_group(world, rank), paths[0], paths[1]:
        warnings.simplefilter("ignore")
        mesh = Mesh(sizes, CPU, rank)
        if kind != CPU:
            mesh.device_type = kind  # what `apply` chooses by; the groups themselves are of this process
        measure = load.measure
        job = Job(recipe, family, mesh, measure)
        if sizes.pp > 1:  # what travels may be found by a probe of the whole model, which is not the rank's
            for batch in job.objective.prepare(None, [job.layout.example(load)]):
                stage = job.model.parts[0].stage
                for cut in stage.cuts:
                    family.carry_spec(batch, cut, job.model.runner.dtype)
        with tracker:
            job.fill()
            known(tracker, job)

            def batches(count: int) -> list[Batch]:
                made = [job.layout.example(load) for _ in range(count)]
                tracker.mark([[batch.tensors, batch.segments] for batch in made], "batch")
                return made

            for step, count in (("warm", 1), ("step", micro_batches)):
                tracker.phase = step
                job.step(partial(batches, count), partial(_grown, tracker, job, step))
        hosted = HOSTED if "parameters" in recipe.parallel.offload else frozenset()
        usage = tracker.usage(("step", "step update"), hosted)
        traffic = _traffic(tracker, mesh, "warm")
        work = _work(tracker, "warm")
        moved = _moved(tracker, "warm")
    if hosted and kind != CPU:  # reduced gradients, in every backward
        moved["backward", True] = moved.get(("backward", True), 0) + usage.host_parts["gradients"]
    chunks = (1.0 / len(job.model.parts),) * len(job.model.parts)
    return Trace(
        rank, mesh.at["pp"], micro_batches, usage, work, traffic, time.perf_counter() - began, measure, load.samples, moved, chunks
    )  # fmt: skip


def known(tracker: Tracker, job: Job) -> None:
    """Name what lives from step to step."""
    for model in job.model.models:
        tracker.mark([*model.parameters(), *model.buffers()], "parameters")
    tracker.mark(list(job.optimizer.state().values()), "optimizer")
    tracker.mark(job.encoders, "encoders")
    if job.average is not None:
        tracker.mark(list(job.average.shadow.values()), "average")


def _grown(tracker: Tracker, job: Job, step: str) -> None:
    tracker.mark([p.grad for p in job.trainable.values() if p.grad is not None], "gradients")
    tracker.phase = f"{step} update"


@contextlib.contextmanager
def _paths_of(kind: str, family: Family, cp: int) -> Iterator[None]:
    """Let the code choose as it would on that device: the fused attention kernels there, gloo's exchanges here.

    What ranks tell one another on the host about their pictures is made up here, where there is one rank.
    """
    kept = devices.packed_attention, flash_kernels.kernel, dist.get_backend, media.gather
    blocks = dict(language.BLOCK_ELEMENTS)
    pretended, warm_up = dist.get_backend, _PipelineSchedule._warmup_p2p

    def alone(schedule: Any, *args: Any) -> None:
        """torch's schedules ask the other stages for shapes, unless they see that a group is pretended."""
        said, dist.get_backend = dist.get_backend, pretended
        try:
            warm_up(schedule, *args)
        finally:
            dist.get_backend = said

    if kind == CPU:
        dist.get_backend = lambda group=None: "gloo"
        _PipelineSchedule._warmup_p2p = alone  # type: ignore[method-assign, assignment]
    else:
        flash = flash_kernels.Kernel(flash_kernels._flash_forward, flash_kernels._flash_backward)
        language.BLOCK_ELEMENTS.clear()

        def for_half(kernel: Any, kind: str, dtype: torch.dtype, head_dim: int) -> Any:
            return kernel if dtype in HALF and head_dim <= 256 else None

        devices.packed_attention = partial(for_half, _kernel)  # type: ignore[assignment]
        flash_kernels.kernel = partial(for_half, flash)  # type: ignore[assignment]
    media.gather = lambda requests, group: _everyone(requests, group, family, cp)
    try:
        yield
    finally:
        devices.packed_attention, flash_kernels.kernel, dist.get_backend, media.gather = kept
        _PipelineSchedule._warmup_p2p = warm_up  # type: ignore[method-assign]
        language.BLOCK_ELEMENTS.update(blocks)


HOSTED = frozenset({"parameters", "gradients", "optimizer", "average"})
"""What lies on the host under parallel.offload of parameters."""


@contextlib.contextmanager
def _hosts(kind: str, tracker: Tracker) -> Iterator[None]:
    """Tell the tracker what goes to the host and back: where the device is pretended, both are one memory here.

    On an accelerator a tensor that comes back, and a shard that is gathered, is a copy; on a CPU it is not.
    """
    kept = (
        memory.to_host,
        memory.from_host,
        optim.state_to_device,
        optim.state_to_host,
        layout.CPUOffloadPolicy,
    )
    gathered = FSDPParam.all_gather_inputs

    def to_host(tensor: Tensor) -> Tensor:
        with tracker.hosting():
            out = kept[0](tensor)
        tracker.moving(out.nbytes)
        return out

    def from_host(tensor: Tensor, to: torch.device) -> Tensor:
        tracker.moving(tensor.nbytes)
        return kept[1](tensor, to) if kind == CPU else tensor.clone()

    def shards(parameter: FSDPParam) -> list[Tensor]:
        inputs = gathered.fget(parameter)  # type: ignore[attr-defined]
        if not parameter.offload_to_cpu:
            return inputs
        own = parameter._sharded_param_data
        tracker.moving(own.nbytes, hidden=True)
        same = own.untyped_storage()._cdata
        return [each.clone() if each.untyped_storage()._cdata == same else each for each in inputs]

    def state_to_device(state: dict[str, Any], device: torch.device) -> None:
        tracker.put(list(state.values()), host=False)

    def state_to_host(state: dict[str, Any]) -> None:
        tracker.put(list(state.values()), host=True)

    memory.to_host, memory.from_host, optim.state_to_device, optim.state_to_host = (
        to_host,
        from_host,
        state_to_device,
        state_to_host,
    )
    if kind != CPU:
        FSDPParam.all_gather_inputs = property(shards)  # type: ignore[assignment, method-assign]
        layout.CPUOffloadPolicy = lambda **_: CPUOffloadPolicy(pin_memory=False)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        memory.to_host, memory.from_host, optim.state_to_device, optim.state_to_host = kept[:4]
        layout.CPUOffloadPolicy = kept[4]  # type: ignore[misc]
        FSDPParam.all_gather_inputs = gathered  # type: ignore[method-assign]


def _everyone(
    requests: Any, group: dist.ProcessGroup, family: Family, cp: int
) -> list[list[media.MediaRequest]]:
    """Every rank's requests when all data-parallel ranks have the same load: the ranks that share this one's sequence
    hold the tokens that it does not, in equal parts."""
    mine = group.rank() % cp
    found: list[list[media.MediaRequest]] = [[] for _ in range(group.size())]
    for number, own in enumerate(requests):
        stream = family.streams[number % len(family.streams)]
        total = sum(family.media_tokens(stream, part) for part in own.parts)  # type: ignore[attr-defined]
        rest = np.array_split(np.setdiff1d(np.arange(total), own.tokens), max(1, cp - 1))
        shares = [
            own if rank == mine else media.request(own.parts, torch.from_numpy(rest.pop()))
            for rank in range(cp)
        ]
        for rank in range(group.size()):
            found[rank].append(shares[rank % cp])
    return found


REDUCTIONS = ("reduce_scatter", "all_reduce")
"""How FSDP2 sums gradients on an accelerator: over the ranks of a model's shards, over its replicas."""

HALF = (torch.float16, torch.bfloat16)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu: Tensor,
    lengths: Any,
    longest: int,
    causal: bool,
    scale: Any,
) -> Tensor:
    """torch's packed attention: with fake tensors its shapes and what it keeps for backward are known everywhere."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query, key, value, cu, cu, longest, longest, scale=scale,
        window_size=(-1, 0) if causal else (-1, -1), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out if isinstance(out, Tensor) else out[0]


def _where(phase: str, backward: bool) -> str:
    return "update" if phase.endswith("update") else "backward" if backward else "forward"


def _work(tracker: Tracker, step: str) -> dict[str, Counter[tuple[bool, float, int]]]:
    found: dict[str, Counter[tuple[bool, float, int]]] = {}
    for (phase, backward, half, flops, touched), calls in tracker.work.items():
        if phase in (step, f"{step} update"):
            found.setdefault(_where(phase, backward), Counter())[half, flops, touched] += calls
    return found


def _moved(tracker: Tracker, step: str) -> dict[tuple[str, bool], int]:
    found: Counter[tuple[str, bool]] = Counter()
    for (phase, backward, hidden), size in tracker.moved.items():
        if phase in (step, f"{step} update"):
            found[_where(phase, backward), hidden] += size
    return dict(found)


def axes_of(ranks: tuple[int, ...], sizes: ParallelSizes) -> str:
    """Mesh axes in which some ranks differ: "tp", "dp_shard", "dp_shard+cp", "pp"."""
    shape = [getattr(sizes, axis) for axis in AXES]
    places = [_unravel(rank, shape) for rank in ranks]
    return "+".join(axis for i, axis in enumerate(AXES) if len({place[i] for place in places}) > 1)


def _unravel(rank: int, shape: list[int]) -> tuple[int, ...]:
    out = []
    for size in reversed(shape):
        out.append(rank % size)
        rank //= size
    return tuple(reversed(out))


def _sums_gradients(sent: Sent, sizes: ParallelSizes) -> bool:
    axes = set(axes_of(sent.ranks, sizes).split("+"))
    return sent.kind in REDUCTIONS and bool(axes & {"dp_shard", "dp_replicate"}) and not axes & {"pp", "tp"}


def _traffic(tracker: Tracker, mesh: Mesh, step: str) -> list[Traffic]:
    calls: Counter[tuple] = Counter()
    sums: Counter[tuple] = Counter()
    for sent in tracker.sent:
        if sent.phase in (step, f"{step} update") and (len(sent.ranks) > 1 or sent.kind in ("send", "recv")):
            where = _where(sent.phase, sent.backward)
            if mesh.sizes.pp > 1 and where == "forward" and _sums_gradients(sent, mesh.sizes):
                where = "update"  # a pipeline reduces gradients once a step, after the last micro-batch
            key = sent.kind, sent.ranks, where
            calls[key] += 1
            sums[key] += sent.bytes
    return [
        Traffic(kind, axes_of(ranks, mesh.sizes), ranks, calls[key], sums[key], where)
        for key in calls
        for kind, ranks, where in [key]
    ]
