"""`polymodal translate`: a start script or command line of another program as a recipe or command."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.files import written_whole
from polymodal.core.terminal import console, say, say_lines, styled
from polymodal.tools.preflight import numbered
from polymodal.tools.translate import bare, diffusers_scripts, inference, native, peers, shell, training
from polymodal.tools.translate.launch import Launch, of_file, of_script, of_words
from polymodal.tools.translate.ledger import KINDS, Row

STYLES = {
    "mapped": "green",
    "changed": "yellow",
    "default": "cyan",
    "checked": "dim",
    "no effect": "dim",
    "unsupported": "red",
    "unknown": "red",
}


def main(
    what: str,
    arguments: Sequence[str],
    out: Path | None,
    nodes: int | None,
    source: str | None,
    values: Sequence[str],
    force: bool,
    as_json: bool,
) -> int:
    """Translate, print the table, write the recipe or the command. Raises PolymodalError for what has
    none."""
    launch = _launch(what, arguments, nodes, source, values)
    command = fill(launch)
    if as_json:
        say_lines(_json(launch, command), "\n")
    else:
        show(launch, error=out is None)
    if not force:
        refuse(launch, "(Correct them, or leave them out with --force.)")
    text = _recipe(launch) if command is None else f"{shlex.join(command)}\n"
    if out is None:
        if not as_json:
            say_lines(text)
        return 0
    if out.exists() and not force:
        raise PolymodalError(f"{out} exists already.", "Name another file, or replace it with --force.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if not as_json:
        say(f"{out}: {_next(launch, out, command)}")
    return 0


def fill(launch: Launch) -> list[str] | None:
    """Translate into the launch's ledger; the words of our command, None where a recipe comes of it."""
    if launch.kind in ("generate", "chat", "evaluate"):
        return inference.translate(launch)
    if launch.kind == "part":
        bare.translate(launch)
    elif launch.kind == "native":
        native.translate(launch)
    elif launch.kind == "diffusers":
        diffusers_scripts.translate(launch)
    elif launch.kind in peers.KINDS:
        peers.translate(launch)
    else:
        training.translate(launch)
    return None


def refuse(launch: Launch, hint: str) -> None:
    """Raises PolymodalError that lists what has no translation."""
    refused = launch.ledger.refused()
    if refused:
        head = f"{launch.file}: {len(refused)} flags and keys without a translation:"
        rows = [f"{row.origin} = {row.value}: {row.why}" for row in refused]
        raise PolymodalError(numbered(head, rows), hint)


def _launch(
    what: str, arguments: Sequence[str], nodes: int | None, source: str | None, values: Sequence[str]
) -> Launch:
    given = dict[str, str]()
    for text in values:
        name, sign, value = text.partition("=")
        if not sign:
            raise PolymodalError(f"--set {text} is not of the form NAME=VALUE.", "Write e.g. --set NNODES=4.")
        given[name] = value
    if " " in what.strip() and not os.path.isfile(what):  # a Path's raises for a name that is too long
        words = [shell.Word(word, 1) for word in shlex.split(what)]
        return of_words(words, "the command line", nodes, source)
    path = Path(what)
    if not path.is_file():
        raise PolymodalError(
            f"{what} is no file, and no command line of a known program.",
            "Name a start script or a config file, or quote a whole command line.",
        )
    if path.suffix.lower() in peers.SUFFIXES:
        kind = peers.recognise(peers.read(path)[0])
        if kind is None and path.suffix.lower() != ".toml":
            return bare.launch(path, nodes, source)
        if kind is None:
            raise PolymodalError(
                f"{path}: its keys are of no program that is known here.",
                "Name the start script, or quote the whole command line that the file belongs to.",
            )
        variables = {name: shell.Value(text, 0) for name, text in given.items()}
        return of_file(path, kind, variables, source)
    return of_script(path, arguments, given, nodes, source)


def _recipe(launch: Launch) -> str:
    """The recipe's text, which the schema accepts; of a file that is a part of a set-up, its part."""
    if launch.kind == "part":
        return bare.text(launch)
    recipes.validate(launch.ledger.nested())
    how = "polymodal encode" if launch.kind == "encode" else "polymodal train"
    nodes = f" on each of {launch.nodes} nodes" if launch.nodes > 1 else ""
    head = [
        f"# From {launch.file} ({launch.entry}, {launch.world} processes). Behind each key: where it comes "
        "from.",
        f"# {how} RECIPE --nproc {launch.nproc}{nodes}",
    ]
    return "\n".join([*head, launch.ledger.text(recipes.all_keys())])


def _next(launch: Launch, out: Path, command: list[str] | None) -> str:
    if command is not None:
        return f"run it with `sh {out}`"
    if launch.kind == "part":
        return "a part of a recipe; the start script names the rest"
    verb = "encode" if launch.kind == "encode" else "train"
    cached = launch.ledger.get("data.encode") == "cached" and "data.datasets" in launch.ledger.values
    if cached and verb == "train":
        return f"encode the data with `polymodal encode {out}`, then train with `polymodal train {out}`"
    return (
        f"look with `polymodal check {out} --world {launch.world}`, start with `polymodal {verb} {out} "
        f"--nproc {launch.nproc}`"
    )


def show(launch: Launch, error: bool = False) -> None:
    """The table: what became of every flag and key, and notes."""
    from rich.table import Table

    counts = Counter(row.kind for row in launch.ledger.rows)
    table = Table(box=None, padding=(0, 1), show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for kind in KINDS:
        rows = [row for row in launch.ledger.rows if row.kind == kind]
        if not rows:
            continue
        table.add_row(styled((f"{kind} ({counts[kind]})", STYLES[kind])), "")
        for names, text in _lines(kind, rows):
            table.add_row(f"  {names}", text)
    console(error=error).print(table)
    for note in launch.notes:
        say(f"note: {note}", error=error)


def _lines(kind: str, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Rows of a kind; those without a key of ours are grouped by their reason, their names by the section."""
    if kind in ("mapped", "changed", "default", "unsupported", "unknown"):
        out = []
        for row in rows:
            value = "" if kind == "default" or row.value is True else f" {row.value}"
            text = row.ours + (f" ({row.why})" if row.why and row.ours else row.why)
            out.append((f"{row.origin.short}{value}"[:100], text))
        return out
    groups: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        section = row.origin.name.partition(".")[0]
        groups.setdefault(row.why, {}).setdefault(section, []).append(row.origin.short)
    return [
        (
            ", ".join(
                f"{name}.* ({len(names)})" if len(names) > 2 else ", ".join(names)
                for name, names in sections.items()
            ),
            why,
        )
        for why, sections in groups.items()
    ]


def _json(launch: Launch, command: list[str] | None) -> str:
    import json

    data: dict[str, Any] = {
        "entry": launch.entry,
        "world": launch.world,
        "nodes": launch.nodes,
        "recipe": None if command else launch.ledger.nested(),
        "command": command,
        "rows": [
            {"kind": row.kind, "from": str(row.origin), "value": row.value, "to": row.ours, "why": row.why}
            for row in launch.ledger.rows
        ],
        "notes": launch.notes,
    }
    return json.dumps(data, indent=1, ensure_ascii=False, default=str)
