"""Autoencoders in the layout of latent-diffusion's code, as diffusers' classes.

`published_names` maps each key of diffusers' `AutoencoderKL` or `VQModel` to the published one; weights are
equal but for the 1x1 convolutions of attention, which diffusers has as linear layers. BAGEL's autoencoder
(`ae.safetensors`, the layout of FLUX) and Lumina-mGPT 2's MoVQGAN (norms that see the latent) are of this
kind.
"""

import re
from typing import Any

from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

_RULES = (
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"mid_block\.block\.0\.", "mid.block_1."),
    (r"mid_block\.block\.1\.", "mid.block_2."),
    (r"mid_block\.attn\.0\.", "mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.(group_norm|spatial_norm)\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def published_names(model: nn.Module) -> dict[str, str]:
    """Each key of the model's state dict, with the published key of it."""
    levels = len(model.config.block_out_channels)
    names = {}
    for name in model.state_dict():
        published = name
        for pattern, new in _RULES:
            published = re.sub(pattern, new, published)
        published = re.sub(r"down_blocks\.(\d+)", r"down.\1", published)
        published = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", published)
        names[name] = published
    return names


def load_published(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a model from a published state dict, which must have every one of its tensors and no other."""
    own = model.state_dict()
    names = published_names(model)
    renamed = {name: state[key].reshape(own[name].shape) for name, key in names.items() if key in state}
    renamed |= {key: state[key] for key in state.keys() - set(names.values())}  # reported by torch
    model.load_state_dict(renamed)


def autoencoder_kl(values: dict[str, Any]) -> AutoencoderKL:
    """FLUX's layout: ch, ch_mult, num_res_blocks, z_channels, scale_factor, shift_factor."""
    widths = [values["ch"] * factor for factor in values["ch_mult"]]
    return AutoencoderKL(
        in_channels=values["in_channels"],
        out_channels=values["out_ch"],
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=values["num_res_blocks"],
        latent_channels=values["z_channels"],
        sample_size=values["resolution"],
        scaling_factor=values["scale_factor"],
        shift_factor=values["shift_factor"],
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def movqgan(values: dict[str, Any]) -> VQModel:
    """MoVQGAN: `ddconfig` with attention at one resolution, n_embed codes of embed_dim."""
    config = values["ddconfig"]
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    sides = [config["resolution"] // 2**level for level in range(len(widths))]
    attended = [side in config["attn_resolutions"] for side in sides]
    return VQModel(
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        down_block_types=tuple(f"{'Attn' * flag}DownEncoderBlock2D" for flag in attended),
        up_block_types=tuple(f"{'Attn' * flag}UpDecoderBlock2D" for flag in reversed(attended)),
        block_out_channels=tuple(widths),
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        sample_size=config["resolution"],
        num_vq_embeddings=values["n_embed"],
        vq_embed_dim=values["embed_dim"],
        norm_type="spatial",
    )
