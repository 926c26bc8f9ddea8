"""The documented system's recommended layouts of Qwen2.5-VL, planned: memory a rank, step time, bubble.

    python benchmarks/plan_layouts.py --json benchmarks/results/plan_layouts.json [--only 7b] [--output docs/plan.md]

Nothing is downloaded: the published sizes' configurations are written to a temporary directory. `--output` puts the table
between the marks of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.plan import accelerators, planner

MARKS = ("<!-- layouts -->", "<!-- end of layouts -->")
SIZES = {  # text: hidden size, layers, heads, key/value heads, MLP, vocabulary, tied; vision: MLP
    "3b": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32b": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72b": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("3b", 8, {}),
    ("7b", 8, {}),
    ("7b", 8, {"tp": 2}),
    ("7b", 8, {"pp": 2}),
    ("7b", 8, {"tp": 2, "pp": 2}),
    ("32b", 16, {"tp": 4}),
    ("32b", 16, {"tp": 4, "pp": 2}),
    ("72b", 32, {"tp": 8}),
    ("72b", 32, {"tp": 8, "pp": 2}),
    ("72b", 32, {"tp": 8, "pp": 4}),
]
TOKENS, BATCH, DEVICE = 4096, 128, "910b"


def config(size: str, directory: Path) -> Path:
    """config.json of a published size."""
    from transformers import Qwen2_5_VLConfig

    hidden, layers, heads, shared, mlp, vocabulary, tied, vision = SIZES[size]
    made = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared,
            "intermediate_size": mlp, "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": vision, "out_hidden_size": hidden,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112, "tokens_per_second": 2,
        },
        tie_word_embeddings=tied, image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip
    made.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    made.save_pretrained(directory / size)
    return directory / size


def planned(size: str, world: int, layout: dict[str, Any], directory: Path) -> dict[str, Any]:
    """One layout without recompute, and with full recompute when it does not fit."""
    source = config(size, directory)
    for recompute in ("none", "full"):
        made = recipes.validate({
            "name": size, "model": {"source": str(source)}, "data": {"max_length": TOKENS},
            "parallel": {**layout, "recompute": recompute}, "train": {"global_batch_size": BATCH},
        })  # fmt: skip
        began = time.process_time()
        family = planner.family_of(made)
        found = planner.plan(made, family, planner.Question(world, accelerators.named(DEVICE)))
        took = time.process_time() - began
        if found.fits:
            break
    return {
        "size": size, "world": world, "layout": layout, "recompute": recompute, "fits": found.fits,
        "peaks": [stage.trace.usage.peak for stage in found.stages],
        "states": [sum(stage.trace.usage.parts[kind] for kind in ("parameters", "gradients", "optimizer")) for stage in found.stages],
        "step": found.step, "mfu": found.mfu, "bubble": found.bubble, "cpu_seconds": took,
    }  # fmt: skip


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    layout = " ".join(f"{axis}{size}" for axis, size in {"tp": 1, "pp": 1, **found["layout"]}.items())
    peaks = " / ".join(f"{peak / 2**30:.1f}" for peak in found["peaks"])
    states = " / ".join(f"{state / 2**30:.1f}" for state in found["states"])
    fits = "yes" if found["fits"] else "**no**"
    return f"| {found['size']} | {found['world']} | {layout} | {found['recompute']} | {states} | {peaks} | {fits} | {found['step']:.1f} | {found['mfu']:.0%} | {found['bubble']:.0%} |"


HEAD = f"""Packs of {TOKENS} tokens (a quarter of them pictures), {BATCH} packs a step, bf16 with float32 masters, on {DEVICE} with 64 GiB; GiB of a
rank of each stage. Recompute is `full` where the layout does not fit without.

| size | devices | layout | recompute | states | peak | fits | step s | MFU | bubble |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    if asked.json and asked.json.is_file():
        results = json.loads(asked.json.read_text())
    with tempfile.TemporaryDirectory(prefix="polymodal-plan-") as directory:
        for size, world, layout in LAYOUTS:
            if asked.only and size not in asked.only.split(","):
                continue
            try:
                found = planned(size, world, layout, Path(directory))
            except PolymodalError as error:
                print(f"{size} {layout}: {error}", flush=True)
                continue
            print(row(found), f"({found['cpu_seconds']:.0f} s of CPU)", flush=True)
            kept = [r for r in results if (r["size"], r["world"], r["layout"]) != (size, world, layout)]
            results = [*kept, found]
            if asked.json:
                asked.json.parent.mkdir(parents=True, exist_ok=True)
                asked.json.write_text(json.dumps(results, indent=1))
    order = {
        (size, world, json.dumps(layout)): number for number, (size, world, layout) in enumerate(LAYOUTS)
    }
    results.sort(key=lambda r: order.get((r["size"], r["world"], json.dumps(r["layout"])), 99))
    if asked.output:
        before, _, rest = asked.output.read_text().partition(MARKS[0])
        made = HEAD + "\n".join(row(found) for found in results)
        partial = asked.output.with_suffix(".partial")
        partial.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        os.replace(partial, asked.output)


if __name__ == "__main__":
    main()
