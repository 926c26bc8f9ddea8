"""The recipe's reference page, written from the schema: every key with its type, its default and what it means.

Sees recipe only. `polymodal recipe docs` prints the page; a test keeps the committed copy equal to it.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polymodal.recipe import Recipe

HEAD = """# The recipe

One YAML file says everything a run does. It is closed: an unknown key, a value of the wrong type or out of its
range stops the command with the file, the line and the nearest known name.

* `base: ../base.yaml` starts from another recipe (or several, in order), relative to the file it stands in; mappings
  are merged key by key, everything else is replaced.
* `polymodal train recipe.yaml train.steps=100 data.datasets.0.path=b.json` overrides keys; entries of lists are
  numbered from 0.
* Paths are relative to the working directory, as on a command line.
* The resolved recipe is saved with the run as `recipe.yaml`; training it again gives the same run.
* `polymodal recipe schema > recipe.schema.json` writes the JSON schema; an editor with a YAML language server completes
  and checks recipes after `# yaml-language-server: $schema=recipe.schema.json` in the first line.

This page is written by `polymodal recipe docs`.
"""


def _bounds(info: FieldInfo) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{signs[name]} {getattr(rule, name):g}"
        for rule in info.metadata
        for name in signs
        if getattr(rule, name, None) is not None
    ]
    return ", ".join(found)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return found + [section for argument in get_args(annotation) for section in _sections(argument)]


def _type(annotation: Any) -> str:
    """A type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        bounds = _bounds(FieldInfo.from_annotation(annotation))
        return _type(arguments[0]) + (f", {bounds}" if bounds else "")
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (types.UnionType, typing.Union):
        parts = [_type(argument) for argument in arguments if argument is not type(None)]
        return " or ".join(dict.fromkeys([*parts, *(["`null`"] if type(None) in arguments else [])]))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if _sections(annotation):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}.get(
        annotation, "any"
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return ""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).replace("\n...", "").strip()
    return f"`{text}`"


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, info in section.model_fields.items():
        bounds = _bounds(info)
        kind = _type(info.annotation) + (f", {bounds}" if bounds else "")
        meaning = re.sub(r"\s+", " ", info.description or "")
        rows.append(
            "| "
            + " | ".join(cell.replace("|", "\\|") for cell in (f"`{name}`", kind, _default(info), meaning))
            + " |"
        )
    return "\n".join(rows) + "\n"


def _pages(section: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """The sections below `section`; one that is used twice is written once."""
    out = []
    for name, info in section.model_fields.items():
        for child in _sections(info.annotation)[:1]:
            title, text = f"{prefix}{name}", re.sub(r"\s+", " ", info.description or "")
            each = " (each entry)" if get_origin(info.annotation) is list else ""
            head = f"\n{'##' if not prefix else '###'} {title}{each}\n\n{text}\n\n"
            if child in seen:
                out.append(f"{head}Keys as in `{seen[child]}`.\n")
                continue
            seen[child] = title
            out.append(head + _table(child))
            out += _pages(child, f"{title}.", seen)
    return out


def markdown() -> str:
    """The whole page."""
    top = "\n## Top level\n\n" + _table(Recipe)
    return HEAD + top + "".join(_pages(Recipe, "", {}))
