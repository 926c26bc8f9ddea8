"""What a run tells: metrics.jsonl, trackers, the progress bar, traces, memory snapshots, and the guards.

Only rank 0 writes metrics; traces and snapshots are written by the ranks that the recipe names.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.recipe import LossGuard, Monitor, Profile
from polymodal.runtime.device import DeviceInfo


class Metrics:
    """One line a logged step into metrics.jsonl, and the same numbers to the trackers."""

    def __init__(self, run: Path, monitor: Monitor, name: str, config: dict[str, Any], step: int = 0):
        """step: the last one that is done, of a resumed run: what was told of later ones is dropped."""
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        if self.path.is_file():
            _forget_after(self.path, step)
        self._file = self.path.open("a", buffering=1)
        self._trackers: list[Any] = []
        for tracker in monitor.trackers:
            self._trackers.append(_TRACKERS[tracker](run, monitor.project, name, config, step))

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
        """Ends the files. A disk without room was said when a line was written: it is no second error."""
        for each in (self._file, *self._trackers):
            with contextlib.suppress(OSError):
                each.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, so that the file is one curve, and those that a full disk or lost power cut."""

    def kept(line: bytes) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            return False

    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(line + b"\n" for line in path.read_bytes().splitlines() if kept(line)))
    temporary.replace(path)


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


def _needs(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise PolymodalError(
            f"monitor.trackers names {module}, which is not installed.",
            f"Run `pip install polymodal[{module}]`, or remove it.",
        ) from None


class _Wandb:
    def __init__(self, run: Path, project: str, name: str, config: dict, step: int):
        kept = (
            run / "wandb.id"
        )  # of this directory: a resumed run goes on, another of the same name is its own
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex)
        self.run = _needs("wandb").init(
            project=project, name=name, dir=str(run), config=config, resume="allow", id=kept.read_text()
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, run: Path, project: str, name: str, config: dict, step: int):
        self.mlflow = _needs("mlflow")
        self.mlflow.set_experiment(project)
        kept = run / "mlflow.id"
        if kept.is_file():
            self.mlflow.start_run(run_id=kept.read_text())
        else:
            kept.write_text(self.mlflow.start_run(run_name=name).info.run_id)
            self.mlflow.log_dict(config, "recipe.json")

    def log(self, step: int, values: dict[str, float]) -> None:
        # its store of files would want `loss` to be a file and, for loss/text, a directory
        names = {k: k.replace("/", ".").replace("@", "_") for k in values}
        self.mlflow.log_metrics({names[k]: v for k, v in values.items()}, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


class Progress:
    """A live bar with the step's numbers below it on a terminal; plain lines elsewhere (log files, CI)."""

    def __init__(self, name: str, steps: int, done: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar
        from rich.text import Text

        class WithNumbers(Bar):
            numbers = ""

            def get_renderables(self) -> Iterator[Any]:
                yield self.make_tasks_table(self.tasks)
                yield Text(self.numbers, style="dim")

        self.console = Console()
        self.live = self.console.is_terminal
        if self.live:
            self.bar = WithNumbers(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                console=self.console, expand=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(name, total=steps, completed=done)

    def update(self, step: int, line: str) -> None:
        if self.live:
            self.bar.numbers = line.partition(" | ")[2]
            self.bar.update(self.task, completed=step)
        else:
            print(line, flush=True)

    def say(self, text: str) -> None:
        if self.live:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.live:
            self.bar.stop()


class Guard:
    """Decides what a step with a strange loss or gradient does. Every rank sees the same numbers, so all agree."""

    def __init__(self, guard: LossGuard, scaled: bool, mean: float | None = None):
        self.guard, self.scaled, self.mean = guard, scaled, mean
        self.skipped = 0
        self.recent: deque[float] = deque(maxlen=5)

    def accept(self, step: int, loss: float, norm: float) -> tuple[bool, str]:
        """-> (apply this step, why not). Raises PolymodalError when the run should stop."""
        self.recent.append(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss}, gradient norm {norm}"
            if self.guard.nan == "stop" and not self.scaled:
                raise PolymodalError(
                    f"Step {step}: {reason}; the last losses were {', '.join(f'{x:.4g}' for x in self.recent)}.",
                    "Lower optim.lr, check the data at this step (the checkpoint before it is whole), or set train.guard.nan: skip.",
                )
            return self._skip(step, reason)
        if self.guard.spike and self.mean and norm > self.guard.spike * self.mean:
            return self._skip(
                step, f"gradient norm {norm:.3g} is over {self.guard.spike} x its mean {self.mean:.3g}"
            )
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


class Profiler:
    """Torch traces over a range of steps: from the recipe, or asked for in a live run by `polymodal profile RUN`.

    Rank 0 alone looks for a request; the step tells every rank that there is one (`asked`), then all `take` it
    together, so that every chosen rank traces the same steps.
    """

    REQUEST = "profile.request"
    POLL = 2.0
    """Seconds between two looks for a request."""

    def __init__(self, run: Path, profile: Profile | None, rank: int, device: DeviceInfo):
        self.run, self.rank, self.device = run, rank, device
        self._wanted = [profile] if profile is not None else []
        self._active: Any = None
        self._step = 0
        self._until = 0
        self._memory = False
        self._looked = -math.inf

    def before(self, step: int) -> None:
        """Call at the start of optimizer step `step` (from 1)."""
        self._step = step
        for profile in self._wanted:
            if profile.start == step and self._active is None:
                self._start(step, profile)

    def asked(self) -> bool:
        """Rank 0: whether a request lies in the run's directory and no trace is being made. Other ranks: no."""
        if self.rank != 0 or self._step < self._until or time.monotonic() - self._looked < self.POLL:
            return False
        self._looked = time.monotonic()
        return (self.run / self.REQUEST).is_file()

    def take(self, share: Callable[[Any], Any]) -> None:
        """Collective: begin what was asked for with the next step. share: rank 0's object, on every rank."""
        asked = None
        if self.rank == 0:
            request = self.run / self.REQUEST
            with contextlib.suppress(OSError, ValueError):
                asked = Profile(**json.loads(request.read_text()), start=self._step + 1)
            request.unlink(missing_ok=True)
            if asked is None:
                print(f"{request} could not be read and was removed", flush=True)
        asked = share(asked)
        if asked is not None:
            self._wanted.append(asked)

    def _start(self, step: int, profile: Profile) -> None:
        self._until = step + profile.steps - 1
        if self.rank not in profile.ranks:
            return
        import torch
        from torch.profiler import ProfilerActivity, supported_activities

        activities = [
            ProfilerActivity.CPU,
            *(a for a in supported_activities() if a != ProfilerActivity.CPU and self.device.kind != "cpu"),
        ]
        self._memory = profile.memory
        if self._memory and self.device.kind != "cpu":
            getattr(torch, self.device.kind).memory._record_memory_history()
        self._active = torch.profiler.profile(
            activities=activities,
            record_shapes=profile.stacks,
            with_stack=profile.stacks,
            profile_memory=profile.memory,
        )
        self._active.__enter__()
        self._first = step

    def after(self, step: int) -> Path | None:
        """Call at the end of a step; returns the trace's path when one was written."""
        if self._active is None or step < self._until:
            return None
        import torch

        self._active.__exit__(None, None, None)
        folder = self.run / "traces"
        folder.mkdir(exist_ok=True)
        path = folder / f"steps-{self._first}-{step}-rank-{self.rank}.json"
        self._active.export_chrome_trace(str(path))
        if self._memory and self.device.kind != "cpu":
            memory = getattr(torch, self.device.kind).memory
            memory._dump_snapshot(str(path.with_suffix(".pickle")))
            memory._record_memory_history(enabled=None)
        self._active = None
        return path


def line(step: int, steps: int, values: dict[str, Any]) -> str:
    """The log line: what people compare, and where the time went."""
    parts = [f"step {step}/{steps}", f"loss {values['loss']:.4f}"]
    kinds = {key.removeprefix("loss/"): value for key, value in values.items() if key.startswith("loss/")}
    if len(kinds) > 1:
        parts[-1] += f" ({', '.join(f'{name} {value:.4f}' for name, value in kinds.items())})"
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
