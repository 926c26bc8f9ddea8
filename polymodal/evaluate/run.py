"""Evaluation: questions dealt out to ranks, answered, kept line by line, judged at the end by rank 0.

Equal work by construction: ranks get the same number of questions (one more at most), meet before the first and after
the last and never in between. Every answer is a line in the rank's own file before the next batch starts, so a run
that was killed goes on from there, with any number of ranks. Answers do not depend on the metric: judging again with
another one generates nothing. Sees generate, data, device and errors.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from polymodal import __version__
from polymodal.errors import PolymodalError
from polymodal.evaluate import benchmarks, report
from polymodal.evaluate.benchmarks import Question, Questions
from polymodal.evaluate.metrics import METRICS
from polymodal.evaluate.store import Memory, Progress, Ranks, Store, replace_file
from polymodal.generate.engine import Answer, Engine, Sampling


@dataclass(frozen=True)
class Judged:
    """One question with its answer and its score; index: its place in the data, from 0; score None: not scored."""

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


@dataclass(frozen=True)
class Result:
    """score: mean over scored questions, 0..1 (None when none has an answer to compare with).

    errors: questions that could not be asked (a broken picture); they count as wrong. unparsed: answers without a
    readable choice. cut: answers that max_new_tokens ended. by: group -> value -> {"score", "n"}.
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

    def summary(self) -> dict[str, Any]:
        """What result.json holds."""
        fields = {k: v for k, v in self.__dict__.items() if k not in ("samples", "out")}
        return {**fields, "version": __version__}


# --- the evaluation ------------------------------------------------------------------------------------------------


def deal(costs: Sequence[float], world: int) -> list[list[int]]:
    """Positions dealt to ranks in a snake by falling cost: counts differ by one at most, and costs hardly."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    hands: list[list[int]] = [[] for _ in range(world)]
    for turn, i in enumerate(order):
        lap, seat = divmod(turn, world)
        hands[seat if lap % 2 == 0 else world - 1 - seat].append(i)
    return [sorted(hand) for hand in hands]


def evaluate(
    model: Engine | tuple[Any, Any] | str | os.PathLike,
    rows: str | os.PathLike | Sequence[Mapping[str, Any]],
    metric: str | None = None,
    *,
    benchmark: str = "custom",
    out: str | os.PathLike | None = None,
    limit: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    system: str | None = None,
    batch_size: int = 16,
    media_dir: str | os.PathLike | None = None,
    restart: bool = False,
    html: int = 300,
    progress: bool = False,
    alone: bool = False,
    label: str = "answer",
) -> Result | None:
    """Ask a model every question and judge the answers.

    model:     an Engine, (model, processor), or any checkpoint that `polymodal chat` opens.
    rows:      a file (VLMEvalKit TSV, CSV, JSON, JSONL), or a list of rows: {"question", "answer", "image" or
               "images" (paths, bytes or PIL images), "options", "category", "id"}.
    metric:    exact, contains, anls, relaxed, choice, open; default: the benchmark's.
    out:       directory for answers, result.json, samples.jsonl and report.html; needed with several ranks.
    sampling:  default: greedy, with the benchmark's max_new_tokens; max_new_tokens overrides either.
    system:    a system prompt put before every question that has none.
    html:      samples with pictures in report.html (evenly from right and wrong ones); 0 = no page.
    alone:     take no part in the process group that exists: this process does everything.

    Under a process group every rank calls this; rank 0 gets the Result, the others None.
    Raises PolymodalError: an unreadable file, an unknown metric, an `out` with answers of other settings.
    """
    world = Ranks(alone)
    try:
        facts = benchmarks.find(benchmark)
        if metric is not None and metric not in METRICS:
            raise PolymodalError(f"There is no metric `{metric}`.", f"Use one of: {', '.join(METRICS)}.")
        questions = benchmarks.read(rows, facts, media_dir)
        count = min(limit, len(questions)) if limit else len(questions)
        metric = (
            metric
            or facts.metric
            or ("choice" if all(questions.key(i).options for i in range(count)) else "exact")
        )
        if metric == "likelihood":
            for i in range(count):
                questions.candidates(i)
        sampling = sampling or Sampling(max_new_tokens=facts.max_new_tokens)
        if max_new_tokens:
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        engine = _engine(model)
        settings = {
            "model": engine.identity, "data": questions.fingerprint, "sampling": asdict(sampling),
            "benchmark": {k: v for k, v in asdict(facts).items() if k in ("name", "instruction", "labelled", "max_new_tokens")},
            "system": system, "engine": engine.settings, "mode": "likelihood" if metric == "likelihood" else "generate",
        }  # fmt: skip
        if out is None and world.size > 1:
            raise PolymodalError(
                "An evaluation with several processes needs a directory for their answers.", "Give `out`."
            )
        store = Store(Path(out), settings) if out is not None else Memory()
        began = time.perf_counter()
        done = _opened(store, world, restart)
        todo = [i for i in range(count) if questions.ids[i] not in done]
        mine = deal([_cost(questions.key(i)) for i in todo], world.size)[world.rank]
        _answer(
            engine, questions, [todo[i] for i in mine], sampling, system, batch_size,
            metric == "likelihood", store, world, count, len(done), progress,
        )  # fmt: skip
        world.barrier()
        if world.rank != 0:
            return None
        result = _judge(
            questions,
            count,
            store.answers(),
            metric,
            engine.name,
            facts.name,
            time.perf_counter() - began,
            count - len(todo),
            settings,
        )
        if out is not None:
            result = replace(result, out=str(out))
            _results(Path(out), result, questions, html, label)
        return result
    finally:
        world.close()


def _engine(model: Any) -> Engine:
    if isinstance(model, Engine):
        return model
    if isinstance(model, tuple):
        return Engine(*model)
    from polymodal.generate.opening import open_engine

    return open_engine(model)


def _opened(store: Store, world: Ranks, restart: bool) -> dict[str, dict[str, Any]]:
    """Open the directory and read what is answered; every rank sees the same, before any of them writes."""
    error: PolymodalError | None = None
    done: dict[str, dict[str, Any]] = {}
    try:
        if world.rank == 0:
            store.open(restart)
    except PolymodalError as caught:
        error = caught
    world.agree(error)
    try:
        if world.rank != 0:
            store.check()
        done = {k: e for k, e in store.answers().items() if not e.get("error")}  # what failed is asked again
    except PolymodalError as caught:
        error = caught
    world.agree(error)
    return done


def _cost(question: Question) -> float:
    return len(question.text) + sum(map(len, question.options.values()))


def _answer(
    engine: Engine, questions: Questions, mine: list[int], sampling: Sampling, system: str | None, batch_size: int,
    likelihood: bool, store: Store, world: Ranks, count: int, done: int, progress: bool,
) -> None:  # fmt: skip
    from polymodal.data.sample import Message

    def ask(i: int) -> Callable[[], tuple[Message, ...]]:
        def messages() -> tuple[Message, ...]:
            asked = questions[i].messages
            return (
                asked
                if system is None or asked[0].role == "system"
                else (Message("system", (system,)), *asked)
            )

        return messages

    if not mine:
        return
    ids = [questions.ids[i] for i in mine]
    if likelihood:
        got = engine.choices(
            [(key, ask(i), questions.candidates(i)) for key, i in zip(ids, mine, strict=True)],
            batch_size=batch_size,
        )
    else:
        got = engine.answers(
            [(key, ask(i)) for key, i in zip(ids, mine, strict=True)], sampling, batch_size=batch_size
        )
    write = store.writer(world.rank)
    with Progress(progress and world.rank == 0, count, done, store, engine.name) as bar:
        began = time.perf_counter()
        for position, answer in got:
            entry: dict[str, Any] = {"id": ids[position]}
            if isinstance(answer, Answer):
                entry |= {"answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
                entry |= {"scores": [round(v, 4) for v in answer.scores]} if answer.scores else {}
            else:
                entry |= {"answer": "", "error": str(answer)}
            write({**entry, "rank": world.rank, "seconds": round(time.perf_counter() - began, 3)})
            bar.update()


# --- judging and writing -------------------------------------------------------------------------------------------


def _judge(
    questions: Questions, count: int, answers: Mapping[str, Mapping[str, Any]], metric: str, name: str, benchmark: str,
    seconds: float, resumed: int, settings: Mapping[str, Any],
) -> Result:  # fmt: skip
    samples: list[Judged] = []
    for i in range(count):
        key, entry = questions.key(i), answers.get(questions.ids[i])
        if entry is None:
            raise PolymodalError(
                f"{key.where}: the answer of question {key.id} is missing in the parts.",
                "Start the same command again; it answers what is missing.",
            )
        common = (i, key.id, key.where, key.text, key.expected, key.options, key.groups, entry["answer"])
        if entry.get("error"):
            samples.append(Judged(*common, score=0.0 if key.expected else None, error=entry["error"]))
            continue
        score = METRICS[metric](entry["answer"], key.expected, key.options)
        samples.append(
            Judged(
                *common,
                score.extracted,
                score.value if key.expected else None,
                score.parsed,
                entry["finished"],
                entry["tokens"],
            )
        )
    scored = [s for s in samples if s.score is not None]
    by: dict[str, dict[str, dict[str, float]]] = {}
    for group in ("split", "category"):
        values: dict[str, list[float]] = {}
        for s in scored:
            if group in s.groups:
                values.setdefault(s.groups[group], []).append(s.score or 0.0)
        if values:
            by[group] = {
                value: {"score": sum(v) / len(v), "n": len(v)} for value, v in sorted(values.items())
            }
    return Result(
        name, benchmark, metric, sum(s.score or 0.0 for s in scored) / len(scored) if scored else None, len(samples), len(scored),
        sum(s.error is not None for s in samples), sum(not s.parsed for s in scored), sum(not s.finished for s in samples),
        by, round(seconds, 2), resumed, settings, samples,
    )  # fmt: skip


def _results(out: Path, result: Result, questions: Questions, html: int, label: str) -> None:
    lines = [
        json.dumps({**asdict(s), "expected": list(s.expected)}, ensure_ascii=False) for s in result.samples
    ]
    replace_file(out / "samples.jsonl", "\n".join(lines) + "\n")
    if html:
        replace_file(out / "report.html", _page(result, questions, html, label))
    replace_file(out / "result.json", json.dumps(result.summary(), indent=1, ensure_ascii=False))


def percent(score: float | None) -> str:
    return "not scored" if score is None else f"{100 * score:.1f} %"


def lines_of(result: Result) -> Iterator[tuple[str, str, int]]:
    """Rows of the table: (what, score, questions)."""
    yield "all", percent(result.score), result.scored
    for group, values in result.by.items():
        if len(values) > 1:
            for value, part in values.items():
                yield f"{group}: {value}", percent(part["score"]), int(part["n"])


def cards(result: Result, questions: Questions, most: int, label: str = "answer") -> list[report.Shown]:
    """Samples with thumbnails for a grid: at most `most`, evenly spread over the right and over the others."""
    right = [i for i, s in enumerate(result.samples) if s.score == 1]
    other = [i for i, s in enumerate(result.samples) if s.score != 1]
    half = max(most // 2, most - len(right), 0)
    chosen = _spread(other, half)
    chosen = sorted(chosen + _spread(right, most - len(chosen)))
    shown = []
    for i in chosen:
        s = result.samples[i]
        try:
            media = [
                m for message in questions[i].messages for m in message.content if not isinstance(m, str)
            ]
        except PolymodalError:
            media = []
        text = s.error or (
            f"{s.answer}  →  {s.extracted}"
            if s.extracted and s.extracted.strip().lower() != s.answer.strip().lower()
            else s.answer
        )
        question = s.question + "".join(f"\n{k}. {v}" for k, v in s.options.items())
        note = "" if s.finished else "cut by max_new_tokens"
        shown.append(
            report.Shown(
                question,
                [(label, text, s.score)],
                " | ".join(s.expected),
                [report.thumbnail(m) for m in media],
                note,
                {"id": s.id, **s.groups},
            )
        )
    return shown


def _spread(positions: list[int], most: int) -> list[int]:
    if len(positions) <= most:
        return positions
    return [positions[i * len(positions) // most] for i in range(most)]


def _page(result: Result, questions: Questions, most: int, label: str) -> str:
    shown = cards(result, questions, most, label)
    facts = [
        ("questions", result.n),
        ("not asked (errors, counted as wrong)", result.errors),
        ("without a readable choice", result.unparsed),
        ("cut by max_new_tokens", result.cut),
    ]
    sections = [
        report.table(("", "score", "questions"), list(lines_of(result))),
        report.table(("", "count"), [f for f in facts if f[1]]),
        f"<details><summary>settings</summary>{report.table(('key', 'value'), [(k, json.dumps(v, ensure_ascii=False)) for k, v in result.settings.items()])}</details>",
        f"<h2>Questions</h2><p class=dim>{len(shown)} of {result.n}; all of them are in samples.jsonl</p>",
        report.grid(shown),
    ]
    return report.page(
        f"{result.name}: {result.benchmark}",
        sections,
        f"{percent(result.score)} by {result.metric} over {result.scored} questions",
    )


def table(result: Result) -> Any:
    """The result as a rich table."""
    from rich.table import Table

    out = Table(title=f"{result.name}: {result.benchmark} ({result.metric})", title_justify="left")
    for name in ("", "score", "questions"):
        out.add_column(name, justify="left" if not name else "right")
    for row in lines_of(result):
        out.add_row(*map(str, row))
    return out


def main(
    checkpoint: str,
    benchmark: str,
    data: str,
    *,
    metric: str | None = None,
    out: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    revision: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Result | None:
    """The command: join the processes that were started (torchrun, SLURM, `--nproc`), evaluate, print the table.

    `options` are those of `evaluate`. Default of `out`: evaluations/<checkpoint>-<benchmark>.
    """
    from rich.console import Console

    from polymodal import launch
    from polymodal import recipe as recipes
    from polymodal.generate.opening import open_engine

    facts = benchmarks.find(benchmark)
    sampling = Sampling(
        max_new_tokens or facts.max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed
    )
    where = Path(out) if out else Path("evaluations") / f"{Path(checkpoint.rstrip('/')).name}-{facts.name}"
    recipe = recipes.Recipe(model=recipes.Model(source=checkpoint), device=recipes.Device(kind=device))  # type: ignore[arg-type]
    with launch.runtime(recipe) as rt:
        engine = open_engine(
            checkpoint, revision=revision, device=rt.device.torch, dtype=dtype, ema=ema, base=base
        )
        result = evaluate(
            engine, data, metric, benchmark=facts.name, out=where, sampling=sampling, progress=True, **options
        )
    if result is not None:
        console = Console()
        console.print(table(result))
        notes = [
            f"{n} {what}"
            for n, what in (
                (result.errors, "could not be asked and count as wrong"),
                (result.unparsed, "without a readable choice"),
                (result.cut, "cut by max_new_tokens"),
                (result.resumed, "taken over from an earlier start"),
            )
            if n
        ]
        if notes:
            console.print("; ".join(notes))
        console.print(
            f"{where}/result.json, samples.jsonl"
            + (", report.html" if (where / "report.html").exists() else ""),
            soft_wrap=True,
        )
    return result
