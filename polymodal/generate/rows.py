"""JSON lines answered in their order (`polymodal chat --json`); a second start goes on after the output's."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Message
from polymodal.core.terminal import say
from polymodal.core.text import check_characters, parse_json
from polymodal.data.formats import RowReader
from polymodal.generate.engine import Answer, Engine, Sampling
from polymodal.recipe import Attr

ADDED = ("answer", "error", "expected", "answer_boxes")
"""Keys of an output row that need not be the input's; a row's own `answer` is kept as `expected`."""


@dataclass(frozen=True)
class Row:
    """A line of the input. problem: why it is no JSON."""

    number: int
    where: str
    value: Any
    problem: PolymodalError | None = None


def conversation(row: Row, reader: RowReader, system: str | None) -> tuple[Message, ...]:
    """What the model is asked: `messages` up to the last question, or `prompt` with image(s) and video(s).

    Raises PolymodalError.
    """
    if row.problem is not None:
        raise row.problem
    value, where = row.value, row.where
    if not isinstance(value, Mapping):
        raise PolymodalError(
            f"{where}: a row is an object, this is a {type(value).__name__}.",
            'Write {"prompt": ..., "image": ...} or {"messages": [...]}.',
        )
    name = next((n for n in ("messages", "conversations") if value.get(n)), None)
    if name is None:
        name, prompt = "messages", value.get("prompt", value.get("question"))
        if not isinstance(prompt, str) or not prompt.strip():
            keys = ", ".join(map(str, value)) or "none"
            raise PolymodalError(
                f"{where}: there is no `prompt` and there are no `messages` (keys: {keys}).",
                'Write {"prompt": ..., "image": ...}.',
            )
        value = {**value, name: [{"role": "user", "content": prompt}]}
    turns = value[name]
    last = turns[-1] if isinstance(turns, list) and turns else None
    answered = isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt")
    if answered and last.get("content", last.get("value")) is None:  # nothing that boxes could be in
        value, answered = {**value, name: turns[:-1]}, False
    record = reader.record(value, where)
    if record.tools:
        raise PolymodalError(
            f"{where}: rows with tools are not answered here.", "Leave out the column `tools`."
        )
    if {"start", "end"} & record.extra.keys() and any(medium.kind == "audio" for medium in record.media):
        raise PolymodalError(
            f"{where}: excerpts (`start`, `end`) are not answered here.", "Cut the recording into files."
        )
    messages = record.messages[:-1] if answered else record.messages
    return (Message("system", (system,)), *messages) if system and messages[0].role != "system" else messages


def answer_rows(
    engine: Engine,
    lines: Iterable[str],
    name: str,
    out: TextIO,
    done: Sequence[Any] = (),
    *,
    system: str | None = None,
    sampling: Sampling = Sampling(),
    batch_size: int = 16,
    media_dir: str | None = None,
) -> tuple[int, int]:
    """Write each row with its `answer` (or `error`). Returns (answered now, failed now).

    name: of the input, "-" for standard input. done: output rows of an earlier start, which must be the
    answers of the first lines. Raises PolymodalError when they are not.
    """
    reader = RowReader("auto", Attr(), name if name != "-" else "", media_dir)
    seen = answered = failed = 0
    for rows in _available(_parsed(lines, "line" if name == "-" else f"{name}, line"), 8 * batch_size):
        for old, row in zip(done[seen:], rows, strict=False):
            if _input(old) != _input(row.value):
                raise PolymodalError(
                    f"The output's row for {row.where} is not an answer to it.",
                    "Give another output file, or remove this one.",
                )
        new = rows[max(0, len(done) - seen) :]
        seen += len(rows)
        asked = [(str(row.number), functools.partial(conversation, row, reader, system)) for row in new]
        answers = dict(engine.answers(asked, sampling, batch_size=batch_size))
        for i, row in enumerate(new):
            out.write(json.dumps(_with_answer(row.value, answers[i]), ensure_ascii=False) + "\n")
        out.flush()
        answered += len(new)
        failed += sum(isinstance(answer, PolymodalError) for answer in answers.values())
    if seen < len(done):
        raise PolymodalError(
            f"The output has {len(done)} rows, {name} only {seen}.",
            "Give another output file, or remove this one.",
        )
    return answered, failed


def _parsed(lines: Iterable[str], place: str) -> Iterator[Row]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where, value, problem = f"{place} {number}", {}, None
        try:
            value = parse_json(text)
            check_characters(value, where)
        except PolymodalError as error:
            value, problem = {}, error
        except ValueError as error:
            problem = PolymodalError(
                f"{where}: not valid JSON: {error}.", "Correct the row: one JSON object a line."
            )
        yield Row(number, where, value, problem)


def _available(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    """At most `most` rows at a time: those read so far, to answer a line before the next one comes."""
    waiting: queue.Queue[Row | Exception | None] = queue.Queue(4 * most)

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(None)
        except Exception as error:  # raised where the rows are used
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        chunk: list[Row] = []
        while len(chunk) < most and not ended and (not chunk or not waiting.empty()):
            item = waiting.get()
            if isinstance(item, Exception):
                raise item
            ended = item is None
            chunk += [item] if item is not None else []
        if chunk:
            yield chunk


def _input(row: Any) -> Any:
    return {k: v for k, v in row.items() if k not in ADDED} if isinstance(row, Mapping) else {}


def _with_answer(value: Any, answer: Answer | PolymodalError) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        value = {"row": value}
    kept = {k: v for k, v in value.items() if k not in ("answer", "error", "answer_boxes")}
    if "answer" in value:
        kept.setdefault("expected", value["answer"])
    if isinstance(answer, Answer):
        found = {"answer_boxes": answer.boxes} if answer.boxes else {}
        return {**kept, "answer": answer.text, **found}
    return {**kept, "answer": None, "error": str(answer)}


def _answered(path: Path) -> list[Any]:
    """Whole rows of an output that an earlier start left; half a line at its end is cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise PolymodalError(
            f"{path} is not an output of this command (its lines are not JSON), nothing is written there.",
            "Give another output file.",
        ) from None
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return rows


def run(engine: Engine, source: str, out: str | None, **options: Any) -> int:
    """The command: from a file or "-" to a file or standard output. Returns 2 when rows failed, else 0.

    options: those of `answer_rows`.
    """
    done = _answered(Path(out)) if out else []
    with contextlib.ExitStack() as files:
        lines = sys.stdin if source == "-" else files.enter_context(open(source, encoding="utf-8-sig"))
        try:
            target = files.enter_context(open(out, "a", encoding="utf-8")) if out else sys.stdout
        except OSError as error:
            raise PolymodalError(
                f"{out} cannot be written: {error.strerror}.", "Choose another --out."
            ) from None
        try:
            answered, failed = answer_rows(engine, lines, source, target, done, **options)
        except UnicodeDecodeError as error:
            raise PolymodalError(
                f"{source} is not UTF-8 text ({error.reason}).", "Save the file as UTF-8."
            ) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise PolymodalError(
                f"{out or 'standard output'} cannot be written: {error.strerror}.",
                "Free space; the same command goes on from here.",
            ) from None
    failed += sum(1 for row in done if isinstance(row, Mapping) and row.get("error"))
    if out:
        say(f"{answered} rows answered, {len(done)} were there before: {out}", error=True)
    if failed:
        say(f"{failed} rows could not be answered; `error` in their row says why.", error=True)
    return 2 if failed else 0
