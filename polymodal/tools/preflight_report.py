"""`polymodal check`: what preflight.py found, printed for a terminal of 80 columns or as JSON. Decides
nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_bytes, format_count
from polymodal.recipe import Recipe
from polymodal.tools.preflight import Report, check
from polymodal.train.layouts import DataFacts


def _rows(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True, min_width=16)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {escape(name)}", escape(value))
    console.print(table)
    console.print()


def _model(report: Report) -> list[tuple[str, str]]:
    rows = [("card", report.model["card"]), ("source", report.model["source"])]
    estimate = report.estimate
    if estimate is not None:
        share = estimate["trained"] / max(1, estimate["total"])
        rows.append(
            (
                "parameters",
                f"{format_count(estimate['total'])}, {format_count(estimate['trained'])} trained ({share:.1%})",
            )
        )
        for tower, (total, trained) in estimate["towers"].items():
            rows.append(
                (
                    f"  {tower}",
                    f"{format_count(total)}, "
                    + (
                        "frozen"
                        if not trained
                        else "all trained"
                        if trained == total
                        else f"{format_count(trained)} trained"
                    ),
                )
            )
    return rows


def _layout(recipe: Recipe, report: Report) -> list[tuple[str, str]]:
    axes = ", ".join(f"{axis} {n}" for axis, n in report.sizes.items() if n > 1) or "one process"
    parallel = recipe.parallel
    extras = (
        [f"recompute {parallel.recompute}"] * (parallel.recompute != "none")
        + ["compile"] * parallel.compile
        + ["sp"] * (parallel.tp > 1 and parallel.sp is not False)
    )
    return [
        ("processes", str(report.world)),
        ("layout", ", ".join([axes, *extras])),
        ("precision", recipe.train.precision),
    ]


def _memory(report: Report) -> list[tuple[str, str]]:
    e = report.estimate or {}
    rows = [
        (name, format_bytes(e[name]))
        for name in ("parameters", "gradients", "optimizer", "average", "gathered", "working")
        if e.get(name)
    ]
    rows.append(("activations", f"{format_bytes(e['activations'])} (for {e['assumed']})"))
    rows.append(
        ("together", f"about {format_bytes(e['memory'])} a rank (an estimate; polymodal plan traces it)")
    )
    if e["saving"]:
        rows.append(
            (
                "on the host",
                f"{format_bytes(e['saving'])} a rank more while a checkpoint is written in the background",
            )
        )
    return rows


def _data(console: Console, title: str, recipe: Recipe, facts: DataFacts) -> None:
    rows = [("rows", f"{facts.rows:,}, {facts.usable:,} usable")]
    rows += [
        (
            f"  {part['name']}",
            f"{part['usable']:,} usable, {part['draws']:,} drawn an epoch"
            + (f", weight {part['weight']:g}" if part["weight"] else "")
            + (f", repeat {part['repeat']:g}" if part["repeat"] != 1 else ""),
        )
        for part in facts.parts
        if len(facts.parts) > 1
    ]
    rows.append(
        (
            "tokens",
            f"{format_count(facts.tokens)}, {format_count(facts.trained)} trained on ({facts.trained / max(1, facts.tokens):.0%}); longest row {facts.longest:,}",
        )
    )
    rows += [
        (stream, f"{format_count(total)} patches or frames") for stream, total in facts.media.items() if total
    ]
    rows += [(f"  {shape}", f"{n:,}") for shape, n in facts.buckets]
    if facts.buckets:
        rows.append(
            ("steps an epoch", f"{facts.steps_per_epoch:,} of {recipe.train.global_batch_size} samples")
        )
        _rows(console, title, rows)
        return
    if facts.looked_at:
        if facts.batching:
            rows.append((facts.unit, f"of {facts.batching}"))
        unit = "packs" if facts.unit == "packs" else "samples"
        rows.append(
            ("steps an epoch", f"{facts.steps_per_epoch:,} of {recipe.train.global_batch_size} {unit}")
        )
    _rows(console, title, rows)
    peak = max((n for _, _, n in facts.histogram), default=0) or 1
    for first, last, n in facts.histogram:
        bar = "█" * round(40 * n / peak) or ("▏" if n else "")
        over = " too long" if first > facts.max_length else ""
        console.print(f"  {first:>6,} to {last:>7,} {n:>9,} {bar}{over}", highlight=False)
    console.print("  [dim]rows by length in tokens[/dim]\n")
    if facts.dropped:
        console.print("  [bold]left out[/bold]")
        for reason, found in facts.dropped.items():
            console.print(f"  {found['count']:>9,}  {escape(reason)}", highlight=False)
            for place in found["first"]:
                console.print(f"             [dim]{escape(place)}[/dim]", highlight=False, soft_wrap=True)
        console.print()


def show_report(recipe: Recipe, report: Report, console: Any = None) -> None:
    """Print what was found; problems are left to the caller."""
    console = console or Console(highlight=False)
    if report.model:
        _rows(console, "Model", _model(report))
    if report.sizes:
        _rows(console, "Layout", _layout(recipe, report))
    if report.data is not None:
        _data(console, "Data", recipe, report.data)
    if report.validation is not None:
        _data(console, "Validation data", recipe, report.validation)
    if report.estimate is not None:
        _rows(console, "Memory", _memory(report))
    if report.disk is not None:
        disk = report.disk
        _rows(
            console,
            "Disk",
            [
                ("one checkpoint", format_bytes(disk["one"])),
                (
                    "at most",
                    f"{format_bytes(disk['wanted'])} in {recipe.run_dir}, {format_bytes(disk['free'])} free",
                ),
            ],
        )
    if report.steps is not None:
        every = recipe.checkpoint.every
        saved = (
            f", a checkpoint every {every}" if every and every < report.steps else ", a checkpoint at the end"
        )
        _rows(console, "Run", [("steps", f"{report.steps:,}{saved}")])
    for note in report.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    if not report.problems:
        console.print("[green]train would start.[/green]")


def main(recipe: Recipe, world: int | None = None, *, measure: bool = True, as_json: bool = False) -> int:
    """The command: prints the report; raises all problems when there are any (exit code 2)."""
    report = check(recipe, world, measure)
    if as_json:
        print(json.dumps({"ok": not report.problems, **asdict(report)}, indent=2, ensure_ascii=False))
        return 2 if report.problems else 0
    show_report(recipe, report)
    if report.problems:
        head = (
            "this recipe would not train:"
            if len(report.problems) == 1
            else f"this recipe would not train, for {len(report.problems)} reasons:"
        )
        raise PolymodalError(
            "\n".join([head, *(f"{i}. {text}" for i, text in enumerate(report.problems, 1))])
        )
    return 0
