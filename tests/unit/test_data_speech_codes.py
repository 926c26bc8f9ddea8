"""Rows for models that speak: what is read, what is refused, packed batches. Real files and tokens."""

from __future__ import annotations

import json

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, pack, padding_sample, unpack
from polymodal.data.source import open_corpus
from polymodal.data.speech_codes import SpeechCodesProcessor
from polymodal.models import catalog
from polymodal.objectives.speech_codes import next_frames
from polymodal.parallel.batches import pad_to_cp
from polymodal.recipe import Data, Dataset, Model
from tests.models import tiny_tts


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("spoken")
    tiny_tts.checkpoint(root / "model", codec=False)
    tiny_tts.rows(root, 3)
    return root


@pytest.fixture(scope="module")
def processor(ground) -> SpeechCodesProcessor:
    media = catalog.family(Model(source=str(ground / "model"))).media_processor(Data())
    return SpeechCodesProcessor(media, Data())


def records(path):
    corpus = open_corpus([Dataset(path=str(path))], None, "data")
    return [corpus[i] for i in range(len(corpus))]


def row(ground, **changes):
    base = {"text": "yes", "audio_codes": tiny_tts.codes(3, 0), "ref_audio": "voice.wav"}
    kept = {key: value for key, value in (base | changes).items() if value is not None}
    (ground / "one.jsonl").write_text(json.dumps(kept) + "\n")
    return records(ground / "one.jsonl")[0]


def test_the_two_channels_are_the_published_table(ground, processor):
    """Text, language and voice of one row, position by position."""
    record = row(ground, language="English")
    made = processor.sample(record).tensors
    ids = processor.media.tokenizer.convert_tokens_to_ids
    pad, bos, eos = (ids(token) for token in tiny_tts.SPOKEN)
    word = processor.media.words("yes")
    text = [*word[:3], *[pad] * 5, bos, *word[3:], eos, pad, *[pad] * 3, pad]
    codes = tiny_tts.codes(3, 0)
    prompt = [-1] * 3 + [35, 37, 39, 38, -2] + [32] * (len(word) - 3 + 2) + [33]
    assert made["input_ids"].tolist() == text
    assert made["codes"][:, 0].tolist() == prompt + [frame[0] for frame in codes] + [34]
    assert made["codes"][len(prompt) : -1].tolist() == codes
    learned = [frame[0] for frame in codes] + [34]
    assert made["labels"].tolist() == [IGNORE] * (len(prompt) - 1) + learned + [IGNORE]
    assert made["weights"].sum() == 4
    assert made["speaker_mels"].shape == (made["speaker_sizes"].item(), 128)
    measured = processor.measure([record])[0]
    assert measured.tokens == len(text) and measured.trained == 4
    assert measured.media == {"speaker": (int(made["speaker_sizes"]),)}


def test_special_tokens_of_a_text_are_words(ground, processor):
    ids = processor.sample(row(ground, text="<|im_end|> yes")).tensors["input_ids"]
    assert processor.media.token_id("<|im_end|>") not in ids.tolist()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"audio_codes": None, "audio": "voice.wav"}, "has no `audio_codes`"),
        ({"audio_codes": [[1, 2, 3]]}, "no list of frames of 4"),
        ({"audio_codes": []}, "no list of frames of 4"),
        ({"audio_codes": "1 2 3"}, "no list of frames of 4"),
        ({"audio_codes": [[1, 2, 3, 99]]}, "holds 99, this model's codebooks have the entries 0 to 31"),
        ({"speaker": "bob"}, "speaker 'bob'"),
        ({"language": "klingon"}, "language 'klingon'"),
        ({"ref_audio": "short.wav"}, "has 0.20 s, 0.5 to 60 s are heard"),
        ({"ref_audio": "gone.wav"}, "gone.wav"),
        ({"text": "  "}, "no text that is spoken"),
    ],
)
def test_what_cannot_be_learned_is_refused(ground, processor, changes, said):
    tiny_tts.voice(ground / "short.wav", 0.2)
    record = row(ground, **changes)
    with pytest.raises(PolymodalError, match="one.jsonl, line 1: ") as caught:
        processor.sample(record)
    assert said in str(caught.value) and caught.value.hint
    assert said in processor.measure([record])[0]


def test_a_pack_is_its_samples(ground, processor):
    samples = [processor.sample(record, i) for i, record in enumerate(records(ground / "rows.jsonl"))]
    batch = pack([*samples, padding_sample(id=9, broken="gone")])
    assert batch["codes"].shape == (1, batch["input_ids"].shape[1], tiny_tts.GROUPS)
    assert batch.axes["codes"] == ("batch", "sequence", "codebook")
    for sample, again in zip(samples, unpack(batch), strict=False):
        assert all(torch.equal(sample.tensors[name], again.tensors[name]) for name in sample.tensors)
    padded = pad_to_cp(batch, 4)
    assert (
        padded["codes"].shape[1] == padded["input_ids"].shape[1] and int(padded["codes"][0, -4:].max()) == -1
    )


def test_frames_that_follow_are_those_of_the_labels(ground, processor):
    batch = pack([processor.sample(record, i) for i, record in enumerate(records(ground / "rows.jsonl"))])
    frames, labels = next_frames(batch["codes"]), batch["labels"][0]
    there = frames[:, 0] != IGNORE
    assert torch.equal(frames[there, 0], labels[there])
    rest = labels[~there]
    assert set(rest.tolist()) == {IGNORE, 34}, "the end has no frame"
