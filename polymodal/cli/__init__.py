"""The one command. A sub-command is a few lines into the package and joins the app by import.

Help is printed without importing what takes half a second.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

# In the order of the help page.
from polymodal.cli import catalogue, training, asking, generation, files, cluster  # isort: skip  # noqa: F401
from polymodal.cli.app import HELP, app, guard, spread

__all__ = ["app", "guard", "help_at_once", "main", "spread"]


def help_at_once(words: list[str]) -> bool:
    """Print the help that the words ask for, without typer's parsing, whose imports take half a second."""
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
        from polymodal.runtime import launcher

        launcher.enter_child()
    try:
        if not help_at_once(sys.argv[1:]):
            app(prog_name="polymodal")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of printing help
        failure = error

        def action() -> int:
            raise failure

        sys.exit(guard(action))
