"""Cutting a model into stages: even and uneven, names kept, every parameter on one stage, refusals."""

from dataclasses import replace

import pytest
import torch

from polymodal.errors import PolymodalError
from polymodal.models.card import Dropped
from polymodal.parallel.pipeline import pipeline_blocks, prune, split
from tests.parallel.spike.qwen import tiny_qwen2_vl
from tests.parallel.spike.wan import CARD as WAN
from tests.parallel.spike.wan import wan
from tests.parallel.spike.whisper import CARD as WHISPER
from tests.parallel.spike.whisper import whisper


def test_layers_are_spread_evenly_the_remainder_in_the_middle():
    assert split(8, 4) == (range(0, 2), range(2, 4), range(4, 6), range(6, 8))
    assert [len(held) for held in split(9, 4)] == [2, 3, 2, 2]
    assert [len(held) for held in split(10, 4)] == [2, 3, 3, 2]
    assert split(4, 2, [1, 3]) == (range(0, 1), range(1, 4))


@pytest.mark.parametrize(
    "layers, stages, asked", [(3, 4, None), (4, 2, [1, 2]), (4, 2, [4, 0]), (4, 2, [2, 1, 1])]
)
def test_what_cannot_be_cut_is_said(layers, stages, asked):
    with pytest.raises(PolymodalError, match=f"{layers} layers cannot be cut into {stages} stages"):
        split(layers, stages, asked)


def test_a_card_that_cannot_be_cut_gives_its_reason():
    model, _ = whisper()
    with pytest.raises(PolymodalError, match="whisper cannot be cut .* an encoder and a decoder"):
        prune(model, WHISPER, 0, 2)


@pytest.mark.parametrize("stages", [2, 3])
def test_every_parameter_is_on_the_stage_that_needs_it_under_its_name(stages):
    family = tiny_qwen2_vl(3)
    whole = {name for name, _ in family.build().trained.named_parameters(remove_duplicate=False)}
    found: list[str] = []
    for index in range(stages):
        model = family.build().trained
        stage = prune(model, family.card, index, stages)
        found += [name for name, _ in model.named_parameters()]
        layers = model.model.language_model.layers
        assert [i for i, layer in enumerate(layers) if not isinstance(layer, Dropped)] == list(stage.layers)
        assert isinstance(model.model.visual, Dropped) == (index > 0)
        assert isinstance(model.lm_head, Dropped) == (index < stages - 1)
        assert not isinstance(model.model.language_model.rotary_emb, Dropped)
        assert stage.tied == (
            (("model.language_model.embed_tokens.weight", 0), ("lm_head.weight", stages - 1)),
        )
        assert stage.copies == ({"lm_head.weight"} if stage.last else set())
    assert sorted(found) == sorted(whole)


def test_one_stage_is_the_whole_model():
    family = tiny_qwen2_vl(2)
    model = family.build().trained
    before = [name for name, _ in model.named_modules()]
    stage = prune(model, family.card, 0, 1)
    assert [name for name, _ in model.named_modules()] == before
    assert stage.tied == () and stage.copies == frozenset() and stage.first and stage.last


def test_a_parameter_of_the_root_can_belong_to_a_stage():
    first, _ = wan()
    last, _ = wan()
    names = {name for name, _ in first.named_parameters()}
    assert pipeline_blocks(first, WAN) == ["blocks.0", "blocks.1"]
    prune(first, WAN, 0, 2)
    prune(last, WAN, 1, 2)
    held = [{name for name, _ in model.named_parameters()} for model in (first, last)]
    assert held[0] | held[1] == names and not held[0] & held[1]
    assert "scale_shift_table" in held[1] and "patch_embedding.weight" in held[0]


def test_a_misspelt_card_is_not_silently_whole():
    model, _ = wan()
    with pytest.raises(PolymodalError, match="places `no_such_module`"):
        prune(model, replace(WAN, last=("norm_out", "no_such_module")), 0, 2)
    with pytest.raises(PolymodalError, match="0 layers"):
        prune(model, replace(WAN, blocks=("no_such_blocks.*",)), 0, 2)


def test_dropped_hands_its_first_argument_through():
    hidden = torch.ones(2)
    assert Dropped()(hidden, 1, other=2) is hidden
    assert not list(Dropped().parameters())
