"""The boxes that a row declares: its columns, and the places in its text that stand for them.

Columns are read as people have them: {"ref": [...], "bbox": [...]} (ms-swift's), a list of objects, a list of
boxes; corners, corner and size (COCO) or centre and size (YOLO); pixels, or shares of the picture.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Box, Located, Media
from polymodal.data.references import first, listed
from polymodal.recipe import Attr

MARK = re.compile("<(bbox|ref-object|objects)>")
COLUMNS = ("objects", "boxes")
LABELS = ("ref", "label", "labels", "category", "categories", "class", "name", "names")
BOXES = ("bbox", "bbox_2d", "bboxes", "boxes", "box", "point_2d", "points", "point")
SCALES: dict[str, float | None] = {"real": None, "norm1": 1.0, "norm1000": 1000.0}
FORMATS = ("xyxy", "xywh", "cxcywh")
FACTS = ("image_id", "bbox_type", "bbox_format")  # one for all boxes of a row, or a list of them


@dataclass
class _Objects:
    """A row's boxes and labels, in order; each replaces the next mark of its kind."""

    key: str
    boxes: list[Box]
    labels: list[Any]


def place(turns: list[dict], row: Mapping[str, Any], attr: Attr) -> None:
    """Puts the row's boxes and labels where their marks are in the turns' parts; in place.

    Without such a column the marks are words. Raises PolymodalError: marks and entries differ in number, a
    box is no box, a picture that is not there.
    """
    value, key = first(row, attr.objects, COLUMNS)
    if value is None or value == "":
        return
    texts = [p for turn in turns for p in turn["parts"] if isinstance(p, str) and MARK.search(p)]
    if not texts:
        return
    pictures = [p for t in turns for p in t["parts"] if isinstance(p, Media) and p.kind == "image"]
    objects = read(value, key, attr, pictures)
    marks = Counter(name for text in texts for name in MARK.findall(text))
    _compare(objects, marks)
    boxes, labels = iter(objects.boxes), iter(objects.labels)

    def located(name: Any) -> Located:
        if name == "objects":
            for label in objects.labels:
                _label(label, key)
            return Located(name, tuple(objects.boxes))
        if name == "bbox":
            return Located(name, (next(boxes),))
        return Located(name, label=_label(next(labels), key))

    for turn in turns:
        parts: list[Any] = []
        for part in turn["parts"]:
            pieces = MARK.split(part) if isinstance(part, str) else [part]
            parts += [located(p) if n % 2 else p for n, p in enumerate(pieces) if n % 2 or p != ""]
        turn["parts"] = parts


def _compare(objects: _Objects, marks: Counter[str]) -> None:
    """Raise PolymodalError when marks and entries differ in number."""
    key, boxes, labels = objects.key, len(objects.boxes), len(objects.labels)
    if marks["objects"] and (marks["bbox"] or (labels and labels != boxes)):
        raise PolymodalError(
            f"<objects> stands for all {boxes} boxes of `{key}`, and there are {labels} labels and "
            f"{marks['bbox']} <bbox>.",
            "Give each box a label, or none of them, and write either <objects> or <bbox>.",
        )
    if not marks["objects"] and marks["bbox"] != boxes:
        raise PolymodalError(
            f"{marks['bbox']} <bbox> in the text, but `{key}` holds {boxes}.",
            "Write one <bbox> for each box, in order of reading, or <objects> once for all of them.",
        )
    if marks["ref-object"] and marks["ref-object"] != labels:
        raise PolymodalError(
            f"{marks['ref-object']} <ref-object> in the text, but the labels of `{key}` are {labels}.",
            "Write one <ref-object> for each label, in order of reading, or none at all.",
        )


def _label(label: Any, key: str) -> str:
    if not isinstance(label, str) or not label.strip():
        raise PolymodalError(
            f"a label of `{key}` is no text: {str(label)[:40]!r}.", "Write the objects' names, not numbers."
        )
    return label


def read(value: Any, key: str, attr: Attr, pictures: Sequence[Media]) -> _Objects:
    """A column of boxes: {"ref": [...], "bbox": [...]}, a list of such objects, or a list of boxes."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PolymodalError(f"`{key}` is not valid JSON: {error}.", "Write it again.") from None
    at, labels, boxes, facts = key, [], value, []
    if isinstance(value, Mapping):
        name, boxes = _named(value, BOXES)
        _, labels = _named(value, LABELS)
        at, boxes, labels = f"{key}.{name}", listed(boxes) or [], listed(labels) or []
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        facts, boxes = value, [_named(v, BOXES)[1] for v in value]
        labels = [_named(v, LABELS)[1] for v in value]
        labels = [] if all(label is None for label in labels) else labels
    boxes = [boxes] if _is_box(boxes) else boxes
    if not isinstance(boxes, list):
        raise PolymodalError(
            f"`{key}` holds no list of boxes: {str(value)[:60]!r}.",
            'Write {"ref": ["a dog"], "bbox": [[x1, y1, x2, y2]]}.',
        )
    if isinstance(value, Mapping):
        facts = [{k: _of_list(value.get(k), n) for k in FACTS} for n in range(len(boxes))]
    facts = facts or [{}] * len(boxes)
    named = labels if len(labels) == len(boxes) else [None] * len(boxes)
    found = []
    for n, (box, own, label) in enumerate(zip(boxes, facts, named, strict=True)):
        made = _box(box, f"{at}[{n}]", own, attr, pictures)
        found.append(replace(made, label=label if isinstance(label, str) else None))
    return _Objects(key, found, labels)


def _named(value: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    name = next((n for n in names if value.get(n) is not None), names[0])
    return name, value.get(name)


def _of_list(value: Any, n: int) -> Any:
    return value[n] if isinstance(value, (list, tuple)) and n < len(value) else value


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, (int, float)) for v in value)
    )


def _choice(facts: Mapping[str, Any], attr: Attr, name: str, known: Sequence[str], at: str) -> str:
    asked = facts.get(name) or getattr(attr, name) or known[0]
    if asked not in known:
        raise PolymodalError(
            f"`{at}`: {name} = {str(asked)[:40]!r} is not known.", f"Use one of: {', '.join(known)}."
        )
    return asked


def _box(value: Any, at: str, facts: Mapping[str, Any], attr: Attr, pictures: Sequence[Media]) -> Box:
    form = _choice(facts, attr, "bbox_format", FORMATS, at)
    scale = SCALES[_choice(facts, attr, "bbox_type", tuple(SCALES), at)]
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 4):
        raise PolymodalError(
            f"`{at}` = {str(value)[:60]} is no box.", "Write [x1, y1, x2, y2], or [x, y] for a point."
        )
    for number in value:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 1e7:
            raise PolymodalError(
                f"`{at}` = {str(list(value))[:60]} holds {str(number)[:20]!r}, which is no coordinate.",
                "Write finite numbers.",
            )
    values = tuple(map(float, value))
    if len(values) == 4 and form != "xyxy":
        x, y, width, height = values
        x, y = (x - width / 2, y - height / 2) if form == "cxcywh" else (x, y)
        values = (x, y, x + width, y + height)
    if len(values) == 4 and not (values[0] <= values[2] and values[1] <= values[3]):
        raise PolymodalError(
            f"`{at}` = {str(list(value))[:80]} ends before it begins (as {form}).",
            "Write the upper left corner first; if the last two are width and height, set bbox_format: xywh.",
        )
    number = facts.get("image_id") or 0
    if not isinstance(number, int) or not 0 <= number < len(pictures):
        raise PolymodalError(
            f"`{at}` is a box of picture {str(number)[:20]} (image_id counts from 0), the row has "
            f"{len(pictures)} of them.",
            "Give the row its picture, or correct image_id.",
        )
    return Box(values, pictures[number], scale, at=at)
