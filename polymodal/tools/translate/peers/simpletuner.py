"""SimpleTuner: config.json and the list of data backends that it names."""

from __future__ import annotations

import re
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import Given, Origin
from polymodal.tools.translate.peers import denoisers, trainer
from polymodal.tools.translate.peers.files import finish, read_list, settings
from polymodal.tools.translate.peers.trainer import listed, number, truth

CAPTIONS = ("textfile", "instanceprompt", "filename", "instance_prompt")
_SIZE = re.compile(r"(\d+)x(\d+)")


def translate(launch: Launch) -> None:
    whole = settings(launch)
    values = {str(key).lstrip("-"): value for key, value in whole.values.items()}
    given, ledger = Given("simpletuner", whole.file, values), launch.ledger
    given.lines = {key.lstrip("-"): line for key, line in whole.lines.items()}
    family = str(given.take("model_family", ""))
    path = given.take("pretrained_model_name_or_path")
    denoisers.source(launch, path, given.origin("pretrained_model_name_or_path"), family)
    kind = str(given.take("model_type", "full"))
    if kind == "lora":
        _adapter(launch, given)
    elif kind != "full":
        ledger.note("unsupported", given.origin("model_type"), kind, "lora and full are known")
    precision = str(given.take("base_model_precision", "no_change"))
    if precision != "no_change":
        kind = next((k for k in ("nf4", "int8", "fp8") if precision.startswith(k)), None)
        trainer.base(launch, kind, given.origin("base_model_precision"), precision)
    _datasets(launch, given)
    micro = number(given, "train_batch_size", 4, int)
    accumulation = number(given, "gradient_accumulation_steps", 1, int)
    where = {name: given.origin(key) for name, key in (("micro", "train_batch_size"),)}
    where["accumulation"] = given.origin("gradient_accumulation_steps")
    processes = number(given, "num_processes", None, int)
    if processes and launch.nproc == 1:
        launch.nproc = processes
    denoisers.length(launch, micro, accumulation, where)
    _length(launch, given)
    _optimizer(launch, given)
    _noise(launch, given)
    _samples(launch, given)
    mixed = str(given.take("mixed_precision", "bf16"))
    known = {"bf16": "pure_bf16", "fp16": "fp16", "no": "fp32"}
    why = "no float32 weights there" if mixed == "bf16" else ""
    ledger.write("train.precision", known.get(mixed, "bf16"), given.origin("mixed_precision"), mixed, why)
    if truth(given.take("gradient_checkpointing")):
        ledger.write("parallel.recompute", "full", given.origin("gradient_checkpointing"), True)
    if truth(given.take("use_ema")):
        decay = number(given, "ema_decay", 0.995)
        ledger.write("train.ema", decay, given.origin("ema_decay"), decay)
    finish(launch, given)


def _adapter(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    kind = str(given.take("lora_type", "standard"))
    if kind != "standard":
        why = "LyCORIS adapters are not trained: lora_type standard"
        ledger.note("unsupported", given.origin("lora_type"), kind, why)
    given.values.setdefault("lora_rank", 16)
    denoisers.adapters(launch, given, "lora_rank", "lora_alpha", None, "lora_dropout")
    start = given.take("init_lora")
    if start is not None:
        ledger.write("checkpoint.init_from", launch.path(str(start)), given.origin("init_lora"), start)


def _datasets(launch: Launch, given: Given) -> None:
    ledger, sets, areas, lengths = launch.ledger, list[dict[str, Any]](), list[Any](), set[int]()
    name = given.take("data_backend_config")
    if name is None:
        raise PolymodalError(
            f"{given.file}: it names no data.", "Name the list of backends: data_backend_config."
        )
    whole_side = given.take("resolution", 1024)
    shape = str(given.take("resolution_type", "pixel_area"))
    for i, entry in enumerate(read_list(launch.open(str(name)))):
        part = Given("simpletuner-data", str(name), entry)
        title = str(part.take("id", i))
        if part.take("dataset_type", "image") not in ("image", "video"):
            part.asked |= set(entry)
            ledger.note(
                "no effect", Origin(title, str(name)), entry["dataset_type"], "features have a directory"
            )
            continue
        if truth(part.take("disabled")):
            part.asked |= set(entry)
            continue
        kind = part.take("type", "local")
        if kind != "local":
            part.asked |= set(entry)
            why = "fetch it to this machine, and name its directory"
            ledger.note("unsupported", Origin(title, str(name)), kind, why)
            continue
        strategy = str(part.take("caption_strategy", given.peek("caption_strategy") or "filename"))
        origin = Origin(f"{title}.instance_data_dir", str(name))
        caption = part.take("instance_prompt")
        if strategy not in CAPTIONS:
            ledger.note(
                "unsupported", Origin(f"{title}.caption_strategy", str(name)), strategy, "textfile is known"
            )
        elif strategy == "filename":
            why = "captions are read from files beside the media: write each file's name there"
            ledger.note("unsupported", Origin(f"{title}.caption_strategy", str(name)), strategy, why)
        before = truth(part.take("prepend_instance_prompt", given.take("prepend_instance_prompt", False)))
        prefix = f"{caption} " if before and caption else None
        found = denoisers.folder(launch, part.take("instance_data_dir"), origin, 1, caption, prefix)
        repeats = float(part.take("repeats", 0))  # times beside the first
        if repeats:
            found["repeat"] = repeats + 1
        share = part.take("probability")
        if share is not None and float(share) != 1.0:
            found["weight"] = float(share)
        sets.append(found)
        size, own = part.take("resolution", whole_side), str(part.take("resolution_type", shape))
        areas.append(float(size) ** 0.5 * 1000 if own == "area" else size)
        video = part.take("video") or {}
        lengths.add(int(video.get("num_frames", 1)))
        part.report_rest(ledger)
    given.take("caption_strategy")
    denoisers.datasets(launch, sets, given.origin("data_backend_config"), name)
    sides = [int(float(area)) for area in areas]
    denoisers.sizes(launch, sides, given.origin("resolution"), True, areas)
    if lengths - {1}:
        denoisers.frames(launch, sorted(lengths), Origin("video.num_frames", str(name)), sorted(lengths))
    else:
        ledger.default("data.clip.frames", [1], Origin("video.num_frames", str(name)), "pictures")
    ledger.write("data.encode", "cached", given.origin("data_backend_config"), name, "encoded before")


def _length(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    steps, epochs = number(given, "max_train_steps", 0, int), number(given, "num_train_epochs", 0)
    if steps and steps > 0:
        ledger.write("train.steps", steps, given.origin("max_train_steps"))
    else:
        ledger.write("train.epochs", epochs or 1, given.origin("num_train_epochs"))
    out = given.take("output_dir")
    if out is not None:
        ledger.write("checkpoint.dir", launch.path(str(out)), given.origin("output_dir"))
    for key in ("checkpoint_step_interval", "checkpointing_steps"):
        every = number(given, key, None, int)
        if every:
            ledger.write("checkpoint.every", every, given.origin(key))
    keep = number(given, "checkpoints_total_limit", None, int)
    if keep:
        ledger.write("checkpoint.keep", keep, given.origin("checkpoints_total_limit"))
    resume = given.take("resume_from_checkpoint")
    if resume == "latest":
        ledger.write("checkpoint.resume", "auto", given.origin("resume_from_checkpoint"), resume)
    elif resume:
        why = "a checkpoint of that trainer is not resumed from"
        ledger.note("unsupported", given.origin("resume_from_checkpoint"), resume, why)
    seed = number(given, "seed", None, int)
    if seed is not None:
        ledger.write("train.seed", seed, given.origin("seed"))
    known = [name for name in listed(given.take("report_to")) if name in trainer.TRACKERS]
    if given.has("report_to"):
        ledger.write("monitor.trackers", known, given.origin("report_to"), given.peek("report_to"))
    name = given.take("tracker_run_name")
    if name:
        ledger.write("name", str(name), given.origin("tracker_run_name"))
    project = given.take("tracker_project_name")
    if project:
        ledger.write("monitor.project", str(project), given.origin("tracker_project_name"))


def _optimizer(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    trainer.optimizer(launch, given, "optimizer", "adamw_bf16")
    ledger.write("optim.lr", number(given, "learning_rate", 4e-7), given.origin("learning_rate"))
    values = {"weight_decay": 0.01, "betas": [0.9, 0.999]}
    for text in listed(given.take("optimizer_config")):
        name, _, value = text.partition("=")
        if name in ("weight_decay", "eps"):
            values[name] = float(value)
        else:
            ledger.note(
                "unsupported", given.origin("optimizer_config"), text, "weight_decay and eps are known"
            )
    for name, value in values.items():
        ledger.default(f"optim.{name}", value, given.origin("optimizer_config"), "given, or AdamW's own")
    name = given.peek("lr_scheduler")
    least, rate = number(given, "lr_end", 4e-7), float(ledger.get("optim.lr"))
    if name == "polynomial":
        given.values["lr_scheduler"] = "linear"
        power = number(given, "lr_power", 0.8)
        why = f"a power of {power} there, linear here"
        ledger.note("changed", given.origin("lr_scheduler"), name, why)
        if rate:
            ratio = float(f"{least / rate:.6g}")
            ledger.write("optim.schedule.min_ratio", min(1.0, ratio), given.origin("lr_end"), least)
    denoisers.schedule(launch, given, "lr_scheduler", "lr_warmup_steps", "constant")
    clip = number(given, "max_grad_norm", 1.0)
    ledger.write("optim.clip_norm", clip or None, given.origin("max_grad_norm"))


def _noise(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    moved = number(given, "flow_schedule_shift", 3.0)
    uniform = truth(given.take("flow_use_uniform_schedule"))
    scale = number(given, "flow_sigmoid_scale", 1.0)
    origin = given.origin("flow_use_uniform_schedule" if uniform else "flow_sigmoid_scale")
    denoisers.noise(launch, "uniform" if uniform else "logit_normal", origin, uniform or scale)
    if truth(given.take("flow_schedule_auto_shift")):
        denoisers.shift(launch, "dynamic", given.origin("flow_schedule_auto_shift"), True)
    else:
        stated = moved if given.has("flow_schedule_shift") else None
        denoisers.shift(launch, moved or 1.0, given.origin("flow_schedule_shift"), stated)
    if scale != 1.0 and not uniform:
        ledger.write("train.diffusion.logit_std", scale, given.origin("flow_sigmoid_scale"))
    guidance = number(given, "flux_guidance_value")
    if guidance is not None:
        denoisers.guidance(launch, guidance, given.origin("flux_guidance_value"))
    drop = number(given, "caption_dropout_probability", 0.1)
    ledger.write("train.diffusion.drop", drop, given.origin("caption_dropout_probability"))
    gamma = number(given, "snr_gamma")
    if gamma:
        ledger.write("train.diffusion.weighting", "min_snr", given.origin("snr_gamma"), gamma)
        ledger.write("train.diffusion.snr_gamma", gamma, given.origin("snr_gamma"))


def _samples(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    prompt = given.take("validation_prompt")
    keys = ("validation_step_interval", "validation_steps")
    every = next((number(given, key, None, int) for key in keys if given.has(key)), None)
    negative = given.take("validation_negative_prompt")
    size = _SIZE.match(str(given.take("validation_resolution", "")))
    guidance, steps = (
        number(given, "validation_guidance"),
        number(given, "validation_num_inference_steps", None, int),
    )
    if not prompt:
        return
    denoisers.prompts(launch, [str(prompt)], given.origin("validation_prompt"), prompt)
    found = {"every": every, "guidance": guidance, "steps": steps, "negative": negative or None}
    if size:
        found |= {"width": int(size[1]), "height": int(size[2])}
    names = {
        "every": next((key for key in keys if given.has(key)), keys[0]),
        "guidance": "validation_guidance",
    }
    names |= {"steps": "validation_num_inference_steps", "negative": "validation_negative_prompt"}
    for key, value in found.items():
        if value is not None:
            origin = given.origin(names.get(key, "validation_resolution"))
            ledger.write(f"evaluate.samples.{key}", value, origin)
