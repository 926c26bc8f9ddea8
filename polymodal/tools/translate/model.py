"""Model files (`--mm-model`): where weights lie, what is frozen, pipeline stages, the noise process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models import catalog
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import TABLES, Given, Origin

VISION, PROJECTOR = "image_encoder.vision_encoder", "image_encoder.vision_projector"
TEXT, AUDIO = "text_decoder", "audio_encoder.audio_encoder"
TOWERS = {"vision": VISION, "language": TEXT, "audio": AUDIO}
COMPARED = {  # their key -> places in config.json
    f"{TEXT}.num_layers": ("num_hidden_layers",),
    f"{TEXT}.hidden_size": ("hidden_size",),
    f"{TEXT}.ffn_hidden_size": ("intermediate_size",),
    f"{TEXT}.num_attention_heads": ("num_attention_heads",),
    f"{TEXT}.num_query_groups": ("num_key_value_heads",),
    f"{TEXT}.vocab_size": ("vocab_size",),
    f"{VISION}.num_layers": ("vision_config.depth", "vision_config.num_hidden_layers"),
    f"{VISION}.patch_size": ("vision_config.patch_size",),
}
ATTENTION = {"flash_attention_2": "auto", "sdpa": "sdpa", "eager": "eager"}
DENSITIES = {
    "explicit_uniform": "uniform",
    "uniform": "uniform",
    "logit-normal": "logit_normal",
    "lognorm": "logit_normal",
    "logit_normal": "logit_normal",
}


def layers_of(given: Given) -> int:
    """The most layers of a tower that the file names; 0 where it names none."""
    keys = (f"{TEXT}.num_layers", "predictor.num_layers", "predictor.mm_single_blocks_depth")
    found = [value for key in keys if isinstance(value := given.peek(key), int)]
    return max(found, default=0)


def source(launch: Launch, given: Given, data: Given, candidates: tuple[tuple[Given, str], ...] = ()) -> None:
    """model.source: the first of the places that name the hub's directory; --source before all."""
    places = (
        *candidates,
        (data, "dataset_param.preprocess_parameters.model_name_or_path"),
        (given, "init_from_hf_path"),
        (data, "dataset_param.tokenizer_config.from_pretrained"),
        (data, "dataset_param.processor_path"),
        (data, "dataset_param.preprocess_parameters.processor_name_or_path"),
        (given, "ckpt_path"),
    )
    found = [(file, key, value) for file, key in places if isinstance(value := file.take(key), str)]
    if launch.source is not None:
        launch.ledger.write("model.source", launch.source, Origin("--source", "the command line"))
        for file, key, value in found:
            launch.ledger.note("no effect", file.origin(key), value, "--source was given")
        return
    if not found:
        raise PolymodalError(
            f"{launch.file}: no file of it names the hub's directory of the model (config.json, tokenizer).",
            "Name it: --source DIR or a hub id.",
        )
    file, key, value = found[0]
    launch.ledger.write(
        "model.source",
        launch.path(value),
        file.origin(key),
        value if launch.path(value) != value else launch.path(value),
    )
    for other, name, again in found[1:]:
        same = launch.path(again) == launch.path(value)
        launch.ledger.note(
            "mapped" if same else "checked",
            other.origin(name),
            again,
            "model.source" if same else "another directory than model.source",
        )


def chat(launch: Launch, given: Given, data: Given, sizes: Mapping[str, int]) -> None:
    """A model that answers: source, freezing, pipeline layers, recompute and attention by tower."""
    ledger = launch.ledger
    source(launch, given, data)
    name = given.take("model_id")
    if name is not None:
        card = TABLES["cards"].get(str(name).lower())
        if card is None:
            known = ", ".join(sorted(TABLES["cards"]))
            ledger.note(
                "checked",
                given.origin("model_id"),
                name,
                f"the checkpoint's config decides; known are {known}",
            )
        else:
            ledger.note("checked", given.origin("model_id"), name, f"the card {card}")
    _frozen(launch, given)
    if sizes["pp"] > 1:
        _stages(launch, given, sizes)
    for tower in TOWERS.values():
        given.take(f"{tower}.pipeline_num_layers")
    _recompute(launch, given)
    for tower in (VISION, TEXT, AUDIO):
        kernel = given.take(f"{tower}.attn_implementation")
        if kernel is not None and kernel in ATTENTION:
            ledger.write(
                "model.attention", ATTENTION[kernel], given.origin(f"{tower}.attn_implementation"), kernel
            )
        elif kernel is not None:
            ledger.note(
                "unsupported",
                given.origin(f"{tower}.attn_implementation"),
                kernel,
                f"known are {', '.join(ATTENTION)}",
            )
    if given.take(f"{TEXT}.activation_offload"):
        before = ledger.get("parallel.offload", [])
        ledger.write(
            "parallel.offload", [*before, "activations"], given.origin(f"{TEXT}.activation_offload"), True
        )
    if launch.kind != "train-transformers":
        _compare(launch, given)


def _frozen(launch: Launch, given: Given) -> None:
    ledger, frozen = launch.ledger, list[str]()
    key = f"{VISION}.freeze"
    vision = given.take(key, launch.kind != "train-transformers")
    projector = given.take(f"{PROJECTOR}.freeze", False)
    audio = given.take(f"{AUDIO}.freeze", True) if given.has(AUDIO) else False
    language = given.take(f"{TEXT}.freeze", False)
    if vision:
        frozen.append("vision")
    if projector:
        frozen.append("projector")
    if audio:
        frozen.append("audio")
    if language and launch.kind == "train-transformers":
        frozen.append("language")
    elif language:
        ledger.note(
            "no effect",
            given.origin(f"{TEXT}.freeze"),
            True,
            "not read there either: the language model trains",
        )
    if frozen:
        origin = given.origin(key)
        if given.has(key):
            ledger.write("train.freeze", frozen, origin, bool(vision))
        else:
            ledger.default("train.freeze", frozen, origin, "the vision tower is frozen where nothing is said")


def _stages(launch: Launch, given: Given, sizes: Mapping[str, int]) -> None:
    layers = dict[str, Any]()
    for tower, path in TOWERS.items():
        counts = given.take(f"{path}.pipeline_num_layers")
        if isinstance(counts, list) and counts:
            nested = all(isinstance(each, list) for each in counts)
            width = len(counts[0]) if nested else len(counts)
            if width != sizes["pp"] or (len(counts) if nested else 1) != sizes["virtual"]:
                raise PolymodalError(
                    f"{given.file}: {path}.pipeline_num_layers {json.dumps(counts)} is not for pp "
                    f"{sizes['pp']} with {sizes['virtual']} stages a rank.",
                    "Correct the list or the sizes in the script.",
                )
            layers[tower] = counts
    if layers:
        origin = given.origin(f"{TEXT}.pipeline_num_layers")
        launch.ledger.write("parallel.pp_layers", layers, origin, list(layers))


def _recompute(launch: Launch, given: Given) -> None:
    """recompute_* of towers: whole towers, or the first blocks of each stage by name."""
    ledger, blocks = launch.ledger, list[str]()
    last: Origin | None = None
    for tower, path in TOWERS.items():
        how = given.take(f"{path}.recompute_granularity")
        method, count = given.take(f"{path}.recompute_method"), given.take(f"{path}.recompute_num_layers")
        if how is None:
            continue
        last = given.origin(f"{path}.recompute_granularity")
        if how != "full":
            ledger.note("unsupported", last, how, "full is known for a single tower")
            continue
        pattern = _blocks(launch, given, tower)
        whole = given.take(f"{path}.num_layers") or 0
        if method == "block" and count and pattern and int(count) < int(whole):
            stages = given.take(f"{path}.pipeline_num_layers") or [whole]
            flat = [n for each in stages for n in (each if isinstance(each, list) else [each])]
            numbers, begin = list[int](), 0
            for size in flat if ledger.get("parallel.pp", 1) > 1 else [int(whole)]:
                numbers += range(begin, begin + min(int(count), size))
                begin += size
            blocks += [pattern.replace("*", str(n)) for n in numbers]
        else:
            blocks.append(tower)
    if last is not None and blocks:
        ledger.write("parallel.recompute", "full", last)
        ledger.write("parallel.recompute_blocks", blocks, last, "recompute_* of towers")


def _blocks(launch: Launch, given: Given, tower: str) -> str | None:
    """Pattern of a tower's blocks, by the card of model_id."""
    card = catalog.cards().get(TABLES["cards"].get(str(given.peek("model_id")).lower(), ""))
    chain = card.pipeline.get(tower) if card is not None else None
    return chain.blocks if chain is not None and isinstance(chain.blocks, str) else None


def _compare(launch: Launch, given: Given) -> None:
    """Sizes of the file against config.json, where it is there; fewer layers become model.config."""
    directory = Path(str(launch.ledger.get("model.source", "")))
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else None
    if config is None:
        launch.notes.append(
            f"{directory} is not here: sizes in {given.file} were not compared with its config.json"
        )
        return
    for key, places in COMPARED.items():
        value = given.take(key)
        found = [(place, at) for place in places if (at := _config(config, place)) is not None]
        if value is None or not found:
            continue
        place, there = found[0]
        if value == there:
            launch.ledger.note("checked", given.origin(key), value, f"as in config.json ({place})")
        elif key.endswith("num_layers") and value < there:
            ours = place if "." in place or "text_config" not in config else f"text_config.{place}"
            launch.ledger.write(
                f"model.config.{ours}",
                value,
                given.origin(key),
                why=f"config.json has {there}: the first {value} are used",
            )
        else:
            launch.ledger.note(
                "checked", given.origin(key), value, f"DIFFERS: config.json has {place} {there}, which counts"
            )


def _config(config: Mapping[str, Any], name: str) -> Any:
    for root in (config, config.get("text_config") or {}, config.get("llm_config") or {}):
        at: Any = root
        for part in name.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        if at is not None:
            return at
    return None


# ---- models that generate --------------------------------------------------


def denoiser(launch: Launch, given: Given, data: Given, encoding: bool = False) -> None:
    """A model that generates: source, encoding, noise process, pipeline layers."""
    ledger = launch.ledger
    name = given.take("predictor.model_id")
    if str(name).lower() in TABLES["without_card"]:
        raise PolymodalError(
            f"{given.file}: predictor.model_id {name} has no card here.",
            "`polymodal models` lists what has one.",
        )
    _pipeline(launch, given, data)
    if encoding:
        return
    video, text = bool(given.take("load_video_features")), bool(given.take("load_text_features"))
    if video != text:
        ledger.note("unsupported", given.origin("load_video_features"), video, "features of one kind alone")
    elif "data.encode" not in ledger.values:
        ledger.write(
            "data.encode", "cached" if video else "online", given.origin("load_video_features"), video
        )
    if name is not None:
        ledger.note(
            "checked",
            given.origin("predictor.model_id"),
            name,
            f"the card {TABLES['cards'].get(str(name).lower(), '?')}",
        )
    _noise(launch, given, str(name).lower(), data.kind == "feature_data")
    layers = given.take("predictor.pipeline_num_layers")
    if layers is not None and ledger.get("parallel.pp", 1) > 1:
        ledger.write(
            "parallel.pp_layers", {"blocks": layers}, given.origin("predictor.pipeline_num_layers"), layers
        )
    elif layers is not None:
        ledger.note("no effect", given.origin("predictor.pipeline_num_layers"), layers, "pp is 1")
    for key in ("predictor.attention_async_offload", "predictor.vace_dit.attention_async_offload"):
        if given.take(key):
            before = ledger.get("parallel.offload", [])
            ledger.write("parallel.offload", [*before, "activations"], given.origin(key), True)
    _double(launch, given)
    if int(given.take("encoder_offload_interval", 1)) > 1:
        ledger.write(
            "data.encoders",
            "offload",
            given.origin("encoder_offload_interval"),
            given.take("encoder_offload_interval"),
        )
    if given.take("use_ema"):
        ledger.write("train.ema", 0.9999, given.origin("use_ema"), True)
    start = given.take("predictor.from_pretrained")
    if isinstance(start, str) and not launch.flags.values.get("load"):
        ledger.write("checkpoint.init_from", launch.path(start), given.origin("predictor.from_pretrained"))


def _pipeline(launch: Launch, given: Given, data: Given) -> None:
    """model.source: the pipeline's directory, by --load, the text encoder, the VAE or the tokenizer."""
    if launch.source is not None:
        launch.ledger.write("model.source", launch.source, Origin("--source", "the command line"))
        return
    load = launch.flags.values.get("load")
    if isinstance(load, str) and os.path.basename(load.rstrip("/")) in ("transformer", "transformer_2"):
        parent = os.path.dirname(load.rstrip("/"))
        launch.ledger.write(
            "model.source", launch.path(parent), launch.where("load"), load, "the pipeline's directory"
        )
        return
    witnesses = list[tuple[Origin, str]]()
    for file, key in (
        (given, "text_encoder"),
        (given, "ae"),
        (given, "tokenizer"),
        (data, "dataset_param.tokenizer_config"),
    ):
        value = file.peek(key)
        for each in value if isinstance(value, list) else [value]:
            path = each.get("from_pretrained") if isinstance(each, Mapping) else None
            if isinstance(path, str) and os.path.basename(path.rstrip("/")) in (
                "text_encoder",
                "text_encoder_2",
                "tokenizer",
                "tokenizer_2",
                "vae",
            ):
                witnesses.append((file.origin(f"{key}.from_pretrained"), os.path.dirname(path.rstrip("/"))))
    if not witnesses:
        raise PolymodalError(
            f"{launch.file}: no file of it names the pipeline's directory (model_index.json); the published "
            "files of the model's authors are not read.",
            "Name it: --source DIR or a hub id of the model's diffusers files.",
        )
    origin, path = witnesses[0]
    launch.ledger.write("model.source", launch.path(path), origin, path, "the directory above")


def _noise(launch: Launch, given: Given, name: str, features: bool) -> None:
    """train.diffusion by the family and the file."""
    ledger, process = launch.ledger, given.take("diffusion.model_id")
    origin = given.origin("diffusion.model_id")
    if name == "wandit":
        for key, value in (("density", "uniform"), ("weighting", "gaussian"), ("per_batch", True)):
            ledger.write(f"train.diffusion.{key}", value, origin, process, "as its scheduler trains")
    elif process is not None:
        ledger.note("checked", origin, process, "the card's noise process")
    for key in ("shift", "train_timestep_shift"):
        shift = given.take(f"diffusion.{key}")
        if shift is not None:
            ledger.write("train.diffusion.shift", float(shift), given.origin(f"diffusion.{key}"))
    if name == "wandit" and given.take("diffusion.shift") is None:
        ledger.default("train.diffusion.shift", 5.0, given.origin("diffusion.shift"))
    if given.take("diffusion.use_dynamic_shifting") or given.take("diffusion.use_timestep_transform"):
        ledger.write("train.diffusion.shift", "dynamic", given.origin("diffusion.use_dynamic_shifting"), True)
    for key in ("weighting_scheme", "t_sample_method", "sample_method", "snr"):
        density = given.take(f"diffusion.{key}")
        if density is not None and density in DENSITIES:
            ledger.write(
                "train.diffusion.density", DENSITIES[density], given.origin(f"diffusion.{key}"), density
            )
        elif density is not None:
            ledger.note(
                "unsupported", given.origin(f"diffusion.{key}"), density, f"known are {', '.join(DENSITIES)}"
            )
    prediction, zero = given.take("diffusion.prediction_type"), given.take("diffusion.rescale_betas_zero_snr")
    if prediction in ("epsilon", "v_prediction"):
        ledger.write("train.diffusion.prediction", prediction, given.origin("diffusion.prediction_type"))
    if zero is not None:
        ledger.write("train.diffusion.zero_snr", bool(zero), given.origin("diffusion.rescale_betas_zero_snr"))
    gamma = given.take("diffusion.snr_gamma")
    if gamma is not None:
        ledger.write("train.diffusion.weighting", "min_snr", given.origin("diffusion.snr_gamma"), gamma)
        ledger.write("train.diffusion.snr_gamma", float(gamma), given.origin("diffusion.snr_gamma"))
    guidance = given.take("predictor.embeded_guidance_scale")
    if guidance is not None:
        ledger.write(
            "train.diffusion.guidance", float(guidance), given.origin("predictor.embeded_guidance_scale")
        )
    if features:
        ledger.default(
            "train.diffusion.drop",
            0.0,
            given.origin("load_text_features"),
            "captions were dropped at extraction",
        )
    highest, lowest = (
        given.take("diffusion.max_timestep_boundary"),
        given.take("diffusion.min_timestep_boundary"),
    )
    if highest is not None or lowest is not None:
        span = (float(lowest or 0), float(highest if highest is not None else 1))
        part = None if span == (0.0, 1.0) else "transformer" if span[0] == 0 else "transformer_2"
        if part is not None:
            origin = given.origin("diffusion.max_timestep_boundary")
            ledger.write("model.part", part, origin, list(span), "the boundary is the pipeline's own")
    if given.take("predictor.seperated_timestep") and str(given.peek("task")) in ("i2v", "ti2v"):
        ledger.write("train.diffusion.first_frame", 1.0, given.origin("predictor.seperated_timestep"), True)


def _double(launch: Launch, given: Given) -> None:
    """HunyuanVideo's two kinds of blocks: how many of each are recomputed."""
    counts, whole = list[int](), list[int]()
    for kind in ("double", "single"):
        count = given.take(f"predictor.{kind}_stream_full_recompute_layers")
        depth = given.take(f"predictor.mm_{kind}_blocks_depth")
        if count is None or depth is None:
            return
        counts.append(int(count))
        whole.append(int(depth))
    origin = given.origin("predictor.double_stream_full_recompute_layers")
    blocks = list[str]()
    for pattern, count, depth in zip(
        ("transformer_blocks", "single_transformer_blocks"), counts, whole, strict=True
    ):
        blocks += [f"{pattern}.*"] if count >= depth else [f"{pattern}.{n}" for n in range(count)]
    launch.ledger.values.pop("parallel.recompute_first", None)
    if blocks:
        launch.ledger.write("parallel.recompute", "full", origin, counts)
        if counts != whole:
            launch.ledger.write("parallel.recompute_blocks", blocks, origin, counts)
    else:
        launch.ledger.write("parallel.recompute", "none", origin, counts)
