"""Whole tensors out: as a tree, as hub files, as a DCP directory; read back and compared before they get their name.

Everything that can be refused is refused before the first byte is written. Sees engine.py, tree.py and writing.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from polymodal.convert import reading, tree, writing
from polymodal.convert.engine import Opened, items_of, opened_dcp, renamed
from polymodal.convert.operations import Facts
from polymodal.convert.options import Settings
from polymodal.convert.source import Mapped, Source, Union
from polymodal.convert.table import Table, cut_of
from polymodal.convert.tree import Parallel
from polymodal.convert.writing import Item, Spec
from polymodal.core.errors import PolymodalError
from polymodal.models.saving import appearing

MARKER = "polymodal_convert.json"
"""In every hub directory that was written here: what it came from. Such a directory may be written again."""
SHARD = 5 << 30
"""Bytes of a weight file, where no template says how to cut."""


@dataclass
class Report:
    """What was written. seconds: of writing, and of reading back when verified."""

    directory: Path
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    seconds: float = 0.0
    verified: bool = False
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = f", {self.bytes / self.seconds / 1e9:.2f} GB/s" if self.seconds > 0.05 else ""
        proof = ", read back and compared" if self.verified else ""
        return f"{self.directory}: {self.tensors} tensors in {self.files} files, {self.bytes / 1e9:.2f} GB{rate}{proof}"


def looked_at(report: Report, settings: Settings) -> Report:
    """Of a dry run. Raises PolymodalError when what one command writes does not fit the disk together."""
    if settings.together is not None:
        settings.together.append(report.bytes)
        writing.need_space(report.directory, sum(settings.together))
    return report


def with_head(table: Table, source: Source, facts: Facts, parallel: Parallel) -> Source:
    """Pipelines hold a tied head by itself, on the last stage; a single stage takes the embedding."""
    if table.tie is None or not facts.get("tied"):
        return source
    head, embedding = table.tie
    if (
        parallel.pp * parallel.vpp > 1
        and parallel.pp > 1
        and head not in source.shapes
        and embedding in source.shapes
    ):
        return Union(source, renamed(source, {head: embedding}))
    return source


def to_tree(opened: Opened, parallel: Parallel, root: Path, settings: Settings) -> Report:
    """Write whole tensors (under the family's own names) as a tree."""
    facts, table = opened.facts, opened.table
    layers = (
        {**tree.one_stage(table, facts), **parallel.layers}
        if parallel.pp * parallel.vpp > 1
        else dict(parallel.layers)
    )
    parallel = Parallel(parallel.tp, parallel.ep, layers, parallel.tower_tp)
    tree.check(parallel, table, facts)
    source = with_head(table, opened.source, facts, parallel)
    facts = table.seen(facts, source.shapes)
    files = tree.place(table, source.shapes, parallel, facts)
    cut = Mapped(
        source,
        {
            f"{name}/{slot}:{key}": stored
            for name, slots in files.items()
            for slot, held in slots.items()
            for key, stored in held.items()
        },
    )
    specs = {
        name: {
            slot: {
                key: (cut.shapes[f"{name}/{slot}:{key}"], cut.dtypes[f"{name}/{slot}:{key}"]) for key in held
            }
            for slot, held in slots.items()
        }
        for name, slots in files.items()
    }
    report = Report(
        root,
        len(files),
        sum(len(held) for slots in files.values() for held in slots.values()),
        sum(_bytes(spec) for slots in specs.values() for spec in slots.values()),
    )
    report.lines = [
        f"{tree.RELEASE}/{name}/{tree.FILE}  {_listing({f'{slot}:{key}': one for slot, held in slots.items() for key, one in held.items()})}"
        for name, slots in specs.items()
    ]
    if settings.dry_run:
        return looked_at(report, settings)
    writing.need_space(root, report.bytes)
    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial:
        began = time.perf_counter()
        items: list[Item] = []
        # ranks that take columns of the same rows write together, so that the rows are read once
        columns = {
            label: stored.pieces[0].key
            for label, stored in cut.layout.items()
            if cut_of(table, stored.pieces[0].key).dim == 1
        }
        for name, slots in specs.items():
            (partial / name).mkdir()
            places = writing.torch_frame(
                partial / name / tree.FILE, slots, {"checkpoint_version": tree.VERSION}
            )
            items += [
                Item(f"{name}/{key}", key, spot, columns.get(f"{name}/{key}", ""))
                for key, spot in places.items()
            ]
        writing.fill(items, cut, settings.threads, settings.verify)
        if settings.verify:
            paths = {partial / name / tree.FILE: slots for name, slots in specs.items()}
            writing.apart(items, {path: writing.torch_places(path, slots) for path, slots in paths.items()})
        report.seconds, report.verified = time.perf_counter() - began, settings.verify
    return report


def to_hub(
    source: Source,
    directory: Path,
    settings: Settings,
    template: Path | None = None,
    stem: str = "model",
    made: Mapping[str, Any] | None = None,
    shard: int = SHARD,
    beside: Mapping[str, Any] | None = None,
    follow: bool = True,
) -> Report:
    """Write tensors under the hub's names as safetensors files.

    template: a hub checkpoint whose other files are taken over; follow: and whose cut into weight files is kept.
    made: what is noted in the marker file; beside: JSON files that go with the weights; shard: bytes of a weight file
    where no template says how to cut.
    """
    homes = shards(source, template if follow else None, stem, shard)
    spec: Spec = {key: (tuple(source.shapes[key]), source.dtypes[key]) for key in source.shapes}
    report = Report(directory, len(homes), len(spec), _bytes(spec))
    report.lines = [f"{name}  {_listing({key: spec[key] for key in keys})}" for name, keys in homes.items()]
    if template is not None and template.resolve() == directory.resolve():
        raise PolymodalError(
            f"{directory} is the checkpoint that the files are taken from.", "Choose another directory."
        )
    overwrite = settings.force or (directory / MARKER).is_file()
    if settings.dry_run:
        return looked_at(report, settings)
    writing.need_space(directory.parent, report.bytes)
    with appearing(directory, overwrite) as partial:
        if template is not None:
            copy_assets(template, partial)
        for name, content in (beside or {}).items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        began = time.perf_counter()
        items: list[Item] = []
        for name, keys in homes.items():
            places = writing.safetensors_frame(partial / name, {key: spec[key] for key in keys})
            items += [Item(key, key, spot) for key, spot in places.items()]
        writing.fill(items, source, settings.threads, settings.verify)
        if len(homes) > 1:
            index = {
                "metadata": {"total_size": report.bytes},
                "weight_map": {key: name for name, keys in homes.items() for key in keys},
            }
            own = re.sub(r"-\d+-of-\d+\.safetensors$", "", next(iter(homes)))
            (partial / f"{own}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if settings.verify:
            writing.apart(items, {partial / n: reading.hub_files(partial / n)[0].places for n in homes})
        report.seconds, report.verified = time.perf_counter() - began, settings.verify
        (partial / MARKER).write_text(
            json.dumps(
                {
                    **(made or {}),
                    "tensors": report.tensors,
                    "bytes": report.bytes,
                    "verified": settings.verify,
                },
                indent=2,
            )
            + "\n"
        )
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
            return (
                dict(sorted(out.items()))
                if len(out) > 1
                else {f"{own}.safetensors": next(iter(out.values()))}
            )
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
        directories[:] = [
            d
            for d in directories
            if not d.startswith(".") and d != tree.RELEASE and not d.startswith("iter_")
        ]
        for name in files:
            left = (
                name.endswith(WEIGHTS)
                or name.endswith(".safetensors.index.json")
                or name in (tree.TRACKER, MARKER, ".metadata")
            )
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
        return looked_at(report, settings)
    writing.need_space(root, report.bytes)
    from polymodal.convert.dcp import save

    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial:
        began = time.perf_counter()
        save(source, partial, prefix, settings.threads)
        report.files = len(list(partial.glob("*.distcp")))
        if settings.verify:
            again = opened_dcp(partial, prefix)
            if odd := again.shapes.keys() ^ source.shapes.keys():
                raise PolymodalError(
                    f"{partial}: {sorted(odd)[0]} was not written.", "This is a defect: please report it."
                )
            writing.compare(
                items_of(source, source.shapes), dict.fromkeys(source.shapes, again), source, settings.threads
            )
        report.seconds, report.verified = time.perf_counter() - began, settings.verify
    return report


def _bytes(spec: Spec) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def _listing(spec: Spec) -> str:
    total = f"{len(spec)} tensors, {_bytes(spec) / 1e6:.1f} MB"
    rows = [
        f"    {key}  {list(shape)} {str(dtype).removeprefix('torch.')}"
        for key, (shape, dtype) in spec.items()
    ]
    return "\n".join([total, *rows])
