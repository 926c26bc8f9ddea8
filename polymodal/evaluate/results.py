"""What an evaluation found, of answers or of what was generated: the result, its files, its page and its
table.

Every kind of evaluation ends here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polymodal import __version__, pages
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.evaluate.thumbnails import thumbnail


@dataclass(frozen=True)
class Judged:
    """One question with its answer and its score; index: its place in the data, from 0; score None: not
    scored."""

    index: int
    id: str
    where: str
    question: str
    expected: tuple[str, ...]
    options: Mapping[str, str]
    groups: Mapping[str, str]
    answer: str
    extracted: str = ""
    score: float | None = None
    parsed: bool = True
    finished: bool = True
    tokens: int = 0
    error: str | None = None
    measures: Mapping[str, float] = field(default_factory=dict)  # of what was generated: clip, motion...


@dataclass(frozen=True)
class Result:
    """score: mean over scored questions, 0..1 (None when none has an answer to compare with).

    errors: questions that could not be asked (a broken picture); they count as wrong. unparsed: answers
    without a readable choice. cut: answers that max_new_tokens ended. by: group -> value -> {"score", "n"},
    of what was generated also the means of its measures. measures: of all that was generated; those of a
    whole set (frechet) too.
    """

    name: str
    benchmark: str
    metric: str
    score: float | None
    n: int
    scored: int
    errors: int
    unparsed: int
    cut: int
    by: Mapping[str, Mapping[str, Mapping[str, float]]]
    seconds: float
    resumed: int
    settings: Mapping[str, Any]
    samples: Sequence[Judged] = field(default=(), repr=False)
    out: str | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What result.json holds."""
        fields = {k: v for k, v in self.__dict__.items() if k not in ("samples", "out")}
        return {**fields, "version": __version__}


Pictures = Callable[[int], Sequence[Any]]
"""Position of a sample -> what its card shows: media, or paths of files."""


def by_group(samples: Sequence[Judged], names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Group -> value -> the means of what its samples have, and their number."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for group in names:
        values: dict[str, list[Judged]] = {}
        for sample in samples:
            if group in sample.groups:
                values.setdefault(sample.groups[group], []).append(sample)
        if values:
            out[group] = {value: {**means(found), "n": len(found)} for value, found in sorted(values.items())}
    return out


def means(samples: Sequence[Judged]) -> dict[str, float]:
    """Mean of the score and of each measure over the samples that have it."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        own = {} if sample.score is None else {"score": sample.score}
        for name, value in {**own, **sample.measures}.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def write(out: Path, result: Result, pictures: Pictures, html: int, label: str) -> None:
    """samples.jsonl, report.html (html: samples on it, 0 = no page) and, last, result.json."""
    lines = [
        json.dumps({**asdict(s), "expected": list(s.expected)}, ensure_ascii=False) for s in result.samples
    ]
    replace_file(out / "samples.jsonl", "\n".join(lines) + "\n")
    if html:
        replace_file(out / "report.html", _page(result, pictures, html, label))
    replace_file(out / "result.json", json.dumps(result.summary(), indent=1, ensure_ascii=False))


def percent(score: float | None) -> str:
    return "not scored" if score is None else f"{100 * score:.1f} %"


def lines_of(result: Result) -> Iterator[tuple[str, str, int]]:
    """Rows of the table: (what, value, samples)."""
    if result.score is not None or not result.measures:
        yield "all", percent(result.score), result.scored
    for name, value in result.measures.items():
        yield name, f"{value:.4g}", result.n - result.errors
    for group, values in result.by.items():
        if len(values) > 1:
            for value, part in values.items():
                for name, mean in part.items():
                    if name != "n":
                        shown = (percent(mean), "") if name == "score" else (f"{mean:.4g}", f", {name}")
                        yield f"{group}: {value}{shown[1]}", shown[0], int(part["n"])


def cards(result: Result, pictures: Pictures, most: int, label: str = "answer") -> list[pages.Card]:
    """Samples with thumbnails for a grid: at most `most`, evenly spread over the right and over the
    others."""
    right = [i for i, s in enumerate(result.samples) if s.score == 1]
    other = [i for i, s in enumerate(result.samples) if s.score != 1]
    half = max(most // 2, most - len(right), 0)
    chosen = _spread(other, half)
    chosen = sorted(chosen + _spread(right, most - len(chosen)))
    shown = []
    for i in chosen:
        s = result.samples[i]
        try:
            media = pictures(i)
        except PolymodalError:
            media = []
        text = s.error or (
            f"{s.answer}  →  {s.extracted}"
            if s.extracted and s.extracted.strip().lower() != s.answer.strip().lower()
            else s.answer
        )
        question = s.question + "".join(f"\n{k}. {v}" for k, v in s.options.items())
        note = "" if s.finished else "cut by max_new_tokens"
        note = ", ".join([*([note] if note else []), *(f"{k} {v:.4g}" for k, v in s.measures.items())])
        shown.append(
            pages.Card(
                question,
                [(label, text, s.score)],
                " | ".join(s.expected),
                [thumbnail(m) for m in media],
                note,
                {"id": s.id, **s.groups},
            )
        )
    return shown


def _spread(positions: list[int], most: int) -> list[int]:
    if len(positions) <= most:
        return positions
    return [positions[i * len(positions) // most] for i in range(most)]


def _page(result: Result, pictures: Pictures, most: int, label: str) -> str:
    counts = [
        ("samples", result.n),
        ("not asked (errors, counted as wrong)", result.errors),
        ("without a readable choice", result.unparsed),
        ("cut by max_new_tokens", result.cut),
    ]
    settings = [(key, json.dumps(value, ensure_ascii=False)) for key, value in result.settings.items()]
    return pages.render(
        "evaluation.html",
        title=f"{result.name}: {result.benchmark}",
        lead=_lead(result),
        scores=pages.Table(_headers(result), list(lines_of(result))),
        counts=pages.Table(("", "count"), [c for c in counts if c[1]]),
        settings=pages.Table(("key", "value"), settings),
        cards=cards(result, pictures, most, label),
        total=result.n,
    )


def _headers(result: Result) -> tuple[str, str, str]:
    return "", "value" if result.measures else "score", "samples"


def _lead(result: Result) -> str:
    if result.score is None and result.measures:
        return ", ".join(f"{k} {v:.4g}" for k, v in result.measures.items()) + f" over {result.n} samples"
    return f"{percent(result.score)} by {result.metric} over {result.scored} questions"


def table(result: Result) -> Any:
    """The result as a rich table; names and categories are the user's, so they are text and no markup."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result.name}: {result.benchmark} ({result.metric})"
    out = Table(title=Text(title), title_justify="left", min_width=min(len(title), 78))
    for name in _headers(result):
        out.add_column(name, justify="left" if not name else "right")
    for row in lines_of(result):
        out.add_row(*(Text(str(value)) for value in row))
    return out
