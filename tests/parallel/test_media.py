"""Pictures dealt out over ranks: even, whole, and nearer ranks first; a rank with many does not hold up the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.sample import Batch, pack
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog
from polymodal.models.family import Family
from polymodal.parallel import media
from polymodal.parallel.apply import apply
from polymodal.parallel.batches import PackedBatchSharding
from polymodal.recipe import Data, Model, Parallel, Recipe, Train
from polymodal.train.step import bind
from tests.models import tiny
from tests.parallel.harness import run


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.floats(0.1, 100), max_size=40),
    homes=st.integers(1, 4),
    copies=st.integers(1, 3),
    data=st.data(),
)
def test_no_rank_has_more_than_the_mean_and_one_part(costs, homes, copies, data):
    of = [data.draw(st.integers(0, homes - 1)) for _ in costs]
    owner = media.assign_media(costs, of, homes * copies, copies)
    load = [0.0] * (homes * copies)
    for rank, cost in zip(owner, costs, strict=True):
        load[rank] += cost
    assert max(load) <= sum(costs) / len(load) + max(costs, default=0) + 1e-6


def test_parts_stay_at_home_where_that_is_even():
    assert media.assign_media([3.0, 3.0, 3.0, 3.0], [0, 0, 1, 1], 4, 2) == [0, 1, 2, 3]
    assert media.assign_media([1.0, 1.0], [0, 1], 2, 1) == [0, 1]
    assert sorted(media.assign_media([1.0] * 4, [1] * 4, 2, 1)) == [0, 0, 1, 1]


def test_a_request_is_short_however_many_tokens():
    made = media.request([(1, 4, 4)], torch.tensor([0, 1, 2, 7, 8, 3]))
    assert made.runs == ((0, 3), (7, 9), (3, 4)) and made.tokens.tolist() == [0, 1, 2, 7, 8, 3]
    assert media.request([], torch.zeros(0, dtype=torch.int64)).runs == ()


def skewed(family: Family, rank: int) -> Batch:
    """Rank 0 has eleven pictures and a video, rank 1 one small picture, the others text."""
    processor = family.media_processor(Data())
    pictures: list[Any] = {0: [tiny.picture(24 + 8 * (i % 5), 32, i) for i in range(11)], 1: [tiny.picture(16, 16)]}.get(rank, [])  # fmt: skip
    if rank == 0:
        pictures.append(tiny.clip(12))
    return pack([tiny.sample(processor, [*pictures, "Describe what you see, one two three."], id=rank)])


def vision_flops(rank: int, directory: str, balance: bool) -> tuple[float, int]:
    """FLOPs of this rank's vision tower in a forward pass, counted by torch, and media tokens it got features of."""
    warnings.simplefilter("ignore")
    recipe = Recipe(
        model=Model(source=directory, init="random"), parallel=Parallel(balance_media=balance), train=Train(precision="fp32")
    )  # fmt: skip
    family = catalog.family(recipe.model)
    model = family.build()
    bind(model, family)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, dist.get_world_size()), "cpu", rank)
    apply(model, family.card, mesh, recipe)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.ones_(tensor)
    (batch,) = PackedBatchSharding(family, mesh, recipe.parallel)([skewed(family, rank)])
    counter = FlopCounterMode(display=False)
    model.model.visual.register_forward_pre_hook(lambda *_: counter.__enter__() and None)
    model.model.visual.register_forward_hook(lambda *_: counter.__exit__(None, None, None))
    model(batch, lambda output, batch: output.hidden_states)
    return float(counter.get_total_flops()), family.received(family.streams[0], batch)


def test_on_a_skewed_batch_no_rank_computes_much_more_than_the_mean(tmp_path):
    source = str(tiny.checkpoint("qwen3-vl", tmp_path))
    found = {balance: run(4, vision_flops, source, balance) for balance in (False, True)}
    busiest = {
        balance: max(f for f, _ in ranks) * 4 / sum(f for f, _ in ranks) for balance, ranks in found.items()
    }
    print(f"busiest rank's vision FLOPs over the mean: {busiest[False]:.2f} alone, {busiest[True]:.2f} dealt out")  # fmt: skip
    assert busiest[False] > 3 and busiest[True] <= 1.15
    assert [n for _, n in found[True]] == [n for _, n in found[False]], (
        "features come back to their own tokens"
    )


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_tower_computes_frames_apart_as_it_computes_them_together(name, tmp_path):
    """What `media_parts` promises: features of a video are those of its frames, one by one."""
    family = catalog.family(Model(source=str(tiny.checkpoint(name, tmp_path))))
    torch.manual_seed(0)
    model = family.build().to_empty(device="cpu")
    from polymodal.models import weights

    weights.load(model, family)
    processor = family.media_processor(Data())
    video = tiny.clip(8)
    values, grid = processor.features(tiny.shape_of(video), video)["vision"]
    together = model.model.visual(values, grid_thw=grid, **family.geometry(grid, torch.device("cpu")))
    parts = family.media_parts(family.streams[0], grid)
    assert len(parts) > 1
    apart = [
        model.model.visual(rows, grid_thw=own, **family.geometry(own, torch.device("cpu"))).pooler_output
        for rows, own in (
            (rows, torch.tensor([part]))
            for rows, part in zip(values.split([t * h * w for t, h, w in parts]), parts, strict=True)
        )
    ]
    torch.testing.assert_close(torch.cat(apart), together.pooler_output, rtol=1e-4, atol=1e-5)
