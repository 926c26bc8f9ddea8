"""The `models` command: the table of models, a page of one model, and the way from a request to training."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say_lines, styled
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.tools import advise, model_table

AXES = {
    "fsdp": "FSDP2, HSDP (dp_shard, dp_replicate)",
    "tp": "tensor (tp)",
    "sp": "sequence in the tp group (sp)",
    "pp": "pipeline (pp)",
    "cp": "context (cp)",
    "ep": "expert (ep)",
    "recompute": "recompute",
    "compile": "torch.compile",
    "lora": "LoRA",
}


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
    """A card as plain data."""
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


def _plain_table(title: str = "", **options: Any) -> Table:
    return Table(title=title, title_justify="left", box=None, **options)


def _table(cards: dict[str, ModelCard], console: Any) -> None:
    table = _plain_table("Models", padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("sizes", max_width=13)
    table.add_column("tasks", min_width=19, max_width=19)
    table.add_column("parallel", max_width=13)
    table.add_column("status", min_width=8, no_wrap=True)
    shown = [axis for axis in AXES if axis not in ("recompute", "compile")]
    for card in cards.values():
        able = " ".join(axis for axis in shown if why_not(card, axis) is None)
        status = styled(("verified", "green")) if card.verified else "declared"
        table.add_row(card.name, ", ".join(card.sizes), ", ".join(card.tasks), able, status)
    console.print(table)
    planned = [family for family in advise.PLANNED if family.name not in cards]
    table = _plain_table("\nNot yet", padding=(0, 2, 0, 0))
    table.add_column("kind")
    table.add_column("models")
    for kind in ("understanding", "generation", "omni", "audio"):
        if names := [family.name for family in planned if family.kind == kind]:
            table.add_row(kind, ", ".join(names))
    if planned:
        console.print(table)
    console.print(
        styled(("\npolymodal models NAME: one model; polymodal models --for TEXT: which, and how", "dim"))
    )


def _page(card: ModelCard, only: str | None, console: Any) -> None:
    console.print(styled((card.name, "bold"), f"  {card.kind}: {', '.join(card.tasks)}"))
    verified = f"verified here by {card.verified}" if card.verified else "declared: not verified here"
    console.print(f"status: {verified}")
    table = _plain_table("\nSizes", show_header=False)
    for key, size in card.sizes.items():
        if only in (None, key):
            vision = f" + {size.vision_layers} vision" if size.vision_layers else ""
            facts = f"{model_table.billions(size)}, {size.layers} layers{vision}, {size.devices} devices, "
            facts += f"{model_table.layout(size)}\n"
            table.add_row(styled((key, "bold")), styled(facts, (size.hub or "", "dim")))
    console.print(table)
    console.print(styled(("devices: recommended for full fine-tuning, 64 to 80 GB each", "dim")))
    table = _plain_table("\nParallelism", show_header=False)
    for axis, title in AXES.items():
        reason = why_not(card, axis)
        table.add_row(title, styled(("yes", "green")) if reason is None else f"no: {reason}")
    if "ring" in card.limits:
        table.add_row("ring", f"no: {card.limits['ring']}")
    console.print(table)
    table = _plain_table("\nTowers (train.freeze, optim.groups, model.lora.towers)", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, modules in card.towers.items():
        table.add_row(name, ", ".join(modules))
    console.print(table)
    first = only or advise.middle(card)
    console.print(
        f"\nNext: polymodal init {card.name}-{first} --task sft -o {card.name}.yaml", soft_wrap=True
    )


def _way(answer: advise.Route, request: str, console: Any) -> None:
    if answer.kind is None:
        console.print(f"Nothing in “{request}” names a model or a task that is known here.")
        console.print(
            "Say what goes in and what comes out, e.g. “answer questions about photos”, “text to video”, "
            "“transcribe speech”."
        )
        return
    card = answer.card
    console.print(styled((answer.kind, "bold"), f", {advise.TASKS[answer.task]}"))
    if card is not None:
        size = answer.size or f"{advise.middle(card)} (there are {', '.join(card.sizes)})"
        console.print(styled("model: ", (card.name, "bold"), f", size {size}"))
        if answer.others:
            console.print(f"also: {', '.join(other.name for other in answer.others)}")
    if answer.coming:
        coming = "also, not here yet" if card else "no card of this is here yet; the families that will be"
        console.print(f"{coming}: {', '.join(family.name for family in answer.coming)}")
    for note in answer.notes:
        console.print(f"note: {note}")
    if answer.stages:
        console.print()
    for number, stage in enumerate(answer.stages, 1):
        later = "" if stage.here else "  not yet"
        console.print(styled((f"{number}. {stage.title}", "bold"), (later, "yellow")))
        for word in ("reads", "writes", "note"):
            if text := getattr(stage, word):
                console.print(styled((f"   {word:6} ", "dim"), text), soft_wrap=True)
        if stage.command:
            console.print(styled((f"   {stage.command}", "cyan")), soft_wrap=True)


def page() -> str:
    """docs/models.md."""
    return model_table.markdown(catalog.cards().values(), AXES.items(), why_not)


def _known(name: str, cards: dict[str, ModelCard]) -> tuple[ModelCard, str | None]:
    """(card, size) of a name. Raises PolymodalError for one that is neither here nor planned."""
    if known := catalog.named(name):
        return known
    if family := advise.planned_family(name):
        task = family.tasks[0].replace("-", " ")
        raise PolymodalError(
            f"{family.name} has no card here yet.", f'`polymodal models --for "{task}"` lists what there is.'
        )
    near = catalog.nearest(name)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(cards)}."
    raise PolymodalError(f"There is no model `{name}`.", hint)


def _answer_values(answer: advise.Route) -> dict[str, Any]:
    return {
        "kind": answer.kind,
        "task": answer.task,
        "model": answer.card.name if answer.card else None,
        "size": answer.size,
        "others": [card.name for card in answer.others],
        "not_yet": [asdict(family) for family in answer.coming],
        "notes": list(answer.notes),
        "stages": [asdict(stage) for stage in answer.stages],
    }


def main(name: str | None = None, request: str | None = None, as_json: bool = False) -> int:
    """The command. Raises PolymodalError for a name that is neither here nor planned."""
    console, cards = terminal.console(), catalog.cards()
    if name is not None and request is not None:
        raise PolymodalError("`polymodal models` takes a NAME or --for, not both.", "Leave one out.")
    if request is not None:
        answer = advise.route(request, cards)
        if as_json:
            say_lines(json.dumps(_answer_values(answer), indent=2, ensure_ascii=False), "\n")
        else:
            _way(answer, request, console)
    elif name is not None:
        card, key = _known(name, cards)
        if as_json:
            say_lines(json.dumps(facts(card), indent=2), "\n")
        else:
            _page(card, key, console)
    elif as_json:
        say_lines(json.dumps([facts(card) for card in cards.values()], indent=2), "\n")
    else:
        _table(cards, console)
    return 0
