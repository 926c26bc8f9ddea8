"""Every Qwen VL card equals the library's own model: patterns, spans, pixels, positions, logits, gradients, answers."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText
from transformers.video_utils import VideoMetadata

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, SampleLengths, pack
from polymodal.distributed import attention
from polymodal.models import catalog, weights
from polymodal.models.card import Output
from polymodal.models.understanding.qwen_vl import PatchEmbedding
from polymodal.parallel.stages import prune
from polymodal.recipe import Data, Model
from tests.bounds import EXACT
from tests.models import tiny

CASES = {
    "image": ["Look: ", tiny.picture(40, 24), "What is it? It is a three."],
    "several images": [
        tiny.picture(24, 16),
        "and ",
        tiny.picture(32, 40, 1),
        tiny.picture(16, 16, 2),
        " are different",
    ],
    "video": ["Describe the video.", tiny.clip(5, 32, 24), "It is a seven."],
    "image and video": [
        tiny.clip(4, 24, 16),
        "then",
        tiny.picture(40, 40),
        "and",
        tiny.clip(6, 16, 16, 3),
        "what?",
    ],
    "text": ["user\nHow many red squares are there? \nassistant\nyes, 3"],
}


@pytest.fixture(scope="module")
def family(checkpoint):
    """family(name, tied) -> the card's family on a tiny checkpoint."""
    return lambda name, tied=False: catalog.family(Model(source=str(checkpoint(name, tied)), experts="eager"))


def model_of(source, name="sdpa", dtype=torch.float64):
    """The checkpoint's weights in the library's class; name: its attention, or `polymodal`."""
    model = AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation="sdpa" if name == "polymodal" else name,
        experts_implementation="eager",
    )
    if name == "polymodal":  # what a family's build adds to the library's class
        attention.use(model)
        model.model.visual.patch_embed.proj.__class__ = PatchEmbedding
    return model.train()


def token_loss(logits, labels):
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def media_of(family, sample):
    """(kind, pixel_values [P, D], grid [3]) of each medium in reading order; the kind is read off its tokens."""
    if "grid_thw" not in sample.tensors:
        return []
    ids, merge = sample.tensors["input_ids"], family.config.vision_config.spatial_merge_size**2
    ids = ids[(ids == family.config.image_token_id) | (ids == family.config.video_token_id)]
    found, token, patch = [], 0, 0
    for grid in sample.tensors["grid_thw"]:
        patches = int(grid.prod())
        kind = "image" if int(ids[token]) == family.config.image_token_id else "video"
        found.append((kind, sample.tensors["pixel_values"][patch : patch + patches], grid))
        token, patch = token + patches // merge, patch + patches
    return found


def library_inputs(family, sample):
    """A Sample as the arguments of the library's own forward."""
    ids = sample.tensors["input_ids"][None]
    types = (ids == family.config.image_token_id).int() + 2 * (ids == family.config.video_token_id).int()
    inputs = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
    for kind, (values, grids) in names.items():
        found = [(pixels, grid) for k, pixels, grid in media_of(family, sample) if k == kind]
        if found:
            inputs[values] = torch.cat([pixels for pixels, _ in found])
            inputs[grids] = torch.stack([grid for _, grid in found])
    if "video_grid_thw" in inputs and family.card.name == "qwen2.5-vl":
        inputs["second_per_grid_ts"] = torch.ones(len(inputs["video_grid_thw"]))
    return inputs


def ours(family, model, batch):
    out = family.stage(model, None, batch)
    assert isinstance(out, Output)
    return out, out.head(out.hidden_states)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got, expected, tolerance=1e-9):
    assert set(got) == set(expected)
    for name, grad in expected.items():
        mine = torch.zeros_like(grad) if got[name] is None and grad is not None else got[name]
        torch.testing.assert_close(
            mine,
            grad,
            rtol=tolerance,
            atol=tolerance * max(1.0, float(grad.abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_the_librarys_own_forward(name, case, family, checkpoint):
    family = family(name)
    sample = tiny.sample(family.media_processor(Data()), CASES[case])
    reference, mine = model_of(checkpoint(name)), model_of(checkpoint(name), "polymodal")
    expected = reference(**library_inputs(family, sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    theirs = gradients(reference)
    if case == "text":  # the library leaves its tower out; ours runs it for nothing
        assert all(grad is None for key, grad in theirs.items() if ".visual." in key)
        visual = [grad for key, grad in gradients(mine).items() if ".visual." in key]
        assert all(grad is not None and not grad.any() for grad in visual), (
            "the tower must run and give nothing"
        )
        theirs = {
            key: torch.zeros_like(gradients(mine)[key]) if grad is None else grad
            for key, grad in theirs.items()
        }
    assert_same(gradients(mine), theirs)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_librarys_own_attention_can_be_chosen(name, implementation, family, checkpoint):
    family = family(name)
    media = family.media_processor(Data())
    batch = pack(
        [
            tiny.sample(media, CASES["image"]),
            tiny.sample(media, CASES["text"]),
            tiny.sample(media, CASES["video"]),
        ]
    )
    _, expected = ours(family, model_of(checkpoint(name), "polymodal"), batch)
    _, got = ours(family, model_of(checkpoint(name), implementation), batch)
    torch.testing.assert_close(
        got, expected, rtol=1e-6, atol=1e-6
    )  # eager's softmax is float32 by the library's choice


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_pattern_of_the_card_matches(name, tied, family):
    family = family(name, tied)
    card, model = family.card, family.build()
    modules = dict(model.named_modules(remove_duplicate=False))
    patterns = [
        *card.blocks,
        *(name for chain in card.pipeline.values() for name in (chain.blocks, *chain.first, *chain.last)),
        *card.tensor_plan,
        *card.expert_plan,
        card.head,
        card.embedding,
    ]
    patterns += [
        card.sequence_entry,
        card.sequence_exit,
        *(name for names in card.towers.values() for name in names),
    ]
    for pattern in filter(None, patterns):
        if pattern.endswith(
            "?"
        ):  # of layers that some checkpoints have: tests/parallel/test_layouts.py has one
            continue
        assert any(_matches(pattern, name) for name in modules), pattern
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        homes = [
            tower for tower, names in card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    assert model.lm_head.weight.is_meta and model.lm_head.weight.dtype is torch.float32
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert (
        model.model.visual.config._attn_implementation
        == attention.NAME
        == model.model.language_model.config._attn_implementation
    )
    assert model.training


def _matches(pattern, name):
    pattern, name = pattern.split("."), name.split(".")
    return len(pattern) == len(name) and all(p in ("*", n) for p, n in zip(pattern, name, strict=True))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_two_pipeline_stages_equal_the_whole(name, family, checkpoint):
    family = family(name)
    media = family.media_processor(Data())
    depth = family.config.vision_config.depth
    for samples in ([CASES["several images"], CASES["text"], CASES["video"]], [CASES["text"]]):
        batch = pack([tiny.sample(media, parts) for parts in samples])
        whole = model_of(checkpoint(name), "polymodal")
        _, expected = ours(family, whole, batch)
        token_loss(expected, batch["labels"]).backward()
        stages = [family.build() for _ in range(2)]
        for index, stage in enumerate(stages):
            weights.load(stage, family, source=checkpoint(name))
            stage.double().set_experts_implementation("eager")
            prune(stage, family, {"vision": (depth, 0), "language": (1, 2)}, index)
        carry = family.stage(stages[0], None, batch)
        spec = family.carry_spec(batch, {"vision": depth, "language": 1}, torch.float64)
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in carry.items()} == {
            k: (t.shape, t.dtype) for k, t in spec.items()
        }
        received = {key: tensor.detach().requires_grad_() for key, tensor in carry.items()}
        _, got = ours_from(family, stages[1], received, batch)
        torch.testing.assert_close(got, expected, rtol=EXACT, atol=EXACT)
        token_loss(got, batch["labels"]).backward()
        sent = [key for key in carry if received[key].grad is not None]
        torch.autograd.backward([carry[key] for key in sent], [received[key].grad for key in sent])
        expected = gradients(whole)
        for stage in stages:
            got = gradients(stage)
            assert_same(got, {key: expected[key] for key in got})


def ours_from(family, model, carry, batch):
    out = family.stage(model, carry, batch)
    return out, out.head(out.hidden_states)


def test_router_logits_are_the_librarys(family, checkpoint):
    family = family("qwen3-vl-moe")
    sample = tiny.sample(family.media_processor(Data()), CASES["image"])
    model = model_of(checkpoint("qwen3-vl-moe"))
    expected = model(**library_inputs(family, sample), use_cache=False, output_router_logits=True)
    attention.use(model)
    out, _ = ours(family, model, pack([sample]))
    assert len(out.extra["router_logits"]) == 3
    for got, theirs in zip(out.extra["router_logits"], expected.router_logits, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-9, atol=1e-9)
        assert got.requires_grad


@pytest.mark.parametrize("name", tiny.NAMES)
def test_cost_is_the_operations_that_run(name, family, checkpoint):
    family = family(name)
    parts = [
        tiny.picture(32, 32),
        "What is in this picture? It is a three.",
        tiny.picture(16, 16),
        tiny.clip(6, 32, 16),
    ]  # whole windows
    sample = tiny.sample(family.media_processor(Data()), parts)
    model = model_of(checkpoint(name), "eager", torch.float32)
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    text = family.config.text_config
    uncausal = (
        2 * text.num_hidden_layers * 64 * sample.measure.tokens**2
    )  # eager computes what causality forbids
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


def test_cost_of_a_window_tower_grows_in_proportion(family):
    family = family("qwen2.5-vl")
    family.config.vision_config.fullatt_block_indexes = []
    one, two = (family.cost(SampleLengths(0, 0, {"vision": (patches,)})) for patches in (16384, 32768))
    assert two == 2 * one


# media


@pytest.fixture(scope="module")
def media(family):
    return {name: family(name).media_processor(Data()) for name in tiny.NAMES}


def rows_of(span):
    return math.prod(span.parts[0].size)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 130), width=st.integers(1, 130), name=st.sampled_from(["qwen2.5-vl", "qwen3-vl"])
)
def test_an_image_span_is_what_the_librarys_processor_makes(media, height, width, name):
    image = tiny.picture(width, height)
    theirs = tiny.processors(name)[0](images=[image], return_tensors="pt")
    span = media[name].span(MediaShape("image", height, width))
    assert list(span.parts[0].size) == theirs["image_grid_thw"][0].tolist()
    assert rows_of(span) == theirs["pixel_values"].shape[0]
    pixels, grid = media[name].features(tiny.shape_of(image), image)["vision"]
    assert torch.equal(pixels, theirs["pixel_values"]) and torch.equal(grid, theirs["image_grid_thw"])


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(4, 90), width=st.integers(4, 90), frames=st.integers(1, 9), name=st.sampled_from(["qwen2-vl", "qwen3-vl"])
)  # fmt: skip
def test_a_video_span_is_what_the_librarys_processor_makes(media, height, width, frames, name):
    video = tiny.clip(frames, width, height)
    given_frames = (
        video if frames > 1 else np.concatenate([video, video])
    )  # the library refuses a single frame (Qwen3)
    tensor = torch.from_numpy(given_frames).permute(0, 3, 1, 2)
    theirs = tiny.processors(name)[1](videos=[tensor], do_sample_frames=False, return_tensors="pt")
    span = media[name].span(MediaShape("video", height, width, frames))
    assert list(span.parts[0].size) == theirs["video_grid_thw"][0].tolist()
    assert rows_of(span) == theirs["pixel_values_videos"].shape[0]
    pixels, grid = media[name].features(tiny.shape_of(video), video)["vision"]
    assert torch.equal(pixels, theirs["pixel_values_videos"]) and grid[0].tolist() == list(span.parts[0].size)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(40, 6000), width=st.integers(40, 6000), frames=st.integers(2, 200))
def test_spans_of_large_media_are_the_librarys_count(media, height, width, frames):
    for name in ("qwen2.5-vl", "qwen3-vl"):
        image, video = tiny.processors(name)
        assert rows_of(
            media[name].span(MediaShape("image", height, width))
        ) == image.get_number_of_image_patches(height, width)
        assert rows_of(
            media[name].span(MediaShape("video", height, width, frames))
        ) == video.get_num_of_video_patches(frames, height, width, {})


@pytest.mark.parametrize("name", tiny.NAMES)
def test_token_ids_and_positions_are_the_librarys(name, media, checkpoint):
    processor = tiny.processor(name)
    video = tiny.clip(5, 32, 24)
    parts = ["<|im_start|>user\nLook: ", tiny.picture(40, 24), "and", video, "What is it?<|im_end|>\n"]
    sample = tiny.sample(media[name], parts, seconds=0.4)
    text = "".join(
        p
        if isinstance(p, str)
        else media[name].placeholder("video" if isinstance(p, np.ndarray) else "image")
        for p in parts
    )
    metadata = VideoMetadata(
        total_num_frames=50, fps=10.0, frames_indices=[0, 4, 8, 12, 16], height=24, width=32
    )
    inputs = processor(
        text=[text], images=[parts[1]], videos=[torch.from_numpy(video).permute(0, 3, 1, 2)], video_metadata=[metadata],
        do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    model = model_of(checkpoint(name))
    extra = {"second_per_grid_ts": inputs["second_per_grid_ts"]} if "second_per_grid_ts" in inputs else {}
    if (
        extra
    ):  # the library takes the mean rate of the sampled frames, here 0.8 s between two temporal patches
        sample = tiny.sample(media[name], parts, seconds=float(inputs["second_per_grid_ts"][0]) / 2)
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        inputs["video_grid_thw"],
        **extra,
    )
    assert sample.tensors["position_ids"][1:].tolist() == expected[:, 0].tolist()
    assert sample.tensors["position_ids"][0].tolist() == list(range(inputs["input_ids"].shape[1]))


def test_qwen3_writes_the_mean_time_of_each_temporal_patch(media):
    span = media["qwen3-vl"].span(MediaShape("video", 16, 16, 5, (0.0, 1.0, 2.0, 3.0, 4.0)))
    text = media["qwen3-vl"].tokenizer.decode(span.ids)
    pads = (
        "<|vision_start|>"
        + "<|video_pad|>" * (span.parts[0].size[1] * span.parts[0].size[2] // 4)
        + "<|vision_end|>"
    )
    assert text == f"<|vision_start|><0.5 seconds>{pads}<2.5 seconds>{pads}<4.0 seconds>{pads}<|vision_end|>"
    assert media["qwen3-vl"].times(4) == [(0, 0.5), (1, 1.5)]  # without times: data.video.fps, 2 a second


@pytest.mark.parametrize("name", tiny.NAMES)
def test_recipe_limits_override_the_checkpoints(name, family):
    data = Data.model_validate(
        {"image": {"max_pixels": 256}, "video": {"min_pixels": 512, "max_pixels": 640}}
    )
    media = family(name).media_processor(data)
    assert rows_of(media.span(MediaShape("image", 64, 64))) == 16  # 256 pixels in patches of 4 x 4
    span = media.span(MediaShape("video", 64, 64, 4))
    assert span.parts[0].size[1] * span.parts[0].size[2] * 16 == 576
    pixels, grid = media.features(tiny.shape_of(tiny.clip(4, 64, 64)), tiny.clip(4, 64, 64))["vision"]
    assert pixels.shape[0] == rows_of(span) and tuple(grid[0].tolist()) == span.parts[0].size
    assert (
        media.features(tiny.shape_of(tiny.picture(64, 64)), tiny.picture(64, 64))["vision"][0].shape[0] == 16
    )
    with pytest.raises(PolymodalError, match="min_pixels.*more than"):
        family(name).media_processor(Data.model_validate({"image": {"min_pixels": 10**6}}))


def test_a_media_processor_is_pickled_and_names_its_settings(media):
    for name, processor in media.items():
        clone = pickle.loads(pickle.dumps(processor))
        assert clone.span(MediaShape("image", 24, 24)) == processor.span(MediaShape("image", 24, 24))
        assert json.dumps(clone.settings, sort_keys=True) == json.dumps(processor.settings, sort_keys=True)
        sample = tiny.sample(clone, CASES["image and video"])
        expected = tiny.sample(processor, CASES["image and video"])
        assert all(torch.equal(tensor, expected.tensors[key]) for key, tensor in sample.tensors.items()), name


def test_media_it_cannot_use_are_refused_in_a_sentence(media, tmp_path):
    with pytest.raises(PolymodalError, match="2000 x 4 pixels cannot be used"):
        media["qwen2.5-vl"].span(MediaShape("image", 4, 2000))
    with pytest.raises(PolymodalError, match="not audio"):
        media["qwen2.5-vl"].placeholder("audio")
    with pytest.raises(PolymodalError, match="tokenizer of .* cannot be read"):
        type(media["qwen2.5-vl"])(str(tmp_path), None, "", Data())
