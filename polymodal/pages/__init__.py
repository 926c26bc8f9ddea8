"""HTML pages: one file each, with its style and pictures inside, so that it opens anywhere.

A page is a template in templates/ (all of them extend base.html) and the values that it shows. Autoescape is
on, and control characters are escaped: what comes from data is plain text wherever it is shown.
"""

from __future__ import annotations

import base64
import functools
import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file

if TYPE_CHECKING:
    import jinja2
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, or why there is none. exact: small, enlarged without blurring."""

    uri: str = ""
    exact: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Card:
    """One question in a grid. expected None: there is nothing to compare with.

    answers: (label, text, score 0..1 or None where not judged); the last one colours the card.
    """

    question: str
    answers: Sequence[tuple[str, str, float | None]] = ()
    expected: str | None = ""
    pictures: Sequence[Picture] = ()
    note: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return verdict(self.answers[-1][2]) if self.answers else ""


@dataclass(frozen=True)
class Table:
    """Numbers are aligned right, and so are the headers of columns that hold nothing else."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


def verdict(score: float | None) -> str:
    """CSS class of a score between 0 and 1; "" where not judged."""
    return "" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else "part"


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold nothing but numbers."""
    columns = zip(*table.rows, strict=True) if table.rows else ((None,) for _ in table.headers)
    return [all(isinstance(value, (int, float)) for value in column) for column in columns]


def _plain(value: Any) -> Any:
    """Text without characters that are not seen or that turn a line around; what a macro made stays."""
    return terminal.plain(value) if type(value) is str else value


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_plain,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"verdict": verdict, "numeric_columns": numeric_columns}
    return made


def render(template: str, **values: Any) -> str:
    """The page of `templates/<template>`. A value that the template uses and does not get raises."""
    return _environment().get_template(template).render(**values)


def write(file: Path, text: str, hint: str = "Choose another place for the page.") -> Path:
    """The page as a file, whole or not at all; missing directories are made. Raises PolymodalError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text)
    except OSError as error:
        raise PolymodalError(f"{file} cannot be written: {error.strerror or error}.", hint) from None
    return file


def thumbnail(picture: Image, side: int = 240) -> Picture:
    """The picture reduced to `side` pixels; one of at most 64 (digits, icons) is kept and enlarged."""
    small = picture.convert("RGB").copy()  # thumbnail() below must not change the caller's
    exact = max(small.size) <= 64
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if exact else "JPEG", **({} if exact else {"quality": 80}))
    return Picture(_data_uri("image/png" if exact else "image/jpeg", buffer.getvalue()), exact)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def waveform(samples: np.ndarray, width: int = 480, height: int = 64) -> Picture:
    """Samples float [n] in -1..1 as SVG: of each column of pixels the lowest and the highest value."""
    columns = np.array_split(samples, min(width, max(1, len(samples))))
    middle, lines = height / 2, []
    for at, column in enumerate(columns):
        low, high = (float(np.clip(value, -1, 1)) for value in (column.min(), column.max()))
        top, bottom = middle * (1 - high), middle * (1 - low)
        lines.append(f"M{at + 0.5:g} {top:.1f}V{max(bottom, top + 0.6):.1f}")
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}"><path d="{"".join(lines)}" stroke="#3b82f6" fill="none"/></svg>'
    )
    return Picture(_data_uri("image/svg+xml", svg.encode()))


def recording(samples: np.ndarray, rate: int) -> str:
    """Samples float [n] in -1..1 as the data URI of a wav file of 16 bits, one channel."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return _data_uri("audio/wav", buffer.getvalue())
