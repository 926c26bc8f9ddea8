"""The `models` command: the table of models, one model's page, and the way from a wish to a trained model.

Sees the cards, the router, and what parallelism is built. Prints with rich, or JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.models.card import ModelCard
from polymodal.tools import advise
from polymodal.tools.model_table import billions, layout

AXES = {
    "fsdp": "FSDP2, HSDP (dp_shard, dp_replicate)", "tp": "tensor (tp)", "sp": "sequence in the tp group (sp)", "pp": "pipeline (pp)",
    "cp": "context (cp)", "ep": "expert (ep)", "recompute": "recompute", "compile": "torch.compile", "lora": "LoRA",
}  # fmt: skip


def why_not(card: ModelCard, axis: str) -> str | None:
    """None when the model can be trained with that kind of parallelism, else the reason."""
    if axis in card.limits:
        return card.limits[axis]
    if axis in ("tp", "sp") and not card.tensor_plan:
        return "the card has no tensor_plan."
    if axis == "pp" and not card.pipeline:
        return "the card does not say where it can be cut."
    if axis == "ep" and not any(size.active for size in card.sizes.values()):
        return "it has no experts."
    return None


def facts(card: ModelCard) -> dict[str, Any]:
    """Everything the command says about a card, as plain data."""
    return {
        "name": card.name,
        "kind": card.kind,
        "tasks": list(card.tasks),
        "status": f"verified: {card.verified}" if card.verified else "declared",
        "architectures": list(card.architectures),
        "towers": {name: list(modules) for name, modules in card.towers.items()},
        "sizes": {key: {**asdict(size), "layout": dict(size.layout)} for key, size in card.sizes.items()},
        "parallel": {axis: why_not(card, axis) or "yes" for axis in AXES},
    }


def _table(cards: dict[str, ModelCard], console: Any) -> None:
    from rich.table import Table

    table = Table(title="Models", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("sizes", max_width=13)
    table.add_column("tasks", min_width=19, max_width=19)
    table.add_column("parallel", max_width=13)
    table.add_column("status", min_width=8, no_wrap=True)
    for card in cards.values():
        able = [
            axis for axis in ("fsdp", "tp", "sp", "pp", "cp", "ep", "lora") if why_not(card, axis) is None
        ]
        table.add_row(
            card.name,
            ", ".join(card.sizes),
            ", ".join(card.tasks),
            " ".join(able),
            "[green]verified[/green]" if card.verified else "declared",
        )
    console.print(table)
    rows = [family for family in advise.PLANNED if family.name not in cards]
    table = Table(title="\nNot yet", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("kind", "models"):
        table.add_column(column)
    for kind in ("understanding", "generation", "omni", "audio"):
        names = [family.name for family in rows if family.kind == kind]
        if names:
            table.add_row(kind, ", ".join(names))
    if rows:
        console.print(table)
    console.print(
        "\n[dim]polymodal models NAME: one model; polymodal models --for TEXT: which, and how[/dim]"
    )


def _page(card: ModelCard, only: str | None, console: Any) -> None:
    from rich.table import Table

    console.print(f"[bold]{card.name}[/bold]  {card.kind}: {', '.join(card.tasks)}")
    console.print(
        f"status: {'verified here by ' + card.verified if card.verified else 'declared: not verified here'}"
    )
    table = Table(title="\nSizes", title_justify="left", box=None, show_header=False)
    for key, size in card.sizes.items():
        if only in (None, key):
            layers = f"{size.layers} layers" + (
                f" + {size.vision_layers} vision" if size.vision_layers else ""
            )
            table.add_row(
                f"[bold]{key}[/bold]",
                f"{billions(size)}, {layers}, {size.devices} devices, {layout(size)}\n[dim]{size.hub}[/dim]",
            )
    console.print(table)
    console.print("[dim]devices: recommended for full fine-tuning, 64 to 80 GB each[/dim]")
    table = Table(title="\nParallelism", title_justify="left", box=None, show_header=False)
    table.add_column()
    table.add_column()
    for axis, title in AXES.items():
        reason = why_not(card, axis)
        table.add_row(title, "[green]yes[/green]" if reason is None else f"no: {reason}")
    console.print(table)
    table = Table(
        title="\nTowers (train.freeze, optim.groups, model.lora.towers)",
        title_justify="left",
        box=None,
        show_header=False,
    )
    table.add_column()
    table.add_column(overflow="fold")
    for name, modules in card.towers.items():
        table.add_row(name, ", ".join(modules))
    console.print(table)
    first = only or advise.middle(card)
    console.print(
        f"\nNext: polymodal init {card.name}-{first} --task sft -o {card.name}.yaml", soft_wrap=True
    )


def _way(answer: advise.Route, wish: str, console: Any) -> None:
    from rich.markup import escape

    if answer.kind is None:
        console.print(f"Nothing in “{escape(wish)}” names a model or a task that is known here.")
        console.print(
            "Say what goes in and what comes out, e.g. “answer questions about photos”, “text to video”, “transcribe speech”."
        )
        return
    console.print(f"[bold]{answer.kind}[/bold], {advise.TASKS[answer.task]}")
    if answer.card is not None:
        key = answer.size or advise.middle(answer.card)
        console.print(
            f"model: [bold]{answer.card.name}[/bold], size {key}"
            + ("" if answer.size else f" (there are {', '.join(answer.card.sizes)})")
        )
        if answer.others:
            console.print(f"also: {', '.join(card.name for card in answer.others)}")
    if answer.coming:
        said = (
            "also, not here yet"
            if answer.card is not None
            else "no card of this is here yet; the families that will be"
        )
        console.print(f"{said}: {', '.join(family.name for family in answer.coming)}")
    for note in answer.notes:
        console.print(f"note: {note}")
    if not answer.stages:
        return
    console.print()
    for number, stage in enumerate(answer.stages, 1):
        console.print(
            f"[bold]{number}. {stage.title}[/bold]" + ("" if stage.here else "  [yellow]not yet[/yellow]")
        )
        for word, text in (("reads", stage.reads), ("writes", stage.writes), ("note", stage.note)):
            if text:
                console.print(f"   [dim]{word:6}[/dim] {escape(text)}", soft_wrap=True)
        if stage.command:
            console.print(f"   [cyan]{escape(stage.command)}[/cyan]", soft_wrap=True)


def page() -> str:
    """docs/models.md."""
    from polymodal.models import catalog
    from polymodal.tools import model_table

    return model_table.markdown(catalog.cards().values(), AXES.items(), why_not)


def main(name: str | None = None, wish: str | None = None, as_json: bool = False) -> int:
    """The command. Raises PolymodalError for a name that is neither here nor known to come."""
    from rich.console import Console

    from polymodal.models import catalog

    console = Console(highlight=False)
    cards = catalog.cards()
    if name is not None and wish is not None:
        raise PolymodalError("`polymodal models` takes a NAME or --for, not both.", "Leave one out.")
    if wish is not None:
        answer = advise.route(wish, cards)
        if as_json:
            print(json.dumps(
                {
                    "kind": answer.kind, "task": answer.task, "model": answer.card.name if answer.card else None, "size": answer.size,
                    "others": [card.name for card in answer.others], "not_yet": [asdict(family) for family in answer.coming],
                    "notes": list(answer.notes), "stages": [asdict(stage) for stage in answer.stages],
                }, indent=2, ensure_ascii=False,
            ))  # fmt: skip
        else:
            _way(answer, wish, console)
        return 0
    if name is None:
        if as_json:
            print(json.dumps([facts(card) for card in cards.values()], indent=2))
        else:
            _table(cards, console)
        return 0
    known = catalog.named(name)
    if known is None:
        later = next((f for f in advise.PLANNED if name.lower() in (f.name, *f.aliases)), None)
        if later is not None:
            raise PolymodalError(
                f"{later.name} has no card here yet.",
                f'`polymodal models --for "{later.tasks[0].replace("-", " ")}"` lists what there is.',
            )
        near = catalog.nearest(name)
        raise PolymodalError(
            f"There is no model `{name}`.",
            f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(cards)}.",
        )
    card, key = known
    if as_json:
        print(json.dumps(facts(card), indent=2))
    else:
        _page(card, key, console)
    return 0
