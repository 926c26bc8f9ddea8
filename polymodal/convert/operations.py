"""The operations of a table: how hub tensors become a tree's tensors, and how those are sharded over TP
ranks.

Each is written once, on stand-ins that only record which box of a file goes where (models/slices.py: Stored);
inverting that record gives the other direction. `source_shapes` gives the hub's shapes from the tree's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

Facts = Mapping[str, int]
"""Numbers of a config that the operations need: heads, kv_heads, experts, ..."""
Shape = tuple[int, ...]


def concatenate(tensors: Sequence[Stored], dim: int = 0) -> Stored:
    return torch.cat(list(tensors), dim)  # type: ignore[arg-type, return-value]


def chunks(tensor: Stored, count: int, dim: int = 0) -> list[Stored]:
    """Equal parts of a tensor."""
    size = tensor.shape[dim]
    if size % count:
        raise PolymodalError(
            f"A tensor has {size} rows, which do not divide into {count} equal parts.",
            "The checkpoint is of another size than its config.",
        )
    return list(tensor.split(size // count, dim))


def with_dim(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _shares(names: tuple[int | str, ...], facts: Facts) -> list[int]:
    return [facts[name] if isinstance(name, str) else name for name in names]


@dataclass(frozen=True)
class Operation:
    """Hub tensors -> tensors of the tree. The plain one renames."""

    label = "rename"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return tensors

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return shapes


@dataclass(frozen=True)
class Concatenate(Operation):
    """Several tensors -> one, along rows. `shares`: how their sizes relate (numbers, or names of facts)."""

    shares: tuple[int | str, ...] = (1, 1)
    label = "concatenate"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [concatenate(tensors)]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        shares = _shares(self.shares, facts)
        return [with_dim(shapes[0], 0, shapes[0][0] * share // sum(shares)) for share in shares]


@dataclass(frozen=True)
class QueryGroups(Operation):
    """q, k, v -> one tensor, query group by query group: [q of its heads; k; v].

    heads, groups: names of facts. fused: the hub has one tensor [q; k; v] already. without_key: the hub has
    no k part (a bias), which reads as zeros."""

    heads: str = "heads"
    groups: str = "kv_heads"
    fused: bool = False
    without_key: bool = False

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        heads, groups = facts[self.heads], facts[self.groups]
        if self.fused:
            rows = tensors[0].shape[0]
            head_dim = rows // (heads + 2 * groups)
            sizes = [head_dim * heads, head_dim * groups, rows - head_dim * (heads + groups)]
            tensors = list(tensors[0].split(sizes))
        if self.without_key:
            query, value = tensors
            tensors = [query, Stored(value.shape, []), value]
        columns = [chunks(tensor, groups) for tensor in tensors]
        return [concatenate([part for group in zip(*columns, strict=True) for part in group])]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        heads, groups = facts[self.heads], facts[self.groups]
        if self.fused:
            return shapes
        head_dim = shapes[0][0] // (heads + 2 * groups)
        query, key = (with_dim(shapes[0], 0, head_dim * count) for count in (heads, groups))
        return [query, key] if self.without_key else [query, key, key]

    @property
    def label(self) -> str:
        return "interleave query groups" + (" (no k: zeros)" if self.without_key else "")


@dataclass(frozen=True)
class HeadsApart(Operation):
    """[head 0: part 0, part 1, ...; head 1: ...] -> [part 0 of all heads; part 1 of all heads; ...]."""

    count: int

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        heads = [chunks(head, self.count) for head in chunks(tensors[0], facts["heads"])]
        return [concatenate([head[part] for part in range(self.count) for head in heads])]

    @property
    def label(self) -> str:
        return f"{self.count} parts a head -> heads of each part"


@dataclass(frozen=True)
class Split(Operation):
    """One tensor -> several along rows, `shares` as in Concatenate."""

    shares: tuple[int | str, ...]
    label = "split"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        shares = _shares(self.shares, facts)
        unit = tensors[0].shape[0] // sum(shares)
        return list(tensors[0].split([unit * share for share in shares]))

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [with_dim(shapes[0], 0, sum(shape[0] for shape in shapes))]


@dataclass(frozen=True)
class Repeat(Operation):
    """One tensor -> two equal ones."""

    label = "repeat"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return tensors * 2

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return shapes[:1]


@dataclass(frozen=True)
class Reorder(Operation):
    """Tensors of `count` equal chunks each -> one tensor; `order`: (tensor, chunk) in their order there."""

    count: int
    order: tuple[tuple[int, int], ...]
    label = "chunks in another order"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        pieces = [chunks(tensor, self.count) for tensor in tensors]
        return [concatenate([pieces[tensor][chunk] for tensor, chunk in self.order])]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        tensors = 1 + max(tensor for tensor, _ in self.order)
        return [with_dim(shapes[0], 0, shapes[0][0] // tensors)] * tensors


@dataclass(frozen=True)
class Transpose(Operation):
    """Exchange the last two dimensions."""

    label = "transpose"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [tensor.transpose(-2 % tensor.ndim, -1 % tensor.ndim) for tensor in tensors]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]


@dataclass(frozen=True)
class UnstackExperts(Operation):
    """[experts, in, out] -> one tensor [out, in] an expert; [experts, out, in] where the fact `as_linear` is
    set."""

    label = "one tensor an expert, transposed"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        experts = [expert.squeeze(0) for expert in chunks(tensors[0], facts["experts"])]
        return experts if facts.get("as_linear") else [expert.transpose(0, 1) for expert in experts]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        rows, columns = shapes[0] if facts.get("as_linear") else shapes[0][::-1]
        return [(len(shapes), rows, columns)]


@dataclass(frozen=True)
class StackExperts(Operation):
    """Linear weights of all experts, transposed -> [experts, in, out], or flat [experts * in, out].

    Tensors come as (first of expert 0, second of expert 0, ..., first of expert 1, ...); the `count` of one
    expert are joined along their rows first."""

    count: int
    flat: bool = False

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        starts = range(0, len(tensors), self.count)
        experts = [concatenate(tensors[at : at + self.count]).transpose(0, 1) for at in starts]
        return [concatenate(experts if self.flat else [expert.unsqueeze(0) for expert in experts])]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        experts, shape = facts["experts"], shapes[0]
        columns, rows = (shape[0] // experts, shape[1]) if self.flat else shape[1:]
        return [(rows // self.count, columns)] * (experts * self.count)

    @property
    def label(self) -> str:
        return "stack experts, transposed" + (", flat" if self.flat else "")


@dataclass(frozen=True)
class FlattenExperts(Operation):
    """[experts, in, out] -> [experts * in, out]."""

    label = "experts one below the other"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [concatenate([expert.squeeze(0) for expert in tensors[0].split(1)])]

    def source_shapes(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [(facts["experts"], shapes[0][0] // facts["experts"], shapes[0][1])]


# ------------------------------------------------------------------------------------------- sharding over TP


@dataclass(frozen=True)
class TPShard:
    """How a tensor is sharded over TP ranks: along `dim` (None: every rank holds all of it), each of `parts`
    equal parts by itself (gate and up; q, k and v)."""

    dim: int | None = None
    parts: int = 1

    def apply(self, tensor: Stored, size: int, facts: Facts, name: str) -> list[Stored]:
        """The shards, rank by rank."""
        if self.dim is None:
            return [tensor] * size
        sections = [
            section.split(self._sizes(section.shape[self.dim], size, facts, name), self.dim)
            for section in self._sections(tensor, facts)
        ]
        return [concatenate([section[rank] for section in sections], self.dim) for rank in range(size)]

    def _sections(self, tensor: Stored, facts: Facts) -> list[Stored]:
        return chunks(tensor, self.parts, self.dim or 0)

    def _sizes(self, length: int, size: int, facts: Facts, name: str) -> list[int]:
        if length % size:
            fits = [n for n in range(1, min(length, 64) + 1) if length % n == 0]
            raise PolymodalError(
                f"{name} has {length * self.parts} values along dimension {self.dim}, "
                f"which a TP size of {size} does not divide.",
                f"TP sizes that do: {', '.join(map(str, fits))}.",
            )
        return [length // size] * size

    def whole(self, shards: list[Shape]) -> Shape:
        """The shape of the whole tensor, from its shards'."""
        if self.dim is None:
            return shards[0]
        return with_dim(shards[0], self.dim, sum(shape[self.dim] for shape in shards))

    @property
    def label(self) -> str:
        each = f", each of {self.parts} parts" if self.parts > 1 else ""
        return "whole" if self.dim is None else f"dim {self.dim}{each}"


@dataclass(frozen=True)
class AttentionMLPColumns(TPShard):
    """Columns of the attention (the fact `hidden`) and those of the MLP behind them, each sharded by
    itself."""

    dim: int | None = 1
    label = "dim 1, attention and MLP columns each"

    def _sections(self, tensor: Stored, facts: Facts) -> list[Stored]:
        return list(tensor.split([facts["hidden"], tensor.shape[1] - facts["hidden"]], 1))


@dataclass(frozen=True)
class Uneven(TPShard):
    """Sharded in units (the fact `unit`, or single rows); the first ranks get one more where they do not
    divide."""

    unit: str = ""

    def _sizes(self, length: int, size: int, facts: Facts, name: str) -> list[int]:
        units = facts[self.unit] if self.unit else length
        return [(units // size + (rank < units % size)) * (length // units) for rank in range(size)]

    @property
    def label(self) -> str:
        dim, comma, each = super().label.partition(",")
        return f"{dim}, uneven {'heads' if self.unit else 'rows'}{comma}{each}"


RENAME, WHOLE, ROWS, COLUMNS = Operation(), TPShard(), TPShard(0), TPShard(1)

vision_groups = partial(QueryGroups, "vision_heads", "vision_heads")
audio_groups = partial(QueryGroups, "audio_heads", "audio_heads")
OPERATIONS = {
    "concatenate": Concatenate(),
    "concatenate3": Concatenate((1, 1, 1)),
    "latents": Concatenate(("query_rows", "latent_rows")),
    "query_groups": QueryGroups(),
    "vision_groups": vision_groups(),
    "fused_vision_groups": vision_groups(fused=True),
    "audio_groups": audio_groups(),
    "audio_groups_without_k": audio_groups(without_key=True),
    "qkv_heads_apart": HeadsApart(3),
    "kv_heads_apart": HeadsApart(2),
    "split_single_block": Split(("hidden_qkv", "mlp")),
    "split_adapter": Split(("adapter_qkv", "adapter_mlp")),
    "repeat": Repeat(),
    # [scale; shift] -> [shift; scale]
    "swap_halves": Reorder(2, ((0, 1), (0, 0))),
    # two modulations of six chunks each: the first three of both, then the last three of both
    "interleave_modulations": Reorder(
        6, tuple((tensor, chunk) for half in ((0, 1, 2), (3, 4, 5)) for tensor in (0, 1) for chunk in half)
    ),
    "transpose": Transpose(),
    "unstack_experts": UnstackExperts(),
    "flatten_experts": FlattenExperts(),
    "stack_experts": StackExperts(1),
    "stack_pairs": StackExperts(2),
    "stack_experts_flat": StackExperts(1, flat=True),
    "stack_pairs_flat": StackExperts(2, flat=True),
}
"""Words of families/*.yaml for operations."""
SHARDS = {
    "whole": WHOLE,
    "rows": ROWS,
    "columns": COLUMNS,
    "glu": TPShard(0, 2),
    "kv": TPShard(0, 2),
    "qkv": TPShard(0, 3),
    "attention_mlp_columns": AttentionMLPColumns(),
    "uneven_rows": Uneven(0),
    "uneven_qkv_heads": Uneven(0, 3, "vision_heads"),
    "uneven_head_columns": Uneven(1, 1, "vision_heads"),
}
"""Words of families/*.yaml for sharding over TP."""
