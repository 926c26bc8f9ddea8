"""Family: the calls that differ between models. A model's file has a ModelCard (card.py) and a Family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, MediaProcessor, MediaStream, SampleLengths
from polymodal.models import partial
from polymodal.models.card import ModelCard, Output

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


class Family:
    """The calls that differ between models. One instance a run, with the config and the card, no weights."""

    layout: Literal["packed", "padded", "speech_codes", "uniform"] = "packed"
    streams: tuple[MediaStream, ...] = ()  # what its towers read
    decoders: tuple[tuple[Any, int], ...] = ()
    """Configs of decoders that run beside the language model, and the rows that each reads for one of its
    tokens."""
    beside: tuple[str, ...] = ()
    """Beginnings of names of tensors in its checkpoints that are no part of the model: exports copy them."""
    beside_files: tuple[str, ...] = ()  # files that go with these
    frozen: tuple[str, ...] = ()  # towers that are never trained
    auto = "AutoModelForImageTextToText"  # transformers' class that opens what it has no class of its own for
    line: str = ""  # of several related cards: the name of their recipes' directory
    picture_frames = 1  # as which the library's processor counts a picture against its limits of pixels
    attention = "auto"  # the recipe's model.attention
    experts = "auto"  # the recipe's model.experts

    def __init__(self, card: ModelCard, config: Any, source: str):
        self.card = card
        self.config = config
        self.source = source

    @classmethod
    def claims(cls, index: Mapping[str, Any]) -> bool:
        """Whether a pipeline of the card's class is of this family, by its model_index.json."""
        return True

    # Files of a checkpoint's directory, where the library's layout is not the only one

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        """The library's config of a checkpoint. Raises OSError, ValueError, KeyError, TypeError."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(directory, trust_remote_code=trust)

    @classmethod
    def published_config(cls, facts: Mapping[str, Any]) -> Any:
        """The library's config of a published size, of the facts in its card (Size.config)."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**facts)

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        """config.json in the layout of the source `origin`."""
        config.save_pretrained(str(directory))

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        """The library's processor of a checkpoint, or its tokenizer. Raises as read_config does."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(directory, trust_remote_code=trust)

    @classmethod
    def write_processor(cls, processor: Any, directory: Path) -> None:
        """Replace the processor's files in a checkpoint's directory, in its layout."""
        for name in PROCESSOR_FILES:
            (directory / name).unlink(missing_ok=True)
        processor.save_pretrained(str(directory))

    @classmethod
    def tensor_names(cls, directory: Path) -> list[Any] | None:
        """For files whose layout the library does not know: the rules (its WeightRenaming and
        WeightConverter) that make its parameters of them and can be reverted, in place of its own. None: its
        own."""
        return None

    @classmethod
    def read_codec(cls, directory: Path) -> Any:
        """Of models that speak: what makes sound of codes (`decode`) and codes of sound (`encode`), with
        lists of [n, K] and [samples]. Raises PolymodalError."""
        raise NotImplementedError

    def limit_media(self, processor: Any, data: Any) -> bool:
        """Set the recipe's pixel limits in the processor. False: they are shortest_edge, longest_edge."""
        return False

    @classmethod
    def picture_size(cls, processor: Any, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of a picture of this size behind the library's processor."""
        return height, width

    # The model

    def check(self) -> None:
        """Raise PolymodalError for a config (with the recipe's overrides) or files that cannot be trained."""

    def build(self) -> nn.Module:
        """The model on the meta device, parameters float32, with this project's attention."""
        raise NotImplementedError

    def media_processor(self, data: Any) -> MediaProcessor:
        """What makes tokens and pixels of samples; `data` is the recipe's data section."""
        raise NotImplementedError

    def cost(self, measure: SampleLengths) -> float:
        """Forward FLOPs of one sample on the whole model; balance, MFU and plan share it."""
        return sum(self.costs(measure).values())

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        """The whole model on a batch, by its own forward. What `stage` cuts, unless a family cuts itself."""
        raise NotImplementedError

    def stage(self, model: nn.Module, carry: Any, batch: Batch) -> Any:
        """One pipeline stage: carry (None on the first) -> carry, or Output on the last.

        By default the model's own forward between the blocks that are here, by the card's chain.
        """
        return partial.stage(self, model, carry, batch)

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """What a stage sends to the next for such a batch: meta tensors in the order of sending.

        before: how many blocks of each chain are before the cut; dtype: of the activations. What follows from
        the batch
        is not sent: every stage has it. By default the stream and the outputs that the card's chain carries.
        """
        return partial.carry_spec(self, batch, dtype)

    def stage_neighbours(self) -> dict[str, str]:
        """Modules that must be in the pipeline stage of a certain block, by the config: module -> block."""
        return {}

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs of one sample, by the module pattern that spends them; their sum is `cost`."""
        raise NotImplementedError

    def example(self, measure: SampleLengths) -> Batch:
        """A micro-batch of one sample of these sizes, without data. Floating tensors are zeros."""
        raise NotImplementedError

    def balance(self, weight: float | None) -> dict[str, Any]:
        """Arguments of the objective's router term: {} without experts; None: the checkpoint's own."""
        return {}

    def routers(self) -> tuple[int, int]:
        """Layers with experts, and experts of each; (0, 0) without any."""
        return 0, 0
