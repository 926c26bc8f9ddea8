"""Encoded features on disk: one file per sample, a list of them, and a manifest of the settings that made
them.

The layout is the documented one (`data.jsonl` at the root, `features/*`), with a manifest beside it; files
are safetensors, or the documented `.pt` with its names. Files appear by renaming, so each is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import file_stem, read_json, replace_file, written_whole
from polymodal.core.sample import Record, SampleLengths
from polymodal.data.captions import TAKEN
from polymodal.data.files import CHUNK, JsonLines
from polymodal.data.source import Part
from polymodal.runtime import host

VERSION = 1
MANIFEST, LIST, FOLDER, EMPTY = "manifest.json", "data.jsonl", "features", "empty.safetensors"
TEXT = "text"  # keys of a caption's tensors: text.<number>.<name>


# -- names and identities --------------------------------------------------


def sources(record: Record, given: Sequence[str]) -> list[str | bytes]:
    """Files of the medium (of both, where two are compared), then those of what it is made from, of the
    roles `given`."""
    media = [each.media[-1] for each in record.conversations]
    media += [m for role, group in record.extra.get("given", {}).items() if role in given for m in group]
    return [name for m in media for name in ((m.source,) if isinstance(m.source, (str, bytes)) else m.source)]


def identity(record: Record, given: Sequence[str] = ()) -> dict[str, Any]:
    """What a sample's features depend on besides the settings: its medium's file, what it is made from, its
    captions.

    given: the roles that the family takes.
    """
    files: list[list[Any]] = []
    for name in sources(record, given):
        if isinstance(name, bytes):
            files.append(["bytes", len(name), hashlib.blake2b(name, digest_size=8).hexdigest()])
            continue
        try:
            info = os.stat(name)
        except OSError as error:
            raise PolymodalError(
                f"{record.where}: {name} cannot be read: {error.strerror}.", "Check the path."
            ) from None
        files.append([name, info.st_size, info.st_mtime_ns])
    roles = {r: len(m) for r, m in record.extra.get("given", {}).items() if r in given}
    taken = {key: list(record.extra[key]) for key in TAKEN if key in record.extra}
    about = {"files": files, "captions": list(record.extra["captions"]), **taken}
    return {**about, **({"given": roles} if roles else {})}


def stamp(who: Mapping[str, Any]) -> str:
    """Of an identity what stays when its files are moved: sizes, times (of bytes their hash) and roles."""
    about = [[file[1:] for file in who["files"]], who.get("given")]
    return hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()


def file_name(who: Mapping[str, Any], ending: str) -> str:
    """features/<name of the medium>-<hash>: readable, and no two samples share one."""
    digest = hashlib.blake2b(json.dumps(who, sort_keys=True).encode(), digest_size=8).hexdigest()
    stem = file_stem(str(who["files"][0][0]).rpartition("/")[2].replace(".", "_"), 80)
    return f"{FOLDER}/{stem}-{digest}.{ending}"


def write_json(path: Path, value: Any) -> None:
    replace_file(path, json.dumps(value, indent=1, ensure_ascii=False))


def content_hash(record: Record, given: Sequence[str] = ()) -> str:
    """Hash of the bytes of the medium and of what it is made from."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sources(record, given):
        if isinstance(name, bytes):
            digest.update(name)
            continue
        with open(name, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


# -- one sample's file -----------------------------------------------------


def write_sample(
    path: Path,
    media: Mapping[str, Tensor],
    captions: Sequence[Mapping[str, Tensor]],
    names: Mapping[str, str],
) -> None:
    """Write a sample's tensors (without a batch axis) to `path`; names: ours -> the documented ones, for
    .pt."""
    if path.suffix == ".pt":
        out: dict[str, Any] = {names.get(n, n): t.contiguous().clone() for n, t in media.items()}
        for name in captions[0]:
            values = [caption[name].contiguous().clone() for caption in captions]
            out[names.get(name, name)] = values[0] if len(values) == 1 else values
        write_tensors(path, out)
        return
    flat = dict(media)
    for i, caption in enumerate(captions):
        flat |= {f"{TEXT}.{i}.{n}": t for n, t in caption.items()}
    write_tensors(path, flat)


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """One file, .pt or .safetensors, that is there whole or not at all. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_whole(path) as temporary:
        try:
            if path.suffix == ".pt":
                torch.save(dict(tensors), temporary)
            else:
                save_file({n: t.contiguous().clone() for n, t in tensors.items()}, temporary)
        except (SafetensorError, RuntimeError) as error:  # of what the system said, the text alone is left
            text = cause(error)
            full = "space left" in text or host.space(path.parent).free < 1 << 20
            raise OSError(errno.ENOSPC if full else errno.EIO, text, str(path)) from None


def read_sample(path: Path, names: Mapping[str, str]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(media tensors, one mapping a caption) of a sample's file. Raises PolymodalError for one that cannot
    be read."""
    try:
        if path.suffix == ".pt":
            return _documented(torch.load(path, map_location="cpu", weights_only=True), names, path)
        from safetensors.torch import load_file

        flat = load_file(path)
    except PolymodalError:
        raise
    except Exception as error:  # safetensors and pickle raise types of their own
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PolymodalError(
            f"{path} cannot be read ({cause}).",
            "Remove it and run `polymodal encode` again: it makes what is missing.",
        ) from None
    captions: dict[int, dict[str, Tensor]] = {}
    media: dict[str, Tensor] = {}
    for key, tensor in flat.items():
        if key.startswith(TEXT + "."):
            _, number, name = key.split(".", 2)
            captions.setdefault(int(number), {})[name] = tensor
        else:
            media[key] = tensor
    return media, [captions[i] for i in sorted(captions)]


def _documented(
    content: Any, names: Mapping[str, str], path: Path
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    own = {theirs: ours for ours, theirs in names.items()}
    if not isinstance(content, dict) or own.get("video") not in {own.get(k, k) for k in content}:
        keys = ", ".join(map(str, content))[:120] if isinstance(content, dict) else type(content).__name__
        raise PolymodalError(
            f"{path} holds no `video` (its keys: {keys}).",
            "Documented feature files are mappings of video, prompt_ids, prompt_mask and the model's "
            "conditions.",
        )
    media: dict[str, Tensor] = {}
    text: dict[str, list[Tensor]] = {}
    for key, value in content.items():
        name = str(own.get(key, key))
        if key.startswith("prompt") and value is not None:
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            text[name] = [v[0] if v.ndim == 3 and v.shape[0] == 1 else v for v in values]
        elif isinstance(value, Tensor):
            media[name] = value
    captions = []
    for i in range(max((len(values) for values in text.values()), default=0)):
        captions.append({n: v[min(i, len(v) - 1)] for n, v in text.items() if n in own.values()})
    return media, captions


# -- the whole -------------------------------------------------------------


def write_list(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write data.jsonl."""
    with written_whole(directory / LIST) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def hashes(directory: Path) -> dict[str, str]:
    """Feature files of a row -> hash of what they were made of, by the list of a finished run; {} without
    one."""
    path = directory / LIST
    if not path.is_file():
        return {}
    lines = JsonLines(str(path))
    rows = (lines[i] for i in range(len(lines)))
    return {hash_key(row): row["hash"] for row in rows if "file" in row and "hash" in row}


def hash_key(row: Mapping[str, Any]) -> str:
    """The feature files of a row of the list."""
    return " ".join(str(row[key]) for key in ("file", "file_rejected") if key in row)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, None when there is none (features of another system). Raises PolymodalError for a broken
    one."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    return read_json(path, "Run `polymodal encode` again.")


def _scores(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """Of the chosen and the rejected sample; None without any."""
    values = [row.get("score"), row.get("score_rejected")]
    if values == [None, None]:
        return None
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values]
    if not all(numbers):
        raise PolymodalError(
            f"{where}: `score` = {values[0]!r} and `score_rejected` = {values[1]!r} are no two numbers.",
            "Write both, or none.",
        )
    return float(values[0]), float(values[1])  # type: ignore[arg-type]


def differences(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that differ, each as `key (there X, here Y)`."""
    return [
        f"{key} (there {had.get(key)!r}, here {wanted.get(key)!r})"
        for key in sorted({*had, *wanted})
        if had.get(key) != wanted.get(key)
    ]


class Features:
    """An encoded directory as the schedule and the loader see it: lengths, buckets, and each sample's
    tensors. Picklable.

    names: the family's documented names; wanted: the settings that training asks for; shares: (weight,
    repeat) by dataset of the recipe; tensors: what each sample must hold beside its latents; pairs: whether
    rows name a second file, `file_rejected`; min_gap: the least difference of their scores, if they have any,
    and equal ones are no pair. Raises PolymodalError for a directory without features, an
    unfinished one, and one made with other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        names: Mapping[str, str],
        grid: Any,
        wanted: Mapping[str, Any] | None = None,
        shares: Sequence[tuple[float | None, float]] = (),
        tensors: Sequence[str] = (),
        pairs: bool = False,
        min_gap: float = 0.0,
    ):
        self.tensors, self.pairs = tuple(tensors), pairs
        self.directory, self.names, self.grid = Path(directory), dict(names), grid
        if not (self.directory / LIST).is_file():
            raise PolymodalError(
                f"{self.directory} holds no finished features (no {LIST}).", self._why_unfinished()
            )
        self.manifest = read_manifest(self.directory)
        if self.manifest is not None and wanted is not None:
            other = differences(self.manifest["settings"], wanted)
            if other:
                settings = "; ".join(other[:4])
                raise PolymodalError(
                    f"The features in {self.directory} were made with other settings: {settings}.",
                    "Encode into another directory (data.features), or set these keys as they were.",
                )
        self.rows = rows = JsonLines(str(self.directory / LIST))
        count = len(rows)
        self.tokens, self.bytes = np.zeros(count, np.int32), np.zeros(count, np.int64)
        self.shapes, self.datasets = np.zeros((count, 3), np.int32), np.zeros(count, np.int32)
        self.files: list[str] = []
        self.rejected: list[str] = []
        self.scores: list[tuple[float, float] | None] = []
        for i in range(count):
            row, where = rows[i], rows.where(i)
            shape = self._shape(row, where)
            self.shapes[i] = shape
            self.tokens[i] = grid.tokens(*shape)
            self.bytes[i] = row.get("bytes", 0) or 4 * math.prod(grid.shape(*shape))
            self.datasets[i] = row.get("dataset", 0)
            self.files.append(self._file(row, where))
            if pairs:
                self.rejected.append(self._file(row, where, "file_rejected"))
                self.scores.append(_scores(row, where))
        self.buckets, self.bucket = np.unique(self.shapes, axis=0, return_inverse=True)
        self.bucket = self.bucket.reshape(-1).astype(np.int32)
        self.media: dict[str, np.ndarray] = {}
        self.trained = self.tokens
        gaps = (None if each is None else each[0] - each[1] for each in self.scores)
        self.usable = np.array([g is None or (g > 0 and g >= min_gap) for g in gaps] or np.ones(count), bool)
        self.record = None
        self.parts = self._parts(shares)

    def _why_unfinished(self) -> str:
        if self.directory.name == FOLDER and (self.directory.parent / LIST).is_file():
            return f"data.features is one level too deep: set it to {self.directory.parent}."
        if (self.directory / FOLDER).is_dir():
            return "Run `polymodal encode` with this recipe again: it goes on where it stopped."
        return (
            "Run `polymodal encode` with this recipe first, or set data.features to where they are, or "
            "data.encode to online."
        )

    def _shape(self, row: Mapping[str, Any], where: str) -> tuple[int, int, int]:
        size = row.get("sample_size")
        if size is None and isinstance(row.get("file"), str):  # the documented lists of VACE have no sizes
            latents = read_sample(self.directory / self._file(row, where), self.names)[0].get("latents")
            if latents is not None and latents.ndim == 4:
                frames, height, width = latents.shape[1:]
                space = self.grid.space
                return (frames - 1) * self.grid.time + 1, height * space, width * space
        try:
            numbers: Any = size.split("x") if isinstance(size, str) else size
            frames, height, width = (int(number) for number in numbers)
            return frames, height, width
        except (ValueError, TypeError):
            raise PolymodalError(
                f"{where}: `sample_size` = {size!r} is not FRAMESxHEIGHTxWIDTH.",
                "Such rows are written by feature extraction, e.g. 81x480x832.",
            ) from None

    def _file(self, row: Mapping[str, Any], where: str, key: str = "file") -> str:
        name = row.get(key)
        if not isinstance(name, str) and self.pairs and key != "file":
            raise PolymodalError(
                f"{where}: the row names no `file_rejected`: these features are no pairs.",
                "Encode rows that compare two with this recipe, or leave train.objective out.",
            )
        if not isinstance(name, str):
            raise PolymodalError(f"{where}: the row names no `file`.", "Run `polymodal encode` again.")
        if (self.directory / name).is_file():
            return name
        hint = "Run `polymodal encode` again: it makes what is missing."
        if self.directory.name == FOLDER and (self.directory.parent / name).is_file():
            hint = f"data.features is one level too deep: set it to {self.directory.parent}."
        elif (self.directory / FOLDER / name).is_file():
            hint = f"The files lie in {FOLDER}/{FOLDER}: move them one level up."
        raise PolymodalError(f"{where}: the feature file {self.directory / name} does not exist.", hint)

    def _parts(self, shares: Sequence[tuple[float | None, float]]) -> list[Part]:
        parts = []
        for number in np.unique(self.datasets).tolist():
            places = np.flatnonzero(self.datasets == number)
            start, stop = int(places[0]), int(places[-1]) + 1
            weight, repeat = shares[number] if number < len(shares) else (None, 1.0)
            digest = hashlib.sha256("\n".join(self.files[start:stop]).encode()).hexdigest()[:16]
            parts.append(Part(f"dataset {number}", start, stop, weight, repeat, digest))
        return parts

    def changed(self) -> dict[str, str]:
        """As a corpus has it: features are replaced whole, so none is in the middle of a change."""
        return {}

    def __len__(self) -> int:
        return len(self.tokens)

    def measure(self, i: int) -> SampleLengths:
        tokens = int(self.tokens[i])
        return SampleLengths(tokens, tokens, shape=tuple(self.shapes[i].tolist()))

    def locate(self, i: int) -> tuple[int, int]:
        return i, -1

    def where(self, i: int) -> str:
        return str(self.directory / self.files[i])

    def samples(self, i: int) -> list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]]:
        """(media, captions) of row i, of a pair of the chosen and the rejected one; the latents have the size
        in the list. Raises PolymodalError."""
        files = [self.files[i], *([self.rejected[i]] if self.pairs else ())]
        return [self._sample(i, name) for name in files]

    def _sample(self, i: int, name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        path = self.directory / name
        media, captions = read_sample(path, self.names)
        shape = self.grid.shape(*self.shapes[i].tolist())
        latents = media.get("latents")
        if latents is None or tuple(latents.shape) != shape:
            actual = "none" if latents is None else list(latents.shape)
            size = "x".join(map(str, self.shapes[i]))
            raise PolymodalError(
                f"{path}: the latents are {actual}, this model's of {size} are {list(shape)}.",
                "The features were made for another model: run `polymodal encode` with this recipe.",
            )
        if not captions:
            raise PolymodalError(f"{path} holds no caption's embedding.", "Run `polymodal encode` again.")
        lacking = next((n for n in self.tensors if n not in media and n not in captions[0]), None)
        if lacking is not None:
            name = self.names.get(lacking, lacking)
            raise PolymodalError(
                f"{path} holds no `{name}`, which this model is given beside the noise.",
                "The features were made for another task or model: run `polymodal encode` with this recipe.",
            )
        return media, captions

    def empty(self) -> dict[str, Tensor]:
        """The empty caption's tensors, each [1, ...]; {} where the features have none."""
        path = self.directory / EMPTY
        if not path.is_file():
            return {}
        from safetensors.torch import load_file

        return dict(load_file(path))
