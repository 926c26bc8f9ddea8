"""The media that a row names: paths, bytes, data: URLs, members of a tar, lists of frame images.

Decides where relative paths start; opens nothing.
"""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media
from polymodal.core.text import parse_json
from polymodal.recipe import Attr

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("images", "image"),
    "video": ("videos", "video"),
    "audio": ("audios", "audio"),
}
BASE64 = re.compile(
    r"(?:/9j/|iVBO|R0lG|UklG|Qk0|T2dn|ZkxhQ|SUQz|AAAA..Z0eX)(?:[A-Za-z0-9+/\s]{24,}={0,2}\s*|.{256,})"
    r"|[A-Za-z0-9+/\s]{1024,}={0,2}\s*",
    re.DOTALL,
)
"""Base64 without a prefix: by the first letters of JPEG, PNG, GIF, RIFF, BMP, Ogg, FLAC, ID3, MP4; or
longer than a path."""
TYPES = {"image": "png", "video": "mp4", "audio": "wav"}
Kind = Literal["image", "video", "audio"]
KINDS: tuple[Kind, ...] = ("image", "video", "audio")


class References:
    """Media of the rows of one file. Picklable.

    Relative paths start from media_dir; without one, from the file's directory, or from the working
    directory where that has the medium's directory and the former has not.
    """

    def __init__(self, attr: Attr, path: str, media_dir: str | None):
        self.attr = attr
        self.base = os.path.expanduser(media_dir) if media_dir is not None else os.path.dirname(path)
        self.fixed = media_dir is not None
        self._folders: dict[str, str] = {}

    def of_row(self, row: Mapping[str, Any], kind: Kind) -> tuple[list[Media], str]:
        """The row's list of media of a kind, and the name of its column. Raises PolymodalError."""
        own = getattr(self.attr, f"{kind}s")
        value, key = first(row, own, COLUMNS[kind])
        if value is None and "__media__" not in row:
            return [], key
        members = row_members(row, kind)
        if value is None or (isinstance(value, (str, list)) and not value):
            return [Media(kind, data) for data in members.values()], key
        value = listed(value)
        entries = value if isinstance(value, list) else [value]
        out = []
        for n, entry in enumerate(entries):
            data = member_named(members, entry)
            out.append(Media(kind, data) if data else self.medium(kind, entry, f"{key}[{n}]"))
        return out, key

    def medium(self, kind: Kind, source: Any, at: str) -> Media:
        """One entry: a path, bytes, a data: URL, an object that holds one of them, or a video's list of
        frames."""
        if isinstance(source, Mapping):
            if kind == "audio" and source.get("array") is not None:
                return Media(kind, _wav(source, at))
            keys = ("bytes", "url", "path", kind, "data")
            name = next((k for k in keys if source.get(k) is not None), None)
            source = None if name is None else source[name]
            if name == "data" and isinstance(source, str) and not source.startswith("data:"):
                source = f"data:;base64,{source}"  # OpenAI's input_audio
        if isinstance(source, (bytes, bytearray)):
            return Media(kind, bytes(source))
        if isinstance(source, str) and source:
            return Media(kind, self._bytes_or_path(kind, source, at))
        if kind == "video" and isinstance(source, (list, tuple)) and source:
            if all(isinstance(s, str) and s for s in source):
                return Media(kind, tuple(self.path(s, at) for s in source))
        forms = ", or a list of frame images." if kind == "video" else " or a data: URL."
        raise PolymodalError(f"`{at}` names no {kind}: {str(source)[:40]!r}.", f"Give a path, bytes{forms}")

    def _bytes_or_path(self, kind: Kind, source: str, at: str) -> bytes | str:
        url = f"data:{kind}/{TYPES[kind]};base64,..."
        if source.startswith("data:"):
            head, _, data = source.partition(",")
            try:
                if not head.endswith(";base64"):
                    raise ValueError("not base64")
                return base64.b64decode(data, validate=True)
            except ValueError as error:
                raise PolymodalError(
                    f"`{at}` is a data: URL that cannot be decoded ({error}).", f"Write {url}"
                ) from None
        if BASE64.fullmatch(source):
            try:
                return base64.b64decode(source, validate=True)
            except ValueError as error:
                raise PolymodalError(
                    f"`{at}` looks like base64 but cannot be decoded ({error}).",
                    "Give a path, or whole base64 text.",
                ) from None
        if len(source) > 4096:
            raise PolymodalError(
                f"`{at}` is neither a path nor base64: {len(source)} characters, from {source[:40]!r}.",
                f"Give a path, or {url}",
            )
        return self.path(source, at)

    def path(self, source: str, at: str) -> str:
        """Where a named file lies. Raises PolymodalError for addresses on the network."""
        if "://" in source[:12]:
            if not source.startswith("file://"):
                raise PolymodalError(
                    f"`{at}` = {source[:60]} is on the network.",
                    "Training reads local files: download it and give the path.",
                )
            source = unquote(source[7:])
        if os.path.isabs(source):
            return source
        if self.fixed:
            return os.path.join(self.base, source)
        folder = os.path.dirname(source)
        base = self._folders.get(folder)
        if base is None:  # asked once a directory, not once a medium
            inside = os.path.isdir(os.path.join(self.base, folder) or ".") or not os.path.isdir(folder)
            base = self._folders[folder] = self.base if inside else ""
        return os.path.join(base, source)


def row_members(row: Mapping[str, Any], kind: str) -> dict[str, bytes]:
    """Members of a webdataset row that are of this kind: name -> bytes, in order."""
    return dict(row.get("__media__", {}).get(f"{kind}s", ()))


def member_named(members: Mapping[str, bytes], name: Any) -> bytes | None:
    """The one member that a row's entry names, by its path in the tar or by its file name; None without
    one."""
    if not members or not isinstance(name, str):
        return None
    last = os.path.basename(name)
    found = [m for m in members if m == name or m.endswith("/" + name) or os.path.basename(m) == last]
    return members[found[0]] if len(found) == 1 else None


def _wav(source: Mapping[str, Any], at: str) -> bytes:
    """Decoded audio {array [samples] or [samples, channels], sampling_rate} as a float32 wav file."""
    rate = source.get("sampling_rate")
    try:
        values = np.asarray(source["array"], np.float32)
    except (ValueError, TypeError, OverflowError):
        values = np.zeros(0, np.float32)
    shaped = values.size and (values.ndim == 1 or (values.ndim == 2 and values.shape[1] <= 64))
    if not isinstance(rate, int) or not 1 <= rate <= 1 << 20 or not shaped:
        raise PolymodalError(
            f"`{at}` is decoded audio without samples or without its sampling_rate.",
            'Write {"array": [...], "sampling_rate": 16000}, or the path of a file.',
        )
    data, channels = values.astype("<f4").tobytes(), values.shape[1] if values.ndim == 2 else 1
    form = struct.pack("<HHIIHH", 3, channels, rate, rate * channels * 4, channels * 4, 32)
    head = struct.pack("<4sI8sI", b"RIFF", 36 + len(data), b"WAVEfmt ", 16)
    return head + form + struct.pack("<4sI", b"data", len(data)) + data


def first(row: Mapping[str, Any], own: str | None, names: tuple[str, ...]) -> tuple[Any, str]:
    """The first column with a value, and its name; (None, the expected name) when there is none."""
    if own is not None:
        return row.get(own), own
    for name in names:
        if row.get(name) is not None:
            return row[name], name
    return None, names[0]


def listed(value: Any) -> Any:
    """JSON text of a list -> the list (csv and parquet keep lists so); anything else as it is."""
    if isinstance(value, str) and value[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value
