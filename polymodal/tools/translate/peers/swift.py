"""ms-swift: `swift sft`, `pt` and `rlhf` command lines and their YAML files."""

from __future__ import annotations

import json
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import TABLES, Given, Origin
from polymodal.tools.translate.peers import trainer
from polymodal.tools.translate.peers.files import checkpoint, finish, settings
from polymodal.tools.translate.peers.trainer import listed, number, truth

FREEZE = (
    ("freeze_vit", True, "vision"),
    ("freeze_aligner", True, "projector"),
    ("freeze_llm", False, "language"),
)
COLUMNS = {
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "messages": "messages",
    "query": "query",
}
COLUMNS |= {"response": "response", "system": "system", "rejected_response": "rejected", "objects": "objects"}
LEARNED = {"default": "assistant", "last_round": "last", "all": "all"}
LONG = {"delete": "drop", "raise": "error", "split": "split"}
ENVIRONMENT = {  # variables that set sizes there -> recipe key
    "MAX_PIXELS": "data.image.max_pixels",
    "MIN_PIXELS": "data.image.min_pixels",
    "VIDEO_MAX_PIXELS": "data.video.max_pixels",
    "VIDEO_MIN_PIXELS": "data.video.min_pixels",
    "FPS": "data.video.fps",
    "FPS_MAX_FRAMES": "data.video.max_frames",
    "FPS_MIN_FRAMES": "data.video.min_frames",
}


def translate(launch: Launch) -> None:
    verb = (
        launch.positional[0].text
        if launch.positional
        else ("rlhf" if launch.flags.has("rlhf_type") else "sft")
    )
    if verb not in ("sft", "pt", "rlhf") and not verb.endswith((".yaml", ".yml", ".json")):
        raise PolymodalError(
            f"{launch.file}: swift {verb} is not translated.", "Training is: swift sft, swift pt, swift rlhf."
        )
    given, ledger = settings(launch, verb), launch.ledger
    checkpoint(launch, "model.source", given.take("model"), given.origin("model"))
    key = "tuner_type" if given.has("tuner_type") else "train_type"
    kind = str(given.take(key, "lora"))
    full = kind == "full"
    if kind == "lora":
        _adapters(launch, given)
    elif full:
        trainer.freeze(launch, given, FREEZE)
    else:
        ledger.note("unsupported", given.origin(key), kind, "lora and full are known")
    if verb == "rlhf" or given.has("rlhf_type"):
        _preferences(launch, given)
    elif given.has("loss_type"):
        why = "own losses: train.objective"
        ledger.note("unsupported", given.origin("loss_type"), given.take("loss_type"), why)
    _rows(launch, given, "pt" if verb == "pt" else "")
    _environment(launch)
    own = {
        "batch": 1,
        "samples": 16,
        "lr": 1e-5 if full else 1e-4,
        "schedule": "cosine",
        "decay": 0.1,
        "betas": (0.9, 0.95),
        "recompute": True,
        "dtype": "bfloat16",
        "log": 5,
        "warmup": 0.0,
    }
    trainer.arguments(launch, given, own)
    _towers(launch, given)
    finish(launch, given)


def _adapters(launch: Launch, given: Given) -> None:
    frozen = [tower for key, otherwise, tower in FREEZE if truth(given.take(key, otherwise))]
    names = {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "target_modules",
    }
    towers = [tower for tower in ("language", "vision", "projector") if tower not in frozen]
    trainer.adapters(launch, given, names, {"rank": 8, "alpha": 32, "dropout": 0.05}, towers)
    for key, _, tower in FREEZE:
        if given.has(key):
            how = "without" if tower in frozen else "with"
            launch.ledger.note(
                "mapped", given.origin(key), given.peek(key), f"model.lora.towers: {how} {tower}"
            )
    init = str(given.take("init_weights", "true")).lower()
    if init == "gaussian":
        launch.ledger.write("model.lora.init", init, given.origin("init_weights"))
    elif init != "true":
        launch.ledger.note("unsupported", given.origin("init_weights"), init, "true and gaussian are known")
    bits, method = given.take("quant_bits"), str(given.take("quant_method", "bnb"))
    if bits is not None:
        kind = {"4": "nf4", "8": "int8"}.get(str(bits)) if method == "bnb" else None
        trainer.base(launch, kind, given.origin("quant_bits"), bits)
    start = listed(given.take("adapters"))
    if len(start) == 1:
        checkpoint(launch, "checkpoint.init_from", start[0], given.origin("adapters"))
    elif start:
        launch.ledger.note("unsupported", given.origin("adapters"), start, "one adapter can be started from")


def _preferences(launch: Launch, given: Given) -> None:
    ledger, kind = launch.ledger, str(given.take("rlhf_type", "dpo"))
    origin = given.origin("rlhf_type")
    if kind in ("dpo", "kto"):
        ledger.write("train.objective", kind, origin)
    elif kind in ("orpo", "simpo"):
        ledger.write("train.objective", "dpo", origin, kind, f"train.preference.loss: {kind}")
        given.values["loss_type"] = kind
    else:
        ledger.note("unsupported", origin, kind, "dpo, kto, orpo and simpo are translated")
        return
    if kind == "kto":
        trainer.unpaired(launch, given)
        return
    own = dict(trainer.PREFERENCE)
    if kind == "simpo":
        own |= {"beta_default": 2.0, "gamma": 1.0, "sft": ("cpo_alpha",)}
        if not given.has("cpo_alpha"):
            given.values["cpo_alpha"] = 1.0  # its default adds the answer's own loss
    trainer.preference(launch, given, {**trainer.LOSSES, "orpo": "orpo", "simpo": "simpo"}, own)


def _rows(launch: Launch, given: Given, stage: str) -> None:
    ledger = launch.ledger
    columns = given.take("columns")
    attr = dict[str, str]()
    if columns:
        columns = json.loads(columns) if isinstance(columns, str) else columns
        for name, meaning in columns.items():
            if meaning in COLUMNS:
                attr[COLUMNS[meaning]] = name
            else:
                ledger.note("unsupported", given.origin("columns"), meaning, "no such column is known")
        ledger.note("mapped", given.origin("columns"), columns, "data.datasets.N.attr")
    for key, ours in (("dataset", "data.datasets"), ("val_dataset", "data.validation")):
        names, origin = listed(given.take(key)), given.origin(key)
        sets = [_dataset(launch, name, origin, attr, stage) for name in names]
        if sets:
            ledger.write(ours, sets, origin, names)
    if "data.datasets" not in ledger.values:
        raise PolymodalError(f"{launch.file}: it names no data.", "Add `dataset` to it.")
    share = number(given, "split_dataset_ratio", 0.0)
    if share:
        why = "hold rows out in a file of their own, and name it as val_dataset"
        ledger.note("unsupported", given.origin("split_dataset_ratio"), share, why)
    length = number(given, "max_length", None, int)
    if length:
        ledger.write("data.max_length", length, given.origin("max_length"))
    else:
        ledger.default("data.max_length", 32768, given.origin("max_length"), "the model's own limit there")
    long = str(given.take("truncation_strategy", "delete"))
    if long in LONG:
        if given.has("truncation_strategy"):
            ledger.write("data.overlong", LONG[long], given.origin("truncation_strategy"), long)
    else:
        why = "rows are left out or split here, never cut"
        ledger.note("changed", given.origin("truncation_strategy"), long, why)
    if truth(given.take("packing")):
        ledger.write("data.pack", True, given.origin("packing"), True)
        length = number(given, "packing_length", None, int)
        if length:
            ledger.write("data.pack_length", length, given.origin("packing_length"))
    if truth(given.take("padding_free")):
        ledger.note("no effect", given.origin("padding_free"), True, "batches are never padded here")
    learned = str(given.take("loss_scale", "default"))
    if learned in LEARNED:
        if given.has("loss_scale"):
            ledger.write("data.train_on", LEARNED[learned], given.origin("loss_scale"), learned)
    else:
        ledger.note("unsupported", given.origin("loss_scale"), learned, f"known are {', '.join(LEARNED)}")
    thinking = given.take("enable_thinking")
    if thinking is not None:
        kwargs = {"enable_thinking": truth(thinking)}
        ledger.write("data.template_kwargs", kwargs, given.origin("enable_thinking"), thinking)
    if given.has("dataset_shuffle") or given.has("train_dataloader_shuffle"):
        key = "dataset_shuffle" if given.has("dataset_shuffle") else "train_dataloader_shuffle"
        ledger.write("data.shuffle", truth(given.take(key)), given.origin(key))


def _dataset(launch: Launch, text: str, origin: Origin, attr: dict[str, str], stage: str) -> dict[str, Any]:
    """`path#500` or `hub-id:subset#500` as an entry of data.datasets."""
    name, _, most = text.partition("#")
    out: dict[str, Any] = {"path": trainer.dataset(launch, name, name, origin)}
    if most:
        if not most.isdigit():
            raise PolymodalError(
                f"{origin.file}:{origin.line}: {text} does not end in a number.", "Write e.g. rows.jsonl#500."
            )
        out["max_samples"] = int(most)
    if stage == "pt":
        out["format"] = "text"
    if attr:
        out["attr"] = attr
    return out


def _environment(launch: Launch) -> None:
    for name, ours in ENVIRONMENT.items():
        value = launch.variables.pop(name, None)
        if value is not None:
            number = float(value.text) if ours.endswith("fps") else int(float(value.text))
            launch.ledger.write(ours, number, Origin(name, launch.file, value.line))
    for name in TABLES["swift"]["environment"]:
        launch.variables.pop(name, None)


def _towers(launch: Launch, given: Given) -> None:
    """Own learning rates of the vision tower and the projector."""
    groups = list[dict[str, Any]]()
    for key, tower in (("vit_lr", "vision"), ("aligner_lr", "projector")):
        rate = number(given, key)
        if rate is not None:
            groups.append({"match": tower, "lr": rate})
    if groups:
        key = "vit_lr" if given.has("vit_lr") else "aligner_lr"
        launch.ledger.write("optim.groups", groups, given.origin(key), given.peek(key))
        if given.has("vit_lr") and given.has("aligner_lr"):
            launch.ledger.note("mapped", given.origin("aligner_lr"), given.peek("aligner_lr"), "optim.groups")
