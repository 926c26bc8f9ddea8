"""Rows that compare answers: TRL, ShareGPT and Alpaca ranking, ms-swift, RLHF-V, RLAIF-V, VLFeedback, KTO.

A row becomes the turns of its prompt, and for each answer the turns of that answer and a score where the row
has one. formats.py reads the turns as it reads those of every conversation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from polymodal.core.errors import PolymodalError
from polymodal.core.text import parse_json
from polymodal.data.references import first, listed
from polymodal.recipe import Attr

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("completion", "output", "response", "answer")
SPEAKERS = ("assistant", "gpt", "model", "bot", "function_call")


class Ranked(NamedTuple):
    """Turns before the answers; the turns of each answer; their scores, higher is better, or () where they
    come in order of preference; columns of media that belong to one answer's conversation alone."""

    prompt: list[Any]
    answers: list[list[Any]]
    scores: tuple[float, ...] = ()
    media: list[dict[str, Any]] = []


def compares(row: Mapping[str, Any], attr: Attr) -> bool:
    """Whether a row names a preferred answer and another one."""
    return all(
        row.get(own or name) is not None
        for own, name in ((attr.chosen, "chosen"), (attr.rejected, "rejected"))
    )


def read(row: Mapping[str, Any], attr: Attr) -> Ranked:
    """The answers of a row. Raises PolymodalError for a row that compares none."""
    if isinstance(text := row.get("text"), str) and text.startswith("{"):  # RLHF-V
        try:
            row = {**row, **parse_json(text)}
        except ValueError as error:
            raise PolymodalError(f"`text` is no JSON: {error}.", "Write plain columns.") from None
    messages, key = first(row, attr.messages, ("messages", "conversations"))
    messages = listed(messages)
    if messages is not None and not isinstance(messages, list):
        raise PolymodalError(f"`{key}` is no list of turns.", "Write [{...}, ...].")
    label, label_key = first(row, attr.label, ("label", "kto_tag"))
    if compares(row, attr):
        return _chosen(row, attr, messages)
    if messages and row.get("rejected_response") is not None:
        prompt, answer = _split(messages, key)
        return Ranked(prompt, [answer, *([_spoken(t)] for t in _several(row["rejected_response"]))])
    if messages and isinstance(other := listed(row.get("rejected_messages")), list):
        media = {name: row.get(f"rejected_{name}") for name in ("images", "videos", "audios")}
        given = {name: value for name, value in media.items() if value is not None}
        (prompt, answer), (begins, rejected) = _split(messages, key), _split(other, "rejected_messages")
        own = [{}, {**given, "__prompt__": begins}] if given or begins != prompt else []
        return Ranked(prompt, [answer, rejected], (), own)
    if (scored := _scored(row)) is not None:
        return Ranked(_prompt(row, attr, messages), *scored)
    if isinstance(label, bool) or (label in (0, 1) and label is not None):
        if messages:
            prompt, answer = _split(messages, key)
            return Ranked(prompt, [answer], (float(label),))
        answer, name = first(row, attr.response, ANSWERS)
        if answer is None:
            raise PolymodalError(f"the column `{name}` is missing.", "Name the answer in data.attr.response.")
        return Ranked(_prompt(row, attr, None), [_turns(answer)], (float(label),))
    raise PolymodalError(
        f"the row compares no answers: it has neither chosen and rejected, rejected_response, "
        f"answers with scores, nor an answer with a `{label_key}` that is true or false.",
        "Name the columns in data.attr.chosen and data.attr.rejected, or data.attr.label.",
    )


def _chosen(row: Mapping[str, Any], attr: Attr, messages: list[Any] | None) -> Ranked:
    chosen, rejected = listed(row[attr.chosen or "chosen"]), listed(row[attr.rejected or "rejected"])
    worse = rejected if _are_several(rejected) else [rejected]
    answers = [_turns(chosen), *map(_turns, worse)]
    if messages or first(row, attr.prompt, QUESTIONS)[0] is not None:
        return Ranked(_prompt(row, attr, messages), answers)
    least = min(map(len, answers))
    common = next((n for n in range(least) if any(a[n] != answers[0][n] for a in answers)), least)
    common = min(common, least - 1)
    if common <= 0:
        raise PolymodalError(
            "the row has no prompt: neither a column, nor turns that chosen and rejected begin with.",
            "Name the column in data.attr.prompt or data.attr.messages.",
        )
    return Ranked(answers[0][:common], [answer[common:] for answer in answers])


def _scored(row: Mapping[str, Any]) -> tuple[list[list[Any]], tuple[float, ...]] | None:
    """Several answers: `completions` of VLFeedback with its ratings; `answers` or `responses`, with `scores`
    (higher is better), `ranks` (1 is the best) or in order of preference."""
    completions = row.get("completions")
    if isinstance(completions, Mapping):  # a list of structs as the hub's reader turns it
        names = list(completions)
        columns = (completions[name] for name in names)
        completions = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if isinstance(completions, list) and all(isinstance(c, Mapping) and "response" in c for c in completions):
        rated = [(c["response"], _rating(c.get("annotations"))) for c in completions]
        known = [(response, rating) for response, rating in rated if rating is not None]
        return [[_spoken(r)] for r, _ in known], tuple(rating for _, rating in known)
    answers, key = first(row, None, ("answers", "responses"))
    answers = listed(answers)
    if not isinstance(answers, list) or len(answers) < 2:
        return None
    scores, name = first(row, None, ("scores", "ranks", "rank"))
    scores = listed(scores)
    if scores is None:
        return [_turns(a) for a in answers], ()
    numbers = isinstance(scores, list) and all(
        isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores
    )
    if not numbers or len(scores) != len(answers):
        raise PolymodalError(
            f"`{name}` is a list of as many numbers as `{key}` has answers ({len(answers)}).",
            "Write one number for each answer, or leave it out where they are in order of preference.",
        )
    sign = 1.0 if name == "scores" else -1.0
    return [_turns(a) for a in answers], tuple(sign * float(score) for score in scores)


def _rating(annotations: Any) -> float | None:
    """Mean of the ratings of an answer, e.g. {"Helpfulness": {"Rating": "4"}}; None without any."""
    values = annotations.values() if isinstance(annotations, Mapping) else ()
    found = []
    for value in values:
        try:
            found.append(float(value["Rating"]))
        except (TypeError, KeyError, ValueError):  # "N/A"
            continue
    return sum(found) / len(found) if found else None


def _prompt(row: Mapping[str, Any], attr: Attr, messages: list[Any] | None) -> list[Any]:
    if messages:
        return messages
    prompt, key = first(row, attr.prompt, QUESTIONS)
    prompt = listed(prompt)
    if isinstance(prompt, list) and prompt:
        return prompt
    if not isinstance(prompt, str):
        raise PolymodalError(
            f"the column `{key}` of the prompt is missing.",
            "Name the column in data.attr.prompt or data.attr.messages.",
        )
    more = first(row, attr.query, ("input",))[0]
    return [{"role": "user", "content": f"{prompt}\n{more}" if more and isinstance(more, str) else prompt}]


def _split(messages: list[Any], key: str) -> tuple[list[Any], list[Any]]:
    """(the conversation up to the last turns of the assistant, these)."""
    at = len(messages)
    while at and isinstance(turn := messages[at - 1], Mapping):
        if str(turn.get("role") or turn.get("from")).lower() not in SPEAKERS:
            break
        at -= 1
    if not 0 < at < len(messages):
        raise PolymodalError(
            f"`{key}` does not end with an answer to something.", "End it with a turn of the assistant."
        )
    return messages[:at], messages[at:]


def _spoken(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _turns(answer: Any) -> list[Any]:
    """An answer as its turns: it is text, a turn, or turns."""
    answer = listed(answer)
    if isinstance(answer, list) and answer:
        return answer
    return [answer] if isinstance(answer, Mapping) else [_spoken(answer)]


def _are_several(answers: Any) -> bool:
    """Whether it is a list of answers, texts or lists of turns."""
    return isinstance(answers, list) and bool(answers) and all(isinstance(a, (str, list)) for a in answers)


def _several(value: Any) -> list[Any]:
    return value if isinstance(value := listed(value), list) else [value]
