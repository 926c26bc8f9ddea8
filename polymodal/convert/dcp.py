"""DCP directories out, by torch's own writer, one tensor in memory at a time.

The state that is saved is on meta; a planner hands the writer each tensor's values when it asks for them.
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

from polymodal.convert.source import Source, whole
from polymodal.convert.tree import VERSION


class _Lazy(DefaultSavePlanner):
    """Resolves tensors from a source instead of from the state."""

    def __init__(self, source: Source, prefix: str):
        super().__init__(dedup_save_to_lowest_rank=True)
        self.source, self.prefix = source, prefix

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        key = name.removeprefix(self.prefix)
        if not name.startswith(self.prefix) or key not in self.source.shapes:
            return super().resolve_data(write_item)
        values = torch.empty(self.source.shapes[key], dtype=self.source.dtypes[key])
        self.source.read(key, whole(values.shape), values)
        return values


def save(source: Source, directory: Path, prefix: str, threads: int) -> None:
    """Write every tensor of a source under `prefix` + its name, and the version that Megatron looks for."""
    state: dict[str, Any] = {
        prefix + key: torch.empty(shape, dtype=source.dtypes[key], device="meta")
        for key, shape in source.shapes.items()
    }
    state["checkpoint_version"] = VERSION
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_state(
            state,
            storage_writer=FileSystemWriter(
                directory, single_file_per_rank=True, sync_files=False, thread_count=threads
            ),
            planner=_Lazy(source, prefix),
            no_dist=True,
        )
