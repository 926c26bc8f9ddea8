"""skills/: each has its front matter, and every command of its ```bash blocks runs, in a miniature of its files."""

import base64
import csv
import json

import pytest
import yaml

from tests.end_to_end.documents import ROOT, commands, run
from tests.models import clips, tiny, tiny_pipelines

SKILLS = sorted((ROOT / "skills").glob("*/SKILL.md"))
VLM = "Qwen/Qwen2.5-VL-3B-Instruct"
SMALLER = {
    "polymodal-vlm": ["data.max_length=512", "data.workers=0", "train.epochs=1", "train.global_batch_size=2"],
    "polymodal-generation": ["train.steps=2", "train.global_batch_size=2"],
}


def test_a_skill_says_its_name_and_when_it_is_used():
    assert [page.parent.name for page in SKILLS] == [
        f"polymodal-{name}" for name in ("environment", "generation", "router", "vlm", "weights")
    ]
    for page in SKILLS:
        _, head, body = page.read_text(encoding="utf-8").split("---\n", 2)
        front = yaml.safe_load(head)
        assert set(front) == {"name", "description"} and front["name"] == page.parent.name
        assert "Use it" in front["description"] and len(front["description"]) <= 1024 and body.strip()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with what the skills name."""
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint("qwen2.5-vl", tmp_path / VLM)
    tiny.picture(48, 40, 1).save("cat.jpg", quality=90)
    rows = [
        {
            "images": ["cat.jpg"],
            "messages": [
                {"role": "user", "content": f"<image>What is number {n}?"},
                {"role": "assistant", "content": "A cat."},
            ],
        }
        for n in range(6)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with open("AI2D_TEST.tsv", "w", newline="") as file:
        image = base64.b64encode((tmp_path / "cat.jpg").read_bytes()).decode()
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "D", "answer"])
        table.writerow([1, image, "What is it?", "a circle", "a line", "a three", "a square", "C"])
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in SMALLER else pytest.mark.slow)
        for name in (page.parent.name for page in SKILLS)
    ],
)
def test_every_command_of_a_skill_runs(name, place):
    if name == "polymodal-generation":
        tiny_pipelines.pipeline("wan", place / "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        rows = json.loads(clips.data(place / "clips", clips=4, pictures=0).read_text())
        (place / "dataset").mkdir()
        rows = [{**row, "path": str(place / "clips" / row["path"])} for row in rows]
        (place / "dataset/data.json").write_text(json.dumps(rows))
    for words in commands(ROOT / "skills" / name / "SKILL.md"):
        if words[0] == "init" and name == "polymodal-generation":
            run(words, place, ())
            recipe = yaml.safe_load((place / "wan.yaml").read_text())
            recipe["data"]["clip"] = {"frames": [5], "fps": 16, "sizes": [[32, 48]]}
            (place / "wan.yaml").write_text(yaml.safe_dump(recipe))
        else:
            size = ["--height", "32", "--width", "48", "--frames", "5"] if words[0] == "generate" else []
            run([*words, *size], place, SMALLER.get(name, ()))
