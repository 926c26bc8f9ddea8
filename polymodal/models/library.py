"""transformers' own rules: how a checkpoint's keys map to a model's parameters, how a module is initialised.

The only file that uses private names of transformers; a test in tests/models/test_weights.py names the one
that changed. Works on models that are on meta, sharded, wrapped or cut into stages.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models.card import PrunedModule
from polymodal.models.slices import NotASlice, Stored
from polymodal.models.storage import Files

ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def plain(name: str) -> str:
    """A parameter's name as it is without adapters: `q_proj.base_layer.weight` -> `q_proj.weight`."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def class_of(module: nn.Module) -> type:
    """A module's class as its author wrote it: FSDP2 replaces it by a subclass of its own."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


@contextmanager
def quietly() -> Iterator[None]:
    """Without the library's progress bars where no terminal shows them, or another rank's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def keep_recording(model: Any) -> None:
    """Let a model of transformers return all its hidden states also after FSDP2 changed its class: the
    library's registry of outputs goes by the class."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def targets(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model that checkpoints have, by plain name: parameters (tied ones under each name) and
    persistent buffers; no adapters."""
    found: dict[str, Tensor] = {
        plain(n): p for n, p in model.named_parameters(remove_duplicate=False) if not ADAPTER.search(n)
    }
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[plain(f"{path}.{name}" if path else name)] = buffer
    return found


def tied(model: nn.Module) -> dict[str, str]:
    """Parameters that the model's config ties: name -> name of the one that checkpoints hold."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def settle_ties(config: Any, directory: Path, head: str, embedding: str) -> None:
    """Set a config's tie_word_embeddings to what the checkpoint's config.json and files have.

    Where config.json's top level does not have the flag, its text part's decides: several classes default to
    true there. Where the files hold both tensors, and they differ, they are not tied, whatever the flag.
    head, embedding: names of the two modules in the model; the files may have another prefix.
    """
    raw = read_json(directory / "config.json")
    text = raw.get("text_config") or {}
    if "tie_word_embeddings" not in raw and "tie_word_embeddings" in text:
        config.tie_word_embeddings = bool(text["tie_word_embeddings"])
    if not getattr(config, "tie_word_embeddings", False) or not any(directory.glob("*.safetensors*")):
        return
    files = Files(directory)
    first, second = (
        [key for key in files.shapes if f".{key}".endswith(f".{name.rpartition('.')[2]}.weight")]
        for name in (head, embedding)
    )
    second = [key for key in second if first and files.shapes[key] == files.shapes[first[0]]]
    if len(first) == len(second) == 1 and not files.alike(first[0], second[0]):
        config.tie_word_embeddings = False


def aliases(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Each tensor of `targets` once, with all its plain names, last that of a tied one in another stage."""
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in targets(model).items():
        names.setdefault(id(tensor), (tensor, []))[1].append(name)
    ties = tied(model)
    for _, held in names.values():
        held += [ties[n] for n in list(held) if n in ties and ties[n] not in held]
    return list(names.values())


@dataclass
class Layout:
    """How the keys of a set of files map to a model.

    entries: plain parameter name -> its boxes in the files; unexpected: file key that no parameter has -> the
    name it would have.
    """

    entries: dict[str, Stored] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.entries[name].shape) if name in self.entries else None


@contextmanager
def _own_classes(model: nn.Module) -> Iterator[None]:
    """Inside, modules have their own classes and not FSDP2's: the library's registries go by class name."""
    wrapped = [(module, type(module)) for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module, _ in wrapped:
            module.__class__ = class_of(module)
        yield
    finally:
        for module, cls in wrapped:
            module.__class__ = cls


@contextmanager
def named_by(model_type: str, rules: list[Any] | None) -> Iterator[None]:
    """Inside, the library reads and writes files of a model type by these rules (None: its own)."""
    if rules is None:
        yield
        return
    from transformers import conversion_mapping as registry

    own = registry.get_checkpoint_conversion_mapping(model_type)
    registry.register_checkpoint_conversion_mapping(model_type, rules, overwrite=True)
    try:
        yield
    finally:
        if own is None:
            registry._checkpoint_conversion_mapping_cache.pop(model_type)
        else:
            registry.register_checkpoint_conversion_mapping(model_type, own, overwrite=True)


def layout(model: nn.Module, shapes: Mapping[str, Sequence[int]], rules: list[Any] | None = None) -> Layout:
    """Map file keys (with their whole shapes) to a model's parameters by the library's conversions.

    rules: in place of the library's own of this model (Family.tensor_names). Raises PolymodalError when the
    tensors of one parameter do not fit together.
    """
    from transformers import PreTrainedModel

    wanted = targets(model)
    out = Layout()
    if not isinstance(model, PreTrainedModel):
        out.entries = {key: Stored.whole(key, shape) for key, shape in shapes.items() if key in wanted}
        out.unexpected = {key: key for key in shapes if key not in wanted}
        return out
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    with _own_classes(model), named_by(model.config.model_type, rules):
        conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    begun: dict[str, tuple[Any, list[str]]] = {}  # first parameter -> the library's converter, file keys
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            out.unexpected[key] = name
        elif pattern is None:
            out.entries[name] = Stored.whole(key, shapes[key])
        else:
            if name not in begun:
                begun[name] = deepcopy(by_pattern[pattern]), []
            converter, keys = begun[name]
            converter.add_tensor(name, key, pattern, Stored.whole(key, shapes[key]))
            keys.append(key)
    parameters = SimpleNamespace(get_parameter=wanted.__getitem__)
    for name, (converter, keys) in begun.items():
        try:
            made = converter.convert(name, model=parameters, config=model.config)
        except (NotASlice, TypeError) as error:  # the latter from operators that Stored does not have
            raise PolymodalError(
                f"{name} is computed from {len(keys)} tensors of the checkpoint (first: {keys[0]}) "
                f"by an operation that cannot be done slice by slice ({error}).",
                "Open and save it once with transformers (save_pretrained), and give that directory.",
            ) from None
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            raise PolymodalError(
                f"{name} cannot be put together from {len(keys)} tensors of the checkpoint "
                f"(first: {keys[0]}): {error}.",
                "Some of them are missing, or the checkpoint is of another size than the config.",
            ) from None
        out.entries |= {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
    return out


def reverted(
    model: nn.Module, state: Mapping[str, Tensor], rules: list[Any] | None = None
) -> dict[str, Tensor]:
    """File key -> tensor for some parameters of a model, on meta or not, as the library would save them.

    rules: as in `layout`.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return dict(state)
    from transformers.core_model_loading import revert_weight_conversion

    with _own_classes(model), named_by(model.config.model_type, rules):
        return revert_weight_conversion(model, dict(state))


def rules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], Any] | None]]:
    """(path, module, its initialiser): that of the innermost library model around it, else torch's own."""
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {}
    for path, module in model.named_modules():
        around = owners.get(path.rpartition(".")[0]) if path else None
        owners[path] = owner = module if isinstance(module, PreTrainedModel) else around
        if owner is not None:
            yield path, module, owner._init_weights
        elif hasattr(type(module), "reset_parameters"):
            yield path, module, type(module).reset_parameters
        else:
            yield path, module, _own_parameters if builds_buffers(model) else None


def builds_buffers(model: nn.Module) -> bool:
    """Whether a model is diffusers', which is built with its buffers in place (models/pipelines.py)."""
    return hasattr(model, "register_to_config") and hasattr(model, "load_config")


@torch.no_grad()
def _own_parameters(module: nn.Module) -> None:
    """diffusers has no initialiser for its modules' own parameters: gains are ones, shifts zeros, tables
    normal with the standard deviation 1 / sqrt(width), as its constructors draw them."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith(("bias", "beta", "shift")) else 1.0)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def optional(model: nn.Module, name: str) -> bool:
    """Whether the library lets a checkpoint lack this parameter."""
    return any(re.search(p, name) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def _deepest(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """The deepest module on the path of a name, and the rest of the path."""
    parts, module = name.split("."), model
    while parts and parts[0] in module._modules:
        module = module._modules[parts.pop(0)]  # type: ignore[assignment]
    return module, parts


def ignorable(model: nn.Module, key: str, name: str) -> bool:
    """Whether a file key that no parameter has may be ignored: by the library's list, as a buffer that is
    computed, or as one of another pipeline stage."""
    if any(re.search(p, key) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()):
        return True
    module, rest = _deepest(model, name)
    if isinstance(module, PrunedModule) or len(rest) != 1:
        return isinstance(module, PrunedModule)
    pruned_parameter = rest[0] in module._parameters and module._parameters[rest[0]] is None
    return rest[0] in module._non_persistent_buffers_set or pruned_parameter


def beyond(model: nn.Module, name: str) -> bool:
    """Whether a name is of a block that this model lacks, having fewer layers than its checkpoint."""
    module, rest = _deepest(model, name)
    number = rest[0] if rest and isinstance(module, nn.ModuleList) else ""
    return number.isdigit() and int(number) >= len(module)  # type: ignore[arg-type]


def overridden(model: nn.Module, written: Any) -> bool:
    """Whether the model's config differs from the one that was read from the checkpoint."""
    config: Any = getattr(model, "config", None)
    if config is None or written is None:
        return False
    volatile = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "use_cache")

    def kept(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: kept(value) for key, value in values.items() if key not in volatile}

    return kept(written.to_dict()) != kept(config.to_dict())
