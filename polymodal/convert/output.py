"""Whole tensors out: as a tree, as hub files, as a DCP directory; read back and compared before they get
their name.

Everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.convert import reading, tree, writing
from polymodal.convert.engine import Opened, opened_dcp
from polymodal.convert.options import Settings
from polymodal.convert.source import Joined, Remapped, Source, renamed
from polymodal.convert.tree import Parallel
from polymodal.convert.writing import Item, Spec, spec_bytes, spec_of
from polymodal.core.errors import PolymodalError
from polymodal.models.saving import appearing
from polymodal.models.storage import to_publish

MARKER = "polymodal_convert.json"
"""In every hub directory that was written here: what it came from. Such a directory may be written again."""
SHARD = 5 << 30
"""Bytes of a weight file, where no template says how to cut."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".h5", ".msgpack", ".gguf")
"""Endings of files that a copy of a hub checkpoint leaves out."""


@dataclass
class Report:
    """What was written, or would be (lines: in detail). seconds: of writing and reading back."""

    directory: Path
    files: int
    tensors: int
    bytes: int
    seconds: float = 0.0
    verified: bool = False
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.seconds:
            size = f"{self.tensors} tensors in {self.files} files, {self.bytes / 1e9:.3f} GB"
            return "\n".join([*self.lines, f"would write {self.directory}: {size}"])
        rate = f", {self.bytes / self.seconds / 1e9:.2f} GB/s" if self.seconds > 0.05 else ""
        proof = ", read back and compared" if self.verified else ""
        size = f"{self.tensors} tensors in {self.files} files, {self.bytes / 1e9:.2f} GB"
        return f"{self.directory}: {size}{rate}{proof}"

    @contextmanager
    def timed(self, settings: Settings) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds, self.verified = time.perf_counter() - began, settings.verify


def _report(directory: Path, specs: Mapping[str, Spec]) -> Report:
    """Of files to be written: name -> the tensors in it."""
    report = Report(
        directory, len(specs), sum(map(len, specs.values())), sum(map(spec_bytes, specs.values()))
    )
    for name, spec in specs.items():
        report.lines.append(f"{name}  {len(spec)} tensors, {spec_bytes(spec) / 1e6:.1f} MB")
        report.lines += [
            f"    {key}  {list(shape)} {str(dtype).removeprefix('torch.')}"
            for key, (shape, dtype) in spec.items()
        ]
    return report


def _with_head(opened: Opened, parallel: Parallel) -> Source:
    """Pipelines hold a tied head by itself, on the last stage; a single stage takes the embedding."""
    source, tie = opened.source, opened.table.tie
    if not tie or not opened.facts.get("tied") or parallel.pp == 1:
        return source
    head, embedding = tie
    if head in source.shapes or embedding not in source.shapes:
        return source
    return Joined(source, renamed(source, {head: embedding}))


def to_tree(opened: Opened, parallel: Parallel, root: Path, settings: Settings) -> Report:
    """Write whole tensors (under the family's own names) as a tree."""
    facts, table = opened.facts, opened.table
    staged = tree.one_stage(table, facts) if parallel.pp * parallel.vpp > 1 else {}
    parallel = Parallel(parallel.tp, parallel.ep, {**staged, **parallel.layers}, parallel.tower_tp)
    tree.check(parallel, table, facts)
    source = _with_head(opened, parallel)
    files = tree.place(table, source.shapes, parallel, table.from_shapes(facts, source.shapes))
    layout = {f"{name}/{key}": stored for name, held in files.items() for key, stored in held.items()}
    cut = Remapped(source, layout)
    specs: dict[str, Spec] = {
        name: {key: (cut.shapes[f"{name}/{key}"], cut.dtypes[f"{name}/{key}"]) for key in held}
        for name, held in files.items()
    }
    report = _report(root, {f"{tree.RELEASE}/{name}/{tree.FILE}": spec for name, spec in specs.items()})
    if settings.dry_run:
        return report
    writing.need_space(root, report.bytes)
    # ranks that take columns of the same rows write together, so that the rows are read once
    origins = {label: stored.pieces[0].key for label, stored in layout.items()}
    groups = {label: key for label, key in origins.items() if table.shard_of(key).dim == 1}
    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial, report.timed(settings):
        items: list[Item] = []
        paths = {name: partial / name / tree.FILE for name in specs}
        for name, spec in specs.items():
            paths[name].parent.mkdir()
            extra = {"checkpoint_version": tree.VERSION}
            locations = writing.empty_torch_file(paths[name], parallel.slots, spec, extra)
            for key, location in locations.items():
                items.append(Item(f"{name}/{key}", key, location, groups.get(f"{name}/{key}", "")))
        writing.write_values(items, cut, settings.threads, settings.verify)
        if settings.verify:
            slots = parallel.slots
            writing.check_headers(items, {p: writing.torch_locations(p, slots) for p in paths.values()})
    return report


def to_hub(
    source: Source,
    directory: Path,
    settings: Settings,
    template: Path | None = None,
    stem: str = "model",
    origin: Mapping[str, Any] | None = None,
    shard: int = SHARD,
    beside: Mapping[str, Any] | None = None,
    follow: bool = True,
) -> Report:
    """Write tensors under the hub's names as safetensors files.

    template: a hub checkpoint whose other files are taken over; follow: and whose cut into weight files is
    kept. origin: what is noted in the marker file; beside: JSON files that go with the weights; shard: bytes
    of a weight file where no template says how to cut."""
    files = _weight_files(source, template if follow else None, stem, shard)
    specs = {name: spec_of(source, keys) for name, keys in files.items()}
    report = _report(directory, specs)
    if template is not None and template.resolve() == directory.resolve():
        raise PolymodalError(
            f"{directory} is the checkpoint that the files are taken from.", "Choose another directory."
        )
    if settings.dry_run:
        return report
    writing.need_space(directory.parent, report.bytes)
    with appearing(directory, overwrite=settings.force or (directory / MARKER).is_file()) as partial:
        if template is not None:
            copy_assets(template, partial)
        for name, content in (beside or {}).items():
            _write_json(partial / name, content)
        with report.timed(settings):
            items = [
                Item(key, key, location)
                for name, spec in specs.items()
                for key, location in writing.empty_safetensors(partial / name, spec).items()
            ]
            writing.write_values(items, source, settings.threads, settings.verify)
            if settings.verify:
                written = {partial / name: reading.hub_files(partial / name).locations for name in files}
                writing.check_headers(items, written)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": report.bytes},
                "weight_map": {key: name for name, keys in files.items() for key in keys},
            }
            _write_json(partial / f"{_stem(next(iter(files)))}.safetensors.index.json", index)
        counts = {"tensors": report.tensors, "bytes": report.bytes, "verified": report.verified}
        _write_json(partial / MARKER, {**(origin or {}), **counts})
        writing.protect(partial)
    return report


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _stem(name: str) -> str:
    """A weight file's name without its number."""
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name)


def _weight_files(source: Source, template: Path | None, stem: str, limit: int) -> dict[str, list[str]]:
    """Weight file -> its keys: as the template has them, else files of at most `limit` bytes."""
    if template is not None and any(template.glob("*.safetensors")):
        locations = reading.hub_files(template).locations
        if source.shapes.keys() <= locations.keys():
            files: dict[str, list[str]] = {}
            for key in source.shapes:
                files.setdefault(locations[key].path.name, []).append(key)
            if len(files) == 1:
                return {f"{_stem(name)}.safetensors": keys for name, keys in files.items()}
            return dict(sorted(files.items()))
    groups: list[list[str]] = [[]]
    held = 0
    for key in source.shapes:
        count = spec_bytes(spec_of(source, [key]))
        if groups[-1] and held + count > limit:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += count
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors": keys for n, keys in enumerate(groups, 1)}


def copy_assets(template: Path, directory: Path) -> None:
    """Everything of a hub checkpoint that is not weights: configs, tokenizer, processors, code, licence."""
    for root, directories, files in os.walk(template):
        directories[:] = [d for d in directories if d != tree.RELEASE and not d.startswith((".", "iter_"))]
        for name in files:
            weights = name.endswith((*WEIGHTS, ".safetensors.index.json"))
            if not weights and name not in (tree.TRACKER, MARKER) and name[0] != ".":
                target = directory / Path(root).relative_to(template) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(to_publish(template, Path(root) / name), target)


def to_dcp(source: Source, root: Path, settings: Settings) -> Report:
    """Write tensors as a DCP directory root/release, under `model.` + their names."""
    spec = spec_of(source, source.shapes)
    report = _report(root, {f"{tree.RELEASE}/": {reading.DCP_PREFIX + key: one for key, one in spec.items()}})
    report.files = settings.threads
    if settings.dry_run:
        return report
    writing.need_space(root, report.bytes)
    from polymodal.convert import dcp

    with writing.released(root, tree.TRACKER, tree.RELEASE) as partial, report.timed(settings):
        dcp.save(source, partial, settings.threads)
        report.files = len(list(partial.glob("*.distcp")))
        if settings.verify:
            again = opened_dcp(partial)
            names = {key: key for key in source.shapes}
            odd = again.shapes.keys() ^ names.keys()
            if key := min(odd, default=None) or writing.first_difference(
                source, again, names, settings.threads
            ):
                raise PolymodalError(f"{partial}: {key} is not what was written.", writing.DISK)
    return report


def to_adapter(source: Source, directory: Path, settings: Settings, config: Any, origin: str) -> Report:
    """Write an adapter in peft's format. config: content of adapter_config.json."""
    beside = {"adapter_config.json": config}
    return to_hub(source, directory, settings, stem="adapter_model", origin={"from": origin}, beside=beside)
