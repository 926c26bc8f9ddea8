"""torch's writer of DCP directories, which takes checksums of what it writes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch.distributed.checkpoint as dcp
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from polymodal.distributed.dcp_reader import INDEX


@dataclass
class StoredFile:
    """A file as it was written. crc32: of each piece (part of a tensor), by the byte that it begins at."""

    size: Annotated[int, Field(ge=0)] = 0
    crc32: dict[str, int] = Field(default_factory=dict)


class _Sums(_StorageWriterTransforms):
    """Sees every piece on its way into a file."""

    def __init__(self) -> None:
        super().__init__()
        self.crc32: dict[Any, int] = {}

    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> Any:
        stream, descriptors = super().transform_save_stream(write_item, raw_stream)
        write, sums, index = stream.write, self.crc32, write_item.index
        sums[index] = 0

        def summed(data: Any) -> int:
            sums[index] = zlib.crc32(data, sums[index])
            return write(data)

        stream.write = summed  # type: ignore[method-assign]
        return stream, descriptors


class Writer(dcp.FileSystemWriter):
    """finish(files): called on the rank that writes the index, once all files are there.

    on_host: all tensors are on the host already. torch's writer then touches no stream of an accelerator,
    which in a background thread would be one of device 0, with a context there of every rank.
    """

    def __init__(self, path: Path, finished: Callable[[dict[str, StoredFile]], None], on_host: bool):
        super().__init__(path, **({"per_thread_copy_ahead": 0} if on_host else {}))
        self.transforms: _Sums = _Sums()
        self.finished = finished

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch's, about its position in a file that could not be written
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None
        for result in written.value():
            vars(result.storage_data)["crc32"] = self.transforms.crc32[result.index]
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, StoredFile] = {}
        for result in chain.from_iterable(results):
            piece = result.storage_data
            file = files.setdefault(piece.relative_path, StoredFile())
            file.crc32[str(piece.offset)] = vars(piece).pop("crc32")
            file.size = max(file.size, piece.offset + piece.length)
        super().finish(metadata, results)
        index = (Path(self.path) / INDEX).read_bytes()
        self.finished(files | {INDEX: StoredFile(len(index), {"0": zlib.crc32(index)})})
