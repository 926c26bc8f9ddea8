"""What is asked: benchmarks as facts (prompt, metric, length of answers), and their files as random-access questions.

Reads VLMEvalKit TSV (base64 pictures), CSV, JSON, JSONL and parquet; pictures are fetched when a question is, so a
file of any size costs only its texts in memory. Sees the data room and errors; knows no model and no rank.
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
from typing import Any, Literal

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Message
from polymodal.core.text import nearest
from polymodal.data.files import Delimited, open_rows
from polymodal.data.formats import RowReader
from polymodal.evaluate.metrics import as_list
from polymodal.recipe import Attr

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One thing to ask. `expected` empty: there is no answer to compare with (a test split), it is not scored."""

    id: str
    where: str  # "file.tsv, line 12"
    messages: tuple[Message, ...]
    text: str  # the question without options and pictures, for reports
    expected: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)  # {"category": ..., "split": ...}


@dataclass(frozen=True)
class Benchmark:
    """Facts of one benchmark. `instruction` ends every prompt without options; `lists`: answers are ["a", "b"]."""

    name: str
    metric: str | None  # None: choice when the rows have options, else exact
    max_new_tokens: int
    about: str
    instruction: str = ""
    labelled: bool = False  # "Question: ..." in front, as the choice prompts of VLMEvalKit have it
    lists: bool = False
    aliases: tuple[str, ...] = ()
    samples: int = 0  # of each prompt, for models that generate; 0: questions to a model that answers
    kind: Literal["answer", "generate", "transcribe"] = "answer"  # what the models do that it is for


SHORT = "Answer the question using a single word or phrase."
SELECT = "Please select the correct answer from the options above."

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("ai2d", "choice", 64, "AI2D: diagrams of school science, multiple choice", labelled=True, aliases=("ai2d_test",)),
    Benchmark(
        "mmmu", "choice_or_open", 512, "MMMU: college subjects, multiple choice and open questions, several pictures",
        labelled=True, lists=True, aliases=("mmmu_dev_val", "mmmu_val", "mmmu_dev"),
    ),
    Benchmark("chartqa", "relaxed", 64, "ChartQA: charts, numbers may be 5 % off", SHORT, aliases=("chartqa_test",)),
    Benchmark("docvqa", "anls", 64, "DocVQA: documents, ANLS with threshold 0.5", SHORT, lists=True, aliases=("docvqa_val", "docvqa_test")),
    Benchmark("custom", None, 128, "your own JSON, JSONL, TSV or CSV: question and answer, or conversations", aliases=("jsonl", "json", "tsv", "csv")),
    Benchmark("generation", None, 0, "your own prompts, for models that generate pictures or clips", aliases=("pictures", "clips"), samples=1, kind="generate"),
    Benchmark("vbench", None, 0, "VBench: its prompts (VBench_full_info.json), its layout of clips", aliases=("vbench_i2v",), samples=5, kind="generate"),
    Benchmark("speech", None, 0, "your own recordings with their texts: word and character error rates", aliases=("asr", "wer", "cer"), kind="transcribe"),
)  # fmt: skip


def find(name: str) -> Benchmark:
    """A benchmark by name or alias, whatever the case. Raises PolymodalError with the known ones."""
    wanted = name.lower().replace("-", "_")
    for benchmark in BENCHMARKS:
        if wanted == benchmark.name or wanted in benchmark.aliases:
            return benchmark
    known = ", ".join(b.name for b in BENCHMARKS)
    raise PolymodalError(
        f"There is no benchmark `{name}`.", f"Use one of: {known}; `custom` takes any file of questions."
    )


# --- questions -----------------------------------------------------------------------------------------------------


class _Given:
    """Rows handed over in memory, with what a file's rows have."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.path = rows, "rows"
        digest = hashlib.blake2b(digest_size=16)
        for row in rows:
            digest.update(repr(sorted((k, _content(v)) for k, v in row.items())).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def where(self, i: int) -> str:
        return f"row {i + 1}"


def _content(value: Any) -> Any:
    """What stands for a value in a fingerprint: pictures by their bytes, not by their place in memory."""
    if isinstance(value, (list, tuple)):
        return [_content(v) for v in value]
    if hasattr(value, "tobytes"):
        return hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()
    return value


def read(
    rows: str | os.PathLike | Sequence[Row], benchmark: Benchmark, media_dir: str | os.PathLike | None = None
) -> Questions:
    """The questions of a file, or of rows in memory. Relative media paths start from media_dir, else the file's place.

    Raises PolymodalError: the file is not there or not readable, a table has no question column, an id comes twice,
    multiple choice has no options.
    """
    if media_dir is not None and not os.path.isdir(media_dir):
        raise PolymodalError(f"The media directory {media_dir} does not exist.", "Check the path.")
    if not isinstance(rows, (str, os.PathLike)):
        return Questions(_Given(rows), benchmark, media_dir)
    path = os.fspath(rows)
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = nearest(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else [])
        raise PolymodalError(
            f"The file of questions {path} does not exist.",
            f"Did you mean {os.path.join(folder, near[0])}?" if near else "Give it with --data.",
        )
    return Questions(open_rows(path), benchmark, media_dir)


def _is_picture(column: str) -> bool:
    return re.fullmatch(r"images?(_\d+)?", column) is not None


class Questions(Sequence[Question]):
    """Rows as questions. Their texts are kept; pictures are read from the file by __getitem__ only. Picklable."""

    def __init__(self, rows: Any, benchmark: Benchmark, media_dir: str | os.PathLike | None = None):
        self.rows, self.benchmark, self.fingerprint = rows, benchmark, rows.fingerprint
        self.reader = RowReader(
            "auto", Attr(), rows.path, None if media_dir is None else os.fspath(media_dir)
        )
        if not len(rows):
            raise PolymodalError(f"{rows.path} holds no question.")
        self.texts: list[dict[str, Any]] = []
        self.ids: list[str] = []
        seen: dict[str, int] = {}
        for i in range(len(rows)):
            row = rows[i]
            self.texts.append({k: v for k, v in row.items() if not _is_picture(k)})
            name = next((row[k] for k in ("index", "id", "question_id") if row.get(k) not in (None, "")), i)
            key = str(name).strip()
            if key in seen:
                raise PolymodalError(
                    f"{rows.where(i)}: the id {key} was used before ({rows.where(seen[key])}).",
                    "Give every question an id of its own, or none.",
                )
            seen[key] = i
            self.ids.append(key)
        self.by_id = seen
        if benchmark.metric == "choice" and not any(
            _options(row, rows.where(i)) for i, row in enumerate(self.texts)
        ):
            raise PolymodalError(
                f"{rows.path}: {benchmark.name} is multiple choice, and no row has options (columns: {', '.join(map(str, rows[0]))[:120]}).",
                "Give the benchmark's own file, or take `custom` for other questions.",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, i: int) -> Question:
        """A question without its messages: what scoring and reports need. Nothing is read from the file."""
        row, where = self.texts[i], self.rows.where(i)
        groups = {k: str(row[k]) for k in ("category", "split") if row.get(k) not in (None, "")}
        if _conversation(row):
            turns, answer = _cut(row, where)
            words = [t for t in turns if t.get("role", t.get("from")) in ("user", "human")]
            text = _said(words[-1]) if words else ""
            return Question(
                self.ids[i], where, (), text, (answer,) if answer else (), _options(row, where), groups
            )
        return Question(
            self.ids[i], where, (), _question(row, where), self._expected(row), _options(row, where), groups
        )

    def __getitem__(self, i: int) -> Question:  # type: ignore[override]
        """Raises PolymodalError with the file and the line when the row's media cannot be had."""
        row, key = self.rows[i], self.key(i)
        if _conversation(row):
            turns, _ = _cut(row, key.where)
            name = "messages" if row.get("messages") else "conversations"
            pictures = [_bytes(value) for value in _media(row, "image")]
            record = self.reader.record(
                {**row, name: turns, **({"images": pictures} if pictures else {})}, key.where
            )
        else:
            content = place_media(
                self._prompt(row, key), self._pictures(row, i), _media(row, "video"), key.where
            )
            turn = {"role": "user", "content": content}
            record = self.reader.record({"messages": [turn], "system": row.get("system")}, key.where)
        if record.tools:
            raise PolymodalError(
                f"{key.where}: questions with tools are not evaluated.", "Leave out the column `tools`."
            )
        return replace(key, messages=record.messages)

    def candidates(self, i: int) -> list[str]:
        """Answers to compare by likelihood: the options' letters where the prompt lists them, else their texts.

        Raises PolymodalError for a question without options.
        """
        options = _options(self.texts[i], self.rows.where(i))
        if not options:
            raise PolymodalError(
                f"{self.rows.where(i)}: likelihood compares options, this question has none.",
                "Add `options`, or use another metric.",
            )
        return list(options.values() if _conversation(self.texts[i]) else options)

    def _pictures(self, row: Row, i: int) -> list[Any]:
        """Pictures of a row: bytes, paths or what JSON rows hold. In a table, a short cell is the index of another row."""
        found: list[Any] = []
        for column in row:
            if not _is_picture(column) or row[column] in (None, ""):
                continue
            value, seen = row[column], {i}
            if not isinstance(self.rows, Delimited):
                found += list(value) if isinstance(value, (list, tuple)) else [value]
                continue
            while len(value) <= 64 and value.strip() in self.by_id:
                at = self.by_id[value.strip()]
                if at in seen:
                    raise PolymodalError(
                        f"{self.rows.where(i)}: the picture refers to row {value.strip()}, which refers back."
                    )
                seen.add(at)
                value = self.rows[at][column] or ""
            found += [
                _decoded(text, self.rows.where(i))
                for text in as_list(value.strip())
                if text and text.lower() != "nan"
            ]
        if not found:
            found = [path for path in as_list(row.get("image_path")) if path and path.lower() != "nan"]
        return [_bytes(value) for value in found]

    def _expected(self, row: Row) -> tuple[str, ...]:
        value = row.get("answer", row.get("answers"))
        if value is None or (
            isinstance(value, str) and (not value.strip() or value.strip().lower() == "nan")
        ):
            return ()
        if isinstance(value, str) and not self.benchmark.lists:
            return (value,)
        return tuple(as_list(value))

    def _prompt(self, row: Row, key: Question) -> str:
        text = f"Question: {key.text}" if self.benchmark.labelled else key.text
        hint = str(row.get("hint") or "").strip()
        if hint and hint.lower() != "nan":
            text = f"Hint: {hint}\n{text}"
        if key.options:
            listed = "\n".join(f"{letter}. {value}" for letter, value in key.options.items())
            return f"{text}\nOptions:\n{listed}\n{SELECT}"
        return f"{text}\n{self.benchmark.instruction}" if self.benchmark.instruction else text


def _media(row: Row, kind: str) -> list[Any]:
    value = row.get(f"{kind}s") or row.get(kind)
    if not value:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _bytes(value: Any) -> Any:
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


def _question(row: Row, where: str) -> str:
    text = next((str(row[k]) for k in ("question", "prompt", "query") if row.get(k) not in (None, "")), None)
    if text is None:
        raise PolymodalError(
            f"{where}: there is no question (columns: {', '.join(map(str, row))[:120]}).",
            "A row needs `question`, or `messages`.",
        )
    return text.strip()


def _options(row: Row, where: str) -> dict[str, str]:
    given = row.get("options", row.get("choices"))
    if isinstance(given, Mapping):
        return {str(k).strip().upper(): str(v) for k, v in given.items() if v is not None}
    if given not in (None, ""):
        values = as_list(given)
        if len(values) > 26:
            raise PolymodalError(f"{where}: {len(values)} options, letters go to 26.")
        return dict(zip(string.ascii_uppercase, values, strict=False))
    cells = {letter: row.get(letter) for letter in string.ascii_uppercase}
    return {
        k: str(v)
        for k, v in cells.items()
        if v is not None and str(v).strip() and str(v).strip().lower() != "nan"
    }


def _conversation(row: Row) -> bool:
    return bool(row.get("messages") or row.get("conversations"))


def _said(turn: Mapping[str, Any]) -> str:
    content = turn.get("content", turn.get("value")) or ""
    if isinstance(content, str):
        return re.sub(r"<(?:image|video|audio)>\s*", "", content).strip()
    return " ".join(p if isinstance(p, str) else p.get("text") or "" for p in content).strip()


def _cut(row: Row, where: str) -> tuple[list[Mapping[str, Any]], str]:
    """A conversation -> the turns before its last answer, and that answer ("" when it ends with a question)."""
    turns = row.get("messages") or row.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise PolymodalError(f"{where}: the conversation is not valid JSON: {error}.") from None
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise PolymodalError(f"{where}: a conversation is a list of turns with a role and a content.")
    if turns and turns[-1].get("role", turns[-1].get("from")) in ("assistant", "gpt"):
        return turns[:-1], _said(turns[-1])
    return turns, ""


_MARK = re.compile(r"<image\s*(\d+)>|<(image|video)>")


def place_media(
    text: str, pictures: Sequence[Any], videos: Sequence[Any], where: str
) -> list[dict[str, Any]]:
    """Text with `<image 1>` (that picture, again if named again), `<image>` and `<video>` (the next one) -> typed parts.

    Media that the text does not name come first. Raises PolymodalError when a mark has no medium.
    """
    parts: list[dict[str, Any]] = []
    used: set[tuple[str, int]] = set()
    turn = {"image": 0, "video": 0}
    at = 0
    for mark in _MARK.finditer(text):
        kind = mark[2] or "image"
        have = pictures if kind == "image" else videos
        number = int(mark[1]) - 1 if mark[1] else turn[kind]
        if not 0 <= number < len(have):
            raise PolymodalError(
                f"{where}: {mark[0]} in the text has no {kind}, the row has {len(have)}.",
                "Every mark needs its medium.",
            )
        turn[kind] = number + 1
        parts += [{"type": "text", "text": text[at : mark.start()]}, {"type": kind, kind: have[number]}]
        used.add((kind, number))
        at = mark.end()
    parts.append({"type": "text", "text": text[at:]})
    rest = [
        (kind, i)
        for kind, have in (("image", pictures), ("video", videos))
        for i in range(len(have))
        if (kind, i) not in used
    ]
    first = [{"type": kind, kind: (pictures if kind == "image" else videos)[i]} for kind, i in rest]
    return [p for p in (*first, *parts) if p["type"] != "text" or p["text"].strip()]
