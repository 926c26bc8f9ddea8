"""Evaluation of what a model generates: the samples of a file of prompts, dealt out to ranks, kept, then measured.

The same store, ranks, result and page as for answers (run.py, results.py): a sample is a file and a line of the rank's
own list before the next batch starts. Samples do not depend on what measures them: measuring again generates nothing.
Sees generate, data, evaluate/measures.py and errors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media
from polymodal.data import media
from polymodal.data.files import open_rows
from polymodal.evaluate import benchmarks, results
from polymodal.evaluate.measures import Measured, Measures, files_of, frechet, is_video
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.run import deal, opened
from polymodal.evaluate.store import Progress, Ranks, Store
from polymodal.generate.media import groups, read_prompts, save
from polymodal.generate.pipeline import Generator, Prompt, Settings, suspicion

PROMPTS = ("prompt", "prompt_en", "caption", "cap", "text")
SAMPLES, VBENCH = "samples", "vbench"


@dataclass(frozen=True)
class Asked:
    """One sample to be made and what is expected of it."""

    id: str
    where: str
    prompt: Prompt
    number: int  # of this prompt's samples, from 0
    label: str | None = None
    groups: dict[str, str] = field(default_factory=dict)


def asked_of(path: str, samples: int, media_dir: str | None, negative: str | None) -> tuple[list[Asked], str]:
    """The rows of a file of prompts, `samples` of each, and the file's fingerprint. Raises PolymodalError.

    Rows: prompt (or prompt_en, caption, cap, text), and any of negative_prompt, image (or image_name), last_image,
    video, mask, references, seed, label, category, split, id. A .txt holds one prompt a line. Media start from media_dir, else the file.
    """
    if not os.path.isfile(path):
        raise PolymodalError(f"The file of prompts {path} does not exist.", "Give it with --data.")
    if path.endswith(".txt"):
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        listed: list[tuple[dict[str, Any], str]] = [
            ({"prompt": p.prompt}, f"{path}, line {i}") for i, p in enumerate(read_prompts(path), 1)
        ]
    else:
        rows = open_rows(path)
        digest = rows.fingerprint
        listed = [(dict(rows[i]), rows.where(i)) for i in range(len(rows))]
    root = media_dir if media_dir is not None else os.path.dirname(path)
    out: list[Asked] = []
    seen: dict[str, str] = {}
    for i, (row, where) in enumerate(listed):
        words = next((row[k] for k in PROMPTS if isinstance(row.get(k), str) and row[k].strip()), None)
        if words is None:
            raise PolymodalError(
                f"{where}: there is no prompt (columns: {', '.join(map(str, row))[:120]}).",
                f"A row needs one of {', '.join(PROMPTS)}.",
            )
        key = str(next((row[k] for k in ("id", "index") if row.get(k) not in (None, "")), i)).strip()
        if key in seen:
            raise PolymodalError(
                f"{where}: the id {key} was used before ({seen[key]}).", "Give every row its own, or none."
            )
        seen[key] = where
        seed = row.get("seed")
        if seed not in (None, "") and not str(seed).lstrip("-").isdigit():
            raise PolymodalError(f"{where}: `seed` = {seed} is no whole number.", "Give an integer, or none.")
        files: dict[str, Any] = {
            name: os.path.join(root, str(value))
            for name, value in (
                ("image", row.get("image") or row.get("image_name")),
                ("last_image", row.get("last_image")),
                ("video", row.get("video")),
                ("mask", row.get("mask")),
            )
            if value
        }
        if row.get("references"):
            files["references"] = [os.path.join(root, str(r)) for r in row["references"]]
        about = {k: str(row[k]) for k in ("category", "split") if row.get(k) not in (None, "")}
        label = None if row.get("label") in (None, "") else str(row["label"])
        against = row.get("negative_prompt") or negative
        for number in range(samples):
            own = None if seed in (None, "") else int(str(seed)) + number
            prompt = Prompt(words.strip(), against, seed=own, **files)
            name = key if samples == 1 else f"{key}-{number}"
            out.append(Asked(name, where, prompt, number, label, about))
    if not out:
        raise PolymodalError(f"{path} holds no prompt.", "Write one a row.")
    return out, digest


def evaluate(
    generator: Generator,
    data: str,
    out: str | os.PathLike,
    *,
    benchmark: str = "generation",
    settings: Settings | None = None,
    samples: int | None = None,
    negative: str | None = None,
    fps: float = 16.0,
    real: str | None = None,
    clip: str | None = None,
    features: str | None = None,
    classifier: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    media_dir: str | None = None,
    restart: bool = False,
    html: int = 300,
    progress: bool = False,
) -> Result | None:
    """Make the samples of a file of prompts and measure them. Under a process group every rank calls this.

    real: directory of real pictures or clips; with features (a vision model's path) their Frechet distance.
    clip: a CLIP's path; classifier: an image classifier's path, for rows with `label`. samples: of each prompt.
    Rank 0 gets the Result, the others None. Raises PolymodalError.
    """
    world = Ranks(alone=False)
    try:
        facts = benchmarks.find(benchmark)
        settings = settings or Settings()
        asked, digest = asked_of(data, samples or facts.samples, media_dir, negative)
        asked = asked[: limit * (samples or facts.samples)] if limit else asked
        still = generator.family.grid().still
        references = _check(facts, asked, still, real, features)
        measures = Measures(clip, features, classifier, generator.device)
        if classifier is not None:
            asked = [_labelled(measures, a) for a in asked]
        belongs = {
            "model": generator.identity, "data": digest, "settings": asdict(settings), "samples": samples or facts.samples,
            "negative": negative, "fps": fps, "benchmark": facts.name,
        }  # fmt: skip
        store = Store(Path(out), belongs)
        folder = Path(out) / SAMPLES
        began = time.perf_counter()
        done = opened(store, world, restart)
        done = {k: e for k, e in done.items() if (folder / str(e["file"])).is_file()}
        todo = [i for i, a in enumerate(asked) if a.id not in done]
        mine = [todo[i] for i in deal([1.0] * len(todo), world.size)[world.rank]]
        folder.mkdir(parents=True, exist_ok=True)
        write = store.writer(world.rank) if mine else None
        with Progress(progress and world.rank == 0, len(asked), len(done), store, generator.name) as bar:
            for entry in _made(generator, asked, mine, settings, batch_size, fps, folder):
                assert write is not None
                write({**entry, "rank": world.rank})
                bar.update()
        world.barrier()
        entries = store.answers()
        found, vectors = _measured(measures, asked, entries, folder, references, world)
        if world.rank != 0:
            return None
        named = {"clip": clip, "features": features, "classifier": classifier, "real": real}
        result = _result(
            generator, facts.name, asked, entries, found, vectors, measures, {**belongs, "measured by": named}
        )
        result = replace(
            result, out=str(out), seconds=round(time.perf_counter() - began, 2), resumed=len(done)
        )

        def shown(i: int) -> Sequence[Any]:
            file = entries[asked[i].id].get("file")
            return (
                [Media("video" if is_video(file) else "image", str(folder / file))]
                if file is not None
                else []
            )

        results.write(Path(out), result, shown, html, "made")
        if facts.name == VBENCH:
            _vbench(Path(out), asked, entries)
        return result
    finally:
        world.close()


def _check(facts: Any, asked: list[Asked], still: bool, real: str | None, features: str | None) -> list[Path]:
    """Refuse what cannot be measured before anything is generated; the files of real pictures."""
    if real is not None and features is None:
        raise PolymodalError("--real needs a model that sees.", "Name a vision model's path with --features.")
    if features is not None and real is None and still:
        raise PolymodalError(
            "--features measures nothing here: pictures have no frames to compare.",
            "Name a directory of real pictures with --real.",
        )
    references = files_of(real) if real is not None else []
    odd = next((p for p in references if is_video(p) == still), None)
    if odd is not None:
        raise PolymodalError(
            f"{odd} is a {'clip' if still else 'picture'}, this model makes {'pictures' if still else 'clips'}.",
            "Name a directory of the same kind with --real.",
        )
    if references and len(asked) < 2:
        raise PolymodalError("A distance of distributions needs at least 2 samples.", "Raise --samples.")
    if facts.name == VBENCH:
        if still:
            raise PolymodalError("VBench judges clips, this model makes pictures.", "Use `generation`.")
        names: dict[str, str] = {}
        for a in asked:
            name = vbench_name(a)
            if "/" in name or len(name.encode()) > 255:
                raise PolymodalError(
                    f"{a.where}: the prompt cannot be a file's name, which VBench wants.", "Shorten it."
                )
            if name in names:
                raise PolymodalError(
                    f"{a.where}: the prompt was used before ({names[name]}); VBench tells clips apart by it.",
                    "Remove one of the rows.",
                )
            names[name] = a.where
    return references


def _labelled(measures: Measures, asked: Asked) -> Asked:
    if asked.label is None:
        return asked
    return replace(asked, label=measures.known_label(asked.label, asked.where))


def _made(
    generator: Generator, asked: list[Asked], mine: list[int], settings: Settings, batch: int, fps: float, folder: Path
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Entries of this rank's samples, each with its file written."""
    good: list[int] = []
    for i in mine:
        error = _unreadable(asked[i].prompt)
        if error is None:
            good.append(i)
        else:
            yield {"id": asked[i].id, "file": None, "answer": "", "error": f"{asked[i].where}: {error}"}
    prompts = [a.prompt for a in asked]
    for group in groups(good, prompts, batch):
        began = time.perf_counter()
        seeded = [
            replace(prompts[i], seed=settings.seed * 1_000_003 + i if prompts[i].seed is None else prompts[i].seed)
            for i in group
        ]  # fmt: skip
        made = generator.sample(seeded, settings)
        each = round((time.perf_counter() - began) / len(group), 3)
        for place, (i, prompt, frames) in enumerate(zip(group, seeded, made, strict=True)):
            entry: dict[str, Any] = {"id": asked[i].id, "seed": prompt.seed, "seconds": each}
            wrong = suspicion(frames)
            if frames.dtype != np.uint8:
                yield {**entry, "file": None, "answer": "", "error": f"the sample {wrong}"}
                continue
            name = save(folder, i, frames, fps, **generator.heard(place))
            yield {**entry, "file": name, "answer": name, **({"warning": wrong} if wrong else {})}


def _unreadable(prompt: Prompt) -> str | None:
    """Why a row's conditions cannot be had, None when they can: such a row is named, the others go on."""
    try:
        for path in (prompt.image, prompt.last_image, *(prompt.references or ())):
            if path is not None:
                media.image(path)
        for path in (prompt.video, prompt.mask):
            if path is not None:
                if is_video(path):
                    media.video_header(path)
                else:
                    media.image(path)
    except PolymodalError as error:
        return error.message
    return None


def _measured(
    measures: Measures, asked: list[Asked], entries: dict[str, Any], folder: Path, references: list[Path], world: Ranks
) -> tuple[dict[int, Measured], np.ndarray | None]:  # fmt: skip
    """What is said of each sample, and the features of the real ones; ranks share the work, rank 0 gets it all."""
    here = [i for i, a in enumerate(asked) if entries.get(a.id, {}).get("file")]
    error: PolymodalError | None = None
    found: dict[int, Measured] = {}
    seen: dict[int, np.ndarray] = {}
    try:
        for i in here[world.rank :: world.size]:
            found[i] = measures.of(folder / entries[asked[i].id]["file"], asked[i].prompt.prompt)
        for at in range(world.rank, len(references), world.size):
            seen[at] = measures.vector(references[at])
    except PolymodalError as caught:
        error = caught
    world.raise_together(error)
    parts = world.gather((found, seen))
    found = {i: m for part in parts for i, m in part[0].items()}
    vectors = {at: v for part in parts for at, v in part[1].items()}
    return found, np.stack([vectors[at] for at in sorted(vectors)]) if vectors else None


def _result(
    generator: Generator, benchmark: str, asked: list[Asked], entries: dict[str, Any], found: dict[int, Measured],
    real: np.ndarray | None, measures: Measures, settings: dict[str, Any],
) -> Result:  # fmt: skip
    judged: list[Judged] = []
    for i, a in enumerate(asked):
        entry = entries.get(a.id)
        if entry is None:
            raise PolymodalError(
                f"{a.where}: the sample {a.id} is missing in the parts.",
                "Start the same command again; it makes what is missing.",
            )
        expected = (a.label,) if a.label is not None and measures.classifier is not None else ()
        common = (i, a.id, a.where, a.prompt.prompt, expected, {}, a.groups, str(entry["answer"]))
        if entry.get("error"):
            judged.append(Judged(*common, score=0.0 if expected else None, error=entry["error"]))
            continue
        said = found[i]
        score = float(said.label == a.label) if expected else None
        judged.append(Judged(*common, said.label or "", score, measures=said.values))
    totals = results.means(judged)
    score = totals.pop("score", None)
    if real is not None:
        made = [m.vector for m in found.values() if m.vector is not None]
        if len(made) < 2:
            raise PolymodalError(
                f"{len(made)} samples could be made, a distance needs 2.", "See samples.jsonl."
            )
        totals["frechet"] = frechet(np.stack(made), real)
    scored = [s for s in judged if s.score is not None]
    metric = "label" if scored else ", ".join(totals) or "none"
    return Result(
        generator.name, benchmark, metric, score, len(judged), len(scored), sum(s.error is not None for s in judged), 0, 0,
        results.by_group(judged, ("split", "category")), 0.0, 0, settings, judged, measures=totals,
    )  # fmt: skip


# ---- VBench ---------------------------------------------------------------------------------------------------------


def vbench_name(asked: Asked) -> str:
    """A clip's file as VBench looks for it: <prompt>-<number>.mp4."""
    return f"{asked.prompt.prompt}-{asked.number}.mp4"


def _vbench(out: Path, asked: list[Asked], entries: dict[str, Any]) -> None:
    """<out>/vbench/<prompt>-<number>.mp4: hard links where the disk allows, else copies. VBench itself is run by the user."""
    folder = out / VBENCH
    folder.mkdir(exist_ok=True)
    for a in asked:
        file = entries[a.id].get("file")
        if file is None:
            continue
        target, source = folder / vbench_name(a), out / SAMPLES / file
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(
    checkpoint: str, benchmark: str, data: str, *, settings: Settings, how: dict[str, Any], out: str | None = None, **options: Any
) -> Result | None:  # fmt: skip
    """The command in one of its processes. how: of `generate.pipeline.opened`; options: of `evaluate`."""
    from rich.console import Console

    from polymodal.generate.pipeline import opened

    where = Path(out) if out else Path("evaluations") / f"{Path(checkpoint.rstrip('/')).name}-{benchmark}"
    facts = benchmarks.find(benchmark)
    asked_of(data, options.get("samples") or facts.samples, options.get("media_dir"), None)  # raises early
    with opened(checkpoint, **how) as (_, generator):
        result = evaluate(
            generator, data, where, benchmark=benchmark, settings=settings, progress=True, **options
        )
    if result is not None:
        console = Console()
        console.print(results.table(result))
        if result.metric == "none":
            console.print("nothing was measured: name --clip, --classifier, or --real with --features")
        if result.errors:
            console.print(f"{result.errors} could not be made")
        if result.resumed:
            console.print(f"{result.resumed} taken over from an earlier start")
        console.print(f"{where}/result.json, samples.jsonl, samples/", markup=False, soft_wrap=True)
    return result
