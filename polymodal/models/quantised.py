"""A frozen base in few bits (`model.base`): linear layers of the blocks are kept as bytes.

A quantised layer stays an nn.Linear with its name; its weight [out, in] becomes a frozen parameter [out, n]
of bytes: every row has its codes first and then its scales. Nothing of a row depends on another, so that a
shard of rows (FSDP2's) is quantised as it is read, alone, and has the bytes that the whole would have; and
FSDP2 shards, pads, gathers and offloads plain bytes, which it casts to nothing. The forward pass makes the
weight in the dtype of its input, the backward pass makes it again: only bytes are kept between them.

    nf4   4 bits a weight of the 16 quantiles of a normal distribution (arXiv:2305.14314,
          appendix E), scaled by the largest of 64 neighbours in bfloat16: 4.25 bits
    int8  8 bits by the largest of the row (float32)
    fp8   float8_e4m3fn by the same
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import LazyTensors
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import library
from polymodal.models.card import ModelCard
from polymodal.recipe import Model

BLOCK = 64
"""Weights of a row that have one scale in nf4; the width of a quantised layer is a multiple of it."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
LARGEST = {"int8": 127.0, "fp8": 448.0}
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a quantised row of `width` weights."""
    return width // 2 + width // BLOCK * 2 if kind == "nf4" else width + 4


def pack(weight: Tensor, kind: str) -> Tensor:
    """[rows, width], of any floating dtype -> [rows, row_bytes] uint8."""
    weight = weight.float()
    rows, width = weight.shape
    if kind == "nf4":
        blocks = weight.view(rows, -1, BLOCK)
        scales = blocks.abs().amax(-1).to(torch.bfloat16)
        shares = blocks / scales.float().clamp(min=1e-38).unsqueeze(-1)
        table = torch.tensor(NF4, device=weight.device)
        codes = torch.bucketize(shares.view(rows, width), (table[1:] + table[:-1]) / 2, out_int32=True)
        codes = codes.to(torch.uint8)
        codes = codes[:, ::2] << 4 | codes[:, 1::2]
    else:
        scales = (weight.abs().amax(-1, keepdim=True) / LARGEST[kind]).clamp(min=1e-38)
        shares = weight / scales
        codes = (shares.round() if kind == "int8" else shares).clamp(-LARGEST[kind], LARGEST[kind])
        codes = codes.to(CODES[kind]).view(torch.uint8)
    return torch.cat([codes, scales.contiguous().view(torch.uint8)], 1)


def unpack(packed: Tensor, kind: str, width: int, dtype: torch.dtype) -> Tensor:
    """What `pack` gave as [rows, width] of `dtype`; the products of codes and scales are rounded once."""
    rows = packed.shape[0]
    if kind == "nf4":
        codes, scales = packed[:, : width // 2], packed[:, width // 2 :].contiguous().view(torch.bfloat16)
        table = torch.tensor(NF4, device=packed.device)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # of the codes in a byte
        values = F.embedding(codes.int(), pairs).view(rows, -1, BLOCK)
        return values.mul_(scales.float().unsqueeze(-1)).to(dtype).view(rows, width)
    codes, scales = packed[:, :width], packed[:, width:].contiguous().view(torch.float32)
    return (codes.contiguous().view(CODES[kind]).float() * scales).to(dtype)


class _Multiply(torch.autograd.Function):
    """x [..., in] times a quantised weight [out, in], without a gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.kind, ctx.width = kind, x.shape[-1]
        return F.linear(x, unpack(packed, kind, x.shape[-1], x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(packed, ctx.kind, ctx.width, gradient.dtype), None, None


def _forward(layer: nn.Linear, kind: str) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:
        out = _Multiply.apply(x, layer.weight, kind)
        return out if layer.bias is None else out + layer.bias.to(out.dtype)

    return multiply


def check(model: Model, sizes: ParallelSizes) -> list[PolymodalError]:
    """Every reason why model.base cannot be what it says."""
    named, reasons = f"model.base = {model.base}", []
    if model.base != "bf16" and model.lora is None:
        cause = f"{named} is for a frozen base, and without model.lora its weights are trained."
        reasons.append(PolymodalError(cause, "Add model.lora, or leave model.base out."))
    for axis in ("tp", "ep") if model.base != "bf16" else ():
        if (size := getattr(sizes, axis)) > 1:
            cause = f"{named} with parallel.{axis} = {size}: quantised rows cannot be cut across."
            reasons.append(PolymodalError(cause, f"Set parallel.{axis} to 1; dp_shard spreads the base."))
    return reasons


def choose(model: nn.Module, card: ModelCard) -> dict[str, nn.Linear]:
    """The layers of a model that can be quantised, by plain name of the module: frozen linear layers of its
    blocks, of a width that is a multiple of BLOCK; no adapters, heads, embeddings, norms, stacked experts."""
    inside = re.compile("|".join(re.escape(p).replace(r"\*", r"[^.]+") + r"\." for p in card.blocks))
    return {
        library.plain(f"{name}.weight").removesuffix(".weight"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and inside.match(name)
        and not library.ADAPTER.search(f"{name}.weight")
        and not module.weight.requires_grad
        and module.in_features % BLOCK == 0
    }


def quantise(model: nn.Module, kind: str, card: ModelCard) -> list[str]:
    """Make the chosen layers of a model on meta quantised ones; returns their names.

    The caller has attached adapters and frozen what is not trained. Raises PolymodalError where there are
    none.
    """
    layers = choose(model, card)
    if not layers:
        raise PolymodalError(
            f"model.base = {kind}: {card.name} has no frozen linear layers in its blocks whose width is a "
            f"multiple of {BLOCK}.",
            "Leave model.base out.",
        )
    for layer in layers.values():
        shape = layer.out_features, row_bytes(kind, layer.in_features)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
        layer.base_kind = kind  # type: ignore[assignment]
        layer.forward = _forward(layer, kind)  # the instance's: names and hooks stay as they are
    return list(layers)


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The quantised layers of a model by the plain name of their weight."""
    return {
        library.plain(f"{name}.weight"): module  # type: ignore[misc]
        for name, module in model.named_modules()
        if hasattr(module, "base_kind")
    }


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of quantised layers are stand-ins on meta of the shapes that files have."""
    held = [(module, module.weight) for module in layers(model).values()]
    try:
        for module, _ in held:
            shape = module.out_features, module.in_features
            module._parameters["weight"] = nn.Parameter(torch.empty(shape, device="meta"), False)
        yield
    finally:
        for module, weight in held:
            module._parameters["weight"] = weight


class Rounded:
    """Plain weights as a quantised base computes with them.

    tensors: `whole`, those of the names rounded when they are asked for. error: of what was read so far, the
    root of the squares of what rounding changed, as a share of that of the weights.
    """

    def __init__(self, whole: LazyTensors, names: list[str], kind: str):
        self.whole, self.kind = whole, kind
        self._weights = self._changes = 0.0
        self.tensors = whole | LazyTensors(dict.fromkeys((n for n in names if n in whole), self._read))

    def _read(self, name: str) -> Tensor:
        weight = self.whole[name].float()
        rounded = unpack(pack(weight, self.kind), self.kind, weight.shape[1], torch.float32)
        self._weights += float(weight.square().sum())
        self._changes += float((rounded - weight).square().sum())
        return rounded

    @property
    def error(self) -> float:
        return math.sqrt(self._changes / self._weights) if self._weights else 0.0
