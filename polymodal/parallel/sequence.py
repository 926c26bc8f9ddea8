"""Sequence parallelism inside a tensor-parallel group: the residual stream is cut along the sequence.

A stream is a tower's hidden states [..., T, D]. Lengths are arbitrary: every rank holds ceil(T / size) rows,
zeros after the last, which are cut off where rows are gathered.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.distributed import collectives

HIDDEN = "hidden_states"
"""The stream of a tower that has one; of diffusion transformers the latents' rows."""


@dataclass
class Stream:
    """One tower's residual stream, cut over the group with `sequence`, whole on every rank without.

    names: the arguments of blocks that it consists of, in the order in which blocks return them and joined
    layers have
    them: latents and text of a diffusion transformer are side by side, each cut by itself.
    lengths: rows of each, whole, in the forward that is running (recompute sets them again, block by block).
    """

    group: dist.ProcessGroup
    sequence: bool
    names: tuple[str, ...] = (HIDDEN,)
    lengths: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def length(self) -> int:
        """Rows of the main stream; 0 before a block was run."""
        return self.lengths[HIDDEN]

    def cut(self, hidden: Tensor, name: str = HIDDEN) -> Tensor:
        """Whole [..., T, D] -> what a rank carries from block to block."""
        self.lengths[name] = hidden.shape[-2]
        return collectives.cut_sequence(hidden, self.group) if self.sequence else hidden

    def enter(self, hidden: Tensor, name: str = HIDDEN) -> Tensor:
        """Stream -> whole input of a region, whose gradients are partial."""
        if self.sequence:
            return collectives.gather_sequence(hidden, self.lengths[name], self.group, partial=True)
        return collectives.copy_to_region(hidden, self.group)

    def enter_rows(self, hidden: Tensor) -> Tensor:
        """As `enter`, for a region that treats rows one by one: of any stream, in any order, with padding."""
        if self.sequence:
            rows = hidden.shape[-2] * self.group.size()
            return collectives.gather_sequence(hidden, rows, self.group, partial=True)
        return collectives.copy_to_region(hidden, self.group)

    def enter_joined(self, hidden: Tensor) -> Tensor:
        """As `enter`, for all streams joined along their rows: gives whole stream after whole stream."""
        gathered = self.enter_rows(hidden)
        return gathered.index_select(-2, self._joined(gathered.device)) if self.sequence else gathered

    def leave_joined(self, partial: Tensor) -> Tensor:
        """The inverse: joined whole streams, partial -> this rank's rows of each, joined."""
        if not self.sequence:
            return collectives.reduce_from_region(partial, self.group)
        rows = sum(self._rows().values()) * self.group.size()
        spread = partial.new_zeros(*partial.shape[:-2], rows, partial.shape[-1])
        spread = spread.index_copy(-2, self._joined(partial.device), partial)
        return collectives.reduce_scatter_sequence(spread, self.group)

    def _rows(self) -> dict[str, int]:
        """Rows of each stream on a rank."""
        return {name: collectives.rows_per_rank(self.lengths[name], self.group.size()) for name in self.names}

    def _joined(self, device: torch.device) -> Tensor:
        """Positions of the rows of whole joined streams among those gathered from ranks."""
        rows = self._rows()
        held, start, places = sum(rows.values()), 0, []
        for name in self.names:
            row = torch.arange(self.lengths[name], device=device)
            places.append(row // rows[name] * held + start + row % rows[name])
            start += rows[name]
        return torch.cat(places)

    def leave(self, partial: Tensor) -> Tensor:
        """Partial output of a region -> stream."""
        if self.sequence:
            return collectives.reduce_scatter_sequence(partial, self.group)
        return collectives.reduce_from_region(partial, self.group)

    def own(self, hidden: Tensor) -> Tensor:
        """Stream -> this rank's rows [..., ceil(T / size), D], whose gradients are whole."""
        return hidden if self.sequence else collectives.cut_sequence(hidden, self.group)

    def together(self, rows: Tensor) -> Tensor:
        """This rank's rows -> stream."""
        if self.sequence:
            return rows
        return collectives.gather_sequence(rows, self.length, self.group, partial=False)

    def gather(self, hidden: Tensor, name: str = HIDDEN) -> Tensor:
        """Stream -> whole, for what is computed alike on every rank."""
        if self.sequence:
            return collectives.gather_sequence(hidden, self.lengths[name], self.group, partial=False)
        return hidden

    def modulation(self, value: Tensor) -> Tensor:
        """Shift and scale of a block's rows, whole: [B, ...] for all rows alike, or [B, T, ...] a row.

        Rows of a cut stream give only their part of its gradient.
        """
        if not self.sequence:
            return value
        if value.ndim > 3:  # a timestep a token
            return collectives.cut_sequence(value.flatten(2), self.group).unflatten(-1, value.shape[2:])
        return collectives.copy_to_region(value, self.group)

    def leading(self, count: int) -> int:
        """Of so many rows at the beginning of the whole main stream, those that this rank holds."""
        if not self.sequence:
            return count
        rows = collectives.rows_per_rank(self.length, self.group.size())
        return min(max(count - rows * self.group.rank(), 0), rows)

    def cut_masked_rows(self, kwargs: dict[str, Any], mask_name: str, rows_name: str) -> dict[str, Any]:
        """A pair of a model's arguments, as `ModelCard.masked_rows` names them, cut to this rank's rows.

        A mask [B = 1, T] bool, and a list of [number of True, D] or None (added in another pipeline stage).
        """
        mask, features = kwargs.get(mask_name), kwargs.get(rows_name)
        if not self.sequence or mask is None or features is None:
            return kwargs
        count = collectives.rows_per_rank(mask.shape[-1], self.group.size())
        start = count * self.group.rank()
        positions = mask[0].nonzero()[:, 0]
        mine = (positions >= start) & (positions < start + count)
        own = mask.new_zeros(1, count)
        own[0, positions[mine] - start] = True
        cut = [
            None if level is None else collectives.copy_to_region(level, self.group)[mine]
            for level in features
        ]
        return {**kwargs, mask_name: own, rows_name: cut}
