"""The parity table: every layout of every model against one process, in float64. `make parity` writes docs/parity.md.

    python benchmarks/parity.py [--dtype float32] [--models qwen3-vl ...] [--only TEXT ...] [--missing] [--output FILE]

Cells are measured a few layouts at a time and merged into the table on disk, so a run that was cut goes on with
`--missing`, and `--only "TP 2"` measures the rows whose name holds that text again. A new layout is a line of MATRIX;
one that few models have names them (`only`). Tests only; test_layouts.py runs the same matrix.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models import tiny, tiny_tts
from tests.parallel import dits, parity_dits, parity_speech, speech
from tests.parallel.harness import run
from tests.parallel.layouts import STEPS, Layout, Parity, compare, one_process

BOUND = 1e-9
"""Largest relative error that counts as equal: float64 rounding after five optimizer steps is far below."""
BOUNDS = {"float64": BOUND, "float32": 1e-5}

VISION = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.resampler.")
SPARSE = ("qwen3-vl-moe", "internvl-moe", "glm4.5v", *tiny.DEEPSEEK, tiny.OMNI3)
HEARS = tiny.OMNIS
AUDIO = ("model.audio_tower.",)
FIRST_STAGE = (*VISION, *AUDIO, "model.language_model.embed_tokens.")
VISION_CUT = {"vision": [3, 1], "language": [0, 3]}
VIRTUAL_CUT = {
    "pp_schedule": "Interleaved1F1B",
    "pp_layers": {"vision": [[1, 1], [2, 0]], "language": [[0, 0], [1, 2]]},
}
MATRIX = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 3, uneven", 3),
    Layout("FSDP2 x 4", 4),
    Layout("FSDP2 x 2, parameters kept after forward", 2, {"reshard_after_forward": False}),
    Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP", 2, {"tp": 2}),
    Layout("FSDP2 x 2, TP 2", 4, {"tp": 2, "sp": False}),
    Layout("FSDP2 x 2, TP 2 + SP", 4, {"tp": 2}),
    Layout("HSDP 2 x 1, TP 2 + SP", 4, {"tp": 2, "dp_replicate": 2}),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("FSDP2 x 2, selective recompute", 2, {"recompute": "selective"}),
    Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    Layout("TP 2 + SP, selective recompute", 2, {"tp": 2, "recompute": "selective"}),
    Layout("Ulysses 2", 2, {"cp": 2}),
    Layout("ring 2", 2, {"cp": 2, "ulysses": 1}),
    Layout("Ulysses 2 x ring 2", 4, {"cp": 4, "ulysses": 2}),
    Layout("ring 4", 4, {"cp": 4, "ulysses": 1}),
    Layout("FSDP2 x 2, Ulysses 2", 4, {"cp": 2}),
    Layout("FSDP2 x 2, ring 2, full recompute", 4, {"cp": 2, "ulysses": 1, "recompute": "full"}),
    Layout("HSDP 2 x 1, ring 2", 4, {"cp": 2, "ulysses": 1, "dp_replicate": 2}),
    Layout("Ulysses 2, TP 2 + SP", 4, {"cp": 2, "tp": 2}),
    Layout("ring 2, TP 2", 4, {"cp": 2, "ulysses": 1, "tp": 2, "sp": False}),
    Layout("ring 2, selective recompute", 2, {"cp": 2, "ulysses": 1, "recompute": "selective"}),
    Layout("FSDP2 x 2, pictures dealt out", 2, {"balance_media": True}),
    Layout("FSDP2 x 2, Ulysses 2, pictures dealt out", 4, {"cp": 2, "balance_media": True}),
    Layout("FSDP2 x 2, vision tower whole", 2, {"replicate": ["vision", "projector"]}),
    Layout(
        "HSDP 2 x 1, ring 2, vision tower whole, pictures dealt out",
        4,
        {
            "dp_replicate": 2,
            "cp": 2,
            "ulysses": 1,
            "replicate": ["vision", "projector"],
            "balance_media": True,
        },
    ),
    Layout("FSDP2 x 2, TP 2 + SP, vision tower whole", 4, {"tp": 2, "replicate": ["vision"]}),
    Layout("frozen vision tower, ring 2", 2, {"cp": 2, "ulysses": 1}, frozen=VISION),
    Layout("LoRA, FSDP2 x 2, Ulysses 2", 4, {"cp": 2}, lora=True),
    Layout("FSDP2 x 2, Ulysses 2 x ring 2", 8, {"cp": 4, "ulysses": 2}),
    Layout(
        "FSDP2 x 2, ring 2, TP 2 + SP, pictures dealt out",
        8,
        {"cp": 2, "ulysses": 1, "tp": 2, "balance_media": True},
    ),
    Layout("frozen vision tower, FSDP2 x 2", 2, frozen=VISION),
    Layout("frozen vision tower, TP 2 + SP", 2, {"tp": 2}, frozen=VISION),
    Layout("frozen audio tower, FSDP2 x 2", 2, frozen=AUDIO, only=HEARS),
    Layout("LoRA, FSDP2 x 2", 2, lora=True),
    Layout("LoRA, TP 2", 2, {"tp": 2, "sp": False}, lora=True),
    Layout("LoRA, FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}, lora=True),
    Layout("ZeRO-1 x 2", 2, {"zero": 1}),
    Layout("ZeRO-2 x 2", 2, {"zero": 2}),
    Layout("ZeRO-1, HSDP 2 x 2", 4, {"zero": 1, "dp_replicate": 2}),
    Layout("ZeRO-2 x 2, TP 2 + SP, full recompute", 4, {"zero": 2, "tp": 2, "recompute": "full"}),
    Layout("FSDP2 x 2, two blocks gathered ahead", 2, {"prefetch": 2}),
    Layout(
        "FSDP2 x 2, none gathered ahead, first block recomputed",
        2,
        {"prefetch": 0, "recompute": "full", "recompute_first": 1},
    ),
    Layout("FSDP2 x 2, vision tower recomputed", 2, {"recompute": "full", "recompute_blocks": ["vision"]}),
    Layout(
        "FSDP2 x 2, every second block recomputed but attention",
        2,
        {"recompute": "selective", "recompute_every": 2, "recompute_keep": ["attention"]},
    ),
    Layout("FSDP2 x 2, activations on the host", 2, {"offload": ["activations"]}),
    Layout(
        "FSDP2 x 2, selective recompute, kept on the host",
        2,
        {"offload": ["activations"], "recompute": "selective"},
    ),
    Layout(
        "TP 2 + SP, full recompute, inputs on the host",
        2,
        {"tp": 2, "offload": ["activations"], "recompute": "full"},
    ),
    Layout("FSDP2 x 2, parameters on the host", 2, {"offload": ["parameters"]}),
    Layout("PP 2, 1F1B", 2, {"pp": 2}),
    Layout("PP 2, GPipe", 2, {"pp": 2, "pp_schedule": "GPipe"}),
    Layout("PP 2 x 2 virtual, Interleaved1F1B", 2, {"pp": 2, "pp_schedule": "Interleaved1F1B"}),
    Layout("PP 2, InterleavedZeroBubble", 2, {"pp": 2, "pp_schedule": "InterleavedZeroBubble"}),
    Layout("PP 2 x 2 virtual, ZBVZeroBubble", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
    Layout("PP 4", 4, {"pp": 4}),
    Layout("PP 2, language 1 + 2", 2, {"pp": 2, "pp_layers": {"language": [1, 2]}}),
    Layout("PP 2, vision alone, then language", 2, {"pp": 2, "pp_layers": {"language": [0, 3]}}),
    Layout("PP 2, vision alone, then language, FSDP2 x 2", 4, {"pp": 2, "pp_layers": {"language": [0, 3]}}),
    Layout(
        "PP 4, vision alone, language on the other three",
        4,
        {"pp": 4, "pp_layers": {"vision": [4, 0, 0, 0], "language": [0, 1, 1, 1]}},
    ),
    Layout("PP 2, the head alone at the end", 2, {"pp": 2, "pp_layers": {"language": [3, 0]}}),
    Layout("PP 2, vision tower 3 + 1", 2, {"pp": 2, "pp_layers": VISION_CUT}),
    Layout(
        "PP 2, TP 2 + SP, audio tower 1 + 3",
        4,
        {"pp": 2, "tp": 2, "pp_layers": {"audio": [1, 3], "language": [0, 3]}},
        only=HEARS,
    ),
    Layout("PP 2 x 2 virtual, vision tower over three stages", 2, {"pp": 2, **VIRTUAL_CUT}),
    Layout("PP 2, full recompute", 2, {"pp": 2, "recompute": "full"}),
    Layout(
        "PP 2, ZBVZeroBubble, full recompute",
        2,
        {"pp": 2, "pp_schedule": "ZBVZeroBubble", "recompute": "full"},
    ),
    Layout("PP 2, frozen vision tower", 2, {"pp": 2}, frozen=VISION),
    Layout(
        "PP 2, a stage that trains nothing",
        2,
        {"pp": 2, "pp_layers": {"language": [0, 3]}},
        frozen=FIRST_STAGE,
    ),
    Layout("PP 2, LoRA", 2, {"pp": 2}, lora=True),
    Layout("PP 2, FSDP2 x 2", 4, {"pp": 2}),
    Layout("PP 2 x 2 virtual, Interleaved1F1B, FSDP2 x 2", 4, {"pp": 2, "pp_schedule": "Interleaved1F1B"}),
    Layout("PP 2 x 2 virtual, ZBVZeroBubble, FSDP2 x 2", 4, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
    Layout("PP 2, HSDP 2", 4, {"pp": 2, "dp_replicate": 2}),
    Layout("PP 2, ZeRO-2 x 2", 4, {"pp": 2, "zero": 2}),
    Layout("PP 2, ZeRO-3 x 2", 4, {"pp": 2, "zero": 3}),
    Layout("PP 2, ZeRO-3 x 2, full recompute", 4, {"pp": 2, "zero": 3, "recompute": "full"}),
    Layout("PP 2, ZeRO-3 x 2, GPipe", 4, {"pp": 2, "zero": 3, "pp_schedule": "GPipe"}),
    Layout("PP 2, ZeRO-3, HSDP 2 x 2", 8, {"pp": 2, "zero": 3, "dp_replicate": 2}),
    Layout("PP 2, TP 2 + SP", 4, {"pp": 2, "tp": 2}),
    Layout("PP 2, TP 2 + SP, vision tower 3 + 1", 4, {"pp": 2, "tp": 2, "pp_layers": VISION_CUT}),
    Layout("PP 2, ZBVZeroBubble, TP 2 + SP", 4, {"pp": 2, "tp": 2, "pp_schedule": "ZBVZeroBubble"}),
    Layout("PP 2, Ulysses 2", 4, {"pp": 2, "cp": 2}),
    Layout("PP 2, Ulysses 2, vision tower 3 + 1", 4, {"pp": 2, "cp": 2, "pp_layers": VISION_CUT}),
    Layout(
        "PP 2, FSDP2 x 2, vision tower 3 + 1, pictures dealt out",
        4,
        {"pp": 2, "balance_media": True, "pp_layers": VISION_CUT},
    ),
    Layout(
        "PP 2, LoRA, FSDP2 x 2, ZBVZeroBubble, full recompute",
        4,
        {"pp": 2, "pp_schedule": "ZBVZeroBubble", "recompute": "full"},
        lora=True,
    ),
    Layout("PP 2, TP 2 + SP, FSDP2 x 2", 8, {"pp": 2, "tp": 2}),
    Layout(
        "PP 2, TP 2 + SP, ring 2, ZBVZeroBubble",
        8,
        {"pp": 2, "tp": 2, "cp": 2, "ulysses": 1, "pp_schedule": "ZBVZeroBubble"},
    ),
    Layout("PP 2, EP 2", 4, {"pp": 2, "ep": 2}, only=SPARSE),
    Layout(
        "PP 2, EP 2, ZeRO-3 x 2, full recompute",
        4,
        {"pp": 2, "ep": 2, "zero": 3, "recompute": "full"},
        only=SPARSE,
    ),
    Layout("PP 2, EP 2, ZBVZeroBubble", 4, {"pp": 2, "ep": 2, "pp_schedule": "ZBVZeroBubble"}, only=SPARSE),
    Layout("PP 2, EP 4, FSDP2 x 2, TP 2 + SP", 8, {"pp": 2, "ep": 4, "tp": 2}, only=SPARSE),
    Layout("EP 2", 2, {"ep": 2}, only=SPARSE),
    Layout("EP 4", 4, {"ep": 4}, only=SPARSE),
    Layout("EP 2, expert FSDP2 x 2", 4, {"ep": 2}, only=SPARSE),
    Layout("EP 2, TP 2", 2, {"ep": 2, "tp": 2, "sp": False}, only=SPARSE),
    Layout("EP 2, TP 2 + SP, full recompute", 2, {"ep": 2, "tp": 2, "recompute": "full"}, only=SPARSE),
    Layout("EP 2, FSDP2 x 2, TP 2 + SP", 4, {"ep": 2, "tp": 2}, only=SPARSE),
    Layout("EP 4, FSDP2 x 2, TP 2", 4, {"ep": 4, "tp": 2, "sp": False}, only=SPARSE),
    Layout("EP 2, HSDP 2 x 2", 4, {"ep": 2, "dp_replicate": 2}, only=SPARSE),
    Layout("EP 2, selective recompute", 2, {"ep": 2, "recompute": "selective"}, only=SPARSE),
    Layout(
        "EP 2, ZeRO-1 x 2, TP 2, parameters on the host",
        4,
        {"ep": 2, "zero": 1, "tp": 2, "offload": ["parameters"]},
        only=SPARSE,
    ),
    Layout("Ulysses 2, EP 2", 2, {"cp": 2, "ep": 2}, only=SPARSE),
    Layout("ring 2 x FSDP2 x 2, EP 4, ZeRO-2", 4, {"cp": 2, "ulysses": 1, "ep": 4, "zero": 2}, only=SPARSE),
    Layout(
        "Ulysses 2, TP 2 + SP, EP 2, full recompute",
        4,
        {"cp": 2, "tp": 2, "ep": 2, "recompute": "full"},
        only=SPARSE,
    ),
    Layout("LoRA on experts, FSDP2 x 2", 2, lora="experts", only=SPARSE),
    Layout("LoRA on experts, TP 2 + SP", 2, {"tp": 2}, lora="experts", only=SPARSE),
    Layout("LoRA on experts, EP 2", 2, {"ep": 2}, lora="experts", only=SPARSE),
    Layout(
        "LoRA on experts, EP 2, expert FSDP2 x 2, full recompute",
        4,
        {"ep": 2, "recompute": "full"},
        lora="experts",
        only=SPARSE,
    ),
    Layout("LoRA on experts, EP 4, FSDP2 x 2, TP 2 + SP", 4, {"ep": 4, "tp": 2}, lora="experts", only=SPARSE),
    Layout("LoRA on experts, PP 2, EP 2", 4, {"pp": 2, "ep": 2}, lora="experts", only=SPARSE),
    Layout("LoRA, EP 2, expert FSDP2 x 2", 4, {"ep": 2}, lora=True, only=SPARSE),
    Layout("EP 2, Ulysses 2", 2, {"ep": 2, "cp": 2}, only=SPARSE),
    Layout("EP 2, FSDP2 x 2, ring 2", 4, {"ep": 2, "cp": 2, "ulysses": 1}, only=SPARSE),
    Layout(
        "EP 4, Ulysses 2, TP 2 + SP, full recompute",
        4,
        {"ep": 4, "cp": 2, "tp": 2, "recompute": "full"},
        only=SPARSE,
    ),
]


CHUNK = 4
"""Layouts of one size that are measured in one set of processes, and lost together when they are stopped."""


def parity(
    name: str,
    layouts: Sequence[Layout],
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> Iterator[Parity]:
    """Parity of one model's tiny checkpoint (qwen2-vl has a tied head) under each layout that it has, a few at a time.

    overrides: keys of the tiny model's config.
    """
    layouts = [layout for layout in layouts if layout.fits(name)]
    with tempfile.TemporaryDirectory(prefix="polymodal-parity-") as directory:
        if name in parity_speech.MODELS:
            source = speech.checkpoint(directory)
        elif name in parity_speech.SPEAKING:
            source = str(tiny_tts.checkpoint(directory, codec=False))
        elif name in (*LANGUAGE.models, *HEARERS.models):
            source = str(tiny.checkpoint(name, directory, tied=name == "qwen2-vl", **overrides))
        else:
            source = str(dits.pipeline(name, directory))
        (reference,) = run(1, one_process, source, layouts, dtype, steps, timeout=600)
        for world in sorted({layout.world for layout in layouts}):
            group = [layout for layout in layouts if layout.world == world]
            for start in range(0, len(group), CHUNK):
                chunk = group[start : start + CHUNK]
                yield from run(world, compare, source, chunk, reference, dtype, steps, timeout=900)[0]


Cells = dict[tuple[str, str], str]
"""By (row, model): a row is a layout's name with its processes."""


def row(layout: Layout) -> str:
    return f"{layout.name} ({layout.world})"


@dataclass(frozen=True)
class Table:
    """Cells of some models under some layouts. about: what stands above it; across: rows are models, not layouts."""

    about: tuple[str, ...]
    models: tuple[str, ...]
    layouts: Sequence[Layout]
    across: bool = False

    def lines(self, cells: Mapping[tuple[str, str], str]) -> list[str]:
        """Markdown, without models that no cell is of; no lines without any cell."""
        names = [name for name in self.models if any(model == name for _, model in cells)]
        layouts = {row(layout): layout for layout in self.layouts}
        columns, rows = (list(layouts), names) if self.across else (names, list(layouts))
        body = []
        for line in rows:
            pairs = [(column, line) if self.across else (line, column) for column in columns]
            found = [
                cells.get((layout, model), "" if layouts[layout].fits(model) else "-")
                for layout, model in pairs
            ]
            if any(cell not in ("", "-") for cell in found):
                body.append(f"| {line} | " + " | ".join(found) + " |")
        if not body:
            return []
        corner = "model" if self.across else "layout (processes)"
        return [
            *self.about,
            f"| {corner} | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
            *body,
        ]


HEARING = [
    *(layout for layout in MATRIX if not layout.only and "vision" not in layout.name),
    Layout("frozen audio tower, FSDP2 x 2", 2, frozen=AUDIO),
    Layout("PP 2, audio tower 1 + 3", 2, {"pp": 2, "pp_layers": {"audio": [1, 3], "language": [0, 3]}}),
    Layout(
        "PP 2, TP 2 + SP, audio tower 1 + 3",
        4,
        {"pp": 2, "tp": 2, "pp_layers": {"audio": [1, 3], "language": [0, 3]}},
    ),
]
"""Of models that hear and do not see."""
LANGUAGE = Table(
    (),
    (*tiny.NAMES, *tiny.INTERNVL[:3], "llava", *tiny.OMNIS, *tiny.GLM, *tiny.DEEPSEEK, tiny.MINICPM[0]),
    MATRIX,
)
"""InternVL with a Qwen2 model, with a Qwen3 MoE, and with a tower as InternViT-6B's."""
DENOISERS = Table(
    (
        "",
        "## Diffusion transformers",
        "",
        "Tiny pipelines of diffusers' classes, their denoiser with four blocks (of both kinds, where it has two) and four",
        "heads. The global batch is four micro-batches of two samples in two shapes whose numbers of tokens are odd, encoded",
        "by the pipeline's own encoders, noise mixed in by the family's objective; the loss is the family's own.",
        "",
    ),
    parity_dits.MODELS,
    parity_dits.MATRIX,
)
SPEECH = Table(
    (
        "",
        "## Encoder and decoder",
        "",
        "Whisper with three blocks in its encoder and three in its decoder. The global batch is four padded micro-batches of",
        "one to three samples, with uneven weights; one sample has none.",
        "",
    ),
    parity_speech.MODELS,
    parity_speech.MATRIX,
)
OTHERS = Table(
    ("", "## Every other generating model", "", "Measured in the same way, with the layers and heads that the tests' pipelines have; those cut into parts are forms of a model above.", ""),
    parity_dits.OTHERS,
    parity_dits.SHARDED,
    across=True,
)  # fmt: skip
HEARERS = Table(
    (
        "",
        "## Speech in a language model",
        "",
        "Qwen3-ASR with four blocks in its audio tower and three in its language model: the packs of the first table, with",
        "sounds where those have pictures.",
        "",
    ),
    (tiny.ASR,),
    HEARING,
)
SPEAKING = Table(
    (
        "",
        "## Models that speak",
        "",
        "Qwen3-TTS with three blocks in its talker and two in its code predictor. The global batch is four packs of one to",
        "three samples with uneven weights, voices as recordings, by name and none; the loss is of all codes of a frame.",
        "",
    ),
    parity_speech.SPEAKING,
    parity_speech.SPEAKING_MATRIX,
)
TABLES = (LANGUAGE, HEARERS, SPEECH, SPEAKING, DENOISERS, OTHERS)


def read(text: str) -> Cells:
    """The cells of the tables that `table` wrote."""
    cells: Cells = {}
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("| "):
            if not line.startswith("|---"):
                header = []
            continue
        parts = [part.strip() for part in line.strip("|").split(" | ")]
        if not header:
            header = parts
            continue
        for column, value in zip(header[1:], parts[1:], strict=True):
            key = (column, parts[0]) if header[0] == "model" else (parts[0], column)
            if value and value != "-":
                cells[key] = value
    return cells


def table(cells: Mapping[tuple[str, str], str], dtype: str = "float64") -> str:
    """Markdown: cells are loss / gradients / weights. Other rows are dropped."""
    import diffusers
    import transformers

    lines = [
        "# Parity",
        "",
        "Written by `make parity`; do not edit. Each cell is one run of a tiny random model of the library's own class",
        f"on real processes (gloo, CPU, {dtype}), compared with one process on the same global batch of four packs with",
        "pictures, a video and text (one pack has no picture): the largest relative L2 error of **loss / any gradient /",
        f"any weight after {STEPS} clipped AdamW steps**. Loss of every model: per token, with the routers' balance loss for",
        f"experts. `-` is a layout that the model does not have, an empty cell was not measured; above {BOUNDS[dtype]:.0e} a cell",
        f"is marked. {'The same in float32: ' if dtype == 'float64' else 'The same in float64: '}[{OTHER[dtype]}]({OTHER[dtype]}.md).",
        *AMPLIFIED[dtype],
        "",
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, diffusers {diffusers.__version__}.",
        "",
    ]
    return "\n".join(lines + [line for each in TABLES for line in each.lines(cells)]) + "\n"


OTHER = {"float64": "parity_float32", "float32": "parity"}
AMPLIFIED: dict[str, tuple[str, ...]] = {
    "float64": (),
    "float32": (
        "Marked cells: softmax does not see a bias of keys, so that its gradient is zero but for rounding, and a relative error of",
        "it is one of rounding (gradients of hunyuan-video and wan-flf2v, for example); AdamW divides by a gradient's own size,",
        "which makes weights of it (those of Qwen2.5-VL and cogvideox1.5). In float64 the same cells stay below 1e-11.",
    ),
}


def cell(result: Parity, bound: float = BOUND) -> str:
    """The three errors; bold when one is no rounding."""
    values = (result.loss, result.gradients, result.weights)
    text = " / ".join(f"{value:.0e}" if value else "0" for value in values)
    return text if max(*values, result.norm) < bound else f"**{text}**"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float64", choices=list(BOUNDS))
    parser.add_argument(
        "--output", type=Path, help="docs/parity.md, of float32 docs/parity_float32.md, if not given"
    )
    everything = [name for each in TABLES for name in each.models]
    parser.add_argument("--models", nargs="+", default=everything, choices=everything, metavar="NAME")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name holds one of these")
    parser.add_argument("--missing", action="store_true", help="only cells that the table lacks")
    asked = parser.parse_args(arguments)
    if asked.output is None:
        asked.output = Path("docs") / ("parity.md" if asked.dtype == "float64" else "parity_float32.md")
    merging = asked.only or asked.missing or len(asked.models) < len(everything)
    cells = read(asked.output.read_text()) if merging and asked.output.is_file() else {}
    bad = 0
    for name in asked.models:
        layouts = [
            layout
            for layout in next(each.layouts for each in TABLES if name in each.models)
            if layout.fits(name)
            and (not asked.only or any(text in layout.name for text in asked.only))
            and not (asked.missing and (row(layout), name) in cells)
        ]
        began = time.monotonic()
        for result in parity(name, layouts, dtype=getattr(torch, asked.dtype)) if layouts else ():
            layout = next(x for x in layouts if x.name == result.layout)
            cells[row(layout), name] = cell(result, BOUNDS[asked.dtype])
            bad += "*" in cells[row(layout), name]
            print(
                f"{name}: {row(layout)}: {cells[row(layout), name]} [{time.monotonic() - began:.0f} s]",
                flush=True,
            )
            asked.output.parent.mkdir(parents=True, exist_ok=True)
            partial = asked.output.with_suffix(".partial")
            partial.write_text(table(cells, asked.dtype))
            os.replace(partial, asked.output)
    print(f"{asked.output}: {len(cells)} cells, {bad} of this run differ")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
