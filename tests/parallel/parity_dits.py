"""The layouts of diffusion transformers in the parity table; parity.py measures and writes them. Tests only."""

from __future__ import annotations

from dataclasses import replace

from tests.models import tiny_pipelines
from tests.parallel.dits import DEEPER
from tests.parallel.layouts import Layout

MODELS = tuple(DEEPER)
"""Models of the table of layouts: four blocks each (of two kinds, where a model has them), four heads."""

SINGLE = ("hunyuan-dit", "hunyuan-video-1.5", "hunyuan-video-1.5-i2v")
"""Models whose library code makes float32 of its own: measured in float32, not here."""
OTHERS = tuple(name for name in tiny_pipelines.MAKERS if name not in (*DEEPER, *SINGLE))
"""Every other generating model: sharded by FSDP2."""

VIRTUAL = {"pp_schedule": "Interleaved1F1B", "pp_layers": {"blocks": [[1, 1], [2, 0]]}}
MATRIX = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 3, uneven", 3),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP", 2, {"tp": 2}),
    Layout("TP 4 + SP", 4, {"tp": 4}),
    Layout("FSDP2 x 2, TP 2", 4, {"tp": 2, "sp": False}),
    Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
    Layout("Ulysses 2", 2, {"cp": 2}),
    Layout("Ulysses 3", 3, {"cp": 3, "ulysses": 3}),
    Layout("ring 2", 2, {"cp": 2, "ulysses": 1}),
    Layout("ring 2, full recompute", 2, {"cp": 2, "ulysses": 1, "recompute": "full"}),
    Layout("Ulysses 2 x ring 2", 4, {"cp": 4, "ulysses": 2}),
    Layout("FSDP2 x 2, Ulysses 2, full recompute", 4, {"cp": 2, "recompute": "full"}),
    Layout("Ulysses 2, TP 2 + SP", 4, {"cp": 2, "tp": 2}),
    Layout("LoRA, ring 2", 2, {"cp": 2, "ulysses": 1}, lora=True),
    Layout("PP 2, 1 + 3 blocks", 2, {"pp": 2, "pp_layers": {"blocks": [1, 3]}}),
    Layout("PP 2, what follows the blocks alone at the end", 2, {"pp": 2, "pp_layers": {"blocks": [4, 0]}}),
    Layout("PP 2 x 2 virtual, [[1, 1], [2, 0]]", 2, {"pp": 2, **VIRTUAL}),
    Layout("PP 2 x 2 virtual, ZBVZeroBubble", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
    Layout("PP 4", 4, {"pp": 4}),
    Layout("PP 2, FSDP2 x 2, full recompute", 4, {"pp": 2, "recompute": "full"}),
    Layout("PP 2, TP 2 + SP", 4, {"pp": 2, "tp": 2}),
    Layout("LoRA, PP 2", 2, {"pp": 2}, lora=True),
    Layout("PP 2, Ulysses 2, full recompute", 4, {"pp": 2, "cp": 2, "recompute": "full"}),
    Layout(
        "PP 2, 0 + 4 blocks, ring 2", 4, {"pp": 2, "cp": 2, "ulysses": 1, "pp_layers": {"blocks": [0, 4]}}
    ),
    Layout("PP 2 x 2 virtual, ring 2, TP 2 + SP", 8, {"pp": 2, "cp": 2, "ulysses": 1, "tp": 2, **VIRTUAL}),
    Layout("PP 2, Ulysses 2, FSDP2 x 2", 8, {"pp": 2, "cp": 2}),
]
RINGLESS = ("open-sora-plan", "open-sora-plan-i2v", "open-sora-plan-1.5")
"""Those whose attention takes every n-th token."""
LEFT = {"ring": RINGLESS, "TP": ("open-sora-2",), "PP": ("open-sora-plan-1.5",)}
"""What a layout's name holds -> models that cannot be laid out so; their cards say why."""


def _measured(row: Layout) -> Layout:
    left = [name for word, names in LEFT.items() if word in row.name for name in names]
    return replace(row, only=tuple(name for name in MODELS if name not in left)) if left else row


MATRIX = [_measured(row) for row in MATRIX]
FORMS = (
    "wan-i2v", "wan-flf2v", "wan2.2-5b", "wan2.2-a14b", "wan2.2-i2v-a14b", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch", "cogvideox",
    "cogvideox-i2v", "cogvideox1.5-i2v", "flux-guided", "flux-kontext", "sd3",
    "open-sora-plan-i2v",
)  # fmt: skip
"""Those that are forms of a model of the table of layouts: cut as it is."""
SHARDED = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("TP 2 + SP", 2, {"tp": 2}, only=FORMS),
    Layout("Ulysses 2", 2, {"cp": 2}, only=FORMS),
    Layout("ring 2", 2, {"cp": 2, "ulysses": 1}, only=tuple(n for n in FORMS if n not in RINGLESS)),
    Layout(
        "PP 2", 2, {"pp": 2}, only=tuple(name for name in FORMS if not name.startswith("cogvideox"))
    ),  # one block
]
