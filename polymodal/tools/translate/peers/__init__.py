"""Files and command lines of other open trainers as a recipe, each by a module of its own.

`recognise` tells by its content whose a config file is; `translate` fills the ledger of a launch of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.peers import (
    ai_toolkit,
    diffusion_pipe,
    kohya,
    llamafactory,
    simpletuner,
    swift,
    trl,
)
from polymodal.tools.translate.peers.files import SUFFIXES, read

__all__ = ["KINDS", "SUFFIXES", "read", "recognise", "translate"]

KINDS = {
    "llamafactory": llamafactory.translate,
    "swift": swift.translate,
    "trl": trl.translate,
    "diffusion-pipe": diffusion_pipe.translate,
    "kohya": kohya.translate,
    "musubi": kohya.translate,
    "ai-toolkit": ai_toolkit.translate,
    "simpletuner": simpletuner.translate,
}


def translate(launch: Launch) -> None:
    """Fill the ledger. Raises PolymodalError for what the files lack."""
    KINDS[launch.kind](launch)


def recognise(values: Mapping[str, Any]) -> str | None:
    """The kind of launch that a config file's top-level keys belong to, None where they are nobody's."""
    names = {str(name).lstrip("-") for name in values}
    if "config" in names and "job" in names:
        return "ai-toolkit"
    if isinstance(values.get("model"), Mapping) and {"dataset", "optimizer"} <= names:
        return "diffusion-pipe"
    if names & {"data_backend_config", "model_family"}:
        return "simpletuner"
    if names & {"finetuning_type", "stage", "cutoff_len"} and "model_name_or_path" in names:
        return "llamafactory"
    if names & {"tuner_type", "train_type", "rlhf_type"} or {"model", "dataset"} <= names:
        return "swift"
    if {"model_name_or_path", "dataset_name"} <= names:
        return "trl"
    return None
