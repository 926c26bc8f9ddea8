"""A whole model on a whole mesh: tensor and expert parallelism, compilation, recompute, FSDP2, in that order.

A recipe's `parallel` and `train.precision` are applied to a model here, on meta or real parameters; a
parameter's name never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.distributed.context_parallel import ulysses_size
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import quantised
from polymodal.models.card import ModelCard, PrunedModule
from polymodal.parallel import dit_context_parallel, expert, memory, pipeline_split, tensor
from polymodal.parallel.batches import attention_heads, context_of
from polymodal.parallel.pipeline_split import SCHEDULES, ScheduleTraits
from polymodal.parallel.styles import on_first, pattern_of
from polymodal.recipe import Model, Parallel, Recipe
from polymodal.runtime import device

COMPUTE_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "pure_bf16": torch.bfloat16}
"""Arithmetic of the forward and backward passes by train.precision; None: that of the parameters."""


def matching(model: nn.Module, patterns: tuple[str, ...] | list[str], what: str) -> dict[str, nn.Module]:
    """Modules whose name fits a pattern (`*` is one dotted part), in order of patterns, then of the model.

    Modules of other pipeline stages are left out. Raises PolymodalError, naming the recipe's or card's key
    `what`, when a pattern fits nothing.
    """
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for pattern in patterns:
        expression = pattern_of(pattern)
        hits = {name: module for name, module in modules.items() if expression.fullmatch(name)}
        if not hits and not any(isinstance(module, PrunedModule) for module in modules.values()):
            lists = [
                n for n, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 1
            ]
            known = ", ".join(f"{name}.*" for name in lists) or "not in lists"
            raise PolymodalError(
                f"{what}: no module of this model fits `{pattern}`.", f"Its blocks are {known}."
            )
        found |= {name: module for name, module in hits.items() if not isinstance(module, PrunedModule)}
    return found


def check(
    card: ModelCard,
    config: Any,
    sizes: ParallelSizes,
    parallel: Parallel | None = None,
    settings: Model | None = None,
) -> list[PolymodalError]:
    """Every reason why a model of this transformers config cannot be sharded so; empty when it can.

    settings: the recipe's model. Needs no model itself; `polymodal check` lists all of the errors.
    """
    reasons = quantised.check(settings, sizes) if settings is not None else []
    attention = settings.attention if settings is not None else "auto"
    for axis in ("pp", "cp", "ep", "tp"):
        size = getattr(sizes, axis)
        if size > 1 and axis in card.limits:
            cause = f"{card.name} cannot be laid out with parallel.{axis} = {size}: {card.limits[axis]}"
            reasons.append(PolymodalError(cause, f"Set parallel.{axis} to 1."))
    if parallel is not None:
        reasons += _check_keys(card, parallel)
    if "cp" not in card.limits:
        reasons += _check_context(card, config, sizes, parallel, attention)
    if sizes.tp > 1 and "tp" not in card.limits:
        reasons += tensor.check(card, config, sizes.tp, spread=sizes.ep > 1)
    if sizes.ep > 1 and "ep" not in card.limits:
        reasons += expert.check(card, config, sizes)
    return reasons


def _check_context(
    card: ModelCard, config: Any, sizes: ParallelSizes, parallel: Parallel | None, attention: str
) -> list[PolymodalError]:
    try:
        heads = max(1, attention_heads(config) // sizes.tp)
        ulysses = ulysses_size(sizes.cp, heads, parallel.ulysses if parallel is not None else None)
    except PolymodalError as error:
        return [error]
    if sizes.cp > ulysses and "ring" in card.limits:
        cause = f"{card.name} cannot be laid out with a ring of {sizes.cp // ulysses}: {card.limits['ring']}"
        return [PolymodalError(cause, f"Set parallel.cp to a divisor of the {heads} heads of a rank.")]
    if sizes.cp > 1 and attention != "auto":
        cause = f"parallel.cp = {sizes.cp} cuts sequences, which model.attention = {attention} cannot follow."
        return [PolymodalError(cause, "Set model.attention to auto.")]
    if sizes.cp > 1 and not card.sequence_entry and not card.sequence_plan:
        cause = f"{card.name} has no rule for cutting its sequences for parallel.cp = {sizes.cp}."
        return [PolymodalError(cause, "Set parallel.cp to 1.")]
    return []


def _check_keys(card: ModelCard, parallel: Parallel) -> list[PolymodalError]:
    """Keys of `parallel` that contradict each other, or the card."""
    reasons = []

    def refuse(cause: str, hint: str) -> None:
        reasons.append(PolymodalError(cause, hint))

    schedule = SCHEDULES[parallel.pp_schedule] if parallel.pp > 1 else ScheduleTraits()
    named = f"parallel.pp_schedule = {parallel.pp_schedule}"
    if parallel.compile and parallel.recompute == "selective":
        cause = "parallel.recompute = selective cannot see the matrix products inside of compiled blocks."
        refuse(cause, "Set parallel.recompute to full, or parallel.compile to false.")
    if parallel.compile and "activations" in parallel.offload:
        cause = "parallel.offload of activations cannot see what compiled blocks save."
        refuse(cause, "Leave it out, or set parallel.compile to false.")
    if key := pipeline_split.unused_pp_key(parallel):
        cause = f"parallel.{key} says how stages are cut, but parallel.pp is 1."
        refuse(cause, f"Set parallel.pp to the number of stages, or leave {key} out.")
    if parallel.zero_stage < 3 and parallel.reshard_after_forward and not schedule.gathers:
        cause = f"parallel.zero = {parallel.zero_stage} keeps parameters whole over a step"
        cause += ", parallel.reshard_after_forward would free them."
        refuse(cause, "Leave reshard_after_forward out, or set parallel.zero to 3.")
    if parallel.recompute_first and parallel.recompute_every:
        cause = "parallel.recompute_first and parallel.recompute_every are two ways to choose blocks."
        refuse(cause, "Give one of them.")
    for key in ("recompute_blocks", "recompute_first", "recompute_every"):
        if getattr(parallel, key) is not None and parallel.recompute == "none":
            cause = f"parallel.{key} chooses blocks, but parallel.recompute is none."
            refuse(cause, "Set parallel.recompute to full or selective.")
    if parallel.recompute_keep is not None and parallel.recompute != "selective":
        cause = f"parallel.recompute = {parallel.recompute} has no use for parallel.recompute_keep."
        refuse(cause, "Set parallel.recompute to selective.")
    if schedule.split_backward and parallel.compile:
        cause = f"{named} splits the backward pass into two, which compiled blocks give only together."
        refuse(cause, "Set parallel.compile to false, or parallel.pp_schedule to Interleaved1F1B.")
    given = {
        "reshard_after_forward = true": parallel.reshard_after_forward,
        f"zero = {parallel.zero}": parallel.zero_stage > 1,
    }
    for key in (key for key, wrong in given.items() if schedule.gathers and wrong):
        cause = f"{named} gathers and reduces whole stages itself, parallel.{key} is not for it."
        refuse(cause, f"Leave out parallel.{key.split()[0]}, or set parallel.pp_schedule to 1F1B.")
    for name in (name for name in parallel.replicate if name not in card.towers):
        cause = f"parallel.replicate: {card.name} has no tower `{name}`."
        refuse(cause, f"Its towers: {', '.join(card.towers)}.")
    if parallel.balance_media and not card.family.streams:
        cause = f"parallel.balance_media assigns pictures within a sequence of text, {card.name} has none."
        refuse(cause, "Leave it out.")
    return reasons


def recomputed(
    model: nn.Module, card: ModelCard, parallel: Parallel, blocks: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Blocks to be recomputed, by name. Raises PolymodalError for a word that matches none."""
    chosen = blocks
    if parallel.recompute_blocks is not None:
        chosen = {}
        for word in parallel.recompute_blocks:
            paths = tuple(f"{path}." for path in card.towers.get(word, ()))
            inside = {name: block for name, block in blocks.items() if paths and name.startswith(paths)}
            chosen |= inside or matching(model, [word], "parallel.recompute_blocks")
    towers: dict[str, list[str]] = {}
    for name in chosen:
        towers.setdefault(name.rpartition(".")[0], []).append(name)
    first, every = parallel.recompute_first, parallel.recompute_every or 1
    return {name: chosen[name] for names in towers.values() for name in names[:first:every]}


def apply(model: nn.Module, card: ModelCard, mesh: Mesh, recipe: Recipe) -> nn.Module:
    """Shard `model` over `mesh` by `recipe.parallel` and `recipe.train.precision`; returns the same object.

    The caller has attached adapters, frozen what is not trained, and bound a forward that ends in the loss.
    Afterwards parameters are DTensors (plain tensors when one process computes in the parameters' own
    precision), and gradients
    are SUMS over all ranks that read data: the loss is to be divided by the global weight before. Raises
    PolymodalError for a layout that this model cannot have.
    """
    parallel, precision = recipe.parallel, recipe.train.precision
    for reason in check(card, getattr(model, "config", None), mesh.sizes, parallel, recipe.model):
        raise reason
    blocks = matching(model, card.blocks, f"the card {card.name}")
    _set_dtypes(model, precision)
    tp, ep = mesh.view("tp"), mesh.view("ep")
    spread = expert.resolve(model, card) if ep is not None else {}
    if tp is not None:
        sequence = parallel.sp if parallel.sp is not None else True
        tensor.apply(model, card, list(blocks), tp, sequence, spread)
    experts = expert.apply(model, spread, ep) if ep is not None else []
    cut = None
    if mesh.sizes.cp > 1 and card.sequence_plan:
        context = context_of(mesh, getattr(model, "config", None), parallel)
        assert context is not None
        cut = dit_context_parallel.apply(model, card, context)
    elif mesh.device_type != "cpu" and card.kind == "generation":
        dit_context_parallel.use(model, card)
    if parallel.compile:
        import torch._dynamo

        if not device.compiles(mesh.device_type):
            cause = f"parallel.compile: torch's compiler makes no code for {mesh.device_type} here."
            raise PolymodalError(cause, "Leave it out.")
        # Inside recompute: attention interrupts a block's graph, which torch allows under recompute from
        # outside only.
        for block in blocks.values():
            block.forward = torch.compile(block.forward)  # the instance's: hooks and names stay as they are
        if (
            tp is not None
        ):  # each block's patched forward is its own function to dynamo, which shares one limit
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 8 * len(blocks))
    if cut is not None and mesh.sizes.pp > 1:
        for block in blocks.values():
            dit_context_parallel.remember_lengths(block, cut)
    offload = "activations" in parallel.offload
    if parallel.recompute != "none":
        chosen = recomputed(model, card, parallel, blocks)
        keep = parallel.recompute_keep if parallel.recompute_keep is not None else tuple(memory.OPERATORS)
        memory.recompute(chosen.values(), parallel.recompute, keep, offload)
    if offload:
        memory.offload_activations(blocks.values())
    alone = mesh.fsdp_size == 1 and mesh.sizes.tp == 1 and precision in ("fp32", "pure_bf16")
    if alone and "parameters" not in parallel.offload:
        return model  # nothing to cut and nothing to cast
    whole = kept_whole(model, card, parallel, blocks)
    _shard(model, list(blocks.values()), experts, whole, mesh, precision, parallel)
    return model


def kept_whole(
    model: nn.Module, card: ModelCard, parallel: Parallel, blocks: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The FSDP2 units, by name, of the towers that parallel.replicate names: their blocks, else the tower."""
    found: dict[str, nn.Module] = {}
    for path in (path for word in parallel.replicate for path in card.towers[word]):
        inside = {name: block for name, block in blocks.items() if name.startswith(f"{path}.")}
        module = dict(model.named_modules()).get(path)
        if inside:
            found |= inside
        elif isinstance(module, nn.ModuleList):
            found |= {f"{path}.{name}": child for name, child in module.named_children()}
        elif module is not None and not isinstance(module, PrunedModule):
            found[path] = module
    return found


def _set_dtypes(model: nn.Module, precision: str) -> None:
    """Frozen parameters need no float32 master: they are kept in the dtype they are computed in.

    Buffers keep theirs: rotary frequencies are float32 under every precision.
    """
    dtype = COMPUTE_DTYPE[precision]
    if dtype is None:
        return
    for parameter in model.parameters():
        if parameter.is_floating_point() and (precision == "pure_bf16" or not parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def _shard(
    model: nn.Module,
    blocks: list[nn.Module],
    experts: list[nn.Module],
    whole: dict[str, nn.Module],
    mesh: Mesh,
    precision: str,
    parallel: Parallel,
) -> None:
    compute = COMPUTE_DTYPE[precision]
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision in ("fp32", "pure_bf16") else compute,
        reduce_dtype=None if precision == "fp32" else torch.float32,
        # FSDP2 would cast every floating input, rotary tables and timesteps too: blocks cast only their
        # activations.
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {"mesh": mesh.fsdp, "mp_policy": policy}
    options["reshard_after_forward"] = parallel.reshards
    if "parameters" in parallel.offload:
        pinned = mesh.device_type != "cpu" and torch.accelerator.is_available()
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    copied = {id(module) for module in whole.values()}
    for module in experts:  # before the blocks that hold them: what is left of a block is its own unit
        own = mesh.expert_fsdp
        fully_shard(module, **{**options, "mesh": own}, shard_placement_fn=expert.fsdp_placement(own))
    for block in blocks:
        if compute is not None:
            block.register_forward_pre_hook(_cast_activations(compute), with_kwargs=True)
        fully_shard(block, **{**options, "mesh": mesh.copies} if id(block) in copied else options)
    for module in whole.values():
        if not isinstance(module, FSDPModule):
            fully_shard(module, **{**options, "mesh": mesh.copies})
    # The root's forward ends in the loss: freed there, its weights would be gathered again at once for
    # backward.
    fully_shard(model, **{**options, "reshard_after_forward": False})
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: the loss is divided by the global weight already, and gloo has no scaled reduction.
            if (
                mesh.fsdp.size() > 1 or experts
            ):  # one rank sums anyway; with a factor torch would divide a copy
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.device_type == "cpu":
                module.set_custom_reduce_scatter(_ReduceScatter())
            if hasattr(module, "set_reduce_scatter_unused_params"):
                # A parameter that one rank's batch does not use (an expert, a merger) is still reduced with
                # the others'.
                module.set_reduce_scatter_unused_params(True)
    memory.shard_by_stage(model, parallel.zero_stage)
    inner = {id(module) for module in experts}
    units = [part for block in blocks for part in block.modules() if part is block or id(part) in inner]
    memory.prefetch(units, parallel.prefetch)


class _ReduceScatter:
    """FSDP2's reduction by collectives.reduce_scatter, which on gloo takes half the time of gloo's own."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, *_: Any, **__: Any
    ) -> None:
        output_tensor.copy_(collectives.reduce_scatter(input_tensor, group))


def _cast_activations(dtype: torch.dtype) -> Any:
    """Pre-forward hook: casts the stream of activations (first argument, or `hidden_states`)."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return on_first(cast, args, kwargs) if args or "hidden_states" in kwargs else (args, kwargs)

    return hook
