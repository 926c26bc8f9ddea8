"""One file a net (or a group of nets): how a golden file's config becomes our class, and its cases calls of it."""

import importlib
import pkgutil
from typing import Any

from tests.golden.net import Net


def find(document: dict[str, Any]) -> Net:
    """The net of a golden file, by the beginning of its `model` (the longest that fits)."""
    fitting = [
        (len(prefix), net) for net in _all() for prefix in net.models if document["model"].startswith(prefix)
    ]
    if not fitting:
        raise LookupError(f"no net for the model {document['model']!r}; known: {', '.join(known())}")
    return max(fitting, key=lambda pair: pair[0])[1]


def known() -> list[str]:
    return sorted(prefix for net in _all() for prefix in net.models)


def _all() -> list[Net]:
    modules = (
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    )
    return [net for module in modules for net in module.NETS]
