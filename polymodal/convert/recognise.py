"""Any directory under the hub's names, recognised by its files: hub files, a tree, a DCP directory.

`polymodal convert` and the reader that training uses (`register`) go through here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from polymodal.convert import changes, engine, family, output, pipeline, reading, tree, writing
from polymodal.convert.engine import Opened
from polymodal.convert.family import Family, architectures, read_config
from polymodal.convert.options import Settings
from polymodal.convert.output import Report
from polymodal.convert.source import Box, Source, values
from polymodal.convert.tree import Parallel
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say, say_lines
from polymodal.models import storage

Kind = Literal["hf", "mm", "dcp"]
CALLED = {"hf": "hub checkpoint", "mm": "tree", "dcp": "DCP directory"}
PREFIXED = Family(
    "by prefix",
    "any model",
    {prefix: family.generic(prefix, "").table() for prefix in ("model.", "base_model.model.model.", "")},
)
"""Tensors with the hub's names behind a prefix."""


def kind_of(directory: Path) -> Kind:
    """What kind of checkpoint a directory holds. Raises PolymodalError for anything else."""
    if tree.is_tree(directory):
        return "mm"
    tracked = (directory / tree.TRACKER).is_file()
    if reading.is_dcp(directory) or tracked and reading.is_dcp(tree.iteration(directory)):
        return "dcp"
    if directory.is_file() or any(directory.glob("*.safetensors")):
        return "hf"
    raise PolymodalError(
        f"{directory} is neither a hub checkpoint (*.safetensors), nor a tree (mp_rank_*), "
        "nor a DCP directory (.metadata).",
        "Give the directory that holds the files, or the tracker above them.",
    )


def families_of(hub: Path) -> list[Family]:
    """Families of trees that take a hub checkpoint, then those of DCP directories."""
    found = family.by_architecture(architectures(read_config(hub)))
    return sorted(found, key=lambda one: one.kind == "dcp")


def tree_family(hub: Path) -> Family:
    """The family whose trees hold a model. Raises PolymodalError when no table knows it."""
    for one in families_of(hub):
        if one.kind != "dcp":
            return one
    titles = [one.title for one in family.families().values() if one.architectures]
    model = " / ".join(architectures(read_config(hub))) or "this model"
    raise PolymodalError(
        f"{hub / 'config.json'}: no converter knows trees of {model}.",
        f"There are tables for {', '.join(titles)}.",
    )


Result = TypeVar("Result")


def first_that_fits(attempts: Iterable[Callable[[], Result]]) -> Result:
    """The result of the first attempt that does not fail; the error of the first one, when all do."""
    failed: PolymodalError | None = None
    for attempt in attempts:
        try:
            return attempt()
        except PolymodalError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def opened_tree(root: Path, hub: Path, settings: Settings) -> tuple[Opened, Source]:
    """A tree under its own names, and under those of the hub checkpoint that it came from."""
    one = tree_family(hub)

    def attempt(variant: str) -> tuple[Opened, Source]:
        opened = engine.opened_tree(one, variant, root, hub, None, settings)
        return opened, engine.unmapped(opened, root, hub)

    return first_that_fits(partial(attempt, variant) for variant in one.tables)


def hub_names(directory: Path, hub: Path, settings: Settings) -> Source:
    """A tree or DCP directory under the names of the hub checkpoint that it came from.

    Raises PolymodalError (that of the likeliest table) when none fits.
    """
    kind = kind_of(directory)
    if kind == "mm":
        return opened_tree(directory, hub, settings)[1]
    if kind == "hf":
        return reading.hub_files(directory)
    source = engine.opened_dcp(directory)

    def attempt(one: Family, variant: str) -> Source:
        return engine.unmapped(engine.under(replace(one, counted={}), variant, hub, source), directory, hub)

    candidates = [*reversed(families_of(hub)), PREFIXED]
    return first_that_fits(partial(attempt, one, variant) for one in candidates for variant in one.tables)


# ------------------------------------------------------------------------------------ for models and training


class ForeignFiles:
    """A tree or DCP directory as models/storage.py reads checkpoints: tensors under the hub's names, box by
    box."""

    def __init__(self, directory: Path, source: Source):
        self.directory, self.source = directory, source
        self.shapes = {key: tuple(shape) for key, shape in source.shapes.items()}
        self.dtypes = {key: writing.DTYPE_NAMES[dtype] for key, dtype in source.dtypes.items()}
        self.order = {key: at for at, key in enumerate(self.shapes)}
        self.bytes_read = 0

    def where(self, key: str) -> Path:
        return self.directory

    def whole(self, key: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, in its own dtype."""
        tensor = values(self.source, key, box)
        self.bytes_read += tensor.nbytes
        return tensor

    def read(self, key: str, box: Box, into: Tensor) -> None:
        """Copy a box of a tensor into `into`, cast to its dtype."""
        into.copy_(self.whole(key, box))

    def equals(self, key: str, box: Box, other: Tensor) -> bool:
        return torch.equal(self.whole(key, box).to(other.dtype), other.cpu())

    def close(self) -> None:
        """There is nothing to close: storage.Files has it."""


def reader(directory: Path, hub: Path) -> ForeignFiles | None:
    """A tree or DCP directory of another system for models/storage.py; None for what is neither."""
    if not (tree.is_tree(directory) or reading.is_dcp(directory) or (directory / tree.TRACKER).is_file()):
        return None
    return ForeignFiles(directory, hub_names(directory, hub, Settings(workers=1)))


def register() -> None:
    """Let training start from trees and DCP directories."""
    if reader not in storage.READERS:
        storage.READERS.append(reader)


# ---------------------------------------------------------------------------------------- `polymodal convert`


def _lists(value: str | None) -> Any:
    """[6,10], [[3,5],[3,5]] or 6,10 as numbers."""
    if not value:
        return None
    try:
        return json.loads(value if value.strip().startswith("[") else f"[{value}]")
    except ValueError:
        raise PolymodalError(
            f"{value!r} is not a list of layer counts.", "Write 6,10 or [[3,5],[3,5]]."
        ) from None


def run(
    source: Path,
    directory: Path,
    to: Kind,
    hub: Path | None,
    sizes: Mapping[str, int],
    layers: Mapping[str, str | None],
    canonical: bool,
    settings: Settings,
) -> int:
    """Convert any checkpoint. hub: the hub checkpoint of the model, where the source is none
    itself.

    sizes: tp and ep, and vit and audio for TP sizes of their own (0: none); layers: pp, vit, audio -> its
    list, as given; canonical: q, k, v and gate, up apart. A pipeline's directory stands for its transformers;
    hub is then the pipeline's too."""

    def cut(opened: Opened) -> Parallel:
        given = {name: tree.counts(f"--{name}-pp", _lists(value)) for name, value in layers.items()}
        names = [tower.name for tower in opened.table.towers] or ["dit"]
        main = next((name for name in names if name in ("llm", "dit")), names[-1])
        lists = {main if name == "pp" else name: value for name, value in given.items() if value}
        tower_tp = {name: sizes[name] for name in ("vit", "audio") if sizes.get(name)}
        return Parallel(sizes["tp"], sizes["ep"], lists, tower_tp)

    def convert(name: str, settings: Settings) -> Report:
        own_hub = pipeline.inside(hub, name) if hub else None
        return _one(source / name, directory / name, to, own_hub, cut, canonical, settings)

    for report in pipeline.each(
        [partial(convert, name) for name in pipeline.parts(source) or ["."]], settings
    ):
        say_lines(report, "\n")
    return 0


def _one(
    source: Path,
    directory: Path,
    to: Kind,
    hub: Path | None,
    cut: Callable[[Opened], Parallel],
    canonical: bool,
    settings: Settings,
) -> Report:
    """cut: how a tree is cut."""
    kind = kind_of(source)
    if kind == "hf":
        hub = source if source.is_dir() else source.parent
    if hub is None:
        raise PolymodalError(
            f"{source} is a {CALLED[kind]}: its config and names are the hub checkpoint's.",
            "Give that with --hf-dir.",
        )
    say(f"{source}: {CALLED[kind]} of {' / '.join(architectures(read_config(hub))[:1])}", error=True)
    if to == "hf":
        stem = next(iter(families_of(hub)), PREFIXED).stem
        tensors = hub_names(source, hub, settings)
        return output.to_hub(tensors, directory, settings, hub, stem, {"from": str(source)})
    if to == "mm" and kind == "mm":
        opened = changes.without_head(opened_tree(source, hub, settings)[0], known=True)
        return output.to_tree(opened, cut(opened), directory, settings)
    tensors = hub_names(source, hub, settings)
    if to == "dcp":
        # directories of language models without a table of their own have the hub's names behind a prefix
        one = next((one for one in reversed(families_of(hub)) if one.kind != "language"), None)
        variants = one.tables if one else ["model."]
    else:
        one = tree_family(hub)
        variants = ["canonical"] if canonical else one.tables
    attempts = (partial(engine.hub, one or PREFIXED, variant, hub, tensors) for variant in variants)
    opened = first_that_fits(attempts)
    if to == "dcp":
        return output.to_dcp(opened.source, directory, settings)
    return output.to_tree(opened, cut(opened), directory, settings)
