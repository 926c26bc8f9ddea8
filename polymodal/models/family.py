"""What a model is to the rest of the program: Family, the few calls that differ between models.

A model's own file holds one ModelCard of facts (card.py) and, where a fact is not enough, a Family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, MediaProcessor, MediaStream, SampleLengths
from polymodal.models import partial
from polymodal.models.card import Components, ModelCard, Output


class Family:
    """The calls that differ between families. One instance a run; holds the config and the card, no weights."""

    layout: Literal["packed", "padded", "uniform"] = "packed"
    streams: tuple[MediaStream, ...] = ()  # what its towers read
    line: str = ""  # what several cards have in common, as the directory of their recipes is called

    def __init__(self, card: ModelCard, config: Any, source: str):
        self.card = card
        self.config = config
        self.source = source

    def build(self) -> Components:
        """The model on the meta device, parameters float32, attention set to the house's own."""
        raise NotImplementedError

    def media_processor(self, data: Any) -> MediaProcessor:
        """Knowledge of tokens and pixels; `data` is the recipe's data section."""
        raise NotImplementedError

    def cost(self, measure: SampleLengths) -> float:
        """Forward FLOPs of one sample on the whole model; balance, MFU and plan share it."""
        return sum(self.costs(measure).values())

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        """The whole model on a batch, by its own forward. What `stage` cuts, unless a family cuts itself."""
        raise NotImplementedError

    def stage(self, model: nn.Module, carry: Any, batch: Batch) -> Any:
        """One pipeline stage: carry (None on the first) -> carry, or Output on the last. Without a pipeline, all.

        By default the model's own forward between the blocks that are here, as the card's chain says.
        """
        return partial.stage(self, model, carry, batch)

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """What travels over a cut for such a batch: meta tensors in wire order.

        before: how many blocks of each chain lie before the cut; dtype: of the activations. What the batch holds or
        can tell need not travel: every stage has the batch. By default the stream and what the card's chain carries.
        """
        return partial.carry_spec(self, batch, dtype)

    def stage_neighbours(self) -> dict[str, str]:
        """Modules that lie in a pipeline stage with a certain block, as the config says: module -> block."""
        return {}

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs of one sample, by the module pattern that spends them; their sum is `cost`."""
        raise NotImplementedError

    def example(self, measure: SampleLengths) -> Batch:
        """A micro-batch of one sample of these sizes, without data: what `plan` runs. Floating-point tensors are zeros."""
        raise NotImplementedError

    def balance(self, weight: float | None) -> dict[str, Any]:
        """Arguments of the objective's router term: {} without experts; weight None = the checkpoint's own."""
        return {}

    def routers(self) -> tuple[int, int]:
        """Layers with experts, and experts of each; (0, 0) without any."""
        return 0, 0
