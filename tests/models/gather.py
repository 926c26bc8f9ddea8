"""A live model's tensors as one process would hold them, of plain models and of models laid out, and a hub checkpoint of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from polymodal.models import library, lora, saving
from polymodal.recipe import Lora


def tensor(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by plain name, without adapters. Collective for a model that is laid out."""
    return {names[0]: tensor(value) for value, names in library.aliases(model)}


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor(value) for name, value in lora.adapters(model).items()}


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights with their adapters added."""
    return dict(lora.merged(weights(model), adapters(model), lora.scales(model), model))


def save_adapter(
    state: Mapping[str, torch.Tensor],
    model: nn.Module,
    options: Lora,
    directory: Path | str,
    *,
    base: Path | str,
) -> Path:
    """What export does with adapters, into a directory that appears when whole."""
    with saving.appearing(Path(directory)) as partial:
        lora.write(state, model, options, partial, base=str(base))
    return Path(directory)


def save(
    state: Mapping[str, torch.Tensor],
    directory: Path,
    *,
    model: nn.Module,
    source: Path | str,
    dtype: torch.dtype | None = None,
    limit: int = 5 << 30,
    overwrite: bool = False,
    convert: bool = False,
    config: Any = None,
) -> Path:
    """What export does with weights: files with the source's keys and layout, in a directory that appears when whole."""
    with saving.appearing(directory, overwrite) as partial:
        files = saving.outputs(model, None if convert else Path(source), dtype)
        saving.write(state, model, files, partial, limit)
        saving.write_config(model, config or model.config, Path(source), partial, files, convert)
    return directory
