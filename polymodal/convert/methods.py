"""What the methods of `mm-convert` share: the options that all have, their help, printing of what was done.

A method takes a keyword argument `settings`; `method` gives it the fields of Settings as options of the command line
instead, and prints the reports that it returns. Imports of torch wait for the call, so that help comes at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from polymodal.convert.options import Settings

if TYPE_CHECKING:
    from polymodal.convert.family import Family

SETTINGS = {
    "verify": "read everything back and compare.",
    "dry_run": "print files, keys, shapes and bytes; write nothing.",
    "workers": "threads; 0 = one a core.",
    "force": "replace a target that was not written by a conversion.",
    "allow_pickle": "read files that hold more than tensors; the rest is replaced by inert objects.",
}
"""Options of every method: fields of Settings."""
ARGUMENTS = {
    "cfg": "source, target and options.",
    "hf_dir": "directory of the hub checkpoint.",
    "dcp_dir": "the DCP directory (towards the hub: release or iter_..., or the one above it).",
    "load_dir": "the DCP directory (release or iter_...), or the one above it.",
    "lora_dcp_dir": "DCP directory of the LoRA run.",
    "save_dir": "where the result goes.",
    "save_hf_dir": "where the hub checkpoint goes.",
    "save_merged_hf_dir": "where the sum goes.",
    "model_assets_dir": "the hub checkpoint that it came from: config, processor, cut into files.",
    "origin_hf_dir": "the hub checkpoint that it came from.",
    "base_hf_dir": "the base's hub checkpoint.",
    "dcp_prefix": "what the directory's names begin with.",
    "hf_prefix": "what the hub's names begin with instead.",
    "tie_weight_mapping": (
        'tensors that are written as copies: {"lm_head.weight": "model.embed_tokens.weight"}.'
    ),
    "fused_linear_names": "expert tensors that lie one below the other in the directory, such as gate_up_proj.",
    "max_shard_size": "largest weight file.",
    "trust_remote_code": "accepted for scripts that give it; no code of a checkpoint is ever run.",
}
"""Arguments that mean the same wherever they are taken."""


def method(function: Callable, reads_torch_files: bool = False) -> Callable:
    """A method of the command line, from one that takes Settings."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
    defaults = {field.name: field.default for field in fields(Settings)}
    names = [name for name in SETTINGS if name != "allow_pickle" or reads_torch_files]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default))
        for name in names
        for default in [defaults[name]]
    ]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        settings = Settings(**{name: kwargs.pop(name) for name in names if name in kwargs})
        result = function(*args, **kwargs, settings=settings)
        for report in result if inspect.isgenerator(result) else [result]:
            print(report)

    signature = inspect.Signature([*own, *more])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    text = inspect.cleandoc(function.__doc__ or "")
    text += "" if "Args:" in text else "\n\nArgs:"
    shared = {
        p.name: ARGUMENTS[p.name] for p in own if p.name in ARGUMENTS and f"\n    {p.name}: " not in text
    }
    help_texts = {**shared, **{name: SETTINGS[name] for name in names}}
    run.__doc__ = text + "".join(f"\n    {name}: {explained}" for name, explained in help_texts.items())
    return run


method_on_torch_files = functools.partial(method, reads_torch_files=True)


class Converter:
    """A converter of one family. Its public methods are what the command line offers: those that work for it, no others."""

    _family: str = ""

    def _of(self) -> Family:
        from polymodal.convert.family import family

        return family(self._family)
