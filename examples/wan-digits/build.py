"""Builds what the video demonstration starts from: clips of moving digits with captions, a small Wan VAE, a Wan pipeline.

The digits are scikit-learn's 1,797 real scans, each moving in four directions ("a seven moving left"), as mp4 files. The
VAE is an AutoencoderKLWan, trained here first; the text encoder is a UMT5EncoderModel, random and frozen; the denoiser
is a WanTransformer3DModel of which only the config is written: `polymodal train` draws its weights.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import shared
from shared import TRAIN, WORDS, scans

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns)
SIDE, SIZE, FRAMES, FPS = 16, 8, 17, 16  # pixels of a frame and of a digit; frames of a clip, a second
CHANNELS = 8  # of the latents
WINDOW = 5  # frames of the clips that the VAE learns from


def caption(digit: int, direction: str) -> str:
    return f"a {WORDS[digit]} moving {direction}"


def clip(scan: np.ndarray, direction: str, draw: random.Random) -> np.ndarray:
    """A scan on its way through the frame, a pixel every other frame: float32 [17, 16, 16] in 0..1.

    Drawn are how far from the middle the way lies (up to 2 pixels) and whether the first step comes a frame early.
    """
    steps = np.array(DIRECTIONS[direction])
    middle = np.where(steps == 0, draw.randint(-2, 2), 0) + (SIDE - SIZE) // 2
    early = draw.randrange(2)
    out = np.zeros((FRAMES, SIDE, SIDE), np.float32)
    for i in range(FRAMES):
        y, x = middle + steps * ((i + early) // 2 - FRAMES // 4)
        out[i, y : y + SIZE, x : x + SIZE] = scan
    return out


def data(directory: Path) -> tuple[Path, Path]:
    """Each scan in four directions as mp4 files, with their captions: train.jsonl, and held.jsonl of unseen scans."""
    from polymodal.generate.media import write_video

    files = directory / "train.jsonl", directory / "held.jsonl"
    if all(file.is_file() for file in files):
        return files
    (directory / "clips").mkdir(parents=True, exist_ok=True)
    images, digits = scans()
    draw = random.Random(0)
    rows: tuple[list[str], list[str]] = ([], [])
    for i, (scan, digit) in enumerate(zip(images, digits, strict=True)):
        for direction in DIRECTIONS if i < TRAIN else [draw.choice(list(DIRECTIONS))]:
            name = f"clips/{i:04d}-{direction}.mp4"
            grey = (clip(scan, direction, draw) * 255).round().astype(np.uint8)
            write_video(directory / name, np.repeat(grey[..., None], 3, -1), FPS)
            row = {
                "path": name,
                "cap": caption(int(digit), direction),
                "digit": int(digit),
                "direction": direction,
                "scan": i,
            }
            rows[i >= TRAIN].append(json.dumps(row))
    for file, lines in zip(files, rows, strict=True):
        file.write_text("\n".join(lines) + "\n")
    return files


def vae(steps: int, threads: int, seed: int = 0) -> Any:
    """An AutoencoderKLWan (4 x 4 pixels and 4 frames a latent) trained on clips drawn as it goes."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    torch.set_num_threads(threads)  # this part is one process
    model = AutoencoderKLWan(
        base_dim=16, dim_mult=[1, 2, 3], num_res_blocks=1, temperal_downsample=[True, True], z_dim=CHANNELS, scale_factor_spatial=4,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    )  # fmt: skip
    with torch.no_grad():  # a whisper of noise on latents to begin with: as much as there is signal drowns it
        model.quant_conv.bias[CHANNELS:] = -5.0
    images, _ = scans()
    draw = random.Random(seed)

    def batch(count: int) -> torch.Tensor:
        made = [
            clip(images[draw.randrange(TRAIN)], draw.choice(list(DIRECTIONS)), draw) for _ in range(count)
        ]
        return torch.from_numpy(np.stack(made))[:, None].expand(-1, 3, -1, -1, -1) * 2 - 1

    raw: list[Any] = []  # of each chunk before `decode` clamps it: what is clamped has no gradient
    hook = model.decoder.register_forward_hook(lambda module, given, made: raw.append(made))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        if step < 0.7 * steps:  # mostly parts of clips: a few frames cost a few frames
            start = draw.choice(range(0, FRAMES - WINDOW + 1, 4))
            pixels = batch(16)[:, :, start : start + WINDOW]
        else:
            pixels = batch(8)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            raw.clear()
            model.decode(posterior.sample())
        error = (torch.cat(raw, 2).float() - pixels).square().mean()
        loss = error + 1e-7 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(
                f"VAE step {step + 1}/{steps} | error {error.item():.4f} | {time.monotonic() - began:.0f} s",
                flush=True,
            )
    hook.remove()
    model.eval()
    with torch.no_grad():
        latents = model.encode(batch(256)).latent_dist.mode()
    axes = (0, 2, 3, 4)
    model.register_to_config(latents_mean=latents.mean(axes).tolist(), latents_std=latents.std(axes).tolist())
    return model


def pipeline(directory: Path, steps: int, threads: int) -> bool:
    """Write the pipeline in diffusers' layout; False when it was there already."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    if (directory / "model_index.json").is_file():
        return False
    trained = vae(steps, threads)
    torch.manual_seed(1)
    words = shared.tokenizer(["a", "moving", *WORDS, *DIRECTIONS], length=6)
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    )
    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=32, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=64, freq_dim=128,
        ffn_dim=768, num_layers=6, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    made = WanPipeline(
        tokenizer=words, text_encoder=text, vae=trained, scheduler=scheduler, transformer=denoiser
    )
    made.save_pretrained(directory)
    return True
