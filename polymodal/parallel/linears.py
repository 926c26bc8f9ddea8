"""Tensor parallelism's parameters and linear layers: DTensors in the model, local tensors inside of forwards.

Linear layers may have LoRA adapters; tensor.py has the regions around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from polymodal.core.errors import PolymodalError
from polymodal.distributed import collectives
from polymodal.parallel.styles import see_local

COLWISE = ("colwise", "fused_colwise", "gated_colwise", "joined_colwise", "entering_colwise")
ROWWISE = ("rowwise", "joined_rowwise", "leaving_rowwise")
LINEAR = (*COLWISE, *ROWWISE)
FUSED_PARTS = {"fused_colwise": 3, "gated_colwise": 2}


class Linears:
    """Places the parameters of one model; every patched forward needs what it holds."""

    def __init__(self, model: nn.Module, styles: dict[str, str], blocks: list[str], mesh: DeviceMesh):
        self.modules = dict(model.named_modules())
        self.styles = styles
        self.mesh = mesh
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self.blocks = blocks
        # by id, old and new: tied weights stay tied
        self.placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.done: set[str] = set()

    def above(self, name: str) -> Iterator[str]:
        """The module itself and its ancestors, innermost first; the model is the last."""
        while name:
            yield name
            name = name.rpartition(".")[0]
        yield ""

    # Parameters

    def place(self, module: nn.Module, key: str, placement: Placement) -> None:
        """Replace a parameter by a DTensor; every rank is assumed to hold the same values (or meta)."""
        parameter = module._parameters[key]
        if parameter is None or isinstance(parameter, DTensor):
            return
        if id(parameter) not in self.placed:
            value = distribute_tensor(parameter.data, self.mesh, [placement], src_data_rank=None)
            new = nn.Parameter(value, requires_grad=parameter.requires_grad)
            self.placed[id(parameter)] = (parameter, new)
        module._parameters[key] = self.placed[id(parameter)][1]

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
                f"The tensor_plan says {style} for `{name}`, which is a {type(module).__name__}.",
                "This is a defect of the model's card: please report it.",
            )
        self.done.add(name)
        if style in ROWWISE:
            self.divisible(name, "input features", module.in_features)
            if style == "joined_rowwise":
                self.fused(module, self.beside_heads(name, module.in_features), ("weight",), columns=True)
            if module.bias is not None and self.rank:
                self.without_bias(module)
            self.local(module, {"weight": Shard(1), "bias": Replicate()}, {"bias": Partial()})
        else:
            parts = FUSED_PARTS.get(style, 1)
            self.divisible(name, "output features", module.out_features, parts)
            if parts > 1:
                self.fused(module, [module.out_features // parts] * parts, ("weight", "bias"))
            self.local(module, {"weight": Shard(0), "bias": Shard(0)}, {})

    def beside_heads(self, name: str, features: int) -> list[int]:
        """Both parts of a joined_rowwise layer's input: heads, and the joined_colwise layer's output."""
        block = next(path for path in self.above(name) if path in self.blocks)
        joined = (n for n, s in self.styles.items() if s == "joined_colwise" and n.startswith(f"{block}."))
        beside = self.modules[next(joined)]
        wide = getattr(beside, "base_layer", beside).out_features
        for part in (features - wide, wide):
            self.divisible(name, "input features of a part", part)
        return [features - wide, wide]

    def without_bias(self, module: nn.Module) -> None:
        """Only rank 0's partial sum has the bias; other ranks give it a zero gradient."""
        forward = module.forward

        @wraps(forward)
        def zero_bias(*args: Any, **kwargs: Any) -> Any:
            module.__dict__["bias"] = module.__dict__["bias"] * 0
            return forward(*args, **kwargs)

        module.forward = zero_bias

    def fused(
        self, module: nn.Module, parts: list[int], keys: tuple[str, ...], columns: bool = False
    ) -> None:
        """Before the forward an exchange turns the cut of fused rows (or columns) into a cut of each part."""
        order, sent, received = collectives.fused_exchange(parts, self.size, self.rank)
        index: dict[torch.device, Tensor] = {}
        forward = module.forward

        @wraps(forward)
        def exchanged(*args: Any, **kwargs: Any) -> Any:
            for key in keys:
                value = module.__dict__.get(key)
                if value is None:
                    continue
                on = value.device
                if on not in index:
                    index[on] = torch.tensor(order, device=on)
                rows = value.t() if columns else value
                rows = collectives.exchange_rows(rows, index[on], sent, received, self.group)
                module.__dict__[key] = rows.t() if columns else rows
            return forward(*args, **kwargs)

        module.forward = exchanged

    def adapter(self, name: str, module: nn.Module, style: str) -> None:
        """A LoRA layer of peft, y = W x + s B A x, cut like W: colwise B's rows, rowwise A's columns."""
        for child, part in list(self.modules.items()):
            if not child.startswith(name + "."):
                continue
            inner = child.removeprefix(name + ".")
            if inner == "base_layer":
                self.linear(child, style)
            elif isinstance(part, nn.Linear):
                wide = inner.startswith("lora_A" if style in ROWWISE else "lora_B")
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
            in_parts = f" in {parts} parts" if parts > 1 else ""
            raise PolymodalError(
                f"parallel.tp = {self.size} does not divide the {count} {what} of `{name}`{in_parts}.",
                f"Choose a divisor of {count // parts}.",
            )
