"""Accelerators' fused attention with the log of the softmax's denominator, forward and backward apart.

A ring needs it to merge attention over parts of the keys. None of it runs on a CPU, nor was it run there:
signatures are those of torch's schemas and of the Ascend manual. ring_attention.py has what runs on a CPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymodal.core.tensors import to_device
from polymodal.runtime import device


@dataclass(frozen=True)
class Kernel:
    """forward(query [n, H, D], key [m, K, D], value, query_runs, key_runs, causal, scale) -> ([n, H, D], lse
    [n, H]); backward(grad, query, key, value, out, lse, query_runs, key_runs, causal, scale) -> gradients of
    the three. Runs are the rows of every segment, on the host, all above zero."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel(kind: str, dtype: torch.dtype, head_dim: int) -> Kernel | None:
    """The kernel of a kind of device, or None. float16 and bfloat16 only, head_dim <= 256."""
    if kind == "cpu" or dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return None
    return _found(kind)


@functools.cache
def _found(kind: str) -> Kernel | None:
    operators = device.ascend_operators(kind)
    if operators is not None:
        return Kernel(
            functools.partial(_ascend_forward, operators), functools.partial(_ascend_backward, operators)
        )
    found = device.has_kernel("aten::_flash_attention_backward", kind)
    return Kernel(_flash_forward, _flash_backward) if found else None


@functools.lru_cache(1024)  # the same for every layer of a step
def _starts(runs: tuple[int, ...], on: torch.device) -> Tensor:
    starts = torch.tensor([0, *itertools.accumulate(runs)], dtype=torch.int32)
    return to_device(starts, on)


def _lengths(query, query_runs, key_runs) -> tuple:
    """Cumulative lengths of queries and keys, and the longest of each."""
    starts = (_starts(tuple(runs), query.device) for runs in (query_runs, key_runs))
    return *starts, max(query_runs), max(key_runs)


def _flash_forward(query, key, value, query_runs, key_runs, causal, scale):
    """torch's variable-length flash attention; its log-sum-exp is [H, n]."""
    lengths = _lengths(query, query_runs, key_runs)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *lengths, 0.0, causal, False, scale=scale
    )
    return out, lse.transpose(0, 1)


def _flash_backward(grad, query, key, value, out, lse, query_runs, key_runs, causal, scale):
    lengths = _lengths(query, query_runs, key_runs)
    lse = lse.transpose(0, 1).contiguous().float()
    no_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # random state: there is no dropout
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, lse, *lengths, 0.0, causal, no_state, no_state, scale=scale
    )


@functools.cache
def _mask(on: torch.device) -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool, device=on).triu(1)


def _ascend(query, query_runs, key_runs, causal) -> dict[str, Any]:
    """TND wants the ends of segments on the host; sparse mode 3 is causal with a compressed mask."""
    return {
        "input_layout": "TND",
        "atten_mask": _mask(query.device) if causal else None,
        "keep_prob": 1.0,
        "actual_seq_qlen": list(itertools.accumulate(query_runs)),
        "actual_seq_kvlen": list(itertools.accumulate(key_runs)),
        "sparse_mode": 3 if causal else 0,
    }


def _ascend_forward(operators, query, key, value, query_runs, key_runs, causal, scale):
    """Its softmax maximum and sum are [n, H, 8], the same eight times."""
    out, peak, total, *_ = operators.npu_fusion_attention(
        query, key, value, query.shape[1], scale=scale, **_ascend(query, query_runs, key_runs, causal)
    )
    return out, peak[..., 0] + total[..., 0].log()


def _ascend_backward(operators, grad, query, key, value, out, lse, query_runs, key_runs, causal, scale):
    """exp(S - maximum) / sum: with the log-sum-exp as maximum the sum is 1."""
    peak = lse.float().unsqueeze(-1).expand(*lse.shape, 8).contiguous()
    known = {"softmax_max": peak, "softmax_sum": torch.ones_like(peak), "attention_in": out}
    known |= _ascend(query, query_runs, key_runs, causal)
    return operators.npu_fusion_attention_grad(
        query, key, value, grad, query.shape[1], scale_value=scale, **known
    )[:3]
