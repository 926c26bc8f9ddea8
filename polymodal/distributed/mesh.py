"""One device mesh, fixed order pp, dp_replicate, dp_shard, cp, tp, with named views.

Ground floor: imports torch.distributed and the recipe's Parallel section. Intent (`ParallelSizes`) and the live
mesh (`Mesh`) are two types; the live mesh is passed in, never global.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        if shard == 0:
            raise PolymodalError(
                "parallel.dp_shard = 0 has no meaning.", "Use -1 for all remaining ranks, or a number from 1."
            )
        if shard == -1:
            if world % fixed:
                near = [str(n) for n in (world // fixed * fixed, (world // fixed + 1) * fixed) if n]
                raise PolymodalError(
                    f"{world} processes cannot be divided by pp {parallel.pp} x dp_replicate {parallel.dp_replicate} x cp {parallel.cp} x tp {parallel.tp} = {fixed}.",
                    f"Start {' or '.join(near)} processes, or lower one of these.",
                )
            shard = world // fixed
        if fixed * shard != world:
            raise PolymodalError(
                f"parallel asks for {fixed * shard} processes (pp {parallel.pp} x dp_replicate {parallel.dp_replicate} x dp_shard {shard} x cp {parallel.cp} x tp {parallel.tp}), but {world} were started.",
                f"Set parallel.dp_shard to {f'{world // fixed} or ' if world % fixed == 0 else ''}-1, or start {fixed * shard} processes.",
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
    """The live mesh of one run.

    Views (each a DeviceMesh or None when its size is 1): pp, tp, cp; `fsdp` = [dp_replicate,] dp_shard x cp flattened
    (1-D, or 2-D with dp_replicate > 1: HSDP); `dp` and `loss` groups for data and for sums over all that see tokens.
    With ep > 1 a second mesh of the same ranks, pp, dp_replicate, efsdp, ep: view `ep`, and `expert_fsdp`.
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
        shard_cp = self.world["dp_shard", "cp"]._flatten("fsdp_shard")
        if sizes.dp_replicate > 1:
            self._fsdp = self._two("dp_replicate", shard_cp)
        else:
            self._fsdp = shard_cp
        self._loss = self.world["dp_replicate", "dp_shard", "cp"]._flatten("loss")
        self._dp = self.world["dp_replicate", "dp_shard"]._flatten("dp")
        self._experts: DeviceMesh | None = None
        if sizes.ep > 1:  # the same ranks in another order: dp_shard x cp x tp = efsdp x ep
            shape = (sizes.pp, sizes.dp_replicate, sizes.efsdp, sizes.ep)
            self._experts = init_device_mesh(device_type, shape, mesh_dim_names=EXPERT_AXES)
        self._shard = shard_cp
        self._contexts: dict[int, Context] = {}
        self._copies: DeviceMesh | None = None
        self._same_samples: dist.ProcessGroup | None = None
        self._log = self._loss
        if sizes.pp > 1:
            self._log = self.world["pp", "dp_replicate", "dp_shard", "cp"]._flatten("log")

    def _two(self, outer: str, inner: DeviceMesh) -> DeviceMesh:
        if self.sizes.cp == 1:
            return self.world["dp_replicate", "dp_shard"]
        return DeviceMesh._concatenate([self.world[outer], inner])

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for fully_shard: 1-D (shard) or 2-D (replicate, shard)."""
        return self._fsdp

    @property
    def copies(self) -> DeviceMesh:
        """Mesh for fully_shard of what every rank keeps whole: 2-D, (all ranks of fsdp, 1). Collective at first use."""
        if self._copies is None:
            self._copies = self._loss._unflatten(0, (self.fsdp_size, 1), ("copies", "alone"))
        return self._copies

    @property
    def fsdp_size(self) -> int:
        return self.sizes.dp_replicate * self.sizes.dp_shard * self.sizes.cp

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

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """Ranks that hold one copy of the sharded model: dp_shard x cp, cp ranks beside each other."""
        return self._shard.get_group()

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """Mesh over which fully_shard spreads the experts of an ep rank: 1-D (efsdp) or 2-D (replicate, efsdp)."""
        assert self._experts is not None, "parallel.ep is 1"
        return (
            self._experts["dp_replicate", "efsdp"] if self.sizes.dp_replicate > 1 else self._experts["efsdp"]
        )

    @property
    def dp_rank(self) -> int:
        """This rank's number among those that see different data."""
        return self.at["dp_replicate"] * self.sizes.dp_shard + self.at["dp_shard"]

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """Ranks whose token weights are summed: all data- and context-parallel ones of this stage."""
        return self._loss.get_group()

    @property
    def log_group(self) -> dist.ProcessGroup:
        """Ranks that a step's logs are summed over: the loss group of every stage; the last stage speaks."""
        return self._log.get_group()

    @property
    def same_samples_group(self) -> dist.ProcessGroup:
        """Ranks that read the same samples: those of all stages, context- and tensor-parallel ranks of one data-parallel
        rank. Collective over the world at first use."""
        if self._same_samples is None:
            for ranks in self.world.mesh.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1).tolist():
                group = dist.new_group(ranks)
                if isinstance(group, dist.ProcessGroup):  # of the ranks that are not in it another value
                    self._same_samples = group
        assert self._same_samples is not None
        return self._same_samples

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self._dp.get_group()
