"""Evaluation of models that generate: the samples of a file of prompts, then what measures them.

Samples are files and entries of the store; measuring them again generates nothing.
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
from polymodal.core.terminal import say
from polymodal.data import media
from polymodal.data.files import open_rows
from polymodal.evaluate import benchmarks, results
from polymodal.evaluate.measures import Measured, Measures, files_of, frechet, is_video
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.store import Ranks, complete, store_in
from polymodal.generate.media import make, read_prompts
from polymodal.generate.pipeline import Generator, Prompt, Settings, opened

PROMPTS = ("prompt", "prompt_en", "caption", "cap", "text")
SAMPLES, VBENCH = "samples", "vbench"


@dataclass(frozen=True)
class Request:
    """One sample to be made and what is expected of it."""

    id: str
    where: str
    prompt: Prompt
    number: int  # of this prompt's samples, from 0
    label: str | None = None
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def vbench_name(self) -> str:
        """A clip's file as VBench looks for it."""
        return f"{self.prompt.prompt}-{self.number}.mp4"


def read_requests(
    path: str, samples: int, media_dir: str | None, negative: str | None
) -> tuple[list[Request], str]:
    """`samples` requests for each row of a file of prompts, and the file's fingerprint.

    Rows: prompt (or prompt_en, caption, cap, text), and any of negative_prompt, image (or image_name),
    last_image, video, mask, references, seed, label, category, split, id. A .txt holds one prompt a line.
    Media start from media_dir, else from the file's directory. Raises PolymodalError.
    """
    if not os.path.isfile(path):
        raise PolymodalError(f"The file of prompts {path} does not exist.", "Give it with --data.")
    rows: list[dict[str, Any]]
    if path.endswith(".txt"):
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        rows = [{"prompt": p.prompt} for p in read_prompts(path)]
        where = [f"{path}, line {i}" for i in range(1, len(rows) + 1)]
    else:
        file = open_rows(path)
        digest = file.fingerprint
        rows, where = [dict(file[i]) for i in range(len(file))], [file.where(i) for i in range(len(file))]
    root = media_dir if media_dir is not None else os.path.dirname(path)
    requests: list[Request] = []
    seen: dict[str, str] = {}
    for i, row in enumerate(rows):
        row = {name: value for name, value in row.items() if value not in (None, "")}
        key = str(row.get("id", row.get("index", i))).strip()
        if key in seen:
            raise PolymodalError(
                f"{where[i]}: the id {key} was used before ({seen[key]}).", "Give every row its own, or none."
            )
        seen[key] = where[i]
        prompt = _prompt(row, where[i], root, negative)
        label = str(row["label"]) if "label" in row else None
        groups = {name: str(row[name]) for name in ("category", "split") if name in row}
        for n in range(samples):
            seeded = prompt if prompt.seed is None else replace(prompt, seed=prompt.seed + n)
            name = key if samples == 1 else f"{key}-{n}"
            requests.append(Request(name, where[i], seeded, n, label, groups))
    if not requests:
        raise PolymodalError(f"{path} holds no prompt.", "Write one a row.")
    return requests, digest


def _prompt(row: dict[str, Any], where: str, root: str, negative: str | None) -> Prompt:
    text = next((row[k] for k in PROMPTS if isinstance(row.get(k), str) and row[k].strip()), None)
    if text is None:
        raise PolymodalError(
            f"{where}: there is no prompt (columns: {', '.join(map(str, row))[:120]}).",
            f"A row needs one of {', '.join(PROMPTS)}.",
        )
    seed = row.get("seed")
    if seed is not None and not str(seed).lstrip("-").isdigit():
        raise PolymodalError(f"{where}: `seed` = {seed} is no whole number.", "Give an integer, or none.")
    row = {"image": row.get("image_name"), **row}
    files = {
        name: os.path.join(root, str(row[name]))
        for name in ("image", "last_image", "video", "mask")
        if row.get(name)
    }
    return Prompt(
        text.strip(),
        row.get("negative_prompt", negative),
        references=[os.path.join(root, str(file)) for file in row.get("references", ())] or None,
        seed=None if seed is None else int(str(seed)),
        **files,
    )


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
    clip: a CLIP's path; classifier: an image classifier's path, for rows with `label`. samples: of each
    prompt. Rank 0 gets the Result, the others None. Raises PolymodalError.
    """
    began = time.perf_counter()
    facts = benchmarks.find(benchmark)
    settings = settings or Settings()
    each = samples or facts.samples
    requests, digest = read_requests(data, each, media_dir, negative)
    requests = requests[: limit * each] if limit else requests
    references = _check(facts.name, requests, generator.family.grid().still, real, features)
    measures = Measures(clip, features, classifier, generator.device)
    if classifier is not None:
        requests = [
            r if r.label is None else replace(r, label=measures.known_label(r.label, r.where))
            for r in requests
        ]
    belongs = {
        "model": generator.identity,
        "data": digest,
        "settings": asdict(settings),
        "samples": each,
        "negative": negative,
        "fps": fps,
        "benchmark": facts.name,
    }
    folder = Path(out) / SAMPLES

    def answer(mine: list[int]) -> Iterator[dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        return _entries(generator, requests, mine, settings, batch_size, fps, folder)

    with Ranks() as world, store_in(out, belongs, world) as store:
        entries, resumed = complete(
            store,
            world,
            [r.id for r in requests],
            answer,
            usable=lambda entry: (folder / str(entry["file"])).is_file(),
            restart=restart,
            title=generator.name if progress else None,
        )
        files = [folder / str(entries[r.id]["file"]) if entries[r.id]["file"] else None for r in requests]
        measured, real_vectors = _measure(measures, requests, files, references, world)
        if world.rank != 0:
            return None
    judged = [
        _judged(i, r, entries[r.id], measured.get(i), classifier is not None) for i, r in enumerate(requests)
    ]
    totals = results.means(judged)
    score = totals.pop("score", None)
    if real_vectors is not None:
        vectors = [m.vector for m in measured.values() if m.vector is not None]
        if len(vectors) < 2:
            raise PolymodalError(
                f"{len(vectors)} samples could be made, a distance needs 2.", "See samples.jsonl."
            )
        totals["frechet"] = frechet(np.stack(vectors), real_vectors)
    named = {"clip": clip, "features": features, "classifier": classifier, "real": real}
    metric = "label" if score is not None else ", ".join(totals) or "none"
    by, shown = results.by_group(judged), {**belongs, "measured by": named}
    result = Result(generator.name, facts.name, metric, score, judged, shown, by, totals)

    def pictures(i: int) -> list[Media]:
        file = files[i]
        return [] if file is None else [Media("video" if is_video(file) else "image", str(file))]

    if facts.name == VBENCH:
        _link_for_vbench(Path(out) / VBENCH, requests, files)
    return results.finish(result, out, began, resumed, html, "made", pictures)


def _check(
    benchmark: str, requests: Sequence[Request], still: bool, real: str | None, features: str | None
) -> list[Path]:
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
        kinds = ("picture", "clip")
        raise PolymodalError(
            f"{odd} is a {kinds[still]}, this model makes {kinds[not still]}s.",
            "Name a directory of the same kind with --real.",
        )
    if references and len(requests) < 2:
        raise PolymodalError("A distance of distributions needs at least 2 samples.", "Raise --samples.")
    if benchmark == VBENCH:
        _check_vbench(requests, still)
    return references


def _check_vbench(requests: Sequence[Request], still: bool) -> None:
    if still:
        raise PolymodalError("VBench judges clips, this model makes pictures.", "Use `generation`.")
    seen: dict[str, str] = {}
    for request in requests:
        name = request.vbench_name
        if "/" in name or len(name.encode()) > 255:
            raise PolymodalError(
                f"{request.where}: the prompt cannot be a file's name, which VBench wants.", "Shorten it."
            )
        if name in seen:
            raise PolymodalError(
                f"{request.where}: the prompt was used before ({seen[name]}), VBench names clips by it.",
                "Remove one of the rows.",
            )
        seen[name] = request.where


def _entries(
    generator: Generator,
    requests: Sequence[Request],
    mine: Sequence[int],
    settings: Settings,
    batch_size: int,
    fps: float,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Entries of these requests, each with its file written; a row with a broken picture fails alone."""
    problems = {i: _unreadable(requests[i].prompt) for i in mine}
    for i, problem in problems.items():
        if problem is not None:
            error = f"{requests[i].where}: {problem}"
            yield {"id": requests[i].id, "file": None, "answer": "", "error": error}
    readable = [i for i, problem in problems.items() if problem is None]
    prompts = [request.prompt for request in requests]
    for sample in make(generator, prompts, readable, settings, batch_size, folder, fps):
        entry = {
            "id": requests[sample.number].id,
            "seed": sample.prompt.seed,
            "seconds": round(sample.seconds, 3),
            "file": sample.file,
            "answer": sample.file or "",
        }
        if sample.file is None:
            entry["error"] = f"the sample {sample.warning}"
        elif sample.warning:
            entry["warning"] = sample.warning
        yield entry


def _unreadable(prompt: Prompt) -> str | None:
    """Why a row's pictures and clips cannot be read, None when they can."""
    pictures = [prompt.image, prompt.last_image, *(prompt.references or ())]
    try:
        for path in [*pictures, prompt.video, prompt.mask]:
            if path is None:
                continue
            if path not in pictures and is_video(path):
                media.video_header(path)
            else:
                media.image(path)
    except PolymodalError as error:
        return error.message
    return None


def _measure(
    measures: Measures,
    requests: Sequence[Request],
    files: Sequence[Path | None],
    references: Sequence[Path],
    world: Ranks,
) -> tuple[dict[int, Measured], np.ndarray | None]:
    """Measures by position, and the features of the real files; ranks share the work. Collective."""
    measured: dict[int, Measured] = {}
    vectors: dict[int, np.ndarray] = {}
    with world.together():
        made = [(i, file) for i, file in enumerate(files) if file is not None]
        for i, file in made[world.rank :: world.size]:
            measured[i] = measures.of(file, requests[i].prompt.prompt)
        for at in range(world.rank, len(references), world.size):
            vectors[at] = measures.vector(references[at])
    for some_measured, some_vectors in world.gather((measured, vectors)):
        measured |= some_measured
        vectors |= some_vectors
    return measured, np.stack([vectors[at] for at in sorted(vectors)]) if vectors else None


def _judged(i: int, request: Request, entry: Any, measured: Measured | None, labels: bool) -> Judged:
    expected = (request.label,) if request.label is not None and labels else ()
    about = (request.id, request.where, request.prompt.prompt, expected, {}, request.groups)
    sample = Judged(i, *about, str(entry["answer"]))
    if measured is None:
        return replace(sample, score=0.0 if expected else None, error=entry["error"])
    score = float(measured.label == request.label) if expected else None
    return replace(sample, extracted=measured.label or "", score=score, measures=measured.values)


def _link_for_vbench(folder: Path, requests: Sequence[Request], files: Sequence[Path | None]) -> None:
    """<prompt>-<number>.mp4: hard links where the disk allows, else copies. The user runs VBench itself."""
    folder.mkdir(exist_ok=True)
    for request, source in zip(requests, files, strict=True):
        if source is not None:
            target = folder / request.vbench_name
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)


def main(
    checkpoint: str,
    benchmark: str,
    data: str,
    *,
    out: str | None = None,
    opening: dict[str, Any],
    **options: Any,
) -> Result | None:
    """The command in one of its processes. opening: options of `opened`; options: those of `evaluate`."""
    where = results.directory(out, checkpoint, benchmark)
    read_requests(data, 1, options.get("media_dir"), None)  # raises before the model is opened
    with opened(checkpoint, **opening) as (_, generator):
        result = evaluate(generator, data, where, benchmark=benchmark, progress=True, **options)
    if result is not None:
        results.show(result, where, errors="could not be made")
        if result.metric == "none":
            say("nothing was measured: name --clip, --classifier, or --real with --features")
    return result
