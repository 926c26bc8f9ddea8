"""`polymodal chat`: one answer, a conversation in the terminal, or files of questions answered row by row.

Three ways to use an engine: `once`, `Terminal`, `rows`; `main` chooses among them by what was asked for. Sees the
engine, opening, the data room's reader of rows and errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.data import media as decoders
from polymodal.data.formats import RowReader
from polymodal.generate.engine import Answer, Engine, Sampling
from polymodal.recipe import Attr

HELP = """/image FILE   show a picture with the next message
/video FILE   show a video with the next message
/reset        forget the conversation
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def medium(kind: str, path: str) -> Media:
    """A picture or video for a message, looked at now. Raises PolymodalError: not there, not a picture, not a video."""
    path = os.path.expanduser(path)
    try:
        if kind == "image":
            decoders.image(path)
        else:
            decoders.video_header(path)
    except PolymodalError as error:
        hint = "Check the path." if not os.path.exists(path) else error.hint
        raise PolymodalError(error.message[:1].upper() + error.message[1:], hint) from None
    return Media(kind, path)  # type: ignore[arg-type]


def once(
    engine: Engine,
    prompt: str,
    media: Sequence[Media] = (),
    system: str | None = None,
    sampling: Sampling = Sampling(),
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """One answer to one prompt; `<image>` and `<video>` in it say where media stand, else they come first."""
    return engine.answer(_turns(prompt, media, system), sampling, on_text=on_text)


def _turns(prompt: str, media: Sequence[Media], system: str | None) -> tuple[Message, ...]:
    columns = {f"{kind}s": [m.source for m in media if m.kind == kind] for kind in ("image", "video")}
    row = {
        "messages": [{"role": "user", "content": prompt}],
        **{k: v for k, v in columns.items() if v},
        "system": system,
    }
    return RowReader("auto", Attr(), "", None).record(row, "the prompt").messages


class Terminal:
    """A conversation: history, media waiting for the next message, answers as they are made.

    read: asks for a line (raises EOFError at the end); write: prints text as it is. Both are the terminal's by default.
    """

    def __init__(
        self, engine: Engine, *, media: Sequence[Media] = (), system: str | None = None, sampling: Sampling = Sampling(),
        read: Callable[[str], str] = input, write: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.engine, self.system, self.sampling, self.read = engine, system, sampling, read
        self.write = write or (lambda text: print(text, end="", flush=True))
        self.history: list[Message] = []
        self.waiting: list[Media] = list(media)

    def run(self) -> None:
        """Until /quit or the end of input."""
        self.write(f"{self.engine.name}: write a message, /help for commands\n")
        while True:
            try:
                line = self.read("you> ").strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n/quit or Ctrl-D to leave\n")
                continue
            if not line:
                continue
            if line.startswith("/"):
                if self.command(*(line[1:].split(None, 1) + [""])[:2]):
                    return
                continue
            self.say(line)

    def command(self, name: str, value: str = "") -> bool:
        """One /command. Returns whether the conversation is to end."""
        value = value.strip().strip("'\"")
        if name in ("quit", "exit"):
            return True
        if name == "help":
            self.write(HELP + "\n")
        elif name == "reset":
            self.history, self.waiting = [], []
            self.write("the conversation is forgotten\n")
        elif name in ("image", "video"):
            if not value:
                self.write(f"/{name} needs a file\n")
                return False
            try:
                self.waiting.append(medium(name, value))
            except PolymodalError as error:
                self.write(f"{error}\n")
                return False
            self.write(f"{value} goes with the next message\n")
        else:
            self.write(f"there is no /{name}; commands:\n{HELP}\n")
        return False

    def say(self, text: str) -> str:
        """One turn: the user's message with the media that wait; returns the answer. A failed turn leaves no trace."""
        said: list[str] = []

        def show(piece: str) -> None:
            said.append(piece)
            self.write(piece)

        try:
            turn = _turns(text, self.waiting, None)[-1]
            before = [Message("system", (self.system,))] if self.system else []
            key = str(len(self.history))
            self.write("")
            try:
                answer = self.engine.answer(
                    [*before, *self.history, turn], self.sampling, key=key, on_text=show
                ).text
            except KeyboardInterrupt:
                answer = "".join(said).strip()
                self.write(" [stopped]")
        except PolymodalError as error:
            self.write(f"{error}\n")
            return ""
        self.write("\n")
        self.history += [turn, Message("assistant", (answer,))]
        self.waiting = []
        return answer


# --- rows in, rows out -----------------------------------------------------------------------------------------------


def conversation(row: Any, reader: RowReader, where: str, system: str | None) -> tuple[Message, ...]:
    """A row -> what the model is asked: `messages` up to its last question, or `prompt` with image(s) and video(s).

    Raises PolymodalError with `where`.
    """
    if not isinstance(row, Mapping):
        raise PolymodalError(
            f"{where}: a row is an object, this is a {type(row).__name__}.",
            'Write {"prompt": ..., "image": ...} or {"messages": [...]}.',
        )
    name = next((n for n in ("messages", "conversations") if row.get(n)), None)
    if name is None:
        prompt = row.get("prompt", row.get("question"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise PolymodalError(
                f"{where}: there is no `prompt` and there are no `messages` (keys: {', '.join(map(str, row)) or 'none'}).",
                'Write {"prompt": ..., "image": ...}.',
            )
        row = {**row, "messages": [{"role": "user", "content": prompt}]}
        name = "messages"
    turns = row[name]
    last = turns[-1] if isinstance(turns, list) and turns else None
    if isinstance(last, Mapping) and last.get("role", last.get("from")) in ("assistant", "gpt"):
        row = {**row, name: turns[:-1]}
    record = reader.record(row, where)
    if record.tools:
        raise PolymodalError(
            f"{where}: rows with tools are not answered here.", "Leave out the column `tools`."
        )
    messages = record.messages
    return (Message("system", (system,)), *messages) if system and messages[0].role != "system" else messages


ADDED = ("answer", "error", "expected")
"""Keys of an output row that need not be the input's; a row's own `answer` is kept as `expected`."""


def _core(row: Any) -> Any:
    return {k: v for k, v in row.items() if k not in ADDED} if isinstance(row, Mapping) else {}


def rows(
    engine: Engine, lines: Iterable[str], name: str, out: TextIO, *, done: Sequence[Any] = (), system: str | None = None,
    sampling: Sampling = Sampling(), batch_size: int = 16, media_dir: str | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Answer JSON lines in their order, `answer` (or `error`) added to each. Returns (answered now, failed now).

    lines: of the input; `done`: output rows of an earlier start, which must be the answers of the first lines.
    Raises PolymodalError when they are not.
    """
    reader = RowReader("auto", Attr(), name if name != "-" else "", media_dir)
    place = "line" if name == "-" else f"{name}, line"
    parsed = (_parsed(number, text, place) for number, text in enumerate(lines, 1) if text.strip())
    seen = answered = failed = 0
    for chunk in _chunks(parsed, 8 * batch_size, live=name == "-"):
        for old, row in zip(done[seen:], chunk, strict=False):
            if _core(old) != _core(row.value):
                raise PolymodalError(
                    f"The output's row for {row.where} is not an answer to it.",
                    "Give another output file, or remove this one.",
                )
        new = chunk[max(0, len(done) - seen) :]
        seen += len(chunk)
        asked = [(str(row.number), functools.partial(_asked, row, reader, system)) for row in new]
        results = dict(engine.answers(asked, sampling, batch_size=batch_size))
        for i, row in enumerate(new):
            got = results[i]
            answered += 1
            failed += isinstance(got, PolymodalError)
            out.write(json.dumps(_with_answer(row.value, got), ensure_ascii=False) + "\n")
        out.flush()
    if seen < len(done):
        raise PolymodalError(
            f"The output has {len(done)} rows, {name} only {seen}.",
            "Give another output file, or remove this one.",
        )
    return answered, failed


@dataclass(frozen=True)
class _Row:
    number: int
    where: str
    value: Any
    problem: PolymodalError | None = None


def _parsed(number: int, text: str, place: str) -> _Row:
    where = f"{place} {number}"
    try:
        return _Row(number, where, json.loads(text))
    except ValueError as error:
        return _Row(number, where, {}, PolymodalError(f"{where}: not valid JSON: {error}."))


def _asked(row: _Row, reader: RowReader, system: str | None) -> tuple[Message, ...]:
    if row.problem is not None:
        raise row.problem
    return conversation(row.value, reader, row.where, system)


def _with_answer(value: Any, got: Answer | PolymodalError) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        value = {"row": value}
    kept = {k: v for k, v in value.items() if k not in ("answer", "error")}
    if "answer" in value:
        kept.setdefault("expected", value["answer"])
    return kept | ({"answer": got.text} if isinstance(got, Answer) else {"answer": None, "error": str(got)})


def _chunks(items: Iterator[_Row], size: int, live: bool) -> Iterator[list[_Row]]:
    """Lists of at most `size`. live: what is there now, so that who waits for an answer to one line gets it."""
    if not live:
        while chunk := list(islice(items, size)):
            yield chunk
        return
    waiting: queue.Queue[_Row | None] = queue.Queue(4 * size)

    def fill() -> None:
        for item in items:
            waiting.put(item)
        waiting.put(None)

    threading.Thread(target=fill, daemon=True).start()
    ended = False
    while not ended and (first := waiting.get()) is not None:
        chunk = [first]
        while len(chunk) < size and not waiting.empty():
            item = waiting.get()
            if item is None:
                ended = True
                break
            chunk.append(item)
        yield chunk


def _done(path: Path) -> list[Any]:
    """Whole rows of an output that an earlier start left; half a line at its end is cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise PolymodalError(
            f"{path} is not an output of this command (its lines are not JSON), nothing is written there.",
            "Give another output file.",
        ) from None
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return found


def main(
    checkpoint: str,
    *,
    image: Sequence[str] = (),
    video: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    json_file: str | None = None,
    out: str | None = None,
    media_dir: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    revision: str | None = None,
    sampling: Sampling = Sampling(),
    batch_size: int = 16,
) -> int:
    """The command. Returns the exit code: 2 when rows of a file could not be answered.

    json_file: JSON lines to answer ("-" = standard input); `out`: where to, else standard output. The same command
    again goes on after the rows that `out` has. Without prompt and json_file: a conversation in the terminal, or,
    when standard input is no terminal, its whole text as the prompt.
    """
    from polymodal.runtime import device as devices

    if json_file is not None and (prompt is not None or image or video):
        raise PolymodalError(
            "--json brings its own prompts and pictures.", "Leave out --prompt, --image and --video."
        )
    if json_file not in (None, "-") and not os.path.isfile(json_file or ""):
        raise PolymodalError(f"The file {json_file} does not exist.", "Check the path.")
    if (
        json_file is not None
        and out is not None
        and os.path.exists(out)
        and os.path.exists(json_file)
        and os.path.samefile(out, json_file)
    ):
        raise PolymodalError("Input and output are the same file.", "Give another --out.")
    if prompt is not None and not prompt.strip():
        raise PolymodalError("The prompt is empty.", "Give --prompt TEXT.")
    media = [medium("image", path) for path in image] + [medium("video", path) for path in video]
    if prompt is None and json_file is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise PolymodalError(
                "There is no prompt: standard input is empty and no terminal.",
                "Give --prompt TEXT, or --json FILE.",
            )
    from polymodal.generate.opening import open_engine

    found = devices.find(device)  # type: ignore[arg-type]
    engine = open_engine(checkpoint, revision=revision, device=found.torch, dtype=dtype, ema=ema, base=base)
    if json_file is not None:
        return _rows_of(engine, json_file, out, system, sampling, batch_size, media_dir)
    if prompt is not None:
        answer = once(
            engine,
            prompt,
            media,
            system,
            sampling,
            (lambda text: print(text, end="", flush=True)) if sys.stdout.isatty() else None,
        )
        print("" if sys.stdout.isatty() else answer.text)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    Terminal(engine, media=media, system=system, sampling=sampling).run()
    return 0


def _rows_of(
    engine: Engine,
    source: str,
    out: str | None,
    system: str | None,
    sampling: Sampling,
    batch_size: int,
    media_dir: str | None,
) -> int:
    done = _done(Path(out)) if out else []
    lines = sys.stdin if source == "-" else open(source, encoding="utf-8-sig")  # noqa: SIM115
    try:
        target = open(out, "a", encoding="utf-8") if out else sys.stdout  # noqa: SIM115
    except OSError as error:
        raise PolymodalError(f"{out} cannot be written: {error.strerror}.", "Choose another --out.") from None
    try:
        answered, failed = rows(
            engine,
            lines,
            source,
            target,
            done=done,
            system=system,
            sampling=sampling,
            batch_size=batch_size,
            media_dir=media_dir,
        )
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
    finally:
        if source != "-":
            lines.close()
        if out:
            target.close()
    failed += sum(1 for row in done if isinstance(row, Mapping) and row.get("error"))
    if out:
        print(f"{answered} rows answered, {len(done)} were there before: {out}", file=sys.stderr)
    if failed:
        print(f"{failed} rows could not be answered; `error` in their row says why.", file=sys.stderr)
    return 2 if failed else 0
