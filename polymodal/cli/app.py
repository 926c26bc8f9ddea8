"""What every sub-command shares: the groups they join, how errors leave, how processes start, the common options.

Sees launch and spawn, inside functions. A PolymodalError is one message on stderr and exit code 2; Ctrl-C is 130; a
traceback is a bug.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from polymodal.core.errors import PolymodalError

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
app.add_typer(data_app, name="data", rich_help_panel="Files")
app.add_typer(recipe_app, name="recipe", rich_help_panel="Files")


def command(
    group: typer.Typer, *examples: str, name: str | None = None, panel: str | None = None
) -> Callable[[Callable], Callable]:
    """A sub-command with examples in its help, whose errors are one message. panel: its box on the page of all commands."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            raise typer.Exit(guard(lambda: function(*args, **kwargs)))

        epilog = "\n\n".join(["Example:" if len(examples) == 1 else "Examples:", *examples])
        group.command(name, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return wrap


def guard(action: Callable[[], int | None]) -> int:
    """Runs `action`; its exit code, or the one of the error that was printed."""
    try:
        from polymodal.runtime import launcher

        try:
            try:
                return action() or 0
            except OSError as error:
                from polymodal.runtime import host

                said = host.full_disk(error)
                if said is None:
                    raise
                raise said from None
        except PolymodalError as error:
            if launcher.record(error):
                start = "\033[1;31merror:\033[0m" if sys.stderr.isatty() else "error:"
                print(start, error, file=sys.stderr)
            return error.code
        except launcher.Stopped as stopped:
            return stopped.code
        except BrokenPipeError:  # who read the output has enough (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1  # as typer and rich do
        except Exception as error:
            if launcher.record(error):
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
    from polymodal.runtime import launcher, process_group

    if launcher.CHILD in os.environ:
        return here()
    target = process_group.from_environment(process_group.default_nproc(nproc, kind))
    if isinstance(target, process_group.ProcessInfo) or (target.nproc * target.nodes == 1 and not restarts):
        return here()
    if min_nodes is not None and min_nodes > target.nodes:
        raise PolymodalError(
            f"--min-nodes {min_nodes} is more than the {target.nodes} nodes of this run.",
            "Set NNODES to the nodes there are, or lower --min-nodes.",
        )
    for warning in launcher.before_start(run_dir, target):
        print("warning:", warning, file=sys.stderr)
    command = ["-m", "polymodal", *sys.argv[1:]]
    return launcher.run(command, target, restarts=restarts, min_nodes=min_nodes)


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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or the accelerator's kind.")]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Other = Annotated[str | None, typer.Option("--with", metavar="RUN", help="Run of the other denoiser (Wan2.2 A14B).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Ema = Annotated[bool, typer.Option("--ema", help="Use a run's averaged weights.")]
Base = Annotated[str | None, typer.Option(metavar="DIR", help="Where the base model of an adapter or a run lies now.")]
MediaDir = Annotated[str | None, typer.Option(metavar="DIR", help="Directory that relative media paths start from.")]
