"""Attention over a group of ranks equals attention of one process: values and gradients, any lengths, any heads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import pack, padding_sample
from polymodal.distributed import attention, sequence_sharding
from polymodal.distributed.context_parallel import Context, PackedShard, ulysses_size
from polymodal.distributed.mesh import ParallelSizes
from polymodal.distributed.ring_attention import backward_block, forward_block, plain_backward, plain_forward
from polymodal.models import catalog
from polymodal.parallel.apply import check
from polymodal.recipe import Data, Parallel
from tests.bounds import EXACT
from tests.models import tiny
from tests.parallel import layouts
from tests.parallel.harness import run
from tests.unit.test_attention import dense, draw

LENGTHS = [
    (1,), (3, 1, 1), (37,), (5, 2, 16), (8, 8, 8, 8), (1, 1, 1, 1, 1, 1, 1), (2, 40, 3), (64, 64), (11, 11, 30),
]  # fmt: skip
HEADS = [(4, 4), (4, 2), (6, 1), (6, 2), (5, 5)]


def one(context: Context, lengths, heads, causal, dtype=torch.float64, scale=None):
    """Largest relative L2 error of output and gradients against one process."""
    inputs = draw(list(lengths), *heads, 8, dtype, seed=len(lengths))
    cu_seqlens = attention.cumulative(list(lengths))
    weight = torch.randn(1, sum(lengths), heads[0], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)  # fmt: skip
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    whole = dense(*wide, list(lengths), causal, scale)
    expected = torch.autograd.grad((whole * weight.double()).sum(), wide)
    cut = context.spread(lengths)
    mine = [tensor.detach()[:, :, cut.rows].requires_grad_() for tensor in inputs]
    out = attention.attend(*mine, cu_seqlens, causal, scale, cut=cut)
    assert out.dtype == dtype and out.shape == (1, len(cut.rows), heads[0], 8)
    got = torch.autograd.grad((out * weight[:, cut.rows]).sum(), mine)
    pairs = [(out, whole[:, cut.rows])] + [(g, e[:, :, cut.rows]) for g, e in zip(got, expected, strict=True)]
    return max(float((a.detach().double() - b).norm()) / (1e-3 + float(b.detach().norm())) for a, b in pairs)


def every(rank: int, sizes: tuple[int, ...]) -> dict[int, float]:
    """The largest error by the ranks that exchange heads; the others of the group are a ring."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    found = {}
    for ulysses in sizes:
        context = Context(mesh["cp"], ulysses)
        assert (context.ring, context.ulysses) == (size // ulysses, ulysses)
        cases = itertools.product(zip(LENGTHS, itertools.cycle(HEADS)), (True, False))
        found[ulysses] = max(
            one(context, lengths, heads, causal, scale=0.3 if causal else None)
            for (lengths, heads), causal in cases
            if ulysses <= heads[0]
        )
    return found


@pytest.mark.parametrize(
    "world, ulysses",
    [
        (2, (2, 1)),
        (4, (2,)),
        (3, (1,)),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((4, (1, 4)), (3, (3,)))),
    ],
)
def test_attention_over_ranks_is_attention_of_one_process(world: int, ulysses: tuple[int, ...]):
    for found in run(world, every, ulysses):
        assert max(found.values()) < EXACT, found


def precisions(rank: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    found = {}
    for name, ulysses in (("ring", 1), ("ulysses", 2)):
        context = Context(mesh["cp"], ulysses)
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{name} {dtype}"] = one(context, (300, 7, 600), (4, 2), True, dtype)
    return found


def test_half_precision_loses_no_more_than_its_rounding():
    for found in run(2, precisions):
        assert all(error < (1e-6 if "32" in name else 1e-2) for name, error in found.items()), found


# ---- a model whose packs are shorter than the group


def short(rank: int, directory: str, layout: layouts.Layout, reference: Any) -> Any:
    """Packs of one and of three tokens beside one with a picture; without `reference`, what one process gives."""
    whole = layouts.batches

    def batches(family: Any) -> list[Any]:
        words = tiny.sample(family.media_processor(Data()), ["yes no"], id=7)
        return [pack([padding_sample(1, 4)]), whole(family)[0], pack([words])]

    layouts.batches = batches
    if reference is None:
        return layouts.measure(directory, layout, torch.float64, rank, 0)
    return layouts.compare(rank, directory, [layout], {layouts.kind(layout): reference}, torch.float64, 0)[0]


@pytest.mark.parametrize("ulysses", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_packs_shorter_than_the_group(tmp_path, ulysses: int):
    source = str(tiny.checkpoint("qwen3-vl-moe", tmp_path))
    (reference,) = run(1, short, source, layouts.Layout("one process", 1), None)
    cut = layouts.Layout("four", 4, {"cp": 4, "ulysses": ulysses, "recompute": "full"})
    for found in run(4, short, source, cut, reference):
        assert max(found.loss, found.gradients, found.norm) < EXACT, found


# ---- the cut, without processes


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).map(tuple),
    ring=st.integers(1, 5),
    ulysses=st.integers(1, 4),
    causal=st.booleans(),
)
def test_every_row_is_held_once_and_evenly(lengths, ring, ulysses, causal):
    cut = sequence_sharding.shard_lengths(lengths, ring, ulysses, causal)
    held = [sequence_sharding.rows(lengths, cut, r, u) for r in range(ring) for u in range(ulysses)]
    assert sorted(torch.cat(held).tolist()) == list(range(sum(lengths)))
    for r in range(ring):
        assert cut.rows_of(r) == sum(len(held[r * ulysses + u]) for u in range(ulysses))
        assert max(cut.parts[r]) - min(cut.parts[r]) <= 1
        for segment, length in enumerate(lengths):
            mine = sum(cut.runs[piece][segment] for piece in cut.held[r])
            assert abs(mine - length / ring) < 2


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(16, 300), min_size=1, max_size=6).map(tuple), ring=st.sampled_from([2, 3, 4])
)
def test_a_causal_ring_gives_every_rank_the_same_work(lengths, ring):
    cut = sequence_sharding.shard_lengths(lengths, ring, 1, True)
    work = []
    for r in range(ring):
        rows = sequence_sharding.rows(lengths, cut, r, 0)
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        work.append(float((rows - starts[torch.bucketize(rows, starts, right=True) - 1] + 1).sum()))
    assert max(work) < 1.02 * min(work) + 8 * sum(lengths) ** 0.5 + max(lengths)


@settings(max_examples=30, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    heads=st.sampled_from([(4, 2), (3, 3)]),
    causal=st.booleans(),
)
def test_a_block_is_the_definition_and_its_gradients(pairs, heads, causal):
    """Dense calls by segment, of any lengths (none, too), on the fused CPU kernel; the plain formula beside it."""
    if causal:
        pairs = [(n, n) for n, _ in pairs]
    (queries, keys), (h, kv) = zip(*pairs, strict=True), heads
    generator = torch.Generator().manual_seed(len(pairs))
    shapes = ((sum(queries), h), (sum(keys), kv), (sum(keys), kv), (sum(queries), h))
    q, k, v, g = (
        torch.randn(*shape, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in shapes
    )
    out, lse = forward_block(q, k, v, queries, keys, causal, 0.4)
    grads = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    backward_block(g, q, k, v, out, lse, queries, keys, causal, 0.4, *grads)
    parts = [tensor.split(runs) for tensor, runs in ((q, queries), (k, keys), (v, keys), (g, queries))]
    pieces = []
    for qs, ks, vs, gs in zip(*parts, strict=True):
        if len(qs) and len(ks):
            dense_q, dense_k, dense_v, dense_g = (t.transpose(0, 1)[None] for t in (qs, ks, vs, gs))
            theirs, norm = plain_forward(dense_q, dense_k, dense_v, causal, 0.4)
            pieces.append((dense_q, theirs, dense_g))
            mine = plain_backward(dense_g, dense_q, dense_k, dense_v, theirs, norm, causal, 0.4)
            automatic = torch.autograd.grad((theirs * dense_g).sum(), (dense_q, dense_k, dense_v), retain_graph=True)  # fmt: skip
            for a, b in zip(mine, automatic, strict=True):
                torch.testing.assert_close(a, b)
    total = sum((theirs * dense_g).sum() for _, theirs, dense_g in pieces)
    torch.testing.assert_close((out * g).sum(), total + 0 * g.sum())
    if pieces:
        for mine, theirs in zip(grads, torch.autograd.grad(total, (q, k, v)), strict=True):
            torch.testing.assert_close(mine, theirs)


class Ring:
    """A context in which attention over ranks is refused before any rank is asked."""

    size, ring, ulysses, ring_rank, ulysses_rank, ring_group, ulysses_group = 2, 2, 1, 0, 0, object(), None
    attend = Context.attend


def test_what_attention_over_ranks_cannot_do_is_reported():
    inputs, cu_seqlens = draw([4], 2, 2, 4, torch.float32), attention.cumulative([8])
    cut = PackedShard(Ring(), sequence_sharding.shard_lengths((8,), 2, 1, True), torch.arange(4))  # type: ignore[arg-type]
    with pytest.raises(PolymodalError, match="dropout cannot run over a ring"):
        attention.attend(*inputs, cu_seqlens, True, dropout=0.1, cut=cut)
    with pytest.raises(ValueError, match="this rank holds 4 rows, the stream has 3"):
        attention.attend(*(t[:, :, :3] for t in inputs), cu_seqlens, True, cut=cut)


def test_a_card_without_sequence_cuts_is_refused():
    card = replace(catalog.cards()["qwen2-vl"], sequence_entry="", sequence_plan={})
    wan = catalog.cards()["wan2.1"]
    (reason,) = check(wan, None, ParallelSizes(1, 1, 2, 1, 1), Parallel(balance_media=True))
    assert "assigns pictures within a sequence of text, wan2.1 has none" in str(reason)
    (reason,) = check(card, tiny.config("qwen2-vl"), ParallelSizes(1, 1, 1, 2, 1))
    assert "has no rule for cutting its sequences" in str(reason)


def test_ulysses_takes_what_the_heads_allow():
    assert ulysses_size(4, 8, None) == 4 and ulysses_size(8, 4, None) == 4 and ulysses_size(4, 6, None) == 2
    assert ulysses_size(4, 6, 4) == 4 and ulysses_size(4, 6, 1) == 1
    with pytest.raises(
        PolymodalError, match="parallel.ulysses = 3 does not divide parallel.cp = 4"
    ) as caught:
        ulysses_size(4, 12, 3)
    assert "1, 2, 4" in caught.value.hint
    with pytest.raises(PolymodalError, match="more than the 2 attention heads"):
        ulysses_size(4, 2, 4)
