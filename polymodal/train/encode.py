"""`polymodal encode`: pictures, clips and captions through the frozen encoders, once, into features on disk.

Ranks share the records. Files that exist are not made again, so a run that was killed continues and new
records are added. The list and the manifest are written at the end; until then training refuses the
directory.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal import __version__
from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import Record, SampleLengths
from polymodal.core.terminal import Bar, say
from polymodal.data import features as store
from polymodal.data.media_pairs import PairClips
from polymodal.data.source import Corpus, open_corpus
from polymodal.models import catalog
from polymodal.models.diffusion import Generation
from polymodal.runtime import host
from polymodal.runtime.lock import DirectoryLock
from polymodal.runtime.process_group import runtime
from polymodal.train import prior
from polymodal.train.actors import Encoders
from polymodal.train.layouts import Section, layout_of
from polymodal.train.layouts.uniform import captioned, clips_of, feature_settings, features_directory

WINDOW = 256
"""Records that are sorted by shape together."""
CAPTIONS = 512
"""Captions whose embeddings are kept."""


@dataclass
class Encoded:
    """What a rank did."""

    made: int = 0
    kept: int = 0
    broken: list[str] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)  # numbers of the records
    beside: set[int] = field(default_factory=set)  # datasets with media in files of their own
    frames: int = 0
    seconds: float = 0.0


@dataclass
class _Job:
    """A record, its shape, its feature file and its row of the list."""

    record: Record
    measure: SampleLengths
    path: Path
    row: dict[str, Any]


_Decoded = tuple[_Job, Tensor, dict[str, Tensor]]
"""A job, its frames, and its conditions by role; uint8 [F, H, W, 3]."""


def run(recipe: recipes.Recipe) -> int:
    """The command, in one of its processes. Returns the exit code."""
    with runtime(recipe) as rt:
        family: Any = catalog.family(recipe.model.model_copy(update={"init": "random"}))
        if not isinstance(family, Generation):
            raise PolymodalError(
                f"{family.card.name} is trained on its data as they are: it has no frozen encoders.",
                "Run `polymodal train`; only models that generate have features to encode.",
            )
        if not recipe.data.datasets:
            raise PolymodalError(
                "The recipe has no data.datasets.",
                "Add at least one, e.g. data.datasets: [{path: data.json}].",
            )
        prior.draw(recipe, family, rt.device.torch)
        encoders: list[Encoders] = []
        for section in ("datasets", "validation"):
            if getattr(recipe.data, section):
                Encoding(recipe, family, section, rt, encoders).run()  # type: ignore[arg-type]
    return 0


class Encoding:
    """One section of data into one directory. `encoders` is filled when the first sample has to be made."""

    def __init__(
        self, recipe: recipes.Recipe, family: Any, section: Section, rt: Any, encoders: list[Encoders]
    ):
        self.recipe, self.family, self.rt, self.section = recipe, family, rt, section
        self.data = recipe.data
        self.directory = features_directory(recipe, section)
        self.clips = clips_of(recipe, family)
        self.settings = feature_settings(recipe, family)
        self.dtype = layout_of(recipe, family).dtype
        self.encoders = encoders
        self.batch = self.data.encode_batch
        self.done = Encoded()
        self._texts: dict[str, dict[str, Tensor]] = {}  # of captions
        self._writing: deque[Future[int]] = deque()
        self._hashes: dict[str, str] = {}  # feature file -> hash of the files it was made of

    def run(self) -> None:
        """Collective. Raises PolymodalError for broken records, settings that are not the directory's,
        another process that writes there, and a disk that is full or cannot be written."""
        hint = "Wait until it ends, or encode into another directory (data.features)."
        lock = DirectoryLock(self.directory, "encoding", hint)
        try:
            with lock if self.rt.rank == 0 else contextlib.nullcontext():
                self.rt.barrier()  # the others write once it is locked
                self._run()
        except OSError as error:
            raise host.full_disk(error) or PolymodalError(
                f"{error.filename or self.directory} cannot be written or read: {error.strerror or error}.",
                "Set data.features to a directory that this user may write.",
            ) from None

    def _run(self) -> None:
        began = time.perf_counter()
        datasets = captioned(getattr(self.data, self.section), self.recipe)
        corpus = open_corpus(datasets, self.data.attr, f"data.{self.section}")
        self._prepare()
        own = range(self.rt.rank, len(corpus), self.rt.world)
        with (
            open(self.directory / f".part-{self.rt.rank}.jsonl", "w", encoding="utf-8") as listing,
            ThreadPoolExecutor(max(1, self.data.workers), "polymodal-decode") as pool,
            Bar(f"Encoding {self.section}", len(own) * self.members, hidden=self.rt.rank != 0) as bar,
        ):
            for at in range(0, len(own), WINDOW):
                for row in self._rows(corpus, own[at : at + WINDOW], pool, bar.advance):
                    listing.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._write_empty_caption()
        self.rt.barrier()
        self.done.seconds = time.perf_counter() - began
        total = self._total()
        if self.rt.rank == 0:
            self._finish(corpus, total)
        self.rt.barrier()

    # ------------------------------------------------------------------ the directory

    def _parts(self) -> list[Path]:
        """Lists of the ranks, also those of a run that was killed."""
        return sorted(self.directory.glob(".part-*.jsonl"))

    def _prepare(self) -> None:
        settings = self.directory / "settings.json"
        if self.rt.rank == 0:
            (self.directory / store.FOLDER).mkdir(parents=True, exist_ok=True)
            known = settings.is_file()
            other = []
            if known:
                other = store.differences(read_json(settings), self.settings)
            if other or (not known and (self.directory / store.LIST).is_file()):
                what = f"made with other settings: {'; '.join(other[:4])}" if other else "of another system"
                raise PolymodalError(
                    f"{self.directory} holds features {what}.",
                    "Choose another data.features, or remove that directory.",
                )
            store.write_json(settings, self.settings)
            unfinished = (self.directory / store.FOLDER).glob(".*.tmp")  # of a process that was killed
            for part in [*self._parts(), *unfinished]:
                part.unlink()
        self._hashes = store.hashes(self.directory)
        self.rt.barrier()

    def _finish(self, corpus: Corpus, total: Encoded) -> None:
        texts = [part.read_text(encoding="utf-8") for part in self._parts()]
        rows = [json.loads(line) for text in texts for line in text.split("\n") if line]
        rows.sort(key=lambda row: row["record"])
        if not rows:
            cause = total.broken[0] if total.broken else "there is none"
            raise PolymodalError(
                f"Not one sample of data.{self.section} could be encoded; {cause}.",
                "Fix the data, or loosen data.clip.",
            )
        store.write_list(self.directory, rows)
        manifest = {
            "version": store.VERSION,
            "polymodal": __version__,
            "settings": self.settings,
            "model": str(self.family.source),
            "card": self.family.card.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "samples": len(rows),
            "datasets": [
                {"name": p.name, "rows": len(p), "fingerprint": p.fingerprint} for p in corpus.parts
            ],
            "media_inside": [k for k in range(len(corpus.parts)) if k not in total.beside],
            "broken": total.broken[:1000],
            "left_out": total.left_out,
        }
        store.write_json(self.directory / store.MANIFEST, manifest)
        for part in self._parts():
            part.unlink()
        counts = f"{len(rows)} samples, {total.made} encoded, {total.kept} kept"
        if total.broken:
            counts += f", {len(total.broken)} left out"
        if total.made:
            counts += f", {total.frames / total.seconds:.1f} frames a second"
        say(f"{self.directory}: {counts}")
        for reason in total.broken[:5]:
            say(f"  left out: {reason}", error=True)

    def _total(self) -> Encoded:
        ranks: list[Any] = [self.done] * self.rt.world
        if self.rt.world > 1:
            dist.all_gather_object(ranks, self.done)
        return Encoded(
            sum(rank.made for rank in ranks),
            sum(rank.kept for rank in ranks),
            [reason for rank in ranks for reason in rank.broken],
            sorted(number for rank in ranks for number in rank.left_out),
            {number for rank in ranks for number in rank.beside},
            sum(rank.frames for rank in ranks),
            max(rank.seconds for rank in ranks),
        )

    def _write_empty_caption(self) -> None:
        """For condition dropping; made once."""
        path = self.directory / store.EMPTY
        if self.rt.rank == 0 and not path.is_file():
            store.write_tensors(path, {n: t.cpu() for n, t in self._encoders().text([""]).items()})

    def _encoders(self) -> Encoders:
        if not self.encoders:
            self.encoders.append(Encoders(self.family, self.dtype, self.rt.device.torch))
        return self.encoders[0]

    # ------------------------------------------------------------------ the work

    def _rows(
        self, corpus: Corpus, numbers: Sequence[int], pool: ThreadPoolExecutor, advance: Any
    ) -> Iterator[dict[str, Any]]:
        """Make the feature files of these records; gives their rows of the list."""
        samples = [jobs for number in numbers if (jobs := self._jobs(corpus, number))]
        missing = [job for jobs in samples for job in jobs if not job.path.is_file()]
        self.done.kept += sum(map(len, samples)) - len(missing)
        advance(len(numbers) * self.members - len(missing))
        failed = self._make(missing, pool, advance)
        whole = [jobs for jobs in samples if not any(job.path in failed for job in jobs)]
        used = {jobs[0].row["record"] for jobs in whole}
        self.done.left_out += [number for number in numbers if number not in used]
        for jobs in whole:
            size = sum(job.path.stat().st_size for job in jobs)
            yield {**jobs[0].row, "hash": self._hash(corpus, jobs[0]), "bytes": size // len(jobs)}

    @property
    def members(self) -> int:
        """Feature files of a row: 2 of a pair."""
        return 2 if isinstance(self.clips, PairClips) else 1

    def _jobs(self, corpus: Corpus, number: int) -> list[_Job]:
        """Of each medium of a record, the first with the row of the list; [] for one that is broken or a
        tie."""
        try:
            record = corpus[number]
            measure = self.clips.bucket(record)
            whole = store.identity(record, self.family.given)
        except PolymodalError as error:
            origin = corpus.where(number)
            text = error.message if error.message.startswith(origin) else f"{origin}: {error.message}"
            self._broken(text, error.hint)
            return []
        if isinstance(self.clips, PairClips) and self.clips.tied(record):
            return []
        sides = record.conversations[: self.members]
        files = [
            store.file_name(
                {**store.identity(side, self.family.given), "shape": measure.shape}, self.data.feature_files
            )
            for side in sides
        ]
        extra = {key: value for key, value in record.extra.items() if key not in ("captions", "given")}
        row = {
            **extra,
            "cap": list(record.extra["captions"]),
            "file": files[0],
            "sample_size": "x".join(map(str, measure.shape)),
            "sample_num_frames": measure.shape[0],
            "record": number,
            "dataset": bisect.bisect_right([part.stop for part in corpus.parts], number),
            "stamp": store.stamp(whole),
            "media_bytes": sum(file[1] for file in whole["files"]),
        }
        if self.members > 1:
            row["file_rejected"] = files[1]
            scores = record.scores or (None, None)
            row |= {"score": scores[0], "score_rejected": scores[1]}
        if any(isinstance(name, str) for name in store.sources(record, self.family.given)):
            self.done.beside.add(int(row["dataset"]))
        return [
            _Job(side, measure, self.directory / file, row) for side, file in zip(sides, files, strict=True)
        ]

    def _broken(self, text: str, hint: str) -> None:
        if self.data.on_error == "fail":
            raise PolymodalError(
                text,
                f"{hint} Or set data.on_error to skip: what is broken is then named and left out.".strip(),
            )
        self.done.broken.append(text)

    def _make(self, jobs: list[_Job], pool: ThreadPoolExecutor, advance: Any) -> set[Path]:
        """Encode jobs in batches of one shape; returns the files of those whose media are broken."""
        self._pool = pool
        unique: dict[Path, _Job] = {}
        for job in jobs:  # the same medium and captions twice are one file
            unique.setdefault(job.path, job)
        failed: set[Path] = set()
        batch: list[_Decoded] = []
        order = sorted(unique.values(), key=lambda job: job.measure.shape)
        for job, decoded in self._decode_ahead(order, pool):
            if batch and (len(batch) >= self.batch or batch[0][0].measure.shape != job.measure.shape):
                self._encode(batch)
                batch = []
            try:
                batch.append((job, *decoded.result()))
            except PolymodalError as error:
                self._broken(error.message, error.hint)
                failed.add(job.path)
            advance(1)
        if batch:
            self._encode(batch)
        self._written(0)
        return failed

    def _written(self, left: int) -> None:
        """Wait until at most so many samples are still being written. Raises what went wrong with one."""
        while len(self._writing) > left:
            frames = self._writing.popleft()
            self.done.frames += frames.result()
            self.done.made += 1

    def _decode_ahead(self, jobs: list[_Job], pool: ThreadPoolExecutor) -> Iterator[tuple[_Job, Future]]:
        """Jobs in order, of which the next two batches are being decoded."""
        waiting: deque[tuple[_Job, Future]] = deque()
        rest = iter(jobs)
        while True:
            for job in islice(rest, max(self.batch * 2, 4) - len(waiting)):
                waiting.append((job, pool.submit(self._decode, job)))
            if not waiting:
                return
            yield waiting.popleft()

    def _decode(self, job: _Job) -> tuple[Tensor, dict[str, Tensor]]:
        conditions = self.clips.given(job.record, job.measure)
        frames = self.clips.frames(job.record, job.measure)
        return torch.tensor(frames), {role: torch.tensor(value) for role, value in conditions.items()}

    def _hash(self, corpus: Corpus, job: _Job) -> str:
        """Of the files that a sample was made of; the feature file's name changes when they do."""
        name = store.hash_key(job.row)
        if name not in self._hashes:
            record = corpus[job.row["record"]] if self.members > 1 else job.record
            self._hashes[name] = store.content_hash(record, self.family.given)
        return self._hashes[name]

    def _encode(self, batch: list[_Decoded]) -> None:
        """Through the encoders and to disk. Out of memory: a smaller batch, then tiles, then an error."""
        encoders = self._encoders()
        try:
            media = encoders.media([pixels for _, pixels, _ in batch], [given for _, _, given in batch])
        except torch.OutOfMemoryError:
            self._encode_with_less_memory(batch)
            return
        for i, (job, pixels, _) in enumerate(batch):
            captions = [self._text(c, pixels) for c in job.record.extra["captions"]]
            names = self.family.documented if job.path.suffix == ".pt" else {}
            own = {n: t[i] for n, t in media.items()}
            self._writing.append(self._pool.submit(self._write, job, own, captions, names))
        self._written(len(batch))  # while the next batch is encoded

    def _write(self, job: _Job, media: dict[str, Tensor], captions: Any, names: Any) -> int:
        """Its frames, once the sample is on disk."""
        store.write_sample(job.path, {n: t.cpu() for n, t in media.items()}, captions, names)
        return int(job.measure.shape[0])

    def _encode_with_less_memory(self, batch: list[_Decoded]) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        vae = self._encoders().pipeline.vae
        if len(batch) > 1:
            half = self.batch = len(batch) // 2
            say(f"out of memory: encoding {half} samples at once", error=True)
            self._encode(batch[:half])
            self._encode(batch[half:])
        elif not getattr(vae, "use_tiling", True):
            vae.enable_tiling()
            say("out of memory: encoding in tiles", error=True)
            self._encode(batch)
        else:
            frames, height, width = batch[0][0].measure.shape
            raise PolymodalError(
                f"One sample of {frames} frames of {height} x {width} does not fit the device, even in "
                "tiles.",
                "Lower data.clip.pixels or data.clip.frames, or start fewer processes on a device.",
            )

    def _text(self, caption: str, pixels: Tensor) -> dict[str, Tensor]:
        seen = pixels[None] if self.family.sees else None
        text = None if seen is not None else self._texts.get(caption)
        if text is None:
            text = {n: t[0].cpu() for n, t in self._encoders().text([caption], seen).items()}
        if seen is None:
            if len(self._texts) > CAPTIONS:
                self._texts.clear()
            self._texts[caption] = text
        return text
