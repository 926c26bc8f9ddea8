"""Cutting a model into stages: as asked and by cost, names kept, every parameter on one stage, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.models import lora, partial, weights
from polymodal.models.card import PrunedModule
from polymodal.parallel import pipeline, pipeline_split, stages
from polymodal.parallel.stages import prune
from polymodal.recipe import Lora, Parallel, Train
from tests.parallel.harness import run
from tests.parallel.spike.qwen import tiny_qwen2_vl, tiny_qwen3_vl
from tests.parallel.spike.wan import wan
from tests.parallel.spike.whisper import whisper


def cut(family, **asked) -> dict:
    return pipeline_split.counts(family.build(), family, Parallel(**asked))


def test_layers_lie_as_asked():
    family = tiny_qwen3_vl()  # 3 vision and 4 language layers
    assert cut(family, pp=2, pp_layers={"language": [1, 3]}) == {"vision": (3, 0), "language": (1, 3)}
    assert cut(family, pp=2, pp_layers={"language": [0, 4], "vision": [2, 1]})["vision"] == (2, 1)
    nested = {"language": [[0, 1], [2, 1]], "vision": [[3, 0], [0, 0]]}
    asked = {"pp": 2, "pp_schedule": "Interleaved1F1B", "pp_layers": nested}
    assert cut(family, **asked) == {"vision": (3, 0, 0, 0), "language": (0, 1, 2, 1)}
    assert cut(family, pp=2, pp_layers={"language": [4, 0]})["language"] == (4, 0), (
        "the head alone at the end"
    )


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"pp_layers": {"language": [1, 2]}}, r"language = \[1, 2\] adds up to 3, .* has 4 language layers. Nearest: \[2, 2\]"),
        ({"pp_layers": {"language": [3, 3]}}, r"adds up to 6, .* Nearest: \[2, 2\]"),
        ({"pp_layers": {"language": [1, 2, 1]}}, r"has 3 numbers, 2 stages need 2. Give 2 numbers, such as \[2, 2\]"),
        ({"pp_layers": {"language": [2, 2], "sound": [1, 1]}}, "has no tower `sound` to cut. Its towers: vision, language"),
        ({"pp_layers": {"vision": [2, 1]}}, r"does not place the 4 language layers. Add language: \[2, 2\]"),
        ({"pp_layers": {"language": [2, 2], "vision": [2, 1]}}, "stage 0 holds language layers, but the vision tower of .* ends in stage 1"),
        ({"pp": 3, "pp_layers": {"language": [2, 0, 2]}}, "stage 1 of .* would hold no layer"),
        ({"pp": 8}, "7 blocks of qwen3-vl cannot be cut into 8 stages. Set parallel.pp to at most 7"),
        ({"pp_virtual": 2}, "1F1B needs 1 stage a rank, not 2. Set parallel.pp_virtual to 1, or take Interleaved1F1B"),
        ({"pp_schedule": "Interleaved1F1B", "pp_layers": {"language": [2, 2]}, "pp_virtual": 1}, "Interleaved1F1B needs at least 2 stages a rank, not 1"),
        ({"pp_schedule": "ZBVZeroBubble", "pp_virtual": 3}, "ZBVZeroBubble needs 2 stages a rank, not 3"),
        ({"pp_schedule": "ZBVZeroBubble", "pp_layers": {"language": [[1, 1], [1, 1]], "vision": [[3, 0]]}}, "ask for 1 and for 2 stages a rank"),
        ({"pp_schedule": "Interleaved1F1B", "pp_layers": {"language": [2, 2]}}, "has 2 numbers, 4 stages need 4. Give 2 lists of 2 numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_reported_with_what_can(asked, words):
    with pytest.raises(PolymodalError) as caught:
        cut(tiny_qwen3_vl(), **{"pp": 2, **asked})
    import re

    assert re.search(words, str(caught.value).replace("\n", " ")), str(caught.value)


@pytest.mark.parametrize("schedule", pipeline_split.SCHEDULES)
def test_torch_takes_the_micro_batches_that_are_reported_to_fit(schedule):
    """Against torch's own classes, built on stages that are never run."""
    from types import SimpleNamespace

    from torch.distributed.pipelining.schedules import get_schedule_class

    kind = pipeline_split.SCHEDULES[schedule]
    for pp in (2, 3, 4):
        for count in range(1, 14):
            made = [
                SimpleNamespace(
                    num_stages=kind.least * pp, group_size=pp, group_rank=0, submod=torch.nn.Module()
                )
                for _ in range(kind.least)
            ]
            given = made if kind.least > 1 or "Zero" in schedule else made[0]
            try:
                get_schedule_class(schedule)(given, n_microbatches=count, loss_fn=lambda out, _: out)
                fits = True
            except ValueError:
                fits = False
            assert fits == pipeline_split.micro_batches_fit(schedule, pp, count), (pp, count)


def test_too_few_micro_batches_are_reported_with_the_nearest_global_batch():
    with pytest.raises(
        PolymodalError,
        match="1F1B needs at least 4 micro-batches .*global_batch_size = 6 gives 3.*\n*.*to 8, or",
    ):
        pipeline_split.check_micro_batches(Parallel(pp=4), Train(global_batch_size=6), True, 2)
    interleaved = Parallel(pp=4, pp_schedule="Interleaved1F1B")
    with pytest.raises(PolymodalError, match="gives 9.*\n*.*to 8 or 10, or"):
        pipeline_split.check_micro_batches(interleaved, Train(global_batch_size=9), True, 1)
    pipeline_split.check_micro_batches(Parallel(pp=4), Train(global_batch_size=8), True, 2)
    pipeline_split.check_micro_batches(
        Parallel(pp=4, pp_schedule="GPipe"), Train(global_batch_size=1), True, 1
    )
    assert pipeline_split.micro_batches(Train(global_batch_size=16, micro_batch_size=4), False, 2) == 2


def test_stages_lie_in_turn_or_in_a_v():
    loop, v = (Parallel(pp=2, pp_schedule=name) for name in ("Interleaved1F1B", "ZBVZeroBubble"))
    assert [pipeline_split.stage_to_rank(loop, stage) for stage in range(4)] == [0, 1, 0, 1]
    assert [pipeline_split.stage_to_rank(v, stage) for stage in range(4)] == [0, 1, 1, 0]


def test_auto_makes_the_most_expensive_stage_as_cheap_as_can_be():
    family = tiny_qwen3_vl()
    model = family.build()
    short, long = SampleLengths(8, 4, {"vision": (400,)}), SampleLengths(400, 200, {"vision": (8,)})
    assert pipeline_split.balanced(model, family, 2, long)["vision"] == (3, 0), (
        "the tower is cheap: it stays together"
    )
    heavy = pipeline_split.balanced(model, family, 2, short)
    assert heavy["vision"][1] > 0 and heavy["language"] == (0, 4), "pictures are most of the work: it is cut"
    costs = pipeline_split.block_costs(model, family, long)
    assert costs["language"][-1] > costs["language"][0], "the head lies with the last layer"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("model.visual"))
    frozen = pipeline_split.block_costs(model, family, long)
    assert frozen["vision"][1] == pytest.approx(costs["vision"][1] / 3), "forward only"
    assert frozen["language"] == pytest.approx(costs["language"])


def test_training_passes_are_counted_by_module():
    family = tiny_qwen3_vl()
    model, measure = family.build(), SampleLengths(400, 200, {"vision": (400,)})
    assert pipeline_split.training_passes(model, family, measure) == pytest.approx(3)
    costs = family.costs(measure)
    vision = sum(cost for name, cost in costs.items() if name.startswith("model.visual"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("model.visual"))
    frozen = (vision + 3 * (sum(costs.values()) - vision)) / sum(costs.values())
    assert pipeline_split.training_passes(model, family, measure) == pytest.approx(frozen)
    model.requires_grad_(False)
    assert pipeline_split.training_passes(model, family, measure) == pytest.approx(1)
    adapted = family.build()
    lora.attach(adapted, Lora(rank=1), family.card)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in adapted.parameters())
    language = sum(costs.values()) - vision
    least = (vision + 2 * language) / (vision + language)  # adapters lie on the language model alone
    assert least <= pipeline_split.training_passes(adapted, family, measure) < least + 3 * share


def test_auto_goes_by_parameters_where_a_family_has_no_flops():
    from tests.parallel.test_wan_pipeline import TinyWan

    family = TinyWan.make(6)
    assert cut(family, pp=3) == {"transformer": (2, 2, 2)}


def test_a_card_that_cannot_be_cut_gives_its_reason():
    model, family = whisper()
    with pytest.raises(PolymodalError, match="whisper cannot be cut .* an encoder and a decoder"):
        pipeline_split.counts(model, family, Parallel(pp=2))


@pytest.mark.parametrize("count", [2, 3])
def test_every_parameter_is_on_the_stage_that_needs_it_under_its_name(count):
    family = tiny_qwen2_vl(3)
    whole = {name for name, _ in family.build().named_parameters(remove_duplicate=False)}
    counts = {"vision": (1, *[0] * (count - 1)), "language": (1, 2) if count == 2 else (1, 1, 1)}
    found: list[str] = []
    for index in range(count):
        model = family.build()
        stage = prune(model, family, counts, index)
        found += [name for name, _ in model.named_parameters()]
        layers = model.model.language_model.layers
        held = [i for i, layer in enumerate(layers) if not isinstance(layer, PrunedModule)]
        assert held == list(stage.held["language"])
        assert isinstance(model.model.visual.merger, PrunedModule) == (index > 0)
        assert isinstance(model.lm_head, PrunedModule) == (index < count - 1)
        assert not isinstance(model.model.language_model.rotary_emb, PrunedModule)
        assert stage.tied == (
            (("model.language_model.embed_tokens.weight", 0), ("lm_head.weight", count - 1)),
        )
        assert list(stage.copies) == (["lm_head.weight"] if stage.last else [])
    assert sorted(found) == sorted(whole)


def test_deepstack_mergers_lie_with_the_blocks_that_feed_them():
    family = tiny_qwen3_vl()
    model = family.build()
    prune(model, family, {"vision": (2, 1), "language": (0, 4)}, 1)
    mergers = model.model.visual.deepstack_merger_list
    assert [isinstance(m, PrunedModule) for m in mergers] == [True, True, False]
    assert isinstance(model.model.visual.patch_embed, partial.ShapeStub)
    assert not isinstance(model.model.language_model.embed_tokens, PrunedModule), "where the tower ends"


def test_gradients_go_back_only_to_what_is_trained():
    family = tiny_qwen3_vl()
    counts = {"vision": (3, 0, 0), "language": (0, 2, 2)}

    def wanted(*trained: str) -> tuple[bool, ...]:
        model = family.build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        return prune(model, family, counts, 0).trained_before

    assert wanted("model.visual") == (True, True)
    assert wanted("model.language_model.layers") == (False, True)
    assert wanted("lm_head") == (False, False)


def test_without_a_pipeline_there_is_one_whole_part():
    family = tiny_qwen2_vl(2)
    (part,) = stages.build(lambda: family.build(), family, Parallel(), 0)
    assert not any(isinstance(module, PrunedModule) for module in part.model.modules())
    assert part.stage.first and part.stage.last and not part.stage.copies and part.stage.tied == ()


def test_a_tied_copy_goes_by_its_owners_name_and_follows_it_on_the_same_rank():
    family = tiny_qwen2_vl(3)
    asked = Parallel(pp=2, pp_schedule="ZBVZeroBubble", pp_layers={"language": [[0, 1], [1, 1]]})
    owner, copy = "model.language_model.embed_tokens.weight", "lm_head.weight"
    parts = stages.build(lambda: family.build(), family, asked, 0)
    for part in parts:
        weights.materialise(part.model, "cpu")
    assert [part.stage.index for part in parts] == [0, 3]
    names = [name for name, _ in stages.named_parameters(parts)]
    assert names.count(owner) == 1 and copy not in names
    with torch.no_grad():
        parts[0].model.get_parameter(owner).fill_(3)
    stages.sync_tied_copies(parts)
    assert parts[1].model.get_parameter(copy).eq(3).all()
    last = stages.build(lambda: family.build(), family, Parallel(pp=2, pp_layers={"language": [1, 2]}), 1)
    assert dict(stages.named_parameters(last, copies=True)).keys() == {owner}


def test_a_parameter_of_the_root_can_belong_to_a_stage():
    (first, family), (last, _) = wan(), wan()
    names = {name for name, _ in first.named_parameters()}
    counts = {"transformer": (1, 1)}
    prune(first, family, counts, 0)
    prune(last, family, counts, 1)
    held = [{name for name, _ in model.named_parameters()} for model in (first, last)]
    assert held[0] | held[1] == names and not held[0] & held[1]
    assert "scale_shift_table" in held[1] and "patch_embedding.weight" in held[0]


def test_a_misspelt_card_is_not_silently_whole():
    model, family = wan()
    chain = family.card.pipeline["transformer"]

    def with_chain(**changes):
        family.card = replace(family.card, pipeline={"transformer": replace(chain, **changes)})
        return family

    with pytest.raises(PolymodalError, match="card wan names `no_such_module`"):
        prune(model, with_chain(last=("norm_out", "no_such_module")), {"transformer": (1, 1)}, 0)
    with pytest.raises(PolymodalError, match="no module fits `no_such_blocks"):
        pipeline_split.counts(model, with_chain(blocks="no_such_blocks.*"), Parallel(pp=2))


def test_dropped_hands_its_first_argument_through():
    hidden = torch.ones(2)
    assert PrunedModule()(hidden, 1, other=2) is hidden
    assert not list(PrunedModule().parameters())


def test_a_hollow_module_has_the_shape_of_its_output_and_no_memory():
    hollow = partial.ShapeStub(torch.nn.Linear(3, 5))
    out = hollow(torch.ones(1000, 3))
    assert out.shape == (1000, 5) and out.untyped_storage().nbytes() == 4 and not list(hollow.parameters())
    hollow.dtype = torch.bfloat16
    assert hollow(torch.ones(2, 3)).dtype == torch.bfloat16


def _broken(rank: int) -> str:
    class Broken(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise PolymodalError("No rows came.", "Give some.")

    some = torch.zeros(1000)
    stage = PipelineStage(Broken(), 0, 1, torch.device("cpu"), input_args=(some,), output_args=(some,))
    with pytest.raises(PolymodalError) as caught, pipeline._own_errors():
        stage.forward_one_chunk(0, (some,))
    return str(caught.value)


def test_what_a_stage_raises_is_raised_as_it_was():
    """torch's pipelines would say it within a dump of every tensor that the stage was given."""
    assert run(1, _broken) == ["No rows came. Give some."]
