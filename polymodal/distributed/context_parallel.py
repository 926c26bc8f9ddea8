"""Context parallelism: a group of ring x ulysses ranks that share sequences, and attention over it.

Everything but attention treats rows of a stream one by one, so a stream may be cut in any order; ranks
communicate in `Context.attend` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from polymodal.core.errors import PolymodalError
from polymodal.distributed import sequence_sharding
from polymodal.distributed.ring_attention import ring_attention
from polymodal.distributed.sequence_sharding import SequenceSharding
from polymodal.distributed.ulysses import gather_heads, scatter_heads


def ulysses_size(cp: int, heads: int, asked: int | None) -> int:
    """Ulysses ranks of a context-parallel group: `asked`, else the largest divisor of cp that divides the
    heads of a rank (the rest is the ring). Raises PolymodalError for an impossible number."""
    divisors = [n for n in range(1, cp + 1) if cp % n == 0]
    if asked is None:
        return max(n for n in divisors if heads % n == 0)
    possible = [n for n in divisors if n <= heads]
    if asked in possible:
        return asked
    why = f"is more than the {heads} attention heads of a rank"
    if cp % asked:
        why = f"does not divide parallel.cp = {cp}"
    raise PolymodalError(
        f"parallel.ulysses = {asked} {why}.",
        f"Choose from {', '.join(map(str, possible))}, or leave it out; the ring takes the rest of cp.",
    )


class Context:
    """The live group. cp rank = ring rank x ulysses size + ulysses rank: neighbours exchange heads."""

    def __init__(self, view: DeviceMesh, ulysses: int):
        """view: the 1-D mesh of the cp axis. Collective over the world."""
        self.size, self.rank = view.size(), view.get_local_rank()
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.group: dist.ProcessGroup = view.get_group()
        self.ulysses, self.ring = ulysses, self.size // ulysses
        self.ring_rank, self.ulysses_rank = divmod(self.rank, ulysses)
        self.ulysses_group: dist.ProcessGroup | None = None
        self.ring_group: dist.ProcessGroup | None = None
        if self.ring == 1:
            self.ulysses_group = self.group
        elif ulysses == 1:
            self.ring_group = self.group
        else:
            both = view._unflatten(0, (self.ring, ulysses), ("ring", "ulysses"))
            self.ring_group, self.ulysses_group = both.get_group("ring"), both.get_group("ulysses")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        share: SequenceSharding,
        causal: bool,
        scale: float | None,
        local: Callable[[Tensor, Tensor, Tensor], Tensor],
        kept: Tensor | None = None,
    ) -> Tensor:
        """Attention of this rank's rows to all ranks'.

        query [B, n, H, D]; key, value [B, n, K, D], H a multiple of K; n as `share` gives this rank. `local`
        computes whole streams [B, S, h, D] -> [B, S, h, D] as one process would, for this rank's heads where
        there is no ring.
        kept: of sequences cut alike (sequence_sharding.even), the rows that attend and are attended to [B, S]
        bool, in the order of ranks; a ring gives 0 for other rows, `local` must know them itself. Returns [B,
        n, H, D].
        """
        heads, rows = query.shape[2], share.parts[self.ring_rank]
        own = rows[self.ulysses_rank]
        if query.shape[1] != own:
            raise ValueError(f"this rank holds {own} rows, the stream has {query.shape[1]}")
        if self.ulysses_group is not None:
            query, key, value = scatter_heads(query, key, value, rows, self.ulysses_group)
        if self.ring_group is not None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            flat = [tensor.flatten(0, 1) for tensor in (query, key, value)]
            if kept is None:
                out = ring_attention(*flat, share, causal, scale, self.ring_group).view(query.shape)
            else:
                share, places = self._of_kept(share, kept)
                flat = [tensor.index_select(0, places) for tensor in flat]
                around = ring_attention(*flat, share, causal, scale, self.ring_group)
                out = torch.zeros_like(query).flatten(0, 1).index_copy(0, places, around).view(query.shape)
        else:
            out = local(query, key, value)
        if self.ulysses_group is not None:
            out = gather_heads(out, heads, rows, self.ulysses_group)
        return out

    def _of_kept(self, share: SequenceSharding, kept: Tensor) -> tuple[SequenceSharding, Tensor]:
        """The share of those rows alone, and their positions among this ring rank's [B * rows]."""
        known = self._kept.get(kept)
        if known is None:
            pieces = kept.split([sum(part) for part in share.parts], dim=1)
            runs = tuple(tuple(piece.sum(dim=1).tolist()) for piece in pieces)
            places = pieces[self.ring_rank].flatten().nonzero()[:, 0]
            known = SequenceSharding(runs, share.held, share.parts), places
            self._kept[kept] = known
        return known

    def spread(self, lengths: tuple[int, ...], causal: bool = True) -> PackedShard:
        """How a packed stream with these segments is cut over the group."""
        share = sequence_sharding.shard_lengths(lengths, self.ring, self.ulysses, causal)
        rows = sequence_sharding.rows(lengths, share, self.ring_rank, self.ulysses_rank)
        return PackedShard(self, share, rows)


@dataclass(frozen=True)
class PackedShard:
    """One packed stream, cut over a group: `rows` [n] int64 are the positions of the stream held here.

    filler: tokens of padding at the stream's end: a stream shorter than the group is padded, because
    libraries cannot compute with no rows.
    """

    context: Context
    share: SequenceSharding
    rows: Tensor
    filler: int = 0
