"""Evaluation of models that answer: questions shared out over ranks, answered, judged at the end by rank 0.

Answers do not depend on the metric: judging again with another one generates nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Message
from polymodal.data import boxes
from polymodal.data import media as decoders
from polymodal.data.boxes import BoxWriter
from polymodal.evaluate import benchmarks, results, together
from polymodal.evaluate.benchmarks import Questions
from polymodal.evaluate.metrics import BOX_METRICS, METRICS
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.store import Ranks, complete, store_in
from polymodal.generate.engine import Answer, Engine, Sampling


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
) -> Result | None:
    """Ask a model every question and judge the answers.

    model:     an Engine, (model, processor), or any checkpoint that `polymodal chat` opens.
    rows:      a file (VLMEvalKit TSV, CSV, JSON, JSONL), or a list of rows: {"question", "answer", "image" or
               "images" (paths, bytes or PIL images), "options", "category", "id"}.
    metric:    a name in metrics.METRICS; default: the benchmark's.
    out:       directory for answers, result.json, samples.jsonl and report.html; needed with several ranks.
    sampling:  default: greedy, with the benchmark's max_new_tokens; max_new_tokens overrides either.
    system:    a system prompt put before every question that has none.
    html:      samples with pictures in report.html (evenly from right and wrong ones); 0 = no page.

    Under a process group every rank calls this; rank 0 gets the Result, the others None.
    Raises PolymodalError: an unreadable file, an unknown metric, an `out` with answers of other settings.
    """
    began = time.perf_counter()
    facts = benchmarks.find(benchmark)
    if facts.kind != "answer":
        raise PolymodalError(
            f"`{facts.name}` is for models that {facts.kind}.", "Use `custom` for questions of your own."
        )
    if metric is not None and metric not in METRICS:
        raise PolymodalError(f"There is no metric `{metric}`.", f"Use one of: {', '.join(METRICS)}.")
    questions = benchmarks.read(rows, facts, media_dir)
    ids = questions.ids[:limit] if limit else questions.ids
    if metric is None:
        options = all(questions.key(i).options for i in range(len(ids)))
        metric = facts.metric or ("choice" if options else "iou@0.5" if questions.of_boxes else "exact")
    wanted = [_expected_boxes(questions, i) for i in range(len(ids))] if metric in BOX_METRICS else None
    if wanted is not None and not any(texts for texts, _ in wanted):
        raise PolymodalError(
            f"{metric} compares boxes, and no question declares any.",
            "Write them as `bbox` beside the question, in pixels of the picture, or as `objects`.",
        )
    candidates = [questions.candidates(i) for i in range(len(ids))] if metric == "likelihood" else None
    sampling = sampling or Sampling(max_new_tokens=facts.max_new_tokens)
    if max_new_tokens:
        sampling = replace(sampling, max_new_tokens=max_new_tokens)
    engine = _engine(model)
    asked = ("name", "instruction", "prompt", "labelled", "max_new_tokens")
    settings = {
        "model": engine.identity,
        "data": questions.fingerprint,
        "sampling": asdict(sampling),
        "benchmark": {name: getattr(facts, name) for name in asked},
        "system": system,
        "engine": engine.settings,
        "mode": "likelihood" if candidates is not None else "generate",
    }

    def messages(i: int) -> Callable[[], tuple[Message, ...]]:
        def read() -> tuple[Message, ...]:
            own = questions[i].messages
            return own if system is None or own[0].role == "system" else (Message("system", (system,)), *own)

        return read

    def answer(mine: list[int]) -> Iterator[dict[str, Any]]:
        start = time.perf_counter()
        pairs = [(ids[i], messages(i)) for i in mine]
        if candidates is None:
            answers = engine.answers(pairs, sampling, batch_size=batch_size)
        else:
            choices = [(*pair, candidates[i]) for pair, i in zip(pairs, mine, strict=True)]
            answers = engine.choices(choices, batch_size=batch_size)
        for position, made in answers:
            entry = _entry(made)
            yield {"id": ids[mine[position]], **entry, "seconds": round(time.perf_counter() - start, 3)}

    def length(i: int) -> float:
        key = questions.key(i)
        return len(key.text) + sum(map(len, key.options.values()))

    with Ranks() as world, store_in(out, settings, world) as store:
        entries, resumed = complete(
            store, world, ids, answer, cost=length, restart=restart, title=engine.name if progress else None
        )
        if world.rank != 0:
            return None
        samples = [
            _judged(questions, i, entries[key], metric, engine.boxes, wanted[i] if wanted else None)
            for i, key in enumerate(ids)
        ]
    score = results.means(samples).get("score")
    by = results.by_group([s for s in samples if s.score is not None])
    measures = dict[str, float]()
    if facts.together:
        judged = [(i, sample) for i, sample in enumerate(samples) if sample.score is not None]
        keys = [questions.together(i) for i, _ in judged]
        measures = together.RULES[facts.together]([sample for _, sample in judged], keys) if judged else {}
    result = Result(engine.name, facts.name, metric, score, samples, settings, by, measures)
    return results.finish(
        result, out, began, resumed, html, "answer", lambda i: _media(questions[i].messages)
    )


def _engine(model: Any) -> Engine:
    if isinstance(model, (str, os.PathLike)):
        from polymodal.generate.opening import open_engine

        return open_engine(model)
    return model if isinstance(model, Engine) else Engine(*model)


def _entry(made: Answer | PolymodalError) -> dict[str, Any]:
    """What is stored of an answer."""
    if isinstance(made, PolymodalError):
        return {"answer": "", "error": str(made)}
    entry = {"answer": made.text, "tokens": made.tokens, "finished": made.finished}
    return {**entry, "scores": [round(v, 4) for v in made.scores]} if made.scores else entry


Expected = tuple[tuple[str, ...], tuple[int, int] | None]
"""Boxes as texts in pixels of their picture, and its (height, width), None where it is broken or absent."""


def _expected_boxes(questions: Questions, i: int) -> Expected:
    """Raises PolymodalError for boxes that are none."""
    wanted = questions.boxes(i)
    try:
        sizes = [decoders.image_size(box.picture.source) for box in wanted]  # type: ignore[arg-type]
    except PolymodalError:  # the question cannot be asked, and says so
        return tuple(str(list(box.values)) for box in wanted), None
    try:
        texts = [str(list(boxes.pixels(box, *size))) for box, size in zip(wanted, sizes, strict=True)]
    except PolymodalError as error:
        raise error.at(questions.key(i).where) from None
    return tuple(texts), sizes[0] if sizes else None


def _judged(
    questions: Questions,
    i: int,
    entry: Mapping[str, Any],
    metric: str,
    writer: BoxWriter,
    wanted: Expected | None,
) -> Judged:
    key, answer = questions.key(i), entry["answer"]
    if wanted is not None:
        key, size = replace(key, expected=wanted[0]), wanted[1]
        answer = ", ".join(str(list(box)) for box in (writer.found(answer, *size) if size else ()))
    about = (key.id, key.where, key.text, key.expected, key.options, key.groups)
    sample = Judged(i, *about, entry["answer"])
    if entry.get("error"):
        return replace(sample, score=0.0 if key.expected else None, error=entry["error"])
    score = METRICS[metric](answer, key.expected, key.options)
    return replace(
        sample,
        extracted=score.extracted,
        score=score.value if key.expected else None,
        parsed=score.parsed,
        finished=entry["finished"],
        tokens=entry["tokens"],
    )


def _media(messages: Sequence[Message]) -> list[Any]:
    return [part for message in messages for part in message.content if not isinstance(part, str)]


def main(
    checkpoint: str,
    benchmark: str,
    data: str,
    *,
    metric: str | None = None,
    out: str | None = None,
    max_new_tokens: int | None = None,
    opening: Mapping[str, Any],
    **options: Any,
) -> Result | None:
    """The command in one of its processes. opening: of `opened_model`; options: those of `evaluate`."""
    from polymodal.generate.opening import engine_of, opened_model

    facts = benchmarks.find(benchmark)
    where = results.directory(out, checkpoint, facts.name)
    with opened_model(checkpoint, **opening) as model:
        result = evaluate(
            engine_of(model),
            data,
            metric,
            benchmark=facts.name,
            out=where,
            max_new_tokens=max_new_tokens,
            progress=True,
            **options,
        )
    if result is not None:
        results.show(
            result,
            where,
            errors="could not be asked and count as wrong",
            unparsed="without a readable choice",
            cut="cut by max_new_tokens",
        )
    return result
