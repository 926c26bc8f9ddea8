"""A tiny Whisper from recordings to texts: trained until it knows them, stopped and resumed, on two processes
alike, transcribed with and without times, measured, exported and opened by the library. Real processes and
files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from polymodal.core.errors import PolymodalError
from polymodal.evaluate.speech import evaluate
from polymodal.generate import transcribe
from polymodal.generate.opening import open_model
from polymodal.generate.transcribe import Speech, Transcriber, transcriber_of
from polymodal.train.export import export
from tests.models import tiny_speech

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SENTENCES = list(dict.fromkeys(tiny_speech.sentences(14, longest=3)))
STEPS = 160


def run(*words: str, expect: int = 0) -> str:
    command = [sys.executable, "-m", "polymodal", *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def printed(*words: str) -> str:
    command = [sys.executable, "-m", "polymodal", *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    tiny_speech.checkpoint(root / "model")
    rows = []
    for i, text in enumerate(SENTENCES):
        tiny_speech.recording(root / f"{i}.wav", text)
        rows.append({"audio": f"{i}.wav", "text": text, "language": "en"})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.jsonl")}], "workers": 0},
        "train": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 8, "precision": "fp32"},
        "optim": {"lr": 3e-3, "schedule": {"name": "cosine", "warmup": 0.1}},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def trained(ground) -> Path:
    run("train", ground / "recipe.yaml", f"checkpoint.dir={ground / 'run'}")
    return ground / "run"


@pytest.fixture(scope="module")
def transcriber(trained) -> Transcriber:
    made = open_model(trained, device="cpu")
    return transcriber_of(made.model, made.processor, name=made.name, identity=made.identity)


def curve(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("nproc, layout", [(2, ()), (2, ("parallel.pp=2",)), (2, ("parallel.tp=2",))])
def test_a_run_is_the_same_on_two_processes(ground, tmp_path, nproc, layout):
    short = (
        "train.steps=4",
        f"data.validation=[{{path: {ground / 'train.jsonl'}}}]",
        "train.micro_batch_size=4",
    )
    run("train", ground / "recipe.yaml", *short, f"checkpoint.dir={tmp_path / 'one'}")
    run(
        "train",
        ground / "recipe.yaml",
        *short,
        f"checkpoint.dir={tmp_path / 'two'}",
        *layout,
        "--nproc",
        nproc,
    )
    assert curve(tmp_path / "two") == [pytest.approx(pair, rel=1e-4) for pair in curve(tmp_path / "one")]
    last = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert last[1]["validation/loss"] == pytest.approx(last[0]["validation/loss"], rel=1e-4)
    assert last[1]["validation/loss/audio"] > 0


@pytest.mark.nightly
def test_a_run_that_is_resumed_is_the_run_that_was_not(ground, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ("optim.schedule.name=constant", "optim.schedule.warmup=2")
    run("train", ground / "recipe.yaml", "train.steps=6", f"checkpoint.dir={whole}", *schedule)
    for steps in (3, 6):
        run("train", ground / "recipe.yaml", f"train.steps={steps}", f"checkpoint.dir={parts}", *schedule)
    assert len(curve(parts)) == 6
    assert json.loads((parts / "summary.json").read_text())["resumed_at"] == 3
    assert curve(parts) == [pytest.approx(pair, rel=1e-4) for pair in curve(whole)]


@pytest.mark.slow
def test_check_says_what_is_learned_from_and_what_is_too_long(ground, tmp_path):
    tiny_speech.recording(tmp_path / "long.wav", "one two", seconds=9)
    tiny_speech.recording(tmp_path / "good.wav", "one two")
    rows = [{"audio": "long.wav", "text": "one two"}, {"audio": "good.wav", "text": "one two"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"data.datasets=[{{path: {tmp_path / 'data.jsonl'}}}]"
    keys = (data, "data.speech.language=en", f"checkpoint.dir={tmp_path / 'run'}", "data.on_error=skip")
    said = " ".join(run("check", ground / "recipe.yaml", *keys).split())
    assert "2, 1 usable" in said and "has 9.0 s, this model takes 2 s at once" in said
    assert "micro-batches of 8 samples" in said and "steps an epoch 1 of 16 samples" in said
    refused = run("check", ground / "recipe.yaml", *keys[:-1], expect=2)
    assert "has 9.0 s, this model takes 2 s at once. Cut it into rows with `start` and `end`" in " ".join(
        refused.split()
    )


@pytest.mark.slow
def test_plan_predicts_a_run_of_it(ground):
    said = json.loads(run("plan", ground / "recipe.yaml", "--world", "2", "--json"))
    assert said["peak_bytes"] > 0 and said["micro_batches"] == 1


@pytest.mark.nightly
@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_recording_that_one_rank_alone_cannot_read(ground, axis):
    from tests.parallel.harness import run as world_of

    worlds = [world_of(n, _unreadable, n, str(ground), axis, timeout=180) for n in (1, 2)]
    ((one,), (two, other)) = worlds
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and one["samples"] == two["samples"] < 2 * 16
    assert not other["error"]


def _unreadable(rank: int, world: int, root: str, axis: str) -> dict:
    """Two steps; 1.wav cannot be decoded by the last rank (which with pp decodes nothing: there by the
    first)."""
    from polymodal import recipe as recipes
    from polymodal.data import audio
    from polymodal.runtime import device, process_group
    from polymodal.train.trainer import Trainer

    keys = [
        "train.steps=2",
        "data.on_error=skip",
        f"checkpoint.dir={root}/unreadable-{axis}-{world}",
        "checkpoint.resume=never",
    ]
    made = recipes.load(
        Path(root) / "recipe.yaml",
        [*keys, *([f"parallel.{axis}=2", "train.micro_batch_size=4"] if world > 1 else [])],
    )
    process = process_group.ProcessInfo(rank, world, rank, world, 0, 1)
    rt = process_group.Runtime(process, device.find("cpu", rank), 1)
    decode, failing = audio.decode_audio, 0 if axis == "pp" else world - 1

    def heard(source, *args):
        if Path(source).name == "1.wav" and rank == failing:
            raise PolymodalError(f"{source} cannot be read.")
        return decode(source, *args)

    audio.decode_audio = heard
    try:
        trainer = Trainer(made, rt)
        trainer.train()
        trainer.close()
    finally:
        audio.decode_audio = decode
    if rank:
        return {"error": ""}
    lines = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"loss": lines[-1]["loss"], "samples": lines[-1]["samples"], "error": ""}


# ---- what it learned ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_writes_down_what_it_was_taught(ground, transcriber):
    jobs = [Speech(str(ground / f"{i}.wav")) for i in range(len(SENTENCES))]
    found = dict(transcriber.transcripts(jobs, batch_size=4))
    assert [found[i].text for i in range(len(SENTENCES))] == SENTENCES
    assert {found[i].language for i in found} == {"en"}, "it tells the language that it was taught"


@pytest.mark.slow
def test_the_command_prints_texts_and_writes_files(ground, trained, tmp_path):
    (tmp_path / "in").mkdir()
    for i in (0, 1):
        (tmp_path / "in" / f"{i}.wav").write_bytes((ground / f"{i}.wav").read_bytes())
    assert (
        printed("transcribe", trained, ground / "2.wav", "--language", "en", "--device", "cpu")
        == SENTENCES[2] + "\n"
    )
    run(
        "transcribe",
        trained,
        tmp_path / "in",
        "--language",
        "en",
        "--out",
        tmp_path / "out",
        "--format",
        "json",
        "--device",
        "cpu",
    )
    read = [json.loads((tmp_path / "out" / f"{i}.json").read_text()) for i in (0, 1)]
    assert [r["text"] for r in read] == SENTENCES[:2] and read[0]["segments"][0]["start"] == 0


@pytest.mark.slow
def test_long_recordings_are_cut_where_it_is_quiet(transcriber, tmp_path):
    """Sentences with silence between them, together more than is heard at once: no word is cut, all are
    written."""
    chosen = [s for s in SENTENCES if len(s.split()) == 3][:4]
    silence = np.zeros(tiny_speech.RATE, np.float32)
    whole = np.concatenate([x for s in chosen for x in (tiny_speech.spoken(s), silence)])
    ranges = transcribe.quiet_cuts(whole, tiny_speech.RATE, tiny_speech.SECONDS)
    assert len(ranges) == len(chosen) and all(b - a <= 2 * tiny_speech.RATE for a, b in ranges)
    cuts = [b for _, b in ranges[:-1]]
    assert [a for a, _ in ranges[1:]] == cuts and ranges[-1][1] == len(whole)
    assert all(np.abs(whole[c - 100 : c + 100]).max() == 0 for c in cuts), "in silence"
    tiny_speech.write(tmp_path / "long.wav", whole)
    ((_, found),) = transcriber.transcripts([Speech(str(tmp_path / "long.wav"), language="en")])
    assert found.seconds == pytest.approx(7.0) and len(found.segments) == 4
    assert [s.stop for s in found.segments[:-1]] == [s.start for s in found.segments[1:]]
    assert found.segments[0].text == chosen[0], "which begins as it was taught"


@pytest.mark.slow
def test_a_file_that_cannot_be_read_does_not_stop_the_rest(ground, trained, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF....")
    said = run(
        "transcribe",
        trained,
        tmp_path / "broken.wav",
        ground / "0.wav",
        "--language",
        "en",
        "--device",
        "cpu",
        expect=2,
    )
    assert SENTENCES[0] in said and "1 of 2 files could not be transcribed" in said
    assert "does not exist" in run("transcribe", trained, tmp_path / "absent.wav", expect=2)


def test_models_that_do_not_transcribe_say_so(tmp_path):
    from tests.models import tiny

    tiny.checkpoint("qwen2.5-vl", tmp_path)
    made = open_model(tmp_path, device="cpu")
    with pytest.raises(PolymodalError, match="does not transcribe speech"):
        transcriber_of(made.model, made.processor, name="qwen")


# ---- measuring ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_are_counted_over_the_corpus(ground, transcriber, tmp_path):
    rows = [json.loads(line) for line in (ground / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(ground / row["audio"])
    rows[0]["text"] = rows[0]["text"].upper() + "!"  # which does not count
    rows[1]["text"] += " surplus word"  # two words that are not said
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = evaluate(transcriber, str(tmp_path / "test.jsonl"), out=tmp_path / "out", normalise="basic")
    words = sum(len(row["text"].split()) for row in rows)
    assert result.measures["wer"] == pytest.approx(2 / words) and 0 < result.measures["cer"] < 0.5
    assert result.by["language"]["en"]["n"] == len(rows) and result.n == len(rows)
    strict = evaluate(transcriber, str(tmp_path / "test.jsonl"), out=tmp_path / "out", normalise="none")
    assert strict.measures["wer"] > result.measures["wer"] and strict.resumed == len(rows), (
        "nothing was heard again"
    )
    assert (tmp_path / "out" / "report.html").is_file()
    saved = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (
        saved["measures"] == pytest.approx(strict.measures) and saved["settings"]["words"]["length"] == words
    )


@pytest.mark.nightly
def test_the_command_measures_on_two_processes(ground, trained, tmp_path):
    said = run(
        "evaluate",
        trained,
        "speech",
        "--data",
        ground / "train.jsonl",
        "--out",
        tmp_path / "out",
        "--nproc",
        "2",
        "--device",
        "cpu",
    )
    assert (
        "wer" in said and json.loads((tmp_path / "out" / "result.json").read_text())["measures"]["wer"] == 0
    )
    assert len(list((tmp_path / "out" / "parts").glob("*.jsonl"))) == 2
    refused = run(
        "evaluate", trained, "speech", "--data", ground / "train.jsonl", "--metric", "exact", expect=2
    )
    assert "`speech` is for models that transcribe, it has no --metric" in refused


# ---- taking it away ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_export_is_what_transformers_opens(ground, trained, tmp_path):
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    done = export(str(trained), str(tmp_path / "out"))
    assert done.what == "model" and done.tokens > 5
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = WhisperProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(tiny_speech.heard(SENTENCES[3]), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(inputs.input_features, language="en", task="transcribe")
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == SENTENCES[3]


@pytest.mark.nightly
def test_adapters_are_trained_merged_and_used(ground, tmp_path):
    keys = (
        "model.lora={rank: 2, towers: [audio, language], targets: [q_proj, v_proj, fc1]}",
        "train.steps=3",
    )
    run("train", ground / "recipe.yaml", *keys, f"checkpoint.dir={tmp_path / 'run'}", "--nproc", "2")
    adapter = export(str(tmp_path / "run"), str(tmp_path / "adapter"))
    merged = export(str(tmp_path / "run"), str(tmp_path / "merged"), merge_lora=True)
    assert (adapter.what, merged.what) == ("adapter", "merged")
    job, texts = [Speech(str(ground / "0.wav"), language="en")], set()
    for place in ("run", "adapter", "merged"):
        made = open_model(tmp_path / place, device="cpu")
        ((_, found),) = transcriber_of(made.model, made.processor).transcripts(job)
        texts.add(found.text)
    assert len(texts) == 1
