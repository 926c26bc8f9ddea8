"""The console command `polymodal-compat`: `run` an entry of the documents, `install` files of their names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = "The documented commands of MindSpeed-MM, as they are written, run by polymodal."
RUN = "run [--tree] ENTRY ..."


def main() -> None:
    """The entry point of the console script."""
    from polymodal.__main__ import run

    run(_command)


def entry(name: str, *options: str) -> None:
    """What a file that was installed calls: its own command line, as that of `run`."""
    sys.argv = ["polymodal-compat", "run", *options, name, *sys.argv[1:]]
    main()


def _command() -> None:
    from polymodal.cli import guard

    words = sys.argv[1:]
    if words[:1] == ["run"] and len(words) > 1 and words[1] not in ("-h", "--help"):
        sys.exit(guard(lambda: _run(words[1:])))
    given = _parser().parse_args(words)
    if given.command == "install":
        from polymodal.compat import install

        sys.exit(guard(lambda: install.main(given.directory, given.tree, given.force)))
    _parser().print_help()


def _run(words: Sequence[str]) -> int:
    from polymodal.compat import running

    tree = words[0] == "--tree"
    name, *arguments = words[tree:] or ["--tree"]
    return running.run(name, arguments, tree)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polymodal-compat", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "run",
        usage=f"polymodal-compat {RUN}",
        help="run an entry, e.g. pretrain_vlm.py, with its documented arguments, in torchrun's world",
        description="Translate the command line of an entry and run what it means in this process. --tree: "
        "training also writes a Megatron-style tree (or DCP directory) into the directory of --save.",
    )
    install = commands.add_parser(
        "install",
        help="write thin files of the documented names, so that the documents' lines run unchanged",
        description="Write thin files of the documented names and paths into DIR.",
    )
    install.add_argument("directory", type=Path, metavar="DIR", help="where the documents' lines are called")
    install.add_argument("--tree", action="store_true", help="training also writes a Megatron-style tree")
    install.add_argument("--force", action="store_true", help="replace files that have these names")
    return parser
