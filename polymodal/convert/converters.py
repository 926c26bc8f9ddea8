"""The converters that `mm-convert` offers: classes made from the table in converters.yaml.

What their methods do is in actions_*.py, imported when they are called, so that help comes at once, without
torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from polymodal.convert import options as option_types
from polymodal.convert.options import Settings
from polymodal.core.terminal import say_lines

TYPES: dict[str, Any] = {
    **{one.__name__: one for one in (str, bool, int, float)},
    **{name: one for name, one in vars(option_types).items() if isinstance(one, type)},
    "optional float": float | None,
    "optional list": list[str] | None,
    "optional names": dict[str, str] | None,
    "style": Literal["merge", "split"],
    "hunyuan version": Literal["t2v", "i2v", "t2v-lora", "i2v-lora", "1.5"],
    "cogvideo version": Literal["t2v", "i2v"],
    "plan version": Literal["v1.2", "v1.3", "v1.5"],
}
"""Types of options, by their names in the table."""
HELP = {
    "verify": "read everything back and compare.",
    "dry_run": "print files, keys, shapes and bytes; write nothing.",
    "workers": "threads; 0 = one a core.",
    "force": "replace a target that was not written by a conversion.",
    "allow_pickle": "read files that hold more than tensors; the rest is replaced by inert objects.",
}
"""Fields of Settings: options of every method (allow_pickle: of those that read torch's files)."""


@dataclass(frozen=True)
class Call:
    """What an action gets beside its method's options. converter: its name; family, variant, original: names
    of the family and of its tables, for the hub's names and for those of the original code."""

    settings: Settings
    converter: str
    family: str = ""
    variant: str = ""
    original: str = ""
    remove_pos_emb: bool = False


@dataclass(frozen=True)
class Option:
    """An option of a command: its name, type and help."""

    name: str
    type: Any
    help: str
    default: Any = inspect.Parameter.empty

    @property
    def parameter(self) -> inspect.Parameter:
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=self.default, annotation=self.type)


SETTINGS = [
    Option(name, type(getattr(Settings, name)), text, getattr(Settings, name)) for name, text in HELP.items()
]


def _described(function: Callable, options: list[Option], text: str, name: str = "") -> Any:
    """A function with the signature and the help that the command line shows. name: none for a method."""
    own = [] if name else [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    function.__signature__ = inspect.Signature([*own, *(one.parameter for one in options)])  # type: ignore
    function.__annotations__ = {one.name: one.type for one in options}
    function.__doc__ = "\n".join([text, "", "Args:", *(f"    {one.name}: {one.help}" for one in options)])
    function.__name__ = name or function.__name__
    return function


class _Table:
    """The content of converters.yaml."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.options = {
            key: Option(**{"name": key, **entries, "type": TYPES[entries["type"]]})
            for key, entries in content["options"].items()
        }

    def method(self, entries: Mapping[str, Any], name: str = "") -> Callable:
        """A method of a class, or a function, where it has a name of its own."""
        parameters = {key: self.options[option] for key, option in entries["options"].items()}
        settings = [one for one in SETTINGS if one.name != "allow_pickle" or entries.get("torch_files")]

        def run(self: Any = None, **given: Any) -> None:
            given = {one.name: one.default for one in (*parameters.values(), *settings)} | given
            call = {"converter": name, **(self.call if self else {}), **entries.get("call", {})}
            call["settings"] = Settings(**{one.name: given[one.name] for one in settings})
            module, _, action = entries["action"].partition(".")
            function = getattr(import_module(f"polymodal.convert.actions_{module}"), action)
            result = function(Call(**call), **{key: given[one.name] for key, one in parameters.items()})
            for report in result if inspect.isgenerator(result) else [result]:
                say_lines(report, "\n")

        return _described(run, [*parameters.values(), *settings], entries["help"], name)

    def converter(self, name: str, entries: Mapping[str, Any]) -> type:
        options = [self.options[option] for option in entries.get("options", ())]

        def initialise(self: Any, **values: Any) -> None:
            values = {one.name: one.default for one in options} | values
            version = entries.get("versions", {}).get(values.pop("version", ""), {})
            self.call = {"converter": name, **entries.get("call", {}), **version, **values}

        methods = {}
        for group in entries["methods"]:
            methods |= {key: self.method(one) for key, one in self.content["methods"][group].items()}
        initialise = _described(initialise, options, "")
        return type(name, (), {"__doc__": entries["help"], "__init__": initialise, **methods})


def _converters() -> dict[str, Callable]:
    table = _Table(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))
    classes = {name: table.converter(name, one) for name, one in table.content["converters"].items()}
    return classes | {name: table.method(one, name) for name, one in table.content["functions"].items()}


CONVERTERS = _converters()
"""What the command offers, by name."""
