"""Encoder-decoder models of transformers: an encoder of fixed-size features, and a decoder that attends to
all of its output.

What such families share in running and cutting. The encoder's output is carried to every stage of a pipeline
that holds decoder blocks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core import padded
from polymodal.core.sample import Batch, MediaStream, Sample, SampleLengths
from polymodal.distributed import attention
from polymodal.models import partial
from polymodal.models.card import Output, PrunedModule
from polymodal.models.family import Family

STATE, ENCODED = "encoder.state", "encoder.output"
"""What is sent between stages: hidden states of an encoder that goes on, or the output of one that is
done."""


class EncoderDecoder(Family):
    """Padded batches [B, T] of decoder tokens, with features [B, ...] for the encoder.

    attention, experts: the recipe's choice. The card's pipeline has two chains, `encoder` and `decoder`, in
    this order.
    """

    layout = "padded"
    attention = "auto"
    experts = "auto"
    features: MediaStream

    # -- of each model ---------------------------------------------------------------------------------------

    def encode(self, model: nn.Module, features: Tensor) -> Tensor:
        """The encoder by its own forward: features [B, ...] -> [B, S, D]."""
        raise NotImplementedError

    def decode(self, model: nn.Module, batch: Batch, encoded: Tensor) -> Tensor:
        """The decoder by its own forward: hidden states [B, T, D] after the last norm."""
        raise NotImplementedError

    def features_shape(self) -> tuple[int, ...]:
        """Of one sample's features."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        """Of the decoder's input."""
        return self.config.max_target_positions

    def encoded_shape(self) -> tuple[int, int]:
        """(positions, width) of the encoder's output and of its stream."""
        raise NotImplementedError

    # -- building and running --------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The library's model on meta in float32; its attention builds no masks, for padding needs none."""
        import transformers

        make = getattr(transformers, self.card.architectures[0])
        with torch.device("meta"):
            model = make(copy.deepcopy(self.config))
        attention.use(model, self.attention, padded=True)
        return model.train()

    def stage(
        self, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
    ) -> dict[str, Tensor] | Output:
        """The whole model, or one pipeline stage of it whose other modules are PrunedModule.

        carry: None on the first stage; {STATE: [B, S, D]} of an encoder that goes on; {ENCODED: [B, S, D]} of
        one that is done, with {"hidden_states": [B, T, D]} once the decoder began.
        """
        chains, carried = self.card.pipeline, dict(carry or {})
        encoded, hidden = carried.get(ENCODED), carried.get(partial.HIDDEN)
        if encoded is None:
            features = self._features(model, batch)
            state, encoded = partial.run(
                model, chains["encoder"], carried.get(STATE), lambda: self.encode(model, features)
            )
            if encoded is None:
                return {STATE: state}
        first = model.get_submodule(partial.blocks(model, chains["decoder"])[0])
        if hidden is None and isinstance(first, PrunedModule):
            return {ENCODED: encoded}
        with self._depends(first, encoded) if carry and hidden is None else contextlib.nullcontext():
            left, out = partial.run(
                model, chains["decoder"], hidden, lambda: self.decode(model, batch, encoded)
            )
        if left is not None:
            return {partial.HIDDEN: left, ENCODED: encoded}
        # a last stage without decoder blocks does not use the encoder's output, which still needs a gradient
        return Output(partial.together(out, carry), model.get_submodule(self.card.head))

    def _features(self, model: nn.Module, batch: Batch) -> Tensor:
        """The encoder's input in its first layer's dtype; on stages without that layer, zeros of its
        shape."""
        features = batch.get(self.features.tensor)
        if features is None:
            ids = batch["input_ids"]
            features = torch.zeros((), device=ids.device).expand(len(ids), *self.features_shape())
        layer = model.get_submodule(self.card.pipeline["encoder"].first[0])
        return features if isinstance(layer, PrunedModule) else features.to(layer.weight.dtype)

    @staticmethod
    @contextlib.contextmanager
    def _depends(block: nn.Module, encoded: Tensor) -> Iterator[None]:
        """The decoder's first block, whose hidden states then depend on the stage's input, with a gradient of
        zero.

        Schedules that compute gradients of weights apart from those of inputs find the weights by walking the
        graph from the inputs. Layers that no input reaches, such as the first self-attention, they would meet
        from several sides and compute twice.
        """

        def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return (partial.together(args[0], {ENCODED: encoded}), *args[1:]), kwargs

        handle = block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    # -- shapes without data ---------------------------------------------------------------------------------

    @functools.cached_property
    def encoder_layers(self) -> int:
        return len(partial.blocks(self.build(), self.card.pipeline["encoder"]))

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        rows, tokens = batch["input_ids"].shape
        positions, width = self.encoded_shape()
        state = torch.empty(rows, positions, width, dtype=dtype, device="meta")
        if before["encoder"] < self.encoder_layers:
            return {STATE: state}
        if not before["decoder"]:
            return {ENCODED: state}
        hidden = torch.empty(rows, tokens, width, dtype=dtype, device="meta")
        return {partial.HIDDEN: hidden, ENCODED: state}

    def example(self, measure: SampleLengths, count: int = 1) -> Batch:
        """Equal samples, of which the last `trained` tokens have labels."""
        ids = torch.ones(measure.tokens, dtype=torch.int64)
        weights = (torch.arange(measure.tokens) >= measure.tokens - measure.trained).float()
        tensors: dict[str, Any] = {"input_ids": ids, "labels": ids, "weights": weights}
        tensors[self.features.tensor] = torch.zeros(self.features_shape())
        sample = Sample(0, tensors, measure, modality="audio", streams=(self.features,))
        return padded.pad([sample] * count)
