"""Conversion of a checkpoint, hub -> tree at TP 2 x PP 2: its speed over `cp` of the same bytes, and its peak of memory.

    python benchmarks/convert_speed.py [--gigabytes 4] [--rounds 3] [--json FILE]

Writes a random Qwen2.5-VL checkpoint of that size in bf16, then in turns copies its weight files with cp and converts
them in a process of its own, on the same disk; files are in the page cache for both, neither waits for the disk. The
speed is of the conversion by itself (writing, without start of Python, and with reading back apart); wanted: at least
0.7 of cp. The memory is the peak resident set of the whole process; wanted: below twice the largest file written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WANTED, MEMORY = 0.7, 2.0


def write(directory: Path, gigabytes: float) -> int:
    """A random checkpoint of about that size, as the hub has it; returns its bytes."""
    import torch
    import transformers

    from polymodal.convert import writing
    from polymodal.models import library

    vision = {
        "depth": 8,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3456,
        "out_hidden_size": 2048,
    }
    text = {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11_008,
    }
    text["num_hidden_layers"] = max(
        2, round((gigabytes * 1e9 / 2 - 2 * 151_936 * 2048 - 2e8) / 77e6) // 2 * 2
    )
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    keys = library.reverted(model, dict(model.state_dict()))
    directory.mkdir()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)
    files: list[dict] = [{}]
    held = 0
    for key, tensor in keys.items():
        if held + tensor.nbytes > 1e9 and files[-1]:
            files.append({})
            held = 0
        files[-1][key] = (tuple(tensor.shape), torch.bfloat16)
        held += tensor.nbytes
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    index = {}
    for number, spec in enumerate(files, 1):
        path = directory / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        writing.safetensors_frame(path, spec)
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with open(path, "r+b") as file:
            file.seek(begin)
            left = path.stat().st_size - begin
            while left:
                left -= file.write(noise[: min(left, len(noise))])
        index |= dict.fromkeys(spec, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def convert(source: Path, target: Path) -> None:
    """Runs in a process of its own; prints what it measured."""
    from polymodal.convert import engine, output
    from polymodal.convert.family import read_config
    from polymodal.convert.options import Settings
    from polymodal.convert.shelf import family
    from polymodal.convert.tree import Parallel

    config = read_config(source)
    layers, depth = config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"]
    parallel = Parallel(2, 1, {"llm": ((layers // 2, layers - layers // 2),), "vit": ((depth, 0),)})
    report = output.to_tree(engine.hub(family("qwen2.5-vl"), "", source), parallel, target, Settings())
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(
        json.dumps(
            {
                "seconds": report.seconds,
                "verified": report.verified,
                "bytes": report.bytes,
                "peak": peak * 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        return convert(*args.convert)
    base = Path(tempfile.mkdtemp(prefix="polymodal-convert-"))
    copies, runs = [], []
    try:
        size = write(base / "source", args.gigabytes)
        weights = sorted((base / "source").glob("*.safetensors"))
        for _ in range(args.rounds):
            (base / "copy").mkdir()
            began = time.perf_counter()
            subprocess.run(["cp", "--reflink=never", *weights, base / "copy"], check=True)
            copies.append(size / (time.perf_counter() - began))
            shutil.rmtree(base / "copy")
            began = time.perf_counter()
            words = [sys.executable, __file__, "--convert", str(base / "source"), str(base / "tree")]
            done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ})
            one = json.loads(done.stdout.splitlines()[-1])
            runs.append(
                {**one, "speed": one["bytes"] / one["seconds"], "process": time.perf_counter() - began}
            )
            largest = max(p.stat().st_size for p in (base / "tree").rglob("*.pt"))
            shutil.rmtree(base / "tree")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    speed, cp = statistics.median(r["speed"] for r in runs), statistics.median(copies)
    result = {
        "bytes": size, "cp": cp, "speed": speed, "ratio": speed / cp, "wanted": WANTED,
        "with_reading_back": statistics.median(r["bytes"] / (r["seconds"] + r["verified"]) for r in runs) / cp,
        "process_seconds": statistics.median(r["process"] for r in runs), "largest": largest,
        "peak": max(r["peak"] for r in runs), "memory_ratio": max(r["peak"] for r in runs) / largest, "memory_wanted": MEMORY,
    }  # fmt: skip
    print(
        f"{size / 1e9:.2f} GB: cp {cp / 1e9:.2f} GB/s, conversion {speed / 1e9:.2f} GB/s ({result['ratio']:.2f} of cp, wanted {WANTED}; "
        f"with reading back {result['with_reading_back']:.2f}), whole process {result['process_seconds']:.1f} s; "
        f"peak {result['peak'] / 1e6:.0f} MB, {result['memory_ratio']:.2f} of the largest file (wanted below {MEMORY})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    raise SystemExit(0 if result["ratio"] >= WANTED and result["memory_ratio"] < MEMORY else 1)


if __name__ == "__main__":
    main()
