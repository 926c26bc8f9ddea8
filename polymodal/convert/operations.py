"""The operations of a table: how hub tensors become one system's tensors, and how those are cut over TP ranks.

Each is written once, for stand-ins that only keep the books (models/slices.py: Stored); the engine turns the books
round for the other direction. `parts` gives the hub shapes that belong to a shape of the other side. Sees errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

Facts = Mapping[str, int]
"""Numbers of a config that the operations need: heads, kv_heads, experts, ..."""
Shape = tuple[int, ...]


def cat(parts: Sequence[Stored], dim: int = 0) -> Stored:
    """Join tensors along a dimension."""
    return torch.cat(list(parts), dim)  # type: ignore[arg-type, return-value]


def chunks(stored: Stored, count: int, dim: int = 0, what: str = "") -> list[Stored]:
    """Cut a tensor into equal parts."""
    size = stored.shape[dim]
    if size % count:
        raise PolymodalError(
            f"{what or 'a tensor'} has {size} rows, which {count} parts do not divide.",
            "The checkpoint is of another size than its config.",
        )
    return list(stored.split(size // count, dim))


@dataclass(frozen=True)
class Operation:
    """Hub tensors -> tensors of the other side. The plain one renames."""

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return tensors

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        """The hub's shapes, from the other side's."""
        return shapes

    @property
    def label(self) -> str:
        return "rename"


@dataclass(frozen=True)
class Concatenate(Operation):
    """k tensors -> one, along a dimension. `shares`: how their sizes relate (numbers, or names of facts)."""

    count: int = 2
    dim: int = 0
    shares: tuple[int | str, ...] = ()

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [cat(tensors, self.dim)]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        share = [facts[s] if isinstance(s, str) else s for s in self.shares] or [1] * self.count
        return [with_dim(shapes[0], self.dim, shapes[0][self.dim] * s // sum(share)) for s in share]

    @property
    def label(self) -> str:
        return "concatenate" if self.dim == 0 else f"concatenate along dim {self.dim}"


@dataclass(frozen=True)
class QueryGroups(Operation):
    """q, k, v -> one tensor, query group by query group: [q of its heads; k; v].

    heads, groups: names of facts. fused: the hub has one tensor [q; k; v] already. without_key: the hub has no k part
    (a bias), which reads as zeros.
    """

    heads: str = "heads"
    groups: str = "kv_heads"
    fused: bool = False
    without_key: bool = False

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        heads, groups = facts[self.heads], facts[self.groups]
        if self.fused:
            rows = tensors[0].shape[0]
            unit = rows // (heads + 2 * groups)
            tensors = list(tensors[0].split([unit * heads, unit * groups, rows - unit * (heads + groups)]))
        if self.without_key:
            query, value = tensors
            tensors = [query, Stored(value.shape, []), value]
        columns = [chunks(tensor, groups) for tensor in tensors]
        return [cat([part for group in zip(*columns, strict=True) for part in group])]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        heads, groups = facts[self.heads], facts[self.groups]
        if self.fused:
            return shapes
        unit = shapes[0][0] // (heads + 2 * groups)
        query, key = (with_dim(shapes[0], 0, unit * n) for n in (heads, groups))
        return [query, key] if self.without_key else [query, key, key]

    @property
    def label(self) -> str:
        return "interleave query groups" + (" (no k: zeros)" if self.without_key else "")


@dataclass(frozen=True)
class HeadsApart(Operation):
    """[head 0: part 0, part 1, ...; head 1: ...] -> [part 0 of all heads; part 1 of all heads; ...]."""

    heads: str = "heads"
    count: int = 3

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        heads = [chunks(head, self.count) for head in chunks(tensors[0], facts[self.heads])]
        return [cat([head[part] for part in range(self.count) for head in heads])]

    @property
    def label(self) -> str:
        return f"{self.count} parts a head -> heads of each part"


@dataclass(frozen=True)
class Split(Operation):
    """One tensor -> several along dim 0, `shares` as in Concatenate."""

    shares: tuple[int | str, ...]

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        share = [facts[s] if isinstance(s, str) else s for s in self.shares]
        unit = tensors[0].shape[0] // sum(share)
        return list(tensors[0].split([unit * s for s in share]))

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [with_dim(shapes[0], 0, sum(shape[0] for shape in shapes))]

    @property
    def label(self) -> str:
        return "split"


@dataclass(frozen=True)
class Repeat(Operation):
    """One tensor -> several equal ones."""

    count: int = 2

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return tensors * self.count

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return shapes[:1]

    @property
    def label(self) -> str:
        return "repeat"


@dataclass(frozen=True)
class Reorder(Operation):
    """Tensors of `count` equal chunks each -> one tensor; `order`: (tensor, chunk) in the order in which they lie."""

    count: int
    order: tuple[tuple[int, int], ...]

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        pieces = [chunks(tensor, self.count) for tensor in tensors]
        return [cat([pieces[tensor][chunk] for tensor, chunk in self.order])]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        tensors = 1 + max(tensor for tensor, _ in self.order)
        return [with_dim(shapes[0], 0, shapes[0][0] // tensors)] * tensors

    @property
    def label(self) -> str:
        return "chunks in another order"


@dataclass(frozen=True)
class Transpose(Operation):
    """Exchange the last two dimensions."""

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [tensor.transpose(-2 % tensor.ndim, -1 % tensor.ndim) for tensor in tensors]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]

    @property
    def label(self) -> str:
        return "transpose"


@dataclass(frozen=True)
class Unstack(Operation):
    """[experts, in, out] -> one tensor [out, in] an expert; [experts, out, in] where the fact `as_linear` is set."""

    experts: str = "experts"
    as_linear: str = "as_linear"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        each = [one.squeeze(0) for one in chunks(tensors[0], facts[self.experts])]
        return each if facts.get(self.as_linear) else [one.transpose(0, 1) for one in each]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        rows, columns = shapes[0] if facts.get(self.as_linear) else shapes[0][::-1]
        return [(len(shapes), rows, columns)]

    @property
    def label(self) -> str:
        return "one tensor an expert, transposed"


@dataclass(frozen=True)
class StackExperts(Operation):
    """Linear weights of all experts (k a expert, joined along rows) -> [experts, in, out], or flat [experts * in, out].

    Tensors come as (first of expert 0, second of expert 0, ..., first of expert 1, ...). transpose: whether the last
    two dimensions are exchanged on the way.
    """

    count: int = 1
    flat: bool = True
    transpose: bool = True
    experts: str = "experts"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        each = [cat(tensors[at : at + self.count]) for at in range(0, len(tensors), self.count)]
        if self.transpose:
            each = [one.transpose(0, 1) for one in each]
        return [cat(each) if self.flat else cat([one.unsqueeze(0) for one in each])]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        experts = facts[self.experts]
        rows, columns = (shapes[0][0] // experts, shapes[0][1]) if self.flat else shapes[0][1:]
        rows, columns = (columns, rows) if self.transpose else (rows, columns)
        return [(rows // self.count, columns)] * (experts * self.count)

    @property
    def label(self) -> str:
        return "stack experts" + (", transposed" if self.transpose else "") + (", flat" if self.flat else "")


@dataclass(frozen=True)
class Flatten(Operation):
    """[experts, in, out] -> [experts * in, out]."""

    experts: str = "experts"

    def forward(self, tensors: list[Stored], facts: Facts) -> list[Stored]:
        return [cat([one.squeeze(0) for one in tensors[0].split(1)])]

    def parts(self, shapes: list[Shape], facts: Facts) -> list[Shape]:
        return [(facts[self.experts], shapes[0][0] // facts[self.experts], shapes[0][1])]

    @property
    def label(self) -> str:
        return "experts one below the other"


def with_dim(shape: Shape, dim: int, size: int) -> Shape:
    return (*shape[:dim], size, *shape[dim + 1 :])


# --------------------------------------------------------------------------------------------------- cutting over TP


@dataclass(frozen=True)
class TPShard:
    """How a tensor is cut over TP ranks. The plain one is not: every rank holds all of it."""

    dim: int | None = None

    def apply(self, stored: Stored, size: int, facts: Facts, what: str) -> list[Stored]:
        """The shards, rank by rank."""
        return [stored] * size

    def check(self, stored: Stored, size: int, parts: int, what: str) -> None:
        assert self.dim is not None
        have = stored.shape[self.dim]
        if have % (size * parts):
            fits = [n for n in range(1, have // parts + 1) if have % (n * parts) == 0 and n <= 64]
            raise PolymodalError(
                f"{what} has {have} values along dimension {self.dim}, which a TP size of {size} does not divide.",
                f"TP sizes that do: {', '.join(map(str, fits))}.",
            )

    def whole(self, shards: list[Shape]) -> Shape:
        """The shape of the tensor, from its shards'."""
        if self.dim is None:
            return shards[0]
        return with_dim(shards[0], self.dim, sum(shape[self.dim] for shape in shards))

    @property
    def label(self) -> str:
        return "whole"


@dataclass(frozen=True)
class Parts(TPShard):
    """`count` equal parts along a dimension, each of them cut: gate and up, or q, k and v."""

    dim: int | None = 0
    count: int = 1

    def apply(self, stored: Stored, size: int, facts: Facts, what: str) -> list[Stored]:
        assert self.dim is not None
        self.check(stored, size, self.count, what)
        parts = [chunks(part, size, self.dim) for part in chunks(stored, self.count, self.dim)]
        return [cat([part[rank] for part in parts], self.dim) for rank in range(size)]

    @property
    def label(self) -> str:
        return f"dim {self.dim}" + (f", each of {self.count} parts" if self.count > 1 else "")


@dataclass(frozen=True)
class Border(TPShard):
    """Columns before a border (heads * head_dim) and after it, each cut by itself."""

    dim: int | None = 1
    fact: str = "hidden"

    def apply(self, stored: Stored, size: int, facts: Facts, what: str) -> list[Stored]:
        before = stored.narrow(1, 0, facts[self.fact])
        after = stored.narrow(1, facts[self.fact], stored.shape[1] - facts[self.fact])
        for part in (before, after):
            self.check(part, size, 1, what)
        pairs = zip(chunks(before, size, 1), chunks(after, size, 1), strict=True)
        return [cat(pair, 1) for pair in pairs]

    @property
    def label(self) -> str:
        return "dim 1, attention and MLP columns each"


@dataclass(frozen=True)
class Uneven(TPShard):
    """Cut in units (heads, or rows when `fact` is empty); the first ranks get one more when they do not divide."""

    dim: int | None = 0
    count: int = 1
    fact: str = ""

    def apply(self, stored: Stored, size: int, facts: Facts, what: str) -> list[Stored]:
        assert self.dim is not None
        parts = chunks(stored, self.count, self.dim)
        along = parts[0].shape[self.dim]
        units = facts[self.fact] if self.fact else along
        sizes = [(units // size + (rank < units % size)) * (along // units) for rank in range(size)]
        cut = [part.split(sizes, self.dim) for part in parts]
        return [cat([part[rank] for part in cut], self.dim) for rank in range(size)]

    @property
    def label(self) -> str:
        unit = "heads" if self.fact else "rows"
        return f"dim {self.dim}, uneven {unit}" + (f", each of {self.count} parts" if self.count > 1 else "")


WHOLE, ROWS, COLUMNS, GLU, QKV, KV = TPShard(), Parts(0), Parts(1), Parts(0, 2), Parts(0, 3), Parts(0, 2)
RENAME = Operation()
