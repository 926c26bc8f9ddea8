"""Recompute computes again what it should, keeps what it should, and changes neither values nor names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from polymodal.parallel import memory
from polymodal.runtime import device


class Operators(TorchDispatchMode):
    """Counts aten operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden: torch.Tensor, *, scale: torch.Tensor) -> tuple[torch.Tensor, str]:
        heads = self.up(hidden).tanh().view(1, 2, 4, 8)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads).reshape(4, 16)
        return hidden + self.dropout(self.down(mixed)) * scale, "a value that is no tensor"


def _backward(
    policy: str | None, train: bool = True, offload: bool = False, keep: Any = tuple(memory.OPERATORS)
) -> tuple[torch.Tensor, Counter[str], list[str]]:
    torch.manual_seed(0)
    block = Block().train(train)
    if policy is not None:
        memory.recompute([block], policy, keep, offload)  # type: ignore[arg-type]
    if offload:
        memory.offload_activations([block])
    x = torch.randn(4, 8, requires_grad=True)
    torch.manual_seed(1)
    out, _ = block(x, scale=torch.tensor(2.0))
    with Operators() as operators:
        out.square().sum().backward()
    names = [name for name, _ in block.named_parameters()]
    return (
        torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in block.parameters())]),
        operators.seen,
        names,
    )


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("policy, products, attentions", [("full", 2, 1), ("selective", 0, 0)])
def test_what_is_computed_again(policy: str, products: int, attentions: int):
    expected, plain, names = _backward(None)
    found, seen, same = _backward(policy)
    torch.testing.assert_close(found, expected)  # dropout drew the same mask again
    assert names == same
    assert seen["mm"] - plain["mm"] == products
    assert seen[ATTENTION] - plain[ATTENTION] == attentions
    assert seen["tanh"] - plain["tanh"] == 1


def test_the_values_of_recompute_keep():
    expected, plain, _ = _backward(None)
    for keep, products, attentions in ((["attention"], 2, 0), (["matmul"], 0, 1), ([], 2, 1)):
        found, seen, _ = _backward("selective", keep=keep)
        torch.testing.assert_close(found, expected)
        assert (seen["mm"] - plain["mm"], seen[ATTENTION] - plain[ATTENTION]) == (products, attentions)


def test_evaluation_is_not_recomputed():
    expected, plain, _ = _backward(None, train=False)
    found, seen, _ = _backward("full", train=False)
    torch.testing.assert_close(found, expected)
    assert seen == plain


def test_the_kept_operators_exist():
    names = {overload.overloadpacket.__name__ for overload in memory.kept_overloads()}
    assert {"mm", "addmm", "bmm", ATTENTION} <= names


class _Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def test_packed_attention_of_cuda_is_among_the_kept_operators():
    """Which operator the dispatcher sees there, on tensors without data."""
    with FakeTensorMode(), _Dispatched() as seen:
        query = torch.empty(12, 4, 64, dtype=torch.bfloat16, device="cuda")
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        for causal, key in ((True, query[:, :2]), (False, query)):
            out = device._flash_packed(query, key, key, ends, (5, 7), 7, causal, None)
            assert out.shape == query.shape and out.device.type == "cuda"
    attention = [operator for operator in seen.operators if operator.namespace == "torch_attn"]
    assert len(attention) == 2 and set(attention) <= set(memory.kept_overloads(["attention"]))


def test_a_copy_on_the_host_is_laid_out_alike():
    turned = torch.arange(6.0).view(2, 3).t()
    copy = memory.to_host(turned)
    assert (
        copy.stride() == turned.stride()
        and torch.equal(copy, turned)
        and copy.data_ptr() != turned.data_ptr()
    )


@pytest.mark.parametrize("policy", [None, "full", "selective"])
def test_activations_on_the_host(policy: str | None, monkeypatch: pytest.MonkeyPatch):
    """The same values; what is saved goes to the host once each, but for parameters and small tensors."""
    monkeypatch.setattr(memory, "SMALLEST", 1)
    moved: list[tuple[int, ...]] = []
    original = memory.to_host

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(memory, "to_host", to_host)
    expected, plain, _ = _backward(None)
    found, seen, _ = _backward(policy, offload=True)
    torch.testing.assert_close(found, expected)
    if policy == "selective":  # products and attention wait on the host too, and are not computed again
        assert (4, 8) in moved and (4, 16) in moved and (1, 2, 4, 8) in moved
        assert (seen["mm"], seen[ATTENTION]) == (plain["mm"], plain[ATTENTION])
        return
    if policy is None:
        assert (4, 16) in moved and (16, 8) not in moved and (8, 16) not in moved  # activations, not weights
        assert moved.count((4, 8)) <= 2  # the input of `up`, and the dropout's mask
    else:
        assert moved == [(4, 8)]  # what enters by position; tables given by keyword are shared by all blocks
