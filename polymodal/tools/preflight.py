"""Everything that `train` would refuse, found before anything is started; and a dry pass over model and data.

`refuse` is the quick part that `train` itself runs first; `check` does all of it and lists every problem, not
only the first.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.core.text import format_bytes
from polymodal.recipe import Dataset, Recipe
from polymodal.runtime import environment, host

if TYPE_CHECKING:
    from polymodal.train.layouts import DataFacts

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
        """Raise what was collected: one error itself, several numbered."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise PolymodalError(numbered(f"{len(self.errors)} problems:", self.errors))


def numbered(head: str, problems: Iterable[object]) -> str:
    return "\n".join([head, *(f"{i}. {problem}" for i, problem in enumerate(problems, 1))])


# ---- what needs no model ---------------------------------------------------------------------------


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
    from polymodal.train import callbacks, optim

    data, profile = recipe.data, recipe.monitor.profile
    problems.run(ParallelSizes.of, recipe.parallel, world)
    for name, value in recipe.device.env.items():
        problems.run(environment.check, name, value)
    if not data.datasets and data.features is None:
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
    template = data.chat_template
    if template is not None and not os.path.isfile(os.path.expanduser(template)):
        problems.add(
            f"data.chat_template = {template}: the file does not exist.",
            "Check the path, or leave it out: the checkpoint's is used.",
        )
    length = data.pack_length or data.max_length
    if data.pack and length < data.max_length:
        problems.add(
            f"data.pack_length = {length} is smaller than data.max_length = {data.max_length}: "
            "a sample could be longer than its pack.",
            f"Raise data.pack_length to {data.max_length}, or lower data.max_length.",
        )
    for tracker in recipe.monitor.trackers:
        if importlib.util.find_spec(tracker) is None:
            problems.add(
                f"monitor.trackers names {tracker}, which is not installed.",
                f"Run `pip install polymodal[{tracker}]`, or remove it.",
            )
    absent = [rank for rank in profile.ranks if not 0 <= rank < world] if profile is not None else []
    if absent:
        problems.add(
            f"monitor.profile.ranks names {absent[0]}, and there are ranks 0 to {world - 1}.",
            "Name ranks of the run.",
        )
    problems.run(callbacks.load, recipe.train.callbacks)
    if recipe.optim.name not in optim.OWN:
        problems.run(optim.named_class, recipe.optim)
    elif recipe.optim.arguments:
        problems.add(
            f"optim.arguments are of a module:Class, and optim.name is {recipe.optim.name}.",
            "Leave them out, or name the class in optim.name.",
        )
    _check_start(recipe, problems)
    problems.run(host.require_writable, recipe.run_dir)


def _check_start(recipe: Recipe, problems: Problems) -> None:
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


# ---- what needs the config -------------------------------------------------------------------------


def family_of(recipe: Recipe, world: int, problems: Problems) -> Any:
    """The family, with the layout held against the card and the config. None when the source is refused."""
    from polymodal.distributed.mesh import ParallelSizes
    from polymodal.models import catalog
    from polymodal.parallel import apply as parallel
    from polymodal.parallel import pipeline_split
    from polymodal.train.layouts import layout_of

    family = problems.run(lambda: catalog.family(recipe.model))
    if family is None:
        return None
    layout = layout_of(recipe, family)
    problems.run(lambda: layout.objective)
    try:
        sizes = ParallelSizes.of(recipe.parallel, world)
    except PolymodalError:  # a problem already
        return family
    if sizes.pp > 1 and "pp" not in family.card.limits:
        if recipe.evaluate.samples.prompts:
            problems.add(
                "evaluate.samples needs the whole model on every rank, a pipeline has a part on each.",
                "Set parallel.pp to 1, or sample from the checkpoints with `polymodal generate`.",
            )
        problems.run(
            pipeline_split.check_micro_batches, recipe.parallel, recipe.train, layout.packs, sizes.dp
        )
    problems.errors += parallel.check(family.card, family.config, sizes, recipe.parallel, recipe.model)
    towers = family.card.towers
    for name in (recipe.model.lora.towers or ()) if recipe.model.lora is not None else ():
        if name not in towers:
            problems.add(
                f"model.lora.towers: {family.card.name} has no tower `{name}`.",
                f"Its towers: {', '.join(towers)}.",
            )
    return family


def refuse(recipe: Recipe, world: int) -> None:
    """The quick part, in seconds: raises all problems of paths, sizes, names and the checkpoint's config at
    once."""
    problems = Problems()
    static(recipe, world, problems)
    family_of(recipe, world, problems)
    problems.raise_all()


# ---- the dry pass ----------------------------------------------------------------------------------


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


def check(
    recipe: Recipe, world: int | None = None, measure_data: bool = True, progress: Any = None
) -> Report:
    """All of it. The report's `problems` holds every sentence that `train` would stop with; nothing is
    raised."""
    from polymodal.distributed.mesh import ParallelSizes
    from polymodal.train.layouts import layout_of

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
                f"train.global_batch_size = {recipe.train.global_batch_size} is less than the {sizes.dp} "
                "ranks that see different data: some idle in every step."
            )
    units: dict[str, float] = {}
    mean_sample = None
    if family is not None and measure_data:
        layout = layout_of(recipe, family)
        report.data, schedule = layout.facts("datasets", problems.run, progress)
        if schedule is not None:
            mean_sample = schedule.mean_sample()
            _run_length(recipe, schedule, sizes, report)
        report.notes += report.data.notes if report.data is not None else []
        if recipe.data.validation:
            report.validation, _ = layout.facts("validation", problems.run, progress)
        if report.data is not None and report.data.tokens:
            units = {name: total / report.data.tokens for name, total in report.data.media.items()}
    if family is not None:
        _model(recipe, family, world, units, mean_sample, report, problems)
    report.problems = [str(error) for error in problems.errors]
    return report


def _run_length(recipe: Recipe, schedule: Any, sizes: Any, report: Report) -> None:
    """Steps of the run, and a note when they are too few."""
    from polymodal.train import run_length

    report.steps = recipe.train.steps or schedule.steps_in(recipe.train.epochs)
    note = run_length.warning(recipe, schedule, report.steps, sizes.dp if sizes is not None else 1)
    report.notes += [note] if note else []


def _model(
    recipe: Recipe,
    family: Any,
    world: int,
    units: Mapping[str, float],
    mean_sample: Any,
    report: Report,
    problems: Problems,
) -> None:
    """The layout tried on meta, memory and disk. units: patches and frames a token of the data, by stream."""
    from polymodal.distributed.mesh import ParallelSizes
    from polymodal.plan import estimate, pretended, shape
    from polymodal.train.layouts import layout_of
    from polymodal.train.parallel_model import meta_model

    report.model = {"card": family.card.name, "source": str(family.source)}
    towers = set(recipe.model.lora.towers or ()) if recipe.model.lora is not None else set()
    model = None
    if towers <= set(family.card.towers):  # others are a problem already
        model = problems.run(meta_model, family, recipe)
    if model is None:
        return
    report.notes += _groups_without_effect(recipe, family, model)
    counted = shape.shape_of(family, model)
    problems.run(pretended.try_layout, family, recipe, world, mean_sample)
    sizes = problems.run(ParallelSizes.of, recipe.parallel, world)
    layout = layout_of(recipe, family)
    load = problems.run(estimate.workload, layout, units)
    if load is None or sizes is None:
        return
    found = estimate.Formula(counted, recipe, sizes, load, layout.packs).memory()
    report.estimate = found.as_dict()
    needed, free = estimate.disk(recipe, found)
    report.disk = {"wanted": needed, "free": free, "one": found.checkpoint}
    if needed > free:
        problems.add(
            f"Checkpoints of this run take up to {format_bytes(needed)} ({recipe.checkpoint.keep} kept and "
            f"one being written), the disk of {recipe.run_dir} has {format_bytes(free)} free.",
            "Free some, lower checkpoint.keep, set checkpoint.save to weights, or checkpoint.dir to another "
            "disk.",
        )


def _groups_without_effect(recipe: Recipe, family: Any, model: Any) -> Iterator[str]:
    """A note for each of optim.groups that matches no trained parameter."""
    from polymodal.train import optim

    towers = family.card.towers
    for i, group in enumerate(recipe.optim.groups):
        matching = [p for name, p in model.named_parameters() if optim.matches(name, group.match, towers)]
        if any(parameter.requires_grad for parameter in matching):
            continue
        why = "matches only frozen parameters"
        if not matching:
            why = f"is neither a tower ({', '.join(towers)}) nor the pattern of a parameter"
        yield f"optim.groups.{i}.match = {group.match} {why}: it has no effect."


def show(recipe: Recipe, out: Path, samples: int, seed: int) -> int:
    """`polymodal data show`: a page of samples as the model meets them. Needs the checkpoint's config, not
    its weights."""
    from polymodal.data.source import open_corpus
    from polymodal.models import catalog
    from polymodal.models.diffusion import Generation
    from polymodal.tools import data_show as page
    from polymodal.train.layouts import layout_of
    from polymodal.train.layouts.uniform import captioned, clips_of

    family = catalog.family(recipe.model.model_copy(update={"init": "random"}))
    layout: Any = layout_of(recipe, family)
    if layout.compares and isinstance(family, Generation):
        corpus = open_corpus(captioned(layout.datasets("datasets"), recipe), recipe.data.attr)
        chosen = page.show_pairs(corpus, clips_of(recipe, family), str(out), samples, seed)
    else:
        chat, corpus = layout.processor(), layout.corpus(layout.datasets("datasets"), recipe.data)
        chosen = page.show(corpus, chat, str(out), samples, seed)
    say(f"{out}: {len(chosen)} of {len(corpus)} samples")
    return 0
