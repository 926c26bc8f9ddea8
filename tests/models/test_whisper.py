"""Whisper's card against the library's own class: outputs, gradients, keys, FLOPs and the sizes that are
published."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.models import catalog, weights
from polymodal.models.audio.whisper import CARD, Whisper
from polymodal.objectives.language import LanguageObjective
from polymodal.recipe import Model, Recipe
from polymodal.train.layouts import layout_of
from tests.models import tiny_speech
from tests.parallel import speech
from tests.parallel.exact import float64

# d_model, layers of the encoder and of the decoder, bands, vocabulary, parameters (tied head once)
PUBLISHED = {
    "tiny": (384, 4, 4, 80, 51865, 37_760_640),
    "tiny.en": (384, 4, 4, 80, 51864, 37_760_256),
    "base": (512, 6, 6, 80, 51865, 72_593_920),
    "base.en": (512, 6, 6, 80, 51864, 72_593_408),
    "small": (768, 12, 12, 80, 51865, 241_734_912),
    "small.en": (768, 12, 12, 80, 51864, 241_734_144),
    "medium": (1024, 24, 24, 80, 51865, 763_857_920),
    "medium.en": (1024, 24, 24, 80, 51864, 763_856_896),
    "large": (1280, 32, 32, 80, 51865, 1_543_304_960),
    "large-v2": (1280, 32, 32, 80, 51865, 1_543_304_960),
    "large-v3": (1280, 32, 32, 128, 51866, 1_543_490_560),
    "turbo": (1280, 32, 4, 128, 51866, 808_878_080),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_speech.checkpoint(tmp_path_factory.mktemp("whisper") / "model")


@pytest.fixture(scope="module")
def family(source) -> Whisper:
    found = catalog.family(Model(source=str(source)))
    assert isinstance(found, Whisper)
    return found


def test_every_published_size_is_on_the_card():
    assert set(CARD.sizes) == set(PUBLISHED)
    hubs = {key: f"openai/whisper-{key}" for key in PUBLISHED} | {"turbo": "openai/whisper-large-v3-turbo"}
    assert {key: size.hub for key, size in CARD.sizes.items()} == hubs
    assert catalog.named("openai/whisper-large-v3-turbo") == (CARD, "turbo")


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_published_size_has_its_parameters(key):
    from transformers import AutoConfig

    width, encoder, decoder, bands, vocabulary, parameters = PUBLISHED[key]
    config = AutoConfig.for_model(**CARD.sizes[key].config)
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (width, encoder, decoder)
    assert (config.num_mel_bins, config.vocab_size) == (bands, vocabulary)
    assert config.encoder_attention_heads == config.decoder_attention_heads == width // 64
    made = Whisper(CARD, config, key).build()
    count = sum(p.numel() for p in made.parameters())
    assert count == parameters and CARD.sizes[key].parameters == pytest.approx(count / 1e9, rel=0.02)
    assert CARD.sizes[key].layers == decoder


def test_loss_and_gradients_are_the_librarys(family, source):
    from transformers import WhisperForConditionalGeneration

    with float64():
        batch = speech.batches(family, torch.float64)[2]
        batch.tensors["weights"] = (batch["labels"] >= 0).double()
        ours = family.build().double()
        weights.load(ours, family)
        objective = LanguageObjective()
        inverse = {"text": 1 / objective.weights(batch)["text"]}
        loss, _ = objective.loss(family.stage(ours.eval(), None, batch), batch, inverse)
        loss.backward()
        library = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float64).eval()
        out = library(
            batch["input_features"],
            decoder_input_ids=batch["input_ids"],
            labels=batch["labels"],
            use_cache=False,
        )
        out.loss.backward()
    torch.testing.assert_close(loss, out.loss, rtol=1e-9, atol=0)
    theirs = dict(library.named_parameters())
    own = dict(ours.named_parameters())
    assert own.keys() == theirs.keys() and not own["model.encoder.embed_positions.weight"].requires_grad
    scale = max(float(p.grad.norm()) for p in theirs.values() if p.grad is not None)
    for name, parameter in own.items():
        if parameter.requires_grad:
            assert float((parameter.grad - theirs[name].grad).norm()) < 1e-9 * scale, name


def test_a_sample_in_a_padded_batch_is_the_sample_alone(family):
    """No mask is given: padding stands after what could see it, and has no weight."""
    with float64():
        model = family.build().double()
        weights.load(model, family)
        model.eval()
        whole = speech.batches(family, torch.float64)[0]
        out = family.stage(model, None, whole).hidden_states
        for at, tokens in enumerate(whole.groups["lengths"]):
            tensors = {n: t[at : at + 1] for n, t in whole.tensors.items()}
            for name in ("input_ids", "labels", "weights"):
                tensors[name] = tensors[name][:, :tokens]
            alone = family.stage(model, None, dataclasses.replace(whole, tensors=tensors)).hidden_states
            torch.testing.assert_close(out[at : at + 1, :tokens], alone, rtol=1e-9, atol=1e-9)


def test_no_mask_is_built_and_nothing_is_asked_of_the_positions(family, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda _: pytest.fail("looked at positions")
    )
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *_, **__: pytest.fail("built a mask"))
    model = family.build()
    weights.load(model, family)
    batch = speech.batches(family, torch.float32)[0]
    assert family.stage(model, None, batch).hidden_states.shape == (2, 11, 32)


def test_the_flops_are_those_that_torch_counts(source):
    family = catalog.family(Model(source=str(source), attention="eager"))  # whose products torch sees
    model = family.build()
    weights.load(model, family)
    tokens = 40
    batch = family.example(SampleLengths(tokens, tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        model.proj_out(out.hidden_states)
    counted = family.cost(SampleLengths(tokens, tokens))
    causal = (
        family.config.decoder_layers * 2.0 * tokens**2 * family.config.d_model
    )  # torch counts the masked half too
    assert counted + causal == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_example_is_shaped_like_data(family):
    recipe = Recipe(model=Model(source="x"))
    recipe.train.micro_batch_size = 3
    layout = layout_of(recipe, family)
    load = layout.workload(0.25, 1024)
    batch = layout.example(load)
    assert load.samples == 3 and load.measure.tokens == 48, "what the decoder takes, not data.max_length"
    assert batch["input_ids"].shape == (3, 48) and batch["input_features"].shape == (
        3,
        tiny_speech.BANDS,
        200,
    )
    assert layout.describe(load) == "3 samples of 48 tokens and 100 positions of audio"


def test_a_feature_extractor_of_another_size_is_refused(source, tmp_path):
    from transformers import WhisperFeatureExtractor

    tiny_speech.checkpoint(tmp_path)
    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(tmp_path)
    with pytest.raises(PolymodalError, match="makes 80 bands of 200 frames, the model takes 16 of 200"):
        catalog.family(Model(source=str(tmp_path))).media_processor(None)


def test_layouts_that_it_does_not_have_say_why():
    from polymodal.distributed.mesh import ParallelSizes
    from polymodal.parallel.apply import check

    config = tiny_speech.config()

    def reasons(**sizes) -> list[str]:
        return [
            str(e)
            for e in check(
                CARD,
                config,
                ParallelSizes(**{"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, **sizes}),
            )
        ]

    assert "its sequences are short" in reasons(cp=2)[0] and "no experts" in reasons(ep=2)[0]
    assert not reasons(tp=2) and not reasons(tp=4, pp=2), "also where the vocabulary is odd"
    assert "encoder_attention_heads = 4" in reasons(tp=8)[0]


@pytest.mark.parametrize(
    "files, options, words",
    [
        (("a.wav", "b.wav"), {"form": "srt"}, "--format srt is one file for each recording. Give --out DIR"),
        (("a.wav",), {"form": "doc"}, "--format doc is not known"),
        (("a.wav",), {"language": "klingon"}, "does not know the language klingon"),
        (("none.wav",), {}, "none.wav does not exist"),
        (("empty",), {}, "empty holds no audio or video file"),
        (("a.wav",), {"out": "a.wav"}, "a.wav cannot be made"),
    ],
)
def test_what_cannot_be_transcribed_is_one_sentence(source, tmp_path, files, options, words):
    from polymodal.generate import transcribe

    for name in ("a", "b"):
        tiny_speech.recording(tmp_path / f"{name}.wav", "one")
    (tmp_path / "empty").mkdir()
    if "out" in options:
        options = {"out": tmp_path / options["out"]}
    with pytest.raises(PolymodalError, match=re.escape(words)):
        transcribe.main(str(source), [str(tmp_path / file) for file in files], **options, device="cpu")


def test_it_is_not_asked_questions(source):
    from polymodal.generate.engine import Engine
    from polymodal.generate.opening import open_model

    made = open_model(source, device="cpu")
    with pytest.raises(PolymodalError, match="transcribes speech, it does not answer questions"):
        Engine(made.model, made.processor)
