"""Pictures over ranks: which rank's tower computes which picture, patches sent there and features sent back.

Sees ops.py and torch. Pictures are dealt out greedily by cost, whole (or by the frame, where a tower sees frames
apart), over a group of ranks that may see different data, or share one sequence, or both; every rank then gets the
features of the media tokens it holds. All ranks plan alike from lists gathered on the host once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.distributed import collectives

Grid = tuple[int, int, int]
"""Time, height and width of a part of the media, in patches."""


@dataclass(frozen=True)
class MediaRequest:
    """What one rank brings to a micro-batch: the media of its data, and which of their tokens it holds.

    parts: grids in the order of its patches; runs: ranges (start, stop) of media tokens, numbered along its stream.
    """

    parts: tuple[Grid, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([np.arange(*run) for run in self.runs] or [np.zeros(0, dtype=np.int64)])


def request(parts: Sequence[Grid], tokens: Tensor) -> MediaRequest:
    """tokens [n] int64: numbers of the media tokens that a rank holds, in its order."""
    numbers = tokens.numpy()
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    pieces = np.split(numbers, breaks) if len(numbers) else []
    return MediaRequest(tuple(parts), tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces))


def assign_media(costs: Sequence[float], homes: Sequence[int], ranks: int, copies: int) -> list[int]:
    """The rank that computes each part: the largest first, each on a rank that has its patches while that one stays
    below the mean, else on the least loaded. Rank r has the patches of home r // copies."""
    target = sum(costs) / ranks
    load = [0.0] * ranks
    owner = [0] * len(costs)
    for part in sorted(range(len(costs)), key=lambda part: -costs[part]):
        near = min(range(homes[part] * copies, (homes[part] + 1) * copies), key=load.__getitem__)
        if load[near] + costs[part] > target:
            near = min(range(ranks), key=lambda rank: (load[rank], rank // copies != homes[part]))
        owner[part] = near
        load[near] += costs[part]
    return owner


@dataclass(frozen=True)
class MediaAllToAll:
    """One micro-batch's way of patches to the ranks that compute them, and of features back.

    grid:     [M, 3] int64 on the host: what this rank's tower computes.
    received: media tokens that this rank gets features of.
    """

    group: dist.ProcessGroup
    grid: Tensor
    received: int
    moves: bool  # do patches travel at all?
    patches_order: Tensor  # rows of own pixel_values, as they are sent
    patches_sent: tuple[int, ...]
    patches_received: tuple[int, ...]
    patches_place: Tensor  # where the rows of this rank's grids are among those that came
    features_order: Tensor
    features_sent: tuple[int, ...]
    features_received: tuple[int, ...]
    features_place: Tensor

    def patches(self, pixels: Tensor | None, width: int, device: torch.device) -> Tensor | None:
        """pixel_values [P, width] of this rank's data (None: it has none) -> those of `grid`, None when it is empty."""
        if pixels is None:
            pixels = torch.zeros(0, width, device=device)
        rows = pixels[self.patches_order.to(device)]
        if self.moves:
            came = rows.new_empty(sum(self.patches_received), width)
            dist.all_to_all_single(came, rows, list(self.patches_received), list(self.patches_sent), group=self.group)  # fmt: skip
            rows = came[self.patches_place.to(device)]
        return rows if len(self.grid) else None

    def features(self, features: Tensor) -> Tensor:
        """Features of `grid`'s media tokens [m, D] -> features of the media tokens of this rank [received, D].

        A rank without media passes what its tower made of a dummy, any [., D]: it sends none, but is part of the
        graph, so that every rank meets the others in the backward pass too."""
        features = features[: len(self.features_order)]
        order, place = self.features_order.to(features.device), self.features_place.to(features.device)
        came = collectives.exchange_rows(features, order, list(self.features_sent), list(self.features_received), self.group)  # fmt: skip
        return came[place]


def gather(requests: Sequence[MediaRequest], group: dist.ProcessGroup) -> list[list[MediaRequest]]:
    """By rank of the group, the requests of its micro-batches. One exchange on the host."""
    found: list = [None] * group.size()
    dist.all_gather_object(found, list(requests), group=group)
    return found


def plan(
    requests: Sequence[MediaRequest], copies: int, cost: Callable[[Grid], float], tokens: Callable[[Grid], int], group: dist.ProcessGroup
) -> MediaAllToAll | None:  # fmt: skip
    """The exchange of one micro-batch from every rank's wish; None when nobody has media.

    copies: consecutive ranks of the group that have the same data; cost and tokens of a part: FLOPs, and features.
    """
    rank, ranks = group.rank(), group.size()
    parts = [(home, part) for home in range(ranks // copies) for part in requests[home * copies].parts]
    if not parts:
        return None
    homes = [home for home, _ in parts]
    owner = assign_media([cost(part) for _, part in parts], homes, ranks, copies)
    source = [
        to if to // copies == home else home * copies + to % copies
        for to, home in zip(owner, homes, strict=True)
    ]
    patches = [t * h * w for _, (t, h, w) in parts]
    sizes = [tokens(part) for _, part in parts]

    # patches: from `source` to `owner`, on both sides in the order of parts
    start, begins = 0, []
    for number, (home, _) in enumerate(parts):
        if number and home != homes[number - 1]:
            start = 0
        begins.append(start)
        start += patches[number]
    sent: list[list[int]] = [[n for n in range(len(parts)) if source[n] == rank and owner[n] == to] for to in range(ranks)]  # fmt: skip
    came: list[list[int]] = [[n for n in range(len(parts)) if source[n] == of and owner[n] == rank] for of in range(ranks)]  # fmt: skip
    arrived, place = {}, 0
    for numbers in came:
        for number in numbers:
            arrived[number] = place
            place += patches[number]
    mine = [number for number in range(len(parts)) if owner[number] == rank]

    # features: every media token has a number along its stream, a rank that computed it and a place there
    made = [0] * ranks
    computed: list[list[np.ndarray]] = [[] for _ in range(ranks // copies)]
    places: list[list[np.ndarray]] = [[] for _ in range(ranks // copies)]
    for number, home in enumerate(homes):
        computed[home].append(np.full(sizes[number], owner[number]))
        places[home].append(np.arange(made[owner[number]], made[owner[number]] + sizes[number]))
        made[owner[number]] += sizes[number]
    whole = [np.concatenate(a) if a else np.zeros(0, dtype=np.int64) for a in computed]
    where = [np.concatenate(a) if a else np.zeros(0, dtype=np.int64) for a in places]
    order, counts = [], []
    for to in range(ranks):
        wanted = requests[to].tokens
        local = wanted[whole[to // copies][wanted] == rank]
        order.append(where[to // copies][local])
        counts.append(len(local))
    own = requests[rank].tokens
    makers = whole[rank // copies][own]
    return MediaAllToAll(
        group,
        torch.tensor([parts[number][1] for number in mine], dtype=torch.int64).view(-1, 3),
        len(own),
        source != owner,
        _ranges([(begins[n], patches[n]) for numbers in sent for n in numbers]),
        tuple(sum(patches[n] for n in numbers) for numbers in sent),
        tuple(sum(patches[n] for n in numbers) for numbers in came),
        _ranges([(arrived[n], patches[n]) for n in mine]),
        torch.from_numpy(np.concatenate(order)),
        tuple(counts),
        tuple(int((makers == of).sum()) for of in range(ranks)),
        torch.from_numpy(np.argsort(np.argsort(makers, kind="stable"))),
    )


def _ranges(pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Indices of (start, length) pieces, one after the other: int64."""
    if not pieces:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([torch.arange(start, start + length) for start, length in pieces])
