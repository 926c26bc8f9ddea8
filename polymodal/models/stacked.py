"""Adapters on stacked experts: which stacks get them, and what an adapter adds to each expert of a stack.

peft wraps the module that holds a stack [E, ..] once for each of its stacks, one wrapper inside another, with
one pair of matrices for all experts: A [r E, in], B [out, r E].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.models.library import plain
from polymodal.recipe import Lora


def chosen(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> list[str]:
    """Names of the stacks [E, .., ..] of these modules that a target names."""
    stacks = [
        f"{name}.{key}"
        for name, module in modules.items()
        for key, value in module._parameters.items()
        if value is not None and value.ndim == 3
    ]
    return [name for name in stacks if ends_in(name, targets)]


def ends_in(name: str, targets: Iterable[str]) -> bool:
    """Whether a target is a name or its last dotted parts."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def selector(stacks: list[str], model: nn.Module) -> list[str]:
    """peft's shortest target_parameters for exactly these stacks: `module.parameter` endings if enough."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in stacks})
    hit = [plain(name) for name, _ in model.named_parameters() if ends_in(plain(name), endings)]
    return endings if sorted(hit) == sorted(stacks) else sorted(stacks)


def wrappers(model: nn.Module) -> dict[str, Any]:
    """peft's wrappers of stacks by module name, in the model's order."""
    from peft.tuners.lora.layer import ParamWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}


def homes(model: nn.Module) -> dict[str, str]:
    """Name of an adapted stack, as it is without adapters -> name of its wrapper."""
    return {f"{plain(name + '.')}{m.parameter_name}": name for name, m in wrappers(model).items()}


def check(lora: Lora) -> None:
    """Raises PolymodalError for what adapters on stacks cannot have."""
    if lora.dropout:
        raise PolymodalError(
            f"model.lora.dropout = {lora.dropout}: adapters on stacked experts are added to the weights, "
            "there is no input to drop.",
            "Set it to 0, or leave the experts out of model.lora.targets.",
        )


def delta(wrapper: Any, a: Tensor, b: Tensor) -> Tensor:
    """B A of every expert, shaped as the stack; peft keeps B's columns with the expert counted fastest.

    a: [r E, in], b: [out, r E]; -> [E, out, in], or [E, in, out] for stacks that are stored so.
    """
    experts = wrapper.num_experts
    rows = a.reshape(experts, -1, a.shape[-1])
    columns = b.reshape(b.shape[0], -1, experts)
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    return torch.einsum("ore,eri->eio" if transposed else "ore,eri->eoi", columns, rows)
