"""Hub checkpoints written from whole tensors, with the source's own keys and layout.

What every file holds follows from names and shapes before a value is read (`outputs`), so each of several
processes writes files of its own (`write`), and one file's tensors are the most that a process holds. The
directory gets its name when everything in it is written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import require_finite
from polymodal.core.text import nearest
from polymodal.models import catalog, library
from polymodal.models.family import Family
from polymodal.models.library import Layout, plain
from polymodal.models.slices import Piece
from polymodal.models.storage import Files, dtype_of, to_publish, write_file

KEPT_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.py", "LICENSE*"),
    "additional_chat_templates/*",
)
"""What is copied from the source beside weights and config.json: tokenizer, processors, templates, code."""
CONVERTED_FILES = ("generation_config.json", "LICENSE*")
"""The same where all else is written in another layout than the source's."""
LEFT_FILES = ("config.json", "*.index.json", "adapter_config.json", "trainer_state.json")


@contextmanager
def appearing(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that gets the name `final` at the end, and is removed after a failure.

    Raises PolymodalError when `final` has files (unless overwrite), and for a full or read-only disk.
    """
    if final.exists() and not (final.is_dir() and (overwrite or not any(final.iterdir()))):
        raise PolymodalError(f"{final} exists already.", "Choose another directory, or remove it.")
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _swap(partial, final)
    except OSError as error:
        raise PolymodalError(
            f"{final} could not be written: {error.strerror or error}.",
            "Free space there, or choose another directory.",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Together:
    """`appearing` for all processes of a group, on a disk that they share (None: for this process alone).

    All write into `directory`; rank 0 gives it its name. The only collective is at the start: ranks that have
    written leave a file in the directory for rank 0 (`wait`), since a collective would time out.
    """

    def __init__(self, final: Path, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self.directory = final.with_name(f".{final.name}.partial")
        self._final = appearing(final, overwrite=True)

    def __enter__(self) -> Together:
        if self.rank == 0:
            self._final.__enter__()
        if self.group is not None:
            dist.barrier(self.group)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.rank == 0:
            self._final.__exit__(kind, error, trace)
            return
        result = self.directory / f".rank-{self.rank}"
        with suppress(OSError):  # rank 0 has failed, and the directory is gone
            unnamed = result.with_suffix(".part")
            unnamed.write_text("" if error is None else f"{error}" or type(error).__name__)
            unnamed.replace(result)

    def wait(self) -> None:
        """On rank 0: until every other rank has left `with Together`. Raises when one failed."""
        waiting = {rank: self.directory / f".rank-{rank}" for rank in range(1, self.world)}
        while waiting:
            for rank, result in [(rank, result) for rank, result in waiting.items() if result.exists()]:
                error = result.read_text()
                if error:
                    raise PolymodalError(f"Rank {rank}: {error}")
                waiting.pop(rank).unlink()
            if waiting:
                time.sleep(0.1)


def _swap(partial: Path, final: Path) -> None:
    """Give `partial` its name; what had it before goes only when that worked."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy_files(origin: Path, directory: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in sorted(origin.glob(pattern)):
            name = path.relative_to(origin)
            if path.is_file() and not any(fnmatchcase(str(name), left) for left in LEFT_FILES):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(to_publish(origin, path), directory / name)


def _file_layout(
    model: nn.Module, origin: Path | None, rules: list[Any] | None
) -> tuple[Layout, dict[str, tuple[int, ...]], dict[str, str]]:
    """(layout, shape of each file key, dtype of the source's keys): the source's, else the library's.

    rules: of the source's layout (Family.tensor_names).
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    if origin is not None and any(origin.glob("*.safetensors")):
        files = Files(origin)
        shapes, dtypes = files.shapes, files.dtypes
    plan = library.layout(model, shapes, rules)
    own = library.targets(model)
    fits = {n: s for n, s in plan.entries.items() if s.complete and s.shape == own[n].shape}
    rest = {
        names[0]: torch.empty(tensor.shape, device="meta")
        for tensor, names in library.aliases(model)
        if not fits.keys() & set(names)
    }
    fresh = library.reverted(model, rest, rules) if rest else {}
    made = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    more = library.layout(model, made, rules)
    shapes = {key: shapes[key] for stored in fits.values() for key in stored.keys} | made
    return Layout({**fits, **more.entries}), shapes, dtypes


@dataclass
class Output:
    """A tensor of the files to be written: (parameter name, its box) for all boxes that it is made of; none
    where it is a copy of the source's."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[str, Piece]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def outputs(model: nn.Module, origin: Path | None, dtype: torch.dtype | None) -> list[Output]:
    """Every tensor of the files, in the order in which the model's parameters complete them.

    model:  for names, shapes and dtypes; may be on meta or sharded.
    origin: the checkpoint whose keys, layout and few float32 tensors are kept, and the tensors beside the
    model (Family.beside); None: the library's.
    """
    reader = Family if origin is None else catalog.reader(origin)
    rules = None if origin is None else reader.tensor_names(origin)
    plan, shapes, stored_as = _file_layout(model, origin, rules)
    usual = next((dtype for dtype, _ in Counter(stored_as.values()).most_common(1)), None)

    def kind(key: str, own: torch.dtype) -> torch.dtype:
        if dtype is None or not own.is_floating_point:
            return own
        return torch.float32 if stored_as.get(key) == "F32" != usual else dtype

    made: list[Output] = []
    begun: dict[str, Output] = {}
    missing: dict[str, int] = {}  # elements
    for tensor, names in library.aliases(model):
        for name in (name for name in names if name in plan.entries):
            for piece in plan.entries[name].pieces:
                key, shape = piece.key, shapes[piece.key]
                out = begun.setdefault(key, Output(key, shape, kind(key, tensor.dtype)))
                out.pieces.append((names[0], piece))
                missing[key] = missing.get(key, prod(shape)) - prod(piece.size)
                if missing[key] == 0:
                    made.append(out)
    if origin is not None and reader.beside and any(origin.glob("*.safetensors")):
        files = Files(origin)
        for key in (key for key in files.shapes if key.startswith(reader.beside)):
            made.append(Output(key, files.shapes[key], dtype_of(files.dtypes[key])))
    return made


def write(
    state: Mapping[str, Tensor],
    model: nn.Module,
    made: list[Output],
    directory: Path,
    limit: int,
    *,
    stem: str = "model",
    rank: int = 0,
    world: int = 1,
    origin: Path | None = None,
) -> None:
    """Write this process's share of a model's files, of at most `limit` bytes each; rank 0 also the index.

    origin: where tensors are copied from that are no parameters (`outputs`).
    state: whole tensors by plain parameter name; every tensor is read once for each file that has a part of
    it. Raises PolymodalError when names or shapes are not the model's, and for a full disk.
    """
    aliases = library.aliases(model)
    known = {name: names[0] for _, names in aliases for name in names}
    shapes = {names[0]: tuple(tensor.shape) for tensor, names in aliases}
    held = {known[name]: name for name in map(plain, state) if name in known}
    strange = next((name for name in state if plain(name) not in known), None)
    if strange is not None:
        raise PolymodalError(
            f"The state has {strange}, which {library.class_of(model).__name__} does not.",
            f"Nearest: {', '.join(nearest(strange, known, most=2)) or 'none'}.",
        )
    lost = sorted({name for out in made for name, _ in out.pieces} - set(held))
    if lost:
        raise PolymodalError(
            f"The state lacks {len(lost)} parameters: {', '.join(lost[:4])}.",
            "Give the whole state of the model.",
        )

    def value(name: str) -> Tensor:
        tensor = state[held[name]]
        if tuple(tensor.shape) != shapes[name]:
            raise PolymodalError(
                f"{name} is {list(tensor.shape)} in the state, {list(shapes[name])} in the model.",
                "Give the model.config that the state was trained with.",
            )
        hint = "The run had diverged: take an earlier checkpoint."
        require_finite([(name, tensor)], "the state", hint, infinite=True)
        return tensor

    by_key = {out.key: out for out in made}
    split = split_state_dict_into_shards_factory(
        by_key,
        get_storage_size=lambda out: out.nbytes,
        get_storage_id=lambda out: None,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=limit,
    )
    for name, keys in list(split.filename_to_tensors.items())[rank::world]:
        write_file(_values([by_key[key] for key in keys], value, origin), directory / name)
    if rank == 0 and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _values(
    file: list[Output], value: Callable[[str], Tensor], origin: Path | None = None
) -> dict[str, Tensor]:
    """The tensors of one file, in their own memory; one parameter at a time is held beside them."""
    tensors = {out.key: torch.empty(out.shape, dtype=out.dtype) for out in file if out.pieces}
    copied = [out.key for out in file if not out.pieces]
    if copied and origin is not None:
        files = Files(origin)
        tensors |= {key: files.whole(key) for key in copied}
    boxes: dict[str, list[tuple[str, Piece]]] = {}
    for out in file:
        for name, piece in out.pieces:
            boxes.setdefault(name, []).append((out.key, piece))
    for name, pieces in boxes.items():
        whole = value(name)
        for key, piece in pieces:
            tensors[key][piece.box].copy_(piece.view(whole))
    return tensors


def write_config(
    model: nn.Module, config: Any, origin: Path, directory: Path, made: list[Output], convert: bool = False
) -> None:
    """config.json and all other files beside the weights: copied from `origin`, in its layout.

    convert: in the library's layout whatever the source's; tokenizer and processor are written anew.
    """
    reader = catalog.reader(origin)
    if convert:
        reader.read_processor(origin).save_pretrained(str(directory))
    _copy_files(origin, directory, CONVERTED_FILES if convert else (*KEPT_FILES, *reader.beside_files))
    config = deepcopy(config)
    sizes: Counter[torch.dtype] = Counter()
    for out in made:
        sizes[out.dtype] += out.nbytes if out.pieces else 0
    largest = next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), None)
    if largest is not None:
        for part in [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]:
            if part is not None:
                part.dtype = str(largest).removeprefix("torch.")
    config.architectures = [library.class_of(model).__name__]
    (Family if convert else reader).write_config(config, origin, directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not (directory / "generation_config.json").is_file():
        generation.save_pretrained(str(directory))
