"""ai-toolkit: the YAML or JSON of `python run.py config/FILE.yaml`."""

from __future__ import annotations

from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import Given, Origin
from polymodal.tools.translate.peers import denoisers, trainer
from polymodal.tools.translate.peers.files import finish, part, settings
from polymodal.tools.translate.peers.trainer import number, truth

PRECISIONS = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}
NOISE = {  # train.timestep_type -> density, shift
    "sigmoid": ("logit_normal", 1.0),
    "linear": ("uniform", 1.0),
    "shift": ("uniform", "dynamic"),
    "flux_shift": ("uniform", "dynamic"),
    "lumina2_shift": ("uniform", "dynamic"),
}


def translate(launch: Launch) -> None:
    whole = settings(launch)
    processes = whole.take("config.process", [])
    if len(processes) != 1:
        raise PolymodalError(
            f"{whole.file}: config.process has {len(processes)} entries, one is translated.",
            "Make a file for each.",
        )
    given, ledger = part(whole, "ai-toolkit", "config.process.0", processes[0]), launch.ledger
    kind = given.take("type")
    if kind not in ("sd_trainer", "diffusion_trainer", "ui_trainer"):
        ledger.note("unsupported", given.origin("type"), kind, "sd_trainer is known")
    name = whole.take("config.name")
    whole.take("meta"), whole.take("job")
    ledger.write("name", str(name), whole.origin("config.name"))
    arch = str(given.take("model.arch", "flux" if truth(given.take("model.is_flux")) else ""))
    path = given.take("model.name_or_path")
    denoisers.source(launch, path, given.origin("model.name_or_path"), arch)
    folder = given.take("training_folder", "output")
    out = launch.path(f"{folder}/{name}")
    ledger.write("checkpoint.dir", out, given.origin("training_folder"), folder)
    if given.take("network") is not None:
        network = part(given, "ai-toolkit-network", "network", given.take("network"))
        if network.take("type", "lora") != "lora":
            ledger.note("unsupported", network.origin("type"), network.peek("type"), "lora is known")
        denoisers.adapters(launch, network, "linear", "linear_alpha", 1)
        network.report_rest(ledger)
    if truth(given.take("model.quantize")):
        kinds = {"qfloat8": "fp8", "float8": "fp8", "int8": "int8", "qint8": "int8", "uint4": None}
        trainer.base(
            launch, kinds.get(str(given.take("model.qtype", "qfloat8"))), given.origin("model.quantize"), True
        )
    if truth(given.take("model.quantize_te")):
        why = "text encoders work once, before training, in 16 bits"
        ledger.note("changed", given.origin("model.quantize_te"), True, why)
    _datasets(launch, given)
    _train(launch, given)
    _samples(launch, given)
    finish(launch, given)


def _datasets(launch: Launch, given: Given) -> None:
    ledger, sets, areas = launch.ledger, list[dict[str, Any]](), list[Any]()
    trigger = given.take("trigger_word")
    if trigger:
        why = "in front of every caption; there only of those without it"
        ledger.note(
            "changed", given.origin("trigger_word"), trigger, f"data.datasets.N.caption_prefix: {why}"
        )
    drops, lengths, cached, buckets = set[float](), set[int](), False, True
    for i, entry in enumerate(given.take("datasets", [])):
        rows = part(given, "ai-toolkit-data", f"datasets.{i}", entry)
        key = "folder_path" if rows.has("folder_path") else "dataset_path"
        caption = rows.take("default_caption")
        repeat = rows.take("num_repeats", 1)
        prefix = f"{rows.take('trigger_word', trigger)} " if rows.take("trigger_word", trigger) else None
        found = denoisers.folder(launch, rows.take(key), rows.origin(key), repeat, caption, prefix)
        if truth(rows.take("is_reg")):
            found["loss_weight"] = 1.0
        weight = rows.take("loss_multiplier")
        if weight is not None:
            found["loss_weight"] = float(weight)
        sets.append(found)
        size = rows.take("resolution", 512)
        areas += size if isinstance(size, list) else [size]
        drops.add(float(rows.take("caption_dropout_rate", 0.0)))
        lengths.add(int(rows.take("num_frames", 1)))
        buckets = truth(rows.take("buckets", True)) and buckets
        cached = truth(rows.take("cache_latents_to_disk")) or truth(rows.take("cache_latents")) or cached
        if rows.has("caption_ext"):
            denoisers.captions(launch, rows.take("caption_ext"), rows.origin("caption_ext"))
        rows.report_rest(ledger)
    origin = given.origin("datasets")
    denoisers.datasets(launch, sets, origin, [each["path"] for each in sets])
    denoisers.sizes(launch, areas, Origin("resolution", given.file), buckets, areas)
    denoisers.frames(launch, sorted(lengths), Origin("num_frames", given.file), sorted(lengths))
    drop = max(drops, default=0.0)
    why = "one share for all data sets here, the largest" if len(drops) > 1 else ""
    ledger.write("train.diffusion.drop", drop, Origin("caption_dropout_rate", given.file), sorted(drops), why)
    origin = Origin("cache_latents_to_disk", given.file)
    ledger.write("data.encode", "cached" if cached else "online", origin, cached)


def _train(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    train = part(given, "ai-toolkit-train", "train", given.take("train") or {})
    micro = number(train, "batch_size", 1, int)
    accumulation = number(train, "gradient_accumulation_steps", 1, int) * number(
        train, "gradient_accumulation", 1, int
    )
    where = {"micro": train.origin("batch_size"), "accumulation": train.origin("gradient_accumulation_steps")}
    denoisers.length(launch, micro, accumulation, where)
    ledger.write("train.steps", number(train, "steps", 1000, int), train.origin("steps"))
    ledger.write("optim.lr", number(train, "lr", 1e-6), train.origin("lr"))
    trainer.optimizer(launch, train, "optimizer")
    more = {"weight_decay": 0.01, "betas": [0.9, 0.999], **(train.take("optimizer_params") or {})}
    for name, value in more.items():
        if name in ("weight_decay", "betas", "eps"):
            value = [float(each) for each in value] if name == "betas" else float(value)
            ledger.default(f"optim.{name}", value, train.origin("optimizer_params"), "given, or AdamW's own")
        else:
            why = "weight_decay, betas and eps are known"
            ledger.note("unsupported", train.origin("optimizer_params"), {name: value}, why)
    denoisers.schedule(launch, train, "lr_scheduler", "lr_warmup_steps")
    ledger.write("optim.clip_norm", number(train, "max_grad_norm", 1.0), train.origin("max_grad_norm"))
    if truth(train.take("gradient_checkpointing", True)):
        ledger.write("parallel.recompute", "full", train.origin("gradient_checkpointing"), True)
    dtype = str(train.take("dtype", "bf16"))
    ledger.write("train.precision", PRECISIONS.get(dtype, "bf16"), train.origin("dtype"), dtype)
    average = train.take("ema_config") or {}
    if truth(average.get("use_ema")):
        ledger.write("train.ema", float(average.get("ema_decay", 0.999)), train.origin("ema_config"), average)
    kind, origin = str(train.take("timestep_type", "sigmoid")), train.origin("timestep_type")
    if kind in NOISE:
        density, moved = NOISE[kind]
        denoisers.noise(launch, density, origin, kind)
        denoisers.shift(launch, moved, origin, kind)
    else:
        ledger.note("unsupported", origin, kind, f"known are {', '.join(NOISE)}")
    gamma = number(train, "min_snr_gamma")
    if gamma:
        ledger.write("train.diffusion.weighting", "min_snr", train.origin("min_snr_gamma"), gamma)
        ledger.write("train.diffusion.snr_gamma", gamma, train.origin("min_snr_gamma"))
    train.report_rest(ledger)
    save = part(given, "ai-toolkit-save", "save", given.take("save") or {})
    ledger.write("checkpoint.every", number(save, "save_every", 1000, int), save.origin("save_every"))
    keep = number(save, "max_step_saves_to_keep", 5, int)
    ledger.write("checkpoint.keep", keep, save.origin("max_step_saves_to_keep"))
    save.report_rest(ledger)


def _samples(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    sample = part(given, "ai-toolkit-sample", "sample", given.take("sample") or {})
    texts = sample.take("prompts") or [each.get("prompt", "") for each in sample.take("samples", [])]
    sample.take("samples")
    denoisers.prompts(launch, texts, sample.origin("prompts"), f"{len(texts)} prompts")
    if texts:
        for key, ours, kind in (
            ("sample_every", "every", int),
            ("width", "width", int),
            ("height", "height", int),
            ("num_frames", "frames", int),
            ("fps", "fps", float),
            ("guidance_scale", "guidance", float),
            ("sample_steps", "steps", int),
        ):
            value = number(sample, key, None, kind)
            if value is not None and key == "num_frames":
                ledger.write("evaluate.samples.frames", 1 + (value - 1) // 4 * 4, sample.origin(key), value)
            elif value is not None:
                ledger.write(f"evaluate.samples.{ours}", value, sample.origin(key))
        if sample.take("neg"):
            ledger.write("evaluate.samples.negative", sample.peek("neg"), sample.origin("neg"))
    sample.report_rest(ledger)
