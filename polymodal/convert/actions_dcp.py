"""What converters between the hub and DCP directories do, method by method; experts merged and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from polymodal.convert import changes, engine, lora, output, reading
from polymodal.convert.converters import Call
from polymodal.convert.family import Family, family, generic
from polymodal.convert.output import Report
from polymodal.convert.source import Source

EXPERTS = ("internvl3.5", "glm-4.5v", "qwen3-omni-moe")
"""Families with one linear layer an expert; directories and merged checkpoints hold them in one tensor."""


def _with_experts(hub: str) -> Family:
    """Which of the models with experts a hub checkpoint is of."""
    return engine.accepting(Path(hub), [family(name) for name in EXPERTS])


def _family(call: Call, hub: str, prefix: str, hub_prefix: str, flat: Sequence[str] | None) -> Family:
    if call.family == "any":
        return generic(prefix, hub_prefix, flat or ())
    if call.family == "experts":
        return _with_experts(hub)
    model = family(call.family)
    return (
        replace(model, values={"prefix": prefix, "hub_prefix": hub_prefix}) if prefix or hub_prefix else model
    )


def hub_to_dcp(
    call: Call,
    source: str,
    target: str,
    tie_head: bool = False,
    lora_base: bool = False,
    prefix: str = "",
    hub_prefix: str = "",
    copies: Mapping[str, str] | None = None,
    flat: Sequence[str] | None = None,
) -> Report:
    if tie_head:
        copies = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    tensors = changes.with_copies(reading.hub_files(Path(source)), copies or {}, source)
    model = _family(call, source, prefix, hub_prefix, flat)
    opened = engine.hub(model, "lora base" if lora_base else "", Path(source), tensors)
    return output.to_dcp(opened.source, Path(target), call.settings)


def dcp_to_hub(
    call: Call,
    source: str,
    target: str,
    template: str,
    bf16: bool = False,
    prefix: str = "",
    hub_prefix: str = "",
    flat: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """trust_remote_code: of no effect, since no code of a checkpoint is run."""
    model = _family(call, template, prefix, hub_prefix, flat)
    tensors: Source = engine.dcp(model, Path(source), Path(template))
    if bf16:
        tensors = changes.Rounded(tensors, torch.bfloat16)
    origin = {"from": source, "converter": call.converter}
    return output.to_hub(tensors, Path(target), call.settings, Path(template), model.stem, origin)


def dcp_to_adapter(call: Call, source: str, target: str, base: str, alpha: float | None) -> Report:
    tensors = engine.dcp(family("adapter-dcp"), Path(source), None)
    config = lora.config(tensors, alpha, base, lora.PEFT)
    return output.to_adapter(tensors, Path(target), call.settings, config, source)


def merge_adapters(call: Call, base: str, adapters: str, target: str, modules: str, scaling: float) -> Report:
    hub, held = engine.hub(family(call.family), "modules", Path(base)), engine.opened_dcp(Path(adapters))
    targets = [module.strip() for module in modules.split(",")]
    pairs = lora.pairs(held, hub.source.shapes, adapters, f"{lora.PEFT}model.", targets)
    merged = lora.Merged(hub.source, held, pairs, scaling)
    tensors = engine.unmapped(hub.but(merged), Path(base))
    origin = {"from": [base, adapters]}
    return output.to_hub(tensors, Path(target), call.settings, Path(base), origin=origin)


def merge_experts(call: Call, source: str, target: str, shard: str) -> Report:
    return merge_or_split_experts(call, "merge", source, target, shard)


def split_experts(call: Call, source: str, target: str, shard: str) -> Report:
    return merge_or_split_experts(call, "split", source, target, shard)


def merge_or_split_experts(
    call: Call, style: Literal["merge", "split"], source: str, target: str, shard: str
) -> Report:
    hub, model = Path(source), _with_experts(source)
    if style == "merge":
        tensors: Source = engine.hub(model, "merged", hub).source
    else:
        tensors = engine.unmapped(engine.under(model, "merged", hub, reading.hub_files(hub)), hub)
    origin, limit = {"from": source, "style": style}, changes.size(shard)
    return output.to_hub(
        tensors, Path(target), call.settings, hub, model.stem, origin, shard=limit, follow=False
    )
