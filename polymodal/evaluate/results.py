"""The result of an evaluation, of answers or of what was generated: its files, its page and its table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from polymodal import __version__, pages
from polymodal.core import terminal
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.evaluate.thumbnails import thumbnail

Means = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Group ("category") -> its value -> means of score and measures, and the number of samples as "n"."""


@dataclass(frozen=True)
class Judged:
    """One sample with its answer and score. index: its position in the data; score None: not scored."""

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


@dataclass
class Result:
    """score: mean over scored samples, 0..1 (None when none has an answer to compare with).

    measures: means over all samples; those of a whole set (frechet) too. settings: what the answers belong
    to. resumed: answers of an earlier start. Counted from the samples: `n`, `scored`, `errors` (samples
    without an answer; they count as wrong), `unparsed` (answers without a readable choice), `cut` (answers
    that max_new_tokens ended).
    """

    name: str
    benchmark: str
    metric: str
    score: float | None
    samples: Sequence[Judged] = field(repr=False)
    settings: Mapping[str, Any]
    by: Means
    measures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        scored = [s for s in self.samples if s.score is not None]
        self.n, self.scored = len(self.samples), len(scored)
        self.errors = sum(s.error is not None for s in self.samples)
        self.unparsed = sum(not s.parsed for s in scored)
        self.cut = sum(not s.finished for s in self.samples)

    def summary(self) -> dict[str, Any]:
        """What result.json holds."""
        return {k: v for k, v in vars(self).items() if k not in ("samples", "out")} | {"version": __version__}


def by_group(samples: Sequence[Judged]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the samples of each split and of each category."""
    groups: dict[str, dict[str, list[Judged]]] = {"split": {}, "category": {}}
    for sample in samples:
        for name, value in sample.groups.items():
            groups.setdefault(name, {}).setdefault(value, []).append(sample)
    return {
        name: {value: {**means(inside), "n": len(inside)} for value, inside in sorted(values.items())}
        for name, values in groups.items()
        if values
    }


def means(samples: Sequence[Judged]) -> dict[str, float]:
    """Mean of the score and of each measure over the samples that have it."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        score = {} if sample.score is None else {"score": sample.score}
        for name, value in {**score, **sample.measures}.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


Pictures = Callable[[int], Sequence[Any]]
"""Position of a sample -> what its card shows: media, or paths of files."""


def finish(
    result: Result,
    out: str | os.PathLike | None,
    began: float,
    resumed: int,
    html: int,
    label: str,
    pictures: Pictures,
) -> Result:
    """The result with its time since `began` (time.perf_counter), written to `out` if there is one."""
    seconds = round(time.perf_counter() - began, 2)
    result = replace(result, seconds=seconds, resumed=resumed, out=None if out is None else str(out))
    if out is not None:
        write(Path(out), result, pictures, html, label)
    return result


def write(out: Path, result: Result, pictures: Pictures, html: int, label: str) -> None:
    """samples.jsonl, report.html (html: samples on it, 0 = no page) and, last, result.json."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in result.samples]
    replace_file(out / "samples.jsonl", "\n".join(lines) + "\n")
    if html:
        replace_file(out / "report.html", _page(result, pictures, html, label))
    replace_file(out / "result.json", json.dumps(result.summary(), indent=1, ensure_ascii=False))


# --- the command ----------------------------------------------------------------------------------


def directory(out: str | None, checkpoint: str, benchmark: str) -> Path:
    """--out, else evaluations/<checkpoint>-<benchmark>."""
    return Path(out) if out else Path("evaluations") / f"{Path(checkpoint.rstrip('/')).name}-{benchmark}"


def show(result: Result, out: Path, **notes: str) -> None:
    """Print the table, the counts that `notes` names (a field of Result -> its text) and the files."""
    terminal.console().print(table(result))
    counts = {text: getattr(result, name) for name, text in notes.items()}
    counts["taken over from an earlier start"] = result.resumed
    if any(counts.values()):
        terminal.say("; ".join(f"{count} {text}" for text, count in counts.items() if count))
    files = [name for name in ("samples.jsonl", "report.html", "samples") if (out / name).exists()]
    terminal.say(", ".join([f"{out}/result.json", *files]))


def table(result: Result) -> Any:
    """The result as a rich table, for `terminal.console`."""
    from rich.table import Table

    title = f"{result.name}: {result.benchmark} ({result.metric})"
    out = Table(title=title, title_justify="left", min_width=min(len(title), 78))
    for name in _headers(result):
        out.add_column(name, justify="left" if not name else "right")
    for row in _rows(result):
        out.add_row(*map(str, row))
    return out


def _percent(score: float | None) -> str:
    return "not scored" if score is None else f"{100 * score:.1f} %"


def _headers(result: Result) -> tuple[str, str, str]:
    return "", "value" if result.measures else "score", "samples"


def _rows(result: Result) -> Iterator[tuple[str, str, int]]:
    """(what, value, samples)."""
    if result.score is not None or not result.measures:
        yield "all", _percent(result.score), result.scored
    for name, value in result.measures.items():
        yield name, f"{value:.4g}", result.n - result.errors
    for group, values in result.by.items():
        for value, part in values.items() if len(values) > 1 else ():
            count = int(part["n"])
            for name, mean in part.items():
                if name == "score":
                    yield f"{group}: {value}", _percent(mean), count
                elif name != "n":
                    yield f"{group}: {value}, {name}", f"{mean:.4g}", count


# --- the page -------------------------------------------------------------------------------------


def _page(result: Result, pictures: Pictures, most: int, label: str) -> str:
    counts = [
        ("samples", result.n),
        ("not asked (errors, counted as wrong)", result.errors),
        ("without a readable choice", result.unparsed),
        ("cut by max_new_tokens", result.cut),
    ]
    settings = [(key, json.dumps(value, ensure_ascii=False)) for key, value in result.settings.items()]
    lead = f"{_percent(result.score)} by {result.metric} over {result.scored} questions"
    if result.score is None and result.measures:
        lead = ", ".join(f"{k} {v:.4g}" for k, v in result.measures.items()) + f" over {result.n} samples"
    return pages.render(
        "evaluation.html",
        title=f"{result.name}: {result.benchmark}",
        lead=lead,
        scores=pages.Table(_headers(result), list(_rows(result))),
        counts=pages.Table(("", "count"), [c for c in counts if c[1]]),
        settings=pages.Table(("key", "value"), settings),
        cards=[_card(result.samples[i], pictures, label) for i in _chosen(result.samples, most)],
        total=result.n,
    )


def _chosen(samples: Sequence[Judged], most: int) -> list[int]:
    """At most `most` positions, evenly spread over the right samples and over the rest."""

    def spread(positions: list[int], count: int) -> list[int]:
        if len(positions) <= count:
            return positions
        return [positions[i * len(positions) // count] for i in range(count)]

    right = [i for i, s in enumerate(samples) if s.score == 1]
    rest = [i for i, s in enumerate(samples) if s.score != 1]
    wrong = spread(rest, max(most // 2, most - len(right), 0))
    return sorted(wrong + spread(right, most - len(wrong)))


def _card(sample: Judged, pictures: Pictures, label: str) -> pages.Card:
    try:
        media = pictures(sample.index)
    except PolymodalError:
        media = []
    text = sample.error or sample.answer
    same = sample.extracted.strip().lower() == sample.answer.strip().lower()
    if sample.extracted and not same and not sample.error:
        text = f"{sample.answer}  →  {sample.extracted}"
    notes = [] if sample.finished else ["cut by max_new_tokens"]
    notes += [f"{name} {value:.4g}" for name, value in sample.measures.items()]
    return pages.Card(
        sample.question + "".join(f"\n{letter}. {option}" for letter, option in sample.options.items()),
        [(label, text, sample.score)],
        " | ".join(sample.expected),
        [thumbnail(medium) for medium in media],
        ", ".join(notes),
        {"id": sample.id, **sample.groups},
    )
