"""Expert parallelism: experts spread over the ep group, tokens sent to them and their results sent back.

A card's `expert_plan` becomes DTensor parameters and patched forwards of module instances; names stay. The
exchange is transformers' own (`AllToAllEP`): tokens are sorted by expert, sent by one all-to-all, computed
with the library's grouped products, and sent back by another. tensor.py cuts experts with the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.models.understanding import language
from polymodal.parallel.sequence import Stream
from polymodal.parallel.styles import on_first, pattern_of, see_local

STYLES = {
    "dispatch": "stacked experts [E, ...]: a rank of the ep group holds E / ep and is sent their tokens",
    "router": "chooses experts for this rank's tokens; its first output (the logits) feeds the balance loss",
}
"""Style names of a card's expert_plan. The module that holds experts and router is one region: of the tokens
that a tensor-parallel group shares, each rank takes its own rows through it."""


def count(config: Any) -> int:
    """Routed experts a layer of this transformers config; 0 for a dense model."""
    return language.experts(config.get_text_config() if hasattr(config, "get_text_config") else config)


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

    Raises PolymodalError for a style that does not exist. Patterns may fit nothing: a pipeline stage or a
    model's variant without experts.
    """
    found: dict[str, str] = {}
    for pattern, style in card.expert_plan.items():
        if style not in STYLES:
            raise PolymodalError(
                f"The card {card.name} names the expert-parallel style `{style}`, known are "
                f"{', '.join(STYLES)}.",
                "This is a defect of the model's card: please report it.",
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


# Stacked experts and their adapters ---------------------------------------------------------------


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[Any]]:
    """(the module inside of peft's wrappers of its parameters, these wrappers from the inside out)."""
    wrappers: list[Any] = []
    while hasattr(module, "parameter_name"):
        wrappers.insert(0, module)
        module = module.base_layer  # type: ignore[assignment]
    return module, wrappers


def stacks(module: nn.Module, name: str, axis: str) -> tuple[Any, list[Any], list[str]]:
    """(the module of stacked experts [E, ...], its peft wrappers, names of its parameters).

    Raises PolymodalError for experts that are not whole stacks; axis: tp or ep.
    """
    experts: Any
    experts, wrappers = unwrapped(module)
    keys = [key for key, value in experts._parameters.items() if value is not None]
    count = getattr(experts, "num_experts", None)
    if not isinstance(count, int) or not keys or any(len(experts._parameters[k]) != count for k in keys):
        raise PolymodalError(
            f"The experts of `{name}` cannot be cut over ranks: they are not stacked in tensors.",
            f"Set parallel.{axis} to 1.",
        )
    return experts, wrappers, keys


def add_adapters(experts: nn.Module, wrappers: list[Any], start: int, held: int) -> None:
    """Let the forward of `experts`, which sees its stacks [held, ...] in `__dict__`, add the LoRA adapters of
    the experts start .. start + held to them: W + scale * B A. The wrappers then only call it.

    peft wraps the module once for each adapted stack, one wrapper inside of the other; A [r E, in] and B
    [out, r E] stay whole parameters like other adapters, so files, norms and merging know no group. Call
    before styles.see_local. A rank's gradients of A and B are those of its own experts: their sum over the
    ranks that share the experts is whole.
    """
    if not wrappers:
        return
    forward = experts.forward

    @wraps(forward)
    def adapted(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        for wrapper in wrappers:
            key = wrapper.parameter_name
            for name in () if wrapper.disable_adapters else wrapper.active_adapters:
                left, right, scale = wrapper.get_delta_factors(name)
                own = (_local(factor).narrow(0, start, held) for factor in (left, right))
                experts.__dict__[key] = torch.baddbmm(experts.__dict__[key], *own, alpha=scale)
        out = forward(hidden, index, weights)
        if torch.is_grad_enabled() and not out.requires_grad:
            # no token chose an expert of this rank, whose gradients others wait for
            added = sum(experts.__dict__[wrapper.parameter_name].sum() for wrapper in wrappers)
            out = out + (hidden.sum() + weights.sum() + added) * 0
        return out

    experts.forward = adapted  # type: ignore[method-assign]
    for wrapper in wrappers:
        wrapper.forward = partial(_call_base_layer, wrapper)


def _call_base_layer(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    return wrapper.base_layer(*args, **kwargs)


def _local(factor: Tensor) -> Tensor:
    return factor.to_local(grad_placements=[Partial()]) if isinstance(factor, DTensor) else factor


# Dispatch -----------------------------------------------------------------------------------------


class _NoSharedTokens:
    """AllToAllEP's mesh of ranks with the same tokens: there are none, each rank took its own before."""

    def size(self) -> int:
        return 1


def apply(model: nn.Module, styles: dict[str, str], mesh: DeviceMesh) -> list[nn.Module]:
    """Spread the experts that `resolve` found over the 1-D `mesh`; returns their modules in order.

    Afterwards their parameters are DTensors on `mesh`, cut by expert, and their forward takes global expert
    numbers: (hidden [N, D], index [N, k], weights [N, k]) of this rank's tokens -> [N, D]. N may differ
    between ranks and be 0.
    Collective in forward and backward: every rank of the group runs every such module equally often. Raises
    PolymodalError for experts that are not whole stacks.
    """
    from transformers.distributed.expert_parallel import AllToAllEP

    class AllToAll(AllToAllEP):
        def __init__(self, experts: Any):
            self.experts_forward, self.num_local_experts = experts.forward, experts.num_experts
            self.ep_mesh, self.tp_mesh = mesh, _NoSharedTokens()

    spread = []
    for name in (name for name, style in styles.items() if style == "dispatched"):
        experts, wrappers, keys = stacks(model.get_submodule(name), name, "ep")
        for key in keys:
            parameter = experts._parameters[key]
            value = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            experts._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        experts.num_experts = held = experts.num_experts // mesh.size()
        add_adapters(experts, wrappers, held * mesh.get_local_rank(), held)
        see_local(experts, dict.fromkeys(keys))
        experts.forward = partial(_dispatched, AllToAll(experts))
        spread.append(experts)
    return spread


def _dispatched(exchange: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return exchange(hidden, index, weights).to(hidden.dtype)


def own_rows(
    region: nn.Module, routers: Sequence[nn.Module], stream: Stream, group: dist.ProcessGroup
) -> None:
    """Of the tokens that a tensor-parallel `group` shares, let each rank take its own rows through `region`.

    The routers' logits are gathered, so that the balance loss has all tokens [N, E] on every rank.
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
    """Dimension of an expert weight that FSDP2 cuts over the last axis of `mesh`: the second if it divides.

    The first is cut by expert already; a second cut of it would interleave, also in checkpoints.
    """
    size = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % size == 0 else Shard(0)

    return placement
