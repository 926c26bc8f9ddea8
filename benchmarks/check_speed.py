"""How fast `polymodal check` measures lengths: records of text and pictures a second, from headers, no pixel decoded.

    python benchmarks/check_speed.py [--samples 100000] [--json FILE]

Writes that many rows with their own picture files (links to a few hundred real JPEG and PNG files, so that each row
opens its own), then measures them as `check` and `train` do, with as many processes as there are cores, and again
from the cached index. Wanted: 5,000 samples a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import ground

WANTED = 5000


def write_rows(directory: Path, samples: int) -> Path:
    """train.jsonl of so many conversations; three quarters JPEG, one quarter PNG, of 50 sizes."""
    from PIL import Image

    draw, text = random.Random(0), ground.words()
    scenes = [Image.fromarray(image) for image in ground.photographs()]
    files = []
    for n in range(200):
        width, height = draw.randrange(160, 640), draw.randrange(120, 427)
        files.append(directory / f"{n}.{'png' if n % 4 == 3 else 'jpg'}")
        draw.choice(scenes).crop((0, 0, width, height)).save(files[-1])
    with (directory / "train.jsonl").open("w") as out:
        for i in range(samples):
            if i % 1000 == 0:
                folder = directory / f"images{i // 1000}"
                folder.mkdir()
            names = []
            for k in range(draw.choices(ground.PICTURES, ground.SHARES)[0]):
                source = draw.choice(files)
                names.append(f"{folder.name}/{i}-{k}{source.suffix}")
                os.link(source, directory / names[-1])
            row = {"messages": ground.conversation(draw, text, len(names)), "images": names}
            out.write(json.dumps(row) + "\n")
    return directory / "train.jsonl"


def measure(root: Path, data: Path) -> dict[str, Any]:
    """Seconds of wall and of CPU (all processes), and what was found."""
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.index import build_index
    from polymodal.data.source import open_corpus
    from polymodal.models import catalog

    recipe = ground.recipe(root, data, root / "run", steps=1)
    chat = ChatProcessor(catalog.family(recipe.model).media_processor(recipe.data), recipe.data)
    began, cpu = time.perf_counter(), os.times()
    corpus = open_corpus(recipe.data.datasets, recipe.data.attr)
    index = build_index(corpus, chat, recipe.data)
    used = os.times()
    return {
        "samples": len(index), "tokens": int(index.tokens.sum()), "pictures": int((index.media["vision"] > 0).sum()), "usable": int(index.usable.sum()),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": sum(used[:4]) - sum(cpu[:4]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ground.write_checkpoint(root / "model")
        (root / "data").mkdir()
        data = write_rows(root / "data", args.samples)
        first, again = measure(root, data), measure(root, data)
    rate = first["samples"] / first["seconds"]
    print(
        f"{first['samples']:,} samples, {first['pictures']:,} with pictures, {first['tokens'] / first['samples']:.0f} tokens a sample: {rate:,.0f} samples/s "
        f"(wanted {WANTED:,}), {first['samples'] / first['cpu_seconds']:,.0f} a CPU second; from the cached index {again['seconds']:.1f} s"
    )
    if args.json:
        out = {"rate": rate, "wanted": WANTED, "ratio": rate / WANTED, "first": first, "again": again}
        ground.add_to(args.json, {}, **out)


if __name__ == "__main__":
    main()
