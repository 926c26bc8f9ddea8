"""What a diffusers pipeline's directory holds, by model_index.json; nothing is opened."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from polymodal.models.storage import read_json


def is_pipeline(directory: str | Path) -> bool:
    return (Path(directory) / "model_index.json").is_file()


def read_index(directory: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline's directory. Raises PolymodalError."""
    return read_json(Path(directory) / "model_index.json")


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
