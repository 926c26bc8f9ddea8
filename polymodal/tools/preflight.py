"""Everything that `train` would refuse, found before anything is started; and a dry pass over model and data.

Sees what the trainer sees. `refuse` is the quick part that `train` itself runs first; `check` does all of it and
lists every problem, not only the first.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from polymodal.core.errors import PolymodalError
from polymodal.recipe import Dataset, Recipe
from polymodal.runtime import device, host

T = TypeVar("T")


class Problems:
    """Collects what is wrong; `run` goes on after an error."""

    def __init__(self) -> None:
        self.errors: list[PolymodalError] = []

    def add(self, message: str, hint: str = "") -> None:
        self.errors.append(PolymodalError(message, hint))

    def run(self, action: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return action(*arguments)
        except PolymodalError as error:
            if str(error) not in map(str, self.errors):
                self.errors.append(error)
            return None

    def raise_all(self) -> None:
        """Nothing when there is nothing; the error itself when it is one; else all of them, numbered."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise PolymodalError(
                "\n".join(
                    [
                        f"{len(self.errors)} problems:",
                        *(f"{i}. {error}" for i, error in enumerate(self.errors, 1)),
                    ]
                )
            )


# ---- what needs no model --------------------------------------------------------------------------------------------


def _datasets(recipe: Recipe) -> Iterator[tuple[str, Dataset]]:
    for i, dataset in enumerate(recipe.data.datasets):
        yield f"data.datasets.{i}", dataset
    for i, dataset in enumerate(recipe.data.validation):
        yield f"data.validation.{i}", dataset


def needs(recipe: Recipe) -> int:
    """The least number of processes that the layout can have."""
    parallel = recipe.parallel
    return parallel.pp * parallel.dp_replicate * max(1, parallel.dp_shard) * parallel.cp * parallel.tp


def static(recipe: Recipe, world: int, problems: Problems) -> None:
    """Sizes, paths, names of packages, environment variables, the output directory."""
    from polymodal.data.source import check_path
    from polymodal.distributed.mesh import ParallelSizes

    problems.run(ParallelSizes.of, recipe.parallel, world)
    for name, value in recipe.device.env.items():
        problems.run(device.checked_variable, name, value)
    if not recipe.data.datasets and recipe.data.features is None:
        problems.add(
            "The recipe has no data.datasets.", "Add at least one, e.g. data.datasets: [{path: train.json}]."
        )
    for key, dataset in _datasets(recipe):
        problems.run(check_path, dataset, f"{key}.path")
        if dataset.media_dir is not None and not os.path.isdir(os.path.expanduser(dataset.media_dir)):
            problems.add(
                f"{key}.media_dir = {dataset.media_dir}: the directory does not exist.",
                f"Paths start from the working directory, {os.getcwd()}.",
            )
    if recipe.data.chat_template is not None and not os.path.isfile(
        os.path.expanduser(recipe.data.chat_template)
    ):
        problems.add(
            f"data.chat_template = {recipe.data.chat_template}: the file does not exist.",
            "Check the path, or leave it out: the checkpoint's is used.",
        )
    length = recipe.data.pack_length or recipe.data.max_length
    if recipe.data.pack and length < recipe.data.max_length:
        problems.add(
            f"data.pack_length = {length} is smaller than data.max_length = {recipe.data.max_length}: a sample could be longer than its pack.",
            f"Raise data.pack_length to {recipe.data.max_length}, or lower data.max_length.",
        )
    for tracker in recipe.monitor.trackers:
        if importlib.util.find_spec(tracker) is None:
            problems.add(
                f"monitor.trackers names {tracker}, which is not installed.",
                f"Run `pip install polymodal[{tracker}]`, or remove it.",
            )
    profile = recipe.monitor.profile
    absent = [rank for rank in profile.ranks if not 0 <= rank < world] if profile is not None else []
    if absent:
        problems.add(
            f"monitor.profile.ranks names {absent[0]}, and there are ranks 0 to {world - 1}.",
            "Name ranks of the run.",
        )
    _starts(recipe, problems)
    problems.run(lambda: host.require_writable(recipe.run_dir))


def _starts(recipe: Recipe, problems: Problems) -> None:
    """Where weights and state come from, besides model.source."""
    from polymodal.distributed import checkpoint
    from polymodal.models import catalog, lora

    chosen = recipe.checkpoint.resume
    if chosen not in ("auto", "never"):
        problems.run(lambda: checkpoint.locate(chosen))
    origin = recipe.checkpoint.init_from
    if origin is not None and not catalog.is_whole(origin) and not lora.is_adapter(origin):
        if checkpoint.at(origin) is None:
            problems.run(lambda: _foreign(recipe, Path(origin)) or checkpoint.locate(origin))


def _foreign(recipe: Recipe, origin: Path) -> bool:
    """Whether weights come from another system's checkpoint; its tensors are named and counted, not read."""
    from polymodal.models import catalog, storage, weights

    if not storage.READERS or not origin.is_dir():
        return False
    return storage.foreign(origin, weights.directory_of(None, catalog.family(recipe.model))) is not None


# ---- what needs the config ------------------------------------------------------------------------------------------


def family_of(recipe: Recipe, world: int, problems: Problems) -> Any:
    """The family, with the layout held against the card and the config. None when the source is refused."""
    from polymodal.distributed.mesh import ParallelSizes
    from polymodal.models import catalog
    from polymodal.parallel import apply as layout
    from polymodal.parallel import pipeline_split

    family = problems.run(lambda: catalog.family(recipe.model))
    if family is None:
        return None
    try:
        sizes = ParallelSizes.of(recipe.parallel, world)
    except PolymodalError:  # said already
        return family
    if sizes.pp > 1 and "pp" not in family.card.limits:
        packed = recipe.data.pack and family.layout == "packed"
        if recipe.evaluate.samples.prompts:
            problems.add(
                "evaluate.samples needs the whole model on every rank, a pipeline has a part on each.",
                "Set parallel.pp to 1, or sample from the checkpoints with `polymodal generate`.",
            )
        problems.run(pipeline_split.check_micro_batches, recipe.parallel, recipe.train, packed, sizes.dp)
    problems.errors += layout.check(
        family.card, family.config, sizes, recipe.parallel, recipe.model.attention
    )
    towers = family.card.towers
    for name in (recipe.model.lora.towers or ()) if recipe.model.lora is not None else ():
        if name not in towers:
            problems.add(
                f"model.lora.towers: {family.card.name} has no tower `{name}`.",
                f"Its towers: {', '.join(towers)}.",
            )
    return family


def refuse(recipe: Recipe, world: int) -> None:
    """The quick part, in seconds: raises all problems of paths, sizes, names and the checkpoint's config at once."""
    problems = Problems()
    static(recipe, world, problems)
    family_of(recipe, world, problems)
    problems.raise_all()


# ---- the dry pass ---------------------------------------------------------------------------------------------------


@dataclass
class DataFacts:
    """What one section of data comes to."""

    rows: int
    usable: int
    parts: list[dict[str, Any]]
    dropped: dict[str, dict[str, Any]]  # reason -> {"count", "first": places}
    tokens: int  # of usable rows, each once
    trained: int
    media: dict[str, int]  # stream -> sum of its lengths
    longest: int
    histogram: list[tuple[int, int, int]]  # (from, to, rows)
    steps_per_epoch: int = 0
    packs: int = 0  # of the batches that were looked at
    fill: float = 0.0  # share of the packs' tokens that are samples
    looked_at: int = 0  # batches
    buckets: list[tuple[str, int]] = field(
        default_factory=list
    )  # of what is to be generated: (frames x height x width, rows)


@dataclass
class Report:
    """Everything that was found."""

    world: int
    sizes: dict[str, int] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None
    disk: dict[str, int] | None = None
    data: DataFacts | None = None
    validation: DataFacts | None = None
    steps: int | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def histogram(tokens: Any, longest: int, bins: int = 10) -> list[tuple[int, int, int]]:
    """Rows by length in equal bins from 1 to `longest` tokens: (from, to, rows); longer rows in one more."""
    import numpy as np

    edges = np.unique(np.linspace(0, longest, bins + 1).round().astype(int))
    counts, _ = np.histogram(np.minimum(tokens, longest), edges + 0.5)
    out = [(int(a) + 1, int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    above = int((np.asarray(tokens) > longest).sum())
    if above:
        first, last, count = out[-1]
        out[-1] = (first, last, count - above)
        out.append((longest + 1, int(np.max(tokens)), above))
    return out


def measure(
    recipe: Recipe, family: Any, datasets: list[Dataset], problems: Problems, key: str, progress: Any = None
) -> tuple[DataFacts | None, Any]:
    """Index and plan one section of data as the trainer would. (facts, schedule), None where it is refused."""
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.index import build_index
    from polymodal.data.schedule import Schedule
    from polymodal.data.source import open_corpus

    corpus = problems.run(lambda: open_corpus(datasets, recipe.data.attr, key))
    chat = problems.run(lambda: ChatProcessor(family.media_processor(recipe.data), recipe.data))
    if corpus is None or chat is None:
        return None, None
    problems.run(lambda: build_index(corpus, chat, recipe.data, progress=progress))  # what train would refuse
    lenient = recipe.data.model_copy(
        update={
            "on_error": "skip",
            "overlong": "drop" if recipe.data.overlong == "error" else recipe.data.overlong,
        }
    )
    index = problems.run(lambda: build_index(corpus, chat, lenient, progress=progress))
    if index is None:
        return None, None
    usable = index.usable
    broken = {problem.row for problem in index.problems}
    known = [i for i in range(len(index)) if i not in broken] if broken else slice(None)
    facts = DataFacts(
        rows=len(corpus), usable=int(usable.sum()), parts=[], dropped={reason: {"count": len(places), "first": places[:3]} for reason, places in index.dropped.items()},
        tokens=int(index.tokens[usable].sum(dtype="int64")), trained=int(index.trained[usable].sum(dtype="int64")), media={n: int(c[usable].sum(dtype="int64")) for n, c in index.media.items()},
        longest=int(index.tokens.max()) if len(index) else 0, histogram=histogram(index.tokens[known], recipe.data.max_length),
    )  # fmt: skip
    schedule = problems.run(lambda: Schedule(index, corpus.parts, recipe.data, recipe.train, family.cost))
    if schedule is None:
        return facts, None
    facts.parts = [
        {
            "name": share.name,
            "usable": share.usable,
            "draws": share.draws,
            "weight": part.weight,
            "repeat": part.repeat,
        }
        for share, part in zip(schedule.shares, corpus.parts, strict=True)
    ]
    facts.steps_per_epoch = schedule.steps_in_epoch(0)
    filled = 0
    for batch in schedule.batches(epochs=1):
        facts.looked_at += 1
        facts.packs += len(batch.packs)
        filled += int(sum(index.tokens[list(pack)].sum() for pack in batch.packs))
        if facts.looked_at == 200:  # enough for the share of filling
            break
    if recipe.data.pack and facts.packs:
        facts.fill = filled / (facts.packs * schedule.pack_length)
    return facts, schedule


def measure_buckets(
    recipe: Recipe, family: Any, section: Any, problems: Problems
) -> tuple[DataFacts | None, Any]:
    """The same for a model that generates: its features, or its clips when data.encode is online."""
    import numpy as np

    from polymodal.train.tasks import task_of

    task = problems.run(lambda: task_of(recipe, family))
    feed = problems.run(lambda: task.feed(section, 0)) if task is not None else None
    if feed is None:
        return None, None
    schedule, index = feed.schedule, feed.schedule.index
    usable, tokens = np.asarray(index.usable), np.asarray(index.tokens)
    facts = DataFacts(
        rows=len(usable), usable=int(usable.sum()), parts=[], dropped={}, tokens=int(tokens[usable].sum(dtype="int64")), trained=int(tokens[usable].sum(dtype="int64")),
        media={}, longest=int(tokens.max()) if len(tokens) else 0, histogram=histogram(tokens[usable], int(tokens.max()) if len(tokens) else 1),
    )  # fmt: skip
    facts.parts = [
        {"name": s.name, "usable": s.usable, "draws": s.draws, "weight": None, "repeat": 1.0}
        for s in schedule.shares
    ]
    facts.steps_per_epoch = schedule.steps_in_epoch(0)
    shapes = index.shapes() if callable(index.shapes) else index.shapes
    kinds, counts = np.unique(shapes[usable], axis=0, return_counts=True)
    facts.buckets = [
        ("x".join(map(str, kind)), int(n)) for kind, n in zip(kinds.tolist(), counts.tolist(), strict=True)
    ]
    return facts, schedule


def check(
    recipe: Recipe, world: int | None = None, measure_data: bool = True, progress: Any = None
) -> Report:
    """All of it. The report's `problems` holds every sentence that `train` would stop with; nothing is raised."""
    from polymodal.distributed.mesh import ParallelSizes

    problems = Problems()
    world = world or needs(recipe)
    report = Report(world)
    static(recipe, world, problems)
    family = family_of(recipe, world, problems)
    sizes = problems.run(lambda: ParallelSizes.of(recipe.parallel, world))
    if sizes is not None:
        report.sizes = {
            axis: getattr(sizes, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
        }
        if sizes.dp > recipe.train.global_batch_size:
            report.notes.append(
                f"train.global_batch_size = {recipe.train.global_batch_size} is less than the {sizes.dp} ranks that see different data: some idle in every step."
            )
    ratio, mean_sample = 0.0, None
    if family is not None and family.layout == "uniform":
        report.data, schedule = (
            measure_buckets(recipe, family, "datasets", problems) if measure_data else (None, None)
        )
        if schedule is not None:
            mean_sample = schedule.mean_sample()
            report.steps = recipe.train.steps or schedule.steps_in(recipe.train.epochs)
        if recipe.data.validation and measure_data:
            report.validation, _ = measure_buckets(recipe, family, "validation", problems)
    elif family is not None and measure_data and recipe.data.datasets:
        report.data, schedule = measure(
            recipe, family, recipe.data.datasets, problems, "data.datasets", progress
        )
        if schedule is not None:
            mean_sample = schedule.mean_sample()
            report.steps = recipe.train.steps or schedule.steps_in(recipe.train.epochs)
        if recipe.data.validation:
            report.validation, _ = measure(
                recipe, family, recipe.data.validation, problems, "data.validation", progress
            )
        if report.data is not None and report.data.tokens:
            ratio = report.data.media.get("vision", 0) / report.data.tokens
    if family is not None:
        _model(recipe, family, world, ratio, mean_sample, report, problems)
    report.problems = [str(error) for error in problems.errors]
    return report


def _model(
    recipe: Recipe,
    family: Any,
    world: int,
    ratio: float,
    mean_sample: Any,
    report: Report,
    problems: Problems,
) -> None:
    from polymodal.plan import estimate
    from polymodal.train import optim

    towers = set(recipe.model.lora.towers or ()) if recipe.model.lora is not None else set()
    model = (
        problems.run(lambda: estimate.meta_model(family, recipe))
        if towers <= set(family.card.towers)
        else None
    )
    report.model = {"card": family.card.name, "source": str(family.source)}
    if model is None:
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for i, group in enumerate(recipe.optim.groups):
        if not any(optim.matches(name, group.match, family.card.towers) for name in names):
            frozen = any(
                optim.matches(name, group.match, family.card.towers) for name, _ in model.named_parameters()
            )
            said = (
                "matches only frozen parameters"
                if frozen
                else f"is neither a tower ({', '.join(family.card.towers)}) nor the pattern of a parameter"
            )
            report.notes.append(f"optim.groups.{i}.match = {group.match} {said}: it has no effect.")
    found = problems.run(lambda: estimate.lay_out(model, family, recipe, world, mean_sample))
    if found is None:
        return
    found.activations, found.assumed = estimate.activations(family, recipe, ratio, world)
    report.estimate = found.as_dict()
    wanted, free = estimate.disk(recipe, found)
    report.disk = {"wanted": wanted, "free": free, "one": found.checkpoint}
    if wanted > free:
        problems.add(
            f"Checkpoints of this run take up to {host.size(wanted)} ({recipe.checkpoint.keep} kept and one being written), the disk of {recipe.run_dir} has {host.size(free)} free.",
            "Free some, lower checkpoint.keep, set checkpoint.save to weights, or checkpoint.dir to another disk.",
        )


def show(recipe: Recipe, out: Path, samples: int, seed: int) -> int:
    """`polymodal data show`: a page of samples as the model meets them. Needs the checkpoint's config, not its weights."""
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.source import open_corpus
    from polymodal.models import catalog
    from polymodal.tools import data_show as page

    family = catalog.family(recipe.model.model_copy(update={"init": "random"}))
    if family.layout != "packed":
        raise PolymodalError(
            f"{family.card.name} generates: what it learns from are pictures and clips, not tokens to be shown.",
            "`polymodal data check` looks at every row and file, `polymodal check` counts sizes and lengths.",
        )
    chat = ChatProcessor(family.media_processor(recipe.data), recipe.data)
    corpus = open_corpus(recipe.data.datasets, recipe.data.attr)
    chosen = page.show(corpus, chat, str(out), samples, seed)
    print(f"{out}: {len(chosen)} of {len(corpus)} samples")
    return 0


def main(recipe: Recipe, world: int | None = None, *, measure: bool = True, as_json: bool = False) -> int:
    """The command: prints the report; raises all problems when there are any (exit code 2)."""
    from dataclasses import asdict

    report = check(recipe, world, measure)
    if as_json:
        print(json.dumps({"ok": not report.problems, **asdict(report)}, indent=2, ensure_ascii=False))
        return 2 if report.problems else 0
    from polymodal.tools.preflight_page import show_report

    show_report(recipe, report)
    if report.problems:
        head = (
            "this recipe would not train:"
            if len(report.problems) == 1
            else f"this recipe would not train, for {len(report.problems)} reasons:"
        )
        raise PolymodalError(
            "\n".join([head, *(f"{i}. {text}" for i, text in enumerate(report.problems, 1))])
        )
    return 0
