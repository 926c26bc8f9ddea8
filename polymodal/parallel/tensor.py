"""Tensor parallelism by name pattern: which weights are cut over the tp group, and how activations pass them.

This room turns a card's `tensor_plan` into DTensor parameters and patched forwards of module instances; names stay.
It sees collectives.py, sequence.py, linears.py and models/card.py. Weights are DTensors (so that checkpoints and FSDP2 know where each
piece belongs) but modules compute with plain local tensors: inside a region (an attention, an MLP) every rank has the
whole input and its own heads or columns, and gradients are partial sums; at the region's end outputs are summed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.models.card import ModelCard, PrunedModule
from polymodal.models.partial import on_argument
from polymodal.parallel import adapters, expert
from polymodal.parallel.linears import LINEAR, Linears
from polymodal.parallel.sequence import Stream
from polymodal.parallel.styles import STYLES, on_first, resolve

__all__ = ["STYLES", "apply", "check", "counts", "resolve"]

ATTENTIONS = ("attention", "joint_attention", "joint_heads", "joined_heads")
REGIONS = (*ATTENTIONS, "mlp", "feed_forward", "merger")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "heads")
CONTEXT = "encoder_hidden_states"
CONTEXTS = (CONTEXT, "key_value_states")
"""Arguments of attentions over another stream than their own."""
MODULATION = ("temb", "token_replace_emb")
"""Arguments of diffusers' blocks that shift and scale their rows."""
LENGTHS = "polymodal_stream_lengths"
"""Argument that tells a block how long the whole streams are; taken off before its own forward."""


class _Layout(Linears):
    """Applies styles to one model; holds what every patched forward needs."""

    def __init__(
        self, model: nn.Module, card: ModelCard, styles: dict[str, str], blocks: list[str], mesh: DeviceMesh, sequence: bool
    ):  # fmt: skip
        super().__init__(model, styles, blocks, mesh)
        self.sequence, self.leading = sequence, card.num_leading_rows
        self.masked_rows = card.masked_rows
        names = card.block_streams
        self.streams = {n: Stream(self.group, sequence, names) for n, s in styles.items() if s == "stream"}

    # Where a module lies

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
        if any(self.styles.get(p) == "whole_attention" for p in path):
            return False
        if any(self.styles.get(p) in (*REGIONS, "sparse") for p in path):
            return True
        on_stream = any(p in self.blocks for p in path) or (
            self.styles.get(name) == "exit" and self.carries(name)
        )
        return self.sequence and on_stream

    def leaves(self, name: str, style: str) -> bool:
        """Is this a dropped merger that ends a stream whose blocks are here? The stream leaves whole through it."""
        return style == "merger" and self.carries(name)

    # Modules with a style of their own

    def region(self, name: str, style: str) -> None:
        module, stream = self.modules[name], self.stream(name)
        if style in ATTENTIONS:
            width = getattr(module, "num_heads", 0) * getattr(module, "head_dim", 0)
            if (
                width and module.__dict__.get("embed_dim") == width
            ):  # what heads are joined to, in some towers
                module.embed_dim = width // self.size
            for key in HEAD_COUNTS:
                if isinstance(module.__dict__.get(key), int):
                    self.divisible(name, key, getattr(module, key))
                    setattr(module, key, getattr(module, key) // self.size)
            self.whole_heads(name, module)
        forward = module.forward
        joint = style in ("joint_attention", "joint_heads")
        enter = {"feed_forward": stream.enter_rows, "joined_heads": stream.enter_joined}.get(style, stream.enter)  # fmt: skip

        def context(hidden: Tensor) -> Tensor:
            return stream.enter(hidden, CONTEXT) if joint else collectives.copy_to_region(hidden, self.group)

        def leave(out: Tensor) -> Tensor:
            return collectives.reduce_from_region(out, self.group) if style == "merger" else stream.leave(out)

        @wraps(forward)
        def region(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_first(enter, args, kwargs)
            if style in ATTENTIONS:
                for each in CONTEXTS:
                    args, kwargs = on_argument(module, each, context, args, kwargs)
            out = forward(*args, **kwargs)
            if style in ("joint_heads", "joined_heads"):
                return out
            if not isinstance(out, tuple):
                return leave(out)
            return (leave(out[0]), *(leave(part) if joint else part for part in out[1:]))

        module.forward = region

    def whole(self, name: str) -> None:
        """A region computed alike on every rank: its input is made whole, of its output each takes its own
        rows."""
        module, stream = self.modules[name], self.stream(name)
        forward = module.forward

        @wraps(forward)
        def whole(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_first(stream.gather, args, kwargs)
            out = forward(*args, **kwargs)
            if not stream.sequence:
                return out
            first = out[0] if isinstance(out, tuple) else out
            own = collectives.cut_sequence(first, self.group)
            return (own, *out[1:]) if isinstance(out, tuple) else own

        module.forward = whole

    def joined(self, name: str, style: str) -> None:
        """The layers of a block that joins its streams: before and after the attention beside them."""
        module, stream = self.modules[name], self.stream(name)
        forward = module.forward
        if style == "joined_colwise":
            module.forward = wraps(forward)(lambda hidden: forward(stream.enter_joined(hidden)))
        else:
            module.forward = wraps(forward)(lambda hidden: stream.leave_joined(forward(hidden)))

    def alone(self, name: str, style: str) -> None:
        """The two layers of a feed-forward part that is no module of its own."""
        module, stream = self.modules[name], self.stream(name)
        forward = module.forward
        if style == "entering_colwise":
            module.forward = wraps(forward)(lambda hidden: forward(stream.enter(hidden)))
        else:
            module.forward = wraps(forward)(lambda hidden: stream.leave(forward(hidden)))

    def norm_across_heads(self, name: str) -> None:
        module = self.modules[name]
        weight, eps = module._parameters.get("weight"), getattr(module, "eps", None)
        if type(module).__name__ != "RMSNorm" or weight is None or module._parameters.get("bias") is not None:
            raise PolymodalError(
                f"`{name}` is a {type(module).__name__} over all heads, only a root-mean-square norm with a weight can be cut.",
                "Set parallel.tp to 1.",
            )
        self.divisible(name, "features", len(weight))
        self.done.add(name)
        module.forward = lambda hidden: collectives.rms_norm_across(
            hidden, module.__dict__["weight"], eps, self.group
        )
        self.local(module, {"weight": Shard(0)}, {})

    def whole_heads(self, name: str, module: nn.Module) -> None:
        """A cut between two halves of a head would have the right size and the wrong meaning."""
        size = getattr(module, "head_dim", None)
        for child, style in self.styles.items():
            if style == "colwise" and child.rpartition(".")[0] == name and isinstance(size, int):
                part = self.modules[child]
                part = getattr(part, "base_layer", part)
                self.divisible(child, "heads", part.out_features // size)

    def block(self, name: str, first: bool, last: bool) -> None:
        """first: here the streams are cut; last: here they are made whole, for what another pipeline stage holds."""
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
            stream.note(kwargs.pop(LENGTHS, {}))
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
            # a hook, which recompute does not repeat: other batches may have other lengths by then
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, LENGTHS: dict(stream.lengths)}), with_kwargs=True
            )

    def exit(self, name: str) -> None:
        module, stream = self.modules[name], self.stream(name)
        self.replicate(module, self.partial(name))
        self.done.add(name)
        if self.carries(name):
            forward = module.forward
            module.forward = wraps(forward)(lambda *args, **kwargs: stream.gather(forward(*args, **kwargs)))

    def end(self, name: str) -> None:
        module, stream = self.modules[name], self.stream(name)
        if not self.carries(name):
            return
        forward = module.forward

        @wraps(forward)
        def end(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_first(stream.gather, args, kwargs)
            return forward(*args, **kwargs)

        module.forward = end

    def tower(self, name: str) -> None:
        module, stream = self.modules[name], self.streams[name]
        forward = module.forward

        @wraps(forward)
        def cut(*args: Any, **kwargs: Any) -> Any:
            for mask, rows in self.masked_rows.items():
                kwargs = stream.cut_masked_rows(kwargs, mask, rows)
            return forward(*args, **kwargs)

        if self.masked_rows:
            module.forward = cut

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
            return collectives.embed(ids, module._parameters["weight"].to_local(), rows, padding, self.group)

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
            return collectives.gather_last(
                forward(collectives.copy_to_region(hidden, self.group)), self.group
            )

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
            return (collectives.scale_gradient(out[0], 1 / self.size), *out[1:])

        module.forward = router

    def run(self) -> None:
        self.goes_on = any(
            s == "end" and isinstance(self.modules[n], PrunedModule) for n, s in self.styles.items()
        )
        # What another pipeline stage holds is handed through; only the end of a stream still has to gather.
        self.styles = {
            name: style
            for name, style in self.styles.items()
            if style == "exit" or not isinstance(self.modules[name], PrunedModule) or self.leaves(name, style)
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
            if isinstance(self.modules[name], PrunedModule) and style == "merger":
                self.exit(name)
            elif style in REGIONS:
                self.region(name, style)
            elif style == "whole_attention":
                self.whole(name)
            elif style in ("joined_colwise", "joined_rowwise"):
                self.joined(name, style)
            elif style in ("entering_colwise", "leaving_rowwise"):
                self.alone(name, style)
            elif style == "end":
                self.end(name)
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
            self.block(name, first=id(stream) not in entered, last=name in self.blocks[-1:] and self.goes_on)
            entered.add(id(stream))
        for name in self.streams:
            self.tower(name)


def counts(card: ModelCard, config: Any) -> dict[str, int]:
    """What tensor parallelism divides, by its key in config.json: heads, widths, vocabulary, experts; not the
    heads of a tower whose attention the card leaves whole."""
    found: dict[str, int] = {}
    if isinstance(config, Mapping):  # diffusers
        config = SimpleNamespace(**config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", None)
    if getattr(config, "is_encoder_decoder", False):
        keys = ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim")
        return {key: getattr(config, key) for key in keys}  # the vocabulary stays whole
    experts = getattr(text, "num_experts", 0)
    dense = (
        not experts or getattr(text, "mlp_only_layers", None) or getattr(text, "decoder_sparse_step", 1) > 1
    )
    keys = ["num_attention_heads", "num_key_value_heads", "vocab_size", "num_experts"]
    for key in [*keys, "intermediate_size"] if dense else keys:
        if getattr(text, key, 0):
            found[key if text is config else f"text_config.{key}"] = getattr(text, key)
    heads = (
        "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads"
    )  # some have both for one thing
    spread = "whole_attention" not in card.tensor_plan.values()
    for key in (heads, "intermediate_size") if spread else ("intermediate_size",):
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
    have = {key: n for key, n in counts(card, config).items() if not (spread and key.endswith("num_experts"))}
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
    _Layout(model, card, styles, blocks, mesh, sequence).run()
