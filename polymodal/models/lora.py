"""LoRA adapters: their layers, initial values, files. peft owns the layers themselves.

Adapters are attached to the whole model on meta, before it is sharded; from then on they are parameters like
others, named `<layer>.lora_A.default.weight` and `..lora_B..`.
"""

from __future__ import annotations

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
from polymodal.models import adapter_files, library, stacked, weights
from polymodal.models.card import ModelCard
from polymodal.models.initial import seeded
from polymodal.models.slices import scatter
from polymodal.models.storage import Files, write_file
from polymodal.recipe import Lora

NAME = "default"  # peft's name of the one adapter


def towers_of(lora: Lora, card: ModelCard) -> list[str]:
    """The towers that get adapters: the recipe's, or the card's main one."""
    return lora.towers if lora.towers is not None else [card.main]


def attach(model: nn.Module, lora: Lora, card: ModelCard) -> list[str]:
    """Put adapters (float32, on meta) on the chosen layers and freeze all else; returns the layers' names.

    model: whole, before it is sharded. all-linear is every nn.Linear of the chosen towers except the head and
    `taken`; it includes neither stacked experts, which must be named, nor routers. Of a stack the parameter's
    name is returned. Raises PolymodalError for towers and targets that cannot be.
    """
    from peft import inject_adapter_in_model

    if "lora" in card.limits:
        raise PolymodalError(
            f"model.lora: {card.name} takes no adapters: {card.limits['lora']}.", "Leave it out."
        )
    linear, stacks = layers(model, lora, card)
    config = config_of(
        lora, _selector(linear, _names(model), not taken(model)), stacks=stacked.selector(stacks, model)
    )
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


def taken(model: nn.Module) -> set[str]:
    """Last parts of layers' names that peft takes for experts of before transformers 5 stacked them, in every
    file of adapters of such a model: linear layers named so (dense and shared MLPs) cannot have any."""
    from peft.utils import transformers_weight_conversion as conversion

    kind = getattr(getattr(model, "config", None), "model_type", None)
    older = conversion._MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(older, ()))


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
    names = taken(model)
    linear = [
        n
        for n, m in modules.items()
        if isinstance(m, nn.Linear) and n != card.head and n.rpartition(".")[2] not in names
    ]
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
            raise _no_layer(target, modules, linear, names, lora, card)
    return [name for name in linear if stacked.ends_in(name, lora.targets)], stacks


def _no_layer(
    target: str,
    modules: Mapping[str, nn.Module],
    linear: list[str],
    names: set[str],
    lora: Lora,
    card: ModelCard,
) -> PolymodalError:
    what = f"model.lora.targets: `{target}`"
    if target in (card.head, card.head.rpartition(".")[2]):
        return PolymodalError(
            f"{what} is the output projection, which the loss multiplies by in chunks without an adapter.",
            "Leave it out.",
        )
    endings = sorted({name.rpartition(".")[2] for name in linear})
    if target.rpartition(".")[2] in names:
        return PolymodalError(
            f"{what}: peft takes layers of {card.name} that are named so for its experts.",
            f"Leave it out, name stacks (experts.gate_up_proj), or take {', '.join(endings)}.",
        )
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


def _selector(chosen: list[str], names: list[str], patterns: bool = True) -> list[str] | str:
    """peft's shortest target_modules for exactly these modules: endings, else a pattern of numbers.

    patterns: not where names are `taken`, where peft breaks them into endings."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    if {name for name in names if name.rpartition(".")[2] in endings} == set(chosen):
        return endings
    pattern = "|".join(sorted({re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in chosen}))
    if patterns and {name for name in names if re.fullmatch(pattern, name)} == set(chosen):
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
    config = config_of(lora, _selector(chosen, _names(model), not taken(model)), base, stacks)
    config.inference_mode = True
    if not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = None  # a denoiser is no language model to peft
    values = {adapter_files.PREFIX + _key(name): state[name].detach().cpu() for name in names}
    values = {key: value.to(dtype or value.dtype).contiguous().clone() for key, value in values.items()}
    write_file(values, directory / f"{adapter_files.STEM}.safetensors")
    config.save_pretrained(str(directory))


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter (`adapter_files.find`) and no whole model."""
    return adapter_files.find(path) is not None


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
    """Write adapters as the file that `load_lora_weights` of diffusers opens.

    Its B matrices are multiplied by the layers' factors (alpha = rank): readers that know tensors alone apply
    it in full. state: whole adapters by parameter name; pipeline: the diffusers class; part: the denoiser's
    name in it.
    """
    names, factors = _all_in(state, model), scales(model)
    chosen = list(dict.fromkeys(map(_layer, names)))
    plain = lora.model_copy(update={"alpha": float(lora.rank), "rslora": False})
    config = config_of(plain, _selector(chosen, _names(model), not taken(model))).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items() if k != "task_type"}

    def whole(name: str) -> Tensor:
        value = state[name].detach().cpu().float()
        return value * factors[_layer(name)] if ".lora_B." in name else value

    values = {_key(name): whole(name).to(dtype or torch.float32).contiguous() for name in names}
    arguments = {f"{part}_lora_layers": values, f"{part}_lora_adapter_metadata": config}
    pipeline.save_lora_weights(str(directory), **arguments)


@torch.no_grad()
def load(model: nn.Module, lora: Lora | None, path: str | Path, family: Any = None) -> None:
    """Fill a model's adapters, sharded or not, from an adapter of this or another program.

    family: of a denoiser. Raises PolymodalError when the adapter is of another kind, of a higher rank or of
    other layers.
    """
    if lora is None:
        raise PolymodalError(
            f"{path} is a LoRA adapter, but the recipe has no model.lora.",
            "Add model.lora as the adapter was trained, "
            "or merge it into its base first (`polymodal export --merge-lora`).",
        )
    initial = initial_values(model, lora, 0)
    weights.materialise(model)
    values = read(model, path, family, initial)
    for name, parameter in adapters(model).items():
        scatter(values[name], parameter)


def read(
    model: nn.Module, path: str | Path, family: Any = None, initial: Mapping[str, Tensor] | None = None
) -> LazyTensors:
    """An adapter whole, by the model's parameter names, to be multiplied by the model's own factors.

    A lower rank than the model's is filled up: rows of A with `initial` (or zeros), columns of B with zeros.
    Raises PolymodalError when it is of other layers or shapes than the model's.
    """
    found = adapter_files.require(path)
    own = {_key(name): name for name in adapters(model)}
    if family is not None and hasattr(family, "part"):
        bare = {family.part: model}
        parted = adapter_files.of_denoiser(path, family, bare)
        shapes = {key: tuple(value.shape) for key, value in parted[family.part].items()}
        keys, values = (
            {key: key for key in shapes},
            LazyTensors(dict.fromkeys(shapes, parted[family.part].get)),
        )
        factor = dict.fromkeys(map(_layer, shapes), 1.0)
    else:
        files = Files(found.file.parent, (found.file.stem,))
        adapter_files.check_plain(found, files.shapes)
        config, shapes = adapter_files.settings(found), files.shapes
        keys, values = peft_names(model, shapes), LazyTensors(dict.fromkeys(shapes, files.whole))
        names = {_layer(key): _layer(keys[key]) for key in shapes}
        rank = {_layer(key): shape[0] for key, shape in shapes.items() if ".lora_A" in key}
        factor = {
            layer: adapter_files.scale(config, file.removeprefix(adapter_files.PREFIX), rank.get(file, 1))
            for file, layer in names.items()
        }
    by_name = {keys[key]: key for key in shapes}
    absent, others = sorted(own.keys() - by_name.keys()), sorted(by_name.keys() - own.keys())
    surplus = [name for name in others if not library.ignorable(model, name, name)]  # of other stages
    if absent or surplus:
        what = f"lacks {len(absent)}" if absent else f"has {len(surplus)}"
        why = "wants" if absent else "does not"
        endings = sorted({_layer(name).rpartition(".")[2] for name in by_name if ".lora_" in name})
        raise PolymodalError(
            f"The adapter {path} {what} layers' weights that the recipe's model.lora {why} "
            f"(first: {(absent or surplus)[0]}).",
            f"Set model.lora.towers and targets as they were when it was trained: it has layers named "
            f"{', '.join(endings[:12])}{' ...' if len(endings) > 12 else ''}.",
        )
    factors = scales(model)
    stacks = set(stacked.homes(model).values())

    def value(name: str) -> Tensor:
        key, layer = _key(name), _layer(name)
        wanted, tensor = model.get_parameter(name).shape, values[by_name[key]].float()
        side = 0 if ".lora_A." in name else 1  # the rank's
        low = layer not in stacks and tensor.ndim == len(wanted) and tensor.shape[side] < wanted[side]
        if side == 1 and factor[layer] != factors[layer]:
            tensor = tensor * (factor[layer] / factors[layer])
        if low:
            rest = initial[name] if initial is not None else torch.zeros(wanted)
            rest = rest if side == 0 else torch.zeros(wanted)
            tensor = torch.cat(
                [tensor, rest.narrow(side, tensor.shape[side], wanted[side] - tensor.shape[side])], side
            )
        require_finite([(by_name[key], tensor)], path)
        return tensor

    for key, name in own.items():
        shape, wanted = tuple(shapes[by_name[key]]), tuple(model.get_parameter(name).shape)
        side = 0 if ".lora_A." in name else 1
        others = [n for at, (n, m) in enumerate(zip(shape, wanted, strict=False)) if at != side and n != m]
        if len(shape) != len(wanted) or others:
            raise PolymodalError(
                f"The adapter {path} has {by_name[key]} of shape {list(shape)}, the model {list(wanted)}.",
                "Give the base that it was trained on (model.source, or --base).",
            )
        if shape[side] > wanted[side] or (_layer(name) in stacks and shape != wanted):
            ranks = [s[0] for k, s in shapes.items() if ".lora_A" in k and _layer(keys[k]) not in stacks]
            highest = max(ranks, default=0) or adapter_files.settings(found).get("r")
            raise PolymodalError(
                f"The adapter {path} has the rank {highest}, more than the recipe's model.lora.rank.",
                f"Set model.lora.rank to {highest}.",
            )
    return LazyTensors(dict.fromkeys(own.values(), value))


def peft_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """A peft file's keys -> the model's, without peft's prefix; where the model has no such layer, renamed by
    the library as it renames the weights of older checkpoints."""
    known = set(_names(model))
    names = {key: key.removeprefix(adapter_files.PREFIX) for key in shapes}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, name in names.items():
        if _layer(name) not in known and (end := library.ADAPTER.search(name)):
            layers.setdefault(_layer(name), {})[end[1]] = shapes[key]
    whole = {f"{n}.weight": (m["B"][0], m["A"][-1]) for n, m in layers.items() if {"A", "B"} <= m.keys()}
    if whole:
        entries = library.layout(model, whole).entries
        renamed = {
            one.keys[0].removesuffix(".weight"): n.removesuffix(".weight") for n, one in entries.items()
        }
        for key, name in names.items():
            if layer := renamed.get(_layer(name)):
                names[key] = layer + name.removeprefix(_layer(name))
    return names


def read_settings(path: str | Path, family: Any) -> Lora:
    """The recipe's section of an adapter of a denoiser at full strength, its layers named one by one."""
    state = adapter_files.of_denoiser(path, family, {family.part: family.build()})[family.part]
    rank = max(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    return Lora(rank=rank, alpha=rank, targets=sorted(set(map(_layer, state))))


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
            "Give the base that the adapter was trained on with --base.",
        )

    def value(name: str) -> Tensor:
        if name not in layer_of:
            return state[name]
        layer = layer_of[name]
        a, b = (parts[f"{layer}.lora_{x}.{NAME}.weight"].float() for x in "AB")
        b = scales[layer] * b  # as exports have it: both merge to the same bits
        return state[name].float() + (stacked.delta(wrappers[layer], a, b) if layer in wrappers else b @ a)

    return LazyTensors(dict.fromkeys(state, value))
