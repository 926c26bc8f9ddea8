"""What a rank holds under each memory policy, in bytes by kind: counted allocation by allocation, not estimated.

    python benchmarks/memory.py [--only WORD] [--json FILE]

Real ranks (gloo, float32 unless the row says otherwise) run real optimizer steps of a small model of the library's
class with four micro-batches; a tracker sees every allocation (polymodal/plan/tracker.py). For each kind the highest
moment of a step is taken, of the rank that holds most. `gathered` are parameters put together from their shards,
`communication` the buffers of them and of reduced gradients. What a policy keeps on the host is counted as such, although
here the host is all there is. Written to benchmarks/results/memory.json row by row (with --only into the rows that it
has), from where table.py makes the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

KINDS = ("parameters", "gathered", "communication", "gradients", "optimizer", "activations", "host")
MICRO_BATCHES = 4
SIZES = {
    "text_config__num_hidden_layers": 8, "text_config__hidden_size": 128, "text_config__num_attention_heads": 8, "text_config__intermediate_size": 256,
    "vision_config__depth": 4, "vision_config__out_hidden_size": 128,
}  # fmt: skip
DENSE, SPARSE = "qwen2.5-vl", "qwen3-vl-moe"
Case = tuple[str, str, int, dict[str, Any], str]  # name, model, ranks, recipe's parallel section, precision

CASES: list[Case] = [
    ("one process", DENSE, 1, {}, "fp32"),
    ("ZeRO-3 (the default)", DENSE, 2, {}, "fp32"),
    ("ZeRO-3, parameters kept after forward", DENSE, 2, {"reshard_after_forward": False}, "fp32"),
    ("ZeRO-2", DENSE, 2, {"zero": 2}, "fp32"),
    ("ZeRO-1", DENSE, 2, {"zero": 1}, "fp32"),
    ("two copies (dp_replicate)", DENSE, 2, {"dp_replicate": 2}, "fp32"),
    ("HSDP 2 x 2", DENSE, 4, {"dp_replicate": 2}, "fp32"),
    ("ZeRO-3 x 4", DENSE, 4, {}, "fp32"),
    ("no block gathered ahead", DENSE, 2, {"prefetch": 0}, "fp32"),
    ("three blocks gathered ahead", DENSE, 2, {"prefetch": 3}, "fp32"),
    ("bf16, float32 masters", DENSE, 2, {}, "bf16"),
    ("pure_bf16, no masters", DENSE, 2, {}, "pure_bf16"),
    ("recompute full", DENSE, 2, {"recompute": "full"}, "fp32"),
    ("recompute selective", DENSE, 2, {"recompute": "selective"}, "fp32"),
    ("selective, keeping attention only", DENSE, 2, {"recompute": "selective", "recompute_keep": ["attention"]}, "fp32"),
    ("full, the first 4 blocks of a tower", DENSE, 2, {"recompute": "full", "recompute_first": 4}, "fp32"),
    ("full, every second block", DENSE, 2, {"recompute": "full", "recompute_every": 2}, "fp32"),
    ("full, the language model", DENSE, 2, {"recompute": "full", "recompute_blocks": ["language"]}, "fp32"),
    ("activations on the host", DENSE, 2, {"offload": ["activations"]}, "fp32"),
    ("recompute full, inputs on the host", DENSE, 2, {"recompute": "full", "offload": ["activations"]}, "fp32"),
    ("parameters on the host", DENSE, 2, {"offload": ["parameters"]}, "fp32"),
    ("optimizer state on the host", DENSE, 2, {"offload": ["optimizer"]}, "fp32"),
    ("MoE: ZeRO-3 x 4", SPARSE, 4, {}, "fp32"),
    ("MoE: EP 2, expert FSDP2 x 2", SPARSE, 4, {"ep": 2}, "fp32"),
    ("MoE: EP 4", SPARSE, 4, {"ep": 4}, "fp32"),
    ("MoE: EP 4, TP 2", SPARSE, 4, {"ep": 4, "tp": 2}, "fp32"),
]  # fmt: skip


def overrides(model: str) -> dict[str, Any]:
    return SIZES | (
        {"text_config__num_experts": 8, "text_config__moe_intermediate_size": 128} if model == SPARSE else {}
    )


def measured(rank: int, source: str, parallel: dict[str, Any], precision: str, tokens: int) -> dict[str, int]:
    """Bytes by kind at each kind's highest moment of the second step."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    from polymodal.distributed.mesh import Mesh, ParallelSizes
    from polymodal.models import catalog
    from polymodal.parallel import memory
    from polymodal.plan.job import Job
    from polymodal.plan.tracker import Tracker
    from polymodal.recipe import validate
    from polymodal.train import step
    from polymodal.train.layouts.packed import lengths

    recipe = validate({
        "model": {"source": source, "init": "random"}, "parallel": parallel, "train": {"precision": precision},
        "data": {"max_length": tokens},
    })  # fmt: skip
    family = catalog.family(recipe.model)
    example = lengths(family, tokens, 0.25, 256)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, dist.get_world_size()), "cpu", rank)
    job = Job(recipe, family, mesh, example)
    job.load_all(seed=0)
    tracker = Tracker()
    groups = [
        group
        for module in job.model.models[0].modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    ]

    def gradients() -> None:
        tracker.mark([p.grad for p in job.trainable.values() if p.grad is not None], "gradients")
        for group in groups:  # those that ZeRO-1 keeps whole
            for parameter in group.fsdp_params:
                gathered = getattr(parameter, "_unsharded_param", None)
                for whole in (parameter.unsharded_accumulated_grad, getattr(gathered, "grad", None)):
                    tracker.mark([whole] if whole is not None else [], "gradients")

    before, to_host = memory.before_backward, memory.to_host

    def before_backward(model: Any, last: bool) -> None:
        gradients()
        before(model, last)

    def counted(tensor: Any) -> Any:
        host = to_host(tensor)
        tracker.mark(host, "host")
        return host

    step.before_backward, memory.to_host = before_backward, counted  # type: ignore[assignment]
    with tracker:
        tracker.mark(list(job.model.all.values()), "parameters")
        tracker.mark(list(job.optimizer.state().values()), "optimizer")
        for name in ("first step", "step"):
            tracker.phase = name
            job.step(lambda: [family.example(example) for _ in range(MICRO_BATCHES)], gradients)
            gc.collect()
    most, held = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for storage, change, phase, _ in tracker.changes:
        kind = storage.purpose
        if kind in held:
            held[kind] += change
        if phase == "step":
            most = {kind: max(most[kind], held[kind]) for kind in KINDS}
    away = {"parameters": ("parameters", "gradients", "optimizer"), "optimizer": ("optimizer",)}
    for word in recipe.parallel.offload:
        for kind in away.get(word, ()):
            most["host"] += most[kind]
            most[kind] = 0
    return most


def main() -> None:
    from tests.models import tiny
    from tests.parallel.harness import run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="Rows whose name holds this.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.only and args.json and args.json.is_file():  # the other rows stay
        rows = [row for row in json.loads(args.json.read_text())["rows"] if args.only not in row["name"]]
    with tempfile.TemporaryDirectory(prefix="polymodal-memory-") as directory:
        sources = {m: str(tiny.checkpoint(m, Path(directory, m), **overrides(m))) for m in (DENSE, SPARSE)}
        print(f"{'MiB a rank':42}" + "".join(f"{kind:>14}" for kind in KINDS), flush=True)
        for name, model, world, parallel, precision in CASES:
            if args.only not in name:
                continue
            found = run(world, measured, sources[model], parallel, precision, args.tokens, timeout=300)
            most = {kind: max(rank[kind] for rank in found) for kind in KINDS}
            rows.append(
                {"name": name, "ranks": world, "parallel": parallel, "precision": precision, "bytes": most}
            )
            print(
                f"{name:38} {world:3}" + "".join(f"{most[kind] / 2**20:14.2f}" for kind in KINDS), flush=True
            )
            if args.json:
                order = [case[0] for case in CASES]
                rows.sort(key=lambda row: order.index(row["name"]))
                facts = {"tokens": args.tokens, "micro_batches": MICRO_BATCHES, "rows": rows}
                args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
