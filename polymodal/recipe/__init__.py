"""The recipe: one typed, closed schema for everything a run does; `load` reads it, `dump` writes it."""

from polymodal.recipe import file
from polymodal.recipe.schema import (
    Attr,
    Checkpoint,
    Clip,
    Data,
    Dataset,
    Device,
    Diffusion,
    Evaluate,
    Group,
    Image,
    Lora,
    LossGuard,
    Model,
    Monitor,
    Optim,
    Parallel,
    Profile,
    Recipe,
    Samples,
    Schedule,
    Section,
    Train,
    Video,
    all_keys,
    changed,
    dump,
    json_schema,
    load,
    validate,
)

__all__ = [
    "Attr", "Checkpoint", "Clip", "Data", "Dataset", "Device", "Diffusion", "Evaluate", "Group", "Image", "Lora",
    "LossGuard", "Model", "Monitor", "Optim", "Parallel", "Profile", "Recipe", "Samples", "Schedule", "Section",
    "Train", "Video", "all_keys", "changed", "dump", "file", "json_schema", "load", "validate",
]  # fmt: skip
