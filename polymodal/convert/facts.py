"""Facts of the families: the numbers that their tables need, from config.json, and from the tensors' shapes.

families/*.yaml name these functions: `facts: ...` one of FROM_CONFIG, `from_shapes: ...` one of FROM_SHAPES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.convert.operations import Facts, Shape


def _section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A part of a config that older versions kept at the top."""
    return next((config[name] for name in names if isinstance(config.get(name), Mapping)), config)


def _attention(text: Mapping[str, Any]) -> dict[str, int]:
    heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    return {"heads": heads, "kv_heads": kv_heads, "layers": int(text["num_hidden_layers"])}


def _tied(*configs: Mapping[str, Any], default: bool = False) -> int:
    """Whether the head is the embedding: from the first config that has the key."""
    key = "tie_word_embeddings"
    return int(bool(next((config[key] for config in configs if key in config), default)))


def _experts(text: Mapping[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(text[name]) for name in names if text.get(name)), 0)


def vision_language(config: Mapping[str, Any]) -> Facts:
    text, vision = _section(config, "text_config"), config["vision_config"]
    return {
        **_attention(text),
        "vision_heads": int(vision["num_heads"]),
        "vision_layers": int(vision["depth"]),
        "tied": _tied(config, text),
    }


def omni(config: Mapping[str, Any]) -> Facts:
    thinker = config.get("thinker_config", config)
    audio = thinker["audio_config"]
    return {
        **vision_language(thinker),
        "audio_heads": int(audio["encoder_attention_heads"]),
        "audio_layers": int(audio["encoder_layers"]),
        "tied": _tied(thinker["text_config"]),
    }


def qwen3_vl(config: Mapping[str, Any]) -> Facts:
    text = config["text_config"]
    deepstack = config["vision_config"].get("deepstack_visual_indexes") or []
    return {
        **vision_language(config),
        "hidden": int(text["hidden_size"]),
        "experts": _experts(text),
        "deepstack": len(deepstack),
        **{f"deepstack.{index}": int(layer) for index, layer in enumerate(deepstack)},
    }


def internvl(config: Mapping[str, Any]) -> Facts:
    library = "text_config" in config
    text, vision = config["text_config" if library else "llm_config"], config["vision_config"]
    names = [*(text.get("architectures") or ()), text.get("model_type")]
    return {
        **_attention(text),
        "vision_heads": int(vision["num_attention_heads"]),
        "vision_layers": int(vision["num_hidden_layers"]),
        "internlm2": int("InternLM2ForCausalLM" in names or "internlm2" in names),
        "library": int(library),
        "tied": _tied(config, default=True) if library else _tied(text),
    }


def deepseek(config: Mapping[str, Any]) -> Facts:
    text = config["language_config"]
    heads, latent = int(text["num_attention_heads"]), int(text.get("q_lora_rank") or 0)
    nope, rope = (int(text.get(f"qk_{kind}_head_dim") or 0) for kind in ("nope", "rope"))
    return {
        "layers": int(text["num_hidden_layers"]),
        "kv_heads": int(text.get("num_key_value_heads") or heads),
        "experts": int(text.get("n_routed_experts") or 0),
        "query_latent": latent,
        "query_rows": latent or heads * (nope + rope) or 1,
        "latent_rows": int(text.get("kv_lora_rank") or 0) + rope or 1,
        "vision_layers": int(config["vision_config"]["layers"]),
        "tied": _tied(text),
    }


def experts(config: Mapping[str, Any]) -> Facts:
    thinker = _section(config, "thinker_config")
    return {"experts": _experts(_section(thinker, "llm_config", "text_config"))}


def layers(config: Mapping[str, Any]) -> Facts:
    return {"layers": int(config["num_layers"])}


def stepvideo(config: Mapping[str, Any]) -> Facts:
    return {"heads": int(config["num_attention_heads"]), **layers(config)}


FROM_CONFIG = {
    function.__name__: function
    for function in (vision_language, omni, qwen3_vl, internvl, deepseek, experts, layers, stepvideo)
}


# ------------------------------------------------------------------------------------------------ from shapes


def _shape(shapes: Mapping[str, Shape], *endings: str) -> Shape | None:
    """The shape of the first tensor whose key ends so."""
    return next((shape for key, shape in shapes.items() if key.endswith(endings)), None)


def qwen3_vl_experts(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Published experts are [experts, in, out]; recent versions of the library save [experts, out, in]."""
    down = _shape(shapes, "experts.down_proj")
    if down is None:
        return facts
    return {**facts, "as_linear": int(down[2] != facts["hidden"] and down[1] == facts["hidden"])}


def hunyuan(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Widths of the fused single blocks, from their output layer (in the tree, and by diffusers' name)."""
    hidden, columns = _shape(shapes, ".linear2.weight", ".proj_out.weight") or (0, 0)
    return {**facts, "hidden": hidden, "hidden_qkv": 3 * hidden, "mlp": columns - hidden}


def hunyuan_adapter(facts: Facts, shapes: Mapping[str, Shape]) -> Facts:
    """Widths of the fused layers of single blocks: their input is the hidden size."""
    down = _shape(shapes, "linear1.lora_down.weight") or _shape(shapes, "linear1_qkv.lora_A.default.weight")
    up = _shape(shapes, "linear1.lora_up.weight")
    hidden, rows = down[1] if down else 0, up[0] if up else 0
    return {**facts, "adapter_qkv": 3 * hidden, "adapter_mlp": rows - 3 * hidden}


FROM_SHAPES = {function.__name__: function for function in (qwen3_vl_experts, hunyuan, hunyuan_adapter)}
