"""Benchmarks as facts (benchmarks.yaml), and their files as questions with random access.

Reads VLMEvalKit TSV (base64 pictures), CSV, JSON, JSONL and parquet; pictures are fetched when a question is,
so a file of any size costs only its texts in memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Box, Message, Record
from polymodal.core.text import nearest
from polymodal.data.box_columns import COLUMNS, MARK
from polymodal.data.files import Delimited, open_rows
from polymodal.data.formats import RowReader
from polymodal.evaluate import together
from polymodal.evaluate.metrics import as_list
from polymodal.recipe import Attr

Row = Mapping[str, Any]
_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
SELECT = "Please select the correct answer from the options above."


@dataclass(frozen=True)
class Benchmark:
    """Facts of one benchmark, as explained in benchmarks.yaml."""

    name: str
    kind: Literal["answer", "generate", "transcribe", "speak"]
    metric: str | None = None
    max_new_tokens: int = 0
    instruction: str = ""
    prompt: str = ""
    unasked: str = ""
    labelled: bool = False
    lists: bool = False
    samples: int = 0
    together: str = ""
    groups: Sequence[str] = ()
    aliases: Sequence[str] = ()


def find(name: str) -> Benchmark:
    """A benchmark by name or alias, whatever the case. Raises PolymodalError with the known ones."""
    table = yaml.safe_load((Path(__file__).parent / "benchmarks.yaml").read_text(encoding="utf-8"))
    asked = name.lower().replace("-", "_")
    for known, facts in table.items():
        if asked in (known, *facts["aliases"]):
            return Benchmark(known, **facts)
    raise PolymodalError(
        f"There is no benchmark `{name}`.",
        f"Use one of: {', '.join(table)}; `custom` takes any file of questions.",
    )


# --- questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One thing to ask. `expected` empty (a test split): it is not scored."""

    id: str
    where: str  # "file.tsv, line 12"
    messages: tuple[Message, ...]
    text: str  # the question without options and pictures, for reports
    expected: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)  # {"category": ..., "split": ...}


def read(
    rows: str | os.PathLike | Sequence[Row], benchmark: Benchmark, media_dir: str | os.PathLike | None = None
) -> Questions:
    """The questions of a file, or of rows in memory. Relative media paths start from media_dir, else the
    file's place.

    Raises PolymodalError: no such file, no question column, an id twice, multiple choice without options.
    """
    if media_dir is not None and not os.path.isdir(media_dir):
        raise PolymodalError(f"The media directory {media_dir} does not exist.", "Check the path.")
    if not isinstance(rows, (str, os.PathLike)):
        return Questions(_InMemory(rows), benchmark, media_dir)
    path = os.fspath(rows)
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = nearest(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [])
        raise PolymodalError(
            f"The file of questions {path} does not exist.",
            f"Did you mean {os.path.join(folder, near[0])}?" if near else "Give it with --data.",
        )
    return Questions(open_rows(path), benchmark, media_dir)


class _InMemory(list):
    """A list of rows with what the rows of a file have."""

    path = "rows"

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for row in self:
            digest.update(repr(sorted((k, _content(v)) for k, v in row.items())).encode())
        return digest.hexdigest()

    def where(self, i: int) -> str:
        return f"row {i + 1}"


def _content(value: Any) -> Any:
    """What stands for a value in a fingerprint: pictures by their pixels, not by their address in memory."""
    if isinstance(value, (list, tuple)):
        return [_content(v) for v in value]
    if hasattr(value, "tobytes"):
        return hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()
    return value


class Questions(Sequence[Question]):
    """Rows as questions. Their texts are kept, pictures are read by __getitem__ only. Picklable."""

    def __init__(self, rows: Any, benchmark: Benchmark, media_dir: str | os.PathLike | None = None):
        self.rows, self.benchmark, self.fingerprint = rows, benchmark, rows.fingerprint
        directory = None if media_dir is None else os.fspath(media_dir)
        self.reader = RowReader("auto", Attr(), rows.path, directory)
        if not len(rows):
            raise PolymodalError(f"{rows.path} holds no question.", "Check --data: there is no row in it.")
        every = (rows[i] for i in range(len(rows)))
        self.texts = [{k: v for k, v in row.items() if not _is_picture(k)} for row in every]
        self.positions: dict[str, int] = {}
        for i, row in enumerate(self.texts):
            key = str(_first(row, "index", "id", "question_id", default=i)).strip()
            if key in self.positions:
                raise PolymodalError(
                    f"{rows.where(i)}: the id {key} was used before ({rows.where(self.positions[key])}).",
                    "Give every question an id of its own, or none.",
                )
            self.positions[key] = i
        self.ids = list(self.positions)
        if benchmark.metric == "choice" and not any(self._options(i) for i in range(len(rows))):
            raise PolymodalError(
                f"{rows.path}: {benchmark.name} is multiple choice, and no row has options "
                f"({_columns(rows[0])}).",
                "Give the benchmark's own file, or take `custom` for other questions.",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, i: int) -> Question:
        """A question without its messages: what scoring and reports need. Nothing is read from the file."""
        row, where = self.texts[i], self.rows.where(i)
        names = ("category", "split", *self.benchmark.groups)
        groups = {k: str(row[k]) for k in names if row.get(k) not in (None, "")}
        if _is_conversation(row):
            turns, answer = _split_answer(_turns(row, where))
            asked = [t for t in turns if t.get("role", t.get("from")) in ("user", "human")]
            text = _text_of(asked[-1]) if asked else ""
            expected: tuple[str, ...] = (answer,) if answer else ()
        else:
            text = _question(row, where, self.benchmark.unasked)
            expected = _expected(row, self.benchmark.lists)
        return Question(self.ids[i], where, (), text, expected, self._options(i), groups)

    def __getitem__(self, i: int) -> Question:  # type: ignore[override]
        """Raises PolymodalError with the file and the line when the row's media cannot be had."""
        key, record = self.key(i), self._record(i)
        if record.tools:
            raise PolymodalError(
                f"{key.where}: questions with tools are not evaluated.", "Leave out the column `tools`."
            )
        return replace(key, messages=record.messages[:-1] if _answered(record) else record.messages)

    def boxes(self, i: int) -> tuple[Box, ...]:
        """Boxes that the answer to a question is expected to hold. Raises PolymodalError."""
        record = self._record(i)
        return replace(record, messages=record.messages[-1:]).boxes if _answered(record) else ()

    @property
    def of_boxes(self) -> bool:
        """Whether the answer to the first question is declared as boxes."""
        row = self.texts[0]
        if _is_conversation(row):
            return (
                _box_column(row) is not None
                and "<" in _split_answer(_turns(row, ""))[1]
                and bool(self.boxes(0))
            )
        return _box_column(row) is not None and not _expected(row, False)

    def _record(self, i: int) -> Record:
        """A question with its answer, where it is a conversation or boxes."""
        row, key = self.rows[i], self.key(i)
        if _is_conversation(row):
            turns = _turns(row, key.where)
            row = {**row, "messages" if row.get("messages") else "conversations": turns}
            pictures = [_encoded(value) for value in _media(row, "image")]
            if pictures:
                row["images"] = pictures
        else:
            prompt = self._prompt(row, key)
            content = place_media(prompt, self._pictures(row, i), _videos(row, key.where), key.where)
            turns = [{"role": "user", "content": content}]
            objects = _box_column(row)
            if objects is not None and not MARK.search(prompt):
                turns.append({"role": "assistant", "content": "<objects>"})
            row = {"messages": turns, "system": row.get("system"), "objects": objects}
        return self.reader.record(row, key.where)

    def candidates(self, i: int) -> list[str]:
        """Answers to compare by likelihood: the options' letters where the prompt lists them, else texts.

        Raises PolymodalError for a question without options.
        """
        options = self._options(i)
        if not options:
            raise PolymodalError(
                f"{self.rows.where(i)}: likelihood compares options, this question has none.",
                "Add `options`, or use another metric.",
            )
        return list(options.values() if _is_conversation(self.texts[i]) else options)

    def _options(self, i: int) -> dict[str, str]:
        """Letter -> text, of a mapping, a list, or the columns A, B, ..."""
        row = self.texts[i]
        given = next(
            (row[name] for name in ("options", "choices", "candidates") if not _none(row.get(name))), None
        )
        if isinstance(given, Mapping):
            return {str(k).strip().upper(): str(v) for k, v in given.items() if v is not None}
        if given in (None, ""):
            letters = {c: row.get(c, row.get(f"choice_{c.lower()}")) for c in string.ascii_uppercase}
            return {c: str(text) for c, text in letters.items() if not _is_empty(text)}
        values = _unmarked(as_list(given))
        if len(values) > 26:
            raise PolymodalError(
                f"{self.rows.where(i)}: {len(values)} options, letters go to 26.",
                "Leave out options, or split the question.",
            )
        return dict(zip(string.ascii_uppercase, values, strict=False))

    def _pictures(self, row: Row, i: int) -> list[Any]:
        """Pictures of a row: bytes, paths or base64. A table's short cell is the index of another row."""
        pictures: list[Any] = []
        for column, value in row.items():
            if not _is_picture(column) or value in (None, ""):
                continue
            if not isinstance(self.rows, Delimited):
                pictures += list(value) if isinstance(value, (list, tuple)) else [value]
                continue
            seen = {i}
            while len(value) <= 64 and value.strip() in self.positions:
                at = self.positions[value.strip()]
                if at in seen:
                    raise PolymodalError(
                        f"{self.rows.where(i)}: the picture refers to row {value.strip()}, "
                        "which refers back.",
                        "Put the picture itself into one of the two rows.",
                    )
                seen.add(at)
                value = self.rows[at][column] or ""
            cells = [text for text in as_list(value.strip()) if not _is_empty(text)]
            pictures += [_decoded(text, self.rows.where(i)) for text in cells]
        if not pictures:
            pictures = [path for path in as_list(row.get("image_path")) if not _is_empty(path)]
        return [_encoded(value) for value in pictures]

    def _prompt(self, row: Row, key: Question) -> str:
        text = f"Question: {key.text}" if self.benchmark.labelled else key.text
        text = self.benchmark.prompt.format(text) if self.benchmark.prompt else text
        if not _is_empty(row.get("hint")):
            text = f"Hint: {str(row['hint']).strip()}\n{text}"
        instruction = self.benchmark.instruction
        if instruction and text.lower().rstrip(" .").endswith(instruction.lower().rstrip(" .")):
            instruction = ""
        if key.options:
            listed = "\n".join(f"{letter}. {value}" for letter, value in key.options.items())
            return f"{text}\nOptions:\n{listed}\n{SELECT}"
        return f"{text}\n{instruction}" if instruction else text

    def together(self, i: int) -> str:
        """Key of the questions that question i is judged with."""
        return together.key(self.benchmark.together, self.ids[i], self.texts[i])


# --- cells of a row -------------------------------------------------------------------------------


def _is_picture(column: str) -> bool:
    return re.fullmatch(r"images?(_\d+)?", column) is not None


def _is_conversation(row: Row) -> bool:
    return bool(row.get("messages") or row.get("conversations"))


def _is_empty(cell: Any) -> bool:
    """No value, or what pandas wrote in its place."""
    return cell is None or str(cell).strip().lower() in ("", "nan")


def _first(row: Row, *names: str, default: Any = None) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), default)


def _columns(row: Row) -> str:
    return f"columns: {', '.join(map(str, row))[:120]}"


def _none(value: Any) -> bool:
    """No value: of any type."""
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def _unmarked(options: list[str]) -> list[str]:
    """Options without the letters that a list writes in front of them: ["A. red", "B. blue"]."""
    marks = [re.match(r"\(?([A-Z])[.):]\s*(?=\S)", option) for option in options]
    if options and all(mark and mark[1] == c for mark, c in zip(marks, string.ascii_uppercase, strict=False)):
        return [option[mark.end() :] for option, mark in zip(options, marks, strict=True) if mark]
    return options


def _videos(row: Row, where: str) -> list[Any]:
    """Videos of a row: `video_path`, else `video`, which may be an id; MVBench's names are below `prefix`."""
    if not _is_empty(row.get("start")) and not _is_empty(row.get("end")):
        raise PolymodalError(
            f"{where}: the question is about a part of its video ({row['start']} to {row['end']} s).",
            "Cut the clip into a file of its own, and leave out start and end.",
        )
    path = row.get("video_path")
    found = [path] if not _is_empty(path) else _media(row, "video")
    prefix = row.get("prefix")
    return found if _is_empty(prefix) else [os.path.join(str(prefix), str(each)) for each in found]


def _question(row: Row, where: str, otherwise: str = "") -> str:
    """otherwise: the question of rows without one."""
    text = _first(row, "question", "prompt", "query", default=otherwise or None)
    if text is None:
        raise PolymodalError(
            f"{where}: there is no question ({_columns(row)}).", "A row needs `question`, or `messages`."
        )
    return str(text).strip()


def _expected(row: Row, lists: bool) -> tuple[str, ...]:
    """lists: a text may be that of a list."""
    value = _first(row, "answer", "answers", "gt_answer")
    if value is None and not _is_empty(row.get("correct_choice")):  # LongVideoBench: the option's place
        value = string.ascii_uppercase[int(row["correct_choice"])]
    if isinstance(value, str) and (_is_empty(value) or not lists):
        return () if _is_empty(value) else (value,)
    return tuple(as_list(value))


def _media(row: Row, kind: str) -> list[Any]:
    value = row.get(f"{kind}s") or row.get(kind) or []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _encoded(value: Any) -> Any:
    """A PIL image as PNG bytes; paths, bytes and base64 as they are."""
    if not hasattr(value, "save"):
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    buffer = io.BytesIO()
    value.save(buffer, format="PNG")
    return buffer.getvalue()


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise PolymodalError(
            f"{where}: the picture is neither base64 nor the index of another row.",
            "Write the file again, or use a column image_path.",
        ) from None


def _text_of(turn: Row) -> str:
    content = turn.get("content", turn.get("value")) or ""
    if isinstance(content, str):
        return re.sub(r"<(?:image|video|audio)>\s*", "", content).strip()
    return " ".join(p if isinstance(p, str) else p.get("text") or "" for p in content).strip()


def _box_column(row: Row) -> Any:
    """The boxes that a row declares: in `objects` or `boxes`, or as `bbox` beside its question."""
    value = _first(row, *COLUMNS)
    if value is not None:
        return value
    if not _is_empty(row.get("bbox")):
        return {name: row.get(name) for name in ("bbox", "bbox_format", "bbox_type")}
    answer = row.get("answer")
    if isinstance(answer, str) and _BOX.fullmatch(answer.strip()):  # a table's "[x1, y1, x2, y2]"
        return {"bbox": json.loads(answer)}
    return None


def _answered(record: Record) -> bool:
    return record.messages[-1].role == "assistant"


def _turns(row: Row, where: str) -> list[Row]:
    """The turns of a conversation."""
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise PolymodalError(
                f"{where}: the conversation is not valid JSON: {error}.",
                'Write the column as JSON: [{"role": "user", "content": ...}, ...].',
            ) from None
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise PolymodalError(
            f"{where}: a conversation is a list of turns with a role and a content.",
            'Write [{"role": "user", "content": ...}, ...].',
        )
    return turns


def _split_answer(turns: list[Row]) -> tuple[list[Row], str]:
    """The turns before the last answer of a conversation, and that answer ("" where there is none)."""
    if turns and turns[-1].get("role", turns[-1].get("from")) in ("assistant", "gpt"):
        return turns[:-1], _text_of(turns[-1])
    return turns, ""


def place_media(
    text: str, pictures: Sequence[Any], videos: Sequence[Any], where: str
) -> list[dict[str, Any]]:
    """Text with `<image 1>` (that picture), `<image>` and `<video>` (the next one) as typed parts.

    Media that the text does not name come first. Raises PolymodalError when a mark has no medium.
    """
    media = {"image": pictures, "video": videos}
    parts: list[dict[str, Any]] = []
    used: set[tuple[str, int]] = set()
    following = {"image": 0, "video": 0}
    at = 0
    for mark in re.finditer(r"<image\s*(\d+)>|<(image|video)>", text):
        kind = mark[2] or "image"
        number = int(mark[1]) - 1 if mark[1] else following[kind]
        if not 0 <= number < len(media[kind]):
            raise PolymodalError(
                f"{where}: {mark[0]} in the text has no {kind}, the row has {len(media[kind])}.",
                "Every mark needs its medium.",
            )
        following[kind] = number + 1
        parts += [
            {"type": "text", "text": text[at : mark.start()]},
            {"type": kind, kind: media[kind][number]},
        ]
        used.add((kind, number))
        at = mark.end()
    parts.append({"type": "text", "text": text[at:]})
    unnamed = [
        {"type": kind, kind: medium}
        for kind, values in media.items()
        for i, medium in enumerate(values)
        if (kind, i) not in used
    ]
    return [p for p in (*unnamed, *parts) if p["type"] != "text" or p["text"].strip()]
