"""The cheap model of a run: bytes of a rank and seconds of a step by closed formulas, in microseconds a
layout.

Used where a trace would take too long: `init` chooses a layout by it, `check` reports the memory of a rank,
the search ranks its candidates. Its constants are fitted to traces (trace.py), and
tests/parallel/test_plan.py holds it to them. States are Rajbhandari et al. 2020, activations Korthikanti et
al. 2022.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.family import Family
from polymodal.objectives.language import CHUNK_BYTES
from polymodal.objectives.preference import needs_copy
from polymodal.parallel import pipeline_split
from polymodal.plan import accelerators
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.shape import EXPERTS_KEPT, EXPERTS_MOVED, Shape, Tower
from polymodal.recipe import Recipe
from polymodal.runtime import host
from polymodal.train.layouts import Layout, Workload

BACKWARD = 2.0
"""Bytes that the backward pass moves over those of the forward pass."""
MOVED_A_PARAMETER = 4.0
"""Bytes that a micro-batch moves for a parameter, and again for its gradient: casts, copies in and out of
gathers."""
MOVED_A_LOGIT = 24.0
"""Times that the bytes of the logits are read or written, forward and backward."""
MOVED_A_CHUNK = 11.0
"""Bytes that a chunk of logits moves for a trained parameter of the head, where there are several."""
MOVED_BY_UPDATE = 40
"""Bytes that the optimizer moves for a parameter."""

UNPACKED = 8
"""Bytes for each weight of the largest quantised layer while it is made plain (models/quantised.py)."""


@dataclass
class Estimate:
    """Bytes of the fullest rank at a step's highest moment."""

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
    def varying(self) -> int:
        """What a layout's trace corrects: all but the states."""
        return self.gathered + self.activations + self.working

    @property
    def memory(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.average + self.varying

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory}


def media_shares(family: Family, units: Mapping[str, float]) -> tuple[float, float]:
    """Shares of tokens that stand for (pictures, sound), of which there are so many units (patches, frames) a
    token, by stream."""
    shares = [0.0, 0.0]
    for stream in family.streams:
        size = family.medium(stream, 1024)  # type: ignore[attr-defined]
        each = family.media_tokens(stream, size)  # type: ignore[attr-defined]
        lengths = family.media_lengths(stream, size)  # type: ignore[attr-defined]
        shares[stream.hears] += units.get(stream.name, 0.0) * each / sum(lengths)
    most = max(1.0, sum(shares) / 0.99)
    return shares[0] / most, shares[1] / most


def workload(layout: Layout, units: Mapping[str, float]) -> Workload:
    """The largest micro-batch, with as many patches and frames (units a token, by stream) as data that were
    measured have; of media of at most 1,024."""
    data = layout.recipe.data
    tokens, sizes = data.pack_length or data.max_length, [1024, 1024]
    for stream in layout.family.streams:
        sizes[stream.hears] = min(1024, max(1, int(tokens * units.get(stream.name, 0.0))))
    media, sound = media_shares(layout.family, units)
    return layout.workload(media, sizes[0], sound, sizes[1])


class Formula:
    """A recipe's layout of a model, on micro-batches of `load`. packed: whether those are packs."""

    def __init__(self, shape: Shape, recipe: Recipe, sizes: ParallelSizes, load: Workload, packed: bool):
        self.shape, self.recipe, self.sizes, self.load = shape, recipe, sizes, load
        self.parallel, self.measure = recipe.parallel, load.measure
        self.width = (
            4 if recipe.train.precision == "fp32" else 2
        )  # bytes of an element in the arithmetic's dtype
        self.micro_batches = pipeline_split.micro_batches(recipe.train, packed, sizes.dp)
        self.shards = sizes.dp_shard * sizes.cp
        self.learning = shape.trained > 0.5 * shape.total
        copied = [shape.by_tower.get(word, (0, 0)) for word in recipe.parallel.replicate]
        self.copied, self.copied_trained = (sum(pair[i] for pair in copied) for i in (0, 1))
        """Parameters that parallel.replicate keeps whole on every rank."""
        root = shape.total - shape.blocks
        head_ranks = sizes.tp if shape.head_cut else 1
        self.root = root / head_ranks
        """Parameters outside of blocks on this rank, once they are gathered."""
        logits = self.measure.trained * load.samples / sizes.cp / head_ranks
        self.logits = logits * shape.vocabulary * self.width
        self.chunks = math.ceil(self.logits / CHUNK_BYTES)
        self.head = shape.vocabulary * shape.towers[0].hidden / head_ranks * shape.head_trained
        """Parameters of the head on this rank, if they are trained."""

    def _tokens(self, tower: Tower) -> float:
        """Of a micro-batch on this rank that a tower computes."""
        length = tower.rows * (self.measure.total(tower.media) if tower.media else self.measure.tokens)
        return length * self.load.samples / self.sizes.cp

    def _elements(
        self, tower: Tower, fit: tuple[float, float, float], experts: float, gathered: float = 0.0
    ) -> float:
        """Elements a token of one block. The hidden size is cut by sequence parallelism, what is inside of a
        block by tp; but without ep every rank of a tp group has the rows of all experts."""
        tp = self.sizes.tp
        hidden, attention, mlp = fit
        cut = tp if self.parallel.sp is not False else 1
        hidden = hidden / cut + gathered * (cut > 1)
        elements = hidden * tower.hidden + attention * tower.attention / tp
        inner = mlp * tower.mlp + experts * tower.experts * tower.hidden
        return elements + inner / (1 if tower.experts and self.sizes.ep == 1 else tp)

    def _on_rank(self, parameters: float, experts: float) -> float:
        """Parameters of the rank once they are gathered: experts are spread over ep, all others cut by tp."""
        tp, ep = self.sizes.tp, self.sizes.ep
        return (parameters - experts) / tp + experts / (ep if ep > 1 else tp)

    # ---- bytes

    def memory(self) -> Estimate:
        """Of the fullest rank at a step's highest moment."""
        shape, recipe, sizes, measure = self.shape, self.recipe, self.sizes, self.measure
        root = shape.total - shape.blocks
        cut = (1 - shape.uncut / max(1, shape.total)) / sizes.tp + shape.uncut / max(1, shape.total)
        share = (shape.blocks / sizes.pp + root * (1.0 if sizes.pp == 1 else 0.5)) / max(1, shape.total)

        def held(count: int, copied: int) -> float:
            """Parameters of the rank."""
            return ((count - copied) / self.shards + copied) * share * cut

        trained = held(shape.trained, self.copied_trained)
        frozen = held(shape.total - shape.trained, self.copied - self.copied_trained)
        reference = held(shape.total, self.copied) * needs_copy(recipe)
        master = 2 if recipe.train.precision == "pure_bf16" else 4
        moments = 2.0
        if recipe.optim.name == "muon":
            moments -= shape.matrices / max(1, shape.trained)
        full, ema = recipe.checkpoint.save == "full", bool(recipe.train.ema)
        saved = held(shape.low * self.width - shape.low_bytes, 0)
        out = Estimate(
            parameters=int(trained * master + (frozen + reference) * self.width - saved),
            gradients=int(trained * master),
            optimizer=int(trained * master * moments),
            average=int(4 * trained * ema),
            total=shape.total,
            trained=shape.trained,
            towers=shape.by_tower,
            checkpoint=int(shape.trained * (master + full * (master * moments + 4 * ema))),
            export=2 * shape.total,
        )
        out.activations, out.gathered, out.working = map(int, self._highest())
        samples = f"{self.load.samples} x " if self.load.samples > 1 else ""
        out.assumed = f"{samples}{measure.tokens} tokens"
        if (depth := self._depth()) > 1:
            out.assumed = f"{depth} x {out.assumed} on 1 / {sizes.pp} of the layers"
        if recipe.checkpoint.asynchronous:  # of parameters as many bytes as of their gradients
            out.saving = out.gradients + (out.optimizer + out.average) * full
        if "parameters" in self.parallel.offload:
            out.parameters = out.gradients = out.optimizer = out.average = 0
        if "optimizer" in self.parallel.offload:
            out.optimizer = 0
        return out

    def _depth(self) -> int:
        """Micro-batches of which the first rank of a pipeline holds activations."""
        if self.sizes.pp == 1:
            return 1
        gpipe = self.parallel.pp_schedule == "GPipe"
        return self.micro_batches if gpipe else min(self.micro_batches, self.sizes.pp)

    def _highest(self) -> tuple[float, float, float]:
        """(activations, gathered parameters, held for a moment) at the highest of three moments of a step:
        the loss, the backward pass of the last block, and the reduction of what is outside of blocks."""
        shape, sizes, parallel, width = self.shape, self.sizes, self.parallel, self.width
        kept, one = self._activations()
        kept *= self._depth() / sizes.pp
        head = self.head * width  # its gradient is made in the forward pass and kept
        loss = max(1.5 * min(CHUNK_BYTES, self.logits), (3 if self.chunks > 1 else 1) * head)
        one += UNPACKED * shape.low_largest
        packed = 1 - (1 - shape.low_bytes / max(1, shape.low) / width) * shape.low / max(1, shape.blocks)
        if self.shards * sizes.dp_replicate == 1:
            return max((kept + head, 0.0, loss), (kept + head, 0.0, one), key=sum)
        root = self.root / min(sizes.pp, 2)
        # with few activations the largest block decides, else the last, whose backward pass meets all of them
        size = shape.largest if parallel.recompute == "full" else shape.last
        block = self._on_rank(size, size * shape.experts / max(1, shape.blocks))
        blocks = self._on_rank(shape.blocks, shape.experts) / sizes.pp
        gathered, ahead = root * width, 2 * block * width * packed
        reduced = block * (width * packed + 4 * self.learning)  # buffers of collectives
        if not parallel.reshards:
            gathered, ahead = gathered + blocks * width * packed, 0.0
        if parallel.zero_stage == 1 and self.learning:
            gathered, reduced = gathered + 4 * (blocks + root), 0.0
        return max(
            (kept + head, gathered, loss),
            (kept + head, gathered + ahead, one + reduced),
            (0.0, gathered, 4 * root * self.learning),
            key=sum,
        )

    def _activations(self) -> tuple[float, float]:
        """Bytes (kept for the backward pass of one micro-batch on all layers, beside them in that of one
        block).

        Recompute keeps a block's input and, selectively, its matrix products, and makes the rest of one block
        at a time.
        """
        on_host = "activations" in self.parallel.offload
        kept = one = 0.0
        for tower in (tower for tower in self.shape.towers if tower.learns):
            fit, size = tower.fit, self._tokens(tower) * self.width
            block = size * self._elements(tower, fit.kept, EXPERTS_KEPT, fit.gathered)
            if not self.learning:
                block *= fit.frozen
            entry = size * self._elements(tower, (1.0, 0.0, 0.0), 0.0)
            products = entry + size * self._elements(tower, fit.products, 0.0, fit.gathered)
            held = {"none": block, "selective": min(block, products), "full": entry}[self.parallel.recompute]
            if held == block and not on_host:
                one = max(one, 0.15 * block)
            else:
                one = max(one, 1.15 * (block - held * (not on_host)))
            kept += 0.0 if on_host else tower.layers * held
        return kept, one

    # ---- seconds

    def compute(self, accelerator: Accelerator) -> float:
        """Seconds of arithmetic and memory traffic of one micro-batch on a rank, forward and backward."""
        shape, sizes, measure, recompute = self.shape, self.sizes, self.measure, self.parallel.recompute
        peak = accelerator.half_flops if self.width == 2 else accelerator.single_flops
        inside, outside = shape.cost(measure)
        media = {stream: 2 * lengths for stream, lengths in measure.media.items()}
        twice = SampleLengths(2 * measure.tokens, 2 * measure.trained, media, measure.shape)
        attention = max(0.0, shape.cost(twice)[0] / 2 - inside)  # what grows with the square of the tokens
        # the backward pass of attention is 2.5 times the forward, whatever is trained
        flops = inside * (shape.passes + (recompute == "full")) + attention * (3.5 - shape.passes)
        if not shape.head_cut:
            outside *= sizes.tp  # every rank computes it
        flops = self.load.samples * (flops + (2.0 + shape.head_trained) * outside)
        whole = (self._on_rank(shape.blocks, shape.experts) + self.root) * (
            1 + shape.trained / max(1, shape.total)
        )
        moved = MOVED_A_PARAMETER * whole + MOVED_A_LOGIT * self.logits
        if self.chunks > 1:
            moved += MOVED_A_CHUNK * self.chunks * self.head
        again = {"none": 0.0, "selective": 0.9, "full": 1.0}[recompute]
        for tower in shape.towers:
            passes = 1.0 + BACKWARD + again if tower.learns else 1.0
            copied = tower.fit.copied * (1 - 1 / sizes.tp)
            elements = self._elements(tower, tower.fit.moved, EXPERTS_MOVED, copied)
            moved += self._tokens(tower) * self.width * tower.layers * elements * passes
        arithmetic = flops / (sizes.tp * sizes.cp) / (peak * accelerator.matmul)
        return (arithmetic + moved / accelerator.stream_bandwidth) / sizes.pp

    def seconds(self, accelerator: Accelerator) -> float:
        """Of a step: arithmetic, what it does not hide of collectives, the pipeline's bubble, the update.

        FSDP's gathers and reductions run beside the arithmetic of another block; those of tp, cp and ep wait.
        """
        shape, parallel, sizes, width = self.shape, self.parallel, self.sizes, self.width

        def ring(kind: str, size: float, ranks: int, stride: int, calls: float) -> float:
            members = tuple(range(0, ranks * stride, stride))
            calls = math.ceil(calls)
            return accelerators.transfer(accelerator, kind, members, size, calls) if ranks > 1 else 0.0

        exposed = 0.0
        for tower in shape.towers:
            stream = self._tokens(tower) * tower.hidden * width
            calls = tower.layers / sizes.pp * tower.fit.regions
            if tower.learns:
                calls *= 3 if parallel.recompute == "full" else 2
            exposed += 2 * ring("all_gather", stream * calls, sizes.tp, 1, calls)
            exposed += ring("all_to_all", stream / sizes.tp * 2 * calls, sizes.cp, sizes.tp, 2 * calls)
            exposed += ring("all_to_all", stream / sizes.tp * tower.experts * calls, sizes.ep, 1, calls)
            if parallel.sp is not False and tower.learns:
                sums = tower.layers / sizes.pp * tower.fit.reduced
                exposed += ring("all_reduce", sums * tower.hidden * width, sizes.tp, 1, sums)
            exposed += 2 * ring("send", stream / sizes.tp, sizes.pp, sizes.world // sizes.pp, 1)
        spread, layers = self.shards * sizes.tp, shape.towers[0].layers / sizes.pp
        sharded = (self._on_rank(shape.blocks - self.copied, shape.experts) + self.root) / sizes.pp
        trained = sharded * shape.trained / max(1, shape.total)
        gathers = 2 if parallel.reshards else 1
        fsdp = ring("all_gather", sharded * width * gathers, self.shards, sizes.tp, layers * gathers)
        fsdp += ring("reduce_scatter", trained * 4, self.shards, sizes.tp, layers)
        once = fsdp if parallel.zero_stage == 1 else 0.0  # a step, not a micro-batch
        arithmetic = self.compute(accelerator)
        each = arithmetic + exposed + max(0.0, fsdp - once - arithmetic)
        copied = self.copied_trained / sizes.pp / sizes.tp
        once += ring("all_reduce", trained * 4 / self.shards, sizes.dp_replicate, spread, 1)
        once += ring("all_reduce", copied * 4, self.shards * sizes.dp_replicate, sizes.tp, 1)
        once += MOVED_BY_UPDATE * (trained / self.shards + copied) / accelerator.stream_bandwidth
        bubble = (sizes.pp - 1) / pipeline_split.stages_per_rank(parallel) if sizes.pp > 1 else 0.0
        return each * (self.micro_batches + bubble) + once

    def mfu(self, accelerator: Accelerator, step: float) -> float:
        """Model FLOPs utilisation of a step of so many seconds; recomputed work does not count."""
        samples = self.micro_batches * self.sizes.dp * self.load.samples
        flops = self.shape.passes * sum(self.shape.cost(self.measure)) * samples
        return flops / (step * self.sizes.world * accelerator.half_flops)


def disk(recipe: Recipe, estimate: Estimate) -> tuple[int, int]:
    """(bytes that checkpoints and the export take at most, bytes free there). One more is written before one
    is removed."""
    needed = estimate.checkpoint * (recipe.checkpoint.keep + 1)
    if recipe.checkpoint.export:
        needed += estimate.export
    return needed, host.space(os.fspath(recipe.run_dir)).free
