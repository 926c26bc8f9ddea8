"""What the formulas of estimate.py know of a model: counts of parameters, its towers, and what a sample
costs.

Counted on the model on meta, or, where a checkpoint's config is not here, from a published size's facts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from polymodal.core.sample import SampleLengths
from polymodal.models import quantised
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.models.understanding import language
from polymodal.parallel import pipeline_split
from polymodal.train import optim
from polymodal.train.layouts.base import SOUND_FRAMES


@dataclass(frozen=True)
class BlockFit:
    """Constants of one kind of block, fitted to traces: elements of the compute dtype a token, as multiples
    of (the hidden size, the width of queries, keys and values, the feed-forward's width)."""

    kept: tuple[float, float, float]
    """Saved for backward without recompute; norms work in float32, where an element counts as two."""
    products: tuple[float, float, float]
    """What selective recompute still keeps: results of matrix products and of attention."""
    moved: tuple[float, float, float]
    """Read and written in the forward pass by operators that are no matrix products; the backward pass moves
    twice as much."""
    frozen: float
    """Share of `kept` that is saved where the weights are frozen and adapters learn: inputs of frozen weights
    are not."""
    gathered: float = 0.0
    """Hidden sizes that sequence parallelism adds to `kept`: inputs gathered for layers that are cut."""
    copied: float = 0.0
    """Hidden sizes that its gathers and reductions add to `moved`, of the tokens of other ranks."""
    regions: int = 2
    """Attentions and feed-forward parts, whose tokens tensor-parallel ranks exchange."""
    reduced: int = 0
    """Gradients of whole parameters, each summed over tensor-parallel ranks under sequence parallelism."""


DECODER = BlockFit((8.8, 2.0, 4.0), (3.0, 1.0, 2.0), (130.0, 0.0, 0.0), 0.9)
"""Language models, with a gated feed-forward part, rotary positions and norms in float32."""
VISION = BlockFit((8.8, 2.0, 4.0), (3.0, 1.0, 2.0), (47.0, 0.0, 0.0), 0.9)
"""Vision towers."""
SPEECH = BlockFit(
    (5.4, 2.0, 2.0), (4.0, 1.3, 1.2), (24.0, 0.0, 4.0), 0.95, gathered=5.5, copied=34.0, reduced=6
)
"""Encoders with a plain feed-forward part and LayerNorms, such as Whisper's."""
TRANSCRIPT = replace(SPEECH, regions=3, reduced=9)
"""Their decoders, with cross attention."""
DENOISER = BlockFit((39.0, 0.0, 2.0), (5.0, 1.0, 1.0), (165.0, 0.0, 8.0), 0.67)
"""Diffusion transformers that attend to the text in a layer of its own and modulate every token in
float32."""
JOINT_DENOISER = BlockFit((18.0, 0.0, 2.0), (5.0, 1.0, 1.0), (85.0, 0.0, 8.0), 0.67)
"""Diffusion transformers whose stream holds the text too, or runs beside a stream of text."""
EXPERTS_KEPT, EXPERTS_MOVED = 1.5, 20.0
"""Hidden sizes that a block of experts keeps, and moves in its forward pass, for each expert of a token."""


@dataclass(frozen=True)
class Tower:
    """A chain of alike blocks. attention: width of queries, keys and values together; mlp: of all experts of
    a token together; media: the stream of media whose patches or frames it computes, else it computes
    tokens."""

    layers: int
    hidden: int
    attention: int
    mlp: int
    media: str = ""
    fit: BlockFit = DECODER
    rows: float = 1.0  # that its blocks compute for each token, patch or frame
    experts: int = 0  # of a token
    learns: bool = True  # gradients flow here: not so in a tower of media that is wholly frozen


@dataclass(frozen=True)
class Shape:
    """Parameters of a model, its towers, and the cost of its samples."""

    total: int
    trained: int
    blocks: int  # parameters inside blocks
    largest: int  # parameters of the largest block
    last: int  # of the last one
    uncut: int  # parameters that tensor parallelism leaves whole
    towers: tuple[Tower, ...]
    cost: Callable[[SampleLengths], tuple[float, float]]
    """Forward FLOPs of one sample: in blocks, and outside of them (the head, whose backward is part of its
    forward)."""
    passes: float  # FLOPs of training over those of the forward pass
    experts: int = 0  # parameters of routed experts
    matrices: int = 0  # trained parameters of the blocks' matrices: muon's
    vocabulary: int = 0
    head_trained: bool = True
    head_cut: bool = True  # over tensor-parallel ranks, as the embedding is
    by_tower: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (parameters, trained)
    low: int = 0  # parameters that model.base keeps in few bits
    low_bytes: int = 0
    low_largest: int = 0  # parameters of the largest of those layers


def shape_of(family: Family, model: nn.Module) -> Shape:
    """Counted on `model`, whole on meta with adapters attached and towers frozen
    (parallel_model.meta_model)."""
    low = quantised.layers(model).values()
    held = sum(layer.weight.numel() for layer in low)
    sizes = [layer.in_features * layer.out_features for layer in low]
    with quantised.unpacked(model):
        shape = _counted(family, model)
    return replace(shape, low=sum(sizes), low_bytes=held, low_largest=max(sizes, default=0))


def _counted(family: Family, model: nn.Module) -> Shape:
    card = family.card
    block_names = re.compile("|".join(re.escape(p).replace(r"\*", r"[^.]+") + r"(?=\.)" for p in card.blocks))
    blocks: dict[str, int] = {}
    by_tower: dict[str, tuple[int, int]] = {}
    cut = re.compile("|".join(_cut_patterns(card)))
    experts = matrices = uncut = 0
    for name, parameter in model.named_parameters():
        count, trained = parameter.numel(), parameter.numel() * parameter.requires_grad
        tower = optim.tower_of(name, card.towers) or "other"
        before = by_tower.get(tower, (0, 0))
        by_tower[tower] = before[0] + count, before[1] + trained
        experts += count * (".experts." in name)
        uncut += count * (cut.match(name) is None)
        if block := block_names.match(name):
            blocks[block[0]] = blocks.get(block[0], 0) + count
            matrices += trained * (parameter.ndim == 2)
    towers, vocabulary = _towers(family)
    named = dict(model.named_parameters())
    head = [p for name, p in named.items() if name.startswith(f"{card.head}.")]
    head = head or [p for name, p in named.items() if name.startswith(f"{card.embedding}.")]

    def cost(measure: SampleLengths) -> tuple[float, float]:
        if not vocabulary:
            return family.cost(measure), 0.0
        parts = family.costs(measure)
        outside = parts.get(card.head, 0.0)
        return sum(parts.values()) - outside, outside

    return Shape(
        total=sum(total for total, _ in by_tower.values()),
        trained=sum(trained for _, trained in by_tower.values()),
        blocks=sum(blocks.values()),
        largest=max(blocks.values(), default=0),
        last=next(reversed(blocks.values()), 0),
        uncut=uncut,
        towers=tuple(replace(t, learns=not t.media or by_tower.get(t.media, (0, 1))[1] > 0) for t in towers),
        cost=cost,
        passes=pipeline_split.training_passes(model, family),
        experts=experts,
        matrices=matrices,
        vocabulary=vocabulary,
        head_trained=any(p.requires_grad for p in head),
        head_cut=not vocabulary or bool({card.head, card.embedding} & set(card.tensor_plan)),
        by_tower=by_tower,
    )


def _cut_patterns(card: ModelCard) -> Iterator[str]:
    """Expressions of the parameters that tensor parallelism cuts: linear layers, experts, and embedding and
    head where the card says so."""
    for pattern, style in card.tensor_plan.items():
        if style.endswith(("colwise", "rowwise")):
            yield re.escape(pattern).replace(r"\*", r"[^.]+") + r"\."
        elif pattern in (card.embedding, card.head):
            yield re.escape(pattern) + r"\."
    yield r".*\.experts\."


def _towers(family: Family) -> tuple[list[Tower], int]:
    """(towers, size of the vocabulary) by the config: a transformers one, or a denoiser's."""
    config = family.config
    if not hasattr(config, "get_text_config"):
        return [denoiser(family.card, *family.size())], 0  # type: ignore[attr-defined]
    if getattr(config, "is_encoder_decoder", False):
        side = config.d_model
        decoder = Tower(config.decoder_layers, side, 5 * side, config.decoder_ffn_dim, fit=TRANSCRIPT)
        encoder = Tower(config.encoder_layers, side, 3 * side, config.encoder_ffn_dim, "audio", SPEECH)
        return [decoder, encoder], config.vocab_size
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    towers = [_decoder(text), *(_decoder(other, rows) for other, rows in family.decoders)]
    if vision is not None:
        side = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or int(side * getattr(vision, "mlp_ratio", 4))
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        towers.append(Tower(depth, side, 3 * side, inner, "vision", VISION))
    known: Any = family
    for stream in (stream for stream in family.streams if stream.hears):
        audio, size = config.audio_config, known.medium(stream, SOUND_FRAMES)
        rows, side = known.tower_state(stream, torch.tensor([size]))
        share = rows / sum(known.media_lengths(stream, size))
        inner = audio.encoder_ffn_dim
        towers.append(Tower(audio.encoder_layers, side, 3 * side, inner, stream.name, SPEECH, share))
    return towers, text.vocab_size


def _decoder(text: Any, rows: int = 1) -> Tower:
    """A language model, which reads so many rows a token."""
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = size * (heads + 2 * getattr(text, "num_key_value_heads", heads))
    experts = text.num_experts_per_tok if language.experts(text) else 0
    mlp = text.moe_intermediate_size * experts if experts else text.intermediate_size
    return Tower(text.num_hidden_layers, text.hidden_size, attention, mlp, experts=experts, rows=rows)


def denoiser(card: ModelCard, layers: int, hidden: int, parameters: float) -> Tower:
    """A denoiser's blocks. Of `parameters`, which every token meets, what is not attention is feed-forward,
    of at most four widths."""
    joint = "joint_attention" in card.tensor_plan.values()
    inner = (parameters / layers / hidden - (4 if joint else 6) * hidden) / 2
    fit = JOINT_DENOISER if joint else DENOISER
    return Tower(layers, hidden, 3 * hidden, int(min(max(inner, hidden), 4.0 * hidden)), fit=fit)


def published(card: ModelCard, key: str, adapters: bool, base: str = "bf16") -> Shape:
    """Of a published size whose config is not here, by the card's parameters and layers. A block has 12
    hidden^2 weights. base: the recipe's model.base; experts are stacks, which stay whole."""
    size, generates = card.sizes[key], card.kind == "generation"
    total, active = size.parameters * 1e9, (size.active or size.parameters) * 1e9
    hidden = int(math.sqrt(active / size.layers / 12))
    if generates:
        tower, outside = denoiser(card, size.layers, hidden, active), 0.03 * total
    else:
        tower = Tower(
            size.layers, hidden, int(1.4 * hidden), int(3.2 * hidden), experts=8 if size.active else 0
        )
        outside = min(0.1 * total, 2 * 150_000 * hidden + 0.7e9)  # embeddings, head, vision

    low = min(active, total - outside) if adapters and base != "bf16" else 0

    def cost(measure: SampleLengths) -> tuple[float, float]:
        attention = (4.0 if generates else 2.0) * size.layers * hidden * float(measure.tokens) ** 2
        return 2.0 * active * measure.tokens + attention, 0.0

    return Shape(
        total=int(total),
        trained=int(0.005 * total if adapters else total),
        blocks=int(total - outside),
        largest=int(total - outside) // size.layers,
        last=int(total - outside) // size.layers,
        uncut=0,
        towers=(tower,),
        cost=cost,
        passes=2.0 if adapters else 3.0,
        experts=int(total - active) if size.active else 0,
        vocabulary=0 if generates else 150_000,
        head_trained=not adapters,
        low=int(low),
        low_bytes=int(low * quantised.row_bytes(base, 4096) / 4096) if low else 0,
        low_largest=hidden * tower.mlp * bool(low),
    )
