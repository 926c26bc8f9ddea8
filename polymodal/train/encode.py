"""`polymodal encode`: pictures, clips and captions through the frozen encoders, once, into features on disk.

Sees every room. Ranks share the records; what exists is not made again, so a run that was killed goes on and new rows
are added. The list and the manifest are written at the end, whole; until then training says that it is not finished.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal import __version__
from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record, SampleLengths
from polymodal.data import features as store
from polymodal.data.clips import Clips
from polymodal.data.source import Corpus, open_corpus
from polymodal.models import catalog
from polymodal.models.diffusion import Generation
from polymodal.runtime.process_group import runtime
from polymodal.train import prior
from polymodal.train.actors import Encoders
from polymodal.train.layouts import Section, layout_of
from polymodal.train.layouts.uniform import captioned, features_directory, wanted_settings

WINDOW = 256
"""Records that are sorted into buckets together."""


@dataclass
class Encoded:
    """What a rank did. seconds: of the whole; encoding: inside the encoders."""

    made: int = 0
    kept: int = 0
    broken: list[str] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    encoding: float = 0.0


@dataclass
class _Job:
    number: int
    record: Record
    measure: SampleLengths
    path: Path
    row: dict[str, Any]


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
        prior.make(recipe, family, rt.device.torch)
        encoders: list[Encoders] = []
        for section in ("datasets", "validation"):
            if getattr(recipe.data, section):
                work = Encoding(recipe, family, section, rt, encoders)  # type: ignore[arg-type]
                work.run()
    return 0


_Ready = tuple[_Job, Tensor, dict[str, Tensor]]
"""What is decoded: the job, its frames, and what they are made from by role; uint8 [F, H, W, 3]."""


class Encoding:
    """One section of data into one directory. `encoders` is filled when the first sample has to be made."""

    def __init__(
        self, recipe: recipes.Recipe, family: Any, section: Section, rt: Any, encoders: list[Encoders]
    ):
        self.recipe, self.family, self.rt, self.section = recipe, family, rt, section
        self.data = recipe.data
        self.directory = features_directory(recipe, section)
        self.clips = Clips(self.data.clip, family.grid(), family.given, family.needed)
        self.settings = wanted_settings(recipe, family)
        self.dtype = layout_of(recipe, family).dtype
        self.encoders = encoders
        self.batch = self.data.encode_batch
        self.done = Encoded()
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._hashes: dict[str, str] = {}  # feature file -> hash of what it was made of

    def run(self) -> Encoded:
        """Collective over the ranks. Raises PolymodalError for settings that are not the directory's, and broken rows."""
        began = time.perf_counter()
        datasets = captioned(getattr(self.data, self.section))
        corpus = open_corpus(datasets, self.data.attr, f"data.{self.section}")
        self._prepare()
        part = self.directory / f".part-{self.rt.rank}.jsonl"
        with open(part, "w", encoding="utf-8") as listing:
            for rows in self._windows(corpus):
                for row in rows:
                    listing.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._empty()
        self._barrier()
        self.done.seconds = time.perf_counter() - began
        total = self._total()
        if self.rt.rank == 0:
            self._finish(corpus, total)
        self._barrier()
        return self.done

    # ------------------------------------------------------------------ the directory

    def _prepare(self) -> None:
        settings = self.directory / "settings.json"
        if self.rt.rank == 0:
            (self.directory / store.FOLDER).mkdir(parents=True, exist_ok=True)
            had = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
            other = store.differences(had, self.settings) if had is not None else []
            foreign = had is None and (self.directory / store.LIST).is_file()
            if other or foreign:
                raise PolymodalError(
                    f"{self.directory} holds features made with other settings: {'; '.join(other[:4])}."
                    if other
                    else f"{self.directory} holds features of another system.",
                    "Choose another data.features, or remove that directory.",
                )
            store.write_json(settings, self.settings)
            for part in self.directory.glob(
                ".part-*.jsonl"
            ):  # of a run that was killed, maybe of more processes
                part.unlink()
        self._hashes = store.hashes(self.directory)
        self._barrier()

    def _finish(self, corpus: Corpus, total: Encoded) -> None:
        rows = []
        for part in sorted(self.directory.glob(".part-*.jsonl")):
            rows += [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: row["record"])
        if not rows:
            raise PolymodalError(
                f"Not one sample of data.{self.section} could be encoded; {total.broken[0] if total.broken else 'there is none'}.",
                "Mend the data, or loosen data.clip.",
            )
        store.write_list(self.directory, rows)
        manifest = {
            "version": store.VERSION, "polymodal": __version__, "settings": self.settings, "model": str(self.family.source),
            "card": self.family.card.name, "dtype": str(self.dtype).removeprefix("torch."), "samples": len(rows),
            "datasets": [{"name": p.name, "rows": len(p), "fingerprint": p.fingerprint} for p in corpus.parts],
            "broken": total.broken[:1000],
        }  # fmt: skip
        store.write_json(self.directory / store.MANIFEST, manifest)
        for part in self.directory.glob(".part-*.jsonl"):
            part.unlink()
        rate = f", {total.frames / total.seconds:.1f} frames a second" if total.made else ""
        left = f", {len(total.broken)} left out" if total.broken else ""
        print(
            f"{self.directory}: {len(rows)} samples, {total.made} encoded, {total.kept} kept{left}{rate}",
            flush=True,
        )
        for reason in total.broken[:5]:
            print(f"  left out: {reason}", file=sys.stderr, flush=True)

    def _total(self) -> Encoded:
        if not dist.is_initialized() or self.rt.world == 1:
            return self.done
        all_done: list[Any] = [None] * self.rt.world
        dist.all_gather_object(all_done, self.done)
        out = Encoded(seconds=max(d.seconds for d in all_done))
        for one in all_done:
            out.made, out.kept, out.frames = out.made + one.made, out.kept + one.kept, out.frames + one.frames
            out.broken += one.broken
        return out

    def _barrier(self) -> None:
        if dist.is_initialized() and self.rt.world > 1:
            dist.barrier()

    def _empty(self) -> None:
        """The empty caption, for condition dropping; made once."""
        path = self.directory / store.EMPTY
        if self.rt.rank == 0 and not path.is_file():
            from safetensors.torch import save_file

            save_file({n: t.cpu().contiguous() for n, t in self._encoders().text([""]).items()}, path)

    def _encoders(self) -> Encoders:
        if not self.encoders:
            self.encoders.append(Encoders(self.family, self.dtype, self.rt.device.torch))
        return self.encoders[0]

    # ------------------------------------------------------------------ the work

    def _windows(self, corpus: Corpus) -> Iterator[list[dict[str, Any]]]:
        """Rows of the list, window by window; the next window's first clips are decoded while the last is encoded."""
        mine = range(self.rt.rank, len(corpus), self.rt.world)
        starts = [0] + [part.stop for part in corpus.parts[:-1]]
        with (
            ThreadPoolExecutor(max(1, self.data.workers), "polymodal-decode") as pool,
            self._bar(len(mine)) as advance,
        ):
            for at in range(0, len(mine), WINDOW):
                jobs = []
                for number in mine[at : at + WINDOW]:
                    job = self._job(corpus, number, sum(number >= s for s in starts) - 1)
                    if job is not None:
                        jobs.append(job)
                missing = [job for job in jobs if not job.path.is_file()]
                self.done.kept += len(jobs) - len(missing)
                advance(len(mine[at : at + WINDOW]) - len(missing))
                failed = self._make(missing, pool, advance)
                rows = []
                for job in jobs:
                    if job.number not in failed:
                        rows.append({**job.row, "hash": self._hash(job), "bytes": job.path.stat().st_size})
                yield rows

    def _job(self, corpus: Corpus, number: int, dataset: int) -> _Job | None:
        try:
            record = corpus[number]
            measure = self.clips.bucket(record)
            who = store.identity(record, self.family.given)
        except PolymodalError as error:
            where = corpus.where(number)
            text = error.message if error.message.startswith(where) else f"{where}: {error.message}"
            self._broken(text, error.hint)
            return None
        name = store.file_name({**who, "shape": measure.shape}, self.data.feature_files)
        frames, height, width = measure.shape
        given = {k: v for k, v in record.extra.items() if k not in ("captions", "given")}
        row = {
            **given, "cap": list(record.extra["captions"]), "file": name, "sample_size": f"{frames}x{height}x{width}",
            "sample_num_frames": frames, "record": number, "dataset": dataset,
        }  # fmt: skip
        return _Job(number, record, measure, self.directory / name, row)

    def _broken(self, text: str, hint: str) -> None:
        if self.data.on_error == "fail":
            raise PolymodalError(
                text,
                f"{hint} Or set data.on_error to skip: what is broken is then named and left out.".strip(),
            )
        self.done.broken.append(text)

    def _make(self, jobs: list[_Job], pool: ThreadPoolExecutor, advance: Any) -> set[int]:
        """Encode jobs, bucket by bucket; returns the numbers of those whose medium turned out to be broken."""
        failed: set[int] = set()
        unique: dict[Path, _Job] = {}
        for job in jobs:  # the same medium and captions twice are one file
            unique.setdefault(job.path, job)
        order = sorted(unique.values(), key=lambda job: job.measure.shape)
        ahead = max(self.batch * 2, 4)
        decoding: dict[int, Future] = {}

        def look_ahead(at: int) -> None:
            for job in order[at : at + ahead]:
                if job.number not in decoding:
                    decoding[job.number] = pool.submit(self._decode, job)

        at = 0
        while at < len(order):
            look_ahead(at)
            group = [j for j in order[at : at + self.batch] if j.measure.shape == order[at].measure.shape]
            ready: list[_Ready] = []
            for job in group:
                try:
                    ready.append((job, *decoding[job.number].result()))
                except PolymodalError as error:
                    self._broken(error.message, error.hint)
                    failed.add(job.number)
            look_ahead(at + len(group))
            if ready:
                self._encode(ready)
            for job in group:
                del decoding[job.number]
            at += len(group)
            advance(len(group))
        gone = {order_job.path for order_job in order if order_job.number in failed}
        return failed | {job.number for job in jobs if job.path in gone}

    def _hash(self, job: _Job) -> str:
        """Of the files that a sample was made of; the feature file's name changes when they do."""
        name = str(job.row["file"])
        if name not in self._hashes:
            self._hashes[name] = store.content_hash(job.record, self.family.given)
        return self._hashes[name]

    def _decode(self, job: _Job) -> tuple[Tensor, dict[str, Tensor]]:
        given = self.clips.given(job.record, job.measure)
        frames = self.clips.frames(job.record, job.measure)
        return torch.tensor(frames), {role: torch.tensor(shown) for role, shown in given.items()}

    def _encode(self, ready: list[_Ready]) -> None:
        """Through the encoders and to disk. Out of memory: a smaller batch, then tiles, then an error that says what to cut."""
        began = time.perf_counter()
        encoders = self._encoders()
        try:
            media = encoders.media([pixels for _, pixels, _ in ready], [given for _, _, given in ready])
        except torch.OutOfMemoryError:
            self._relieve(ready)
            return
        for i, (job, pixels, _) in enumerate(ready):
            captions = [self._text(c, pixels) for c in job.record.extra["captions"]]
            names = self.family.documented if job.path.suffix == ".pt" else {}
            store.write_sample(job.path, {n: t[i].cpu() for n, t in media.items()}, captions, names)
            self.done.made += 1
            self.done.frames += job.measure.shape[0]
        self.done.encoding += time.perf_counter() - began

    def _relieve(self, ready: list[_Ready]) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        vae = self._encoders().pipeline.vae
        if len(ready) > 1:
            self.batch = max(1, len(ready) // 2)
            print(f"out of memory: encoding {self.batch} samples at once", file=sys.stderr, flush=True)
            self._encode(ready[: self.batch])
            self._encode(ready[self.batch :])
        elif not getattr(vae, "use_tiling", True):
            vae.enable_tiling()
            print("out of memory: encoding in tiles", file=sys.stderr, flush=True)
            self._encode(ready)
        else:
            frames, height, width = ready[0][0].measure.shape
            raise PolymodalError(
                f"One sample of {frames} frames of {height} x {width} does not fit the device, even in tiles.",
                "Lower data.clip.pixels or data.clip.frames, or start fewer processes on a device.",
            )

    def _text(self, caption: str, pixels: Tensor) -> dict[str, Tensor]:
        if self.family.sees:
            return {n: t[0].cpu() for n, t in self._encoders().text([caption], pixels[None]).items()}
        if caption not in self._texts:
            if len(self._texts) > 512:
                self._texts.clear()
            self._texts[caption] = {n: t[0].cpu() for n, t in self._encoders().text([caption]).items()}
        return self._texts[caption]

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Any]:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(file=sys.stderr)
        with Progress(
            console=console, transient=True, disable=self.rt.rank != 0 or not console.is_terminal
        ) as bar:
            task = bar.add_task(f"Encoding {self.section}", total=total)
            yield lambda count: bar.advance(task, count)
