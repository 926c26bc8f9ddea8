"""Qwen3-ASR equals the library's own model: tokens, mel frames, logits, gradients, stages, files; it transcribes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, pack
from polymodal.data import audio
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.generate.opening import open_model, processor_of
from polymodal.generate.transcribe import Speech, transcriber_of
from polymodal.models import catalog, weights
from polymodal.parallel.stages import prune
from polymodal.recipe import Attr, Data, Model
from polymodal.train.export import export
from tests.models import test_qwen_vl, tiny
from tests.models.test_qwen_vl import gradients, ours, token_loss
from tests.unit.media_fixtures import write_audio

CASES = {
    "one": [tiny.sound(2.7), "language English<asr_text>one two"],
    "short": [tiny.sound(0.2), "three"],
    "two": ["one", tiny.sound(1.25, 1), "and", tiny.sound(0.6, 2), "seven"],
    "text": ["one two three"],
}


@pytest.fixture(scope="module")
def family(checkpoint):
    return catalog.family(Model(source=str(checkpoint(tiny.ASR))))


@pytest.fixture(scope="module")
def media(family):
    return family.media_processor(Data())


def loaded(family):
    model = family.build()
    weights.load(model, family)
    return model.double()


def library_model(family, dtype=torch.float64):
    return transformers.Qwen3ASRForConditionalGeneration.from_pretrained(family.source, dtype=dtype)


def library_inputs(sample):
    inputs = {"input_ids": sample.tensors["input_ids"][None]}
    if "audio_frames" in sample.tensors:
        lengths = sample.tensors["audio_frames"][:, 0].tolist()
        longest = -(-max(lengths) // 100) * 100
        rows = sample.tensors["input_features"].split(lengths)
        padded = [torch.nn.functional.pad(each, (0, 0, 0, longest - len(each))).T for each in rows]
        inputs["input_features"] = torch.stack(padded).double()
        inputs["input_features_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_librarys_own_forward(case, family, media):
    sample = tiny.sample(media, CASES[case])
    reference, mine = library_model(family).train(), loaded(family)
    expected = reference(**library_inputs(sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    theirs, found = gradients(reference), gradients(mine)
    outside = {key for key, grad in theirs.items() if grad is None}  # the tower, of text alone
    assert bool(outside) == (case == "text") and not any(found[key].any() for key in outside)
    theirs |= {key: torch.zeros_like(found[key]) for key in outside}
    test_qwen_vl.assert_same(found, theirs)


def test_a_pack_equals_its_samples_alone(family, media):
    samples = [tiny.sample(media, CASES[case]) for case in ("one", "text", "short", "two")]
    model = loaded(family)
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("audio, language", [((4, 0), (1, 2)), ((1, 3), (0, 3))])
def test_two_pipeline_stages_equal_the_whole(audio, language, family, media):
    for cases in (["one", "text"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        _, expected = ours(family, loaded(family), batch)
        stages, found = [loaded(family) for _ in range(2)], {"audio": audio, "language": language}
        for index, stage in enumerate(stages):
            prune(stage, family, found, index)
        carry = family.stage(stages[0], None, batch)
        spec = family.carry_spec(batch, {tower: cut[0] for tower, cut in found.items()}, torch.float64)
        assert {k: t.shape for k, t in carry.items()} == {k: t.shape for k, t in spec.items()}
        out = family.stage(stages[1], carry, batch)
        torch.testing.assert_close(out.head(out.hidden_states), expected, rtol=1e-9, atol=1e-9)


def test_cost_is_the_operations_that_run(family, media):
    sample = tiny.sample(media, [tiny.sound(3.0), "one two"])
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    uncausal = 2 * family.text.num_hidden_layers * 64 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


@pytest.mark.parametrize("key", ["0.6b", "1.7b"])
def test_published_sizes_have_their_parameters(key):
    card = catalog.cards()[tiny.ASR]
    size = card.sizes[key]
    family = card.family(card, transformers.AutoConfig.for_model(**size.config), size.hub)
    family.check()
    total = sum(parameter.numel() for parameter in family.build().parameters())
    assert round(total / 1e9, 2) == size.parameters


# -- rows, files, transcription


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recordings")
    for name, seconds in (("a", 1.0), ("short", 0.2), ("long", 15.0)):
        write_audio(directory / f"{name}.wav", seconds)
    return directory


def record(recordings, **columns):
    row = {"audio": str(recordings / "a.wav"), "text": "one two", **columns}
    return RowReader("auto", Attr(), str(recordings / "train.jsonl"), None).record(row, "row 1")


def test_rows_become_what_the_model_was_taught(recordings, family, media):
    """The prompt is the library's transcription request, the labels are the language, the text and the end."""
    processor = processor_of(family.source)
    source = str(recordings / "a.wav")
    heard = audio.decode_audio(source, audio.audio_header(source), 16000)
    prompts = processor.apply_transcription_request([heard], prompt="red, blue", tokenize=False)
    asked = processor(text=prompts, audio=[heard], sampling_rate=16000)
    for columns, said in (
        ({"language": "en"}, "language English<asr_text>one two<|im_end|>"),
        ({"language": "german"}, "language German<asr_text>one two<|im_end|>"),
        ({}, "language None<asr_text>one two<|im_end|>"),
        ({"text": "language English<asr_text>yes"}, "language English<asr_text>yes<|im_end|>"),
        ({"text": "<|0.00|> one <|0.50|> two <|0.90|>"}, "language None<asr_text>one two<|im_end|>"),
    ):
        row = record(recordings, prompt="red, blue", **columns)
        chat = ChatProcessor(media, Data())
        sample = chat.sample(row)
        assert chat.measure([row]) == [sample.measure]
        labels = sample.tensors["labels"]
        first = int((labels != IGNORE).nonzero()[0]) + 1
        assert sample.tensors["input_ids"][:first].tolist() == asked["input_ids"][0].tolist()
        made = media.tokenizer.decode(labels[labels != IGNORE])
        assert made.strip() == said
        frames = asked["input_features"][0].T[: int(asked["input_features_mask"].sum())]
        torch.testing.assert_close(sample.tensors["input_features"], frames)


def test_what_cannot_be_learned_is_said(recordings, media):
    chat = ChatProcessor(media, Data())
    for columns, said in (
        ({"language": "Klingon"}, "row 1: Qwen3-ASR does not know the language Klingon"),
        ({"task": "translate"}, "row 1: Qwen3-ASR transcribes, it does not translate"),
    ):
        with pytest.raises(PolymodalError, match=said):
            chat.sample(record(recordings, **columns))


def test_it_transcribes_in_pieces_and_batches(recordings, family):
    made = open_model(family.source, device="cpu")
    transcriber = transcriber_of(made.model, made.processor, name="tiny")
    jobs = [Speech(str(recordings / f"{name}.wav")) for name in ("long", "a", "short")]
    jobs += [Speech(str(recordings / "a.wav"), language="German"), Speech(str(recordings / "none.wav"))]
    import polymodal.generate.transcribe as module

    before, module.TOKENS = module.TOKENS, 8
    try:
        found = dict(transcriber.transcripts(jobs, batch_size=2))
        alone = [dict(transcriber.transcripts([job], batch_size=1))[0] for job in jobs[:2]]
    finally:
        module.TOKENS = before
    assert len(found[0].segments) <= 3 and found[0].seconds == 15.0
    assert [found[0].text, found[1].text] == [each.text for each in alone]
    assert found[3].language == "de" and isinstance(found[4], PolymodalError)
    for job, said in (
        (Speech("a.wav", language="Klingon"), "does not know the language"),
        (Speech("a.wav", task="translate"), "does not translate"),
    ):
        with pytest.raises(PolymodalError, match=said):
            transcriber.check(job)
    with pytest.raises(PolymodalError, match="writes no times"):
        transcriber.check(jobs[0], timestamps=True)


def original(source, directory):
    """A checkpoint in the authors' layout, written from the names of their files."""
    directory.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (directory / file.name).write_bytes(file.read_bytes())
    state = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        key = key.replace("model.multi_modal_projector.linear_", "model.audio_tower.proj")
        key = key.removeprefix("model.")
        for ours_, theirs in (
            ("language_model", "model"),
            ("lm_head", "lm_head"),
            ("audio_tower", "audio_tower"),
        ):
            if key.startswith(ours_):
                state[f"thinker.{theirs}{key.removeprefix(ours_)}"] = tensor.clone()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    text, sound = config["text_config"], config["audio_config"]
    rope = {"rope_theta": text.pop("rope_parameters")["rope_theta"]}
    rope["rope_scaling"] = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    inner = {
        "audio_config": sound | {"model_type": "qwen3_asr_audio_encoder", "max_source_positions": 1500},
        "text_config": text | rope | {"model_type": "qwen3_asr_text"},
        "audio_token_id": config["audio_token_id"],
        "dtype": "float32",
        "model_type": "qwen3_asr_thinker",
    }
    sound.pop("max_position_embeddings")
    whole = {"architectures": config["architectures"], "model_type": "qwen3_asr", "thinker_config": inner}
    (directory / "config.json").write_text(json.dumps(whole))
    return directory


def test_the_authors_layout_is_read_and_written(checkpoint, family, media, tmp_path):
    source = original(checkpoint(tiny.ASR), tmp_path / "original")
    own = catalog.family(Model(source=str(source)))
    batch = pack([tiny.sample(media, CASES["one"])])
    _, expected = ours(family, loaded(family), batch)
    assert torch.equal(ours(own, loaded(own), batch)[1], expected)
    done = export(str(source), str(tmp_path / "out"), dtype="fp32")
    before, after = (load_file(at / "model.safetensors") for at in (source, tmp_path / "out"))
    assert done.tokens and before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert "thinker_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert export(str(source), str(tmp_path / "hf"), layout="transformers").tokens
    library = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert library.config.audio_config.d_model == 32
