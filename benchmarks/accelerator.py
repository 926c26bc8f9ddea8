"""One command for the first day on an accelerator: is it right, how fast is it, does the plan hold.

    python benchmarks/accelerator.py [--only PART ...] [--peers] [--minutes 10] [--json FILE] [--tiny]

One card, under ten minutes, nothing but the installed package and this repository (benchmarks/, and the small
models of tests/; scikit-learn and the network are not needed). Each part is a process of its own with a time
limit: one that fails, hangs or breaks the device is a row with its error, and the others run. Exit code 1 when a
part of correctness failed.

Correctness (float32 without TF32; errors are relative L2 norms):
  device     what runtime/device.py says: memory, name, kernels; the best product against the table's peak
  attention  every path and dtype, rings of 2 and 4 with segments that some ranks have nothing of, against
             float64 on the CPU
  layouts    loss and gradients of small models, packed, uniform and padded, against the CPU; bf16 against the CPU's bf16
  training   losses of the trainer, stopped, saved and resumed, against the CPU's
Speed (random weights, made on the device; layers are cut to fit the memory, and the row says so):
  vlm        Qwen2.5-VL 3B's shape: tokens/s and MFU by recompute, compile and packing
  wan        Wan 2.1 1.3B's shape: frames/s of 81 frames of 480p
  flux       FLUX.1's shape: images/s at 1024 x 1024
  encode     `polymodal encode`, from mp4 files to features, over bare calls of the encoders
  peers      with --peers: transformers' Trainer and the loop of diffusers' examples, same shapes, batches and recompute

--tiny takes small sizes, and is the default without an accelerator; compile and peaks of memory are then left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

CORRECTNESS = ("device", "attention", "layouts", "training")
SPEED = ("vlm", "wan", "flux", "encode")
LIMITS = {"layouts": 120, "vlm": 170, "wan": 120, "flux": 100, "peers": 200}
"""Seconds of a part, others 90; less where less is left."""
ERRORS = {"float32": (1e-4, 1e-4), "bfloat16": (1e-2, 2e-2), "float16": (2e-3, 5e-3)}
"""Largest errors of attention's output and of its gradients, against float64 on the same inputs."""
LOSS, GRADIENT = 1e-5, 1e-4
"""Largest relative error of a loss, and of a gradient over the largest gradient, in float32."""
NAMES = {
    "packed": ("qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe"),
    "uniform": ("flux", "wan"),
    "padded": ("whisper",),
}
Row = dict[str, Any]


def row(name: str, said: str, ok: bool | None = None, **facts: Any) -> Row:
    """A line of the table. ok: whether it is as wanted, None where nothing is wanted."""
    return {"name": name, "said": said, "ok": ok, **facts}


def attempt(name: str, work: Callable[[], Row]) -> Row:
    """A row, or the row of its error; memory is given back behind it."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return row(name, f"{type(error).__name__}: {error}".splitlines()[0], False)
    finally:
        gc.collect()
        device().empty_cache(info().kind)


def device() -> Any:
    from polymodal.runtime import device

    return device


def info() -> Any:
    return device().find()


def finish() -> None:
    """Wait until the device has done what it was given."""
    device().synchronize(info().kind)


def clock() -> float:
    finish()
    return time.perf_counter()


def table_entry() -> Any:
    """This accelerator's row of accelerators.yaml, None where it has none."""
    import torch

    from polymodal.plan import accelerators

    if info().kind == "cpu":
        return None
    name = str(getattr(torch, info().kind).get_device_name(info().index)).lower()
    return next((each for key, each in accelerators.table().items() if key in name), None)


def total_memory() -> float:
    import torch

    here = info()
    return float(getattr(torch, here.kind).mem_get_info(here.index)[1]) if here.kind != "cpu" else 1e12


# ---- correctness ---------------------------------------------------------------------------------


def check_device(tiny: bool) -> Iterator[Row]:
    import torch

    here, devices = info(), device()
    name = "" if here.kind == "cpu" else getattr(torch, here.kind).get_device_name(here.index)
    yield row("device", f"{here.kind} {name}, torch {torch.__version__}", kind=here.kind, device=name)
    size = 2**26 if tiny else 2**30
    before = devices.memory(here)
    held = torch.ones(size, dtype=torch.uint8, device=here.torch)
    after = devices.memory(here)
    grown, peak = after["now"] - before["now"], after["peak"] - before["now"]
    close = 0.9 * size <= grown <= 1.3 * size and peak >= 0.9 * size
    yield row("memory counted", f"{size / 2**20:.0f} MiB made, {grown / 2**20:.0f} seen", close)
    del held
    kernel = devices.packed_attention(here.kind, torch.bfloat16, 128)
    ring = ring_kernel(here.kind)
    said = f"{getattr(kernel, '__name__', 'dense by length')}; ring {ring}"
    yield row("kernels of attention", said, None, packed=kernel is not None, ring=ring)
    n = 512 if tiny else 8192
    a = torch.randn(n, n, dtype=torch.bfloat16, device=here.torch)
    rate = 2 * n**3 / least_seconds(lambda: a @ a)
    known = devices.peak_flops(here)
    share = f", {rate / known:.0%} of the table's peak" if known else ", no peak in the table: no MFU"
    # far below: the wrong entry, or a card that is throttled or shared
    fits = None if tiny else known is not None and 0.4 <= rate / known <= 1.03
    yield row("best product, bf16", f"{rate / 1e12:.3g} TFLOP/s{share}", fits, flops=rate, peak=known)
    rows = torch.empty(size, dtype=torch.uint8, device=here.torch)
    speed = 2 * size / least_seconds(lambda: rows.clone())
    entry = table_entry()
    share = f", {speed / entry.bandwidth:.0%} of the table's" if entry else ""
    yield row("memory bandwidth", f"{speed / 1e9:.0f} GB/s{share}", None, bytes_a_second=speed)
    if here.kind != "cpu":
        pinned = torch.empty(size, dtype=torch.uint8).pin_memory()
        link = size / least_seconds(lambda: rows.copy_(pinned, non_blocking=True))
        yield row("link to the host", f"{link / 1e9:.1f} GB/s", None, bytes_a_second=link)
        said = f"{total_memory() / 2**30:.1f} GiB"
        if entry:
            said += f", the table has {entry.memory / 2**30:.0f}"
        close = None if entry is None else abs(total_memory() / entry.memory - 1) < 0.1
        yield row("memory", said, close, bytes=total_memory())


def least_seconds(work: Callable[[], Any], times: int = 5) -> float:
    work()
    found = []
    for _ in range(times):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


def ring_kernel(kind: str) -> str:
    import torch

    from polymodal.distributed import flash_kernels

    found = flash_kernels.kernel(kind, torch.bfloat16, 128)
    return "torch's own" if found is None else getattr(found.forward, "__name__", "fused")


def check_attention(tiny: bool) -> Iterator[Row]:
    import torch

    exact()
    lengths = {"text": (700, 1, 33, 290), "windows": (64,) * 30 + (17, 40)}
    if tiny:
        lengths = {"text": (70, 1, 33), "windows": (16,) * 6 + (5,)}
    shapes = {"text": (8, 2, 128, True), "windows": (4, 4, 80, False)}  # heads, key heads, size, causal
    paths: dict[str, Callable[..., Any]] = {"packed": packed_path, "by length": dense_path}
    for ring in (2, 4):
        paths[f"ring of {ring}"] = lambda *given, ring=ring: ring_path(*given, ring=ring)
    for kind, (path, how), dtype in itertools.product(lengths, paths.items(), ERRORS):
        name = f"{path}, {kind}, {dtype}"

        def one(kind: str = kind, how: Any = how, dtype: str = dtype, name: str = name) -> Row:
            heads, keys, size, causal = shapes[kind]
            draw = torch.Generator().manual_seed(0)
            total = sum(lengths[kind])
            q, k, v, g = (
                torch.randn(total, n, size, generator=draw).to(getattr(torch, dtype))
                for n in (heads, keys, keys, heads)
            )
            expected = definition(*(t.double() for t in (q, k, v, g)), lengths[kind], causal)
            found = how(*(t.to(info().torch) for t in (q, k, v, g)), lengths[kind], causal)
            errors = [distance(a, b) for a, b in zip(found, expected, strict=True)]
            forward, backward = errors[0], max(errors[1:])
            most = ERRORS[dtype]
            ok = forward <= most[0] and backward <= most[1]
            return row(name, f"{forward:.1e}, gradients {backward:.1e}", ok, errors=errors)

        yield attempt(name, one)


def exact() -> None:
    """float32 products with all of float32's bits."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def distance(found: Any, expected: Any) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def definition(q: Any, k: Any, v: Any, g: Any, lengths: Any, causal: bool) -> tuple[Any, ...]:
    """Output and the gradients of q, k and v, segment after segment, on the CPU in float64."""
    import torch

    q, k, v = (t.requires_grad_() for t in (q, k, v))
    outputs = []
    for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        one, keys, values = (t.transpose(0, 1) for t in rows)
        keys, values = (t.repeat_interleave(len(one) // len(t), 0) for t in (keys, values))
        scores = one @ keys.transpose(1, 2) * one.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    out = torch.cat(outputs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), g)


def packed_path(q: Any, k: Any, v: Any, g: Any, lengths: Any, causal: bool) -> tuple[Any, ...]:
    """What every layer of a packed model calls."""
    import torch

    from polymodal.distributed import attention

    ends = attention.cumulative(lengths, q.device)
    given = [t.requires_grad_() for t in (q, k, v)]
    out = attention.attend(*(t.transpose(0, 1)[None] for t in given), ends, causal)[0]
    return out.detach(), *torch.autograd.grad(out, given, g)


def dense_path(q: Any, k: Any, v: Any, g: Any, lengths: Any, causal: bool) -> tuple[Any, ...]:
    """torch's dense attention, a call a length: where a device has no packed kernel."""
    import torch

    from polymodal.distributed import attention

    known = attention.plan(attention.cumulative(lengths, q.device))
    given = [t.requires_grad_() for t in (q, k, v)]
    out = attention._by_length(*given, known, causal, None, 0.0)
    return out.detach(), *torch.autograd.grad(out, given, g)


def ring_path(q: Any, k: Any, v: Any, g: Any, lengths: Any, causal: bool, ring: int) -> tuple[Any, ...]:
    """All ranks of a ring one after the other: the blocks and merges that they run, without sending."""
    import torch

    from polymodal.distributed import ring_attention
    from polymodal.distributed.sequence_sharding import rows, shard_lengths

    share, scale = shard_lengths(lengths, ring, 1, causal), q.shape[-1] ** -0.5
    own = [rows(lengths, share, rank, 0).to(q.device) for rank in range(ring)]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    grads = [torch.zeros(t.shape, dtype=wide, device=q.device) for t in (q, k, v)]
    for rank in range(ring):
        queries, incoming = q[own[rank]], g[own[rank]]
        merged = queries.new_zeros(queries.shape, dtype=wide)
        lse = queries.new_full(queries.shape[:2], float("-inf"), dtype=wide)
        seen = [(s, *pair) for s in range(ring) for pair in ring_attention._seen(share, causal, rank, s)]
        for source, i, at, j, keys in seen:
            block = (queries[at], k[own[source]][keys], v[own[source]][keys], share.runs[i], share.runs[j])
            part = ring_attention.forward_block(*block, causal and i == j, scale)
            ring_attention._merge(merged[at], lse[at], *part)
        out[own[rank]] = merged
        rounded, grad_q = merged.to(q.dtype), torch.zeros_like(merged)
        for source, i, at, j, keys in seen:
            held = (k[own[source]], v[own[source]])
            totals = [torch.zeros(t.shape, dtype=wide, device=q.device) for t in held]
            ring_attention.backward_block(
                incoming[at], queries[at], held[0][keys], held[1][keys], rounded[at], lse[at],
                share.runs[i], share.runs[j], causal and i == j, scale, grad_q[at], totals[0][keys], totals[1][keys],
            )  # fmt: skip
            for grad, total in zip(grads[1:], totals, strict=True):
                grad[own[source]] += total
        grads[0][own[rank]] = grad_q
    return out, *grads


def check_layouts(tiny: bool) -> Iterator[Row]:
    """Loss and gradients of small models of the real classes, on this device and on the CPU."""
    import torch

    from tests.models import tiny as models
    from tests.parallel import dits, layouts, speech

    exact()
    alone = layouts.Layout("one process", 1)

    def write(name: str, directory: str) -> None:
        kind = next(kind for kind, names in NAMES.items() if name in names)
        {"packed": lambda: models.checkpoint(name, directory), "uniform": lambda: dits.pipeline(name, directory),
         "padded": lambda: speech.checkpoint(directory)}[kind]()  # fmt: skip

    def compare(kind: str, name: str) -> Iterator[Row]:
        with tempfile.TemporaryDirectory() as directory:
            write(name, directory)

            def run(dtype: Any, where: str) -> Any:
                return layouts.measure(directory, alone, dtype, 0, 0, where)

            expected = run(torch.float32, "cpu")
            largest = max(float(t.norm()) for t in expected.gradients.values())

            def against(found: Any) -> tuple[float, float]:
                """Relative error of the loss, and the worst gradient's over the largest gradient."""
                assert found.gradients.keys() == expected.gradients.keys()
                worst = max(
                    float((found.gradients[n].float().cpu() - g).norm())
                    for n, g in expected.gradients.items()
                )
                return abs(found.loss / expected.loss - 1), worst / largest

            def single() -> Row:
                loss, gradient = against(run(torch.float32, str(info().torch)))
                said = f"loss {loss:.1e}, gradients {gradient:.1e}"
                return row(
                    f"{kind}: {name}, float32",
                    said,
                    loss <= LOSS and gradient <= GRADIENT,
                    errors=[loss, gradient],
                )

            def half() -> Row:
                """bf16 rounds everywhere: twice the CPU's own distance from float32 is allowed. Where that is large
                already (denoisers whose norms were moved), the loss alone decides."""
                theirs, ours = (against(run(torch.bfloat16, where)) for where in ("cpu", str(info().torch)))
                said = f"loss {ours[0]:.1e}, gradients {ours[1]:.1e} (CPU {theirs[0]:.1e}, {theirs[1]:.1e})"
                ok = ours[0] <= 2 * theirs[0] + 5e-3 and (theirs[1] > 0.1 or ours[1] <= 2 * theirs[1] + 5e-3)
                return row(f"{kind}: {name}, bfloat16", said, ok, errors=[*ours, *theirs])

            yield attempt(f"{kind}: {name}, float32", single)
            yield attempt(f"{kind}: {name}, bfloat16", half)

    for kind, names in NAMES.items():
        for name in names[:1] if tiny else names:
            yield from compare(kind, name)


def check_training(tiny: bool) -> Iterator[Row]:
    """Four steps of the trainer, stopped after two and resumed from the checkpoint, on the device and on the CPU."""
    from polymodal import recipe as recipes
    from polymodal.train import trainer
    from tests.models import tiny as models

    exact()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        models.checkpoint("qwen2.5-vl", root / "model")
        made = []
        for n in range(12):
            names = [f"{n}-{k}.png" for k in range(n % 3)]
            for name in names:
                models.picture(24, 16, seed=n).save(root / name)
            said = "<image>" * len(names) + "How many are there? " + "one two " * n
            turns = [
                {"role": "user", "content": said},
                {"role": "assistant", "content": f"It is a three. {n}"},
            ]
            made.append({"messages": turns, "images": names})
        (root / "train.json").write_text(json.dumps(made))

        def losses(kind: str) -> list[float]:
            for steps in (2, 4):
                trainer.run(recipes.validate({
                    "model": {"source": str(root / "model")},
                    "data": {"datasets": [{"path": str(root / "train.json")}], "max_length": 256, "workers": 0},
                    "train": {"steps": steps, "global_batch_size": 2, "precision": "fp32"},
                    "optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": 0}}, "device": {"kind": kind},
                    "checkpoint": {"dir": str(root / kind), "every": 2}, "monitor": {"trackers": []},
                }))  # fmt: skip
            lines = (root / kind / "metrics.jsonl").read_text().splitlines()
            return [values["loss"] for values in map(json.loads, lines) if "loss" in values]

        def both() -> Row:
            expected, found = losses("cpu"), losses("auto")
            assert len(expected) == len(found) == 4, (expected, found)
            worst = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
            said = f"{found[0]:.4f} to {found[-1]:.4f}; off by {worst:.1e}"
            return row(
                "saved and resumed",
                said,
                worst <= GRADIENT and found[-1] < found[0],
                losses=[found, expected],
            )

        yield attempt("saved and resumed", both)


# ---- speed ---------------------------------------------------------------------------------------


def vlm_config(directory: Path, share: float, tiny: bool) -> str:
    import plan_layouts

    from polymodal.core.files import read_json

    path = plan_layouts.config("3b", directory)
    config = read_json(path / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    count = max(1, round(text["num_hidden_layers"] * share))
    text |= {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}
    if tiny:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
        text["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64,
                   "fullatt_block_indexes": [1]}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def pipeline_config(
    directory: Path, name: str, denoiser: Any, vae: Any, text: dict[str, Any], text2: Any = None
) -> str:
    """The configs of a pipeline in diffusers' layout, without weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, UMT5Config

    denoiser.save_config(directory / "transformer")
    vae.save_config(directory / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    encoder = {"WanPipeline": UMT5Config}.get(name, T5Config)
    encoder(**text).save_pretrained(directory / ("text_encoder" if text2 is None else "text_encoder_2"))
    if text2 is not None:
        text2.save_pretrained(directory / "text_encoder")
    index = {
        "_class_name": name,
        "transformer": ["diffusers", type(denoiser).__name__],
        "vae": ["diffusers", type(vae).__name__],
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return str(directory)


def wan_config(directory: Path, share: float, tiny: bool) -> str:
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    sizes = {
        "num_attention_heads": 12,
        "ffn_dim": 8960,
        "num_layers": max(1, round(30 * share)),
        "text_dim": 4096,
    }
    if tiny:
        sizes = {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "ffn_dim": 128,
            "num_layers": 2,
            "text_dim": 32,
        }
    with torch.device("meta"):
        return pipeline_config(
            directory,
            "WanPipeline",
            WanTransformer3DModel(**sizes),
            AutoencoderKLWan(),
            {"d_model": sizes["text_dim"]},
        )


def flux_config(directory: Path, share: float, tiny: bool) -> str:
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig

    layers = {"num_layers": max(1, round(19 * share)), "num_single_layers": max(1, round(38 * share))}
    sizes: dict[str, Any] = {"guidance_embeds": True, **layers}
    if tiny:
        sizes |= {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
                  "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12)}  # fmt: skip
    with torch.device("meta"):
        made = FluxTransformer2DModel(**sizes)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
        clip = CLIPTextConfig(
            hidden_size=made.config.pooled_projection_dim, projection_dim=made.config.pooled_projection_dim
        )
        return pipeline_config(
            directory, "FluxPipeline", made, vae, {"d_model": made.config.joint_attention_dim}, clip
        )


class Shape:
    """A published size of a model, with as many of its layers as fit, and what a step of it is counted in."""

    def __init__(
        self,
        name: str,
        unit: str,
        config: Callable[[Path, float, bool], str],
        data: dict[str, Any],
        tiny: bool,
    ):
        self.name, self.unit, self.config, self.data, self.tiny = name, unit, config, data, tiny
        self.place = tempfile.TemporaryDirectory()
        usable = 0.9 * total_memory()
        for self.share in (1.0, 0.75, 0.5, 0.35, 0.25, 0.15):
            self.source = self.config(Path(self.place.name, str(self.share)), self.share, tiny)
            self.estimated = self.needed(self.recipe(recompute="full"))
            if self.estimated <= usable:
                break

    def recipe(self, batch: int = 1, data: dict[str, Any] | None = None, **parallel: Any) -> Any:
        from polymodal import recipe as recipes

        return recipes.validate({
            "model": {"source": self.source, "init": "random"}, "data": {**self.data, **(data or {})},
            "train": {"global_batch_size": batch, "precision": "bf16"}, "parallel": parallel,
        })  # fmt: skip

    def needed(self, recipe: Any) -> int:
        """Bytes by the closed formulas that `init` and `check` use."""
        from polymodal.distributed.mesh import ParallelSizes
        from polymodal.plan import estimate, planner, shape
        from polymodal.train.layouts import layout_of
        from polymodal.train.parallel_model import meta_model

        family = planner.family_of(recipe)
        layout = layout_of(recipe, family)
        counted = shape.shape_of(family, meta_model(family, recipe))
        sizes = ParallelSizes.of(recipe.parallel, 1)
        return (
            estimate.Formula(counted, recipe, sizes, layout.workload(0.25, 1024), layout.packs)
            .memory()
            .memory
        )

    def planned(self, recipe: Any) -> int | None:
        """Peak bytes of `polymodal plan`."""
        from polymodal.plan import accelerators, planner

        entry = table_entry() or accelerators.named("h100")
        return planner.plan(recipe, planner.family_of(recipe), planner.Question(1, entry)).peak

    def job(self, recipe: Any, rt: Any) -> Any:
        """Model, optimizer and layout as training has them, its weights drawn on the device."""
        import torch

        from polymodal.distributed.mesh import Mesh, ParallelSizes
        from polymodal.plan import planner
        from polymodal.plan.job import Job
        from polymodal.train.layouts import layout_of

        family = planner.family_of(recipe)
        mesh = Mesh(ParallelSizes.of(recipe.parallel, 1), rt.device.kind, 0)
        load = layout_of(recipe, family).workload(0.25, 1024)
        job = Job(recipe, family, mesh, load.measure, rt.device.torch)
        job.load_all()
        with torch.no_grad():
            for parameter in job.trainable.values():
                draw(getattr(parameter, "_local_tensor", parameter))
        return job


def draw(tensor: Any) -> None:
    if tensor.ndim > 1:
        tensor.normal_(std=0.02)
    else:
        tensor.fill_(1.0)


def measured(job: Any, batches: Callable[[], list[Any]], steps: int) -> dict[str, float]:
    """Seconds of a step, the quickest; what the host took to hand it to the device, and its CPU seconds."""
    found = []
    for number in range(steps + 1):
        began, cpu = clock(), time.process_time()
        job.step(batches)
        handed, used = time.perf_counter() - began, time.process_time() - cpu
        if number:  # the first one makes what is made once
            found.append((clock() - began, handed, used))
    seconds, host, cpu = min(found)
    return {"seconds": seconds, "host_seconds": host, "cpu_seconds": cpu}


def filled(batches: list[Any]) -> list[Any]:
    """The same with numbers where an example has zeros."""
    import torch

    for batch in batches:
        for name, tensor in batch.tensors.items():
            if tensor.is_floating_point() and name not in ("weights", "weight"):
                tensor.normal_(generator=torch.Generator().manual_seed(0))
    return batches


def speed(
    shape: Shape, count: Callable[[Any], float], further: tuple[str, Callable[[], Row]] | None = None
) -> Iterator[Row]:
    """A row a policy of the recipe, and the peak of memory beside what `plan` says for the first one."""
    import torch

    from polymodal.runtime.process_group import runtime

    here = info()
    usable, peak_rate = 0.92 * total_memory(), device().peak_flops(here)
    if shape.share < 1:
        yield row("layers", f"{shape.share:.0%} of them, to fit the memory", None, share=shape.share)

    def one(name: str, parallel: dict[str, Any]) -> Row:
        recipe = shape.recipe(**parallel)
        if (needed := shape.needed(recipe)) > usable:
            return row(name, f"not run: needs {needed / 2**30:.0f} GiB by the estimate")
        with runtime(recipe) as rt:
            if here.kind != "cpu":
                getattr(torch, here.kind).reset_peak_memory_stats()
            job = shape.job(recipe, rt)
            load = job.layout.workload(0.25, 1024)
            made = filled([job.layout.example(load)])
            found = measured(job, lambda: made, 3)
            flops = job.model.passes * job.family.cost(load.measure) * load.samples
            peak = device().memory(here)["peak"]
        found |= {"rate": count(load) / found["seconds"], "peak_bytes": peak}
        said = f"{found['rate']:.4g} {shape.unit}/s, step {found['seconds']:.3f} s"
        if peak_rate:
            found["mfu"] = flops / found["seconds"] / peak_rate
            said += f", MFU {found['mfu']:.0%}"
        if here.kind != "cpu":
            said += f", host {found['host_seconds']:.3f} s, {peak / 2**30:.1f} GiB"
        return row(name, said, **found)

    first: Row | None = None
    for name, parallel in POLICIES.items():
        made = attempt(name, lambda name=name, parallel=parallel: one(name, parallel))
        yield made
        if first is None and "peak_bytes" in made:
            first = {**made, "recipe": shape.recipe(**parallel)}
    if first is not None:
        yield attempt("plan's peak", lambda: against_plan(shape, first))
    if further is not None:
        yield attempt(further[0], further[1])
    if not shape.tiny:  # a compiler takes minutes, the last of a part's
        name = "recompute full, compile"
        yield attempt(name, lambda: one(name, {"recompute": "full", "compile": True}))


def against_plan(shape: Shape, first: Row) -> Row:
    from polymodal.core.text import format_bytes

    planned = shape.planned(first["recipe"])
    said = f"{format_bytes(planned)} planned for `{first['name']}`"
    if info().kind == "cpu":
        return row("plan's peak", f"{said} (the CPU's is not comparable)", None, planned_bytes=planned)
    ratio = first["peak_bytes"] / planned
    return row(
        "plan's peak",
        f"{said}, measured {ratio:.2f} of it",
        0.85 <= ratio <= 1.15,
        planned_bytes=planned,
        ratio=ratio,
    )


POLICIES: dict[str, dict[str, Any]] = {
    "recompute full": {"recompute": "full"},
    "recompute selective": {"recompute": "selective"},
    "no recompute": {},
}


def vlm_shape(tiny: bool) -> Shape:
    return Shape("Qwen2.5-VL 3B", "tokens", vlm_config, {"max_length": 256 if tiny else 8192}, tiny)


def vlm_speed(tiny: bool) -> Iterator[Row]:
    shape = vlm_shape(tiny)
    count = lambda load: load.measure.tokens * load.samples  # noqa: E731
    yield from speed(shape, count, ("packing", lambda: packing(shape)))


def samples(family: Any, longest: int, total: int) -> list[Any]:
    """Samples of unlike lengths, half of them with a picture, of about `total` tokens together."""
    import random

    from polymodal.core.sample import unpack
    from polymodal.train.layouts.packed import lengths

    choose, made, tokens = random.Random(0), [], 0
    while tokens < total:
        length = int(choose.uniform(0.1, 1.0) * longest)
        measure = lengths(family, length, [(0.5 * (len(made) % 2), longest // 2)])
        made += unpack(filled([family.example(measure)])[0])
        tokens += length
    return made


def packing(shape: Shape) -> Row:
    """The same samples in one pack, and one by one."""
    from polymodal.core.sample import pack
    from polymodal.runtime.process_group import runtime

    total = shape.data["max_length"]
    recipe = shape.recipe(recompute="full")
    with runtime(recipe) as rt:
        job = shape.job(recipe, rt)
        drawn = samples(job.family, total // 8, total)
        tokens = sum(sample.measure.tokens for sample in drawn)
        packed = measured(job, lambda: [pack(drawn)], 3)["seconds"]
        single = measured(job, lambda: [pack([sample]) for sample in drawn], 2)["seconds"]
    said = f"{tokens / packed:.4g} tokens/s, one sample a forward {tokens / single:.4g}"
    return row(
        "packing, recompute full", said, None, ratio=single / packed, samples=len(drawn), rate=tokens / packed
    )


def wan_shape(tiny: bool) -> Shape:
    clip = {"frames": [5], "sizes": [[32, 32]]} if tiny else {"frames": [81], "sizes": [[480, 832]]}
    return Shape("Wan 2.1 1.3B", "frames", wan_config, {"clip": clip}, tiny)


def wan_speed(tiny: bool) -> Iterator[Row]:
    yield from speed(wan_shape(tiny), lambda load: load.measure.shape[0] * load.samples)


def flux_speed(tiny: bool) -> Iterator[Row]:
    side = 32 if tiny else 1024
    shape = Shape("FLUX.1", "images", flux_config, {"clip": {"sizes": [[side, side]]}}, tiny)
    yield from speed(shape, lambda load: load.samples)


def encode_speed(tiny: bool) -> Iterator[Row]:
    import generation

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        generation.write_pipeline(root / "pipeline")
        generation.write_clips(root / "data", 2 if tiny else 24)
        found = generation.encode(root, 1, clock)
        frames = found["clips"] * generation.FRAMES
        said = f"{frames / found['seconds']:.4g} frames/s, {found['ratio']:.2f} of bare calls (a small Wan, 128 x 96)"
        yield row("files to features", said, None, **found)


# ---- others --------------------------------------------------------------------------------------


def peers(tiny: bool) -> Iterator[Row]:
    yield attempt("transformers' Trainer", lambda: trainer_peer(tiny))
    yield attempt("diffusers' loop", lambda: diffusers_peer(tiny))


def trainer_peer(tiny: bool) -> Row:
    """Useful tokens a second on the same samples: packed, and padded as the Trainer's collator does.

    Both sides: 3B's shape, bf16 over float32 weights, AdamW (fused), every block recomputed, collating in the
    timed step. Sixteen samples of unlike lengths a step at most.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from polymodal.core.sample import pack
    from polymodal.runtime.process_group import runtime

    shape = vlm_shape(tiny)
    total = shape.data["max_length"]
    recipe = shape.recipe(recompute="full")
    with runtime(recipe) as rt:
        job = shape.job(recipe, rt)
        drawn = samples(job.family, total // 8, total)
        tokens = sum(sample.measure.tokens for sample in drawn)
        ours = measured(job, lambda: [pack(drawn)], 3)["seconds"]
        rows = job.family.streams[0]
        del job
    gc.collect()
    device().empty_cache(info().kind)

    def collate(items: list[Any]) -> dict[str, Any]:
        longest = max(sample.measure.tokens for sample in items)

        def padded(name: str, value: int = 0) -> Any:
            parts = [sample.tensors[name] for sample in items]
            return torch.stack(
                [torch.nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in parts]
            )

        media = {key: torch.cat([s.tensors[name] for s in items if name in s.tensors])
                 for key, name in (("pixel_values", rows.tensor), ("image_grid_thw", rows.sizes))}  # fmt: skip
        mask = torch.stack([torch.arange(longest) < sample.measure.tokens for sample in items])
        places = padded("position_ids")[:, -3:].transpose(0, 1)
        return {"input_ids": padded("input_ids"), "labels": padded("labels", -100), "attention_mask": mask.long(),
                "position_ids": places, **media}  # fmt: skip

    marks: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(clock())

    with torch.device(info().torch):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(shape.source), dtype=torch.float32
        )
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=len(drawn), max_steps=4, bf16=True, gradient_checkpointing=True, optim="adamw_torch_fused",
            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000, remove_unused_columns=False, use_cpu=info().kind == "cpu",
        )  # fmt: skip
        Trainer(
            model=model, args=arguments, train_dataset=drawn * 4, data_collator=collate, callbacks=[Watch()]
        ).train()
    theirs = min(b - a for a, b in itertools.pairwise(marks))
    said = f"ours {tokens / ours:.4g} tokens/s, theirs {tokens / theirs:.4g}: {theirs / ours:.2f} x"
    return row(
        "transformers' Trainer", said, None, ratio=theirs / ours, ours=tokens / ours, theirs=tokens / theirs
    )


def diffusers_peer(tiny: bool) -> Row:
    """Frames a second of Wan's shape, on latents that are there: the loop of diffusers' examples (accelerate)."""
    import torch
    from accelerate import Accelerator
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from polymodal.runtime.process_group import runtime

    shape = wan_shape(tiny)
    recipe = shape.recipe(recompute="full")
    with runtime(recipe) as rt:
        job = shape.job(recipe, rt)
        load = job.layout.workload(0.0, 1)
        made = filled([job.layout.example(load)])
        ours = measured(job, lambda: made, 3)["seconds"]
        del job
    gc.collect()
    device().empty_cache(info().kind)
    accelerator = Accelerator(cpu=info().kind == "cpu", mixed_precision="bf16")
    with torch.device(info().torch):
        model = WanTransformer3DModel.from_config(
            WanTransformer3DModel.load_config(shape.source, subfolder="transformer")
        )
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, text = (made[0][name].to(info().torch) for name in ("latents", "encoder_hidden_states"))

    def example() -> None:
        noise = torch.randn_like(latents)
        at = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
        sigmas = scheduler.sigmas[at].to(latents).view(-1, 1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        (out,) = model(noisy, scheduler.timesteps[at].to(latents.device), text, return_dict=False)
        accelerator.backward(((out - (noise - latents)) ** 2).mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    theirs, frames = least_seconds(example, 3), load.measure.shape[0]
    said = f"ours {frames / ours:.4g} frames/s, theirs {frames / theirs:.4g}: {theirs / ours:.2f} x"
    return row("diffusers' loop", said, None, ratio=theirs / ours, ours=frames / ours, theirs=frames / theirs)


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "device": check_device, "attention": check_attention, "layouts": check_layouts, "training": check_training,
    "vlm": vlm_speed, "wan": wan_speed, "flux": flux_speed, "encode": encode_speed, "peers": peers,
}  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def child(part: str, tiny: bool, seconds: float) -> Iterator[Row]:
    """The rows of a part in a process of its own, as they come; then its error, if it ended with one."""
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if tiny else [])]
    fixed = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if tiny:
        fixed["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **fixed}, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )  # fmt: skip
        assert process.stdout is not None
        end, late = time.monotonic() + seconds, False
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while True:
                late = not ready.select(max(0.0, end - time.monotonic()))
                line = "" if late else process.stdout.readline()
                if not line:
                    break
                if line.startswith("ROW "):
                    yield json.loads(line.removeprefix("ROW "))
        if late:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if late or code:
            errors.seek(0)
            said = (errors.read().strip().splitlines() or ["no output"])[-1]
            yield row(part, f"stopped after {seconds:.0f} s" if late else f"exit code {code}: {said}", False)


def show(part: str, found: Row) -> None:
    """At most 80 columns; what does not fit goes on in the next line."""
    verdict = {True: "ok", False: "FAIL", None: ""}[found["ok"]]
    said, lines = found["said"], []
    while said:
        cut = len(said) if len(said) <= 36 else max(said.rfind(" ", 0, 37), 0) or 36
        lines.append(said[:cut].strip())
        said = said[cut:].strip()
    for number, line in enumerate(lines or [""]):
        left = f"{part:9} {found['name'][:28]:28} {verdict:4} " if number == 0 else " " * 44
        print((left + line).rstrip(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="parts to run")
    parser.add_argument("--peers", action="store_true", help="with other trainers, in the same run")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="parts that would begin later are left out"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes; the default on the CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        info()  # an adapter is imported before autograd has made its threads
        for found in PARTS[args.part](args.tiny):
            print("ROW " + json.dumps(found), flush=True)
        return 0
    began = time.monotonic()
    tiny = args.tiny or info().kind == "cpu"
    chosen = args.only or [*CORRECTNESS, *SPEED, *(["peers"] if args.peers else [])]
    rows: list[Row] = []
    for part in chosen:
        left = 60 * args.minutes - (time.monotonic() - began)
        limit = min(left, LIMITS.get(part, 90))
        found = (
            child(part, tiny, limit) if left > 10 else iter([row(part, "not run: no time is left", False)])
        )
        for each in found:
            show(part, each)
            rows.append({"part": part, **each})
    failed = any(each["ok"] is False and each["part"] in CORRECTNESS for each in rows)
    print(f"{'FAILED' if failed else 'correct'}, {time.monotonic() - began:.0f} s", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"tiny": tiny, "correct": not failed, "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
