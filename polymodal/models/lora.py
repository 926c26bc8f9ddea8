"""Adapters: which layers get them, how they start, and their way to disk and back; peft owns the layers themselves.

Sees the ground floor, card.py and the weights' rooms. Adapters are attached to the whole model on meta, before it is
laid out; from then on they are parameters like others, named `<layer>.lora_A.default.weight` and `..lora_B..`.
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
from polymodal.core.tensors import LazyTensors
from polymodal.core.text import nearest
from polymodal.models import library, stacked, weights
from polymodal.models.card import ModelCard
from polymodal.models.initial import seeded
from polymodal.models.saving import appearing
from polymodal.models.slices import scatter
from polymodal.models.storage import Files, write_file
from polymodal.recipe import Lora

NAME = "default"  # peft's name of the one adapter
PREFIX = "base_model.model."  # of every key in peft's files
STEM = "adapter_model"
DIFFUSERS_STEM = "pytorch_lora_weights"

REFUSED_STARTS = {
    "pissa": "it moves part of each weight into its adapter, so the adapter no longer fits the base that lies on disk",
    "olora": "it moves part of each weight into its adapter, so the adapter no longer fits the base that lies on disk",
}


def scale(lora: Lora) -> float:
    """What an adapter's output is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."""
    return lora.alpha / (sqrt(lora.rank) if lora.rslora else lora.rank)


def towers_of(lora: Lora, card: ModelCard) -> list[str]:
    """The towers that get adapters: the recipe's, or the card's main one."""
    return lora.towers if lora.towers is not None else [card.main]


def attach(model: nn.Module, lora: Lora, card: ModelCard) -> list[str]:
    """Put adapters (float32, on meta) on the chosen layers and freeze everything else; returns the layers' names.

    model: whole, before it is laid out. all-linear is every nn.Linear of the chosen towers except the head; stacked
    experts, which must be named, and routers are none. Of a stack the parameter's name is returned. Raises
    PolymodalError for towers, targets and starts that cannot be.
    """
    from peft import inject_adapter_in_model

    if lora.init in REFUSED_STARTS:
        raise PolymodalError(
            f"model.lora.init = {lora.init} is not done: {REFUSED_STARTS[lora.init]}, and shards cannot be decomposed alone.",
            "Use default or gaussian.",
        )
    if "lora" in card.limits:
        raise PolymodalError(
            f"model.lora: {card.name} takes no adapters: {card.limits['lora']}.", "Leave it out."
        )
    linear, stacks = layers(model, lora, card)
    config = config_of(
        lora, _selector(linear, _names(model)), stacks=stacked.selector(stacks, model) if stacks else None
    )
    inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    adapted = []
    for name, parameter in model.named_parameters():
        adapter = library.ADAPTER.search(name) is not None
        parameter.requires_grad_(adapter)
        if adapter:
            parameter.data = parameter.data.float()
            adapted.append(name.split(".lora_")[0])
    homes = stacked.homes(model)
    assert set(adapted) == {*linear, *homes.values()} and set(homes) == set(stacks), (
        "peft adapted other layers than were chosen"
    )
    return linear + stacks


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
    modules = {
        n: m for n, m in model.named_modules() if n and any(n == p or n.startswith(p + ".") for p in inside)
    }
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n != card.head]
    if lora.targets == "all-linear":
        if not linear:
            raise PolymodalError(
                f"The towers {', '.join(towers)} of {card.name} have no linear layers.",
                "Choose other model.lora.towers.",
            )
        return linear, []
    chosen: set[str] = set()
    stacks = stacked.chosen(modules, lora.targets)
    if stacks:
        stacked.check(lora)
    for target in lora.targets:
        hits = [n for n in linear if n == target or n.endswith("." + target)]
        if not hits and not any(n == target or n.endswith("." + target) for n in stacks):
            raise _no_layer(target, modules, linear, lora, card)
        chosen.update(hits)
    if not chosen and not stacks:
        raise PolymodalError("model.lora.targets is empty.", "Use all-linear, or name layers.")
    return [n for n in linear if n in chosen], stacks


def _no_layer(
    target: str, modules: Mapping[str, nn.Module], linear: list[str], lora: Lora, card: ModelCard
) -> PolymodalError:
    what = f"model.lora.targets: `{target}`"
    if target in (card.head, card.head.rpartition(".")[2]):
        return PolymodalError(
            f"{what} is the output projection, which the loss multiplies by in chunks without an adapter.",
            "Leave it out.",
        )
    leaf = target.rpartition(".")[2]
    for name, module in modules.items():
        if name == target or name.endswith("." + target):
            return PolymodalError(
                f"{what} is a {library.class_of(module).__name__} ({name}); adapters go on linear layers.",
                f"Name linear layers: {', '.join(sorted({n.rpartition('.')[2] for n in linear}))}.",
            )
    endings = sorted({n.rpartition(".")[2] for n in linear})
    near = nearest(leaf, endings, 0.5)
    return PolymodalError(
        f"{what} fits no linear layer of {', '.join(towers_of(lora, card))} in {card.name}.",
        (f"Did you mean {near[0]}? " if near else "") + f"There are: {', '.join(endings)}.",
    )


def _selector(chosen: list[str], names: list[str]) -> list[str] | str:
    """The shortest way to tell peft exactly these of all modules: endings, else a pattern with layer numbers left open."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    wanted = set(chosen)
    if {name for name in names if name.rpartition(".")[2] in endings} == wanted:
        return endings
    patterns = sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in chosen})
    pattern = "|".join(patterns)
    if {name for name in names if re.fullmatch(pattern, name)} == wanted:
        return pattern
    return sorted(wanted)


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
        target_parameters=stacks,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {n: p for n, p in model.named_parameters() if library.ADAPTER.search(n)}


def initialise(model: nn.Module, lora: Lora, seed: int) -> None:
    """Start values of adapters, from (seed, name) whatever the layout: B = 0, so the model is unchanged at step 0.

    A as peft draws it: uniform within 1 / sqrt(in features) (kaiming with a = sqrt 5), or normal with std 1 / r.
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
                value.normal_(0.0, 1.0 / lora.rank) if lora.init == "gaussian" else value.uniform_(
                    -bound, bound
                )
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


def save(
    state: Mapping[str, Tensor],
    model: nn.Module,
    lora: Lora,
    directory: str | Path,
    *,
    base: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """`write` into a directory that appears when it is whole. Raises PolymodalError also for one that is in
    use."""
    final = Path(directory)
    with appearing(final, overwrite) as partial:
        write(state, model, lora, partial, base=base, dtype=dtype)
    return final


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

    state: whole adapters by parameter name; model: tells the names of the other layers, may be on meta; base:
    hub id or directory of the base model. Raises PolymodalError for an incomplete state, a full disk.
    """
    names = _all_in(state, model)
    homes = stacked.homes(model)
    chosen = [n for n in dict.fromkeys(name.split(".lora_")[0] for name in names) if n not in homes.values()]
    config = config_of(
        lora, _selector(chosen, _names(model)), base, stacked.selector(list(homes), model) if homes else None
    )
    config.inference_mode = True
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None  # a denoiser is no language model to peft
    values = {PREFIX + name.replace(f".{NAME}.", "."): state[name].detach().cpu() for name in names}
    values = {key: value.to(dtype or value.dtype).contiguous().clone() for key, value in values.items()}
    write_file(values, directory / f"{STEM}.safetensors")
    config.save_pretrained(str(directory))


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds an adapter, in peft's format or diffusers', and no whole model."""
    found = Path(directory)
    if (found / "config.json").is_file() or (found / "model_index.json").is_file():
        return False
    return (found / "adapter_config.json").is_file() or (found / f"{DIFFUSERS_STEM}.safetensors").is_file()


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
    chosen = list(dict.fromkeys(name.split(".lora_")[0] for name in names))
    config = config_of(lora, _selector(chosen, _names(model))).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items() if k != "task_type"}
    layers = {
        n.replace(f".{NAME}.", "."): state[n].detach().cpu().to(dtype or torch.float32).contiguous()
        for n in names
    }
    pipeline.save_lora_weights(
        str(directory), **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config}
    )


@torch.no_grad()
def load(model: nn.Module, lora: Lora | None, directory: str | Path) -> None:
    """Fill a model's adapters, laid out or not, from a directory of peft or diffusers.

    Raises PolymodalError when the adapter is of another kind, rank, scale or set of layers.
    """
    directory = Path(directory)
    if lora is None:
        raise PolymodalError(
            f"{directory} is a LoRA adapter, but the recipe has no model.lora.",
            "Add model.lora as the adapter was trained, or merge it into its base first (`polymodal export --merge-lora`).",
        )
    weights.materialise(model)
    _compare(directory, lora)
    values = read(model, directory)
    for name, parameter in adapters(model).items():
        scatter(values[name], parameter)


def read(model: nn.Module, directory: Path) -> LazyTensors:
    """The adapters in a directory of peft or diffusers, whole, by the model's parameter names; it may be on
    meta.

    Raises PolymodalError when they are of other layers or shapes than the model's.
    """
    ours = (directory / "adapter_config.json").is_file()
    files = Files(directory, (STEM if ours else DIFFUSERS_STEM,))
    prefix = PREFIX if ours else next(iter(files.shapes)).partition(".")[0] + "."
    keys = {prefix + name.replace(f".{NAME}.", "."): name for name in adapters(model)}
    for few, many, what in ((keys, files.shapes, "lacks"), (files.shapes, keys, "has")):
        lost = sorted(set(few) - set(many))
        if lost:
            raise PolymodalError(
                f"The adapter {directory} {what} {len(lost)} layers' weights that the recipe's model.lora {'wants' if what == 'lacks' else 'does not'} (first: {lost[0]}).",
                "Set model.lora.towers and targets as they were when it was trained.",
            )
    for key, name in keys.items():
        shape = tuple(model.get_parameter(name).shape)
        if files.shapes[key] != shape:
            raise PolymodalError(
                f"The adapter {directory} has {key} of shape {list(files.shapes[key])}, the model {list(shape)}.",
                "It belongs to another base model.",
            )
    return LazyTensors(dict.fromkeys(keys, files.whole)).renamed(keys)


def _compare(directory: Path, lora: Lora) -> None:
    path = directory / "adapter_config.json"
    try:
        if not path.is_file() and (directory / f"{DIFFUSERS_STEM}.safetensors").is_file():
            path, config = directory / f"{DIFFUSERS_STEM}.safetensors", _diffusers_config(directory, lora)
        else:
            config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolymodalError(
            f"{path} cannot be read: {error}.", "Give the directory of a peft adapter."
        ) from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise PolymodalError(
            f"{path}: this is a {config.get('peft_type')} adapter{' with DoRA' if config.get('use_dora') else ''}, not plain LoRA.",
            "Choose a LoRA adapter.",
        )
    for key, mine in {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}.items():
        if config.get(key, False) != mine:
            name = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}[key]
            raise PolymodalError(
                f"{path}: {key} is {config.get(key)}, the recipe's model.lora.{name} is {mine}.",
                f"Set model.lora.{name} to {config.get(key)}.",
            )


def _diffusers_config(directory: Path, lora: Lora) -> dict[str, Any]:
    """peft's config as diffusers keeps it in the file's header; a file without one has alpha = rank."""
    from safetensors import safe_open

    with safe_open(str(directory / f"{DIFFUSERS_STEM}.safetensors"), framework="pt") as file:
        kept = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        rank = next(
            (file.get_slice(k).get_shape()[0] for k in sorted(file.keys()) if ".lora_A." in k), lora.rank
        )
    config = {key.rpartition(".")[2]: value for key, value in kept.items()}
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}


def read_settings(directory: Path) -> Lora:
    """The recipe's section that an adapter of a denoiser was trained with, its layers named one by one."""
    ours = directory / "adapter_config.json"
    config = (
        json.loads(ours.read_text(encoding="utf-8"))
        if ours.is_file()
        else _diffusers_config(directory, Lora())
    )
    files = Files(directory, (STEM if ours.is_file() else DIFFUSERS_STEM,))
    prefix = PREFIX if ours.is_file() else next(iter(files.shapes)).partition(".")[0] + "."
    named = sorted({key.removeprefix(prefix).split(".lora_")[0] for key in files.shapes})
    return Lora(
        rank=config["r"], alpha=config["lora_alpha"], rslora=bool(config.get("use_rslora")), targets=named
    )


def scales(model: nn.Module) -> dict[str, float]:
    """What each adapted layer's B A is multiplied by, by the layer's name."""
    from peft.tuners.lora import LoraLayer

    return {n: m.scaling[NAME] for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def merged(
    state: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
    scales: Mapping[str, float] | float,
    model: nn.Module | None = None,
) -> LazyTensors:
    """Weights by plain name with adapters added when they are asked for: W + scale * B A, in float32.

    parts: whole adapters by parameter name; scales: of each layer, or of all; model: with its adapters, needed where
    stacked experts have some. Raises PolymodalError when an adapter finds no weight.
    """
    stacks = stacked.homes(model) if model is not None else {}
    wrappers = stacked.wrappers(model) if stacks else {}
    layers = {name: stacks.get(name) or name.removesuffix(".weight") for name in state}
    left = {name.split(".lora_")[0] for name in parts}
    left -= {layer for name, layer in layers.items() if name in stacks or name.endswith(".weight")}
    if left:
        raise PolymodalError(
            f"{len(left)} adapters have no weight to be added to (first: {sorted(left)[0]}).",
            "Is it the adapter's base model?",
        )

    def value(name: str) -> Tensor:
        layer, tensor = layers[name], state[name]
        if f"{layer}.lora_A.{NAME}.weight" not in parts or not (name in stacks or name.endswith(".weight")):
            return tensor
        a, b = (parts[f"{layer}.lora_{x}.{NAME}.weight"].float() for x in "AB")
        by = scales if isinstance(scales, (int, float)) else scales[layer]
        return tensor.float() + by * (stacked.delta(wrappers[layer], a, b) if layer in wrappers else b @ a)

    return LazyTensors(dict.fromkeys(state, value))
