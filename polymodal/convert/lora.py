"""Adapters: their tables, made from a family's own, and their sum with the base, computed box by box."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polymodal.convert.operations import WHOLE, Operation, TPShard
from polymodal.convert.source import Box, InMemory, Joined, Source, values
from polymodal.convert.table import Row, Table
from polymodal.core.errors import PolymodalError

PEFT = "base_model.model."
LIBRARY = {"model.": "model.language_model.", "visual.": "model.visual."}
"""What checkpoints call modules -> the library's names since transformers 4.52."""
WEIGHT = re.compile(r"(.*)\.(weight|\{p\})\Z")


def _library_name(key: str) -> str:
    for prefix, name in LIBRARY.items():
        if key.startswith(prefix):
            return name + key.removeprefix(prefix)
    return key


def _pair(hub: str, tree: str, shard: TPShard) -> list[Row]:
    """The rows of an adapter. hub, tree: keys with {} for A or B; shard: of the weight that it belongs to."""
    return [
        Row(
            (hub.replace("{}", side),),
            (tree.replace("{}", side),),
            shards=(shard if shard.dim == dim else WHOLE,),
        )
        for side, dim in (("A", 1), ("B", 0))
    ]


def adapters(table: Table, hub_prefix: str, suffix: str = "", library_names: bool = False) -> Table:
    """The table of a family's adapters: a pair for every weight that is only renamed. Rows that join or take
    apart layers have none, since the parts' A matrices differ.

    hub_prefix, suffix: around the hub's module names (`suffix` after lora_A); library_names: the library's
    module names instead of the checkpoint's."""
    rows: list[Row] = []
    for row in table.rows:
        hub, tree = WEIGHT.match(row.hub[0]), WEIGHT.match(row.tree[0])
        if type(row.operation) is Operation and hub and tree and "{x}" not in row.hub[0]:
            module = _library_name(hub[1]) if library_names else hub[1]
            name = f"{hub_prefix}{module}.lora_{{}}{suffix}.weight"
            rows += _pair(name, f"{tree[1]}.lora_{{}}.default.weight", row.shards[0])
    return replace(table, rows=tuple(rows), tie=None, drop=(), keep=())


def tree_adapters(table: Table) -> Table:
    """Adapters under a tree's own names, sharded as the layers that they belong to."""
    rows: list[Row] = []
    for row in table.rows:
        for pattern, shard in zip(row.tree, row.shards, strict=True):
            if weight := WEIGHT.match(pattern):
                name = f"{weight[1]}.lora_{{}}.default.weight"
                rows += _pair(name, name, shard)
    return replace(table, rows=(*rows, Row(("{x}",), ("{x}",))), tie=None, drop=(), keep=())


class Merged:
    """A base whose weights have the adapters' products added, in float32, rounded once.

    pairs: base key -> (key of A, key of B) in `adapters`; scale: alpha / rank.
    """

    def __init__(self, base: Source, adapters: Source, pairs: Mapping[str, tuple[str, str]], scale: float):
        self.base, self.adapters, self.pairs, self.scale = base, adapters, dict(pairs), scale
        self.shapes, self.dtypes = base.shapes, base.dtypes

    def read(self, key: str, box: Box, into: Tensor) -> None:
        self.base.read(key, box, into)
        if key not in self.pairs:
            return
        a_key, b_key = self.pairs[key]
        rank = slice(0, self.adapters.shapes[a_key][0])
        a, b = values(self.adapters, a_key, (rank, box[1])), values(self.adapters, b_key, (box[0], rank))
        into.copy_(into.float() + (b.float() @ a.float()) * self.scale)


LORA = re.compile(r"(.*)\.lora_(A|B)(?:\.default)?\.weight\Z")


def pairs(
    adapters: Source, base: Iterable[str], where: str, prefix: str = "", targets: Iterable[str] = ()
) -> dict[str, tuple[str, str]]:
    """Base weight -> (A, B), for the adapters of modules whose names hold one of `targets` (all, if none are
    given).

    Raises PolymodalError for half a pair, for an adapter whose weight the base lacks, and when nothing is
    left."""
    targets = [target for target in targets if target]
    found: dict[str, dict[str, str]] = {}
    for key in adapters.shapes:
        named = LORA.match(key)
        if named and (not targets or any(target in named[1] for target in targets)):
            found.setdefault(f"{named[1].removeprefix(prefix)}.weight", {})[named[2]] = key
    known = set(base)
    for key, sides in found.items():
        if len(sides) != 2:
            raise PolymodalError(
                f"{where}: {key} has lora_{next(iter(sides))} only.",
                "Save or fetch the adapter again: A and B belong together.",
            )
        if key not in known:
            raise PolymodalError(
                f"{where}: the base has no {key} for its adapter.",
                "Give the base that the adapter was trained on.",
            )
    if not found:
        of = f" of {', '.join(targets)}" if targets else ""
        raise PolymodalError(f"{where} has no adapters{of}.", "Look at the names of its tensors.")
    return {key: (sides["A"], sides["B"]) for key, sides in found.items()}


def alphas(source: Source) -> list[float]:
    """The different alphas of a file of adapters (`x.alpha`), for which trees have no entry."""
    return sorted({float(values(source, key)) for key in source.shapes if key.endswith(".alpha")})


def with_alpha(source: Source, alpha: float, where: str) -> Source:
    """With an alpha beside each pair of lora_down and lora_up."""
    end = ".lora_down.weight"
    names = [key.removesuffix(end) for key in source.shapes if key.endswith(end)]
    if not names:
        raise PolymodalError(f"{where} has no adapters for lora_alpha.", "Leave lora_alpha out.")
    return Joined(source, InMemory({f"{name}.alpha": torch.tensor(float(alpha)) for name in names}))


def config(source: Source, alpha: float | None, base: str, prefix: str) -> dict[str, Any]:
    """What peft needs beside an adapter's weights; ranks are read off the tensors."""
    ranks = {
        named[1].removeprefix(prefix): shape[0]
        for key, shape in source.shapes.items()
        if (named := LORA.match(key)) and named[2] == "A"
    }
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": alpha if alpha is not None else common,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
    }
