"""The commands of README.md and of the docs' first page run as they stand: tiny checkpoint, pictures and table at their paths."""

import base64
import csv
import json

import pytest

from tests.end_to_end.documents import ROOT, commands, run
from tests.models import tiny

SMALLER = ["data.max_length=512", "data.workers=0", "train.epochs=2", "train.global_batch_size=2"]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_command_of_the_start_page_runs(page, tmp_path, monkeypatch):
    tiny.checkpoint("qwen2.5-vl", tmp_path / "Qwen/Qwen2.5-VL-3B-Instruct")
    tiny.picture(48, 40, 1).save(tmp_path / "cat.jpg", quality=90)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>What is number {n}?"},
                {"role": "assistant", "content": "It is a three."},
            ],
            "images": ["cat.jpg"],
        }
        for n in range(6)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with open(tmp_path / "AI2D_TEST.tsv", "w", newline="") as file:
        image = base64.b64encode((tmp_path / "cat.jpg").read_bytes()).decode()
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "D", "answer"])
        table.writerow([1, image, "What is it?", "a circle", "a line", "a three", "a square", "C"])
    monkeypatch.chdir(tmp_path)
    said = {words[0]: run(words, tmp_path, SMALLER) for words in commands(ROOT / page)}
    assert {"init", "check", "train", "chat", "export"} <= set(said)
    assert said["chat"].strip() and "opened with transformers" in said["export"]
    assert (tmp_path / "out/config.json").is_file()
    if "evaluate" in said:
        [path] = tmp_path.glob("evaluations/*/result.json")
        assert json.loads(path.read_text())["scored"] == 1
