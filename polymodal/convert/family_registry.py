"""Finds a family of tables by its name, and the families that know a set of keys."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable

from polymodal.convert.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    from polymodal.convert import families as room

    found = {}
    for module in pkgutil.iter_modules(room.__path__):
        for value in vars(importlib.import_module(f"{room.__name__}.{module.name}")).values():
            if isinstance(value, Family):
                found[value.name] = value
    return found


def family(name: str) -> Family:
    return families()[name]


def by_architecture(names: Iterable[str]) -> list[Family]:
    """Families that accept a config with one of these architectures."""
    wanted = set(names)
    return [one for one in families().values() if wanted & set(one.architectures)]
