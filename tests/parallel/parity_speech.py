"""The layouts of models that transcribe and of those that speak in the parity table; parity.py measures and
writes them. Tests only."""

from __future__ import annotations

from tests.models import tiny_tts
from tests.parallel.layouts import Layout

MODELS = ("whisper",)
SPEAKING = (tiny_tts.NAME,)
ENCODER = ("model.encoder.",)
HALVES = {"encoder": [3, 0], "decoder": [0, 3]}
FOUR = {"encoder": [1, 2, 0, 0], "decoder": [0, 0, 1, 2]}
ENDS = {"encoder": [3, 0], "decoder": [3, 0]}  # the last stage has the norm and the head alone
MATRIX = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 3, uneven", 3),
    Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    Layout("ZeRO-1 x 2", 2, {"zero": 1}),
    Layout("ZeRO-2 x 2", 2, {"zero": 2}),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("FSDP2 x 2, selective recompute", 2, {"recompute": "selective"}),
    Layout("FSDP2 x 2, encoder recomputed", 2, {"recompute": "full", "recompute_blocks": ["audio"]}),
    Layout("FSDP2 x 2, activations on the host", 2, {"offload": ["activations"]}),
    Layout("FSDP2 x 2, parameters on the host", 2, {"offload": ["parameters"]}),
    Layout("FSDP2 x 2, encoder whole", 2, {"replicate": ["audio"]}),
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP", 2, {"tp": 2}),
    Layout("TP 4 + SP", 4, {"tp": 4}),
    Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    Layout("PP 2, 1F1B", 2, {"pp": 2}),
    Layout("PP 2, encoder, then decoder", 2, {"pp": 2, "pp_layers": HALVES}),
    Layout("PP 2, encoder 2 + 1", 2, {"pp": 2, "pp_layers": {"encoder": [2, 1], "decoder": [0, 3]}}),
    Layout("PP 2, the head alone at the end", 2, {"pp": 2, "pp_layers": ENDS}),
    Layout("PP 4, GPipe", 4, {"pp": 4, "pp_schedule": "GPipe", "pp_layers": FOUR}),
    Layout("PP 2 x 2 virtual, Interleaved1F1B", 2, {"pp": 2, "pp_schedule": "Interleaved1F1B"}),
    Layout("PP 2, InterleavedZeroBubble", 2, {"pp": 2, "pp_schedule": "InterleavedZeroBubble"}),
    Layout("PP 2 x 2 virtual, ZBVZeroBubble", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
    Layout("PP 2, ZeRO-3 x 2, full recompute", 4, {"pp": 2, "zero": 3, "recompute": "full"}),
    Layout("PP 2, TP 2 + SP", 4, {"pp": 2, "tp": 2}),
    Layout("PP 2, TP 2 + SP, FSDP2 x 2", 8, {"pp": 2, "tp": 2}),
    Layout("frozen encoder, FSDP2 x 2", 2, frozen=ENCODER),
    Layout("frozen encoder, PP 2", 2, {"pp": 2, "pp_layers": HALVES}, frozen=ENCODER),
    Layout("LoRA, FSDP2 x 2", 2, lora=True),
    Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
    Layout("LoRA, PP 2", 2, {"pp": 2}, lora=True),
]
PREDICTOR = ("talker.code_predictor.",)
SPEAKING_MATRIX = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 3, uneven", 3),
    Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    Layout("ZeRO-1 x 2", 2, {"zero": 1}),
    Layout("ZeRO-2 x 2", 2, {"zero": 2}),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("FSDP2 x 2, selective recompute", 2, {"recompute": "selective"}),
    Layout(
        "FSDP2 x 2, code predictor recomputed",
        2,
        {"recompute": "full", "recompute_blocks": ["code_predictor"]},
    ),
    Layout("FSDP2 x 2, activations on the host", 2, {"offload": ["activations"]}),
    Layout("FSDP2 x 2, parameters on the host", 2, {"offload": ["parameters"]}),
    Layout("FSDP2 x 2, code predictor whole", 2, {"replicate": ["code_predictor"]}),
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP", 2, {"tp": 2}),
    Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    Layout("Ulysses 2", 2, {"cp": 2}),
    Layout("ring 2", 2, {"cp": 2, "ulysses": 1}),
    Layout("ring 4", 4, {"cp": 4, "ulysses": 1}),
    Layout("FSDP2 x 2, Ulysses 2", 4, {"cp": 2}),
    Layout("Ulysses 2, TP 2 + SP", 4, {"cp": 2, "tp": 2}),
    Layout("frozen code predictor, FSDP2 x 2", 2, frozen=PREDICTOR),
    Layout("LoRA, FSDP2 x 2", 2, lora=True),
    Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
]
