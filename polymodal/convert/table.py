"""A family's table: rows of (hub key pattern, other key pattern, operation, TP cut), and what it knows of pipelines.

One table serves every direction: `forward` writes the other side's tensors in terms of the hub's, `hub_shapes` tells
which hub tensors a set of the other side's stands for. Patterns: `{n}` layer, `{e}` expert, `{p}` weight or bias,
`{x}` anything. Sees operations.py and models/slices.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from polymodal.convert.operations import RENAME, WHOLE, Facts, Operation, Shape, TPShard
from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

PLACEHOLDERS = {"n": r"\d+", "m": r"\d+", "e": r"\d+", "p": "weight|bias", "x": ".+"}


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", pattern)
    text = "".join(
        re.escape(part) if at % 2 == 0 else f"(?P<{part}>{PLACEHOLDERS[part]})"
        for at, part in enumerate(parts)
    )
    return re.compile(text + r"\Z")


def match(pattern: str, key: str) -> dict[str, str] | None:
    found = _regex(pattern).match(key)
    return None if found is None else found.groupdict()


def fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w)\}", lambda m: values[m[1]], pattern)


@dataclass(frozen=True)
class Row:
    """hub, other: key patterns (several: in the operation's order). An `{e}` on one side only counts the experts."""

    hub: tuple[str, ...]
    other: tuple[str, ...]
    operation: Operation = RENAME
    cut: TPShard = WHOLE
    cuts: tuple[TPShard, ...] = ()  # one for each of `other`, when they differ

    def cut_of(self, position: int) -> TPShard:
        return self.cuts[position] if self.cuts else self.cut


def row(
    hub: str | Sequence[str],
    other: str | Sequence[str],
    operation: Operation = RENAME,
    cut: TPShard = WHOLE,
    cuts: tuple[TPShard, ...] = (),
) -> Row:
    """A row from one pattern or several on either side."""

    def listed(value: str | Sequence[str]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else tuple(value)

    return Row(listed(hub), listed(other), operation, cut, cuts)


@dataclass(frozen=True)
class Tower:
    """A stack of layers that pipelines cut: `name` ("llm", "vit", "audio"), the prefix of its layers' keys, prefixes of
    what goes with its first and its last layer, and its prefix (for a TP size of its own)."""

    name: str
    layers: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    prefix: str = ""
    count: str = "layers"  # name of the fact


@dataclass(frozen=True)
class Table:
    """tie: (name of the head, name of the embedding) on the other side: a tied head is written for pipelines only.
    drop: hub keys that are left out (and cannot come back); keep: hub keys that the other side does not have but an
    export takes from its template."""

    rows: tuple[Row, ...]
    towers: tuple[Tower, ...] = ()
    tie: tuple[str, str] | None = None
    head: str = ""  # the hub's key of the head, which tied checkpoints may hold or not
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()  # prefixes of what every pipeline stage holds
    tensor_parallel: bool = True
    pipeline: bool = True
    seen: Callable[[Facts, Mapping[str, Shape]], Facts] = lambda facts, shapes: (
        facts
    )  # facts that only the shapes tell


@dataclass
class Unit:
    """One application of a row: hub keys and other keys, in the operation's order."""

    row: Row
    values: dict[str, str]
    hub: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


class Unknown(PolymodalError):
    """Keys that no row of a table knows."""

    def __init__(self, keys: list[str], side: str, where: str = ""):
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        super().__init__(
            f"{where + ': ' if where else ''}{len(keys)} tensors are unknown to this converter: {shown}.",
            f"Is it {side} of this model, and not of another one?",
        )
        self.keys = keys


def _collect(table: Table, keys: Iterable[str], side: str) -> tuple[list[Unit], list[str]]:
    """The units whose `side` keys are there, and the keys that nothing takes."""
    units: dict[tuple[int, tuple], Unit] = {}
    held: dict[tuple[int, tuple], dict[tuple[int, int], str]] = {}
    left = []
    ordered = [
        (number, one, position, pattern)
        for number, one in enumerate(table.rows)
        for position, pattern in enumerate(getattr(one, side))
    ]
    for key in keys:
        for number, one, position, pattern in ordered:
            values = match(pattern, key)
            if values is None:
                continue
            spread = "e" in values and not all("{e}" in p for p in (*one.hub, *one.other))
            expert = int(values.pop("e")) if spread else 0
            name = (number, tuple(sorted(values.items())))
            units.setdefault(name, Unit(one, values))
            held.setdefault(name, {})[(expert, position)] = key
            break
        else:
            left.append(key)
    for name, unit in units.items():
        getattr(unit, side).extend(held[name][at] for at in sorted(held[name]))
    return list(units.values()), left


def _names(patterns: tuple[str, ...], values: Mapping[str, str], experts: int) -> list[str]:
    """The keys of one side; with `{e}` not among the values, those of every expert."""
    if any("{e}" in p for p in patterns) and "e" not in values:
        return [fill(p, {**values, "e": str(e)}) for e in range(experts) for p in patterns]
    return [fill(p, values) for p in patterns]


def _whole(unit: Unit, side: str, experts: int) -> list[str]:
    """Keys of a unit's `side` that are missing."""
    wanted = _names(getattr(unit.row, side), unit.values, experts)
    return [key for key in wanted if key not in getattr(unit, side)]


def forward(
    table: Table, shapes: Mapping[str, Shape], facts: Facts, where: str = ""
) -> tuple[dict[str, Stored], list[Unit]]:
    """The other side's tensors in terms of the hub's.

    Raises PolymodalError for hub keys that the table does not know, and for tensors whose partners are missing.
    """
    facts = table.seen(facts, shapes)
    units, left = _collect(table, shapes, "hub")
    unknown = [key for key in left if not any(match(p, key) for p in (*table.drop, *table.keep))]
    if unknown:
        raise Unknown(unknown, "a hub checkpoint", where)
    experts = facts.get("experts", 0)
    made: dict[str, Stored] = {}
    for unit in units:
        missing = _whole(unit, "hub", experts)
        if missing:
            raise PolymodalError(
                f"{where + ': ' if where else ''}{missing[0]} is missing beside {unit.hub[0]}.",
                "Is the checkpoint whole?",
            )
        unit.other = _names(unit.row.other, unit.values, experts)
        wholes = [Stored.whole(key, shapes[key]) for key in unit.hub]
        try:
            results = unit.row.operation.forward(wholes, facts)
        except KeyError as error:
            raise _lacks(error, where) from None
        except ValueError as error:
            raise PolymodalError(
                f"{where + ': ' if where else ''}{unit.hub[0]} {list(shapes[unit.hub[0]])} does not fit: {error}.",
                "The checkpoint is of another size than its config.",
            ) from None
        made.update(zip(unit.other, results, strict=True))
    return made, units


def _lacks(error: KeyError, where: str) -> PolymodalError:
    return PolymodalError(
        f"{where}: the number of {error.args[0]} is needed, which only the config tells.",
        "Give the hub checkpoint too (hf_dir).",
    )


def hub_shapes(table: Table, shapes: Mapping[str, Shape], facts: Facts, where: str = "") -> dict[str, Shape]:
    """The hub tensors that a set of the other side's (whole) tensors stands for."""
    units, left = _collect(table, shapes, "other")
    tied = (table.tie[0],) if table.tie and facts.get("tied") else ()
    if unknown := [key for key in left if key not in tied]:
        raise Unknown(unknown, "a tree", where)
    experts = facts.get("experts", 0)
    out: dict[str, Shape] = {}
    for unit in units:
        if unit.other == list(tied):
            continue
        missing = _whole(unit, "other", experts)
        if missing:
            raise PolymodalError(
                f"{where + ': ' if where else ''}{missing[0]} is missing beside {unit.other[0]}.",
                "Is the tree whole?",
            )
        names = _names(unit.row.hub, unit.values, experts)
        try:
            parts = unit.row.operation.parts([tuple(shapes[key]) for key in unit.other], facts)
            out.update(zip(names, parts, strict=True))
        except KeyError as error:
            raise _lacks(error, where) from None
        except (ValueError, IndexError, ZeroDivisionError):
            raise PolymodalError(
                f"{where + ': ' if where else ''}{unit.other[0]} {list(shapes[unit.other[0]])} does not fit its table ({unit.row.operation.label}).",
                "The checkpoint is of another size than its config.",
            ) from None
    return out


def cut_of(table: Table, key: str) -> TPShard:
    """How a tensor of the other side is cut over TP."""
    for one in table.rows:
        for position, pattern in enumerate(one.other):
            if match(pattern, key) is not None:
                return one.cut_of(position)
    return WHOLE


def cut_alike(rows: Iterable[Row], table: Table) -> tuple[Row, ...]:
    """Rows of one name on the other side each, cut over TP as another table cuts what bears that name."""
    out: list[Row] = []
    for one in rows:
        (pattern,) = one.other
        cuts = {
            leaf: cut_of(table, fill(pattern, {"n": "0", "p": leaf, "x": "x"})) for leaf in ("weight", "bias")
        }
        if len(set(cuts.values())) == 1:
            out.append(replace(one, cut=cuts["weight"]))
            continue
        for leaf, cut in cuts.items():
            hub, other = (
                tuple(p.replace("{p}", leaf) for p in patterns) for patterns in (one.hub, one.other)
            )
            out.append(replace(one, hub=hub, other=other, cut=cut))
    return tuple(out)
