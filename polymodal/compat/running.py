"""`polymodal-compat run ENTRY ...`: a documented command line, translated and run in this process.

Every process of torchrun's world translates for itself, so that all of them refuse alike and none waits for
another; rank 0 alone prints. What is run is the one command of ours that the line means.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from polymodal.compat import other_programs, outputs
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.runtime import launcher, process_group
from polymodal.runtime.process_group import LaunchRequest, ProcessInfo
from polymodal.tools.translate import command as translator
from polymodal.tools.translate.launch import Launch, of_words
from polymodal.tools.translate.ledger import Origin
from polymodal.tools.translate.shell import Value, Word

LINE = "polymodal.compat.lines:IterationLine"
TREE, DIRECTORY = "polymodal.compat.tree:Tree", "polymodal.compat.tree:Directory"
SOURCE = "POLYMODAL_SOURCE"
"""Variable that names the model's hub directory where the line's files name none."""
READ = ("HCCL_DETERMINISTIC",)
"""Variables of the shell that mean a key of the recipe; others do what they do by being set."""


def run(entry: str, arguments: Sequence[str], tree: bool = False) -> int:
    """The exit code. tree: training also writes a tree. Raises PolymodalError for what has no translation."""
    other = other_programs.find(entry)
    if other is not None:
        return other(arguments)
    process = this_process()
    launch = translated_launch(entry, arguments, process)
    try:
        words = translator.fill(launch)
    except PolymodalError as error:
        raise PolymodalError(
            error.message, error.hint.replace("--source DIR", f"{SOURCE}=DIR in the environment")
        ) from None
    translator.refuse(
        launch, "(Correct them; `polymodal translate` with the start script shows all of them, with lines.)"
    )
    if words is None and launch.kind != "encode":
        _for_one_command(launch)
        _callbacks(launch, tree)
    if process.rank == 0:
        show(launch, words)
    if words is None:
        return _recipe(launch, process)
    return _command(launch, words, process)


def this_process() -> ProcessInfo:
    """This process in its launcher's world. No second launcher: without one it is alone, whatever
    NPUS_PER_NODE says."""
    found = process_group.from_environment()
    if isinstance(found, LaunchRequest):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        found = process_group.from_environment()
    assert isinstance(found, ProcessInfo)
    return found


def translated_launch(entry: str, arguments: Sequence[str], process: ProcessInfo) -> Launch:
    """The launch that the script's line would be, with the world that this process is in."""
    words = [Word(text, 0) for text in ("torchrun", entry, *arguments)]
    launch = of_words(words, "the command line", None, None)
    launch.source = os.environ.get(SOURCE)
    launch.root = Path()  # the program resolves paths from where it is called
    launch.nodes = process.nodes
    launch.nproc = process.world // process.nodes
    launch.variables = {name: Value(os.environ[name], 0, True) for name in READ if name in os.environ}
    if launch.kind == "diffusers":
        launch.accelerate = _accelerate()
    return launch


def _accelerate() -> dict[str, object]:
    """What `accelerate launch` read in its file, as it leaves it in the environment of its processes."""
    environ = os.environ
    found: dict[str, object] = {}
    if environ.get("ACCELERATE_MIXED_PRECISION"):
        found["mixed_precision"] = environ["ACCELERATE_MIXED_PRECISION"]
    if environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        found["use_cpu"] = True
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        deep: dict[str, object] = {}
        for name, key in (
            ("ZERO_STAGE", "zero_stage"),
            ("OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device"),
            ("OFFLOAD_PARAM_DEVICE", "offload_param_device"),
            ("CONFIG_FILE", "deepspeed_config_file"),
        ):
            value = environ.get(f"ACCELERATE_DEEPSPEED_{name}")
            if value not in (None, "", "none"):
                deep[key] = int(value) if value.isdigit() else value
        if environ.get("ACCELERATE_GRADIENT_CLIPPING") not in (None, "none"):
            deep["gradient_clipping"] = environ["ACCELERATE_GRADIENT_CLIPPING"]
        found |= {"distributed_type": "DEEPSPEED", "deepspeed_config": deep}
    elif environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        names = ("SHARDING_STRATEGY", "OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING")
        fsdp = {f"fsdp_{name.lower()}": environ.get(f"FSDP_{name}") for name in names}
        values = {key: {"true": True, "false": False}.get(str(v).lower(), v) for key, v in fsdp.items() if v}
        found |= {"distributed_type": "FSDP", "fsdp_config": values}
    return found


def _for_one_command(launch: Launch) -> None:
    """Features of a script that encodes and trains in one command are made as it trains."""
    ledger = launch.ledger
    if launch.kind == "diffusers" and ledger.get("data.encode") == "cached":
        why = "encoded while it trains; `polymodal encode` with the recipe of `polymodal translate` caches"
        ledger.write("data.encode", "online", launch.where("cache_latents"), True, why)


def _callbacks(launch: Launch, tree: bool) -> None:
    ledger, origin = launch.ledger, Origin("the lines that scripts read", launch.file)
    shards = launch.kind == "native" or bool(launch.flags.values.get("use-torch-fsdp2"))
    own = DIRECTORY if shards and launch.kind != "train-generation" else TREE
    ledger.values["train.callbacks"] = ([LINE, *([own] if tree else [])], str(origin))
    if not tree:
        return
    if "model.lora.rank" in ledger.values:
        raise PolymodalError(
            f"{launch.file}: adapters are trained, and a tree holds a whole model.",
            "Run it without the option of `polymodal-compat run --tree`; `polymodal export RUN DIR "
            "--merge-lora` writes the merged model.",
        )
    ledger.values["checkpoint.export"] = (True, "--tree")


def show(launch: Launch, words: Sequence[str] | None) -> None:
    """The table in short: how many names became what, those that changed, and notes."""
    rows = launch.ledger.rows
    counts = Counter(row.kind for row in rows)
    ours = shlex.join(words) if words else f"polymodal {'encode' if launch.kind == 'encode' else 'train'}"
    say(f"{launch.entry}: {ours} ({', '.join(f'{count} {kind}' for kind, count in counts.items())})")
    for row in rows:
        if row.why and (row.kind == "changed" or row.why.startswith("DIFFERS")):
            ours = f"{row.ours} ({row.why})" if row.ours else row.why
            given = row.origin.short if row.value is True else f"{row.origin.short} {row.value}"
            say(f"  {given}: {ours}")
    for note in launch.notes:
        say(f"note: {note}")


def _recipe(launch: Launch, process: ProcessInfo) -> int:
    from polymodal import recipe as recipes
    from polymodal.cli import generation, training

    recipe = recipes.validate(launch.ledger.nested())
    if launch.kind != "encode":
        return training.start(recipe)
    code = generation.start_encoding(recipe)
    if code == 0 and process.rank == 0:
        outputs.encoded(Path(str(recipe.data.features)))
    return code


def _command(launch: Launch, words: Sequence[str], process: ProcessInfo) -> int:
    """A command of ours, which joins the world by itself; `chat` has one process, the first."""
    from polymodal.cli import app

    own = [*words[1:]]
    if "--nproc" in own:
        at = own.index("--nproc")
        del own[at : at + 2]
    if launch.kind == "evaluate":  # ours has a directory for each evaluation
        at = own.index("--out") + 1 if "--out" in own else len(own) + 1
        own[at - 1 :] = [
            "--out",
            str(Path(own[at] if at < len(own) else ".") / outputs.sheet_stem(launch)),
            *own[at + 1 :],
        ]
    if launch.kind == "chat":
        if process.rank != 0:
            return 0
        for name in launcher.CHILD_VARIABLES:
            os.environ.pop(name, None)
    code = app(own, prog_name="polymodal", standalone_mode=False) or 0
    if code == 0 and process.rank == 0:
        outputs.name(launch, own)
    return code
