"""What a rank of two holds under FSDP2 against one process: bytes of parameters, gradients and optimizer state.

    python benchmarks/fsdp_memory.py [--ranks 1 2] [--json FILE]

Each world trains two real steps (gloo, float32, the common model and data), then every rank counts the storages of
its parameters, of their gradients after one more backward pass, and of the optimizer's state. The process's peak
resident set, activations and gathered layers included, is reported beside it. Wanted: at most 0.55 of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import ground

WANTED = 0.55


def held(tensors: list) -> int:
    """Bytes of the distinct storages behind tensors; of a DTensor, its local part."""
    storages = {}
    for tensor in tensors:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def rank_main(rank: int, world: int, port: int, root: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    place = Path(root)
    recipe = ground.recipe(
        place, place / "mixed" / "train.json", place / f"run{world}", steps=3, packs=2, workers=0
    )
    from polymodal.runtime import device
    from polymodal.runtime.process_group import runtime
    from polymodal.train.step import StepMetrics, forward_backward, inverse_weights
    from polymodal.train.trainer import Trainer

    with runtime(recipe) as rt:
        before = device.memory(rt.device)["now"]
        trainer = Trainer(recipe, rt)
        loader = trainer.feed.loader(
            dp_rank=trainer.mesh.dp_rank, dp_size=trainer.mesh.sizes.dp, stop_after=3
        )
        for number, step in enumerate(loader, 1):
            if number < 3:
                trainer._step(number, step, time.perf_counter())
                continue
            inverse = inverse_weights(trainer.objective, step.micro_batches, trainer.dp_group)
            batches = trainer.shard_batches(step.micro_batches)
            forward_backward(
                trainer.model,
                trainer.objective,
                batches,
                inverse,
                trainer.device,
                StepMetrics(trainer.objective.parts),
            )
        parameters = list(trainer.model.parameters())
        found = {
            "parameters": held(parameters),
            "gradients": held([p.grad for p in parameters if p.grad is not None]),
            "optimizer": held(list(trainer.optimizer.state().values())),
            "peak": device.memory(rt.device)["peak"] - before,
        }
        trainer.close()
    (place / f"held-{world}-{rank}.json").write_text(json.dumps(found))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as root:
        ground.write_checkpoint(Path(root) / "model")
        ground.write_data(Path(root) / "mixed", args.rows)
        worlds = {}
        for world in (1, args.ranks):
            mp.spawn(rank_main, (world, free_port(), root), nprocs=world)
            ranks = [
                json.loads((Path(root) / f"held-{world}-{rank}.json").read_text()) for rank in range(world)
            ]
            kinds = ("parameters", "gradients", "optimizer")
            worlds[world] = max(ranks, key=lambda r: sum(r[kind] for kind in kinds))
            worlds[world]["held"] = sum(worlds[world][kind] for kind in kinds)
            worlds[world]["peak"] = max(r["peak"] for r in ranks)
    alone, shared = worlds[1], worlds[args.ranks]
    ratio = shared["held"] / alone["held"]
    print(
        f"one process holds {alone['held'] / 2**20:.0f} MiB, a rank of {args.ranks} {shared['held'] / 2**20:.0f} MiB: {ratio:.3f} (wanted <= {WANTED}); "
        f"peak of the process {alone['peak'] / 2**20:.0f} and {shared['peak'] / 2**20:.0f} MiB"
    )
    if args.json:
        facts = {"ranks": args.ranks, "ratio": ratio, "wanted": WANTED}
        ground.add_to(args.json, {}, **facts, peak_ratio=shared["peak"] / alone["peak"], alone=alone, shared=shared)  # fmt: skip


if __name__ == "__main__":
    main()
