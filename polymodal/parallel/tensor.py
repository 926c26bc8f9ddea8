"""Tensor parallelism by name pattern: which weights are cut over the tp group, and how activations pass them.

This room turns a card's `tensor_plan` into DTensor parameters and patched forwards of module instances; names stay.
It sees ops.py, sequence.py and models/card.py. Weights are DTensors (so that checkpoints and FSDP2 know where each
piece belongs) but modules compute with plain local tensors: inside a region (an attention, an MLP) every rank has the
whole input and its own heads or columns, and gradients are partial sums; at the region's end outputs are summed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from polymodal.errors import PolymodalError
from polymodal.models.card import Dropped, ModelCard
from polymodal.parallel import adapters, expert, ops
from polymodal.parallel.sequence import Stream
from polymodal.parallel.styles import STYLES, on_first, resolve, see_local

__all__ = ["STYLES", "apply", "check", "counts", "resolve"]

REGIONS = ("attention", "mlp", "merger")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
FUSED_PARTS = 3


class _Layout:
    """Applies styles to one model; holds what every patched forward needs."""

    def __init__(
        self, model: nn.Module, styles: dict[str, str], blocks: list[str], mesh: DeviceMesh, sequence: bool
    ):
        self.modules = dict(model.named_modules())
        self.styles = styles
        self.mesh = mesh
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self.sequence = sequence
        self.blocks = blocks
        self.streams = {n: Stream(self.group, sequence) for n, style in styles.items() if style == "stream"}
        # by id, old and new: tied weights stay tied
        self.placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.done: set[str] = set()

    # Where a module lies

    def above(self, name: str) -> Iterator[str]:
        """The module itself and its ancestors, innermost first."""
        while name:
            yield name
            name = name.rpartition(".")[0]

    def stream(self, name: str) -> Stream:
        for path in self.above(name):
            if path in self.streams:
                return self.streams[path]
        raise PolymodalError(f"The tensor_plan cuts `{name}`, which lies in no stream.")

    def carries(self, name: str) -> bool:
        """Is a block of this module's stream here? Without one (another pipeline stage's) nothing cuts the stream."""
        stream = self.stream(name)
        return any(self.stream(block) is stream for block in self.blocks)

    def partial(self, name: str) -> bool:
        """Are gradients of a replicated parameter of this module partial over the group?"""
        path = list(self.above(name))
        if any(self.styles.get(p) in (*REGIONS, "sparse") for p in path):
            return True
        on_stream = any(p in self.blocks for p in path) or (
            self.styles.get(name) == "exit" and self.carries(name)
        )
        return self.sequence and on_stream

    def leaves(self, name: str, style: str) -> bool:
        """Is this a dropped merger that ends a stream whose blocks are here? The stream leaves whole through it."""
        return style == "merger" and self.carries(name)

    # Parameters

    def place(self, module: nn.Module, key: str, placement: Placement) -> None:
        """Replace a parameter by a DTensor; every rank is assumed to hold the same values (or meta)."""
        parameter = module._parameters[key]
        if parameter is None or isinstance(parameter, DTensor):
            return
        if id(parameter) not in self.placed:
            value = distribute_tensor(parameter.data, self.mesh, [placement], src_data_rank=None)
            self.placed[id(parameter)] = (
                parameter,
                nn.Parameter(value, requires_grad=parameter.requires_grad),
            )
        new = self.placed[id(parameter)][1]
        module._parameters[key] = new

    def local(
        self, module: nn.Module, placements: dict[str, Placement], gradients: dict[str, Placement]
    ) -> None:
        """Cut a module's own parameters, and let its forward see plain local tensors under their names."""
        for key in placements:
            self.place(module, key, placements[key])
        keys = [key for key in placements if module._parameters.get(key) is not None]
        if keys:
            see_local(module, {key: gradients.get(key) for key in keys})

    def replicate(self, module: nn.Module, partial: bool) -> None:
        own = [key for key, value in module._parameters.items() if value is not None]
        gradient: Placement = Partial() if partial else Replicate()
        self.local(module, dict.fromkeys(own, Replicate()), dict.fromkeys(own, gradient))

    # Linear layers, with or without an adapter

    def linear(self, name: str, style: str) -> None:
        module = self.modules[name]
        if hasattr(module, "base_layer"):
            self.adapter(name, module, style)
            return
        if not isinstance(module, nn.Linear):
            raise PolymodalError(
                f"The tensor_plan says {style} for `{name}`, which is a {type(module).__name__}."
            )
        self.done.add(name)
        if style == "rowwise":
            self.divisible(name, "input features", module.in_features)
            if module.bias is not None and self.rank:
                self.without_bias(module)
            self.local(module, {"weight": Shard(1), "bias": Replicate()}, {"bias": Partial()})
        else:
            parts = FUSED_PARTS if style == "fused_colwise" else 1
            self.divisible(name, "output features", module.out_features, parts)
            if parts > 1:
                self.fused(module, module.out_features, parts)
            self.local(module, {"weight": Shard(0), "bias": Shard(0)}, {})

    def without_bias(self, module: nn.Module) -> None:
        """Of the partial sums of a rowwise layer only rank 0's holds the bias; the others give it a zero gradient."""
        forward = module.forward

        @wraps(forward)
        def zero_bias(*args: Any, **kwargs: Any) -> Any:
            module.__dict__["bias"] = module.__dict__["bias"] * 0
            return forward(*args, **kwargs)

        module.forward = zero_bias

    def fused(self, module: nn.Module, rows: int, parts: int) -> None:
        """Before the forward: the natural cut of fused rows becomes a cut of each part (an exchange of rows)."""
        order, sent, received = ops.fused_exchange(rows, parts, self.size, self.rank)
        index: dict[torch.device, Tensor] = {}
        forward = module.forward

        @wraps(forward)
        def exchanged(*args: Any, **kwargs: Any) -> Any:
            for key in ("weight", "bias"):
                value = module.__dict__.get(key)
                if value is not None:
                    if value.device not in index:
                        index[value.device] = torch.tensor(order, device=value.device)
                    module.__dict__[key] = ops.exchange_rows(
                        value, index[value.device], sent, received, self.group
                    )
            return forward(*args, **kwargs)

        module.forward = exchanged

    def adapter(self, name: str, module: nn.Module, style: str) -> None:
        """A LoRA layer of peft: y = W x + s B A x. Cut like W: colwise cuts B's rows, rowwise cuts A's columns."""
        for child, part in list(self.modules.items()):
            if not child.startswith(name + "."):
                continue
            inner = child.removeprefix(name + ".")
            if inner == "base_layer":
                self.linear(child, style)
            elif isinstance(part, nn.Linear):
                wide = inner.startswith("lora_B") if style != "rowwise" else inner.startswith("lora_A")
                if wide:
                    self.linear(child, style)
                else:  # the narrow side is whole on every rank, its gradient partial
                    self.replicate(part, partial=True)
                    self.done.add(child)
            elif any(value is not None for value in part._parameters.values()):
                raise PolymodalError(
                    f"The adapter of `{name}` ({inner}) cannot be cut over a tensor-parallel group.",
                    "Use plain LoRA, or set parallel.tp to 1 (FSDP shards any adapter).",
                )

    def divisible(self, name: str, what: str, count: int, parts: int = 1) -> None:
        if count % (self.size * parts):
            raise PolymodalError(
                f"parallel.tp = {self.size} does not divide the {count} {what} of `{name}`"
                + (f" in {parts} parts." if parts > 1 else "."),
                f"Choose a divisor of {count // parts}.",
            )

    # Modules with a style of their own

    def region(self, name: str, style: str) -> None:
        module, stream = self.modules[name], self.stream(name)
        if style == "attention":
            for key in HEAD_COUNTS:
                if isinstance(module.__dict__.get(key), int):
                    self.divisible(name, key, getattr(module, key))
                    setattr(module, key, getattr(module, key) // self.size)
            self.whole_heads(name, module)
        forward = module.forward
        leave = ops.reduce_from_region if style == "merger" else None

        @wraps(forward)
        def region(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_first(stream.enter, args, kwargs)
            out = forward(*args, **kwargs)
            partial = out[0] if isinstance(out, tuple) else out
            whole = leave(partial, self.group) if leave is not None else stream.leave(partial)
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        module.forward = region

    def whole_heads(self, name: str, module: nn.Module) -> None:
        """A cut between two halves of a head would have the right size and the wrong meaning."""
        size = getattr(module, "head_dim", None)
        for child, style in self.styles.items():
            if style == "colwise" and child.rpartition(".")[0] == name and isinstance(size, int):
                part = self.modules[child]
                part = getattr(part, "base_layer", part)
                self.divisible(child, "heads", part.out_features // size)

    def block(self, name: str, first: bool) -> None:
        module, stream = self.modules[name], self.stream(name)
        forward = module.forward

        @wraps(forward)
        def block(*args: Any, **kwargs: Any) -> Any:
            stream.note_length(kwargs)
            if first:
                args, kwargs = on_first(stream.cut, args, kwargs)
            return forward(*args, **kwargs)

        module.forward = block

    def exit(self, name: str) -> None:
        module, stream = self.modules[name], self.stream(name)
        self.replicate(module, self.partial(name))
        self.done.add(name)
        if self.carries(name):
            forward = module.forward
            module.forward = wraps(forward)(lambda *args, **kwargs: stream.gather(forward(*args, **kwargs)))

    def tower(self, name: str) -> None:
        module, stream = self.modules[name], self.streams[name]
        forward = module.forward
        module.forward = wraps(forward)(
            lambda *args, **kwargs: forward(*args, **stream.cut_deepstack(kwargs))
        )

    def embedding(self, name: str) -> None:
        module = self.modules[name]
        if not isinstance(module, nn.Embedding):
            raise PolymodalError(
                f"`{name}` is a {type(module).__name__}, which cannot be cut by vocabulary.",
                "Leave the embedding out of model.lora.targets, or set parallel.tp to 1.",
            )
        rows, padding = module.num_embeddings, module.padding_idx
        self.divisible(name, "rows", rows)
        self.done.add(name)
        self.place(module, "weight", Shard(0))

        def forward(ids: Tensor) -> Tensor:
            return ops.embed(ids, module._parameters["weight"].to_local(), rows, padding, self.group)

        module.forward = forward

    def head(self, name: str) -> None:
        module = self.modules[name]
        if not isinstance(module, nn.Linear):
            raise PolymodalError(
                f"`{name}` is a {type(module).__name__}, which cannot be cut by vocabulary.",
                "Leave the head out of model.lora.targets, or set parallel.tp to 1.",
            )
        self.divisible(name, "rows", module.out_features)
        self.done.add(name)
        self.local(module, {"weight": Shard(0), "bias": Shard(0)}, {})
        forward = module.forward

        @wraps(forward)
        def head(hidden: Tensor) -> Tensor:
            return ops.gather_last(forward(ops.copy_to_region(hidden, self.group)), self.group)

        module.forward = head

    def experts(self, name: str) -> None:
        """[E, ...] parameters cut by expert; choices of other ranks' experts become the library's sentinel E / size."""
        module: Any
        module, wrappers = adapters.wrapped(self.modules[name])
        count = getattr(module, "num_experts", None)
        keys = [key for key, value in module._parameters.items() if value is not None]
        if (
            not isinstance(count, int)
            or not keys
            or any(module._parameters[k].shape[0] != count for k in keys)
        ):
            raise PolymodalError(
                f"The experts of `{name}` cannot be cut over a tensor-parallel group.",
                "Set parallel.tp to 1.",
            )
        self.divisible(name, "experts", count)
        self.done.add(self.innermost(name))
        held = count // self.size
        start = held * self.rank
        module.num_experts, module._is_expert_parallel = held, True
        if wrappers:
            adapters.add_own(module, wrappers, start, held)
        self.local(module, dict.fromkeys(keys, Shard(0)), {})
        forward = module.forward

        @wraps(forward)
        def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            elsewhere = (index < start) | (index >= start + held)
            local = (index - start).masked_fill(elsewhere, held)
            weights = weights.masked_fill(elsewhere, 0)
            out = forward(hidden, local, weights)
            if not out.requires_grad and hidden.requires_grad:
                # No token chose an expert of this rank: its peers still wait for it in backward.
                out = out + (hidden.sum() + weights.sum()) * 0
            return out

        module.forward = experts

    def innermost(self, name: str) -> str:
        """Name of the module inside of its adapters."""
        inner, _ = adapters.wrapped(self.modules[name])
        return next(other for other, module in self.modules.items() if module is inner)

    def router(self, name: str) -> None:
        module = self.modules[name]
        self.replicate(module, partial=True)
        self.done.add(name)
        forward = module.forward

        @wraps(forward)
        def router(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            # The balance loss is computed alike on every rank: its gradient is whole, this region's are partial.
            return (ops.scale_gradient(out[0], 1 / self.size), *out[1:])

        module.forward = router

    def run(self) -> None:
        # What another pipeline stage holds is handed through; only the end of a stream still has to gather.
        self.styles = {
            name: style
            for name, style in self.styles.items()
            if style == "exit" or not isinstance(self.modules[name], Dropped) or self.leaves(name, style)
        }
        for name, style in self.styles.items():
            if style in ("colwise", "rowwise", "fused_colwise"):
                self.linear(name, style)
            elif style in ("embedding", "head", "experts", "router", "exit"):
                getattr(self, style)(name)
            elif style == "dispatched":
                self.done.add(self.innermost(name))
        for name, module in self.modules.items():
            if name not in self.done and any(p is not None for p in module._parameters.values()):
                self.replicate(module, self.partial(name))
        for name, style in self.styles.items():
            if isinstance(self.modules[name], Dropped) and style == "merger":
                self.exit(name)
            elif style in REGIONS:
                self.region(name, style)
            elif style == "sparse":
                routers = [
                    n for n, s in self.styles.items() if s == "sparse_router" and n.rpartition(".")[0] == name
                ]
                expert.own_rows(
                    self.modules[name], [self.modules[n] for n in routers], self.stream(name), self.group
                )
        entered: set[int] = set()
        for name in self.blocks:
            stream = self.stream(name)
            self.block(name, first=id(stream) not in entered)
            entered.add(id(stream))
        for name in self.streams:
            self.tower(name)


def counts(config: Any) -> dict[str, int]:
    """What tensor parallelism divides, by its key in config.json: heads, widths, vocabulary, experts."""
    found: dict[str, int] = {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", None)
    experts = getattr(text, "num_experts", 0)
    dense = (
        not experts or getattr(text, "mlp_only_layers", None) or getattr(text, "decoder_sparse_step", 1) > 1
    )
    keys = ["num_attention_heads", "num_key_value_heads", "vocab_size", "num_experts"]
    for key in [*keys, "intermediate_size"] if dense else keys:
        if getattr(text, key, 0):
            found[key if text is config else f"text_config.{key}"] = getattr(text, key)
    for key in ("num_heads", "num_attention_heads", "intermediate_size"):
        if vision is not None and getattr(vision, key, 0):
            found[f"vision_config.{key}"] = getattr(vision, key)
    return found


def check(card: ModelCard, config: Any, size: int, spread: bool = False) -> list[PolymodalError]:
    """Why a model of this transformers config cannot be cut over `size` ranks, with the numbers that would work.

    spread: the experts are laid out over an expert-parallel group instead.
    """
    if not card.tensor_plan:
        return [
            PolymodalError(
                f"{card.name} has no tensor-parallel plan.", "Set parallel.tp to 1 and use dp_shard."
            )
        ]
    have = {key: n for key, n in counts(config).items() if not (spread and key.endswith("num_experts"))}
    common = math.gcd(*have.values())
    works = [n for n in range(1, common + 1) if common % n == 0]
    return [
        PolymodalError(
            f"parallel.tp = {size} does not divide {key} = {value} of {card.name}.",
            f"Choose parallel.tp from {', '.join(map(str, works))}.",
        )
        for key, value in have.items()
        if value % size
    ]


def apply(
    model: nn.Module,
    card: ModelCard,
    blocks: list[str],
    mesh: DeviceMesh,
    sequence: bool,
    spread: Mapping[str, str] | None = None,
) -> None:
    """Cut `model` over the 1-D tensor-parallel `mesh` by its card's tensor_plan.

    blocks: names of the card's blocks in order; sequence: also cut the residual streams (sequence parallelism);
    spread: styles of regions whose experts expert.py lays out, in place of the plan's for all that lies in them.
    Afterwards every other parameter is a DTensor on `mesh`. Raises PolymodalError for what cannot be cut.
    """
    # FSDP2 over TP gathers a whole parameter in two steps; DTensor warns of it at every export and checkpoint.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    styles, spread = resolve(model, card), spread or {}
    regions = tuple(f"{name}." for name, style in spread.items() if style == "sparse")
    styles = {name: style for name, style in styles.items() if not name.startswith(regions)} | dict(spread)
    _Layout(model, styles, blocks, mesh, sequence).run()
