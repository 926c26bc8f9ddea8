"""Config files of other trainers: which one a launch names, its values with lines, paths of checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import open_file
from polymodal.core.text import parse_json
from polymodal.recipe import file as recipe_file
from polymodal.tools.translate.launch import Launch, write_environment
from polymodal.tools.translate.ledger import MOST, Given, Origin, read_config

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_TABLE = re.compile(r"\s*\[\[?\s*([\w.-]+)\s*\]\]?")
_KEY = re.compile(r"\s*([\w-]+)\s*=")


def settings(launch: Launch, verb: str = "") -> Given:
    """Keys of the file that a launch names, with those of its command line over them."""
    words = [word.text for word in launch.positional]
    if verb and words[:1] == [verb]:
        words = words[1:]
    flags = launch.flags
    name = flags.take("config") or next((word for word in words if Path(word).suffix in SUFFIXES), None)
    values, lines, file = dict[str, Any](), dict[str, int](), launch.file
    if name is not None:
        values, lines = read(launch.open(str(name)))
        file = str(name)
    given = Given(launch.kind, file, values, lines)
    for word in words:
        if "=" in word:
            recipe_file.override(given.values, {}, word)
    for key, value in flags.values.items():
        if key != "config":
            given.values[key] = value
            given.lines[key], given.files[key] = flags.lines.get(key, 0), flags.file
    return given


SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A config file and the lines of its keys (none of JSON). Raises PolymodalError with file and line."""
    if path.suffix.lower() == ".toml":
        return _toml(path)
    if path.suffix.lower() == ".json":
        return read_config(path), {}
    values, lines = recipe_file.parse(path, "config file")
    return values, {key: line for key, (_, line) in lines.items()}


def _toml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        with open_file(path) as stream:
            text = stream.read(MOST).decode("utf-8-sig")
        values = tomllib.loads(text)
    except OSError as error:
        raise PolymodalError(f"{path}: {error.strerror}.", "Name an existing file.") from None
    except ValueError as error:  # of TOML and of UTF-8
        raise PolymodalError(f"{path}: not valid TOML: {error}.", "Correct it there.") from None
    lines, table = dict[str, int](), ""
    for at, line in enumerate(text.split("\n"), 1):
        if found := _TABLE.match(line):
            table = f"{found[1]}."
        elif found := _KEY.match(line):
            lines.setdefault(f"{table}{found[1]}", at)
    return values, lines


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON file that is a list of mappings. Raises PolymodalError with file and line."""
    try:
        with open_file(path) as stream:
            found = parse_json(stream.read(MOST).decode("utf-8-sig", errors="replace"))
    except OSError as error:
        raise PolymodalError(f"{path}: {error.strerror}.", "Name an existing file.") from None
    except ValueError as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise PolymodalError(
            f"{where}: not valid JSON: {getattr(error, 'msg', error)}.", "Correct that line."
        ) from None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PolymodalError(f"{path}: a list of mappings is wanted.", "Compare the documented file.")
    return found


def part(given: Given, kind: str, name: str, values: Any) -> Given:
    """What lies under a dotted key (numbers count entries of lists) as a Given with its lines."""
    lines = {key[len(name) + 1 :]: line for key, line in given.lines.items() if key.startswith(f"{name}.")}
    if not isinstance(values, dict):
        raise PolymodalError(
            f"{given.file}: `{name}` is {str(values)[:60]!r}, a mapping is wanted.", "Correct it there."
        )
    return Given(kind, given.file, values, lines)


def finish(launch: Launch, *files: Given) -> None:
    """Rows of what was given and is left: keys of the tables, those at a value that changes nothing."""
    write_environment(launch)
    for given in files:
        given.report_rest(launch.ledger)
        told = {(row.origin.file, row.origin.name.lstrip("-").split(".")[0]) for row in launch.ledger.rows}
        for key, value in given.values.items():
            inner = value[0] if isinstance(value, list) and value else value
            if isinstance(inner, dict):  # its keys have rows of their own
                continue
            origin = given.origin(key)
            if key in given.asked and (origin.file, key) not in told:
                launch.ledger.note("no effect", origin, value, "it changes nothing here at this value")
    launch.options.report_rest(launch.ledger)
    if not launch.known:
        note = "how many processes there are is not said; the batch is that of one: --set NPROC_PER_NODE=8"
        launch.notes.append(note)
    launch.ledger.values.setdefault("name", (Path(launch.file).stem, "the file's name"))


def checkpoint(launch: Launch, key: str, value: Any, origin: Origin) -> None:
    """A recipe key that is a directory or a hub id; --source stands before model.source."""
    if key == "model.source" and launch.source is not None:
        launch.ledger.write(key, launch.source, Origin("--source", "the command line"))
        if value is not None:
            launch.ledger.note("no effect", origin, value, "--source was given")
        return
    if not isinstance(value, str) or not value:
        raise PolymodalError(
            f"{launch.file}: it names no model for {key}.", "Name its directory or hub id: --source DIR."
        )
    path = launch.path(value)
    ours = value if _HUB.fullmatch(value) and not Path(path).exists() else path
    if ours == value:
        launch.ledger.write(key, ours, origin)
    else:
        launch.ledger.write(key, ours, origin, value)
