"""Checkpoints: DCP directories that are whole when they exist, resumed at any world size and layout.

`<run>/checkpoints/step-00000100/` holds the trainable parameters, the optimizer, the average (all by parameter name,
any sharding) and `state.json`: step, data position, recipe, versions. It is written as `.step-...tmp` and renamed
when every rank has finished. Sees torch, recipe and errors; knows nothing of models.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from polymodal import __version__
from polymodal.core.errors import PolymodalError
from polymodal.runtime import process_group

STATE = "state.json"

# one process is a layout like any other here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass
class RunState:
    """Everything of a run that is not a tensor. `position` is the data state, whatever the world size."""

    step: int = 0
    position: dict[str, int] = field(default_factory=lambda: {"epoch": 0, "window": 0, "step": 0})
    data: str = ""  # fingerprint of the schedule that `position` belongs to
    samples: int = 0
    tokens: int = 0
    scaler: dict[str, float] = field(default_factory=dict)
    norm_mean: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    import transformers

    return {"polymodal": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def found(run: Path) -> list[Path]:
    """Whole checkpoints of a run (or of its directory of checkpoints), oldest first."""
    base = run / "checkpoints"
    if run.name == base.name and not base.is_dir():
        base = run
    return sorted(p for p in base.glob("step-*") if (p / STATE).is_file()) if base.is_dir() else []


def newest(run: Path) -> Path | None:
    have = found(run)
    return have[-1] if have else None


def at(path: str | os.PathLike) -> Path | None:
    """The checkpoint that a path names: itself, or the newest of the run that lies there; None for anything else."""
    path = Path(path)
    return path if (path / STATE).is_file() else newest(path)


def locate(path: str | os.PathLike) -> Path:
    """A run directory or one checkpoint -> the checkpoint directory. Raises PolymodalError."""
    path = Path(path)
    have = at(path)
    if have is None:
        others = found(path.parent.parent) if path.parent.name == "checkpoints" else []
        raise PolymodalError(
            f"{path} is neither a checkpoint nor a run that has one.",
            f"That run has {', '.join(other.name for other in others)} (checkpoint.keep says how many are kept)."
            if others
            else "Give a run directory, or <run>/checkpoints/step-...",
        )
    return have


def read_state(checkpoint: Path) -> RunState:
    try:
        return RunState(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PolymodalError(f"{checkpoint / STATE} cannot be read: {error}.") from None


def _plain(value: Tensor) -> Tensor:
    """DTensors whose chunks lie strided (FSDP over TP) are stored as plain shards of the inner dimension."""
    if isinstance(value, DTensor) and any(type(p).__name__ == "_StridedShard" for p in value.placements):
        placements = [Replicate() if type(p).__name__ == "_StridedShard" else p for p in value.placements]
        return value.redistribute(placements=placements)
    return value


def _staged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What may be written while training goes on. CPU tensors are copied here; torch's stager copies the others."""
    out = {}
    for name, value in tensors.items():
        value = _plain(value.detach())
        if value.device.type != "cpu":
            out[name] = value
        elif isinstance(value, DTensor):
            copy = value.to_local().clone()
            out[name] = DTensor.from_local(
                copy,
                value.device_mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )
        else:
            out[name] = value.clone()
    return out


class Writer:
    """Writes checkpoints of one run, one at a time, in the background if asked, and prunes old ones."""

    def __init__(self, run: Path, keep: int, asynchronous: bool, rank: int, group: dist.ProcessGroup | None):
        self.run, self.keep, self.asynchronous, self.rank, self.group = run, keep, asynchronous, rank, group
        self._pending: tuple[Future, Path, Path] | None = None
        if rank == 0:
            base = run / "checkpoints"
            base.mkdir(parents=True, exist_ok=True)
            for left in base.glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)

    def save(self, tensors: dict[str, Tensor], state: RunState) -> Path:
        """Start (or, if synchronous, do) one checkpoint. Raises PolymodalError on a full or unwritable disk."""
        self.finish()
        final = directory(self.run, state.step)
        temporary = final.with_name(f".{final.name}.tmp")
        if self.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
            except OSError as error:
                raise self._said(error, temporary) from error
        if self.group is not None:
            dist.barrier(self.group)
        try:
            if self.asynchronous:
                future = dcp.async_save(
                    _staged(tensors),
                    checkpoint_id=temporary,
                    process_group=self.group,
                    no_dist=self.group is None,
                )
                self._pending = (
                    cast(Future, future),
                    temporary,
                    final,
                )  # a thread writes: no staging is reported apart
            else:
                dcp.save(
                    {k: _plain(v.detach()) for k, v in tensors.items()},
                    checkpoint_id=temporary,
                    process_group=self.group,
                    no_dist=self.group is None,
                )
                self._complete(temporary, final)
        except Exception as error:
            raise self._said(error, temporary) from error
        return final

    def _said(self, error: Exception, path: Path) -> PolymodalError:
        if self.group is not None and process_group.lost(str(error)):
            return process_group.LostPeer(
                f"Rank {self.rank} lost contact with another process while {path} was written.",
                "Look for the first error of another rank or node; the run resumes from the newest whole checkpoint.",
            )
        usage = shutil.disk_usage(self.run)
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return PolymodalError(
            f"The checkpoint {path} could not be written ({cause}; {usage.free / 2**30:.1f} GiB free there).",
            "Free space or set checkpoint.dir to another disk; earlier checkpoints are untouched, the run resumes from the newest.",
        )

    def _complete(self, temporary: Path, final: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in found(self.run)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def poll(self) -> None:
        """Give a finished background checkpoint its name; rank 0's future ends when all ranks have written."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way."""
        if self._pending is None:
            return
        future, temporary, final = self._pending
        self._pending = None
        try:
            future.result()
        except Exception as error:
            raise self._said(error, temporary) from error
        self._complete(temporary, final)


def _keys(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:
        raise PolymodalError(
            f"The checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}).",
            "Use an earlier one, or checkpoint.resume: never.",
        ) from None
    return {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}


def names(checkpoint: Path) -> set[str]:
    """Keys of the tensors that a checkpoint holds."""
    return set(_keys(checkpoint))


def load(
    checkpoint: Path,
    tensors: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    *,
    required: Callable[[str], bool] = lambda key: True,
) -> None:
    """Fill `tensors` in place from a checkpoint of any layout. Raises PolymodalError when keys or shapes differ."""
    have = _keys(checkpoint)
    missing = [k for k in tensors if k not in have and required(k)]
    if missing:
        raise PolymodalError(
            f"The checkpoint {checkpoint} lacks {len(missing)} of {len(tensors)} tensors (first: {missing[0]}).",
            "The recipe trains other parameters than the checkpoint's: see model.lora, train.freeze, optim.name and train.ema in its state.json; or use checkpoint.init_from.",
        )
    wrong = [k for k in tensors if k in have and tuple(have[k].size) != tuple(tensors[k].shape)]
    if wrong:
        k = wrong[0]
        raise PolymodalError(
            f"The checkpoint {checkpoint} has {k} of shape {tuple(have[k].size)}, the model {tuple(tensors[k].shape)}.",
            "Give the model.source and model.config that the checkpoint was made with.",
        )
    wanted = {k: v for k, v in tensors.items() if k in have}
    strided = {
        k: v
        for k, v in wanted.items()
        if isinstance(v, DTensor) and any(type(p).__name__ == "_StridedShard" for p in v.placements)
    }
    targets = {k: _plain(v.detach()) if k in strided else v.detach() for k, v in wanted.items()}
    dcp.load(targets, checkpoint_id=checkpoint, process_group=group, no_dist=group is None)
    with torch.no_grad():
        for k, v in strided.items():
            v.to_local().copy_(cast(DTensor, targets[k]).redistribute(placements=v.placements).to_local())


class _Reader(dcp.FileSystemReader):
    """Reads the list of all tensors once, not once a tensor: it grows with the model."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_listing"):
            self._listing = super().read_metadata(*args, **kwargs)
        return self._listing


def read_model(checkpoint: Path, prefix: str = "model.") -> Iterator[tuple[str, Tensor]]:
    """Full tensors on the CPU, one at a time, in one process: what export and chat read.

    prefix: "model." for the weights, "ema." for the average. Names come without it.
    """
    have = _keys(checkpoint)
    names = sorted(k for k in have if k.startswith(prefix))
    if not names:
        raise PolymodalError(
            f"The checkpoint {checkpoint} holds no `{prefix[:-1]}` tensors.",
            "Averages exist only in runs with train.ema." if prefix == "ema." else "",
        )
    reader = _Reader(checkpoint)
    for key in names:
        info = have[key]
        target = {key: torch.empty(info.size, dtype=info.properties.dtype)}
        dcp.load(target, storage_reader=reader, no_dist=True)
        yield key[len(prefix) :], target[key]
