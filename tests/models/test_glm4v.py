"""GLM-4.1V and GLM-4.5V equal the library's own models: tokens, positions, logits, gradients, stages, routers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.video_utils import VideoMetadata

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, Message, Record, SampleLengths, pack
from polymodal.data.chat import ChatProcessor
from polymodal.distributed import attention
from polymodal.generate.opening import processor_of
from polymodal.models import catalog, lora, weights
from polymodal.plan.planner import family_of
from polymodal.recipe import Data, Lora, Model, Recipe
from tests.bounds import EXACT
from tests.models import gather, tiny
from tests.models.staged import assert_two_stages_equal_the_whole, loaded
from tests.models.test_qwen_vl import CASES, assert_same, gradients, model_of, ours, rows_of, token_loss

NAMES = tiny.GLM


@pytest.fixture(scope="module")
def family(checkpoint):
    return lambda name: catalog.family(Model(source=str(checkpoint(name)), experts="eager"))


@pytest.fixture(scope="module")
def media(family):
    return {name: family(name).media_processor(Data()) for name in NAMES}


def types_of(family, ids):
    """The library's mm_token_type_ids: pictures 1, and 2 between the marks of a video."""
    config = family.config
    inside = (ids == config.video_start_token_id).cumsum(0) > (ids == config.video_end_token_id).cumsum(0)
    return (ids == config.image_token_id).int() * (1 + inside.int())


def library_inputs(family, sample):
    """A Sample as arguments of the library's forward, which refuses pictures and videos at once: then all frames
    are given as pictures, with the positions that its get_rope_index gives."""
    ids, tensors = sample.tensors["input_ids"], sample.tensors
    types, sizes = types_of(family, ids), tensors.get("grid_thw")
    inputs = {"input_ids": ids[None], "mm_token_type_ids": types[None]}
    kinds = set(types[types > 0].tolist())
    if kinds == {1, 2}:
        frames = sizes.repeat_interleave(sizes[:, 0], 0)
        frames[:, 0] = 1
        positions = tensors["position_ids"][1:, None]
        return {
            **inputs,
            "pixel_values": tensors["pixel_values"],
            "image_grid_thw": frames,
            "position_ids": positions,
        }
    names = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}
    for kind in kinds:
        inputs |= dict(zip(names[kind], (tensors["pixel_values"], sizes), strict=True))
    return inputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_librarys_own_forward(case, name, family, media, checkpoint):
    family, sample = family(name), tiny.sample(media[name], CASES[case])
    reference, mine = model_of(checkpoint(name)), loaded(family)
    expected = reference(**library_inputs(family, sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    theirs, found = gradients(reference), gradients(mine)
    if case == "text":  # the library leaves its tower out; ours runs it for nothing
        outside = {key for key, grad in theirs.items() if grad is None and ".visual." in key}
        assert outside and not any(found[key].any() for key in outside)
        theirs |= {key: torch.zeros_like(found[key]) for key in outside}
    assert_same(found, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut, layers", [((4, 0), (1, 2)), ((3, 1), (0, 3))])
def test_two_pipeline_stages_equal_the_whole(cut, layers, name, family, media):
    batch = pack([tiny.sample(media[name], CASES[case]) for case in ("several images", "text", "video")])
    assert_two_stages_equal_the_whole(family(name), batch, {"vision": cut, "language": layers}, (), EXACT)


def test_routers_choose_by_the_files_bias_and_give_the_librarys_logits(family, media, checkpoint):
    family = family("glm4.5v")
    assert family.routers() == (2, 4)
    sample = tiny.sample(media["glm4.5v"], CASES["image"])
    model, mine = model_of(checkpoint("glm4.5v")), loaded(family)
    expected = model(**library_inputs(family, sample), use_cache=False, output_router_logits=True)
    out, _ = ours(family, mine, pack([sample]))
    for got, theirs in zip(out.extra["router_logits"], expected.router_logits, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-6, atol=1e-6)
        assert got.requires_grad
    biases = {name: buffer for name, buffer in mine.named_buffers() if name.endswith("correction_bias")}
    assert len(biases) == 2 and all(bias.abs().max() > 0.1 for bias in biases.values())
    for bias in biases.values():
        bias.zero_()
    changed, _ = ours(family, mine, pack([sample]))
    assert (changed.hidden_states - out.hidden_states).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_the_operations_that_run(name, family, media):
    family = family(name)
    sample = tiny.sample(media[name], [tiny.picture(32, 32), "It is a three.", tiny.clip(6, 32, 16)])
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        batch = pack([sample])
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    uncausal = 2 * family.text.num_hidden_layers * 64 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_pixels_and_positions_are_the_librarys(name, media, checkpoint):
    processor, video = processor_of(checkpoint(name)), tiny.clip(5, 32, 24)
    parts = [
        "<|user|>\nLook: ",
        tiny.picture(40, 24),
        "and",
        video,
        "What",
        video[:4],
        "is it?<|assistant|>\n",
    ]
    sample = tiny.sample(media[name], parts, seconds=0.7)
    mark = {
        True: "<|begin_of_video|><|video|><|end_of_video|>",
        False: "<|begin_of_image|><|image|><|end_of_image|>",
    }
    text = "".join(p if isinstance(p, str) else mark[isinstance(p, np.ndarray)] for p in parts)
    facts = [
        VideoMetadata(
            total_num_frames=50, fps=10.0, frames_indices=list(range(0, 7 * n, 7)), height=24, width=32
        )
        for n in (5, 4)
    ]
    inputs = processor(
        text=[text],
        images=[parts[1]],
        videos=[torch.from_numpy(v).permute(0, 3, 1, 2) for v in (video, video[:4])],
        video_metadata=facts,
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values_videos"]])
    assert torch.equal(pixels, sample.tensors["pixel_values"])
    expected, _ = model_of(checkpoint(name)).model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], inputs["video_grid_thw"]
    )
    assert sample.tensors["position_ids"][1:].tolist() == expected[:, 0].tolist()


def test_spans_are_the_librarys_count_of_patches(media):
    image, video = tiny.processors("glm4.1v")
    for height, width, frames in ((3, 5, 2), (64, 64, 3), (90, 20, 7), (1200, 777, 16), (40, 6000, 200)):
        picture = media["glm4.1v"].span(MediaShape("image", height, width))
        assert rows_of(picture) == image.get_number_of_image_patches(height, width)
        clip = media["glm4.1v"].span(MediaShape("video", height, width, frames))
        assert rows_of(clip) == video.get_num_of_video_patches(frames, height, width, {})


def test_recipe_limits_are_pixels_of_one_picture_and_of_one_frame(family, checkpoint):
    data = Data.model_validate(
        {"image": {"max_pixels": 256}, "video": {"min_pixels": 512, "max_pixels": 640}}
    )
    own = family("glm4.1v")
    media = own.media_processor(data)
    assert rows_of(media.span(MediaShape("image", 64, 64))) == 16  # 256 pixels in patches of 4 x 4
    size = media.span(MediaShape("video", 64, 64, 4)).parts[0].size
    assert size[1] * size[2] * 16 == 576
    with pytest.warns(UserWarning, match="whole videos"):
        processor = processor_of(checkpoint("glm4.1v"), data, own)
    pixels = processor.image_processor(images=[tiny.picture(64, 64)], return_tensors="pt")["pixel_values"]
    assert pixels.shape[0] == 16 and own.picture_size(processor, 64, 64) == (16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_towers_hold_every_parameter_once_and_an_example_fits(name, family):
    family = family(name)
    for parameter, _ in family.build().named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(60, 20, {"vision": (16, 16)}))
    assert batch["grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert family.build().model.visual.config._attn_implementation == attention.NAME


def test_adapters_go_where_peft_can_name_them(family):
    """To peft, MLPs of glm4v_moe are its experts of before they were stacked; GLM-4.1V's are layers."""
    dense, sparse = family("glm4.1v"), family("glm4.5v")
    assert any(name.endswith("gate_up_proj") for name in lora.attach(dense.build(), Lora(), dense.card))
    names = lora.attach(sparse.build(), Lora(towers=["vision", "language"]), sparse.card)
    ends = {name.rpartition(".")[2] for name in names}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"}
    stacks = lora.attach(sparse.build(), Lora(targets=["experts.gate_up_proj"]), sparse.card)
    assert stacks == [f"model.language_model.layers.{n}.mlp.experts.gate_up_proj" for n in (1, 2)]
    with pytest.raises(
        PolymodalError, match="peft takes layers of glm4.5v that are named so for its experts"
    ):
        lora.attach(sparse.build(), Lora(targets=["shared_experts.down_proj"]), sparse.card)


def test_a_conversation_teaches_where_answers_end(media):
    """GLM's template prints nothing behind an answer: the next role ends it, and the text's end the last."""
    talk = [("user", "Is it?"), ("assistant", "yes"), ("user", "Is it seven?"), ("assistant", "no")]
    chat = ChatProcessor(media["glm4.1v"], Data())
    tensors = chat.sample(Record(tuple(Message(role, (text,)) for role, text in talk), "here")).tensors
    learned = chat.media.tokenizer.decode(tensors["labels"][tensors["labels"] != IGNORE])
    assert learned == "yes<|user|>no<|endoftext|>"


@pytest.mark.parametrize("name", NAMES)
def test_the_files_keys_come_back(name, family, checkpoint, tmp_path):
    """One file an expert's weight, as the library writes them, the routers' biases too."""
    model = family(name).build()
    weights.load(model, family(name))
    source = checkpoint(name)
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=source)
    written, read = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == read.keys() and all(torch.equal(written[k], read[k]) for k in read)
    experts = [k for k in read if "mlp.experts.3.gate_proj" in k]
    assert len(experts) == family(name).routers()[0]


def test_a_published_size_is_planned_without_its_files(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = Recipe(model=Model(source="zai-org/GLM-4.5V", config={"text_config.num_hidden_layers": 2}))
    family = family_of(recipe)
    assert family.routers() == (1, 128) and len(family.build().model.language_model.layers) == 2
    with pytest.raises(PolymodalError, match="not complete in its cache"):
        family_of(Recipe(model=Model(source="zai-org/GLM-4.1V-9B-Base")))
