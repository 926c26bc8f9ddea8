"""Rows of what is to be generated: a picture or a clip with its caption; and the lists that name folders of
them.

The documented rows are {path, cap, num_frames, fps, resolution}; other usual column names are known too. A
row becomes a Record whose user message is the first caption and whose assistant message is the medium; all
captions are in `extra["captions"]`. What the medium is made from (a source, its mask, reference pictures)
stands before the caption, and by role in `extra["given"]`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import open_file
from polymodal.core.sample import Media, Message, Record
from polymodal.data.files import AUDIO, IMAGE, MAX_TEXT, VIDEO, Rows, read_text
from polymodal.data.references import KINDS, References, first, listed, member_named, row_members
from polymodal.recipe import Attr

MEDIA = ("path", "video", "image", "file", "file_name", "media_path", "videos", "images")
GIVEN = {
    "source": ("src_video", "src_image"),
    "mask": ("src_video_mask", "src_mask"),
    "references": ("src_ref_images", "ref_images"),
}
"""Roles of what a medium is made from, and the columns that name it. Only `references` may be several
pictures."""
TAKEN = {"cut": 2, "crop": 4}
"""What of a medium a row takes: cut = [first frame, frame after the last], crop = [left, right, top,
bottom] in pixels of the file, right and bottom excluded: the fields of Open-Sora Plan's lists."""
CAPTIONS = ("cap", "caption", "captions", "text", "prompt")


def is_caption_row(row: Mapping[str, Any], attr: Attr) -> bool:
    """Whether a row of no named format is a medium with its caption."""
    medium, _ = first(row, attr.videos or attr.images, MEDIA)
    caption, _ = first(row, attr.prompt, CAPTIONS[:3])
    return medium is not None and caption is not None


def caption_record(
    row: Mapping[str, Any], where: str, attr: Attr, references: References, medium: Media | None = None
) -> Record:
    """medium: in place of the one that the row names. Raises PolymodalError with the key, the cause and a
    fix."""
    medium = _medium(row, attr, references) if medium is None else medium
    captions, _ = first(row, attr.prompt, CAPTIONS)
    captions = listed(captions)
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise PolymodalError(
            f"the row has no caption (looked for {', '.join(CAPTIONS)}).",
            "Write one as `cap`, or a list of several; name another column in data.attr.prompt. For a file "
            "in a directory: in a .txt of its name beside it, or one for all as `caption`.",
        )
    media_columns = {*MEDIA, attr.videos, attr.images, *(name for names in GIVEN.values() for name in names)}
    extra: dict[str, Any] = {}
    for key, value in row.items():
        plain = isinstance(value, (str, int, float)) or (isinstance(value, dict) and key not in media_columns)
        if plain and not key.startswith("__"):
            extra[key] = value
    given = _given(row, references)
    for key, count in TAKEN.items():
        numbers = _numbers(row.get(key), count, key)
        if numbers and given:
            raise PolymodalError(
                f"`{key}` cuts the row's medium alone, not what it is made from.",
                "Cut the files themselves, and leave that column out.",
            )
        extra |= {key: numbers} if numbers else {}
    shown = [m for group in given.values() for m in group]
    messages = (Message("user", (*shown, captions[0])), Message("assistant", (medium,)))
    return Record(messages, where, extra={**extra, "captions": tuple(captions), "given": given})


def _medium(row: Mapping[str, Any], attr: Attr, references: References) -> Media:
    value, key = first(row, attr.videos or attr.images, MEDIA)
    value = listed(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    for kind in KINDS if "__media__" in row else ():
        members = row_members(row, kind)
        if value is None and members:
            return Media(kind, next(iter(members.values())))
        if data := member_named(members, value):
            return Media(kind, data)
    if value is None or value == "":
        raise PolymodalError(
            f"the row names no picture or clip (looked for {', '.join(MEDIA[:5])}).",
            "Name the column in data.attr.videos or data.attr.images.",
        )
    return references.medium(media_kind(value, key), value, key)


def _numbers(value: Any, count: int, key: str) -> tuple[int, ...] | None:
    """Whole numbers of `cut` or `crop`: a list, or its text in a table; None if there are none."""
    value = listed(value)
    if value is None or value in ("", []):
        return None
    if isinstance(value, list) and len(value) == count:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            numbers = tuple(int(v) for v in value)
            if all(v == float(n) for v, n in zip(numbers, value, strict=True)):
                return numbers
    raise PolymodalError(
        f"`{key}` = {str(value)[:60]} is no list of {count} whole numbers.",
        "Write cut as [first frame, frame after the last], crop as [left, right, top, bottom] in pixels.",
    )


def _given(row: Mapping[str, Any], references: References) -> dict[str, tuple[Media, ...]]:
    """Role -> its media, of those that the row names; null and empty lists name none."""
    given = {}
    for role, names in GIVEN.items():
        value, key = first(row, None, names)
        value = listed(value)
        if value is None or (isinstance(value, (str, list)) and not value):
            continue
        several = role == "references"
        entries = value if isinstance(value, list) and several else [value]
        media = tuple(references.medium(media_kind(entry, key), entry, key) for entry in entries)
        if several and any(m.kind != "image" for m in media):
            raise PolymodalError(f"`{key}` names a video, references are pictures.", "Name pictures there.")
        given[role] = media
    return given


def media_kind(value: Any, key: str) -> Any:
    """image or video, by the file's ending, else by the column's name."""
    name = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(name, list):
        return "video"  # a list of frame images
    ending = _ending(name) if isinstance(name, str) else ""
    if ending in VIDEO or ending == "gif":
        return "video"
    if ending in IMAGE or key.startswith(("image", "src_image", "src_ref", "ref")):
        return "image"
    if key.startswith(("video", "src_video")):
        return "video"
    raise PolymodalError(
        f"`{key}` = {str(value)[:60]} is neither a known picture nor a known video by its ending.",
        f"Known: {', '.join(sorted(IMAGE | VIDEO))}.",
    )


class Folder(Rows):
    """The media in a directory and below, as rows {path, cap}, of audio {audio, text}; hidden files are
    skipped.

    The text is that of the .txt or .caption of the same name beside the medium; without one it is left out.
    texts: how many media have one.
    """

    unit = "file"

    def __init__(self, path: str):
        super().__init__(path)
        found = {
            os.path.relpath(os.path.join(place, name), path)
            for place, _, names in os.walk(path)
            for name in names
            if not name.startswith(".")
        }
        self.files = sorted(n for n in found if _ending(n) in IMAGE | VIDEO | AUDIO)
        self.beside = [next((t for t in _texts(name) if t in found), None) for name in self.files]
        self.texts = len(self.beside) - self.beside.count(None)
        digest = hashlib.blake2b(digest_size=16)
        for name, text in zip(self.files, self.beside, strict=True):
            with contextlib.suppress(OSError):  # a link to nothing, or a pipe: named when the row is read
                size = os.path.getsize(os.path.join(path, name))
                digest.update(os.fsencode(name) + f" {size}\n".encode())
                if text is not None:
                    with open_file(os.path.join(path, text)) as file:
                        digest.update(file.read(MAX_TEXT))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def _row(self, i: int) -> dict[str, Any]:
        name, beside = self.files[i], self.beside[i]
        medium, caption = ("audio", "text") if _ending(name) in AUDIO else ("path", CAPTIONS[0])
        if beside is None:
            return {medium: name}
        return {medium: name, caption: read_text(os.path.join(self.path, beside)).strip()}

    def where(self, i: int) -> str:
        return os.path.join(self.path, self.files[i])


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower().removeprefix(".")


def _texts(name: str) -> tuple[str, str]:
    """Names of the text that may lie beside a medium."""
    stem = os.path.splitext(name)[0]
    return f"{stem}.txt", f"{stem}.caption"


class Captioned(Rows):
    """Rows with one caption for all that have none, and text around every caption."""

    def __init__(self, rows: Rows, caption: str | None, attr: Attr, prefix: str = "", suffix: str = ""):
        super().__init__(rows.path)
        self.rows, self.caption, self.names, self.around = rows, caption, attr, (prefix, suffix)
        added = [caption, prefix, suffix] if prefix or suffix else caption
        content = f"{rows.fingerprint} {added}".encode()
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        own, column = first(row, self.names.prompt, CAPTIONS)
        if own in (None, "", []):
            own, column = self.caption, self.names.prompt or CAPTIONS[0]
        if own is None:
            return row
        captions = listed(own)
        texts = captions if isinstance(captions, list) else [captions]
        prefix, suffix = self.around
        return {
            **row,
            column: [f"{prefix}{each}{suffix}" if isinstance(each, str) else each for each in texts],
        }

    def where(self, i: int) -> str:
        return self.rows.where(i)


def listing(path: str) -> list[tuple[str, str]]:
    """Lines `folder,annotation file` of a text file -> (annotation file, folder).

    Paths start from the working directory, or from the text file's own where they are there. Raises
    PolymodalError.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        folder, comma, annotation = (part.strip() for part in line.rpartition(","))
        if not comma or not folder or not annotation:
            raise PolymodalError(
                f"{path}, line {number}: `{line.strip()}` is not of the form folder,annotation file.",
                "Write e.g. videos,videos/data.json; one pair a line.",
            )
        here = os.path.dirname(path)
        folder, annotation = (p if os.path.exists(p) else os.path.join(here, p) for p in (folder, annotation))
        for what, place in (("folder", folder), ("annotation file", annotation)):
            if not os.path.exists(place):
                raise PolymodalError(
                    f"{path}, line {number}: the {what} {place} does not exist.",
                    f"Paths start from the working directory, {os.getcwd()}, or from the list's.",
                )
        found.append((annotation, folder))
    if not found:
        raise PolymodalError(f"{path}: the list names no data.", "Write lines of folder,annotation file.")
    return found
