"""The recipe's reference page, written from the schema: every key with its type, its default and its meaning.

`polymodal recipe docs` prints the page; a test keeps the committed copy equal to it.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polymodal.recipe import Recipe
from polymodal.recipe.file import sections

HEAD = """# The recipe

One YAML file describes everything a run does. It is closed: an unknown key, a value of the wrong type or
out of its range stops the command with the file, the line and the nearest known name.

* `base: ../base.yaml` starts from another recipe (or several, in order), relative to the file that names it;
  mappings are merged key by key, everything else is replaced.
* `polymodal train recipe.yaml train.steps=100 data.datasets.0.path=b.json` overrides keys; entries of lists
  are numbered from 0.
* Paths are relative to the working directory, as on a command line.
* The resolved recipe is saved with the run as `recipe.yaml`; training it again gives the same run.
* `polymodal recipe schema > recipe.schema.json` writes the JSON schema; an editor with a YAML language server
  completes and checks recipes after `# yaml-language-server: $schema=recipe.schema.json` in the first line.

This page is written by `polymodal recipe docs`.
"""


def _bounds(info: FieldInfo) -> str:
    """Least and largest value, e.g. ", ≥ 0, < 1"; "" without any."""
    text = ""
    for rule in info.metadata:
        for name, sign in {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}.items():
            if (bound := getattr(rule, name, None)) is not None:
                text += f", {sign} {bound:g}"
    return text


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _type(annotation: Any) -> str:
    """A type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0]) + _bounds(FieldInfo.from_annotation(annotation))
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
    if sections(annotation):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).replace("\n...", "").strip()
    return f"`{text}`"


def _table(section: type[BaseModel]) -> str:
    rows, escaped = ["| key | value | default | meaning |", "|---|---|---|---|"], "\\|"
    for name, info in section.model_fields.items():
        cells = (f"`{name}`", _type(info.annotation) + _bounds(info), _default(info), _meaning(info))
        rows.append(f"| {' | '.join(cell.replace('|', escaped) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _pages(section: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """The sections below `section`; one that is used twice is written once."""
    out = []
    for name, info in section.model_fields.items():
        for child in sections(info.annotation)[:1]:
            title = f"{prefix}{name}"
            each = " (each entry)" if get_origin(info.annotation) is list else ""
            head = f"\n{'##' if not prefix else '###'} {title}{each}\n\n{_meaning(info)}\n\n"
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
