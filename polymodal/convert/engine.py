"""From any layout to any other: hub files, trees and DCP directories, opened as whole tensors and written again.

A conversion is: open (hub names or the family's own), map by the table, write, read back, compare. Everything that can
be refused is refused before the first byte. Sees the rest of this package and models/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from polymodal.convert import reading, tree, writing
from polymodal.convert.family import Family, counted, facts_of
from polymodal.convert.operations import Facts, Shape
from polymodal.convert.source import Copy, Flat, Mapped, Place, Source, Union, invert
from polymodal.convert.table import Table, forward, hub_shapes, match
from polymodal.convert.tree import Parallel
from polymodal.convert.writing import Item, Spec
from polymodal.errors import PolymodalError
from polymodal.models.saving import appearing
from polymodal.models.slices import Stored

MARKER = "polymodal_convert.json"
"""In every hub directory that was written here: what it came from. Such a directory may be written again."""
SHARD = 5 << 30
"""Bytes of a weight file, where no template says how to cut."""


@dataclass(frozen=True)
class Settings:
    """verify: read back and compare; dry_run: print the plan only; workers: threads (0: one a core, at most 8);
    allow_pickle: read tensors out of pickles that hold other objects; force: replace what is in the way."""

    verify: bool = True
    dry_run: bool = False
    workers: int = 0
    allow_pickle: bool = False
    force: bool = False

    @property
    def threads(self) -> int:
        return self.workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass
class Report:
    """What was written. seconds: of writing; verified: of reading back (0: not done)."""

    directory: Path
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    verified: float = 0.0
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = f", {self.bytes / self.seconds / 1e9:.2f} GB/s" if self.seconds > 0.05 else ""
        proof = f", read back and compared in {self.verified:.1f} s" if self.verified else ""
        return f"{self.directory}: {self.tensors} tensors in {self.files} files, {self.bytes / 1e9:.2f} GB{rate}{proof}"


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
    required = bool(family.architectures) and not family.counted
    facts = counted(family, facts_of(family, root, required), flat.shapes)
    table = family.table(variant, facts)
    layout, _ = forward(table, flat.shapes, facts, str(source))
    return Opened(Mapped(flat, layout), facts, table)


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
    _same_head(opened, where)
    source: Source = Mapped(opened.source, inverse)
    if template is not None and any(template.glob("*.safetensors")):
        held, _ = reading.hub_files(template)
        more = [key for key in held.shapes if key not in shapes and any(match(p, key) for p in table.keep)]
        if more:
            source = Union(source, restricted(held, more))
        if table.head in held.shapes and table.head not in shapes and table.tie and facts.get("tied"):
            embedding = next(key for key, stored in inverse.items() if stored.pieces[0].key == table.tie[1])
            source = Union(source, Mapped(source, {table.head: Stored.whole(embedding, source.shapes[embedding])}))
        for key, shape in source.shapes.items():
            if key in held.shapes and held.shapes[key] != tuple(shape):
                raise PolymodalError(
                    f"{key} is {list(shape)} in {where}, {list(held.shapes[key])} in {template}.", "They are of different models."
                )
        if lost := [key for key in held.shapes if key not in source.shapes]:
            raise PolymodalError(
                f"{where} lacks {len(lost)} tensors that {template} has (first: {lost[0]}).", "Is the tree whole, and of this model?"
            )
    return opened.but(source)


def _same_head(opened: Opened, where: Path) -> None:
    """A tied head that lies there by itself must be the embedding."""
    table = opened.table
    if not (table.tie and opened.facts.get("tied") and table.tie[0] in opened.source.shapes):
        return
    head, embedding = table.tie
    items = _items(opened.source, [head])
    try:
        writing.compare(items, {head: _renamed(opened.source, {head: embedding})}, opened.source, 1)
    except PolymodalError:
        raise PolymodalError(
            f"{where}: {head} is not {embedding}, but config.json ties them.",
            "Set tie_word_embeddings to false in config.json: the head was trained by itself.",
        ) from None


def _renamed(source: Source, names: Mapping[str, str]) -> Mapped:
    return Mapped(source, {new: Stored.whole(old, source.shapes[old]) for new, old in names.items()})


def _items(source: Source, keys: Iterable[str]) -> list[Item]:
    nowhere = Path()
    return [Item(key, key, Place(nowhere, 0, tuple(source.shapes[key]), (), source.dtypes[key])) for key in keys]


def opened_tree(family: Family, variant: str, root: Path, config: Path | None, given: Parallel | None, settings: Settings) -> Opened:
    """A tree under the family's own names, stages and ranks put together.

    config: a hub checkpoint of the model, or only its config.json; given: how the tree is said to be cut.
    """
    facts: Facts = facts_of(family, config, not family.counted) if config else {}
    if config is not None and any(config.glob("*.safetensors")):
        facts = counted(family, facts, reading.hub_files(config)[0].shapes)
    table = family.table(variant, facts)
    if given is not None:
        tree.check(given, table, facts)
    made = tree.read(table, root, facts, given, settings.allow_pickle)
    found = {t.count: sum(map(sum, made.parallel.layers[t.name])) for t in table.towers if t.name in made.parallel.layers}
    _warn_of_drift(made)
    return Opened(made.source, {"tied": 0, **found, **facts}, table)


def _warn_of_drift(made: tree.Tree) -> None:
    """Say so when tensors that every rank holds are not the same on all of them."""
    apart = 0
    first = ""
    for copy in made.copies:
        pair = [torch.empty([b.stop - b.start for b in box], dtype=made.flat.dtypes[key]) for key, box in ((copy.used, copy.used_box), (copy.other, copy.other_box))]
        made.flat.read(copy.used, copy.used_box, pair[0])
        made.flat.read(copy.other, copy.other_box, pair[1])
        if not torch.equal(writing._raw(pair[0]), writing._raw(pair[1])):
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
        raise PolymodalError(f"{where} has no tensor under {prefix}* (first: {next(iter(layout), 'none')}).", "Is it a checkpoint of a model?")
    return Mapped(flat, kept)


def dcp_directory(root: Path) -> Path:
    if reading.is_dcp(root):
        return root
    where = tree.iteration(root) if (root / tree.TRACKER).is_file() else root
    if not reading.is_dcp(where):
        raise PolymodalError(f"{where} is not a DCP checkpoint: it has no .metadata.", "Give the directory with the .distcp files.")
    return where


# -------------------------------------------------------------------------------------------------------------- write


def with_head(table: Table, source: Source, facts: Facts, parallel: Parallel) -> Source:
    """Pipelines hold a tied head by itself, on the last stage; a single stage takes the embedding."""
    if table.tie is None or not facts.get("tied"):
        return source
    head, embedding = table.tie
    if parallel.pp * parallel.vpp > 1 and parallel.pp > 1 and head not in source.shapes and embedding in source.shapes:
        return Union(source, _renamed(source, {head: embedding}))
    return source


def to_tree(opened: Opened, parallel: Parallel, root: Path, settings: Settings) -> Report:
    """Write whole tensors (under the family's own names) as a tree."""
    facts, table = opened.facts, opened.table
    layers = {**tree.one_stage(table, facts), **parallel.layers} if parallel.pp * parallel.vpp > 1 else dict(parallel.layers)
    parallel = Parallel(parallel.tp, parallel.ep, layers, parallel.tower_tp)
    tree.check(parallel, table, facts)
    source = with_head(table, opened.source, facts, parallel)
    files = tree.place(table, source.shapes, parallel, facts)
    cut = Mapped(source, {f"{name}/{slot}:{key}": stored for name, slots in files.items() for slot, held in slots.items() for key, stored in held.items()})
    specs = {
        name: {slot: {key: (cut.shapes[f"{name}/{slot}:{key}"], cut.dtypes[f"{name}/{slot}:{key}"]) for key in held} for slot, held in slots.items()}
        for name, slots in files.items()
    }
    report = Report(root, len(files), sum(len(held) for slots in files.values() for held in slots.values()), sum(_bytes(spec) for slots in specs.values() for spec in slots.values()))
    report.lines = [f"{tree.RELEASE}/{name}/{tree.FILE}  {_listing({f'{slot}:{key}': one for slot, held in slots.items() for key, one in held.items()})}" for name, slots in specs.items()]
    if settings.dry_run:
        return report
    writing.need_space(root, report.bytes)
    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial:
        began = time.perf_counter()
        items: list[Item] = []
        for name, slots in specs.items():
            (partial / name).mkdir()
            places = writing.torch_frame(partial / name / tree.FILE, slots, {"checkpoint_version": tree.VERSION})
            items += [Item(f"{name}/{slot}:{key}", key, spot) for slot, held in places.items() for key, spot in held.items()]
        writing.fill(items, cut, settings.threads)
        report.seconds = time.perf_counter() - began
        if settings.verify:
            began = time.perf_counter()
            written: dict[str, Source] = {}
            for name, slots in specs.items():
                table_of = reading.torch_file(partial / name / tree.FILE)
                for slot in slots:
                    flat = Flat({key: reading.place(partial / name / tree.FILE, tensor) for key, tensor in table_of[slot].items()})
                    written |= {f"{name}/{slot}:{key}": flat for key in flat.shapes}
            writing.compare(items, written, cut, settings.threads)
            report.verified = time.perf_counter() - began
    return report


def to_hub(source: Source, directory: Path, settings: Settings, template: Path | None = None, stem: str = "model", made: Mapping[str, Any] | None = None, shard: int = SHARD) -> Report:
    """Write tensors under the hub's names as safetensors files.

    template: a hub checkpoint whose other files are taken over, and whose cut into weight files is followed.
    made: what is noted in the marker file.
    """
    homes = shards(source, template, stem, shard)
    spec: Spec = {key: (tuple(source.shapes[key]), source.dtypes[key]) for key in source.shapes}
    report = Report(directory, len(homes), len(spec), _bytes(spec))
    report.lines = [f"{name}  {_listing({key: spec[key] for key in keys})}" for name, keys in homes.items()]
    if template is not None and template.resolve() == directory.resolve():
        raise PolymodalError(f"{directory} is the checkpoint that the files are taken from.", "Choose another directory.")
    overwrite = settings.force or (directory / MARKER).is_file()
    if settings.dry_run:
        return report
    writing.need_space(directory.parent, report.bytes)
    with appearing(directory, overwrite) as partial:
        if template is not None:
            copy_assets(template, partial)
        began = time.perf_counter()
        items: list[Item] = []
        for name, keys in homes.items():
            places = writing.safetensors_frame(partial / name, {key: spec[key] for key in keys})
            items += [Item(key, key, spot) for key, spot in places.items()]
        writing.fill(items, source, settings.threads)
        if len(homes) > 1:
            index = {"metadata": {"total_size": report.bytes}, "weight_map": {key: name for name, keys in homes.items() for key in keys}}
            own = re.sub(r"-\d+-of-\d+\.safetensors$", "", next(iter(homes)))
            (partial / f"{own}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        report.seconds = time.perf_counter() - began
        if settings.verify:
            began = time.perf_counter()
            written: dict[str, Source] = {}
            for name, keys in homes.items():
                written |= dict.fromkeys(keys, writing.reopened(partial / name))
            writing.compare(items, written, source, settings.threads)
            report.verified = time.perf_counter() - began
        (partial / MARKER).write_text(json.dumps({**(made or {}), "tensors": report.tensors, "bytes": report.bytes, "verified": settings.verify}, indent=2) + "\n")
        writing.protect(partial)
    return report


def shards(source: Source, template: Path | None, stem: str, limit: int) -> dict[str, list[str]]:
    """Weight file -> its keys: as the template has them, else files of at most `limit` bytes."""
    if template is not None and any(template.glob("*.safetensors")):
        _, homes = reading.hub_files(template)
        out: dict[str, list[str]] = {}
        for key in source.shapes:
            out.setdefault(homes.get(key, ""), []).append(key)
        if "" not in out:
            own = re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", next(iter(out)))
            return dict(sorted(out.items())) if len(out) > 1 else {f"{own}.safetensors": next(iter(out.values()))}
    groups: list[list[str]] = [[]]
    held = 0
    for key in source.shapes:
        count = prod(source.shapes[key]) * source.dtypes[key].itemsize
        if groups[-1] and held + count > limit:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += count
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors": keys for n, keys in enumerate(groups, 1)}


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".h5", ".msgpack", ".gguf")


def copy_assets(template: Path, directory: Path) -> None:
    """Everything of a hub checkpoint that is not weights: configs, tokenizer, processors, code, licence."""
    for root, directories, files in os.walk(template):
        directories[:] = [d for d in directories if not d.startswith(".") and d != tree.RELEASE and not d.startswith("iter_")]
        for name in files:
            left = name.endswith(WEIGHTS) or name.endswith(".safetensors.index.json") or name in (tree.TRACKER, MARKER, ".metadata")
            if not left and not name.startswith("."):
                target = directory / Path(root).relative_to(template) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(root) / name, target)


def to_dcp(source: Source, root: Path, settings: Settings, prefix: str = "model.") -> Report:
    """Write tensors as a DCP directory root/release, under `prefix` + their names."""
    spec: Spec = {key: (tuple(source.shapes[key]), source.dtypes[key]) for key in source.shapes}
    report = Report(root, settings.threads, len(spec), _bytes(spec))
    report.lines = [f"{tree.RELEASE}/  {_listing({prefix + key: one for key, one in spec.items()})}"]
    if settings.dry_run:
        return report
    writing.need_space(root, report.bytes)
    from polymodal.convert.dcp import save

    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial:
        began = time.perf_counter()
        save(source, partial, prefix, settings.threads)
        report.files = len(list(partial.glob("*.distcp")))
        report.seconds = time.perf_counter() - began
        if settings.verify:
            began = time.perf_counter()
            again = opened_dcp(partial, prefix)
            if odd := again.shapes.keys() ^ source.shapes.keys():
                raise PolymodalError(f"{partial}: {sorted(odd)[0]} was not written.", "This is a defect: please report it.")
            writing.compare(_items(source, source.shapes), dict.fromkeys(source.shapes, again), source, settings.threads)
            report.verified = time.perf_counter() - began
    return report


def _bytes(spec: Spec) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def _listing(spec: Spec) -> str:
    total = f"{len(spec)} tensors, {_bytes(spec) / 1e6:.1f} MB"
    rows = [f"    {key}  {list(shape)} {str(dtype).removeprefix('torch.')}" for key, (shape, dtype) in spec.items()]
    return "\n".join([total, *rows])


def shown_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


# -------------------------------------------------------------------------------------------------------- small changes


def only(opened: Opened, prefix: str, what: str) -> Opened:
    """The tensors whose names begin with a prefix."""
    kept = [key for key in opened.source.shapes if key.startswith(prefix)]
    if not kept:
        raise PolymodalError(f"{what} has no tensor under {prefix}*.", "Leave that option out.")
    return opened.but(restricted(opened.source, kept))


def with_language(source: Path, language: Path | None) -> Source | None:
    """A hub checkpoint with what another one holds in its place (the language model); None without another."""
    if language is None:
        return None
    base, _ = reading.hub_files(source)
    other, _ = reading.hub_files(language)
    taken = [key for key in other.shapes if key in base.shapes]
    if not taken:
        raise PolymodalError(
            f"{language} and {source} have no tensor in common.", "Give a language model of the same family, under the same names."
        )
    for key in taken:
        if other.shapes[key] != base.shapes[key]:
            raise PolymodalError(f"{key} is {list(other.shapes[key])} in {language}, {list(base.shapes[key])} in {source}.", "Give one of the same size.")
    return Union(restricted(base, [key for key in base.shapes if key not in taken]), restricted(other, taken))


def without_head(opened: Opened, known: bool) -> Opened:
    """A tree's tensors without a head that only repeats the embedding, as pipelines need it; facts then say `tied`.

    known: whether the facts come from a config; else a head equal to the embedding is taken for a tied one.
    """
    if opened.table.tie is None or opened.table.tie[1] not in opened.source.shapes:
        return opened
    head, embedding = opened.table.tie
    shapes = opened.source.shapes
    if head not in shapes:
        return opened.but(opened.source, tied=1)
    if known and not opened.facts.get("tied"):
        return opened
    try:
        writing.compare(_items(opened.source, [head]), {head: _renamed(opened.source, {head: embedding})}, opened.source, 1)
    except PolymodalError:
        if known:
            _same_head(opened, Path())
        return opened
    return opened.but(restricted(opened.source, [key for key in shapes if key != head]), tied=1)
