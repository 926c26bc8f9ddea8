"""How a card names what is sharded: styles by module pattern, and the patched forwards that they need.

tensor.py and expert.py give the styles their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Placement

from polymodal.core.errors import PolymodalError
from polymodal.models.card import ModelCard, PrunedModule

STYLES = {
    "stream": "a tower (`` is the model) whose blocks carry a residual stream, cut with sequence parallelism",
    "attention": "a region of heads: input and context of keys enter, output is summed, head counts divided",
    "joint_attention": "the same over two streams, `hidden_states` and `encoder_hidden_states`",
    "joint_heads": "the same over two streams, with the output projection in a later joined_rowwise layer",
    "joined_heads": "the same over the streams joined in one",
    "whole_attention": "a region that every rank computes whole: its heads cannot be spread",
    "norm_across_heads": "an RMS norm of queries or keys over all heads; statistics are summed over ranks",
    "mlp": "a region: input enters, output is summed (dense, or router and experts)",
    "feed_forward": "a region of rows one by one, of any stream or of several joined",
    "joined_colwise": "a linear layer beside attention over the same joined streams, cut by output features",
    "joined_rowwise": "one over attention's heads and a joined_colwise layer's features, cut by both, summed",
    "merger": "a region that ends the stream: its output is whole on every rank",
    "colwise": "a linear layer cut by output features",
    "fused_colwise": "one of three fused parts (q, k, v), each cut by heads; stored in natural order",
    "gated_colwise": "one of two fused parts (gate, up), each cut alike; stored in natural order",
    "entering_colwise": "one that begins a region of two layers that no module holds: its input enters",
    "leaving_rowwise": "the second of these: its output is summed",
    "rowwise": "a linear layer cut by input features; its output is a partial sum",
    "experts": "stacked experts, cut by expert: every rank has all tokens and computes its own experts",
    "router": "chooses experts; alike on every rank, its first output (the logits) feeds the balance loss",
    "sparse": "a region whose experts are spread (expert.py): each rank takes its own rows through it",
    "sparse_router": "the router of such a region: its logits are made whole for the balance loss",
    "dispatched": "the experts of such a region, sharded by expert.py",
    "between": "computes rows of streams one by one between blocks; of a cut stream gradients are partial",
    "exit": "the norm that ends the stream, or the encoder that it runs in: its output is whole",
    "end": "what comes after the stream: its input is whole on every rank",
    "embedding": "a table cut by rows of the vocabulary",
    "head": "an output projection cut by the vocabulary; objectives multiply by its local rows",
}
"""Style names of a card's tensor_plan. What a plan does not name is replicated: inside a region with partial
gradients, on a cut stream too, elsewhere with whole ones. That is right for norms, biases and
convolutions."""


def pattern_of(pattern: str) -> re.Pattern[str]:
    """A card's pattern (`*` is one dotted part) as an expression for whole module names."""
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


def _holds(name: str, pattern: str) -> bool:
    """Could a module that fits `pattern` lie inside the module `name`?"""
    parts, pattern_parts = name.split("."), pattern.split(".")
    return len(parts) <= len(pattern_parts) and all(
        b in ("*", a) for a, b in zip(parts, pattern_parts, strict=False)
    )


def resolve(model: nn.Module, card: ModelCard) -> dict[str, str]:
    """Module name -> style, from the card's patterns; the last pattern that fits counts.

    Raises PolymodalError for a style that does not exist, and for a pattern that fits no module (one that
    ends in `?`
    need not: dense layers among sparse ones): the card is wrong then.
    """
    names = [name for name, _ in model.named_modules()]
    dropped = [name for name, module in model.named_modules() if isinstance(module, PrunedModule)]
    styles: dict[str, str] = {}
    for pattern, style in card.tensor_plan.items():
        if style not in STYLES:
            raise PolymodalError(
                f"The card {card.name} names the tensor-parallel style `{style}`, known are "
                f"{', '.join(STYLES)}.",
                "This is a defect of the model's card: please report it.",
            )
        optional, pattern = pattern.endswith("?"), pattern.removesuffix("?")
        expression = pattern_of(pattern)
        hits = [name for name in names if expression.fullmatch(name)]
        if not hits and not optional and not any(_holds(name, pattern) for name in dropped):
            raise PolymodalError(
                f"The card {card.name}: no module fits `{pattern}` of its tensor_plan.",
                "This is a defect of the model's card: please report it.",
            )
        styles.update(dict.fromkeys(hits, style))  # type: ignore[arg-type]
    return styles


def see_local(module: nn.Module, gradients: Mapping[str, Placement | None]) -> None:
    """Let a module's forward see plain local tensors under the names of its DTensor parameters.

    gradients: parameter name -> placement of its gradient; None: that of the parameter.
    """
    forward = module.forward

    @wraps(forward)
    def with_local_parameters(*args: Any, **kwargs: Any) -> Any:
        for key, grad in gradients.items():
            parameter = module._parameters[key]
            module.__dict__[key] = parameter.to_local(grad_placements=[grad] if grad else None)
        try:
            return forward(*args, **kwargs)
        finally:
            for key in gradients:
                module.__dict__.pop(key, None)

    module.forward = with_local_parameters


def on_first(
    change: Callable[[Tensor], Tensor], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Change the stream among a module's arguments: the first, or `hidden_states`."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def on_output(change: Callable[[Tensor], Tensor], out: Any) -> Any:
    """Change the stream among a module's outputs: the only one, or the first."""
    if isinstance(out, dict):  # a ModelOutput of transformers
        out[next(iter(out))] = change(next(iter(out.values())))
        return out
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def wrap(
    module: nn.Module,
    enter: Callable[[Tensor], Tensor] | None = None,
    leave: Callable[[Any], Any] | None = None,
) -> None:
    """Patch a module's forward: `enter` changes its first argument, `leave` its output."""
    forward = module.forward

    @wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if enter is not None:
            args, kwargs = on_first(enter, args, kwargs)
        out = forward(*args, **kwargs)
        return out if leave is None else leave(out)

    module.forward = wrapped


def remember(block: nn.Module, key: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
    """Let recompute run a block with the state of its own micro-batch: a pipeline runs others in between.

    `get` gives the state when the block is called, as its argument `key`; `put` restores it in its forward.
    """
    forward = block.forward

    @wraps(forward)
    def with_state(*args: Any, **kwargs: Any) -> Any:
        if key in kwargs:
            put(kwargs.pop(key))
        return forward(*args, **kwargs)

    block.forward = with_state
    # a hook, which recompute does not repeat
    block.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, key: get()}), with_kwargs=True)
