"""The one command. Each sub-command is a few lines into the package; everything heavy is imported inside them.

Sees every room. A PolymodalError is one message on stderr and exit code 2; Ctrl-C is 130; a traceback is a bug.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from polymodal import cli_cluster
from polymodal.errors import PolymodalError

FORMATS = ("auto", "mllm", "llava", "sharegpt", "alpaca", "openai", "text", "caption")

HELP = ["-h", "--help"]
app = typer.Typer(
    name="polymodal",
    help="Train multimodal models: hub checkpoints in, one recipe, any number of devices, hub checkpoints out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP},
)
data_app = typer.Typer(help="Convert, check and look at data files.", no_args_is_help=True)
recipe_app = typer.Typer(
    help="The recipe's schema and documentation; a recipe with everything resolved.", no_args_is_help=True
)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")


def command(group: typer.Typer, *examples: str, name: str | None = None) -> Callable[[Callable], Callable]:
    """A sub-command with examples in its help, whose errors are one message."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            raise typer.Exit(guard(lambda: function(*args, **kwargs)))

        epilog = "\n\n".join(["Example:" if len(examples) == 1 else "Examples:", *examples])
        group.command(name, epilog=epilog)(run)
        return function

    return wrap


def guard(action: Callable[[], int | None]) -> int:
    """Runs `action`; its exit code, or the one of the error that was printed."""
    try:
        from polymodal import spawn

        try:
            try:
                return action() or 0
            except OSError as error:
                from polymodal import machine

                said = machine.full_disk(error)
                if said is None:
                    raise
                raise said from None
        except PolymodalError as error:
            if spawn.record(error):
                start = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
                print(start, error, file=sys.stderr)
            return error.code
        except spawn.Stopped as stopped:
            return stopped.code
        except BrokenPipeError:  # who read the output has enough (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1  # as typer and rich do
        except Exception as error:
            if spawn.record(error):
                raise
            return 1
    except KeyboardInterrupt:
        return 130


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises PolymodalError for a value that is none of those allowed."""
    if value not in allowed:
        raise PolymodalError(
            f"{option} {value} is not known.", f"Use {', '.join(allowed[:-1])} or {allowed[-1]}."
        )


def spread(
    nproc: str | None,
    run_dir: str | os.PathLike | None,
    here: Callable[[], int],
    kind: str = "auto",
    restarts: int = 0,
    min_nodes: int | None = None,
) -> int:
    """Run this very command line in as many processes as asked (`here` in each of them), or join and run `here`."""
    from polymodal import launch, spawn

    if spawn.CHILD in os.environ:
        return here()
    target = launch.place(launch.default_nproc(nproc, kind))
    if isinstance(target, launch.Place) or (target.nproc * target.nodes == 1 and not restarts):
        return here()
    if min_nodes is not None and min_nodes > target.nodes:
        raise PolymodalError(
            f"--min-nodes {min_nodes} is more than the {target.nodes} nodes of this run.",
            "Set NNODES to the nodes there are, or lower --min-nodes.",
        )
    for warning in spawn.before_start(run_dir, target):
        print("warning:", warning, file=sys.stderr)
    command = ["-m", "polymodal", *sys.argv[1:]]
    return spawn.run(command, target, restarts=restarts, min_nodes=min_nodes)


def _version(wanted: bool) -> None:
    if wanted:
        from polymodal import __version__

        print(f"polymodal {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# One line an option reads best.
# fmt: off
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Keys of the recipe to set.", show_default=False)]
Processes = Annotated[str | None, typer.Option("--nproc", metavar="N", help="Processes to start on this node; auto = one a device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or the accelerator's kind.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Other = Annotated[str | None, typer.Option("--with", metavar="RUN", help="Run of the other denoiser (Wan2.2 A14B).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Ema = Annotated[bool, typer.Option("--ema", help="Use a run's averaged weights.")]
Base = Annotated[str | None, typer.Option(metavar="DIR", help="Where the base model of an adapter or a run lies now.")]
MediaDir = Annotated[str | None, typer.Option(metavar="DIR", help="Directory that relative media paths start from.")]
DataFormat = Annotated[str, typer.Option(help="auto, mllm, llava, sharegpt, alpaca or openai.")]


@command(app, "polymodal train recipe.yaml --nproc 8", "polymodal train recipe.yaml train.steps=100 optim.lr=2e-5", "torchrun --nproc-per-node 8 -m polymodal train recipe.yaml")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    restarts: Annotated[int, typer.Option(metavar="N", min=0, help="Times to start again from the newest checkpoint after a process died.")] = 0,
    min_nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Nodes that are enough to go on with.", show_default="all")] = None,
) -> int:
    """Train as a recipe says. The same command again goes on where it stopped.

    Joins when torchrun, SLURM or Kubernetes started it; starts local processes with --nproc (or NPUS_PER_NODE).
    """
    from polymodal import device, launch, spawn
    from polymodal import recipe as recipes
    from polymodal.convert import recognise

    read = recipes.load(recipe, overrides or [])
    recognise.register()
    device.apply_environment(read.device)
    if spawn.CHILD not in os.environ:
        target = launch.place(launch.default_nproc(nproc, read.device.kind))
        if isinstance(target, launch.Start) or target.rank == 0:
            from polymodal.train import check as checks

            checks.refuse(read, target.nproc * target.nodes if isinstance(target, launch.Start) else target.world)
        if isinstance(target, launch.Place) and target.how == "alone" and (count := device.count(read.device.kind)) > 1:
            print(f"note: this node has {count} devices and one process trains; --nproc auto uses all", file=sys.stderr)

    def here() -> int:
        from polymodal.train import trainer

        return trainer.run(read)

    return spread(nproc, read.run_dir, here, read.device.kind, restarts, min_nodes)


@command(app, "polymodal check recipe.yaml --world 8")
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes it will be trained on.", show_default="what the layout needs")] = None,
    data: Annotated[bool, typer.Option(help="Measure every sample (headers only).")] = True,
    as_json: AsJson = False,
) -> int:
    """Everything that train would refuse, and what it would do: samples, packs, steps, memory, disk. Trains nothing."""
    from polymodal import recipe as recipes
    from polymodal.convert import recognise
    from polymodal.train import check as checks

    recognise.register()
    return checks.main(recipes.load(recipe, overrides or []), world, measure=data, as_json=as_json)


@command(app, "polymodal models", "polymodal models qwen2.5-vl", 'polymodal models --for "fine-tune a model that reads receipts"')
def models(
    name: Annotated[str | None, typer.Argument(help="Model, or model with size.", show_default=False)] = None,
    wish: Annotated[str | None, typer.Option("--for", metavar="TEXT", help="What you want to do, in plain words (English or Chinese).")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> int:
    """The models: sizes, tasks, status, which parallelism each supports. With --for: which one, and the commands."""
    from polymodal import shelf

    if markdown:
        print(shelf.page(), end="")
        return 0
    return shelf.main(name, wish, as_json)


@command(app, "polymodal init qwen2.5-vl --task lora --size 7b --devices 8 -o recipe.yaml")
def init(
    model: Annotated[str, typer.Argument(help="Model, model with size, hub id or directory.", show_default=False)],
    task: Annotated[str, typer.Option(help="sft, lora, pretrain or dreambooth.")] = "sft",
    size: Annotated[str | None, typer.Option(help="Size, when MODEL names none.")] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", min=1, help="Accelerators of the run.", show_default="recommended")] = None,
    data: Annotated[str, typer.Option(metavar="FILE", help="Data file.")] = "data/train.json",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.", show_default="stdout")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> int:
    """Write a commented recipe with the recommended layout."""
    from polymodal import init as writer

    return writer.main(model, task, size, devices, data, out, force)


@command(app, 'polymodal chat Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --prompt "What is this?"', "polymodal chat runs/mine --json questions.jsonl --out answers.jsonl")
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or adapter.", show_default=False)],
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Picture of the (first) question; may repeat.")] = None,
    video: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Video of the (first) question; may repeat.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One question, one answer.", show_default="conversation")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="JSON lines to answer; - = stdin.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Where answers of --json go.", show_default="stdout")] = None,
    media_dir: MediaDir = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0 = all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 42,
    batch_size: Annotated[int, typer.Option(help="Rows of --json answered together.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ema: Ema = False,
    base: Base = None,
    revision: Revision = None,
) -> int:
    """Ask a checkpoint: one question, a conversation in the terminal, or JSON lines in and out."""
    from polymodal.generate import chat as room
    from polymodal.generate.engine import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed)
    return room.main(
        checkpoint,
        image=image or (),
        video=video or (),
        prompt=prompt,
        system=system,
        json_file=json_file,
        out=out,
        media_dir=media_dir,
        device=device,
        dtype=dtype,
        ema=ema,
        base=base,
        revision=revision,
        sampling=sampling,
        batch_size=batch_size,
    )


@command(app, "polymodal export runs/mine out/my-model --merge-lora --dtype bf16")
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run, or one of its checkpoints.", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the hub checkpoint goes.", show_default=False)],
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add adapters into the weights.", show_default="adapters alone")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="the base's")] = None,
    ema: Ema = False,
    base: Base = None,
    other: Other = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> int:
    """Write a run as a hub checkpoint, and prove that the library opens it with the same outputs."""
    from polymodal.train import export as room

    return room.run(source, directory, merge_lora=merge_lora, dtype=dtype, ema=ema, base=base, other=other, force=force)


@command(app, "polymodal download qwen2.5-vl-3b", "HF_ENDPOINT=https://mirror.example polymodal download Qwen/Qwen2.5-VL-3B-Instruct --to weights/qwen")
def download(
    model: Annotated[str, typer.Argument(help="Model with size, or hub id.", show_default=False)],
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Directory.", show_default="the hub's cache")] = None,
    revision: Revision = None,
) -> int:
    """Fetch a checkpoint from the hub; resumes. Honours HF_ENDPOINT (mirrors), HTTPS_PROXY and HF_TOKEN."""
    from polymodal.models import catalog

    print(catalog.download(model, revision, to))
    return 0


@command(app, "polymodal profile runs/mine --steps 3 --ranks 0,1")
def profile(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that is training.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="Steps to trace.")] = 2,
    ranks: Annotated[str, typer.Option(help="Ranks that write a trace, e.g. 0,1 or 0-7.")] = "0",
    stacks: Annotated[bool, typer.Option("--stacks", help="Record Python stacks and shapes.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also write a memory snapshot.")] = False,
) -> int:
    """Trace a few steps of a live run; it starts at the run's next step. Traces open in Perfetto."""
    from polymodal import live

    return live.request_profile(run, steps, ranks, stacks=stacks, memory=memory)


@command(app, "polymodal doctor", "polymodal doctor --env")
def doctor(env: Annotated[bool, typer.Option("--env", help="Only the table of environment variables.")] = False, as_json: AsJson = False) -> int:
    """Look at this machine before a run: devices, versions, backends, shared memory, ports, disk, limits, clock."""
    from polymodal import doctor as room

    return room.main(env, as_json)


@command(data_app, "polymodal data convert data/llava_instruct_150k.json data/train.json --media-dir COCO2017/train2017")
def convert(
    source: Annotated[str, typer.Argument(help="LLaVA, ShareGPT, Alpaca or OpenAI file, directory or glob.", show_default=False)],
    target: Annotated[str, typer.Argument(help="MLLM file to write, .json or .jsonl.", show_default=False)],
    media_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Put before the rows' media paths.")] = None,
    format: DataFormat = "auto",
    missing: Annotated[str, typer.Option(help="Rows whose media are not there: skip, keep or fail.")] = "skip",
) -> int:
    """Rewrite a data file as MLLM JSON; text-only rows are kept, missing media counted and listed."""
    from polymodal.data import convert as room

    one_of("--format", format, FORMATS)
    one_of("--missing", missing, ("skip", "keep", "fail"))
    print(room.convert(source, target, format=format, media_dir=media_dir, missing=missing))  # type: ignore[arg-type]
    return 0


@command(data_app, "polymodal data check train.json --media-dir images", name="check")
def check_data(
    paths: Annotated[list[str], typer.Argument(metavar="FILE", help="Data files, directories or globs.", show_default=False)],
    media_dir: MediaDir = None,
    format: DataFormat = "auto",
    limit: Annotated[int, typer.Option(help="Problems listed.")] = 20,
    as_json: AsJson = False,
) -> int:
    """Read every row and every media header; list what is broken, with its line. Needs no model."""
    from polymodal.data import check as room

    one_of("--format", format, FORMATS)
    return room.main(paths, media_dir=media_dir, format=format, limit=limit, as_json=as_json)


@command(data_app, "polymodal data show recipe.yaml -o samples.html --samples 20")
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Page to write.")] = Path("samples.html"),
    samples: Annotated[int, typer.Option(min=1, help="Samples shown.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
) -> int:
    """Render samples as the model meets them: tokens, label mask, pictures; one HTML page."""
    from polymodal import recipe as recipes
    from polymodal.train import check as checks

    return checks.show(recipes.load(recipe, overrides or []), out, samples, seed)


@command(recipe_app, "polymodal recipe schema > recipe.schema.json")
def schema() -> int:
    """The JSON schema of a recipe, for editors."""
    import json

    from polymodal import recipe as recipes

    print(json.dumps(recipes.schema(), indent=2))
    return 0


@command(recipe_app, "polymodal recipe show recipe.yaml train.steps=10", name="show")
def show_recipe(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """A recipe with its bases, overrides and defaults resolved."""
    from polymodal import recipe as recipes

    print(recipes.dump(recipes.load(recipe, overrides or [])), end="")
    return 0


@command(recipe_app, "polymodal recipe docs > docs/recipe.md")
def docs() -> int:
    """The reference page of every key, as Markdown."""
    from polymodal import recipe_reference

    print(recipe_reference.markdown(), end="")
    return 0


import polymodal.cli_convert  # noqa: E402  (its command joins the app)
import polymodal.cli_evaluate  # noqa: E402  (its command joins the app)
import polymodal.cli_generation  # noqa: E402, F401  (its commands join the app)

command(app, "polymodal plan recipe.yaml --world 512 --device h100", "polymodal plan recipe.yaml --world 64 --device 910b --search -o best.yaml")(cli_cluster.plan)
command(app, "polymodal launch slurm recipe.yaml --nodes 4 --submit", "polymodal launch kubernetes recipe.yaml --nodes 4 --image registry/polymodal:1")(cli_cluster.launch)


# fmt: on
def help_at_once(words: list[str]) -> bool:
    """Prints the help that the words ask for, without typer's parsing (it imports what takes half a second)."""
    if not set(HELP) & set(words[: words.index("--") if "--" in words else None]):
        return False
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="polymodal", help_option_names=HELP)
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            context = typer.Context(command, info_name=word, parent=context, help_option_names=HELP)
    command.format_help(context, context.make_formatter())
    return True


def main() -> None:
    """The entry point."""
    if "POLYMODAL_LAUNCHED_BY" in os.environ:  # spawn.CHILD, without importing what help does not need
        from polymodal import spawn

        spawn.enter_child()
    try:
        if not help_at_once(sys.argv[1:]):
            app(prog_name="polymodal")
    except KeyboardInterrupt:
        sys.exit(130)
