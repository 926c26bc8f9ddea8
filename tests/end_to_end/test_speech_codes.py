"""A tiny Qwen3-TTS from recordings to speech: codes of a codec, trained until it knows them, stopped and resumed,
adapted, spoken to wav files, exported and opened by its class. Real processes and files.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import pytest
import torch
import yaml

from polymodal.core.errors import PolymodalError
from polymodal.generate import speak
from polymodal.generate.opening import open_model
from polymodal.models.nets import qwen3_tts
from polymodal.tools import data_codes
from polymodal.train.export import export
from tests.end_to_end.test_speech import run
from tests.models import tiny_speech, tiny_tts

STEPS = 120


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    tiny_tts.checkpoint(root / "model")
    tiny_tts.rows(root, 4, coded=False)
    codes(root, root / "rows.jsonl", root / "train.jsonl")
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.jsonl")}], "workers": 0, "max_length": 160},
        "train": {"steps": STEPS, "global_batch_size": 1, "precision": "fp32"},
        "optim": {"lr": 1e-2, "schedule": {"name": "cosine", "warmup": 0.1}},
        "checkpoint": {"dir": str(root / "run"), "every": 60},
        "device": {"kind": "cpu"},
    }
    (root / "r.yaml").write_text(yaml.safe_dump(recipe))
    run("train", root / "r.yaml")
    return root


def codes(root: Path, source: Path, target: Path) -> None:
    model = str(root / "model")
    data_codes.main(str(source), target, model=model, media_dir=None, device="cpu", batch_size=3)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(directory: Path) -> dict[int, float]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in found if "loss" in row}


def speaker(checkpoint: Path) -> speak.Speaker:
    return speak.Speaker(open_model(checkpoint, device="cpu"))


def said(row: dict) -> speak.Utterance:
    return speak.Utterance(row["text"], row["ref_audio"], None, row["language"])


@pytest.mark.slow
def test_codes_of_recordings_are_made_once(ground, tmp_path):
    """A command that was cut goes on behind its last whole row, with the same result."""
    from polymodal.data.source import open_corpus
    from polymodal.recipe import Dataset

    made = (ground / "train.jsonl").read_text()
    frames = [len(row["audio_codes"]) for row in rows(ground / "train.jsonl")]
    assert frames == [8, 9, 10, 12], "0.6 to 0.9 s at 12.5 frames a second, rounded up"
    with pytest.raises(PolymodalError, match="exists already"):
        codes(ground, ground / "rows.jsonl", ground / "train.jsonl")
    mark = open_corpus([Dataset(path=str(ground / "rows.jsonl"))], None, "data").parts[0].fingerprint[:12]
    (tmp_path / f".again.jsonl.{mark}-model.partial").write_text("".join(made.splitlines(True)[:2]) + '{"te')
    codes(ground, ground / "rows.jsonl", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == made
    assert [path.name for path in tmp_path.iterdir()] == ["again.jsonl"]


@pytest.mark.slow
def test_it_says_what_it_was_taught(ground):
    """Greedy codes are those of the rows: the labels of training are what generation asks for."""
    model = speaker(ground / "run")
    learned = rows(ground / "train.jsonl")
    found = model.say([said(row) for row in learned], 2.0, temperature=0.0, repetition_penalty=1.0)
    right = [
        float((a == torch.tensor(row["audio_codes"])).float().mean())
        for each, row in zip(found, learned, strict=True)
        if (a := each.codes).shape == torch.tensor(row["audio_codes"]).shape
    ]
    assert len(right) == 4 and sum(right) / 4 > 0.9
    assert all(each.ended and len(each.sound) == 1920 * len(each.codes) for each in found)


@pytest.mark.nightly
def test_a_resumed_run_has_the_same_curve(ground, tmp_path):
    import shutil

    shutil.copytree(ground / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    run("train", ground / "r.yaml", f"checkpoint.dir={tmp_path / 'run'}")
    before, after = losses(ground / "run"), losses(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(after[step] == pytest.approx(before[step], rel=1e-5) for step in (61, 90, STEPS))


@pytest.mark.slow
def test_exports_open_with_the_class_and_speak(ground, tmp_path):
    done = export(ground / "run", tmp_path / "out")
    assert done is not None and done.difference < 1e-4
    model, info = qwen3_tts.Qwen3TTSForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    source = qwen3_tts.Qwen3TTSForConditionalGeneration.from_pretrained(ground / "model")
    assert torch.equal(model.speaker_encoder.fc.weight, source.speaker_encoder.fc.weight), "it is frozen"
    assert not torch.equal(model.talker.codec_head.weight, source.talker.codec_head.weight)
    written, original = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", ground / "model")
    )
    assert written["talker_config"]["rope_scaling"] == original["talker_config"]["rope_scaling"]
    row = rows(ground / "train.jsonl")[0]
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    one, two = (
        speaker(where).say([said(row)], 1.0, **greedy)[0] for where in (ground / "run", tmp_path / "out")
    )
    assert torch.equal(one.codes, two.codes)


@pytest.mark.nightly
def test_speech_is_written_and_never_over(ground, tmp_path):
    texts = [
        {"text": "yes", "ref_audio": str(ground / "voice.wav")},
        {"text": "How many?", "speaker": "ann", "seed": 3},
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    words = (
        "generate",
        ground / "model",
        "--prompts",
        tmp_path / "texts.jsonl",
        "--text",
        "no",
        "--seconds",
        "0.4",
    )
    run(*words, "--out", tmp_path / "a", "--batch-size", "3")
    run(*words, "--out", tmp_path / "b", "--nproc", "2")
    about = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [row["file"] for row in about["samples"]] == ["0000.wav", "0001.wav", "0002.wav"]
    assert about["samples"][1]["seed"] == 3 and about["samples"][1]["speaker"] == "ann"
    for number in range(3):
        own = [(tmp_path / d / f"{number:04d}.wav").read_bytes() for d in "ab"]
        assert own[0] == own[1], "whatever the batch and the processes"
        with wave.open(str(tmp_path / "a" / f"{number:04d}.wav")) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
    assert "exists already" in run(*words, "--out", tmp_path / "a", expect=2)
    assert "--steps is not for" in run("generate", ground / "model", "--text", "no", "--steps", "3", expect=2)


@pytest.mark.nightly
def test_what_it_says_is_judged_by_a_model_that_transcribes(ground, tmp_path):
    """The rates are those of the wav files by `evaluate speech`; a second start speaks nothing again."""
    from polymodal.evaluate import speech, spoken

    judge = tiny_speech.checkpoint(tmp_path / "whisper")
    opening = {"device": "cpu", "dtype": "auto", "ema": False, "base": None, "revision": None}
    data, out = str(ground / "rows.jsonl"), str(tmp_path / "out")
    found = spoken.main(str(ground / "run"), data, asr=str(judge), out=out, opening=opening, limit=3)
    written = sorted((tmp_path / "out" / "speech").glob("*.wav"))
    times = [path.stat().st_mtime_ns for path in written]
    assert found is not None and len(written) == 3
    texts = rows(ground / "rows.jsonl")[:3]
    lines = [
        json.dumps(
            {
                "audio": str(path),
                "text": row["text"],
                **({"language": "en"} if row["language"] != "auto" else {}),
            }
        )
        for path, row in zip(written, texts, strict=True)
    ]
    (tmp_path / "heard.jsonl").write_text("\n".join(lines))
    expected = speech.main(
        str(judge), str(tmp_path / "heard.jsonl"), out=str(tmp_path / "by"), opening=opening
    )
    assert expected is not None and dict(found.measures) == dict(expected.measures)
    again = spoken.main(str(ground / "run"), data, asr=str(judge), out=out, opening=opening, limit=3)
    assert again is not None and again.resumed == 3
    assert [path.stat().st_mtime_ns for path in written] == times
    with pytest.raises(PolymodalError, match="speech of another model"):
        spoken.main(str(ground / "model"), data, asr=str(judge), out=out, opening=opening, limit=3)
    with pytest.raises(PolymodalError, match="--asr"):
        spoken.main(str(ground / "model"), data, opening=opening)
