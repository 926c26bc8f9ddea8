"""Sequence parallelism inside a tensor-parallel group: the residual stream and its norms are cut along the sequence.

This room knows how a stream (a tower's hidden states [..., T, D]) is entered, crossed and left; it sees ops.py only.
Lengths are arbitrary: every rank holds ceil(T / size) rows, zeros after the last; T is trimmed to wherever rows meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from polymodal.parallel import ops


@dataclass
class Stream:
    """One tower's residual stream. With `sequence` it is cut over the group, without it every rank holds it whole.

    length: rows of the whole stream in the forward that is running (recompute sets it again, block by block).
    """

    group: dist.ProcessGroup
    sequence: bool
    length: int = 0

    def cut(self, hidden: Tensor) -> Tensor:
        """Whole [..., T, D] -> what a rank carries from block to block."""
        self.length = hidden.shape[-2]
        return ops.cut_sequence(hidden, self.group) if self.sequence else hidden

    def enter(self, hidden: Tensor) -> Tensor:
        """Stream -> whole input of a region, whose gradients are partial."""
        if self.sequence:
            return ops.gather_sequence(hidden, self.length, self.group, partial=True)
        return ops.copy_to_region(hidden, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Partial output of a region -> stream."""
        if self.sequence:
            return ops.reduce_scatter_sequence(partial, self.group)
        return ops.reduce_from_region(partial, self.group)

    def own(self, hidden: Tensor) -> Tensor:
        """Stream -> this rank's rows [..., ceil(T / size), D]; a region on them has whole gradients of these rows."""
        return hidden if self.sequence else ops.cut_sequence(hidden, self.group)

    def together(self, rows: Tensor) -> Tensor:
        """This rank's rows -> stream."""
        return rows if self.sequence else ops.gather_sequence(rows, self.length, self.group, partial=False)

    def gather(self, hidden: Tensor) -> Tensor:
        """Stream -> whole, for what is computed alike on every rank."""
        if self.sequence:
            return ops.gather_sequence(hidden, self.length, self.group, partial=False)
        return hidden

    def note_length(self, kwargs: dict[str, Any]) -> None:
        """Remember T from the rotary tables that a block is given; these are never cut."""
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            first = tables[0] if isinstance(tables, (tuple, list)) else tables
            self.length = first.shape[-2]

    def cut_deepstack(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a language model whose layers add vision features to the stream: only this rank's rows.

        visual_pos_masks [B = 1, T] bool and deepstack_visual_embeds, a list of [number of True, D] or
        None (added before, in another pipeline stage), as in Qwen3-VL.
        """
        mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if not self.sequence or mask is None or features is None:
            return kwargs
        count = ops.rows_per_rank(mask.shape[-1], self.group.size())
        start = count * self.group.rank()
        place = mask[0].nonzero()[:, 0]
        mine = (place >= start) & (place < start + count)
        own = mask.new_zeros(1, count)
        own[0, place[mine] - start] = True
        cut = [None if level is None else ops.copy_to_region(level, self.group)[mine] for level in features]
        return {**kwargs, "visual_pos_masks": own, "deepstack_visual_embeds": cut}
