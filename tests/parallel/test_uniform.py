"""Diffusion transformers over cut sequences: prediction, loss and summed gradients of one process, any lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from polymodal.core.errors import PolymodalError
from polymodal.distributed.context_parallel import Context
from polymodal.models import catalog
from polymodal.parallel import dit_context_parallel
from tests.bounds import EXACT
from tests.parallel.exact import float64
from tests.parallel.harness import run


def wan() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two samples of 3 x 1 x 5 patches: 15 rows divide by nothing; 4 heads."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
        num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 3, 2, 10),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    """13 rows of picture joined with 5 of text; 4 heads."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=16,
        pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 13, 8), "encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.3, 0.8]), "img_ids": torch.randint(0, 5, (13, 3)).float(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def step(model: nn.Module, inputs: dict[str, Tensor], copies: int) -> tuple[Tensor, dict[str, Tensor]]:
    (out,) = model(**inputs, return_dict=False)
    (out.square().mean() / copies).backward()
    return out.detach(), {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
    }


def compare(rank: int, which: str, ulysses: int) -> dict[str, Any]:
    size = dist.get_world_size()
    torch.manual_seed(0)
    model, inputs = flux() if which == "flux" else wan()
    card = catalog.cards()["flux.1" if which == "flux" else "wan2.2"]
    if which == "wan, a timestep a token":
        inputs["timestep"] = torch.rand(2, 15) * 1000
    model, inputs = model.double(), {name: tensor.double() for name, tensor in inputs.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with float64():
        out, gradients = step(model, inputs, 1)
        model.zero_grad(set_to_none=True)
        cut = dit_context_parallel.apply(
            model, card, Context(init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))["cp"], ulysses)
        )
        model.forward = cut.around(type(model).forward.__get__(model))  # as Generation.forward calls it
        found, mine = step(model, inputs, size)
    for grad in mine.values():
        dist.all_reduce(grad)
    errors = {name: float((mine[name] - grad).norm() / (grad.norm() + 1e-9)) for name, grad in gradients.items()}  # fmt: skip
    return {"out": float((found - out).abs().max()), "grad": max(errors.items(), key=lambda item: item[1])}


@pytest.mark.parametrize(
    "which, world, ulysses",
    [
        ("wan, a timestep a token", 2, 1),
        ("flux", 4, 2),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("wan", 4, 2), ("flux", 2, 2), ("flux", 3, 1))
        ),
    ],
)
def test_a_cut_transformer_is_the_whole_one(which: str, world: int, ulysses: int):
    for found in run(world, compare, which, ulysses):
        assert found["out"] < EXACT and found["grad"][1] < EXACT, found


def test_the_backend_alone_is_the_librarys_own():
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    query, key, value = (torch.randn(2, 7, 4, 8) for _ in range(3))
    ours = dispatch_attention_fn(query, key, value, backend=dit_context_parallel.register())
    torch.testing.assert_close(ours, dispatch_attention_fn(query, key, value, backend=AttentionBackendName.NATIVE))  # fmt: skip


def test_rows_of_no_stream_and_of_streams_too_alike_are_refused():
    class Three:
        size, rank = 3, 0

    cut = dit_context_parallel.DiTContextParallel(Three())  # type: ignore[arg-type]
    cut.lengths = {("x", "hidden_states"): 9, ("y", "encoder_hidden_states"): 7}
    assert cut.rows(5) == (5, 5, 6)  # joined
    with pytest.raises(ValueError, match="attention over 4 rows"):
        cut.rows(4)
    with pytest.raises(ValueError, match="attention over 3 rows"):  # of 9, but rank 2 has as many of 7
        cut.rows(3)
    with pytest.raises(ValueError, match="7 rows leave the model"):
        cut.gather(torch.zeros(1, 7, 2), 1)
    query = torch.zeros(1, 5, 2, 4)
    cut.lengths = {("x", "hidden_states"): 9, ("y", "encoder_hidden_states"): 7}
    with pytest.raises(ValueError, match="neither causal order"):
        dit_context_parallel.attention(query, query, query, is_causal=True, _parallel_config=cut)
    with pytest.raises(ValueError, match=r"of 16 rows takes masks of its keys, not torch.float32 \[5, 5\]"):
        cut.kept(torch.ones(5, 5))


def test_a_sequence_with_fewer_rows_than_ranks_is_refused_with_both_numbers():
    class Four:
        size, rank = 4, 0

    cut = dit_context_parallel.DiTContextParallel(Four())  # type: ignore[arg-type]
    with pytest.raises(
        PolymodalError, match=r"3 tokens \(hidden_states\) cannot be cut over parallel.cp = 4"
    ):
        cut.cut(torch.zeros(1, 3, 2), 1, ("x", "hidden_states"))
    rows = [
        dit_context_parallel.DiTContextParallel(type("Rank", (), {"size": 4, "rank": r})()) for r in range(4)
    ]  # type: ignore[arg-type]
    for own in rows:
        own.lengths = {("x", "hidden_states"): 9}
    assert [own.leading(5) for own in rows] == [2, 2, 1, 0]  # of 2, 2, 2 and 3
