"""What a translation found: recipe keys with their origins, and a row for every flag and key that was
given."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import open_file
from polymodal.core.text import nearest, parse_json
from polymodal.recipe import file as recipe_file

Kind = Literal["mapped", "changed", "default", "checked", "no effect", "unsupported", "unknown"]
KINDS: tuple[Kind, ...] = ("mapped", "changed", "default", "checked", "no effect", "unsupported", "unknown")
MOST = 8 << 20  # bytes of a config file


def _table(name: str) -> dict[str, Any]:
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _tables() -> dict[str, Any]:
    """tables.yaml, and peers.yaml, whose entries and refusals are added to those of the former."""
    own, peers = _table("tables.yaml"), _table("peers.yaml")
    both = {key: {**own[key], **peers[key]} for key in ("entries", "refused")}
    return {**own, **peers, **both}


TABLES = _tables()
_ABSENT: Any = object()


class Origin(NamedTuple):
    """A flag or key as it was given: its name, and the file and line (0: a key of a JSON file)."""

    name: str
    file: str
    line: int = 0

    @property
    def short(self) -> str:
        """The last part of a dotted key; a flag as it is."""
        return self.name if self.name.startswith("-") else self.name.rpartition(".")[2]

    @property
    def place(self) -> str:
        """The file, with the line where that is known."""
        return f"{self.file}:{self.line}" if self.line else self.file

    def __str__(self) -> str:
        return f"{self.short}, {os.path.normpath(self.file)}" + (f":{self.line}" if self.line else "")


@dataclass
class Row:
    kind: Kind
    origin: Origin
    value: Any
    ours: str = ""
    why: str = ""


@dataclass
class Ledger:
    """Recipe keys in the order of the recipe, and rows in the order that they were met."""

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def write(self, key: str, value: Any, origin: Origin, given: Any = _ABSENT, why: str = "") -> None:
        """A recipe key from a flag or key. given: what stood there, where it is another value."""
        same = given is _ABSENT
        self.values[key] = (value, str(origin))
        kind: Kind = "mapped" if same and not why else "changed"
        self.rows.append(Row(kind, origin, value if same else given, f"{key}: {_short(value)}", why))

    def default(self, key: str, value: Any, origin: Origin, why: str = "") -> None:
        """A recipe key that nobody gave, since the other program's default differs from the recipe's."""
        self.values[key] = (value, f"the default of {origin.short} there")
        self.rows.append(Row("default", origin, "absent", f"{key}: {_short(value)}", why))

    def note(self, kind: Kind, origin: Origin, value: Any, why: str) -> None:
        self.rows.append(Row(kind, origin, value, "", why))

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.values[key][0] if key in self.values else otherwise

    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.kind in ("unsupported", "unknown")]

    def nested(self) -> dict[str, Any]:
        """The recipe as plain data."""
        out: dict[str, Any] = {}
        for key, (value, _) in self.values.items():
            at, names = out, split(key)
            for name in names[:-1]:
                at = at.setdefault(name, {})
            at[names[-1]] = value
        return out

    def text(self, order: list[str]) -> str:
        """The recipe as YAML, each key with its origin as a comment. order: the schema's keys."""
        places = {key: place for place, key in enumerate(order)}

        def place(key: str) -> int:
            while key not in places and "." in key:
                key = key.rpartition(".")[0]
            return places.get(key, len(places))

        lines, open_names = list[str](), list[str]()
        for key in sorted(self.values, key=place):
            value, origin = self.values[key]
            names = split(key)
            common = len(os.path.commonprefix([names[:-1], open_names]))
            for depth, name in enumerate(names[common:-1], common):
                lines.append("  " * depth + f"{name}:")
            open_names = names[:-1]
            lines += _entry(names[-1], value, origin, "  " * (len(names) - 1))
        return "\n".join(lines) + "\n"


def split(key: str) -> list[str]:
    """Parts of a recipe key; names inside free mappings keep their dots."""
    parts = key.split(".")
    for free in recipe_file.FREE:
        if tuple(parts[: len(free)]) == free and len(parts) > len(free):
            return [*free, ".".join(parts[len(free) :])]
    return parts


def _entry(name: str, value: Any, origin: str, indent: str) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        body = recipe_file.write({name: value}).rstrip("\n").split("\n")
        return [f"{indent}{body[0]}  # {origin}", *(indent + line for line in body[1:])]
    flow = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]
    if isinstance(value, float):
        flow = repr(value) if "." in repr(value) or "inf" in repr(value) else repr(value).replace("e", ".0e")
    return [f"{indent}{name}: {flow}  # {origin}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class Given:
    """Flags of a command line or keys of a file, each to be taken once; what is left is reported by
    the tables.

    kind: the section of the table. `taken` names what the code knows, for suggestions.
    """

    def __init__(
        self, kind: str, file: str, values: Mapping[str, Any], lines: Mapping[str, int] | None = None
    ):
        self.kind, self.file, self.values, self.lines = kind, file, dict(values), dict(lines or {})
        self.files: dict[str, str] = {}  # of names that come from another file
        self.asked: set[str] = set()

    def origin(self, name: str) -> Origin:
        of_line = self.kind in ("flags", "diffusers") or (name in self.files and self.lines.get(name))
        shown = f"--{name}" if of_line else name
        return Origin(shown, self.files.get(name, self.file), self.lines.get(name, 0))

    def peek(self, name: str) -> Any:
        """The value of a flag or dotted key, None where it is absent."""
        found = self.values.get(name) if name in self.values else _at(self.values, name)
        return None if found is _ABSENT else found

    def take(self, name: str, otherwise: Any = None) -> Any:
        """The value of a flag or dotted key, which counts as seen; null is `otherwise` too."""
        self.asked.add(name)
        found = self.peek(name)
        return otherwise if found is None else found

    def has(self, name: str) -> bool:
        return name in self.values or _at(self.values, name) is not _ABSENT

    def part(self, name: str, kind: str | None = None) -> Given:
        """The mapping under a key as its own Given, whose leftovers are its own."""
        inner = self.take(name, {})
        if not isinstance(inner, Mapping):
            raise PolymodalError(
                f"{self.file}: `{name}` is {_short(inner)}, a mapping is wanted.",
                "Compare the documented file.",
            )
        return Given(kind or self.kind, self.file, inner)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of what nobody took; entries of lists of mappings are written `name[]`."""
        seen = set[str]()
        for key, value in _leaves(self.values):
            plain = key.replace("[]", "")
            taken = any(plain == name or plain.startswith(f"{name}.") for name in self.asked)
            if not taken and key not in seen:
                seen.add(key)
                yield key, value

    def report_rest(self, ledger: Ledger) -> None:
        """A row for each key that was not taken: by the table, else unknown with the nearest known one."""
        table = TABLES.get(self.kind, {})
        for key, value in self.leaves():
            origin = self.origin(key)
            plain = key.replace("[]", "")
            for kind, section in (
                ("no effect", "ignored"),
                ("checked", "checked"),
                ("unsupported", "unsupported"),
            ):
                why = next(
                    (why for why, names in table.get(section, {}).items() if _fits(plain, names)), None
                )
                if why is not None:
                    neutral = kind == "unsupported" and value in (
                        None,
                        False,
                        0,
                        0.0,
                        "",
                        [],
                        {},
                        "none",
                        "None",
                    )
                    found: Kind = "no effect" if neutral else kind  # type: ignore[assignment]
                    ledger.note(found, origin, value, "at its neutral value" if neutral else why)
                    break
            else:
                known = {
                    *self.asked,
                    *(n for s in ("ignored", "checked", "unsupported") for n in _names(table, s)),
                }
                names = {name.rpartition(".")[2]: name for name in sorted(known) if "*" not in name}
                near = nearest(plain.rpartition(".")[2], names, 0.75)
                hint = f"nearest known: {names[near[0]]}" if near else "no such name in the tables"
                ledger.note("unknown", origin, value, hint)


def _names(table: Mapping[str, Any], section: str) -> list[str]:
    return [name for names in table.get(section, {}).values() for name in names]


def _fits(key: str, names: list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") or fnmatch.fnmatchcase(key, name) for name in names)


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            for each in value:
                yield from _leaves(each, f"{name}[].")
        else:
            yield name, value


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of mappings. Raises PolymodalError with file and line: a trailing comma, a
    comment."""
    if path.suffix.lower() != ".json":
        return recipe_file.parse(path, "config file")[0]
    try:
        with open_file(path) as stream:
            data = stream.read(MOST + 1)
    except OSError as error:
        raise PolymodalError(f"{path}: {cause(error)}.", "Name an existing file.") from None
    if len(data) > MOST:
        raise PolymodalError(f"{path}: it is larger than a config file.", "Name the config file itself.")
    try:
        found = parse_json(data.decode("utf-8-sig", errors="replace"))
    except ValueError as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise PolymodalError(
            f"{where}: not valid JSON: {getattr(error, 'msg', error)}.",
            "JSON takes no comments and no comma behind a last entry: correct that line.",
        ) from None
    if not isinstance(found, dict):
        raise PolymodalError(
            f"{path}: it holds a {type(found).__name__}, a mapping is wanted.", "Name another file."
        )
    return found
