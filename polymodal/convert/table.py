"""A family's table: rows of (hub key patterns, tree key patterns, operation, TP sharding), and its pipeline
stages.

One table serves every direction: `forward` expresses the tree's tensors in terms of the hub's, `hub_shapes`
finds which hub tensors a set of tree tensors stands for. The names of a DCP directory count as a tree's.
Patterns: `{n}`, `{m}` layers, `{e}` expert, `{p}` weight or bias, `{x}` anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from polymodal.convert.operations import RENAME, WHOLE, Facts, Operation, Shape, TPShard
from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

PLACEHOLDERS = {"n": r"\d+", "m": r"\d+", "e": r"\d+", "p": "weight|bias", "x": ".+"}


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", pattern)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (f"(?P<{name}>{PLACEHOLDERS[name]})" for name in parts[1::2])
    return re.compile("".join(parts) + r"\Z")


def match(pattern: str, key: str) -> dict[str, str] | None:
    """The values of a pattern's placeholders in a key; None for a key that it does not match."""
    found = _regex(pattern).match(key)
    return None if found is None else found.groupdict()


def matches(patterns: Iterable[str], key: str) -> bool:
    return any(match(pattern, key) is not None for pattern in patterns)


def fill(pattern: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w)\}", lambda m: values[m[1]], pattern)


@dataclass(frozen=True)
class Row:
    """hub, tree: key patterns (several: in the operation's order). An `{e}` on one side only counts the
    experts."""

    hub: tuple[str, ...]
    tree: tuple[str, ...]
    operation: Operation = RENAME
    shards: tuple[TPShard, ...] = (WHOLE,)  # one for each of `tree`


@dataclass(frozen=True)
class RowMatch:
    """The row of a tree's key: which of its patterns, and the values of the placeholders."""

    row: Row
    position: int
    values: Mapping[str, str]

    @property
    def shard(self) -> TPShard:
        return self.row.shards[self.position]

    @property
    def expert(self) -> int | None:
        """The number of the expert that the key names."""
        return int(self.values["e"]) if "e" in self.values else None

    def with_expert(self, number: int) -> str:
        """The key of another expert."""
        return fill(self.row.tree[self.position], {**self.values, "e": str(number)})


@dataclass(frozen=True)
class Tower:
    """A stack of layers that pipelines cut: `name` ("llm", "vit", "audio", "dit"), the prefix of its layers'
    keys, prefixes of what belongs to its first and its last stage, and its own prefix (for a TP size of its
    own)."""

    name: str
    layers: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    prefix: str = ""
    count: str = "layers"  # the fact with its number of layers

    def layer(self, key: str) -> int | None:
        """The number of the layer that a key belongs to."""
        found = re.match(r"\d+", key[len(self.layers) :]) if key.startswith(self.layers) else None
        return int(found[0]) if found else None

    def renumbered(self, key: str, number: int) -> str:
        """A key of a layer, as that of another layer."""
        return self.layers + re.sub(r"\A\d+", str(number), key[len(self.layers) :])


@dataclass(frozen=True)
class Table:
    """tie: the tree's (head, embedding): a tied head is written for pipelines only. drop: hub keys that are
    left out (and cannot be restored); keep: hub keys that trees do not have but an export takes from its
    template."""

    rows: tuple[Row, ...]
    towers: tuple[Tower, ...] = ()
    tie: tuple[str, str] | None = None
    head: str = ""  # the hub's key of the head, which tied checkpoints may hold or not
    drop: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()  # prefixes of what every pipeline stage holds
    tensor_parallel: bool = True
    pipeline: bool = True
    from_shapes: Callable[[Facts, Mapping[str, Shape]], Facts] = lambda facts, shapes: facts
    """Adds the facts that only the shapes show."""

    @property
    def embedding(self) -> str:
        return self.tie[1] if self.tie else ""

    def row_of(self, key: str) -> RowMatch | None:
        for row in self.rows:
            for position, pattern in enumerate(row.tree):
                values = match(pattern, key)
                if values is not None:
                    return RowMatch(row, position, values)
        return None

    def shard_of(self, key: str) -> TPShard:
        """How a tree's tensor is sharded over TP."""
        found = self.row_of(key)
        return found.shard if found else WHOLE


@dataclass
class _Unit:
    """One application of a row: its keys on either side, in the operation's order."""

    row: Row
    values: dict[str, str]
    hub: list[str] = field(default_factory=list)
    tree: list[str] = field(default_factory=list)

    def names(self, side: str, experts: int) -> list[str]:
        """All keys of one side; with `{e}` not among the values, those of every expert."""
        patterns = getattr(self.row, side)
        if any("{e}" in pattern for pattern in patterns) and "e" not in self.values:
            return [fill(p, {**self.values, "e": str(e)}) for e in range(experts) for p in patterns]
        return [fill(pattern, self.values) for pattern in patterns]

    def check_whole(self, side: str, experts: int, where: str) -> None:
        """Raises PolymodalError when keys of `side` are missing."""
        present = getattr(self, side)
        missing = [key for key in self.names(side, experts) if key not in present]
        if missing:
            raise PolymodalError(
                f"{where}: {missing[0]} is missing beside {present[0]}.",
                f"Is the {'checkpoint' if side == 'hub' else 'tree'} whole?",
            )


def _collect(table: Table, keys: Iterable[str], side: str) -> tuple[list[_Unit], list[str]]:
    """The units whose `side` keys are present, and the keys that no row matches."""
    units: dict[tuple[int, tuple], _Unit] = {}
    held: dict[tuple[int, tuple], dict[tuple[int, int], str]] = {}
    unmatched = []
    patterns = [
        (number, row, position, pattern)
        for number, row in enumerate(table.rows)
        for position, pattern in enumerate(getattr(row, side))
    ]
    for key in keys:
        for number, row, position, pattern in patterns:
            values = match(pattern, key)
            if values is None:
                continue
            one_side_only = not all("{e}" in p for p in (*row.hub, *row.tree))
            expert = int(values.pop("e")) if "e" in values and one_side_only else 0
            name = (number, tuple(sorted(values.items())))
            units.setdefault(name, _Unit(row, values))
            held.setdefault(name, {})[(expert, position)] = key
            break
        else:
            unmatched.append(key)
    for name, unit in units.items():
        getattr(unit, side).extend(held[name][at] for at in sorted(held[name]))
    return list(units.values()), unmatched


def _refuse_unknown(keys: list[str], source: str, where: str) -> None:
    if keys:
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise PolymodalError(
            f"{where}: {len(keys)} tensors are unknown to this converter: {shown}.",
            f"Is it {source} of this model, and not of another one?",
        )


def forward(table: Table, shapes: Mapping[str, Shape], facts: Facts, where: str) -> dict[str, Stored]:
    """The tree's tensors in terms of the hub's.

    Raises PolymodalError for hub keys that the table does not know, and for tensors whose partners are
    missing."""
    facts = table.from_shapes(facts, shapes)
    units, unmatched = _collect(table, shapes, "hub")
    unknown = [key for key in unmatched if not matches((*table.drop, *table.keep), key)]
    _refuse_unknown(unknown, "a hub checkpoint", where)
    experts = facts.get("experts", 0)
    out: dict[str, Stored] = {}
    for unit in units:
        unit.check_whole("hub", experts, where)
        try:
            results = unit.row.operation.forward([Stored.whole(key, shapes[key]) for key in unit.hub], facts)
        except KeyError as error:
            raise _fact_missing(error, where) from None
        except ValueError as error:
            raise _misfit(
                f"{where}: {unit.hub[0]} {list(shapes[unit.hub[0]])} does not fit: {error}."
            ) from None
        out.update(zip(unit.names("tree", experts), results, strict=True))
    return out


def hub_shapes(table: Table, shapes: Mapping[str, Shape], facts: Facts, where: str) -> dict[str, Shape]:
    """The hub tensors that a set of the tree's (whole) tensors stands for."""
    units, unmatched = _collect(table, shapes, "tree")
    tied = [table.tie[0]] if table.tie and facts.get("tied") else []
    _refuse_unknown([key for key in unmatched if key not in tied], "a tree", where)
    experts = facts.get("experts", 0)
    out: dict[str, Shape] = {}
    for unit in units:
        if unit.tree == tied:
            continue
        unit.check_whole("tree", experts, where)
        try:
            parts = unit.row.operation.source_shapes([tuple(shapes[key]) for key in unit.tree], facts)
            out.update(zip(unit.names("hub", experts), parts, strict=True))
        except KeyError as error:
            raise _fact_missing(error, where) from None
        except (ValueError, IndexError, ZeroDivisionError):
            key, label = unit.tree[0], unit.row.operation.label
            raise _misfit(f"{where}: {key} {list(shapes[key])} does not fit its table ({label}).") from None
    return out


def _fact_missing(error: KeyError, where: str) -> PolymodalError:
    return PolymodalError(
        f"{where}: the number of {error.args[0]} is needed, which only the config holds.",
        "Give the hub checkpoint too (hf_dir).",
    )


def _misfit(message: str) -> PolymodalError:
    return PolymodalError(message, "The checkpoint is of another size than its config.")
