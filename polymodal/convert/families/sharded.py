"""DCP directories: hub names behind prefixes, experts in one tensor (flat, transposed or as they are)."""

from __future__ import annotations

from typing import Any

from polymodal.convert.families.qwen3_vl import ARCHITECTURES as QWEN3_VL_NAMES
from polymodal.convert.family import Family, section
from polymodal.convert.operations import Facts, Flatten, Operation, StackExperts, Transpose
from polymodal.convert.table import Row, Table, row


def fused(names: tuple[str, ...], hub_prefix: str, prefix: str, operation: Operation) -> tuple[Row, ...]:
    """Rows of a checkpoint whose experts lie in one tensor already; tensors of these names go through the operation."""
    return (
        *(
            row(f"{hub_prefix}{{x}}.experts.{name}", f"{prefix}{{x}}.experts.{name}", operation)
            for name in names
        ),
        row(f"{hub_prefix}{{x}}", f"{prefix}{{x}}"),
    )


def apart(layer: str, merged: str, flat: bool, transpose: bool = True) -> tuple[Row, ...]:
    """Rows of the experts of a checkpoint that has a linear layer an expert. layer, merged: keys up to the experts."""
    return (
        row(
            [f"{layer}.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up")],
            f"{merged}.experts.gate_up_proj",
            StackExperts(2, flat, transpose),
        ),
        row(
            f"{layer}.experts.{{e}}.down_proj.weight",
            f"{merged}.experts.down_proj",
            StackExperts(1, flat, transpose),
        ),
    )


EXPERTS = ("gate_up_proj", "down_proj")


def qwen3_vl(prefix: str) -> Table:
    """Qwen3-VL behind a prefix; experts one below the other."""
    return Table(fused(EXPERTS, "", prefix, Flatten()))


def qwen3_5(prefix: str = "", hub_prefix: str = "") -> Table:
    """Qwen3.5: experts transposed; those of the extra prediction layers, which the hub may have apart, stacked."""
    names = (
        *apart(f"{hub_prefix}mtp.layers.{{n}}.mlp", f"{prefix}mtp.layers.{{n}}.mlp", False),
        *(
            row(
                f"{hub_prefix}mtp.layers.{{n}}.mlp.experts.{x}",
                f"{prefix}mtp.layers.{{n}}.mlp.experts.{x}",
                Transpose(),
            )
            for x in EXPERTS
        ),
        *(
            row(
                f"{hub_prefix}model.language_model.layers.{{n}}.mlp.experts.{x}",
                f"{prefix}model.language_model.layers.{{n}}.mlp.experts.{x}",
                Transpose(),
            )
            for x in EXPERTS
        ),
        row(f"{hub_prefix}{{x}}", f"{prefix}{{x}}"),
    )
    return Table(names)


RENAMED = {
    "language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.", "language_model.lm_head.": "lm_head.",
}  # fmt: skip
"""Mistral3: the hub's names -> the library's, as its registry of conversions has them (a test compares the two)."""


def mistral3(prefix: str) -> Table:
    return Table(
        (
            *(row(f"{hub}{{x}}", f"{prefix}{ours}{{x}}") for hub, ours in RENAMED.items()),
            row("{x}", f"{prefix}{{x}}"),
        )
    )


# ------------------------------------------------------------------------------------------- experts merged and split


def facts(config: dict[str, Any]) -> Facts:
    thinker = section(config, "thinker_config")
    text = section(thinker, "llm_config", "text_config")
    count = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 0
    return {"experts": int(count)}


def merged(kind: str, prefix: str) -> Table:
    """Experts of one of three models in one tensor, behind a prefix."""
    if kind == "thinker":
        layer, ours = "thinker.model.layers.{n}.mlp", f"{prefix}model.layers.{{n}}.mlp"
        others = tuple(row(f"{part}.{{x}}", f"{prefix}{part}.{{x}}") for part in ("talker", "code2wav"))
        return Table((*others, *apart(layer, ours, False), row("thinker.{x}", f"{prefix}{{x}}")))
    layer = {"internvl": "language_model.model.layers.{n}.mlp", "glm": "model.language_model.layers.{n}.mlp"}[
        kind
    ]
    return Table((*apart(layer, f"{prefix}{layer}", True), row("{x}", f"{prefix}{{x}}")))


def of(kind: str, name: str, title: str, architectures: tuple[str, ...]) -> Family:
    return Family(
        name,
        title,
        {"": merged(kind, "model."), "merged": merged(kind, "")},
        architectures,
        facts,
        kind="dcp",
    )


INTERNVL_MOE = of("internvl", "internvl3.5", "InternVL 3.5", ("InternVLChatModel", "internvl_chat"))
GLM4V_MOE = of("glm", "glm-4.5v", "GLM-4.5V", ("Glm4vMoeForConditionalGeneration", "glm4v_moe"))
QWEN3_OMNI_MOE = of(
    "thinker", "qwen3-omni-moe", "Qwen3-Omni", ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe")
)

QWEN3_VL_DCP = Family(
    "qwen3-vl-dcp",
    "Qwen3-VL",
    {
        "": qwen3_vl("model."),
        "lora base": qwen3_vl("base_model.model.model."),
        "modules": Table((row("{x}", "{x}"),)),
    },
    QWEN3_VL_NAMES,
    facts,
    kind="dcp",
)
QWEN3_5_DCP = Family(
    "qwen3.5-dcp", "Qwen3.5", {"": qwen3_5()},
    ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "qwen3_5", "qwen3_5_moe"), facts, kind="dcp",
)  # fmt: skip
MISTRAL3_DCP = Family(
    "mistral3-dcp", "Mistral3", {"": mistral3("model."), "lora base": mistral3("base_model.model.model."), "modules": mistral3("")},
    ("Mistral3ForConditionalGeneration", "mistral3"), facts, kind="dcp",
)  # fmt: skip


def generic(prefix: str, hub_prefix: str, names: tuple[str, ...]) -> Family:
    """Any model: a prefix exchanged for another one, named experts flat (how many there are, the config tells)."""
    table = Table(fused(names, hub_prefix, prefix, Flatten()))
    return Family("any", "any model", {"": table}, facts=facts if names else None, kind="dcp")


def adapter(prefix: str, hub_prefix: str = "base_model.") -> Table:
    """A LoRA of peft's naming, as the training loads it."""
    return Table(
        tuple(
            row(f"{hub_prefix}{{x}}.lora_{side}.weight", f"{prefix}{{x}}.lora_{side}.default.weight")
            for side in "AB"
        )
    )


ADAPTER_DCP = Family("adapter-dcp", "a LoRA adapter", {"": adapter("base_model.model.")}, kind="dcp")
