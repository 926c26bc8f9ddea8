"""A recipe as a file: YAML with `base:`, line numbers, `a.b=c` overrides, and one sentence for each mistake.

pydantic and yaml only, never torch. Knows no keys: schema.py passes its models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import open_file
from polymodal.core.text import did_you_mean, nearest

Lines = dict[str, tuple[str, int]]
"""Dotted key -> (file, line); line 0 for overrides."""

FREE = (("model", "config"), ("device", "env"), ("data", "template_kwargs"))
"""Mappings whose names are not the recipe's: merged one level deep, dotted names kept whole."""

NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the recipe: closed (no unknown keys), checked on assignment, every key documented."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
        allow_inf_nan=False,
    )


# ---- YAML ----------------------------------------------------------------------------------------------


BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
NUMBER = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?  # 1.5, .5e3
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+  # 1e-5
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
NUMBER_STARTS = list("-+0123456789.")
MAX_FILE = 1 << 20  # bytes of a recipe
MAX_ENTRIES = 100_000  # of a recipe, once its aliases are written out


class _TooLarge(yaml.constructor.ConstructorError):
    """A whole number beyond 64 bits, which nothing here can take."""


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-5 is one; yes, no, on and off are words. Whole numbers have at most 64 bits."""

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        number = super().construct_yaml_int(node) if len(text) <= 100 else 1 << 64
        if not -(1 << 63) <= number < 1 << 63:
            digits = f"{text[:20]}... ({len(text)} characters)" if len(text) > 24 else text
            raise _TooLarge(None, None, f"the number {digits} is too large", node.start_mark)
        return number


_Yaml.yaml_implicit_resolvers = {
    letter: [rule for rule in rules if rule[0] not in (BOOL, FLOAT)]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_constructor("tag:yaml.org,2002:int", _Yaml.construct_yaml_int)
_Yaml.add_implicit_resolver(BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver(FLOAT, NUMBER, NUMBER_STARTS)


class _Dump(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


_Dump.add_implicit_resolver(FLOAT, NUMBER, NUMBER_STARTS)


def write(data: dict) -> str:
    """Plain data as YAML that `read` reads back unchanged."""
    text = yaml.dump(data, Dumper=_Dump, sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029]", text):  # line breaks to YAML, which the dumper does not escape
        text = yaml.dump(data, Dumper=_Dump, sort_keys=False, allow_unicode=False)
    return text


def parse(path: Path, what: str = "recipe") -> tuple[dict, Lines]:
    """YAML file -> (plain data, lines of its keys). what: the kind of file, for messages."""
    try:
        with open_file(path) as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise ValueError(f"it is longer than {MAX_FILE >> 20} MiB")
        text = raw.decode()
    except FileNotFoundError:
        raise PolymodalError(
            f"The {what} {path} does not exist.", "Check the path, or write one with `polymodal init MODEL`."
        ) from None
    except UnicodeDecodeError as error:
        hint = "Save the file as UTF-8."
        raise PolymodalError(
            f"The {what} {path} cannot be read: no UTF-8 text ({error.reason}).", hint
        ) from None
    except (OSError, ValueError) as error:
        raise PolymodalError(
            f"The {what} {path} cannot be read: {cause(error)}.",
            "Check the path, and that this user may read it.",
        ) from None
    try:
        loader = _Yaml(text)
        node = loader.get_single_node()
        if _entries(node, {}) > MAX_ENTRIES:
            raise PolymodalError(
                f"{path}: with its aliases (*name) written out it has more than {MAX_ENTRIES:,} entries.",
                "Write the values themselves.",
            )
        lines = dict(_lines(node, "", path))
        data = {} if node is None else loader.construct_document(node)
    except PolymodalError:
        raise
    except Exception as error:  # yaml raises its own errors, and those of the types that it makes
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        hint = "Look at the indentation and the quotes there."
        if mark and "\t" in [*text.split("\n"), ""][min(mark.line, text.count("\n"))]:
            hint = "YAML is indented with spaces, not tabs."
        reason = getattr(error, "problem", None) or cause(error)
        if isinstance(error, _TooLarge):
            raise PolymodalError(f"{where}: {reason}.", "Correct it.") from None
        raise PolymodalError(f"{where}: not valid YAML: {reason}.", hint) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PolymodalError(
            f"{path}: a {what} is a mapping of sections, this file holds a {type(data).__name__}.",
            "Start from `polymodal init MODEL`.",
        )
    return data, lines


def _entries(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Nodes at and below `node`, those of an alias counted wherever it stands. known: counts by node.

    A node within itself counts as more than any recipe has.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_ENTRIES + 1
        inner = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_entries(n, known) for n in inner)
    return known[id(node)]


def _lines(node: yaml.Node | None, prefix: str, path: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """The dotted keys below `node` with their file and line. Raises PolymodalError for one given twice."""
    entries: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        entries = [(f"{prefix}{key.value}", key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        entries = [(f"{prefix}{i}", value, value) for i, value in enumerate(node.value)]
    seen = set()
    for name, key, value in entries:
        line = key.start_mark.line + 1
        if name in seen:
            raise PolymodalError(f"{path}, line {line}: `{name}` is given twice.", "Remove one of them.")
        seen.add(name)
        yield name, (str(path), line)
        yield from _lines(value, name + ".", path)


def _merge(base: dict, over: dict, path: tuple = ()) -> dict:
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and path not in FREE:
            out[key] = _merge(out[key], value, (*path, key))
        else:
            out[key] = value
    return out


def read(
    path: Path, chain: tuple[Path, ...] = (), known: dict[Path, tuple[dict, Lines]] | None = None
) -> tuple[dict, Lines]:
    """A recipe file with the files of its `base:` merged under it: (plain data, lines of its keys).

    Mappings are merged key by key, everything else is replaced. Raises PolymodalError with file and line.
    chain: the files that led here; known: those read already.
    """
    known = {} if known is None else known
    chain = (*chain, Path(os.path.realpath(path)))
    if chain[-1] in chain[:-1]:
        raise PolymodalError(
            f"{path}: `base:` goes in a circle ({' -> '.join(file.name for file in chain)}).",
            "Remove one of the `base:` lines.",
        )
    data, lines = parse(path)
    base = data.pop("base", None)
    where = f"{path}, line {lines.pop('base', ('', 0))[1]}"
    names = [base] if isinstance(base, str) else [] if base is None else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PolymodalError(
            f"{where}: `base:` = {base!r} is not a file name or a list of them.",
            "Write e.g. base: ../base.yaml",
        )
    merged: dict = {}
    merged_lines: Lines = {}
    for name in names:
        file = path.parent / name
        if not file.is_file():
            raise PolymodalError(
                f"{where}: the base recipe {file} does not exist.",
                "`base:` is relative to the file that names it.",
            )
        if (file := Path(os.path.realpath(file))) not in known:
            known[file] = read(path.parent / name, chain, known)
        child, child_lines = known[file]
        merged = _merge(merged, child)
        merged_lines |= child_lines
    return _merge(merged, data), merged_lines | lines


def override(data: dict, lines: Lines, text: str) -> None:
    """Apply one `a.b=c` to `data`. Numbers count list entries; names inside free mappings keep their dots."""
    key, sign, value = text.partition("=")
    key = key.strip().lstrip("-")
    parts = key.split(".")
    if not sign or not all(parts):
        raise PolymodalError(
            f"The override `{text[:80]}` is not of the form a.b=c.",
            "Write e.g. train.steps=100; quote values with spaces.",
        )
    try:
        loader = _Yaml(value)
        node = loader.get_single_node()
        if _entries(node, {}) > MAX_ENTRIES:
            raise ValueError("aliases without an end")
        parsed = None if node is None else loader.construct_document(node)
    except _TooLarge as error:
        raise PolymodalError(f"The override `{text[:60]}`: {error.problem}.", "Correct it.") from None
    except Exception:  # no YAML: the text itself
        parsed = value
    for free in FREE:  # model.config.text_config.hidden_size: a name with dots in model.config
        if tuple(parts[: len(free)]) == free and len(parts) > len(free):
            parts = [*free, ".".join(parts[len(free) :])]
    target: Any = data
    for i, part in enumerate(parts):
        index: Any = part
        if isinstance(target, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(target):
                raise PolymodalError(
                    f"The override `{text[:80]}`: `{'.'.join(parts[:i])}` is a list of {len(target)}, "
                    f"`{part}` is not one of its numbers.",
                    "Entries are numbered from 0.",
                )
            index = int(part)
        if i + 1 == len(parts):
            target[index] = parsed
            break
        if not isinstance(target[index] if isinstance(target, list) else target.get(part), (dict, list)):
            target[index] = {}
        target = target[index]
    for old in [name for name in lines if f"{name}.".startswith(f"{key}.")]:
        del lines[old]
    lines[key] = (f"override `{text if len(text) <= 200 else text[:197] + '...'}`", 0)


# ---- the schema's keys ---------------------------------------------------------------------------------


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections in a type, e.g. of `list[Dataset] | None`."""
    own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return own + [section for argument in get_args(annotation) for section in sections(argument)]


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema; entries of lists have no number."""
    out = []
    for name, info in section.model_fields.items():
        out.append(prefix + name)
        for child in sections(info.annotation):
            out += keys(child, f"{prefix}{name}.")
    return out


def _fields(root: type[BaseModel], location: tuple) -> dict[str, Any]:
    """The keys of the section at `location`, none where there is no section."""
    section: type[BaseModel] | None = root
    for part in location:
        if not isinstance(part, int):
            info = section.model_fields.get(part) if section is not None else None
            children = sections(info.annotation) if info is not None else []
            section = children[0] if children else None
    return section.model_fields if section is not None else {}


# ---- mistakes ------------------------------------------------------------------------------------------

NO_INTEGER = ("is not a whole number", "")
NO_NUMBER = ("is not a number", "")
NO_BOOLEAN = ("is neither true nor false", "")
MISTAKES = {
    "list_type": ("is not a list", "Write it in brackets, or one entry a line after `- `."),
    "int_parsing": NO_INTEGER,
    "int_type": NO_INTEGER,
    "int_from_float": NO_INTEGER,
    "float_parsing": NO_NUMBER,
    "float_type": NO_NUMBER,
    "finite_number": ("is not a finite number", ""),
    "bool_parsing": NO_BOOLEAN,
    "bool_type": NO_BOOLEAN,
    "too_short": ("must have {min_length} entries", ""),
    "too_long": ("must have {max_length} entries", ""),
    "greater_than_equal": ("must be at least {ge:g}", ""),
    "greater_than": ("must be more than {gt:g}", ""),
    "less_than_equal": ("must be at most {le:g}", ""),
    "less_than": ("must be less than {lt:g}", ""),
    "value_error": ("{error}", ""),
}
"""pydantic's kind of error -> (what is wrong with the value, hint), filled with the error's context."""


def _mistake(item: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[str, str]:
    """(what is wrong with the value, hint) in plain words. fields: keys of the section that it should be."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in MISTAKES:
        what, hint = MISTAKES[kind]
        return what.format(**context), hint
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"is not one of {', '.join(allowed)}", did_you_mean(item["input"], allowed, "", 0.5)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        names = ", ".join([*list(fields)[:6], *(["..."] if len(fields) > 6 else [])])
        hint = f"Write its keys indented below it: {names}." if names else "Write name: value pairs below it."
        return "is a section, not a single value", hint
    if kind == "string_type":
        return "is not text", "Put it in quotes." if isinstance(item["input"], (int, float)) else ""
    return item["msg"][0].lower() + item["msg"][1:], ""


def _unknown(root: type[BaseModel], location: tuple) -> str:
    """The hint for an unknown key: one of its section, else of another section, else all of its section."""
    name, parents = str(location[-1]), location[:-1]
    known, every = _fields(root, parents), keys(root)
    last = {key.rpartition(".")[2]: key for key in reversed(every)}
    if near := nearest(name, known):
        return f"Did you mean `{'.'.join([*map(str, parents), near[0]])}`?"
    if near := [name] if name in last else nearest(name, last, 0.75):
        return f"Did you mean `{last[near[0]]}`?"
    return f"Known keys here: {', '.join(known) or 'none'}."


def _location(item: Mapping[str, Any], root: type[BaseModel]) -> tuple:
    """The key of an error, without the names of union members that pydantic adds."""
    location: tuple = ()
    for part in item["loc"]:
        fields = _fields(root, location)
        in_section = part in fields or (fields and item["type"] == "extra_forbidden")
        if in_section or isinstance(part, int) or location in FREE:
            location = (*location, part)
    return location


def _where(lines: Lines, key: str, path: Path | None) -> str:
    """File and line of a key, or of the nearest section around it."""
    while key and key not in lines:
        key = key.rpartition(".")[0]
    if not key:
        return str(path or "recipe")
    file, line = lines[key]
    return f"{file}, line {line}" if line else file


def explain(error: ValidationError, root: type[BaseModel], lines: Lines, path: Path | None) -> PolymodalError:
    """One sentence for each mistake, with file and line, what is wrong, and the nearest known name."""
    sentences: dict[str, tuple[str, str]] = {}
    wrong: dict[str, list[str]] = {}  # the members of a union each have their own error
    for item in error.errors():
        location = _location(item, root)
        key = ".".join(str(part) for part in location)
        where = _where(lines, key, path)
        if item["type"] == "extra_forbidden":
            sentences[key] = f"{where}: unknown key `{key}`.", _unknown(root, location)
        elif item["type"] == "missing":
            info = _fields(root, location[:-1]).get(location[-1])  # None: an entry of a tuple
            text = " ".join((info.description if info else "").split())
            hint = f"Add it: {text[0].lower()}{text[1:]}" if text else "Add it."
            sentences[key] = f"{where}: the key `{key}` is missing.", hint
        else:
            what, hint = _mistake(item, _fields(root, location))
            if what not in wrong.setdefault(key, []):
                wrong[key].append(what)
            value = repr(item["input"])
            value = value if len(value) <= 60 else value[:57] + "..."
            hint = sentences[key][1] or hint if key in sentences else hint
            sentences[key] = f"{where}: `{key}` = {value} {', and '.join(wrong[key])}.", hint
    hints = {hint for _, hint in sentences.values()}  # a misspelt key is also missing: one message
    messages = [
        (message, hint)
        for key, (message, hint) in sentences.items()
        if f"Did you mean `{key}`?" not in hints or "is missing" not in message
    ]
    if len(messages) == 1:
        return PolymodalError(*messages[0])
    return PolymodalError("\n".join(f"{message} {hint}".strip() for message, hint in messages))
