"""Qwen2.5-Omni and Qwen3-Omni equal the library's own thinkers: tokens, mel frames, positions, logits, gradients, stages."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Media, MediaShape, Message, SampleLengths, pack
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.generate.engine import Engine, Sampling
from polymodal.generate.media import write_video
from polymodal.generate.opening import load_hub, processor_of
from polymodal.models import catalog
from polymodal.plan import estimate
from polymodal.plan.shape import shape_of
from polymodal.recipe import Attr, Data, Model, Recipe
from polymodal.train.export import export
from polymodal.train.layouts import layout_of
from tests.models import test_qwen_vl, tiny
from tests.models.staged import assert_two_stages_equal_the_whole, loaded
from tests.models.test_qwen_vl import ours, token_loss
from tests.unit.media_fixtures import write_audio, write_mp4

CASES = {
    "image": test_qwen_vl.CASES["image"],
    "video": test_qwen_vl.CASES["video"],
    "text": test_qwen_vl.CASES["text"],
    "audio": ["Listen: ", tiny.sound(1.43), "What is it? It is a three."],
    "all": [
        tiny.sound(0.3),
        "and ",
        tiny.picture(24, 16),
        "then",
        tiny.clip(4, 24, 16),
        tiny.sound(1.25, 1),
        "what?",
    ],
    "video with sound": [
        "Describe",
        (tiny.clip(6, 24, 16), tiny.sound(2.7)),
        tiny.picture(16, 16, 1),
        tiny.sound(0.2, 2),
        "It is a seven.",
    ],
}
WHOLE = {tiny.OMNI: 0.24, tiny.OMNI3: 3.0}  # seconds that are whole windows
STEP = 0.7
"""Seconds between temporal patches: a fraction of a position in both models."""
UNUSED = "model.audio_tower.audio_bos_eos_token.weight"


@pytest.fixture(scope="module", params=tiny.OMNIS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(name, checkpoint):
    return catalog.family(Model(source=str(checkpoint(name)), experts="eager"))


@pytest.fixture(scope="module")
def media(name, family):
    return family.media_processor(Data.model_validate(tiny.DATA[name]))


def opened(family, dtype=torch.float64):
    """The library's model of the checkpoint."""
    model = load_hub(Path(family.source), dtype)
    if family.routers()[0]:
        model.set_experts_implementation("eager")
    return model


def gradients(model):
    return {n: grad for n, grad in test_qwen_vl.gradients(model).items() if n != UNUSED}


def library_inputs(family, sample):
    """A Sample as the arguments of the library's thinker."""
    inputs = test_qwen_vl.library_inputs(family, sample)
    del inputs["mm_token_type_ids"]
    ids, config = sample.tensors["input_ids"], family.config
    videos = len(inputs.get("video_grid_thw", ()))
    if videos:
        inputs["video_second_per_grid"] = torch.full((videos,), STEP)
        after = ids[(ids == config.vision_start_token_id).nonzero()[:, 0] + 1]
        inputs["use_audio_in_video"] = bool((after == config.audio_start_token_id).any())
    if "audio_frames" in sample.tensors:
        lengths = sample.tensors["audio_frames"][:, 0].tolist()
        rows = sample.tensors["input_features"].split(lengths)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inputs["input_features"] = padded.transpose(1, 2).double()
        inputs["feature_attention_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return inputs


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_librarys_own_forward(case, family, media):
    sample = tiny.sample(media, CASES[case], seconds=STEP / 2)
    reference, mine = opened(family).train(), loaded(family)
    expected = reference(**library_inputs(family, sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    assert dict(mine.named_parameters()).get(UNUSED, labels).grad is None
    theirs, found = gradients(reference), gradients(mine)
    outside = {key for key, grad in theirs.items() if grad is None}  # towers that the library leaves out
    assert not any(found[key].any() for key in outside)
    assert any("language_model" not in key for key in theirs if key not in outside) or case == "text"
    theirs |= {key: torch.zeros_like(found[key]) for key in outside}
    test_qwen_vl.assert_same(found, theirs)


def test_a_pack_equals_its_samples_alone(family, media):
    samples = [tiny.sample(media, CASES[case]) for case in ("video with sound", "text", "all", "audio")]
    model = loaded(family)
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


CUTS = [((4, 0), (4, 0), (1, 2)), ((3, 1), (0, 4), (0, 3)), ((4, 0), (1, 3), (0, 3))]


@pytest.mark.parametrize("vision, audio, language", CUTS)
def test_two_pipeline_stages_equal_the_whole(vision, audio, language, family, media):
    for cases in (["video with sound", "text"], ["audio"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        cuts = {"vision": vision, "audio": audio, "language": language}
        assert_two_stages_equal_the_whole(family, batch, cuts, [UNUSED])


def test_cost_is_the_operations_that_run(name, family, media):
    sample = tiny.sample(
        media, [tiny.sound(WHOLE[name]), "and", tiny.picture(32, 32), "what?"]
    )  # whole windows
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    text = family.text
    uncausal = 2 * text.num_hidden_layers * 64 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


def test_tokens_patches_frames_and_positions_are_the_librarys(name, family, media):
    processor = processor_of(family.source, Data.model_validate(tiny.DATA[name]), family)
    picture, clip, other = tiny.picture(40, 24), tiny.clip(6, 24, 16), tiny.clip(4, 16, 16, 3)
    alone, heard, also = tiny.sound(0.4), tiny.sound(2.7, 1), tiny.sound(6.0, 2)
    parts = ["Look: ", picture, "hear ", alone, "both ", (clip, heard), "more ", (other, also), "what?"]
    sample = tiny.sample(media, parts)
    text = [part if isinstance(part, str) else media.placeholder(tiny.shape_of(part).kind) for part in parts]
    inputs = processor(
        text=["".join(text)],
        images=[picture],
        videos=[torch.from_numpy(each).permute(0, 3, 1, 2) for each in (clip, other)],
        audio=[alone, heard, also],
        audio_from_video_indices=[None, 0, 1],
        load_audio_from_video=True,
        sampling_rate=16000,
        return_tensors="pt",
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": False, "fps": 2.0},
    )
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    expected = torch.cat([inputs["pixel_values"], inputs["pixel_values_videos"]])
    assert torch.equal(sample.tensors["pixel_values"], expected)
    mask = inputs["feature_attention_mask"].bool()
    assert mask.sum(1).tolist() == sample.tensors["audio_frames"][:, 0].tolist()
    frames = inputs["input_features"].transpose(1, 2)[mask]
    if name == tiny.OMNI3:  # the library fills a batch up to its longest sound, which changes the last frames
        each = (media.extractor(s, sampling_rate=16000, padding=False) for s in (alone, heard, also))
        frames = torch.cat([torch.as_tensor(made["input_features"][0]).T for made in each])
    torch.testing.assert_close(sample.tensors["input_features"], frames, rtol=0, atol=1e-5)
    thinker = opened(family, torch.float32)
    positions, _ = thinker.get_rope_index(
        inputs["input_ids"],
        inputs["image_grid_thw"],
        inputs["video_grid_thw"],
        inputs["attention_mask"],
        True,
        mask.sum(1),
        torch.as_tensor(inputs["video_second_per_grid"]),
    )
    assert torch.equal(sample.tensors["position_ids"][1:], positions[:, 0])
    assert positions.dtype == sample.tensors["position_ids"].dtype


def test_a_short_sound_is_the_same_in_any_pack(checkpoint):
    """The library's tower fills chunks up to the longest of a call: there a sound of less than a second depends
    on the others. Here it is always filled up to a whole chunk."""
    family = catalog.family(Model(source=str(checkpoint(tiny.OMNI3)), experts="eager"))
    media = family.media_processor(Data.model_validate(tiny.DATA[tiny.OMNI3]))
    short, long = (tiny.sample(media, [tiny.sound(seconds), "what?"]) for seconds in (0.3, 1.5))
    model, tower = loaded(family), opened(family).model.audio_tower
    _, together = ours(family, model, pack([long, short]))
    _, alone = ours(family, model, pack([short]))
    torch.testing.assert_close(together[:, long.measure.tokens :], alone, rtol=1e-9, atol=1e-9)
    rows = [sample.tensors["input_features"].double() for sample in (long, short)]
    lengths = [torch.tensor([len(each)]) for each in rows]
    both = tower(torch.cat(rows).T, torch.cat(lengths)).last_hidden_state[20:]
    assert not torch.allclose(both, tower(rows[1].T, lengths[1]).last_hidden_state, rtol=1e-3)
    mine = family.sound(model, rows[1], lengths[1], torch.device("cpu"))
    torch.testing.assert_close(mine, both, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_heard_is_refused(name, family, media):
    for samples, said in ((200_000, "12.5 s, this model takes 6 s"), (150, "too little to be heard")):
        with pytest.raises(PolymodalError, match=said):
            media.span(MediaShape("audio", samples=samples))
    for changes, said in (
        ({"audio_config.output_dim": 32}, "features of 32"),
        ({"audio_config.n_window": 3}, "is odd" if name == tiny.OMNI else "chunks of 100"),
    ):
        with pytest.raises(PolymodalError, match=said):
            catalog.family(Model(source=family.source, config=changes))


def test_towers_hold_every_parameter_once_and_an_example_fits(family):
    model = family.build()
    for parameter, _ in model.named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(80, 20, {"vision": (16,), "audio": (8, 8, 5)}))
    assert batch["audio_frames"].tolist() == [[8], [8], [5]] and batch["input_features"].shape == (21, 16)


@pytest.mark.parametrize(
    "name, key", [(name, key) for name in tiny.OMNIS for key in catalog.cards()[name].sizes]
)
def test_published_sizes_have_their_parameters(name, key):
    card = catalog.cards()[name]
    size = card.sizes[key]
    family = card.family(card, transformers.AutoConfig.for_model(**size.config), size.hub)
    family.check()
    total = sum(parameter.numel() for parameter in family.build().parameters())
    assert round(total / 1e9, 2) == size.parameters


def test_a_plan_counts_pictures_and_sound(family):
    made = Recipe.model_validate({"model": {"source": family.source}, "data": {"max_length": 512}})
    layout = layout_of(made, family)
    load = layout.workload(0.25, 64, 0.25, 300)
    shares = {
        stream.name: family.feature_count(stream, layout.example(load)[stream.sizes]) / 512
        for stream in family.streams
    }
    assert all(0.1 < share <= 0.25 for share in shares.values()), shares
    assert sum(shares.values()) * 512 == 512 - load.measure.trained
    assert "windows of sound" in layout.describe(load) and "pictures" in layout.describe(load)
    measured = {name: sum(lengths) / 512 for name, lengths in load.measure.media.items()}
    again = estimate.workload(layout, measured).measure
    for name, lengths in load.measure.media.items():
        assert again.total(name) == pytest.approx(sum(lengths), rel=0.5)
    towers = {tower.media: tower for tower in shape_of(family, family.build()).towers}
    assert set(towers) == {"", "vision", "audio"} and towers["audio"].layers == 4
    assert 0.12 <= towers["audio"].rows <= 0.5
    with pytest.raises(PolymodalError, match="leave no tokens for text"):
        layout.workload(0.6, 64, 0.5, 300)


# -- rows, chat, export


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A directory with recordings of every kind, stereo and at other rates, a video with sound and one without."""
    directory = tmp_path_factory.mktemp("recordings")
    for ending in ("wav", "flac", "mp3", "ogg", "m4a"):
        write_audio(directory / f"a.{ending}", 1.0, channels=(1.0, 0.5))
    frames = np.stack([np.asarray(tiny.picture(48, 32, i)) for i in range(10)])
    write_video(directory / "film.mp4", frames, 4.0, np.stack([tiny.sound(2.5)] * 2), 16000)
    write_mp4(directory / "mute.mp4")
    (directory / "broken.mp3").write_bytes(b"no sound at all")
    write_audio(directory / "long.wav", 7.0)
    tiny.picture(40, 24).save(directory / "a.png")
    return directory


@pytest.fixture(scope="module")
def hearing(family):
    """A ChatProcessor that takes the sound of videos."""
    data = Data.model_validate({"video": {"sound": True, "min_pixels": 64, "max_pixels": 4096}})
    return ChatProcessor(family.media_processor(data), data)


def asked(content, **columns):
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "3"}],
        **columns,
    }


def test_every_way_to_name_a_recording_is_one_sample(recordings, hearing):
    reader = RowReader("auto", Attr(), str(recordings / "train.jsonl"), None)
    written = base64.b64encode((recordings / "a.wav").read_bytes()).decode()
    rows = [asked("<audio>what?", audios=[f"a.{ending}"]) for ending in ("wav", "flac", "mp3", "ogg", "m4a")]
    rows += [
        {"conversations": [{"from": "human", "value": "<audio>what?"}, {"from": "gpt", "value": "3"}], "audios": ["a.wav"]},
        asked([{"type": "input_audio", "input_audio": {"data": written, "format": "wav"}}, {"type": "text", "text": "what?"}]),
        asked([{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "what?"}]),
    ]  # fmt: skip
    records = [reader.record(row, f"row {n}") for n, row in enumerate(rows)]
    samples = [hearing.sample(record) for record in records]
    assert [s.measure for s in samples] == hearing.measure(records)
    first = samples[0]
    assert first.tensors["audio_frames"].tolist() == [[100]] and first.modality == "audio"
    for sample in samples:
        assert abs(int(sample.tensors["audio_frames"]) - 100) <= 7  # codecs pad
    for sample in samples[5:]:
        assert all(torch.equal(sample.tensors[name], tensor) for name, tensor in first.tensors.items())
    brought = samples[1].tensors["input_features"]  # from 44.1 kHz and two channels
    assert float((brought - first.tensors["input_features"]).abs().mean()) < 0.02


def test_what_cannot_be_heard_is_said_with_its_row(recordings, hearing, checkpoint):
    reader = RowReader("auto", Attr(), str(recordings / "train.jsonl"), None)
    for row, said in (
        (asked("<audio>what?", audios=["broken.mp3"]), "row 7: the audio .*broken.mp3 cannot be read"),
        (asked("<audio>what?", audios=["mute.mp4"]), "row 7: the audio .*mute.mp4 holds no sound"),
        (asked("<audio>what?", audios=["long.wav"]), "row 7: .*long.wav: the sound has 7.0 s"),
        (asked("<video>what?", videos=["mute.mp4"]), "row 7: the video .*mute.mp4 has no sound"),
    ):
        with pytest.raises(PolymodalError, match=said):
            hearing.sample(reader.record(row, "row 7"))
    with pytest.raises(PolymodalError, match="does not hear"):
        deaf = catalog.family(Model(source=str(checkpoint("qwen2.5-vl")))).media_processor(Data())
        ChatProcessor(deaf, Data.model_validate({"video": {"sound": True}}))


def test_chat_asks_as_training_does(recordings, hearing, family):
    """Tokens, and logits after them, of a question with a picture, a recording and a video with its sound."""
    row = asked("<image>Look, <audio>listen, <video>what?")
    row |= {"images": ["a.png"], "audios": ["a.flac"], "videos": ["film.mp4"]}
    record = RowReader("auto", Attr(), str(recordings / "x.jsonl"), None).record(row, "row 1")
    prompt = hearing.prompt(record)
    data = Data.model_validate({"video": {"sound": True, "min_pixels": 64, "max_pixels": 4096}})
    model = opened(family, torch.float32).eval()
    engine = Engine(model, processor_of(family.source, data, family), video=data.video)
    asking = record.messages[:-1]
    inputs = engine._encode([engine._prepare(0, "0", asking)])
    assert inputs["input_ids"][0].tolist() == prompt.tensors["input_ids"].tolist()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        _, got = ours(family, loaded(family).float(), pack([prompt]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    answer = engine.answer(asking, Sampling(max_new_tokens=3))
    assert answer.prompt_tokens == len(prompt.tensors["input_ids"]) and 1 <= answer.tokens <= 3
    with pytest.raises(PolymodalError, match="7.0 s of sound"):
        engine.answer([Message("user", (Media("audio", str(recordings / "long.wav")),))])


def test_an_export_has_the_talker_byte_for_byte(name, checkpoint, tmp_path):
    source, target = checkpoint(name), tmp_path / "out"
    done = export(str(source), str(target), dtype="bf16", max_shard_bytes=300_000)
    assert done.tokens and len(list(target.glob("*.safetensors"))) > 1
    before = load_file(source / "model.safetensors")
    after = {key: value for path in target.glob("*.safetensors") for key, value in load_file(path).items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        own = key.startswith("thinker.")
        assert after[key].dtype == (torch.bfloat16 if own else value.dtype)
        assert torch.equal(after[key], value.to(after[key].dtype)), key
    for file in catalog.cards()[name].family.beside_files:
        assert (target / file).read_bytes() == (source / file).read_bytes()
    old, new = (json.loads((at / "config.json").read_text()) for at in (source, target))
    assert new["talker_config"] == old["talker_config"] and new["dtype"] == "bfloat16"
    kind = (
        "Qwen2_5OmniForConditionalGeneration" if name == tiny.OMNI else "Qwen3OmniMoeForConditionalGeneration"
    )
    whole = getattr(transformers, kind).from_pretrained(target)
    assert whole.talker is not None and catalog.find(target).name == name
    plain = export(str(source), str(tmp_path / "plain"), layout="transformers")
    assert plain.tokens and not any(
        "talker" in key for key in load_file(tmp_path / "plain" / "model.safetensors")
    )
