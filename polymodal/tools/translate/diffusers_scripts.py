"""Command lines of diffusers' example trainers under `accelerate launch` as a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch, scalar, typed, write_environment
from polymodal.tools.translate.ledger import TABLES, Given, Origin, read_config

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
SHARDING = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2, "HYBRID_SHARD": 3, "NO_SHARD": 1}


def translate(launch: Launch) -> None:
    """Fill the ledger of a training launch."""
    flags, ledger = launch.flags, launch.ledger
    config = _accelerate(launch)
    _data(launch)
    micro = launch.number("train_batch_size", 4)
    accumulation = launch.number("gradient_accumulation_steps", 1)
    theirs = config.take("deepspeed_config.gradient_accumulation_steps", "auto")
    if theirs != "auto" and int(theirs) != accumulation:
        raise PolymodalError(
            f"{config.file}: deepspeed_config.gradient_accumulation_steps is {theirs}, the command line says "
            f"{accumulation}.",
            "Make them equal.",
        )
    whole = micro * accumulation * launch.world
    ledger.write("train.micro_batch_size", micro, launch.where("train_batch_size"))
    why = f"{micro} x {accumulation} accumulated x {launch.world} processes"
    ledger.write(
        "train.global_batch_size", whole, launch.where("gradient_accumulation_steps"), accumulation, why
    )
    precision = flags.take("mixed_precision") or config.take("mixed_precision", "no")
    known = {"bf16": "bf16", "fp16": "fp16", "no": "fp32"}
    ledger.write("train.precision", known.get(precision, "fp32"), launch.where("mixed_precision"), precision)
    config.take("mixed_precision")
    if launch.entry.startswith(("train_dreambooth_lora", "train_text_to_image_lora")):
        rank = launch.number("rank", 4)
        ledger.write("model.lora.rank", rank, launch.where("rank"))
        if flags.has("lora_alpha"):
            ledger.write("model.lora.alpha", launch.number("lora_alpha"), launch.where("lora_alpha"))
        else:
            ledger.default("model.lora.alpha", rank, launch.where("lora_alpha"), "the rank there")
        ledger.default("model.lora.init", "gaussian", launch.where("rank"))
        names = flags.take("lora_layers") or flags.take("lora_target_modules")
        if isinstance(names, str):
            ledger.write("model.lora.targets", names.split(","), launch.where("lora_layers"), names)
    _optimizer(launch, config)
    if flags.take("gradient_checkpointing") or flags.take("use_gradient_checkpointing"):
        ledger.write("parallel.recompute", "full", launch.where("gradient_checkpointing"), True)
    _noise(launch)
    _samples(launch)
    for name, key in TABLES["diffusers"]["mapped"].items():
        if name in flags.values and name not in flags.asked:
            value = typed(flags.take(name))
            if key in ("checkpoint.dir",):
                value = launch.path(str(value))
            ledger.write(key, value, launch.where(name))
    if ledger.get("train.steps") is not None:
        ledger.values.pop("train.epochs", None)
    for key, value in (("optim.weight_decay", 1e-4), ("checkpoint.every", 500), ("optim.lr", 1e-4)):
        if key not in ledger.values:
            ledger.default(key, value, Origin(key.rpartition(".")[2], launch.file))
    write_environment(launch)
    flags.report_rest(ledger)
    launch.options.report_rest(ledger)
    config.report_rest(ledger)
    ledger.values.setdefault(
        "name", (Path(launch.file).parent.resolve().name or "run", "the script's directory")
    )


def _accelerate(launch: Launch) -> Given:
    """accelerate's own file: processes, sharding, offload."""
    name, ledger = launch.options.take("config_file"), launch.ledger
    values = read_config(launch.open(str(name))) if name else launch.accelerate
    given = Given("accelerate", str(name or launch.file), values)
    count = given.take("num_processes")
    if count is not None and not launch.options.has("num_processes"):
        machines = int(given.take("num_machines", 1))
        launch.nodes = launch.nodes if launch.nodes > 1 else machines
        launch.nproc = max(1, int(count) // machines)
    deep = given.take("deepspeed_config.deepspeed_config_file")
    deepspeed: Mapping[str, Any] = read_config(launch.open(str(deep))) if deep else {}
    stage = (deepspeed.get("zero_optimization") or {}).get("stage", given.take("deepspeed_config.zero_stage"))
    kind = given.take("distributed_type", "MULTI_GPU")
    origin = given.origin("distributed_type")
    if kind == "DEEPSPEED" and stage in (1, 2, 3):
        ledger.write("parallel.zero", stage, given.origin("deepspeed_config.zero_stage"))
        ledger.write("parallel.dp_shard", -1, origin, kind)
    elif kind == "FSDP":
        way = str(given.take("fsdp_config.fsdp_sharding_strategy", "FULL_SHARD"))
        ledger.write(
            "parallel.zero", SHARDING.get(way, 3), given.origin("fsdp_config.fsdp_sharding_strategy"), way
        )
        if way == "HYBRID_SHARD":
            ledger.write("parallel.dp_shard", launch.nproc, origin, way)
            ledger.write("parallel.dp_replicate", launch.nodes, origin, way)
    elif launch.world > 1:
        ledger.default("parallel.dp_replicate", launch.world, origin, "every process holds the model")
        ledger.default("parallel.dp_shard", 1, origin)
    offload = list[str]()
    for key, what in (
        ("deepspeed_config.offload_optimizer_device", "optimizer"),
        ("deepspeed_config.offload_param_device", "parameters"),
    ):
        where = given.take(key, "none")
        if where == "cpu":
            offload.append(what)
        elif where != "none":
            ledger.note("unsupported", given.origin(key), where, "only the host's memory is known")
    if given.take("fsdp_config.fsdp_offload_params"):
        offload.append("parameters")
    if offload:
        ledger.write("parallel.offload", offload, given.origin("deepspeed_config"), "cpu")
    if given.take("fsdp_config.fsdp_activation_checkpointing"):
        ledger.write(
            "parallel.recompute", "full", given.origin("fsdp_config.fsdp_activation_checkpointing"), True
        )
    if given.take("use_cpu") is True:
        ledger.write("device.kind", "cpu", given.origin("use_cpu"), True)
    for key in ("fsdp_config.fsdp_forward_prefetch", "fsdp_config.fsdp_reshard_after_forward"):
        value = given.take(key)
        if key.endswith("after_forward") and isinstance(value, bool):
            ledger.write("parallel.reshard_after_forward", value, given.origin(key))
    return given


def _data(launch: Launch) -> None:
    flags, ledger = launch.flags, launch.ledger
    prompt, folder = flags.take("instance_prompt"), flags.take("instance_data_dir")
    name = flags.take("dataset_name")
    column = flags.take("caption_column")
    sets = list[dict[str, Any]]()
    if folder is not None:
        sets.append({"path": launch.path(str(folder))})
        origin = launch.where("instance_data_dir")
    elif name is not None:
        path = launch.path(str(name))
        if not os.path.exists(path):
            raise PolymodalError(
                f"{launch.where('dataset_name').place}: the data set {name} is no path on this machine.",
                "Fetch it first with `hf download` and name its directory or files.",
            )
        sets.append({"path": path})
        origin = launch.where("dataset_name")
    else:
        raise PolymodalError(
            f"{launch.file}: it names no data.", "Add instance_data_dir or dataset_name to it."
        )
    if prompt is not None:
        sets[0]["caption"] = prompt
        ledger.note(
            "mapped",
            launch.where("instance_prompt"),
            prompt,
            "data.datasets.0.caption, of pictures without one of their own",
        )
    if flags.take("with_prior_preservation"):
        ledger.note("mapped", launch.where("with_prior_preservation"), True, "data.datasets.1: the class")
        prior = {
            "path": launch.path(str(flags.take("class_data_dir", "data/class"))),
            "caption": flags.take("class_prompt", ""),
            "generate": launch.number("num_class_images", 100),
            "loss_weight": float(flags.take("prior_loss_weight", 1.0)),
        }
        sets[0]["weight"] = prior["weight"] = 1
        sets.append(prior)
    for key in ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"):
        flags.take(key)
    if flags.has("repeats"):
        sets[0]["repeat"] = float(flags.take("repeats"))
    ledger.write("data.datasets", sets, origin, folder if folder is not None else name)
    for flag, key in ((column, "prompt"), (flags.take("image_column"), "images")):
        if flag is not None:
            origin = launch.where("caption_column" if key == "prompt" else "image_column")
            ledger.write(f"data.attr.{key}", flag, origin)
    side = launch.number("resolution", 512)
    if flags.take("enable_bucket"):
        ledger.write(
            "data.clip.pixels",
            side * side,
            launch.where("resolution"),
            side,
            "sizes of this area for every shape",
        )
    else:
        ledger.write("data.clip.sizes", [[side, side]], launch.where("resolution"), side)
    cached = flags.take("cache_latents")
    ledger.write("data.encode", "cached" if cached else "online", launch.where("cache_latents"), bool(cached))
    if flags.take("offload"):
        ledger.write("data.encoders", "offload", launch.where("offload"), True)
    if flags.take("fsdp_text_encoder"):
        ledger.write("data.encoders", "shard", launch.where("fsdp_text_encoder"), True)
    ledger.default("train.diffusion.drop", 0.0, Origin("caption dropping", launch.file), "none there")


def _optimizer(launch: Launch, config: Given) -> None:
    flags, ledger = launch.flags, launch.ledger
    name = flags.take("lr_scheduler", "constant")
    if name in SCHEDULES:
        ledger.write("optim.schedule.name", SCHEDULES[name], launch.where("lr_scheduler"), name)
    else:
        ledger.note("unsupported", launch.where("lr_scheduler"), name, f"known are {', '.join(SCHEDULES)}")
    warmup = launch.number("lr_warmup_steps", 500)
    if name == "constant" or not flags.has("lr_warmup_steps"):
        warmup = 0 if name == "constant" else warmup
    ledger.write(
        "optim.schedule.warmup",
        warmup,
        launch.where("lr_warmup_steps"),
        flags.values.get("lr_warmup_steps", "absent"),
    )
    betas = [
        scalar(flags.take(f"adam_beta{i}", d), launch.where(f"adam_beta{i}"))
        for i, d in ((1, 0.9), (2, 0.999))
    ]
    if flags.has("adam_beta1") or flags.has("adam_beta2"):
        ledger.write("optim.betas", betas, launch.where("adam_beta1"))
    else:
        ledger.default("optim.betas", betas, launch.where("adam_beta1"))
    clip = config.take("deepspeed_config.gradient_clipping")
    if clip not in (None, "auto") and not flags.has("max_grad_norm"):
        ledger.write("optim.clip_norm", float(clip), config.origin("deepspeed_config.gradient_clipping"))
    elif clip not in (None, "auto") and float(clip) != float(flags.values["max_grad_norm"]):
        origin = config.origin("deepspeed_config.gradient_clipping")
        ledger.note("changed", origin, clip, "DeepSpeed's file and --max_grad_norm differ: the flag is taken")
    if str(flags.take("optimizer", "adamw")).lower() != "adamw":
        ledger.note(
            "unsupported", launch.where("optimizer"), flags.values["optimizer"], "AdamW and Muon are known"
        )


def _noise(launch: Launch) -> None:
    flags, ledger = launch.flags, launch.ledger
    scheme = flags.take("weighting_scheme")
    origin = launch.where("weighting_scheme")
    if scheme in ("logit_normal", "mode", "cosmap"):
        ledger.write("train.diffusion.density", scheme, origin)
    elif scheme == "sigma_sqrt":
        ledger.write("train.diffusion.weighting", "sigma_sqrt", origin)
        ledger.write("train.diffusion.density", "uniform", origin, scheme)
    elif scheme == "none":
        ledger.write("train.diffusion.density", "uniform", origin, scheme)
    elif scheme is not None:
        ledger.note(
            "unsupported", origin, scheme, "known are logit_normal, mode, cosmap, sigma_sqrt and none"
        )
    gamma = flags.take("snr_gamma")
    if gamma is not None:
        ledger.write("train.diffusion.weighting", "min_snr", launch.where("snr_gamma"), gamma)
        ledger.write("train.diffusion.snr_gamma", float(gamma), launch.where("snr_gamma"))
    if flags.take("use_ema"):
        ledger.write("train.ema", 0.9999, launch.where("use_ema"), True)


def _samples(launch: Launch) -> None:
    flags, ledger = launch.flags, launch.ledger
    prompts = flags.take("validation_prompt")
    steps, epochs = flags.take("validation_steps"), flags.take("validation_epochs")
    if prompts is not None:
        ledger.write(
            "evaluate.samples.prompts",
            [prompts] if isinstance(prompts, str) else prompts,
            launch.where("validation_prompt"),
        )
        if steps is not None:
            ledger.write("evaluate.samples.every", int(steps), launch.where("validation_steps"))
        elif epochs is not None:
            why = "epochs there, steps here: set evaluate.samples.every"
            ledger.note("changed", launch.where("validation_epochs"), epochs, why)
    else:
        for name, value in (("validation_steps", steps), ("validation_epochs", epochs)):
            if value is not None:
                ledger.note("no effect", launch.where(name), value, "there is no validation_prompt")
