"""Speech with its text: prompts, times, lengths, what is refused, padded batches and how they are planned.
Real files and tokens."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest
import torch

from polymodal.core import padded
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Media, Message, Record
from polymodal.data.schedule import Schedule
from polymodal.data.speech import SpeechProcessor
from polymodal.models import catalog
from polymodal.recipe import Data, Model, Train
from tests.models import tiny_speech


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("speech")
    tiny_speech.checkpoint(root / "many")
    tiny_speech.checkpoint(root / "english", multilingual=False)
    tiny_speech.recording(root / "short.wav", "one two three")
    tiny_speech.recording(root / "long.wav", "one two three", seconds=5)
    return root


def processor(ground, name="many", augment=False, **speech) -> SpeechProcessor:
    data = Data(speech={"language": "en", **speech})
    return SpeechProcessor(
        catalog.family(Model(source=str(ground / name))).media_processor(data), data, augment
    )


def row(ground, text="one two three", file="short.wav", **extra) -> Record:
    heard = Media("audio", str(ground / file))
    return Record((Message("user", (heard,)), Message("assistant", (text,))), "a.jsonl, line 1", extra=extra)


def spelt(ids) -> str:
    return tiny_speech.tokenizer().decode(ids)


def test_the_labels_are_what_the_library_makes_of_the_same_text(ground):
    made = processor(ground).sample(row(ground))
    library = tiny_speech.tokenizer()
    library.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    expected = library(" one two three").input_ids
    assert made.tensors["labels"].tolist() == expected[1:]
    assert made.tensors["input_ids"].tolist() == expected[:-1], "the decoder's start, which is not learned"
    assert made.tensors["weights"].tolist() == [1.0] * (len(expected) - 1)


def test_the_features_are_the_librarys(ground):
    made = processor(ground).sample(row(ground)).tensors["input_features"]
    heard = tiny_speech.heard("one two three")
    expected = tiny_speech.extractor()(heard, sampling_rate=16000, return_tensors="pt").input_features[0]
    assert made.shape == (tiny_speech.BANDS, 200) and torch.allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize(
    "extra, words",
    [
        ({}, "<|en|><|transcribe|><|notimestamps|> one two three<|endoftext|>"),
        ({"language": "de"}, "<|de|><|transcribe|><|notimestamps|> one two three<|endoftext|>"),
        (
            {"language": "german", "task": "translate"},
            "<|de|><|translate|><|notimestamps|> one two three<|endoftext|>",
        ),
        ({"language": "zh"}, "<|zh|><|transcribe|><|notimestamps|>one two three<|endoftext|>"),
    ],
)
def test_records_name_language_and_task(ground, extra, words):
    assert spelt(processor(ground).tokens(row(ground, **extra))[1:]) == words


def test_times_become_tokens_and_take_the_place_of_no_times(ground):
    text = "<|0.00|>one two<|0.50|><|0.50|> three <|0.75|>"
    ids = processor(ground).tokens(row(ground, text))
    begin = tiny_speech.tokenizer().convert_tokens_to_ids("<|notimestamps|>") + 1
    times = [(i - begin) * 0.02 for i in ids if i >= begin]
    assert times == pytest.approx([0.0, 0.5, 0.5, 0.75], abs=0.011)
    assert begin - 1 not in ids and " one two" in spelt(ids) and " three" in spelt(ids)


def test_special_tokens_in_a_text_are_its_letters(ground):
    ids = processor(ground).tokens(row(ground, "<|endoftext|> one"))
    assert ids.count(ids[-1]) == 1, "the end comes once, at the end"


def test_english_models_have_no_language_to_tell(ground):
    made = processor(ground, "english", language=None)
    assert spelt(made.tokens(row(ground))[1:]) == "<|notimestamps|> one two three<|endoftext|>"
    for extra, words in (
        ({"language": "de"}, "the language de"),
        ({"task": "translate"}, "the task translate"),
    ):
        (said,) = made.measure([row(ground, **extra)])
        assert words in said and "transcribes English alone" in said


@pytest.mark.parametrize(
    "record, words",
    [
        ({"file": "long.wav"}, "has 5.0 s, this model takes 2 s at once"),
        ({"text": "one " * 60}, "tokens, this model's decoder takes 48"),
        ({"language": "klingon"}, "Unsupported language: klingon"),
        ({"text": "<|1.00|> one <|0.50|>"}, "the times in its text are not in order"),
        ({"text": "one <|7.00|>"}, "beyond 2 s"),
        ({"file": "absent.wav"}, "absent.wav"),
        ({"start": 9.0}, "9 to 0.75 s does not lie in the audio"),
        ({"start": 0.1, "end": 9.0}, "0.1 to 9 s does not lie in the audio"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(ground, record, words):
    text, file = record.pop("text", "one"), record.pop("file", "short.wav")
    made = processor(ground)
    (said,) = made.measure([row(ground, text, file, **record)])
    assert isinstance(said, str) and words in said
    with pytest.raises(PolymodalError, match="^a.jsonl, line 1: "):
        made.sample(row(ground, text, file, **record))


def test_without_a_language_anywhere_the_fix_is_named(ground):
    (said,) = processor(ground, language=None).measure([row(ground)])
    assert "the language is missing" in said and "data.speech.language" in said


def test_records_without_or_with_several_media_are_refused(ground):
    made = processor(ground)
    none = Record((Message("user", ("hello",)), Message("assistant", ("one",))), "x")
    heard = Media("audio", str(ground / "short.wav"))
    two = Record((Message("user", (heard, heard)), Message("assistant", ("one",))), "x")
    for said, holds in zip(made.measure([none, two]), ("no media", "audio, audio"), strict=True):
        assert f"the row holds {holds}, but one audio a row is transcribed" in said


def test_an_excerpt_is_the_slice_of_the_whole(ground):
    made = processor(ground)
    one = made.sample(row(ground, "two", file="long.wav", start=1.0, end=2.0))
    heard = tiny_speech.heard("one two three", 5)[16000:32000]
    expected = tiny_speech.extractor()(heard, sampling_rate=16000, return_tensors="pt").input_features[0]
    assert torch.allclose(one.tensors["input_features"], expected, atol=1e-5)


def test_lengths_are_known_without_decoding(ground, monkeypatch):
    from polymodal.data import audio

    made, record = processor(ground), row(ground)
    whole = made.sample(record).measure
    monkeypatch.setattr(audio, "decode_audio", lambda *_: pytest.fail("decoded"))
    assert made.measure([record]) == [whole] and whole.media == {"audio": (100,)}
    later = made.sample(record, pixels=False)
    assert "input_features" not in later.tensors and later.measure == whole


def test_what_decides_lengths_is_in_the_fingerprint(ground):
    prints = {
        processor(ground).fingerprint,
        processor(ground, language="de").fingerprint,
        processor(ground, task="translate").fingerprint,
        processor(ground, "english", language=None).fingerprint,
    }
    assert len(prints) == 4 and processor(ground).fingerprint in prints


def test_frames_are_masked_by_the_samples_seed_in_training_only(tmp_path):
    masks = {"mask_time_prob": 0.2, "mask_feature_prob": 0.3, "mask_feature_length": 2}
    tiny_speech.checkpoint(tmp_path / "masked", apply_spec_augment=True, **masks)
    tiny_speech.recording(tmp_path / "short.wav", "one two three")
    made = processor(tmp_path, "masked", augment=True)

    def features(seed):
        return made.sample(row(tmp_path, seed=seed)).tensors["input_features"]

    plain = processor(tmp_path, "masked").sample(row(tmp_path, seed=1)).tensors["input_features"]
    assert torch.equal(features(1), features(1)) and not torch.equal(features(1), features(2))
    masked = features(1)
    frames = (masked == 0).all(dim=0)
    assert 10 <= int(frames.sum()) <= 40 and (masked == 0).all(dim=1).any(), "spans of frames, and bands"
    assert torch.equal(masked[masked != 0], plain[masked != 0]) and not (plain == 0).all(dim=0).any()


def test_a_page_shows_recordings_and_what_is_learned_of_their_text(ground, tmp_path):
    from polymodal.data.source import open_corpus
    from polymodal.recipe import Dataset
    from polymodal.tools.data_show import show

    rows = [
        {"audio": str(ground / "short.wav"), "text": "one two"},
        {"audio": str(ground / "long.wav"), "text": "three", "start": 1.0, "end": 2.5},
        {"audio": str(ground / "long.wav"), "text": "four"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = open_corpus([Dataset(path=str(tmp_path / "rows.jsonl"))])
    show(corpus, processor(ground), str(tmp_path / "page.html"), n=3)
    page = html.unescape((tmp_path / "page.html").read_text())
    assert "short.wav, 0.8 s, 16000 Hz" in page and "long.wav, 5.0 s, 16000 Hz, 1 to 2.5 s of it" in page
    assert page.count("data:image/svg+xml;base64,") == page.count("<audio controls") == 2, "their waveforms"
    assert "<|transcribe|>" in page and "audio 100 in 1 media" in page
    assert "has 5.0 s, this model takes 2 s at once" in page, "a row that cannot be used, with its reason"


# ---- batches -----------------------------------------------------------------------------------------------


def batch(ground, broken=()):
    made = processor(ground)
    texts = ("one two three four five six", "nine", "one two")
    samples = [
        padded.padding_sample(made.media.stream, made.media.shape, i, "gone")
        if i in broken
        else made.sample(row(ground, text), i)
        for i, text in enumerate(texts)
    ]
    return padded.pad(samples)


def test_padding_has_neither_label_nor_weight(ground):
    made = batch(ground)
    lengths = made.groups["lengths"]
    assert made["input_ids"].shape == (3, max(lengths)) and made["input_features"].shape == (
        3,
        tiny_speech.BANDS,
        200,
    )
    for at, n in enumerate(lengths):
        assert (made["labels"][at, n:] == IGNORE).all() and (made["weights"][at, n:] == 0).all()
        assert (made["weights"][at, :n] == 1).all()
    assert made.segments["text"].tolist() == [0, max(lengths), 2 * max(lengths), 3 * max(lengths)]
    assert made.groups["broken"] == (False, False, False)


@pytest.mark.parametrize("mine, all_of_them", [((), (0,)), ((1,), (0, 1)), ((), (0, 1, 2)), ((2,), (2,))])
def test_samples_that_another_rank_lacks_become_its_padding(ground, mine, all_of_them):
    """The longest one among them: the width of the batch is that of what is left."""
    found, lost = padded.without(batch(ground, mine), [i in all_of_them for i in range(3)])
    expected = batch(ground, all_of_them)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected.tensors)
    assert (found.groups, found.samples) == (expected.groups, expected.samples)
    assert torch.equal(found.segments["text"], expected.segments["text"])
    assert len(lost) == len(all_of_them) - len(mine)


def test_a_batch_is_taken_apart_into_its_samples(ground):
    made, again = batch(ground, (1,)), padded.pad(padded.unpad(batch(ground, (1,))))
    assert all(torch.equal(again[name], made[name]) for name in made.tensors)
    assert (again.groups, again.samples, again.axes) == (made.groups, made.samples, made.axes)
    assert torch.equal(again.segments["text"], made.segments["text"])


# ---- the plan ----------------------------------------------------------------------------------------------


class Lengths:
    """An index of samples with these lengths."""

    def __init__(self, tokens):
        self.tokens = np.array(tokens, np.int32)
        self.media, self.usable, self.record = {}, np.ones(len(tokens), bool), None

    def measure(self, i):
        from polymodal.core.sample import SampleLengths

        return SampleLengths(int(self.tokens[i]), int(self.tokens[i]))

    def locate(self, i):
        return i, -1


class Part:
    name, start, weight, repeat, fingerprint = "a", 0, None, 1.0, "a"

    def __init__(self, count):
        self.stop = count


def planned(by_length: bool, count=1003, epoch=0, **data):
    draw = np.random.default_rng(3)
    index = Lengths(draw.integers(5, 200, count))
    train = Train(global_batch_size=16, micro_batch_size=4, seed=1)
    schedule = Schedule(
        index, [Part(count)], Data(pack=False, **data), train, lambda m: float(m.tokens), by_length=by_length
    )
    return index, schedule, [b for b in schedule.batches(epochs=epoch + 1) if b.position.epoch == epoch]


def test_samples_of_like_length_meet_and_each_is_used_once():
    index, _, batches = planned(True)
    packs = [pack for b in batches for pack in b.packs]
    assert sorted(i for pack in packs for i in pack) == list(range(1003))
    assert {len(pack) for pack in packs[:-1]} == {4} and len(packs[-1]) == 3

    def filled(packs):
        return sum(index.tokens[list(p)].sum() for p in packs) / sum(
            len(p) * index.tokens[list(p)].max() for p in packs
        )

    _, _, unsorted = planned(False)
    assert filled(packs) > 0.97 and filled([p for b in unsorted for p in b.packs]) < 0.75
    firsts = [index.tokens[list(pack)].mean() for pack in packs]
    assert np.corrcoef(firsts[:-1], firsts[1:])[0, 1] < 0.3, "micro-batches come in random order"


def test_the_order_differs_by_epoch_and_is_the_same_when_asked_again():
    first, again, other = planned(True)[2], planned(True)[2], planned(True, epoch=1)[2]
    assert [b.packs for b in first] == [b.packs for b in again]
    assert {p for b in first for p in b.packs} != {p for b in other for p in b.packs}


def test_without_shuffling_the_order_is_the_files():
    packs = [pack for b in planned(True, shuffle=False)[2] for pack in b.packs]
    assert [i for pack in packs for i in pack] == list(range(1003))


def test_the_way_of_joining_is_in_the_fingerprint():
    assert planned(True)[1].fingerprint != planned(False)[1].fingerprint
