"""Predicted peaks against what an allocator counts in real processes: rows of the table of docs/plan.md.

Every way of laying out, of saving memory and of computing is in one row here; `python -m tests.parallel.calibration`
measures all of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from polymodal import recipe as recipes
from polymodal.models import catalog
from polymodal.plan import accelerators, planner, search
from polymodal.plan.estimate import Formula
from polymodal.plan.shape import shape_of
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import meta_model
from tests.models import tiny, tiny_pipelines
from tests.parallel.calibration import BOUND, CASES, compare

QUICK = ("FSDP2 x 2",)
ROWS = (
    "one process, bf16",
    "full recompute",
    "FSDP2 x 2",
    "FSDP2 x 2, LoRA",
    "FSDP2 x 2, selective recompute, kept on the host",
    "FSDP2 x 2, optimizer on the host, bf16",
    "TP 2 + SP, bf16",
    "Ulysses 2 x ring 2",
    "HSDP 2 x 2, full recompute",
    "Qwen3-VL MoE, FSDP2 x 2, EP 2, TP 2 + SP",
    "PP 2 x VPP 2 (interleaved)",
    "PP 2, FSDP2 x 2, gradients kept sharded",
    "PP 2, FSDP2 x 2, TP 2 + SP, bf16",
)
TESTED = [case for case in CASES if case.name in ROWS]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in TESTED],
    ids=lambda case: case.name,
)
def test_predicted_peak_is_within_five_percent(case):
    predicted, measured, error = compare(case)
    assert error <= BOUND, f"predicted {predicted}, measured {measured}"


def test_enough_layouts_are_compared():
    assert len(TESTED) == len(ROWS) >= 12 and {case.world for case in TESTED} == {1, 2, 4, 8}


# ---- the formulas against traces ----------------------------------------------------------------------------------------

FORMULA_BOUND = 0.15
"""Memory and time by the formulas of plan/estimate.py against traces, with published models' widths."""

FORMULA_CASES = [
    ({}, {}),
    ({"recompute": "selective"}, {}),
    ({"recompute": "full"}, {}),
    ({"tp": 4}, {}),
    ({"tp": 4, "recompute": "full"}, {}),
    ({"cp": 2}, {}),
    ({"dp_replicate": 2, "recompute": "full"}, {}),
    ({}, {"lora": {"rank": 16, "towers": ["language"]}}),
    ({"recompute": "full"}, {"lora": {"rank": 16, "towers": ["language"]}}),
    ({"replicate": ["vision"]}, {}),
]


def language(directory: Path) -> dict:
    """Qwen2.5-VL with the widths of 7B and four layers of each tower, as a config alone."""
    text = {
        "hidden_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    write_config("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", directory, text, vision)
    return {"max_length": 4096}


def experts(directory: Path) -> dict:
    """Qwen3-VL MoE with the widths of 30B-A3B and four layers of each tower."""
    text = {
        "hidden_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [1, 2, 3],
    }
    write_config("qwen3-vl-moe", "Qwen3VLMoeForConditionalGeneration", directory, text, vision)
    return {"max_length": 4096}


def write_config(name: str, architecture: str, directory: Path, text: dict, vision: dict) -> None:
    sections = {"text_config": text, "vision_config": vision}
    values = {f"{section}__{key}": value for section, keys in sections.items() for key, value in keys.items()}
    config = tiny.config(name, **values)
    config.architectures = [architecture]
    config.save_pretrained(directory)


def joint_denoiser(directory: Path) -> dict:
    """FLUX.1 with its widths, four blocks of two streams and eight of one: 4,096 tokens."""
    layers = {"num_layers": 4, "num_single_layers": 8}
    heads = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]}
    denoiser("flux", directory, {**layers, **heads, "joint_attention_dim": 4096})
    return {"clip": {"pixels": 512 * 512}}


def cross_denoiser(directory: Path) -> dict:
    """Wan 2.1 with the widths of 1.3B and eight blocks."""
    heads = {"attention_head_dim": 128, "num_attention_heads": 12, "ffn_dim": 8960}
    denoiser("wan", directory, {**heads, "num_layers": 8, "text_dim": 4096, "rope_max_seq_len": 1024})
    return {"clip": {"frames": [33], "pixels": 240 * 416}}


def speech(directory: Path) -> dict:
    """Whisper with the widths of large-v3 and four layers of each side."""
    published = catalog.cards()["whisper"].sizes["large-v3"].config
    config = AutoConfig.for_model(**{**published, "encoder_layers": 4, "decoder_layers": 4})
    config.architectures = ["WhisperForConditionalGeneration"]
    config.save_pretrained(directory)
    return {}


def denoiser(name: str, directory: Path, changes: dict) -> None:
    """A tiny pipeline whose denoiser has other sizes, as a config alone."""
    file = Path(tiny_pipelines.pipeline(name, directory)) / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


SPEECH_CASES = [
    ({}, {}),
    ({"recompute": "selective"}, {}),
    ({"dp_replicate": 2, "recompute": "full"}, {}),
    ({"tp": 4}, {}),
    ({"tp": 4, "sp": False}, {}),
    ({"tp": 2}, {}),
    ({"tp": 4, "recompute": "full"}, {}),
    ({"recompute": "full"}, {"lora": {"rank": 16, "towers": ["language"]}}),
]
FORMULAS = [
    *((speech, *case) for case in SPEECH_CASES),
    *((language, *case) for case in FORMULA_CASES),
    (experts, {"tp": 4}, {}),
    (experts, {"tp": 4, "recompute": "full"}, {}),
    (experts, {"ep": 4}, {}),
    *(
        (maker, {"recompute": word}, {})
        for maker in (joint_denoiser, cross_denoiser)
        for word in search.RECOMPUTE
    ),
]
FAST = (language, {"recompute": "full"}, {})


@pytest.mark.parametrize(
    "maker, parallel, model",
    [pytest.param(*case, marks=() if case == FAST else pytest.mark.slow) for case in FORMULAS],
    ids=lambda part: (
        getattr(part, "__name__", None) or " ".join(f"{k}={v}" for k, v in part.items()) or "plain"
    ),
)
def test_the_formulas_are_near_the_traces(tmp_path, maker, parallel, model):
    data = maker(tmp_path)
    train = (
        {"global_batch_size": 256, "micro_batch_size": 8} if maker is speech else {"global_batch_size": 32}
    )
    source = {"source": str(tmp_path), **model}
    made = recipes.validate({"model": source, "data": data, "parallel": parallel, "train": train})
    family = planner.family_of(made)
    traced = planner.plan(made, family, planner.Question(8, accelerators.named("h100")))
    layout, accelerator = layout_of(made, family), traced.accelerator
    shape = shape_of(family, meta_model(family, made))
    formula = Formula(shape, made, traced.sizes, layout.workload(0.25, 1024), layout.packs)
    seconds = formula.seconds(accelerator)
    assert formula.memory().memory == pytest.approx(traced.peak, rel=FORMULA_BOUND)
    assert seconds == pytest.approx(traced.step, rel=FORMULA_BOUND)
    assert formula.mfu(accelerator, seconds) == pytest.approx(traced.mfu, rel=FORMULA_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [joint_denoiser, cross_denoiser])
def test_a_denoisers_cost_is_the_arithmetic_of_its_forward_pass(tmp_path, maker):
    """Not of every weight on every token: text has its own, and modulation is computed once a sample."""
    data = maker(tmp_path)
    made = recipes.validate({"model": {"source": str(tmp_path)}, "data": data})
    family = planner.family_of(made)
    (stage,) = planner.plan(made, family, planner.Question(1, accelerators.named("h100"))).stages
    load = stage.trace.load
    assert stage.trace.flops("forward") == pytest.approx(family.cost(load.measure) * load.samples, rel=0.1)
