"""YAML of MindSpeed-MM's native FSDP2 trainer (`fsdp/train/trainer.py cfg.yaml a.b=v`) as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.recipe import file as recipe_file
from polymodal.tools.translate import data, model, training
from polymodal.tools.translate.launch import Launch, scalar, typed, write_environment
from polymodal.tools.translate.ledger import Given, Origin, read_config

MAPPED = {  # as they are
    "training.micro_batch_size": "train.micro_batch_size",
    "training.train_iters": "train.steps",
    "training.max_epochs": "train.epochs",
    "training.seed": "train.seed",
    "training.lr": "optim.lr",
    "training.weight_decay": "optim.weight_decay",
    "training.adam_eps": "optim.eps",
    "training.log_interval": "monitor.every",
    "training.validate_interval": "evaluate.every",
    "training.val_interval": "evaluate.every",
    "data.dataloader_param.num_workers": "data.workers",
    "parallel.expert_parallel_size": "parallel.ep",
    "parallel.fsdp_plan.reshard_after_forward": "parallel.reshard_after_forward",
}
FROZEN = {  # ends of module paths -> towers
    "visual": ["vision", "projector"],
    "visual.blocks": ["vision"],
    "visual.patch_embed": [],
    "visual.merger": ["projector"],
    "visual.deepstack_merger_list": ["projector"],
    "language_model": ["language"],
    "lm_head": ["language"],
    "audio_tower": ["audio"],
}
RECOMPUTED = {"visual.blocks": "vision", "language_model.layers": "language", "transformer_blocks": "blocks"}
OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "muon": "muon", "adamw_swap": "adamw"}


def translate(launch: Launch) -> None:
    """Fill the ledger from the YAML that the launch names first, and `a.b=v` behind it."""
    name = next((word.text for word in launch.positional if word.text.endswith((".yaml", ".yml"))), None)
    if name is None:
        raise PolymodalError(f"{launch.file}: {launch.entry} wants a YAML file first.", "Name it there.")
    whole = read_config(launch.open(name))
    for word in launch.positional:
        if "=" in word.text:
            recipe_file.override(whole, {}, word.text)
    given = Given("native", name, whole)
    rows = Given("chat_data", name, given.take("data") or {})
    ledger = launch.ledger
    dp = _parallel(launch, given)
    _training(launch, given, dp)
    data.chat(launch, rows)
    _model(launch, given, rows)
    training.profile(launch, Given("tool", name, given.take("tools") or {}))
    for key, ours in MAPPED.items():
        source = rows if key.startswith("data.") else given
        inner = key.removeprefix("data.")
        value = source.take(inner)
        if value is not None:
            ledger.write(ours, typed(value), source.origin(inner))
    if "train.epochs" in ledger.values:
        ledger.values.pop("train.steps", None)
    write_environment(launch)
    given.report_rest(ledger)
    rows.report_rest(ledger)
    launch.options.report_rest(ledger)
    ledger.values.setdefault("name", (Path(name).stem, "the file's name"))


def _parallel(launch: Launch, given: Given) -> int:
    """Writes `parallel`; the data-parallel size."""
    ledger = launch.ledger
    ulysses = int(given.take("parallel.ulysses_parallel_size", 1))
    ring = int(given.take("parallel.ring_attention_size", 1))
    cp = ulysses * ring
    if cp > 1:
        ledger.write("parallel.cp", cp, given.origin("parallel.ulysses_parallel_size"), [ulysses, ring])
        ledger.write("parallel.ulysses", ulysses, given.origin("parallel.ulysses_parallel_size"))
    tp = int(given.take("parallel.tensor_parallel_size", 1))
    if tp > 1:
        ledger.note("unsupported", given.origin("parallel.tensor_parallel_size"), tp, "refused there too")
    if launch.world % cp:
        raise PolymodalError(
            f"{launch.file}: {launch.world} processes are no multiple of ulysses {ulysses} x ring {ring}.",
            "Correct the sizes, or name the nodes: --nodes N.",
        )
    dp = launch.world // cp
    ledger.write("parallel.zero", 3, Origin("FSDP2", given.file), True)
    size = given.take("parallel.fully_shard_parallel_size")
    training.shards(launch, size, given.origin("parallel.fully_shard_parallel_size"), dp, cp)
    dtype = given.take("parallel.fsdp_plan.param_dtype", "fp32")
    if dtype in ("bf16", "fp16", "fp32"):
        ledger.write(
            "train.precision", dtype, given.origin("parallel.fsdp_plan.param_dtype"), why="float32 masters"
        )
    else:
        ledger.note(
            "unsupported",
            given.origin("parallel.fsdp_plan.param_dtype"),
            dtype,
            "known are bf16, fp16 and fp32",
        )
    prefetch = [given.take(f"parallel.fsdp_plan.num_to_{way}_prefetch") for way in ("forward", "backward")]
    if any(each is not None for each in prefetch):
        most = max(int(each or 0) for each in prefetch)
        ledger.write(
            "parallel.prefetch",
            most,
            given.origin("parallel.fsdp_plan.num_to_*_prefetch"),
            prefetch,
            "the larger",
        )
    _recompute(launch, given)
    places = ("model.text_decoder.activation_offload", "features.enable_activation_offload")
    if any(given.take(place) for place in places):
        ledger.write("parallel.offload", ["activations"], given.origin(places[1]), True)
    for section in ("model", "features"):
        given.take(f"{section}.activation_offload_plan")
    return dp


def _recompute(launch: Launch, given: Given) -> None:
    for section in ("parallel", "features", "model"):
        asked, modules = (
            given.take(f"{section}.recompute"),
            given.take(f"{section}.recompute_plan.apply_modules"),
        )
        if not asked:
            continue
        origin = given.origin(f"{section}.recompute")
        launch.ledger.write("parallel.recompute", "full", origin, True)
        towers = [tower for name in modules or [] for part, tower in RECOMPUTED.items() if part in str(name)]
        if towers and len(towers) == len(modules) and "blocks" not in towers:
            launch.ledger.write("parallel.recompute_blocks", list(dict.fromkeys(towers)), origin, modules)
        elif modules:
            launch.ledger.note("changed", origin, modules, "all blocks are recomputed here")


def _training(launch: Launch, given: Given, dp: int) -> None:
    ledger = launch.ledger

    def take(name: str, otherwise: Any = None) -> Any:
        return given.take(f"training.{name}", otherwise)

    def origin(name: str) -> Origin:
        return given.origin(f"training.{name}")

    micro, accumulation = int(take("micro_batch_size", 1)), int(take("gradient_accumulation_steps", 1))
    whole = take("global_batch_size") or micro * accumulation * dp
    if int(whole) % (micro * dp):
        raise PolymodalError(
            f"{given.file}: training.global_batch_size {whole} is no multiple of micro_batch_size {micro} x "
            f"{dp} ranks.",
            "Correct one of them.",
        )
    how = f"{micro} x {int(whole) // (micro * dp)} accumulated x {dp} ranks of {launch.world} processes"
    ledger.write(
        "train.global_batch_size", int(whole), origin("gradient_accumulation_steps"), accumulation, how
    )
    style = str(take("lr_decay_style", "constant"))
    if style in training.SCHEDULES:
        ledger.write("optim.schedule.name", training.SCHEDULES[style], origin("lr_decay_style"), style)
    else:
        ledger.note(
            "unsupported", origin("lr_decay_style"), style, f"known are {', '.join(training.SCHEDULES)}"
        )
    ledger.write("optim.schedule.warmup", float(take("lr_warmup_ratio", 0)), origin("lr_warmup_ratio"))
    least = take("lr_min")
    if least is not None and style == "cosine":
        ratio = float(f"{float(least) / float(take('lr', 5e-5)):.6g}")
        ledger.write("optim.schedule.min_ratio", ratio, origin("lr_min"), least, "lr_min / lr")
    betas = [scalar(take(f"adam_beta{i}", d), origin(f"adam_beta{i}")) for i, d in ((1, 0.9), (2, 0.999))]
    ledger.write("optim.betas", betas, origin("adam_beta1"))
    clip = scalar(take("clip_grad", 1.0), origin("clip_grad"))
    ledger.write("optim.clip_norm", clip or None, origin("clip_grad"), clip, "" if clip else "0 is off")
    name = str(take("optimizer", "adamw"))
    if name in OPTIMIZERS:
        ledger.write("optim.name", OPTIMIZERS[name], origin("optimizer"), name)
    else:
        ledger.note("unsupported", origin("optimizer"), name, f"known are {', '.join(OPTIMIZERS)}")
    if name == "adamw_swap":
        ledger.write(
            "parallel.offload", [*ledger.get("parallel.offload", []), "optimizer"], origin("optimizer"), name
        )
    for key, otherwise, ours in (("train_iters", 10000, "train.steps"), ("lr", 5e-5, "optim.lr")):
        if take(key) is None and not (key == "train_iters" and take("max_epochs")):
            ledger.default(ours, otherwise, origin(key))
    if take("use_deter_comp") or take("enable_full_determinism"):
        ledger.write("train.deterministic", True, origin("use_deter_comp"))
    _checkpoints(launch, given)


def _checkpoints(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    save, every = given.take("training.save"), given.take("training.save_interval", 1)
    if save is not None:
        ledger.write("checkpoint.dir", launch.path(str(save)), given.origin("training.save"))
        ledger.write("checkpoint.every", int(every), given.origin("training.save_interval"))
    if given.take("training.no_save_optim"):
        ledger.write("checkpoint.save", "weights", given.origin("training.no_save_optim"), True)
    if given.take("training.save_format") == "hf":
        ledger.write("checkpoint.export", True, given.origin("training.save_format"), "hf")
    load, fresh = given.take("training.load"), given.take("training.no_load_optim")
    for name in ("no_load_rng", "no_save_rng", "load_format"):
        given.take(f"training.{name}")
    if load is None:
        return
    origin = given.origin("training.load")
    if save is not None and launch.path(str(load)) == launch.path(str(save)) and not fresh:
        ledger.write("checkpoint.resume", "auto", origin, load)
    else:
        training.start_from(launch, str(load), origin, ["no_load_optim"] if fresh else [])


def _model(launch: Launch, given: Given, rows: Given) -> None:
    ledger = launch.ledger
    places = ((given, "model.model_name_or_path"), (given, "model.checkpoint_path"))
    model.source(launch, given, rows, places)
    name = given.take("model.model_id")
    if name is not None:
        ledger.note(
            "checked", given.origin("model.model_id"), name, "the checkpoint's config.json chooses the card"
        )
    frozen = list[str]()
    paths = given.take("model.freeze") or []
    for path in [paths] if isinstance(paths, str) else paths:
        end = str(path).removeprefix("model.").removesuffix(".{*}")
        frozen += FROZEN.get(end, [f"*{end}*"])
    if frozen:
        ledger.write("train.freeze", list(dict.fromkeys(frozen)), given.origin("model.freeze"), paths)
    for section in ("model", "features"):
        loss = given.take(f"{section}.loss_cfg.loss_type")
        if loss is not None:
            ledger.write(
                "train.loss",
                training.LOSSES.get(loss, "per_micro_batch"),
                given.origin(f"{section}.loss_cfg.loss_type"),
                loss,
            )
        router = given.take(f"{section}.loss_cfg.router_aux_loss_coef")
        if router is not None:
            ledger.write(
                "train.router_aux_loss",
                float(router),
                given.origin(f"{section}.loss_cfg.router_aux_loss_coef"),
            )
    if "train.loss" not in ledger.values:
        ledger.default("train.loss", "per_micro_batch", given.origin("loss_cfg.loss_type"))
    kernel = given.take("model.attn_implementation")
    if kernel is not None and kernel in model.ATTENTION:
        ledger.write(
            "model.attention", model.ATTENTION[kernel], given.origin("model.attn_implementation"), kernel
        )
    elif kernel is not None:
        known = ", ".join(model.ATTENTION)
        ledger.note("unsupported", given.origin("model.attn_implementation"), kernel, f"known are {known}")
    if given.take("model.use_grouped_expert_matmul"):
        ledger.write("model.experts", "grouped_mm", given.origin("model.use_grouped_expert_matmul"), True)
    trust = given.take("model.trust_remote_code")
    if trust:
        ledger.note(
            "no effect", given.origin("model.trust_remote_code"), trust, "no model with a card needs it"
        )
