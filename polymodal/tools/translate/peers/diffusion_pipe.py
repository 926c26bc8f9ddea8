"""diffusion-pipe: the TOML of `train.py --deepspeed --config FILE.toml`, and that of its data set."""

from __future__ import annotations

from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import TABLES, Given
from polymodal.tools.translate.peers import denoisers, trainer
from polymodal.tools.translate.peers.files import finish, read, settings
from polymodal.tools.translate.peers.trainer import number, truth

PRECISIONS = {"bfloat16": "pure_bf16", "float16": "fp16", "float32": "fp32"}


def translate(launch: Launch) -> None:
    given, ledger = settings(launch), launch.ledger
    model = str(given.take("model.type", ""))
    place = "diffusers_path" if given.has("model.diffusers_path") else "ckpt_path"
    path = given.take(f"model.{place}")
    if place == "ckpt_path" and launch.source is None:
        path = None  # the authors' own layout
    for name in TABLES["diffusion-pipe"]["weights"]:
        if given.has(name):
            value = given.take(name)
            ledger.note("checked", given.origin(name), value, "a part of the pipeline in model.source")
    denoisers.source(launch, path, given.origin(f"model.{place}"), model)
    stages = number(given, "pipeline_stages", 1, int)
    if stages > 1:
        ledger.write("parallel.pp", stages, given.origin("pipeline_stages"))
    data = _datasets(launch, given)
    _sizes(launch, data)
    micro = given.take("micro_batch_size_per_gpu", 1)
    if not isinstance(micro, int):
        raise PolymodalError(
            f"{given.file}: micro_batch_size_per_gpu is {micro}, one for each resolution.",
            "Write one number.",
        )
    accumulation = number(given, "gradient_accumulation_steps", 1, int)
    where = {"micro": given.origin("micro_batch_size_per_gpu")}
    where["accumulation"] = given.origin("gradient_accumulation_steps")
    if launch.world % stages:
        raise PolymodalError(
            f"{given.file}: {launch.world} processes are no multiple of pipeline_stages {stages}.",
            "Say how many there are: --set NPROC_PER_NODE=4.",
        )
    ledger.write("train.micro_batch_size", micro, where["micro"])
    whole = micro * accumulation * (launch.world // stages)
    why = f"{micro} x {accumulation} accumulated x {launch.world // stages} copies"
    ledger.write("train.global_batch_size", whole, where["accumulation"], accumulation, why)
    if given.has("adapter"):
        _adapter(launch, given)
    for key in ("model.transformer_dtype", "model.diffusion_model_dtype"):
        if given.has(key) and given.peek(key) != given.peek("model.dtype"):
            kind = {"float8": "fp8", "float8_e4m3fn": "fp8"}.get(str(given.take(key)))
            trainer.base(launch, kind, given.origin(key), given.peek(key))
    dtype = str(given.take("model.dtype", "bfloat16"))
    ledger.write("train.precision", PRECISIONS.get(dtype, "bf16"), given.origin("model.dtype"), dtype)
    _optimizer(launch, given)
    _noise(launch, given)
    if given.take("activation_checkpointing"):
        value = given.peek("activation_checkpointing")
        ledger.write("parallel.recompute", "full", given.origin("activation_checkpointing"), value)
    if number(given, "blocks_to_swap", 0, int):
        origin, value = given.origin("blocks_to_swap"), given.peek("blocks_to_swap")
        ledger.write("parallel.offload", ["parameters"], origin, value, "all parameters wait on the host")
    if truth(given.take("compile")):
        ledger.write("parallel.compile", True, given.origin("compile"))
    _length(launch, given)
    ledger.write("data.encode", "cached", given.origin("dataset"), given.peek("dataset"), "encoded before")
    finish(launch, given)


def _datasets(launch: Launch, given: Given) -> Given:
    name = given.take("dataset")
    if not isinstance(name, str):
        raise PolymodalError(f"{given.file}: it names no dataset.", "Write dataset = 'FILE.toml' in it.")
    values, lines = read(launch.open(name))
    data = Given("diffusion-pipe-data", name, values, lines)
    sets = list[dict[str, Any]]()
    for entry in data.take("directory", []):
        part = Given("diffusion-pipe-data", name, entry)
        origin = data.origin("directory.path")
        prefix = part.take("caption_prefix", data.take("caption_prefix"))
        repeats = part.take("num_repeats", 1)
        found = denoisers.folder(launch, part.take("path"), origin, repeats, prefix=prefix)
        sets.append(found)
        for key in ("resolutions", "frame_buckets"):  # of a directory: over those of the file
            if part.has(key):
                why = "one choice for all directories here: written as the file's"
                launch.ledger.note("changed", part.origin(key), part.take(key), why)
                data.values.setdefault(key, entry[key])
        part.report_rest(launch.ledger)
    denoisers.datasets(launch, sets, given.origin("dataset"), name)
    return data


def _sizes(launch: Launch, data: Given) -> None:
    buckets = truth(data.take("enable_ar_bucket", False))
    areas = data.take("resolutions", [])
    denoisers.sizes(launch, areas, data.origin("resolutions"), buckets, areas)
    counts = data.take("frame_buckets")
    if counts is not None:
        denoisers.frames(launch, counts, data.origin("frame_buckets"), counts)
    else:
        launch.ledger.default("data.clip.frames", [1], data.origin("frame_buckets"))
    data.report_rest(launch.ledger)


def _adapter(launch: Launch, given: Given) -> None:
    kind = given.take("adapter.type", "lora")
    if kind != "lora":
        launch.ledger.note("unsupported", given.origin("adapter.type"), kind, "lora is known")
    denoisers.adapters(launch, given, "adapter.rank", "adapter.alpha", dropout="adapter.dropout")
    start = given.take("adapter.init_from_existing")
    if start is not None:
        origin = given.origin("adapter.init_from_existing")
        launch.ledger.write("checkpoint.init_from", launch.path(str(start)), origin, start)


def _optimizer(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    trainer.optimizer(launch, given, "optimizer.type")
    for key, ours in (("lr", "lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
        value = number(given, f"optimizer.{key}")
        if value is not None:
            ledger.write(f"optim.{ours}", value, given.origin(f"optimizer.{key}"))
    betas = given.take("optimizer.betas")
    if betas is not None:
        ledger.write("optim.betas", [float(beta) for beta in betas], given.origin("optimizer.betas"))
    else:
        ledger.default("optim.betas", [0.9, 0.99], given.origin("optimizer.betas"))
    if not given.has("optimizer.weight_decay"):
        ledger.default("optim.weight_decay", 0.01, given.origin("optimizer.weight_decay"))
    clip = number(given, "gradient_clipping", 1.0)
    ledger.write("optim.clip_norm", clip or None, given.origin("gradient_clipping"))
    denoisers.schedule(launch, given, "lr_scheduler", "warmup_steps")
    rate = given.take("force_constant_lr")
    if rate is not None:
        ledger.write("optim.lr", float(rate), given.origin("force_constant_lr"))


def _noise(launch: Launch, given: Given) -> None:
    method = str(given.take("model.timestep_sample_method", "logit_normal"))
    origin = given.origin("model.timestep_sample_method")
    if method not in ("logit_normal", "uniform"):
        launch.ledger.note("unsupported", origin, method, "logit_normal and uniform are known")
        return
    std = number(given, "model.sigmoid_scale", 1.0) if method == "logit_normal" else None
    moved = number(given, "model.shift")
    denoisers.noise(launch, method, origin, method)
    if std not in (None, 1.0):
        launch.ledger.write("train.diffusion.logit_std", std, given.origin("model.sigmoid_scale"))
    if moved is not None:
        denoisers.shift(launch, moved, given.origin("model.shift"), moved)
    elif truth(given.take("model.flux_shift")):
        denoisers.shift(launch, "dynamic", given.origin("model.flux_shift"), True)
    else:
        denoisers.shift(launch, 1.0, given.origin("model.shift"))
    drop = number(given, "uncond_fraction", 0.0)
    if drop:
        launch.ledger.write("train.diffusion.drop", drop, given.origin("uncond_fraction"))
    else:
        launch.ledger.default("train.diffusion.drop", 0.0, given.origin("uncond_fraction"))


def _length(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    steps = number(given, "max_steps", None, int)
    if steps:
        ledger.write("train.steps", steps, given.origin("max_steps"))
    epochs = number(given, "epochs", 1)
    if not steps:
        ledger.write("train.epochs", epochs, given.origin("epochs"))
    out = given.take("output_dir")
    if out is not None:
        ledger.write("checkpoint.dir", launch.path(str(out)), given.origin("output_dir"))
    every = number(given, "save_every_n_steps", None, int)
    if every:
        ledger.write("checkpoint.every", every, given.origin("save_every_n_steps"))
    for key in ("save_every_n_epochs", "checkpoint_every_n_epochs", "checkpoint_every_n_minutes"):
        value = given.take(key)
        if value is not None:
            ledger.note("changed", given.origin(key), value, "counted in steps here: set checkpoint.every")
    every = number(given, "eval_every_n_steps", None, int)
    if every:
        ledger.write("evaluate.every", every, given.origin("eval_every_n_steps"))
    every = number(given, "steps_per_print", None, int)
    if every:
        ledger.write("monitor.every", every, given.origin("steps_per_print"))
    if truth(given.take("monitoring.enable_wandb")):
        ledger.write("monitor.trackers", ["wandb"], given.origin("monitoring.enable_wandb"), True)
