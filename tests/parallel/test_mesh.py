"""Sizes that do not fit are refused in one sentence; a rank's place and its views are what the order says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.parallel import tensor
from polymodal.parallel.apply import apply, check, matching, recomputed
from polymodal.recipe import Model, Parallel, Recipe
from tests.models import tiny
from tests.parallel.harness import run


@pytest.mark.parametrize(
    "keys, world, words",
    [
        ({"tp": 3}, 8, "8 processes cannot be divided by .* Start 6 or 9 processes, or lower one of these."),
        (
            {"tp": 4, "pp": 2},
            6,
            "6 processes cannot be divided by .* Start 8 processes, or lower one of these.",
        ),
        ({"tp": 2, "dp_shard": 2}, 8, "asks for 4 processes .* Set parallel.dp_shard to 4 or -1, or start 4"),
        ({"tp": 3, "dp_shard": 2}, 8, "asks for 6 processes .* Set parallel.dp_shard to -1, or start 6"),
        ({"dp_shard": 0}, 1, "no meaning"),
        ({"ep": 3}, 4, "ep = 3 does not divide dp_shard x cp x tp = 4"),
    ],
)
def test_sizes_that_do_not_fit(keys: dict, world: int, words: str):
    with pytest.raises(PolymodalError, match=words):
        ParallelSizes.of(Parallel(**keys), world)


def test_what_is_left_goes_to_dp_shard():
    sizes = ParallelSizes.of(Parallel(dp_replicate=2, tp=2), 16)
    assert (sizes.dp_shard, sizes.dp, sizes.world) == (4, 8, 16)


def _places(rank: int) -> tuple:
    mesh = Mesh(ParallelSizes(1, 2, 1, 1, 2), "cpu", rank)
    total = torch.tensor([1.0])
    dist.all_reduce(total, group=mesh.loss_group)
    tp = mesh.view("tp")
    assert mesh.view("cp") is None and tp is not None
    return mesh.dp_rank, tp.get_local_rank(), mesh.fsdp.ndim, mesh.fsdp.size(), total.item()


def test_places_and_views():
    assert run(4, _places) == [(0, 0, 2, 2, 2.0), (0, 1, 2, 2, 2.0), (1, 0, 2, 2, 2.0), (1, 1, 2, 2, 2.0)]


def _expert_places(rank: int) -> tuple:
    mesh = Mesh(ParallelSizes(1, 1, 2, 1, 2, ep=2), "cpu", rank)
    ep, sharded = mesh.view("ep"), mesh.expert_fsdp
    assert ep is not None and mesh.fsdp.size() == 2
    return dist.get_process_group_ranks(ep.get_group()), dist.get_process_group_ranks(sharded.get_group())


def test_experts_lie_on_the_same_ranks_in_another_order():
    places = run(4, _expert_places)
    assert places == [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]


CARD = ModelCard("toy", Family, (), (), ("layers.*",), {}, tensor_plan={"layers.*": "mlp"})
TEXT = {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 1000, "intermediate_size": 96}


def _sizes(**keys: int) -> ParallelSizes:
    return ParallelSizes(**{"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **keys})


def test_check_says_what_would_work():
    assert check(CARD, SimpleNamespace(**TEXT), _sizes(tp=4)) == []
    (reason,) = check(CARD, SimpleNamespace(**TEXT), _sizes(tp=8, dp_shard=2))[:1]
    assert "num_attention_heads = 12" in reason.message and reason.hint == "Choose parallel.tp from 1, 2, 4."


def test_two_names_of_one_number_are_one_reason():
    """qwen2.5-vl's vision tower gives its heads under both of the library's names."""
    config = tiny.config("qwen2.5-vl")
    assert config.vision_config.num_heads == config.vision_config.num_attention_heads == 2
    reasons = check(catalog.cards()["qwen2.5-vl"], config, _sizes(tp=4, dp_shard=1))
    (said,) = [reason.message for reason in reasons if "vision_config" in reason.message]
    assert "does not divide vision_config.num_heads = 2" in said


def test_check_lists_every_reason():
    limited = ModelCard("toy", Family, (), (), (), {}, limits={"pp": "its towers share weights."})
    reasons = check(limited, SimpleNamespace(**TEXT), _sizes(pp=2, tp=2, ep=2))
    assert [r.message.split(":")[0] for r in reasons] == [
        "toy cannot be laid out with parallel.pp = 2",
        "toy has no tensor-parallel plan.",
        "parallel.ep = 2",
    ]


def test_check_says_how_experts_can_be_spread():
    sparse = ModelCard("toy", Family, (), (), (), {}, expert_plan={"layers.*": "dispatch"})
    assert check(sparse, SimpleNamespace(**TEXT, num_experts=6), _sizes(ep=2, dp_shard=4)) == []
    (reason,) = check(sparse, SimpleNamespace(**TEXT, num_experts=6), _sizes(ep=4, dp_shard=4))
    assert reason.message == "parallel.ep = 4 does not divide the 6 experts a layer of toy."
    assert reason.hint == "Choose parallel.ep from 1, 2."
    (reason,) = check(sparse, SimpleNamespace(**TEXT), _sizes(ep=2, dp_shard=4))
    assert reason.message == "parallel.ep = 2: toy has no experts."


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"zero": 2, "reshard_after_forward": True}, "zero = 2 keeps parameters whole over a step"),
        ({"pp": 2, "reshard_after_forward": True}, "zero = 1 keeps parameters whole over a step"),
        ({"pp": 2, "pp_schedule": "ZBVZeroBubble", "zero": 2}, "zero = 2 is not for it"),
        ({"recompute": "full", "recompute_first": 1, "recompute_every": 2}, "two ways to choose blocks"),
        ({"recompute_first": 2}, "recompute_first chooses blocks, but parallel.recompute is none"),
        (
            {"recompute": "full", "recompute_keep": ["attention"]},
            "full has no use for parallel.recompute_keep",
        ),
        ({"pp_layers": {"language": [2, 2]}}, "pp_layers says how stages are cut, but parallel.pp is 1"),
        ({"pp_virtual": 2}, "pp_virtual says how stages are cut, but parallel.pp is 1"),
        ({"compile": True, "recompute": "selective"}, "cannot see the matrix products"),
        ({"compile": True, "offload": ["activations"]}, "cannot see what compiled blocks save"),
    ],
)
def test_keys_that_contradict_each_other(keys: dict, words: str):
    (reason,) = check(CARD, SimpleNamespace(**TEXT), _sizes(), Parallel(**keys))
    assert words in reason.message and reason.hint


@pytest.mark.parametrize(
    "keys, names",
    [
        ({}, ["eyes.0", "eyes.1", "eyes.2", "layers.0", "layers.1"]),
        ({"recompute_blocks": ["vision"]}, ["eyes.0", "eyes.1", "eyes.2"]),
        ({"recompute_blocks": ["layers.1", "eyes.*"]}, ["layers.1", "eyes.0", "eyes.1", "eyes.2"]),
        ({"recompute_first": 1}, ["eyes.0", "layers.0"]),
        ({"recompute_every": 2}, ["eyes.0", "eyes.2", "layers.0"]),
        ({"recompute_first": 2, "recompute_blocks": ["vision"]}, ["eyes.0", "eyes.1"]),
    ],
)
def test_which_blocks_are_recomputed(keys: dict, names: list[str]):
    model = _toy()
    model.eyes = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    card = ModelCard("toy", Family, (), (), ("eyes.*", "layers.*"), {"vision": ("eyes",)})
    blocks = matching(model, card.blocks, "the card")
    assert list(recomputed(model, card, Parallel(recompute="full", **keys), blocks)) == names


def _toy() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    return model


def test_a_pattern_without_a_module_names_the_blocks():
    with pytest.raises(PolymodalError, match=r"parallel.recompute_blocks: .*`layer\.\*`.*layers\.\*"):
        matching(_toy(), ["layer.*"], "parallel.recompute_blocks")


def test_a_card_with_a_wrong_style_is_refused():
    card = ModelCard("toy", Family, (), (), (), {}, tensor_plan={"layers.*": "sideways"})
    with pytest.raises(PolymodalError, match="style `sideways`"):
        tensor.resolve(_toy(), card)


def _one_rank(rank: int) -> tuple[str, str, bool]:
    """One process in its own precision stays plain; with bf16 arithmetic it is FSDP2 on one rank, masters float32."""
    from torch.distributed.tensor import DTensor

    found = []
    for precision in ("fp32", "bf16"):
        recipe = Recipe(model=Model(source="toy"), train={"precision": precision})
        model = _toy()
        apply(model, CARD, Mesh(_sizes(), "cpu", rank), recipe)
        found.append(model.layers[0].weight)
    return type(found[0]).__name__, type(found[1]).__name__, isinstance(found[1], DTensor)


def test_one_process():
    assert run(1, _one_rank) == [("Parameter", "DTensor", True)]
