"""DeepSeek-VL2: the family equals the class's own forward; tokens and tiles those of its processor; files as published."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, SampleLengths, pack
from polymodal.generate.opening import load_hub, processor_of
from polymodal.models import catalog
from polymodal.models.nets.deepseek_vl2 import Router
from polymodal.models.understanding.deepseek_vl2 import WHOLE
from polymodal.recipe import Data, Model
from tests.models import test_qwen_vl, tiny
from tests.models.staged import assert_two_stages_equal_the_whole, loaded
from tests.models.test_qwen_vl import CASES, ours, token_loss

CASES = {name: CASES[name] for name in ("image", "several images", "text")}
POOL = "model.vision_tower.attn_pool."


@pytest.fixture(scope="module")
def family(checkpoint):
    return lambda name="deepseek-vl2": catalog.family(Model(source=str(checkpoint(name)), experts="eager"))


def gradients(model):
    return {n: grad for n, grad in test_qwen_vl.gradients(model).items() if not n.startswith(POOL)}


def crops(sample):
    """(columns, rows) of each picture, as the class takes them."""
    return torch.tensor([[w, h] for h, w in sample.tensors["tiles"].tolist() if (h, w) != WHOLE])


@pytest.mark.parametrize("name", tiny.DEEPSEEK)
def test_logits_and_gradients_equal_the_classs_own_forward(name, family, checkpoint):
    family = family(name)
    for case in CASES if name == "deepseek-vl2" else ["several images"]:
        sample = tiny.sample(family.media_processor(Data()), CASES[case])
        reference = load_hub(checkpoint(name), torch.float64).train()
        reference.set_experts_implementation("eager")
        inputs = {"input_ids": sample.tensors["input_ids"][None], "use_cache": False}
        if "tiles" in sample.tensors:
            inputs |= {"pixel_values": sample.tensors["pixel_values"].double()}
            inputs |= {"images_spatial_crop": crops(sample)}
        mine = loaded(family)
        expected = reference(**inputs).logits
        _, got = ours(family, mine, pack([sample]))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # norms and rotation are float32
        labels = sample.tensors["labels"][None]
        token_loss(expected, labels).backward()
        token_loss(got, labels).backward()
        theirs, found = gradients(reference), gradients(mine)
        if case == "text":  # the class leaves its tower out; ours runs it for nothing
            outside = {key for key, grad in theirs.items() if grad is None}
            assert outside and not any(found[key].any() for key in outside)
            theirs |= {key: torch.zeros_like(found[key]) for key in outside}
        test_qwen_vl.assert_same(found, theirs, 1e-5)


@pytest.mark.parametrize("name", tiny.DEEPSEEK[:2])
def test_a_pack_equals_its_samples_alone(name, family):
    family = family(name)
    media, model = family.media_processor(Data()), loaded(family)
    samples = [tiny.sample(media, CASES[case]) for case in ("several images", "text", "image")]
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut, layers", [((3, 1), (0, 3)), ((4, 0), (1, 2))])
def test_two_pipeline_stages_equal_the_whole(cut, layers, family):
    family = family()
    media = family.media_processor(Data())
    for cases in (["several images", "text"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        assert_two_stages_equal_the_whole(family, batch, {"vision": cut, "language": layers}, [POOL])


@pytest.mark.parametrize("name", tiny.DEEPSEEK[:2])
def test_cost_is_the_operations_that_run(name, family):
    family = family(name)
    sample = tiny.sample(family.media_processor(Data()), CASES["several images"])
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    wide = 4 * (16 + 8 + 16) if family.text.use_mla else 4 * 32
    uncausal = family.text.num_hidden_layers * wide * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


def test_token_ids_and_tiles_are_the_processors(family, checkpoint):
    processor, media = processor_of(checkpoint("deepseek-vl2")), family().media_processor(Data())
    images = [tiny.picture(40, 24), tiny.picture(16, 60, 1)]
    sample = tiny.sample(media, ["<|User|>: ", images[0], "\nand ", images[1], "\nWhat?\n\n<|Assistant|>:"])
    text = "<|User|>: <image>\nand <image>\nWhat?\n\n<|Assistant|>:"
    inputs = processor(text=[text], images=images, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], sample.tensors["pixel_values"])
    assert inputs["images_spatial_crop"].tolist() == crops(sample).tolist() == [[2, 2], [1, 3]]
    assert processor._get_num_multimodal_tokens(image_sizes=[(24, 40), (60, 16)])["num_image_tokens"] == [
        len(media.span(MediaShape("image", *size)).ids) for size in ((24, 40), (60, 16))
    ]
    with pytest.raises(PolymodalError, match="not video"):
        media.placeholder("video")


def test_rows_of_published_sizes_and_no_tiles_of_many_pictures(family):
    media = family().media_processor(Data())
    media.processor.tile_side = 14
    image = media.processor.image_processor
    image.image_size = 384
    image.candidate_resolutions = [
        [384 * n, 384 * m] for n in range(1, 10) for m in range(1, 10) if n * m <= 9
    ]
    for (height, width), grid, rows in (
        ((384, 384), (1, 1), 421),
        ((768, 384), (1, 2), 631),
        ((480, 640), (2, 2), 210 + 1 + 28 * 29),
        ((3000, 3000), (3, 3), 210 + 1 + 42 * 43),
    ):
        shape = MediaShape("image", height, width)
        assert media.grid(shape) == grid and len(media.span(shape).ids) == rows
    assert media.grid(MediaShape("image", 3000, 3000, among=3)) == (1, 1)


def test_files_are_those_that_were_read(family, checkpoint, tmp_path):
    for name in tiny.DEEPSEEK:
        source = checkpoint(name)
        model = load_hub(source)
        model.save_pretrained(tmp_path / name)
        before, after = (load_file(each / "model.safetensors") for each in (source, tmp_path / name))
        assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
        assert {
            "vision.blocks.0.attn.qkv.weight",
            "language.model.layers.1.mlp.experts.3.up_proj.weight",
        } <= set(before)
        assert ("language.model.layers.1.mlp.gate.e_score_correction_bias" in before) == name.endswith("bias")
    family = family()
    config = catalog.override(family.config, {"language_config.num_hidden_layers": 2})
    family.write_config(config, checkpoint("deepseek-vl2"), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["language_config"]["num_hidden_layers"] == 2 and written["vision_config"]["width"] == 32
    assert written["architectures"] == ["DeepseekVLV2ForCausalLM"]


def test_groups_of_experts_limit_the_choice():
    config = tiny.config("deepseek-vl2", language_config__n_group=2, language_config__topk_group=1)
    config.language_config.topk_method = "group_limited_greedy"
    router = Router(config.language_config)
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.35], [0.1, 0.2, 0.25, 0.05]])
    assert sorted(router.choose(scores)[0].tolist()) == [0, 1]
    assert sorted(router.choose(scores)[1].tolist()) == [2, 3]


def test_what_cannot_be_run_is_refused(checkpoint, family, tmp_path):
    with pytest.raises(PolymodalError, match="topk_method = unheard"):
        catalog.family(
            Model(source=str(checkpoint("deepseek-vl2")), config={"language_config.topk_method": "unheard"})
        )
    with pytest.raises(PolymodalError, match="none of this model's resolutions"):
        family().media_processor(Data.model_validate({"image": {"max_pixels": 300}}))
    other = shutil.copytree(checkpoint("deepseek-vl2"), tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    for change, said in (
        ({"tile_tag": "1D"}, "tile_tag = 1D"),
        ({"architectures": ["DeepseekOCRForCausalLM", "deepseek_vl_v2"]}, "DeepSeek-OCR"),
    ):
        (other / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(PolymodalError, match=said):
            catalog.family(Model(source=str(other)))


def test_towers_hold_every_parameter_once_and_an_example_fits(family):
    family = family()
    for parameter, _ in family.build().named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(80, 20, {"vision": (25, 25)}))
    assert batch["tiles"].tolist() == [[1, 1], [1, 1]] and batch["pixel_values"].shape == (2, 3, 20, 20)
