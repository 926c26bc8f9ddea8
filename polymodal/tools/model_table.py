"""The page of models and the table in README, written from the cards: `polymodal models --markdown > docs/models.md`.

Sees the cards and the router's list of families to come. What a layout needs is told by the caller, who knows what
parallelism is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from polymodal.models.card import ModelCard, Size
from polymodal.tools.advise import PLANNED, PlannedFamily

WhyNot = Callable[[ModelCard, str], str | None]
"""(card, axis) -> None when the model can be trained so, else the reason."""

INPUTS = {
    "image-text-to-text": "image",
    "video-text-to-text": "video",
    "text-generation": "text",
    "text-to-video": "text to video",
    "image-to-video": "image to video",
    "video-to-video": "video to video",
    "text-to-image": "text to image",
    "image-to-image": "image to image",
}


def row(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def billions(size: Size) -> str:
    return f"{size.parameters:g} B" + (f" ({size.active:g} B active)" if size.active else "")


def readme_row(card: ModelCard, why_not: WhyNot) -> str:
    """The card's line in README: name, sizes, what goes in, how it can be trained."""
    name = card.title or card.name.replace("qwen", "Qwen").replace("-vl", "-VL").replace("-moe", " MoE")
    sizes = ", ".join(key.upper() for key in card.sizes)
    inputs = ", ".join(
        dict.fromkeys(INPUTS[task] for task in card.tasks if INPUTS.get(task, "text") != "text")
    )
    weights = "full" + (", LoRA" if why_not(card, "lora") is None else "")
    names = {"fsdp": "FSDP2, HSDP", "tp": "TP", "sp": "SP", "pp": "PP", "cp": "CP", "ep": "EP"}
    layouts = ", ".join(text for axis, text in names.items() if why_not(card, axis) is None)
    return row((name, sizes, inputs, f"{weights}; {layouts}"))


def _layout(size: Size) -> str:
    return (
        ", ".join(f"{axis} {count}" for axis, count in size.layout.items() if count not in (-1, 1)) or "fsdp"
    )


def _section(card: ModelCard, axes: Iterable[tuple[str, str]], why_not: WhyNot) -> list[str]:
    status = f"Verified here: {card.verified}." if card.verified else "Declared: not verified here."
    lines = [f"## {card.name}", "", f"{', '.join(card.tasks)}. {status}", ""]
    lines += [row(("size", "hub", "parameters", "layers", "devices", "layout")), "|---|---|---|---|---|---|"]
    for key, size in card.sizes.items():
        layers = f"{size.layers}" + (f" + {size.vision_layers} vision" if size.vision_layers else "")
        lines.append(
            row(
                (
                    f"`{card.name}-{key}`",
                    f"`{size.hub}`",
                    billions(size),
                    layers,
                    f"{size.devices}",
                    _layout(size),
                )
            )
        )
    lines += ["", row(("training", "here")), "|---|---|"]
    for axis, title in axes:
        reason = why_not(card, axis)
        lines.append(row((title, "yes" if reason is None else f"no: {reason.rstrip('.')}")))
    lines += ["", row(("tower", "modules")), "|---|---|"]
    lines += [
        row((f"`{name}`", ", ".join(f"`{module}`" for module in modules)))
        for name, modules in card.towers.items()
    ]
    return [*lines, ""]


def markdown(cards: Iterable[ModelCard], axes: Iterable[tuple[str, str]], why_not: WhyNot) -> str:
    """docs/models.md. axes: (axis, title) in the order of the page."""
    cards, axes = list(cards), list(axes)
    lines = [
        "# Models",
        "",
        "Written by `polymodal models --markdown` from the cards. Devices: recommended for full fine-tuning, 64 to 80 GB each.",
        "Towers are the names that `train.freeze`, `optim.groups` and `model.lora.towers` take.",
        "",
    ]
    for card in cards:
        lines += _section(card, axes, why_not)
    coming: list[PlannedFamily] = [
        family for family in PLANNED if family.name not in {card.name for card in cards}
    ]
    if coming:
        lines += ["## Not here yet", "", row(("model", "kind", "tasks")), "|---|---|---|"]
        lines += [row((family.name, family.kind, ", ".join(family.tasks))) for family in coming]
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"
