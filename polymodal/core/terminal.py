"""What the program prints. Text of users, data and libraries is text: no markup, no control characters.

Names, paths, captions, answers and messages of libraries may hold escape codes that clear a terminal, write
to its clipboard or hide a line, and characters that turn the order of a line around. `say`, `console` and
`Bar` are the only ways to print (a static test refuses others); `start` guards what libraries print.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from polymodal.core.errors import PolymodalError
from polymodal.core.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

CONTROL = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, DEL, C1
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"  # lines and the direction of text
    r"\u200b\u2060\ufeff\ud800-\udfff\U000e0000-\U000e007f"  # invisible; half of a character; tags
)
"""Characters that are never printed as they are (a class of a regular expression)."""

_CONTROL = re.compile(f"[{CONTROL}]")

_COLOURS = r"\x1b\[(?:[0-9;]*[mABCDGJK]|\?25[hl])"
"""Of colours and progress bars: what rich and the bars of libraries may send to a terminal."""

_FOREIGN = re.compile(rf"({_COLOURS}|\r)|[{CONTROL}]")

LEAST_WIDTH = 80
"""Columns that help, tables and reports are laid out for where a terminal has less."""

_FORCED = ("FORCE_COLOR", "TTY_COMPATIBLE", "PY_COLORS", "GITHUB_ACTIONS")
"""Variables for which rich and typer send colours to what is no terminal."""


def _escaped(text: str) -> str:
    r"""Each UTF-16 unit as \uXXXX, which JSON reads as the same character."""
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def plain(text: object) -> str:
    r"""The text with control characters and others that are not seen as \uXXXX; tabs and line ends stay."""
    return _CONTROL.sub(lambda found: _escaped(found[0]), str(text).replace("\r\n", "\n"))


def line(text: object) -> str:
    r"""`plain` on one line: a line end, which only data have inside a sentence, is \n."""
    return plain(text).replace("\n", "\\n")


def say(*words: object, error: bool = False) -> None:
    """Print words as one line of plain text. error: on standard error."""
    say_lines(" ".join(map(line, words)), "\n", error)


def say_lines(text: object, end: str = "", error: bool = False) -> None:
    """Print plain text that may have several lines, and flush."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:  # closed by who started this
        print(plain(text), end=end, file=stream, flush=True)


def report(error: PolymodalError) -> None:
    """Print an error; on a terminal its lines end between words, so that paths are never cut.

    It is one sentence or a numbered list of them: other line ends are data's.
    """
    text = "\n".join(line(part) for part in re.split(r"\n(?=\d+\. )", str(error)))
    if sys.stderr is not None and sys.stderr.isatty():
        width = max(40, min(100, shutil.get_terminal_size().columns))
        fill = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(
            fill(f"error: {part}" if at == 0 else part) for at, part in enumerate(text.split("\n"))
        )
        text = text.removeprefix("error: ")
    console(error=True).print(styled(("error:", "bold red"), " ", text), soft_wrap=True)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of pieces, each alone or with its style: ("yes", "green")."""
    from rich.text import Text

    return Text.assemble(*(plain(p) if isinstance(p, str) else (plain(p[0]), p[1]) for p in parts))


def console(error: bool = False, **options: Any) -> Console:
    """A console of rich that prints strings, also in tables, as they are. options: rich.console.Console's.

    Its lines have 80 columns at least: on a narrower terminal they wrap there, and no word is cut.
    """
    made = _console_class()(stderr=error, markup=False, highlight=False, emoji=False, **options)
    if "width" not in options and made.width < LEAST_WIDTH:
        made.width = LEAST_WIDTH
    return made


@functools.cache
def _console_class() -> type:
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(plain(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=plain(segment.text))

    return PlainConsole


class Bar:
    """A progress bar on a terminal (`live`), nothing elsewhere.

    error: on standard error; it is then gone when it ends. hidden: none, as on ranks but the first.
    A terminal that is gone, a reader that ended or a log on a full disk end nothing.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, error: bool = True, hidden: bool = False):
        self.below = ""
        self.live = False
        if hidden:
            return
        self.console = console(error, width=shutil.get_terminal_size().columns)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        if self.live:
            self._bar = _progress(self, transient=error)
            self._task = self._bar.add_task(plain(title), total=total, completed=done)
            self._bar.start()

    def update(self, done: int, total: int | None = None, below: str = "") -> None:
        """below: a line under the bar."""
        self.below = below
        if self.live:
            self._bar.update(self._task, completed=done, total=total)

    def advance(self, count: int) -> None:
        if self.live:
            self._bar.advance(self._task, count)

    def print(self, text: str) -> None:
        """A line above the bar."""
        with contextlib.suppress(OSError):
            if self.live:
                self.console.print(text, soft_wrap=True)
            else:
                say(text)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.live:
            with contextlib.suppress(OSError):
                self._bar.stop()


def _progress(bar: Bar, transient: bool) -> Any:
    from rich import progress
    from rich.table import Column

    class WithLine(progress.Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            if bar.below:
                yield styled((bar.below, "dim"))

    title = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, bar.console.width // 3))
    columns = (
        progress.TextColumn("{task.description}", markup=False, table_column=title),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return WithLine(*columns, console=bar.console, expand=True, transient=transient)


# ---- the streams of the process --------------------------------------------------------------------------


class _Stream(io.TextIOWrapper):
    """Standard output or error: without secrets; of control characters only those of colours and bars, on a
    terminal only.

    Characters that its encoding lacks are escaped; an error of writing names the stream.
    """

    label = ""
    foreign = _FOREIGN  # globals of this module may be gone when the last objects of the process print
    redact = staticmethod(redact)

    def write(self, text: str) -> int:
        try:
            return super().write(self.foreign.sub(self._allowed, self.redact(text)))
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.label) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.label) from None

    def _allowed(self, found: re.Match) -> str:
        coloured = self.isatty() or any(os.environ.get(name) for name in _FORCED)
        return found[1] if found[1] == "\r" or (found[1] and coloured) else _escaped(found[0])


def start() -> None:
    """Guard this process's standard output and error. Called once, where a command begins."""
    if shutil.get_terminal_size().columns < LEAST_WIDTH:
        os.environ.setdefault("TERMINAL_WIDTH", str(LEAST_WIDTH))  # typer's help
    codecs.register_error("polymodal.escape", _escape_error)
    for name, label in (("stdout", "standard output"), ("stderr", "standard error")):
        stream: TextIO | None = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, _Stream):
            kept: dict[str, Any] = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
            made = _Stream(stream.detach(), errors="polymodal.escape", write_through=name == "stderr", **kept)
            made.label = label
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def _escape_error(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escaped(error.object[error.start : error.end]), error.end


def finish() -> None:
    """Standard output is no longer written to: who read it has enough, or its disk is full."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
