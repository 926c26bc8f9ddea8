"""The published configs of generating models build what their cards say: parameters and layers, on meta."""

import pytest

from polymodal.models import catalog, pipelines

FLUX = {"in_channels": 64, "guidance_embeds": True}
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
SD35M = {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
SD35L = {
    **SD3,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SDXL = {
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
COG = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
COG15 = {**COG, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "text_dim": 4096,
    "num_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 13824,
}
WAN5 = {
    **WAN,
    "num_layers": 30,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
SANA = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
LUMINA2 = {"cap_feat_dim": 2304, "axes_dim_rope": (32, 32, 32), "axes_lens": (300, 512, 512)}
HUNYUAN_DIT = {
    "num_layers": 40, "hidden_size": 1408, "in_channels": 4, "patch_size": 2, "sample_size": 128, "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
VACE13 = {
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "num_layers": 30,
    "vace_layers": list(range(0, 30, 2)),
}
PUBLISHED = {
    ("vace", "1.3b"): ("WanVACETransformer3DModel", VACE13),
    ("vace", "14b"): ("WanVACETransformer3DModel", {}),
    ("wan2.2", "5b"): ("WanTransformer3DModel", WAN5),
    ("wan2.2", "t2v-a14b"): ("WanTransformer3DModel", WAN),
    ("wan2.2", "i2v-a14b"): ("WanTransformer3DModel", {**WAN, "in_channels": 36}),
    ("sana", "0.6b"): ("SanaTransformer2DModel", SANA),
    ("sana", "1.6b"): ("SanaTransformer2DModel", {}),
    ("lumina2", "2b"): ("Lumina2Transformer2DModel", LUMINA2),
    ("qwen-image", "20b"): ("QwenImageTransformer2DModel", {}),
    ("hunyuan-dit", "1.2"): ("HunyuanDiT2DModel", HUNYUAN_DIT),
    ("hidream", "full"): ("HiDreamImageTransformer2DModel", HIDREAM),
    ("flux2", "dev"): ("Flux2Transformer2DModel", {}),
    ("hunyuan-video", "13b"): ("HunyuanVideoTransformer3DModel", {}),
    ("ltx-2", "19b"): ("LTX2VideoTransformer3DModel", {}),
    ("hunyuan-video-1.5", "t2v"): ("HunyuanVideo15Transformer3DModel", {}),
    ("hunyuan-video-1.5", "i2v"): ("HunyuanVideo15Transformer3DModel", {}),
    ("hunyuan-video-i2v", "13b"): ("HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}),
    ("hunyuan-video-i2v", "13b-33ch"): ("HunyuanVideoTransformer3DModel", {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}),
    ("flux.1", "dev"): ("FluxTransformer2DModel", FLUX),
    ("flux.1-kontext", "dev"): ("FluxTransformer2DModel", FLUX),
    ("kolors", "2.6b"): ("UNet2DConditionModel", {**SDXL, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "projection_class_embeddings_input_dim": 5632}),
    ("flux.1", "schnell"): ("FluxTransformer2DModel", {**FLUX, "guidance_embeds": False}),
    ("sd3", "2b"): ("SD3Transformer2DModel", SD3),
    ("sd3", "3.5-medium"): ("SD3Transformer2DModel", SD35M),
    ("sd3", "8.1b"): ("SD3Transformer2DModel", SD35L),
    ("sdxl", "3.5b"): ("UNet2DConditionModel", SDXL),
    ("cogvideox", "2b"): ("CogVideoXTransformer3DModel", {"num_attention_heads": 30, "num_layers": 30}),
    ("cogvideox", "5b"): ("CogVideoXTransformer3DModel", COG),
    ("cogvideox", "i2v-5b"): ("CogVideoXTransformer3DModel", {**COG, "in_channels": 32, "use_learned_positional_embeddings": True}),
    ("cogvideox", "1.5-5b"): ("CogVideoXTransformer3DModel", COG15),
    ("cogvideox", "1.5-i2v-5b"): ("CogVideoXTransformer3DModel", {**COG15, "in_channels": 32, "ofs_embed_dim": 512}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), PUBLISHED)
def test_a_published_config_builds_the_model_the_card_describes(name, key):
    card = catalog.cards()[name]
    cls, config = PUBLISHED[name, key]
    full = {**config, "_class_name": cls}
    model = pipelines.empty(full)
    family = card.family(card, {**dict(model.config), **full}, "nowhere")
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(card.sizes[key].parameters, rel=0.01)
    layers, width, parameters = family.size()
    assert layers == card.sizes[key].layers and 0 < parameters / 1e9 < count and width > 100


def test_every_published_size_is_listed_here():
    listed = {name for name, _ in PUBLISHED}
    cards = {c.name: c for c in catalog.cards().values() if c.kind == "generation" and c.name != "wan2.1"}
    assert listed == set(cards) and set(PUBLISHED) == {(n, k) for n, c in cards.items() for k in c.sizes}
