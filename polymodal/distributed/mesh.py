"""One device mesh in the fixed order pp, dp_replicate, dp_shard, cp, tp, with named views.

The sizes (`ParallelSizes`) and the live mesh (`Mesh`) are two types; the live mesh is passed in, never
global.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from polymodal.core.errors import PolymodalError
from polymodal.distributed.context_parallel import Context
from polymodal.recipe import Parallel

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep")


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks each kind of parallelism has; the product is the world."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int = 1

    @classmethod
    def of(cls, parallel: Parallel, world: int) -> ParallelSizes:
        """Resolve dp_shard = -1 and check that the world divides. Raises PolymodalError."""
        fixed = parallel.pp * parallel.dp_replicate * parallel.cp * parallel.tp
        shard = parallel.dp_shard
        before = f"pp {parallel.pp} x dp_replicate {parallel.dp_replicate} x"
        after = f"cp {parallel.cp} x tp {parallel.tp}"
        if shard == 0:
            raise PolymodalError(
                "parallel.dp_shard = 0 has no meaning.", "Use -1 for all remaining ranks, or a number from 1."
            )
        if shard == -1:
            if world % fixed:
                near = [str(n) for n in (world // fixed * fixed, (world // fixed + 1) * fixed) if n]
                raise PolymodalError(
                    f"{world} processes cannot be divided by {before} {after} = {fixed}.",
                    f"Start {' or '.join(near)} processes, or lower one of these.",
                )
            shard = world // fixed
        if fixed * shard != world:
            fitting = f"{world // fixed} or -1" if world % fixed == 0 else "-1"
            raise PolymodalError(
                f"parallel asks for {fixed * shard} processes ({before} dp_shard {shard} x {after}), "
                f"but {world} were started.",
                f"Set parallel.dp_shard to {fitting}, or start {fixed * shard} processes.",
            )
        spread = shard * parallel.cp * parallel.tp
        if spread % parallel.ep:
            works = [str(n) for n in range(1, spread + 1) if spread % n == 0]
            raise PolymodalError(
                f"parallel.ep = {parallel.ep} does not divide dp_shard x cp x tp = {spread}.",
                f"Choose parallel.ep from {', '.join(works)}.",
            )
        return cls(parallel.pp, parallel.dp_replicate, shard, parallel.cp, parallel.tp, parallel.ep)

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def efsdp(self) -> int:
        """Ranks that the experts of one ep rank are sharded over: dp_shard x cp x tp = efsdp x ep."""
        return self.dp_shard * self.cp * self.tp // self.ep


class Mesh:
    """The live mesh of one run, with its views and process groups.

    With ep > 1 a second mesh of the same ranks in another order, pp, dp_replicate, efsdp, ep: view `ep`, and
    `expert_fsdp`.
    """

    def __init__(self, sizes: ParallelSizes, device_type: str, rank: int):
        self.sizes = sizes
        self.rank = rank
        self.device_type = device_type
        self.world: DeviceMesh = init_device_mesh(
            device_type,
            (sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.cp, sizes.tp),
            mesh_dim_names=AXES,
        )
        coordinate = self.world.get_coordinate()
        assert coordinate is not None
        self.at = dict(zip(AXES, coordinate, strict=True))
        self._shard = self.world["dp_shard", "cp"]._flatten("fsdp_shard")
        self.fsdp = self._shard
        """Mesh for fully_shard: (dp_shard x cp), or with dp_replicate > 1 (replicate, shard): HSDP."""
        if sizes.dp_replicate > 1 and sizes.cp == 1:
            self.fsdp = self.world["dp_replicate", "dp_shard"]
        elif sizes.dp_replicate > 1:
            self.fsdp = DeviceMesh._concatenate([self.world["dp_replicate"], self._shard])
        self._loss = self.world["dp_replicate", "dp_shard", "cp"]._flatten("loss")
        self._dp = self.world["dp_replicate", "dp_shard"]._flatten("dp")
        self._experts: DeviceMesh | None = None
        if sizes.ep > 1:
            shape = (sizes.pp, sizes.dp_replicate, sizes.efsdp, sizes.ep)
            self._experts = init_device_mesh(device_type, shape, mesh_dim_names=EXPERT_AXES)
        self._contexts: dict[int, Context] = {}
        self._log = self._loss
        if sizes.pp > 1:
            self._log = self.world["pp", "dp_replicate", "dp_shard", "cp"]._flatten("log")

    @property
    def fsdp_size(self) -> int:
        return self.sizes.dp_replicate * self.sizes.dp_shard * self.sizes.cp

    @property
    def dp_rank(self) -> int:
        """This rank's number among those that read different data."""
        return self.at["dp_replicate"] * self.sizes.dp_shard + self.at["dp_shard"]

    def view(self, axis: str) -> DeviceMesh | None:
        """1-D mesh of one axis, or None when its size is 1."""
        if axis == "ep":
            return self._experts["ep"] if self._experts is not None else None
        return self.world[axis] if getattr(self.sizes, axis) > 1 else None

    def context(self, ulysses: int) -> Context:
        """The context-parallel group of this rank, cut into rings and Ulysses groups of `ulysses` ranks.

        Collective at its first call: every rank must make it.
        """
        if ulysses not in self._contexts:
            self._contexts[ulysses] = Context(self.world["cp"], ulysses)
        return self._contexts[ulysses]

    @cached_property
    def copies(self) -> DeviceMesh:
        """Mesh for fully_shard of whole copies: (all ranks of fsdp, 1). Collective at first use."""
        return self._loss._unflatten(0, (self.fsdp_size, 1), ("copies", "alone"))

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """Mesh for fully_shard of the experts of an ep rank: 1-D (efsdp) or 2-D (replicate, efsdp)."""
        assert self._experts is not None, "parallel.ep is 1"
        replicated = self.sizes.dp_replicate > 1
        return self._experts["dp_replicate", "efsdp"] if replicated else self._experts["efsdp"]

    # Process groups

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """Ranks that hold one copy of the sharded model: dp_shard x cp, cp ranks beside each other."""
        return self._shard.get_group()

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that read different data."""
        return self._dp.get_group()

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """Ranks whose token weights are summed: all data- and context-parallel ones of this stage."""
        return self._loss.get_group()

    @property
    def log_group(self) -> dist.ProcessGroup:
        """Ranks that a step's logs are summed over: the loss groups of all stages."""
        return self._log.get_group()

    @cached_property
    def same_samples_group(self) -> dist.ProcessGroup:
        """Ranks that read the same samples: those of all stages, context- and tensor-parallel ranks of one
        data-parallel rank. Collective over the world at first use."""
        groups = self.world.mesh.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1).tolist()
        own, _ = dist.new_subgroups_by_enumeration(groups)
        assert isinstance(own, dist.ProcessGroup)
        return own
