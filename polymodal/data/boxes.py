"""Boxes and points of pictures: from a row's columns to the coordinates and the text of a model, and back.

A model sees a picture in another size than its file has (`MediaProcessor.picture_size`), and each line of
models writes boxes its own way: `BoxFormat`, a fact of the card. A row declares boxes apart from its text
(box_columns.py); `BoxWriter` writes them there as the model does, and reads the model's answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Box, Control, Located, Media, Message, Record
from polymodal.data import media

LOOKED_AT = 256  # rows that `check` looks at
_NUMBER = r"\s*(-?\d{1,7}(?:\.\d{1,9})?)\s*"
_BOX = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]|\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
_PAIR = rf"[\[(]{_NUMBER},{_NUMBER}[\])]"
_POINT = (
    rf"(?:point_2d\W{{1,8}}|box(?:_start)?[=|>]\W{{0,3}}){_PAIR}(?!\s*,\s*\()|\A\W{{0,9}}{_PAIR}\W{{0,9}}\Z"
)
_FOUND = re.compile(f"{_BOX}|{_POINT}")

Values = tuple[float, ...]


@dataclass(frozen=True)
class BoxFormat:
    """How a line of models writes boxes.

    scale: the picture's width and height in its coordinates (1000: thousandths); None: pixels of the resized
    picture. largest: the largest coordinate there is (None: `scale`, or the last pixel). digits: after the
    decimal point. box, point, label: text of each, by str.format of x1, y1, x2, y2 (a point's: x1, y1) and
    label. labelled, bare: an object with and without a label, of `box`, its `key` and `label`; json: the
    label is inside a JSON string. listing: before, between and after the objects of a list.
    """

    scale: float | None
    box: str
    point: str
    label: str = "{label}"
    labelled: str = "{label}{box}"
    bare: str = "{box}"
    json: bool = False
    listing: tuple[str, str, str] = ("", "", "")
    largest: float | None = None
    digits: int = 0

    @property
    def tokens(self) -> frozenset[str]:
        """The tokens that it writes around boxes and labels."""
        return frozenset(re.findall("<[^<>{}]+>", self.box + self.label))

    def values(self, fractions: Values, height: int, width: int) -> Values:
        """Coordinates in a picture that the model sees in this size. fractions: of width, height, width..."""
        out = []
        for fraction, size in zip(fractions, (width, height) * 2, strict=False):
            top = self.largest if self.largest is not None else self.scale or size - 1
            value = round(fraction * (self.scale or size), self.digits or None)
            out.append(min(max(value, 0), top if self.digits else int(top)))
        return tuple(out)

    def coordinates(self, values: Values) -> str:
        names = dict(zip(("x1", "y1", "x2", "y2"), values, strict=False))
        return (self.box if len(values) == 4 else self.point).format(**names)


def written(text: str, label: str, **fields: str) -> Iterator[str]:
    """A template filled in: text of the program, the label as text of the data, text of the program."""
    before, _, after = text.format(label="\0", **fields).partition("\0")
    yield from (Control(before), label, Control(after))


class BoxWriter:
    """Boxes of messages as one model writes them. Picklable.

    form: None for a model without a declared way; resized(height, width) -> (height, width) as it sees them.
    """

    def __init__(self, form: BoxFormat | None, resized: Callable[[int, int], tuple[int, int]]):
        self.form, self.resized = form, resized

    @property
    def unit(self) -> str:
        """Of the model's coordinates, in words."""
        if self.form is None:
            return "a form that is not known here"
        if self.form.scale is None:
            return "pixels of the resized picture"
        return f"0 to {self.form.scale:g} over the picture"

    def record(self, record: Record) -> Record:
        """With text in place of boxes. Opens the headers of their pictures. Raises PolymodalError."""
        messages = self.messages(record.messages)
        return record if messages is record.messages else replace(record, messages=messages)

    def messages(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not any(isinstance(part, Located) for m in messages for part in m.content):
            return messages
        return tuple(
            replace(m, content=tuple(p for part in m.content for p in self._parts(part))) for m in messages
        )

    def _parts(self, part: str | Media | Located) -> Iterator[str | Media]:
        if not isinstance(part, Located):
            yield part
            return
        form = self._form()
        if part.kind == "ref-object":
            yield from written(form.label, part.label)
        elif part.kind == "bbox":
            yield Control(form.coordinates(self.values(part.boxes[0])))
        else:
            before, between, after = form.listing
            for n, box in enumerate(part.boxes):
                yield Control(between if n else before)
                label = json.dumps(box.label, ensure_ascii=False)[1:-1] if form.json else box.label or ""
                fields = {"box": form.coordinates(self.values(box))}
                fields["key"] = "bbox_2d" if len(box.values) == 4 else "point_2d"
                yield from written(form.bare if box.label is None else form.labelled, label, **fields)
            yield Control(after if part.boxes else "[]" if form.json else "")

    def _form(self) -> BoxFormat:
        if self.form is None:
            raise PolymodalError(
                "the row declares boxes, and it is not known how this model writes them.",
                "Write its own coordinates into the text and remove the marks, or choose another model.",
            )
        return self.form

    def values(self, box: Box) -> Values:
        """A box in the model's coordinates."""
        size = media.image_size(box.picture.source)  # type: ignore[arg-type]
        return self._form().values(fractions(box, *size), *self.resized(*size))

    def pixels(self, values: Values, height: int, width: int) -> Values | None:
        """The model's coordinates in pixels of a picture of this size, by a tenth; None: no box of it."""
        sizes = (width, height) * 2
        scale = self._form().scale
        seen = (scale,) * 4 if scale else self.resized(height, width)[::-1] * 2
        inside = all(0 <= v <= limit for v, limit in zip(values, seen, strict=False))
        if not inside or any(a > b for a, b in zip(values, values[2:], strict=False)):
            return None
        return tuple(round(v * size / limit, 1) for v, size, limit in zip(values, sizes, seen, strict=False))

    def found(self, text: str, height: int, width: int) -> list[Values]:
        """Boxes and points of an answer about a picture of this size, in its pixels."""
        if self.form is None:
            return []
        placed = (self.pixels(values, height, width) for values in numbers(text))
        return [values for values in placed if values is not None]


def fractions(box: Box, height: int, width: int) -> Values:
    """A box as shares of its picture's width and height. Raises PolymodalError when it is outside of it.

    One pixel over the border is a rounding of whoever labelled it.
    """
    scales = (width, height) * 2 if box.scale is None else (box.scale,) * 4
    out = tuple(value / scale for value, scale in zip(box.values, scales, strict=False))
    for share, size in zip(out, (width, height) * 2, strict=False):
        if not -1 / size <= share <= 1 + 1 / size:
            what = "" if box.scale is None else f" in units of 1/{box.scale:g}"
            raise PolymodalError(
                f"`{box.at}` = {_shown(box)}{what} is outside its picture of {width} x {height} pixels.",
                "Correct it; bbox_format (xyxy, xywh, cxcywh) and bbox_type (real: pixels of the file, "
                "norm1, norm1000), in the row or in data.attr, say how numbers are meant, image_id whose "
                "they are.",
            )
    if box.scale is None and max(box.values) <= 1 and any(v != int(v) for v in box.values):
        raise PolymodalError(
            f"`{box.at}` = {_shown(box)} looks like shares of the picture, and is declared as pixels.",
            "Set bbox_type to norm1, in the row's objects or as data.attr.bbox_type.",
        )
    return tuple(min(max(share, 0.0), 1.0) for share in out)


def pixels(box: Box, height: int, width: int) -> Values:
    """A box in pixels of its picture. Raises PolymodalError when it is outside of it."""
    shares = zip(fractions(box, height, width), (width, height) * 2, strict=False)
    return tuple(round(share * size, 1) for share, size in shares)


def _shown(box: Box) -> str:
    return str(list(box.values))[:80]


def numbers(text: str) -> list[Values]:
    """Coordinates of the boxes and points in a text, as they are written there."""
    groups = (match.groups() for match in _FOUND.finditer(text))
    return [tuple(float(value) for value in group if value is not None) for group in groups]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes; of a point and a box 1 where it is inside."""
    (ax, ay, *_, ar, ab), (bx, by, *_, br, bb) = (v if len(v) == 4 else (*v, *v) for v in (a, b))
    width, height = min(ar, br) - max(ax, bx), min(ab, bb) - max(ay, by)
    if width < 0 or height < 0:
        return 0.0
    union = (ar - ax) * (ab - ay) + (br - bx) * (bb - by) - width * height
    if len(a) == 2 or len(b) == 2 or not union:
        return 1.0
    return width * height / union


# -- what `check` says -----------------------------------------------------------------------------------


def notes(corpus: Sequence[Record], writer: BoxWriter) -> list[str]:
    """What becomes of boxes: declared ones, and answers that look like boxes and are declared by no row; of
    rows spread over the corpus."""
    looked, declared, undeclared = 0, list[Record](), list[Record]()
    for i in range(0, len(corpus), max(1, len(corpus) // LOOKED_AT)):
        try:
            record = corpus[i]
        except PolymodalError:  # counted and listed elsewhere
            continue
        looked += 1
        texts = [p for m in record.messages if m.role == "assistant" for p in m.content if isinstance(p, str)]
        if record.boxes:
            declared.append(record)
        elif record.media and any("_2d" in t or len(v) == 4 for t in texts for v in numbers(t)):
            undeclared.append(record)
    try:
        return [
            *([_declared(declared, looked, writer)] if declared and writer.form else []),
            *([_undeclared(undeclared, looked, writer)] if undeclared else []),
        ]
    except PolymodalError:  # a broken picture or box: counted and listed elsewhere
        return []


def _declared(records: Sequence[Record], looked: int, writer: BoxWriter) -> str:
    box = records[0].boxes[0]
    height, width = media.image_size(box.picture.source)  # type: ignore[arg-type]
    values, (seen_height, seen_width) = writer.values(box), writer.resized(height, width)
    return (
        f"boxes of {len(records)} of {looked} rows looked at are written as this model has them, in "
        f"{writer.unit}: {records[0].where}, `{box.at}` of {width} x {height} pixels becomes {list(values)} "
        f"(for the model the picture has {seen_width} x {seen_height})."
    )


def _undeclared(records: Sequence[Record], looked: int, writer: BoxWriter) -> str:
    picture = next((m for m in records[0].media if m.kind == "image"), None)
    there = ""
    if picture is not None:
        size = media.image_size(picture.source)  # type: ignore[arg-type]
        there = " (there {1} x {0} to {3} x {2})".format(*size, *writer.resized(*size))
    return (
        f"answers of {len(records)} of {looked} rows looked at seem to hold boxes (first: "
        f"{records[0].where}), and these rows declare none: their numbers stay as they are, while pictures "
        f"are resized{there}. "
        f"This model's boxes are in {writer.unit}. Declare them in `objects`, with <bbox> in the text "
        "(docs/data.md, Boxes), or leave them if they are in that form already."
    )
