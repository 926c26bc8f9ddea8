"""Encoded features on disk: one file a sample, a list of them, and a manifest that says what made them.

Part of the data room: sees errors, files, sample and torch. The layout is the documented one (`data.jsonl` at the root,
`features/*`), with a manifest beside it; files are safetensors, or the documented `.pt` with its names. What exists is
whole: files appear by renaming.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record, SampleLengths
from polymodal.data.captions import TAKEN
from polymodal.data.files import JsonLines

VERSION = 1
MANIFEST, LIST, FOLDER, EMPTY = "manifest.json", "data.jsonl", "features", "empty.safetensors"
TEXT = "text"  # keys of a caption's tensors: text.<number>.<name>


class Part(NamedTuple):
    """One dataset of the list, as the schedule wants it."""

    name: str
    start: int
    stop: int
    weight: float | None
    repeat: float
    fingerprint: str


# ---- names and identities -------------------------------------------------------------------------------------------


def _sources(record: Record, given: Sequence[str]) -> list[str | bytes]:
    """Files of the medium, then those of what it is made from, of the roles `given`."""
    media = [record.media[-1]]
    media += [m for role, group in record.extra.get("given", {}).items() if role in given for m in group]
    return [name for m in media for name in ((m.source,) if isinstance(m.source, (str, bytes)) else m.source)]


def identity(record: Record, given: Sequence[str] = ()) -> dict[str, Any]:
    """What a sample's features depend on besides the settings: its medium's file, what it is made from, its captions.

    given: the roles that the family takes.
    """
    files: list[list[Any]] = []
    for name in _sources(record, given):
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


def file_name(who: Mapping[str, Any], ending: str) -> str:
    """features/<name of the medium>-<hash>: readable, and no two samples share one."""
    digest = hashlib.blake2b(json.dumps(who, sort_keys=True).encode(), digest_size=8).hexdigest()
    stem = str(who["files"][0][0]).rpartition("/")[2].replace(".", "_") or "sample"
    return f"{FOLDER}/{stem[-80:]}-{digest}.{ending}"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)


def content_hash(record: Record, given: Sequence[str] = ()) -> str:
    """Hash of the bytes of the medium and of what it is made from."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _sources(record, given):
        if isinstance(name, bytes):
            digest.update(name)
            continue
        with open(name, "rb") as file:
            while chunk := file.read(4 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# ---- one sample's file ----------------------------------------------------------------------------------------------


def write_sample(
    path: Path,
    media: Mapping[str, Tensor],
    captions: Sequence[Mapping[str, Tensor]],
    names: Mapping[str, str],
) -> None:
    """Write a sample's tensors (without a batch axis) under `path`; names: ours -> the documented ones, for .pt."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    if path.suffix == ".pt":
        out: dict[str, Any] = {names.get(n, n): t.contiguous().clone() for n, t in media.items()}
        for name in captions[0]:
            found = [one[name].contiguous().clone() for one in captions]
            out[names.get(name, name)] = found[0] if len(found) == 1 else found
        torch.save(out, partial)
    else:
        from safetensors.torch import save_file

        flat = {n: t.contiguous().clone() for n, t in media.items()}
        for i, one in enumerate(captions):
            flat |= {f"{TEXT}.{i}.{n}": t.contiguous().clone() for n, t in one.items()}
        save_file(flat, partial)
    os.replace(partial, path)


def read_sample(path: Path, names: Mapping[str, str]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(media tensors, one mapping a caption) of a sample's file. Raises PolymodalError for one that cannot be read."""
    try:
        if path.suffix == ".pt":
            return _documented(torch.load(path, map_location="cpu", weights_only=True), names, path)
        from safetensors.torch import load_file

        flat = load_file(path)
    except PolymodalError:
        raise
    except Exception as error:  # safetensors and pickle raise types of their own
        raise PolymodalError(
            f"{path} cannot be read ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}).",
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
    found: Any, names: Mapping[str, str], path: Path
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    own = {theirs: ours for ours, theirs in names.items()}
    if not isinstance(found, dict) or own.get("video") not in {own.get(k, k) for k in found}:
        raise PolymodalError(
            f"{path} holds no `video` (its keys: {', '.join(map(str, found))[:120] if isinstance(found, dict) else type(found).__name__}).",
            "Documented feature files are mappings of video, prompt_ids, prompt_mask and the model's conditions.",
        )
    media: dict[str, Tensor] = {}
    text: dict[str, list[Tensor]] = {}
    for key, value in found.items():
        if value is None:
            continue
        if key.startswith("prompt"):
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            text[own.get(key, key)] = [v[0] if v.ndim == 3 and v.shape[0] == 1 else v for v in values]
        elif isinstance(value, Tensor):
            media[own.get(key, key)] = value
    count = max((len(v) for v in text.values()), default=0)
    return media, [
        {n: v[min(i, len(v) - 1)] for n, v in text.items() if n in own.values()} for i in range(count)
    ]


# ---- the whole ------------------------------------------------------------------------------------------------------


def write_list(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write data.jsonl so that it is there whole or not at all."""
    partial = directory / f".{LIST}.{os.getpid()}"
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, directory / LIST)


def hashes(directory: Path) -> dict[str, str]:
    """Feature file -> hash of what it was made of, by the list of a finished run; {} without one."""
    path = directory / LIST
    if not path.is_file():
        return {}
    rows = JsonLines(str(path))
    found = (rows[i] for i in range(len(rows)))
    return {row["file"]: row["hash"] for row in found if "file" in row and "hash" in row}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, None when there is none (features of another system). Raises PolymodalError for a broken one."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise PolymodalError(f"{path} is not readable: {error}.", "Run `polymodal encode` again.") from None


def differences(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that differ, each as `key (had X, now Y)`."""
    return [
        f"{key} (there {had.get(key)!r}, here {wanted.get(key)!r})"
        for key in sorted({*had, *wanted})
        if had.get(key) != wanted.get(key)
    ]


class Features:
    """An encoded directory as the schedule and the loader see it: lengths, buckets, and each sample's tensors.

    names: the family's documented names; wanted: the settings that training asks for; channels: of its latents;
    shares: (weight, repeat) by dataset of the recipe; tensors: what each sample must hold beside its latents. Picklable. Raises PolymodalError for a directory without
    features, one that is not finished, one made with other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        names: Mapping[str, str],
        grid: Any,
        wanted: Mapping[str, Any] | None = None,
        shares: Sequence[tuple[float | None, float]] = (),
        tensors: Sequence[str] = (),
    ):
        self.tensors = tuple(tensors)
        self.directory, self.names, self.grid = Path(directory), dict(names), grid
        if not (self.directory / LIST).is_file():
            begun = (self.directory / FOLDER).is_dir()
            deep = self.directory.name == FOLDER and (self.directory.parent / LIST).is_file()
            raise PolymodalError(
                f"{self.directory} holds no finished features (no {LIST}).",
                f"data.features is one level too deep: set it to {self.directory.parent}."
                if deep
                else "Run `polymodal encode` with this recipe again: it goes on where it stopped."
                if begun
                else "Run `polymodal encode` with this recipe first, or set data.features to where they are, or data.encode to online.",
            )
        self.manifest = read_manifest(self.directory)
        if self.manifest is not None and wanted is not None:
            other = differences(self.manifest["settings"], wanted)
            if other:
                raise PolymodalError(
                    f"The features in {self.directory} were made with other settings: {'; '.join(other[:4])}.",
                    "Encode into another directory (data.features), or set these keys as they were.",
                )
        rows = JsonLines(str(self.directory / LIST))
        self.rows = rows
        count = len(rows)
        self.tokens = np.zeros(count, np.int32)
        self.bytes = np.zeros(count, np.int64)
        shapes, datasets = np.zeros((count, 3), np.int32), np.zeros(count, np.int32)
        self.files: list[str] = []
        for i in range(count):
            row = rows[i]
            shapes[i] = self._shape(row, rows.where(i))
            self.tokens[i] = grid.tokens(*(int(x) for x in shapes[i]))
            self.bytes[i] = row.get("bytes", 0) or 4 * int(np.prod(grid.shape(*(int(x) for x in shapes[i]))))
            datasets[i] = row.get("dataset", 0)
            self.files.append(self._file(row, rows.where(i)))
        self.shapes, self.datasets = shapes, datasets
        self.buckets, self.bucket = np.unique(shapes, axis=0, return_inverse=True)
        self.bucket = self.bucket.reshape(-1).astype(np.int32)
        self.media: dict[str, np.ndarray] = {}
        self.trained = self.tokens
        self.usable = np.ones(count, bool)
        self.record = None
        self.parts = self._parts(datasets, shares)

    def _shape(self, row: Mapping[str, Any], where: str) -> tuple[int, int, int]:
        size = row.get("sample_size")
        if size is None and isinstance(row.get("file"), str):  # the documented lists of VACE say no sizes
            latents = read_sample(self.directory / self._file(row, where), self.names)[0].get("latents")
            if latents is not None and latents.ndim == 4:
                frames, height, width = latents.shape[1:]
                space = self.grid.space
                return (frames - 1) * self.grid.time + 1, height * space, width * space
        try:
            frames, height, width = (int(x) for x in (size.split("x") if isinstance(size, str) else size))  # type: ignore[union-attr]
            return frames, height, width
        except (ValueError, TypeError, AttributeError):
            raise PolymodalError(
                f"{where}: `sample_size` = {size!r} is not FRAMESxHEIGHTxWIDTH.",
                "Such rows are written by feature extraction, e.g. 81x480x832.",
            ) from None

    def _file(self, row: Mapping[str, Any], where: str) -> str:
        name = row.get("file")
        if not isinstance(name, str):
            raise PolymodalError(f"{where}: the row names no `file`.", "Run `polymodal encode` again.")
        if not (self.directory / name).is_file():
            nested = (self.directory.parent / name).is_file() and self.directory.name == FOLDER
            doubled = (self.directory / FOLDER / name).is_file()
            raise PolymodalError(
                f"{where}: the feature file {self.directory / name} does not exist.",
                f"data.features is one level too deep: set it to {self.directory.parent}."
                if nested
                else f"The files lie in {FOLDER}/{FOLDER}: move them one level up."
                if doubled
                else "Run `polymodal encode` again: it makes what is missing.",
            )
        return name

    def _parts(self, datasets: np.ndarray, shares: Sequence[tuple[float | None, float]]) -> list[Part]:
        parts = []
        for number in sorted(set(datasets.tolist())):
            places = np.flatnonzero(datasets == number)
            start, stop = int(places[0]), int(places[-1]) + 1
            weight, repeat = shares[number] if number < len(shares) else (None, 1.0)
            digest = hashlib.sha256("\n".join(self.files[start:stop]).encode()).hexdigest()[:16]
            parts.append(Part(f"dataset {number}", start, stop, weight, repeat, digest))
        return parts

    def __len__(self) -> int:
        return len(self.tokens)

    def measure(self, i: int) -> SampleLengths:
        frames, height, width = (int(x) for x in self.shapes[i])
        return SampleLengths(int(self.tokens[i]), int(self.tokens[i]), shape=(frames, height, width))

    def locate(self, i: int) -> tuple[int, int]:
        return i, -1

    def where(self, i: int) -> str:
        return str(self.directory / self.files[i])

    def sample(self, i: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """(media, captions) of row i; the latents are what its list says. Raises PolymodalError."""
        media, captions = read_sample(self.directory / self.files[i], self.names)
        wanted = self.grid.shape(*(int(x) for x in self.shapes[i]))
        latents = media.get("latents")
        if latents is None or tuple(latents.shape) != wanted:
            had = "none" if latents is None else list(latents.shape)
            raise PolymodalError(
                f"{self.where(i)}: the latents are {had}, this model's of {'x'.join(map(str, self.shapes[i]))} are {list(wanted)}.",
                "The features were made for another model: run `polymodal encode` with this recipe.",
            )
        if not captions:
            raise PolymodalError(
                f"{self.where(i)} holds no caption's embedding.", "Run `polymodal encode` again."
            )
        lacking = next((n for n in self.tensors if n not in media and n not in captions[0]), None)
        if lacking is not None:
            told = self.names.get(lacking, lacking)
            raise PolymodalError(
                f"{self.where(i)} holds no `{told}`, which this model is given beside the noise.",
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
