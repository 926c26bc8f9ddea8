"""What is printed of text that users and data bring: as it is, and nothing that a terminal obeys."""

import html
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from polymodal import pages
from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.evaluate import results
from polymodal.pages import charts

ODD = (
    "\x1b[31m", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b]52;c;aGk=\x07", "\x1bc", "\x1b[6n", "\x9b2J",
    "\r", "\r\n", "\b\b", "\x7f", "\x85", "\u202e", "\u2066", "\u2028", "\ufeff", "\udcff", "\U000e0041", "\x00",
    "[bold]", "[/b0]", "[link=http://x]", ":smile:", "{% x %}", "</script>", "&quot;", "%s", "{0}",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=6), min_size=1, max_size=6).map("".join)
SEEN = re.compile("[^\x20-\x7e\t\n]")
FAST = settings(max_examples=60, deadline=None, derandomize=True)


def obeyed(text: str) -> list[str]:
    """Characters that a terminal obeys, that are not seen, or that turn the order of a line around."""
    return re.findall(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text
    )


@FAST
@given(TEXT)
def test_plain_text_has_nothing_that_a_terminal_obeys(text):
    shown = terminal.plain(text)
    assert not obeyed(shown) and terminal.plain(shown) == shown
    assert not obeyed(terminal.line(text)) and "\n" not in terminal.line(text)
    kept = "".join(re.findall(r"[a-zA-Z0-9\[\]/{}%:&;<>=]", text))
    assert kept == "".join(re.findall(r"[a-zA-Z0-9\[\]/{}%:&;<>=]", re.sub(r"\\u[0-9a-f]{4}", "", shown)))


@FAST
@given(st.dictionaries(TEXT, TEXT, max_size=3))
def test_json_is_the_same_json_after_it(values):
    for ascii_only in (True, False):
        written = json.dumps(values, ensure_ascii=ascii_only)
        assert json.loads(terminal.plain(written)) == json.loads(written)


@FAST
@given(TEXT, TEXT, TEXT)
def test_tables_titles_and_lines_show_text_as_it_is(title, name, cell):
    out = io.StringIO()
    console = terminal.console(file=out, width=400)
    table = Table(title=title, box=None, min_width=390)
    table.add_column(name)
    table.add_row(cell)
    table.add_row(terminal.styled((cell, "bold"), cell))
    console.print(table)
    console.print(cell, terminal.styled(name))
    said = out.getvalue()
    assert not obeyed(said)
    words = {word for text in (title, name, cell) for word in re.findall(r"\[[a-z/=:0-9.]+\]|:smile:", text)}
    assert all(word in said for word in words)


@FAST
@given(TEXT, TEXT, TEXT)
def test_the_result_of_an_evaluation_is_text_on_the_terminal_and_on_its_page(category, name, answer):
    judged = results.Judged(
        0, name, "f", answer, (answer,), {"A": answer}, {"category": category}, answer, answer, 1.0
    )
    samples = [judged, results.replace(judged, groups={"category": "other"}, score=0.0)]
    found = results.Result(name, "custom", "exact", 0.5, samples, {name: answer}, results.by_group(samples))
    out = io.StringIO()
    terminal.console(file=out, width=400).print(results.table(found))
    assert not obeyed(out.getvalue())
    page = results._page(found, lambda i: [], 2, "answer")
    body = page.partition("<body>")[2]
    assert body.count("<script>") == page.count("</script>") == 1  # the page's own
    assert not obeyed(body)
    shown = html.escape(terminal.plain(answer), quote=False)
    assert shown in body.replace("&#34;", '"').replace("&#39;", "'")


@FAST
@given(TEXT)
def test_words_on_charts_are_text(text):
    chart = charts.curve(text, [(0, 1.0), (1, 2.0)], mark=(1, text))
    chart.block(0, 0, 1, 1, text, 1.0, text)
    drawn = pages._environment().get_template("parts.html").module.chart(chart)
    tags = set(re.findall(r"<(/?\w+)", drawn))
    assert tags <= {
        f"{end}{tag}" for end in ("", "/") for tag in ["div", "svg", "path", "line", "text", "rect", "title"]
    }


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], **options)


HOSTILE = "x[/b]\x1b]0;pwn\x07\x1b[2J\x9b31m\u202e\udcff → é"
GUARDED = f"""
import logging, sys, warnings
from polymodal.core import terminal
terminal.start()
text = {HOSTILE!r}
print(text)
warnings.warn(text)
logging.getLogger("a.library").warning(text)
sys.stderr.write("\\r50 %\\x1b[A\\x1b[0m")
terminal.say(text)
raise ValueError(text)
"""


def test_what_libraries_and_tracebacks_print_is_guarded():
    done = run(GUARDED, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 1 and "ValueError: x[/b]" in said and "→ é" in said
    assert not obeyed(said.replace("\r", ""))
    ascii_only = run(GUARDED, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 1 and "\\u2192 \\u00e9" in ascii_only.stdout.decode("ascii")


def on_terminal(code: str, **variables: str) -> str:
    """What a process prints on a terminal of 60 columns."""
    first, second = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"COLUMNS": "60", "TERM": "xterm", **variables}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=second, stdout=second, stderr=second, env=env, close_fds=True
    )
    os.close(second)
    said = b""
    while True:
        try:
            piece = os.read(first, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    child.wait(timeout=60)
    os.close(first)
    return said.decode()


BAR = f"""
from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
terminal.start()
text = {HOSTILE!r}
with terminal.Bar(text, 3, error=False) as bar:
    bar.print("above " + text)
    bar.update(2, below="below " + text)
terminal.report(PolymodalError(text + " is wrong because of " + "many words " * 9 + "/a/long/path/that/is/copied/whole/by/users/file.json.", "Mend it.\\nerror: not an error of its own"))
"""


def test_bars_and_errors_on_a_terminal():
    said = on_terminal(BAR)
    colours = re.compile(r"\x1b\[(?:[0-9;]*[mAK]|\?25[hl]|2K)")
    assert colours.search(said) and not obeyed(colours.sub("", said).replace("\r", ""))
    assert "2/3" in said and "above x[/b]" in said and "below x[/b]" in said
    seen = colours.sub("", said).replace("\r", "")
    rows = seen[seen.rindex("error: x") :].split("\n")
    assert all(len(row) <= 60 for row in rows) and len(rows) > 3
    assert any("/a/long/path/that/is/copied/whole/by/users/file.json." in row for row in rows)
    assert not any(row.startswith("error: not") for row in rows)
    dumb = on_terminal(BAR, TERM="dumb")
    assert not obeyed(dumb.replace("\r", "")) and "above x[/b]" in dumb and "2/3" not in dumb
    assert "\x1b[1;31m" not in on_terminal(BAR, NO_COLOR="1")


@pytest.mark.parametrize("words", [["--help"], ["recipe", "docs"]])
def test_a_full_disk_and_a_reader_that_has_enough(words):
    command = [sys.executable, "-m", "polymodal", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: standard output could not be written")
    assert done.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and not done.stderr


def test_no_word_is_cut_on_a_narrow_terminal():
    env = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "polymodal", "train", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert "\u2026" not in said and max(map(len, said.splitlines())) > 40
    assert terminal.console(file=io.StringIO(), _environ={"COLUMNS": "40"}).width == 80


def test_names_of_files_and_rows(tmp_path):
    """`data check` of a file and rows with such names; the answer is text and readable as JSON."""
    file = tmp_path / "a[b]\x1b]0;p\x07\u202e\n2.jsonl"
    rows = [{"bad\x1b[31m[/x]": 1}, {"images": ["\x9b2J.png"], "messages": [{"role": "u\r", "content": "x"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "polymodal", "data", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not obeyed(done.stdout + done.stderr)
    assert (
        "a[b]\\u001b]0;p\\u0007\\u202e\\n2.jsonl, line 1" in done.stdout
        and "bad\\u001b[31m[/x]" in done.stdout
    )
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert str(file) in json.loads(done.stdout)["problems"][0] and not obeyed(done.stdout)


def test_errors_are_one_line_for_each_of_their_sentences(capsys):
    listed = "would not train, for 2 reasons:\n1. a\nb is bad.\n2. c is bad."
    terminal.report(PolymodalError(listed, "Mend them."))
    assert capsys.readouterr().err.splitlines() == [
        "error: would not train, for 2 reasons:",
        "1. a\\nb is bad.",
        "2. c is bad. Mend them.",
    ]


def test_the_guard_is_where_commands_begin():
    for file in ("__main__.py", "convert/command.py"):
        assert "terminal.start()" in (Path(terminal.__file__).parents[1] / file).read_text()
