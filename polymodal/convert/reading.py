"""Files as plain tensors: safetensors, torch's zip files, and DCP directories.

No value is read here, only where each tensor is stored. Pickles are opened by torch's weights-only reader,
or, when asked for, with inert stand-ins for everything that is no tensor: no code of a file is ever run."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.convert.source import FileTensors, Location, contiguous
from polymodal.core import inert_pickle
from polymodal.core.errors import PolymodalError
from polymodal.distributed.dcp_reader import INDEX, read_metadata
from polymodal.models.slices import Piece, Stored
from polymodal.models.storage import STEMS, Files, dtype_of

AGAIN = "Fetch or copy the file again."
DCP_PREFIX = "model."
"""What the names of a model's tensors begin with in DCP directories."""
HUB_STEMS = (*STEMS, "adapter_model", "pytorch_lora_weights", "ema")


def hub_files(source: Path) -> FileTensors:
    """The tensors of a directory or one file of safetensors."""
    if source.is_file():
        if source.suffix != ".safetensors":
            raise PolymodalError(
                f"{source} is not a safetensors file.", "Give a .safetensors file or a directory with some."
            )
        files = Files(source.parent, (source.stem,))
    else:
        files = Files(source, HUB_STEMS)
    locations: dict[str, Location] = {}
    for path in dict.fromkeys(files.where(key) for key in files.order):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            shape, begin = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            locations[key] = Location(path, begin, shape, contiguous(shape), dtype_of(entry["dtype"]))
    files.close()
    return FileTensors({key: locations[key] for key in files.order})


# ------------------------------------------------------------------------------------------------ torch files


REBUILD = {
    "torch": ("Size", "Tensor"),
    "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor"),
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.nn.parameter": ("Parameter",),
    "collections": ("OrderedDict",),
    "builtins": ("dict", "list", "set", "tuple"),
}
"""What a pickle of tensors needs; everything else becomes inert."""
MINDSPORE = (b"mindspore", b"msadapter", b"mindtorch")


def _known(module: str, name: str) -> Any:
    found = getattr(torch, name, None) if module == "torch" else None
    if isinstance(found, torch.dtype) or (found is not None and name.endswith("Storage")):
        return found
    return getattr(import_module(module), name) if name in REBUILD.get(module, ()) else None


def torch_file(path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """The object in a torch file, its tensors on meta; `location` finds where each is stored.

    Raises PolymodalError for a file that is not torch's zip format, is cut short, or holds objects beyond
    tensors (unless allow_pickle: those come out inert)."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    if module := next((name for name in MINDSPORE if name in head), None):
        raise PolymodalError(
            f"{path} was written by the MindSpore back end ({module.decode()} in its pickle), "
            "whose files torch cannot read.",
            "Convert the hub checkpoint with the torch back end, "
            "or export the run to the hub's format there.",
        )
    if head[:2] != b"PK":
        problem = "is empty" if not head else "is not in torch's zip format"
        raise PolymodalError(
            f"{path} {problem}.",
            "Files of torch before 1.6 must be loaded and saved again once; else fetch it again.",
        )
    try:
        if allow_pickle:
            inert = inert_pickle.pickle_module(_known)
            content = torch.load(path, map_location="meta", weights_only=False, pickle_module=inert)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PolymodalError(
            f"{path} holds more than tensors ({_object_of(str(error))}), "
            "and reading such a pickle can run code.",
            "If you trust it, allow it (--allow-pickle): only its tensors are taken, "
            "the rest is replaced by inert objects.",
        ) from None
    except (RuntimeError, EOFError, OSError, AttributeError, KeyError) as error:
        raise PolymodalError(
            f"{path} is cut short or corrupt ({str(error).strip().splitlines()[0][:120]}).", AGAIN
        ) from None
    if not isinstance(content, dict):
        raise PolymodalError(f"{path} holds a {type(content).__name__}, not a table of tensors.", AGAIN)
    return content


def _object_of(text: str) -> str:
    """What torch's message says it refused."""
    for mark in ("GLOBAL ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return text.split(mark, 1)[1].split(" was")[0].split()[0]
    return text.strip().splitlines()[-1][:100]


def location(path: Path, tensor: Tensor, base: int = 0) -> Location:
    """Where a tensor that was loaded on meta is stored. base: the byte of the file at which its archive
    begins."""
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise PolymodalError(f"{path}: a tensor has no offset in the file.", AGAIN)
    offset = base + begin + tensor.storage_offset() * tensor.element_size()
    return Location(path, offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def locations(path: Path, table: Mapping[str, Any]) -> dict[str, Location]:
    """Where the tensors of a table are stored; it may hold other things: Megatron writes None for states that
    are empty."""
    return {key: location(path, value) for key, value in table.items() if isinstance(value, Tensor)}


def any_file(path: Path, *keys: str, allow_pickle: bool = False) -> FileTensors:
    """The tensors of a directory or file, of safetensors or of torch (there: of the first table under one of
    `keys`)."""
    if path.is_dir() or path.suffix == ".safetensors":
        return hub_files(path)
    if not path.is_file():
        raise PolymodalError(f"{path} does not exist.", "Give a directory or file of weights.")
    content = torch_file(path, allow_pickle)
    inner = (content[key] for key in keys if isinstance(content.get(key), Mapping) and content[key])
    return FileTensors(locations(path, next(inner, content)))


# -------------------------------------------------------------------------------------------------------- DCP


def is_dcp(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def dcp(directory: Path) -> tuple[FileTensors, dict[str, Stored]]:
    """(the chunks of a DCP directory, each tensor by its name in terms of the chunks)."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata, index = read_metadata(directory), directory / INDEX
    stored_at = {(one.fqn, tuple(one.offset or ())): info for one, info in metadata.storage_data.items()}
    chunks: dict[str, Location] = {}
    layout: dict[str, Stored] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        pieces = []
        for number, chunk in enumerate(entry.chunks):
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            info = stored_at.get((name, offsets)) or stored_at.get((name, ()))
            if info is None:
                raise PolymodalError(f"{index} does not say where a part of {name} is stored.", AGAIN)
            path, label, rank = directory / info.relative_path, f"{name}@{number}", len(sizes)
            chunks[label] = _chunk(path, info, name)
            if chunks[label].shape != sizes:
                raise PolymodalError(f"{path}: {name} is not of the shape in .metadata.", AGAIN)
            pieces.append(Piece(label, (0,) * rank, offsets, sizes, tuple(range(rank))))
        layout[name] = Stored(tuple(entry.size), pieces)
    return FileTensors(chunks), layout


def _chunk(path: Path, info: Any, name: str) -> Location:
    from torch.distributed.checkpoint.utils import _create_file_view

    try:
        with open(path, "rb") as file:
            file.seek(info.offset)
            if file.read(2) != b"PK":
                raise PolymodalError(
                    f"{path}: {name} is not stored as torch stores tensors.",
                    "Save it again with torch's DCP.",
                )
            view: Any = _create_file_view(file, info.offset, info.length)
            tensor = torch.load(view, map_location="meta", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise PolymodalError(
            f"{path}: {name} cannot be read ({str(error).strip().splitlines()[0]}).", AGAIN
        ) from None
    return location(path, tensor, info.offset)
