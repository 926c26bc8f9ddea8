"""A recipe as a file: YAML with `base:`, line numbers, `a.b=c` overrides, and mistakes said in one sentence each.

Ground floor: pydantic and yaml only, never torch. Knows nothing of the keys; `recipe` hands its schema in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean, nearest

Places = dict[str, tuple[str, int]]
"""Dotted key -> (file, line); line 0 for overrides."""

FREE = (("model", "config"), ("device", "env"), ("data", "template_kwargs"))
"""Mappings whose names are not the recipe's: merged one level deep, dotted names kept whole."""


class Section(BaseModel):
    """A section of the recipe: closed (no unknown keys), checked on assignment, every key documented."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-5 is one; yes, no, on and off are words."""


_Yaml.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern)
        for tag, pattern in rules
        if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    ]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class _Dump(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


_Dump.yaml_implicit_resolvers = {
    letter: [
        *_Yaml.yaml_implicit_resolvers.get(letter, []),
        *yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
    ]
    for letter in {*_Yaml.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
}


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Yaml)


def write(data: dict) -> str:
    """Plain data as YAML that `read` reads back unchanged."""
    text = yaml.dump(data, Dumper=_Dump, sort_keys=False, allow_unicode=True)
    if any(
        mark in text for mark in "\x85\u2028\u2029"
    ):  # line breaks to YAML, which the dumper does not escape
        text = yaml.dump(data, Dumper=_Dump, sort_keys=False, allow_unicode=False)
    return text


def _compose(path: Path) -> tuple[dict, Places]:
    """YAML file -> (plain data, {dotted key: (file, line)})."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PolymodalError(
            f"The recipe {path} does not exist.", "Check the path, or write one with `polymodal init MODEL`."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolymodalError(
            f"The recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    try:
        node = yaml.compose(text, Loader=_Yaml)
        places: Places = {}
        if node is not None:
            _walk(node, "", path, places)
        data = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        tab = mark is not None and mark.line < text.count("\n") + 1 and "\t" in (text.split("\n")[mark.line])
        mend = (
            "YAML is indented with spaces, not tabs."
            if tab
            else "Look at the indentation and the quotes there."
        )
        raise PolymodalError(
            f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.", mend
        ) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PolymodalError(
            f"{path}: a recipe is a mapping of sections, this file holds a {type(data).__name__}.",
            "Start from `polymodal init MODEL`.",
        )
    return data, places


def _walk(node: yaml.Node, prefix: str, path: Path, places: Places) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in seen:
                raise PolymodalError(
                    f"{path}, line {key.start_mark.line + 1}: `{name}` is given twice.", "Remove one of them."
                )
            seen.add(name)
            places[name] = (str(path), key.start_mark.line + 1)
            _walk(value, name + ".", path, places)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            places[f"{prefix}{i}"] = (str(path), value.start_mark.line + 1)
            _walk(value, f"{prefix}{i}.", path, places)


def _merge(base: dict, over: dict, path: tuple = ()) -> dict:
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and path not in FREE:
            out[key] = _merge(out[key], value, (*path, key))
        else:
            out[key] = value
    return out


def read(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict, Places]:
    """A recipe file with the files of its `base:` merged under it: (plain data, places).

    Mappings are merged key by key, everything else is replaced. Raises PolymodalError with file and line.
    """
    full = path.resolve()
    if full in chain:
        raise PolymodalError(
            f"{path}: `base:` goes in a circle ({' -> '.join(p.name for p in (*chain, full))}).",
            "Remove one of the `base:` lines.",
        )
    data, places = _compose(path)
    base = data.pop("base", None)
    line = places.pop("base", (str(path), 0))[1]
    if base is None:
        return data, places
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PolymodalError(
            f"{path}, line {line}: `base:` = {base!r} is not a file name or a list of them.",
            "Write e.g. base: ../base.yaml",
        )
    merged: dict = {}
    merged_places: Places = {}
    for name in names:
        file = path.parent / name
        if not file.is_file():
            raise PolymodalError(
                f"{path}, line {line}: the base recipe {file} does not exist.",
                "`base:` is relative to the file it stands in.",
            )
        child, child_places = read(file, (*chain, full))
        merged = _merge(merged, child)
        merged_places.update(child_places)
    merged_places.update(places)
    return _merge(merged, data), merged_places


def override(data: dict, places: Places, text: str) -> None:
    """Apply one `a.b=c` to `data`. Numbers count list entries; names inside free mappings keep their dots."""
    key, sep, value = text.partition("=")
    key = key.strip().lstrip("-")
    if not sep or not key or not all(key.split(".")):
        raise PolymodalError(
            f"The override `{text}` is not of the form a.b=c.",
            "Write e.g. train.steps=100; quote values with spaces.",
        )
    try:
        parsed = _parse(value) if value else None
    except yaml.YAMLError:
        parsed = value
    target: Any = data
    parts = key.split(".")
    for free in FREE:  # model.config.text_config.hidden_size: a name with dots in model.config
        if tuple(parts[: len(free)]) == free and len(parts) > len(free):
            parts = [*free, ".".join(parts[len(free) :])]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise PolymodalError(
                    f"The override `{text}`: `{'.'.join(parts[:i])}` is a list of {len(target)}, `{part}` is not one of its numbers.",
                    "Entries are numbered from 0.",
                )
            if last:
                target[int(part)] = parsed
            else:
                target = target[int(part)]
        elif last:
            target[part] = parsed
        else:
            if not isinstance(target.get(part), (dict, list)):
                target[part] = {}
            target = target[part]
    for old in [name for name in places if name == key or name.startswith(key + ".")]:
        del places[old]
    places[key] = (f"override `{text}`", 0)


# ---- mistakes -----------------------------------------------------------------------------------------------------


def _sections(annotation: Any) -> list[type[BaseModel]]:
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    for argument in getattr(annotation, "__args__", ()) or ():
        found += _sections(argument)
    return found


def _section_at(root: type[BaseModel], location: tuple) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            continue
        info = section.model_fields.get(part) if section is not None else None
        children = _sections(info.annotation) if info is not None else []
        section = children[0] if children else None
    return section


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema; entries of lists have no number."""
    found = []
    for name, info in section.model_fields.items():
        found.append(prefix + name)
        for child in _sections(info.annotation):
            found += keys(child, f"{prefix}{name}.")
    return found


def _place(places: Places, dotted: str, path: Path | None) -> str:
    probe = dotted
    while probe:
        if probe in places:
            file, line = places[probe]
            return f"{file}, line {line}" if line else file
        probe = probe.rpartition(".")[0]
    return str(path or "recipe")


def _words(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(item: Mapping[str, Any], section: type[BaseModel] | None) -> tuple[str, str]:
    """(what is wrong with the value, mend) in plain words."""
    kind, context, value = item["type"], item.get("ctx", {}), item.get("input")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"is not one of {', '.join(allowed)}", did_you_mean(value, allowed, "", 0.5)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        known = list(section.model_fields) if section is not None else []
        mend = (
            f"Write its keys indented below it: {', '.join(known[:6])}{', ...' if len(known) > 6 else ''}."
            if known
            else "Write name: value pairs below it."
        )
        return "is a section, not a single value", mend
    if kind == "list_type":
        return "is not a list", "Write it in brackets, or one entry a line after `- `."
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return "is not a whole number", ""
    if kind in ("float_parsing", "float_type"):
        return "is not a number", ""
    if kind in ("too_short", "too_long"):
        return f"must have {context.get('min_length', context.get('max_length'))} entries", ""
    if kind in ("bool_parsing", "bool_type"):
        return "is neither true nor false", ""
    if kind == "string_type":
        return "is not text", "Put it in quotes." if isinstance(value, (int, float, bool)) else ""
    for name, words in {
        "greater_than_equal": "ge",
        "greater_than": "gt",
        "less_than_equal": "le",
        "less_than": "lt",
    }.items():
        if kind == name:
            sense = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}[words]
            return f"must be {sense} {context[words]:g}", ""
    if kind == "value_error":
        return str(context.get("error", item["msg"])), ""
    return item["msg"][0].lower() + item["msg"][1:], ""


def _unknown(root: type[BaseModel], location: tuple) -> str:
    name, parents = str(location[-1]), location[:-1]
    section = _section_at(root, parents)
    known = list(section.model_fields) if section is not None else []
    every = keys(root)
    if near := nearest(name, known):
        return f"Did you mean `{'.'.join([*map(str, parents), near[0]])}`?"
    if elsewhere := [key for key in every if key.rpartition(".")[2] == name]:
        return f"Did you mean `{elsewhere[0]}`?"
    last = {key.rpartition(".")[2]: key for key in reversed(every)}
    if near := nearest(name, last, 0.75):
        return f"Did you mean `{last[near[0]]}`?"
    return f"Known keys here: {', '.join(known) or 'none'}."


def explain(
    error: ValidationError, root: type[BaseModel], places: Places, path: Path | None
) -> PolymodalError:
    """One sentence for each mistake, with file and line, what is wrong, and the nearest known name."""
    sentences: dict[str, tuple[str, str]] = {}
    for item in error.errors():
        location: tuple = ()
        for part in item["loc"]:  # pydantic adds names of union members, which are no keys
            section = _section_at(root, location)
            if (
                location in FREE
                or isinstance(part, int)
                or (
                    section is not None
                    and (part in section.model_fields or item["type"] == "extra_forbidden")
                )
            ):
                location = (*location, part)
        dotted = ".".join(str(part) for part in location)
        place = _place(places, dotted, path)
        if item["type"] == "extra_forbidden":
            sentence = f"{place}: unknown key `{dotted}`.", _unknown(root, location)
        elif item["type"] == "missing":
            section = _section_at(root, location[:-1])
            what = (
                section.model_fields[location[-1]].description
                if section is not None and location[-1] in section.model_fields
                else None
            )
            sentence = (
                f"{place}: the key `{dotted}` is missing.",
                f"Add it: {what[0].lower() + what[1:]}" if what else "Add it.",
            )
        else:
            said, mend = _message(item, _section_at(root, location))
            sentence = f"{place}: `{dotted}` = {_words(item.get('input'))} {said}.", mend
        if dotted in sentences and item["type"] not in ("extra_forbidden", "missing"):  # members of one union
            old = sentences[dotted]
            if sentence[0] != old[0]:
                sentences[dotted] = (
                    f"{old[0].rstrip('.')}, and {sentence[0].partition(_words(item.get('input')) + ' ')[2]}",
                    old[1] or mend,
                )
        else:
            sentences[dotted] = sentence
    mends = {mend for _, mend in sentences.values()}  # a misspelt key is also missing: said once
    seen = [
        said
        for dotted, said in sentences.items()
        if f"Did you mean `{dotted}`?" not in mends or "is missing" not in said[0]
    ]
    if len(seen) == 1:
        return PolymodalError(*seen[0])
    return PolymodalError("\n".join(f"{message} {hint}".strip() for message, hint in seen))
