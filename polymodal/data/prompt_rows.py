"""Rows that ask: parquet of verl and EasyR1, TRL's prompts, conversations without their last answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import parse_json
from polymodal.data.references import first, listed
from polymodal.recipe import Attr

QUESTIONS = ("problem", "question", "prompt", "instruction", "query")
EXPECTED = ("ground_truth", "solution", "answer", "output", "response", "completion")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def turns(row: Mapping[str, Any], attr: Attr) -> tuple[list[Any], list[str]]:
    """(the turns of a row's prompt, the answers it expects): verl's and EasyR1's rows, TRL's, and every
    conversation, whose last answers are then what is expected. Raises PolymodalError without a question."""
    messages, key = first(row, attr.messages, ("messages", "conversations"))
    if messages is None and attr.messages is None:
        messages, key = first(row, attr.prompt, QUESTIONS)
    messages = listed(messages)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise PolymodalError(
            f"the row asks nothing: `{key}` is {'missing' if messages is None else 'no question'}.",
            "Name the column in data.attr.prompt or data.attr.messages.",
        )
    asked = list(messages)
    said: list[str] = []
    while asked and isinstance(turn := asked[-1], Mapping):
        speaker = str(turn.get(attr.role or "role") or turn.get("from")).lower()
        if speaker not in ("assistant", "gpt", "model", attr.assistant):
            break
        text = turn.get(attr.content or "content", turn.get("value"))
        said = [text] if isinstance(text, str) else said
        asked.pop()
    if not asked:
        raise PolymodalError(f"`{key}` has no question before its answer.", "Begin it with a user's turn.")
    expected = _truth(row, attr)
    return asked, said if expected is None else expected


def _truth(row: Mapping[str, Any], attr: Attr) -> list[str] | None:
    value = first(row, attr.response, EXPECTED)[0]
    model = row.get("reward_model")  # verl
    if isinstance(model, str) and model.startswith("{"):
        try:
            model = parse_json(model)
        except ValueError:
            model = None
    if attr.response is None and isinstance(model, Mapping) and model.get("ground_truth") is not None:
        value = model["ground_truth"]
    value = listed(value)
    if value is None or isinstance(value, Mapping):
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each if isinstance(each, str) else str(each) for each in values if not isinstance(each, Mapping)]


def columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards see of a row: all of it but bytes and media."""
    return {
        key: value
        for key, value in row.items()
        if not key.startswith("__") and key not in MEDIA and not isinstance(value, (bytes, bytearray))
    }
