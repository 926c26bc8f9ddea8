"""diffusers' pipelines on disk: the denoiser built without memory, the frozen parts opened whole, names checked.

Sees errors, card.py, weights.py and diffusers. The only file that opens pipelines; what lies in one is told by its
model_index.json. Missing or surplus weights are an error here, where the library would only warn.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polymodal.core.errors import PolymodalError


class _NoDraws(TorchFunctionMode):
    """Random initial values are not drawn: they would be thrown away, and memory that is not written costs nothing."""

    DRAWS = (
        Tensor.uniform_,
        Tensor.normal_,
        Tensor.trunc_normal_ if hasattr(Tensor, "trunc_normal_") else None,
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if func in self.DRAWS else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to meta as they are registered; buffers (rotary tables) keep the values their module computes."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(
                parameter.to("meta"), requires_grad=parameter.requires_grad
            )

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _NoDraws():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty(config: Mapping[str, Any], library: str = "diffusers") -> nn.Module:
    """A diffusers model of a config (with its `_class_name`), float32, parameters on meta and buffers real.

    library: as model_index.json has it; a name that is no package is one of diffusers' pipelines.
    """
    cls = _class(library, str(config["_class_name"]))
    with _parameters_on_meta():
        return cls.from_config(dict(config)).float()


def _class(library: str, name: str) -> Any:
    # parts that a pipeline brings itself are listed under its own name; a directory here may have that name too
    module = getattr(importlib.import_module("diffusers.pipelines"), library, None)
    if module is None:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(library)
    found = getattr(module, name, None)
    if found is None:
        raise PolymodalError(
            f"{library} has no class {name}.", f"The checkpoint wants another version of {library}."
        )
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and notes: what matters about loading is said here, as an error."""
    import diffusers
    import transformers

    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters to a dtype but those that the library keeps in float32; buffers stay as they are computed."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype != torch.float32 else ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model


def read_index(directory: str | Path) -> dict[str, Any]:
    """model_index.json of a pipeline's directory. Raises PolymodalError."""
    path = Path(directory) / "model_index.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PolymodalError(
            f"{path} cannot be read: {error}.", "Give the directory of a pipeline in diffusers' layout."
        ) from None


def pipeline_class(directory: str | Path) -> Any:
    """diffusers' class that model_index.json names."""
    return _class("diffusers", str(read_index(directory)["_class_name"]))


def models_of(directory: str | Path) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline that have weights: name -> (library, class)."""
    found = {}
    for name, entry in read_index(directory).items():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and None not in entry:
            folder = Path(directory) / name
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
                found[name] = (str(entry[0]), str(entry[1]))
    return found


def load_part(directory: str | Path, name: str, dtype: torch.dtype, device: Any = "cpu") -> nn.Module:
    """One part of a pipeline with its weights, every key accounted for. Raises PolymodalError.

    Models of diffusers go the house's way (weights.load), those of transformers by from_pretrained with its report.
    """
    from polymodal.models import weights

    library, cls_name = models_of(directory).get(name, ("", ""))
    folder = Path(directory) / name
    if not library:
        raise PolymodalError(
            f"{directory} has no weights of {name}.", "Fetch the whole pipeline in diffusers' layout."
        )
    if library == "diffusers" or hasattr(_class(library, cls_name), "load_config"):
        config = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), "_class_name": cls_name}
        model = empty(config, library)
        weights.load(model, source=folder, device="cpu")
        return cast(model, dtype).to(device).eval().requires_grad_(False)
    with quiet():
        loaded = _class(library, cls_name).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lost:
        raise PolymodalError(
            f"{folder} lacks {len(lost)} tensors of {cls_name} (first: {lost[0]}).", "Fetch it again."
        )
    return model.to(device).eval().requires_grad_(False)


def open_pipeline(
    directory: str | Path,
    *,
    parts: Mapping[str, nn.Module] | None = None,
    without: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
) -> Any:
    """The pipeline of a directory: `parts` as given, those of `without` left out, the others loaded and frozen.

    Raises PolymodalError for missing weights.
    """
    given: dict[str, Any] = dict(parts or {})
    given |= dict.fromkeys(without)
    for name in models_of(directory):
        if name not in given:
            given[name] = load_part(directory, name, dtype, device)
    name = str(read_index(directory)["_class_name"])
    try:
        with quiet():
            opened = _class("diffusers", name).from_pretrained(str(directory), **given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolymodalError(
            f"{directory} cannot be opened as {name}: {reason}", "Is it whole, and in diffusers' layout?"
        ) from None
    opened.set_progress_bar_config(disable=True)
    return opened


def sizes(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """Parameters of a pipeline's models by their configs alone; names: of these, by default of all."""
    found = {}
    for name, entry in read_index(directory).items():
        config = Path(directory) / name / "config.json"
        if not isinstance(entry, (list, tuple)) or None in entry or not config.is_file():
            continue
        cls = _class(*entry)
        if not issubclass(cls, nn.Module) or (names is not None and name not in names):
            continue
        if entry[0] == "diffusers":
            model = empty({**json.loads(config.read_text(encoding="utf-8")), "_class_name": entry[1]})
        else:
            with torch.device("meta"):
                model = cls(cls.config_class.from_pretrained(config.parent))
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    return found


def fingerprint(directory: str | Path, name: str) -> str:
    """A part's identity: its config, and of each file of weights its size and the hash of its first and last MiB."""
    import hashlib

    folder = Path(directory) / name
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("config.json")]):
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size}".encode() + head + file.read())
    return digest.hexdigest()
