"""Bytes that one training step's collectives send, a rank, against the least that the layout needs.

    python benchmarks/collective_bytes.py [--json FILE]

A Qwen3-VL of the real class with random weights in float32, one pack of text with pictures, forward and backward. Every
collective is seen by torch's dispatcher, so that FSDP2's and the backward pass's are counted too; what a rank keeps
counts for nothing. The least, for N ranks that cut it: (N - 1) / N of what is gathered or reduced (twice that for an
all-reduce), and of a trade or a ring only what others need. Wanted: at most 1.1 x, the sum over all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYERS, WIDTH, HEADS, KEYS, HEAD, TOKENS = 4, 128, 8, 4, 16, 1500


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to others, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            name = operator._opname
            boxed = next(
                x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())
            )
            group = dist.ProcessGroup.unbox(boxed)
            self.count(name, args, group.size(), group.rank())
        return operator(*args, **(kwargs or {}))

    def count(self, name: str, args: Any, size: int, rank: int) -> None:
        def weight(value: Any) -> float:
            return sum(
                x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, torch.Tensor)
            )

        if "allreduce" in name:
            moved = 2 * (size - 1) / size * weight(args[0])
        elif "allgather" in name:
            moved = (size - 1) * weight(args[1])  # its own piece to each of the others
        elif "reduce_scatter" in name:
            moved = (size - 1) / size * weight(args[1])
        elif "alltoall_base" in name:
            splits = [x for x in args if isinstance(x, list) and all(isinstance(i, int) for i in x)]
            whole = weight(args[1])
            sizes = splits[1] if len(splits) > 1 else []
            moved = whole * (1 - sizes[rank] / sum(sizes)) if sum(sizes) else whole * (size - 1) / size
        elif name == "send":
            moved = weight(args[0])
        elif name in ("recv_", "barrier"):
            moved = 0
        else:
            raise RuntimeError(f"a collective that is not counted: {name}")
        self.bytes[name] = self.bytes.get(name, 0.0) + moved


def step(rank: int, directory: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """What this rank sent in a step, and what the analytic minimum needs to know."""
    from polymodal.models import catalog, weights
    from polymodal.objectives.language import LanguageObjective
    from polymodal.parallel.apply import apply
    from polymodal.parallel.batches import BatchLayout
    from polymodal.parallel.mesh import Mesh, ParallelSizes
    from polymodal.recipe import Model, Parallel, Recipe, Train
    from polymodal.train.step import bind, inverse_weights

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recipe = Recipe(
        model=Model(source=directory), parallel=Parallel(**parallel), train=Train(precision="fp32")
    )
    family = catalog.family(recipe.model)
    model = family.build().trained
    bind(model, family)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, dist.get_world_size()), "cpu", rank)
    apply(model, family.card, mesh, recipe)
    weights.load(model, family)
    layout, objective = BatchLayout(family, mesh, recipe.parallel), LanguageObjective()
    whole = [batch(family, mesh.dp_rank)]
    inverse = inverse_weights(objective, whole, layout.weights_group)
    (own,) = layout(whole)
    with Sent() as sent:
        loss, _ = model(own, lambda output, batch: objective.loss(output, batch, inverse))
        loss.backward()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    media = own.media
    away = lambda counts: sum(counts) - counts[media.group.rank()] if media is not None else 0  # noqa: E731
    return {
        "sent": sent.bytes, "total": sum(sent.bytes.values()), "parameters": sizes, "rows": own["input_ids"].shape[1],
        "patches": away(media.patches_sent) if media is not None and media.moves else 0,
        "features": away(media.features_sent) if media is not None else 0,
        "pixels": whole[0]["pixel_values"].shape[1], "tokens": whole[0]["input_ids"].shape[1],
        "all_patches": whole[0]["pixel_values"].shape[0], "trained": int((whole[0]["weights"] > 0).sum()),
        "depth": family.config.vision_config.depth, "side": family.config.vision_config.hidden_size,
    }  # fmt: skip


def batch(family: Any, number: int) -> Any:
    from polymodal.data.sample import pack
    from polymodal.recipe import Data
    from tests.models import tiny

    media = family.media_processor(Data())
    lengths = (TOKENS - 400, 250, 150)
    samples = []
    for i, length in enumerate(lengths):
        parts = [tiny.picture(64, 64, i + 7 * number)] * (1 + number % 2) + [
            "How many red squares are there? " * length
        ]
        sample = tiny.sample(media, parts)
        for name, tensor in sample.tensors.items():
            if name in ("input_ids", "labels", "weights", "position_ids"):
                sample.tensors[name] = tensor[..., :length]
        samples.append(sample)
    return pack(samples)


def least(name: str, results: Sequence[dict[str, Any]], parallel: dict[str, Any]) -> float:
    """Bytes that all ranks of a layout together must send: sharded parameters are gathered before forward and, blocks
    only, again before backward, gradients reduced once; then what the layout's own kind adds."""
    world, cp = len(results), parallel.get("cp", 1)
    shards = world // parallel.get("tp", 1)
    blocks = sum(n for key, n in results[0]["parameters"].items() if ".blocks." in key or ".layers." in key)
    root = sum(results[0]["parameters"].values()) - blocks
    tp = parallel.get("tp", 1)
    levels = 3  # the merger's features and two deeper levels
    total = world * (shards - 1) / shards * (3 * blocks + 2 * root) / tp * 4
    if tp > 1:
        # two regions a block (attention, MLP), each summed once in forward and once in backward; with sequence
        # parallelism the sum is a gather and a scatter of the same bytes; the loss sums the gradient of its rows
        vision = results[0]["depth"] * 4 * results[0]["all_patches"] * results[0]["side"]
        mergers = levels * (
            results[0]["all_patches"] // 4 * WIDTH + results[0]["all_patches"] * results[0]["side"]
        )
        text = LAYERS * 4 * results[0]["tokens"] * WIDTH
        ends = (
            results[0]["tokens"] * WIDTH + results[0]["trained"] * WIDTH
        )  # embedding forward, loss backward
        total += world * 2 * (tp - 1) / tp * (vision + mergers + text + ends) * 4
    if cp > 1:
        ulysses = parallel.get("ulysses", cp)
        ring = cp // ulysses
        rows = sum(result["rows"] for result in results)
        # a trade: each row's heads that live elsewhere; keys go wherever query heads look at them
        keys = max(KEYS, ulysses)
        trade = rows * (ulysses - 1) / ulysses * (2 * HEADS + 2 * keys) * HEAD
        # the ring: keys and values visit every other rank, twice (forward, backward), and their gradients come home
        turn = rows * (ring - 1) * 2 * (keys if ulysses > 1 else KEYS) / ulysses * ulysses * HEAD
        total += LAYERS * (2 * trade + 3 * turn) * 4
    total += sum(result["patches"] * result["pixels"] for result in results) * 4
    total += sum(2 * result["features"] * levels * WIDTH for result in results) * 4
    return total


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "FSDP2 x 2": (2, {}),
    "FSDP2 x 4": (4, {}),
    "Ulysses 2": (2, {"cp": 2}),
    "ring 2": (2, {"cp": 2, "ulysses": 1}),
    "Ulysses 4": (4, {"cp": 4, "ulysses": 4}),
    "ring 4": (4, {"cp": 4, "ulysses": 1}),
    "Ulysses 2 x ring 2": (4, {"cp": 4, "ulysses": 2}),
    "FSDP2 x 2, ring 2": (4, {"cp": 2, "ulysses": 1}),
    "TP 2": (2, {"tp": 2, "sp": False}),
    "TP 2 + SP": (2, {"tp": 2}),
    "FSDP2 x 2, pictures dealt out": (2, {"balance_media": True}),
}


def main() -> None:
    from tests.models import tiny
    from tests.parallel.harness import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        text = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": HEAD}  # fmt: skip
        overrides = {f"text_config__{key}": value for key, value in text.items()}
        tiny.checkpoint("qwen3-vl", directory, vision_config__out_hidden_size=WIDTH, **overrides)
        for name, (world, parallel) in LAYOUTS.items():
            results = run(world, step, directory, parallel, timeout=300)
            moved = sum(result["total"] for result in results)
            needed = least(name, results, parallel)
            rows.append({"layout": name, "bytes": moved, "least": needed, "ratio": moved / needed})
            print(f"{name}: {moved / 2**20:.2f} MiB sent by all ranks, the least is {needed / 2**20:.2f}: {moved / needed:.3f} x", results[0]["sent"], flush=True)  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
