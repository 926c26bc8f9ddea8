"""Any directory under the hub's names, told by what lies in it: hub files, a tree, a DCP directory.

`polymodal convert` and the reader that training uses (`register`) go through here. Sees engine.py and shelf.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from polymodal.convert import engine, family_registry, pipeline, reading, tree, writing
from polymodal.convert.engine import Opened
from polymodal.convert.family import Family, read_config
from polymodal.convert.options import Settings
from polymodal.convert.source import Box, Source
from polymodal.convert.table import Table, row
from polymodal.core.errors import PolymodalError
from polymodal.models import storage

Kind = Literal["hf", "mm", "dcp"]
CALLED = {"hf": "hub checkpoint", "mm": "tree", "dcp": "DCP directory"}
IDENTITY = Family(
    "by prefix",
    "any model",
    {prefix: Table((row("{x}", prefix + "{x}"),)) for prefix in ("model.", "base_model.model.model.", "")},
)


def kind_of(directory: Path) -> Kind:
    """What lies there. Raises PolymodalError for anything else."""
    if tree.is_tree(directory):
        return "mm"
    if (
        reading.is_dcp(directory)
        or (directory / tree.TRACKER).is_file()
        and reading.is_dcp(tree.iteration(directory))
    ):
        return "dcp"
    if directory.is_file() or any(directory.glob("*.safetensors")):
        return "hf"
    raise PolymodalError(
        f"{directory} is neither a hub checkpoint (*.safetensors), nor a tree (mp_rank_*), nor a DCP directory (.metadata).",
        "Give the directory that holds the files, or the tracker above them.",
    )


def architectures(hub: Path) -> list[str]:
    config = read_config(hub)
    return [
        *(config.get("architectures") or ()),
        *filter(None, [config.get("_class_name"), config.get("model_type")]),
    ]


def families_of(hub: Path) -> list[Family]:
    """Families of trees that take a hub checkpoint, then those of DCP directories."""
    return sorted(
        family_registry.by_architecture(architectures(hub)), key=lambda family: family.kind == "dcp"
    )


def tree_family(hub: Path) -> Family:
    """The family whose trees hold a model. Raises PolymodalError when no table knows it."""
    for family in families_of(hub):
        if family.kind != "dcp":
            return family
    raise PolymodalError(
        f"{hub / 'config.json'}: no converter knows trees of {' / '.join(architectures(hub)) or 'this model'}.",
        f"There are tables for {', '.join(one.title for one in family_registry.families().values() if one.architectures)}.",
    )


def dcp_family(hub: Path) -> Family | None:
    """The family that names a model's tensors in DCP directories; None: they are the hub's behind a prefix."""
    return next((family for family in reversed(families_of(hub)) if family.kind != "language"), None)


Named = TypeVar("Named")


def fitting(family: Family, attempt: Callable[[str], Named]) -> Named:
    """What the first of a family's tables gives that fits; the error of the first one, when none does."""
    failed: PolymodalError | None = None
    for variant in family.tables:
        try:
            return attempt(variant)
        except PolymodalError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def opened_tree(root: Path, hub: Path, settings: Settings) -> tuple[Opened, Source]:
    """A tree under its own names, and under those of the hub checkpoint that it came from."""
    family = tree_family(hub)

    def attempt(variant: str) -> tuple[Opened, Source]:
        opened = engine.opened_tree(family, variant, root, hub, None, settings)
        return opened, engine.unmapped(opened, root, hub).source

    return fitting(family, attempt)


def hub_names(directory: Path, hub: Path, settings: Settings) -> Source:
    """A tree or DCP directory under the names of the hub checkpoint that it came from.

    Raises PolymodalError (that of the likeliest table) when none fits.
    """
    kind = kind_of(directory)
    if kind == "mm":
        return opened_tree(directory, hub, settings)[1]
    if kind == "hf":
        return reading.hub_files(directory)[0]
    source = engine.opened_dcp(directory)
    failed: PolymodalError | None = None
    for family in [*reversed(families_of(hub)), IDENTITY]:

        def attempt(variant: str, family: Family = replace(family, counted={})) -> Source:
            return engine.unmapped(engine.under(family, variant, hub, source), directory, hub).source

        try:
            return fitting(family, attempt)
        except PolymodalError as error:
            failed = failed or error
    assert failed is not None
    raise failed


# ---------------------------------------------------------------------------------------------- for models and training


class Foreign:
    """A tree or DCP directory as models/storage.py reads checkpoints: tensors under the hub's names, box by box."""

    def __init__(self, directory: Path, source: Source):
        self.directory, self.source = directory, source
        self.shapes = {key: tuple(shape) for key, shape in source.shapes.items()}
        self.dtypes = {key: writing.NAMES[dtype] for key, dtype in source.dtypes.items()}
        self.order = {key: at for at, key in enumerate(self.shapes)}
        self.bytes_read = 0

    def where(self, key: str) -> Path:
        return self.directory

    def read(self, key: str, box: Box, into: Tensor) -> None:
        """Copy a box of a tensor into `into`, cast to its dtype."""
        values = torch.empty(into.shape, dtype=self.source.dtypes[key])
        self.source.read(key, box, values)
        self.bytes_read += values.nbytes
        into.copy_(values)

    def equals(self, key: str, box: Box, other: Tensor) -> bool:
        values = torch.empty(other.shape, dtype=other.dtype, device="cpu")
        self.read(key, box, values)
        return torch.equal(values, other.cpu())

    def whole(self, key: str) -> Tensor:
        values = torch.empty(self.shapes[key], dtype=self.source.dtypes[key])
        self.read(key, tuple(slice(0, n) for n in self.shapes[key]), values)
        return values

    def close(self) -> None:
        pass


def reader(directory: Path, hub: Path) -> Foreign | None:
    """A tree or DCP directory of another system for models/storage.py; None for what is neither."""
    if (
        not tree.is_tree(directory)
        and not reading.is_dcp(directory)
        and not (directory / tree.TRACKER).is_file()
    ):
        return None
    return Foreign(directory, hub_names(directory, hub, Settings(workers=1)))


def register() -> None:
    """Let training start from trees and DCP directories."""
    if reader not in storage.READERS:
        storage.READERS.append(reader)


# ------------------------------------------------------------------------------------------------ `polymodal convert`


def lists(value: str | None) -> Any:
    """[6,10], [[3,5],[3,5]] or 6,10 as numbers."""
    if not value:
        return None
    import json

    try:
        return json.loads(value if value.strip().startswith("[") else f"[{value}]")
    except ValueError:
        raise PolymodalError(
            f"{value!r} is not a list of layer counts.", "Write 6,10 or [[3,5],[3,5]]."
        ) from None


def run(
    source: Path,
    target: Path,
    to: Kind,
    hub: Path | None,
    sizes: dict[str, int],
    layers: dict[str, str | None],
    canonical: bool,
    settings: Settings,
) -> int:
    """Convert whatever lies in `source`. hub: the hub checkpoint of the model, where the source is none itself.

    A pipeline's directory stands for its transformers; hub is then the pipeline's too.
    """
    from polymodal.convert import changes, output
    from polymodal.convert.converters import said
    from polymodal.convert.tree import Parallel, counts

    if names := pipeline.parts(source):

        def one(how: Settings, name: str) -> None:
            of = pipeline.inside(hub, name) if hub is not None else None
            run(source / name, target / name, to, of, sizes, layers, canonical, how)

        pipeline.each([partial(one, name=name) for name in names], settings)
        return 0
    kind = kind_of(source)
    if kind == "hf":
        hub = source if source.is_dir() else source.parent
    if hub is None:
        raise PolymodalError(
            f"{source} is a {CALLED[kind]}: its config and names are the hub checkpoint's.",
            "Give that with --hf-dir.",
        )
    print(
        f"{source}: {CALLED[kind]} of {' / '.join(architectures(hub)[:1])}",
        file=sys.stderr,
    )
    if to == "hf":
        made = {"from": str(source)}
        stem = next(iter(families_of(hub)), IDENTITY).stem
        said(output.to_hub(hub_names(source, hub, settings), target, settings, hub, stem, made), settings)
        return 0
    if to == "dcp":
        named, family = hub_names(source, hub, settings), dcp_family(hub)
        if family is None:
            opened = engine.hub(IDENTITY, "model.", hub, named)
        else:
            opened = fitting(family, lambda variant: engine.hub(family, variant, hub, named))
        said(output.to_dcp(opened.source, target, settings), settings)
        return 0
    if kind == "mm":
        opened = changes.without_head(opened_tree(source, hub, settings)[0], known=True)
    else:
        made, named = tree_family(hub), hub_names(source, hub, settings)
        if canonical:
            opened = engine.hub(made, "canonical", hub, named)
        else:
            opened = fitting(made, lambda variant: engine.hub(made, variant, hub, named))
    given = {name: counts(f"--{name}-pp", lists(value)) for name, value in layers.items()}
    if given.get("pp"):
        last = opened.table.towers[-1].name if opened.table.towers else "dit"
        main = next((t.name for t in opened.table.towers if t.name in ("llm", "dit")), last)
        given[main] = given["pp"]
    own_tp = {name: size for name, size in sizes.items() if name in ("vit", "audio") and size}
    parallel = Parallel(sizes["tp"], sizes["ep"], {k: v for k, v in given.items() if v and k != "pp"}, own_tp)
    said(output.to_tree(opened, parallel, target, settings), settings)
    return 0
