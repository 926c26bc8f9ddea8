"""Any layout opened as whole tensors: hub files, trees and DCP directories, under the hub's names or a family's own.

Everything that is wrong with a source is said here, before anything is written. Sees the sources and the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from polymodal.convert import reading, tree, writing
from polymodal.convert.family import Family, counted, facts_of, read_config
from polymodal.convert.operations import Facts, Shape
from polymodal.convert.options import Settings
from polymodal.convert.source import Mapped, Place, Source, Union, invert
from polymodal.convert.table import Table, forward, hub_shapes, match
from polymodal.convert.tree import Parallel
from polymodal.convert.writing import Item
from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

# -------------------------------------------------------------------------------------------------------------- open


@dataclass
class Opened:
    """Whole tensors under one side's names, what is known of them, and the table that they follow."""

    source: Source
    facts: Facts
    table: Table

    def but(self, source: Source, **facts: int) -> Opened:
        """The same with other tensors, and facts that changed."""
        return Opened(source, {**self.facts, **facts}, self.table)


def restricted(source: Source, keys: Iterable[str]) -> Mapped:
    """Some of a source's tensors."""
    return Mapped(source, {key: Stored.whole(key, source.shapes[key]) for key in keys})


def hub(family: Family, variant: str, source: Path, flat: Source | None = None) -> Opened:
    """A hub checkpoint under the family's own names. flat: its tensors, if they are not simply its files'."""
    if flat is None:
        flat, _ = reading.hub_files(source)
    root = source if source.is_dir() else source.parent
    facts = counted(family, facts_of(family, root, family.needs_config), flat.shapes)
    table = family.table(variant, facts)
    return mapped(flat, table, _tied(table, facts, flat.shapes), str(source))


def mapped(flat: Source, table: Table, facts: Facts, where: str) -> Opened:
    """Tensors under the hub's names, under a table's own."""
    layout, _ = forward(table, flat.shapes, facts, where)
    return Opened(Mapped(flat, layout), facts, table)


def _tied(table: Table, facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """`tied`: the hub's files leave the head out; a head that is there is kept, whatever the config says."""
    return (
        {**facts, "tied": int(table.head not in shapes), "tied_config": facts.get("tied", 0)}
        if table.head
        else facts
    )


def unmapped(opened: Opened, where: Path, template: Path | None = None) -> Opened:
    """Tensors under the family's own names, under the hub's again.

    template: a hub checkpoint whose other tensors (table.keep) are taken over, and whose head is written if it has one.
    """
    facts, table = opened.facts, opened.table
    shapes = hub_shapes(table, opened.source.shapes, facts, str(where))
    layout, _ = forward(table, shapes, facts, str(where))
    for key, stored in layout.items():
        if tuple(stored.shape) != tuple(opened.source.shapes[key]):
            raise PolymodalError(
                f"{where}: {key} is {list(opened.source.shapes[key])}, the config makes it {list(stored.shape)}.",
                "Give the config that the tree was made with.",
            )
    inverse, _ = invert(layout, shapes)
    same_head(opened, where)
    source: Source = Mapped(opened.source, inverse)
    if template is not None and any(template.glob("*.safetensors")):
        held, _ = reading.hub_files(template)
        more = [key for key in held.shapes if key not in shapes and any(match(p, key) for p in table.keep)]
        if more:
            source = Union(source, restricted(held, more))
        if table.head in held.shapes and table.head not in shapes and table.tie and facts.get("tied_config"):
            embedding = next(key for key, stored in inverse.items() if stored.pieces[0].key == table.tie[1])
            source = Union(
                source, Mapped(source, {table.head: Stored.whole(embedding, source.shapes[embedding])})
            )
        for key, shape in source.shapes.items():
            if key in held.shapes and held.shapes[key] != tuple(shape):
                raise PolymodalError(
                    f"{key} is {list(shape)} in {where}, {list(held.shapes[key])} in {template}.",
                    "They are of different models.",
                )
        if lost := [key for key in held.shapes if key not in source.shapes]:
            raise PolymodalError(
                f"{where} lacks {len(lost)} tensors that {template} has (first: {lost[0]}).",
                "Is the tree whole, and of this model?",
            )
    return opened.but(source)


def same_head(opened: Opened, where: Path) -> None:
    """A tied head that lies there by itself must be the embedding."""
    table = opened.table
    if not (table.tie and opened.facts.get("tied") and table.tie[0] in opened.source.shapes):
        return
    head, embedding = table.tie
    items = items_of(opened.source, [head])
    try:
        writing.compare(items, {head: renamed(opened.source, {head: embedding})}, opened.source, 1)
    except PolymodalError:
        raise PolymodalError(
            f"{where}: {head} is not {embedding}, but config.json ties them.",
            "Set tie_word_embeddings to false in config.json: the head was trained by itself.",
        ) from None


def renamed(source: Source, names: Mapping[str, str]) -> Mapped:
    return Mapped(source, {new: Stored.whole(old, source.shapes[old]) for new, old in names.items()})


def items_of(source: Source, keys: Iterable[str]) -> list[Item]:
    nowhere = Path()
    return [
        Item(key, key, Place(nowhere, 0, tuple(source.shapes[key]), (), source.dtypes[key])) for key in keys
    ]


def opened_tree(
    family: Family, variant: str, root: Path, config: Path | None, given: Parallel | None, settings: Settings
) -> Opened:
    """A tree under the family's own names, stages and ranks put together.

    config: a hub checkpoint of the model, or only its config.json; given: how the tree is said to be cut.
    """
    facts: Facts = facts_of(family, config, family.needs_config) if config else {}
    shapes: Mapping[str, Shape] = {}
    if config is not None and any(config.glob("*.safetensors")):
        shapes = reading.hub_files(config)[0].shapes
        facts = counted(family, facts, shapes)
    table = family.table(variant, facts)
    if shapes:
        facts = table.seen(_tied(table, facts, shapes), shapes)
    return opened_table(table, root, facts, given, settings)


def opened_table(
    table: Table, root: Path, facts: Facts, given: Parallel | None, settings: Settings
) -> Opened:
    """A tree that follows a table."""
    if given is not None:
        tree.check(given, table, facts)
    made = tree.read(table, root, facts, given, settings.allow_pickle)
    found = {
        t.count: sum(map(sum, made.parallel.layers[t.name]))
        for t in table.towers
        if t.name in made.parallel.layers
    }
    _warn_of_drift(made)
    return Opened(made.source, {"tied": 0, **found, **facts}, table)


def _warn_of_drift(made: tree.Tree) -> None:
    """Say so when tensors that every rank holds are not the same on all of them."""
    apart = 0
    first = ""
    for copy in made.copies:
        pair = [
            torch.empty([b.stop - b.start for b in box], dtype=made.flat.dtypes[key])
            for key, box in ((copy.used, copy.used_box), (copy.other, copy.other_box))
        ]
        made.flat.read(copy.used, copy.used_box, pair[0])
        made.flat.read(copy.other, copy.other_box, pair[1])
        if not writing.equal(*pair):
            apart += 1
            first = first or f"{copy.other} from {copy.used}"
    if apart:
        print(
            f"warning: {made.directory}: {apart} tensors differ between ranks that should hold the same (first: {first}); the first rank's are taken",
            file=sys.stderr,
        )


def opened_dcp(root: Path, prefix: str = "model.") -> Mapped:
    """The tensors of a DCP directory (or of the one that its tracker points at) whose names begin with `prefix`, without it."""
    where = dcp_directory(root)
    flat, layout = reading.dcp(where)
    kept = {key.removeprefix(prefix): stored for key, stored in layout.items() if key.startswith(prefix)}
    if not kept:
        raise PolymodalError(
            f"{where} has no tensor under {prefix}* (first: {next(iter(layout), 'none')}).",
            "Is it a checkpoint of a model?",
        )
    return Mapped(flat, kept)


def dcp_directory(root: Path) -> Path:
    if reading.is_dcp(root):
        return root
    where = tree.iteration(root) if (root / tree.TRACKER).is_file() else root
    if not reading.is_dcp(where):
        raise PolymodalError(
            f"{where} is not a DCP checkpoint: it has no .metadata.",
            "Give the directory with the .distcp files.",
        )
    return where


def accepting(directory: Path, families: Iterable[Family]) -> Family:
    """The one of several families that takes a directory's config."""
    config = read_config(directory)
    named = [
        *(config.get("architectures") or ()),
        *filter(None, [config.get("_class_name"), config.get("model_type")]),
    ]
    for family in families:
        if set(named) & set(family.architectures):
            return family
    raise PolymodalError(
        f"{directory / 'config.json'} is of {' / '.join(named) or 'no architecture'}, which this converter does not take.",
        f"It takes {', '.join(name for family in families for name in family.architectures[:1])}.",
    )


def under(family: Family, variant: str, config: Path | None, source: Source) -> Opened:
    """Whole tensors that bear the family's own names already."""
    facts = facts_of(family, config, family.needs_config) if config is not None else {}
    return Opened(source, facts, family.table(variant, facts))


def dcp(family: Family, variant: str, root: Path, template: Path | None) -> Opened:
    """A DCP directory under the hub's names."""
    opened = under(
        family, variant, template if family.architectures or family.name == "any" else None, opened_dcp(root)
    )
    return unmapped(opened, root, template)


def by_layers(opened: Opened) -> Opened:
    """With the numbers of layers counted in the names."""
    found = {}
    for tower in opened.table.towers:
        numbers = {
            key[len(tower.layers) :].split(".")[0]
            for key in opened.source.shapes
            if key.startswith(tower.layers)
        }
        found[tower.count] = len(numbers)
    return Opened(opened.source, {**opened.facts, **found}, opened.table)
