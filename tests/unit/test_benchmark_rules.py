"""Benchmarks of answering models beyond the documents' four: their files, prompts, metrics and figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.evaluate import benchmarks, together
from polymodal.evaluate.metrics import METRICS
from polymodal.evaluate.results import Judged

PICTURE = Image.new("RGB", (40, 30))


def questions(name: str, *rows: dict):
    return benchmarks.read([{"image": PICTURE, **row} for row in rows], benchmarks.find(name))


def prompt(asked) -> str:
    return asked.messages[-1].content[-1]


def judged(asked, *right: bool, **values) -> list[Judged]:
    """Samples of questions with their scores."""
    keys = [asked.key(i) for i in range(len(asked))]
    about = [(k.id, k.where, k.text, k.expected, k.options, k.groups, "") for k in keys]
    return [
        replace(Judged(i, *each), score=float(score), **values)
        for i, (each, score) in enumerate(zip(about, right, strict=True))
    ]


def figures(asked, samples) -> dict[str, float]:
    rule = asked.benchmark.together
    return together.RULES[rule](samples, [asked.together(i) for i in range(len(asked))])


def score(metric: str, answer: str, *expected: str, **options: str) -> float:
    return METRICS[metric](answer, expected, options).value


def test_mmbench_counts_a_question_that_is_right_in_every_order():
    options = {"A": "red", "B": "blue"}
    rows = [
        {"index": index, "question": "Which?", "answer": "A", **options}
        for index in (3, 1_000_003, 4, 1_000_004)
    ]
    asked = questions("MMBench_DEV_EN", *rows)
    assert asked[0].options == options and "Options:\nA. red\nB. blue" in prompt(asked[0])
    assert figures(asked, judged(asked, True, True, True, False)) == {"circular": 0.5}


def test_mme_counts_pictures_whose_both_answers_are_right():
    rows = [
        {
            "category": kind,
            "image_path": f"{kind}/{n}.jpg",
            "question": "Is it? Please answer yes or no.",
            "answer": a,
        }
        for kind in ("color", "code_reasoning")
        for n in (1, 2)
        for a in ("Yes", "No")
    ]
    asked = questions("mme", *rows)
    assert prompt(asked[0]) == "Is it? Please answer yes or no."
    found = figures(asked, judged(asked, True, True, True, False, False, True, False, False))
    assert found == {"perception": 75 + 50, "cognition": 25 + 0, "total": 150}


def test_hallusionbench_groups_by_question_and_by_figure():
    row = {"question": "Is it so?", "answer": "No", "category": "VS", "l2-category": "chart"}
    asked = questions(
        "hallusionbench", *({"index": f"VS_chart_0_{f}_{q}", **row} for f in (0, 1) for q in (0, 1))
    )
    assert prompt(asked[0]) == "Is it so?\nPlease answer yes or no."
    assert figures(asked, judged(asked, True, True, True, False)) == {"by question": 0.5, "by figure": 0.5}
    named = questions(
        "hallusionbench",
        *(
            {
                **row,
                "gt_answer": "0",
                "answer": None,
                "set_id": 0,
                "figure_id": f,
                "question_id": f * 2 + q,
                "id": f * 2 + q,
            }
            for f in (0, 1)
            for q in (0, 1)
        ),
    )
    assert named.key(0).expected == ("0",) and score("yes_no", "No.", "0") == 1
    assert figures(named, judged(named, True, True, True, False)) == {"by question": 0.75, "by figure": 0.5}


def test_pope_counts_yes():
    rows = [
        {"question": "Is there a dog?", "answer": a, "category": "random"} for a in ("yes", "yes", "no", "no")
    ]
    asked = questions("pope", *rows)
    samples = [
        replace(sample, extracted=said)
        for sample, said in zip(
            judged(asked, True, False, False, True), ("yes", "no", "yes", "no"), strict=True
        )
    ]
    assert figures(asked, samples) == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5}


def test_ocrbench_counts_points_by_part():
    kinds = ("Regular Text Recognition", "Irregular Text Recognition", "Doc-oriented VQA")
    asked = questions(
        "ocrbench", *({"question": "What?", "answer": "['CAT']", "question_type": k} for k in kinds)
    )
    assert asked.key(0).expected == ("CAT",)
    found = figures(asked, judged(asked, True, True, False))
    assert found == {"text recognition": 2.0, "doc-oriented VQA": 0.0, "points": 2.0}


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "value"),
    [
        ("yes_no", "Yes, it is.", ["Yes"], 1),
        ("yes_no", "No", ["Yes"], 0),
        ("yes_no", "Yes and no", ["Yes"], 0),
        ("substring", "The sign says: Open daily", ["open"], 1),
        ("substring", r"\frac { a } { b }", [r"\frac{a}{b}"], 1),
        ("vqa", "the two dogs.", ["2 dogs"] * 10, 1),
        ("vqa", "dog", ["dog"] * 3 + ["cat"] * 7, (3 * 2 / 3 + 7) / 10),
        ("typed", "It is about 3.14159", ["3.14"], 1),
        ("typed", "so 12 or 13", ["12"], 0),
        ("typed", "yes", ["Yes"], 1),
    ],
)
def test_metrics(metric, answer, expected, value):
    assert score(metric, answer, *expected) == pytest.approx(value)


def test_options_of_every_form():
    listed = {"question": "Which?", "candidates": "['A. red', 'B. blue']", "answer": "B"}
    assert questions("video_mme", listed)[0].options == {"A": "red", "B": "blue"}
    lettered = {"question": "Which?", "choice_a": "red", "choice_b": "blue", "answer": "A"}
    assert questions("seedbench", lettered)[0].options == {"A": "red", "B": "blue"}
    placed = {"question": "Which?", "candidates": ["red", "blue"], "correct_choice": 1}
    assert questions("longvideobench", placed)[0].expected == ("B",)
    unseen = {"options": "['1', '2']", "answer": "A"}
    assert "Options:\nA. 1\nB. 2" in prompt(questions("mmmu_pro_v", unseen)[0])
    text = {"question": "What?", "candidates": ["a dog", "a cat"], "answer": "a cat"}
    assert score("choice", "B", *questions("mvbench", text)[0].expected, A="a dog", B="a cat") == 1


def test_clips_are_looked_for_where_the_files_say(tmp_path):
    row = {"question": "What?", "candidates": ["x", "y"], "answer": "x", "image": None}
    [medium, _] = (
        questions("mvbench", {**row, "prefix": "clips/star", "video": "1.mp4"})[0].messages[-1].content
    )
    assert str(medium.source).endswith("clips/star/1.mp4")
    [medium, _] = (
        questions("video_mme", {**row, "video": "abc", "video_path": "./v/abc.mp4"})[0].messages[-1].content
    )
    assert str(medium.source).endswith("v/abc.mp4")
    with pytest.raises(PolymodalError, match="a part of its video"):
        questions("mvbench", {**row, "video": "1.mp4", "start": 1.0, "end": 3.0})[0]


def test_refcoco_has_boxes_in_the_answer():
    asked = questions("refcoco+", {"question": "the left cup", "answer": "[1, 2, 11, 22]"})
    assert prompt(asked[0]).endswith("this sentence describes: the left cup")
    assert [box.values for box in asked.boxes(0)] == [(1, 2, 11, 22)]
