"""A run as one page: its figures, curves from metrics.jsonl, pictures with answers, what to try next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.evaluate.thumbnails import thumbnail
from polymodal.pages import charts


@dataclass(frozen=True)
class Curve:
    """One chart: points (step, value); `mark` draws a vertical line at a step; `smooth` adds a running
    mean."""

    title: str
    unit: str
    points: Sequence[tuple[float, float]]
    mark: tuple[float, str] | None = None
    smooth: int = 0
    from_zero: bool = False


def read_metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl. Raises PolymodalError when the run has none."""
    path = Path(run) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise PolymodalError(
            f"{run} has no metrics.jsonl.", "Give the directory of a run (checkpoint.dir of its recipe)."
        ) from None
    except ValueError as error:
        raise PolymodalError(f"{path} is damaged: {error}.") from None


SHEETS = 12
"""Sheets of samples on a page at most: the first, the last, and evenly between."""


def drawn(run: Path) -> list[tuple[int, Path]]:
    """(step, contact sheet) of what a generating model drew while it trained (evaluate.samples), by step."""
    found = sorted(Path(run).glob("samples/step-*/sheet.png"))
    steps = [(int(sheet.parent.name.removeprefix("step-")), sheet) for sheet in found]
    if len(steps) > SHEETS:
        steps = [steps[round(i * (len(steps) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    return steps


def of_generation(run: Path, prompts: Sequence[str], resumed_at: int | None = None) -> str:
    """The page of a generating model that trains: its curves, and what it drew of its prompts so far."""
    metrics = read_metrics(run)
    last = metrics[-1] if metrics else {}
    numbers = {
        "step": str(last.get("step", 0)),
        "loss": charts.number(float(last.get("loss", math.nan))),
    }
    return page(
        Path(run).name,
        "Samples: " + " | ".join(prompts),
        numbers,
        curves(metrics, resumed_at, "mean squared error"),
        drawn=drawn(run),
    )


def curves(
    metrics: list[dict], resumed_at: int | None = None, unit: str = "nats per answer token"
) -> list[Curve]:
    """Loss (in `unit`), throughput and memory (and validation loss, when there is one) of a run."""

    def points(key: str) -> list[tuple[float, float]]:
        return [
            (m["step"], m[key])
            for m in metrics
            if isinstance(m.get(key), (int, float)) and math.isfinite(m[key])
        ]

    mark = (resumed_at, "stopped and resumed") if resumed_at else None
    made = [
        Curve("Loss", unit, points("loss"), mark, smooth=15),
        Curve("Throughput", "tokens per second", points("tokens_per_second"), mark, 15, from_zero=True),
        Curve("Memory", "GiB, peak of one process", points("memory_gib"), mark, from_zero=True),
        Curve("Validation loss", unit, points("validation/loss"), mark),
    ]
    return [c for c in made if c.points]


def page(
    title: str,
    lead: str,
    numbers: Mapping[str, str],
    charted: Sequence[Curve],
    cards: Sequence[pages.Card] = (),
    steps: Sequence[tuple[str, str]] = (),
    drawn: Sequence[tuple[int, Path]] = (),
) -> str:
    """The whole page. cards: held-out pictures; steps: (what to try next, the command); drawn: (step, sheet
    of samples)."""
    drawings: list[tuple[str, str, Any]] = [
        (
            c.title,
            c.unit,
            charts.curve(c.title, c.points, mark=c.mark, smooth=c.smooth, from_zero=c.from_zero),
        )
        for c in charted
    ]
    return pages.render(
        "run.html",
        title=title,
        lead=lead,
        numbers=numbers,
        charts=drawings,
        cards=cards,
        steps=steps,
        sheets=[(step, thumbnail(str(sheet), 900)) for step, sheet in drawn],
    )
