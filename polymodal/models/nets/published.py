"""State dicts that are published as torch's own files."""

from pathlib import Path

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped and not read; what else it holds (epoch, step) is left out.

    Raises PolymodalError for a missing or damaged file, or one with other objects.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds: torch's zip reader, its unpickler
        raise PolymodalError(
            f"{path}: no readable file of tensors ({type(error).__name__}).",
            "Give the published file, complete and unchanged.",
        ) from None
    if not isinstance(state, dict):
        raise PolymodalError(f"{path}: no state dict.", "Give the published file, complete and unchanged.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
