"""The page of models and the table in README, written from the cards: `polymodal models --markdown >
docs/models.md`.

The page is the template models.md.j2. The caller gives the reasons against a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from polymodal.models.card import ModelCard, Size
from polymodal.tools.advise import PLANNED
from polymodal.tools.templates import template

WhyNot = Callable[[ModelCard, str], str | None]
"""(card, axis) -> None when the model can be trained so, else the reason."""

INPUTS = {
    "image-text-to-text": "image",
    "video-text-to-text": "video",
    "audio-text-to-text": "audio",
    "text-generation": "text",
    "text-to-video": "text to video",
    "image-to-video": "image to video",
    "video-to-video": "video to video",
    "text-to-image": "text to image",
    "image-to-image": "image to image",
    "speech-recognition": "speech to text",
    "text-to-speech": "text to speech",
}


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
    return f"| {name} | {sizes} | {inputs} | {weights}; {layouts} |"


def layout(size: Size) -> str:
    """The recommended axes that are more than 1: "dp_shard 8, tp 2"."""
    return ", ".join(f"{axis} {n}" for axis, n in size.layout.items() if n not in (-1, 1)) or "fsdp"


def markdown(cards: Iterable[ModelCard], axes: Iterable[tuple[str, str]], why_not: WhyNot) -> str:
    """docs/models.md. axes: (axis, title) in the order of the page."""

    def reason(card: ModelCard, axis: str) -> str:
        why = why_not(card, axis)
        return "yes" if why is None else f"no: {why.rstrip('.')}"

    cards = list(cards)
    here = {card.name for card in cards}
    page = template("models.md.j2", billions=billions, layout=layout, reason=reason)
    return page.render(
        cards=cards, axes=list(axes), coming=[family for family in PLANNED if family.name not in here]
    )
