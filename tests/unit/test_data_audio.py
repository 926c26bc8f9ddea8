"""Audio from real files: lengths from headers, samples at any rate, excerpts; and the rows that name audio."""

from __future__ import annotations

import base64
import io
import itertools
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, MediaPart, MediaStream, Message, Span
from polymodal.data import audio
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.data.source import check_path, open_corpus
from polymodal.recipe import Attr, Data, Dataset
from polymodal.tools.data_check import check
from polymodal.tools.data_convert import convert
from tests.unit.media_fixtures import AUDIO, sweep, write_audio, write_mp4

RATE = 16000
LOSSY = {"mp3", "opus", "ogg", "m4a", "aac", "webm", "mkv"}
PADDED = {"aac": 2 * 1024 / 22050, "mkv": 1024 / 48000}
"""Containers that do not say what the encoder added, and at most how much that is in seconds."""


def lag(heard, true, around=1.0, rate=RATE):
    """(samples by which `heard` is late, mean error there) near a place in seconds."""
    a = int(around * rate)
    part = true[a : a + 4000]
    errors = {k: np.abs(heard[a + k : a + k + 4000] - part).mean() for k in range(-1200, 1200)}
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


@pytest.mark.parametrize("ending", AUDIO)
def test_length_and_samples_of_every_format(tmp_path, ending):
    seconds = 2.0123
    source = str(write_audio(tmp_path / f"a.{ending}", seconds))
    header = audio.audio_header(source)
    assert header.rate == AUDIO[ending][1] and header.channels == (2 if ending == "ogg" else 1)
    assert seconds - 0.001 <= header.seconds <= seconds + PADDED.get(ending, 0.001) + 0.001
    heard = audio.decode_audio(source, header, RATE)
    assert heard.dtype == np.float32 and heard.shape == (header.samples(RATE),)
    late, error = lag(heard, sweep(seconds, RATE))
    assert error < (0.03 if ending in LOSSY else 0.002)
    assert late == pytest.approx(1024 / 22050 * RATE, abs=2) if ending == "aac" else abs(late) <= 1
    assert np.array_equal(audio.decode_audio(Path(source).read_bytes(), header, RATE), heard)


@pytest.mark.parametrize("ending", AUDIO)
def test_an_excerpt_is_the_slice_of_the_whole(tmp_path, ending):
    source = str(write_audio(tmp_path / f"a.{ending}", 12.0))
    header = audio.audio_header(source)
    whole = audio.decode_audio(source, header, RATE)
    for start, stop in ((0.0, 1.5), (0.4, 2.0), (7.3, 9.123), (10.0, header.seconds)):
        part = audio.decode_audio(source, header, RATE, start, stop)
        assert part.shape == (round(stop * RATE) - round(start * RATE),)
        assert np.abs(part - whole[round(start * RATE) :][: len(part)])[: -RATE // 100].max() < 2e-3, start
    cuts = [0.0, 4.1, 8.2, header.seconds]
    pieces = [audio.decode_audio(source, header, RATE, *pair) for pair in itertools.pairwise(cuts)]
    assert sum(map(len, pieces)) == len(whole)


def test_channels_are_averaged_without_growing_louder(tmp_path):
    source = str(write_audio(tmp_path / "a.flac", 1.0, (1.0, 1.0)))
    header = audio.audio_header(source)
    assert header.channels == 2
    assert np.abs(audio.decode_audio(source, header, 44100) - sweep(1.0, 44100)).max() < 1e-3
    left = str(write_audio(tmp_path / "left.flac", 1.0, (1.0, 0.0)))
    assert np.abs(audio.decode_audio(left, header, 44100) - sweep(1.0, 44100) / 2).max() < 1e-3


def test_real_recordings_of_odd_forms():
    spec = find_spec("scipy")
    assert spec is not None and spec.submodule_search_locations
    folder = f"{spec.submodule_search_locations[0]}/io/tests/data/test-"
    from scipy.io import wavfile

    for name in ("44100Hz-le-1ch-4bytes", "8000Hz-le-2ch-1byteu", "48000Hz-2ch-64bit-float-le-wavex"):
        rate, values = wavfile.read(f"{folder}{name}.wav")
        header = audio.audio_header(f"{folder}{name}.wav")
        assert (header.rate, header.samples(rate)) == (rate, len(values))
        scale = {np.int32: (2**31, 0), np.uint8: (128, 128), np.float64: (1, 0)}[values.dtype.type]
        true = (values.astype(np.float64).reshape(len(values), -1).mean(axis=1) - scale[1]) / scale[0]
        assert np.abs(audio.decode_audio(f"{folder}{name}.wav", header, rate) - true).max() < 1e-6, name


def test_the_sound_of_a_video(tmp_path):
    import av

    silent = str(write_mp4(tmp_path / "silent.mp4"))
    with pytest.raises(PolymodalError, match=r"silent.mp4 holds no sound\. Name a wav"):
        audio.audio_header(silent)
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        track = container.add_stream("aac", rate=32000, layout="mono")
        for _ in range(20):
            container.mux(
                picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
            )
        frame = av.AudioFrame.from_ndarray(sweep(2.0, 32000)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 32000, 0
        container.mux(track.encode(frame))
        container.mux([*picture.encode(), *track.encode()])
    header = audio.audio_header(str(path))
    assert header.seconds == pytest.approx(2.0, abs=0.002)
    assert abs(lag(audio.decode_audio(str(path), header, RATE), sweep(2.0, RATE))[0]) <= 1
    both = audio.sound(str(path), RATE, 2 * RATE)
    assert np.array_equal(both[0], both[1])
    assert np.abs(both[0] - audio.decode_audio(str(path), header, RATE)[: 2 * RATE]).max() < 1e-6


def test_headers_that_do_not_say_the_length(tmp_path):
    wav = write_audio(tmp_path / "a.wav", 2.0).read_bytes()
    data = wav.index(b"data")
    for size in (b"\0\0\0\0", b"\xff\xff\xff\xff"):  # written to a pipe
        piped = wav[:4] + size + wav[8 : data + 4] + size + wav[data + 8 :]
        header = audio.audio_header(piped)
        assert header.seconds == 2.0 and len(audio.decode_audio(piped, header, RATE)) == 2 * RATE
    flac = bytearray(write_audio(tmp_path / "a.flac", 2.0).read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # "unknown" in STREAMINFO
    assert audio.audio_header(bytes(flac)).seconds == pytest.approx(2.0)
    untagged = str(write_audio(tmp_path / "b.mp3", 2.0, options={"write_xing": "0"}))
    assert 2.0 <= audio.audio_header(untagged).seconds <= 2.0 + 3 * 1152 / 44100
    live = str(write_audio(tmp_path / "b.webm", 2.0, options={"live": "1"}))
    assert audio.audio_header(live).seconds == pytest.approx(2.0, abs=0.03)


def test_an_estimated_length_is_not_believed(tmp_path):
    """A variable bit rate: silence, then noise. The header of raw AAC gives another length than there is."""
    import av

    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 44100 * 3).astype(np.float32)
    values = np.concatenate([np.zeros(44100 * 3, np.float32), noise])[None]
    path = tmp_path / "vbr.aac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "aac", rate=44100, layout="mono", options={"global_quality": "300", "flags": "+qscale"}
        )
        frame = av.AudioFrame.from_ndarray(values, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        assert abs(float(track.duration * track.time_base) - 6.0) > 0.5  # what this test is about
    header = audio.audio_header(str(path))
    assert header.seconds == pytest.approx(6.0, abs=0.08)
    assert len(audio.decode_audio(str(path), header, RATE)) == header.samples(RATE)


def test_bad_audio_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("not audio at all")
    (tmp_path / "empty.mp3").write_bytes(b"")
    wav = write_audio(tmp_path / "whole.wav", 2.0).read_bytes()
    (tmp_path / "cut.wav").write_bytes(wav[: len(wav) // 2])
    m4a = write_audio(tmp_path / "whole.m4a", 2.0).read_bytes()
    (tmp_path / "cut.m4a").write_bytes(m4a[: len(m4a) // 2])
    cases = {
        "none.wav": "does not exist. Check the path",
        "text.wav": "cannot be read",
        "empty.mp3": "cannot be read",
        "cut.wav": r"is cut short: \d+ of 64000 bytes of sound are there. Fetch it again",
        "cut.m4a": "cannot be read",
        "": "is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(PolymodalError, match=words) as error:
            audio.audio_header(str(tmp_path / name))
        assert str(tmp_path / name) in error.value.message and error.value.hint
    for ending in ("flac", "mp3"):  # their headers are whole
        whole = write_audio(tmp_path / f"long.{ending}", 4.0).read_bytes()
        header = audio.audio_header(whole[: len(whole) // 2])
        assert header.seconds == pytest.approx(4.0, abs=0.01)
        with pytest.raises(PolymodalError, match=r"ends at \d.\d s, its header says 4.0 s|cannot be read"):
            audio.decode_audio(whole[: len(whole) // 2], header, RATE)
    header = audio.audio_header(wav)
    with pytest.raises(PolymodalError, match="goes on after 1.* s, its header says 1.0 s"):
        audio.decode_audio(wav, audio.AudioHeader(1.0, RATE, 1), RATE)
    for start, stop in ((1.5, 1.0), (2.5, None), (0.0, 9.0), (-1.0, 1.0)):
        with pytest.raises(PolymodalError, match="does not lie in the audio .* which has 2.00 s.*seconds"):
            audio.decode_audio(wav, header, RATE, start, stop)
    with pytest.raises(PolymodalError, match="27.8 hours, more than can be decoded at once"):
        audio.decode_audio(wav, audio.AudioHeader(1e5, RATE, 1), RATE)


# rows that name audio


def read(row, format="auto", **attr):
    return RowReader(format, Attr(**attr), "folder/data.jsonl", None).record(row, "data.jsonl, line 7")


def a(name):
    return Media("audio", f"folder/{name}")


def test_conversations_about_audio():
    messages = [{"role": "user", "content": "<audio>Who? <audio>"}, {"role": "assistant", "content": "Ann."}]
    record = read({"messages": messages, "audios": ["a.wav", "b.mp3"]})
    assert record.messages[0].content == (a("a.wav"), "Who? ", a("b.mp3"))
    parts = [
        {"type": "audio", "audio": "a.wav"},
        {"type": "audio_url", "audio_url": {"url": "b.flac"}},
        {
            "type": "input_audio",
            "input_audio": {"data": base64.b64encode(b"RIFFs").decode(), "format": "wav"},
        },
        {"type": "text", "text": "Which?"},
    ]
    record = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]})
    assert record.messages[0].content == (a("a.wav"), a("b.flac"), Media("audio", b"RIFFs"), "Which?")
    data = "data:audio/wav;base64," + base64.b64encode(b"RIFFs").decode()
    assert read({"messages": messages, "audios": [data, {"bytes": b"x", "path": None}]}).media == (
        Media("audio", b"RIFFs"),
        Media("audio", b"x"),
    )
    with pytest.raises(PolymodalError, match="2 <audio> in the text, but `audios` holds 1"):
        read({"messages": messages, "audios": ["a.wav"]})


@pytest.mark.parametrize("key", ["text", "sentence", "transcription", "transcript"])
@pytest.mark.parametrize("column", ["audio", "audio_filepath", "file_name"])
def test_speech_with_its_text(key, column):
    record = read({column: "a.wav", key: "Hello.", "language": "en", "start": "1.5", "end": 3, "id": "x"})
    assert record.messages == (Message("user", (a("a.wav"),)), Message("assistant", ("Hello.",)))
    assert not record.plain and record.extra["language"] == "en" and record.extra["id"] == "x"
    assert (record.extra["start"], record.extra["end"]) == (1.5, 3.0)


def test_other_columns_of_speech():
    assert read({"clip": "a.wav", "words": "Hi"}, "asr", audios="clip", response="words").media == (
        a("a.wav"),
    )
    assert read({"audio_filepath": "a.wav", "text": "x", "offset": 2.0, "duration": 1.5}).extra["end"] == 3.5
    assert read({"file_name": "a.png", "text": "plain"}).plain
    assert read({"instruction": "Translate.", "audio": "a.wav", "output": "Hallo"}).messages[0].content == (
        a("a.wav"),
        "Translate.",
    )
    for row, words in (
        ({"audio": "a.wav", "text": "x", "start": "soon"}, "`start` = 'soon' is no time in seconds"),
        ({"audio": "a.wav", "text": "x", "start": 2, "end": 1}, "`end` = 1 s is not after `start` = 2 s"),
        ({"audio": ["a.wav", "b.wav"], "text": "x"}, "more than one audio"),
        ({"audio": "a.wav", "text": 3}, "`text` of the transcription is no text"),
    ):
        with pytest.raises(PolymodalError, match=words) as error:
            read(row)
        assert error.value.message.startswith("data.jsonl, line 7") and error.value.hint
    with pytest.raises(PolymodalError, match="names no audio"):
        read({"text": "x"}, "asr")


def test_decoded_audio_becomes_a_file_again(tmp_path):
    values = sweep(0.5, RATE)
    record = read({"audio": {"array": values.tolist(), "sampling_rate": RATE, "path": None}, "sentence": "s"})
    source = record.media[0].source
    header = audio.audio_header(source)
    assert (header.seconds, header.rate) == (0.5, RATE)
    assert np.abs(audio.decode_audio(source, header, RATE) - values).max() < 1e-6
    with pytest.raises(PolymodalError, match="without its sampling_rate"):
        read({"audio": {"array": [0.1], "sampling_rate": None}, "text": "s"})


def test_parquet_with_audio_inside(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = write_audio(tmp_path / "a.flac", 1.0).read_bytes()
    rows = [
        {"audio": {"bytes": data, "path": "a.flac"}, "sentence": "one"},
        {"audio": {"bytes": None, "path": "a.flac"}, "sentence": "two"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    corpus = open_corpus([Dataset(path=str(tmp_path / "rows.parquet"))])
    assert [r.messages[1].content for r in corpus] == [("one",), ("two",)]
    assert [r.media[0].source for r in corpus] == [data, str(tmp_path / "a.flac")]


def test_a_directory_of_recordings_with_their_texts(tmp_path):
    folder = tmp_path / "speech"
    (folder / "b").mkdir(parents=True)
    for name, text in (("a.wav", "One.\n"), ("b/c.flac", "Two."), ("d.wav", None)):
        write_audio(folder / name, 1.0)
        if text:
            (folder / name).with_suffix(".txt").write_text(text)
    dataset = Dataset(path=str(folder))
    check_path(dataset, "data")
    corpus = open_corpus([dataset])
    assert len(corpus) == 3 and corpus.where(1) == str(folder / "b/c.flac")
    assert [corpus[i].messages[1].content[0] for i in (0, 1)] == ["One.", "Two."]
    assert corpus[1].media == (Media("audio", str(folder / "b/c.flac")),)
    found = check(corpus)
    assert found.media == {"audio": 2} and found.seconds == {"audio": [1.0] * 3} and not found.pixels
    assert len(found.problems) == 1 and str(folder / "d.wav") in found.problems[0]
    before = corpus.parts[0].fingerprint
    (folder / "a.txt").write_text("Other.")
    assert open_corpus([dataset]).parts[0].fingerprint != before


def test_a_shard_of_recordings(tmp_path):
    import tarfile

    data = write_audio(tmp_path / "a.mp3", 1.0).read_bytes()
    members = {"1.mp3": data, "1.txt": b"one", "2.mp3": data, "2.json": json.dumps({"text": "two"}).encode()}
    members |= {"3.mp3": data, "3.json": json.dumps({"audio": "3.mp3", "sentence": "three"}).encode()}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    corpus = open_corpus([Dataset(path=str(tmp_path / "s.tar"))])
    assert [r.messages[1].content[0] for r in corpus] == ["one", "two", "three"]
    assert all(r.media == (Media("audio", data),) for r in corpus)


def test_converted_records_read_the_same(tmp_path):
    data = write_audio(tmp_path / "a.flac", 1.0).read_bytes()
    url = "data:audio/flac;base64," + base64.b64encode(data).decode()
    (tmp_path / "in.jsonl").write_text(json.dumps({"audio": url, "text": "one"}) + "\n")
    convert(str(tmp_path / "in.jsonl"), str(tmp_path / "out.json"))
    (record,) = open_corpus([Dataset(path=str(tmp_path / "out.json"))])
    assert record.messages[1].content == ("one",)
    assert str(record.media[0].source).endswith(".flac")
    assert Path(str(record.media[0].source)).read_bytes() == data


# ---- audio in conversations -------------------------------------------------------------------------------


class Listening:
    """A media processor that takes audio, a token of every tenth of a second, with the words of another one."""

    rows, frame_multiple, sample_rate = 1, 1, RATE
    streams = (MediaStream("audio", "input_features", "feature_sizes", ("frame", "none")),)
    boxes = None

    def __init__(self, other):
        self.tokenizer, self.picture_size = other.tokenizer, other.picture_size

    def conversation(self, record):
        return record

    def placeholder(self, kind):
        return "~sound~"

    def template_content(self, part):
        return {"type": "text", "text": part if isinstance(part, str) else self.placeholder(part.kind)}

    def span(self, shape):
        frames = -(-shape.samples // (RATE // 10))
        return Span([7] * frames, (MediaPart("audio", (frames,), (frames,)),), shape)

    def features(self, shape, decoded):
        assert len(decoded) == shape.samples
        frames = np.resize(decoded, (-(-len(decoded) // (RATE // 10)), RATE // 10))
        return {"audio": (torch.from_numpy(frames), torch.tensor([[len(frames)]]))}

    def position_ids(self, input_ids, spans):
        return torch.arange(len(input_ids))[None]


def test_conversations_take_the_excerpt_that_their_row_names(tmp_path, qwen):
    source = str(write_audio(tmp_path / "a.wav", 4.0))
    chat = ChatProcessor(Listening(qwen().media), Data())

    def record(**extra):
        row = {"audio": source, "text": "a b", **extra}
        return RowReader("auto", Attr(), "data.jsonl", None).record(row, "line 1")

    whole, part = chat.sample(record()), chat.sample(record(start=1.0, end=2.5))
    assert whole.measure.media == {"audio": (40,)} and part.measure.media == {"audio": (15,)}
    assert part.measure.tokens == whole.measure.tokens - 25
    rows = whole.tensors["input_features"]
    assert torch.allclose(part.tensors["input_features"], rows[10:25], atol=2e-3)
    assert chat.measure([record(), record(start=1.0, end=2.5)]) == [whole.measure, part.measure]
    (refused,) = chat.measure([record(start=3.0, end=9.0)])
    assert "3 to 9 s does not lie in the audio" in refused
    with pytest.raises(PolymodalError, match=r"^line 1: 5 to 4 s does not lie in the audio"):
        chat.sample(record(start=5.0))
