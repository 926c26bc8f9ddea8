"""Tiny random hub checkpoints: of the real classes where the libraries have them, of key lists and shapes elsewhere."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.convert import keylists as keys
from tests.models import tiny

SHARDED = "60KB"


@dataclass(frozen=True)
class Hub:
    """family, variant: of the tables; make: writes the checkpoint; run: an export -> outputs of the library's model."""

    family: str
    make: Callable[[Path], Path]
    variant: str = ""
    run: Callable[[Path], torch.Tensor] | None = None


def keys_only(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None, stem: str = "model"
) -> Callable[[Path], Path]:
    """A checkpoint of given keys and shapes, as one file."""

    def make(directory: Path) -> Path:
        directory.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        state = {
            key: torch.randn(shape, generator=generator).to(torch.bfloat16) for key, shape in shapes.items()
        }
        save_file(state, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def understanding(name: str, tied: bool = False, **overrides: Any) -> Callable[[Path], Path]:
    return lambda directory: tiny.checkpoint(name, directory, tied=tied, dtype=torch.bfloat16, **overrides)


def from_config(name: str, config: Callable[[], Any]) -> Callable[[Path], Path]:
    """A transformers model of random weights, saved by the library in several files."""

    def make(directory: Path) -> Path:
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, name)(config()).to(torch.bfloat16)
        model.save_pretrained(directory, max_shard_size=SHARDED)
        return directory

    return make


def transformer(name: str, **sizes: Any) -> Callable[[Path], Path]:
    """A diffusers model of random weights."""

    def make(directory: Path) -> Path:
        import diffusers

        torch.manual_seed(0)
        getattr(diffusers, name)(**sizes).save_pretrained(directory, max_shard_size=SHARDED)
        return directory

    return make


def logits(directory: Path) -> torch.Tensor:
    """What the library's model says to a few tokens."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    model = (
        getattr(transformers, config.architectures[0]).from_pretrained(directory, dtype=torch.float32).eval()
    )
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def wan(directory: Path) -> torch.Tensor:
    import diffusers

    name = json.loads((directory / "config.json").read_text())["_class_name"]
    model = getattr(diffusers, name).from_pretrained(directory).eval()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 5, 8, generator=generator) if model.config.image_dim else None
    with torch.no_grad():
        return model(
            torch.randn(1, 4, 2, 4, 4, generator=generator), torch.tensor([3]), torch.randn(1, 5, 16, generator=generator),
            encoder_hidden_states_image=image, return_dict=False,
        )[0]  # fmt: skip


def vace(directory: Path) -> torch.Tensor:
    import diffusers

    model = diffusers.WanVACETransformer3DModel.from_pretrained(directory).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            torch.randn(1, 4, 2, 4, 4, generator=g), torch.tensor([3]), torch.randn(1, 5, 16, generator=g),
            control_hidden_states=torch.randn(1, 8, 2, 4, 4, generator=g), return_dict=False,
        )[0]  # fmt: skip


OSP, OSP_U = "open_sora_plan.OpenSoraPlanTransformer", "open_sora_plan_1_5.OpenSoraPlanUTransformer"
_osp = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 5, "caption_channels": 16,
}  # fmt: skip
_osp_u = {
    "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": [1, 2, 1],
    "sparse_n": [1, 2, 1], "caption_channels": 16, "pooled_projection_dim": 8, "timestep_embed_dim": 16,
}  # fmt: skip


STEP, OS2 = "step_video.StepVideoModel", "open_sora_2.OpenSora2Transformer"
_step = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "caption_channels": [16, 8],
}  # fmt: skip
_os2 = {
    "in_channels": 16, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 40, "num_heads": 4, "depth": 3, "depth_single_blocks": 3,
    "axes_dim": [2, 4, 4],
}  # fmt: skip


def _net(path: str) -> Any:
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"polymodal.models.nets.{module}"), name)


def own_net(path: str, **config: Any) -> Callable[[Path], Path]:
    """A checkpoint of a class of models/nets."""

    def make(directory: Path) -> Path:
        torch.manual_seed(0)
        _net(path)(**config).to(torch.bfloat16).save_pretrained(directory)
        return directory

    return make


def step_video(directory: Path) -> torch.Tensor:
    model, g = _net(STEP).from_pretrained(directory).eval(), torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 16, generator=g), torch.randn(1, 3, 8, generator=g)
    with torch.no_grad():
        return model(torch.randn(1, 2, 4, 4, 4, generator=g), torch.tensor([0.3]), *text, return_dict=False)[
            0
        ]


def open_sora_2(directory: Path) -> torch.Tensor:
    model, g = _net(OS2).from_pretrained(directory).eval(), torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 16, generator=g), torch.randn(1, 8, generator=g)
    given = {
        "img_ids": model.places(2, 4, 4, torch.device("cpu")),
        "condition": torch.randn(1, 8, 20, generator=g),
    }
    with torch.no_grad():
        return model(
            torch.randn(1, 8, 16, generator=g), torch.tensor([0.3]), *text, **given, return_dict=False
        )[0]


def open_sora_plan(directory: Path) -> torch.Tensor:
    config = json.loads((directory / "config.json").read_text())
    newer = config["_class_name"] == "OpenSoraPlanUTransformer"
    model = _net(OSP_U if newer else OSP).from_pretrained(directory).eval()
    g = torch.Generator().manual_seed(1)
    channels = 12 if config.get("vae_scale_factor_t") else 4
    given = {"pooled_projections": torch.randn(1, 8, generator=g)} if newer else {}
    with torch.no_grad():
        return model(
            torch.randn(1, channels, 2, 4, 4, generator=g), torch.randn(1, 5, 16, generator=g), timestep=torch.tensor([3]),
            **given, return_dict=False,
        )[0]  # fmt: skip


def thinker(directory: Path) -> torch.Tensor:
    """What Qwen2.5-Omni's language model says: the part that a tree holds."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def cogvideox(directory: Path) -> torch.Tensor:
    import diffusers

    model = diffusers.CogVideoXTransformer3DModel.from_pretrained(directory).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            torch.randn(1, 2, 4, 8, 8, generator=generator),
            torch.randn(1, 5, 16, generator=generator),
            torch.tensor([3]),
            return_dict=False,
        )[0]


def _mask(length: int) -> torch.Tensor:
    return torch.ones(1, length, dtype=torch.bool)


def hunyuan_video(directory: Path) -> torch.Tensor:
    import diffusers

    model = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(directory).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            torch.randn(1, 4, 2, 4, 4, generator=g), torch.tensor([3]), torch.randn(1, 5, 16, generator=g), _mask(5),
            torch.randn(1, 8, generator=g), guidance=torch.tensor([6.0]), return_dict=False,
        )[0]  # fmt: skip


def hunyuan_video_15(directory: Path) -> torch.Tensor:
    import diffusers

    model = diffusers.HunyuanVideo15Transformer3DModel.from_pretrained(directory).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            torch.randn(1, 9, 2, 4, 4, generator=g), torch.tensor([3.0]), torch.randn(1, 5, 16, generator=g), _mask(5),
            encoder_hidden_states_2=torch.randn(1, 3, 12, generator=g), encoder_attention_mask_2=_mask(3),
            image_embeds=torch.randn(1, 4, 6, generator=g), return_dict=False,
        )[0]  # fmt: skip


WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 5,
}  # fmt: skip
HUBS = {
    "qwen2-vl, tied": Hub("qwen2-vl", understanding("qwen2-vl", tied=True), run=logits),
    "qwen2.5-vl": Hub(
        "qwen2.5-vl", understanding("qwen2.5-vl", text_config__num_hidden_layers=4), run=logits
    ),
    "qwen2.5-vl canonical": Hub("qwen2.5-vl", understanding("qwen2.5-vl"), "canonical"),
    "qwen3-vl, tied": Hub("qwen3-vl", understanding("qwen3-vl", tied=True), run=logits),
    "qwen3-vl experts": Hub("qwen3-vl", understanding("qwen3-vl-moe"), run=logits),
    "wan t2v": Hub("wan", transformer("WanTransformer3DModel", **WAN), run=wan),
    "wan i2v": Hub(
        "wan",
        transformer("WanTransformer3DModel", **WAN, image_dim=8, added_kv_proj_dim=24, pos_embed_seq_len=10),
        run=wan,
    ),
}


TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}  # fmt: skip
VISION = {
    "depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "out_hidden_size": 32,
}  # fmt: skip


def _omni() -> Any:
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig

    audio = {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 16,
        "output_dim": 32,
        "max_source_positions": 20,
        "n_window": 4,
    }
    vision = {**VISION, "fullatt_block_indexes": [1]}
    thinker = Qwen2_5OmniThinkerConfig(text_config=TEXT, vision_config=vision, audio_config=audio)
    talker = {**TEXT, "embedding_size": 32, "head_dim": 8}
    token2wav = {
        "dit_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 2, "emb_dim": 8, "head_dim": 8, "mel_dim": 8, "enc_dim": 8, "enc_emb_dim": 8, "enc_channels": [8, 8, 8, 8, 24], "num_embeds": 16},
        "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]], "upsample_rates": [2], "upsample_kernel_sizes": [4]},
    }  # fmt: skip
    return Qwen2_5OmniConfig(
        thinker_config=thinker.to_dict(), talker_config=talker, token2wav_config=token2wav
    )


def _internvl() -> Any:
    from transformers import InternVLConfig, Qwen2Config

    vision = {
        "hidden_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "intermediate_size": 48,
        "image_size": [16, 16],
        "patch_size": [4, 4],
        "use_qk_norm": True,
        "attention_bias": True,
    }
    text = Qwen2Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return InternVLConfig(vision_config=vision, text_config=text.to_dict(), image_token_id=60)


COGVIDEOX = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "text_embed_dim": 16,
    "time_embed_dim": 16, "num_layers": 5, "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5,
}  # fmt: skip
HUNYUAN_SIZES = {
    "num_attention_heads": 4, "attention_head_dim": 10, "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0,
    "patch_size": 1, "text_embed_dim": 16, "rope_axes_dim": (2, 4, 4),
}  # fmt: skip
HUNYUAN = {
    **HUNYUAN_SIZES, "in_channels": 4, "out_channels": 4, "num_single_layers": 2, "pooled_projection_dim": 8,
}  # fmt: skip
HUNYUAN_15 = {
    **HUNYUAN_SIZES,
    "in_channels": 9,
    "out_channels": 4,
    "text_embed_2_dim": 12,
    "image_embed_dim": 6,
}
HUBS |= {
    "qwen2.5-omni": Hub(
        "qwen2.5-omni", from_config("Qwen2_5OmniForConditionalGeneration", _omni), run=thinker
    ),
    "glm-4.1v": Hub("glm-4.1v", understanding("glm4.1v"), run=logits),
    "internvl library": Hub(
        "internvl", from_config("InternVLForConditionalGeneration", _internvl), run=logits
    ),
    "cogvideox": Hub("cogvideox", transformer("CogVideoXTransformer3DModel", **COGVIDEOX), run=cogvideox),
    "hunyuan-video diffusers": Hub(
        "hunyuan-video", transformer("HunyuanVideoTransformer3DModel", **HUNYUAN), "diffusers", hunyuan_video
    ),
    "hunyuan-video-1.5 diffusers": Hub(
        "hunyuan-video-1.5",
        transformer("HunyuanVideo15Transformer3DModel", **HUNYUAN_15),
        "diffusers",
        hunyuan_video_15,
    ),
    "vace diffusers": Hub(
        "vace",
        transformer("WanVACETransformer3DModel", **WAN, vace_layers=[0, 2], vace_in_channels=8),
        "diffusers",
        vace,
    ),
}


DIFFUSION = "diffusion_pytorch_model"
HUBS |= {
    "internvl chat": Hub("internvl", keys_only(keys.internvl_chat(), keys.chat_config())),
    "internvl chat internlm2": Hub("internvl", keys_only(keys.internvl_chat(True), keys.chat_config(True))),
    "deepseek-vl2": Hub("deepseek-vl2", keys_only(keys.deepseek(False), keys.deepseek_config(False))),
    "deepseek-vl2 latent queries": Hub(
        "deepseek-vl2", keys_only(keys.deepseek(True), keys.deepseek_config(True))
    ),
    "stepvideo": Hub("stepvideo", own_net(STEP, **_step), run=step_video),
    "open-sora": Hub("open-sora", own_net(OS2, **_os2), run=open_sora_2),
    "open-sora-plan 1.2": Hub("open-sora-plan", own_net(OSP, **_osp), "v1.2", run=open_sora_plan),
    "open-sora-plan 1.3": Hub(
        "open-sora-plan", own_net(OSP, **_osp, sparse1d=True), "v1.3", run=open_sora_plan
    ),
    "open-sora-plan 1.3 i2v": Hub(
        "open-sora-plan", own_net(OSP, **_osp, vae_scale_factor_t=4), "v1.3", run=open_sora_plan
    ),
    "open-sora-plan 1.5": Hub("open-sora-plan", own_net(OSP_U, **_osp_u), "v1.5", run=open_sora_plan),
    "hunyuan-video": Hub("hunyuan-video", keys_only(keys.hunyuan(), None)),
    "hunyuan-video-1.5": Hub(
        "hunyuan-video-1.5", keys_only({"double_blocks.0.img_attn_q.weight": (8, 8)}, None)
    ),
    "cogvideox original": Hub("cogvideox", keys_only(keys.sat(), None, DIFFUSION), "source"),
    "vace": Hub("vace", keys_only(keys.vace_original(), None, DIFFUSION)),
    "bagel": Hub("bagel", keys_only(keys.bagel(), None, "ema")),
    "lumina": Hub("lumina", keys_only(keys.expert("model.layers.0.mlp", 16, 24), None)),
}
