"""How a stream is sharded over a context-parallel group: plain arithmetic on lengths, no communication.

A group of ring x ulysses ranks cuts every segment of a packed stream into pieces;
each ring rank holds one piece of each segment (or two, an early and a late one, so that causal attention
costs all ranks the same), and cuts what it holds into one part a ulysses rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceSharding:
    """One stream over a group; rank c of the group is ring rank c // ulysses, ulysses rank c % ulysses.

    runs:  by piece, the rows that each segment has in it.
    held:  by ring rank, its pieces; its rows are piece after piece, in a piece segment after segment.
    parts: by ring rank, the rows that each ulysses rank has of them.
    """

    runs: tuple[tuple[int, ...], ...]
    held: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[int, ...], ...]

    @property
    def ring(self) -> int:
        return len(self.held)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of every piece."""
        return tuple(sum(run) for run in self.runs)

    def rows_of(self, ring_rank: int) -> int:
        """Rows that a ring rank and its ulysses peers hold together."""
        return sum(self.sizes[piece] for piece in self.held[ring_rank])

    def slices(self, ring_rank: int) -> list[tuple[int, slice]]:
        """(piece, where it lies among the ring rank's rows), in order."""
        out, start = [], 0
        for piece in self.held[ring_rank]:
            out.append((piece, slice(start, start + self.sizes[piece])))
            start += self.sizes[piece]
        return out


def cut_points(length: int, parts: int, shift: int = 0) -> list[int]:
    """Cuts of a run of `length` into `parts` of equal size, or one more; `shift` moves which are longer."""
    return [(length * part + shift) // parts for part in range(parts + 1)]


def part_sizes(length: int, parts: int) -> tuple[int, ...]:
    """The sizes of the parts that `cut_points` cuts."""
    points = cut_points(length, parts)
    return tuple(stop - start for start, stop in zip(points, points[1:], strict=False))


def shard_lengths(lengths: tuple[int, ...], ring: int, ulysses: int, causal: bool) -> SequenceSharding:
    """A packed stream with these segment lengths, of any number of rows, over ring x ulysses ranks.

    causal: with a ring, segments are cut into 2 x ring pieces and rank r holds pieces r and 2 x ring - 1 - r,
    the "zig-zag" order (Brandon et al. 2023, Striped Attention, and its successors): every rank meets the
    same number of earlier tokens. What does not divide goes to another piece with each segment.
    """
    pieces = 2 * ring if causal and ring > 1 else ring
    by_segment = [cut_points(length, pieces, number % pieces) for number, length in enumerate(lengths)]
    runs = tuple(tuple(points[piece + 1] - points[piece] for points in by_segment) for piece in range(pieces))
    held = tuple((r, pieces - 1 - r) if pieces > ring else (r,) for r in range(ring))
    parts = tuple(part_sizes(sum(sum(runs[piece]) for piece in own), ulysses) for own in held)
    return SequenceSharding(runs, held, parts)


def even(counts: tuple[int, ...], ring: int, batch: int = 1) -> SequenceSharding:
    """Sequences [batch, S] cut alike: rank c holds counts[c] consecutive rows of every one."""
    ulysses = len(counts) // ring
    parts = tuple(tuple(counts[r * ulysses : (r + 1) * ulysses]) for r in range(ring))
    return SequenceSharding(
        tuple((sum(part),) * batch for part in parts), tuple((r,) for r in range(ring)), parts
    )


def rows(lengths: tuple[int, ...], share: SequenceSharding, ring_rank: int, ulysses_rank: int) -> Tensor:
    """Which rows of the whole stream a rank holds, in its order: int64 [n]."""
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    pieces: list[list[Tensor]] = []  # the rows of each piece, segment after segment
    for run in share.runs:
        pieces.append([torch.arange(at, at + count) for at, count in zip(starts, run, strict=True)])
        starts = [at + count for at, count in zip(starts, run, strict=True)]
    ranges = [rows for piece in share.held[ring_rank] for rows in pieces[piece]]
    own = torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
    start = sum(share.parts[ring_rank][:ulysses_rank])
    return own[start : start + share.parts[ring_rank][ulysses_rank]]
