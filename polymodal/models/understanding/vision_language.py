"""Models of towers, projectors and a language model: building, running, pipeline stages and FLOPs.

A tower reads one media stream (core/sample.py: MediaStream), its projector makes features of the language
model's width, and these replace placeholder tokens among the token embeddings. A model's own file has its
card and the call of its tower (`tower`); the library owns the architecture.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import AXES, IGNORE, Batch, MediaStream, SampleLengths
from polymodal.core.tensors import to_device
from polymodal.distributed import attention as packed_attention
from polymodal.distributed.router_loss import router_sums
from polymodal.models import partial
from polymodal.models.card import Chain, ModelCard, Output, PrunedModule
from polymodal.models.family import Family
from polymodal.models.understanding import language

TASKS = ("image-text-to-text", "video-text-to-text")
KEYWORDS = (
    "vision-language",
    "image understanding",
    "video understanding",
    "visual question answering",
    "vqa",
    "ocr",
    "document",
    "chart",
    "caption",
    "grounding",
    "multimodal chat",
    "image",
    "picture",
    "photo",
    "video question",
)


def vision_language_card(**facts: Any) -> ModelCard:
    """A ModelCard with what is usual for modules as transformers names them; `facts` replace it."""
    text = "model.language_model"
    usual = {"sequence_entry": text, "sequence_exit": text, "embedding": f"{text}.embed_tokens"}
    return ModelCard(**{"tasks": TASKS, "keywords": KEYWORDS, **usual, **facts})


def language_chain() -> Chain:
    """The language model's chain of blocks, as transformers names it."""
    return Chain("model.language_model.layers.*", last=("model.language_model.norm", "lm_head"))


class VisionLanguage(Family):
    """Packed samples of text and media. `attention` and `experts` are the recipe's model.* choices.

    A tower has the name of its stream, in `card.towers` and `card.pipeline` too. Its chain of blocks ends
    with the modules that make features of the stream of the last block; the last one also with the embedding.
    """

    layout = "packed"
    auto = "AutoModelForImageTextToText"  # transformers' class that knows the model
    streams: tuple[MediaStream, ...] = (MediaStream("vision", "pixel_values", "grid_thw"),)

    # -- what a model's own file defines

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        """The tower and its projector, by the library's modules: `stream.tensor` rows and sizes [M, k] on the
        host -> features [media tokens, D] in reading order."""
        raise NotImplementedError

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        """Shape of what a block of the tower passes to the next, for media of sizes [M, k]."""
        raise NotImplementedError

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        """Shape of one row of the stream's tensor."""
        raise NotImplementedError

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        """Size of a medium of about this length (SampleLengths.media); of the smallest one for 0."""
        raise NotImplementedError

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        """Features, and so placeholder tokens, of a part of this size."""
        raise NotImplementedError

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        """SampleLengths.media of a part of this size."""
        raise NotImplementedError

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        """Ids of the placeholder tokens of a stream's features."""
        raise NotImplementedError

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        """Forward FLOPs of the tower and its projector, by module pattern."""
        raise NotImplementedError

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        """The smallest parts of media [M, k] that the tower computes independently, in the order of rows."""
        return [tuple(size) for size in sizes.tolist()]

    # -- building

    @property
    def text(self) -> Any:
        """The language model's config."""
        return self.config.get_text_config()

    def build(self) -> nn.Module:
        """The library's model on meta in float32, with packed attention in text and towers."""
        import transformers

        experts = {} if self.experts == "auto" else {"experts_implementation": self.experts}
        with torch.device("meta"):
            model = getattr(transformers, self.auto).from_config(
                copy.deepcopy(self.config), dtype=torch.float32, attn_implementation="sdpa", **experts
            )
        packed_attention.use(model, self.attention)
        return model.train()

    def language_model(self, model: nn.Module) -> nn.Module:
        """Embeddings, layers and last norm."""
        return model.get_submodule(self.card.embedding.rpartition(".")[0])

    # -- running

    def media_mask(self, stream: MediaStream, batch: Batch) -> Tensor:
        """Which tokens of a batch are placeholders of a stream's features: bool [1, T]."""
        ids = batch["input_ids"]
        return functools.reduce(torch.logical_or, (ids == each for each in self.media_ids(stream)))

    def media_rows(self, stream: MediaStream, batch: Batch) -> Tensor:
        """The rows of `media_mask`, found on the host: int64 [n] on the batch's device."""
        ids = batch.on_host("input_ids")
        assert ids is not None
        rows = torch.isin(ids[0], torch.tensor(self.media_ids(stream))).nonzero()[:, 0]
        return to_device(rows, batch["input_ids"].device)

    def feature_numbers(self, stream: MediaStream, batch: Batch) -> Tensor | None:
        """Of each placeholder of a whole batch, the number of its feature, int64 [n] on the host; None where
        each has its own. Sequences of a sample that share media have their features once."""
        if not any(batch.groups.get("shared", ())):
            return None
        ids = batch.on_host("input_ids")
        assert ids is not None
        found, at, first = torch.isin(ids[0], torch.tensor(self.media_ids(stream))), 0, 0
        numbers = []
        for lengths, shared in zip(batch.groups["sequences"], batch.groups["shared"], strict=True):
            for number, length in enumerate(lengths):
                count = int(found[at : at + length].sum())
                first -= count if shared and number else 0
                numbers.append(torch.arange(first, first + count))
                first, at = first + count, at + length
        return torch.cat(numbers)

    def repeated(self, stream: MediaStream, batch: Batch, features: Tensor) -> Tensor:
        """Features [n, D], once for each placeholder of this rank where sequences share media."""
        numbers = batch.get(f"{stream.name}_numbers")
        return features if numbers is None or not len(numbers) else features.index_select(0, numbers)

    def tower_sizes(self, stream: MediaStream, batch: Batch) -> Tensor | None:
        """Sizes [M, k] of the media that the tower of this rank computes."""
        exchange = batch.media.get(stream.name)
        return batch.on_host(stream.sizes) if exchange is None else exchange.sizes

    def feature_count(self, stream: MediaStream, sizes: Tensor) -> int:
        """Features of media of these sizes."""
        return sum(self.media_tokens(stream, part) for part in self.media_parts(stream, sizes))

    def received(self, stream: MediaStream, batch: Batch) -> int:
        """Features of a stream that belong to tokens of this batch, on this rank."""
        exchange = batch.media.get(stream.name)
        if exchange is not None:
            return exchange.received
        sizes = batch.on_host(stream.sizes)
        return 0 if sizes is None else self.feature_count(stream, sizes)

    def tower_inputs(
        self, stream: MediaStream, batch: Batch, entering: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        """(rows of the stream's tensor, sizes on the host, features), after the exchange between ranks.

        A rank without media computes the smallest medium there is (0 features), whose result is multiplied by
        zero: every rank of a sharded model must run the same modules. entering: the state of a tower that
        began in another stage of a pipeline, where only the number of rows counts.
        """
        device = batch["input_ids"].device
        exchange, shape = batch.media.get(stream.name), self.row_shape(stream)
        sizes, rows = self.tower_sizes(stream, batch), batch.get(stream.tensor)
        if entering is not None:
            count = 0 if sizes is None else int(sizes.prod(dim=1).sum())
            rows = torch.zeros((), device=device).expand(count, *shape) if count else None
        elif exchange is not None:
            rows = exchange.rows(rows, shape, device)
        if rows is None or sizes is None:
            sizes = torch.tensor([self.medium(stream, 0)])
            return torch.zeros(int(sizes.prod()), *shape, device=device), sizes, 0
        return rows, sizes, self.feature_count(stream, sizes)

    def run_tower(
        self, model: nn.Module, stream: MediaStream, batch: Batch, carry: dict[str, Tensor]
    ) -> Tensor | None:
        """One call of a tower, or of the part of it that is in this stage: its state if it continues in
        another stage, else None, and carry["<stream>.features"] [features, D] is set.

        carry["<stream>.state"]: of a tower that began in another stage; removed.
        """
        entering = carry.pop(f"{stream.name}.state", None)
        rows, sizes, count = self.tower_inputs(stream, batch, entering)
        call = functools.partial(self.tower, model, stream, rows, sizes, batch["input_ids"].device)
        state, features = partial.run(model, self.card.pipeline[stream.name], entering, call)
        if features is not None:
            # of no media: the dummy's features, all of them, so that they stay in the graph
            carry[f"{stream.name}.features"] = features[:count] if count else features
        return state

    def begins_here(self, model: nn.Module, stream: MediaStream) -> bool:
        first = partial.blocks(model, self.card.pipeline[stream.name])[0]
        return not isinstance(model.get_submodule(first), PrunedModule)

    def stage(
        self, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
    ) -> dict[str, Tensor] | Output:
        """The whole model, or one pipeline stage of it whose other modules are PrunedModule.

        carry: None on the first stage; {"<stream>.state"} of a tower that continues and {"<stream>.features":
        [n, D]} of towers that are done; then {"hidden_states": [1, T, D]}; besides what the family's hooks
        add. Returns the same for the next stage, or Output.
        """
        carried = dict(carry or {})
        hidden = carried.pop(partial.HIDDEN, None)
        if hidden is None:
            for stream in self.streams:
                if f"{stream.name}.features" in carried:
                    continue
                if f"{stream.name}.state" not in carried and not self.begins_here(model, stream):
                    return carried
                state = self.run_tower(model, stream, batch, carried)
                if state is not None:
                    return {f"{stream.name}.state": state, **carried}
            hidden = self.embed(model, batch, carried)
        return self.run_language(model, batch, hidden, carried)

    def embed(self, model: nn.Module, batch: Batch, carried: dict[str, Tensor]) -> Tensor:
        """Token embeddings with media features at the placeholders; features are removed from `carried`."""
        hidden = model.get_submodule(self.card.embedding)(batch["input_ids"])
        for stream in self.streams:
            hidden = self.add_features(stream, batch, hidden, carried)
        return hidden

    def add_features(
        self, stream: MediaStream, batch: Batch, hidden: Tensor, carried: dict[str, Tensor]
    ) -> Tensor:
        """Token embeddings [1, T, D] with a stream's features, which are removed from `carried`."""
        features = carried.pop(f"{stream.name}.features").to(hidden.dtype)
        exchange = batch.media.get(stream.name)
        if exchange is not None:
            features = exchange.features(features)
        features = self.repeated(stream, batch, features)
        return self.insert_features(stream, batch, hidden, features)

    def insert_features(self, stream: MediaStream, batch: Batch, hidden: Tensor, features: Tensor) -> Tensor:
        """Token embeddings [1, T, D] with the features of this rank's placeholder tokens."""
        if not self.received(stream, batch):
            return hidden + features.sum() * 0.0
        rows = self.media_rows(stream, batch)
        if len(rows) != len(features):
            raise RuntimeError(f"{len(rows)} media tokens and {len(features)} media features in a batch")
        return hidden.index_copy(1, rows, features[None])

    def positions(self, batch: Batch, packed: bool) -> Tensor:
        """What the language model is given as position_ids; packed: with packed attention."""
        return batch["position_ids"][0]

    def run_language(
        self, model: nn.Module, batch: Batch, hidden: Tensor, carried: dict[str, Tensor]
    ) -> dict[str, Tensor] | Output:
        """The language layers of this stage, and the head if it is here."""
        text = self.language_model(model)
        held = [number for number, block in enumerate(text.layers) if not isinstance(block, PrunedModule)]
        start = held[0] if held else 0
        done = held[-1] + 1 if held else start
        head = model.get_submodule(self.card.head)
        extra: dict[str, Any] = {}
        if held or not isinstance(head, PrunedModule):
            packed = text.config._attn_implementation == packed_attention.NAME
            arguments: dict[str, Any] = {}
            mask: Tensor | None = None
            if packed:
                # With none the library looks for packed samples in the positions, which waits for the
                # device; one of four dimensions it passes on, and packed attention takes the lengths instead.
                mask = hidden.new_ones(1, 1, 1, 1, dtype=torch.bool)
                packed_attention.plan(batch.segments["text"], batch.host.get("text"))
                arguments["cu_seq_lens_q"] = batch.segments["text"]
            if batch.cut is not None:
                arguments["cut"] = batch.cut
            if self.routers()[0]:
                arguments["output_router_logits"] = True  # hooks of the routers alone keep no hidden states
            out = text(
                inputs_embeds=hidden,
                position_ids=self.positions(batch, packed),
                attention_mask=mask,
                use_cache=False,
                **arguments,
                **self.language_arguments(batch, carried, start, done),
            )
            hidden, extra = out.last_hidden_state, self.router_extra(out, carried)
        if not isinstance(head, PrunedModule):
            return Output(hidden, head, extra)
        return {partial.HIDDEN: hidden, **carried, **self.router_carry(batch, hidden, extra, carried)}

    def language_arguments(
        self, batch: Batch, carried: dict[str, Tensor], start: int, done: int
    ) -> dict[str, Any]:
        """Further arguments of the language model, whose layers start..done are here."""
        return {}

    # -- mixture-of-experts layers: their routers' logits over stages

    def routers(self) -> tuple[int, int]:
        """Layers with experts, and experts of each; (0, 0) without any."""
        return language.sparse_layers(self.text), language.experts(self.text)

    def balance(self, weight: float | None) -> dict[str, Any]:
        if not language.experts(self.text):
            return {}
        own = getattr(self.text, "router_aux_loss_coef", 0.0)
        chosen = self.text.num_experts_per_tok
        return {"aux_weight": own if weight is None else weight, "experts_per_token": chosen}

    def router_extra(self, out: Any, carried: dict[str, Tensor]) -> dict[str, Any]:
        """Output.extra: the logits of this stage's routers, and the sums of those of earlier stages."""
        layers, _ = self.routers()
        if not layers:
            return {}
        logits = list(out.router_logits or ())
        before = carried.pop("router_sums", None)
        if before is None:
            return {"router_logits": logits}
        earlier = {"router_sums_before": before, "router_layers_before": layers - len(logits)}
        return {"router_logits": logits, **earlier}

    def router_carry(
        self, batch: Batch, hidden: Tensor, extra: Mapping[str, Any], carried: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        before = extra.get("router_sums_before")
        if routers := extra.get("router_logits"):
            own = router_sums(routers, self.text.num_experts_per_tok, batch)
            before = own if before is None else own + before
        elif before is None and extra:  # dense layers only, so far
            before = hidden.new_zeros(2, self.routers()[1])
        return {} if before is None else {"router_sums": before}

    # -- shapes without data

    @functools.cached_property
    def depths(self) -> dict[str, int]:
        """Blocks of each tower."""
        model = self.build()
        return {
            name: len(partial.blocks(model, chain))
            for name, chain in self.card.pipeline.items()
            if any(stream.name == name for stream in self.streams)
        }

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        shapes = self.carry_shapes(batch, before)
        spec = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        if before["language"] and self.routers()[0]:
            wide = torch.promote_types(dtype, torch.float32)
            spec["router_sums"] = torch.empty(2, self.routers()[1], dtype=wide, device="meta")
        return spec

    def carry_shapes(self, batch: Batch, before: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of what `stage` returns for the next stage, without routers' sums."""
        shapes: dict[str, tuple[int, ...]] = {}
        for stream in self.streams:
            sizes = self.tower_sizes(stream, batch)
            if sizes is None or not len(sizes):
                sizes = torch.tensor([self.medium(stream, 0)])
            if before[stream.name] < self.depths[stream.name]:
                if before[stream.name]:
                    shapes = {f"{stream.name}.state": self.tower_state(stream, sizes), **shapes}
                return shapes
            shapes[f"{stream.name}.features"] = (self.feature_count(stream, sizes), self.text.hidden_size)
        return {partial.HIDDEN: (1, batch["input_ids"].shape[1], self.text.hidden_size)}

    def example(self, measure: SampleLengths) -> Batch:
        """Media first, then text; the last `trained` tokens have labels.

        Raises PolymodalError when the media's tokens do not fit into measure.tokens.
        """
        ids = torch.ones(1, measure.tokens, dtype=torch.int64)
        tensors, axes, media, at = {}, dict(AXES), {}, 0
        for stream in self.streams:
            found = [self.medium(stream, length) for length in measure.media.get(stream.name, ())]
            media[stream.name] = (len(found),)
            if not found:
                continue
            sizes = torch.tensor(found)
            count = self.feature_count(stream, sizes)
            if at + count > measure.tokens:
                raise PolymodalError(
                    f"Media of {at + count} tokens do not fit into {measure.tokens} tokens.",
                    "Raise data.max_length, or lower data.image.max_pixels.",
                )
            ids[0, at : at + count] = self.media_ids(stream)[0]
            at += count
            rows = int(sizes.prod(dim=1).sum())
            tensors |= {stream.tensor: torch.zeros(rows, *self.row_shape(stream)), stream.sizes: sizes}
            axes |= {stream.tensor: stream.axes, stream.sizes: ("none", "none")}
        trained = torch.arange(measure.tokens)[None] >= measure.tokens - measure.trained
        tensors |= {
            "input_ids": ids,
            "labels": torch.where(trained, ids, IGNORE),
            "weights": trained.float(),
            "position_ids": torch.arange(measure.tokens).expand(self.position_rows, 1, -1).clone(),
        }
        kinds = {"vision": "image"}
        modality = next((kinds.get(name, name) for name, (count,) in media.items() if count), "text")
        groups = {"modality": (modality,), "media": media, "broken": (False,)}
        segments = {"text": packed_attention.cumulative([measure.tokens])}
        axes = {name: axes[name] for name in tensors}
        return Batch(tensors, axes, (0,), segments, groups, streams=self.streams)

    position_rows = 1

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs: two a weight and token, plus attention within each medium's lengths."""
        layers, head = language.costs(self.text, measure.tokens, measure.trained)
        out: dict[str, float] = {}
        for stream in self.streams:
            out |= self.tower_costs(stream, measure.media.get(stream.name, ()))
        blocks = self.card.pipeline["language"].blocks
        return {**out, (blocks if isinstance(blocks, str) else blocks[0]): layers, self.card.head: head}
