"""What trainers built on transformers' Trainer share: its arguments, adapters, DeepSpeed, processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch, scalar, typed
from polymodal.tools.translate.ledger import TABLES, Given, Origin, read_config

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused", "adamw_torch_npu_fused")
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw")
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "disabled": "eager", "torch": "sdpa"}
TRACKERS = ("tensorboard", "wandb", "mlflow")
LOSSES = {
    name: name
    for name in (
        "sigmoid",
        "robust",
        "hinge",
        "ipo",
        "sigmoid_norm",
        "apo_zero",
        "apo_down",
        "bco_pair",
        "sft",
    )
}
"""TRL's losses of pairs, which ms-swift has too, -> ours."""
PREFERENCE: dict[str, Any] = {
    "loss": "loss_type",
    "default": "sigmoid",
    "sft": ("rpo_alpha",),
    "beta": "beta",
    "smoothing": "label_smoothing",
}
"""Its keys of them."""


def truth(value: Any) -> bool:
    """A flag's text or a file's value as a truth value; a flag without a value is True."""
    return value is True or str(value).lower() in ("true", "1", "yes", "on", "y")


def listed(value: Any) -> list[str]:
    """One value, several, or a text with commas, as a list of texts."""
    if value is None:
        return []
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def number(given: Given, name: str, otherwise: Any = None, kind: type = float) -> Any:
    """A number of a key; `otherwise` where it is absent. Raises PolymodalError with its line."""
    value = given.take(name)
    return otherwise if value is None else scalar(value, given.origin(name), kind)


def arguments(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    """Batch, length, optimizer, checkpoints and logs. own: the defaults of this trainer."""
    _batch(launch, given, own)
    _optimizer(launch, given, own)
    _checkpoints(launch, given, own)
    _memory(launch, given, own)
    ledger = launch.ledger
    ledger.default("data.pack", False, given.origin("packing")) if "data.pack" not in ledger.values else None
    seed = number(given, "seed", None, int)
    if seed is not None:
        ledger.write("train.seed", seed, given.origin("seed"))
    workers = number(given, "dataloader_num_workers", None, int)
    if workers:
        ledger.write("data.workers", workers, given.origin("dataloader_num_workers"))
    elif workers == 0:
        ledger.note("no effect", given.origin("dataloader_num_workers"), 0, "media are decoded by processes")
    kernel = given.take("attn_implementation") or given.take("attn_impl") or given.take("flash_attn")
    if kernel is not None:
        known = ATTENTION.get(str(kernel), "auto")
        name = next(n for n in ("attn_implementation", "attn_impl", "flash_attn") if given.has(n))
        ledger.write("model.attention", known, given.origin(name), kernel)
    for key, ours in TABLES[launch.kind].get("mapped", {}).items():
        if given.has(key) and key not in given.asked:
            value = given.take(key)
            if value is not None:
                ledger.write(ours, typed(value), given.origin(key))


def _batch(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    ledger = launch.ledger
    micro = number(given, "per_device_train_batch_size", own.get("batch", 8), int)
    accumulation = number(given, "gradient_accumulation_steps", None, int)
    shards = number(given, "sequence_parallel_size", 1, int)
    if launch.world % shards:
        raise PolymodalError(
            f"{launch.file}: {launch.world} processes are no multiple of sequence_parallel_size {shards}.",
            "Correct it, or say how many processes there are: --set NPROC_PER_NODE=8.",
        )
    if shards > 1:
        origin = given.origin("sequence_parallel_size")
        ledger.write("parallel.cp", shards, origin)
    ranks = launch.world // shards
    if accumulation is None:
        least = own.get("samples")
        accumulation = max(1, -(-least // (micro * ranks))) if least else 1
    whole = micro * accumulation * ranks
    ledger.write("train.micro_batch_size", micro, given.origin("per_device_train_batch_size"))
    why = f"{micro} x {accumulation} accumulated x {ranks} ranks"
    ledger.write(
        "train.global_batch_size", whole, given.origin("gradient_accumulation_steps"), accumulation, why
    )
    steps = number(given, "max_steps", -1, int)
    epochs = number(given, "num_train_epochs", own.get("epochs", 3.0))
    if steps and steps > 0:
        ledger.write("train.steps", steps, given.origin("max_steps"))
    elif given.has("num_train_epochs"):
        ledger.write("train.epochs", epochs, given.origin("num_train_epochs"))
    else:
        ledger.default("train.epochs", epochs, given.origin("num_train_epochs"))


def _optimizer(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    ledger = launch.ledger
    rate = number(given, "learning_rate")
    if rate is not None:
        ledger.write("optim.lr", rate, given.origin("learning_rate"))
    else:
        rate = own.get("lr", 5e-5)
        ledger.default("optim.lr", rate, given.origin("learning_rate"))
    name = str(given.take("lr_scheduler_type", own.get("schedule", "linear")))
    origin = given.origin("lr_scheduler_type")
    if name not in SCHEDULES:
        ledger.note("unsupported", origin, name, f"known are {', '.join(SCHEDULES)}")
    elif given.has("lr_scheduler_type"):
        ledger.write("optim.schedule.name", SCHEDULES[name], origin, name)
    else:
        ledger.default("optim.schedule.name", SCHEDULES[name], origin)
    more = given.take("lr_scheduler_kwargs") or {}
    if isinstance(more, str):
        more = _json(more, given.origin("lr_scheduler_kwargs"))
    for key, value in more.items():
        origin = given.origin("lr_scheduler_kwargs")
        if key in ("min_lr", "min_lr_rate") and name == "cosine_with_min_lr" and rate:
            ratio = float(value) / rate if key == "min_lr" else float(value)
            ledger.write("optim.schedule.min_ratio", float(f"{ratio:.6g}"), origin, {key: value})
        else:
            ledger.note("unsupported", origin, {key: value}, f"of the schedule {name}")
    steps, share = number(given, "warmup_steps", 0), number(given, "warmup_ratio", own.get("warmup", 0.0))
    key = "warmup_steps" if steps else "warmup_ratio"
    value = 0 if name == "constant" else steps or share
    value = int(value) if value >= 1 else float(value)
    if given.has(key):
        ledger.write("optim.schedule.warmup", value, given.origin(key), steps or share)
    else:
        ledger.default("optim.schedule.warmup", value, given.origin(key))
    decay = number(given, "weight_decay", own.get("decay", 0.0))
    if given.has("weight_decay"):
        ledger.write("optim.weight_decay", decay, given.origin("weight_decay"))
    elif decay:
        ledger.default("optim.weight_decay", decay, given.origin("weight_decay"))
    betas = own.get("betas", (0.9, 0.999))
    found = [number(given, f"adam_beta{i}", b) for i, b in zip((1, 2), betas, strict=True)]
    if given.has("adam_beta1") or given.has("adam_beta2"):
        ledger.write("optim.betas", found, given.origin("adam_beta2"))
    else:
        ledger.default("optim.betas", found, given.origin("adam_beta2"))
    eps = number(given, "adam_epsilon")
    if eps is not None:
        ledger.write("optim.eps", eps, given.origin("adam_epsilon"))
    clip = number(given, "max_grad_norm")
    if clip is not None:
        origin = given.origin("max_grad_norm")
        ledger.write("optim.clip_norm", clip or None, origin, clip, "" if clip else "0 is off")
    optimizer(launch, given, "optim")


def optimizer(launch: Launch, given: Given, name: str, otherwise: str = "adamw") -> None:
    """optim.name from what an optimizer is called in many places."""
    ledger = launch.ledger
    value = str(given.take(name, otherwise)).lower().replace("-", "_")
    plain = value.replace("_", "")
    if value in ADAMW or plain in ("adamwoptimi", "adamwbf16", "stableadamw"):
        if given.has(name):
            ledger.write("optim.name", "adamw", given.origin(name), value)
    elif value in ADAMW_8BIT or plain in ("adamw8bit", "adamw8bitkahan", "pagedadamw8bit", "adam8bit"):
        why = "the optimizer's state is kept in float32 here"
        ledger.write("optim.name", "adamw", given.origin(name), value, why)
    elif plain == "muon":
        ledger.write("optim.name", "muon", given.origin(name), value)
    else:
        ledger.note(
            "unsupported", given.origin(name), value, "AdamW and Muon are known; remove it or --force"
        )


def _checkpoints(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    ledger = launch.ledger
    out = given.take("output_dir", own.get("output_dir"))
    if out is not None and given.has("output_dir"):
        ledger.write("checkpoint.dir", launch.path(str(out)), given.origin("output_dir"))
    strategy = str(given.take("save_strategy", "steps"))
    every = number(given, "save_steps", 500, int)
    if strategy == "steps" and given.has("save_steps"):
        ledger.write("checkpoint.every", every, given.origin("save_steps"))
    elif strategy == "no":
        ledger.write("checkpoint.every", 0, given.origin("save_strategy"), strategy)
    elif strategy == "epoch":
        why = "counted in steps here: set checkpoint.every"
        ledger.note("changed", given.origin("save_strategy"), strategy, why)
    keep = number(given, "save_total_limit", None, int)
    if keep:
        ledger.write("checkpoint.keep", keep, given.origin("save_total_limit"))
    else:
        ledger.default("checkpoint.keep", 100, given.origin("save_total_limit"), "every one is kept there")
    if truth(given.take("save_only_model")):
        ledger.write("checkpoint.save", "weights", given.origin("save_only_model"), True)
    if truth(given.take("overwrite_output_dir")):
        ledger.write("checkpoint.resume", "never", given.origin("overwrite_output_dir"), True)
    resume = given.take("resume_from_checkpoint")
    if resume is not None and str(resume).lower() not in ("true", "false", "none", "null"):
        why = "a checkpoint of that trainer: export it there, and name it in model.source"
        ledger.note("unsupported", given.origin("resume_from_checkpoint"), resume, why)
    every = number(given, "logging_steps", own.get("log"), int)
    if every:
        ledger.write("monitor.every", every, given.origin("logging_steps"))
    _trackers(launch, given)
    name = given.take("run_name")
    if name is not None:
        ledger.write("name", str(name), given.origin("run_name"))
    strategy = str(given.take("eval_strategy", given.take("evaluation_strategy", "no")))
    steps = number(given, "eval_steps", None, int)
    if strategy == "steps" and steps:
        ledger.write("evaluate.every", steps, given.origin("eval_steps"))
    elif strategy == "epoch":
        why = "measured at the end here: set evaluate.every to steps"
        ledger.note("changed", given.origin("eval_strategy"), strategy, why)
    elif steps:
        ledger.note("no effect", given.origin("eval_steps"), steps, "eval_strategy is not steps")


def _trackers(launch: Launch, given: Given) -> None:
    names = listed(given.take("report_to"))
    origin = given.origin("report_to")
    known = [name for name in names if name in TRACKERS]
    for name in names:
        if name == "all":
            launch.ledger.note("changed", origin, name, "tensorboard; name others in monitor.trackers")
        elif name not in TRACKERS and name != "none":
            launch.ledger.note("unsupported", origin, name, f"known are {', '.join(TRACKERS)}")
    if names and "all" not in names:
        launch.ledger.write("monitor.trackers", known, origin, names)


def _memory(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    """Recompute, precision, and how the model lies over processes."""
    ledger = launch.ledger
    off = truth(given.take("disable_gradient_checkpointing", False))
    recompute = truth(given.take("gradient_checkpointing", own.get("recompute", False))) and not off
    origin = given.origin("gradient_checkpointing")
    if recompute and given.has("gradient_checkpointing"):
        ledger.write("parallel.recompute", "full", origin, True)
    elif recompute:
        ledger.default("parallel.recompute", "full", origin)
    given.take("gradient_checkpointing_kwargs")
    _precision(launch, given, own)
    _sharding(launch, given)


def _precision(launch: Launch, given: Given, own: Mapping[str, Any]) -> None:
    ledger = launch.ledger
    half = truth(given.take("fp16"))
    brain = truth(given.take("bf16", own.get("bf16", False)))
    pure = truth(given.take("pure_bf16"))
    dtype = str(given.take("torch_dtype") or given.take("dtype") or own.get("dtype") or "")
    lora = "model.lora.rank" in ledger.values
    sharded = given.has("deepspeed") or given.has("fsdp")
    name = "bf16" if brain or dtype == "bfloat16" else "fp16" if half or dtype == "float16" else "fp32"
    if pure or (dtype == "bfloat16" and not lora and not sharded):
        name = "pure_bf16"
    key = next((k for k in ("pure_bf16", "fp16", "bf16", "torch_dtype", "dtype") if given.has(k)), "bf16")
    why = "no float32 weights there" if name == "pure_bf16" and not pure else ""
    if given.has(key):
        ledger.write("train.precision", name, given.origin(key), given.peek(key), why)
    else:
        ledger.default("train.precision", name, given.origin(key), why)


def _sharding(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    deepspeed, fsdp = given.take("deepspeed"), given.take("fsdp")
    given.take("fsdp_config")
    offload, zero = list[str](), 0
    if deepspeed is not None:
        origin = given.origin("deepspeed")
        if isinstance(deepspeed, str) and deepspeed.startswith("zero") and not deepspeed.endswith(".json"):
            zero = int(deepspeed[4:5] or 0)
            if deepspeed.endswith("_offload"):
                offload = ["parameters"] if zero == 3 else ["optimizer"]
        else:
            zero, offload = _deepspeed(launch, given, deepspeed)
        if zero:
            ledger.write("parallel.zero", zero, origin, deepspeed)
    elif fsdp:
        text = " ".join(listed(fsdp)) if not truth(fsdp) else "full_shard"
        zero = 2 if "shard_grad_op" in text else 3
        ledger.write("parallel.zero", zero, given.origin("fsdp"), fsdp)
        offload = ["parameters"] if "offload" in text else []
    if offload:
        ledger.write("parallel.offload", offload, given.origin("deepspeed" if deepspeed else "fsdp"), "cpu")
    if not zero and launch.world > 1:
        cp = int(ledger.get("parallel.cp", 1))
        origin = Origin("distributed data parallel", launch.file)
        if launch.world > cp:
            ledger.default("parallel.dp_replicate", launch.world // cp, origin, "every process has the model")
        ledger.default("parallel.dp_shard", 1, origin)


def _deepspeed(launch: Launch, given: Given, value: Any) -> tuple[int, list[str]]:
    """(stage, what is offloaded) of a DeepSpeed file."""
    origin = given.origin("deepspeed")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        config = _json(value, origin)
    else:
        config = value if isinstance(value, dict) else read_config(launch.open(str(value)))
    file = Given("deepspeed", str(value) if isinstance(value, str) else launch.file, config)
    zero = number(file, "zero_optimization.stage", 0, int)
    offload = list[str]()
    for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        device = file.take(f"zero_optimization.{key}.device", "none")
        if device == "cpu":
            offload.append(what)
        elif device != "none":
            launch.ledger.note("unsupported", file.origin(key), device, "only the host's memory is known")
    file.report_rest(launch.ledger)
    return zero, ["parameters"] if "parameters" in offload else offload


def adapters(
    launch: Launch, given: Given, names: Mapping[str, str], own: Mapping[str, Any], towers: list[str]
) -> None:
    """model.lora. names: rank, alpha, dropout, targets -> their keys; towers: those with adapters."""
    ledger = launch.ledger
    rank = number(given, names["rank"], own["rank"], int)
    values = {
        "rank": rank,
        "alpha": number(given, names["alpha"], own.get("alpha", 2 * rank)),
        "dropout": number(given, names["dropout"], own.get("dropout", 0.0)),
    }
    for key, value in values.items():
        if given.has(names[key]) and given.peek(names[key]) is not None:
            ledger.write(f"model.lora.{key}", value, given.origin(names[key]))
        else:
            ledger.default(f"model.lora.{key}", value, given.origin(names[key]))
    targets = listed(given.take(names["targets"]))
    if targets and targets not in (["all"], ["all-linear"]):
        ledger.write(
            "model.lora.targets", targets, given.origin(names["targets"]), given.peek(names["targets"])
        )
    elif targets == ["all"]:
        ledger.write("model.lora.targets", "all-linear", given.origin(names["targets"]), "all")
    elif targets:
        ledger.write("model.lora.targets", "all-linear", given.origin(names["targets"]))
    if truth(given.take("use_rslora")):
        ledger.write("model.lora.rslora", True, given.origin("use_rslora"))
    if towers != ["language"]:
        ledger.write("model.lora.towers", towers, Origin("the freeze flags", given.file), towers)


def base(launch: Launch, kind: str | None, origin: Origin, value: Any) -> None:
    """model.base: how the frozen weights under adapters are kept. kind: None for one that is not known."""
    if kind is None:
        launch.ledger.note("unsupported", origin, value, "frozen weights in nf4, int8 and fp8 are known")
    elif "model.lora.rank" not in launch.ledger.values:
        launch.ledger.note("unsupported", origin, value, "only frozen weights under adapters have fewer bits")
    else:
        launch.ledger.write("model.base", kind, origin, value)


def freeze(launch: Launch, given: Given, keys: Sequence[tuple[str, bool, str]]) -> None:
    """train.freeze of a full training. keys: (their key, its default, tower)."""
    for key in [
        key for key in given.values if key.startswith("lora_") or key in ("target_modules", "use_rslora")
    ]:
        launch.ledger.note("no effect", given.origin(key), given.take(key), "the whole model is trained")
    frozen = [tower for key, otherwise, tower in keys if truth(given.take(key, otherwise))]
    stated = [key for key, _, _ in keys if given.has(key)]
    if stated:
        values = {key: given.peek(key) for key in stated}
        launch.ledger.write("train.freeze", frozen, given.origin(stated[0]), values)
        for key in stated[1:]:
            launch.ledger.note("mapped", given.origin(key), given.peek(key), "train.freeze")
    elif frozen:
        launch.ledger.default("train.freeze", frozen, given.origin(keys[0][0]))


def dataset(launch: Launch, name: str, path: str, origin: Origin) -> str:
    """A path that is on this machine, as one of ours. Raises PolymodalError for a data set of a hub."""
    ours = launch.path(path)
    if not Path(ours).exists():
        where = f"{origin.file}:{origin.line}" if origin.line else origin.file
        raise PolymodalError(
            f"{where}: the data set {name} is not on this machine (looked for {ours}).",
            "Fetch it with `hf download --repo-type dataset ID --local-dir DIR` and name that path there.",
        )
    return ours


def unpaired(launch: Launch, given: Given) -> None:
    """train.preference of kto, by TRL's keys."""
    for key in ("desirable_weight", "undesirable_weight", "beta"):
        value = number(given, key)
        if value is not None:
            launch.ledger.write(f"train.preference.{key}", value, given.origin(key))


def preference(launch: Launch, given: Given, names: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """train.objective dpo. names: their losses -> ours."""
    ledger = launch.ledger
    losses = listed(given.take(own["loss"])) or [own["default"]]
    origin = given.origin(own["loss"])
    unknown = [name for name in losses if name not in names]
    if unknown:
        ledger.note("unsupported", origin, unknown, f"known are {', '.join(names)}")
        return
    weights = [float(each) for each in listed(given.take("loss_weights"))] or [1.0] * len(losses)
    if len(weights) != len(losses):
        raise PolymodalError(
            f"{given.file}: {len(losses)} names in {own['loss']}, {len(weights)} in loss_weights.",
            "Give each loss a weight.",
        )
    mix = {names[name]: weight for name, weight in zip(losses, weights, strict=True)}
    for key in own.get("sft", ()):
        share = number(given, key, 0.0)
        if share:
            mix["sft"] = mix.get("sft", 0.0) + share
            ledger.note("mapped", given.origin(key), share, f"train.preference.loss: sft {share}")
    share = number(given, "pref_bco_weight", 0.0)
    if share:
        mix["bco_pair"] = share
        ledger.note(
            "mapped", given.origin("pref_bco_weight"), share, f"train.preference.loss: bco_pair {share}"
        )
    loss: Any = next(iter(mix)) if list(mix.values()) == [1.0] else mix
    if given.has(own["loss"]):
        ledger.write("train.preference.loss", loss, origin, losses)
    else:
        ledger.default("train.preference.loss", loss, origin)
    for key, ours, otherwise in (
        (own["beta"], "beta", own.get("beta_default", 0.1)),
        (own["smoothing"], "label_smoothing", 0.0),
    ):
        value = number(given, key)
        if value is not None:
            ledger.write(f"train.preference.{ours}", value, given.origin(key))
        elif otherwise:
            ledger.default(f"train.preference.{ours}", otherwise, given.origin(key))
    gamma = number(given, "simpo_gamma", own.get("gamma"))
    if "simpo" in mix:
        ledger.write("train.preference.gamma", gamma, given.origin("simpo_gamma"))
    reference = given.take("ref_model")
    if reference is not None:
        ledger.write("train.preference.reference", launch.path(str(reference)), given.origin("ref_model"))


def _json(text: str, origin: Origin) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PolymodalError(
            f"{origin.file}:{origin.line}: {origin.name} is {text[:60]!r}, a JSON mapping is wanted.",
            "Correct it there.",
        )
    return found
