"""Environment variables of accelerators and launchers: the table in environment.yaml, and values held against
it."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean

if TYPE_CHECKING:
    from polymodal import recipe

OWN = {"THP_MEM_ALLOC_ENABLE": "1"}
"""What is set when neither the recipe nor the shell says otherwise. Large pages: a training step on a CPU
spends a fifth of its time on page faults without (logits, gradients and activations come and go in every
micro-batch)."""


@dataclass(frozen=True)
class Variable:
    """One entry of environment.yaml, whose first lines say what the keys mean."""

    name: str
    what: str
    values: tuple[str, ...] = ()
    range: tuple[int, int | None] | None = None
    boolean: bool = False
    leading: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    default: str = ""
    shell: bool = False

    @property
    def allowed(self) -> str:
        """The range in words, for tables and messages."""
        if self.values or self.leading:
            return " | ".join(self.values or self.leading)
        if self.range is not None:
            low, high = self.range
            return f"from {low}" if high is None else f"{low:,} to {high:,}"
        if self.options:
            return ", ".join(f"{name}:..." for name in self.options[:2])
        return "true | false" if self.boolean else "text"

    def check(self, value: str | int | bool) -> str:
        """The value as the variable's reader wants it. Raises PolymodalError when it is out of range."""
        means = f"It means: {self.what}."
        if self.boolean:
            if str(value).lower() not in ("true", "false", "0", "1"):
                raise PolymodalError(
                    f"{self.name} = {value!r} is neither true nor false.",
                    f"Set it to true or false: {self.what}.",
                )
            return "true" if str(value).lower() in ("true", "1") else "false"
        text = str(int(value)) if isinstance(value, bool) else str(value)
        found, known = (text.partition(",")[0].strip(), self.leading) if self.leading else (text, self.values)
        if known and found not in known:
            raise PolymodalError(f"{self.name} = {text} is not one of {', '.join(known)}.", means)
        if self.range is not None:
            low, high = self.range
            number = int(text) if text.lstrip("-").isdecimal() else None
            if number is None or number < low or (high is not None and number > high):
                raise PolymodalError(f"{self.name} = {text} is outside its range, {self.allowed}.", means)
        for option in text.split(",") if self.options else ():
            key, colon, _ = option.partition(":")
            if key.strip() not in self.options or not colon:
                raise PolymodalError(
                    f"{self.name}: the option `{option}` is not of the form name:value with a known name.",
                    did_you_mean(key.strip(), [f"{each}:..." for each in self.options], cutoff=0.5),
                )
        return text


def _read() -> dict[str, Variable]:
    rows = yaml.safe_load(Path(__file__).with_name("environment.yaml").read_text(encoding="utf-8"))
    entries = ({k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return {entry["name"]: Variable(**entry) for entry in entries}


VARIABLES = _read()
"""The documented variables by name; `polymodal doctor --env` prints them."""


def check(name: str, value: str | int | bool) -> str:
    """A value of device.env as it goes into the environment. Raises PolymodalError for an unknown name or a
    bad value."""
    variable = VARIABLES.get(name)
    if variable is None:
        raise PolymodalError(
            f"device.env: {name} is not a known environment variable.",
            did_you_mean(
                name, VARIABLES, "`polymodal doctor --env` lists the known ones; set others in the shell."
            ),
        )
    if variable.shell:
        raise PolymodalError(
            f"device.env: {name} is needed before the recipe is read.",
            f"Set it in the shell: export {name}={value}",
        )
    try:
        return variable.check(value)
    except PolymodalError as error:
        raise PolymodalError(f"device.env: {error.message}", error.hint) from None


def apply(section: recipe.Device, environ: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Check device.env and set it in `environ` (default os.environ), before torch starts. Returns what was
    set of it.

    What is in OWN is set too where nobody has said otherwise. Raises PolymodalError naming the key; nothing
    is set then.
    """
    values = {name: check(name, value) for name, value in section.env.items()}
    into = os.environ if environ is None else environ
    into.update(values)
    for name, value in OWN.items():
        into.setdefault(name, value)
    return values
