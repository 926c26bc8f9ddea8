"""DCP directories out, by torch's own writer, one tensor in memory at a time.

The state that is saved is on meta; a planner gives the writer each tensor's values when it asks for them.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as save_state
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from polymodal.convert.reading import DCP_PREFIX
from polymodal.convert.source import Source, values
from polymodal.convert.tree import VERSION


class _Lazy(DefaultSavePlanner):
    """Takes the values of tensors from a source instead of the state."""

    def __init__(self, source: Source):
        super().__init__(dedup_save_to_lowest_rank=True)
        self.source = source

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        if name.startswith(DCP_PREFIX):
            return values(self.source, name.removeprefix(DCP_PREFIX))
        return super().resolve_data(write_item)


def save(source: Source, directory: Path, threads: int) -> None:
    """Write every tensor of a source, and the version that Megatron looks for."""
    state: dict[str, Any] = {
        DCP_PREFIX + key: torch.empty(shape, dtype=source.dtypes[key], device="meta")
        for key, shape in source.shapes.items()
    }
    state["checkpoint_version"] = VERSION
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=False, thread_count=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_state(state, storage_writer=writer, planner=_Lazy(source), no_dist=True)
