"""Tensor parallelism by name pattern: which weights are cut over the tp group, and how activations pass them.

A card's `tensor_plan` becomes DTensor parameters and patched forwards of module instances; names stay.
Weights are DTensors (so that checkpoints and FSDP2 know where each piece belongs) but modules compute with
plain local tensors: inside a region (an attention, an MLP) every rank has the whole input and its own heads
or columns, and gradients are partial sums; at the region's end outputs are summed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.models.card import ModelCard, PrunedModule
from polymodal.models.partial import on_argument
from polymodal.models.understanding import language
from polymodal.parallel import expert
from polymodal.parallel.linears import LINEAR, Linears
from polymodal.parallel.sequence import Stream
from polymodal.parallel.styles import on_first, on_output, remember, resolve, wrap

ATTENTIONS = ("attention", "joint_attention", "joint_heads", "joined_heads")
REGIONS = (*ATTENTIONS, "mlp", "feed_forward", "merger")
PARTS = ("joined_colwise", "joined_rowwise", "entering_colwise", "leaving_rowwise")
"""Linear layers that begin or end a region which no module holds."""
CROSSED = (*REGIONS, *PARTS, "whole_attention", "end")
"""Styles of modules whose input or output is a stream."""
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "heads")
CONTEXT = "encoder_hidden_states"
CONTEXTS = (CONTEXT, "key_value_states")
"""Arguments of attentions over another stream than their own."""
MODULATION = ("temb", "token_replace_emb")
"""Arguments of diffusers' blocks that shift and scale their rows."""
LENGTHS = "polymodal_stream_lengths"
"""Argument with the lengths of the whole streams, removed before a block's own forward."""


class _Layout(Linears):
    """Applies styles to one model; holds what every patched forward needs."""

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        styles: dict[str, str],
        blocks: list[str],
        mesh: DeviceMesh,
        sequence: bool,
    ):
        super().__init__(model, styles, blocks, mesh)
        self.sequence, self.leading = sequence, card.num_leading_rows
        self.masked_rows = card.masked_rows
        names = card.block_streams
        self.streams = {n: Stream(self.group, sequence, names) for n, s in styles.items() if s == "stream"}

    def run(self) -> None:
        pruned = {name for name, module in self.modules.items() if isinstance(module, PrunedModule)}
        continues = any(style == "end" and name in pruned for name, style in self.styles.items())
        # Pruned modules pass the stream on; only those that end it still have to gather.
        self.styles = {
            name: style
            for name, style in self.styles.items()
            if name not in pruned or style == "exit" or (style == "merger" and self.carries(name))
        }
        for name, style in self.styles.items():
            if style in LINEAR:
                self.linear(name, style)
            elif style in ("embedding", "head", "experts", "router", "exit", "norm_across_heads"):
                getattr(self, style)(name)
            elif style == "dispatched":
                self.done.add(self.innermost(name))
        for name, module in self.modules.items():
            if name not in self.done and any(p is not None for p in module._parameters.values()):
                self.replicate(module, self.partial(name))
        for name, style in self.styles.items():
            if name in pruned and style == "merger":
                self.exit(name)
            else:
                self.region(name, style)
        entered: set[int] = set()
        for name in self.blocks:
            stream = self.stream(name)
            self.block(name, first=id(stream) not in entered, last=name == self.blocks[-1] and continues)
            entered.add(id(stream))
        for name in self.streams if self.masked_rows else ():
            self.tower(name)

    # Where a module is

    def stream(self, name: str) -> Stream:
        for path in self.above(name):
            if path in self.streams:
                return self.streams[path]
        raise PolymodalError(
            f"The tensor_plan cuts `{name}`, which is in no stream.",
            "This is a defect of the model's card: please report it.",
        )

    def carries(self, name: str) -> bool:
        """Is a block of this module's stream here? Without one nothing cuts the stream."""
        stream = self.stream(name)
        return any(self.stream(block) is stream for block in self.blocks)

    def partial(self, name: str) -> bool:
        """Are gradients of a replicated parameter of this module partial over the group?"""
        path = list(self.above(name))
        styles = {self.styles.get(p) for p in path}
        if "whole_attention" in styles:
            return False
        if styles & {*REGIONS, "sparse"}:
            return True
        exits = self.styles.get(name) == "exit" and self.carries(name)
        return self.sequence and (exits or "between" in styles or any(p in self.blocks for p in path))

    # Regions: how a stream enters and leaves them

    def region(self, name: str, style: str) -> None:
        module = self.modules[name]
        if style == "sparse":
            routers = [
                n for n, s in self.styles.items() if s == "sparse_router" and n.rpartition(".")[0] == name
            ]
            expert.own_rows(module, [self.modules[n] for n in routers], self.stream(name), self.group)
            return
        if style in ATTENTIONS:
            self.attention(name, style)
        if style == "end" and not self.carries(name):
            return
        enter, leave = self.crossing(name, style)
        if enter is not None or leave is not None:
            wrap(module, enter, leave)

    def crossing(self, name: str, style: str) -> tuple[Callable | None, Callable | None]:
        """(what a module of this style does with its input, and with its output)."""
        if style not in CROSSED:
            return None, None
        stream = self.stream(name)
        leave = partial(on_output, stream.leave)
        cut = partial(collectives.cut_sequence, group=self.group)
        reduce = partial(collectives.reduce_from_region, group=self.group)

        def leave_both(out: Any) -> Any:
            return tuple(map(stream.leave, out)) if isinstance(out, tuple) else stream.leave(out)

        crossings: dict[str, tuple[Callable | None, Callable | None]] = {
            "attention": (stream.enter, leave),
            "joint_attention": (stream.enter, leave_both),
            "joint_heads": (stream.enter, None),
            "joined_heads": (stream.enter_joined, None),
            "joined_colwise": (stream.enter_joined, None),
            "joined_rowwise": (None, stream.leave_joined),
            "entering_colwise": (stream.enter, None),
            "leaving_rowwise": (None, stream.leave),
            "mlp": (stream.enter, leave),
            "feed_forward": (stream.enter_rows, leave),
            "merger": (stream.enter, partial(on_output, reduce)),
            "whole_attention": (stream.gather, partial(on_output, cut) if stream.sequence else None),
            "end": (stream.gather, None),
        }
        return crossings[style]

    def attention(self, name: str, style: str) -> None:
        """Divide the head counts of an attention, and let its context enter too."""
        module, stream = self.modules[name], self.stream(name)
        width = getattr(module, "num_heads", 0) * getattr(module, "head_dim", 0)
        if width and module.__dict__.get("embed_dim") == width:  # what heads are joined to, in some towers
            module.embed_dim = width // self.size
        for key in HEAD_COUNTS:
            if isinstance(module.__dict__.get(key), int):
                self.divisible(name, key, getattr(module, key))
                setattr(module, key, getattr(module, key) // self.size)
        self.whole_heads(name, module)
        forward, joint = module.forward, style in ("joint_attention", "joint_heads")

        def context(hidden: Tensor) -> Tensor:
            return stream.enter(hidden, CONTEXT) if joint else collectives.copy_to_region(hidden, self.group)

        @wraps(forward)
        def with_context(*args: Any, **kwargs: Any) -> Any:
            for each in CONTEXTS:
                args, kwargs = on_argument(module, each, context, args, kwargs)
            return forward(*args, **kwargs)

        module.forward = with_context

    def whole_heads(self, name: str, module: nn.Module) -> None:
        """A cut between two halves of a head would have the right size and the wrong meaning."""
        size = getattr(module, "head_dim", None)
        for child, style in self.styles.items():
            if style == "colwise" and child.rpartition(".")[0] == name and isinstance(size, int):
                part = getattr(self.modules[child], "base_layer", self.modules[child])
                self.divisible(child, "heads", part.out_features // size)

    def block(self, name: str, first: bool, last: bool) -> None:
        """first: here the streams are cut; last: here they are made whole, for the next pipeline stage."""
        module, stream = self.modules[name], self.stream(name)
        forward, several = module.forward, len(stream.names) > 1

        def cut(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if not several:
                return on_first(stream.cut, args, kwargs)
            for each in stream.names:
                args, kwargs = on_argument(module, each, partial(stream.cut, name=each), args, kwargs)
            return args, kwargs

        @wraps(forward)
        def block(*args: Any, **kwargs: Any) -> Any:
            if first:
                args, kwargs = cut(args, kwargs)
            for each in MODULATION if stream.sequence else ():
                args, kwargs = on_argument(module, each, stream.modulation, args, kwargs)
            if self.leading:
                args, kwargs = on_argument(module, self.leading, stream.leading, args, kwargs)
            out = forward(*args, **kwargs)
            if not last:
                return out
            if not several:
                return stream.gather(out)
            return tuple(  # a model's last block may give a stream up
                part if part is None else stream.gather(part, each)
                for each, part in zip(stream.names, out, strict=True)
            )

        module.forward = block
        if stream.sequence and not first:
            remember(module, LENGTHS, lambda: dict(stream.lengths), stream.lengths.update)

    def exit(self, name: str) -> None:
        module = self.modules[name]
        self.replicate(module, self.partial(name))
        self.done.add(name)
        if self.carries(name):
            wrap(module, leave=partial(on_output, self.stream(name).gather))

    def tower(self, name: str) -> None:
        module, stream = self.modules[name], self.streams[name]
        forward = module.forward

        @wraps(forward)
        def cut(*args: Any, **kwargs: Any) -> Any:
            for mask, rows in self.masked_rows.items():
                kwargs = stream.cut_masked_rows(kwargs, mask, rows)
            return forward(*args, **kwargs)

        module.forward = cut

    # Modules whose parameters are cut in a way of their own

    def norm_across_heads(self, name: str) -> None:
        module = self.modules[name]
        weight, eps = module._parameters.get("weight"), getattr(module, "eps", None)
        if type(module).__name__ != "RMSNorm" or weight is None or module._parameters.get("bias") is not None:
            raise PolymodalError(
                f"`{name}` is a {type(module).__name__} over all heads, only a root-mean-square norm with a "
                "weight can be cut.",
                "Set parallel.tp to 1.",
            )
        self.divisible(name, "features", len(weight))
        self.done.add(name)
        module.forward = lambda hidden: collectives.rms_norm_across(
            hidden, module.__dict__["weight"], eps, self.group
        )
        self.local(module, {"weight": Shard(0)}, {})

    def embedding(self, name: str) -> None:
        module = self.of_vocabulary(name, nn.Embedding, "embedding")
        rows, padding = module.num_embeddings, module.padding_idx
        self.divisible(name, "rows", rows)
        self.place(module, "weight", Shard(0))

        def forward(ids: Tensor) -> Tensor:
            return collectives.embed(ids, module._parameters["weight"].to_local(), rows, padding, self.group)

        module.forward = forward

    def head(self, name: str) -> None:
        module = self.of_vocabulary(name, nn.Linear, "head")
        self.divisible(name, "rows", module.out_features)
        self.local(module, {"weight": Shard(0), "bias": Shard(0)}, {})
        wrap(
            module,
            partial(collectives.copy_to_region, group=self.group),
            partial(collectives.gather_last, group=self.group),
        )

    def of_vocabulary(self, name: str, kind: type, what: str) -> Any:
        module = self.modules[name]
        if not isinstance(module, kind):
            raise PolymodalError(
                f"`{name}` is a {type(module).__name__}, which cannot be cut by vocabulary.",
                f"Leave the {what} out of model.lora.targets, or set parallel.tp to 1.",
            )
        self.done.add(name)
        return module

    def experts(self, name: str) -> None:
        """[E, ...] parameters cut by expert; choices of other ranks' experts become the library's sentinel E
        / size."""
        module, wrappers, keys = expert.stacks(self.modules[name], name, "tp")
        self.divisible(name, "experts", module.num_experts)
        self.done.add(self.innermost(name))
        held = module.num_experts // self.size
        start = held * self.rank
        module.num_experts, module._is_expert_parallel = held, True
        expert.add_adapters(module, wrappers, start, held)
        self.local(module, dict.fromkeys(keys, Shard(0)), {})
        forward = module.forward

        @wraps(forward)
        def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            elsewhere = (index < start) | (index >= start + held)
            local = (index - start).masked_fill(elsewhere, held)
            weights = weights.masked_fill(elsewhere, 0)
            out = forward(hidden, local, weights)
            if torch.is_grad_enabled() and not out.requires_grad:
                # No token chose an expert of this rank: the other ranks still wait for it in backward.
                added = sum(module._parameters[key].to_local().sum() for key in keys)
                out = out + (hidden.sum() + weights.sum() + added) * 0
            return out

        module.forward = experts

    def innermost(self, name: str) -> str:
        """Name of the module inside of its adapters."""
        inner, _ = expert.unwrapped(self.modules[name])
        return next(other for other, module in self.modules.items() if module is inner)

    def router(self, name: str) -> None:
        module = self.modules[name]
        self.replicate(module, partial=True)
        self.done.add(name)
        # The balance loss is computed alike on every rank: its gradient is whole, this region's are partial.
        scale = partial(collectives.scale_gradient, factor=1 / self.size)
        wrap(module, leave=partial(on_output, scale))


def counts(card: ModelCard, config: Any) -> dict[str, int]:
    """The numbers of config.json that tensor parallelism divides, by key: heads, widths, vocabulary, experts;
    not the heads of a tower whose attention the card leaves whole."""
    if isinstance(config, Mapping):  # diffusers
        config = SimpleNamespace(**config)
    if getattr(config, "is_encoder_decoder", False):
        keys = ["encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"]
        return {key: getattr(config, key) for key in keys}  # the vocabulary stays whole
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    keys = ["num_attention_heads", "num_key_value_heads", "vocab_size", *language.COUNTS[:2]]
    if language.sparse_layers(text) < getattr(text, "num_hidden_layers", 1):
        keys.append("intermediate_size")
    if getattr(text, "n_shared_experts", 0):
        keys.append("moe_intermediate_size")
    prefix = "" if text is config else f"{getattr(text, 'base_config_key', '') or 'text_config'}."
    found = {f"{prefix}{key}": getattr(text, key) for key in keys if getattr(text, key, 0)}
    for section in ("vision_config", "audio_config"):
        tower = getattr(config, section, None)
        keys = ["intermediate_size"]
        if "whole_attention" not in card.tensor_plan.values():  # some configs have both keys for one thing
            keys.insert(0, "num_heads" if hasattr(tower, "num_heads") else "num_attention_heads")
        found |= {f"{section}.{key}": getattr(tower, key) for key in keys if getattr(tower, key, 0)}
    return found


def check(card: ModelCard, config: Any, size: int, spread: bool = False) -> list[PolymodalError]:
    """Why a model of this config cannot be cut over `size` ranks, with the numbers that would work.

    spread: the experts are sharded over an expert-parallel group instead.
    """
    if not card.tensor_plan:
        cause = f"{card.name} has no tensor-parallel plan."
        return [PolymodalError(cause, "Set parallel.tp to 1 and use dp_shard.")]
    numbers = counts(card, config)
    if spread:
        numbers = {key: n for key, n in numbers.items() if not key.endswith(language.COUNTS)}
    common = math.gcd(*numbers.values())
    works = [str(n) for n in range(1, common + 1) if common % n == 0]
    return [
        PolymodalError(
            f"parallel.tp = {size} does not divide {key} = {value} of {card.name}.",
            f"Choose parallel.tp from {', '.join(works)}.",
        )
        for key, value in numbers.items()
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

    blocks: names of the card's blocks in order; sequence: also cut the residual streams (sequence
    parallelism);
    spread: styles of regions whose experts expert.py shards, in place of the plan's for everything inside
    them. Afterwards every other parameter is a DTensor on `mesh`. Raises PolymodalError.
    """
    # FSDP2 over TP gathers a whole parameter in two steps; DTensor warns of it at every export and
    # checkpoint.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    styles, spread = resolve(model, card), spread or {}
    regions = tuple(f"{name}." for name, style in spread.items() if style == "sparse")
    styles = {name: style for name, style in styles.items() if not name.startswith(regions)} | dict(spread)
    _Layout(model, card, styles, blocks, mesh, sequence).run()
