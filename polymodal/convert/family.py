"""What a converter is: its tables, the facts that it takes from a config, the checkpoints that it accepts.

Each file in families/ makes one or several. Sees table.py, operations.py and errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polymodal.convert.operations import Facts, Shape
from polymodal.convert.table import Table
from polymodal.core.errors import PolymodalError


@dataclass(frozen=True)
class Family:
    """name: as in docs; architectures: names in config.json that it accepts; tables: variant -> table ("" is the usual
    one), or what makes it from the facts; facts: config.json -> numbers; counted: facts that are counted in the
    checkpoint's keys (fact -> pattern with one group); stem: name of exported weight files; kind: generative ones bear
    the names of their trees in DCP directories too, others those of a table of kind "dcp"."""

    name: str
    title: str
    tables: Mapping[str, Table | Callable[[Facts], Table]]
    architectures: tuple[str, ...] = ()
    facts: Callable[[dict[str, Any]], Facts] | None = None
    counted: Mapping[str, str] = field(default_factory=dict)
    stem: str = "model"
    kind: Literal["language", "generative", "dcp"] = "language"

    @property
    def needs_config(self) -> bool:
        """Whether the operations need numbers that only config.json tells."""
        return self.facts is not None and not self.counted

    def table(self, variant: str = "", facts: Facts | None = None) -> Table:
        if variant not in self.tables:
            raise PolymodalError(
                f"{self.title} has no layout {variant!r}.",
                f"It has {', '.join(repr(v) for v in self.tables)}.",
            )
        made = self.tables[variant]
        return made if isinstance(made, Table) else made(facts or {})


def read_config(source: Path, required: bool = True) -> dict[str, Any]:
    """The config.json of a directory."""
    path = source / "config.json"
    if not path.is_file():
        if not required:
            return {}
        raise PolymodalError(f"{path} does not exist.", "Give the directory of the hub checkpoint.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolymodalError(
            f"{path} cannot be read: {error}.", "Copy it again from the checkpoint's origin."
        ) from None
    if not isinstance(data, dict):
        raise PolymodalError(f"{path}: a JSON object is wanted, this is a {type(data).__name__}.")
    return data


def facts_of(family: Family, source: Path, required: bool = True) -> Facts:
    """The numbers of a checkpoint's config. Raises PolymodalError for a config of another architecture."""
    config = read_config(source, required)
    named = [
        *(config.get("architectures") or ()),
        *filter(None, [config.get("_class_name"), config.get("model_type")]),
    ]
    if named and family.architectures and not set(named) & set(family.architectures):
        raise PolymodalError(
            f"{source / 'config.json'} is of {' / '.join(named)}, not of {family.title}.",
            f"This converter takes {', '.join(family.architectures)}.",
        )
    try:
        return family.facts(config) if config and family.facts else {}
    except KeyError as error:
        raise PolymodalError(
            f"{source / 'config.json'} lacks {error.args[0]}, which {family.title} needs.",
            "Copy it again from the checkpoint's origin.",
        ) from None


def counted(family: Family, facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Facts, with those that are counted in a checkpoint's hub keys."""
    found = dict(facts)
    for name, pattern in family.counted.items():
        numbers = {m[1] for key in shapes if (m := re.search(pattern, key))}
        if numbers:
            found[name] = len(numbers)
    return found


def section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of a config that older versions kept at the top."""
    for name in names:
        if isinstance(config.get(name), Mapping):
            return config[name]
    return config


def attention(text: Mapping[str, Any]) -> dict[str, int]:
    """heads, kv_heads, layers of a language model's config."""
    heads = int(text["num_attention_heads"])
    return {
        "heads": heads,
        "kv_heads": int(text.get("num_key_value_heads") or heads),
        "layers": int(text["num_hidden_layers"]),
    }
