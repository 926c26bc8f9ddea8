"""kohya-ss: command lines of sd-scripts and musubi-tuner (`flux_train_network.py`), and their TOML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import TABLES, Given, Origin
from polymodal.tools.translate.peers import denoisers, trainer
from polymodal.tools.translate.peers.files import finish, read, settings
from polymodal.tools.translate.peers.trainer import number, truth

_REPEATS = re.compile(r"(\d+)_(.*)")  # a folder of the DreamBooth layout: 10_a photo of sks


def translate(launch: Launch) -> None:
    if launch.flags.has("config_file"):
        launch.flags.values["config"] = launch.flags.take("config_file")
    given, ledger = settings(launch), launch.ledger
    musubi = launch.kind == "musubi"
    model = launch.entry.split("_train")[0]
    if musubi and given.has("task"):
        model = f"{model} {given.take('task')}"
        ledger.note(
            "checked", given.origin("task"), given.peek("task"), "the pipeline in model.source decides"
        )
    key = "dit" if musubi else "pretrained_model_name_or_path"
    denoisers.source(launch, given.take(key), given.origin(key), model)
    adapter = "network" in launch.entry or given.has("network_module")
    if adapter:
        _adapter(launch, given)
    config, micro = _data(launch, given)
    accumulation = number(given, "gradient_accumulation_steps", 1, int)
    where = {
        "micro": config.origin("batch_size") if config else given.origin("train_batch_size"),
        "accumulation": given.origin("gradient_accumulation_steps"),
    }
    denoisers.length(launch, micro, accumulation, where)
    _precision(launch, given)
    _optimizer(launch, given)
    _noise(launch, given, musubi)
    _memory(launch, given)
    _length(launch, given)
    cached = musubi or truth(given.take("cache_latents")) or truth(given.take("cache_latents_to_disk"))
    origin = given.origin("cache_latents_to_disk" if given.has("cache_latents_to_disk") else "cache_latents")
    ledger.write("data.encode", "cached" if cached else "online", origin, cached)
    denoisers.read_prompts(launch, given, "sample_prompts")
    finish(launch, *([given, config] if config else [given]))


def _adapter(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    module = str(given.take("network_module", "networks.lora"))
    origin = given.origin("network_module")
    if "lora" not in module.rpartition(".")[2] or "lycoris" in module:
        ledger.note("unsupported", origin, module, "LoRA is known")
    else:
        ledger.note("mapped", origin, module, "model.lora")
    denoisers.adapters(launch, given, "network_dim", "network_alpha", 1, "network_dropout")
    start = given.take("network_weights")
    if start is not None:
        ledger.write("checkpoint.init_from", launch.path(str(start)), given.origin("network_weights"), start)
    text = [number(given, "text_encoder_lr", 0.0)] if given.has("text_encoder_lr") else []
    if any(text):
        why = "text encoders are frozen here"
        ledger.note("unsupported", given.origin("text_encoder_lr"), given.peek("text_encoder_lr"), why)
    if truth(given.take("network_train_unet_only")):
        ledger.note("mapped", given.origin("network_train_unet_only"), True, "text encoders are frozen here")


def _data(launch: Launch, given: Given) -> tuple[Given | None, int]:
    """Writes data.datasets and sizes; the data set's file, and the batch of a process."""
    name = given.take("dataset_config")
    if name is None:
        return None, _folders(launch, given)
    values, lines = read(launch.open(str(name)))
    config = Given("kohya-data", str(name), values, lines)
    general = config.take("general", {})
    sets, areas, lengths, batches = list[dict[str, Any]](), list[Any](), list[Any](), set[int]()
    rates, buckets, first = set[Any](), False, True
    for fallback, entry in _entries(config.take("datasets", []), general):
        part = Given("kohya-data", str(name), {**fallback, **entry})
        key = next((key for key in TABLES["kohya-data"]["folders"] if key in part.values), "image_dir")
        captions = part.take("class_tokens")
        origin = config.origin(f"datasets.{key}")
        around = [part.take("caption_prefix"), part.take("caption_suffix")]
        repeats = part.take("num_repeats", 1)
        found = denoisers.folder(launch, part.take(key), origin, repeats, captions, *around)
        if part.take("is_reg"):
            found["loss_weight"] = number(given, "prior_loss_weight", 1.0)
        if "jsonl" in key:
            found["format"] = "caption"
            found["attr"] = {"images" if "image" in key else "videos": key.split("_")[0] + "_path"}
            found["attr"]["prompt"] = "caption"
        sets.append(found)
        area = part.take("resolution", [960, 544] if launch.kind == "musubi" else None)
        areas += [area] if area is not None else []
        buckets = truth(part.take("enable_bucket")) or buckets
        lengths += part.take("target_frames", [] if "video" not in key else [1])
        rate = part.take("source_fps")
        rates |= {rate} if "video" in key else set()
        batches.add(int(part.take("batch_size", 1)))
        if first and "image_jsonl" not in key and "video_jsonl" not in key:
            denoisers.captions(launch, part.take("caption_extension"), config.origin("caption_extension"))
            first = False
        part.take("caption_extension")
        part.report_rest(launch.ledger)
        drop = number(part, "caption_dropout_rate", None)
        if drop is not None:
            launch.ledger.write("train.diffusion.drop", drop, config.origin("caption_dropout_rate"))
    denoisers.datasets(launch, sets, given.origin("dataset_config"), name)
    denoisers.sizes(launch, areas, config.origin("resolution"), buckets, areas)
    origin = config.origin("datasets.target_frames")
    if lengths:
        pictures = any(
            "video" not in key for entry in values.get("datasets", []) for key in entry if "dir" in key
        )
        denoisers.frames(launch, [*lengths, *([1] if pictures else [])], origin, lengths)
        model = TABLES["musubi"]["rates"].get(launch.entry, 16.0)
        rate = None if rates == {None} else model
        why = "every frame" if rate is None else "the model's rate there; see the clips' own in their files"
        launch.ledger.write(
            "data.clip.fps", rate, config.origin("datasets.source_fps"), sorted(map(str, rates)), why
        )
    elif launch.kind == "musubi":
        launch.ledger.default("data.clip.frames", [1], origin, "pictures")
    if len(batches) > 1:
        why = "one batch for all data sets here, the smallest"
        launch.ledger.note("changed", config.origin("batch_size"), sorted(batches), why)
    return config, min(batches, default=1)


def _entries(sets: Any, general: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(values that hold where an entry has none, entry): data sets, or their subsets where they have some."""
    for entry in sets:
        subsets = entry.get("subsets")
        if subsets is None:
            yield general, entry
        else:
            own = {key: value for key, value in entry.items() if key != "subsets"}
            yield from (({**general, **own}, subset) for subset in subsets)


def _folders(launch: Launch, given: Given) -> int:
    """The DreamBooth layout: folders named REPEATS_CAPTION below train_data_dir."""
    root, origin = given.take("train_data_dir"), given.origin("train_data_dir")
    if root is None:
        raise PolymodalError(
            f"{launch.file}: it names no data.", "Give it dataset_config (a TOML file) or train_data_dir."
        )
    sets = list[dict[str, Any]]()
    for key, weight in (("train_data_dir", None), ("reg_data_dir", number(given, "prior_loss_weight", 1.0))):
        place = given.take(key)
        if place is None:
            continue
        base = Path(trainer.dataset(launch, str(place), str(place), given.origin(key)))
        found = [(p, _REPEATS.fullmatch(p.name)) for p in sorted(base.iterdir()) if p.is_dir()]
        named = [(p, match) for p, match in found if match]
        for path, match in named or [(base, None)]:
            entry: dict[str, Any] = {"path": str(path)}
            if match and int(match[1]) != 1:
                entry["repeat"] = float(match[1])
            if match:
                entry["caption"] = match[2]
            if weight is not None:
                entry["loss_weight"] = weight
            sets.append(entry)
        if key == "reg_data_dir":
            launch.ledger.note("mapped", given.origin(key), place, "data.datasets with loss_weight")
    denoisers.datasets(launch, sets, origin, root)
    denoisers.captions(launch, given.take("caption_extension"), given.origin("caption_extension"))
    size = given.take("resolution", "512")
    sides = [int(side) for side in str(size).split(",")]
    area = sides * 2 if len(sides) == 1 else sides
    buckets = truth(given.take("enable_bucket"))
    denoisers.sizes(launch, [area], given.origin("resolution"), buckets, size)
    return number(given, "train_batch_size", 1, int)


def _precision(launch: Launch, given: Given) -> None:
    mixed = str(given.take("mixed_precision") or launch.options.take("mixed_precision") or "no")
    known = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    launch.options.take("mixed_precision")
    value = "pure_bf16" if truth(given.take("full_bf16")) else known.get(mixed, "fp32")
    launch.ledger.write("train.precision", value, given.origin("mixed_precision"), mixed)


def _optimizer(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    trainer.optimizer(launch, given, "optimizer_type", "adamw")
    rate = number(given, "unet_lr") or number(given, "learning_rate", 2e-6)
    given.take("learning_rate")
    ledger.write("optim.lr", rate, given.origin("unet_lr" if given.peek("unet_lr") else "learning_rate"))
    denoisers.schedule(launch, given, "lr_scheduler", "lr_warmup_steps")
    least = number(given, "lr_scheduler_min_lr_ratio")
    if least is not None:
        ledger.write("optim.schedule.min_ratio", least, given.origin("lr_scheduler_min_lr_ratio"))
    clip = number(given, "max_grad_norm", 1.0)
    ledger.write("optim.clip_norm", clip or None, given.origin("max_grad_norm"))
    values = {"weight_decay": 0.01, "betas": (0.9, 0.999)}
    for text in trainer.listed(given.take("optimizer_args")):
        name, _, value = text.partition("=")
        if name not in ("weight_decay", "betas", "eps"):
            ledger.note(
                "unsupported", given.origin("optimizer_args"), text, "weight_decay, betas, eps are known"
            )
        elif name != "betas":
            values[name] = float(value)
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        ledger.default(f"optim.{name}", value, given.origin("optimizer_args"), "AdamW's own there")


def _noise(launch: Launch, given: Given, musubi: bool) -> None:
    ledger = launch.ledger
    kind, origin = str(given.take("timestep_sampling", "sigma")), given.origin("timestep_sampling")
    scheme = str(given.take("weighting_scheme", "none" if musubi else "uniform"))
    moved = number(given, "discrete_flow_shift", 1.0 if musubi else 3.0)
    std = number(given, "sigmoid_scale", 1.0)
    if kind in ("uniform", "sigmoid", "shift", "flux_shift"):
        density = "uniform" if kind == "uniform" else "logit_normal"
        if density == "logit_normal" and std != 1.0:
            ledger.write("train.diffusion.logit_std", std, given.origin("sigmoid_scale"))
    elif kind == "sigma":
        density = {"none": "uniform", "uniform": "uniform", "sigma_sqrt": "uniform"}.get(scheme, scheme)
        if density == "logit_normal":
            for name in ("logit_mean", "logit_std"):
                value = number(given, name, float(name == "logit_std"))
                ledger.write(f"train.diffusion.{name}", value, given.origin(name))
    else:
        ledger.note("unsupported", origin, kind, "known are sigma, uniform, sigmoid, shift and flux_shift")
        return
    denoisers.noise(launch, density, origin, kind)
    if kind in ("sigma", "shift"):
        given_shift = moved if given.has("discrete_flow_shift") else None
        denoisers.shift(launch, moved, given.origin("discrete_flow_shift"), given_shift)
    else:
        denoisers.shift(launch, "dynamic" if kind == "flux_shift" else 1.0, origin, kind)
        if given.has("discrete_flow_shift"):
            why = f"timestep_sampling {kind} has none"
            ledger.note("no effect", given.origin("discrete_flow_shift"), moved, why)
    if scheme == "sigma_sqrt":
        ledger.write("train.diffusion.weighting", "sigma_sqrt", given.origin("weighting_scheme"))
    predicted = str(given.take("model_prediction_type", "raw" if musubi else "sigma_scaled"))
    if not musubi and predicted != "raw" and launch.entry in TABLES["kohya"]["guided"]:
        why = "the loss is of the velocity here, as with raw"
        ledger.note("changed", given.origin("model_prediction_type"), predicted, why)
    guidance = number(given, "guidance_scale")
    guided = launch.entry in TABLES[launch.kind]["guided"]
    if guidance is not None or guided:
        stated = guidance is not None
        denoisers.guidance(launch, guidance if stated else 3.5, given.origin("guidance_scale"), stated)
    drop = number(given, "caption_dropout_rate")
    if drop is not None:
        ledger.write("train.diffusion.drop", drop, given.origin("caption_dropout_rate"))
    elif "train.diffusion.drop" not in ledger.values:
        ledger.default("train.diffusion.drop", 0.0, given.origin("caption_dropout_rate"))
    gamma = number(given, "min_snr_gamma")
    if gamma:
        ledger.write("train.diffusion.weighting", "min_snr", given.origin("min_snr_gamma"), gamma)
        ledger.write("train.diffusion.snr_gamma", gamma, given.origin("min_snr_gamma"))


def _memory(launch: Launch, given: Given) -> None:
    ledger, offload = launch.ledger, list[str]()
    for key in ("fp8_base", "fp8_base_unet", "fp8_scaled"):
        if truth(given.take(key)):
            trainer.base(launch, "fp8", given.origin(key), True)
    if truth(given.take("gradient_checkpointing")):
        ledger.write("parallel.recompute", "full", given.origin("gradient_checkpointing"), True)
    if number(given, "blocks_to_swap", 0, int):
        offload.append("parameters")
    for key in ("gradient_checkpointing_cpu_offload", "cpu_offload_checkpointing"):
        if truth(given.take(key)):
            offload.append("activations")
    if offload:
        names = ("blocks_to_swap", "gradient_checkpointing_cpu_offload", "cpu_offload_checkpointing")
        key = next(name for name in names if given.has(name))
        why = "all parameters wait on the host" if "parameters" in offload else ""
        ledger.write("parallel.offload", offload, given.origin(key), given.peek(key), why)
    for key in ("compile", "torch_compile"):
        if truth(given.take(key)):
            ledger.write("parallel.compile", True, given.origin(key))


def _length(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    epochs, steps = number(given, "max_train_epochs"), number(given, "max_train_steps", None, int)
    if epochs:
        ledger.write("train.epochs", epochs, given.origin("max_train_epochs"))
    elif steps:
        ledger.write("train.steps", steps, given.origin("max_train_steps"))
    else:
        ledger.default("train.steps", 1600, given.origin("max_train_steps"))
    out, name = given.take("output_dir"), given.take("output_name")
    if out is not None:
        ledger.write("checkpoint.dir", launch.path(str(out)), given.origin("output_dir"))
    if name is not None:
        ledger.write("name", str(name), given.origin("output_name"))
    every = number(given, "save_every_n_steps", None, int)
    if every:
        ledger.write("checkpoint.every", every, given.origin("save_every_n_steps"))
    for key in ("save_every_n_epochs", "sample_every_n_epochs"):
        value = given.take(key)
        if value is not None:
            ours = "checkpoint.every" if key.startswith("save") else "evaluate.samples.every"
            ledger.note("changed", given.origin(key), value, f"counted in steps here: set {ours}")
    keep = number(given, "save_last_n_steps_state", None, int) or number(
        given, "save_last_n_epochs_state", None, int
    )
    if keep:
        ledger.write("checkpoint.keep", keep, Origin("--save_last_n_*_state", launch.file))
    seed = number(given, "seed", None, int)
    if seed is not None:
        ledger.write("train.seed", seed, given.origin("seed"))
    every = number(given, "sample_every_n_steps", None, int)
    if every:
        ledger.write("evaluate.samples.every", every, given.origin("sample_every_n_steps"))
    trackers = {"tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]}
    kind = given.take("log_with")
    if kind is not None:
        ledger.write("monitor.trackers", trackers.get(str(kind), []), given.origin("log_with"), kind)
