"""jinja2 templates beside these files: recipes, job scripts, the page of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2


def template(name: str, **filters: Callable) -> jinja2.Template:
    """The template of a file of this directory, in whose own directory it finds those that it imports."""
    file = Path(__file__).parent / name
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(file.name)
