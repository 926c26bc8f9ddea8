"""Expert parallelism: experts spread over the ep group, tokens sent to them and their results sent back.

This room turns a card's `expert_plan` into DTensor parameters and patched forwards of module instances; names stay.
The exchange is transformers' own (`AllToAllEP`): tokens are sorted by expert, sent by one all-to-all, computed with the
library's grouped products, and sent back by another. It sees styles.py, adapters.py, collectives.py, sequence.py and
models/card.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.parallel import adapters
from polymodal.parallel.sequence import Stream
from polymodal.parallel.styles import on_first, pattern_of, see_local

STYLES = {
    "dispatch": "stacked experts [E, ...]: each rank of the ep group holds E / ep whole experts and is sent their tokens",
    "router": "chooses experts for this rank's tokens; its first output (the logits) feeds the balance loss",
}
"""Style names of a card's expert_plan. The module that holds experts and router is one region: of the tokens that a
tensor-parallel group shares, each rank takes its own rows through it."""

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def count(config: Any) -> int:
    """Routed experts a layer of this transformers config; 0 for a dense model."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return next((n for n in (getattr(text, key, 0) for key in COUNTS) if n), 0)


def check(card: ModelCard, config: Any, sizes: ParallelSizes) -> list[PolymodalError]:
    """Why the experts of a model of this transformers config cannot be spread so; empty when they can."""
    experts, asked = count(config), f"parallel.ep = {sizes.ep}"
    if not experts or not card.expert_plan:
        cause = "has no experts" if not experts else "has no expert-parallel plan"
        return [PolymodalError(f"{asked}: {card.name} {cause}.", "Set parallel.ep to 1.")]
    if experts % sizes.ep == 0:
        return []
    spread = sizes.efsdp * sizes.ep
    works = [str(n) for n in range(1, spread + 1) if spread % n == 0 and experts % n == 0]
    cause = f"{asked} does not divide the {experts} experts a layer of {card.name}."
    return [PolymodalError(cause, f"Choose parallel.ep from {', '.join(works)}.")]


def resolve(model: nn.Module, card: ModelCard) -> dict[str, str]:
    """Module name -> style of tensor.py for everything inside of the regions with experts, and the regions.

    Raises PolymodalError for a style that does not exist. Patterns may fit nothing: a pipeline stage or a model's
    variant without experts.
    """
    found: dict[str, str] = {}
    for pattern, style in card.expert_plan.items():
        if style not in STYLES:
            raise PolymodalError(
                f"The card {card.name} names the expert-parallel style `{style}`, known are {', '.join(STYLES)}."
            )
        expression = pattern_of(pattern)
        found |= {name: style for name, _ in model.named_modules() if expression.fullmatch(name)}
    styles: dict[str, str] = {}
    for name, style in found.items():
        region = name.rpartition(".")[0]
        if style == "dispatch":
            styles |= {region: "sparse", name: "dispatched"}
        elif any(other.rpartition(".")[0] == region for other, s in found.items() if s == "dispatch"):
            styles[name] = "sparse_router"
    return styles


class _OwnRows:
    """The mesh of ranks that hold the same tokens, as AllToAllEP asks: none do, rows were parted before."""

    def size(self) -> int:
        return 1


def apply(model: nn.Module, styles: dict[str, str], mesh: DeviceMesh) -> list[nn.Module]:
    """Spread the experts that `resolve` found over the 1-D `mesh`; returns their modules in the model's order.

    Afterwards their parameters are DTensors on `mesh`, cut by expert, and their forward takes global expert numbers:
    (hidden [N, D], index [N, k], weights [N, k]) of this rank's tokens -> [N, D]. N may differ between ranks and be 0.
    Collective in forward and backward: every rank of the group runs every such module equally often.
    Adapters on them stay as they are: a rank adds those of its experts. Raises PolymodalError for experts that are
    not whole stacks.
    """
    from transformers.distributed.expert_parallel import AllToAllEP

    class AllToAll(AllToAllEP):
        def __init__(self, experts: Any):
            self.experts_forward, self.num_local_experts = experts.forward, experts.num_experts
            self.ep_mesh, self.tp_mesh = mesh, _OwnRows()

    spread = []
    for name in (name for name, style in styles.items() if style == "dispatched"):
        experts: Any
        experts, wrappers = adapters.wrapped(model.get_submodule(name))
        keys = [key for key, value in experts._parameters.items() if value is not None]
        whole = getattr(experts, "num_experts", None)
        if (
            not isinstance(whole, int)
            or not keys
            or any(experts._parameters[k].shape[0] != whole for k in keys)
        ):
            raise PolymodalError(
                f"The experts of `{name}` cannot be spread over an expert-parallel group.",
                "Set parallel.ep to 1.",
            )
        for key in keys:
            parameter = experts._parameters[key]
            value = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            experts._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        experts.num_experts = held = whole // mesh.size()
        if wrappers:
            adapters.add_own(experts, wrappers, held * mesh.get_local_rank(), held)
        see_local(experts, dict.fromkeys(keys))
        experts.forward = _dispatched(AllToAll(experts))
        spread.append(experts)
    return spread


def _dispatched(exchange: Any) -> Any:
    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return exchange(hidden, index, weights).to(hidden.dtype)

    return forward


def own_rows(
    region: nn.Module, routers: Sequence[nn.Module], stream: Stream, group: dist.ProcessGroup
) -> None:
    """Of the tokens that a tensor-parallel `group` shares, let each rank take its own rows through `region`.

    These are the tokens that it sends to the experts. The routers' logits are gathered, so that the balance loss sees
    all tokens [N, E] on every rank.
    """
    rows: dict[str, tuple[int, ...]] = {}

    def routed(forward: Any) -> Any:
        @wraps(forward)
        def router(*args: Any, **kwargs: Any) -> Any:
            logits, *choice = forward(*args, **kwargs)
            mine = logits.view(*rows["shape"], logits.shape[-1])
            whole = collectives.gather_sequence(mine, stream.length, group, partial=False)
            return (whole.flatten(0, -2), *choice)

        return router

    forward = region.forward

    @wraps(forward)
    def sparse(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_first(stream.own, args, kwargs)
        rows["shape"] = tuple((args[0] if args else kwargs["hidden_states"]).shape[:-1])
        return stream.together(forward(*args, **kwargs))

    for module in routers:
        module.forward = routed(module.forward)
    region.forward = sparse


def fsdp_placement(mesh: DeviceMesh) -> Any:
    """Which dimension of an expert weight FSDP2 cuts over the last axis of `mesh`: inside of experts where it divides.

    The first dimension is cut by expert already; a second cut of it would interleave, and a checkpoint's pieces with it.
    """
    size = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % size == 0 else Shard(0)

    return placement
