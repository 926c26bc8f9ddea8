"""Ascend's fused attention is called as its manual says: a stand-in of the two operators, segment by segment, in float64.

The real ones need the device; what is checked is what we give them and make of what they return.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from polymodal.distributed import flash_kernels, ring_attention
from polymodal.distributed.ring_attention import backward_block, forward_block


def segments(rows: torch.Tensor, ends: list[int]) -> list[torch.Tensor]:
    lengths = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    return [part.transpose(0, 1)[None] for part in rows.split(lengths)]  # [1, heads, L, D]


def packed(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    found = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scale
    mask = torch.ones(found.shape[-2:], dtype=torch.bool).triu(1 + found.shape[-1] - found.shape[-2])
    return found.masked_fill(mask & causal, float("-inf"))


def attention(query, key, value, head_num, *, input_layout, atten_mask, scale, keep_prob, actual_seq_qlen, actual_seq_kvlen, sparse_mode):  # fmt: skip
    assert (input_layout, head_num, keep_prob) == ("TND", query.shape[1], 1.0)
    assert (sparse_mode == 3) == (atten_mask is not None)
    out, peaks, totals = [], [], []
    for q, k, v in zip(segments(query, actual_seq_qlen), segments(key, actual_seq_kvlen), segments(value, actual_seq_kvlen), strict=True):  # fmt: skip
        found = scores(q, k, sparse_mode == 3, scale)
        peak = found.amax(-1, keepdim=True)
        total = (found - peak).exp().sum(-1, keepdim=True)
        out.append((found - peak).exp() / total @ v.repeat_interleave(q.shape[1] // v.shape[1], 1))
        peaks.append(peak.expand(*peak.shape[:-1], 8))
        totals.append(total.expand(*total.shape[:-1], 8))
    return packed(out), packed(peaks), packed(totals), None, 0, 0, 0


def attention_grad(query, key, value, dy, head_num, *, input_layout, atten_mask, softmax_max, softmax_sum, attention_in, scale_value, keep_prob,
                   actual_seq_qlen, actual_seq_kvlen, sparse_mode):  # fmt: skip
    assert softmax_max.shape == (*query.shape[:2], 8) and softmax_max.is_contiguous()
    grads: list[list[torch.Tensor]] = [[], [], []]
    of_queries = [segments(t, actual_seq_qlen) for t in (query, dy, attention_in, softmax_max[..., :1], softmax_sum[..., :1])]  # fmt: skip
    of_keys = [segments(t, actual_seq_kvlen) for t in (key, value)]
    for q, g, o, peak, total, k, v in zip(*of_queries, *of_keys, strict=True):
        p = (scores(q, k, sparse_mode == 3, scale_value) - peak).exp() / total
        groups = q.shape[1] // k.shape[1]
        slope = p * (g @ v.repeat_interleave(groups, 1).transpose(2, 3) - (g * o).sum(-1, keepdim=True)) * scale_value  # fmt: skip
        grads[0].append(slope @ k.repeat_interleave(groups, 1))
        grads[1].append((slope.transpose(2, 3) @ q).unflatten(1, (-1, groups)).sum(2))
        grads[2].append((p.transpose(2, 3) @ g).unflatten(1, (-1, groups)).sum(2))
    return *(packed(parts) for parts in grads), None


OPERATORS = SimpleNamespace(npu_fusion_attention=attention, npu_fusion_attention_grad=attention_grad)


CASES = [
    (True, [5, 3, 1], [5, 3, 1]),
    (False, [5, 3], [2, 7]),
    (False, [5, 3, 0, 2, 4], [2, 0, 4, 7, 1]),  # a sample that has rows on some ranks only
    (False, [0, 6], [3, 2]),
    (False, [0, 6], [3, 0]),
    (True, [0, 4, 0, 2], [0, 4, 0, 2]),
]


@pytest.mark.parametrize("causal, queries, keys", CASES)
def test_blocks_by_the_fused_operators_are_those_of_the_cpu(monkeypatch, causal, queries, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2), (sum(queries), 4))
    q, k, v, g = (torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in shapes)

    def both() -> list[torch.Tensor]:
        out, lse = forward_block(q, k, v, queries, keys, causal, 0.3)
        grads = [torch.zeros_like(tensor) for tensor in (q, k, v)]
        backward_block(g, q, k, v, out, lse, queries, keys, causal, 0.3, *grads)
        return [out, lse, *grads]

    expected = both()
    kernel = flash_kernels.Kernel(
        functools.partial(flash_kernels._ascend_forward, OPERATORS),
        functools.partial(flash_kernels._ascend_backward, OPERATORS),
    )
    monkeypatch.setattr(ring_attention.flash_kernels, "kernel", lambda *_: kernel)
    for other in ("_forward", "_backward"):  # whole scores, where the kernel is not taken
        monkeypatch.setattr(ring_attention, other, None)
    for mine, theirs in zip(both(), expected, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=1e-6
        )  # the operators want float32 statistics


def test_a_cpu_and_float32_have_no_fused_kernel():
    assert flash_kernels.kernel("cpu", torch.bfloat16, 64) is None
    assert flash_kernels.kernel("meta", torch.float32, 64) is None
