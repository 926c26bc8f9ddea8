"""InternVL from its recipe to an export that transformers opens, in both layouts of its checkpoints."""

import base64
import csv
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data.chat import ChatProcessor
from polymodal.distributed import checkpoint as checkpoints
from polymodal.generate.opening import open_engine
from polymodal.models import catalog, weights
from polymodal.train.export import export
from tests.end_to_end.documents import run
from tests.models import tiny

SMALLER = [
    "data.max_length=256",
    "data.workers=0",
    "train.precision=fp32",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Both layouts of one model, InternLM2's in its authors'; rows with a picture, a video and text; a
    benchmark."""
    root = tmp_path_factory.mktemp("internvl")
    tiny.checkpoint("internvl", root / "library")
    tiny.original_internvl("internvl", root / "library", root / "authors")
    llama = tiny.checkpoint("internvl-llama", root / "llama")
    tiny.original_internvl("internvl-llama", llama, root / "internlm")
    rows = []
    for n in range(6):
        tiny.picture(24 + 8 * (n % 3), 24, n).save(root / f"{n}.png")
        question = "<image>\nWhat is in this picture?" if n % 3 else "yes or no?"
        row = {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "It is a three."},
            ]
        }
        rows.append({**row, "images": [f"{n}.png"]} if n % 3 else row)
    (root / "train.json").write_text(json.dumps(rows))
    with open(root / "AI2D_TEST.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "A", "B", "C", "D", "answer"])
        picture = base64.b64encode((root / "1.png").read_bytes()).decode()
        table.writerow(
            [1, picture, "What is in this picture?", "a circle", "a line", "a three", "a square", "C"]
        )
    return root


def keys(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "name, task",
    [
        ("authors", "sft"),
        pytest.param("library", "sft", marks=pytest.mark.nightly),
        pytest.param("internlm", "lora", marks=pytest.mark.slow),
    ],
)
def test_from_a_recipe_to_an_export(name, task, place, monkeypatch):
    monkeypatch.chdir(place)
    start, recipe = ["init", name, "--task", task, "--data", "train.json"], f"{name}.yaml"
    run([*start, "--devices", "1", "--out", recipe], place, ())
    smaller = [*SMALLER, f"checkpoint.dir=runs/{name}", "train.global_batch_size=2"]
    assert "train would start" in run(["check", recipe], place, [*smaller, "train.steps=1"])
    run(["train", recipe], place, [*smaller, "train.steps=1"])
    run(["train", recipe], place, [*smaller, "train.steps=2"])
    lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2]
    asked = ["--image", "1.png", "--prompt", "What is it?"]
    assert run(["chat", f"runs/{name}", *asked, "--max-new-tokens", "3"], place, ()) is not None
    said = run(["evaluate", f"runs/{name}", "ai2d", "--data", "AI2D_TEST.tsv"], place, ())
    assert "ai2d" in said.lower()
    merge = ["--merge-lora"] if task == "lora" else []
    run(["export", f"runs/{name}", f"out/{name}", *merge], place, ())
    assert keys(place / "out" / name) == keys(place / name)  # as the source has them
    written, before = (
        json.loads((at / "config.json").read_text()) for at in (place / "out" / name, place / name)
    )
    assert written["model_type"] == before["model_type"]
    run(["chat", f"out/{name}", *asked, "--max-new-tokens", "3"], place, ())
    run(["export", f"runs/{name}", f"out/{name}-library", "--format", "transformers", *merge], place, ())
    opened = place / "out" / f"{name}-library"
    assert keys(opened) == keys(place / ("llama" if name == "internlm" else "library"))
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(opened),
        AutoProcessor.from_pretrained(opened),
    )
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "Hi"}],
        }
    ]
    inputs = processor.apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    if task == "lora":
        run(["export", f"runs/{name}", f"out/{name}-adapter"], place, ())
        run(["chat", f"out/{name}-adapter", *asked, "--max-new-tokens", "3"], place, ())
        with pytest.raises(PolymodalError, match="adapter"):
            export(f"runs/{name}", place / "no", layout="transformers")


@pytest.mark.parametrize("name", ["library", "authors", "internlm"])
def test_training_and_inference_see_the_same_of_pictures_and_videos(name, place, tmp_path):
    record, data = tiny.record(tmp_path, images=2, videos=1), recipes.Data()
    family = catalog.family(recipes.Model(source=str(place / name)))
    sample = ChatProcessor(family.media_processor(data), data).prompt(record)
    engine = open_engine(place / name, device="cpu")
    inputs = engine._encode([engine._prepare(0, "0", record.messages[:1])])
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], sample.tensors["pixel_values"])


def test_pixel_limits_of_a_recipe_are_in_both_layouts_of_its_export(place, tmp_path, monkeypatch):
    data = recipes.Data.model_validate({"image": {"max_pixels": 600}})
    recipe = recipes.Recipe(model=recipes.Model(source=str(place / "authors")), data=data)
    family = catalog.family(recipe.model)
    model = family.build()
    weights.load(model, family)
    state = checkpoints.RunState(step=1, recipe=recipe.model_dump(mode="json"))
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    checkpoints.Writer(tmp_path / "run", 2, False, 0, None).save(tensors, state)
    export(tmp_path / "run", tmp_path / "authors")
    assert json.loads((tmp_path / "authors/config.json").read_text())["max_dynamic_patch"] == 2
    export(tmp_path / "run", tmp_path / "library", layout="transformers")
    assert AutoProcessor.from_pretrained(tmp_path / "library").image_processor.max_patches == 2
    recipe.data.chat_template = str(tmp_path / "template.jinja")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    state = checkpoints.RunState(step=2, recipe=recipe.model_dump(mode="json"))
    checkpoints.Writer(tmp_path / "run", 2, False, 0, None).save(tensors, state)
    with pytest.raises(PolymodalError, match="chat_template"):
        export(tmp_path / "run", tmp_path / "other")
