"""TRL: `trl sft`, `dpo` and `kto` command lines with their YAML."""

from __future__ import annotations

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.peers import trainer
from polymodal.tools.translate.peers.files import checkpoint, finish, settings
from polymodal.tools.translate.peers.trainer import number, truth

RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6}


def translate(launch: Launch) -> None:
    verb = launch.positional[0].text if launch.positional else ""
    if verb not in RATES:
        raise PolymodalError(
            f"{launch.file}: trl {verb or 'without a trainer'} is not translated.",
            'Give the whole line: polymodal translate "trl sft ..." (sft, dpo or kto).',
        )
    given, ledger = settings(launch, verb), launch.ledger
    checkpoint(launch, "model.source", given.take("model_name_or_path"), given.origin("model_name_or_path"))
    revision = given.take("model_revision", "main")
    if revision != "main":
        ledger.write("model.revision", revision, given.origin("model_revision"))
    if truth(given.take("use_peft")):
        ledger.note("mapped", given.origin("use_peft"), True, "model.lora")
        names = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        names["targets"] = "lora_target_modules"
        own = {"rank": 16, "alpha": 32, "dropout": 0.05}
        trainer.adapters(launch, given, names, own, ["language"])
        if not given.has("lora_target_modules"):
            why = "all linear layers of the language tower here, the model's few usual ones there"
            ledger.note("changed", given.origin("lora_target_modules"), "absent", why)
    name, origin = given.take("dataset_name"), given.origin("dataset_name")
    if name is None:
        raise PolymodalError(f"{launch.file}: it names no data.", "Add `dataset_name` to it.")
    ledger.write(
        "data.datasets", [{"path": trainer.dataset(launch, str(name), str(name), origin)}], origin, name
    )
    given.take("dataset_train_split")
    length = number(given, "max_length", 1024, int)
    if length:
        why = "longer rows are cut there, left out here"
        if given.has("max_length"):
            ledger.write("data.max_length", length, given.origin("max_length"), why=why)
        else:
            ledger.default("data.max_length", length, given.origin("max_length"), why)
    if truth(given.take("packing")):
        ledger.write("data.pack", True, given.origin("packing"), True)
    if verb == "sft":
        answers = truth(given.take("assistant_only_loss")) or truth(given.take("completion_only_loss"))
        key = "assistant_only_loss" if given.has("assistant_only_loss") else "completion_only_loss"
        if given.has(key):
            ledger.write(
                "data.train_on", "assistant" if answers else "all", given.origin(key), given.peek(key)
            )
        else:
            why = (
                "rows of messages are learned whole there; rows with prompt and completion only in the latter"
            )
            ledger.default("data.train_on", "all", given.origin("assistant_only_loss"), why)
    else:
        ledger.write("train.objective", verb, trainer.Origin(f"trl {verb}", launch.file))
        if verb == "dpo":
            trainer.preference(launch, given, trainer.LOSSES, trainer.PREFERENCE)
        else:
            trainer.unpaired(launch, given)
    for key, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if truth(given.take(key)):
            trainer.base(launch, kind, given.origin(key), True)
    own = {"lr": RATES[verb], "recompute": True, "bf16": True, "log": 10}
    trainer.arguments(launch, given, own)
    finish(launch, given)
