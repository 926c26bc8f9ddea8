"""Samples into packs of at most a fixed number of tokens. All functions are pure.

A packing is `cuts`: pack k holds the samples cuts[k] .. cuts[k + 1] of the (re-ordered) list.
"""

from __future__ import annotations

import heapq

import numpy as np


def first_fit_decreasing(
    lengths: np.ndarray, capacity: int, key: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pack: longest (or highest key) first, each into the first pack with space: (order [n], cuts [packs +
    1]).

    At most 11/9 of the best number of packs, + 6/9 (Dosa 2007). A tree of the space left finds the pack in
    log time, samples of one length that fit the same pack go in together. All lengths must be 1..capacity.
    """
    order = np.argsort(-(lengths if key is None else key).astype(np.int64), kind="stable")
    ordered = lengths[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    most = min(
        len(order), 2 * int(lengths.sum(dtype=np.int64)) // capacity + 2
    )  # all packs but one are over half full
    size = 1 << (most - 1).bit_length()
    space = [capacity] * (2 * size)
    packs: list[int] = []
    taken: list[int] = []
    for length, count in zip(
        ordered[starts].tolist(), np.diff(np.append(starts, len(order))).tolist(), strict=True
    ):
        while count:
            i = 1
            while i < size:
                i += i
                if space[i] < length:
                    i += 1
            take = min(count, space[i] // length)
            packs.append(i - size)
            taken.append(take)
            count -= take
            space[i] -= take * length
            i >>= 1
            while i:
                a, b = space[2 * i], space[2 * i + 1]
                best = a if a > b else b
                if space[i] == best:
                    break
                space[i] = best
                i >>= 1
    pack_of = np.repeat(packs, taken)
    by_pack = np.argsort(pack_of, kind="stable")
    return order[by_pack], np.append(0, np.cumsum(np.bincount(pack_of)))


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack runs of consecutive samples, order kept. Returns cuts [packs + 1]."""
    total = np.append(0, np.cumsum(lengths, dtype=np.int64))
    cuts = [0]
    while cuts[-1] < len(lengths):
        cuts.append(int(np.searchsorted(total, total[cuts[-1]] + capacity, side="right")) - 1)
    return np.array(cuts)


def cut_to_multiple(lengths: np.ndarray, cuts: np.ndarray, multiple: int) -> np.ndarray:
    """Cut the fullest packs of several samples in two until their number divides by `multiple`, or none is
    left."""
    missing = -(len(cuts) - 1) % multiple
    if not missing:
        return cuts
    total = np.append(0, np.cumsum(lengths, dtype=np.int64))
    tokens = np.diff(total[cuts])
    heap = [
        (-int(t), int(a), int(b)) for t, a, b in zip(tokens, cuts[:-1], cuts[1:], strict=True) if b - a > 1
    ]
    heapq.heapify(heap)
    added = []
    while missing and heap:
        _, a, b = heapq.heappop(heap)
        half = int(np.searchsorted(total[a : b + 1], (total[a] + total[b]) / 2)) + a
        if half > a + 1 and total[half] + total[half - 1] > total[a] + total[b]:
            half -= 1  # the neighbour is nearer to the middle
        half = min(max(half, a + 1), b - 1)
        added.append(half)
        missing -= 1
        for start, stop in ((a, half), (half, b)):
            if stop - start > 1:
                heapq.heappush(heap, (-int(total[stop] - total[start]), start, stop))
    return np.sort(np.append(cuts, added).astype(np.int64))
