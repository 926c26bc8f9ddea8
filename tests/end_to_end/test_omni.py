"""A tiny Qwen2.5-Omni learns what recordings, pictures and a video with its sound are: trained on two processes,
resumed in another layout with a frozen tower, asked in chat, exported and asked again. Real processes and files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from polymodal.generate import chat
from polymodal.generate.engine import Sampling
from polymodal.generate.media import write_video
from polymodal.generate.opening import open_engine
from tests.models import tiny, tiny_speech

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ANSWERS = ("seven", "nine", "three", "red", "blue", "green")
ASKED = "What is it?"


def run(*words: object) -> str:
    command = [sys.executable, "-m", "polymodal", *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ground(root: Path) -> Path:
    tiny.checkpoint(tiny.OMNI, root / "model")
    rows = []
    for i, answer in enumerate(ANSWERS):
        tiny_speech.write(root / f"{i}.wav", tiny.sound(0.5, 7 * i))
        rows.append(([{"type": "audio", "audio": f"{i}.wav"}], answer))
    tiny.picture(24, 16).save(root / "a.png")
    frames = np.stack([np.asarray(tiny.picture(24, 16, i)) for i in range(8)])
    write_video(root / "a.mp4", frames, 4.0, np.stack([tiny.sound(2.0, 3)] * 2), 16000)
    rows.append(([{"type": "image", "image": "a.png"}], "a circle"))
    rows.append(([{"type": "video", "video": "a.mp4"}], "a line"))
    turns = [
        [
            {"role": "user", "content": [*media, {"type": "text", "text": ASKED}]},
            {"role": "assistant", "content": answer},
        ]
        for media, answer in rows
    ]
    (root / "train.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {
            "datasets": [{"path": str(root / "train.jsonl")}],
            "workers": 0,
            "max_length": 256,
            "video": {"sound": True, **tiny.DATA[tiny.OMNI]["video"]},
        },
        "train": {"steps": 80, "global_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 5e-3, "schedule": {"name": "cosine", "warmup": 0.1}},
        "checkpoint": {"dir": str(root / "run"), "every": 60},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml"


@pytest.mark.slow
def test_what_is_heard_and_seen_is_learned(tmp_path):
    recipe = ground(tmp_path)
    run("train", recipe, "--nproc", 2, "train.steps=60")
    run("train", recipe, "parallel.pp=2", "--nproc", 2, "train.freeze=[vision]")
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.1 * losses[0]
    run("export", tmp_path / "run", tmp_path / "out")
    before, after = (load_file(at / "model.safetensors") for at in (tmp_path / "model", tmp_path / "out"))
    changed = {key for key, value in before.items() if not value.equal(after[key])}
    assert changed and all(key.startswith("thinker.") for key in changed)
    said = run(
        "chat", tmp_path / "run", "--audio", tmp_path / "0.wav", "--prompt", ASKED, "--max-new-tokens", 6
    )
    assert said.strip() == ANSWERS[0]
    check(tmp_path)


def check(root: Path) -> None:
    """The run and its export know every answer."""
    questions = [("audio", f"{i}.wav", answer) for i, answer in enumerate(ANSWERS)]
    questions.append(("image", "a.png", "a circle"))
    # an export knows neither the limits of videos nor that they have sound
    for source, asked in (("out", questions), ("run", [*questions, ("video", "a.mp4", "a line")])):
        engine = open_engine(root / source, device="cpu")
        for kind, name, answer in asked:
            media = [chat.medium(kind, str(root / name))]
            made = chat.once(engine, ASKED, media, sampling=Sampling(max_new_tokens=6))
            assert made.text == answer, (source, name)
