"""Checkpoints: DCP directories that are whole when they exist, resumed at any world size and layout.

`<run>/checkpoints/step-00000100/` holds the trainable parameters, the optimizer, the average (all by
parameter name, any sharding) and `state.json`: step, data position, recipe, versions, size and checksums of
the other files. It is written as `.step-...tmp` and renamed when every rank has finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor, Shard

from polymodal import __version__
from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import LazyTensors
from polymodal.core.terminal import say
from polymodal.distributed.collectives import with_local
from polymodal.distributed.dcp_reader import INDEX, Reader
from polymodal.distributed.dcp_writer import StoredFile
from polymodal.distributed.dcp_writer import Writer as FileWriter
from polymodal.runtime import process_group

STATE = "state.json"
FINISH_SECONDS = 600.0
"""How long a run that ends with an error waits for the checkpoint that is being written."""

# one process is a layout like any other here
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Damaged(PolymodalError):
    """A checkpoint that is partly gone, cut, or other than it was written."""


@dataclass
class RunState:
    """Everything of a run that is not a tensor. `position` is the data state, whatever the world size."""

    step: Count = 0
    position: dict[Literal["epoch", "window", "step"], Count] = field(
        default_factory=lambda: {"epoch": 0, "window": 0, "step": 0}
    )
    data: str = ""  # fingerprint of the schedule that `position` belongs to
    lengths: str = ""  # and of the samples' lengths it was planned with; "" where an older version wrote
    samples: Count = 0
    tokens: Count = 0
    scaler: dict[Literal["scale", "good"], NotNegative] = field(default_factory=dict)
    norm_mean: NotNegative | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)  # {} where an older version wrote


def versions() -> dict[str, str]:
    import transformers

    return {"polymodal": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _step_of(path: Path) -> int:
    """The step that a directory of a checkpoint is named by, -1 for another name."""
    digits = re.fullmatch("step-([0-9]{8,30})", path.name)
    return int(digits[1]) if digits else -1


def found(run: Path) -> list[Path]:
    """Checkpoints of a run (or of its directory of checkpoints), oldest first; damaged ones too."""
    base = run / "checkpoints"
    if run.name == base.name and not base.is_dir():
        base = run
    named = [p for p in base.glob("step-*") if _step_of(p) >= 0 and os.path.isdir(p)]
    return sorted(named, key=_step_of)


def newest(run: Path) -> Path | None:
    have = found(run)
    return have[-1] if have else None


def newest_whole(run: Path, but: Collection[Path] = ()) -> Path | None:
    """What a run resumes from, none for a new run; a word on each damaged one that is passed over.

    but: found damaged before. Raises PolymodalError when all are damaged.
    """
    have, error = found(run), None
    for path in reversed(have):
        if path in but:
            continue
        try:
            check(path)
        except Damaged as damage:
            error = damage
            say(f"warning: {error.message} The checkpoint before it is taken.", error=True)
        else:
            return path
    if have:
        raise PolymodalError(
            f"None of the {len(have)} checkpoints of {run} is whole"
            + (f" (the oldest: {error.message})." if error else "."),
            "Restore one from a copy, or start anew: checkpoint.resume: never, or another checkpoint.dir.",
        )
    return None


def at(path: str | os.PathLike) -> Path | None:
    """The checkpoint at a path: itself, or the newest of the run that lies there; None for anything else."""
    path = Path(path)
    itself = os.path.isfile(path / STATE) or (_step_of(path) >= 0 and os.path.isdir(path))
    return path if itself else newest(path)


def locate(path: str | os.PathLike) -> Path:
    """A run directory or one checkpoint -> the checkpoint directory. Raises PolymodalError; Damaged for one
    whose state, index or sizes of files are not what was written."""
    path = Path(path)
    have = at(path)
    if have is None:
        others = found(path.parent.parent) if path.parent.name == "checkpoints" else []
        raise PolymodalError(
            f"{path} is neither a checkpoint nor a run that has one.",
            f"That run has {', '.join(o.name for o in others)} (checkpoint.keep says how many are kept)."
            if others
            else "Give a run directory, or <run>/checkpoints/step-...",
        )
    try:
        check(have)
    except Damaged as error:
        raise Damaged(error.message, _instead(have)) from None
    return have


def read_state(checkpoint: Path) -> RunState:
    """Raises Damaged for a file that is missing, cut, or holds other things than a RunState."""
    path = checkpoint / STATE
    try:
        if not os.path.isfile(path):
            raise OSError(0, "there is no such file")
        state = TypeAdapter(RunState).validate_json(path.read_bytes(), strict=True)
        if _step_of(checkpoint) not in (-1, state.step):
            raise ValueError(f"step: {state.step}, the directory says {_step_of(checkpoint)}")
        late = [key for key, value in state.position.items() if value > state.step]
        if late:
            raise ValueError(f"position.{late[0]}: {state.position[late[0]]} after {state.step} steps")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    else:
        return state
    raise Damaged(f"{path} cannot be read ({reason}).", "Take another checkpoint.")


def check(checkpoint: Path) -> None:
    """Whether every file of a checkpoint is there in its size, and state and index are as written: what can
    be seen without reading the tensors. Raises Damaged."""
    state = read_state(checkpoint)
    reader = _reader(checkpoint)
    sizes = {name: file.size for name, file in state.files.items()} or reader.extents()
    for name, size in sizes.items():
        file = checkpoint / name
        have = file.stat().st_size if os.path.isfile(file) else None
        if have is None or have < size or (have > size and state.files):
            what = "is missing" if have is None else f"has {have:,} bytes in place of {size:,}"
            raise Damaged(f"{file} {what}.", "Take another checkpoint.")


def _instead(checkpoint: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    others = [one for one in found(checkpoint.parent) if _step_of(one) < _step_of(checkpoint)]
    for other in reversed(others):
        with contextlib.suppress(Damaged):
            check(other)
            return f"Give the one before it, {other}, or remove the damaged directory."
    return (
        "There is no whole checkpoint before it: start anew (checkpoint.resume: never, or another "
        "checkpoint.dir)."
    )


def agreed(rt: process_group.Runtime, choose: Callable[[], Path | None]) -> Path | None:
    """The checkpoint that rank 0 chooses, on every rank. Collective.

    Directories of a network disk may look different from two nodes for a while, and torch would put a model
    together from two checkpoints. Raises PolymodalError, on all ranks, when they do not read the same state
    and index there.
    """
    made: Any = None
    if rt.is_main:
        try:
            made = choose(), None
        except PolymodalError as error:
            made = None, error
    chosen, failed = cast(Any, rt.share(made))
    if failed is not None:
        raise failed
    if chosen is None or rt.world == 1:
        return chosen
    read: list[Any] = [None] * rt.world
    with process_group.lost_peers(rt.process):
        dist.all_gather_object(read, _digest(chosen))
    other = next((rank for rank, digest in enumerate(read) if digest != read[0]), None)
    if other is not None:
        what = "cannot read it" if read[other] is None else "reads other content there"
        raise PolymodalError(
            f"Rank 0 found the checkpoint {chosen}, rank {other} {what}.",
            "Put the run on a disk that all nodes share; where it is one, start again once its caches agree.",
        )
    return chosen


def _digest(checkpoint: Path) -> str | None:
    """Of what says which checkpoint it is: state.json and the index. None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        for name in (STATE, INDEX):
            with open(checkpoint / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _check_strided(tensors: dict[str, Tensor]) -> None:
    """Raise PolymodalError where DCP would store a rank's rows of a weight as other rows.

    FSDP over TP cuts a weight's rows twice, TP first, though TP comes last on the mesh: a `_StridedShard`. A
    rank then holds consecutive rows, but DCP takes the shape and the first row from what torch computes of
    the placements; some releases of torch computed them wrongly.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as claimed

    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            continue
        strided = [i for i, p in enumerate(value.placements) if type(p).__name__ == "_StridedShard"]
        if not strided:
            continue
        mesh, coordinate = value.device_mesh, value.device_mesh.get_coordinate()
        shape, offset = claimed(value.shape, mesh, value.placements)
        plain = [i for i, p in enumerate(value.placements) if isinstance(p, Shard) and i not in strided]
        first, size = [0] * value.ndim, list(value.shape)
        for i in (*plain, *reversed(strided)):
            dim = cast(Shard, value.placements[i]).dim
            chunk = -(-size[dim] // mesh.size(i))
            begin = min(cast(Any, coordinate)[i] * chunk, size[dim])
            first[dim], size[dim] = first[dim] + begin, min(chunk, size[dim] - begin)
        held = tuple(value.to_local().shape)
        if (
            held != tuple(shape)
            or held != tuple(size)
            or (value.to_local().numel() and list(offset) != first)
        ):
            raise PolymodalError(
                f"torch {torch.__version__} cannot store the rows of {name} that FSDP over TP gives a rank "
                f"(it holds {list(size)} from {first}, torch says {list(shape)} from {list(offset)}).",
                "Use torch 2.14 or newer, or parallel.tp: 1.",
            )


def _staged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that training may change while they are written: CPU tensors are cloned here, others by DCP."""
    whole = {name: value.detach() for name, value in tensors.items()}
    return {n: with_local(v, Tensor.clone) if v.device.type == "cpu" else v for n, v in whole.items()}


class Writer:
    """Writes checkpoints of one run, one at a time, in the background if asked, and prunes old ones.

    Every rank writes what it holds; nothing is gathered. saved(directory) is called on every rank, in the
    thread that calls the writer, once a checkpoint is written; rank 0 has renamed it by then.
    """

    def __init__(
        self,
        run: Path,
        keep: int,
        asynchronous: bool,
        rank: int,
        group: dist.ProcessGroup | None,
        saved: Callable[[Path], None] = lambda path: None,
    ):
        self.run, self.keep, self.asynchronous, self.rank, self.group = run, keep, asynchronous, rank, group
        self.saved = saved
        self._pending: tuple[Future, Path, Path] | None = None
        if rank == 0:
            base = run / "checkpoints"
            try:
                base.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._write_error(error, base) from None
            for left in base.glob(".step-*.tmp"):
                _remove(left)

    def save(self, tensors: dict[str, Tensor], state: RunState) -> Path:
        """Start (or, if synchronous, do) one checkpoint. Raises PolymodalError on a full or unwritable
        disk.
        """
        self.finish()
        _check_strided(tensors)
        final = directory(self.run, state.step)
        temporary = final.with_name(f".{final.name}.tmp")
        if self.rank == 0:
            try:
                _remove(temporary)
                temporary.mkdir(parents=True)
            except OSError as error:
                raise self._write_error(error, temporary) from error
        if self.group is not None:
            dist.barrier(self.group)
        now = asdict(state)  # training goes on while it is written

        def finish(files: dict[str, StoredFile]) -> None:
            (temporary / STATE).write_text(
                json.dumps(now | {"files": {k: asdict(f) for k, f in files.items()}})
            )

        on_host = self.asynchronous or all(value.device.type == "cpu" for value in tensors.values())
        writer: Any = {"storage_writer": FileWriter(temporary, finish, on_host), "process_group": self.group}
        writer |= {"no_dist": self.group is None}
        try:
            if self.asynchronous:
                stager = DefaultStager(StagingOptions(False, False, False, False))
                future = dcp.async_save(_staged(tensors), async_stager=stager, **writer)
                # a thread writes: no staging is reported apart
                self._pending = self._completing(cast(Future, future), temporary, final), temporary, final
            else:
                dcp.save({k: v.detach() for k, v in tensors.items()}, **writer)
                self._complete(temporary, final)
        except (Exception, CheckpointException) as error:
            raise self._write_error(error, temporary) from error
        if not self.asynchronous:
            self.saved(final)
        return final

    def _completing(self, written: Future, temporary: Path, final: Path) -> Future:
        """Done when the checkpoint has its final name, which the writing thread gives it: the run may have
        ended.
        """
        done: Future = Future()

        def complete(written: Future) -> None:
            try:
                written.result()
                self._complete(temporary, final)
            except BaseException as error:  # noqa: B036 - raised where the future is waited for
                done.set_exception(error)
            else:
                done.set_result(None)

        written.add_done_callback(complete)
        return done

    def _write_error(self, error: BaseException, path: Path) -> PolymodalError:
        if self.group is not None and process_group.lost(str(error)):
            return process_group.LostPeer(
                f"Rank {self.rank} lost contact with another process while {path} was written.",
                "Look for the first error of another rank or node; the run resumes from the newest whole "
                "checkpoint.",
            )
        usage = shutil.disk_usage(self.run)
        return PolymodalError(
            f"The checkpoint {path} could not be written ({_cause(error)}; {usage.free / 2**30:.1f} GiB are "
            "free there).",
            "Free space or set checkpoint.dir to another disk; earlier checkpoints are untouched, the run "
            "resumes from the newest.",
        )

    def _complete(self, temporary: Path, final: Path) -> None:
        if self.rank == 0:
            _remove(final)
            os.replace(temporary, final)
            # later ones are damaged, or of a course that was left: the newest of this one count
            for old in [p for p in found(self.run) if _step_of(p) <= _step_of(final)][: -self.keep]:
                _remove(old)

    def poll(self) -> None:
        """Raise what went wrong with a checkpoint in the background, once it has ended."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way."""
        if self._pending is None:
            return
        (done, temporary, final), self._pending = self._pending, None
        try:
            done.result()
        except (Exception, CheckpointException) as error:
            raise self._write_error(error, temporary) from error
        self.saved(final)

    def close(self, seconds: float = FINISH_SECONDS) -> None:
        """At the end of a run, whatever ended it: complete the checkpoint under way if the other ranks still
        write it.

        Waits for at most `seconds`. Prints errors: the one that ended the run is already being raised.
        """
        if self._pending is None:
            return
        (done, temporary, _), self._pending = self._pending, None
        if self.rank == 0 and not done.done():
            say(f"{temporary} is still being written: waiting for it")
        try:
            done.result(timeout=seconds)
        except futures.TimeoutError:
            say(f"{temporary} was not written within {seconds:.0f} s and is given up")
        except (Exception, CheckpointException) as error:
            say(self._write_error(error, temporary))


def _remove(path: Path) -> None:
    """A directory with all that is in it; a file or a link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _first(error: BaseException) -> BaseException:
    """Of DCP's collection of errors, the first rank's."""
    failed = isinstance(error, CheckpointException) and error.failures
    return next(iter(failed.values()))[0] if failed else error


def _cause(error: BaseException) -> str:
    """An error in a few words."""
    error = _first(error)
    if isinstance(error, PolymodalError):
        return error.message
    text = str(error).strip()
    if "weights_only" in text:  # torch advises to run what lies there
        return "a file of it holds other things than tensors, which are not opened"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _reader(checkpoint: Path) -> Reader:
    """A reader that compares what it reads with the checksums in state.json. Raises Damaged."""
    try:
        return Reader(checkpoint, read_state(checkpoint).files)
    except PolymodalError as error:
        raise Damaged(f"The checkpoint {checkpoint} cannot be read: {error.message}", error.hint) from None


def _fill(targets: dict[str, Tensor], reader: Reader, group: dist.ProcessGroup | None, alone: bool) -> None:
    """dcp.load; Damaged for files that are missing, cut or of other content than was written."""
    try:
        dcp.load(targets, storage_reader=reader, process_group=group, no_dist=alone)
    except (Exception, CheckpointException) as error:
        if not alone and process_group.lost(str(error)):
            raise process_group.LostPeer(
                f"Lost contact with another process while {reader.path} was read.",
                "Look for the first error of another rank or node.",
            ) from error
        checkpoint = Path(reader.path)
        if isinstance(_first(error), (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
            error
        ):
            raise
        raise Damaged(
            f"The checkpoint {checkpoint} cannot be read ({_cause(error)}).", _instead(checkpoint)
        ) from error


def names(checkpoint: Path) -> set[str]:
    """Keys of the tensors that a checkpoint holds."""
    return set(_reader(checkpoint).tensors)


def load(
    checkpoint: Path,
    tensors: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    *,
    required: Callable[[str], bool] = lambda key: True,
) -> None:
    """Fill `tensors` in place from a checkpoint of any layout. Raises PolymodalError when keys or shapes
    differ, Damaged on all ranks for what one of them cannot read.
    """
    reader = _reader(checkpoint)
    have = reader.tensors
    missing = [k for k in tensors if k not in have and required(k)]
    if missing:
        raise PolymodalError(
            f"The checkpoint {checkpoint} lacks {len(missing)} of {len(tensors)} tensors (first: "
            f"{missing[0]}).",
            "The recipe trains other parameters than the checkpoint's: see model.lora, train.freeze, "
            "optim.name and train.ema in its state.json; or use checkpoint.init_from.",
        )
    wrong = [k for k in tensors if k in have and tuple(have[k].size) != tuple(tensors[k].shape)]
    if wrong:
        k = wrong[0]
        raise PolymodalError(
            f"The checkpoint {checkpoint} has {k} of shape {tuple(have[k].size)}, the model "
            f"{tuple(tensors[k].shape)}.",
            "Give the model.source and model.config that the checkpoint was made with.",
        )
    wanted = {k: v.detach() for k, v in tensors.items() if k in have}
    _check_strided(wanted)
    _fill(wanted, reader, group, group is None)


def read_model(checkpoint: Path, prefix: str = "model.") -> LazyTensors:
    """Full tensors on the CPU, each read when it is asked for, in one process: what export and chat read.

    prefix: "model." for the weights, "ema." for the average. Names come without it.
    """
    reader = _reader(checkpoint)
    have = {k.removeprefix(prefix): info for k, info in reader.tensors.items() if k.startswith(prefix)}
    if not have:
        raise PolymodalError(
            f"The checkpoint {checkpoint} holds no `{prefix[:-1]}` tensors.",
            "Averages exist only in runs with train.ema." if prefix == "ema." else "",
        )

    def read(name: str) -> Tensor:
        target = {prefix + name: torch.empty(have[name].size, dtype=have[name].properties.dtype)}
        _fill(target, reader, None, True)
        return target[prefix + name]

    return LazyTensors(dict.fromkeys(sorted(have), read))
