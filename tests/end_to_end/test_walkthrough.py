"""docs/walkthrough.md, command by command, on a miniature of its files: a tiny checkpoint where the 3B lies."""

import base64
import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.documents import ROOT, commands, run
from tests.models import tiny

SMALLER = [
    "data.max_length=512",
    "data.workers=0",
    "train.epochs=6",
    "train.global_batch_size=2",
    "optim.lr=2e-3",
]
"""What the miniature changes in the recipe: everything else is the recipe's own."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The layout of the document. Picture 77 is missing; the last row has no picture."""
    root = tmp_path_factory.mktemp("walkthrough")
    tiny.checkpoint("qwen2.5-vl", root / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct")
    pictures = root / "data/COCO2017/train2017"
    pictures.mkdir(parents=True)
    numbers = (9, 25, 30, 34, 36, 42, 77)
    rows = []
    for n in numbers:
        if n != 77:
            tiny.picture(48 + n % 5 * 8, 40, n).save(pictures / f"{n:012}.jpg", quality=90)
        turns = [
            {"from": "human", "value": "What is in this picture?\n<image>"},
            {"from": "gpt", "value": f"The digit {n}."},
            {"from": "human", "value": "Is it a three?"},
            {"from": "gpt", "value": "It is a three."},
        ]
        rows.append({"id": f"{n:012}", "image": f"{n:012}.jpg", "conversations": turns})
    rows.append(
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "yes or no?"}, {"from": "gpt", "value": "yes"}],
        }
    )
    (root / "data/llava_instruct_150k.json").write_text(json.dumps(rows))
    with open(root / "data/AI2D_TEST.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "D", "answer"])
        for n in numbers[:3]:
            image = base64.b64encode((pictures / f"{n:012}.jpg").read_bytes()).decode()
            table.writerow(
                [n, image, "What is in this picture?", "a circle", "a line", "a three", "a square", "C"]
            )
    shutil.copytree(ROOT / "examples/coco_llava", root / "examples/coco_llava")
    return root


@pytest.mark.slow
def test_every_command_of_the_walk_through_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    said = {}
    for words in commands(ROOT / "docs/walkthrough.md"):
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        said.setdefault(name, []).append(run(words, place, SMALLER))
    wanted = [
        "download",
        "data convert",
        "data check",
        "data show",
        "check",
        "train",
        "chat",
        "evaluate",
        "export",
    ]
    assert list(said) == wanted  # all of the way, in this order

    assert "7 of 8 rows" in said["data convert"][0] and "1 rows of text only" in said["data convert"][0]
    missing = (place / "data/mllm_format_llava_instruct_data.json.missing.txt").read_text()
    assert "000000000077.jpg" in missing and missing.count("\n") == 1
    converted = json.loads((place / "data/mllm_format_llava_instruct_data.json").read_text())
    assert (
        converted[0]["images"] == ["data/COCO2017/train2017/000000000009.jpg"]
        and converted[-1]["images"] == []
    )
    assert "data:image/" in (place / "samples.html").read_text()

    losses = [
        json.loads(line)["loss"]
        for line in (place / "runs/coco_llava/metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) >= 6 and losses[-1] < losses[0]

    [path] = place.glob("evaluations/*/result.json")
    result = json.loads(path.read_text())
    assert (result["n"], result["scored"], result["errors"]) == (3, 3, 0)

    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(place / "out/qwen2.5-vl-3b-coco-llava")
    assert str(model.dtype) == "torch.bfloat16"
    assert said["chat"][0].strip() and said["chat"][1].strip()
