"""Adapters: their tables, made from a family's own, and their sum with the base, computed box by box.

Sees table.py, source.py, engine.py and errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polymodal.convert.operations import WHOLE, Operation
from polymodal.convert.source import Box, Held, Source, Union
from polymodal.convert.table import Row, Table, row
from polymodal.core.errors import PolymodalError

PEFT = "base_model.model."
NEW = (("model.language_model.", "model."), ("model.visual.", "visual."))
"""The library's module names since transformers 4.52, and what checkpoints call them."""


def renamed(key: str) -> str:
    """A checkpoint's key as the library's module is called."""
    for new, old in NEW:
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def adapters(
    table: Table,
    hub_prefix: str,
    suffix: str = "",
    new_names: bool = False,
    rename: Mapping[str, str] | None = None,
) -> Table:
    """The table of a family's adapters: a pair for every weight that is only renamed. Rows that join or take apart
    layers have none, since the parts' A matrices differ.

    hub_prefix, suffix: around the hub's module names (`suffix` after lora_A); new_names: the library's module names
    instead of the checkpoint's; rename: other spellings of hub modules.
    """
    rows: list[Row] = []
    for one in table.rows:
        if type(one.operation) is not Operation or len(one.hub) != 1 or "{x}" in one.hub[0]:
            continue
        found = re.match(r"(.*)\.(weight|\{p\})\Z", one.hub[0])
        mine = re.match(r"(.*)\.(weight|\{p\})\Z", one.other[0])
        if found is None or mine is None:
            continue
        hub = (rename or {}).get(found[1], renamed(found[1]) if new_names else found[1])
        sides = {"A": one.cut if one.cut.dim == 1 else WHOLE, "B": one.cut if one.cut.dim == 0 else WHOLE}
        rows += [
            row(f"{hub_prefix}{hub}.lora_{s}{suffix}.weight", f"{mine[1]}.lora_{s}.default.weight", cut=cut)
            for s, cut in sides.items()
        ]
    return Table(tuple(rows), table.towers, tensor_parallel=table.tensor_parallel, pipeline=table.pipeline)


def own(table: Table) -> Table:
    """Adapters under a tree's own names, cut as the layers that they belong to."""
    rows: list[Row] = []
    for one in table.rows:
        for position, pattern in enumerate(one.other):
            named = re.match(r"(.*)\.(weight|\{p\})\Z", pattern)
            if named is not None:
                cut = one.cut_of(position)
                for side, dim in (("A", 1), ("B", 0)):
                    name = f"{named[1]}.lora_{side}.default.weight"
                    rows.append(row(name, name, cut=cut if cut.dim == dim else WHOLE))
    return Table(
        (*rows, row("{x}", "{x}")),
        table.towers,
        tensor_parallel=table.tensor_parallel,
        pipeline=table.pipeline,
        seen=table.seen,
    )


def originals(table: Table, original: Callable[[str], str]) -> dict[str, str]:
    """Hub module -> the original code's name of it, from its name in the tree."""
    out = {}
    for one in table.rows:
        start = "blocks.{n}." if one.other[0].startswith("blocks.{n}.") else ""
        name = original(one.other[0].removeprefix(start))
        out[one.hub[0].rpartition(".")[0]] = (start + name).rpartition(".")[0]
    return out


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
        first, second = self.pairs[key]
        a = self._part(first, (slice(0, self.adapters.shapes[first][0]), box[1]))
        b = self._part(second, (box[0], slice(0, self.adapters.shapes[second][1])))
        into.copy_(into.float() + (b @ a) * self.scale)

    def _part(self, key: str, box: Box) -> Tensor:
        values = torch.empty([part.stop - part.start for part in box], dtype=self.adapters.dtypes[key])
        self.adapters.read(key, box, values)
        return values.float()


LORA = re.compile(r"(.*)\.lora_(A|B)(?:\.default)?\.weight\Z")


def pairs(
    adapters: Source, base: Iterable[str], where: str, prefix: str = "", targets: Iterable[str] = ()
) -> dict[str, tuple[str, str]]:
    """Base weight -> (A, B), for the adapters of modules whose names hold one of `targets` (all, if none are given).

    Raises PolymodalError for half a pair, for an adapter whose weight the base lacks, and when nothing is left.
    """
    wanted = [one for one in targets if one]
    found: dict[str, dict[str, str]] = {}
    for key in adapters.shapes:
        named = LORA.match(key)
        if named is None:
            continue
        if not wanted or any(one in named[1] for one in wanted):
            found.setdefault(f"{named[1].removeprefix(prefix)}.weight", {})[named[2]] = key
    have = set(base)
    for key, sides in found.items():
        if len(sides) != 2:
            raise PolymodalError(
                f"{where}: {key} has lora_{next(iter(sides))} only.", "Is the adapter whole?"
            )
        if key not in have:
            raise PolymodalError(
                f"{where}: the base has no {key} for its adapter.",
                "Give the base that the adapter was trained on.",
            )
    if not found:
        raise PolymodalError(
            f"{where} has no adapters{' of ' + ', '.join(wanted) if wanted else ''}.",
            "Look at the names of its tensors.",
        )
    return {key: (sides["A"], sides["B"]) for key, sides in found.items()}


def alphas(source: Source) -> list[float]:
    """The different alphas that lie beside adapters (`x.alpha`), which trees have no place for."""
    found = set()
    for key in source.shapes:
        if key.endswith(".alpha"):
            value = torch.empty(source.shapes[key], dtype=source.dtypes[key])
            source.read(key, tuple(slice(0, n) for n in value.shape), value)
            found.add(float(value))
    return sorted(found)


def with_alpha(source: Source, alpha: float, where: str) -> Source:
    """With an alpha beside each pair of lora_down and lora_up."""
    ends = ".lora_down.weight"
    names = [key.removesuffix(ends) for key in source.shapes if key.endswith(ends)]
    if not names:
        raise PolymodalError(f"{where} has no adapters for lora_alpha.", "Leave lora_alpha out.")
    return Union(source, Held({f"{name}.alpha": torch.tensor(float(alpha)) for name in names}))


def config(source: Source, alpha: float | None, base: str, prefix: str) -> dict[str, Any]:
    """What peft needs beside an adapter's weights; ranks are read off the tensors."""
    ranks = {
        LORA.match(key)[1].removeprefix(prefix): shape[0]
        for key, shape in source.shapes.items()
        if ".lora_A." in key
    }  # type: ignore[index]
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": common,
        "lora_alpha": alpha if alpha is not None else common, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(ranks), "rank_pattern": {name: r for name, r in ranks.items() if r != common},
    }  # fmt: skip
