"""`polymodal chat`: one answer, a conversation in the terminal, or JSON lines answered (rows.py)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.core.terminal import say_lines
from polymodal.core.text import check_characters
from polymodal.data import audio as sounds
from polymodal.data import media as decoders
from polymodal.data.formats import RowReader
from polymodal.data.references import KINDS
from polymodal.generate import rows
from polymodal.generate.engine import Answer, Engine, Sampling
from polymodal.recipe import Attr

HELP = """/image FILE   show a picture with the next message
/video FILE   show a video with the next message
/audio FILE   play a recording with the next message
/reset        forget the conversation
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def medium(kind: str, path: str) -> Media:
    """A picture, video or recording for a message. Raises PolymodalError: not there, or no such thing."""
    path = os.path.expanduser(path)
    try:
        {"image": decoders.image, "video": decoders.video_header, "audio": sounds.audio_header}[kind](path)
    except PolymodalError as error:
        hint = "Check the path." if not os.path.exists(path) else error.hint
        raise PolymodalError(error.message[:1].upper() + error.message[1:], hint) from None
    return Media(kind, path)  # type: ignore[arg-type]


def messages_of(prompt: str, media: Sequence[Media], system: str | None) -> tuple[Message, ...]:
    """A prompt with media; `<image>`, `<video>` and `<audio>` in it say where they stand, else they come
    first."""
    check_characters((prompt, system), "the prompt")
    row: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "system": system}
    for item in media:
        row.setdefault(f"{item.kind}s", []).append(item.source)
    return RowReader("auto", Attr(), "", None).record(row, "the prompt").messages


def once(
    engine: Engine,
    prompt: str,
    media: Sequence[Media] = (),
    system: str | None = None,
    sampling: Sampling = Sampling(),
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """One answer to one prompt."""
    return engine.answer(messages_of(prompt, media, system), sampling, on_text=on_text)


def boxes_line(answer: Answer) -> str:
    """Boxes of an answer as a line for people, "" without any."""
    if not answer.boxes or answer.size is None:
        return ""
    height, width = answer.size
    listed = ", ".join(str(list(box)) for box in answer.boxes)
    return f"boxes in pixels of the picture of {width} x {height}: {listed}\n"


def _print(text: str) -> None:
    say_lines(text)


class Terminal:
    """A conversation: history, media waiting for the next message, answers as they are made.

    read: asks for a line (raises EOFError at the end); write: prints text as it is.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        media: Sequence[Media] = (),
        system: str | None = None,
        sampling: Sampling = Sampling(),
        read: Callable[[str], str] = input,
        write: Callable[[str], None] = _print,
    ):
        self.engine, self.sampling, self.read, self.write = engine, sampling, read, write
        self.system = [Message("system", (system,))] if system else []
        self.history: list[Message] = []
        self.waiting: list[Media] = list(media)

    def run(self) -> None:
        """Until /quit or the end of input."""
        self.write(f"{self.engine.name}: write a message, /help for commands\n")
        ended = False
        while not ended:
            try:
                line = self.read("you> ").strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n/quit or Ctrl-D to leave\n")
                continue
            if line.startswith("/"):
                name, _, value = line[1:].partition(" ")
                ended = self.command(name, value.strip().strip("'\""))
            elif line:
                self.say(line)

    def command(self, name: str, value: str = "") -> bool:
        """One /command. Returns whether the conversation is to end."""
        if name == "help":
            self.write(HELP + "\n")
        elif name == "reset":
            self.history, self.waiting = [], []
            self.write("the conversation is forgotten\n")
        elif name in KINDS and not value:
            self.write(f"/{name} needs a file\n")
        elif name in KINDS:
            try:
                self.waiting.append(medium(name, value))
                self.write(f"{value} goes with the next message\n")
            except PolymodalError as error:
                self.write(f"{error}\n")
        elif name not in ("quit", "exit"):
            self.write(f"there is no /{name}; commands:\n{HELP}\n")
        return name in ("quit", "exit")

    def say(self, text: str) -> str:
        """One turn, the message with the waiting media. Returns the answer; a failed turn leaves no trace."""
        pieces: list[str] = []
        boxes = ""

        def show(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        try:
            turn = messages_of(text, self.waiting, None)[-1]
            conversation = [*self.system, *self.history, turn]
            try:
                key = str(len(self.history))
                made = self.engine.answer(conversation, self.sampling, key=key, on_text=show)
                answer, boxes = made.text, boxes_line(made)
            except KeyboardInterrupt:
                answer = "".join(pieces).strip()
                self.write(" [stopped]")
        except PolymodalError as error:
            self.write(f"{error}\n")
            return ""
        self.write("\n" + boxes)
        self.history += [turn, Message("assistant", (answer,))]
        self.waiting = []
        return answer


def main(
    checkpoint: str,
    *,
    image: Sequence[str] = (),
    video: Sequence[str] = (),
    audio: Sequence[str] = (),
    prompt: str | None = None,
    system: str | None = None,
    json_file: str | None = None,
    out: str | None = None,
    media_dir: str | None = None,
    sampling: Sampling = Sampling(),
    batch_size: int = 16,
    **opening: Any,
) -> int:
    """The command. Returns the exit code: 2 when rows of a file could not be answered.

    json_file: JSON lines to answer ("-" = standard input); `out`: where to, else standard output. The same
    command again goes on after the rows that `out` has. Without prompt and json_file: a conversation in the
    terminal, or, when standard input is no terminal, its whole text as the prompt. opening: options of
    `open_engine`.
    """
    given = {"image": image, "video": video, "audio": audio}
    _check(prompt, json_file, out, any(given.values()))
    media = [medium(kind, path) for kind, paths in given.items() for path in paths]
    if prompt is None and json_file is None and not sys.stdin.isatty():
        prompt = _standard_input().strip()
        if not prompt:
            raise PolymodalError(
                "There is no prompt: standard input is empty and no terminal.",
                "Give --prompt TEXT, or --json FILE.",
            )
    from polymodal.generate.opening import open_engine

    engine = open_engine(checkpoint, **opening)
    asked: Mapping[str, Any] = {"system": system, "sampling": sampling}
    if json_file is not None:
        return rows.run(engine, json_file, out, batch_size=batch_size, media_dir=media_dir, **asked)
    if prompt is not None:
        shown = sys.stdout.isatty()
        answer = once(engine, prompt, media, **asked, on_text=_print if shown else None)
        say_lines("" if shown else answer.text, "\n")
        say_lines(boxes_line(answer), error=True)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    Terminal(engine, media=media, **asked).run()
    return 0


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise PolymodalError(f"Standard input is no UTF-8 text: {error.reason}.", "Give text.") from None


def _check(prompt: str | None, json_file: str | None, out: str | None, media: bool) -> None:
    """Raise PolymodalError for options that do not go together."""
    if json_file is not None and (prompt is not None or media):
        raise PolymodalError(
            "--json brings its own prompts and media.", "Leave out --prompt, --image, --video and --audio."
        )
    if json_file is not None and json_file != "-":
        if not os.path.isfile(json_file):
            raise PolymodalError(f"The file {json_file} does not exist.", "Check the path.")
        if out is not None and os.path.exists(out) and os.path.samefile(out, json_file):
            raise PolymodalError("Input and output are the same file.", "Give another --out.")
    if prompt is not None and not prompt.strip():
        raise PolymodalError("The prompt is empty.", "Give --prompt TEXT.")
