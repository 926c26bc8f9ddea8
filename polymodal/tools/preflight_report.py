"""`polymodal check`: what preflight.py found, printed for a terminal of 80 columns or as JSON. Decides
nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say_lines, styled
from polymodal.core.text import format_bytes, format_count
from polymodal.recipe import Recipe
from polymodal.tools.preflight import Report, check, numbered
from polymodal.train.layouts import DataFacts

Rows = list[tuple[str, str]]


def _print(console: Any, title: str, rows: Rows) -> None:
    style = {"title_justify": "left", "title_style": "bold", "box": None, "padding": (0, 2, 0, 0)}
    table = Table(title=title, show_header=False, **style)  # type: ignore[arg-type]
    table.add_column(no_wrap=True, min_width=16)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", value)
    console.print(table)
    console.print()


def _model(report: Report) -> Rows:
    rows = [("card", report.model["card"]), ("source", report.model["source"])]
    if (estimate := report.estimate) is None:
        return rows
    total, trained = estimate["total"], estimate["trained"]
    share = trained / max(1, total)
    rows.append(("parameters", f"{format_count(total)}, {format_count(trained)} trained ({share:.1%})"))
    for tower, (total, trained) in estimate["towers"].items():
        how = "all trained" if trained == total else f"{format_count(trained)} trained"
        rows.append((f"  {tower}", f"{format_count(total)}, {how if trained else 'frozen'}"))
    return rows


def _layout(recipe: Recipe, report: Report) -> Rows:
    parallel = recipe.parallel
    words = [f"{axis} {n}" for axis, n in report.sizes.items() if n > 1] or ["one process"]
    words += [f"recompute {parallel.recompute}"] * (parallel.recompute != "none")
    words += ["compile"] * parallel.compile
    words += ["sp"] * (parallel.tp > 1 and parallel.sp is not False)
    return [
        ("processes", str(report.world)),
        ("layout", ", ".join(words)),
        ("precision", recipe.train.precision),
    ]


def _memory(e: dict[str, Any]) -> Rows:
    kinds = ("parameters", "gradients", "optimizer", "average", "gathered", "working")
    rows = [(kind, format_bytes(e[kind])) for kind in kinds if e[kind]]
    rows.append(("activations", f"{format_bytes(e['activations'])} (for {e['assumed']})"))
    together = f"about {format_bytes(e['memory'])} a rank (an estimate; polymodal plan traces it)"
    rows.append(("together", together))
    if e["saving"]:
        saving = f"{format_bytes(e['saving'])} a rank more while a checkpoint is written in the background"
        rows.append(("on the host", saving))
    return rows


def _data_rows(recipe: Recipe, facts: DataFacts) -> Rows:
    rows = [("rows", f"{facts.rows:,}, {facts.usable:,} usable")]
    for part in facts.parts if len(facts.parts) > 1 else ():
        words = f"{part['usable']:,} usable, {part['draws']:,} drawn an epoch"
        words += f", weight {part['weight']:g}" if part["weight"] else ""
        words += f", repeat {part['repeat']:g}" if part["repeat"] != 1 else ""
        rows.append((f"  {part['name']}", words))
    share = facts.trained / max(1, facts.tokens)
    trained = f"{format_count(facts.trained)} trained on ({share:.0%})"
    rows.append(("tokens", f"{format_count(facts.tokens)}, {trained}; longest row {facts.longest:,}"))
    for stream, total in facts.media.items():
        if total:
            rows.append((stream, f"{format_count(total)} patches or frames"))
    rows += [(f"  {shape}", f"{n:,}") for shape, n in facts.buckets]
    if facts.looked_at and facts.batching and not facts.buckets:
        rows.append((facts.unit, f"of {facts.batching}"))
    if facts.looked_at or facts.buckets:
        unit = "packs" if facts.unit == "packs" and not facts.buckets else "samples"
        steps = f"{facts.steps_per_epoch:,} of {recipe.train.global_batch_size} {unit}"
        rows.append(("steps an epoch", steps))
    return rows


def _data(console: Any, title: str, recipe: Recipe, facts: DataFacts) -> None:
    _print(console, title, _data_rows(recipe, facts))
    if facts.buckets:
        return
    peak = max((n for _, _, n in facts.histogram), default=0) or 1
    for first, last, n in facts.histogram:
        bar = "█" * round(40 * n / peak) or ("▏" if n else "")
        over = " too long" if first > facts.max_length else ""
        console.print(f"  {first:>6,} to {last:>7,} {n:>9,} {bar}{over}")
    console.print(styled(("  rows by length in tokens\n", "dim")))
    if facts.dropped:
        console.print(styled(("  left out", "bold")))
        for reason, found in facts.dropped.items():
            console.print(f"  {found['count']:>9,}  {reason}")
            for place in found["first"]:
                console.print(styled((f"             {place}", "dim")), soft_wrap=True)
        console.print()


def show_report(recipe: Recipe, report: Report, console: Any = None) -> None:
    """Print what was found; problems are left to the caller."""
    console = console or terminal.console()
    if report.model:
        _print(console, "Model", _model(report))
    if report.sizes:
        _print(console, "Layout", _layout(recipe, report))
    if report.data is not None:
        _data(console, "Data", recipe, report.data)
    if report.validation is not None:
        _data(console, "Validation data", recipe, report.validation)
    if report.estimate is not None:
        _print(console, "Memory", _memory(report.estimate))
    if disk := report.disk:
        free = f"{format_bytes(disk['wanted'])} in {recipe.run_dir}, {format_bytes(disk['free'])} free"
        _print(console, "Disk", [("one checkpoint", format_bytes(disk["one"])), ("at most", free)])
    if report.steps is not None:
        every = recipe.checkpoint.every
        saved = f"every {every}" if every and every < report.steps else "at the end"
        _print(console, "Run", [("steps", f"{report.steps:,}, a checkpoint {saved}")])
    for note in report.notes:
        console.print(styled(("note:", "yellow"), f" {note}"))
    if not report.problems:
        console.print(styled(("train would start.", "green")))


def main(recipe: Recipe, world: int | None = None, *, measure: bool = True, as_json: bool = False) -> int:
    """The command: prints the report; raises all problems when there are any (exit code 2)."""
    report = check(recipe, world, measure)
    if as_json:
        say_lines(
            json.dumps({"ok": not report.problems, **asdict(report)}, indent=2, ensure_ascii=False), "\n"
        )
        return 2 if report.problems else 0
    show_report(recipe, report)
    if report.problems:
        reasons = f", for {len(report.problems)} reasons" if len(report.problems) > 1 else ""
        raise PolymodalError(numbered(f"this recipe would not train{reasons}:", report.problems))
    return 0
