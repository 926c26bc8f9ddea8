"""MiniCPM-V: the family equals the class's own forward; tokens and slices those of its processor; files as published."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, SampleLengths, pack
from polymodal.distributed import attention
from polymodal.generate.opening import load_hub, processor_of
from polymodal.models import catalog
from polymodal.models.nets.minicpmv_processor import MiniCPMVImageProcessor
from polymodal.recipe import Data, Model
from tests.models import tiny
from tests.models.staged import assert_two_stages_equal_the_whole, loaded
from tests.models.test_qwen_vl import CASES, assert_same, gradients, ours, token_loss

CASES = {name: CASES[name] for name in ("image", "several images", "text")}


@pytest.fixture(scope="module")
def family(checkpoint):
    return lambda name=tiny.MINICPM[0]: catalog.family(Model(source=str(checkpoint(name))))


def grids(media, case):
    return torch.tensor(
        [media.slices(tiny.shape_of(part, 1)) for part in CASES[case] if not isinstance(part, str)]
    )


@pytest.mark.parametrize("name", tiny.MINICPM)
def test_logits_and_gradients_equal_the_classs_own_forward(name, family, checkpoint):
    family = family(name)
    media = family.media_processor(Data())
    for case in CASES:
        sample = tiny.sample(media, CASES[case])
        reference = load_hub(checkpoint(name), torch.float64).train()
        assert reference.config._attn_implementation == "sdpa" != attention.NAME  # masks in place of lengths
        inputs = {"input_ids": sample.tensors["input_ids"][None], "use_cache": False}
        if case != "text":
            inputs |= {
                "pixel_values": sample.tensors["pixel_values"].double(),
                "image_grids": grids(media, case),
            }
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
        assert_same(found, theirs, 1e-5)


@pytest.mark.parametrize("name", tiny.MINICPM)
def test_a_pack_equals_its_samples_alone(name, family):
    family = family(name)
    media, model = family.media_processor(Data()), loaded(family)
    samples = [tiny.sample(media, CASES[case]) for case in ("several images", "text", "image")]
    assert (
        len(
            {
                tuple(grid)
                for each in samples
                if "slice_grids" in each.tensors
                for grid in each.tensors["slice_grids"].tolist()
            }
        )
        > 2
    )
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut, layers", [((3, 1), (0, 3)), ((4, 0), (1, 2))])
def test_two_pipeline_stages_equal_the_whole(cut, layers, family):
    family = family()
    media = family.media_processor(Data())
    for cases in (["several images", "text"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        assert_two_stages_equal_the_whole(family, batch, {"vision": cut, "language": layers})


def test_cost_is_the_operations_that_run(family, monkeypatch):
    family = family()
    sample = tiny.sample(
        family.media_processor(Data()), ["Look: ", tiny.picture(16, 16), "what?"]
    )  # one slice
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",  # which the counter does not know on this processor
        lambda q, k, v, attn_mask: (q @ k.transpose(2, 3)).masked_fill(~attn_mask, -1e9).softmax(-1) @ v,
    )
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    uncausal = 2 * family.text.num_hidden_layers * 256 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


@pytest.mark.parametrize("name", tiny.MINICPM)
def test_token_ids_and_slices_are_the_processors(name, family, checkpoint):
    processor, media = processor_of(checkpoint(name)), family(name).media_processor(Data())
    images = [tiny.picture(40, 24), tiny.picture(16, 60, 1), tiny.picture(9, 12, 2)]
    sample = tiny.sample(media, ["a ", images[0], "\nand ", images[1], images[2], "\nWhat?"])
    inputs = processor(text=["a <unk>\nand <unk><unk>\nWhat?"], images=images, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], sample.tensors["pixel_values"])
    assert inputs["image_grids"].tolist() == [[3, 5, 2, 2, 3, 5], [8, 2, 4, 1, 4, 4], [4, 3, 0, 0, 0, 0]]
    assert sample.tensors["slice_grids"].tolist() == [[3, 5]] * 5 + [[8, 2]] + [[4, 4]] * 4 + [[4, 3]]
    assert processor._get_num_multimodal_tokens(image_sizes=[(24, 40), (60, 16)])["num_image_tokens"] == [
        len(media.span(MediaShape("image", *size)).ids) for size in ((24, 40), (60, 16))
    ]
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]}
    ]
    written = processor.apply_chat_template(asked, add_generation_prompt=True)
    if name.endswith("2.6"):
        user = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        pictures = [f"<image_id>{n}</image_id><unk>" for n in (0, 1)]
        expected = f"{user}{pictures[0]}\nWhat?\n{pictures[1]}<|im_end|>\n<|im_start|>assistant\n"
    else:
        head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
        expected = f"<|endoftext|>{head('user')}<unk>\nWhat?\n<unk><|eot_id|>{head('assistant')}"
    assert written == expected
    with pytest.raises(PolymodalError, match="not video"):
        media.placeholder("video")


def test_slices_of_published_sizes():
    """By the repository's rules on paper: the number of slices from the area, their grid from the aspect, sides of 14."""
    images = MiniCPMVImageProcessor()
    assert images.picture(448, 448) == (32, 32, 0, 0, 0, 0)
    assert images.picture(100, 80) == (36, 29, 0, 0, 0, 0)  # enlarged
    assert images.picture(900, 1600) == (24, 43, 2, 4, 34, 30)  # 8 of 448 x 448; 450 x 400 each
    assert images.picture(2000, 300) == (83, 12, 4, 1, 41, 25)
    whole = images.picture(4000, 4000)
    assert whole[2] * whole[3] == 9 and math.prod(whole[4:]) <= 33 * 33


def test_files_are_those_that_were_read(family, checkpoint, tmp_path):
    for name in tiny.MINICPM:
        source = checkpoint(name)
        load_hub(source).save_pretrained(tmp_path / name)
        before, after = (load_file(each / "model.safetensors") for each in (source, tmp_path / name))
        assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
        assert {
            "llm.model.layers.1.mlp.up_proj.weight",
            "llm.lm_head.weight",
            "resampler.attn.in_proj_weight",
        } <= set(before)
        assert {"vpm.encoder.layers.3.self_attn.out_proj.bias", "resampler.attn.out_proj.bias"} <= set(before)
    origin = shutil.copytree(checkpoint(tiny.MINICPM[0]), tmp_path / "origin")
    raw = json.loads((origin / "config.json").read_text())
    raw |= {
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "version": 2.6,
    }
    raw |= {"batch_vision_input": True, "torch_dtype": raw.pop("dtype")}
    (origin / "config.json").write_text(json.dumps(raw))
    family = catalog.family(Model(source=str(origin)))
    changes = {"num_hidden_layers": 2, "vision_config.num_hidden_layers": 3}
    family.write_config(catalog.override(family.config, changes), origin, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("num_hidden_layers") == 2 and written["vision_config"].pop("num_hidden_layers") == 3
    del raw["num_hidden_layers"], raw["vision_config"]["num_hidden_layers"]
    assert written == raw


def test_limits_and_what_cannot_be_run(checkpoint, family, tmp_path):
    limited = family().media_processor(Data.model_validate({"image": {"max_pixels": 2 * 256}}))
    assert len(limited.span(MediaShape("image", 90, 90)).parts) == 3
    with pytest.raises(PolymodalError, match="enlarges every picture"):
        family().media_processor(Data.model_validate({"image": {"min_pixels": 300}}))
    other = shutil.copytree(checkpoint(tiny.MINICPM[0]), tmp_path / "other")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"version": 4.5}))
    with pytest.raises(PolymodalError, match=r"MiniCPM-V 4\.5 is not known"):
        catalog.family(Model(source=str(other)))


def test_towers_hold_every_parameter_once_and_an_example_fits(family):
    family = family()
    for parameter, _ in family.build().named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(80, 20, {"vision": (25, 18)}))
    assert batch["slice_grids"].tolist() == [[5, 5], [4, 4]] and batch["pixel_values"].shape == (41, 3, 4, 4)
