"""Models whose net is ours, from a recipe to an export in their authors' layout, which is opened again."""

import json

import pytest
from safetensors import safe_open

from tests.end_to_end.documents import run
from tests.models import tiny

SMALLER = [
    "data.max_length=256",
    "data.workers=0",
    "train.precision=fp32",
    "train.global_batch_size=2",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]


def keys(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, task",
    [
        (tiny.MINICPM[0], "sft"),
        pytest.param("deepseek-vl2", "sft", marks=pytest.mark.nightly),
        pytest.param(tiny.MINICPM[1], "lora", marks=pytest.mark.nightly),
    ],
)
def test_from_a_recipe_to_an_export(name, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(name, tmp_path / "source")
    rows = []
    for n in range(4):
        tiny.picture(24 + 8 * n, 24, n).save(tmp_path / f"{n}.png")
        question = "<image>\nWhat is in this picture?" if n else "yes or no?"
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is a three."}]
        rows.append({"messages": said, **({"images": [f"{n}.png"]} if n else {})})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    start = ["init", "source", "--task", task, "--data", "train.json", "--devices", "1", "--out", "run.yaml"]
    run(start, tmp_path, ())
    smaller = [*SMALLER, "checkpoint.dir=runs/run"]
    assert "train would start" in run(["check", "run.yaml"], tmp_path, [*smaller, "train.steps=1"])
    run(["train", "run.yaml"], tmp_path, [*smaller, "train.steps=1"])
    run(["train", "run.yaml"], tmp_path, [*smaller, "train.steps=2"])  # resumed
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
    run(["export", "runs/run", "out", *(["--merge-lora"] if task == "lora" else [])], tmp_path, ())
    assert keys(tmp_path / "out") == keys(tmp_path / "source")
    written, before = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("out", "source"))
    assert written["model_type"] == before["model_type"]
    asked = ["--image", "1.png", "--prompt", "What is it?", "--max-new-tokens", "3"]
    answers = [run(["chat", at, *asked], tmp_path, ()) for at in ("runs/run", "out")]
    assert answers[0] == answers[1]
