"""What our code costs around a generating model: encoding, the training step, and what features save.

    python benchmarks/generation.py [--only encode step diffusers online memory] [--steps 8] [--json FILE]

A small Wan 2.1 of the real classes (AutoencoderKLWan, UMT5, WanTransformer3DModel; random weights) and mp4 clips cut
from real photographs, 17 frames of 128 x 96. One process on one core in float32, timed in its CPU seconds, in turns
(A B B A), the quicker of two counts: other work on the machine makes a side slower, never quicker.

encode: `polymodal encode` from mp4 files to features on disk, over bare calls of VAE and text encoder on decoded
tensors; throughput, wanted at least 0.95. step: the trainer's step on cached latents over a bare loop with the same
batches; time, wanted at most 1.03. diffusers: samples a second from files to optimizer step over the loop of diffusers'
training examples (accelerate, DataLoader over cached latents, timesteps from the scheduler); wanted at least 1.0.
online: time of a step that encodes its clips itself over one on features. memory: bytes of the frozen encoders, and
what a process that trains on features holds of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ground

WANTED = {"encode": 0.95, "step": 1.03, "diffusers": 1.0}
FRAMES, HEIGHT, WIDTH = 17, 96, 128
BATCH = 2
SKIPPED = 2


def write_pipeline(directory: Path) -> Path:
    """A Wan 2.1 pipeline in diffusers' layout, about 13 million parameters without the text encoder."""
    import build as digits
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ground.words()
    tokenizer = digits.tokenizer([" ".join(words[i : i + 50]) for i in range(0, 20_000, 50)], vocabulary=4096)
    tokenizer.model_max_length = 512
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=256, d_kv=32, d_ff=512, num_layers=2, num_heads=8, pad_token_id=tokenizer.pad_token_id
    )  # fmt: skip
    made = WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), vae=AutoencoderKLWan(base_dim=16, z_dim=16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=6, attention_head_dim=64, text_dim=256, freq_dim=64, ffn_dim=1024, num_layers=4, cross_attn_norm=True
        ),
    )  # fmt: skip
    made.save_pretrained(directory)
    return directory


def write_clips(directory: Path, count: int) -> Path:
    """Clips that pan over real photographs, as mp4, with captions. Returns the data file."""
    import av
    import numpy as np

    (directory / "videos").mkdir(parents=True)
    photographs, words, lines = ground.photographs(), ground.words(), []
    draw = np.random.default_rng(0)
    for number in range(count):
        whole = photographs[number % len(photographs)]
        y, x = (int(draw.integers(n)) for n in (whole.shape[0] - HEIGHT, whole.shape[1] - WIDTH - 2 * FRAMES))
        name = f"videos/{number:03d}.mp4"
        with av.open(str(directory / name), "w") as out:
            stream = out.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for t in range(FRAMES):
                shown = np.ascontiguousarray(whole[y : y + HEIGHT, x + 2 * t : x + 2 * t + WIDTH])
                out.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            out.mux(stream.encode())
        facts = {"num_frames": FRAMES, "fps": 16, "resolution": {"height": HEIGHT, "width": WIDTH}}
        start = int(draw.integers(10_000))
        lines.append({"path": name, "cap": " ".join(words[start : start + 24]), **facts})
    (directory / "data.json").write_text(json.dumps(lines))
    return directory / "data.json"


def recipe(root: Path, name: str, steps: int, **data: Any) -> Any:
    from polymodal import recipe as recipes

    return recipes.validate({
        "name": "benchmark", "model": {"source": str(root / "pipeline")},
        "data": {
            "datasets": [{"path": str(root / "data" / "data.json")}], "features": str(root / "features"), "workers": 0, "encode_batch": BATCH,
            "clip": {"frames": [FRAMES], "sizes": [[HEIGHT, WIDTH]], "fps": 16}, **data,
        },
        "train": {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "precision": "fp32", "diffusion": {"drop": 0.0}},
        "optim": {"lr": 1e-4, "schedule": {"name": "constant"}}, "checkpoint": {"dir": str(root / name), "every": 0, "save": "weights", "resume": "never"},
        "monitor": {"trackers": []},
    })  # fmt: skip


def in_turns(
    a: Callable[[], None], b: Callable[[], None], clock: Callable[[], float] = time.process_time
) -> tuple[float, float]:
    """CPU seconds of each, or those of another clock, the quicker of two."""

    def timed(what: Callable[[], None]) -> float:
        began = clock()
        what()
        return clock() - began

    seconds = [timed(x) for x in (a, b, b, a)]
    return min(seconds[0], seconds[3]), min(seconds[1], seconds[2])


def encode(root: Path, steps: int, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """Throughput of `polymodal encode` over bare encoder calls; it also leaves the features that others train on."""
    import shutil

    import torch

    from polymodal.models import catalog
    from polymodal.runtime.process_group import runtime
    from polymodal.train.actors import Encoders
    from polymodal.train.encode import Encoding

    chosen = recipe(root, "encode", 1)
    family: Any = catalog.family(chosen.model.model_copy(update={"init": "random"}))
    with runtime(chosen) as rt:
        torch.set_num_threads(1)
        encoders = Encoders(family, torch.float32, rt.device.torch)
        corpus, clips = _corpus(chosen), Encoding(chosen, family, "datasets", rt, [encoders]).clips
        pixels = [torch.tensor(clips.frames(r, clips.bucket(r))) for r in corpus]
        captions = [r.extra["captions"][0] for r in corpus]

        def ours() -> None:
            shutil.rmtree(root / "features", ignore_errors=True)
            Encoding(chosen, family, "datasets", rt, [encoders]).run()

        def bare() -> None:
            for at in range(0, len(pixels), BATCH):
                encoders.media(pixels[at : at + BATCH])
                for caption in captions[at : at + BATCH]:
                    encoders.text([caption])

        bare()
        mine, theirs = in_turns(ours, bare, clock)
    return {"ratio": theirs / mine, "clips": len(pixels), "seconds": mine, "bare": theirs}


def _corpus(chosen: Any) -> list[Any]:
    from polymodal.data.source import open_corpus

    corpus = open_corpus(chosen.data.datasets, chosen.data.attr, "data.datasets")
    return [corpus[i] for i in range(len(corpus))]


def step(root: Path, steps: int) -> dict[str, Any]:
    """Our step on features over a bare loop with the same batches, model and objective."""
    import torch

    pairs = []
    with ground.opened(recipe(root, "step", steps), steps) as (trainer, batches):
        model, parameters = trainer.model.models[0], list(trainer.trainable.values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

        def ours(number: int) -> None:
            trainer._step(number + 1, batches[number], time.perf_counter())

        def bare(number: int) -> None:
            inverse = {trainer.objective.term: 1.0 / BATCH}
            for batch in trainer.objective.prepare(None, batches[number].micro_batches):
                model(batch, lambda o, b: trainer.objective.loss(o, b, inverse))[0].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for number in range(steps):
            pairs.append(in_turns(lambda n=number: ours(n), lambda n=number: bare(n)))
    return {"ratio": sum(a for a, _ in pairs[SKIPPED:]) / sum(b for _, b in pairs[SKIPPED:]), "pairs": pairs}


def diffusers(root: Path, steps: int) -> dict[str, Any]:
    """Our step and its data over the loop of diffusers' examples on the same features."""
    import torch
    from accelerate import Accelerator
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
    from torch.utils.data import DataLoader

    pairs = []
    with ground.opened(recipe(root, "diffusers", 2 * steps), 1) as (trainer, _):
        features = trainer.feed.schedule.index
        rows = [features.sample(i) for i in range(len(features.shapes))]
        cached = [{**media, **texts[0]} for media, texts in rows]
        accelerator = Accelerator(cpu=True)
        model = WanTransformer3DModel.from_pretrained(root / "pipeline", subfolder="transformer")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        loader = DataLoader(cached, batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
        model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

        def endless(make: Callable[[], Any]) -> Any:
            while True:
                yield from make()

        theirs, mine = endless(lambda: loader), iter(trainer.feed.loader())
        number = 0

        def example() -> None:
            batch = next(theirs)
            with accelerator.accumulate(model):
                latents = batch["latents"]
                noise = torch.randn_like(latents)
                u = compute_density_for_timestep_sampling("none", len(latents))
                at = (u * scheduler.config.num_train_timesteps).long()
                sigmas = scheduler.sigmas[at].view(-1, 1, 1, 1, 1)
                noisy = (1.0 - sigmas) * latents + sigmas * noise
                (out,) = model(
                    noisy, scheduler.timesteps[at], batch["encoder_hidden_states"], return_dict=False
                )
                weights = compute_loss_weighting_for_sd3("none", sigmas)
                loss = (weights * (out - (noise - latents)) ** 2).reshape(len(latents), -1).mean(1).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            loss.detach().item()  # the examples log it at every step

        def ours() -> None:
            nonlocal number
            number += 1
            trainer._step(number, next(mine), time.perf_counter())

        pairs = [in_turns(ours, example) for _ in range(steps)][SKIPPED:]
    return {"ratio": sum(b for _, b in pairs) / sum(a for a, _ in pairs), "pairs": pairs}


def online(root: Path, steps: int) -> dict[str, Any]:
    """A step that decodes and encodes its clips over one on features."""
    found = {}
    for mode in ("cached", "online"):
        with ground.opened(recipe(root, mode, steps, encode=mode), 0) as (trainer, _):
            seconds, loader = [], iter(trainer.feed.loader(stop_after=steps))
            for number in range(steps):
                began = time.process_time()
                trainer._step(number + 1, next(loader), time.perf_counter())
                seconds.append(time.process_time() - began)
            found[mode] = min(seconds[1:])
    return {"ratio": found["online"] / found["cached"], **found}


def memory(root: Path, steps: int) -> dict[str, Any]:
    """Bytes of weights besides the denoiser's that a training process holds, by data.encode."""
    import gc

    import torch

    held = {}
    for mode in ("cached", "online"):
        with ground.opened(recipe(root, f"memory-{mode}", 1, encode=mode), 0) as (trainer, _):
            gc.collect()
            own = {id(p) for p in trainer.model.models[0].parameters()}
            others = {
                id(p): p.numel() * p.element_size()
                for p in gc.get_objects()
                if type(p) is torch.nn.Parameter and id(p) not in own and p.device.type != "meta"
            }
            held[mode] = sum(others.values())
    return {"ratio": held["cached"] / held["online"], "bytes": held}


MEASURES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "encode": encode, "step": step, "diffusers": diffusers, "online": online, "memory": memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--steps", type=int, default=8, help="the first two are not counted")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_pipeline(root / "pipeline")
        write_clips(root / "data", args.clips)
        for name in dict.fromkeys(["encode", *args.only]):  # which makes the features
            found = MEASURES[name](root, args.steps)
            wanted = WANTED.get(name)
            print(f"{name}: {found['ratio']:.3f}" + (f" (wanted {wanted})" if wanted else ""), flush=True)
            if args.json and name in args.only:
                ground.add_to(args.json, {"measures": {name: {**found, "wanted": wanted}}})


if __name__ == "__main__":
    main()
