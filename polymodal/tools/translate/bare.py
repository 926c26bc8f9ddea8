"""A config file alone, without the line that names it: recognised by its content.

Files that hold a whole run (the native trainer's YAML, one with gpt_args, an inference or evaluation file)
become what the line of their program would; one that is a part of a set-up (data, model, tool, FSDP2) the
keys of a recipe that it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.tools.translate import data, model, training
from polymodal.tools.translate.launch import Launch, of_words
from polymodal.tools.translate.ledger import Given, Origin, read_config
from polymodal.tools.translate.shell import Word

Holds = Callable[[Mapping[str, Any]], bool]


def _any(*names: str) -> Holds:
    return lambda values: any(name in values for name in names)


_generates = _any("predictor", "load_video_features", "ae")
_speaks = _any("encoder_layers")


WHOLE: dict[
    str, tuple[Holds, str | None]
] = {  # program -> (what its file holds, the flag that names the file)
    "pretrain_transformers.py": (_any("gpt_args"), None),
    "trainer.py": (lambda v: "training" in v and ("model" in v or "parallel" in v), None),
    "evaluate_vlm.py": (_any("evaluation_dataset"), "--mm-model"),
    "inference_sora.py": (lambda v: "pipeline_class" in v and "save_path" in v, "--mm-model"),
    "inference_vlm.py": (_any("pipeline_class"), "--mm-model"),
}
PARTS: dict[str, Holds] = {
    "data": _any("dataset_param"),
    "tool": _any("profile", "memory_profile", "sorafeature"),
    "model": lambda v: _generates(v) or _speaks(v) or "image_encoder" in v or "text_decoder" in v,
    "fsdp2": _any("sharding_size", "sub_modules_to_wrap", "num_to_forward_prefetch", "recompute_modules"),
    "layerzero": _any("zero3_size", "transformer_layers"),
}
NAMED = ("model_name_or_path", "processor_name_or_path")  # keys of data files that name the hub's directory


def launch(path: Path, nodes: int | None, source: str | None) -> Launch:
    """The launch that a config file stands for. Raises PolymodalError for a file of none of these kinds."""
    values = read_config(path)
    entry = next((name for name, (holds, _) in WHOLE.items() if holds(values)), None)
    if entry is not None:
        flag = WHOLE[entry][1]
        words = ["torchrun", entry, *([flag] if flag else []), str(path)]
        found = of_words([Word(word, 0) for word in words], str(path), nodes, source)
        found.root = Path()
        if flag is None:
            found.notes.append(
                f"{path} does not say how many processes there are: sizes of batches are for {found.world}; "
                "translate the start script, or name the global batch in the recipe"
            )
        return found
    part = next((name for name, holds in PARTS.items() if holds(values)), None)
    if part is None:
        raise PolymodalError(
            f"{path} is no config file that is known here (keys: {', '.join(map(str, [*values][:6]))}).",
            "Known are data, model, tool and FSDP2 files, those of inference and evaluation, and trainers' "
            "YAML; for others name the start script.",
        )
    flags = Given("flags", str(path), {})
    known = Launch(str(path), part, "part", flags, flags, [], {}, Path(), 1, nodes or 1, source)
    known.notes.append(f"{path} is the {part} file of a set-up: the start script that names it has the rest")
    return known


def translate(launch: Launch) -> None:
    """Fill the ledger from the one file."""
    values = read_config(Path(launch.file))
    nothing, sizes = Given("chat_data", launch.file, {}), {"tp": 1, "pp": 1, "cp": 1, "virtual": 1}
    if launch.entry in ("fsdp2", "layerzero"):
        _sharding(launch, values)
        return
    kind = {
        "data": lambda: training.data_kind(launch, values),
        "model": lambda: (
            "denoiser_model" if _generates(values) else "speech_model" if _speaks(values) else "chat_model"
        ),
        "tool": lambda: "tool",
    }[launch.entry]()
    given = Given(kind, launch.file, values)
    if kind == "tool":
        training.profile(launch, given)
        features = given.take("sorafeature.save_path")
        if features is not None:
            launch.ledger.write("data.features", str(features), given.origin("sorafeature.save_path"))
    elif kind in ("clip_data", "feature_data"):
        data.clips(launch, given)
    elif kind in ("audio_data", "chat_data"):
        (data.speech if kind == "audio_data" else data.chat)(launch, given)
        if any(given.has(f"dataset_param.preprocess_parameters.{key}") for key in NAMED):
            model.source(launch, Given("chat_model", launch.file, {}), given)
    else:
        _model(launch, given, nothing, sizes)
    given.report_rest(launch.ledger)


def _model(launch: Launch, given: Given, rows: Given, sizes: Mapping[str, int]) -> None:
    named = launch.source
    launch.source = named or "."  # the data file may be what names it: no error here
    if given.kind == "denoiser_model":
        model.denoiser(launch, given, rows)
    elif given.kind == "speech_model":
        launch.source = named
        model.source(launch, given, rows)
        return
    else:
        model.chat(launch, given, rows, sizes)
    launch.source = named
    if named is None:
        launch.ledger.values.pop("model.source")
        launch.ledger.rows = [row for row in launch.ledger.rows if not row.ours.startswith("model.source")]


def _sharding(launch: Launch, values: Mapping[str, Any]) -> None:
    """An FSDP2 or layerzero file; its size of a shard is taken for the number of processes."""
    size = values.get("sharding_size", values.get("zero3_size", 1))
    launch.nproc = size if isinstance(size, int) else 1
    switch = {"fsdp2": "use-torch-fsdp2", "layerzero": "layerzero"}[launch.entry]
    launch.flags.values = {switch: True, f"{launch.entry}-config-path": launch.file}
    if launch.entry == "layerzero":
        launch.flags.values = {switch: True, "layerzero-config": launch.file}
    training.sharding(launch, launch.world, 1)
    if launch.nproc > 1:  # how many such shards there are is not known: no -1 for all ranks
        name = "sharding_size" if "sharding_size" in values else "zero3_size"
        launch.ledger.rows = [row for row in launch.ledger.rows if row.origin.name != name]
        launch.ledger.write("parallel.dp_shard", launch.nproc, Origin(name, launch.file))
    launch.ledger.rows = [
        row for row in launch.ledger.rows if row.origin != Origin(f"--{switch}", launch.file)
    ]


def text(launch: Launch) -> str:
    """The keys as YAML, once the schema accepts them beside a model and data."""
    nested = launch.ledger.nested()
    nested.setdefault("model", {}).setdefault("source", "MODEL")
    nested.setdefault("data", {}).setdefault("datasets", [{"path": "DATA"}])
    recipes.validate(nested)
    head = f"# A part of a recipe, from {launch.file} alone. Behind each key: where it comes from."
    return "\n".join([head, launch.ledger.text(recipes.all_keys())])
