"""diffusers' pipelines on disk: denoisers built without memory, frozen parts opened whole.

The only file that opens pipelines; model_index.json names their components. Missing or surplus weights are an
error here, where the library would only warn.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.tensors import require_finite
from polymodal.models import nets, weights
from polymodal.models.pipeline_index import LIBRARIES, components, is_own, models_of, read_index


def empty(config: Mapping[str, Any], library: str = "diffusers") -> nn.Module:
    """A diffusers model of a config (with its `_class_name`), float32, parameters on meta and buffers real.

    library: as model_index.json has it; a name that is no package is one of diffusers' pipelines.
    """
    from accelerate import init_empty_weights

    cls = _class(library, str(config["_class_name"]))
    with init_empty_weights(include_buffers=False):
        return cls.from_config(dict(config)).float()


def _class(library: str, name: str) -> Any:
    # classes of a pipeline's own module are listed under its name, which a directory here may have too
    module = getattr(importlib.import_module("diffusers.pipelines"), library, None)
    library = nets.CLASSES.get(name, library)
    if module is None and (library in LIBRARIES or is_own(library)):
        module = importlib.import_module(library)
    found = getattr(module, name, None)
    if not isinstance(found, type) or not (
        found.__module__.partition(".")[0] in LIBRARIES or is_own(found.__module__)
    ):
        raise PolymodalError(
            f"{library} has no class {name}.",
            f"Install the version of {library} that the checkpoint's model_index.json names.",
        )
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: what matters about loading is an error here."""
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
    """Parameters to a dtype but those that the library keeps in float32; buffers stay."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype != torch.float32 else ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model


def pipeline_class(directory: str | Path) -> Any:
    """The class that model_index.json names."""
    return named(str(read_index(directory)["_class_name"]))


def named(name: str) -> Any:
    """A class of diffusers, or of models/nets."""
    return _class("diffusers", name)


def load_part(directory: str | Path, name: str, dtype: torch.dtype, device: Any = "cpu") -> nn.Module:
    """One part of a pipeline with its weights, every key accounted for. Raises PolymodalError.

    Models of diffusers by weights.load, those of transformers by from_pretrained with its report.
    """
    library, cls_name = models_of(directory).get(name, ("", ""))
    folder = Path(directory) / name
    if not library:
        raise PolymodalError(
            f"{directory} has no weights of {name}.", "Fetch the whole pipeline in diffusers' layout."
        )
    if library == "diffusers" or hasattr(_class(library, cls_name), "load_config"):
        model = empty({**read_json(folder / "config.json"), "_class_name": cls_name}, library)
        weights.load(model, source=folder, device="cpu")
        return cast(model, dtype).to(device).eval().requires_grad_(False)
    with quiet():
        cls = _class(library, cls_name)
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    lost = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if lost:
        raise PolymodalError(
            f"{folder} lacks {len(lost)} tensors of {cls_name} (first: {lost[0]}).", "Fetch it again."
        )
    require_finite(model.named_parameters(), folder)
    return model.to(device).eval().requires_grad_(False)


def open_pipeline(
    directory: str | Path,
    *,
    parts: Mapping[str, nn.Module] | None = None,
    without: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
) -> Any:
    """The pipeline of a directory: `parts` as given, those of `without` left out, all else loaded and frozen.

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
            opened = named(name).from_pretrained(str(directory), **given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PolymodalError(
            f"{directory} cannot be opened as {name}: {reason}",
            "Fetch it again in diffusers' layout (`polymodal download`).",
        ) from None
    opened.set_progress_bar_config(disable=True)
    return opened


def sizes(directory: str | Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """Parameters of a pipeline's models by their configs alone; names: of these, by default of all."""
    found = {}
    for name, (library, cls_name) in components(directory).items():
        folder, cls = Path(directory) / name, _class(library, cls_name)
        if not (folder / "config.json").is_file() or not issubclass(cls, nn.Module):
            continue
        if names is not None and name not in names:
            continue
        if hasattr(cls, "load_config"):
            model = empty({**read_json(folder / "config.json"), "_class_name": cls_name}, library)
        else:
            with torch.device("meta"):
                model = cls(cls.config_class.from_pretrained(folder))
        found[name] = sum(parameter.numel() for parameter in model.parameters())
    return found
