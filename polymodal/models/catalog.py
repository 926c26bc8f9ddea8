"""Finds things by name: the card of a model, the directory of a checkpoint, the family of a recipe.

It reads config files and the hub's cache and imports the cards; of weights no more than whether two are tied.
Whatever is wrong with a source is said here, before anything is built.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest as nearest_names
from polymodal.models import library
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.recipe import Model

ROOMS = ("understanding", "generation", "omni", "audio")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
"""Files of a hub repository that are fetched: not other frameworks' copies of the weights."""


@functools.cache
def cards() -> dict[str, ModelCard]:
    """Every card by its name: the `CARD` of each module in the model rooms."""
    found = {}
    for room in ROOMS:
        package = importlib.import_module(f"polymodal.models.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            card = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CARD", None)
            if card is not None:
                found[card.name] = card
    return found


@functools.cache
def _names() -> dict[str, tuple[ModelCard, str | None]]:
    """What people write -> (card, size): card names and aliases, with a size, hub ids, hub names without `-Instruct`."""
    names: dict[str, tuple[ModelCard, str | None]] = {}
    for card in cards().values():
        for alias in (card.name, *card.aliases):
            names.setdefault(_plain(alias), (card, None))
        for key, size in card.sizes.items():
            short = size.hub.rpartition("/")[2]
            version, _, rest = key.partition("-")
            for alias in (card.name, *card.aliases):
                names.setdefault(_plain(f"{alias}-{key}"), (card, key))
                if rest and alias.endswith(version):  # internvl3 of size 3-8b
                    names.setdefault(_plain(f"{alias}-{rest}"), (card, key))
            for hub in (size.hub, short, re.sub("-instruct$", "", short, flags=re.I)):
                names.setdefault(_plain(hub), (card, key))
    return names


def _plain(text: str) -> str:
    return re.sub(r"[\s_:]+", "-", text.strip().lower())


def named(text: str) -> tuple[ModelCard, str | None] | None:
    """(card, size or None) of a card's name, alias, `name-size` or published hub id; None when it is none of them."""
    return _names().get(_plain(text))


def nearest(text: str, count: int = 3) -> list[str]:
    """Names of cards and sizes that look like the text."""
    close = nearest_names(_plain(text).rpartition("/")[2], [n for n in _names() if "/" not in n], 0.5, count)
    return list(
        dict.fromkeys(
            card.name if key is None else f"{card.name}-{key}"
            for card, key in map(_names().__getitem__, close)
        )
    )


def find(source: str | os.PathLike, revision: str | None = None) -> ModelCard:
    """The card of a checkpoint's directory, a hub id, or a name such as `qwen2.5-vl-7b`.

    A directory is told by the architectures of its config.json; a published hub id by the catalogue, any other by
    its config. Raises PolymodalError with the nearest names when nothing fits.
    """
    source = os.fspath(source)
    known = None if _is_path(source) else named(source)
    if known is not None:
        return known[0]
    directory = resolve(source, revision, weights=False)
    wanted = _architectures(directory)
    for card in cards().values():
        if set(wanted) & set(card.architectures) and _claims(card, directory):
            return card
    near = nearest_names(wanted[0] if wanted else "", [a for c in cards().values() for a in c.architectures])
    closest = next((card.name for card in cards().values() if near and near[0] in card.architectures), None)
    raise PolymodalError(
        f"{directory / 'config.json'}: the architecture {' / '.join(wanted) or '(none named)'} has no card.",
        (f"Nearest: {closest}. " if closest else "") + f"Known models: {', '.join(cards())}.",
    )


def _claims(card: ModelCard, directory: Path) -> bool:
    """Several cards may have one pipeline class: the family knows its own by model_index.json."""
    index = directory / "model_index.json"
    claims = getattr(card.family, "claims", None)
    return claims is None or not index.is_file() or bool(claims(_read(index)))


def reader(directory: str | os.PathLike) -> type[Family]:
    """Who knows what lies in a checkpoint's directory: the family of its card; Family itself without a
    card."""
    if not (Path(directory) / "config.json").is_file():
        return Family
    wanted = set(_architectures(Path(directory)))
    return next((card.family for card in cards().values() if wanted & set(card.architectures)), Family)


def read_config(directory: Path, trust: bool = False) -> Any:
    """The library's config of a checkpoint of transformers, its card's changes made. Raises
    PolymodalError."""
    try:
        return reader(directory).read_config(directory, trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PolymodalError(f"{directory / 'config.json'} cannot be used: {reason}") from None


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or os.path.exists(os.path.expanduser(source))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolymodalError(
            f"{path} cannot be read: {error}.", "Copy the file again from the checkpoint's origin."
        ) from None
    if not isinstance(data, dict):
        raise PolymodalError(f"{path}: a JSON object is wanted, this is a {type(data).__name__}.")
    return data


def _architectures(directory: Path) -> list[str]:
    if (directory / "model_index.json").is_file():
        return [str(_read(directory / "model_index.json").get("_class_name", ""))]
    data = _read(directory / "config.json")
    return [str(name) for name in (*(data.get("architectures") or ()), data.get("model_type")) if name]


def resolve(
    source: str | os.PathLike, revision: str | None = None, weights: bool = True, key: str = ""
) -> Path:
    """The local directory of a source: a path, or a hub id or card name through the hub's cache (fetched when online).

    weights: also demand complete weights. key: of the recipe, for the message. Raises PolymodalError that names what is missing and how to get it.
    """
    source = os.fspath(source)
    known = None if _is_path(source) else named(source)
    if known is not None:
        card, key = known
        if key is None:
            raise PolymodalError(
                f"{source} is a model of several sizes.",
                f"Name one of {', '.join(f'{card.name}-{size}' for size in card.sizes)}.",
            )
        source = card.sizes[key].hub
    if known is None and (_is_path(source) or not HUB_ID.match(source)):
        directory = Path(source).expanduser()
        if not directory.is_dir():
            near = nearest(source)
            raise PolymodalError(
                f"{key}{source} is neither a directory nor a hub id nor a known model.",
                f"Did you mean {' or '.join(near)}?"
                if near
                else f"Check the path, or take one of {', '.join(cards())}.",
            )
        _check(directory, source, weights)
        return directory
    return _from_hub(source, revision, weights)


def _from_hub(repository: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        missing = missing_files(directory, weights)
    except LocalEntryNotFoundError:
        directory, missing = None, ["config.json", "the weights"]
    if directory is not None and not missing:
        _check(directory, repository, weights)
        return directory
    if constants.is_offline_mode():
        raise _absent(repository, revision, missing, "this machine is set to work offline (HF_HUB_OFFLINE)")
    return download(repository, revision, weights=weights, missing=missing)


def download(
    source: str,
    revision: str | None = None,
    directory: str | os.PathLike | None = None,
    weights: bool = True,
    missing: list[str] | None = None,
) -> Path:
    """Fetch a hub repository (or a card's name with a size) into the hub's cache, or into `directory`.

    huggingface_hub resumes what was cut off and follows HF_ENDPOINT (mirrors), HTTPS_PROXY and HF_TOKEN. Returns the
    directory with the files. Raises PolymodalError for what the network, the name or the licence forbids.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    known = named(source)
    repository = known[0].sizes[known[1]].hub if known and known[1] else source
    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"]
    try:
        path = Path(
            snapshot_download(repository, revision=revision, local_dir=directory, allow_patterns=patterns)
        )
    except RevisionNotFoundError:
        raise PolymodalError(
            f"{repository} has no revision {revision}.", "Leave model.revision empty for the newest."
        ) from None
    except GatedRepoError:
        raise PolymodalError(
            f"{repository} asks you to accept its licence first.",
            f"Accept it at https://huggingface.co/{repository}, then set HF_TOKEN.",
        ) from None
    except RepositoryNotFoundError:
        near = nearest(repository)
        raise PolymodalError(
            f"The hub has no model {repository}, or it is private.",
            f"Did you mean {' or '.join(near)}? "
            if near
            else "Check the name; set HF_TOKEN for a private one.",
        ) from None
    except Exception as error:  # the network's errors are classes of whatever transport the hub's client uses
        if getattr(error, "errno", None) in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
        ):
            raise PolymodalError(
                f"{repository} cannot be stored: {error}.",
                "Free space, or set HF_HOME to a larger disk that you may write to.",
            ) from None
        reason = textwrap.shorten(
            str(error.__cause__ or error).strip().split("\n")[0], 160, placeholder=" ..."
        )
        raise _absent(
            repository, revision, missing or ["its files"], f"the hub cannot be reached ({reason})"
        ) from None
    _check(path, repository, weights)
    return path


def _absent(repository: str, revision: str | None, missing: list[str], why: str) -> PolymodalError:
    asked = f"{repository} --revision {revision}" if revision else repository
    listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    return PolymodalError(
        f"{repository} is no directory here, and as a model of the hub it is not complete in its cache (missing: {listed}), and {why}.",
        f"Run `polymodal download {asked}` on a machine with a network and set model.source to that directory.",
    )


def is_whole(directory: str | os.PathLike) -> bool:
    """Whether a directory is a whole checkpoint of transformers or diffusers, by its config files."""
    return any((Path(directory) / name).is_file() for name in ("config.json", "model_index.json"))


def missing_files(directory: Path, weights: bool = True) -> list[str]:
    """Files that a checkpoint's own lists name and that are not there."""
    if (directory / "model_index.json").is_file():
        return _missing_parts(directory, weights)
    if not (directory / "config.json").is_file():
        return ["config.json"]
    if not weights:
        return []
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read(index).get("weight_map", {}).values()))
        return [name for name in shards if not (directory / name).is_file()]
    return [] if any(directory.glob("*.safetensors")) else ["model.safetensors"]


def _missing_parts(directory: Path, weights: bool) -> list[str]:
    """Files of a diffusers pipeline that are not there: config.json of a denoiser, shards that an index lists."""
    parts = [
        name
        for name, entry in _read(directory / "model_index.json").items()
        if isinstance(entry, list) and len(entry) == 2 and None not in entry
    ]
    missing = [f"{part}/" for part in parts if not (directory / part).is_dir()]
    if not weights:
        return missing
    for index in sorted(directory.glob("*/*.safetensors.index.json")):
        shards = sorted(set(_read(index).get("weight_map", {}).values()))
        missing += [f"{index.parent.name}/{name}" for name in shards if not (index.parent / name).is_file()]
    return missing


def _check(directory: Path, source: str, weights: bool) -> None:
    """Raise what is wrong with a local checkpoint."""
    missing = missing_files(directory, weights)
    if "config.json" in missing:
        if (directory / "adapter_config.json").is_file():
            base = _read(directory / "adapter_config.json").get("base_model_name_or_path") or "its base model"
            raise PolymodalError(
                f"{source} is a LoRA adapter of {base}, not a whole model.",
                f"Set model.source to {base} and checkpoint.init_from to the adapter, or merge it with `polymodal export --merge-lora`.",
            )
        inside = [path.parent.name for path in sorted(directory.glob("*/config.json"))][:3]
        raise PolymodalError(
            f"{source} has no config.json, so it is not a hub checkpoint.",
            f"Did you mean {source.rstrip('/')}/{inside[0]}?"
            if inside
            else "Give the directory that holds config.json and the .safetensors files.",
        )
    if missing:
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
            raise PolymodalError(
                f"{source} has weights in PyTorch's pickle format only.",
                "Save it once more with safetensors: `model.save_pretrained(DIR)` in transformers.",
            )
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise PolymodalError(
            f"{source} lacks {listed}.",
            "Fetch the rest with `polymodal download`, or set model.init to random to train from the config alone.",
        )
    for path in _pointers(directory, weights):
        raise PolymodalError(
            f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself.",
            "Run `git lfs pull` in that directory, or fetch it with `polymodal download`.",
        )


def _pointers(directory: Path, weights: bool) -> Iterator[Path]:
    for pattern in ("*.json", "*.safetensors") if weights else ("*.json",):
        for path in sorted(directory.glob(pattern)):
            if path.stat().st_size < 1024:
                with open(path, "rb") as file:
                    if file.read(40).startswith(b"version https://git-lfs"):
                        yield path


def family(model: Model) -> Family:
    """The family of a recipe's model section: config.json read, `model.config` overrides applied, card chosen.

    Raises PolymodalError for everything `resolve` and `find` refuse and for overrides that do not fit the config.
    """
    directory = resolve(
        model.source, model.revision, weights=model.init == "pretrained", key="model.source = "
    )
    card = find(directory)
    if card.kind == "generation":
        return _pipeline_family(card, directory, model)
    config = read_config(directory, model.trust_remote_code)
    if model.init == "pretrained" and card.embedding and "tie_word_embeddings" not in model.config:
        library.settle_ties(config, directory, card.head, card.embedding)
    made = card.family(card, override(config, model.config), str(directory))
    for name in ("attention", "experts"):
        setattr(made, name, getattr(model, name))
    getattr(made, "check", lambda: None)()
    return made


def _pipeline_family(card: ModelCard, directory: Path, model: Model) -> Family:
    """The family of a diffusers pipeline: the denoiser's config.json, by the name that the family has for it."""
    part = _part(card, directory, model.part)
    path = directory / part / "config.json"
    config = _read(path)
    flat = dict(_flat(model.config))
    for key, value in flat.items():
        if key not in config:
            raise PolymodalError(f"model.config: `{key}` is not a key of {path}.", _mean(key, config))
        config[key] = _typed(key, config[key], value)
    made = card.family(card, config, str(directory))
    for name in ("attention", "experts"):
        setattr(made, name, getattr(model, name))
    made.part = part  # type: ignore[attr-defined]
    made.check()  # type: ignore[attr-defined]
    return made


def _part(card: ModelCard, directory: Path, asked: str | None) -> str:
    """The denoiser that is trained. Raises PolymodalError for one that the pipeline has not."""
    own = str(getattr(card.family, "part", "transformer"))
    known = getattr(card.family, "denoisers", ()) or (own,)
    there = [name for name in known if (directory / name / "config.json").is_file()]
    if asked is not None and asked not in there:
        raise PolymodalError(
            f"model.part = {asked}: {directory} has no such denoiser.",
            f"It has {', '.join(there) or 'none'}.",
        )
    return asked or own


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with keys replaced by dotted name (or nested mappings); a copy of the same class.

    Raises PolymodalError for an unknown key (with the nearest) or a value of another type.
    """
    flat = dict(_flat(changes))
    if not flat:
        return config
    data = config.to_dict()
    known = dict(_flat(data))
    for key, value in flat.items():
        *path, leaf = key.split(".")
        section: Any = data
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            raise PolymodalError(
                f"model.config: `{key}` is not a key of this model's config.json.", _mean(key, known)
            )
        section[leaf] = _typed(key, section[leaf], value)
        if leaf == "num_hidden_layers" and ".".join([*path, "layer_types"]) not in flat:
            section.pop("layer_types", None)  # one entry a layer: the library makes it anew
    try:
        return type(config).from_dict(data)
    except Exception as error:  # the library's validators raise types of their own
        reason = " ".join(str(error).split())
        raise PolymodalError(
            f"model.config: {', '.join(flat)}: the library refuses this config: {reason}"
        ) from None


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mean(key: str, known: Mapping[str, Any]) -> str:
    leaf = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [leaves[name] for name in nearest_names(leaf, leaves, 0.7)]
    if not near:
        return "See the checkpoint's config.json for its keys."
    return f"Did you mean {' or '.join(f'`{name}`' for name in near[:2])}?"


def _typed(key: str, old: Any, new: Any) -> Any:
    """`new` as the type of `old`; whole numbers may stand for decimals, anything for what was empty."""
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    same = (
        isinstance(old, (list, tuple)) == isinstance(new, (list, tuple))
        if isinstance(old, (list, tuple))
        else type(new) is type(old)
    )
    if old is None or new is None or same:
        return new
    raise PolymodalError(
        f"model.config: `{key}` = {new!r} is a {type(new).__name__}, the config has a {type(old).__name__} ({old!r}).",
        "Give a value of that type.",
    )
