"""Diffusion transformers under every layout that their cards promise: the single process's loss, gradients and weights.

float64, tiny models of diffusers' classes, features by their own encoders. One row by default, the matrix is slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.parallel import apply as layout
from polymodal.parallel import tensor
from tests.parallel.harness import run
from tests.parallel.layouts import Layout
from tests.parallel.parity import BOUND, parity
from tests.parallel.parity_dits import MATRIX, MODELS, OTHERS, SINGLE


def equal(name: str, layouts: list[Layout]) -> None:
    for result in parity(name, layouts, steps=1):
        assert max(result.loss, result.gradients, result.norm, result.weights) < BOUND, result


def test_two_streams_and_masked_text_are_the_single_process():
    layouts = [
        Layout("TP 2 + SP", 2, {"tp": 2}),
        Layout("ring 2", 2, {"cp": 2, "ulysses": 1}),
        Layout("PP 2, 1 + 3 blocks", 2, {"pp": 2, "pp_layers": {"blocks": [1, 3]}}),
    ]
    equal("hunyuan-video", layouts)


def test_stages_hand_on_rows_of_cut_sequences():
    """Two shapes in a step, computed again when another's lengths came last; and cut by a stage that holds no block."""
    cut = {"pp": 2, "cp": 2, "ulysses": 1, "recompute": "full"}
    layouts = [Layout("auto", 4, cut), Layout("0 + 4", 4, {**cut, "pp_layers": {"blocks": [0, 4]}})]
    equal("wan", layouts)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(MODELS)), ids=MODELS)
def test_every_layout_is_the_single_process(at: int):
    """Every layout on one of the models, in turns; `make parity` measures all of them."""
    equal(MODELS[at], [row for row in MATRIX[at :: len(MODELS)] if row.fits(MODELS[at])])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan-i2v", "wan2.2-5b", "hunyuan-video-i2v", "cogvideox", "flux-kontext"])
def test_the_other_forms_of_these_models_are_cut_alike(name: str):
    equal(name, [Layout("TP 2 + SP", 2, {"tp": 2}), Layout("ring 2", 2, {"cp": 2, "ulysses": 1})])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_sharded_model_is_the_single_process(name: str):
    equal(name, [Layout("FSDP2 x 2", 2)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_a_sharded_model_is_the_single_process_in_float32(name: str):
    for result in parity(name, [Layout("FSDP2 x 2", 2)], steps=1, dtype=torch.float32):
        assert max(result.loss, result.gradients) < 1e-5, result


@pytest.mark.parametrize(
    "name", ["wan2.1", "wan2.2", "flux.1", "hunyuan-video", "cogvideox", "sd3", "open-sora-plan"]
)
def test_heads_that_do_not_divide_are_refused_from_the_config_alone(name: str):
    card = catalog.cards()[name]
    config = {"num_attention_heads": 6, "attention_head_dim": 8}
    (reason,) = layout.check(card, config, ParallelSizes(1, 1, 1, 1, 4))
    assert "parallel.tp = 4 does not divide num_attention_heads = 6" in str(reason)
    assert "Choose parallel.tp from 1, 2, 3, 6." in str(reason)
    assert not layout.check(card, config, ParallelSizes(1, 1, 1, 1, 3))


def test_a_ring_is_refused_where_a_rank_needs_every_token():
    card, config = catalog.cards()["open-sora-plan"], {"num_attention_heads": 4, "attention_head_dim": 12}
    asked = recipes.Parallel(cp=4, ulysses=2)
    (reason,) = layout.check(card, config, ParallelSizes(1, 1, 1, 4, 1), asked)
    assert "a ring of 2: a sequence of every n-th token needs all tokens on a rank" in str(reason)
    assert not layout.check(card, config, ParallelSizes(1, 1, 1, 4, 1))


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
