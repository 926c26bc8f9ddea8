"""LoRA files of this program and of others, at their full strength and by the library's names of the layers.

Trainers write the same A and B under other names (peft, diffusers, kohya, ComfyUI, fal, XLabs, bare names of
modules) and keep the factor of B A in a config, a header or `.alpha` tensors, for all layers or each one.
diffusers and peft own the names: their conversions are called. A tensor that they drop, or that fits no
layer, is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError, cause
from polymodal.models import catalog, library, pipelines
from polymodal.models.storage import Files, read_json

PREFIX = "base_model.model."  # of every key in peft's files
STEM = "adapter_model"
DIFFUSERS_STEM = "pytorch_lora_weights"

_MATRIX = re.compile(
    r"[._](?P<what>lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.(?:down|up))"
    r"(?:\.(?!weight$|bias$)\w+)?\.(?P<kind>weight|bias)$"
)
"""The end of a key: which of the two matrices, perhaps peft's name of the adapter, weight or bias."""

KINDS = {
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_|\.boft_": "OFT",
    r"\.lora_mid\.": "LoCon with a third matrix",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lora_embedding_": "LoRA of embeddings",
    r"\.(ia3_l|on_input$)": "IA3",
}
"""What is no plain LoRA, by keys of its tensors."""

MERGE = "Merge it into its base with the program that trained it, and give the merged checkpoint."


class Found(NamedTuple):
    """The file with an adapter's tensors; config: peft's, beside it."""

    file: Path
    config: Path | None = None


def find(path: str | Path) -> Found | None:
    """The adapter that a path holds: a LoRA file, peft's directory, or one with a single LoRA file.

    Raises PolymodalError for a directory with several.
    """
    path = Path(path).expanduser()
    if path.is_file():
        config = path.parent / "adapter_config.json"
        own = path.stem == STEM and config.is_file()
        return Found(path, config if own else None) if _matrices(path) else None
    if not path.is_dir() or catalog.is_whole(path):
        return None
    if (config := path / "adapter_config.json").is_file():
        return Found(path / f"{STEM}.safetensors", config)
    if (own := path / f"{DIFFUSERS_STEM}.safetensors").is_file():
        return Found(own)
    files = [file for file in sorted(path.glob("*.safetensors")) if _matrices(file)]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (" ..." if len(files) > 4 else "")
        raise PolymodalError(f"{path} holds {len(files)} LoRA files: {names}.", "Give one of them.")
    return Found(files[0]) if files else None


def _matrices(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(str(file), framework="pt") as opened:
            return any(re.search(r"lora|lokr|hada|oft_", key) for key in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def require(path: str | Path) -> Found:
    """`find`, whose absence is an error."""
    found = find(path)
    if found is None:
        raise PolymodalError(
            f"{path} holds no LoRA adapter.", "Give a LoRA file (.safetensors), or the directory of one."
        )
    return found


def settings(found: Found) -> dict[str, Any]:
    """peft's config, of the directory or in the file's header by component (diffusers); {} without one."""
    from safetensors import safe_open

    if found.config is not None:
        return read_json(found.config)
    with safe_open(str(found.file), framework="pt") as file:
        try:
            kept = json.loads((file.metadata() or {}).get("lora_adapter_metadata") or "{}")
        except ValueError:
            kept = None
    if not isinstance(kept, dict):
        raise PolymodalError(
            f"{found.file}: lora_adapter_metadata in its header is no JSON object.", "Export it again."
        )
    return kept


def check_plain(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises PolymodalError for what is no plain LoRA, by its config, and its tensors' names and shapes."""
    config = settings(found)
    kind = config.get("peft_type", "LORA") if found.config is not None else "LORA"
    extra = [
        key for key in ("modules_to_save", "trainable_token_indices", "layer_replication") if config.get(key)
    ]
    what = f"{kind} of peft" if kind != "LORA" else None
    what = what or (f"LoRA with {', '.join(extra)}" if extra else None)
    what = what or ("LoRA with biases" if config.get("bias", "none") != "none" else None)
    what = what or ("LoRA with DoRA" if config.get("use_dora") else None)
    for pattern, name in KINDS.items():
        first = next((key for key in shapes if re.search(pattern, key)), None)
        if what is None and first is not None:
            what = f"{name} ({first})"
    for key, shape in shapes.items():
        end = _MATRIX.search(key)
        if end and end["kind"] == "weight" and (len(shape) < 2 or 0 in shape):
            raise PolymodalError(
                f"{found.file}: {key} of shape {list(shape)} is no matrix.",
                "Save or fetch the adapter again.",
            )
    if what is not None:
        raise PolymodalError(f"{found.config or found.file}: this is {what}, not plain LoRA.", MERGE)


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor of a layer's B A by peft's config, with its patterns; 1 where it names no alpha."""
    from peft.utils.other import get_pattern_key

    def of(key: str, patterns: str) -> Any:
        chosen = config.get(patterns) or {}
        return chosen.get(get_pattern_key(chosen, layer), config.get(key)) if chosen else config.get(key)

    try:
        alpha, rank = of("lora_alpha", "alpha_pattern"), of("r", "rank_pattern") or rank
        factor = 1.0 if alpha is None else float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
        if isfinite(factor):
            return factor
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, OverflowError, re.error):
        pass
    raise PolymodalError(
        f"The adapter's config gives {layer} no factor that is a number (lora_alpha, r and their patterns).",
        "Correct adapter_config.json, or export the adapter again.",
    )


# --- denoisers ------------------------------------------------------------------------------------


def of_denoiser(
    path: str | Path, family: Any, models: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """An adapter's float32 tensors with alpha = rank, by component and "<layer>.lora_A.weight".

    models: the components that it may be of, on meta or not: the denoiser (family.part), text encoders.
    Raises PolymodalError when a tensor is of no layer of them, or the library's conversion drops it.
    """
    found = require(path)
    tensors = _full_strength(found, family.part)
    cls = pipelines.pipeline_class(family.source)
    convert = partial(_converted, cls=cls, family=family, models=models)
    failures: list[tuple[int, str]] = []
    inner = {key.removeprefix(PREFIX).removeprefix("diffusion_model."): v for key, v in tensors.items()}
    for names in (
        tensors,
        *({prefix + k: v for k, v in inner.items()} for prefix in _prefixes(family)),
    ):
        try:
            with pipelines.quiet():
                made = convert(names)
                lost = _dropped(names, convert)
        except Exception as error:  # whatever a conversion of diffusers stumbles over
            why = f"diffusers cannot convert its names: {type(error).__name__}: {cause(error)[:160]}"
            failures.append((len(names), why))
            continue
        misfits = _misfits(made, models)
        if not misfits and not lost:
            return made
        why = misfits[0] if misfits else f"diffusers drops {lost[0]}"
        failures.append(
            (len(misfits) + len(lost), f"{len(misfits) + len(lost)} of {len(names)} tensors: {why}")
        )
    _, why = min(failures, key=lambda failure: failure[0])
    raise PolymodalError(
        f"{found.file} does not fit {family.card.name}'s {family.part} ({why}).",
        "Give the base that it was trained on (--base or model.source); convert an adapter in a format that "
        "diffusers does not read with the program that wrote it.",
    )


def _prefixes(family: Any) -> tuple[str, ...]:
    """What may be missing before bare names of modules: diffusers' or the original architecture's."""
    return "", f"{family.part}.", "diffusion_model.", PREFIX


def _full_strength(found: Found, part: str) -> dict[str, Tensor]:
    """The file's tensors in float32, each B multiplied by its layer's factor; `.alpha` tensors say rank."""
    files = Files(found.file.parent, (found.file.stem,))
    check_plain(found, files.shapes)
    tensors = {key: files.whole(key).float() for key in files.shapes}
    config = settings(found)
    ranks, ups = {}, {}
    for key in tensors:
        if end := _MATRIX.search(key):
            layer = key[: end.start()]
            down = end["what"].endswith(("A", "down"))
            if down and end["kind"] == "weight":
                ranks[layer] = tensors[key].shape[0]
            elif not down:
                ups[key] = layer
    for key, layer in ups.items():
        alpha, rank = tensors.get(f"{layer}.alpha"), ranks.get(layer)
        if rank is None:
            raise PolymodalError(f"{found.file}: {layer} has B and no A.", "Save the adapter again.")
        if alpha is not None:
            factor = float(alpha.reshape(-1)[0]) / rank if alpha.numel() == 1 else nan
            if not isfinite(factor):
                raise PolymodalError(f"{found.file}: {layer}.alpha is no number.", "Save the adapter again.")
        elif found.config is not None:
            factor = scale(config, layer.removeprefix(PREFIX), rank)
        else:
            component, _, inside = layer.partition(".")
            own = {k.partition(".")[2]: v for k, v in config.items() if k.partition(".")[0] == component}
            factor = scale(own, inside, rank)
        tensors[key] = tensors[key] * factor
    for layer in {*ranks} - {*ups.values()}:
        raise PolymodalError(f"{found.file}: {layer} has A and no B.", "Save the adapter again.")
    for layer, rank in ranks.items():  # some conversions demand alphas, others know none
        if f"{layer}.alpha" in tensors:
            tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
            if f"{layer}.lora_down.weight" not in tensors:
                del tensors[f"{layer}.alpha"]
    return {unnamed(key): value for key, value in tensors.items()}


def unnamed(key: str) -> str:
    """A key without peft's name of the adapter: `q.lora_A.default.weight` -> `q.lora_A.weight`."""
    return re.sub(r"(\.lora_[AB])\.(?!weight$|bias$)\w+\.(weight|bias)$", r"\1.\2", key)


def _converted(
    tensors: Mapping[str, Tensor], cls: Any, family: Any, models: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """By component, through diffusers' own conversions."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    state: Any = dict(tensors)
    if hasattr(cls, "lora_state_dict"):
        options = {"unet_config": models[family.part].config} if family.part == "unet" else {}
        state = cls.lora_state_dict(state, **options)
        state = state[0] if isinstance(state, tuple) else state
    parted: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        component, _, inside = key.partition(".")
        # a pipeline's second denoiser has the first one's names in files
        component = family.part if component in ("transformer", "unet") else component
        if inside and not inside.endswith(".alpha"):
            parted.setdefault(component, {})[inside] = value
        elif not key.endswith(".alpha"):
            parted.setdefault("", {})[key] = value
    for component, values in parted.items():
        if any(not re.search(r"\.lora_[AB]\.", key) for key in values):
            if component == family.part:
                values = convert_unet_state_dict_to_peft(values)
            elif component.startswith("text_encoder"):
                values = convert_state_dict_to_peft(convert_state_dict_to_diffusers(values))
        if component.startswith("text_encoder") and not hasattr(models.get(component), "text_model"):
            values = {key.removeprefix("text_model."): value for key, value in values.items()}
        parted[component] = values
    return parted


def _dropped(
    tensors: Mapping[str, Tensor], convert: Callable[[Any], dict[str, dict[str, Tensor]]]
) -> list[str]:
    """Keys whose values are nowhere in what `convert` makes: each is followed by a number in its place."""
    keys = [key for key in tensors if not key.endswith(".alpha")]
    marked = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    marked |= {key: torch.tensor(float(i)).expand(tensors[key].shape) for i, key in enumerate(keys, 1)}
    seen = set()
    for state in convert(marked).values():
        for value in state.values():
            rows = value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)
            seen |= set(rows[:, 0].tolist()) | set(rows[0].tolist())
    return [key for i, key in enumerate(keys, 1) if float(i) not in seen]


def _misfits(made: Mapping[str, Mapping[str, Tensor]], models: Mapping[str, nn.Module]) -> list[str]:
    """What fits no layer, in words."""
    wrong = []
    for component, state in made.items():
        layers = dict(models[component].named_modules()) if component in models else {}
        layers = {library.plain(name): module for name, module in layers.items()}
        for key, value in state.items():
            end = _MATRIX.search(key)
            layer = _weighted(layers.get(key[: end.start()])) if end else None
            name = f"{component}.{key}" if component else key
            if layer is None and component in models and library.ignorable(models[component], key, key):
                continue  # of another pipeline stage
            if end is None or layer is None:
                wrong.append(f"{name} is of no layer")
            elif end["kind"] == "weight":
                side = 1 if end["what"] == "lora_A" else 0
                size = layer.weight.shape[side]
                if value.shape[side] != size:
                    wrong.append(
                        f"{name} has the shape {list(value.shape)}, its layer {list(layer.weight.shape)}"
                    )
    return wrong


def _weighted(module: nn.Module | None) -> Any:
    """A layer with a weight matrix; the layer inside peft's, where it has adapters already."""
    module = getattr(module, "base_layer", module)
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.ndim >= 2 else None
