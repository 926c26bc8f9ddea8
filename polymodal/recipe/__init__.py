"""The recipe: one typed, closed schema for everything a run does; `load` reads it, `dump` writes it."""
# ruff: noqa: F401, all are re-exported

from polymodal.recipe import file
from polymodal.recipe.schema import (
    Attr,
    Checkpoint,
    Clip,
    Data,
    Dataset,
    Device,
    Diffusion,
    Group,
    Image,
    Lora,
    LossGuard,
    Model,
    Monitor,
    Optim,
    Parallel,
    Preference,
    Profile,
    Recipe,
    Schedule,
    Train,
    Video,
    all_keys,
    changed,
    dump,
    json_schema,
    load,
    plain,
    validate,
)
