"""The published configs of generating models build what their cards say: parameters and layers, on meta."""

import inspect
import json
import typing

import pytest
import yaml

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data.clips import Clips
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog, pipelines
from polymodal.parallel import apply as layout
from polymodal.plan import accelerators, estimate, recommend, shape
from polymodal.tools import init_recipe
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import meta_model

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
    ("open-sora-1.2", "1.1b"): ("STDiT3", {}),
    ("open-sora-2", "11b"): ("OpenSora2Transformer", {}),
    ("step-video", "t2v-30b"): ("StepVideoModel", {}),
    ("step-video", "ti2v-30b"): ("StepVideoModel", {"use_additional_conditions": True}),
    ("open-sora-plan-1.5", "8b"): ("OpenSoraPlanUTransformer", {}),
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
    ("open-sora-plan", "1.3-2b"): ("OpenSoraPlanTransformer", {"cross_attention_dim": 2304, "sparse1d": True, "sparse_n": 4}),
    ("open-sora-plan", "1.2-2b"): ("OpenSoraPlanTransformer", {"in_channels": 4, "out_channels": 4}),
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
    model = card.family(card, full, "nowhere").build()
    family = card.family(card, {**dict(model.config), **full}, "nowhere")
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert count == pytest.approx(card.sizes[key].parameters, rel=0.01)
    layers, width, parameters = family.size()
    assert layers == card.sizes[key].layers and 0 < parameters / 1e9 < count and width > 100


def test_every_published_size_is_listed_here():
    listed = {name for name, _ in PUBLISHED}
    cards = {c.name: c for c in catalog.cards().values() if c.kind == "generation" and c.name != "wan2.1"}
    assert listed == set(cards) and set(PUBLISHED) == {(n, k) for n, c in cards.items() for k in c.sizes}


WAN21 = {
    "1.3b": {**WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14b": WAN,
    "i2v-14b-480p": {**WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "i2v-14b-720p": {**WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "flf2v-14b": {
        **WAN,
        "in_channels": 36,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "pos_embed_seq_len": 514,
    },
}
RATIOS = {
    "ltx-2": {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
    "flux.1": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16},
}
"""What a published VAE's config says otherwise than its class."""
EVERY = PUBLISHED | {("wan2.1", key): ("WanTransformer3DModel", config) for key, config in WAN21.items()}


def published_family(name, key, directory):
    """A family with the published denoiser's config and the configs that the classes of its other parts have by default."""
    card = catalog.cards()[name]
    cls, config = EVERY[name, key]
    pipeline = pipelines.named(card.pipelines[card.tasks[-1 if "i2v" in key else 0]])
    index = {
        "_class_name": pipeline.__name__,
        "expand_timesteps": key == "5b",
        "boundary_ratio": 0.9 if "a14b" in key else None,
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    for part, annotation in typing.get_type_hints(pipeline.__init__).items():
        if inspect.isclass(annotation) and annotation.__name__.startswith("Autoencoder"):
            (directory / part).mkdir()
            config_of_part = {**defaults(annotation), **RATIOS.get(name, {})}
            (directory / part / "config.json").write_text(json.dumps(config_of_part))
    return card.family(card, {**defaults(pipelines.named(cls)), **config}, str(directory))


def defaults(cls):
    """What a class's config says by default."""
    known = inspect.signature(cls.__init__).parameters.items()
    return {k: p.default for k, p in known if p.default is not p.empty}


CLIPS = [(n, k) for n, k in EVERY if any(t.endswith("video") for t in catalog.cards()[n].tasks)]


@pytest.mark.parametrize(("name", "key"), EVERY)
def test_written_layouts_are_accepted_for_the_published_model(name, key, tmp_path):
    """What `init` writes for a size is what `check` accepts, whatever the task and the number of devices."""
    family = published_family(name, key, tmp_path)
    for task in ("sft", "lora", "pretrain", *family.card.methods):
        for devices in (None, 1, 6, 8, 64):
            chosen = init_recipe.plan(f"{name}-{key}", task, None, devices)
            made = recipes.validate(yaml.safe_load(init_recipe.text(chosen, "x.json")))
            sizes = ParallelSizes.of(made.parallel, chosen.devices)
            assert layout.check(family.card, family.config, sizes, made.parallel, made.model) == []


@pytest.mark.parametrize(("name", "key"), CLIPS)
def test_clips_of_a_recipe_fit_the_published_model(name, key, tmp_path):
    """Whole latents and whole tokens, of the length that the library's pipeline samples."""
    made = recipes.validate(
        yaml.safe_load(init_recipe.text(init_recipe.plan(f"{name}-{key}", "sft", None, None), "x.json"))
    )
    family = published_family(name, key, tmp_path)
    clips = Clips(made.data.clip, family.grid(), family.given, family.needed)  # refuses what does not fit
    pipeline = pipelines.named(next(iter(family.routes.values())))
    default = inspect.signature(pipeline.__call__).parameters["num_frames"].default
    newer = family.grid().patch[0] > 1
    if default is not None and not newer and key != "5b":
        assert clips.lengths == [default]
    if key == "i2v-5b":  # its places are learned
        assert clips.sizes == [(480, 720)]
        with pytest.raises(
            PolymodalError, match="480 x 640 is not 480 x 720 pixels, which this model's places"
        ):
            Clips(recipes.Clip(frames=[49], sizes=[(480, 640)]), family.grid())
    sizes = [h * w for h, w in clips.sizes if w > h]
    assert max(sizes) > 0.9 * made.data.clip.pixels


CARDS_THAT_FIT = [  # GiB of one card, what it trains adapters of at the card's or these sizes
    *(("flux.1", "dev", 12, {"pixels": 1024 * 1024}), ("qwen-image", "20b", 24, {"pixels": 1024 * 1024})),
    ("wan2.1", "14b", 24, {"frames": [81], "pixels": 480 * 832}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key", "card_memory", "clip"), CARDS_THAT_FIT)
def test_one_card_trains_adapters_of_the_published_model_on_nf4(name, key, card_memory, clip, tmp_path):
    family = published_family(name, key, tmp_path)
    family.config = {**family.config, "_class_name": EVERY[name, key][0]}
    made = recipes.validate(
        {
            "model": {
                "source": str(tmp_path),
                "base": "nf4",
                "lora": {"rank": 16, "towers": [family.card.main]},
            },
            "data": {"clip": {**family.card.clip, **clip}},
            "parallel": {"recompute": "full", "offload": ["activations"]},
        }
    )
    counted = shape.shape_of(family, meta_model(family, made))
    assert counted.low > 0.9 * counted.total and counted.low_bytes < 0.54 * counted.low
    laid_out = layout_of(made, family)
    formula = estimate.Formula(
        counted, made, ParallelSizes.of(made.parallel, 1), laid_out.workload(0.25, 1024), laid_out.packs
    )
    accelerator = accelerators.named(accelerators.nearest(card_memory))
    assert accelerator.memory == card_memory * 2**30
    assert formula.memory().memory < accelerator.usable_memory * recommend.MARGIN
