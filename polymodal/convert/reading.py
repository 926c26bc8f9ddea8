"""What lies on disk, as plain tensors: safetensors, torch's zip files, and DCP directories.

No value is read here, only where each tensor lies; pickles are opened by torch's weights-only reader, or, when asked
for, with inert stand-ins for everything that is no tensor: no code of a file is ever run. Sees models/storage.py.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.convert.source import Flat, Place, dense
from polymodal.core import inert_pickle
from polymodal.core.errors import PolymodalError
from polymodal.distributed.dcp_reader import INDEX, read_metadata
from polymodal.models.slices import Stored
from polymodal.models.storage import STEMS, Files, dtype_of

AGAIN = "Fetch or copy the file again."


# ------------------------------------------------------------------------------------------------------- safetensors


def hub_files(
    source: Path, stems: tuple[str, ...] = (*STEMS, "adapter_model", "pytorch_lora_weights", "ema")
) -> tuple[Flat, dict[str, str]]:
    """(tensors, file name of each) of a directory or one file of safetensors."""
    if source.is_file():
        if source.suffix != ".safetensors":
            raise PolymodalError(
                f"{source} is not a safetensors file.", "Give a .safetensors file or a directory with some."
            )
        files = Files(source.parent, (source.stem,))
    else:
        files = Files(source, stems)
    homes = {key: files.where(key) for key in files.order}
    files.close()
    places: dict[str, Place] = {}
    for path in dict.fromkeys(homes.values()):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                shape = tuple(entry["shape"])
                begin = 8 + length + entry["data_offsets"][0]
                places[key] = Place(path, begin, shape, dense(shape), dtype_of(entry["dtype"]))
    return Flat({key: places[key] for key in homes}), {key: path.name for key, path in homes.items()}


# --------------------------------------------------------------------------------------------------------- torch files


REBUILD = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"), ("collections", "OrderedDict"), ("builtins", "dict"), ("builtins", "list"),
    ("builtins", "set"), ("builtins", "tuple"),
}  # fmt: skip
"""What a pickle of tensors needs; everything else becomes inert."""


def _known(module: str, name: str) -> Any:
    found = getattr(torch, name, None) if module == "torch" else None
    if isinstance(found, torch.dtype) or (found is not None and name.endswith("Storage")):
        return found
    return getattr(import_module(module), name) if (module, name) in REBUILD else None


def torch_file(path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """The object in a torch file, its tensors on meta; `place` tells where each lies.

    Raises PolymodalError for a file that is not torch's zip format, is cut short, or holds objects beyond tensors
    (unless allow_pickle: those come out inert).
    """
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    if found := next((name for name in (b"mindspore", b"msadapter", b"mindtorch") if name in head), None):
        raise PolymodalError(
            f"{path} was written by the MindSpore back end ({found.decode()} in its pickle), whose files torch cannot read.",
            "Convert the hub checkpoint with the torch back end, or export the run to the hub's format there.",
        )
    if head[:2] != b"PK":
        what = "is empty" if not head else "is not in torch's zip format"
        raise PolymodalError(
            f"{path} {what}.",
            "Files of torch before 1.6 must be loaded and saved again once; else fetch it again.",
        )
    try:
        if allow_pickle:
            made = torch.load(
                path,
                map_location="meta",
                weights_only=False,
                pickle_module=inert_pickle.pickle_module(_known),
            )
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                made = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        raise PolymodalError(
            f"{path} holds more than tensors ({reason}), and reading such a pickle can run code.",
            "If you trust it, allow it (--allow-pickle): only its tensors are taken, the rest is replaced by inert objects.",
        ) from None
    except (RuntimeError, EOFError, OSError, AttributeError, KeyError) as error:
        raise PolymodalError(
            f"{path} is cut short or corrupt ({str(error).strip().splitlines()[0][:120]}).", AGAIN
        ) from None
    if not isinstance(made, dict):
        raise PolymodalError(f"{path} holds a {type(made).__name__}, not a table of tensors.", AGAIN)
    return made


def _reason(text: str) -> str:
    for mark in ("GLOBAL ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return text.split(mark, 1)[1].split(" was")[0].split()[0]
    return text.strip().splitlines()[-1][:100]


def place(path: Path, tensor: Tensor, base: int = 0) -> Place:
    """Where a tensor that came on meta lies. base: where in the file its archive begins."""
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise PolymodalError(f"{path}: a tensor has no place in the file.", AGAIN)
    size = tensor.element_size()
    return Place(
        path,
        base + begin + tensor.storage_offset() * size,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def torch_tensors(path: Path, *keys: str, allow_pickle: bool = False) -> Flat:
    """The tensors of a torch file that is one table, or of the table that lies in it under the first of `keys`."""
    table: Any = torch_file(path, allow_pickle)
    for key in keys:
        if isinstance(table.get(key), Mapping) and table[key]:
            table = table[key]
            break
    return Flat({name: place(path, value) for name, value in table.items() if isinstance(value, Tensor)})


def any_file(path: Path, *keys: str, allow_pickle: bool = False) -> Flat:
    """The tensors of a directory or file, of safetensors or of torch (there: of the table under one of `keys`)."""
    if path.is_dir() or path.suffix == ".safetensors":
        return hub_files(path)[0]
    if not path.is_file():
        raise PolymodalError(f"{path} does not exist.", "Give a directory or file of weights.")
    return torch_tensors(path, *keys, allow_pickle=allow_pickle)


# -------------------------------------------------------------------------------------------------------------- DCP


def is_dcp(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def dcp(directory: Path) -> tuple[Flat, dict[str, Stored]]:
    """(the chunks of a DCP directory, each tensor by its name in terms of the chunks)."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = read_metadata(directory)
    path, table = directory / INDEX, metadata.state_dict_metadata
    where = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    places: dict[str, Place] = {}
    layout: dict[str, Stored] = {}
    for name, entry in table.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        pieces = []
        for number, chunk in enumerate(entry.chunks):
            info = where.get((name, tuple(chunk.offsets))) or where.get((name, ()))
            if info is None:
                raise PolymodalError(f"{path} does not say where a part of {name} lies.", AGAIN)
            label = f"{name}@{number}"
            places[label] = _chunk(directory / info.relative_path, info, name)
            if places[label].shape != tuple(chunk.sizes):
                raise PolymodalError(
                    f"{directory / info.relative_path}: {name} is not of the shape in .metadata.", AGAIN
                )
            stored = Stored.whole(label, chunk.sizes)
            for dim, begin in enumerate(chunk.offsets):
                stored = _shifted(stored, dim, begin)
            pieces += stored.pieces
        layout[name] = Stored(tuple(entry.size), pieces)
    return Flat(places), layout


def _shifted(stored: Stored, dim: int, begin: int) -> Stored:
    from dataclasses import replace

    moved = [
        replace(p, offset=(*p.offset[:dim], p.offset[dim] + begin, *p.offset[dim + 1 :]))
        for p in stored.pieces
    ]
    return Stored(stored.shape, moved)


def _chunk(path: Path, info: Any, name: str) -> Place:
    try:
        with open(path, "rb") as file:
            file.seek(info.offset)
            if file.read(2) != b"PK":
                raise PolymodalError(
                    f"{path}: {name} is not stored as torch stores tensors.",
                    "Save it again with torch's DCP.",
                )
            tensor = torch.load(
                _Window(file, info.offset, info.length), map_location="meta", weights_only=True
            )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PolymodalError(
            f"{path}: {name} cannot be read ({str(error).strip().splitlines()[0]}).", AGAIN
        ) from None
    return place(path, tensor, info.offset)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, begin: int, length: int):
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def readinto(self, into: Any) -> int:
        self.file.seek(self.begin + self.at)
        data = self.file.read(min(len(into), self.length - self.at))
        into[: len(data)] = data
        self.at += len(data)
        return len(data)


def iterate(table: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a table that may hold other things: Megatron writes None for states that are empty."""
    for name, value in table.items():
        if isinstance(value, Tensor):
            yield name, value
