"""Evaluation: scores, files and pages of one process; the same result on several; a killed one goes on."""

import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.evaluate import results, run, store
from polymodal.evaluate.thumbnails import thumbnail
from polymodal.generate.engine import Engine, Sampling
from polymodal.generate.opening import open_engine
from tests.models import tiny
from tests.parallel import harness

TOKENS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint("qwen2.5-vl", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(model):
    return open_engine(model, device="cpu")


def write_rows(directory, engine=None, count=7, **more):
    """Questions about pictures; with an engine, every second expected answer is the one it gives."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        tiny.picture(16 + 8 * (i % 3), 16, seed=i).save(directory / f"{i}.png")
        rows.append(
            {
                "id": f"q{i}",
                "question": "What is in this picture? " * (1 + i % 4),
                "image": f"{i}.png",
                "category": "even" if i % 2 == 0 else "odd",
                "answer": "x",
                **more,
            }
        )
    if engine is not None:
        given = run.evaluate(
            engine,
            [{**row, "image": str(directory / row["image"])} for row in rows],
            "exact",
            max_new_tokens=TOKENS,
        )
        for i, (row, sample) in enumerate(zip(rows, given.samples, strict=True)):
            row["answer"] = sample.answer if i % 2 == 0 else "something else"
    path = directory / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(engine, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), engine)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.pictures, self.cards = [], 0, []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.pictures += tag == "img" and found["src"].startswith("data:image/")
        self.outside += [v for k, v in found.items() if k in ("src", "href") and not v.startswith("data:")]
        if tag == "div" and (found.get("class") or "").startswith("card"):
            self.cards.append(found["class"])


def test_scores_files_and_page(engine, data, tmp_path):
    out = tmp_path / "out"
    result = run.evaluate(engine, data, "exact", out=out, max_new_tokens=TOKENS, batch_size=3)
    assert (result.n, result.scored, result.errors, result.resumed) == (7, 7, 0, 0)
    assert result.score == pytest.approx(4 / 7)
    assert result.by == {"category": {"even": {"score": 1.0, "n": 4}, "odd": {"score": 0.0, "n": 3}}}
    saved = json.loads((out / "result.json").read_text())
    assert (
        saved["score"] == result.score
        and saved["n"] == 7
        and saved["settings"]["sampling"]["max_new_tokens"] == TOKENS
    )
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["id"] for s in samples] == [f"q{i}" for i in range(7)] and [
        s["index"] for s in samples
    ] == list(range(7))
    assert [s["score"] for s in samples] == [1, 0, 1, 0, 1, 0, 1]
    page = Links()
    page.feed((out / "report.html").read_text())
    assert (
        page.outside == []
        and page.pictures == 7
        and sorted(page.cards) == ["card right"] * 4 + ["card wrong"] * 3
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "parts",
        "report.html",
        "result.json",
        "samples.jsonl",
        "settings.json",
    ]


def test_another_metric_judges_the_same_answers_without_asking_again(engine, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    exact = run.evaluate(engine, data, "exact", out=out, max_new_tokens=TOKENS)
    monkeypatch.setattr(Engine, "answers", lambda *a, **k: pytest.fail("asked again"))
    anls = run.evaluate(engine, data, "anls", out=out, max_new_tokens=TOKENS)
    assert (
        anls.resumed == 7
        and anls.metric == "anls"
        and [s.answer for s in anls.samples] == [s.answer for s in exact.samples]
    )
    limited = run.evaluate(engine, data, "exact", out=out, max_new_tokens=TOKENS, limit=2)
    assert limited.n == 2 and limited.score == 0.5
    console = terminal.console(file=io.StringIO(), width=80)
    console.print(results.table(limited))
    assert limited.name in console.file.getvalue().splitlines()[0]
    assert f"custom ({limited.metric})" in console.file.getvalue().splitlines()[0]  # the title is one line


def test_answers_of_other_settings_are_not_mixed(engine, data, tmp_path, model):
    out = tmp_path / "out"
    run.evaluate(engine, data, "exact", out=out, max_new_tokens=2, limit=2)
    with pytest.raises(
        PolymodalError, match=r"other settings \(sampling.max_new_tokens: \d+ -> \d+\).*--restart"
    ):
        run.evaluate(engine, data, "exact", out=out, max_new_tokens=3, limit=2)
    again = run.evaluate(engine, data, "exact", out=out, max_new_tokens=3, limit=2, restart=True)
    assert again.resumed == 0 and all(s.tokens <= 3 for s in again.samples)
    with pytest.raises(PolymodalError, match="not an evaluation's directory"):
        (tmp_path / "mine" / "parts").mkdir(parents=True)
        run.evaluate(engine, data, "exact", out=tmp_path / "mine", restart=True)
    assert (tmp_path / "mine" / "parts").is_dir()


def test_what_cannot_be_asked_counts_as_wrong_and_is_asked_again(engine, tmp_path):
    rows = [
        {"id": 1, "question": "a", "image": "gone.png", "answer": "x"},
        {"id": 2, "question": "b", "answer": "x"},
        {"id": 3, "question": "c"},
    ]
    path, out = tmp_path / "rows.json", tmp_path / "out"
    path.write_text(json.dumps(rows))
    result = run.evaluate(engine, path, "exact", out=out, max_new_tokens=2)
    assert (result.n, result.scored, result.errors, result.score) == (3, 2, 1, 0.0)
    assert "gone.png does not exist" in result.samples[0].error and result.samples[2].score is None
    assert "gone.png does not exist" in (out / "report.html").read_text()
    tiny.picture().save(tmp_path / "gone.png")
    mended = run.evaluate(engine, path, "exact", out=out, max_new_tokens=2)
    assert mended.errors == 0 and mended.resumed == 2


def test_likelihood_ranks_options_and_choice_is_the_default_with_options(engine, tmp_path):
    rows = [
        {"id": i, "question": "Which?", "options": ["one", "two", "three"], "answer": "two"} for i in range(3)
    ]
    ranked = run.evaluate(engine, rows, "likelihood")
    best = ranked.samples[0].answer
    assert best in "ABC" and ranked.score == float(best == "B")
    assert run.evaluate(engine, rows, max_new_tokens=3).metric == "choice"
    assert run.evaluate(engine, [{"question": "Which?", "answer": "x"}], max_new_tokens=3).metric == "exact"
    with pytest.raises(PolymodalError, match="There is no metric `accuracy`"):
        run.evaluate(engine, rows, "accuracy")
    turns = [
        {
            "messages": [
                {"role": "user", "content": "Say yes or no."},
                {"role": "assistant", "content": "no"},
            ],
            "options": ["yes", "no"],
        }
    ]
    assert run.evaluate(engine, turns, "likelihood").samples[0].answer in ("yes", "no")


# --- several processes ----------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 6))
def test_questions_are_dealt_out_evenly(costs, world):
    hands = store.deal(costs, world)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    loads = [sum(costs[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def on_a_rank(rank, model, data, out, options):
    result = run.evaluate(
        open_engine(model, device="cpu"), data, "exact", out=out, max_new_tokens=TOKENS, **options
    )
    return None if result is None else result.summary()


@pytest.mark.parametrize("world, count", [(2, 7), (3, 2)])
def test_any_length_on_any_number_of_ranks(model, engine, data, tmp_path, world, count):
    """7 questions on 2 ranks; 2 on 3, where one rank has nothing to do."""
    alone = run.evaluate(engine, data, "exact", max_new_tokens=TOKENS, limit=count)
    out = tmp_path / "out"
    results = harness.run(world, on_a_rank, str(model), str(data), str(out), {"limit": count})
    assert results[1:] == [None] * (world - 1) and results[0]["score"] == alone.score
    samples = [json.loads(line)["answer"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples == [s.answer for s in alone.samples]
    lines = sorted(f.read_text().count("\n") for f in (out / "parts").glob("*.jsonl"))
    assert sum(lines) == count and max(lines) - min(lines) <= 1


def failing_on_a_rank(rank, model, data, out):
    try:
        on_a_rank(rank, model, data, out, {})
    except PolymodalError as error:
        return str(error)


def test_an_error_at_the_start_is_every_ranks_error(model, data, tmp_path):
    out = tmp_path / "out"
    run.evaluate(open_engine(model, device="cpu"), data, "exact", out=out, max_new_tokens=1, limit=1)
    said = harness.run(2, failing_on_a_rank, str(model), str(data), str(out))
    assert said[0] == said[1] and "answers of other settings" in said[0]


CODE = """
import sys, time
from polymodal.evaluate import run, store

real = store.Store.writer

def writer(self, rank):
    write, lines = real(self, rank), []
    def slow(entry):
        write(entry)
        lines.append(entry)
        if len(lines) == 3:
            time.sleep(3600)
    return slow

store.Store.writer = writer  # after three answers a rank waits for its end
options = {"metric": "exact", "opening": {"device": "cpu"}, "max_new_tokens": 8, "batch_size": 1}
run.main(sys.argv[1], "custom", sys.argv[2], out=sys.argv[3], **options)
"""


def start(world, *words):
    """The command as torchrun would start it."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", CODE, *map(str, words)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return [subprocess.Popen(command, env={**shared, **rank}, **piped) for rank in ranks]


def test_killed_half_way_it_goes_on(model, engine, tmp_path):
    """kill -9 of both ranks while they answer, then one process: what was answered is not asked again."""
    data, out = write_rows(tmp_path / "data", count=12), tmp_path / "out"
    processes = start(2, model, data, out)
    parts, deadline = out / "parts", time.monotonic() + 600
    while len(before := [f for f in parts.glob("*.jsonl") if f.read_bytes().count(b"\n") == 3]) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            p.communicate() for p in processes
        ]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (out / "result.json").exists()
    with before[0].open("ab") as file:
        file.write(b'{"id": "q11", "answer": "half a li')  # as a kill in the middle of a write leaves it
    kept = {f: f.read_bytes() for f in before}
    options = {"metric": "exact", "opening": {"device": "cpu"}, "max_new_tokens": 8, "batch_size": 1}
    result = run.main(str(model), "custom", str(data), out=str(out), **options)
    assert all(f.read_bytes().startswith(lines) for f, lines in kept.items())
    assert (result.n, result.resumed) == (12, 6)
    alone = run.evaluate(engine, data, "exact", max_new_tokens=8)
    assert [s.answer for s in result.samples] == [s.answer for s in alone.samples]


# --- the page's parts -----------------------------------------------------------------------------


TAGS = ("<script>alert(1)</script>", "<b>", '"&', "<i>", "<u>", "<s>", "<c>", "<k>", "[/b0]")


def test_everything_from_data_is_escaped(tmp_path, capsys):
    """On the page and in the printed table: markup of data is text, in every place that data reaches."""
    script, bold, quote, italic, under, strike, category, key, closing = TAGS
    judged = results.Judged(
        0, strike, "f", script, (italic,), {"A": under}, {"group": category}, bold, quote, 1.0
    )
    other = replace(judged, groups={"group": closing}, score=0.0, error=under)
    samples, by = [judged, other], results.by_group([judged, other])
    found = results.Result(
        f"x{closing}", "<t>", "<m>", 0.5, samples, {key: script}, by, seconds=1.0, resumed=0
    )
    results.write(tmp_path, found, lambda i: [str(tmp_path / "<gone>.png")], 2, "answer")
    page = (tmp_path / "report.html").read_text()
    body = page.partition("<body>")[2].partition("<script>")[0]
    elements = {tag for tag, _ in re.findall(r"<(\w+)((?:\s[^<>]*)?)>", body)}
    own = "h1 h2 p div table thead tbody tr th td details summary button input b span"
    assert elements <= set(own.split()), elements
    text = html.unescape(re.sub(r"<[^<>]+>", "", body))
    for each in (*TAGS, "<gone>.png does not exist", "<t>"):
        assert each in text, each
    assert (
        '<div class="card wrong">' in page and '<div class="card right">' in page
    )  # coloured by the last answer
    terminal.console(width=200).print(results.table(found))
    printed = capsys.readouterr().out
    assert f"x{closing}: <t> (<m>)" in printed and f"group: {closing}" in printed


def test_thumbnails_keep_small_pictures_exact_and_reduce_large_ones():
    import base64
    import io

    from PIL import Image

    def back(picture):
        return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition("base64,")[2])))

    digit = tiny.picture(8, 8)
    assert list(back(thumbnail(digit)).getdata()) == list(digit.getdata()) and thumbnail(digit).exact
    assert max(back(thumbnail(tiny.picture(800, 600))).size) == 240


def test_the_default_directory_and_the_printed_table(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = run.main(
        str(model),
        "custom",
        str(data),
        metric="exact",
        opening={"device": "cpu"},
        max_new_tokens=TOKENS,
        limit=3,
    )
    printed = capsys.readouterr().out
    assert (tmp_path / "evaluations" / "tiny-custom" / "result.json").is_file() and result.n == 3
    assert (
        "category: even" in printed
        and "66.7 %" in printed
        and "evaluations/tiny-custom/result.json" in printed
    )
    sampled = run.evaluate(
        open_engine(model, device="cpu"), data, "exact", sampling=Sampling(TOKENS, temperature=1.5), limit=3
    )
    assert [s.answer for s in sampled.samples] != [s.answer for s in result.samples]
