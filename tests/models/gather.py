"""A live model's tensors as one process would hold them: of plain models and of models laid out over several ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from polymodal.models import library, lora


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
