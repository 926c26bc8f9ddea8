"""Weights out of a model: whole tensors, one at a time, into a hub checkpoint with the source's own keys and layout.

Sees errors and models/. What goes out is a stream, so that no more than one shard of the files is ever held; the
directory appears under its name when everything in it is written. Called through weights.py.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest
from polymodal.models import library
from polymodal.models.family import Family
from polymodal.models.library import Layout, plain
from polymodal.models.slices import Stored
from polymodal.models.storage import Files, ShardWriter

KEPT_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.py",
    "LICENSE*",
    "additional_chat_templates/*",
)
"""What is taken over from the source beside weights and config.json: tokenizer, processors, templates, code."""
LEFT_FILES = ("config.json", "*.index.json", "adapter_config.json", "trainer_state.json")


def gather(source: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(plain name, whole tensor) of each parameter and persistent buffer, one at a time, without adapters.

    Collective: every rank goes through all of it. Rank 0 gets CPU tensors; the others get an empty one to pass over.
    source: a model, or tensors by parameter name (an average of the weights).
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if isinstance(source, nn.Module):
        items = {names[0]: tensor for tensor, names in library.aliases(source)}
    else:
        items = {plain(name): tensor for name, tensor in source.items() if not library.ADAPTER.search(name)}
    for name, tensor in items.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.cpu() if first else torch.empty(0)


def save(
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    family: Family | None,
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> Path:
    """Write a full state as a hub checkpoint with the source's keys and layout, or the library's where it has none.

    state:  whole tensors by parameter name, a mapping or a stream (gather, read, lora.merged): one shard is held.
    family: gives model (on meta) and source; either may be given by itself.
    dtype:  of floating tensors; None: as they come. What the source alone keeps in float32 stays float32.
    Of several processes only rank 0 writes, the others go through `state`. The directory appears when it is whole.
    Raises PolymodalError for a directory that is in use, a full disk, and states that lack or exceed the model's names.
    """
    final = Path(directory)
    pairs = iter(state.items() if isinstance(state, Mapping) else state)
    if dist.is_initialized() and dist.get_rank() > 0:
        for _ in pairs:
            pass
        return final
    try:
        with appearing(final, overwrite) as partial:
            origin = Path(source if source is not None else family.source)  # type: ignore[union-attr]
            if origin.resolve() == final.resolve():
                raise PolymodalError(
                    f"{final} is the checkpoint that the model came from.", "Choose another directory."
                )
            if model is None:
                model = family.build().trained  # type: ignore[union-attr]
            config = deepcopy(family.config if family is not None else model.config)
            _copy_files(origin, partial)
            _write(pairs, model, origin, partial, config, dtype, max_shard_bytes)
    finally:
        for _ in pairs:  # a stream may be collective: the other ranks go through all of it
            pass
    return final


@contextmanager
def appearing(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to write into that gets the name `final` when the block ends well, and is gone when it does not.

    Raises PolymodalError when `final` has files (unless overwrite), and for a disk that is full or not writable.
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


def _copy_files(origin: Path, directory: Path) -> None:
    for pattern in KEPT_FILES:
        for path in sorted(origin.glob(pattern)):
            name = path.relative_to(origin)
            if path.is_file() and not any(fnmatchcase(str(name), left) for left in LEFT_FILES):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / name)


def _file_layout(model: nn.Module, origin: Path) -> tuple[Layout, dict[str, tuple[int, ...]], dict[str, str]]:
    """(layout, shape of each file key, dtype of the keys that the source has): the source's, else the library's."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    if any(origin.glob("*.safetensors")):
        files = Files(origin)
        shapes, dtypes = files.shapes, files.dtypes
    plan = library.layout(model, shapes)
    wanted = library.targets(model)
    fits = {n: s for n, s in plan.entries.items() if s.complete and tuple(s.shape) == tuple(wanted[n].shape)}
    computed = [
        one for one in plan.computed if all(tuple(wanted[n].shape) == tuple(s) for n, s in one.shapes.items())
    ]
    have = {*fits, *(n for one in computed for n in one.shapes)}
    rest = {
        names[0]: torch.empty(tensor.shape, device="meta")
        for tensor, names in library.aliases(model)
        if not have & set(names)
    }
    made = {key: tuple(tensor.shape) for key, tensor in library.reverted(model, rest).items()} if rest else {}
    more = library.layout(model, made)
    shapes = {key: shapes[key] for stored in fits.values() for key in stored.keys} | made
    return Layout({**fits, **more.entries}, computed + more.computed), shapes, dtypes


def _write(
    pairs: Iterator[tuple[str, Tensor]],
    model: nn.Module,
    origin: Path,
    directory: Path,
    config: Any,
    dtype: torch.dtype | None,
    limit: int,
) -> None:
    plan, shapes, stored_as = _file_layout(model, origin)
    common = Counter(stored_as.values()).most_common(1)
    usual = common[0][0] if common else None
    writer = ShardWriter(directory, limit)
    bytes_by_dtype: Counter[torch.dtype] = Counter()

    def put(key: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and dtype is not None:
            kept = stored_as.get(key) == "F32" != usual
            tensor = tensor.to(torch.float32 if kept else dtype)
        bytes_by_dtype[tensor.dtype] += tensor.numel() * tensor.element_size()
        tensor = tensor.contiguous()
        alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        writer.add(key, tensor if alone else tensor.clone())

    open_keys: dict[str, tuple[Tensor, int]] = {}  # file tensors that several parameters fill

    def split(stored: Stored, tensor: Tensor) -> None:
        for piece in stored.pieces:
            view = piece.view(tensor)
            if tuple(view.shape) == shapes[piece.key]:
                put(piece.key, view)
                continue
            whole, missing = open_keys.pop(piece.key, (None, 0))
            if whole is None:
                whole = torch.empty(shapes[piece.key], dtype=tensor.dtype)
                missing = whole.numel()
            whole[piece.box].copy_(view)
            if missing == view.numel():
                put(piece.key, whole)
            else:
                open_keys[piece.key] = (whole, missing - view.numel())

    names_of = {name: names for _, names in library.aliases(model) for name in names}
    waiting = {name: one for one in plan.computed for name in one.shapes}
    collected: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, tensor in pairs:
        name = plain(name)
        if name not in names_of:
            raise PolymodalError(
                f"The state has {name}, which {library.class_of(model).__name__} does not.",
                f"Nearest: {', '.join(nearest(name, names_of, most=2)) or 'none'}.",
            )
        for alias in [n for n in names_of[name] if n not in seen]:
            seen.add(alias)
            if plan.shape(alias) not in (None, tuple(tensor.shape)):
                raise PolymodalError(
                    f"{alias} is {list(tensor.shape)} in the state, {list(plan.shape(alias) or ())} in the model."
                )
            if alias in plan.entries:  # a tied weight that the files hold twice: no memory may be shared
                split(plan.entries[alias], tensor if alias == name else tensor.clone())
            elif alias in waiting:
                collected[alias] = tensor
                group = waiting[alias].shapes
                if all(n in collected for n in group):
                    for key, value in library.reverted(model, {n: collected.pop(n) for n in group}).items():
                        put(key, value)
    lost = [n for n in [*plan.entries, *waiting] if n not in seen]
    if lost:
        raise PolymodalError(
            f"The state lacks {len(lost)} parameters: {', '.join(lost[:4])}.",
            "Give the whole state of the model.",
        )
    writer.finish()
    _write_config(model, config, directory, bytes_by_dtype)


def _write_config(
    model: nn.Module, config: Any, directory: Path, bytes_by_dtype: Counter[torch.dtype]
) -> None:
    floats = [(d, n) for d, n in bytes_by_dtype.most_common() if d.is_floating_point]
    if floats:
        name = str(floats[0][0]).removeprefix("torch.")
        for part in [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]:
            if part is not None:
                part.dtype = name
    config.architectures = [library.class_of(model).__name__]
    config.save_pretrained(str(directory))
    generation = getattr(model, "generation_config", None)
    if generation is not None and not (directory / "generation_config.json").is_file():
        generation.save_pretrained(str(directory))
