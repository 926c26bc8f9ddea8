"""Conversion of a checkpoint, hub -> tree at TP 2 x PP 2: its speed over `cp` of the same bytes, and its peak of memory.

    python benchmarks/convert_speed.py [--gigabytes 4] [--rounds 3] [--json FILE]

Writes a random Qwen2.5-VL checkpoint of that size in bf16, then in turns copies its weight files with cp and converts
them in a process of its own, on the same disk; files are in the page cache for both, neither waits for the disk.
Two cps: one that copies the bytes through memory (--reflink=never), as every program that looks at them must, which is
the opponent of the target, and plain cp, which leaves the copying to the kernel. Two conversions: writing only, and with
every byte read back and compared; both without the start of Python. Wanted: writing at least 0.7 of the first cp.
CPU seconds (all threads) are printed beside the times: they tell on a machine that is not quiet. The memory is the peak
resident set of the whole process; wanted: below twice the largest file written.
"""

from __future__ import annotations

import argparse
import json
import resource
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
        writing.empty_safetensors(path, spec)
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with open(path, "r+b") as file:
            file.seek(begin)
            left = path.stat().st_size - begin
            while left:
                left -= file.write(noise[: min(left, len(noise))])
        index |= dict.fromkeys(spec, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def convert(source: Path, target: Path, verify: bool) -> None:
    """Runs in a process of its own; prints what it measured."""
    from polymodal.convert import engine, output
    from polymodal.convert.family import family, read_config
    from polymodal.convert.options import Settings
    from polymodal.convert.tree import Parallel

    config = read_config(source)
    layers, depth = config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"]
    parallel = Parallel(2, 1, {"llm": ((layers // 2, layers - layers // 2),), "vit": ((depth, 0),)})
    opened = engine.hub(family("qwen2.5-vl"), "", source)
    before = time.process_time()
    report = output.to_tree(opened, parallel, target, Settings(verify=verify))
    cpu = time.process_time() - before
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": report.seconds, "cpu": cpu, "bytes": report.bytes, "peak": peak * 1024}))


def run(words: list[str], size: int) -> dict[str, float]:
    """Speed in bytes/s and CPU seconds of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    one = {"process": seconds, "cpu": cpu, "seconds": seconds, "bytes": size}
    if done.stdout:
        one |= json.loads(done.stdout.splitlines()[-1])
    return {**one, "speed": one["bytes"] / one["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        return convert(Path(args.convert[0]), Path(args.convert[1]), args.convert[2] == "verified")
    base = Path(tempfile.mkdtemp(prefix="polymodal-convert-"))
    runs: dict[str, list[dict]] = {}
    try:
        size = write(base / "source", args.gigabytes)
        weights = [str(path) for path in sorted((base / "source").glob("*.safetensors"))]
        own = [sys.executable, __file__, "--convert", str(base / "source"), str(base / "out")]
        commands = {
            "cp": ["cp", "--reflink=never", *weights, str(base / "out")], "cp_by_kernel": ["cp", *weights, str(base / "out")],
            "writing": [*own, "written"], "verified": [*own, "verified"],
        }  # fmt: skip
        for _ in range(args.rounds):
            for name, words in commands.items():
                (base / "out").mkdir()
                runs.setdefault(name, []).append(run(words, size))
                largest = max([p.stat().st_size for p in (base / "out").rglob("*.pt")], default=0)
                shutil.rmtree(base / "out")
    finally:
        shutil.rmtree(base, ignore_errors=True)
    middle = {
        name: {key: statistics.median(one[key] for one in some) for key in ("speed", "cpu", "process")}
        for name, some in runs.items()
    }
    cp, peak = middle["cp"], max(one["peak"] for one in runs["verified"])
    result = {
        "bytes": size, "runs": middle, "ratio": middle["writing"]["speed"] / cp["speed"], "wanted": WANTED,
        "with_reading_back": middle["verified"]["speed"] / cp["speed"],
        "cpu_ratio": middle["writing"]["cpu"] / cp["cpu"], "largest": largest, "peak": peak,
        "memory_ratio": peak / largest, "memory_wanted": MEMORY,
    }  # fmt: skip
    print(f"{size / 1e9:.2f} GB; in turns, median of {args.rounds}:")
    titles = {
        "cp": "cp through memory", "cp_by_kernel": "cp by the kernel", "writing": "conversion, writing",
        "verified": "conversion, read back",
    }  # fmt: skip
    for name, one in middle.items():
        print(
            f"  {titles[name]:22} {one['speed'] / 1e9:5.2f} GB/s  {one['cpu']:5.2f} CPU s  {one['speed'] / cp['speed']:.2f} of cp"
        )
    print(
        f"wanted: writing at least {WANTED} of cp: {result['ratio']:.2f}; "
        f"peak {peak / 1e6:.0f} MB = {result['memory_ratio']:.2f} of the largest file (wanted below {MEMORY})"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    raise SystemExit(0 if result["ratio"] >= WANTED and result["memory_ratio"] < MEMORY else 1)


if __name__ == "__main__":
    main()
