"""Metrics, trackers, the progress bar, the loss guard, profiler traces and memory snapshots.

Only rank 0 writes metrics; traces and snapshots are written by the ranks that the recipe names.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from polymodal.core.errors import PolymodalError
from polymodal.core.files import metric_lines, written_whole
from polymodal.core.terminal import say
from polymodal.recipe import LossGuard, Monitor, Profile
from polymodal.runtime import device as devices
from polymodal.runtime.device import DeviceInfo


class Metrics:
    """One line a logged step into metrics.jsonl, and the same numbers to the trackers."""

    def __init__(self, run: Path, monitor: Monitor, name: str, config: dict[str, Any], step: int = 0):
        """step: the last one that is done; a resumed run drops the lines of later ones."""
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        if self.path.is_file():
            _forget_after(self.path, step)
        self._file = self.path.open("a", buffering=1)
        self._trackers: list[Any] = [
            _TRACKERS[tracker](run, monitor.project, name, config, step) for tracker in monitor.trackers
        ]

    def log(self, step: int, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        """uint8 [H, W, 3] to the trackers that show pictures."""
        for tracker in self._trackers:
            if hasattr(tracker, "picture"):
                tracker.picture(step, name, pixels)

    def close(self) -> None:
        """Close the files. A full disk was an error when a line was written: it is no second one."""
        for each in (self._file, *self._trackers):
            with contextlib.suppress(OSError):
                each.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and those cut by a full disk or lost power: the file is one curve."""
    kept = b"".join(line + b"\n" for line, values in metric_lines(path) if values["step"] <= step)
    with written_whole(path) as temporary:
        temporary.write_bytes(kept)


class _TensorBoard:
    def __init__(self, run: Path, project: str, name: str, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def picture(self, step: int, name: str, pixels: Any) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PolymodalError(
            f"monitor.trackers names {module}, which is not installed.",
            f"Run `pip install {module}`, or remove it.",
        ) from None


class _Wandb:
    def __init__(self, run: Path, project: str, name: str, config: dict, step: int):
        # an id of this directory: a resumed run continues its curve, another of the same name has its own
        file = run / "wandb.id"
        if not file.is_file():
            file.write_text(uuid.uuid4().hex)
        self.run = _import("wandb").init(
            project=project, name=name, dir=str(run), config=config, resume="allow", id=file.read_text()
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, run: Path, project: str, name: str, config: dict, step: int):
        self.mlflow = _import("mlflow")
        self.mlflow.set_experiment(project)
        file = run / "mlflow.id"
        if file.is_file():
            self.mlflow.start_run(run_id=file.read_text())
        else:
            file.write_text(self.mlflow.start_run(run_name=name).info.run_id)
            self.mlflow.log_dict(config, "recipe.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        # its file store could not hold `loss` (a file) beside `loss/text` (in a directory)
        names = {k: k.replace("/", ".").replace("@", "_") for k in values}
        self.mlflow.log_metrics({names[k]: v for k, v in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


class Guard:
    """Skips or refuses steps with unusual losses or gradients. All ranks have the same numbers and agree."""

    def __init__(self, guard: LossGuard, scaled: bool, mean: float | None = None):
        self.guard, self.scaled, self.mean = guard, scaled, mean
        self.skipped = 0
        self.recent: deque[float] = deque(maxlen=5)

    def accept(self, step: int, loss: float, norm: float) -> tuple[bool, str]:
        """-> (apply this step, why not). Raises PolymodalError when the run should stop."""
        self.recent.append(loss)
        spike = self.guard.spike
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss}, gradient norm {norm}"
            if self.guard.nan == "stop" and not self.scaled:
                losses = ", ".join(f"{x:.4g}" for x in self.recent)
                raise PolymodalError(
                    f"Step {step}: {reason}; the last losses were {losses}.",
                    "Lower optim.lr, check the data at this step (the checkpoint before it is whole), or set "
                    "train.guard.nan: skip.",
                )
            return self._skip(step, reason)
        if spike and self.mean and norm > spike * self.mean:
            return self._skip(step, f"gradient norm {norm:.3g} is over {spike} x its mean {self.mean:.3g}")
        self.skipped = 0
        self.mean = norm if self.mean is None else 0.98 * self.mean + 0.02 * norm
        return True, ""

    def _skip(self, step: int, reason: str) -> tuple[bool, str]:
        self.skipped += 1
        if self.skipped >= self.guard.max_skips:
            raise PolymodalError(
                f"Step {step}: {self.skipped} steps in a row were skipped (last: {reason}).",
                "See train.guard; resume from an earlier checkpoint with a lower optim.lr.",
            )
        return False, reason


REQUEST_BYTES = 1 << 16
"""Of a request for a trace that are read."""


class Profiler:
    """torch.profiler traces over a range of steps: of the recipe, or requested by `polymodal profile RUN`.

    Rank 0 alone looks for a request (`asked`); the step shares that flag with all ranks, which then `take`
    the request together, so that every chosen rank traces the same steps.
    """

    REQUEST = "profile.request"
    POLL = 2.0
    """Seconds between two looks for a request file."""

    def __init__(self, run: Path, profile: Profile | None, rank: int, device: DeviceInfo):
        self.run, self.rank, self.device = run, rank, device
        self._profiles = [profile] if profile is not None else []
        self._active: Any = None
        self._step = self._first = self._last = 0
        self._memory: Any = None  # torch.<device>.memory while its history is recorded
        self._looked = -math.inf
        self._taken = 0  # the time of the last request

    def before(self, step: int) -> None:
        """Call at the start of optimizer step `step` (from 1)."""
        self._step = step
        for profile in self._profiles:
            if profile.start == step and self._active is None:
                self._start(step, profile)

    def asked(self) -> bool:
        """Rank 0: whether a request is in the run's directory and no trace is being made. Other ranks: no."""
        if self.rank != 0 or self._step < self._last or time.monotonic() - self._looked < self.POLL:
            return False
        self._looked = time.monotonic()
        request = self.run / self.REQUEST
        return os.path.isfile(request) and os.stat(request).st_mtime_ns != self._taken

    def take(self, share: Callable[[Any], Any]) -> None:
        """Collective: begin the requested trace with the next step. share: rank 0's object, on every rank."""
        asked = None
        if self.rank == 0:
            request = self.run / self.REQUEST
            try:
                self._taken = os.stat(request).st_mtime_ns  # where it cannot be removed, it is taken once
                with open(request, "rb") as file:
                    asked = Profile.model_validate_json(file.read(REQUEST_BYTES))
                asked.start = self._step + 1
            except (OSError, ValueError) as error:  # pydantic's among them
                say(f"warning: {request} is no request for a trace: {_why(error)}")
            with contextlib.suppress(OSError):
                request.unlink()
        asked = share(asked)
        if asked is not None:
            self._profiles.append(asked)

    def _start(self, step: int, profile: Profile) -> None:
        self._first, self._last = step, step + profile.steps - 1
        if self.rank not in profile.ranks:
            return
        import torch

        kind = self.device.kind
        if profile.memory and kind != "cpu":
            self._memory = getattr(torch, kind).memory
            self._memory._record_memory_history()
        profiler, activities = devices.profiler(kind)
        self._active = profiler(
            activities=activities,
            record_shapes=profile.stacks,
            with_stack=profile.stacks,
            profile_memory=profile.memory,
        )
        self._active.__enter__()

    def after(self, step: int) -> Path | None:
        """Call at the end of a step; returns the trace's path when one was written."""
        if self._active is None or step < self._last:
            return None
        self._active.__exit__(None, None, None)
        path = self.run / "traces" / f"steps-{self._first}-{step}-rank-{self.rank}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._active.export_chrome_trace(str(path))
            if self._memory is not None:
                self._memory._dump_snapshot(str(path.with_suffix(".pickle")))
        except (OSError, RuntimeError) as error:  # training matters more
            say(f"warning: the trace {path} could not be written: {_why(error)}")
            return None
        finally:
            if self._memory is not None:
                self._memory._record_memory_history(enabled=None)
            self._active = self._memory = None
        return path


def _why(error: Exception) -> str:
    """An error in a few words; of pydantic's, the first key that it is about."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(["JSON", *map(str, first["loc"]), first["msg"]][1 if first["loc"] else 0 :])
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def line(step: int, steps: int, values: dict[str, Any]) -> str:
    """The line of a step in the log: losses, rates and where the time went."""
    parts = [f"step {step}/{steps}", f"loss {values['loss']:.4f}"]
    kinds = {key.removeprefix("loss/"): value for key, value in values.items() if key.startswith("loss/")}
    if len(kinds) > 1:
        parts[-1] += f" ({', '.join(f'{name} {value:.4f}' for name, value in kinds.items())})"
    if "rewards/accuracy" in values:
        parts.append(f"accuracy {values['rewards/accuracy']:.2f}")
    if "rewards/margin" in values:
        parts.append(f"margin {values['rewards/margin']:.3g}")
    parts += [
        f"grad norm {values['grad_norm']:.3g}",
        f"lr {values['lr']:.3g}",
        f"{values['seconds']:.2f} s/it",
        f"{values['samples_per_second']:.1f} samples/s",
        f"{values['tokens_per_second_device']:.0f} tokens/s/device",
    ]
    if values.get("frames_per_second"):
        parts.append(f"{values['frames_per_second']:.1f} frames/s")
    if values.get("mfu"):
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"{values['memory_gib']:.2f} GiB")
    if values.get("wait_seconds", 0.0) >= 0.01 * values["seconds"]:
        parts.append(f"waited {values['wait_seconds'] / values['seconds']:.0%} for data")
    return " | ".join(parts)
