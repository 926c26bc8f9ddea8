"""The packed attention equals dense attention with a mask over segments: values and gradients, every grouping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.distributed import attention
from polymodal.parallel import dit_context_parallel
from tests.bounds import EXACT


def dense(query, key, value, lengths, causal, scale=None):
    """The definition: softmax over allowed places, in the dtype given. [1, H, T, D] -> [1, T, H, D]."""
    heads, total, width = query.shape[1:]
    key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = of[:, None] == of[None, :]
    if causal:
        allowed &= torch.ones(total, total, dtype=torch.bool).tril()
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scale is None else scale)
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def draw(lengths, heads, key_heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def one(count):  # the strides of a real layer: tokens first in memory, heads moved forward
        data = torch.randn(1, total, count, width, generator=generator, dtype=torch.float64).to(dtype)
        return data.transpose(1, 2).detach().requires_grad_()

    return one(heads), one(key_heads), one(key_heads)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 4, 4, 7, 16]), min_size=1, max_size=9),
    groups=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_dense_attention_with_a_mask(lengths, groups, causal, scale):
    inputs = draw(lengths, *groups, 8, torch.float64)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ours = attention.attend(*inputs, cu_seqlens, causal, scale)
    theirs = dense(*inputs, lengths, causal, scale)
    assert ours.shape == (1, sum(lengths), groups[0], 8)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    weight = torch.randn_like(ours)
    got = torch.autograd.grad((ours * weight).sum(), inputs)
    expected = torch.autograd.grad((theirs * weight).sum(), inputs)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_every_precision_keeps_its_dtype_and_is_as_exact_as_it_can_be(dtype, tolerance):
    lengths = [5, 64, 64, 300, 64]  # below and above the length where half precision changes its way
    inputs = draw(lengths, 4, 2, 16, dtype)
    ours = attention.attend(*inputs, attention.cumulative(lengths), True)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    theirs = dense(*wide, lengths, True)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    got = torch.autograd.grad((ours * weight.to(dtype)).sum(), inputs)
    expected = torch.autograd.grad((theirs * weight).sum(), wide)
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype is dtype
        torch.testing.assert_close(mine.double(), reference, rtol=4 * tolerance, atol=8 * tolerance)


def test_the_host_learns_the_lengths_once(monkeypatch):
    asked = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(1) or original(self))
    inputs = draw([3, 5], 2, 2, 4, torch.float32)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    for _ in range(4):
        attention.attend(*inputs, cu_seqlens, True)
    assert len(asked) == 1
    attention.attend(*inputs, attention.cumulative([3, 5]), True)
    assert len(asked) == 1


def test_lengths_that_do_not_fill_the_stream_are_refused():
    inputs = draw([8], 2, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="ends at 7"):
        attention.attend(*inputs, attention.cumulative([3, 4]), True)


def test_a_window_shorter_than_a_sample_is_refused_and_a_longer_one_is_not():
    inputs = draw([8], 2, 2, 4, torch.float32)
    layer = torch.nn.Module()
    layer.is_causal = True
    cu_seqlens = attention.cumulative([8])
    with pytest.raises(PolymodalError, match="window of 7"):
        attention.attention(layer, *inputs, None, cu_seq_lens_q=cu_seqlens, sliding_window=7)
    out, _ = attention.attention(layer, *inputs, None, cu_seq_lens_q=cu_seqlens, sliding_window=8)
    torch.testing.assert_close(out, dense(*inputs, [8], True))


def test_without_lengths_it_is_the_librarys_masked_attention():
    query, key, value = draw([6], 4, 2, 8, torch.float32)
    layer = torch.nn.Module()
    layer.is_causal, layer.num_key_value_groups = True, 2
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2] = False
    mask |= torch.eye(6, dtype=torch.bool)
    out, _ = attention.attention(layer, query, key, value, mask, scaling=8**-0.5)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(out, (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2))


def test_a_moved_batch_is_not_asked_for_its_lengths():
    """On an accelerator `tolist` waits for all work before it; the host's copy knows the lengths (meta stands for it)."""
    batch = Batch(
        {"input_ids": torch.zeros(1, 8, dtype=torch.int64)},
        {},
        (),
        {"text": torch.tensor([0, 3, 8], dtype=torch.int32)},
    )
    there = batch.to("meta")
    moved = there.segments["text"]
    assert moved.is_meta and attention.plan(moved, there.host["text"]).lengths == (3, 5)
    assert attention.plan(moved).lengths == (3, 5)  # layers of the library hand on the tensor alone
    assert torch.equal(there.on_host("input_ids"), batch["input_ids"])
    assert batch.to("cpu").segments["text"] is batch.segments["text"]


def test_keys_that_are_padding_are_left_out_not_masked(monkeypatch):
    """Samples of unlike numbers of keys, of the same, and with gaps, grouped queries: values and gradients."""
    masks = {
        "unlike": [[1] * 5 + [0] * 4, [1] * 9],
        "alike": [[1] * 6 + [0] * 3] * 2,
        "gaps": [[1, 0, 1, 1, 0, 1, 0, 0, 0], [1] * 9],
    }
    torch.manual_seed(0)
    sizes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    called = []

    def seen(*args, **kwargs):
        called.append(len(args) > 3 or kwargs.get("attn_mask") is not None)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(dit_context_parallel, "scaled_dot_product_attention", seen)
    for name, rows in masks.items():
        mask = torch.tensor(rows, dtype=torch.bool)[:, None, None]
        expected = scaled_dot_product_attention(*given, mask, enable_gqa=True)
        for _ in range(2):  # the second time from what is known of the mask
            found = dit_context_parallel.unpadded(*given, mask, None)
            torch.testing.assert_close(found, expected, msg=name)
        for a, b in zip(
            *(torch.autograd.grad(out.square().sum(), given) for out in (found, expected)), strict=True
        ):
            torch.testing.assert_close(a, b, msg=name)
    assert not any(called) and len(called) == 2 * (2 + 1 + 2)
