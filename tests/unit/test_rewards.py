"""Rewards: rules, functions of a user, a real HTTP scorer; what fails is no number and is said."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.data.formats import RowReader
from polymodal.evaluate import rewards
from polymodal.evaluate.rewards import Answered, Rewards, boxed
from polymodal.recipe import Attr, Reward


def value(name: str, completion: str, answers=(), **more) -> float:
    settings = {key: more.pop(key) for key in ("tolerance", "pattern") if key in more}
    item = Answered(completion, "?", tuple(answers), **more)
    return Rewards([Reward(name=name, **settings)])([item]).values[0, 0].item()


def test_rules():
    assert value("exact", "<think>4?</think> Seven.", ["seven"]) == 1 and value("exact", "six", ["7"]) == 0
    assert value("numeric", "7.0", ["7"]) == 1 and value("numeric", "7.1", ["7"]) == 0
    assert value("numeric", "7.1", ["7"], tolerance=0.05) == 1
    assert value("choice", "The answer is (B).", ["B"], options={"A": "x", "B": "y"}) == 1
    assert math.isnan(value("choice", "B", ["B"])) and math.isnan(value("exact", "B")), "it does not apply"
    assert 0.5 < value("anls", "helo", ["hello"]) < 1
    assert value("format", "<think>a\nb</think>\n<answer>3</answer>") == 1 and value("format", "3") == 0
    assert value("format", "Answer: 3", pattern=r"Answer: \d") == 1
    boxes = {"boxes": "[0.0, 0.0, 10.0, 10.0]"}
    assert value("iou", "", ["[0, 0, 10, 5]"], **boxes) == pytest.approx(0.5)


def test_boxed():
    assert boxed(r"a \boxed{1} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}" and boxed("1") is None
    assert boxed(r"\boxed{1") is None
    for said, wanted in (
        (r"so \boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{ 12\text{ cm} }", r"\boxed{12cm}"),
        (r"<think>\boxed{9}</think> \boxed{30^\circ}", "30"),
        (r"\boxed{2\sqrt{3}}", r"2 \sqrt{3}"),
        (r"\boxed{-\frac{3}{4}}", "-0.75"),
    ):
        assert value("boxed", said, [wanted]) == 1, said
    assert value("boxed", r"\boxed{3}", ["4"]) == 0 and value("boxed", "4", ["4"]) == 0


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "import time\n"
        "def length(completions, level, **columns): return [len(c) + l for c, l in zip(completions, level)]\n"
        "def some(completions, answers): return [None if c == '?' else len(a) for c, a in zip(completions, answers)]\n"
        "def broken(completions): raise RuntimeError('no file')\n"
        "def short(completions): return [1.0]\n"
        "def odd(completions): return [float('nan')] + [1.0] * (len(completions) - 1)\n"
        "def slow(completions): time.sleep(60)\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_rewards", None)


def of(name: str, **more) -> Reward:
    return Reward(name=name, function=f"own_rewards:{name}", **more)


def test_functions_and_what_fails(module):
    items = [Answered("ab", answers=("x",), row={"level": 3}), Answered("?", row={"level": 5})]
    found = Rewards([of("length", weight=2), of("some")])(items)
    assert found.values[0].tolist() == [5, 1] and found.values[1, 0] == 6 and found.values[1, 1].isnan()
    assert found.total.tolist() == [11, 12] and not found.failed.any() and not found.problems
    for name, said in (("broken", "no file"), ("short", "1 values for 2"), ("slow", "longer than 0.2 s")):
        began = time.monotonic()
        found = Rewards([of("length"), of(name, timeout=0.2)])(items)
        assert found.total.isnan().all(), "never silently 0"
        assert found.failed.tolist() == [[False, True]] * 2 and said in found.problems[0]
        assert time.monotonic() - began < 30
    found = Rewards([of("length"), of("odd")])(items)
    assert found.total[0].isnan() and found.total[1] == 7
    found = Rewards([of("length"), of("broken", weight=0)])(items)
    assert found.total.tolist() == [5, 6], "what is only looked at spoils nothing"


@pytest.mark.parametrize(
    "settings, said",
    [
        ([Reward(name="exact"), Reward(name="exact")], "twice"),
        ([Reward(name="exact", weight=0)], "every weight is 0"),
        ([Reward(name="x", function="a:b", url="http://h")], "a function and a url"),
        ([Reward(name="x", function="own_rewards:constant")], "cannot be called"),
        ([Reward(name="x", function="own_rewards:lenght")], "Did you mean length|no `lenght`"),
        ([Reward(name="exact", tolerance=0.1)], "tolerance is for"),
        ([Reward(name="format", pattern="(")], "no regular expression"),
    ],
)
def test_rewards_that_cannot_be(module, settings, said):
    with pytest.raises(PolymodalError, match=said) as found:
        Rewards(settings)
    assert found.value.hint


class _Scorer(BaseHTTPRequestHandler):
    failures = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if _Scorer.failures:
            _Scorer.failures -= 1
            self.send_error(503)
            return
        answer = json.dumps({"scores": [len(text) + row["level"] for text, row in zip(body["completions"], body["rows"], strict=True)]})  # fmt: skip
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


def test_a_scorer_is_asked_again_and_its_failure_is_no_zero(monkeypatch):
    monkeypatch.setattr(rewards, "PAUSE", 0.01)
    server = HTTPServer(("127.0.0.1", 0), _Scorer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url, item = f"http://127.0.0.1:{server.server_port}/score", Answered("abc", row={"level": 1})
        scorer = Rewards([Reward(name="far", url=url, retries=1, timeout=10)])
        assert scorer([item]).total.tolist() == [4]
        _Scorer.failures = 1
        assert scorer([item]).total.tolist() == [4]
        _Scorer.failures = 2
        found = scorer([item])
        assert found.total.isnan().all() and found.failed.all() and "503" in found.problems[0]
    finally:
        server.shutdown()
        server.server_close()
    assert scorer([item]).failed.all()


@pytest.mark.parametrize(
    "row, question, expected",
    [
        ({"data_source": "geo3k", "prompt": [{"role": "user", "content": "Find x."}], "reward_model": {"style": "rule", "ground_truth": "3"}, "extra_info": {"answer": "no"}}, "Find x.", ("3",)),
        ({"problem": "Find x.", "answer": "3"}, "Find x.", ("3",)),
        ({"prompt": "Find x.", "solution": "3"}, "Find x.", ("3",)),
        ({"conversations": [{"from": "human", "value": "Find x."}, {"from": "gpt", "value": "3"}]}, "Find x.", ("3",)),
        ({"messages": [{"role": "user", "content": "Find x."}, {"role": "assistant", "content": "3"}], "answer": ["3", "three"]}, "Find x.", ("3", "three")),
        ({"question": "Find x.", "answer": 3, "choices": ["1", "3"]}, "Find x.", ("3",)),
    ],
)  # fmt: skip
def test_rows_that_ask(row, question, expected):
    record = RowReader("prompt", Attr(), "rows.json", None).record(row, "row 1")
    assert record.messages[-1].role == "user" and record.messages[-1].content == (question,)
    assert record.extra["answers"] == expected and record.extra["columns"].keys() == row.keys()
    if "choices" in row:
        assert record.extra["options"] == {"A": "1", "B": "3"}


def test_rows_that_ask_nothing():
    with pytest.raises(PolymodalError, match="asks nothing") as found:
        RowReader("prompt", Attr(), "rows.json", None).record({"answer": "3"}, "row 1")
    assert found.value.hint
