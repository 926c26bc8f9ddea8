"""Host memory while a checkpoint is read into shards: the peak of each rank over the bytes that it keeps.

    python benchmarks/load_memory.py [--gigabytes 1] [--ranks 2 4] [--tp 1] [--dcp] [--json FILE]

Writes a random Qwen2.5-VL and a random Qwen3-VL-MoE (experts as the hub's files have them) of that size in bf16, lays
them out with FSDP2 (over --tp tensor-parallel ranks) on gloo processes with float32 parameters, loads them, and
compares the rise of each process's peak resident set, pages of mapped files included, with its own share of the
parameters. Wanted: below 1.3 on every rank. Needs memory for the whole model in float32. --dcp: Qwen2.5-VL is also read by
torch's HuggingFaceStorageReader, in turns (it cannot read the other, whose experts are stored transposed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WANTED = 1.3


def write(kind: str, directory: Path, gigabytes: float) -> int:
    """A random checkpoint of about that many gigabytes in bf16; returns its bytes."""
    import transformers

    from polymodal.models import weights

    vision = {"depth": 2, "hidden_size": 256, "num_heads": 4, "intermediate_size": 512}
    text = {"vocab_size": 151_936, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
    layer = 16_000_000 if kind == "qwen3-vl-moe" else 8_000_000
    text["num_hidden_layers"] = max(2, round((gigabytes * 2**30 / 2 - 2 * 151_936 * 768) / layer))
    if kind == "qwen3-vl-moe":
        vision |= {"out_hidden_size": 768, "deepstack_visual_indexes": [0, 1]}
        text |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 192, "head_dim": 64}
        config = transformers.Qwen3VLMoeConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False
        )
    else:
        vision |= {"out_hidden_size": 768, "fullatt_block_indexes": [1]}
        text |= {"intermediate_size": 2816}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False
        )
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    weights.initialise(model, seed=0, device="cpu")
    model.save_pretrained(directory, max_shard_size="400MB")
    if kind == "qwen3-vl-moe":
        from safetensors.torch import load_file, save_file

        for path in directory.glob("*.safetensors"):
            state = load_file(path)
            state = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in state.items()}
            save_file(state, path, metadata={"format": "pt"})
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def load_by_dcp(model: torch.nn.Module, source: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from polymodal.models import library, weights
    from polymodal.models.storage import Files

    weights.materialise(model)
    keys = {
        name: pieces.keys[0]
        for name, pieces in library.layout(model, Files(Path(source)).shapes).entries.items()
    }
    held = library.targets(model)
    dcp.load(
        {key: held[name].detach() for name, key in keys.items()},
        storage_reader=HuggingFaceStorageReader(source),
    )
    weights.rebuild_buffers(model)


def rank_main(rank: int, world: int, tp: int, source: str, store: str, results: str, dcp: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from polymodal.distributed.mesh import Mesh, ParallelSizes
    from polymodal.models import catalog, weights
    from polymodal.parallel.apply import apply
    from polymodal.recipe import Model, Parallel, Recipe, Train

    recipe = Recipe(model=Model(source=source), parallel=Parallel(tp=tp), train=Train(precision="fp32"))
    family = catalog.family(recipe.model)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, world), "cpu", rank)
    out = {}
    for turn in range(5 if dcp else 1):
        for reader in ("own", "dcp") if dcp else ("own",):
            model = family.build()
            apply(model, family.card, mesh, recipe)
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before, began = status("VmRSS"), time.perf_counter()
            if reader == "own":
                report = weights.load(model, family)
                out |= {"share": report.bytes_held, "read": report.bytes_read}
            else:
                load_by_dcp(model, source)
            seconds = time.perf_counter() - began
            out[reader] = min(seconds, out.get(reader, seconds))
            if turn == 0:  # later ones use memory that the first ones gave back
                out[f"{reader} peak"] = status("VmHWM") - before
    Path(results, f"{rank}.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dcp", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = Path(tempfile.mkdtemp(prefix="polymodal-load-"))
    rows = []
    try:
        for kind in ("qwen2.5-vl", "qwen3-vl-moe"):
            size = write(kind, base / kind, args.gigabytes)
            print(f"{kind}: {size / 2**30:.2f} GiB of bf16 on disk")
            for world in args.ranks:
                results = base / f"{kind}-{world}"
                results.mkdir()
                dcp = args.dcp and kind == "qwen2.5-vl"
                arguments = (world, args.tp, str(base / kind), str(results / "store"), str(results), dcp)
                began = time.perf_counter()
                mp.spawn(rank_main, arguments, nprocs=world)
                ranks = [json.loads((results / f"{rank}.json").read_text()) for rank in range(world)]
                worst = max(r["own peak"] / r["share"] for r in ranks)
                rows.append({
                    "model": kind, "ranks": world, "tp": args.tp, "share": max(r["share"] for r in ranks), "ratio": worst,
                    "read": sum(r["read"] for r in ranks) / size, "seconds": max(r["own"] for r in ranks), "total": time.perf_counter() - began,
                })  # fmt: skip
                print(
                    f"  {world} ranks (tp {args.tp}): own share {rows[-1]['share'] / 2**20:.0f} MiB, peak {worst:.3f} x share, "
                    f"read {rows[-1]['read']:.3f} x the files, {rows[-1]['seconds']:.2f} s"
                )
                if dcp:
                    rows[-1] |= {
                        "dcp ratio": max(r["dcp peak"] / r["share"] for r in ranks),
                        "dcp seconds": max(r["dcp"] for r in ranks),
                    }
                    print(
                        f"    HuggingFaceStorageReader: peak {rows[-1]['dcp ratio']:.3f} x share, {rows[-1]['dcp seconds']:.2f} s"
                    )
            shutil.rmtree(base / kind)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    met = all(row["ratio"] < WANTED for row in rows)
    print(
        f"worst {max(row['ratio'] for row in rows):.3f}, wanted below {WANTED}: {'met' if met else 'MISSED'}"
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
