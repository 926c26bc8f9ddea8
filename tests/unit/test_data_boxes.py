"""Boxes of rows in each model's coordinates: drawn, counted, refused by name, read back from answers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Control, Media
from polymodal.data import boxes
from polymodal.data.boxes import BoxWriter, numbers
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.data.index import build_index, cache_key
from polymodal.data.source import open_corpus
from polymodal.evaluate import benchmarks
from polymodal.evaluate.metrics import METRICS
from polymodal.generate import rows
from polymodal.models import catalog
from polymodal.models.understanding.internvl import BOXES
from polymodal.recipe import Attr, Data, Dataset
from polymodal.tools import data_check, data_convert, data_show
from tests.unit.media_fixtures import write_rows

LIMIT = {"image": {"max_pixels": 1024}}  # 200 x 100 becomes 40 x 16
ASK = {"role": "user", "content": "<image>Where is the <ref-object>?"}
ROW = {
    "messages": [ASK, {"role": "assistant", "content": "<bbox>"}],
    "images": ["a.png"],
    "objects": {"ref": ["red square"], "bbox": [[20, 20, 180, 80]]},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """a.png of 200 x 100 with a red rectangle from (20, 20) to (180, 80), b.png of 64 x 128."""
    directory = tmp_path_factory.mktemp("boxes")
    pixels = np.full((100, 200, 3), 255, np.uint8)
    pixels[20:80, 20:180] = (255, 0, 0)
    Image.fromarray(pixels).save(directory / "a.png")
    Image.new("RGB", (64, 128), "blue").save(directory / "b.png")
    return directory


def row(content="<bbox>", objects=ROW["objects"], images=("a.png",), ask=None, **more):
    marks = "<image>" * len(images)
    return {
        "messages": [
            {"role": "user", "content": ask or f"{marks}Where is the <ref-object>?"},
            {"role": "assistant", "content": content},
        ],
        "images": list(images),
        "objects": objects,
        **more,
    }


def texts(chat, directory, value, attr=None):
    """(question, answer) as the model reads them."""
    record = RowReader("auto", attr or Attr(), str(directory / "x.jsonl"), None).record(
        value, "x.jsonl, line 7"
    )
    text = chat._prepare(record).layout.text
    question, _, answer = text.partition("<|im_end|>\n<|im_start|>assistant\n")
    return question.rpartition("<|vision_end|>")[2], answer.removesuffix("<|im_end|>\n")


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("qwen2.5-vl", "Where is the red square?", "[4, 3, 36, 13]"),
        ("qwen3-vl", "Where is the red square?", "[100, 200, 900, 800]"),
        ("qwen3-vl-moe", "Where is the red square?", "[100, 200, 900, 800]"),
        (
            "qwen2-vl",
            "Where is the <|object_ref_start|>red square<|object_ref_end|>?",
            "<|box_start|>(100,200),(900,800)<|box_end|>",
        ),
    ],
)
def test_each_model_gets_its_coordinates_and_its_text(qwen, pictures, name, question, answer):
    chat = qwen(name, **LIMIT)
    assert chat.media.picture_size(100, 200) == (16, 40)
    assert texts(chat, pictures, ROW) == (question, answer)


def test_marks_that_the_program_writes_are_special_tokens(qwen, pictures):
    chat = qwen("qwen2-vl", **LIMIT)
    record = RowReader("auto", Attr(), str(pictures / "x.jsonl"), None).record(ROW, "x")
    ids = chat.sample(record, pixels=False).tensors["input_ids"].tolist()
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        assert ids.count(chat.media.token_id(token)) == 1
    parts = chat.boxes.record(record).messages[0].content
    assert [type(p) for p in parts if isinstance(p, str) and p] == [str, Control, str, Control, str]
    assert [p for p in parts if type(p) is str] == ["Where is the ", "red square", "?"]


def test_a_list_of_objects_is_written_as_the_model_lists_them(qwen, pictures):
    labelled = [{"label": 'a "red" one', "bbox": [20, 20, 180, 80]}, {"label": "corner", "point": [199, 99]}]
    value = row("<objects>", labelled, ask="<image>Find all.")
    assert texts(qwen("qwen2-vl", **LIMIT), pictures, value)[1] == (
        '<|object_ref_start|>a "red" one<|object_ref_end|><|box_start|>(100,200),(900,800)<|box_end|>'
        "<|object_ref_start|>corner<|object_ref_end|><|box_start|>(995,990)<|box_end|>"
    )
    answer = texts(qwen("qwen2.5-vl", **LIMIT), pictures, value)[1]
    assert json.loads(answer.removeprefix("```json\n").removesuffix("\n```")) == [
        {"bbox_2d": [4, 3, 36, 13], "label": 'a "red" one'},
        {"point_2d": [39, 15], "label": "corner"},  # pixels end at 39 and 15
    ]
    assert texts(qwen("qwen2.5-vl", **LIMIT), pictures, row("<objects>", [], ask="<image>Find"))[1] == "[]"


def test_internvl_counts_thousandths_of_the_whole_picture():
    writer = BoxWriter(BOXES, lambda height, width: (height, width))
    assert (
        BOXES.coordinates(BOXES.values((0.1, 0.25, 1, 1), 448, 448)) == "<box>[[100, 250, 1000, 1000]]</box>"
    )
    assert writer.found("<ref>a</ref><box>[[100, 250, 1000, 1000]]</box>", 200, 400) == [(40, 50, 400, 200)]
    assert catalog.cards()["internvl"].boxes is BOXES


@pytest.mark.parametrize(
    ("objects", "attr"),
    [
        ({"bbox": [20, 20, 180, 80]}, None),
        ({"bbox": [[0.1, 0.2, 0.9, 0.8]], "bbox_type": "norm1"}, None),
        ({"bbox": [[100, 200, 900, 800]], "bbox_type": ["norm1000"]}, None),
        ({"bbox": [[20, 20, 160, 60]], "bbox_format": "xywh"}, None),
        ({"bbox": [[20, 20, 160, 60]]}, Attr(bbox_format="xywh")),
        ({"bbox": [[0.5, 0.5, 0.8, 0.6]]}, Attr(bbox_format="cxcywh", bbox_type="norm1")),
        ([[20, 20, 180, 80]], None),
        ([{"bbox_2d": [20, 20, 180, 80]}], None),
        ('{"bbox": [[20, 20, 180, 80]]}', None),  # a table's cell
        ("[[20, 20, 180, 80]]", None),
        ({"bbox": [[19.2, 19.6, 200.9, 79.6]], "image_id": None}, None),
    ],
)
def test_forms_that_people_have(qwen, pictures, objects, attr):
    value = row("<bbox>", objects, ask="<image>Where?")
    expected = "[4, 3, 39, 13]" if "200.9" in str(objects) else "[4, 3, 36, 13]"
    assert texts(qwen("qwen2.5-vl", **LIMIT), pictures, value, attr)[1] == expected
    named = {**value, "regions": value.pop("objects")}
    own = (attr or Attr()).model_copy(update={"objects": "regions"})
    assert texts(qwen("qwen2.5-vl", **LIMIT), pictures, named, own)[1] == expected


def test_each_box_is_of_its_own_picture(qwen, pictures):
    objects = {"bbox": [[20, 20, 180, 80], [0, 64, 32, 128]], "image_id": [0, 1]}
    value = row("<bbox> and <bbox>", objects, ("a.png", "b.png"), ask="<image><image>Where?")
    assert (
        texts(qwen("qwen3-vl", **LIMIT), pictures, value)[1] == "[100, 200, 900, 800] and [0, 500, 500, 1000]"
    )
    chat = qwen("qwen2.5-vl", **LIMIT)
    height, width = chat.media.picture_size(128, 64)
    second = [0, height // 2, width // 2, height - 1]
    assert texts(chat, pictures, value)[1] == f"[4, 3, 36, 13] and {second}"


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        (
            {"bbox": [[20, 20, 280, 80]]},
            "`objects.bbox[0]` = [20.0, 20.0, 280.0, 80.0] is outside its picture of 200 x 100",
        ),
        ({"bbox": [[-9, 20, 28, 80]]}, "is outside its picture"),
        ({"bbox": [[0.1, 0.2, 1.8, 0.4]], "bbox_type": "norm1"}, "is outside its picture"),
        ({"bbox": [[0.1, 0.2, 0.8, 0.4]]}, "looks like shares of the picture"),
        ({"bbox": [[180, 20, 20, 80]]}, "ends before it begins (as xyxy)"),
        ({"bbox": [[20, 20, -5, 80]], "bbox_format": "xywh"}, "ends before it begins (as xywh)"),
        ({"bbox": [[20, 20, float("nan"), 80]]}, "holds 'nan', which is no coordinate"),
        ({"bbox": [[20, 20, float("inf"), 80]]}, "holds 'inf', which is no coordinate"),
        ({"bbox": [[20, 20, 10**400, 80]]}, "a number of 401 digits"),
        ({"bbox": [[20, 20, "180", 80]]}, "holds '180', which is no coordinate"),
        ({"bbox": [[20, 20, True, 80]]}, "holds 'True', which is no coordinate"),
        ({"bbox": [[20, 20, None, 80]]}, "holds 'None', which is no coordinate"),
        ({"bbox": [[20, 20, 180]]}, "is no box"),
        ({"bbox": [[20, 20, 180, 20, 180, 80, 20, 80]]}, "is no box"),
        ({"bbox": ["20 20 180 80"]}, "is no box"),
        ({"bbox": {"x": 1}}, "`objects` holds no list of boxes"),
        ("somewhere", "`objects` holds no list of boxes"),
        ('{"bbox": [[1, 2', "`objects` is not valid JSON"),
        ("[" * 100000, "`objects` "),
        (7, "`objects` holds no list of boxes"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_type": "norm100"}, "bbox_type = 'norm100' is not known"),
        ({"bbox": [[1, 2, 3, 4]], "bbox_format": [["yxyx"]]}, "bbox_format = "),
        (
            {"bbox": [[1, 2, 3, 4]], "image_id": [1]},
            "is a box of picture 1 (image_id counts from 0), the row has 1",
        ),
        ({"bbox": [[1, 2, 3, 4]], "image_id": "a"}, "is a box of picture a"),
        ({"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "1 <bbox> in the text, but `objects` holds 2"),
        (
            {"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]},
            "1 <ref-object> in the text, but the labels of `objects` are 2",
        ),
        ({"ref": [3], "bbox": [[1, 2, 3, 4]]}, "a label of `objects` is no text: '3'"),
        ({"bbox": []}, "1 <bbox> in the text, but `objects` holds 0"),
    ],
)
def test_what_is_no_box_is_named_with_file_and_line(qwen, pictures, tmp_path, objects, said):
    ask = None if isinstance(objects, dict) and "ref" in objects else "<image>Where?"
    path = write_rows(tmp_path / "rows.jsonl", [ROW, row("<bbox>", objects, ask=ask)])
    corpus = open_corpus([Dataset(path=str(path), media_dir=str(pictures))])
    place = f"{path}, line 2"
    with pytest.raises(PolymodalError) as error:
        build_index(corpus, qwen("qwen2.5-vl", **LIMIT), Data(cache_dir=str(tmp_path / "cache")))
    assert said in str(error.value) and place in str(error.value), error.value
    (problem,) = data_check.check(corpus).problems
    assert said in problem and place in problem


def test_objects_need_a_label_each_or_none(qwen, pictures):
    for content, objects in (
        ("<objects>", {"ref": ["a"], "bbox": [[1, 2, 3, 4]] * 2}),
        ("<objects><bbox>", [[1, 2, 3, 4]]),
    ):
        with pytest.raises(PolymodalError, match="<objects> stands for all"):
            texts(qwen(), pictures, row(content, objects, ask="<image>Find"))
    with pytest.raises(PolymodalError, match="is no text: '7'"):
        texts(
            qwen(), pictures, row("<objects>", {"category": [7], "bbox": [[1, 2, 3, 4]]}, ask="<image>Find")
        )


def test_marks_are_words_where_no_boxes_are_declared(qwen, pictures):
    for objects in (None, "", {}):
        value = row("Write <bbox> and <objects>.", objects, ask="<image>What is <ref-object>?")
        if objects == {}:
            with pytest.raises(PolymodalError):
                texts(qwen(), pictures, value)
            continue
        assert texts(qwen(), pictures, value) == ("What is <ref-object>?", "Write <bbox> and <objects>.")
    kept = row("It is red.", {"id": [3]}, ask="<image>Which colour?")  # a column of that name, no marks
    assert texts(qwen(), pictures, kept) == ("Which colour?", "It is red.")


def test_a_model_without_a_declared_form_refuses(qwen, pictures):
    record = RowReader("auto", Attr(), str(pictures / "x.jsonl"), None).record(ROW, "x")
    with pytest.raises(PolymodalError, match="not known how this model writes them"):
        BoxWriter(None, lambda height, width: (height, width)).record(record)


def test_lengths_follow_the_text_that_is_written(qwen, pictures, tmp_path):
    """Another size of the picture gives other numbers, and another index."""
    many = row("<bbox>" * 9, {"bbox": [[20, 20, 180, 80]] * 9}, ask="<image>Where?")
    path = write_rows(tmp_path / "rows.jsonl", [ROW, many])
    large, small = qwen("qwen2.5-vl", image={"max_pixels": 20000}), qwen("qwen2.5-vl", **LIMIT)
    corpus = open_corpus([Dataset(path=str(path), media_dir=str(pictures))])
    for chat in (large, small, qwen("qwen2-vl", **LIMIT)):
        measured = chat.measure([corpus[0], corpus[1]])
        made = [chat.sample(corpus[i], pixels=False).measure for i in range(2)]
        assert measured == made
    keys = {cache_key(corpus, chat, Data()) for chat in (large, small, qwen("qwen3-vl", **LIMIT))}
    plain = ChatProcessor(small.media, Data())
    plain.boxes = BoxWriter(None, small.media.picture_size)
    keys.add(cache_key(corpus, plain, Data()))
    keys.add(cache_key(open_corpus(corpus_of(path, pictures, "xywh")), small, Data()))
    assert len(keys) == 5
    assert cache_key(open_corpus(corpus_of(path, pictures, None)), small, Data()) == cache_key(
        corpus, small, Data()
    )


def corpus_of(path, pictures, form):
    return [Dataset(path=str(path), media_dir=str(pictures), attr=Attr(bbox_format=form))]


def test_a_long_conversation_is_cut_with_its_boxes(qwen, pictures):
    turns = [
        ASK,
        {"role": "assistant", "content": "<bbox>"},
        {"role": "user", "content": "And <ref-object>?"},
    ]
    value = {"messages": [*turns, {"role": "assistant", "content": "<bbox>"}], "images": ["a.png"]}
    value["objects"] = {"ref": ["a", "b"], "bbox": [[20, 20, 180, 80], [0, 0, 100, 50]]}
    chat = qwen("qwen2.5-vl", **LIMIT, max_length=50, overlong="split")
    record = RowReader("auto", Attr(), str(pictures / "x.jsonl"), None).record(value, "x")
    pieces = chat.pieces(record)
    assert [p.messages[-1].content for p in pieces] == [("[4, 3, 36, 13]",), ("[0, 0, 20, 8]",)]


def test_data_show_draws_where_the_model_s_numbers_are(qwen, pictures):
    chat = qwen("qwen2.5-vl", image={"max_pixels": 4096})
    record = RowReader("auto", Attr(), str(pictures / "x.jsonl"), None).record(ROW, "x")
    caption, (shown,), *_ = data_show._figure(record.media[0], record, chat)
    height, width = chat.media.picture_size(100, 200)
    values = re.search(r"for the model (\d+) x (\d+): \[(\d+), (\d+), (\d+), (\d+)\]", caption)
    assert tuple(map(int, values.groups()[:2])) == (width, height) and shown.uri
    with Image.open(pictures / "a.png") as picture:
        drawn, _ = data_show._drawn(picture.convert("RGB"), list(record.boxes), chat.boxes)
    x1, y1, x2, y2 = map(int, values.groups()[2:])
    pixels = np.asarray(drawn).astype(int)
    line = (pixels == data_show.MAGENTA).all(-1)
    assert line[y1, x1 : x2 + 1].all() and line[y1 : y2 + 1, x1].all()
    assert not line[: y1 - 1].any() and not line[:, x2 + 2 :].any()


def test_check_says_what_becomes_of_boxes(qwen, pictures, tmp_path):
    native = {**ROW, "objects": None, "messages": [{"role": "user", "content": "<image>Where?"}]}
    for text in ("<|box_start|>(20,20),(180,180)<|box_end|>", '{"bbox_2d": [1, 2, 3, 4]}', "[[1, 2, 3, 4]]"):
        native["messages"] = [native["messages"][0], {"role": "assistant", "content": text}]
        path = write_rows(tmp_path / "native.jsonl", [native] * 3)
        corpus = open_corpus([Dataset(path=str(path), media_dir=str(pictures))])
        (said,) = boxes.notes(corpus, qwen("qwen2.5-vl", **LIMIT).boxes)
        assert "3 of 3 rows" in said and "(there 200 x 100 to 40 x 16)" in said and "stay as they are" in said
        assert "pixels of the resized picture" in said and "line 1" in said
    path = write_rows(tmp_path / "declared.jsonl", [ROW] * 2)
    corpus = open_corpus([Dataset(path=str(path), media_dir=str(pictures))])
    (said,) = boxes.notes(corpus, qwen("qwen2.5-vl", **LIMIT).boxes)
    assert "boxes of 2 of 2 rows" in said and "becomes [4, 3, 36, 13]" in said
    plain = {
        **native,
        "messages": [native["messages"][0], {"role": "assistant", "content": "At (1, 2) or so."}],
    }
    corpus = open_corpus(
        [Dataset(path=str(write_rows(tmp_path / "p.jsonl", [plain])), media_dir=str(pictures))]
    )
    assert boxes.notes(corpus, qwen().boxes) == []


def test_data_check_counts_and_data_convert_keeps_boxes(pictures, tmp_path):
    several = row(
        "<objects>",
        [{"label": "a", "bbox": [1, 2, 3, 4]}, {"label": "b", "point": [5, 6]}],
        ask="<image>Find",
    )
    norm = row("<bbox>", {"ref": ["c"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"})
    path = write_rows(tmp_path / "rows.jsonl", [ROW, several, norm])
    corpus = open_corpus([Dataset(path=str(path), media_dir=str(pictures))])
    found = data_check.check(corpus)
    assert (found.boxes, found.problems) == (4, [])
    data_convert.convert(str(path), str(tmp_path / "out.json"), media_dir=str(pictures))
    again = open_corpus([Dataset(path=str(tmp_path / "out.json"))])
    for before, after in zip(corpus, again, strict=True):
        assert [(b.values, b.scale, b.label) for b in before.boxes] == [
            (b.values, b.scale, b.label) for b in after.boxes
        ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('```json\n[{"bbox_2d": [4, 3, 36, 13], "label": "x"}]\n```', [(20.0, 18.8, 180.0, 81.2)]),
        ("(4,3),(36,13)", [(20.0, 18.8, 180.0, 81.2)]),  # special tokens are not decoded
        ("[[4, 3, 36, 13], [0,0,1,1]]", [(20.0, 18.8, 180.0, 81.2), (0.0, 0.0, 5.0, 6.2)]),
        ('{"point_2d": [20, 8]}', [(100.0, 50.0)]),
        ("click(start_box='(20,8)')", [(100.0, 50.0)]),
        ("[20, 8]", [(100.0, 50.0)]),
        ("In (1, 2) of the book.", []),
        ("[36, 3, 4, 13]", []),  # not in order
        ("[4, 3, 400, 13]", []),  # outside
        ("1, 2, 3, 4", []),
    ],
)
def test_answers_are_read_back_in_pixels_of_the_picture(qwen, text, found):
    assert qwen("qwen2.5-vl", **LIMIT).boxes.found(text, 100, 200) == found


@pytest.mark.parametrize(
    ("answer", "expected", "iou", "half"),
    [
        ("[0, 0, 10, 10]", ["[0, 0, 10, 10]"], 1, 1),
        ("[0, 0, 10, 10]", ["[0, 0, 10, 5]"], 0.5, 1),
        ("[0, 0, 10, 10]", ["[5, 5, 15, 15]"], 25 / 175, 0),
        ("[0, 0, 10, 10], [20, 20, 30, 30]", ["[0, 0, 10, 10]"], 0.5, 0.5),  # one too many
        ("[0, 0, 10, 10]", ["[20, 20, 30, 30]", "[0, 0, 10, 10]"], 0.5, 0.5),  # one too few
        ("[5, 5]", ["[0, 0, 10, 10]"], 1, 1),
        ("[5, 5, 5, 5]", ["[0, 0, 10, 10]"], 0, 0),  # a box without area is no point
        ("nothing", ["[0, 0, 10, 10]"], 0, 0),
    ],
)
def test_metrics_of_boxes(answer, expected, iou, half):
    assert METRICS["iou"](answer, expected, {}).value == pytest.approx(iou)
    assert METRICS["iou@0.5"](answer, expected, {}).value == pytest.approx(half)
    assert METRICS["iou"](answer, expected, {}).parsed == (answer != "nothing")


def test_questions_declare_their_boxes(pictures, tmp_path):
    facts = benchmarks.find("custom")
    flat = {"question": "Where is it?", "image": "a.png", "bbox": [20, 20, 160, 60], "bbox_format": "xywh"}
    for rows_ in ([flat], [ROW], [{**flat, "bbox": "[20, 20, 160, 60]"}]):
        questions = benchmarks.read(str(write_rows(tmp_path / "q.jsonl", rows_)), facts, pictures)
        assert questions.of_boxes
        (box,) = questions.boxes(0)
        assert boxes.pixels(box, 100, 200) == (20, 20, 180, 80)
        asked = questions[0].messages
        assert [m.role for m in asked] == ["user"]
    region = {"question": "What is in <bbox>?", "image": "a.png", "answer": "red", "bbox": [20, 20, 180, 80]}
    questions = benchmarks.read(str(write_rows(tmp_path / "q.jsonl", [region])), facts, pictures)
    assert not questions.of_boxes and questions.boxes(0) == ()
    assert any(getattr(p, "kind", "") == "bbox" for p in questions[0].messages[0].content)


def test_rows_of_chat_take_boxes_in_the_question_and_in_the_answer(pictures):
    reader = RowReader("auto", Attr(), str(pictures / "x.jsonl"), None)
    asked = rows.conversation(rows.Row(1, "x.jsonl, line 1", ROW), reader, None)
    assert [m.role for m in asked] == ["user"] and isinstance(asked[0].content[0], Media)
    region = {"prompt": "What is in <bbox>?", "image": "a.png", "objects": {"bbox": [[20, 20, 180, 80]]}}
    asked = rows.conversation(rows.Row(1, "x.jsonl, line 1", region), reader, None)
    assert asked[0].content[2].boxes[0].values == (20, 20, 180, 80)


def test_numbers_are_found_in_bounded_time():
    for text in (
        "[" * 200_000,
        "[1, " * 100_000,
        "(1,2),(" * 50_000,
        "[1,2,3" + " " * 200_000,
        "box=" * 50_000,
    ):
        assert numbers(text) == []
