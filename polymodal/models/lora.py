"""LoRA adapters: their layers, initial values, files. peft owns the layers themselves.

Adapters are attached to the whole model on meta, before it is sharded; from then on they are parameters like
others, named `<layer>.lora_A.default.weight` and `..lora_B..`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import LazyTensors, require_finite
from polymodal.core.text import nearest
from polymodal.models import catalog, library, stacked, weights
from polymodal.models.card import ModelCard
from polymodal.models.initial import seeded
from polymodal.models.slices import scatter
from polymodal.models.storage import Files, read_json, write_file
from polymodal.recipe import Lora

NAME = "default"  # peft's name of the one adapter
PREFIX = "base_model.model."  # of every key in peft's files
STEM = "adapter_model"
DIFFUSERS_STEM = "pytorch_lora_weights"

REFUSED_INIT = ("pissa", "olora")


def towers_of(lora: Lora, card: ModelCard) -> list[str]:
    """The towers that get adapters: the recipe's, or the card's main one."""
    return lora.towers if lora.towers is not None else [card.main]


def attach(model: nn.Module, lora: Lora, card: ModelCard) -> list[str]:
    """Put adapters (float32, on meta) on the chosen layers and freeze all else; returns the layers' names.

    model: whole, before it is sharded. all-linear is every nn.Linear of the chosen towers except the head; it
    includes neither stacked experts, which must be named, nor routers. Of a stack the parameter's name is
    returned. Raises PolymodalError for towers, targets and init that cannot be.
    """
    from peft import inject_adapter_in_model

    if lora.init in REFUSED_INIT:
        raise PolymodalError(
            f"model.lora.init = {lora.init} is not done: it moves part of each weight into its adapter, "
            "so the adapter no longer fits the base on disk, and shards cannot be decomposed alone.",
            "Use default or gaussian.",
        )
    if "lora" in card.limits:
        raise PolymodalError(
            f"model.lora: {card.name} takes no adapters: {card.limits['lora']}.", "Leave it out."
        )
    linear, stacks = layers(model, lora, card)
    config = config_of(lora, _selector(linear, _names(model)), stacks=stacked.selector(stacks, model))
    inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    adapted = set()
    for name, parameter in model.named_parameters():
        adapter = library.ADAPTER.search(name) is not None
        parameter.requires_grad_(adapter)
        if adapter:
            parameter.data = parameter.data.float()
            adapted.add(_layer(name))
    homes = stacked.homes(model)
    assert adapted == {*linear, *homes.values()} and set(homes) == set(stacks), (
        "peft adapted other layers than were chosen"
    )
    return linear + stacks


def _layer(name: str) -> str:
    """The adapted layer of an adapter's parameter or file key."""
    return name.split(".lora_")[0]


def _key(name: str) -> str:
    """An adapter's parameter name as files have it: without peft's name of the adapter."""
    return name.replace(f".{NAME}.", ".")


def _names(model: nn.Module) -> list[str]:
    """Names of the modules as they are without adapters."""
    return [n for n, _ in model.named_modules() if not n.endswith(".base_layer") and ".lora_" not in n]


def layers(model: nn.Module, lora: Lora, card: ModelCard) -> tuple[list[str], list[str]]:
    """Names of the linear layers and of the stacks that get adapters, in the model's order.

    Raises PolymodalError as `attach` does.
    """
    towers = towers_of(lora, card)
    unknown = [tower for tower in towers if tower not in card.towers]
    if unknown or not towers:
        raise PolymodalError(
            f"model.lora.towers = {towers}: {card.name} has the towers {', '.join(card.towers)}.",
            "Name one or more of them.",
        )
    inside = tuple(prefix for tower in towers for prefix in card.towers[tower])
    modules = {n: m for n, m in model.named_modules() if any(n == p or n.startswith(p + ".") for p in inside)}
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n != card.head]
    if lora.targets == "all-linear":
        if not linear:
            raise PolymodalError(
                f"The towers {', '.join(towers)} of {card.name} have no linear layers.",
                "Choose other model.lora.towers.",
            )
        return linear, []
    if not lora.targets:
        raise PolymodalError("model.lora.targets is empty.", "Use all-linear, or name layers.")
    stacks = stacked.chosen(modules, lora.targets)
    if stacks:
        stacked.check(lora)
    for target in lora.targets:
        if not any(stacked.ends_in(name, [target]) for name in linear + stacks):
            raise _no_layer(target, modules, linear, lora, card)
    return [name for name in linear if stacked.ends_in(name, lora.targets)], stacks


def _no_layer(
    target: str, modules: Mapping[str, nn.Module], linear: list[str], lora: Lora, card: ModelCard
) -> PolymodalError:
    what = f"model.lora.targets: `{target}`"
    if target in (card.head, card.head.rpartition(".")[2]):
        return PolymodalError(
            f"{what} is the output projection, which the loss multiplies by in chunks without an adapter.",
            "Leave it out.",
        )
    endings = sorted({name.rpartition(".")[2] for name in linear})
    for name, module in modules.items():
        if stacked.ends_in(name, [target]):
            return PolymodalError(
                f"{what} is a {library.class_of(module).__name__} ({name}); adapters go on linear layers.",
                f"Name linear layers: {', '.join(endings)}.",
            )
    near = nearest(target.rpartition(".")[2], endings, 0.5)
    return PolymodalError(
        f"{what} fits no linear layer of {', '.join(towers_of(lora, card))} in {card.name}.",
        (f"Did you mean {near[0]}? " if near else "") + f"There are: {', '.join(endings)}.",
    )


def _selector(chosen: list[str], names: list[str]) -> list[str] | str:
    """peft's shortest target_modules for exactly these modules: endings, else a pattern of numbers."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    if {name for name in names if name.rpartition(".")[2] in endings} == set(chosen):
        return endings
    pattern = "|".join(sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in chosen}))
    if {name for name in names if re.fullmatch(pattern, name)} == set(chosen):
        return pattern
    return sorted(chosen)


def config_of(
    lora: Lora, selector: list[str] | str, base: str | None = None, stacks: list[str] | None = None
) -> Any:
    """peft's LoraConfig of a recipe's section."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        target_modules=selector,
        target_parameters=stacks or None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {n: p for n, p in model.named_parameters() if library.ADAPTER.search(n)}


def initialise(model: nn.Module, lora: Lora, seed: int) -> None:
    """Initial values of adapters, from (seed, name) whatever the layout: B = 0: the model is unchanged.

    A as peft draws it: uniform within 1 / sqrt(in features) (kaiming, a = sqrt 5), or normal with std 1 / r.
    """
    weights.materialise(model)
    values = initial_values(model, lora, seed)
    for name, parameter in adapters(model).items():
        scatter(values[name], parameter)


def initial_values(model: nn.Module, lora: Lora, seed: int) -> LazyTensors:
    """What `initialise` fills adapters with, whole, by parameter name; the model may be on meta."""
    shapes = {name: parameter.shape for name, parameter in adapters(model).items()}

    def drawn(name: str) -> Tensor:
        value = torch.zeros(shapes[name])
        if ".lora_A." in name:
            bound = 1.0 / sqrt(value.shape[1])
            with seeded(seed, name):
                if lora.init == "gaussian":
                    value.normal_(0.0, 1.0 / lora.rank)
                else:
                    value.uniform_(-bound, bound)
        return value

    return LazyTensors(dict.fromkeys(shapes, drawn))


def _all_in(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of a model's adapters. Raises PolymodalError when the state lacks some."""
    names = list(adapters(model))
    lost = sorted(set(names) - set(state))
    if lost:
        raise PolymodalError(
            f"The state lacks {len(lost)} adapters: {', '.join(lost[:4])}.", "Give all of the model's."
        )
    return names


def write(
    state: Mapping[str, Tensor],
    model: nn.Module,
    lora: Lora,
    directory: Path,
    *,
    base: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters as files that `PeftModel.from_pretrained(base_model, directory)` opens.

    state: whole adapters by parameter name; model: for the names of all layers, may be on meta; base: hub id
    or directory of the base model. Raises PolymodalError for an incomplete state, a full disk.
    """
    names = _all_in(state, model)
    homes = stacked.homes(model)
    chosen = [layer for layer in dict.fromkeys(map(_layer, names)) if layer not in homes.values()]
    stacks = stacked.selector(list(homes), model)
    config = config_of(lora, _selector(chosen, _names(model)), base, stacks)
    config.inference_mode = True
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None  # a denoiser is no language model to peft
    values = {PREFIX + _key(name): state[name].detach().cpu() for name in names}
    values = {key: value.to(dtype or value.dtype).contiguous().clone() for key, value in values.items()}
    write_file(values, directory / f"{STEM}.safetensors")
    config.save_pretrained(str(directory))


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter, in peft's format or diffusers', and no whole model."""
    return not catalog.is_whole(directory) and AdapterFiles(Path(directory)).path.is_file()


def save_for_pipeline(
    state: Mapping[str, Tensor],
    model: nn.Module,
    lora: Lora,
    directory: str | Path,
    *,
    pipeline: Any,
    part: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters as the file that `load_lora_weights` of diffusers opens, rank and alpha inside.

    state: whole adapters by parameter name; pipeline: the diffusers class; part: the denoiser's name in it.
    """
    names = _all_in(state, model)
    chosen = list(dict.fromkeys(map(_layer, names)))
    config = config_of(lora, _selector(chosen, _names(model))).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items() if k != "task_type"}
    values = {_key(n): state[n].detach().cpu().to(dtype or torch.float32).contiguous() for n in names}
    arguments = {f"{part}_lora_layers": values, f"{part}_lora_adapter_metadata": config}
    pipeline.save_lora_weights(str(directory), **arguments)


class AdapterFiles:
    """A directory with an adapter in peft's format or diffusers'."""

    def __init__(self, directory: Path):
        self.directory = directory
        config = directory / "adapter_config.json"
        self.peft = config.is_file()
        self.path = config if self.peft else directory / f"{DIFFUSERS_STEM}.safetensors"

    def settings(self) -> dict[str, Any]:
        """peft's config; diffusers has it in the file's header, without it alpha = rank."""
        from safetensors import safe_open

        if self.peft:
            return read_json(self.path)
        if not self.path.is_file():
            raise PolymodalError(
                f"{self.directory} has no adapter_config.json.", "Give the directory of a peft adapter."
            )
        with safe_open(str(self.path), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            ranks = (file.get_slice(k).get_shape()[0] for k in sorted(file.keys()) if ".lora_A." in k)
            rank = next(ranks, None)
        own = {key.rpartition(".")[2]: value for key, value in kept.items()}
        return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **own}

    def tensors(self) -> tuple[Files, str]:
        """The tensors, and the prefix of their keys."""
        files = Files(self.directory, (STEM if self.peft else DIFFUSERS_STEM,))
        return files, PREFIX if self.peft else next(iter(files.shapes)).partition(".")[0] + "."


@torch.no_grad()
def load(model: nn.Module, lora: Lora | None, directory: str | Path) -> None:
    """Fill a model's adapters, sharded or not, from a directory of peft or diffusers.

    Raises PolymodalError when the adapter is of another kind, rank, scale or set of layers.
    """
    directory = Path(directory)
    if lora is None:
        raise PolymodalError(
            f"{directory} is a LoRA adapter, but the recipe has no model.lora.",
            "Add model.lora as the adapter was trained, "
            "or merge it into its base first (`polymodal export --merge-lora`).",
        )
    weights.materialise(model)
    _compare(AdapterFiles(directory), lora)
    values = read(model, directory)
    for name, parameter in adapters(model).items():
        scatter(values[name], parameter)


def read(model: nn.Module, directory: Path) -> LazyTensors:
    """The adapters in a directory of peft or diffusers, whole, by the model's parameter names.

    Raises PolymodalError when they are of other layers or shapes than the model's.
    """
    files, prefix = AdapterFiles(directory).tensors()
    keys = {prefix + _key(name): name for name in adapters(model)}
    absent, surplus = sorted(keys.keys() - files.shapes.keys()), sorted(files.shapes.keys() - keys.keys())
    if absent or surplus:
        what = f"lacks {len(absent)}" if absent else f"has {len(surplus)}"
        why = "wants" if absent else "does not"
        raise PolymodalError(
            f"The adapter {directory} {what} layers' weights that the recipe's model.lora {why} "
            f"(first: {(absent or surplus)[0]}).",
            "Set model.lora.towers and targets as they were when it was trained.",
        )
    for key, name in keys.items():
        shape = tuple(model.get_parameter(name).shape)
        if files.shapes[key] != shape:
            raise PolymodalError(
                f"The adapter {directory} has {key} of shape {list(files.shapes[key])}, "
                f"the model {list(shape)}.",
                "It belongs to another base model.",
            )

    def whole(key: str) -> Tensor:
        tensor = files.whole(key)
        require_finite([(key, tensor)], files.where(key))
        return tensor

    return LazyTensors(dict.fromkeys(keys, whole)).renamed(keys)


def _compare(found: AdapterFiles, lora: Lora) -> None:
    config = found.settings()
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = f"{config.get('peft_type')} adapter{' with DoRA' if config.get('use_dora') else ''}"
        raise PolymodalError(f"{found.path}: this is a {kind}, not plain LoRA.", "Choose a LoRA adapter.")
    for key, name in {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}.items():
        asked = getattr(lora, name)
        if config.get(key, False) != asked:
            raise PolymodalError(
                f"{found.path}: {key} is {config.get(key)}, the recipe's model.lora.{name} is {asked}.",
                f"Set model.lora.{name} to {config.get(key)}.",
            )


def read_settings(directory: Path) -> Lora:
    """The recipe's section that an adapter of a denoiser was trained with, its layers named one by one."""
    found = AdapterFiles(directory)
    config, (files, prefix) = found.settings(), found.tensors()
    targets = sorted({_layer(key.removeprefix(prefix)) for key in files.shapes})
    rslora = bool(config.get("use_rslora"))
    return Lora(rank=config["r"], alpha=config["lora_alpha"], rslora=rslora, targets=targets)


def scales(model: nn.Module) -> dict[str, float]:
    """The factor of each adapted layer's B A, by the layer's name: alpha / r, or alpha / sqrt(r)."""
    from peft.tuners.lora import LoraLayer

    return {n: m.scaling[NAME] for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def merged(
    state: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    scales: Mapping[str, float],
    model: nn.Module | None = None,
) -> LazyTensors:
    """Weights by plain name with adapters added when they are read: W + scale * B A, in float32.

    parts: whole adapters by parameter name; scales: of each layer; model: with its adapters, needed where
    stacked experts have some. Raises PolymodalError when an adapter finds no weight.
    """
    stacks = stacked.homes(model) if model is not None else {}
    wrappers = stacked.wrappers(model) if model is not None else {}
    layer_of = {name: stacks.get(name, name.removesuffix(".weight")) for name in state}
    layer_of = {name: layer for name, layer in layer_of.items() if f"{layer}.lora_A.{NAME}.weight" in parts}
    left = {_layer(name) for name in parts} - set(layer_of.values())
    if left:
        raise PolymodalError(
            f"{len(left)} adapters have no weight to be added to (first: {sorted(left)[0]}).",
            "Is it the adapter's base model?",
        )

    def value(name: str) -> Tensor:
        if name not in layer_of:
            return state[name]
        layer = layer_of[name]
        a, b = (parts[f"{layer}.lora_{x}.{NAME}.weight"].float() for x in "AB")
        delta = stacked.delta(wrappers[layer], a, b) if layer in wrappers else b @ a
        return state[name].float() + scales[layer] * delta

    return LazyTensors(dict.fromkeys(state, value))
