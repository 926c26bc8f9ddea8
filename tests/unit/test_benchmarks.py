"""Files of questions: VLMEvalKit tables, JSON, conversations; pictures by base64, path, reference; bad rows."""

import base64
import csv
import io
import json
import pickle

import pytest
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.evaluate import benchmarks


def png(side=64):
    """Noise, so that its base64 is longer than a csv field may be by default."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def text_of(data):
    return base64.b64encode(data).decode()


def table(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def content(question):
    return question.messages[-1].content


def test_ai2d_records_become_choice_prompts(tmp_path):
    big, small = png(400), png()
    assert len(text_of(big)) > 131072
    columns = ["index", "image", "question", "hint", "A", "B", "C", "D", "answer", "category", "split"]
    rows = [
        [
            0,
            text_of(big),
            'Which part is the "root"?\nLook\tclosely.',
            "",
            "X",
            "Y",
            "Z",
            "",
            "B",
            "plants",
            "test",
        ],
        [1, "0", "And the leaf?", "A hint.", "X", "Y", "", "nan", "A", "plants", "test"],
        [2, text_of(small), "No answer", "", "X", "Y", "", "", "", "animals", "test"],
    ]
    questions = benchmarks.read(
        table(tmp_path / "AI2D_TEST.tsv", columns, rows), benchmarks.find("AI2D_TEST")
    )
    assert len(questions) == 3 and questions.ids == ["0", "1", "2"]
    first, second, third = questions[0], questions[1], questions[2]
    assert content(first) == (
        Media("image", big),
        'Question: Which part is the "root"?\nLook\tclosely.\nOptions:\nA. X\nB. Y\nC. Z\n'
        "Please select the correct answer from the options above.",
    )
    assert first.expected == ("B",) and first.options == {"A": "X", "B": "Y", "C": "Z"}
    assert first.groups == {"category": "plants", "split": "test"}
    assert content(second)[0] == Media("image", big)  # its cell refers to row 0
    assert content(second)[1].startswith("Hint: A hint.\nQuestion: And the leaf?") and second.options == {
        "A": "X",
        "B": "Y",
    }
    assert third.expected == () and content(third)[0] == Media("image", small)
    assert first.where.endswith("AI2D_TEST.tsv, line 2") and second.where.endswith(
        "line 4"
    )  # the first row has two lines
    key = questions.key(0)
    assert key.messages == () and (key.text, key.expected) == (first.text, first.expected)
    assert questions.candidates(1) == ["A", "B"]
    again = pickle.loads(pickle.dumps(questions))
    assert again[0] == first and again.fingerprint == questions.fingerprint


def test_mmmu_puts_pictures_where_the_text_names_them(tmp_path):
    one, two, three = png(), png(), png()
    columns = ["index", "image", "question", "A", "B", "answer", "category", "split"]
    rows = [
        [
            "v1",
            str([text_of(one), text_of(two)]),
            "Compare <image 2> with <image 1>.",
            "<image 2>",
            "neither",
            "A",
            "Art",
            "validation",
        ],
        ["v2", text_of(three), "How long?", "", "", "['24/7', '3.43']", "Math", "dev"],
        ["v3", text_of(three), "See <image 2>.", "a", "b", "A", "Art", "dev"],
    ]
    questions = benchmarks.read(table(tmp_path / "mmmu.tsv", columns, rows), benchmarks.find("mmmu"))
    first = content(questions[0])
    assert first[:5] == (
        "Question: Compare ",
        Media("image", two),
        " with ",
        Media("image", one),
        ".\nOptions:\nA. ",
    )
    assert first[5] == Media("image", two)
    assert content(questions[1]) == (Media("image", three), "Question: How long?") and questions[
        1
    ].expected == ("24/7", "3.43")
    with pytest.raises(PolymodalError, match=r"line 4: <image 2> in the text has no image, the row has 1"):
        questions[2]


def test_docvqa_chartqa_and_picture_paths(tmp_path):
    (tmp_path / "shots").mkdir()
    Image.open(io.BytesIO(png())).save(tmp_path / "shots" / "a.png")
    columns = ["index", "image_path", "question", "answer"]
    path = table(
        tmp_path / "docvqa.tsv", columns, [[5, "shots/a.png", "What is the total?", "['12 dollars', '$12']"]]
    )
    question = benchmarks.read(path, benchmarks.find("docvqa_val"))[0]
    assert question.expected == ("12 dollars", "$12") and question.id == "5"
    assert content(question) == (
        Media("image", str(tmp_path / "shots" / "a.png")),
        "What is the total?\nAnswer the question using a single word or phrase.",
    )
    chart = benchmarks.read(path, benchmarks.find("chartqa"))[0]
    assert chart.expected == ("['12 dollars', '$12']",)  # a list is DocVQA's way only


def test_own_questions_in_json(tmp_path):
    rows = [
        {"question": "Which digit?", "image": "7.png", "answer": 7, "category": "odd"},
        {
            "prompt": "Between <image> and <image>?",
            "images": ["a.png", "b.png"],
            "answers": ["x", "y"],
            "options": ["x", "z"],
            "system": "Be short.",
        },
        {
            "messages": [
                {"role": "user", "content": "<image>What is it?"},
                {"role": "assistant", "content": "A three."},
            ],
            "images": ["3.png"],
            "options": ["3", "4"],
        },
        {
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "Hi"},
                {"from": "human", "value": "Bye"},
            ]
        },
        {"question": "text only", "answer": "yes", "choices": {"a": "yes", "b": "no"}, "video": "clip.mp4"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = benchmarks.read(path, benchmarks.find("jsonl"))
    at = lambda name: str(tmp_path / name)  # noqa: E731
    assert content(questions[0]) == (Media("image", at("7.png")), "Which digit?") and questions[
        0
    ].expected == ("7",)
    assert questions[1].messages[0] == Message("system", ("Be short.",))
    assert content(questions[1])[:4] == (
        "Between ",
        Media("image", at("a.png")),
        " and ",
        Media("image", at("b.png")),
    )
    assert questions[1].expected == ("x", "y") and questions.candidates(1) == ["A", "B"]
    third = questions[2]
    assert (
        content(third) == (Media("image", at("3.png")), "What is it?")
        and third.expected == ("A three.",)
        and third.text == "What is it?"
    )
    assert questions.candidates(2) == ["3", "4"]  # the prompt does not list them
    assert (
        [m.role for m in questions[3].messages] == ["user", "assistant", "user"]
        and questions[3].expected == ()
        and questions[3].text == "Bye"
    )
    assert content(questions[4])[0] == Media("video", at("clip.mp4")) and questions[4].options == {
        "A": "yes",
        "B": "no",
    }
    (tmp_path / "list.json").write_text(json.dumps(rows))
    listed = benchmarks.read(tmp_path / "list.json", benchmarks.find("custom"))
    assert [content(listed[i]) for i in range(5)] == [content(questions[i]) for i in range(5)]
    (tmp_path / "media").mkdir()
    moved = benchmarks.read(path, benchmarks.find("custom"), tmp_path / "media")
    assert content(moved[0])[0] == Media("image", at("media/7.png"))


def test_records_in_memory_with_pictures_of_any_kind():
    picture, data = Image.new("RGB", (8, 8), "red"), png()
    rows = [
        {"question": "a", "image": picture},
        {"question": "b", "image": data},
        {"question": "c", "image": "x.png"},
    ]
    questions = benchmarks.read(rows, benchmarks.find("custom"))
    assert Image.open(io.BytesIO(content(questions[0])[0].source)).getpixel((0, 0)) == (255, 0, 0)
    assert content(questions[1])[0] == Media("image", data) and content(questions[2])[0] == Media(
        "image", "x.png"
    )
    other = benchmarks.read(
        [{**rows[0], "image": Image.new("RGB", (8, 8), "blue")}, *rows[1:]], benchmarks.find("custom")
    )
    assert other.fingerprint != questions.fingerprint
    assert benchmarks.read(list(rows), benchmarks.find("custom")).fingerprint == questions.fingerprint


def test_parquet_with_pictures_inside(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = png()
    rows = [
        {
            "id": "q1",
            "question": "See <image 1>",
            "options": "['a', 'b']",
            "answer": "B",
            "image_1": {"bytes": data, "path": None},
            "image_2": None,
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub.parquet")
    question = benchmarks.read(tmp_path / "hub.parquet", benchmarks.find("mmmu"))[0]
    assert content(question)[1] == Media("image", data) and question.options == {"A": "a", "B": "b"}


def test_bad_files_and_records_in_one_sentence(tmp_path):
    columns = ["index", "image", "question", "answer"]
    cases = [
        ([[0, "!!", "q", "a"]], r"line 2: the picture is neither base64"),
        ([["x", "y", "q", "a"], ["y", "x", "q", "a"]], r"refers to row x, which refers back"),
        ([[0, "", "", "a"]], r"line 2: there is no question \(columns: index"),
    ]
    for i, (rows, sentence) in enumerate(cases):
        with pytest.raises(PolymodalError, match=sentence):
            benchmarks.read(table(tmp_path / f"{i}.tsv", columns, rows), benchmarks.find("custom"))[0]
    with pytest.raises(PolymodalError, match=r"line 3: the id 0 was used before"):
        benchmarks.read(
            table(tmp_path / "twice.tsv", columns, [[0, "", "q", "a"], [0, "", "q", "a"]]),
            benchmarks.find("custom"),
        )
    with pytest.raises(PolymodalError, match="no question"):
        benchmarks.read([], benchmarks.find("custom"))
    with pytest.raises(PolymodalError, match="questions.tsv does not exist.*Did you mean .*question.tsv"):
        table(tmp_path / "question.tsv", columns, [])
        benchmarks.read(tmp_path / "questions.tsv", benchmarks.find("custom"))
    with pytest.raises(PolymodalError, match="media directory"):
        benchmarks.read(tmp_path / "question.tsv", benchmarks.find("custom"), tmp_path / "gone")
    with pytest.raises(
        PolymodalError, match=r"chartqa.tsv: ai2d is multiple choice, and no row has options .*index"
    ):
        benchmarks.read(
            table(tmp_path / "chartqa.tsv", columns, [[0, "", "How many?", "3"]]), benchmarks.find("ai2d")
        )
    with pytest.raises(PolymodalError, match="There is no benchmark `mmlu`.*ai2d"):
        benchmarks.find("mmlu")
    with pytest.raises(PolymodalError, match="likelihood compares options"):
        benchmarks.read([{"question": "q", "answer": "a"}], benchmarks.find("custom")).candidates(0)
