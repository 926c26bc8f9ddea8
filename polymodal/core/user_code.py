"""Objects of a user's own modules, named `module:name` in a recipe.

A module must be installed or lie on PYTHONPATH: the working directory is never searched because a command
happens to be started there, so that a file lying in it cannot replace a module by its name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest

_FORM = re.compile(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)")


def load_object(reference: str, key: str) -> Any:
    """The object that `module:name` stands for. key: the recipe's key that holds it, for messages.

    Raises PolymodalError for another form, a module that cannot be found or fails while it is imported, and a
    name that it does not have.
    """
    named = f"{key} = {reference}"
    parts = _FORM.fullmatch(reference)
    if parts is None:
        raise PolymodalError(
            f"{named} is not of the form module:name.", "Write e.g. my_package.losses:Focal."
        )
    module, names = parts.groups()
    try:
        with _without_working_directory():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise PolymodalError(
                f"{named}: {module} imports {error.name}, which is not installed.",
                f"Install it (`pip install {error.name}`), or correct the import.",
            ) from error
        raise PolymodalError(
            f"{named}: there is no module {error.name}.",
            "It must be installed or its directory be on PYTHONPATH; the working directory is not searched.",
        ) from None
    except Exception as error:
        raise PolymodalError(
            f"{named}: importing {module} failed: {type(error).__name__}: {error}.",
            f"Try `python -c 'import {module}'`.",
        ) from error
    for name in names.split("."):
        if not hasattr(found, name):
            near = nearest(name, dir(found))
            raise PolymodalError(
                f"{named}: {module} has no `{name}`.",
                f"Did you mean {near[0]}?" if near else "Check the name.",
            )
        found = getattr(found, name)
    return found


@contextlib.contextmanager
def _without_working_directory() -> Iterator[None]:
    """sys.path without its first entry where that is the working directory, which `python -m` and an
    interactive python put there, and PYTHONPATH does not name it."""
    here = os.path.realpath(os.getcwd())
    named = [os.path.realpath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    implicit = bool(sys.path) and os.path.realpath(sys.path[0] or here) == here and here not in named
    if not implicit:
        yield
        return
    first = sys.path.pop(0)
    try:
        yield
    finally:
        sys.path.insert(0, first)
