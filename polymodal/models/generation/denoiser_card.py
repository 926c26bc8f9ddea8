"""What cards of denoisers have in common: their usual facts, and tensor plans of diffusers' blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.models.card import Chain, ModelCard

UNBUILT = {
    "tp": "its tensor plan is not built",
    "cp": "the cut of its sequence over ranks is not built",
    "pp": "its stages are not built",
}
VERIFIED = "tiny models of the class: trained, exported, opened and sampled by diffusers' pipeline"


def denoiser_card(
    *,
    blocks: tuple[str, ...],
    embedders: tuple[str, ...],
    output: tuple[str, ...],
    pipelines: Mapping[str, str],
    carry: tuple[str, ...] = (),
    limits: Mapping[str, str] | None = None,
    **facts: Any,
) -> ModelCard:
    """A ModelCard with the towers blocks, embedders and output. `facts` replace what is usual.

    carry: embedders whose outputs every block reads (Chain.carry). Without, FSDP2 is the only layout.
    """
    usual: dict[str, Any] = {
        "architectures": tuple(dict.fromkeys(pipelines.values())),
        "kind": "generation",
        "tasks": tuple(pipelines),
        "towers": {
            "blocks": tuple(pattern.removesuffix(".*") for pattern in blocks),
            "embedders": tuple(name.removesuffix("?") for name in embedders),
            "output": output,
        },
        "head": "proj_out",
        "verified": VERIFIED,
    }
    if carry:
        chain = Chain(blocks if len(blocks) > 1 else blocks[0], first=embedders, last=output, carry=carry)
        usual |= {"pipeline": {"blocks": chain}, "sequence_exit": "proj_out"}
    built = carry or "tensor_plan" in facts
    limits = {**({} if built else UNBUILT), "ep": "it has no experts", **(limits or {})}
    return ModelCard(**{**usual, "blocks": blocks, "pipelines": pipelines, "limits": limits, **facts})


def attention_plan(attention: str, style: str) -> dict[str, str]:
    projections = {f"{attention}.to_{name}": "colwise" for name in "qkv"}
    return {attention: style, **projections, f"{attention}.to_out.0": "rowwise"}


def feed_forward_plan(module: str) -> dict[str, str]:
    return {module: "feed_forward", f"{module}.net.0.proj": "colwise", f"{module}.net.2": "rowwise"}


def joint_blocks_plan(blocks: str = "transformer_blocks.*") -> dict[str, str]:
    """Of blocks with a stream of the picture and one of text, as FLUX's and HunyuanVideo's are."""
    return {
        **attention_plan(f"{blocks}.attn", "joint_attention"),
        f"{blocks}.attn.add_q_proj": "colwise",
        f"{blocks}.attn.add_k_proj": "colwise",
        f"{blocks}.attn.add_v_proj": "colwise",
        f"{blocks}.attn.to_add_out": "rowwise",
        **feed_forward_plan(f"{blocks}.ff"),
        **feed_forward_plan(f"{blocks}.ff_context"),
    }


def single_blocks_plan(style: str, blocks: str = "single_transformer_blocks.*") -> dict[str, str]:
    """Of blocks whose attention and MLP share an output projection; style: of their attention."""
    return {
        f"{blocks}.attn": style,
        **{f"{blocks}.attn.to_{name}": "colwise" for name in "qkv"},
        f"{blocks}.proj_mlp": "joined_colwise",
        f"{blocks}.proj_out": "joined_rowwise",
    }
