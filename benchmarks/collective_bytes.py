"""Bytes that one training step's collectives send, a rank, against the least that the layout needs.

    python benchmarks/collective_bytes.py [--json FILE]

A Qwen3-VL (dense, for experts its MoE) of the real class with random weights in float32, one pack of text with pictures
(under a pipeline as many as it has stages), forward and backward. Every collective is seen by torch's dispatcher, so that
FSDP2's and the backward pass's are counted too; what a rank keeps counts for nothing. The least, for N ranks that cut it:
(N - 1) / N of what is gathered or reduced (twice that for an all-reduce), and of a trade or a ring only what others need;
of experts a row for each choice that falls on another rank, there and back, forward and backward; of a pipeline what the
next stage's layers read, and its gradient. Wanted: at most 1.1 x, the sum over all ranks.
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


WAITS = ("wait_tensor", "_wrap_tensor_autograd")
"""Functional operators that send nothing."""


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to others, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "_c10d_functional" and operator._opname == "all_to_all_single":
            tensor, _, splits, name = args
            group = torch._C._distributed_c10d._resolve_process_group(name)
            self.add(operator._opname, self.traded(tensor, splits, group.size(), group.rank()))
        elif operator.namespace == "_c10d_functional" and operator._opname == "all_reduce":  # DTensor's own
            size = torch._C._distributed_c10d._resolve_process_group(args[2]).size()
            moved = 2 * (size - 1) / size * args[0].numel() * args[0].element_size()
            self.add(operator._opname, moved)
        elif operator.namespace == "_c10d_functional" and operator._opname not in WAITS:
            raise RuntimeError(f"a collective that is not counted: {operator}")
        if operator.namespace == "c10d":
            name = operator._opname
            boxed = next(
                x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())
            )
            group = dist.ProcessGroup.unbox(boxed)
            self.count(name, args, group.size(), group.rank())
        return operator(*args, **(kwargs or {}))

    def add(self, name: str, moved: float) -> None:
        self.bytes[name] = self.bytes.get(name, 0.0) + moved

    @staticmethod
    def traded(tensor: torch.Tensor, splits: Sequence[int], size: int, rank: int) -> float:
        """Of an all-to-all: all but what stays here. splits: rows for each rank, none for equal parts."""
        whole = tensor.numel() * tensor.element_size()
        if not splits:
            return whole * (size - 1) / size
        return whole * (1 - splits[rank] / sum(splits)) if sum(splits) else 0.0

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
            moved = self.traded(args[1], splits[1] if len(splits) > 1 else [], size, rank)
        elif name == "send":
            moved = weight(args[0])
        elif name in ("recv_", "barrier"):
            moved = 0
        else:
            raise RuntimeError(f"a collective that is not counted: {name}")
        self.add(name, moved)


def step(rank: int, directory: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """What this rank sent in a step, and what the analytic minimum needs to know."""
    from polymodal.distributed.mesh import Mesh, ParallelSizes
    from polymodal.models import catalog, weights
    from polymodal.objectives.language import LanguageObjective
    from polymodal.parallel.batches import PackedBatchSharding
    from polymodal.recipe import Model, Parallel, Recipe, Train
    from polymodal.train.parallel_model import ParallelModel
    from polymodal.train.step import StepMetrics, forward_backward, inverse_weights

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    recipe = Recipe(
        model=Model(source=directory), parallel=Parallel(**parallel), train=Train(precision="fp32")
    )
    family = catalog.family(recipe.model)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, dist.get_world_size()), "cpu", rank)
    model = ParallelModel(lambda: family.build(), family, mesh, recipe, torch.device("cpu"))
    model.load_all(lambda part: weights.load(part, family))
    layout = PackedBatchSharding(family, mesh, recipe.parallel)
    objective = LanguageObjective(**family.balance(None))
    whole = [batch(family, mesh.dp_rank + number) for number in range(mesh.sizes.pp)]
    inverse = inverse_weights(objective, whole, layout.weights_group)
    own = layout(whole)
    tally = StepMetrics(routers=family.routers())
    with Sent() as sent:
        forward_backward(model.runner, objective, own, inverse, tally)
        if model.ties is not None:
            model.ties.reduce()
    choices, ep = tally.values.get("choices"), mesh.sizes.ep
    routed = 0.0
    if isinstance(choices, torch.Tensor) and ep > 1:  # [layers, experts]: those of the other ranks
        mine = choices.chunk(ep, dim=1)[dist.get_rank(mesh.view("ep").get_group())]
        routed = float(choices.sum() - mine.sum())
    media = own[0].media.get("vision")
    away = lambda counts: sum(counts) - counts[media.group.rank()] if media is not None else 0  # noqa: E731
    first = whole[0]
    tied = [name for tie in model.parts[0].stage.tied for name, _ in tie]
    return {
        "sent": sent.bytes, "total": sum(sent.bytes.values()), "parameters": {n: p.numel() for n, p in model.all.items()},
        "rows": own[0]["input_ids"].shape[1], "routed": routed, "stage": mesh.at["pp"], "tied": tied[:1],
        "patches": away(media.rows_sent) if media is not None and media.moves else 0,
        "features": away(media.features_sent) if media is not None else 0,
        "pixels": first["pixel_values"].shape[1], "tokens": first["input_ids"].shape[1],
        "all_patches": first["pixel_values"].shape[0], "trained": int((first["weights"] > 0).sum()),
        "all_tokens": sum(each["input_ids"].shape[1] for each in whole),
        "all_features": sum(each["pixel_values"].shape[0] // 4 for each in whole),
        "depth": family.config.vision_config.depth, "side": family.config.vision_config.hidden_size,
    }  # fmt: skip


def batch(family: Any, number: int) -> Any:
    from polymodal.core.sample import pack
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


def states(results: Sequence[dict[str, Any]], parallel: dict[str, Any]) -> float:
    """Bytes that parameters and gradients cost all ranks: sharded parameters are gathered before forward and, blocks
    only, again before backward, gradients reduced once over the shards and then over the replicas. A pipeline gathers
    once a step. Experts are sharded over the ranks that hold the same ones."""
    world, tp, ep = len(results), parallel.get("tp", 1), parallel.get("ep", 1)
    replicas, stages = parallel.get("dp_replicate", 1), parallel.get("pp", 1)
    total = 0.0
    for result in results:
        for key, number in result["parameters"].items():
            spread = ep if ".experts." in key else 1
            shards = world // tp // replicas // stages // spread
            passes = 3 if (".blocks." in key or ".layers." in key) and stages == 1 else 2
            held = number / tp / spread
            total += held * (shards - 1) / shards * passes
            total += 2 * (replicas - 1) / replicas * held / shards
    return total * 4


def least(results: Sequence[dict[str, Any]], parallel: dict[str, Any]) -> float:
    """Bytes that all ranks of a layout together must send: parameters and gradients, then what the layout's own kind
    adds."""
    cp, tp, pp, world = parallel.get("cp", 1), parallel.get("tp", 1), parallel.get("pp", 1), len(results)
    levels = 3  # the merger's features and two deeper levels
    total = states(results, parallel)
    total += sum(result["routed"] for result in results) * WIDTH * 4 * 4
    if pp > 1:
        # each data-parallel rank's packs over each cut: hidden states, and deeper levels for the layers behind it
        for result in results:
            layers = sum(parallel["pp_layers"]["language"][: result["stage"]])
            if result["stage"]:
                deeper = max(0, levels - 1 - layers) * result["all_features"]
                total += 2 * (result["all_tokens"] + deeper) * WIDTH * 4
        for name in results[0]["tied"]:
            held = next(r["parameters"][name] for r in results if name in r["parameters"])
            total += (
                2 * held * 4
            )  # both ends of each line, shards together: (2 - 1) / 2 of it twice, from both
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
    "HSDP 2 x 2": (4, {"dp_replicate": 2}),
    "MoE: FSDP2 x 2, EP 2": (2, {"ep": 2}),
    "MoE: FSDP2 x 4, EP 2": (4, {"ep": 2}),
    "MoE: FSDP2 x 4, EP 4": (4, {"ep": 4}),
    "PP 2": (2, {"pp": 2, "pp_layers": {"language": [2, 2]}}),
    "PP 4": (4, {"pp": 4, "pp_layers": {"language": [1, 1, 1, 1]}}),
    "PP 2, FSDP2 x 2": (4, {"pp": 2, "pp_layers": {"language": [2, 2]}}),
}


def main() -> None:
    from tests.models import tiny
    from tests.parallel.harness import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="layouts whose name has this in it")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        text = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": HEAD}  # fmt: skip
        overrides = {f"text_config__{key}": value for key, value in text.items()}
        overrides["vision_config__out_hidden_size"] = WIDTH
        for kind in ("qwen3-vl", "qwen3-vl-moe"):
            tiny.checkpoint(kind, f"{directory}/{kind}", **overrides)
        for name, (world, parallel) in LAYOUTS.items():
            if asked.only not in name:
                continue
            source = f"{directory}/{'qwen3-vl-moe' if name.startswith('MoE') else 'qwen3-vl'}"
            results = run(world, step, source, parallel, timeout=300)
            moved = sum(result["total"] for result in results)
            needed = least(results, parallel)
            rows.append({"layout": name, "bytes": moved, "least": needed, "ratio": moved / needed})
            print(f"{name}: {moved / 2**20:.2f} MiB sent by all ranks, the least is {needed / 2**20:.2f}: {moved / needed:.3f} x", results[0]["sent"], flush=True)  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
