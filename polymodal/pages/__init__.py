"""HTML pages: one file each, with its style and pictures inside; nothing is loaded from elsewhere, so they
open anywhere.

A page is a template in templates/ (all of them extend base.html) and the values that it shows. Autoescape is
on: what comes from data is plain text wherever it lands. The rooms above hand over plain values; of them this
room knows nothing.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file

if TYPE_CHECKING:
    import jinja2
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, or (without `uri`) the reason why there is none; exact: small, enlarged without
    blurring."""

    uri: str = ""
    exact: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Card:
    """One question in a grid. answers: (label, text, score 0..1 or None for "not judged"), e.g. before and
    after training; the last one colours the card. expected None: there is nothing to compare with."""

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
    """Numbers stand right, in columns that hold nothing else their headers too."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


def verdict(score: float | None) -> str:
    """Class of a score between 0 and 1: "right", "part", "wrong", or "" when it was not judged."""
    return "" if score is None else "right" if score >= 1 else "wrong" if score <= 0 else "part"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell(value: object) -> str:
    """A table cell's text; floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numeric_columns(table: Table) -> list[bool]:
    return [
        bool(table.rows) and all(is_number(row[i]) for row in table.rows) for i in range(len(table.headers))
    ]


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"verdict": verdict, "cell": cell, "numeric_columns": numeric_columns}
    made.tests["numeric"] = is_number
    return made


def render(template: str, **values: Any) -> str:
    """The page of `templates/<template>` with these values. A value that the template lacks is a bug and
    raises."""
    return _environment().get_template(template).render(**values)


def write(file: Path, text: str, hint: str = "Choose another place for the page.") -> Path:
    """The page as a file, whole or not at all; missing directories are made. Raises PolymodalError where it
    cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text)
    except OSError as error:
        raise PolymodalError(f"{file} cannot be written: {error.strerror or error}.", hint) from None
    return file


def thumbnail(picture: Image, side: int = 240) -> Picture:
    """The picture, reduced to at most `side` pixels; one of at most 64 (digits, icons) is kept exactly and
    enlarged."""
    picture = picture.convert(
        "RGB"
    )  # a copy or the picture itself: thumbnail() below must not change the caller's
    exact = max(picture.size) <= 64
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG" if exact else "JPEG", **({} if exact else {"quality": 80}))
    data = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{'png' if exact else 'jpeg'};base64,{data}", exact)
