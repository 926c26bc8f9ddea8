"""Any layout opened as whole tensors: hub files, trees and DCP directories, under the hub's names or a
family's own.

Everything that is wrong with a source is found here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from polymodal.convert import reading, tree, writing
from polymodal.convert.family import Family, architectures, counted, facts_of, read_config
from polymodal.convert.operations import Facts, Shape
from polymodal.convert.options import Settings
from polymodal.convert.source import Joined, Remapped, Source, invert, renamed, subset, values
from polymodal.convert.table import Table, forward, hub_shapes, matches
from polymodal.convert.tree import Parallel
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say


@dataclass
class Opened:
    """Whole tensors under one side's names, the facts about them, and the table that they follow."""

    source: Source
    facts: Facts
    table: Table

    def but(self, source: Source, **facts: int) -> Opened:
        """The same with other tensors, and facts that changed."""
        return replace(self, source=source, facts={**self.facts, **facts})


def hub(family: Family, variant: str, source: Path, tensors: Source | None = None) -> Opened:
    """A hub checkpoint under the family's own names. tensors: its tensors, if they are not simply its
    files'."""
    if tensors is None:
        tensors = reading.hub_files(source)
    root = source if source.is_dir() else source.parent
    facts = counted(family, facts_of(family, root), tensors.shapes)
    table = family.table(variant, facts)
    return mapped(tensors, table, _tied(table, facts, tensors.shapes), str(source))


def mapped(tensors: Source, table: Table, facts: Facts, where: str) -> Opened:
    """Tensors with the hub's names, under a table's own."""
    return Opened(Remapped(tensors, forward(table, tensors.shapes, facts, where)), facts, table)


def _tied(table: Table, facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """`tied`: the hub's files leave the head out; a head that is there is kept, whatever the config says."""
    if not table.head:
        return facts
    return {**facts, "tied": int(table.head not in shapes), "tied_config": facts.get("tied", 0)}


def unmapped(opened: Opened, where: Path, template: Path | None = None) -> Source:
    """Tensors with the family's own names, under the hub's again.

    template: a hub checkpoint whose other tensors (table.keep) are taken over, and whose head is written if
    it has one."""
    facts, table = opened.facts, opened.table
    shapes = hub_shapes(table, opened.source.shapes, facts, str(where))
    layout = forward(table, shapes, facts, str(where))
    for key, stored in layout.items():
        shape = opened.source.shapes[key]
        if tuple(stored.shape) != tuple(shape):
            raise PolymodalError(
                f"{where}: {key} is {list(shape)}, the config makes it {list(stored.shape)}.",
                "Give the config that the tree was written with.",
            )
    inverse, _ = invert(layout, shapes)
    check_tied_head(opened, where)
    source: Source = Remapped(opened.source, inverse)
    if template is None or not any(template.glob("*.safetensors")):
        return source
    held = reading.hub_files(template)
    more = [key for key in held.shapes if key not in shapes and matches(table.keep, key)]
    if more:
        source = Joined(source, subset(held, more))
    if table.head in held.shapes and table.head not in shapes and table.tie and facts.get("tied_config"):
        embedding = next(key for key, stored in inverse.items() if stored.pieces[0].key == table.embedding)
        source = Joined(source, renamed(source, {table.head: embedding}))
    for key, shape in source.shapes.items():
        if key in held.shapes and held.shapes[key] != tuple(shape):
            raise PolymodalError(
                f"{key} is {list(shape)} in {where}, {list(held.shapes[key])} in {template}.",
                "Give a tree and a hub checkpoint of one model and size.",
            )
    if lost := [key for key in held.shapes if key not in source.shapes]:
        raise PolymodalError(
            f"{where} lacks {len(lost)} tensors that {template} has (first: {lost[0]}).",
            "Copy the whole tree, or give the hub checkpoint of the model that it is of.",
        )
    return source


def head_is_embedding(opened: Opened) -> bool:
    """Whether the head of a tree has the values of its embedding."""
    assert opened.table.tie is not None
    head, embedding = opened.table.tie
    return writing.first_difference(opened.source, opened.source, {head: embedding}, 1) is None


def check_tied_head(opened: Opened, where: Path) -> None:
    """Raises PolymodalError for a tied head that is stored by itself and is not the embedding."""
    tie = opened.table.tie
    if tie and opened.facts.get("tied") and tie[0] in opened.source.shapes and not head_is_embedding(opened):
        raise PolymodalError(
            f"{where}: {tie[0]} is not {tie[1]}, but config.json ties them.",
            "Set tie_word_embeddings to false in config.json: the head was trained by itself.",
        )


def opened_tree(
    family: Family, variant: str, root: Path, config: Path | None, given: Parallel | None, settings: Settings
) -> Opened:
    """A tree under the family's own names, stages and ranks put together.

    config: a hub checkpoint of the model, or only its config.json; given: how the caller believes the tree is
    cut."""
    facts: Facts = facts_of(family, config) if config else {}
    shapes: Mapping[str, Shape] = {}
    if config is not None and any(config.glob("*.safetensors")):
        shapes = reading.hub_files(config).shapes
        facts = counted(family, facts, shapes)
    table = family.table(variant, facts)
    if shapes:
        facts = table.from_shapes(_tied(table, facts, shapes), shapes)
    return opened_table(table, root, facts, given, settings)


def opened_table(
    table: Table, root: Path, facts: Facts, given: Parallel | None, settings: Settings
) -> Opened:
    """A tree that follows a table."""
    if given is not None:
        tree.check(given, table, facts)
    opened = tree.read(table, root, facts, given, settings.allow_pickle)
    layers = opened.parallel.layers
    found = {t.count: sum(map(sum, layers[t.name])) for t in table.towers if t.name in layers}
    _warn_of_drift(opened)
    return Opened(opened.source, {"tied": 0, **found, **facts}, table)


def _warn_of_drift(opened: tree.Tree) -> None:
    """Print a warning when tensors that every rank holds are not the same on all of them."""
    different = [
        one
        for one in opened.duplicates
        if not writing.equal(
            values(opened.files, one.used, one.used_box), values(opened.files, one.other, one.other_box)
        )
    ]
    if different:
        say(
            f"warning: {opened.directory}: {len(different)} tensors differ between ranks "
            f"that should hold the same (first: {different[0].other} from {different[0].used}); "
            "the first rank's are taken",
            error=True,
        )


def opened_dcp(root: Path) -> Remapped:
    """The tensors of the model in a DCP directory, or in the one that its tracker points at."""
    where, prefix = root, reading.DCP_PREFIX
    if not reading.is_dcp(root):
        where = tree.iteration(root) if (root / tree.TRACKER).is_file() else root
        if not reading.is_dcp(where):
            raise PolymodalError(
                f"{where} is not a DCP checkpoint: it has no .metadata.",
                "Give the directory with the .distcp files.",
            )
    chunks, layout = reading.dcp(where)
    kept = {key.removeprefix(prefix): stored for key, stored in layout.items() if key.startswith(prefix)}
    if not kept:
        raise PolymodalError(
            f"{where} has no tensor under {prefix}* (first: {next(iter(layout), 'none')}).",
            "Give the checkpoint of a model, not of an optimizer or a dataset.",
        )
    return Remapped(chunks, kept)


def accepting(directory: Path, families: Iterable[Family]) -> Family:
    """The one of several families that takes a directory's config."""
    named = architectures(read_config(directory))
    for family in families:
        if set(named) & set(family.architectures):
            return family
    raise PolymodalError(
        f"{directory / 'config.json'} is of {' / '.join(named) or 'no architecture'}, "
        "which this converter does not take.",
        f"It takes {', '.join(family.architectures[0] for family in families)}.",
    )


def under(family: Family, variant: str, config: Path | None, source: Source) -> Opened:
    """Whole tensors that have the family's own names already."""
    facts = facts_of(family, config) if config is not None else {}
    return Opened(source, facts, family.table(variant, facts))


def dcp(family: Family, root: Path, template: Path | None) -> Source:
    """A DCP directory under the hub's names."""
    config = template if family.architectures or family.facts else None
    return unmapped(under(family, "", config, opened_dcp(root)), root, template)


def count_layers(opened: Opened) -> Opened:
    """With the numbers of layers counted in the names."""
    numbers = {
        tower.count: len({n for key in opened.source.shapes if (n := tower.layer(key)) is not None})
        for tower in opened.table.towers
    }
    return opened.but(opened.source, **numbers)
