"""Diffusion transformers under every layout that their cards promise: the single process's loss, gradients and weights.

float64, tiny models of diffusers' classes, features by their own encoders. One row by default, the matrix is slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.errors import PolymodalError
from polymodal.models import catalog
from polymodal.models.card import Family, ModelCard
from polymodal.parallel import apply as layout
from polymodal.parallel import tensor
from polymodal.parallel.mesh import Mesh, ParallelSizes
from tests.parallel.harness import run
from tests.parallel.layouts import Layout
from tests.parallel.parity import BOUND, parity

TENSOR = [
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP, full recompute", 2, {"tp": 2, "recompute": "full"}),
    Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
    Layout("FSDP2 x 2, TP 2 + SP", 4, {"tp": 2}),
]


def equal(name: str, layouts: list[Layout]) -> None:
    for result in parity(name, layouts, steps=1):
        assert max(result.loss, result.gradients, result.norm, result.weights) < BOUND, result


def test_two_streams_over_a_tensor_parallel_group_are_the_single_process():
    equal("hunyuan-video", [Layout("TP 2 + SP", 2, {"tp": 2})])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wan", "wan-i2v", "wan2.2-5b", "flux", "cogvideox", "sd3.5", "hunyuan-video-i2v"]
)
def test_a_tensor_parallel_group_is_the_single_process(name: str):
    equal(name, TENSOR)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "flux.1", "hunyuan-video", "cogvideox", "sd3"])
def test_heads_that_do_not_divide_are_told_from_the_config_alone(name: str):
    card = catalog.cards()[name]
    config = {"num_attention_heads": 6, "attention_head_dim": 8}
    (reason,) = layout.check(card, config, ParallelSizes(1, 1, 1, 1, 4))
    assert "parallel.tp = 4 does not divide num_attention_heads = 6" in str(reason)
    assert "Choose parallel.tp from 1, 2, 3, 6." in str(reason)
    assert not layout.check(card, config, ParallelSizes(1, 1, 1, 1, 3))


def _layer_norm_across(rank: int) -> str:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_q = nn.LayerNorm(8)

    plan = {"": "stream", "norm_q": "norm_across_heads"}
    card = ModelCard("toy", Family, (), (), (), {}, tensor_plan=plan)
    mesh = Mesh(ParallelSizes(1, 1, 1, 1, 2), "cpu", rank).view("tp")
    with pytest.raises(PolymodalError) as error, torch.device("meta"):
        tensor.apply(Model(), card, [], mesh, False)
    return str(error.value)


def test_a_norm_over_all_heads_that_is_no_rms_norm_is_refused():
    for message in run(2, _layer_norm_across):
        assert "`norm_q` is a LayerNorm over all heads" in message and "Set parallel.tp to 1" in message
