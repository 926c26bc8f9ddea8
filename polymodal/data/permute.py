"""Random order without state: a hash of 64 bits and a keyed bijection of 0..n-1 in constant memory.

Own arithmetic in place of numpy.random, whose streams may change between versions: the
order of a run must be the same on every machine and after every upgrade.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLD = 0x9E3779B97F4A7C15
_ROUNDS = 8


def scramble(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 bijection whose bits look random: the finaliser of SplitMix64 (Steele, Lea, Flood
    2014)."""
    x = np.asarray(x, dtype=np.uint64) + np.uint64(_GOLD)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """Integers -> one 64-bit key; different tuples give unrelated keys."""
    key = 0
    for number in numbers:
        key = int(scramble(np.array([(key ^ (number & _MASK)) & _MASK], dtype=np.uint64))[0])
    return key


def permute(x: np.ndarray, size: int, key: int | np.ndarray) -> np.ndarray:
    """A keyed bijection of 0..size-1, evaluated at x (uint64), in constant memory.

    An alternating Feistel network over the next power of two, walked until it is back below `size`
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"); `key` may differ for every element.
    """
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape)
    out = x.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right, k = out[todo] >> low, out[todo] & masks[0], keys[todo]
        for turn in range(_ROUNDS):
            k = k + np.uint64(_GOLD)
            if turn % 2:
                right = right ^ (scramble(left ^ k) & masks[0])
            else:
                left = left ^ (scramble(right ^ k) & masks[1])
        out[todo] = (left << low) | right
        todo = todo[out[todo] >= size]
    return out
