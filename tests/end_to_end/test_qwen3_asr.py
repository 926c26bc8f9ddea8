"""A tiny Qwen3-ASR learns to write down recordings: trained on two processes, resumed in another layout with a frozen
tower, transcribed, its errors counted, exported and opened by transformers; the same with adapters. Real processes and
files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from polymodal.generate.opening import open_model
from polymodal.generate.transcribe import Speech, transcriber_of
from tests.end_to_end.test_omni import run
from tests.models import tiny, tiny_speech

TEXTS = ("seven", "nine", "three", "one two")


def ground(root: Path, **changes: object) -> Path:
    tiny.checkpoint(tiny.ASR, root / "model")
    rows = []
    for i, text in enumerate(TEXTS):
        tiny_speech.write(root / f"{i}.wav", tiny.sound(0.5 + 0.5 * i, 7 * i))
        rows.append({"audio": f"{i}.wav", "text": text, "language": "en" if i else "German"})
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model"), **changes},
        "data": {"datasets": [{"path": str(root / "train.jsonl")}], "workers": 0, "max_length": 256},
        "train": {"steps": 70, "global_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 5e-3, "schedule": {"name": "cosine", "warmup": 0.1}},
        "checkpoint": {"dir": str(root / "run"), "every": 50},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


@pytest.mark.slow
def test_what_is_heard_is_written_down(tmp_path):
    recipe = ground(tmp_path)
    run("train", recipe, "parallel.tp=2", "--nproc", 2, "train.steps=50")
    run("train", recipe, "parallel.pp=2", "--nproc", 2, "train.freeze=[audio]")
    said = run("transcribe", tmp_path / "run", tmp_path / "2.wav", "--format", "json")
    found = json.loads(said)
    assert (found["text"], found["language"]) == (TEXTS[2], "en")
    told = run(
        "evaluate", tmp_path / "run", "speech", "--data", tmp_path / "train.jsonl", "--out", tmp_path / "e"
    )
    assert "wer" in told.lower()
    (report,) = (tmp_path / "e").rglob("result.json")
    assert json.loads(report.read_text())["measures"]["wer"] == 0.0
    run("export", tmp_path / "run", tmp_path / "out")
    made = open_model(tmp_path / "out", device="cpu")
    jobs = [Speech(str(tmp_path / f"{i}.wav")) for i in range(len(TEXTS))]
    found = dict(transcriber_of(made.model, made.processor).transcripts(jobs))
    assert [found[i].text for i in range(len(TEXTS))] == list(TEXTS)
    assert [found[i].language for i in range(len(TEXTS))] == ["de", "en", "en", "en"]


@pytest.mark.nightly
def test_adapters_learn_it_too(tmp_path):
    recipe = ground(tmp_path, lora={"rank": 32, "alpha": 64, "towers": ["audio", "projector", "language"]})
    run("train", recipe, "train.steps=120")
    run("export", tmp_path / "run", tmp_path / "out", "--merge-lora")
    made = open_model(tmp_path / "out", device="cpu")
    (job,) = dict(
        transcriber_of(made.model, made.processor).transcripts([Speech(str(tmp_path / "1.wav"))])
    ).values()
    assert job.text == TEXTS[1]
