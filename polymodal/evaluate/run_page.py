"""A run as one page: its figures, curves from metrics.jsonl, pictures with answers, what to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.core.files import metric_lines
from polymodal.evaluate.thumbnails import thumbnail
from polymodal.pages import charts

SHEETS = 12
"""Sheets of samples on a page at most: the first, the last, and evenly between."""

Curve = tuple[str, str, charts.Chart]
"""Title, unit, chart."""


def read_metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl. Raises PolymodalError when the run has none."""
    path = Path(run) / "metrics.jsonl"
    try:
        return [values for _, values in metric_lines(path)]
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be read: {error.strerror}.",
            "Give the directory of a run (checkpoint.dir of its recipe).",
        ) from None


def sheets(run: Path) -> list[tuple[int, Path]]:
    """(step, contact sheet) of what a generating model sampled while it trained, by step."""
    files = sorted(Path(run).glob("samples/step-*/sheet.png"))
    steps = [(int(sheet.parent.name.removeprefix("step-")), sheet) for sheet in files]
    if len(steps) > SHEETS:
        steps = [steps[round(i * (len(steps) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    return steps


def of_generation(run: Path, prompts: Sequence[str], resumed_at: int | None = None) -> str:
    """The page of a generating model that trains: its curves, and its samples of the prompts so far."""
    metrics = read_metrics(run)
    last = metrics[-1] if metrics else {}
    loss = charts.number(float(last.get("loss", math.nan)))
    return page(
        Path(run).name,
        "Samples: " + " | ".join(prompts),
        {"step": str(last.get("step", 0)), "loss": loss},
        curves(metrics, resumed_at, "mean squared error"),
        sampled=sheets(run),
    )


def curves(
    metrics: list[dict], resumed_at: int | None = None, unit: str = "nats per answer token"
) -> list[Curve]:
    """Charts of loss (in `unit`), throughput, memory and, where there is one, validation loss of a run."""
    mark = (resumed_at, "stopped and resumed") if resumed_at else None
    made = []
    for key, title, measured_in, smooth, from_zero in (
        ("loss", "Loss", unit, 15, False),
        ("tokens_per_second", "Throughput", "tokens per second", 15, True),
        ("memory_gib", "Memory", "GiB, peak of one process", 0, True),
        ("validation/loss", "Validation loss", unit, 0, False),
    ):
        values = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), (int, float))]
        points = [(step, value) for step, value in values if math.isfinite(value)]
        if points:
            chart = charts.curve(title, points, mark=mark, smooth=smooth, from_zero=from_zero)
            made.append((title, measured_in, chart))
    return made


def page(
    title: str,
    lead: str,
    numbers: Mapping[str, str],
    charted: Sequence[Curve],
    cards: Sequence[pages.Card] = (),
    steps: Sequence[tuple[str, str]] = (),
    sampled: Sequence[tuple[int, Path]] = (),
) -> str:
    """The page. cards: held-out pictures; steps: (what to try next, the command); sampled: (step, sheet)."""
    return pages.render(
        "run.html",
        title=title,
        lead=lead,
        numbers=numbers,
        charts=charted,
        cards=cards,
        steps=steps,
        sheets=[(step, thumbnail(str(sheet), 900)) for step, sheet in sampled],
    )
