"""Boxes on the way from a row to a model that answers: the same tokens as in training, and pixels back."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.evaluate import run
from polymodal.generate import rows
from polymodal.generate.chat import boxes_line
from polymodal.generate.engine import Engine, Sampling
from polymodal.generate.opening import Opened, engine_of, load_hub, open_engine, processor_of
from polymodal.models import catalog
from tests.models import tiny
from tests.unit.media_fixtures import write_rows

ROW = {
    "images": ["a.png"],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<image>Where is the <ref-object> at <bbox>?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "And the <ref-object>?"},
        {"role": "assistant", "content": "<bbox>"},
    ],
    "objects": {"ref": ["red square", "corner"], "bbox": [[20, 20, 180, 80], [0, 0, 100, 50]]},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    directory = tmp_path_factory.mktemp("boxes")
    Image.new("RGB", (200, 100), "red").save(directory / "a.png")
    return directory


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_a_question_with_boxes_is_what_training_reads_and_its_answer_comes_back(name, ground):
    source = tiny.checkpoint(name, ground / name)
    family = catalog.family(recipes.Model(source=str(source)))
    data = recipes.Data(image=recipes.Image(max_pixels=1024))
    reader = RowReader("auto", recipes.Attr(), str(ground / "x.jsonl"), None)
    record = reader.record(ROW, "x.jsonl, line 1")
    expected = ChatProcessor(family.media_processor(data), data).prompt(record).tensors["input_ids"]
    model, processor = load_hub(source), processor_of(source, data, family)
    engine = engine_of(Opened(model, processor, name, name, card=family.card))
    asked = engine._prepare(0, "0", rows.conversation(rows.Row(1, "x", ROW), reader, None))
    assert torch.equal(engine._encode([asked])["input_ids"][0], expected)

    text = {"qwen2-vl": "<|box_start|>(0,0),(500,500)<|box_end|>", "qwen2.5-vl": "[0, 0, 20, 8]"}[name]
    ids = engine.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    answer = engine._answer(ids, 1, asked)
    assert (answer.boxes, answer.size) == (((0, 0, 100, 50),), (100, 200))
    assert boxes_line(answer) == "boxes in pixels of the picture of 200 x 100: [0.0, 0.0, 100.0, 50.0]\n"
    out = rows._with_answer(ROW, answer)
    assert (
        json.loads(json.dumps(out))["answer_boxes"] == [[0, 0, 100, 50]] and out["objects"] == ROW["objects"]
    )

    with pytest.raises(PolymodalError, match="not known how this model writes them"):
        Engine(model, processor)._prepare(0, "0", record.messages[:-1])


def test_evaluation_compares_in_pixels_and_names_what_is_no_box(ground, tmp_path):
    source = tiny.checkpoint("qwen2.5-vl", ground / "evaluated")
    engine = open_engine(source, device="cpu")
    flat = {"question": "Where?", "image": str(ground / "a.png"), "bbox": [20, 20, 160, 60]}
    path = write_rows(
        tmp_path / "q.jsonl", [{**flat, "bbox_format": "xywh"}, {**ROW, "images": [flat["image"]]}]
    )
    short = Sampling(max_new_tokens=2)
    result = run.evaluate(engine, path, sampling=short, out=tmp_path / "out", html=0)
    assert (result.metric, result.scored, result.errors) == ("iou@0.5", 2, 0)
    assert result.samples[0].expected == ("[20.0, 20.0, 180.0, 80.0]",)
    assert result.samples[1].expected == ("[0.0, 0.0, 100.0, 50.0]",)
    again = run.evaluate(engine, path, "iou", sampling=short, out=tmp_path / "out", html=0)
    assert again.resumed == 2 and again.metric == "iou"
    for bad, said in (
        ({**flat, "bbox": [20, 20, 160, 600]}, "q.jsonl, line 1: `objects.bbox"),
        ({"question": "?"}, "no question"),
    ):
        write_rows(path, [bad])
        with pytest.raises(PolymodalError, match=said):
            run.evaluate(engine, path, "iou", sampling=short)
