"""What a model is to the rest of the program: Family, the few calls that differ between models.

A model's own file holds one ModelCard of facts (card.py) and, where a fact is not enough, a Family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, MediaProcessor, MediaStream, SampleLengths
from polymodal.models import partial
from polymodal.models.card import Components, ModelCard, Output

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


class Family:
    """The calls that differ between families. One instance a run; holds the config and the card, no weights."""

    layout: Literal["packed", "padded", "uniform"] = "packed"
    streams: tuple[MediaStream, ...] = ()  # what its towers read
    line: str = ""  # what several cards have in common, as the directory of their recipes is called

    def __init__(self, card: ModelCard, config: Any, source: str):
        self.card = card
        self.config = config
        self.source = source

    # What lies in a checkpoint's directory, where the library cannot tell

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        """The library's config of a checkpoint. Raises OSError, ValueError, KeyError, TypeError."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(directory, trust_remote_code=trust)

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        """config.json in the layout of the source `origin`."""
        config.save_pretrained(str(directory))

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        """The library's processor of a checkpoint, or its tokenizer. Raises OSError, ValueError, KeyError,
        TypeError."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(directory, trust_remote_code=trust)

    @classmethod
    def write_processor(cls, processor: Any, directory: Path) -> None:
        """The library's processor into a checkpoint's directory, in its layout, in place of what is there."""
        for name in PROCESSOR_FILES:
            (directory / name).unlink(missing_ok=True)
        processor.save_pretrained(str(directory))

    @classmethod
    def tensor_names(cls, directory: Path) -> list[Any] | None:
        """Of files whose layout the library does not know: the rules (its WeightRenaming and WeightConverter)
        that make its parameters of them, and can be reverted; in place of its own rules of this model. None:
        it knows."""
        return None

    def limit_media(self, processor: Any, data: Any) -> bool:
        """Put the recipe's pixel limits into the library's processor. False: they are its smallest and
        largest size, as shortest_edge and longest_edge."""
        return False

    # The model

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
