"""Command lines in tests."""

import shlex

from typer.testing import CliRunner

from polymodal import cli
from polymodal.convert import command


def run(line: str) -> int:
    """Exit code of one line of mm-convert, as a shell would cut it; lines may be continued."""
    program, *words = shlex.split(line.replace("\\\n", " "))
    assert program == "mm-convert"
    try:
        command.main(words)
    except SystemExit as stop:
        return stop.code
    return 0


def ok(line: str) -> None:
    """Run a line of mm-convert that must succeed."""
    assert run(line) == 0, line


def polymodal(line: str) -> tuple[int, str]:
    """(exit code, output) of `polymodal` + line."""
    done = CliRunner().invoke(cli.app, line.split())
    return done.exit_code, done.output
