"""Batches over a mesh: what `apply` does to the model, BatchSharding does to every step's micro-batches.

Packed sequences are cut over the context-parallel group, media are assigned to the ranks that share
sequences, or to all that read data. A step cuts its batches once, on the host, after the denominators of its
loss were counted on whole ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.core.sample import IGNORE, Axis, Batch, MediaStream, SampleLengths
from polymodal.distributed import attention
from polymodal.distributed.context_parallel import Context, ulysses_size
from polymodal.distributed.mesh import Mesh
from polymodal.models.family import Family
from polymodal.parallel import media
from polymodal.recipe import Parallel


def attention_heads(config: Any) -> int:
    """Query heads of a model's (language) layers, by its config; 1 without such a key."""
    if isinstance(config, Mapping):  # diffusers
        return config.get("num_attention_heads") or config.get("num_heads") or 1
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_attention_heads", None) or getattr(text, "num_heads", None) or 1


def context_of(mesh: Mesh, config: Any, parallel: Parallel) -> Context | None:
    """The context-parallel group of this rank, None when cp is 1. Collective at its first call."""
    if mesh.sizes.cp == 1:
        return None
    heads = max(1, attention_heads(config) // mesh.sizes.tp)
    return mesh.context(ulysses_size(mesh.sizes.cp, heads, parallel.ulysses))


def pad_to_cp(batch: Batch, count: int) -> Batch:
    """A packed batch with one more segment of `count` tokens (id 0) that have neither label nor weight."""
    tensors = dict(batch.tensors)
    if "codes" in tensors:
        tensors["codes"] = torch.nn.functional.pad(tensors["codes"], (0, 0, 0, count), value=-1)
    for name, value in (("input_ids", 0), ("labels", IGNORE), ("weights", 0)):
        tensors[name] = torch.cat([tensors[name], tensors[name].new_full((1, count), value)], dim=1)
    positions = tensors["position_ids"]
    more = torch.arange(count, dtype=positions.dtype).expand(*positions.shape[:-1], count)
    tensors["position_ids"] = torch.cat([positions, more], dim=-1)
    lengths = (*attention.plan(batch.segments["text"]).lengths, count)
    return replace(batch, tensors=tensors, segments={**batch.segments, "text": attention.cumulative(lengths)})


class BatchSharding:
    """Turns the micro-batches of a step into those this rank computes; alike on all ranks of a stage.

    Here they stay whole: a sequence that is cut over ranks is cut inside of the model
    (dit_context_parallel.py), and all ranks of a context-parallel group then compute the whole loss.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    @property
    def weights_group(self) -> dist.ProcessGroup:
        """Ranks over which the denominators of a loss are summed, each counted as often as its terms are."""
        return self.mesh.loss_group

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        return list(batches)


class PackedBatchSharding(BatchSharding):
    """Cuts packed sequences over the context-parallel group, and assigns media to ranks."""

    def __init__(self, family: Family, mesh: Mesh, parallel: Parallel):
        super().__init__(mesh)
        self.family = family
        self.context = context_of(mesh, family.config, parallel)
        self.group = None
        self.gather = media.gather
        if parallel.balance_media and mesh.sizes.dp_shard * mesh.sizes.cp > 1:
            self.group = mesh.shard_group
        elif self.context is not None:
            self.group = self.context.group
        self._costs: dict[tuple[str, media.Size], float] = {}

    @property
    def weights_group(self) -> dist.ProcessGroup:
        """Each batch once: ranks of a context-parallel group count different rows of it."""
        return self.mesh.dp_group

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """Packed batches -> the same with this rank's rows of input_ids and position_ids, `rows` [n] int64
        among the tensors (labels and weights stay whole), `cut` for attention, and `media` if assigned."""
        pairs = [self._cut(batch) for batch in batches]
        out = [own for _, own in pairs]
        if self.group is None:
            return out
        streams = self.family.streams
        requests = [self._request(stream, whole, own) for whole, own in pairs for stream in streams]
        everyone = self.gather(requests, self.group)
        plans: list[media.MediaAllToAll | None] = []
        for number in range(len(requests)):
            stream = streams[number % len(streams)]
            cost, tokens = partial(self._cost, stream), partial(self.family.media_tokens, stream)
            of = [rank[number] for rank in everyone]
            plans.append(media.plan(of, self.mesh.sizes.cp, cost, tokens, self.group))
        for number, batch in enumerate(out):
            own = plans[number * len(streams) : (number + 1) * len(streams)]
            named = zip((stream.name for stream in streams), own, strict=True)
            out[number] = replace(batch, media={name: each for name, each in named if each is not None})
        return out

    def _cut(self, batch: Batch) -> tuple[Batch, Batch]:
        """(the whole batch, pad_to_cp up if it is shorter than the group, and this rank's)."""
        if self.context is None:
            return batch, self._numbered(batch, batch, None)
        cut = self.context.spread(attention.plan(batch.segments["text"]).lengths)
        if any(0 in part for part in cut.share.parts):
            filler = 2 * self.context.size
            batch = pad_to_cp(batch, filler)
            cut = replace(self.context.spread(attention.plan(batch.segments["text"]).lengths), filler=filler)
        tensors = dict(batch.tensors)
        for name in ("input_ids", "position_ids"):
            tensors[name] = tensors[name].index_select(batch.axes[name].index("sequence"), cut.rows)
        tensors["rows"] = cut.rows
        own = replace(batch, tensors=tensors, axes={**batch.axes, "rows": ("sequence",)}, cut=cut)
        return batch, self._numbered(batch, own, cut.rows)

    def _held(self, stream: MediaStream, whole: Batch, rows: Tensor | None) -> Tensor:
        """Numbers of the features of this rank's placeholders, in their order."""
        places = self.family.media_mask(stream, whole)[0]
        numbers = places.cumsum(0) - 1
        held = numbers[places] if rows is None else numbers[rows][places[rows]]
        shared = self.family.feature_numbers(stream, whole)
        return held if shared is None else shared[held]

    def _numbered(self, whole: Batch, own: Batch, rows: Tensor | None) -> Batch:
        """With `<stream>_numbers` [n] where sequences share media: of each placeholder of this rank, which of
        the features that it gets."""
        if not any(whole.groups.get("shared", ())):
            return own
        held = {f"{s.name}_numbers": self._held(s, whole, rows) for s in self.family.streams}
        numbers = {name: places.unique(return_inverse=True)[1] for name, places in held.items()}
        axes: dict[str, tuple[Axis, ...]] = dict.fromkeys(numbers, ("none",))
        return replace(own, tensors={**own.tensors, **numbers}, axes={**own.axes, **axes})

    def _request(self, stream: MediaStream, whole: Batch, own: Batch) -> media.MediaRequest:
        if stream.sizes not in whole.tensors:
            return media.MediaRequest((), ())
        held = self._held(stream, whole, own.get("rows"))
        if any(whole.groups.get("shared", ())):
            held = held.unique()
        return media.request(self.family.media_parts(stream, whole[stream.sizes]), held)

    def _cost(self, stream: MediaStream, part: media.Size) -> float:
        if (stream.name, part) not in self._costs:
            lengths = SampleLengths(0, 0, {stream.name: self.family.media_lengths(stream, part)})
            self._costs[stream.name, part] = self.family.cost(lengths)
        return self._costs[stream.name, part]
