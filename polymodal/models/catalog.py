"""Finds by name: the card of a model, the directory of a checkpoint, the family of a recipe.

Reads config files and the hub's cache; of weights no more than whether two are tied. What is wrong with a
source is an error here, before anything is built.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest as nearest_names
from polymodal.models import library, pipeline_index, storage
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.recipe import Model

FOLDERS = ("understanding", "generation", "omni", "audio")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
"""Files of a hub repository that are fetched: not other frameworks' copies of the weights."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@functools.cache
def cards() -> dict[str, ModelCard]:
    """Every card by its name: the `CARD` of each module in FOLDERS."""
    found = {}
    for folder in FOLDERS:
        package = importlib.import_module(f"polymodal.models.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            card = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CARD", None)
            if card is not None:
                found[card.name] = card
    return found


@functools.cache
def _names() -> dict[str, tuple[ModelCard, str | None]]:
    """What users write -> (card, size): card names, aliases, both with a size, hub ids, hub names."""
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
    """(card, size or None) of a card's name, alias, `name-size` or published hub id, else None."""
    return _names().get(_plain(text))


def nearest(text: str, count: int = 3) -> list[str]:
    """Names of cards and sizes that look like the text."""
    names = _names()
    close = nearest_names(_plain(text).rpartition("/")[2], [n for n in names if "/" not in n], 0.5, count)
    full = (card.name if key is None else f"{card.name}-{key}" for card, key in map(names.__getitem__, close))
    return list(dict.fromkeys(full))


def _did_you_mean(names: list[str], otherwise: str) -> str:
    return f"Did you mean {' or '.join(names)}?" if names else otherwise


def find(source: str | os.PathLike, revision: str | None = None) -> ModelCard:
    """The card of a checkpoint's directory, a hub id, or a name such as `qwen2.5-vl-7b`.

    A directory is recognised by the architectures of its config.json, a published hub id by the cards, any
    other by its config. Raises PolymodalError with the nearest names when nothing fits.
    """
    source = os.fspath(source)
    card_and_size = None if _is_path(source) else named(source)
    if card_and_size is not None:
        return card_and_size[0]
    directory = resolve(source, revision, weights=False)
    card = card_of(directory)
    if card is not None:
        return card
    found = _architectures(directory)
    known = {name: card.name for card in cards().values() for name in card.architectures}
    near = nearest_names(found[0] if found else "", known)
    raise PolymodalError(
        f"{directory / 'config.json'}: the architecture {' / '.join(found) or '(none named)'} has no card.",
        (f"Nearest: {known[near[0]]}. " if near else "") + f"Known models: {', '.join(cards())}.",
    )


def card_of(directory: Path) -> ModelCard | None:
    """By architectures of config.json; of cards with one pipeline class the one that claims its index."""
    found = set(_architectures(directory))
    index = pipeline_index.read_index(directory) if pipeline_index.is_pipeline(directory) else None
    fits = (card for card in cards().values() if found & set(card.architectures))
    return next((card for card in fits if index is None or card.family.claims(index)), None)


def reader(directory: str | os.PathLike) -> type[Family]:
    """The family that reads and writes a checkpoint's directory: that of its card, else Family itself."""
    known = (Path(directory) / "config.json").is_file()
    card = card_of(Path(directory)) if known else None
    return Family if card is None else card.family


def read_config(directory: Path, trust: bool = False) -> Any:
    """The library's config of a transformers checkpoint, with its card's changes. Raises PolymodalError."""
    try:
        return reader(directory).read_config(directory, trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PolymodalError(
            f"{directory / 'config.json'} cannot be used: {reason}",
            "Fetch it again, or take one that this version of transformers reads.",
        ) from None


def _is_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or os.path.exists(os.path.expanduser(source))


def _architectures(directory: Path) -> list[str]:
    if pipeline_index.is_pipeline(directory):
        return [str(pipeline_index.read_index(directory).get("_class_name", ""))]
    data = storage.read_json(directory / "config.json")
    return [str(name) for name in (*(data.get("architectures") or ()), data.get("model_type")) if name]


def resolve(
    source: str | os.PathLike, revision: str | None = None, weights: bool = True, key: str = ""
) -> Path:
    """The local directory of a source: a path, or a hub id or card name by the hub's cache or a download.

    weights: also require complete weights. key: of the recipe, for messages. Raises PolymodalError.
    """
    source = os.fspath(source)
    card_and_size = None if _is_path(source) else named(source)
    if card_and_size is not None:
        card, size = card_and_size
        if size is None:
            raise PolymodalError(
                f"{source} is a model of several sizes.",
                f"Name one of {', '.join(f'{card.name}-{each}' for each in card.sizes)}.",
            )
        source = card.sizes[size].hub
    elif _is_path(source) or not HUB_ID.match(source):
        directory = Path(source).expanduser()
        if not directory.is_dir():
            raise PolymodalError(
                f"{key}{source} is neither a directory nor a hub id nor a known model.",
                _did_you_mean(
                    [] if _is_path(source) else nearest(source),
                    f"Check the path, or take one of {', '.join(cards())}.",
                ),
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

    huggingface_hub resumes what was cut off and follows HF_ENDPOINT (mirrors), HTTPS_PROXY and HF_TOKEN.
    Returns the directory with the files. Raises PolymodalError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    known = named(source)
    repository = known[0].sizes[known[1]].hub if known and known[1] else source
    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"]
    patterns += [*known[0].family.beside_files] if known else []
    options: dict[str, Any] = {"revision": revision, "local_dir": directory, "allow_patterns": patterns}
    try:
        path = Path(snapshot_download(repository, **options))
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
        raise PolymodalError(
            f"The hub has no model {repository}, or it is private.",
            _did_you_mean(nearest(repository), "Check the name; set HF_TOKEN for a private one."),
        ) from None
    except Exception as error:  # the network's errors are classes of whatever transport the hub's client uses
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise PolymodalError(
                f"{repository} cannot be stored: {error}.",
                "Free space, or set HF_HOME to a larger disk that you may write to.",
            ) from None
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        why = f"the hub cannot be reached ({textwrap.shorten(cause, 160, placeholder=' ...')})"
        raise _absent(repository, revision, missing or ["its files"], why) from None
    _check(path, repository, weights)
    return path


def _absent(repository: str, revision: str | None, missing: list[str], why: str) -> PolymodalError:
    asked = shlex.join([repository, *(("--revision", revision) if revision else ())])
    return PolymodalError(
        f"{repository} is no directory here, and as a model of the hub it is not complete in its cache "
        f"(missing: {_listed(missing)}), and {why}.",
        f"Run `polymodal download {asked}` on a machine with a network "
        "and set model.source to that directory.",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def is_whole(directory: str | os.PathLike) -> bool:
    """Whether a directory is a whole checkpoint of transformers or diffusers, by its config files."""
    return (Path(directory) / "config.json").is_file() or pipeline_index.is_pipeline(directory)


def missing_files(directory: Path, weights: bool = True) -> list[str]:
    """Files that a checkpoint's own lists name and that are not there, and directories of components."""
    missing = []
    if pipeline_index.is_pipeline(directory):
        missing = [
            f"{part}/" for part in pipeline_index.components(directory) if not (directory / part).is_dir()
        ]
        indexes = sorted(directory.glob("*/*.safetensors.index.json"))
    elif (directory / "config.json").is_file():
        indexes = sorted(directory.glob("model.safetensors.index.json"))
        if weights and not indexes and not any(directory.glob("*.safetensors")):
            return ["model.safetensors"]
    else:
        return ["config.json"]
    for index in indexes if weights else ():
        absent = [path for path in storage.shards(index)[1] if not path.is_file()]
        missing += [str(path.relative_to(directory)) for path in absent]
    return missing


def _check(directory: Path, source: str, weights: bool) -> None:
    """Raise PolymodalError for what is wrong with a local checkpoint."""
    missing = missing_files(directory, weights)
    if "config.json" in missing:
        if (directory / "adapter_config.json").is_file():
            adapter = storage.read_json(directory / "adapter_config.json")
            base = adapter.get("base_model_name_or_path") or "its base model"
            raise PolymodalError(
                f"{source} is a LoRA adapter of {base}, not a whole model.",
                f"Set model.source to {base} and checkpoint.init_from to the adapter, "
                "or merge it with `polymodal export --merge-lora`.",
            )
        inside = [f"{source.rstrip('/')}/{p.parent.name}" for p in sorted(directory.glob("*/config.json"))]
        raise PolymodalError(
            f"{source} has no config.json, so it is not a hub checkpoint.",
            _did_you_mean(
                inside[:1], "Give the directory that holds config.json and the .safetensors files."
            ),
        )
    if missing:
        if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
            raise PolymodalError(
                f"{source} has weights in PyTorch's pickle format only.",
                "Save it once more with safetensors: `model.save_pretrained(DIR)` in transformers.",
            )
        raise PolymodalError(
            f"{source} lacks {_listed(missing)}.",
            "Fetch the rest with `polymodal download`, "
            "or set model.init to random to train from the config alone.",
        )
    for pattern in ("*.json", "*.safetensors") if weights else ("*.json",):
        for path in sorted(directory.glob(pattern)):
            if storage.is_lfs_pointer(path):
                raise PolymodalError(
                    f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself.",
                    "Run `git lfs pull` in that directory, or fetch it with `polymodal download`.",
                )


def family(model: Model) -> Family:
    """The family of a recipe's model section: config.json with `model.config` applied, card chosen.

    Raises PolymodalError as `resolve` and `find` do, and for overrides that do not fit the config.
    """
    pretrained = model.init == "pretrained"
    directory = resolve(model.source, model.revision, weights=pretrained, key="model.source = ")
    card = find(directory)
    if card.kind == "generation":
        part = _part(card, directory, model.part)
        config = _changed(storage.read_json(directory / part / "config.json"), model.config)
        made: Any = card.family(card, config, str(directory))
        made.part = part
    else:
        config = read_config(directory, model.trust_remote_code)
        if pretrained and card.embedding and "tie_word_embeddings" not in model.config:
            library.settle_ties(config, directory, card.head, card.embedding)
        made = card.family(card, override(config, model.config), str(directory))
    made.attention, made.experts = model.attention, model.experts
    made.check()
    return made


def published(card: ModelCard, key: str | None) -> Family | None:
    """The family of a published size, where its card has the config."""
    facts = card.sizes[key].config if key else {}
    if not facts:
        return None
    if card.kind == "generation":
        return card.family.published(card, str(key))  # type: ignore[attr-defined]
    return card.family(card, card.family.published_config(facts), card.sizes[str(key)].hub)


def _part(card: ModelCard, directory: Path, asked: str | None) -> str:
    """The denoiser that is trained. Raises PolymodalError for one that the pipeline lacks."""
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
    if not changes:
        return config
    data = _changed(config.to_dict(), changes)
    try:
        return type(config).from_dict(data)
    except Exception as error:  # the library's validators raise types of their own
        reason = f"the library refuses this config: {' '.join(str(error).split())}"
        raise PolymodalError(
            f"model.config: {', '.join(dict(_flat(changes)))}: {reason}.",
            "Give values that fit each other and the rest of the checkpoint's config.json.",
        ) from None


def _changed(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    flat, known = dict(_flat(changes)), dict(_flat(data))
    for key, value in flat.items():
        *path, leaf = key.split(".")
        section: Any = data
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or leaf not in section:
            raise PolymodalError(
                f"model.config: `{key}` is not a key of this model's config.json.", _near_keys(key, known)
            )
        section[leaf] = _typed(key, section[leaf], value)
        if leaf == "num_hidden_layers" and ".".join([*path, "layer_types"]) not in flat:
            section.pop("layer_types", None)  # one entry a layer: the library makes it anew
    return data


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _near_keys(key: str, known: Mapping[str, Any]) -> str:
    leaf = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf]
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [leaves[name] for name in nearest_names(leaf, leaves, 0.7)]
    return _did_you_mean([f"`{name}`" for name in near[:2]], "See the checkpoint's config.json for its keys.")


def _typed(key: str, old: Any, new: Any) -> Any:
    """`new` as the type of `old`; whole numbers may stand for decimals, anything for what was empty."""
    if isinstance(old, float) and type(new) is int:
        return float(new)
    sequences = isinstance(old, (list, tuple)) and isinstance(new, (list, tuple))
    if old is None or new is None or sequences or type(new) is type(old):
        return new
    raise PolymodalError(
        f"model.config: `{key}` = {new!r} is a {type(new).__name__}, "
        f"the config has a {type(old).__name__} ({old!r}).",
        "Give a value of that type.",
    )
