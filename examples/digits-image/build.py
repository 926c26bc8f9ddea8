"""Builds what the picture demonstration starts from: coloured digits with captions, a small VAE, and a FLUX pipeline.

The digits are scikit-learn's 1,797 real scans, each in several colours with captions such as "a red seven". The VAE is
diffusers' AutoencoderKL, trained here first; the text encoders are of the real classes, random and frozen; the
denoiser is a FluxTransformer2DModel of which only the config is written: `polymodal train` draws its weights.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import shared
from shared import TRAIN, WORDS, scans

COLOURS = {
    "red": (255, 30, 30), "green": (30, 230, 50), "blue": (50, 80, 255), "yellow": (255, 230, 0), "pink": (255, 60, 220), "white": (245, 245, 245),
}  # fmt: skip
TEMPLATES = ("a {} {}", "the digit {1} in {0}", "{1} , {0}", "a handwritten {} {}")
SIDE = 32


def caption(colour: str, digit: int, template: str = TEMPLATES[0]) -> str:
    return template.format(colour, WORDS[digit])


def picture(scan: np.ndarray, colour: str) -> Any:
    """A scan as a 32 x 32 picture of a colour on black."""
    from PIL import Image

    large = Image.fromarray((scan * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = np.asarray(large, np.float32)[..., None] / 255
    return Image.fromarray((grey * np.array(COLOURS[colour])).round().astype(np.uint8))


def data(directory: Path, colours: int = 4) -> Path:
    """Each training scan in `colours` colours, as PNG files and train.jsonl. Returns the data file."""
    file = directory / "train.jsonl"
    if file.is_file():
        return file
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    images, digits = scans()
    draw, lines = random.Random(0), []
    for i in range(TRAIN):
        for colour in draw.sample(list(COLOURS), colours):
            name = f"pictures/{i:04d}-{colour}.png"
            picture(images[i], colour).save(directory / name)
            lines.append(
                json.dumps({"image": name, "cap": caption(colour, int(digits[i]), draw.choice(TEMPLATES))})
            )
    file.write_text("\n".join(lines) + "\n")
    return file


def tokenizer(length: int) -> Any:
    """A word-level tokenizer of the captions' words."""
    return shared.tokenizer(["a", "the", "digit", "in", ",", "handwritten", *WORDS, *COLOURS], length)


def vae(pictures: Path, steps: int, seed: int = 0) -> tuple[Any, float]:
    """An AutoencoderKL trained on the pictures (mean squared error and a whisper of KL); (model, PSNR in dB)."""
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    torch.manual_seed(seed)
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))  # this part is one process
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[16, 32, 32],
        layers_per_block=1, norm_num_groups=8, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    files = sorted(pictures.glob("*.png"))
    pixels = (
        torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files]).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (48,))]
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(batch).latent_dist
            back = model.decode(posterior.sample()).sample
        loss = (back.float() - batch).square().mean() + 1e-6 * posterior.kl().mean() / batch[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(
                f"VAE step {step + 1}/{steps} | loss {loss.item():.4f} | {time.monotonic() - began:.0f} s",
                flush=True,
            )
    model.eval()
    with torch.no_grad():
        latents = model.encode(pixels[::8]).latent_dist.mode()
        error = (model.decode(latents[:128]).sample.clamp(-1, 1) - pixels[::8][:128]).square().mean()
    model.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return model, float(10 * torch.log10(4 / error))


def pipeline(directory: Path, pictures: Path, steps: int) -> float | None:
    """Write the pipeline in diffusers' layout; returns the VAE's PSNR, None when it was there already."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    if (directory / "model_index.json").is_file():
        return None
    trained, psnr = vae(pictures, steps)
    torch.manual_seed(1)
    length, words = 8, len(tokenizer(8))
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=length,
            eos_token_id=1, bos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(vocab_size=words, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2))
    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=6, joint_attention_dim=64,
        pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=trained, text_encoder=clip, tokenizer=tokenizer(length), text_encoder_2=t5,
        tokenizer_2=tokenizer(length), transformer=denoiser,
    )  # fmt: skip
    made.save_pretrained(directory)
    return psnr
