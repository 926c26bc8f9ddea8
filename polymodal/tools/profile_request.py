"""Talks to a run that is training in other processes, through files in its directory.

The trainer polls for what is written here (train/monitor.py).
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import say
from polymodal.train.monitor import Profiler

QUIET = 600
"""Seconds without a new line of metrics after which a run is thought to have ended."""


def numbers(text: str, what: str = "--ranks") -> list[int]:
    """ "0,2-4" -> [0, 2, 3, 4]. Raises PolymodalError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise PolymodalError(f"{what} {text} is not a list of numbers.", "Write e.g. 0,1 or 0-7.")
        found += range(first, last + 1)
    return sorted(set(found))


def request_profile(
    run: str | os.PathLike, steps: int, ranks: str, *, stacks: bool = False, memory: bool = False
) -> int:
    """Ask the run in directory `run` to trace its next `steps` steps on `ranks` ("0,2-4").

    The request appears whole (written beside, then renamed). Raises PolymodalError when that is no run's
    directory.
    """
    run = Path(run)
    chosen = numbers(ranks)
    if not (run / "recipe.yaml").is_file():
        raise PolymodalError(
            f"{run} is not the directory of a run: it has no recipe.yaml.",
            "Give the directory that train writes to (checkpoint.dir of its recipe, runs/<name> by default).",
        )
    asked = {"steps": steps, "ranks": chosen, "stacks": stacks, "memory": memory}
    try:
        replace_file(run / Profiler.REQUEST, json.dumps(asked))
    except OSError as error:
        raise PolymodalError(
            f"{run} cannot be written: {error.strerror}.", "Run this as the user who trains."
        ) from None
    word = "step" if steps == 1 else f"{steps} steps"
    say(f"asked: the next {word} of rank {', '.join(map(str, chosen))} will be traced into {run}/traces")
    metrics, summary = run / "metrics.jsonl", run / "summary.json"
    if summary.is_file() and metrics.is_file() and summary.stat().st_mtime >= metrics.stat().st_mtime:
        say("note: the run has ended; the trace waits until it goes on with more steps")
        return 0
    since = "has not logged a step yet"
    if metrics.is_file():
        silent = time.time() - metrics.stat().st_mtime
        if silent <= QUIET:
            return 0
        since = f"has logged no step for {silent / 60:.0f} minutes"
    say(f"note: the run {since}; the trace waits until it goes on")
    return 0
