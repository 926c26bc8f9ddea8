"""Where a run's weights come from: model.source, random values, or whatever checkpoint.init_from names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint
from polymodal.models import catalog, lora, quantised, storage, weights
from polymodal.models.family import Family
from polymodal.recipe import Recipe
from polymodal.runtime.process_group import Runtime
from polymodal.train.parallel_model import ParallelModel


class StartingWeights:
    """Loads values into the parts of a ParallelModel. Every method is collective."""

    def __init__(self, model: ParallelModel, family: Family, recipe: Recipe, device: torch.device):
        self.model, self.family, self.recipe, self.device = model, family, recipe, device
        self.offloaded = "parameters" in recipe.parallel.offload

    def load_source(self) -> None:
        """model.source, or random values for model.init = random; then fresh adapters."""
        settings, seed = self.recipe.model, self.recipe.train.seed

        def load(part: nn.Module) -> None:
            if settings.init == "random":
                weights.initialise(part, self.family, seed, self.device, self.offloaded)
            else:
                weights.load(part, self.family, device=self.device, offloaded=self.offloaded)
            if settings.lora is not None:
                lora.initialise(part, settings.lora, seed)

        self.model.load_all(load)

    def load_init_from(self, rt: Runtime, group: dist.ProcessGroup | None) -> None:
        """checkpoint.init_from: a hub checkpoint, an adapter, another system's checkpoint or one of a run."""
        path = Path(str(self.recipe.checkpoint.init_from))
        if catalog.is_whole(path):
            self._load_files(str(path))
        elif lora.is_adapter(path):
            self.model.load_all(lambda part: lora.load(part, self.recipe.model.lora, path, self.family))
        elif not checkpoint.at(path) and (files := self._foreign(path)) is not None:
            self._load_files(None, files=files)
        else:
            self._load_run(path, rt, group)

    def _load_files(self, source: str | None, **options: Any) -> None:
        options |= {"device": self.device, "offloaded": self.offloaded}
        self.model.load_all(lambda part: weights.load(part, self.family, source, **options))

    def _foreign(self, path: Path) -> Any:
        return storage.foreign(path, weights.directory_of(None, self.family))

    def _load_run(self, path: Path, rt: Runtime, group: dist.ProcessGroup | None) -> None:
        """The weights of a checkpoint, also under adapters, which rename the parameters below them."""
        directory = checkpoint.agreed(rt, lambda: checkpoint.locate(path))
        assert directory is not None
        stored = checkpoint.names(directory)
        known = {f"model.{name}" for n in self.model.names for name in (n, weights.plain(n))}
        unknown = sorted(k for k in stored if k.startswith("model.") and k not in known)
        if unknown or not known & stored:
            raise PolymodalError(
                f"checkpoint.init_from: {directory} has {len(unknown)} tensors that this model does not have "
                f"(first: {unknown[0][6:] if unknown else 'none fits'}).",
                "A run with adapters starts only runs with model.lora; otherwise export it with --merge-lora "
                "and start from the export.",
            )
        low = {name for model in self.model.models for name in quantised.layers(model)}
        if any(f"model.{name}" in stored for name in low):
            raise PolymodalError(
                f"checkpoint.init_from = {path} is a run of whole weights, which model.base = "
                f"{self.recipe.model.base} quantises only as files are read.",
                "Export it and name the export in model.source.",
            )
        own = {f"model.{name}": p for n, p in self.model.all.items() for name in (n, weights.plain(n))}
        checkpoint.load(directory, {k: p for k, p in own.items() if k in stored}, group)
        self.model.after_load()
