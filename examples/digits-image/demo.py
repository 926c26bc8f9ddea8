"""The demonstration behind `make demo-image`: data, VAE, encode, train, generate, judge, report.

Everything but the small VAE is a command that a user would type. A second run takes up what is there: data, VAE,
features and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on cores that others use
import build
import shared
from shared import polymodal, say

HERE = Path(__file__).parent
GUIDANCE = 3.0
SAMPLES = 200


def grey(pictures: np.ndarray) -> np.ndarray:
    """RGB [N, 32, 32, 3] uint8 -> brightness [N, 8, 8] in 0..1, each stretched to its own maximum."""
    value = pictures.astype(np.float32).max(-1)
    small = value.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    return small / np.maximum(small.max((1, 2), keepdims=True), 1e-6)


def judge() -> tuple[Any, float]:
    """A classifier of digits fitted on the real training scans, and its share of right answers on the held-out ones."""
    images, digits = build.scans()
    shown = np.stack([np.asarray(build.picture(scan, "white")) for scan in images])
    features = grey(shown).reshape(len(shown), -1)
    model = shared.fitted(features[: build.TRAIN], digits[: build.TRAIN])
    return model, float((model.predict(features[build.TRAIN :]) == digits[build.TRAIN :]).mean())


def colour_of(picture: np.ndarray) -> str:
    """The nearest of the six colours to the mean of a picture's bright pixels."""
    pixels = picture.reshape(-1, 3).astype(np.float32)
    bright = pixels[pixels.max(1) > 0.6 * pixels.max()]
    mean = bright.mean(0) / max(1.0, float(bright.mean(0).max()))
    return min(
        build.COLOURS,
        key=lambda c: float(np.square(mean - np.array(build.COLOURS[c]) / max(build.COLOURS[c])).sum()),
    )


def neighbours(pictures: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Nearest training scan of each picture, and median distances: of what was generated, and of held-out real scans.

    Were the model repeating its training scans, its distances would be far below those of unseen real ones.
    """
    images, _ = build.scans()
    real = grey(np.stack([np.asarray(build.picture(scan, "white")) for scan in images])).reshape(
        len(images), -1
    )
    train, held = real[: build.TRAIN], real[build.TRAIN :]

    found, mine = shared.nearest(grey(pictures).reshape(len(pictures), -1), train)
    return found, {
        "generated": float(np.median(mine)), "held out": float(np.median(shared.nearest(held, train)[1])),
    }  # fmt: skip


def report(root: Path, result: dict, rows: list[dict], pictures: np.ndarray, nearest: np.ndarray) -> Path:
    from PIL import Image

    from polymodal import pages
    from polymodal.evaluate import run_page
    from polymodal.evaluate.thumbnails import thumbnail

    images, _ = build.scans()
    folder = root / "neighbours"
    folder.mkdir(exist_ok=True)
    shown = [
        pages.Card(
            "All samples of the sheet", [], None, [thumbnail(str(root / "samples" / "sheet.png"), 900)]
        )
    ]
    for i in random.Random(1).sample(range(len(rows)), min(24, len(rows))):
        row, place = rows[i], folder / f"{i:03d}.png"
        pair = np.concatenate([pictures[i], np.asarray(build.picture(images[nearest[i]], "white"))], axis=1)
        Image.fromarray(pair).resize((256, 128), Image.Resampling.NEAREST).save(place)
        answered = [("judged", f"{row['seen_colour']} {build.WORDS[row['seen_digit']]}", float(row["right"]))]
        shown.append(
            pages.Card(
                row["prompt"],
                answered,
                f"{row['colour']} {build.WORDS[row['digit']]}",
                [thumbnail(str(place))],
            )
        )
    numbers = {
        "right digit": f"{result['digit']:.1%}", "right colour": f"{result['colour']:.1%}", "samples": str(result["samples"]),
        "guidance": f"{result['guidance']:g}", "the judge on held-out real digits": f"{result['judge']:.1%}", "minutes": f"{result['seconds'] / 60:.1f}",
        "median distance to the nearest training scan": f"{result['distance']['generated']:.2f} (held-out real scans: {result['distance']['held out']:.2f})",
    }  # fmt: skip
    lead = (
        f"A {result['parameters_millions']:.1f} M parameter FLUX transformer with random weights learned to draw coloured digits from "
        f"{result['rows']} pictures. Left: what it drew; right: the nearest training scan, so that repeating would be seen."
    )
    steps = [
        ("Draw something else.", f"polymodal generate {root}/run --ema --prompt 'a yellow eight' --guidance 3 --out {root}/mine"),
        ("Export it and open it with diffusers.", f"polymodal export {root}/run {root}/export --ema"),
        ("Write a recipe for a real checkpoint.", "polymodal init flux.1 --size dev --task lora --devices 8"),
    ]  # fmt: skip
    text = run_page.page(
        "Coloured digits, from captions",
        lead,
        numbers,
        run_page.curves(run_page.read_metrics(root / "run"), unit="mean squared error"),
        shown,
        steps,
    )
    return pages.write(root / "report.html", text)


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo-image"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--vae-steps", type=int, default=450)
    parser.add_argument("override", nargs="*", help="a.b=c overrides of the recipe")
    args = parser.parse_args()
    root, started, nproc = args.dir, time.monotonic(), ["--nproc", str(args.nproc)]
    root.mkdir(parents=True, exist_ok=True)

    say("data: real scans of digits in six colours, with captions")
    file = build.data(root / "data")
    count = len(file.read_text().splitlines())
    print(f"{count} pictures")

    say("a small AutoencoderKL, and a FLUX pipeline around it")
    psnr = build.pipeline(root / "pipeline", root / "data" / "pictures", args.vae_steps)
    print("there already" if psnr is None else f"reconstruction {psnr:.1f} dB")

    overrides = [
        f"model.source={root}/pipeline", f"data.datasets.0.path={file}", f"data.features={root}/features", f"checkpoint.dir={root}/run", *args.override,
    ]  # fmt: skip
    recipe = str(HERE / "recipe.yaml")
    say("latents and text embeddings, once")
    polymodal("encode", recipe, *nproc, *overrides)
    say("training")
    polymodal("train", recipe, *nproc, *overrides)

    say(f"{SAMPLES} samples")
    draw = random.Random(7)
    wanted = [(draw.choice(list(build.COLOURS)), draw.randrange(10)) for _ in range(SAMPLES)]
    prompts = root / "prompts.txt"
    prompts.write_text("".join(build.caption(c, d) + "\n" for c, d in wanted))
    polymodal(
        "generate", str(root / "run"), "--ema", "--prompts", str(prompts), "--out", str(root / "samples"), "--steps", "20", "--guidance", str(GUIDANCE),
        "--height", "32", "--width", "32", "--batch-size", "50", *nproc,
    )  # fmt: skip
    rows = json.loads((root / "samples" / "samples.json").read_text())["samples"]
    pictures = np.stack(
        [np.asarray(Image.open(root / "samples" / row["file"]).convert("RGB")) for row in rows]
    )

    say("the judge")
    model, right = judge()
    seen = model.predict(grey(pictures).reshape(len(pictures), -1))
    for row, (colour, digit), saw, picture in zip(rows, wanted, seen, pictures, strict=True):
        row |= {"colour": colour, "digit": digit, "seen_digit": int(saw), "seen_colour": colour_of(picture)}
        row["right"] = row["seen_digit"] == digit and row["seen_colour"] == colour
    nearest, distance = neighbours(pictures)
    config = json.loads((root / "run" / "summary.json").read_text())
    result = {
        "digit": float(np.mean([r["seen_digit"] == r["digit"] for r in rows])), "colour": float(np.mean([r["seen_colour"] == r["colour"] for r in rows])),
        "samples": len(rows), "guidance": GUIDANCE, "seconds": round(time.monotonic() - started, 1), "judge": right, "distance": distance, "rows": count,
        "steps": config["step"], "resumed_at": config["resumed_at"], "processes": args.nproc, "parameters_millions": shared.parameters(root / "pipeline") / 1e6,
    }  # fmt: skip
    page = report(root, result, rows, pictures, nearest)
    shared.write_result(root / "result.json", result)
    say(
        f"right digit {result['digit']:.1%}, right colour {result['colour']:.1%}; {result['seconds'] / 60:.1f} minutes; open {page}"
    )


if __name__ == "__main__":
    main()
