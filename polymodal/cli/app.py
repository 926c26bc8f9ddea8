"""What every sub-command shares: the groups they join, how errors are printed, how processes start.

A PolymodalError is one message on stderr and exit code 2; Ctrl-C is 130; a traceback is a bug.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from polymodal.core import terminal
from polymodal.core.errors import PolymodalError

HELP = ["-h", "--help"]
TABLE: dict[str, Any] = yaml.load(
    (Path(__file__).parent / "commands.yaml").read_text(encoding="utf-8"),
    getattr(yaml, "CSafeLoader", yaml.SafeLoader),
)
app = typer.Typer(
    name="polymodal",
    help="Train multimodal models: hub checkpoints in, one recipe, any number of devices, "
    "hub checkpoints out.",
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
GROUPS = {"data": data_app, "recipe": recipe_app}


@dataclasses.dataclass(frozen=True)
class Opening:
    """Options of commands that open a checkpoint."""

    device: str = "auto"
    dtype: str = "auto"
    ema: bool = False
    base: str | None = None
    revision: str | None = None


def command(name: str) -> Callable[[Callable], Callable]:
    """A sub-command of commands.yaml ("data show" of the group `data`), whose errors are one message.

    Parameters are its arguments and options; one that is a dataclass stands for an option a field.
    """

    def wrap(function: Callable) -> Callable:
        kinds = {p.name: p.annotation for p in inspect.signature(function, eval_str=True).parameters.values()}
        groups = {key: kind for key, kind in kinds.items() if dataclasses.is_dataclass(kind)}

        def run(**values: Any) -> None:
            def action() -> int | None:
                for option, value in values.items():
                    _check_choice(name, option, value)
                for key, kind in groups.items():
                    names = [f.name for f in dataclasses.fields(kind)]
                    values[key] = kind(**{n: values.pop(n) for n in names})  # type: ignore[operator]
                return function(**values)

            raise typer.Exit(guard(action))

        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(list(_parameters(name, function)))  # type: ignore[attr-defined]
        facts = TABLE["commands"][name]
        examples = facts["examples"]
        epilog = "\n\n".join(["Example:" if len(examples) == 1 else "Examples:", *examples])
        group, _, last = name.rpartition(" ")
        GROUPS.get(group, app).command(last, epilog=epilog, rich_help_panel=facts.get("panel"))(run)
        return function

    return wrap


def _parameters(name: str, function: Callable) -> Iterator[inspect.Parameter]:
    """A function's parameters as typer takes them, with the help of commands.yaml."""
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            yield from _parameters(name, parameter.annotation)  # type: ignore[arg-type]
        else:
            kind = Annotated[parameter.annotation, _info(name, parameter)]
            yield parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)


def _info(name: str, parameter: inspect.Parameter) -> Any:
    facts = option_facts(name, parameter.name)
    common: dict[str, Any] = {"help": facts["help"], "min": facts.get("min"), "max": facts.get("max")}
    if "shown" in facts or parameter.default is parameter.empty:
        common["show_default"] = str(facts["shown"]) if "shown" in facts else False
    if "argument" in facts:
        return typer.Argument(metavar=facts["argument"], **common)
    panels: Mapping[str, list[str]] = TABLE["commands"][name].get("panels", {})
    panel = next((title for title, names in panels.items() if parameter.name in names), None)
    flags = [flag(name, parameter.name)] if parameter.default is False else facts.get("flags", ())
    return typer.Option(*flags, metavar=facts.get("metavar"), rich_help_panel=panel, **common)


def option_facts(name: str, option: str) -> Mapping[str, Any]:
    """What commands.yaml has about an option of a command."""
    return {**TABLE["shared"], **TABLE["commands"][name].get("options", {})}[option]


def flag(name: str, option: str) -> str:
    """How an option of a command is written."""
    return option_facts(name, option).get("flags", [f"--{option.replace('_', '-')}"])[0]


def guard(action: Callable[[], int | None]) -> int:
    """Runs `action`; its exit code, or the one of the error that was printed."""
    try:
        from polymodal.runtime import launcher

        try:
            try:
                return action() or 0
            except OSError as error:
                from polymodal.runtime import host

                told = host.machine_error(error)
                if told is None:
                    raise
                raise told from None
        except PolymodalError as error:
            if launcher.record(error):
                terminal.report(error)
            return error.code
        except launcher.Stopped as stopped:
            return stopped.code
        except BrokenPipeError:  # who read the output has enough (`| head`)
            terminal.finish()
            return 1  # as typer and rich do
        except Exception as error:
            if launcher.record(error):
                raise
            return 1
    except KeyboardInterrupt:
        return 130


def _check_choice(name: str, option: str, value: Any) -> None:
    choices = option_facts(name, option).get("choices", ())
    if choices and value not in choices:
        raise PolymodalError(
            f"{flag(name, option)} {value} is not known.", f"Use {', '.join(choices[:-1])} or {choices[-1]}."
        )


def spread(
    nproc: str | None,
    run_dir: str | os.PathLike | None,
    here: Callable[[], int],
    kind: str = "auto",
    restarts: int = 0,
    min_nodes: int | None = None,
) -> int:
    """Run this command line in as many processes as asked (`here` in each), or join and run `here`."""
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
        terminal.say("warning:", warning, error=True)
    command = ["-m", "polymodal", *sys.argv[1:]]
    return launcher.run(command, target, restarts=restarts, min_nodes=min_nodes)


def _version(asked: bool) -> None:
    if asked:
        from polymodal import __version__

        terminal.say(f"polymodal {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
