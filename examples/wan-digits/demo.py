"""The demonstration behind `make wan-digits`: clips, VAE, data check, encode, train, generate, judge, report.

Everything but the clips and the small VAE is a command that a user would type. A second run takes up what is there:
clips, VAE, features and checkpoints.
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
from build import SIDE, SIZE
from shared import polymodal, say

HERE = Path(__file__).parent
GUIDANCE = 3.0
SAMPLES = 240
LEAST = 3.0  # pixels that a digit must move to be called moving


def frames_of(path: Path) -> np.ndarray:
    """Brightness of an mp4's frames, float32 [F, 16, 16] in 0..1."""
    from polymodal.data import media

    header = media.video_header(str(path))
    return np.asarray(media.video(str(path), header, range(header.frames)), np.float32).mean(-1) / 255


def centre(frame: np.ndarray) -> np.ndarray:
    """(row, column) of the centroid of what is brighter than a quarter of the brightest."""
    weight = np.where(frame > 0.25 * frame.max(), frame, 0) + 1e-9
    grid = np.indices(frame.shape)
    return (grid * weight).sum((1, 2)) / weight.sum()


def cropped(frame: np.ndarray) -> np.ndarray:
    """8 x 8 pixels around the centroid as 64 features in 0..1, stretched to the brightest."""
    y, x = (centre(frame) + 0.5).round().astype(int) + SIZE // 2
    small = np.pad(frame, SIZE)[y : y + SIZE, x : x + SIZE]
    return (small / max(float(small.max()), 1e-6)).ravel()


def features_of(frames: np.ndarray) -> np.ndarray:
    """[F, 64] of a clip."""
    return np.stack([cropped(frame) for frame in frames])


def direction_of(frames: np.ndarray) -> str:
    """Where the centroid goes from the first frame to the last; "nowhere" below 3 pixels."""
    rows, columns = centre(frames[-1]) - centre(frames[0])
    if max(abs(rows), abs(columns)) < LEAST:
        return "nowhere"
    if abs(rows) > abs(columns):
        return "down" if rows > 0 else "up"
    return "right" if columns > 0 else "left"


class Judge:
    """A classifier of digits fitted on frames of real training clips; a clip's digit is that of most of its frames."""

    def __init__(self, data: Path, rows: list[dict]):
        chosen = [
            row for i, row in enumerate(rows) if (i // 4 + i) % 4 == 0
        ]  # each scan once, directions in turn
        clips = [features_of(frames_of(data / row["path"])) for row in chosen]
        self.rows, self.middles = chosen, np.stack([clip.mean(0) for clip in clips])
        seen = np.concatenate([clip[[0, 8, 16]] for clip in clips])
        self.model = shared.fitted(seen, np.repeat([row["digit"] for row in chosen], 3))

    def __call__(self, frames: np.ndarray) -> tuple[int, str, float]:
        """(digit, direction, share of the frames that show this digit)."""
        votes = np.bincount(self.model.predict(features_of(frames)), minlength=10)
        return int(votes.argmax()), direction_of(frames), float(votes.max() / votes.sum())

    def shares(self, clips: list[np.ndarray], rows: list[dict]) -> dict[str, float]:
        """Shares of clips with the digit, the direction and both of their rows."""
        seen = [self(clip)[:2] for clip in clips]
        digit = np.array([s[0] == row["digit"] for s, row in zip(seen, rows, strict=True)])
        direction = np.array([s[1] == row["direction"] for s, row in zip(seen, rows, strict=True)])
        return {
            "digit": float(digit.mean()),
            "direction": float(direction.mean()),
            "both": float((digit & direction).mean()),
        }


def reconstructed(pipeline: Path, clips: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """(what the VAE makes of real clips, PSNR in dB)."""
    import torch
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(pipeline / "vae")
    pixels = torch.from_numpy(np.stack(clips))[:, None].expand(-1, 3, -1, -1, -1) * 2 - 1
    with torch.no_grad():
        back = torch.cat(
            [model.decode(model.encode(part).latent_dist.mode()).sample for part in pixels.split(32)]
        )
    error = float((back - pixels).square().mean())
    return list((back.mean(1).numpy() + 1) / 2), float(10 * np.log10(4 / error))


def strip(frames: np.ndarray) -> Any:
    """Six frames of a clip side by side, four times as large."""
    from PIL import Image

    chosen = frames[np.linspace(0, len(frames) - 1, 6).round().astype(int)]
    picture = Image.fromarray((np.concatenate(list(chosen), axis=1).clip(0, 1) * 255).astype(np.uint8))
    return picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST)


def report(root: Path, result: dict, rows: list[dict], clips: list[np.ndarray], nearest: list[Path]) -> Path:
    from polymodal import pages
    from polymodal.evaluate import run_page
    from polymodal.evaluate.thumbnails import thumbnail

    sheet = thumbnail(str(root / "samples" / "sheet.png"), 1200)
    shown = [pages.Card("A clip a row, six of its frames", [], None, [sheet])]
    for i in random.Random(1).sample(range(len(rows)), min(24, len(rows))):
        row = rows[i]
        answered = [("judged", build.caption(row["seen_digit"], row["seen_direction"]), float(row["right"]))]
        pictures = [thumbnail(strip(clip), 384) for clip in (clips[i], frames_of(nearest[i]))]
        shown.append(
            pages.Card(row["prompt"], answered, build.caption(row["digit"], row["direction"]), pictures)
        )
    real, vae, distance = result["judge"], result["reconstructed"], result["distance"]
    numbers = {
        "right digit": f"{result['digit']:.1%}", "right direction": f"{result['direction']:.1%}", "both right": f"{result['both']:.1%}",
        "samples": str(result["samples"]), "guidance": f"{result['guidance']:g}",
        "the judge on held-out real clips": f"{real['both']:.1%}", "the same after the VAE": f"{vae['both']:.1%} ({vae['psnr']:.1f} dB)",
        "minutes": f"{result['seconds'] / 60:.1f}",
        "median distance to the nearest training scan": f"{distance['generated']:.2f} (held-out real scans: {distance['held out']:.2f})",
    }  # fmt: skip
    lead = (
        f"A {result['parameters_millions']:.1f} M parameter Wan transformer with random weights learned to draw moving digits from "
        f"{result['rows']} clips. Above: frames that it drew; below: the nearest training clip, so that repeating would be seen."
    )
    steps = [
        ("Draw something else.", f"polymodal generate {root}/run --ema --prompt 'a seven moving up' --guidance 3 --frames 17 --height 16 --width 16 --out {root}/mine"),
        ("Export it and open it with diffusers.", f"polymodal export {root}/run {root}/export --ema"),
        ("Write a recipe for a real checkpoint.", "polymodal init wan2.1 --size 1.3b --task lora --devices 8"),
    ]  # fmt: skip
    curves = run_page.curves(run_page.read_metrics(root / "run"), unit="mean squared error")
    return pages.write(
        root / "report.html",
        run_page.page("Moving digits, from captions", lead, numbers, curves, shown, steps),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/wan-digits"))
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--vae-steps", type=int, default=1700)
    parser.add_argument("override", nargs="*", help="a.b=c overrides of the recipe")
    args = parser.parse_args()
    root, started, nproc = args.dir, time.monotonic(), ["--nproc", str(args.nproc)]
    root.mkdir(parents=True, exist_ok=True)

    say("data: real scans of digits, each moving in four directions")
    file, unseen = build.data(root / "data")
    train, held = ([json.loads(line) for line in f.read_text().splitlines()] for f in (file, unseen))
    polymodal("data", "check", str(file))

    say("a small AutoencoderKLWan, and a Wan pipeline around it")
    if not build.pipeline(root / "pipeline", args.vae_steps, args.nproc):
        print("there already")

    overrides = [
        f"model.source={root}/pipeline", f"data.datasets.0.path={file}", f"data.features={root}/features", f"checkpoint.dir={root}/run", *args.override,
    ]  # fmt: skip
    recipe = str(HERE / "recipe.yaml")
    say("latents and text embeddings, once")
    polymodal("encode", recipe, *nproc, *overrides)
    say("training")
    polymodal("train", recipe, *nproc, *overrides)

    say(f"{SAMPLES} samples")
    wanted = [(d, w) for w in build.DIRECTIONS for d in range(10)] * (SAMPLES // 40)
    random.Random(7).shuffle(wanted)
    prompts = root / "prompts.txt"
    prompts.write_text("".join(build.caption(*one) + "\n" for one in wanted))
    polymodal(
        "generate", str(root / "run"), "--ema", "--prompts", str(prompts), "--out", str(root / "samples"), "--steps", "20", "--guidance", str(GUIDANCE),
        "--height", str(SIDE), "--width", str(SIDE), "--frames", str(build.FRAMES), "--fps", str(build.FPS), "--batch-size", "40", *nproc,
    )  # fmt: skip
    rows = json.loads((root / "samples" / "samples.json").read_text())["samples"]
    clips = [frames_of(root / "samples" / row["file"]) for row in rows]

    say("the judge")
    judge = Judge(root / "data", train)
    real = [frames_of(root / "data" / row["path"]) for row in held]
    back, psnr = reconstructed(root / "pipeline", real)
    for row, (digit, direction), made in zip(rows, wanted, clips, strict=True):
        saw, went, agree = judge(made)
        row |= {
            "digit": digit,
            "direction": direction,
            "seen_digit": saw,
            "seen_direction": went,
            "frames_agree": agree,
        }
        row["right"] = (saw, went) == (digit, direction)
    place, mine = shared.nearest(np.stack([features_of(made).mean(0) for made in clips]), judge.middles)
    _, theirs = shared.nearest(np.stack([features_of(one).mean(0) for one in real]), judge.middles)
    config = json.loads((root / "run" / "summary.json").read_text())
    result = {
        **judge.shares(clips, rows), "samples": len(rows), "guidance": GUIDANCE, "seconds": round(time.monotonic() - started, 1),
        "frames_agree": float(np.mean([row["frames_agree"] for row in rows])), "judge": judge.shares(real, held),
        "reconstructed": {**judge.shares(back, held), "psnr": psnr},
        "distance": {"generated": float(np.median(mine)), "held out": float(np.median(theirs))}, "rows": len(train), "steps": config["step"],
        "resumed_at": config["resumed_at"], "processes": args.nproc, "parameters_millions": shared.parameters(root / "pipeline") / 1e6,
    }  # fmt: skip
    nearest = [root / "data" / judge.rows[i]["path"] for i in place]
    page = report(root, result, rows, clips, nearest)
    (root / "judged.json").write_text(json.dumps(rows, indent=1))
    shared.write_result(root / "result.json", result)
    say(
        f"right digit {result['digit']:.1%}, right direction {result['direction']:.1%}, both {result['both']:.1%}; "
        f"{result['seconds'] / 60:.1f} minutes; open {page}"
    )


if __name__ == "__main__":
    main()
