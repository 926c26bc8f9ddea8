"""Media over ranks: which rank's tower computes which medium, its rows sent there and features sent back.

Media of one stream are assigned greedily by cost, whole (or by the part, where a tower computes parts such as
frames and tiles apart), over a group of ranks that may read different data, or share one sequence, or both;
every rank then gets the features of the media tokens it holds. All ranks plan alike from lists gathered on
the host once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.core.tensors import to_device
from polymodal.distributed import collectives

Size = tuple[int, ...]
"""Of a part of the media, as a row of its stream's `sizes`: the product is its rows of the stream's
tensor."""


@dataclass(frozen=True)
class MediaRequest:
    """Of one rank in a micro-batch: the media of its data, and which of their tokens it holds.

    parts: sizes in the order of its rows; runs: ranges (start, stop) of the numbers of its media tokens.
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
    """The rank that computes each part: the largest first, each on a rank that has its rows while that one
    stays below the mean, else on the least loaded. Rank r has the rows of home r // copies."""
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
    """One micro-batch's exchange: media rows to the ranks that compute them, and features back.

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
    rows_place: Tensor  # positions of the rows of `sizes` among those that were received
    features_order: Tensor
    features_sent: tuple[int, ...]
    features_received: tuple[int, ...]
    features_place: Tensor

    def rows(self, own: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """The stream's tensor [rows, *shape] of this rank's data (None: it has none) -> the rows of `sizes`,
        None when that is empty."""
        if own is None:
            own = torch.zeros(0, *shape, device=device)
        rows = own[to_device(self.rows_order, device)].contiguous()  # as it is sent, whatever its strides
        if self.moves:
            received = rows.new_empty(sum(self.rows_received), *shape)
            counts = list(self.rows_received), list(self.rows_sent)
            dist.all_to_all_single(received, rows, *counts, group=self.group)
            rows = received[to_device(self.rows_place, device)]
        return rows if len(self.sizes) else None

    def features(self, features: Tensor) -> Tensor:
        """Features of the media tokens of `sizes` [m, D] -> features of the media tokens of this rank
        [received, D].

        A rank without media passes its tower's output for a dummy, any [., D]: it sends none, but is part of
        the graph, so that every rank takes part in the exchange of the backward pass too."""
        features = features[: len(self.features_order)]
        order = to_device(self.features_order, features.device)
        counts = list(self.features_sent), list(self.features_received)
        received = collectives.exchange_rows(features, order, *counts, self.group)
        return received[to_device(self.features_place, features.device)]


def gather(requests: Sequence[MediaRequest], group: dist.ProcessGroup) -> list[list[MediaRequest]]:
    """By rank of the group, the requests of its micro-batches. One exchange on the host."""
    found: list = [None] * group.size()
    dist.all_gather_object(found, list(requests), group=group)
    return found


def plan(
    requests: Sequence[MediaRequest],
    copies: int,
    cost: Callable[[Size], float],
    tokens: Callable[[Size], int],
    group: dist.ProcessGroup,
) -> MediaAllToAll | None:
    """The exchange of one micro-batch from every rank's request; None when no rank has media.

    copies: consecutive ranks of the group with the same data; cost, tokens: FLOPs and features of a part.
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
    numbers = range(len(parts))

    # rows: from `source` to `owner`, on both sides in the order of parts
    begins: list[int] = []  # first row of each part in its home's tensor
    end = [0] * (ranks // copies)
    for number, home in enumerate(homes):
        begins.append(end[home])
        end[home] += rows[number]
    sent = [[n for n in numbers if source[n] == rank and owner[n] == to] for to in range(ranks)]
    received = [[n for n in numbers if source[n] == of and owner[n] == rank] for of in range(ranks)]
    arrived, start = {}, 0  # first row of each part among those received
    for number in (n for of_rank in received for n in of_rank):
        arrived[number] = start
        start += rows[number]
    mine = [number for number in numbers if owner[number] == rank]

    # features: by home, the rank that computes each media token, and its position there
    computed = [0] * ranks
    makers: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in end]
    positions: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in end]
    for number, home in enumerate(homes):
        maker, size = owner[number], tokens(parts[number][1])
        makers[home].append(np.full(size, maker))
        positions[home].append(np.arange(computed[maker], computed[maker] + size))
        computed[maker] += size
    maker_of, position_of = [np.concatenate(a) for a in makers], [np.concatenate(a) for a in positions]
    order = []
    for to, other in enumerate(requests):
        home = to // copies
        local = other.tokens[maker_of[home][other.tokens] == rank]
        order.append(position_of[home][local])
    own = maker_of[rank // copies][requests[rank].tokens]
    return MediaAllToAll(
        group,
        sizes=torch.tensor([parts[n][1] for n in mine], dtype=torch.int64).view(-1, len(parts[0][1])),
        received=len(own),
        moves=source != owner,
        rows_order=_ranges([(begins[n], rows[n]) for to_rank in sent for n in to_rank]),
        rows_sent=tuple(sum(rows[n] for n in to_rank) for to_rank in sent),
        rows_received=tuple(sum(rows[n] for n in of_rank) for of_rank in received),
        rows_place=_ranges([(arrived[n], rows[n]) for n in mine]),
        features_order=torch.from_numpy(np.concatenate(order)),
        features_sent=tuple(map(len, order)),
        features_received=tuple(int((own == of).sum()) for of in range(ranks)),
        features_place=torch.from_numpy(np.argsort(np.argsort(own, kind="stable"))),
    )


def _ranges(pieces: Sequence[tuple[int, int]]) -> Tensor:
    """Indices of (start, length) pieces, one after the other: int64."""
    if not pieces:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([torch.arange(start, start + length) for start, length in pieces])
