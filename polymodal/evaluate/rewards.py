"""What an answer, or a drawn sample, is worth while a model trains on its own: rules, functions, scorers.

Nothing here knows how it was made or what is learned from it. A reward that could not be computed is no
number, never 0: the answer is left out, counted, and the reason said.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean
from polymodal.core.user_code import load_object
from polymodal.evaluate import metrics
from polymodal.recipe import RULES, Reward

THOUGHT_THEN_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"
PAUSE = 0.5  # seconds before a request is sent again, doubled each time


@dataclass(frozen=True)
class Answered:
    """completion: the text, or what was drawn (uint8 [F, H, W, 3]). prompt: the last question as text.

    answers: what the row expects, options: letter -> text. media: of the prompt. row: its columns. boxes: the
    completion's boxes in pixels of its picture as text, where the rule `iou` is used.
    """

    completion: Any
    prompt: str = ""
    answers: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    media: tuple[Any, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    boxes: str = ""


@dataclass(frozen=True)
class Scores:
    """values [N, R] float64, NaN where a reward does not apply or failed; failed [N, R] bool; problems: one
    sentence a reward that failed. total [N]: the weighted sum over those that apply, NaN where one failed or
    none applies."""

    values: Tensor
    failed: Tensor
    problems: list[str]
    total: Tensor


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of a text, braces in it in pairs; None without one."""
    at = text.rfind("\\boxed{")
    depth = 0
    for n in range(at + 6, len(text)) if at >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[n], 0)
        if depth == 0:
            return text[at + 7 : n].strip()
    return None


def _plain_maths(text: str) -> str:
    """Without what only sets a formula: dollar signs, spaces, \\text{}, \\left, degree and percent signs."""
    text = re.sub(r"\\(?:left|right|,|;|!|quad)", "", text.strip().strip("$"))
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("^{\\circ}", "").replace("^\\circ", "")
    return re.sub(r"\s+", "", text.replace("\\%", "").replace("%", "")).rstrip(".").casefold()


def _value(text: str) -> float | None:
    """The number that a text is, a fraction too."""
    fraction = re.fullmatch(r"(-?)\\frac\{(-?[\d.]+)\}\{([\d.]+)\}|(-?[\d.]+)/([\d.]+)", text)
    if fraction is None:
        return metrics.number(text)
    sign, top, below, plain_top, plain_below = fraction.groups()
    try:
        quotient = float(top or plain_top) / float(below or plain_below)
    except (ValueError, ZeroDivisionError):
        return None
    return -quotient if sign else quotient


def _same(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    a, b = _value(got), _value(expected)
    return a is not None and b is not None and abs(a - b) <= max(tolerance * abs(b), 1e-9)


def _of_boxed(item: Answered, tolerance: float) -> float:
    """1 where the last \\boxed{} of the answer holds an expected one, which may be boxed itself."""
    got = boxed(metrics.final_text(item.completion)) or boxed(item.completion)
    wanted = [boxed(text) or text for text in item.answers]
    return float(
        got is not None and any(_same(_plain_maths(got), _plain_maths(each), tolerance) for each in wanted)
    )


def _rule(settings: Reward) -> Callable[[Answered], float | None]:
    """Of one answer; None where its row expects none."""
    name = settings.name
    if name == "format":
        matcher = re.compile(settings.pattern or THOUGHT_THEN_ANSWER, re.S)
        return lambda item: float(matcher.fullmatch(item.completion) is not None)

    def judged(item: Answered) -> float | None:
        if not item.answers or (name == "choice" and not item.options):
            return None
        if name == "boxed":
            return _of_boxed(item, settings.tolerance)
        if name == "numeric":
            return metrics.relaxed(item.completion, item.answers, item.options, settings.tolerance).value
        text = item.boxes if name in metrics.BOX_METRICS else item.completion
        return metrics.METRICS[name](text, item.answers, item.options).value

    return judged


def _function(settings: Reward) -> Callable[[Sequence[Answered]], list[Any]]:
    """function(prompts, completions, answers, options, media, rows, and columns of the rows by name), of
    these what its parameters name, each a list with an entry an answer -> list of numbers or None."""
    called = load_object(settings.function or "", "train.rewards.function")
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        raise PolymodalError(
            f"train.rewards.function = {settings.function} cannot be called.", "Name a function."
        ) from None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    needed = {p.name for p in parameters if p.default is p.empty}

    def call(items: Sequence[Answered]) -> list[Any]:
        given: dict[str, list[Any]] = {
            "prompts": [item.prompt for item in items],
            "completions": [item.completion for item in items],
            "answers": [list(item.answers) for item in items],
            "options": [dict(item.options) for item in items],
            "media": [list(item.media) for item in items],
            "rows": [dict(item.row) for item in items],
        }
        columns = {key for item in items for key in item.row} if takes_all else {*named}
        for key in columns - given.keys():
            if takes_all or key in needed or any(key in item.row for item in items):
                given[key] = [item.row.get(key) for item in items]
        return list(called(**(given if takes_all else {k: v for k, v in given.items() if k in named})))

    return call


def _jsonable(value: Any) -> Any:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


def _asked(settings: Reward, items: Sequence[Answered]) -> list[Any]:
    """A scorer's numbers: POST {"prompts", "completions", "answers", "rows"} -> {"scores": [...]}. A request
    that failed is sent again; the last failure is raised."""
    rows = [{key: _jsonable(value) for key, value in item.row.items()} for item in items]
    body = {
        "prompts": [item.prompt for item in items],
        "completions": [item.completion for item in items],
        "answers": [list(item.answers) for item in items],
        "rows": rows,
    }
    data = json.dumps(body).encode()
    for attempt in range(settings.retries + 1):
        request = urllib.request.Request(settings.url or "", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=settings.timeout) as answer:
                found = json.loads(answer.read())
            scores = found["scores"]
            if not isinstance(scores, list):
                raise ValueError("`scores` is no list")
            return scores
        except (OSError, ValueError, KeyError, TypeError):
            if attempt == settings.retries:
                raise
            time.sleep(min(PAUSE * 2**attempt, 10.0))
    raise AssertionError


def _within(seconds: float, call: Callable[[], list[Any]]) -> list[Any]:
    """The result of a call that is given up after so many seconds; its thread then ends with the process."""
    out: list[Any] = []
    problem: list[BaseException] = []

    def work() -> None:
        try:
            out.append(call())
        except BaseException as error:  # of a user's code: it is said, and the run goes on
            problem.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it took longer than {seconds:g} s")
    if problem and not isinstance(problem[0], Exception):  # it asked to leave: that is a failure, too
        raise RuntimeError(f"it raised {type(problem[0]).__name__}")
    if problem:
        raise problem[0]
    return out[0]


class Rewards:
    """The rewards of a recipe. Raises PolymodalError for one that cannot be: before any weight is read."""

    def __init__(self, settings: Sequence[Reward]):
        if not settings:
            raise PolymodalError(
                "train.rewards is empty: nothing says which answers are good.",
                "Add at least one, e.g. train.rewards: [{name: exact}].",
            )
        self.settings = tuple(settings)
        self.names = [each.name for each in settings]
        twice = next((name for name in self.names if self.names.count(name) > 1), None)
        if twice is not None:
            raise PolymodalError(f"train.rewards names {twice} twice.", "Give each a name of its own.")
        if all(each.weight == 0 for each in settings):
            raise PolymodalError("train.rewards: every weight is 0.", "Give one a weight.")
        self.weights = torch.tensor([each.weight for each in settings], dtype=torch.float64)
        self._calls = [self._call(each) for each in settings]

    def _call(self, settings: Reward) -> Callable[[Sequence[Answered]], list[Any]]:
        name = f"train.rewards: {settings.name}"
        own = settings.function is not None or settings.url is not None
        if settings.function is not None and settings.url is not None:
            raise PolymodalError(f"{name} has a function and a url.", "Leave one out.")
        if not own and settings.name not in RULES:
            raise PolymodalError(
                f"{name} is no rule, and it names neither function nor url.",
                did_you_mean(settings.name, RULES),
            )
        for key, rules in (("tolerance", ("numeric", "boxed")), ("pattern", ("format",))):
            if getattr(settings, key) and (own or settings.name not in rules):
                raise PolymodalError(f"{name}: {key} is for {' and '.join(rules)}.", "Leave it out.")
        if settings.pattern is not None:
            try:
                re.compile(settings.pattern)
            except re.error as error:
                raise PolymodalError(
                    f"{name}: pattern is no regular expression: {error}.", "Correct it."
                ) from None
        if settings.function is not None:
            call = _function(settings)
            return lambda items: _within(settings.timeout, lambda: call(items))
        if settings.url is not None:
            longest = (settings.timeout + 10.0) * (settings.retries + 1)
            return lambda items: _within(longest, functools.partial(_asked, settings, items))
        rule = _rule(settings)
        return lambda items: [rule(item) for item in items]

    def __call__(self, items: Sequence[Answered]) -> Scores:
        """Scores of answers. A reward fails as a whole: by an exception, its time, or a wrong number of
        values; and for an answer by a value that is neither a finite number nor None."""
        values = torch.full((len(items), len(self.names)), math.nan, dtype=torch.float64)
        failed = torch.zeros(values.shape, dtype=torch.bool)
        problems = []
        for column, (name, call) in enumerate(zip(self.names, self._calls, strict=True)):
            try:
                found = call(items) if items else []
                if len(found) != len(items):
                    raise ValueError(f"it gave {len(found)} values for {len(items)} answers")
            except Exception as error:
                failed[:, column] = True
                problems.append(f"reward {name} failed: {type(error).__name__}: {error}")
                continue
            for row, value in enumerate(found):
                if value is None:
                    continue
                try:
                    number = float(value)
                except (TypeError, ValueError):
                    number = math.nan
                values[row, column] = number if math.isfinite(number) else math.nan
                failed[row, column] = not math.isfinite(number)
            if failed[:, column].any():
                problems.append(
                    f"reward {name} gave {int(failed[:, column].sum())} values that are no number"
                )
        total = (values.nan_to_num(0.0) * self.weights).sum(1)
        used = self.weights != 0
        total[failed[:, used].any(1) | values[:, used].isnan().all(1)] = math.nan
        return Scores(values, failed, problems, total)
