"""InternVL equals the library's own model: spans, tiles, logits, gradients; and both layouts of its
checkpoints."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, SampleLengths, pack
from polymodal.distributed import attention
from polymodal.distributed.mesh import ParallelSizes
from polymodal.generate.opening import load_hub, processor_of
from polymodal.models import catalog, weights
from polymodal.parallel import apply
from polymodal.parallel.stages import prune
from polymodal.recipe import Data, Model
from tests.models import gather, tiny
from tests.models.test_qwen_vl import CASES, assert_same, gradients, ours, token_loss

BLOCKS = 4  # of the tiny tower


@pytest.fixture(scope="module")
def originals(checkpoint, tmp_path_factory):
    """originals(name) -> the tiny checkpoint in its authors' layout."""
    made = {}

    def write(name):
        if name not in made:
            made[name] = tiny.original_internvl(
                name, checkpoint(name), tmp_path_factory.mktemp(name) / "original"
            )
        return made[name]

    return write


@pytest.fixture(scope="module")
def family(checkpoint):
    return lambda name, tied=False: catalog.family(Model(source=str(checkpoint(name, tied)), experts="eager"))


def model_of(source, packed_attention=False):
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    if packed_attention:
        attention.use(model)
    return model.train()


def library_inputs(sample):
    inputs = {"input_ids": sample.tensors["input_ids"][None]}
    if "pixel_values" in sample.tensors:
        inputs["pixel_values"] = sample.tensors["pixel_values"].double()
    return inputs


@pytest.mark.parametrize("name", tiny.INTERNVL)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_the_librarys_own_forward(name, case, family, checkpoint):
    family = family(name)
    sample = tiny.sample(family.media_processor(Data()), CASES[case])
    reference, mine = model_of(checkpoint(name)), model_of(checkpoint(name), packed_attention=True)
    expected = reference(**library_inputs(sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    theirs, found = gradients(reference), gradients(mine)
    if case == "text":  # the library leaves its tower out; ours runs it for nothing
        outside = {key for key, grad in theirs.items() if grad is None}
        assert outside and not any("language_model" in key for key in outside)
        assert all(found[key] is not None and not found[key].any() for key in outside)
        theirs |= {key: torch.zeros_like(found[key]) for key in outside}
    assert_same(found, theirs)


@pytest.mark.parametrize("name", tiny.INTERNVL)
def test_a_pack_equals_its_samples_alone(name, family, checkpoint):
    family = family(name)
    media = family.media_processor(Data())
    samples = [tiny.sample(media, CASES[case]) for case in ("several images", "text", "image and video")]
    model = model_of(checkpoint(name), packed_attention=True)
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["internvl", "internvl-6b"])
@pytest.mark.parametrize("cut", [(BLOCKS, 0), (3, 1)])
def test_two_pipeline_stages_equal_the_whole(name, cut, family, checkpoint):
    family = family(name)
    media = family.media_processor(Data())
    layers = (1, 2) if cut[0] == BLOCKS else (0, 3)
    for cases in (["several images", "text", "video"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        whole = model_of(checkpoint(name), packed_attention=True)
        _, expected = ours(family, whole, batch)
        token_loss(expected, batch["labels"]).backward()
        stages = [family.build() for _ in range(2)]
        for index, stage in enumerate(stages):
            weights.load(stage, family, source=checkpoint(name))
            prune(stage.double(), family, {"vision": cut, "language": layers}, index)
        carry = family.stage(stages[0], None, batch)
        spec = family.carry_spec(batch, {"vision": cut[0], "language": layers[0]}, torch.float64)
        assert {k: (t.shape, t.dtype) for k, t in carry.items()} == {
            k: (t.shape, t.dtype) for k, t in spec.items()
        }
        received = {key: tensor.detach().requires_grad_() for key, tensor in carry.items()}
        out = family.stage(stages[1], received, batch)
        got = out.head(out.hidden_states)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        token_loss(got, batch["labels"]).backward()
        sent = [key for key in carry if received[key].grad is not None]
        torch.autograd.backward([carry[key] for key in sent], [received[key].grad for key in sent])
        for stage in stages:
            found = gradients(stage)
            assert_same(found, {key: gradients(whole)[key] for key in found})


def test_router_logits_are_the_librarys(family, checkpoint):
    family = family("internvl-moe")
    sample = tiny.sample(family.media_processor(Data()), CASES["image"])
    expected = model_of(checkpoint("internvl-moe"))(
        **library_inputs(sample), use_cache=False, output_router_logits=True
    )
    out, _ = ours(family, model_of(checkpoint("internvl-moe"), packed_attention=True), pack([sample]))
    theirs = getattr(expected, "router_logits", None)
    assert len(out.extra["router_logits"]) == 3 and family.routers() == (3, 4)
    assert family.balance(None) == {"aux_weight": 0.01, "experts_per_token": 2}
    for got, other in zip(out.extra["router_logits"], theirs or out.extra["router_logits"], strict=True):
        torch.testing.assert_close(got, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", tiny.INTERNVL)
def test_cost_is_the_operations_that_run(name, family, checkpoint):
    family = family(name)
    parts = [tiny.picture(32, 32), "What is in this picture? It is a three.", tiny.clip(3, 32, 16)]
    sample = tiny.sample(family.media_processor(Data()), parts)
    model = model_of(checkpoint(name)).float()
    model.set_attn_implementation("eager")
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    text = family.text
    uncausal = 2 * text.num_hidden_layers * 64 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


# -- media ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media(family):
    return family("internvl").media_processor(Data())


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 130), width=st.integers(1, 130))
def test_an_image_span_is_what_the_librarys_processor_makes(media, height, width):
    image = tiny.picture(width, height)
    theirs = tiny.processors("internvl")[0](images=[image], crop_to_patches=True, return_tensors="pt")
    span = media.span(MediaShape("image", height, width))
    assert span.parts[0].size == (len(theirs["pixel_values"]),)
    pixels, tiles = media.features(tiny.shape_of(image), image)["vision"]
    assert torch.equal(pixels, theirs["pixel_values"]) and tiles.tolist() == [[len(pixels)]]
    assert span.ids.count(media.pad) == 4 * len(pixels) and span.parts[0].lengths == (16,) * len(pixels)


@pytest.mark.parametrize("name", ["internvl", "internvl-moe"])
def test_token_ids_and_tiles_are_the_librarys(name, family):
    media, processor = family(name).media_processor(Data()), tiny.processor(name)
    images, videos = [tiny.picture(40, 24), tiny.picture(16, 60, 1)], [tiny.clip(5, 32, 24), tiny.clip(5)]
    parts = [
        "<|im_start|>user\n",
        images[0],
        "\n",
        videos[0],
        "\nand\n",
        images[1],
        "\n",
        videos[1],
        "\nWhat is it?<|im_end|>\n",
    ]
    sample = tiny.sample(media, parts)
    names = {str: lambda p: p, np.ndarray: lambda _: media.placeholder("video")}
    text = "".join(names.get(type(p), lambda _: media.placeholder("image"))(p) for p in parts)
    inputs = processor(
        text=[text],
        images=images,
        videos=[torch.from_numpy(v).permute(0, 3, 1, 2) for v in videos],
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], sample.tensors["pixel_values"])
    assert sample.tensors["position_ids"].tolist() == [list(range(len(sample.tensors["input_ids"])))]


def test_a_media_processor_is_pickled_and_names_its_settings(media):
    clone = pickle.loads(pickle.dumps(media))
    assert clone.span(MediaShape("image", 24, 48)) == media.span(MediaShape("image", 24, 48))
    assert json.dumps(clone.settings, sort_keys=True) == json.dumps(media.settings, sort_keys=True)
    with pytest.raises(PolymodalError, match="not audio"):
        media.placeholder("audio")


def test_pixel_limits_of_a_recipe_are_numbers_of_tiles(family, tmp_path, checkpoint):
    """256 pixels a tile: at most 3 of them and the thumbnail, in training and with the library's own
    processor."""
    family = family("internvl")
    data = Data.model_validate({"image": {"max_pixels": 800}})
    wide = MediaShape("image", 16, 96)
    assert family.media_processor(Data()).span(wide).parts[0].size == (7,)
    assert family.media_processor(data).span(wide).parts[0].size == (4,)
    processor = processor_of(checkpoint("internvl"), data, family)
    assert len(processor(images=[tiny.picture(96, 16)], text="<IMG_CONTEXT>")["pixel_values"]) == 4
    for bad, said in (
        ({"image": {"min_pixels": 2000, "max_pixels": 600}}, "contradict"),
        ({"video": {"max_pixels": 600}}, "one tile"),
    ):
        with pytest.raises(PolymodalError, match=said):
            family.media_processor(Data.model_validate(bad))


# -- the authors' layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.INTERNVL)
def test_both_layouts_are_one_model_and_go_back_to_their_files(name, checkpoint, originals, tmp_path):
    source, original = checkpoint(name), originals(name)
    families = [catalog.family(Model(source=str(path))) for path in (source, original)]
    models = [family.build() for family in families]
    for family, model in zip(families, models, strict=True):
        weights.load(model, family)
    expected = dict(models[0].named_parameters())
    for key, parameter in models[1].named_parameters():
        assert torch.equal(parameter, expected[key]), key
    for key, parameter in load_hub(original).named_parameters():  # by the library's own loader
        assert torch.equal(parameter, expected[key]), key
    for path, family, model in zip((source, original), families, models, strict=True):
        again = gather.save(
            gather.weights(model), tmp_path / path.name, model=model, source=path, config=family.config
        )
        before, after = load_file(path / "model.safetensors"), load_file(again / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        if path is original:
            written = json.loads((path / "config.json").read_text())
            assert json.loads((again / "config.json").read_text()) == written
            assert (again / "modeling_internvl_chat.py").is_file()
    converted = gather.save(
        gather.weights(models[1]),
        tmp_path / "converted",
        model=models[1],
        source=original,
        convert=True,
        config=families[1].config,
    )
    before, after = load_file(source / "model.safetensors"), load_file(converted / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(tensor, after[key]) for key, tensor in before.items()
    )
    assert not (converted / "modeling_internvl_chat.py").exists()
    kept = (converted / "generation_config.json").read_text()
    assert kept == (original / "generation_config.json").read_text()
    opened = AutoModelForImageTextToText.from_pretrained(converted)
    assert all(torch.equal(p, expected[key]) for key, p in opened.named_parameters())
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "Hi"}],
        }
    ]
    inputs = AutoProcessor.from_pretrained(converted).apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert opened(**inputs).logits.isfinite().all()


def test_a_changed_config_goes_back_into_the_authors_names(originals, tmp_path):
    changes = {"text_config.num_hidden_layers": 2, "vision_config.attention_dropout": 0.1}
    family = catalog.family(Model(source=str(originals("internvl")), config=changes))
    model = family.build()
    weights.load(model, family)  # a layer of the files has no place, and the change says why
    again = gather.save(
        gather.weights(model),
        tmp_path / "again",
        model=model,
        source=family.source,
        dtype=torch.bfloat16,
        config=family.config,
    )
    written = json.loads((again / "config.json").read_text())
    assert written["model_type"] == "internvl_chat" and "text_config" not in written
    assert (written["llm_config"]["num_hidden_layers"], written["torch_dtype"]) == (2, "bfloat16")
    assert written["vision_config"]["attention_dropout"] == 0.1
    assert catalog.family(Model(source=str(again))).config.text_config.num_hidden_layers == 2


def test_internlms_tokenizer_is_read_from_its_sentencepiece_model(originals):
    from sentencepiece import SentencePieceProcessor

    directory = originals("internvl-llama")
    model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = processor_of(directory).tokenizer
    for text in (tiny.TEXT, " two  spaces\n\nand lines", "图片 a, b; 'c' (d) éß 🙂"):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    named = {
        token["content"]: int(at)
        for at, token in json.loads((directory / "tokenizer_config.json").read_text())[
            "added_tokens_decoder"
        ].items()
    }
    assert all(tokenizer.convert_tokens_to_ids(token) == at for token, at in named.items())
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>yes<|im_end|>"
    ids = tokenizer.encode(text)
    assert ids[:2] == [model.bos_id(), named["<|im_start|>"]] and ids[-1] == named["<|im_end|>"]


def test_ties_are_those_of_the_language_models_config(checkpoint, tmp_path):
    """The library's config class would tie the embeddings where a config.json says nothing at its top."""
    directory = shutil.copytree(checkpoint("internvl"), tmp_path / "untied")
    written = json.loads((directory / "config.json").read_text())
    del written["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(written))
    family = catalog.family(Model(source=str(directory)))
    model = family.build()
    weights.load(model, family)
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ps_version": "v1"}, "ps_version = v1"),
        ({"select_layer": -4}, "select_layer = -4"),
        ({"llm_config": {"model_type": "phi3"}}, "model_type = phi3"),
        ({"llm_config": {"model_type": "internlm2", "bias": True}}, "bias = True"),
    ],
)
def test_what_cannot_be_described_is_refused(changes, said, originals, tmp_path):
    directory = shutil.copytree(originals("internvl"), tmp_path / "other")
    written = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        written[key] = {**written[key], **value} if isinstance(value, dict) else value
    (directory / "config.json").write_text(json.dumps(written))
    with pytest.raises(PolymodalError, match=said):
        catalog.family(Model(source=str(directory)))


def test_a_damaged_original_says_what_is_missing(originals, tmp_path):
    directory = shutil.copytree(originals("internvl-llama"), tmp_path / "damaged")
    state = load_file(directory / "model.safetensors")
    del state["mlp1.3.bias"]
    save_file(state, directory / "model.safetensors")
    family = catalog.family(Model(source=str(directory)))
    with pytest.raises(PolymodalError, match="multi_modal_projector.linear_2.bias"):
        weights.load(family.build(), family)


# -- layouts -------------------------------------------------------------------------------------------------


def test_heads_of_the_large_tower_stay_whole_and_those_of_the_small_one_must_divide(family):
    large, small = family("internvl-6b"), family("internvl")
    assert not apply.check(large.card, large.config, ParallelSizes(1, 1, 1, 1, 2))
    small.config.vision_config.num_attention_heads = 3
    reasons = apply.check(small.card, small.config, ParallelSizes(1, 1, 1, 1, 2))
    assert ["vision_config.num_attention_heads" in reason.message for reason in reasons] == [True]


@pytest.mark.parametrize("name", tiny.INTERNVL)
def test_towers_hold_every_parameter_once_and_an_example_fits(name, family):
    family = family(name)
    model = family.build()
    for parameter, _ in model.named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(40, 20, {"vision": (16, 16, 16)}))
    assert batch["tiles"].tolist() == [[1], [1], [1]] and batch["pixel_values"].shape == (3, 3, 16, 16)
    assert int((batch["input_ids"] == family.config.image_token_id).sum()) == 12
