"""What accelerators are given equals what a CPU computes, whatever the lengths, labels and holes of a batch."""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polymodal.core.sample import IGNORE, Batch
from polymodal.distributed import attention, flash_kernels, ring_attention
from polymodal.distributed.ring_attention import backward_block, forward_block
from polymodal.objectives.language import _by_modality, head_loss, kept_rows
from polymodal.runtime import device
from tests.unit import test_fused_attention as operators

few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6), st.booleans())
def test_a_ring_block_with_holes_takes_the_fused_operators(runs, causal):
    queries, keys = ([pair[0] for pair in runs], [pair[0 if causal else 1] for pair in runs])
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.randn(sum(queries), 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(sum(keys), 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def both() -> list[torch.Tensor]:
        out, lse = forward_block(q, k, v, queries, keys, causal, 0.3)
        grads = [torch.ones_like(tensor) for tensor in (q, k, v)]
        backward_block(g, q, k, v, out, lse, queries, keys, causal, 0.3, *grads)
        return [out, lse, *grads]

    expected = both()
    kernel = flash_kernels.Kernel(
        functools.partial(flash_kernels._ascend_forward, operators.OPERATORS),
        functools.partial(flash_kernels._ascend_backward, operators.OPERATORS),
    )
    with (
        mock.patch.object(flash_kernels, "kernel", lambda *_: kernel),
        mock.patch.object(ring_attention, "_forward", None),
        mock.patch.object(ring_attention, "_backward", None),
    ):
        found = both()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@few
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4), st.booleans())
def test_ascends_attention_in_parts_is_attention_by_lengths(lengths, segments, causal):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(lengths), 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(sum(lengths), 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    known = attention._plan(tuple(lengths))
    expected = attention._by_length(q, k, v, known, causal, None, 0.0)
    calls = []

    def fused(*args, **options):
        calls.append(len(options["actual_seq_qlen"]))
        return operators.attention(*args, **options)

    fake = SimpleNamespace(npu_fusion_attention=fused)
    with mock.patch.dict(sys.modules, {"torch_npu": fake}), mock.patch.object(device, "SEGMENTS", segments):
        found = device._npu_packed(q, k, v, None, tuple(lengths), known.longest, causal, None)
    torch.testing.assert_close(found, expected)
    assert max(calls) <= segments and sum(calls) == len(lengths)


@few
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([0.0, 0.5, 2.0])), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_the_heads_gradient_is_autograds_with_labels_that_repeat(rows, chunks):
    """Summed a label first, in one chunk of rows or several, without asking how many labels differ."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([label if label < 6 else IGNORE for label, _ in rows])
    weights = torch.tensor([weight for _, weight in rows])
    hidden = torch.randn(len(rows), 4, generator=generator, dtype=torch.float64)
    head = nn.Linear(4, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    with mock.patch("polymodal.objectives.language.CHUNK_BYTES", len(rows) // chunks * 6 * 8):
        loss, _, kept = head_loss(ours, head, labels, weights, kept_rows(labels, weights))
    loss.backward()
    found = [ours.grad, head.weight.grad.clone(), head.bias.grad.clone()]
    head.zero_grad()
    each = nn.functional.cross_entropy(head(theirs), labels, ignore_index=IGNORE, reduction="none")
    (each * weights).sum().backward()
    torch.testing.assert_close(loss, (each * weights).sum())
    for mine, wanted in zip(found, (theirs.grad, head.weight.grad, head.bias.grad), strict=True):
        torch.testing.assert_close(mine, wanted)
    assert len(kept) == int(((labels != IGNORE) & (weights != 0)).sum())


@few
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(["text", "image", "video"])), min_size=1, max_size=6
    ),
    st.data(),
)
def test_the_loss_by_modality_is_a_partition(samples, data):
    ends = torch.tensor([0, *(length for length, _ in samples)]).cumsum(0).to(torch.int32)
    kept = torch.tensor([at for at in range(int(ends[-1])) if data.draw(st.booleans())], dtype=torch.int64)
    losses = torch.rand(len(kept), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names = tuple(name for _, name in samples)
    batch = Batch({}, {}, segments={"text": ends}, groups={"modality": names})
    logs = _by_modality(batch, losses, kept)
    assert {key.partition("/")[2] for key in logs} == set(names)
    for name in set(names):
        inside = [i for i, row in enumerate(kept.tolist()) if names[int((ends[1:] <= row).sum())] == name]
        assert float(logs[f"tokens/{name}"]) == len(inside)
        torch.testing.assert_close(logs[f"nll/{name}"], losses[inside].sum())
