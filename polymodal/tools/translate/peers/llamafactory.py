"""LLaMA-Factory: the YAML or JSON of `llamafactory-cli train`, with overrides, and its dataset_info.json."""

from __future__ import annotations

from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest
from polymodal.tools.translate import data
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import Given, Origin, read_config
from polymodal.tools.translate.peers import trainer
from polymodal.tools.translate.peers.files import checkpoint, finish, settings
from polymodal.tools.translate.peers.trainer import listed, number, truth

COLUMNS = (
    "messages",
    "system",
    "tools",
    "images",
    "videos",
    "audios",
    "prompt",
    "query",
    "response",
    "history",
)
TAGS = {key: ours for key, ours in data.COLUMNS.items() if key.endswith("_tag")}
LOSSES = {name: name for name in ("sigmoid", "hinge", "ipo", "orpo", "simpo")}
PREFERENCE = {
    "loss": "pref_loss",
    "default": "sigmoid",
    "sft": ("pref_ftx",),
    "beta": "pref_beta",
    "smoothing": "dpo_label_smoothing",
    "gamma": 0.5,
}
FREEZE = (  # their key, its default, tower
    ("freeze_vision_tower", True, "vision"),
    ("freeze_multi_modal_projector", True, "projector"),
    ("freeze_language_model", False, "language"),
)


def translate(launch: Launch) -> None:
    given = settings(launch, "train")
    ledger = launch.ledger
    source = given.take("model_name_or_path")
    checkpoint(launch, "model.source", source, given.origin("model_name_or_path"))
    stage, kind = str(given.take("stage", "sft")), str(given.take("finetuning_type", "lora"))
    origin = given.origin("stage")
    if stage in ("dpo", "kto"):
        ledger.write("train.objective", stage, origin)
    elif stage not in ("sft", "pt"):
        ledger.note("unsupported", origin, stage, "sft, pt, dpo and kto are translated")
    if given.take("do_train") is False:
        ledger.note("unsupported", given.origin("do_train"), False, "only training is translated")
    frozen = [tower for key, otherwise, tower in FREEZE if truth(given.take(key, otherwise))]
    if kind == "lora":
        towers = [tower for tower in ("language", "vision", "projector") if tower not in frozen]
        names = {
            "rank": "lora_rank",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "targets": "lora_target",
        }
        trainer.adapters(launch, given, names, {"rank": 8}, towers)
        bits, method = given.take("quantization_bit"), str(given.take("quantization_method", "bnb"))
        nf4 = str(given.take("quantization_type", "nf4")) == "nf4" and method in ("bnb", "bitsandbytes")
        if bits is not None:
            kind = {"4": "nf4" if nf4 else None, "8": "int8"}.get(str(bits))
            trainer.base(launch, kind, given.origin("quantization_bit"), bits)
        for key, _, tower in FREEZE:
            if given.has(key):
                how = "without" if tower in frozen else "with"
                ledger.note("mapped", given.origin(key), given.peek(key), f"model.lora.towers: {how} {tower}")
    elif kind == "full":
        trainer.freeze(launch, given, FREEZE)
    else:
        ledger.note("unsupported", given.origin("finetuning_type"), kind, "lora and full are known")
    start = given.take("adapter_name_or_path")
    if start is not None:
        checkpoint(launch, "checkpoint.init_from", start, given.origin("adapter_name_or_path"))
    if stage == "dpo":
        trainer.preference(launch, given, LOSSES, PREFERENCE)
    if stage == "kto":
        for key, ours, otherwise in (
            ("pref_beta", "beta", 0.1),
            ("kto_chosen_weight", "desirable_weight", 1.0),
            ("kto_rejected_weight", "undesirable_weight", 1.0),
        ):
            ledger.write(f"train.preference.{ours}", number(given, key, otherwise), given.origin(key))
    _rows(launch, given, stage)
    _sizes(launch, given)
    trainer.arguments(launch, given, {"recompute": True})
    finish(launch, given)


def _rows(launch: Launch, given: Given, stage: str) -> None:
    ledger = launch.ledger
    directory = str(given.take("dataset_dir", "data"))
    most = number(given, "max_samples", None, int)
    media = given.take("media_dir", directory)
    for key, ours in (("dataset", "data.datasets"), ("eval_dataset", "data.validation")):
        names, origin = listed(given.take(key)), given.origin(key)
        if not names:
            continue
        info_file = launch.open(f"{directory}/dataset_info.json")
        info = read_config(info_file)
        sets = [_dataset(launch, name, info, str(info_file), directory, origin, stage) for name in names]
        for each in sets:
            each["max_samples"] = min(each.get("max_samples", most or 0) or most or 0, most or 10**9) or None
            each["media_dir"] = launch.path(str(media))
        shares = listed(given.take("interleave_probs"))
        if shares and key == "dataset":
            for each, share in zip(sets, shares, strict=False):
                each["weight"] = float(share)
            ledger.note("mapped", given.origin("interleave_probs"), shares, "data.datasets.N.weight")
        sets = [{name: value for name, value in each.items() if value is not None} for each in sets]
        ledger.write(ours, sets, origin, names, f"as {info_file} describes them")
    if "data.datasets" not in ledger.values:
        raise PolymodalError(f"{launch.file}: it names no data.", "Add `dataset` to it.")
    if most:
        ledger.note("mapped", given.origin("max_samples"), most, "data.datasets.N.max_samples")
    length = number(given, "cutoff_len", 2048, int)
    why = "longer rows are cut there, left out here"
    if given.has("cutoff_len"):
        ledger.write("data.max_length", length, given.origin("cutoff_len"), why=why)
    else:
        ledger.default("data.max_length", length, given.origin("cutoff_len"), why)
    packing = given.take("packing")
    if truth(given.take("neat_packing")) or truth(packing) or (packing is None and stage == "pt"):
        key = "neat_packing" if given.has("neat_packing") else "packing"
        why = "" if key == "neat_packing" else "samples do not see each other here"
        ledger.write("data.pack", True, given.origin(key), True, why)
    _learned(launch, given, stage)
    share = given.take("val_size")
    if share is not None and float(share) > 0:
        why = "hold rows out in a file of their own, and name it in data.validation"
        ledger.note("unsupported", given.origin("val_size"), share, why)


def _learned(launch: Launch, given: Given, stage: str) -> None:
    ledger = launch.ledger
    everything, last = truth(given.take("train_on_prompt")), truth(given.take("mask_history"))
    if everything and last:
        why = "it and train_on_prompt exclude each other"
        ledger.note("unsupported", given.origin("mask_history"), True, why)
    elif everything or last:
        key = "train_on_prompt" if everything else "mask_history"
        ledger.write("data.train_on", "all" if everything else "last", given.origin(key), True)
    template, origin = str(given.take("template", "")), given.origin("template")
    if template in ("default", "empty"):
        ledger.note("unsupported", origin, template, "give its text as data.chat_template")
    elif template:
        ledger.note("checked", origin, template, "the checkpoint's chat template is used")
    thinking = given.take("enable_thinking")
    if thinking is not None or template.endswith("_nothink"):
        key = "enable_thinking" if thinking is not None else "template"
        kwargs = {"enable_thinking": truth(thinking)}
        ledger.write("data.template_kwargs", kwargs, given.origin(key), given.peek(key))
    if truth(given.take("split_special_tokens")):
        ledger.write("data.special_tokens", "text", given.origin("split_special_tokens"), True)
    if truth(given.take("disable_shuffling")):
        ledger.write("data.shuffle", False, given.origin("disable_shuffling"), True)


def _dataset(
    launch: Launch, name: str, info: dict[str, Any], file: str, directory: str, origin: Origin, stage: str
) -> dict[str, Any]:
    """One entry of dataset_info.json as an entry of data.datasets."""
    entry = info.get(name)
    if not isinstance(entry, dict):
        near = nearest(name, info)
        raise PolymodalError(
            f"{file}: the data set {name} is not in it.",
            f"Did you mean {near[0]}?" if near else f"It has {', '.join(list(info)[:8])}.",
        )
    given = Given("dataset_info", file, entry)
    where = Origin(name, file)
    path = given.take("file_name")
    if path is None:
        hub = given.take("hf_hub_url") or given.take("ms_hub_url") or given.take("om_hub_url")
        raise PolymodalError(
            f"{file}: the data set {name} ({hub or 'a script'}) is not on this machine.",
            f"Fetch it with `hf download --repo-type dataset {hub or 'ID'}` and name its file as file_name.",
        )
    out: dict[str, Any] = {"name": name, "path": trainer.dataset(launch, name, f"{directory}/{path}", where)}
    ranked = bool(given.take("ranking"))
    form = str(given.take("formatting", "alpaca"))
    if stage in ("dpo", "kto") or ranked:
        out["format"] = "preference"
    elif form in ("alpaca", "sharegpt", "openai"):
        out["format"] = "text" if stage == "pt" else form
    else:
        launch.ledger.note(
            "unsupported", given.origin("formatting"), form, "alpaca, sharegpt and openai are known"
        )
    most = given.take("num_samples")
    if most is not None:
        out["max_samples"] = int(most)
    columns = {**given.take("columns", {})}
    tags = {**given.take("tags", {})}
    attr = {ours: columns.pop(ours) for ours in (*COLUMNS, "chosen", "rejected") if ours in columns}
    if "kto_tag" in columns:
        attr["label"] = columns.pop("kto_tag")
    attr |= {ours: tags.pop(key) for key, ours in TAGS.items() if key in tags}
    tags.pop("system_tag", None)
    if form == "sharegpt" and "messages" not in attr and not ranked:
        attr.setdefault("messages", "conversations")
    if stage == "pt" and "prompt" in attr:
        attr = {"prompt": attr["prompt"]}
    for key, value in {**columns, **tags}.items():
        launch.ledger.note("unsupported", Origin(key, file), value, "no such column or tag is known")
    if attr:
        out["attr"] = attr
    given.report_rest(launch.ledger)
    return out


def _sizes(launch: Launch, given: Given) -> None:
    """Sizes of pictures and videos; they are always written, the trainer resizes before the processor."""
    for key, ours, otherwise in (
        ("image_max_pixels", "data.image.max_pixels", 768 * 768),
        ("image_min_pixels", "data.image.min_pixels", 32 * 32),
        ("video_max_pixels", "data.video.max_pixels", 256 * 256),
        ("video_min_pixels", "data.video.min_pixels", 16 * 16),
        ("video_fps", "data.video.fps", 2.0),
        ("video_maxlen", "data.video.max_frames", 128),
    ):
        value = number(given, key, None, float if key == "video_fps" else int)
        if value is not None:
            launch.ledger.write(ours, value, given.origin(key))
        elif otherwise not in (2.0, 128):
            launch.ledger.default(ours, otherwise, given.origin(key))
    if truth(given.take("use_audio_in_video")):
        launch.ledger.write("data.video.sound", True, given.origin("use_audio_in_video"))
