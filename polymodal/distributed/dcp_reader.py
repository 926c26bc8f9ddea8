"""DCP directories read as data: their index, `.metadata`, is a pickle whose code torch's reader would run.

`read_metadata` rebuilds the index from inert records, each part checked for its type; `Reader` gives it to
torch's loader. Everything that opens a DCP directory (training, export, conversion) goes through one of the
two.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from polymodal.core.errors import PolymodalError
from polymodal.core.inert_pickle import Inert, unpickler

INDEX = ".metadata"


def _known(module: str, name: str) -> Any:
    """dtypes and sizes, which are harmless values."""
    value = getattr(torch, name, None) if module == "torch" else None
    return value if value is torch.Size or isinstance(value, torch.dtype) else None


def read_metadata(directory: str | os.PathLike, name: str = INDEX) -> Metadata:
    """The index of a DCP directory: tensors with their chunks, and their files. No code of it is run.

    Raises PolymodalError for a file that is no such index, or that names files outside of the directory.
    """
    path = Path(directory) / name
    try:
        with open(path, "rb") as file:
            index = _fields(unpickler(_known)(file).load(), "Metadata")
        table = {_typed(key, str): _entry(entry) for key, entry in index["state_dict_metadata"].items()}
        places = dict(map(_place, index["storage_data"].items()))
    except OSError as error:
        raise PolymodalError(f"{path} cannot be read: {error.strerror}.", _HINT) from None
    except Exception as error:  # a pickle can fail in any way
        raise PolymodalError(
            f"{path} is not the index of a DCP checkpoint ({type(error).__name__}: {str(error)[:200]}).",
            _HINT,
        ) from None
    return Metadata(table, None, places, StorageMeta(), index.get("version"))


_HINT = "Take another checkpoint, or fetch or copy this one again."


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    if type(record).__name__ != kind:
        raise ValueError(f"a {kind} was expected, not {_type_name(record)}")
    state = _typed(record, Inert).state
    return state if isinstance(state, Mapping) else {}


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {kind.__name__} was expected, not {_type_name(value)}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a number of bytes was expected, not {value!r:.40}")
    return value


def _entry(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(entry, Inert) and type(entry).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(entry, "TensorStorageMetadata")
    dtype = _typed(_typed(_typed(fields["properties"], Inert).state, tuple)[0], torch.dtype)
    pieces = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [
        ChunkStorageMetadata(_typed(piece["offsets"], torch.Size), _typed(piece["sizes"], torch.Size))
        for piece in pieces
    ]
    return TensorStorageMetadata(TensorProperties(dtype), _typed(fields["size"], torch.Size), chunks)


def _place(item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    where, info = _fields(item[0], "MetadataIndex"), _fields(item[1], "_StorageInfo")
    offset = where.get("offset")
    file = _typed(info["relative_path"], str)
    if os.path.isabs(file) or ".." in Path(file).parts:
        raise ValueError(f"{file} is outside of the directory")
    if offset is not None:
        _typed(offset, torch.Size)
    transforms = [_typed(each, str) for each in info.get("transform_descriptors") or ()] or None
    return (
        MetadataIndex(_typed(where["fqn"], str), offset, where.get("index")),
        _StorageInfo(file, _count(info["offset"]), _count(info["length"]), transforms),
    )


class Reader(dcp.FileSystemReader):
    """torch's reader over an index that was read as data, once: it grows with the model.

    It has tensors only: torch unpickles whatever an index calls bytes, under a tensor's name too.
    files: what is known of the files (dcp_writer.StoredFile); pieces are compared with it as they are read.
    """

    def __init__(self, path: str | os.PathLike, files: Mapping[str, Any] | None = None):
        super().__init__(path)
        self.files = files or {}
        if INDEX in self.files:
            file = Path(path) / INDEX
            try:
                with open(file, "rb") as stream:
                    self._verify(stream, INDEX, 0)
            except OSError as error:
                raise PolymodalError(f"{file} cannot be read: {error.strerror}.", _HINT) from None
        self.metadata = read_metadata(path)
        table = self.metadata.state_dict_metadata
        self.tensors = {k: v for k, v in table.items() if isinstance(v, TensorStorageMetadata)}
        self.metadata.state_dict_metadata = dict(self.tensors)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def extents(self) -> dict[str, int]:
        """The least size of each file, as the index has it."""
        sizes: dict[str, int] = {}
        for place in self.metadata.storage_data.values():
            end = place.offset + place.length
            sizes[place.relative_path] = max(end, sizes.get(place.relative_path, 0))
        return sizes

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        piece = super()._slice_file(file, sinfo)
        self._verify(piece, sinfo.relative_path, sinfo.offset)
        piece.seek(0)
        return piece

    def _verify(self, piece: IO[bytes], name: str, offset: int) -> None:
        """Raise PolymodalError where bytes are not those that were written."""
        known = self.files[name].crc32.get(str(offset)) if name in self.files else None
        if known is None:
            return
        found = 0
        while block := piece.read(1 << 20):
            found = zlib.crc32(block, found)
        if found != known:
            raise PolymodalError(
                f"{Path(self.path) / name} has changed since it was written: the checksum of what begins at "
                f"byte {offset:,} differs",
                _HINT,
            )
