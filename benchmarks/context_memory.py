"""Memory of one long sequence over 1, 2 and 4 context-parallel ranks: it falls as 1 / cp.

    python benchmarks/context_memory.py [--tokens 8192] [--json FILE]

A Qwen2.5-VL of the real class (6 language layers of width 256) with random weights, one sample of text and pictures in
float32. Counted on every rank: the bytes of all distinct storages that autograd keeps for the backward pass, without
parameters, after the forward pass up to the last norm. Wanted: the largest rank's at most 1.1 / cp of one process's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn


def batch(family, tokens: int):
    """One sample: four pictures and text up to `tokens`."""
    from polymodal.core.sample import pack
    from polymodal.recipe import Data
    from tests.models import tiny

    media = family.media_processor(Data())
    parts = [part for i in range(4) for part in (tiny.picture(64, 64, i), "What is in this picture? ")]
    sample = tiny.sample(media, parts)
    words = tiny.sample(media, ["How many red squares are there? " * tokens])
    missing = tokens - len(sample.tensors["input_ids"])
    for name in ("input_ids", "labels", "weights"):
        sample.tensors[name] = torch.cat([sample.tensors[name], words.tensors[name][:missing]])
    after = sample.tensors["position_ids"].max() + 1 + torch.arange(missing)
    sample.tensors["position_ids"] = torch.cat([sample.tensors["position_ids"], after.expand(4, -1)], dim=1)
    return pack([sample])


def kept(rank: int, directory: str, tokens: int, ulysses: int | None) -> dict[str, int]:
    """Bytes kept for backward on this rank, and rows of the sequence that it holds."""
    from polymodal.distributed.mesh import Mesh, ParallelSizes
    from polymodal.models import catalog, weights
    from polymodal.parallel.apply import apply
    from polymodal.parallel.batches import PackedBatchSharding
    from polymodal.recipe import Model, Parallel, Recipe, Train
    from polymodal.train.step import bind

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = dist.get_world_size()
    recipe = Recipe(
        model=Model(source=directory),
        parallel=Parallel(cp=world, ulysses=ulysses),
        train=Train(precision="fp32"),
    )
    family = catalog.family(recipe.model)
    model = family.build()
    bind(model, family)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, world), "cpu", rank)
    apply(model, family.card, mesh, recipe)
    weights.load(model, family)
    (own,) = PackedBatchSharding(family, mesh, recipe.parallel)([batch(family, tokens)])
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model(own, lambda output, batch: output.hidden_states)
    found = {"bytes": sum(seen.values()), "rows": out.shape[1]}
    out.sum().backward()
    return found


def main() -> None:
    from tests.models import tiny
    from tests.parallel.harness import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
                "max_position_embeddings": 65536, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}  # fmt: skip
        overrides = {f"text_config__{key}": value for key, value in text.items()}
        tiny.checkpoint("qwen2.5-vl", directory, vision_config__out_hidden_size=256, **overrides)
        for name, world, ulysses in (
            ("one process", 1, None), ("Ulysses 2", 2, 2), ("ring 2", 2, 1), ("Ulysses 4", 4, 4), ("Ulysses 2 x ring 2", 4, 2), ("ring 4", 4, 1)
        ):  # fmt: skip
            found = run(world, kept, directory, asked.tokens, ulysses, timeout=600)
            largest = max(result["bytes"] for result in found)
            rows.append({"layout": name, "cp": world, "bytes": largest, "rows": max(result["rows"] for result in found)})  # fmt: skip
            share = largest / rows[0]["bytes"]
            print(f"{name}: {largest / 2**20:.1f} MiB kept for backward on the largest rank, {share:.3f} of one process (1 / cp = {1 / world:.3f})", flush=True)  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps({"tokens": asked.tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
