"""The reference: the model with its adapters off, a frozen copy, or a table on disk.

It gives what the objective compares, log-probabilities of whole answers or errors of noised samples, computed
by the same forward and layout as those of the policy: where both have the same weights they are equal.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import written_whole
from polymodal.core.sample import Batch
from polymodal.core.terminal import say
from polymodal.data.schedule import Position
from polymodal.distributed import checkpoint
from polymodal.distributed.mesh import Mesh
from polymodal.models import catalog
from polymodal.models.card import Output
from polymodal.models.storage import Files, write_file
from polymodal.models.weights import directory_of
from polymodal.objectives.preference import reference_by_adapters, reference_of
from polymodal.recipe import Recipe
from polymodal.runtime.process_group import Runtime
from polymodal.train.parallel_model import ParallelModel, meta_model
from polymodal.train.starting_weights import StartingWeights

VERSION = 1  # of the table: part of its fingerprint


@contextlib.contextmanager
def adapters_off(models: Sequence[nn.Module]) -> Iterator[None]:
    """The models as they are without their adapters. peft's own switch would also freeze the adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Actors:
    """The models that an objective's `prepare` asks, besides the one that it trains.

    shard: the layout's BatchSharding; encoders: frozen ones that make the batches' tensors, or None. Every
    method is collective.
    """

    def __init__(
        self,
        policy: ParallelModel,
        recipe: Recipe,
        mesh: Mesh,
        device: torch.device,
        shard: Callable[[Sequence[Batch]], list[Batch]],
        layout: Any,
        encoders: Any = None,
    ):
        self.encoders = encoders
        self.model, self.recipe, self.mesh, self.device = policy, recipe, mesh, device
        self.shard, self.layout = shard, layout
        self.reference_path = reference_of(recipe)
        self.copy: ParallelModel | None = None
        self.table: dict[str, dict[int, Tensor]] | None = None
        self.section = "datasets"

    # ---------------------------------------------------------------- what the objective asks

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """Offloaded encoders are on the device while inside."""
        return contextlib.nullcontext() if self.encoders is None else self.encoders.on_device()

    def encode(self, batch: Batch) -> Batch:
        """Pixels and captions through the frozen encoders, where there are any."""
        return batch if self.encoders is None else self.encoders.encode(batch)

    def policy(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What is compared of each batch (log-probabilities [S] of its sequences, errors [B] of its samples),
        on the host."""
        return self._compared(self.model, batches)

    def reference(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Those of the reference."""
        if self.table is None:
            return self._live(batches)
        known, out = self.table[self.section], []
        for batch in batches:
            lengths = batch.groups.get("sequences", ((1,),) * len(batch.samples))
            parts = [
                known.get(id, torch.zeros(len(own)))[: len(own)]
                for id, own in zip(batch.samples, lengths, strict=True)
            ]
            out.append(torch.cat(parts))
        return out

    def mean(self, total: Tensor) -> float:
        """total [2]: a sum and a count of this rank's data -> their quotient over all ranks."""
        if self.mesh.sizes.dp > 1:
            dist.all_reduce(total, group=self.mesh.dp_group)
        return float(total[0] / total[1].clamp_min(1))

    def _live(self, batches: Sequence[Batch]) -> list[Tensor]:
        if self.copy is not None:
            return self._compared(self.copy, batches)
        off = (
            adapters_off(self.model.models)
            if reference_by_adapters(self.recipe)
            else contextlib.nullcontext()
        )
        with off:
            return self._compared(self.model, batches)

    def _compared(self, model: ParallelModel, batches: Sequence[Batch]) -> list[Tensor]:
        training = [each.training for each in model.models]
        model.train(False)
        try:
            logs = model.runner.step(self.shard(batches), self._finish, backward=False)
        finally:
            for each, mode in zip(model.models, training, strict=True):
                each.train(mode)
        return [self._own(entry["values"].cpu(), batch) for entry, batch in zip(logs, batches, strict=True)]

    def _finish(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        values = self.layout.objective.compared(output, batch)
        return values.sum(), {"values": values}

    def _own(self, values: Tensor, batch: Batch) -> Tensor:
        """Without the segment more of a stream that was padded for context parallelism."""
        return values[: len(batch.segments["text"]) - 1 if batch.segments else None]

    # ---------------------------------------------------------------- where the reference comes from

    def start(self, rt: Runtime, group: dist.ProcessGroup | None, load_start: Callable[[], None]) -> None:
        """Load what is needed: the table, or the frozen copy; before a checkpoint is resumed.

        load_start: fills the policy with the values that the run starts from, of which a table is made."""
        own = self.reference_path is None
        if not self.recipe.train.preference.cache_reference:
            if not reference_by_adapters(self.recipe):
                self.copy = self._frozen(rt, group)
            return
        files = {section: self._file(section) for section in ("datasets", "validation") if self._has(section)}
        if rt.any_rank(not all(file.is_file() for file in files.values()))[0]:
            if own:
                load_start()
            else:
                self.copy = self._frozen(rt, group)
            for section, file in files.items():
                self._make(section, file, rt)
            self.copy = None
        self.table = {section: _read(file) for section, file in files.items()}

    def _has(self, section: str) -> bool:
        return bool(getattr(self.recipe.data, section))

    def _frozen(self, rt: Runtime, group: dist.ProcessGroup | None) -> ParallelModel:
        """The reference model: laid out like the policy, nothing of it trained."""
        recipe, path = self.recipe, self.reference_path
        if path is not None and catalog.is_whole(path):
            model = recipe.model.model_copy(
                update={"source": path, "revision": None, "init": "pretrained", "lora": None, "base": "bf16"}
            )
            start = recipe.checkpoint.model_copy(update={"init_from": None})
            recipe = recipe.model_copy(update={"model": model, "checkpoint": start})
        elif path is not None:
            start = recipe.checkpoint.model_copy(update={"init_from": path})
            recipe = recipe.model_copy(update={"checkpoint": start})
        family = catalog.family(recipe.model)
        if family.card is not self.layout.family.card:
            raise PolymodalError(
                f"The reference {path} (train.preference.reference, train.grpo.reference) is "
                f"{family.card.name}, the model is {self.layout.family.card.name}: they are not compared.",
                "Name a checkpoint of the same model.",
            )

        def make() -> nn.Module:
            return meta_model(family, recipe).requires_grad_(False)

        made = ParallelModel(make, family, self.mesh, recipe, self.device)
        weights = StartingWeights(made, family, recipe, self.device)
        weights.load_source()
        if recipe.checkpoint.init_from:
            weights.load_init_from(rt, group)
        for parameter in made.all.values():
            parameter.requires_grad_(False)
        made.train(False)
        return made

    # ---------------------------------------------------------------- the table

    def _file(self, section: str) -> Path:
        """The table of a section of data: its name has all that the values depend on."""
        recipe = self.recipe
        feed = self.layout.feed(section, self.mesh.rank, once=True)
        path = self.reference_path
        start = [recipe.model.source, recipe.checkpoint.init_from] if path is None else [path]
        places = [_weights(p) for p in start if p is not None]
        if path is None and recipe.model.init == "random":
            places = [f"random {recipe.train.seed}"]
        state = (
            VERSION,
            feed.schedule.index.key,
            recipe.data.max_length,
            recipe.train.precision,
            recipe.model.config,
            places,
        )
        digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
        return recipe.run_dir / f"reference-{section}-{digest}.safetensors"

    def _make(self, section: str, file: Path, rt: Runtime) -> None:
        feed = self.layout.feed(section, self.mesh.rank, once=True)
        steps = feed.schedule.steps_in_epoch(0)
        if rt.rank == 0:
            say(f"computing the reference's log-probabilities of data.{section}: {steps} batches")
        own: dict[int, Tensor] = {}
        ranks = {"dp_rank": self.mesh.dp_rank, "dp_size": self.mesh.sizes.dp}
        loader = feed.loader(start=Position(0, 0, 0), stop_after=steps, device=self.device, **ranks)
        try:
            for step in loader:
                for batch, sums in zip(step.micro_batches, self._live(step.micro_batches), strict=True):
                    lengths = batch.groups.get("sequences", ((1,),) * len(batch.samples))
                    parts = sums.split([len(each) for each in lengths])
                    own |= dict(zip(batch.samples, parts, strict=True))
        finally:
            loader.close()
        everyone: list[Any] = [own]
        if self.mesh.sizes.dp > 1:
            everyone = [None] * self.mesh.sizes.dp
            dist.all_gather_object(everyone, own, group=self.mesh.dp_group)
        if rt.rank == 0:
            _write(file, {id: part for each in everyone for id, part in each.items() if id >= 0})
        rt.any_rank(False)  # it is written before anyone reads it


def _write(file: Path, values: Mapping[int, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    ids = sorted(values)
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int64),
        "counts": torch.tensor([len(values[id]) for id in ids], dtype=torch.int64),
        "log_probs": torch.cat([values[id] for id in ids]),
    }
    with written_whole(file) as temporary:
        write_file(tensors, temporary)


def _read(file: Path) -> dict[int, Tensor]:
    stored = Files(file.parent, (file.stem,))
    ids, counts, values = (stored.whole(name) for name in ("ids", "counts", "log_probs"))
    return dict(zip(ids.tolist(), values.split(counts.tolist()), strict=True))


def _weights(source: str) -> str:
    """What tells a checkpoint's weights from others: its files' names and sizes, and the ends of each."""
    place = Path(source)
    place = (checkpoint.locate(place) if checkpoint.at(place) else place) if place.exists() else place
    place = place if place is not None and place.exists() else directory_of(source, None)
    digest = hashlib.sha256()
    for file in sorted(
        f for f in place.rglob("*") if f.is_file() and f.suffix in (".safetensors", ".distcp", ".bin")
    ):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(1 << 16))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read())
    return digest.hexdigest()
