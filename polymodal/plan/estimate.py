"""The cheap model of a run: bytes a rank holds and seconds of a step, by closed formulas, in microseconds a
layout.

Used where a trace would take too long: `init` chooses a layout by it, `check` says what a rank will hold,
the search ranks its candidates. Its constants are fitted to traces (trace.py), and
tests/parallel/test_plan.py holds it to them. States are Rajbhandari et al. 2020, activations Korthikanti
et al. 2022, collectives cost their ring (devices.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.objectives.language import CHUNK_BYTES
from polymodal.parallel import pipeline_split
from polymodal.plan import devices
from polymodal.plan.devices import Accelerator
from polymodal.recipe import Recipe
from polymodal.train import optim
from polymodal.train.layouts import Layout, Workload


@dataclass(frozen=True)
class BlockFit:
    """Constants of one kind of block, fitted to traces. Triples are elements of the compute dtype per row
    of the stream: (times the hidden size, times the width of queries, keys and values, times the
    feed-forward's width)."""

    kept: tuple[float, float, float]
    """Saved for backward without recompute; norms work in float32, where an element counts as two."""
    products: tuple[float, float, float]
    """What selective recompute still keeps: results of matrix products and of attention."""
    moved: tuple[float, float, float]
    """Read and written in the forward pass by operators that are no matrix products; the backward pass
    moves twice as much."""
    frozen: float
    """Share of `kept` that is saved where the weights are frozen and adapters learn: inputs of frozen
    weights are not."""
    whole: float = 0.0
    """Hidden sizes of `kept` that sequence parallelism does not cut: inputs gathered for layers that are."""


DECODER = BlockFit((8.8, 2.0, 4.0), (3.0, 1.0, 2.0), (179.0, 0.0, 0.0), 0.9)
"""Blocks of language models, with a gated feed-forward part, rotary positions and norms in float32."""
VISION = BlockFit((8.8, 2.0, 4.0), (3.0, 1.0, 2.0), (47.0, 0.0, 0.0), 0.9)
"""Blocks of vision towers."""
SPEECH = BlockFit((5.4, 2.0, 2.0), (4.0, 1.3, 1.2), (24.0, 0.0, 4.0), 0.95, whole=4.5)
"""Blocks of encoders and decoders with a plain feed-forward part and LayerNorms, such as Whisper's."""
DENOISER = BlockFit((30.0, 0.0, 2.0), (5.0, 1.0, 1.0), (125.0, 0.0, 8.0), 0.67)
"""Blocks of diffusion transformers: between Wan's, which modulate every token in float32, and FLUX's,
which do not."""
BACKWARD = 2.0
"""Bytes that the backward pass moves over those of the forward pass."""
MOVED_A_PARAMETER = 9.5
"""Bytes that a micro-batch moves for a parameter, and again for its gradient: casts, copies in and out of
gathers."""
MOVED_A_LOGIT = 32.0
"""Times that the bytes of the logits are read or written, forward and backward."""


@dataclass(frozen=True)
class Tower:
    """A chain of alike blocks. attention: width of queries, keys and values together; media: the stream of
    media whose patches or frames its rows are, else they are tokens."""

    layers: int
    hidden: int
    attention: int
    mlp: int
    media: str = ""
    fit: BlockFit = DECODER
    learns: bool = True  # gradients flow here: not so in a tower of media that is wholly frozen

    def per_row(self, numbers: tuple[float, float, float], cut: int, tp: int) -> float:
        """Elements a row: hidden sizes are cut by sequence parallelism, what is inside of a block by tp."""
        hidden, attention, mlp = numbers
        whole = min(self.fit.whole, hidden)
        hidden = whole + (hidden - whole) / cut
        return hidden * self.hidden + (attention * self.attention + mlp * self.mlp) / tp


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model: counts of parameters, its towers, what a sample costs."""

    total: int
    trained: int
    blocks: int  # parameters inside blocks
    largest: int  # parameters of the largest block
    towers: tuple[Tower, ...]
    cost: Callable[[SampleLengths], tuple[float, float]]
    """Forward FLOPs of one sample: in blocks, and outside of them (the head, whose backward is part of its
    forward)."""
    experts: int = 0  # parameters of routed experts
    chosen: int = 0  # experts that a token goes to
    matrices: int = 0  # trained parameters of the blocks' matrices: muon's
    vocabulary: int = 0
    head_trained: bool = True
    by_tower: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (parameters, trained)


@dataclass
class Estimate:
    """Bytes of the fullest rank, estimated."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    gathered: int = (
        0  # parameters put together from their shards, and their gradients before they are reduced
    )
    activations: int = 0
    assumed: str = ""  # what the activations were estimated for
    working: int = 0  # logits and what an operator needs for a moment
    total: int = 0  # parameters of the whole model
    trained: int = 0
    towers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (parameters, trained)
    checkpoint: int = 0  # bytes of one checkpoint
    saving: int = 0  # bytes of the host that a rank takes while a checkpoint is written in the background
    export: int = 0  # bytes of the model in the hub's format

    @property
    def memory(self) -> int:
        held = (self.parameters, self.gradients, self.optimizer, self.average, self.gathered)
        return sum(held) + self.activations + self.working

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory}


# ---- what a model is ---------------------------------------------------------------------------------------


def shape_of(family: Family, model: nn.Module) -> Shape:
    """Counted on `model`, on meta with adapters attached and towers frozen (pretended.meta_model)."""
    patterns = [re.compile(re.escape(p).replace(r"\*", r"[^.]+") + r"(?=\.)") for p in family.card.blocks]
    blocks: dict[str, int] = {}
    by_tower: dict[str, tuple[int, int]] = {}
    total = trained = experts = matrices = 0
    for name, parameter in model.named_parameters():
        count, train = parameter.numel(), parameter.numel() * parameter.requires_grad
        total, trained = total + count, trained + train
        tower = optim.tower_of(name, family.card.towers) or "other"
        had = by_tower.get(tower, (0, 0))
        by_tower[tower] = had[0] + count, had[1] + train
        experts += count * (".experts." in name)
        found = next((hit[0] for pattern in patterns if (hit := pattern.match(name))), None)
        if found is not None:
            blocks[found] = blocks.get(found, 0) + count
            matrices += train * (parameter.ndim == 2)
    towers, vocabulary, chosen = _towers(family, sum(blocks.values()))
    towers = tuple(replace(t, learns=not t.media or by_tower.get(t.media, (0, 1))[1] > 0) for t in towers)
    head = [p for n, p in model.named_parameters() if n.startswith(f"{family.card.head}.")]
    head = head or [p for n, p in model.named_parameters() if n.startswith(f"{family.card.embedding}.")]

    def cost(measure: SampleLengths) -> tuple[float, float]:
        if not vocabulary:
            return family.cost(measure), 0.0
        parts = family.costs(measure)
        outside = parts.get(family.card.head, 0.0)
        return sum(parts.values()) - outside, outside

    return Shape(
        total,
        trained,
        sum(blocks.values()),
        max(blocks.values(), default=0),
        towers,
        cost,
        experts,
        chosen,
        matrices,
        vocabulary,
        any(p.requires_grad for p in head),
        by_tower,
    )


def _towers(family: Family, parameters: int) -> tuple[tuple[Tower, ...], int, int]:
    """(towers, rows of the vocabulary, experts a token goes to) by the config: a transformers one, or a
    denoiser's."""
    config = family.config
    if not hasattr(config, "get_text_config"):
        layers, hidden, count = family.size()  # type: ignore[attr-defined]
        return (denoiser(layers, hidden, count),), 0, 0
    if getattr(config, "is_encoder_decoder", False):
        side = config.d_model
        own = Tower(config.decoder_layers, side, 5 * side, config.decoder_ffn_dim, fit=SPEECH)
        heard = Tower(
            config.encoder_layers, side, 3 * side, config.encoder_ffn_dim, media="audio", fit=SPEECH
        )
        return (own, heard), config.vocab_size, 0
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    attention = size * (heads + 2 * getattr(text, "num_key_value_heads", heads))
    chosen = getattr(text, "num_experts_per_tok", 0) if getattr(text, "num_experts", 0) else 0
    mlp = text.moe_intermediate_size * chosen if chosen else text.intermediate_size
    towers = [Tower(text.num_hidden_layers, text.hidden_size, attention, mlp)]
    if vision is not None:
        side = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or int(side * getattr(vision, "mlp_ratio", 4))
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        towers.append(Tower(depth, side, 3 * side, inner, media="vision", fit=VISION))
    return tuple(towers), text.vocab_size, chosen


def denoiser(layers: int, hidden: int, parameters: float) -> Tower:
    """A denoiser's blocks: what is no attention (of itself and of the text) is feed-forward, of at most
    four widths."""
    inner = parameters / layers / 2 / hidden - 4.0 * hidden
    return Tower(layers, hidden, 3 * hidden, int(min(max(inner, hidden), 4.0 * hidden)), fit=DENOISER)


def published(card: ModelCard, key: str, adapters: bool) -> Shape:
    """Of a published size whose config is not here: by the card's parameters and layers. A block has 12
    hidden^2 weights."""
    size = card.sizes[key]
    total, active = size.parameters * 1e9, (size.active or size.parameters) * 1e9
    hidden = int(math.sqrt(active / size.layers / 12))
    generates = card.kind == "generation"
    tower = (
        denoiser(size.layers, hidden, active)
        if generates
        else Tower(size.layers, hidden, int(1.4 * hidden), int(3.2 * hidden))
    )

    def cost(measure: SampleLengths) -> tuple[float, float]:
        attention = (4.0 if generates else 2.0) * size.layers * hidden * float(measure.tokens) ** 2
        return 2.0 * active * measure.tokens + attention, 0.0

    outside = (
        0.03 * total if generates else min(0.1 * total, 2 * 150_000 * hidden + 0.7e9)
    )  # embeddings, head, vision
    blocks = int(total - outside)
    trained = 0.005 * total if adapters else total
    return Shape(
        int(total),
        int(trained),
        blocks,
        blocks // size.layers,
        (tower,),
        cost,
        int(total - active) if size.active else 0,
        8 if size.active else 0,
        vocabulary=0 if generates else 150_000,
        head_trained=not adapters,
    )


def media_share(family: Family, patches_per_token: float) -> float:
    """Share of a stream's tokens that stand for media of which there are so many patches (frames) a token."""
    if not family.streams or not patches_per_token:
        return 0.0
    stream = family.streams[0]
    size = family.medium(stream, 1024)  # type: ignore[attr-defined]
    each = family.media_tokens(stream, size)  # type: ignore[attr-defined]
    lengths = family.media_lengths(stream, size)  # type: ignore[attr-defined]
    return min(0.99, patches_per_token * each / sum(lengths))


def workload(layout: Layout, patches_per_token: float) -> Workload:
    """The largest micro-batch, with as many patches as data that were measured have; of media of at most
    1,024."""
    data = layout.recipe.data
    length = min(1024, max(1, int((data.pack_length or data.max_length) * patches_per_token)))
    return layout.workload(media_share(layout.family, patches_per_token), length)


# ---- bytes -------------------------------------------------------------------------------------------------


def width_of(recipe: Recipe) -> int:
    """Bytes of an element in the arithmetic's dtype."""
    return 4 if recipe.train.precision == "fp32" else 2


def _cut(recipe: Recipe, sizes: ParallelSizes) -> int:
    return sizes.tp if recipe.parallel.sp is not False else 1


def _rows(tower: Tower, measure: SampleLengths, samples: int, cp: int) -> float:
    return (measure.total(tower.media) if tower.media else measure.tokens) * samples / cp


def memory(
    shape: Shape,
    recipe: Recipe,
    sizes: ParallelSizes,
    measure: SampleLengths,
    samples: int = 1,
    under_way: int = 1,
) -> Estimate:
    """Bytes of the fullest rank at a step's highest moment.

    measure, samples: of a micro-batch; under_way: micro-batches of which a pipeline's first rank holds
    activations.
    """
    parallel, width = recipe.parallel, width_of(recipe)
    pure = recipe.train.precision == "pure_bf16"
    root = shape.total - shape.blocks
    share = (shape.blocks / sizes.pp + root * (1.0 if sizes.pp == 1 else 0.5)) / max(1, shape.total)
    here = share / sizes.tp / (sizes.dp_shard * sizes.cp)
    master = 2 if pure else 4
    moments = 2 - (shape.matrices / max(1, shape.trained) if recipe.optim.name == "muon" else 0)
    whole = shape.trained * (master + master * moments * (recipe.checkpoint.save == "full"))
    out = Estimate(
        parameters=int((shape.trained * master + (shape.total - shape.trained) * width) * here),
        gradients=int(shape.trained * master * here),
        optimizer=int(shape.trained * master * moments * here),
        average=int(4 * shape.trained * here) if recipe.train.ema else 0,
        total=shape.total,
        trained=shape.trained,
        towers=shape.by_tower,
        checkpoint=int(
            whole + 4 * shape.trained * bool(recipe.train.ema and recipe.checkpoint.save == "full")
        ),
        export=2 * shape.total,
    )
    out.activations, out.gathered, out.working = _highest(shape, recipe, sizes, measure, samples, under_way)
    out.assumed = f"{samples} x {measure.tokens} tokens" if samples > 1 else f"{measure.tokens} tokens"
    if under_way > 1:
        out.assumed = f"{under_way} x {out.assumed} on 1 / {sizes.pp} of the layers"
    if recipe.checkpoint.asynchronous:  # of parameters as many bytes as of their gradients
        out.saving = out.gradients + (out.optimizer + out.average) * (recipe.checkpoint.save == "full")
    if "parameters" in parallel.offload:
        out.parameters = out.gradients = out.optimizer = out.average = 0
    if "optimizer" in parallel.offload:
        out.optimizer = 0
    return out


def _highest(
    shape: Shape, recipe: Recipe, sizes: ParallelSizes, measure: SampleLengths, samples: int, under_way: int
) -> tuple[int, int, int]:
    """(activations, gathered parameters, held for a moment) at the highest of three moments of a step: the
    loss, the backward pass of the last block, and the reduction of what lies outside of blocks."""
    parallel, width = recipe.parallel, width_of(recipe)
    kept, one = _activations(shape, recipe, sizes, measure, samples)
    kept *= under_way / sizes.pp
    head = logits = 0.0
    if shape.vocabulary:
        logits = measure.trained * samples / sizes.cp * shape.vocabulary * width / sizes.tp
        if shape.head_trained:  # its gradient is made in the forward pass and kept
            head = shape.vocabulary * shape.towers[0].hidden * width / sizes.tp
    loss = max(1.5 * min(CHUNK_BYTES, logits), (3 if logits > CHUNK_BYTES else 1) * head)
    sharded = sizes.dp_shard * sizes.cp * sizes.dp_replicate > 1
    root = (shape.total - shape.blocks) / min(sizes.pp, 2) / sizes.tp
    block = shape.largest / sizes.ep / sizes.tp
    blocks = shape.blocks / sizes.pp / sizes.tp
    learning = shape.trained > 0.5 * shape.total
    gathered = root * width if sharded else 0.0
    ahead = 2 * block * width if sharded else 0.0
    reduced = block * (width + 4 * learning) if sharded else 0.0  # buffers of collectives
    if sharded and not parallel.reshards:
        gathered, ahead = gathered + blocks * width, 0.0
    if sharded and parallel.zero_stage == 1 and learning:
        gathered, reduced = gathered + 4 * (blocks + root), 0.0
    moments = (
        (kept + head, gathered, loss),
        (kept + head, gathered + ahead, one + reduced),
        (0.0, gathered, 4 * root * learning * sharded),
    )
    activations, together, working = max(moments, key=sum)
    return int(activations), int(together), int(working)


def _activations(
    shape: Shape, recipe: Recipe, sizes: ParallelSizes, measure: SampleLengths, samples: int
) -> tuple[float, float]:
    """Bytes (kept for the backward pass of one micro-batch on all layers, beside them in that of one block).

    Recompute keeps a block's input and, selectively, its matrix products, and makes the rest of one block
    at a time.
    """
    parallel, width, cut = recipe.parallel, width_of(recipe), _cut(recipe, sizes)
    away = "activations" in parallel.offload
    kept = one = 0.0
    for tower in shape.towers:
        if not tower.learns:
            continue
        rows = _rows(tower, measure, samples, sizes.cp) * width
        block = rows * tower.per_row(tower.fit.kept, cut, sizes.tp)
        if shape.trained < 0.5 * shape.total:
            block *= tower.fit.frozen
        entry = rows * tower.hidden / cut
        products = entry + rows * tower.per_row(tower.fit.products, cut, sizes.tp)
        held = {"none": block, "selective": min(block, products), "full": entry}[parallel.recompute]
        kept += 0.0 if away else tower.layers * held
        one = max(one, 0.15 * block if held == block and not away else 1.15 * (block - held * (not away)))
    return kept, one


def pipeline_depth(recipe: Recipe, sizes: ParallelSizes, packed: bool) -> int:
    """Micro-batches whose activations the first rank holds at once: as many as there are ranks, of GPipe
    all."""
    count = pipeline_split.micro_batches(recipe.train, packed, sizes.dp)
    return 1 if sizes.pp == 1 else count if recipe.parallel.pp_schedule == "GPipe" else min(count, sizes.pp)


# ---- seconds -----------------------------------------------------------------------------------------------


def compute(
    shape: Shape,
    recipe: Recipe,
    sizes: ParallelSizes,
    measure: SampleLengths,
    samples: int,
    accelerator: Accelerator,
) -> float:
    """Seconds of arithmetic and memory traffic of one micro-batch on a rank, forward and backward."""
    recompute, width, cut = recipe.parallel.recompute, width_of(recipe), _cut(recipe, sizes)
    peak = accelerator.half_flops if width == 2 else accelerator.single_flops
    inside, outside = shape.cost(measure)
    media = {stream: 2 * lengths for stream, lengths in measure.media.items()}
    twice = SampleLengths(2 * measure.tokens, 2 * measure.trained, media, measure.shape)
    attention = max(0.0, shape.cost(twice)[0] / 2 - inside)  # what grows with the square of the tokens
    share = shape.trained / max(1, shape.total)  # gradients of frozen weights are not computed
    flops = inside * (2.0 + share + (recompute == "full")) + attention * (1.5 - share)
    flops = samples * (flops + (2.0 + shape.head_trained) * outside)
    again = {"none": 0.0, "selective": 0.9, "full": 1.0}[recompute]
    moved = MOVED_A_PARAMETER * (shape.total + shape.trained) / sizes.tp
    moved += MOVED_A_LOGIT * measure.trained * samples / sizes.cp * shape.vocabulary * width / sizes.tp
    for tower in shape.towers:
        rows = _rows(tower, measure, samples, sizes.cp) * width * tower.layers
        over = (1.0 + BACKWARD + again) if tower.learns else 1.0
        moved += rows * tower.per_row(tower.fit.moved, cut, sizes.tp) * over
    arithmetic = flops / (sizes.tp * sizes.cp) / (peak * accelerator.matmul)
    return (arithmetic + moved / (accelerator.bandwidth * accelerator.stream)) / sizes.pp


def seconds(
    shape: Shape,
    recipe: Recipe,
    sizes: ParallelSizes,
    measure: SampleLengths,
    samples: int,
    micro_batches: int,
    accelerator: Accelerator,
) -> float:
    """Seconds of a step: arithmetic, what it does not hide of collectives, the pipeline's bubble, the update.

    FSDP's gathers and reductions run beside the arithmetic of another block; those of tp, cp and ep wait.
    """
    parallel, width = recipe.parallel, width_of(recipe)
    one = compute(shape, recipe, sizes, measure, samples, accelerator)
    passes = 3 if parallel.recompute == "full" else 2

    def ring(kind: str, size: float, ranks: int, stride: int, calls: float) -> float:
        members = tuple(range(0, ranks * stride, stride))
        return devices.transfer(accelerator, kind, members, size, math.ceil(calls)) if ranks > 1 else 0.0

    exposed, layers = 0.0, shape.towers[0].layers / sizes.pp
    for tower in shape.towers:
        stream = _rows(tower, measure, samples, sizes.cp) * tower.hidden * width
        own = tower.layers / sizes.pp
        calls = own * 2 * (passes if tower.learns else 1)
        exposed += 2 * ring("all_gather", stream * calls, sizes.tp, 1, calls)
        exposed += ring("all_to_all", stream / sizes.tp * 2 * calls, sizes.cp, sizes.tp, 2 * calls)
        exposed += ring("all_to_all", stream / sizes.tp * shape.chosen * calls, sizes.ep, 1, calls)
        exposed += 2 * ring("send", stream / sizes.tp, sizes.pp, sizes.world // sizes.pp, 1)
    shards = sizes.dp_shard * sizes.cp
    held = (shape.total - shape.experts * (1 - 1 / sizes.ep)) / sizes.pp / sizes.tp
    trained = held * shape.trained / max(1, shape.total)
    gathers = 2 if parallel.reshards else 1
    fsdp = ring("all_gather", held * width * gathers, shards, sizes.tp, layers * gathers)
    fsdp += ring("reduce_scatter", trained * 4, shards, sizes.tp, layers)
    once = fsdp if parallel.zero_stage == 1 else 0.0  # a step, not a micro-batch
    each = one + exposed + max(0.0, fsdp - once - one)
    bubble = (sizes.pp - 1) / pipeline_split.stages_per_rank(parallel) if sizes.pp > 1 else 0.0
    replicas = ring("all_reduce", trained * 4 / shards, sizes.dp_replicate, shards * sizes.tp, 1)
    update = 40 * trained / shards / (accelerator.bandwidth * accelerator.stream)
    return each * (micro_batches + bubble) + once + replicas + update


def mfu(
    shape: Shape, measure: SampleLengths, samples: float, step: float, world: int, accelerator: Accelerator
) -> float:
    """Model FLOPs utilisation of a step of `samples` samples in `step` seconds; recomputed work does not
    count."""
    return 3 * sum(shape.cost(measure)) * samples / (step * world * accelerator.half_flops)


def disk(recipe: Recipe, estimate: Estimate) -> tuple[int, int]:
    """(bytes that checkpoints and the export take at most, bytes free there). One more is written before
    one is pruned."""
    from polymodal.runtime import host

    wanted = estimate.checkpoint * (recipe.checkpoint.keep + 1) + (
        estimate.export if recipe.checkpoint.export else 0
    )
    return wanted, host.space(os.fspath(recipe.run_dir)).free
