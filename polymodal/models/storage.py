"""Checkpoint directories on disk: safetensors files read slice by slice, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import read_json

STEMS = ("model", "diffusion_pytorch_model")
"""Names under which transformers and diffusers look for weights."""

LFS = b"version https://git-lfs"

WINDOW = 32 << 20
"""Bytes of a file that may be mapped into memory at a time: mapped pages count as resident."""


DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}

READERS: list[Callable[[Path, Path], Any]] = []
"""Readers of other systems' checkpoints (the command line registers convert's): (directory, hub checkpoint of
the model) -> its tensors under the hub's names, to be used like Files, or None."""


def foreign(directory: Path, source: Path) -> Any:
    """The tensors of another system's checkpoint of the model in `source`; None when no reader can."""
    return next((found for reader in READERS if (found := reader(directory, source)) is not None), None)


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it."""
    if name not in DTYPES:
        raise PolymodalError(
            f"Tensors of the safetensors type {name} cannot be read.",
            "Use a checkpoint in bf16, fp16 or fp32.",
        )
    return DTYPES[name]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a text of git-lfs in place of the file itself."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


class Files:
    """The tensors of a checkpoint directory: shapes and dtypes from the headers, values slice by slice.

    shapes: key -> shape; dtypes: key -> safetensors' name of the dtype ("BF16"); order: key -> position in
    the files. Raises PolymodalError for everything that is not a whole set of safetensors files.
    """

    def __init__(self, directory: Path, stems: tuple[str, ...] = STEMS):
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.order: dict[str, int] = {}
        self.bytes_read = 0
        self._home: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped = 0
        for path in _shards(directory, stems):
            handle = _open(path)
            for key in handle.offset_keys():
                if key in self._home:
                    raise PolymodalError(
                        f"{directory}: the tensor {key} is in both {self._home[key].name} and {path.name}.",
                        "Remove the files of the other save.",
                    )
                part = handle.get_slice(key)
                self.shapes[key] = tuple(part.get_shape())
                self.dtypes[key] = part.get_dtype()
                self.order[key] = len(self.order)
                self._home[key] = path

    def where(self, key: str) -> Path:
        return self._home[key]

    def read(self, key: str, box: tuple[slice, ...], into: Tensor) -> None:
        """Copy a box of a stored tensor into `into` (same shape; cast to its dtype)."""
        for values, view in self._parts(key, box, into):
            view.copy_(values)

    def equals(self, key: str, box: tuple[slice, ...], other: Tensor) -> bool:
        """Whether a box of a stored tensor, cast to other's dtype, is `other`."""
        return all(torch.equal(values.to(view), view) for values, view in self._parts(key, box, other))

    def alike(self, key: str, other: str) -> bool:
        """Whether two stored tensors of one shape hold the same values; read in parts until they differ."""
        row_bytes = prod(self.shapes[key][1:]) * dtype_of(self.dtypes[key]).itemsize
        step = max(1, WINDOW // 4 // max(1, row_bytes))
        one, two = (_open(self._home[k]).get_slice(k) for k in (key, other))
        parts = (slice(at, at + step) for at in range(0, self.shapes[key][0], step))
        return all(torch.equal(one[part].float(), two[part].float()) for part in parts)

    def _parts(self, key: str, box: tuple[slice, ...], target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(stored values, view of the target) of one part of the box at a time."""
        path, size = self._home[key], dtype_of(self.dtypes[key]).itemsize
        for part, view, spanned in _windows(box, self.shapes[key], target, WINDOW // 2 // size):
            if self._open is None or self._open[0] != path or self._mapped + spanned * size > WINDOW:
                self.close()
                self._open = (path, _open(path))
            source = self._open[1].get_slice(key)
            values = source[part] if part else source[...]
            self._mapped += spanned * size
            self.bytes_read += values.numel() * size
            yield values, view

    def whole(self, key: str) -> Tensor:
        """A stored tensor in full, in its own dtype."""
        tensor = _open(self._home[key]).get_tensor(key).clone()
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        self._open, self._mapped = None, 0


def _windows(
    box: tuple[slice, ...], shape: tuple[int, ...], target: Tensor, limit: int
) -> Iterator[tuple[tuple[slice, ...], Tensor, int]]:
    """Cut a box along its first real dimension into parts that span at most `limit` elements of the file.

    Yields (slices, view of the target, elements spanned): a narrow column of a matrix spans whole rows.
    """
    if target.numel() == 0:
        return
    dim = next((d for d, size in enumerate(target.shape) if size > 1), None)
    if dim is None:
        yield box, target, 1
        return
    row = prod(shape[dim + 1 :])
    step = max(1, limit // row)
    for begin in range(0, target.shape[dim], step):
        size = min(step, target.shape[dim] - begin)
        start = box[dim].start + begin
        part = (*box[:dim], slice(start, start + size), *box[dim + 1 :])
        yield part, target.narrow(dim, begin, size), size * row


def _open(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except Exception as error:
        raise PolymodalError(*_cause(path, error)) from None


def _cause(path: Path, error: Exception) -> tuple[str, str]:
    """(message, hint) for a file that safetensors cannot open."""
    again = "Fetch it again (`polymodal download` resumes), and compare its size with the hub's."
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        return f"{path} does not exist.", again
    except OSError as problem:
        return f"{path} cannot be read: {problem.strerror}.", "Check its permissions and the disk."
    if is_lfs_pointer(path):
        return (
            f"{path} is a git-lfs pointer of {size} bytes, not the weights.",
            f"Run `git lfs pull` in {path.parent}, or use `polymodal download`.",
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path} is a web page, not weights: the download was answered with an error page.", again
    if size == 0:
        return f"{path} is empty.", again
    return f"{path} is cut short or corrupt ({size} bytes; {cause(error)}).", again


def _shards(directory: Path, stems: tuple[str, ...]) -> list[Path]:
    """The files that hold a checkpoint's weights, all of them present."""
    if not directory.is_dir():
        raise PolymodalError(
            f"{directory} is not a directory.", "Give the directory of a hub checkpoint, or a hub id."
        )
    for stem in stems:
        index = directory / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(index)
        if (directory / f"{stem}.safetensors").is_file():
            return [directory / f"{stem}.safetensors"]
        numbered = sorted(directory.glob(f"{stem}-*-of-*.safetensors"))
        if numbered:
            total = numbered[0].stem.rpartition("-of-")[2].lstrip("0")
            if total != str(len(numbered)):
                count = len(numbered)
                raise PolymodalError(
                    f"{directory} has {count} shards but their names say {total}, and there is no index.",
                    "Fetch the missing files.",
                )
            return numbered
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    other = [n for n in names if n.endswith(".safetensors")]
    if other:
        expected = ", ".join(f"{stem}.safetensors" for stem in stems)
        raise PolymodalError(
            f"{directory} has {', '.join(other[:3])}, but none of the files that the library reads "
            f"({expected}, or shards of them).",
            "Give the directory with the library's own layout, or convert the checkpoint first.",
        )
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise PolymodalError(
            f"{directory} holds its weights as pickles only ({', '.join(pickles[:3])}), "
            "which cannot be read slice by slice and can run code.",
            "Use a revision with safetensors, or save it again with transformers' save_pretrained.",
        )
    raise PolymodalError(
        f"{directory} has no weights (no .safetensors file).",
        "Finish the download, or set model.init: random.",
    )


def _indexed(index: Path) -> list[Path]:
    """The shards that an index lists, with all the tensors that it lists for them."""
    if is_lfs_pointer(index):
        raise PolymodalError(
            f"{index} is a git-lfs pointer, not the index.", f"Run `git lfs pull` in {index.parent}."
        )
    table, paths = shards(index)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise PolymodalError(
            f"{index.parent} lacks {len(missing)} of the {len(paths)} files that {index.name} lists "
            f"(first: {missing[0]}).",
            "Fetch the missing files (`polymodal download` resumes).",
        )
    for path in paths:
        have = set(_open(path).keys())
        lost = [key for key, name in table.items() if name == path.name and key not in have]
        if lost:
            raise PolymodalError(
                f"{path} lacks {len(lost)} of the tensors that {index.name} lists for it (first: {lost[0]}).",
                "Index and files are of different saves: fetch them again.",
            )
    return paths


def shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    """(tensor -> file's name, the files) of an index of shards. Raises PolymodalError."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise PolymodalError(f"{index} is no index of shards: it has no weight_map.", "Fetch it again.")
    for name in table.values():
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise PolymodalError(
                f"{index} lists {name!r:.80}, which is not the name of a file beside it.",
                "Take another copy of the checkpoint: an index of transformers or diffusers has plain names.",
            )
    return table, [index.parent / name for name in sorted(set(table.values()))]


def to_publish(root: Path, path: Path) -> Path:
    """A file of a checkpoint's directory that is going to be copied elsewhere.

    Raises PolymodalError for a link that leads out of the directory (and of the hub's cache that it lies in):
    whoever made the checkpoint could have private files copied.
    """
    home, file = root.resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not file.is_relative_to(home) and not file.is_relative_to(blobs):
        raise PolymodalError(
            f"{path} is a link to {file}, outside of the checkpoint: it is not copied.",
            "Remove the link; if that file belongs to the checkpoint, put a copy of it in its place.",
        )
    return file


def write_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file. Raises PolymodalError for a disk that is full or not writable."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(path), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise PolymodalError(
            f"{path} could not be written: {error}.", "Free space there, or choose another directory."
        ) from None
