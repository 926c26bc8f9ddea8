"""Objects that the processes of a run send one another (`all_gather_object` and its like).

torch pickles them, and opens a pickle by calling whatever it names; a process that got between two ranks
could run code in the others. `only_records` lets torch open records alone: values of Python, paths, sizes and
dtypes, tensors, exceptions, and the dataclasses and enumerations of torch.distributed and of this package.
"""

from __future__ import annotations

import enum
import io
import pickle
import sys
from dataclasses import is_dataclass
from typing import Any

VALUES = {
    "builtins": {"set", "frozenset", "complex", "slice", "range", "bytearray"},
    "collections": {"OrderedDict", "defaultdict", "Counter", "deque"},
    "datetime": {"datetime", "timedelta", "date", "timezone"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "traceback": {"StackSummary", "FrameSummary"},
    "torch": {"Size", "device", "Tensor"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_meta_tensor_no_storage"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"scalar", "_reconstruct"},
    "numpy.core.multiarray": {"scalar", "_reconstruct"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.numeric": {"_frombuffer"},
}
"""Names beside records: none of them runs code that it is given."""


def _numbers(content: bytes) -> Any:
    """In place of torch's `_load_from_bytes`, which opens a pickle inside the pickle."""
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


class Records(pickle.Unpickler):
    """Raises UnpicklingError for what is no record. Imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _numbers
        found = getattr(sys.modules.get(module), name, None)
        if name in VALUES.get(module, ()) and found is not None:
            return found
        if module == "torch" and type(found).__name__ == "dtype":
            return found
        if isinstance(found, type) and found.__module__ == module:
            ours = module.startswith(("torch.distributed.", "polymodal."))
            if issubclass(found, BaseException) or (
                ours and (is_dataclass(found) or issubclass(found, enum.Enum))
            ):
                return found
        raise pickle.UnpicklingError(f"another process sent {module}.{name}, which is no plain record")


def only_records() -> None:
    """From here on, in this process."""
    from torch.distributed import distributed_c10d

    distributed_c10d._unpickler = Records  # type: ignore[assignment]
