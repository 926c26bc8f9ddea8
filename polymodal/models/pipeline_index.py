"""What a diffusers pipeline's directory holds, by model_index.json; nothing is opened."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models import nets

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline may name, beside those that diffusers keeps in a module of one pipeline, and those
of models/nets."""


def is_pipeline(directory: str | Path) -> bool:
    return (Path(directory) / "model_index.json").is_file()


def read_index(directory: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline's directory. Raises PolymodalError, also for code that is no library's:
    diffusers would import any module that is named there, and files of a component that are called so."""
    path = Path(directory) / "model_index.json"
    index = read_json(path)
    named = index.get("_class_name", "Pipeline")
    if not isinstance(named, str) or not named.isidentifier():
        raise _foreign(path, "_class_name", named)
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry == [None, None]:
            continue
        library, cls = entry
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise PolymodalError(
                f"{path}: {name!r:.80} is no name of a component.", "Fetch the pipeline again."
            )
        known = isinstance(library, str) and (
            library in LIBRARIES or is_own(library) or library in _modules_of_pipelines()
        )
        if None in entry and (library is None or known):
            continue
        if not known or not isinstance(cls, str) or not cls.isidentifier():
            raise _foreign(path, name, entry)
        if (path.parent / name / f"{library}.py").exists():
            raise _foreign(path, name, f"{name}/{library}.py")
    return index


def is_own(library: str) -> bool:
    """Whether this is the path of a module of models/nets."""
    package, _, name = library.rpartition(".")
    return package == nets.__name__ and any(m.name == name for m in pkgutil.iter_modules(nets.__path__))


def _foreign(path: Path, key: str, named: Any) -> PolymodalError:
    return PolymodalError(
        f"{path}: {key} is {named!r:.100}, which is no class of {' or '.join(LIBRARIES)}: code of a "
        "checkpoint is not run.",
        "Take a pipeline of these libraries' own classes, or install a version of them that has it.",
    )


@functools.cache
def _modules_of_pipelines() -> frozenset[str]:
    """Names of the packages in diffusers.pipelines, without importing any."""
    found = importlib.util.find_spec("diffusers")
    places = found.submodule_search_locations if found else None
    folders = [Path(place) / "pipelines" for place in places or ()]
    return frozenset(init.parent.name for folder in folders for init in folder.glob("*/__init__.py"))


def components(directory: str | Path) -> dict[str, tuple[str, str]]:
    """The components of a pipeline: name -> (library, class)."""
    return {
        name: (str(entry[0]), str(entry[1]))
        for name, entry in read_index(directory).items()
        if isinstance(entry, list) and len(entry) == 2 and None not in entry
    }


def models_of(directory: str | Path) -> dict[str, tuple[str, str]]:
    """The components that have weights."""

    def has_weights(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))

    return {n: entry for n, entry in components(directory).items() if has_weights(Path(directory) / n)}


def fingerprint(directory: str | Path, name: str) -> str:
    """A part's identity: its config, and each file's size and hash of its first and last MiB."""
    folder = Path(directory) / name
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size}".encode() + head + file.read())
    return digest.hexdigest()
