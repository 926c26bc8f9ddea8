"""Media over ranks: which rank's tower computes which medium, its rows sent there and features sent back.

Sees collectives.py and torch. Media of one stream are assigned greedily by cost, whole (or by the part, where a tower sees
parts apart, such as frames and tiles), over a group of ranks that may see different data, or share one sequence, or both; every rank then gets the
features of the media tokens it holds. All ranks plan alike from lists gathered on the host once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.distributed import collectives

Size = tuple[int, ...]
"""Of a part of the media, as a row of its stream's `sizes`: the product is its rows of the stream's tensor."""


@dataclass(frozen=True)
class MediaRequest:
    """What one rank brings to a micro-batch: the media of its data, and which of their tokens it holds.

    parts: sizes in the order of its rows; runs: ranges (start, stop) of media tokens, numbered along its stream.
    """

    parts: tuple[Size, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([np.arange(*run) for run in self.runs] or [np.zeros(0, dtype=np.int64)])


def request(parts: Sequence[Size], tokens: Tensor) -> MediaRequest:
    """tokens [n] int64: numbers of the media tokens that a rank holds, in its order."""
    numbers = tokens.numpy()
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    pieces = np.split(numbers, breaks) if len(numbers) else []
    return MediaRequest(tuple(parts), tuple((int(piece[0]), int(piece[-1]) + 1) for piece in pieces))


def assign_media(costs: Sequence[float], homes: Sequence[int], ranks: int, copies: int) -> list[int]:
    """The rank that computes each part: the largest first, each on a rank that has its rows while that one stays
    below the mean, else on the least loaded. Rank r has the rows of home r // copies."""
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
    """One micro-batch's way of media rows to the ranks that compute them, and of features back.

    sizes:    [M, k] int64 on the host: what this rank's tower computes.
    received: media tokens that this rank gets features of.
    """

    group: dist.ProcessGroup
    sizes: Tensor
    received: int
    moves: bool  # are any rows sent to another rank?
    rows_order: Tensor  # rows of this rank's own tensor, as they are sent
    rows_sent: tuple[int, ...]
    rows_received: tuple[int, ...]
    rows_place: Tensor  # where the rows of `sizes` are among those that were received
    features_order: Tensor
    features_sent: tuple[int, ...]
    features_received: tuple[int, ...]
    features_place: Tensor

    def rows(self, own: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """The stream's tensor [rows, *shape] of this rank's data (None: it has none) -> the rows of `sizes`, None when
        that is empty."""
        if own is None:
            own = torch.zeros(0, *shape, device=device)
        rows = own[self.rows_order.to(device)]
        if self.moves:
            came = rows.new_empty(sum(self.rows_received), *shape)
            sent = list(self.rows_sent)
            dist.all_to_all_single(came, rows, list(self.rows_received), sent, group=self.group)
            rows = came[self.rows_place.to(device)]
        return rows if len(self.sizes) else None

    def features(self, features: Tensor) -> Tensor:
        """Features of the media tokens of `sizes` [m, D] -> features of the media tokens of this rank [received, D].

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
    requests: Sequence[MediaRequest], copies: int, cost: Callable[[Size], float], tokens: Callable[[Size], int], group: dist.ProcessGroup
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
    rows = [math.prod(part) for _, part in parts]
    sizes = [tokens(part) for _, part in parts]

    # rows: from `source` to `owner`, on both sides in the order of parts
    start, begins = 0, []
    for number, (home, _) in enumerate(parts):
        if number and home != homes[number - 1]:
            start = 0
        begins.append(start)
        start += rows[number]
    sent: list[list[int]] = [[n for n in range(len(parts)) if source[n] == rank and owner[n] == to] for to in range(ranks)]  # fmt: skip
    came: list[list[int]] = [[n for n in range(len(parts)) if source[n] == of and owner[n] == rank] for of in range(ranks)]  # fmt: skip
    arrived, place = {}, 0
    for numbers in came:
        for number in numbers:
            arrived[number] = place
            place += rows[number]
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
        torch.tensor([parts[number][1] for number in mine], dtype=torch.int64).view(-1, len(parts[0][1])),
        len(own),
        source != owner,
        _ranges([(begins[n], rows[n]) for numbers in sent for n in numbers]),
        tuple(sum(rows[n] for n in numbers) for numbers in sent),
        tuple(sum(rows[n] for n in numbers) for numbers in came),
        _ranges([(arrived[n], rows[n]) for n in mine]),
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
