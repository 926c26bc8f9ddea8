"""Rows of what is to be generated: a picture or a clip and what it shows; and the lists that name folders
of them.

Part of the data room: sees errors, recipe, references and sample. The documented rows are {path, cap,
num_frames, fps, resolution}; the captions that others use are known by their names. A row becomes a Record
whose user says the first caption and whose assistant answers with the medium; all captions are in
`extra["captions"]`. What the medium is to be made from (a source, its mask, pictures to refer to) the user
shows before the caption; `extra["given"]` says which is which.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message, Record
from polymodal.data.files import AUDIO, IMAGE, VIDEO, Rows
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


def caption_record(row: Mapping[str, Any], where: str, attr: Attr, references: References) -> Record:
    """Raises PolymodalError with `where`, the key, the cause and the mend."""
    value, key = first(row, attr.videos or attr.images, MEDIA)
    value = listed(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    members = {kind: row_members(row, kind) for kind in KINDS} if "__media__" in row else {}
    for kind, named in members.items():
        if value is None and named:
            value = Media(kind, next(iter(named.values())))
        elif data := member_named(named, value):
            value = Media(kind, data)
    if value is None or value == "":
        raise PolymodalError(
            f"{where}: the row names no picture or clip (looked for {', '.join(MEDIA[:5])}).",
            "Name the column in data.attr.videos or data.attr.images.",
        )
    medium = (
        value if isinstance(value, Media) else references.medium(_kind(value, key, where), value, where, key)
    )
    captions, key = first(row, attr.prompt, CAPTIONS)
    captions = listed(captions)
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise PolymodalError(
            f"{where}: the row has no caption (looked for {', '.join(CAPTIONS)}).",
            "Write one as `cap`, or a list of several; name another column in data.attr.prompt. For a file in a "
            "directory: in a .txt of its name beside it, or one for all as `caption`.",
        )
    media_columns = {*MEDIA, attr.videos, attr.images, *(name for names in GIVEN.values() for name in names)}
    extra = {
        k: v
        for k, v in row.items()
        if isinstance(v, (str, int, float, dict))
        and not k.startswith("__")
        and not (isinstance(v, dict) and k in media_columns)
    }
    given = _given(row, where, references)
    taken = {
        key: found for key, count in TAKEN.items() if (found := _numbers(row.get(key), count, key, where))
    }
    if taken and given:
        raise PolymodalError(
            f"{where}: `{next(iter(taken))}` cuts the row's medium alone, not what it is made from.",
            "Cut the files themselves, and leave that column out.",
        )
    shown = [m for group in given.values() for m in group]
    messages = (Message("user", (*shown, captions[0])), Message("assistant", (medium,)))
    return Record(messages, where, extra={**extra, **taken, "captions": tuple(captions), "given": given})


def _numbers(value: Any, count: int, key: str, where: str) -> tuple[int, ...] | None:
    """Whole numbers of `cut` or `crop`: a list, or its text in a table; None where there are none."""
    value = listed(value)
    if value is None or value in ("", []):
        return None
    if isinstance(value, list) and len(value) == count:
        with contextlib.suppress(ValueError, TypeError):
            found = tuple(int(v) for v in value)
            if all(v == float(n) for v, n in zip(found, value, strict=True)):
                return found
    raise PolymodalError(
        f"{where}: `{key}` = {str(value)[:60]} is no list of {count} whole numbers.",
        "Write cut as [first frame, frame after the last], crop as [left, right, top, bottom] in pixels.",
    )


def _given(row: Mapping[str, Any], where: str, references: References) -> dict[str, tuple[Media, ...]]:
    """Role -> its media, of those that the row names; null and empty lists name none."""
    found = {}
    for role, names in GIVEN.items():
        value, key = first(row, None, names)
        value = listed(value)
        if value is None or (isinstance(value, (str, list)) and not value):
            continue
        several = role == "references"
        entries = value if isinstance(value, list) and several else [value]
        media = tuple(references.medium(_kind(e, key, where), e, where, key) for e in entries)
        odd = next((m for m in media if several and m.kind != "image"), None)
        if odd is not None:
            raise PolymodalError(
                f"{where}: `{key}` names a video, references are pictures.", "Name pictures there."
            )
        found[role] = media
    return found


def _kind(value: Any, key: str, where: str) -> Any:
    """image or video, by the file's ending, else by the column's name."""
    name = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(name, list):
        return "video"  # a list of frame images
    ending = os.path.splitext(name)[1].lower().removeprefix(".") if isinstance(name, str) else ""
    if ending in VIDEO or ending == "gif":
        return "video"
    if ending in IMAGE or key.startswith(("image", "src_image", "src_ref", "ref")):
        return "image"
    if key.startswith(("video", "src_video")):
        return "video"
    raise PolymodalError(
        f"{where}: `{key}` = {str(value)[:60]} is neither a known picture nor a known video by its ending.",
        f"Known: {', '.join(sorted(IMAGE | VIDEO))}.",
    )


class Folder(Rows):
    """The media in a directory and below, as rows {path, cap}, of audio {audio, text}; hidden files are
    passed over.

    The text is that of the .txt or .caption of the same name beside the medium; without one it is left out.
    texts: of how many media there is one.
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
            digest.update(f"{name} {os.path.getsize(os.path.join(path, name))}\n".encode())
            if text is not None:
                with open(os.path.join(path, text), "rb") as file:
                    digest.update(file.read())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name, beside = self.files[i], self.beside[i]
        medium, caption = ("audio", "text") if _ending(name) in AUDIO else ("path", CAPTIONS[0])
        if beside is None:
            return {medium: name}
        try:
            with open(os.path.join(self.path, beside), encoding="utf-8-sig") as file:
                return {medium: name, caption: file.read().strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise PolymodalError(
                f"{os.path.join(self.path, beside)} cannot be read: {error}.", "Save it as UTF-8 text."
            ) from None

    def where(self, i: int) -> str:
        return os.path.join(self.path, self.files[i])


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower().removeprefix(".")


def _texts(name: str) -> tuple[str, str]:
    """Names of the text that may lie beside a medium."""
    stem = os.path.splitext(name)[0]
    return f"{stem}.txt", f"{stem}.caption"


class Captioned(Rows):
    """Rows whose media say nothing of themselves, with one caption for all of these."""

    def __init__(self, rows: Rows, caption: str, attr: Attr):
        super().__init__(rows.path)
        self.rows, self.caption, self.names = rows, caption, attr
        self.fingerprint = hashlib.blake2b(
            f"{rows.fingerprint} {caption}".encode(), digest_size=16
        ).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        said, _ = first(row, self.names.prompt, CAPTIONS)
        return row if said not in (None, "", []) else {**row, self.names.prompt or CAPTIONS[0]: self.caption}

    def where(self, i: int) -> str:
        return self.rows.where(i)


def listing(path: str) -> list[tuple[str, str]]:
    """Lines `folder,annotation file` of a text file -> (annotation file, folder).

    Paths start from the working directory, or from the text file's own where they are there. Raises
    PolymodalError.
    """
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymodalError(f"{path} cannot be read: {error}.") from None
    for number, line in enumerate(lines, 1):
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
