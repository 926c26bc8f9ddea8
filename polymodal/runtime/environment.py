"""Environment variables of accelerators and launchers: the table environment.yaml, and checks of values."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean

if TYPE_CHECKING:
    from polymodal import recipe

EXPANDABLE = "expandable_segments:True"
DEFAULTS = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "PYTORCH_CUDA_ALLOC_CONF": EXPANDABLE,
    "PYTORCH_NPU_ALLOC_CONF": EXPANDABLE,
    "HCCL_CONNECT_TIMEOUT": "900",
}
"""Set unless the recipe or the shell sets them. Large pages: without them a training step on a CPU spends a
fifth of its time on page faults (logits, gradients and activations are allocated in every micro-batch).
Segments of an accelerator's memory that grow: packs of different lengths otherwise leave holes in it. hccl's
own 120 s for the first collective are less than ranks may differ in reading a checkpoint."""


@dataclass(frozen=True)
class Variable:
    """One entry of environment.yaml, which documents the keys."""

    name: str
    what: str
    values: Sequence[str] = ()
    range: tuple[int, int | None] | None = None
    boolean: bool = False
    leading: Sequence[str] = ()
    options: Sequence[str] = ()
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
        """The value as it goes into the environment. Raises PolymodalError when it is out of range."""
        means = f"It means: {self.what}."
        if self.boolean:
            if str(value).lower() not in ("true", "false", "0", "1"):
                raise PolymodalError(
                    f"{self.name} = {value!r} is neither true nor false.",
                    f"Set it to true or false: {self.what}.",
                )
            return "true" if str(value).lower() in ("true", "1") else "false"
        text = str(int(value)) if isinstance(value, bool) else str(value)
        known = self.leading or self.values
        if known and (text.partition(",")[0].strip() if self.leading else text) not in known:
            raise PolymodalError(f"{self.name} = {text} is not one of {', '.join(known)}.", means)
        if self.range is not None:
            low, high = self.range
            if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
                raise PolymodalError(f"{self.name} = {text} is outside its range, {self.allowed}.", means)
        for option in text.split(",") if self.options else ():
            key, colon, _ = option.partition(":")
            if key.strip() not in self.options or not colon:
                raise PolymodalError(
                    f"{self.name}: the option `{option}` is not of the form name:value with a known name.",
                    did_you_mean(key.strip(), [f"{each}:..." for each in self.options], cutoff=0.5),
                )
        return text


ENTRIES = yaml.safe_load(Path(__file__).with_name("environment.yaml").read_text(encoding="utf-8"))
VARIABLES = {entry["name"]: Variable(**entry) for entry in ENTRIES}
"""The documented variables by name; `polymodal doctor --env` prints them."""


def check(name: str, value: str | int | bool) -> str:
    """A value of device.env as it goes into the environment. Raises PolymodalError when it is bad."""
    variable = VARIABLES.get(name)
    if variable is None:
        otherwise = "`polymodal doctor --env` lists the known ones; set others in the shell."
        raise PolymodalError(
            f"device.env: {name} is not a known environment variable.",
            did_you_mean(name, VARIABLES, otherwise),
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
    """Check device.env and set it in `environ` (default os.environ) before torch starts; returns its values.

    DEFAULTS are set too where they are not. Raises PolymodalError naming the key; nothing is set then.
    """
    environ = os.environ if environ is None else environ
    values = {name: check(name, value) for name, value in section.env.items()}
    environ.update(values)
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    return values
