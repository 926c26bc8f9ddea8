"""Evaluation: questions dealt out to ranks, answered, kept line by line, judged at the end by rank 0.

Equal work by construction: ranks get the same number of questions (one more at most), meet before the first and after
the last and never in between. Every answer is a line in the rank's own file before the next batch starts, so a run
that was killed goes on from there, with any number of ranks. Answers do not depend on the metric: judging again with
another one generates nothing. Sees generate, data, device and errors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.evaluate import benchmarks, results
from polymodal.evaluate.benchmarks import Question, Questions
from polymodal.evaluate.metrics import METRICS
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.store import Memory, Progress, Ranks, Store
from polymodal.generate.engine import Answer, Engine, Sampling

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
        if facts.kind != "answer":
            raise PolymodalError(
                f"`{facts.name}` is for models that {facts.kind}.", "Use `custom` for questions of your own."
            )
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
        done = opened(store, world, restart)
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
            results.write(Path(out), result, lambda i: _shown(questions[i]), html, label)
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


def opened(store: Store, world: Ranks, restart: bool) -> dict[str, dict[str, Any]]:
    """Open the directory and read what is answered; every rank sees the same, before any of them writes."""
    error: PolymodalError | None = None
    done: dict[str, dict[str, Any]] = {}
    try:
        if world.rank == 0:
            store.open(restart)
    except PolymodalError as caught:
        error = caught
    world.raise_together(error)
    try:
        if world.rank != 0:
            store.check()
        done = {k: e for k, e in store.answers().items() if not e.get("error")}  # what failed is asked again
    except PolymodalError as caught:
        error = caught
    world.raise_together(error)
    return done


def _shown(question: Question) -> list[Any]:
    return [part for message in question.messages for part in message.content if not isinstance(part, str)]


def _cost(question: Question) -> float:
    return len(question.text) + sum(map(len, question.options.values()))


def _answer(
    engine: Engine, questions: Questions, mine: list[int], sampling: Sampling, system: str | None, batch_size: int,
    likelihood: bool, store: Store, world: Ranks, count: int, done: int, progress: bool,
) -> None:  # fmt: skip
    from polymodal.core.sample import Message

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


# --- judging -------------------------------------------------------------------------------------------------------


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
    by = results.by_group(scored, ("split", "category"))
    return Result(
        name, benchmark, metric, sum(s.score or 0.0 for s in scored) / len(scored) if scored else None, len(samples), len(scored),
        sum(s.error is not None for s in samples), sum(not s.parsed for s in scored), sum(not s.finished for s in samples),
        by, round(seconds, 2), resumed, settings, samples,
    )  # fmt: skip


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

    from polymodal import recipe as recipes
    from polymodal.generate.opening import alike, open_engine
    from polymodal.runtime import process_group

    facts = benchmarks.find(benchmark)
    sampling = Sampling(
        max_new_tokens or facts.max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed
    )
    where = Path(out) if out else Path("evaluations") / f"{Path(checkpoint.rstrip('/')).name}-{facts.name}"
    recipe = recipes.Recipe(model=recipes.Model(source=checkpoint), device=recipes.Device(kind=device))  # type: ignore[arg-type]
    with process_group.runtime(recipe) as rt:
        engine = open_engine(
            checkpoint,
            revision=revision,
            device=rt.device.torch,
            dtype=dtype,
            ema=ema,
            base=base,
            locate=alike(rt),
        )
        result = evaluate(
            engine, data, metric, benchmark=facts.name, out=where, sampling=sampling, progress=True, **options
        )
    if result is not None:
        console = Console()
        console.print(results.table(result))
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
            markup=False,
            soft_wrap=True,
        )
    return result
