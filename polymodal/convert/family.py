"""A family: its tables, the facts that it takes from a config, the checkpoints that it accepts. Read from
families/*.yaml.

A file has `names` (abbreviations, used as <NAME>; those of decoder.yaml hold in every file), `towers`, `rows`
and `families`.

rows: named groups, each `hub keys: tree keys [operation] [TP sharding]` by the words of operations.py, or a
list of groups. {a,b} stands for several keys: as many on both sides make one row each, else they are joined
or split in one row. A linear layer's weight that is sharded along its columns leaves its bias whole. <value>:
filled in by a table's `with`.

tables: rows (names of groups, or {use: group, with: values, for_each: fact}), with (values), towers, drop,
keep, everywhere, tensor_parallel, pipeline, from_shapes; like: the table whose entries hold where this one
has none; cases: fact -> what differs where a config has it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from polymodal.convert.facts import FROM_CONFIG, FROM_SHAPES
from polymodal.convert.operations import OPERATIONS, RENAME, SHARDS, WHOLE, Facts, Shape
from polymodal.convert.table import Row, Table, Tower
from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json

TIE = ("text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight")
DEFAULTS = {"vocabulary": "rows", "prefix": "", "hub_prefix": "", "tree": "", "inner": ""}
"""Values that a table may leave out."""


@dataclass(frozen=True)
class Family:
    """architectures: names in config.json that it accepts; tables: variant -> entries of its table in the
    file ("" is the usual one), or a table; facts: config.json -> numbers; counted: facts that are counted in
    the checkpoint's keys (fact -> pattern with one group); stem: name of exported weight files; kind:
    generative ones have the names of their trees in DCP directories too, others those of a table of kind
    "dcp"; values: those of its tables' <names> that a user sets."""

    name: str
    title: str
    tables: Mapping[str, Mapping[str, Any] | Table]
    architectures: tuple[str, ...] = ()
    facts: Callable[[Mapping[str, Any]], Facts] | None = None
    counted: Mapping[str, str] = field(default_factory=dict)
    stem: str = "model"
    kind: Literal["language", "generative", "dcp"] = "language"
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_config(self) -> bool:
        """Whether the operations need numbers that only config.json holds."""
        return self.facts is not None and not self.counted

    def cases(self, variant: str) -> list[str]:
        """Facts that choose between tables of a variant."""
        entries = self.tables[variant]
        return [] if isinstance(entries, Table) else list(entries.get("cases", {}))

    def table(self, variant: str = "", facts: Facts | None = None) -> Table:
        if variant not in self.tables:
            raise PolymodalError(
                f"{self.title} has no layout {variant!r}.",
                f"It has {', '.join(repr(v) for v in self.tables)}.",
            )
        entries, facts = self.tables[variant], facts or {}
        if isinstance(entries, Table):
            return entries
        while "like" in entries:
            own = {name: value for name, value in entries.items() if name != "like"}
            entries = _over(self.tables[entries["like"]], own)  # type: ignore[arg-type]
        case = next((case for fact, case in entries.get("cases", {}).items() if facts.get(fact)), {})
        entries = _over(entries, case)
        return _table(entries, facts, {**DEFAULTS, **entries.get("with", {}), **self.values})


def _over(entries: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {**entries, **own, "with": {**entries.get("with", {}), **own.get("with", {})}}


def _table(entries: Mapping[str, Any], facts: Facts, values: Mapping[str, str]) -> Table:
    names = ("drop", "keep", "everywhere", "tensor_parallel", "pipeline")
    chosen = {name: entries[name] for name in names if name in entries}
    if "head" in values:
        chosen |= {"tie": TIE, "head": f"{values['head']}.weight"}
    if "from_shapes" in entries:
        chosen["from_shapes"] = FROM_SHAPES[entries["from_shapes"]]
    rows = tuple(row for entry in entries["rows"] for row in _rows(entry, facts, values))
    towers = tuple(_definitions()["towers"][name] for name in entries.get("towers", ()))
    return Table(rows, towers, **{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})


def _rows(entry: Any, facts: Facts, values: Mapping[str, str]) -> list[Row]:
    """The rows of an entry under `rows`: the name of a group, {use: group, ...}, or a group."""
    if isinstance(entry, str):
        return _rows(_definitions()["rows"][entry], facts, values)
    if isinstance(entry, list):
        return [row for one in entry for row in _rows(one, facts, values)]
    if "use" not in entry:
        lines = [(_filled(hub, values), _filled(tree, values)) for hub, tree in entry.items()]
        return [row for hub, tree in lines for row in parse(hub, tree)]
    values = {**values, **entry.get("with", {})}
    if "for_each" not in entry:
        return _rows(entry["use"], facts, values)
    fact, rows = entry["for_each"], []
    for index in range(facts.get(fact, 0)):
        numbers = {"index": str(index), "value": str(facts[f"{fact}.{index}"])}
        rows += _rows(entry["use"], facts, {**values, **numbers})
    return rows


def _filled(text: str, values: Mapping[str, str]) -> str:
    """A text whose <names> are replaced by their values, which may have <names> too."""
    while "<" in text:
        text = re.sub(r"<(\w+)>", lambda m: values[m[1]], text)
    return text


def _alternatives(pattern: str) -> list[str]:
    """`a.{b,c}.{p}` -> `a.b.{p}`, `a.c.{p}`."""
    found = re.search(r"\{(\w[^{}]+)\}", pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for choice in found[1].split(",") for one in _alternatives(before + choice + after)]


def parse(hub: str, tree: str) -> list[Row]:
    """The rows of one line of a group."""
    tree, *words = tree.split()
    operation = OPERATIONS[words.pop(0)] if words and words[0] in OPERATIONS else RENAME
    shards = [SHARDS[word] for word in words[0].split(",")] if words else [WHOLE]
    if shards[0].dim == 1 and tree.endswith("{p}"):
        weight, bias = ([side.replace("{p}", leaf) for side in (hub, tree)] for leaf in ("weight", "bias"))
        return [*parse(weight[0], " ".join([weight[1], *words])), *parse(*bias)]
    hubs, trees = _alternatives(hub), _alternatives(tree)
    count = min(len(hubs), len(trees))
    parts = [
        [tuple(keys[at * len(keys) // count : (at + 1) * len(keys) // count]) for at in range(count)]
        for keys in (hubs, trees)
    ]
    shards = shards * (len(trees) // count) if len(shards) == 1 else shards
    return [Row(one, other, operation, tuple(shards)) for one, other in zip(*parts, strict=True)]


@functools.cache
def _definitions() -> dict[str, dict[str, Any]]:
    """The towers, groups of rows and families of all files, by name."""
    files = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))]
    shared = _load((FOLDER / "decoder.yaml").read_text(encoding="utf-8"))["names"]
    found: dict[str, dict[str, Any]] = {"towers": {}, "rows": {}, "families": {}}
    for text in files:
        names = {**shared, **_load(text).get("names", {})}
        # names first; the <values> of tables are filled in later
        content = _load(re.sub(r"<(\w+)>", lambda m, names=names: names.get(m[1], m[0]), text))
        for name, tower in content.get("towers", {}).items():
            sides = {side: tuple(tower.pop(side, ())) for side in ("first", "last")}
            found["towers"][name] = Tower(**{"name": name, **tower, **sides})
        found["rows"] |= content.get("rows", {})
        for name, entries in content.get("families", {}).items():
            facts = FROM_CONFIG[entries.pop("facts")] if "facts" in entries else None
            architectures = tuple(entries.pop("architectures", ()))
            found["families"][name] = Family(name=name, architectures=architectures, facts=facts, **entries)
    return found


FOLDER = Path(__file__).with_name("families")


def _load(text: str) -> dict[str, Any]:
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def families() -> dict[str, Family]:
    """Every family by its name."""
    return _definitions()["families"]


def family(name: str) -> Family:
    return families()[name]


def by_architecture(names: Iterable[str]) -> list[Family]:
    """Families that accept a config with one of these architectures."""
    return [one for one in families().values() if set(names) & set(one.architectures)]


def generic(prefix: str, hub_prefix: str, flat: Iterable[str] = ()) -> Family:
    """Any model: one prefix replaced by another, experts of these names flat (their number is in the
    config)."""
    rows = [
        row
        for name in flat
        for row in parse(f"{hub_prefix}{{x}}.experts.{name}", f"{prefix}{{x}}.experts.{name} flatten_experts")
    ]
    table = Table((*rows, *parse(hub_prefix + "{x}", prefix + "{x}")))
    return Family("any", "any model", {"": table}, facts=FROM_CONFIG["experts"] if flat else None, kind="dcp")


# ---------------------------------------------------------------------------------------------------- configs


def read_config(source: Path, required: bool = True) -> dict[str, Any]:
    """The config.json of a directory."""
    path = source / "config.json"
    if not path.is_file():
        if not required:
            return {}
        raise PolymodalError(f"{path} does not exist.", "Give the directory of the hub checkpoint.")
    return read_json(path)


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names by which a config says what it is of."""
    names = [*(config.get("architectures") or ()), config.get("_class_name"), config.get("model_type")]
    return [name for name in names if name]


def facts_of(family: Family, source: Path) -> Facts:
    """The numbers of a checkpoint's config. Raises PolymodalError for a config of another architecture."""
    config = read_config(source, required=family.needs_config)
    named = architectures(config)
    if named and family.architectures and not set(named) & set(family.architectures):
        raise PolymodalError(
            f"{source / 'config.json'} is of {' / '.join(named)}, not of {family.title}.",
            f"This converter takes {', '.join(family.architectures)}.",
        )
    try:
        return family.facts(config) if config and family.facts else {}
    except KeyError as error:
        raise PolymodalError(
            f"{source / 'config.json'} lacks {error.args[0]}, which {family.title} needs.",
            "Copy it again from the checkpoint's origin.",
        ) from None


def counted(family: Family, facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Facts, with those that are counted in a checkpoint's hub keys."""
    found = dict(facts)
    for name, pattern in family.counted.items():
        numbers = {m[1] for key in shapes if (m := re.search(pattern, key))}
        if numbers:
            found[name] = len(numbers)
    return found
