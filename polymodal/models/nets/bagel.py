"""BAGEL: a Qwen2 whose layers have two sets of weights, one that understands and one that draws, with joint
attention.

Formulas: the BAGEL paper and its public configuration (Apache-2.0). MLPs, norms and rotary embedding are
transformers' Qwen2, the vision layers its SigLIP; keys are those of the published `ema.safetensors`.

One packed row. Text and vision tokens take the plain weights, latent tokens those named `_moe_gen`, in every
norm, projection and MLP. A sample is a list of splits: causal (text), full (a vision image or a clean
latent, with its start and end tokens) or noise (a latent with loss, that no later token sees); attention is
causal between splits. Losses: cross entropy of text, and the mean square of the velocity noise - clean on
x_t = (1 - t) clean + t noise.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.utils import ModelOutput

from polymodal.core.errors import PolymodalError


@strict
class BagelTextConfig(Qwen2Config):
    model_type = "bagel_text"

    qk_norm: bool = True
    layer_module: str = "Qwen2MoTDecoderLayer"
    freeze_und: bool = False


@strict
class BagelConfig(PreTrainedConfig):
    model_type = "bagel"
    sub_configs_defaults = {"llm_config": BagelTextConfig, "vit_config": SiglipVisionConfig}

    llm_config: dict | PreTrainedConfig | None = None
    vit_config: dict | PreTrainedConfig | None = None
    z_channels: int = 16
    vae_downsample: int = 8
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    timestep_shift: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.llm_config.layer_module != "Qwen2MoTDecoderLayer" or self.llm_config.freeze_und:
            raise PolymodalError(
                "llm_config: of BAGEL's layers only Qwen2MoTDecoderLayer with freeze_und: false is here.",
                "Set these two keys so; freeze weights by their names in the recipe (train.freeze).",
            )

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> PreTrainedConfig:
        return self.llm_config


class Route:
    """Which rows [L] go through the `_moe_gen` weights."""

    def __init__(self, generated: Tensor) -> None:
        self.plain, self.gen = (~generated).nonzero()[:, 0], generated.nonzero()[:, 0]
        self.back = torch.cat([self.plain, self.gen]).argsort()

    def __call__(self, x: Tensor, owner: nn.Module, name: str) -> Tensor:
        """Rows of `x` through `owner.name`, or `owner.name_moe_gen`."""
        plain, gen = getattr(owner, name), getattr(owner, f"{name}_moe_gen")
        if not len(self.gen):
            return plain(x)
        return torch.cat([plain(x[self.plain]), gen(x[self.gen])])[self.back]


class BagelAttention(nn.Module):
    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        head = width // config.num_attention_heads
        self.head_dim = head
        for suffix in ("", "_moe_gen"):
            queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
            setattr(self, f"q_proj{suffix}", nn.Linear(width, queries))
            setattr(self, f"k_proj{suffix}", nn.Linear(width, keys))
            setattr(self, f"v_proj{suffix}", nn.Linear(width, keys))
            setattr(self, f"o_proj{suffix}", nn.Linear(queries, width, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = Qwen2RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                setattr(self, name + suffix, norm)

    def forward(self, x: Tensor, route: Route, rotary: tuple[Tensor, Tensor], masks: list[Tensor]) -> Tensor:
        q, k, v = (route(x, self, f"{name}_proj").unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        q, k = route(q, self, "q_norm"), route(k, self, "k_norm")
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=1)
        sizes = [len(mask) for mask in masks]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), masks, strict=True)
        mixed = [
            F.scaled_dot_product_attention(
                *(y.transpose(0, 1)[None] for y in rows), attn_mask=mask, enable_gqa=True
            )
            for *rows, mask in parts
        ]
        y = torch.cat([part[0].transpose(0, 1).flatten(1) for part in mixed])
        return route(y, self, "o_proj")


class BagelLayer(nn.Module):
    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        self.self_attn = BagelAttention(config)
        for suffix in ("", "_moe_gen"):
            setattr(self, f"mlp{suffix}", Qwen2MLP(config))
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, name + suffix, Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, route: Route, rotary: tuple[Tensor, Tensor], masks: list[Tensor]) -> Tensor:
        x = x + self.self_attn(route(x, self, "input_layernorm"), route, rotary, masks)
        return x + route(route(x, self, "post_attention_layernorm"), self, "mlp")


class BagelTextModel(nn.Module):
    def __init__(self, config: BagelTextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BagelLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(self, x: Tensor, generated: Tensor, positions: Tensor, masks: list[Tensor]) -> Tensor:
        route = Route(generated)
        cos, sin = self.rotary_emb(x, positions[None])
        for layer in self.layers:
            x = layer(x, route, (cos[0], sin[0]), masks)
        return route(x, self, "norm")


class VisionTower(nn.Module):
    """SigLIP over patches of images of any size, [N, p * p * C] with rows of a square table of positions."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"  # with a dense mask: an image's patches see each other
        width = config.hidden_size
        side = config.image_size // config.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.embeddings.position_embedding = nn.Embedding(side**2, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(patches) + self.embeddings.position_embedding(positions)
        image = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        mask = (image[:, None] == image)[None, None]
        for layer in self.encoder.layers:
            x = layer(x[None], mask)[0]
        return self.post_layernorm(x)


class Connector(nn.Module):
    def __init__(self, width: int, out: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, out), nn.Linear(out, out)
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class PositionTable(nn.Module):
    """Fixed rows of sines, then cosines; the first half of the channels is the column, the second the row."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Parameter(torch.zeros(side**2, width), requires_grad=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        quarter = self.pos_embed.shape[1] // 4
        omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = torch.arange(self.side, dtype=torch.float64)[:, None] * omega
        rows = torch.cat([angles.sin(), angles.cos()], 1)
        column, row = rows.repeat(self.side, 1), rows.repeat_interleave(self.side, 0)
        self.pos_embed.copy_(torch.cat([column, row], 1).float())

    def forward(self, ids: Tensor) -> Tensor:
        return self.pos_embed[ids]


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        powers = torch.arange(self.half, dtype=torch.float32) * -math.log(10000) / self.half
        angles = t[:, None].float() * powers.double().exp().float().to(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


def patchify(image: Tensor, size: int) -> Tensor:
    """[C, h p, w p] to [h w, p p C]: rows of patches, in each row, column, channel."""
    channels, height, width = image.shape
    parts = image.reshape(channels, height // size, size, width // size, size)
    return parts.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def sample_mask(splits: list[tuple[str, int]], device: Any = None) -> Tensor:
    """Who sees whom in a sample, [n, n] bool (row sees column), of its splits (causal | full | noise,
    length)."""
    rows = [
        (index, kind == "noise", kind == "causal")
        for index, (kind, length) in enumerate(splits)
        for _ in range(length)
    ]
    part, noise, causal = (torch.tensor(list(values), device=device) for values in zip(*rows, strict=True))
    order = torch.arange(len(part), device=device)
    same, earlier = part[:, None] == part, (part[:, None] > part) & ~noise
    return earlier | (same & (~causal[:, None] | (order[:, None] >= order)))


@dataclass
class BagelOutput(ModelOutput):
    """Scalars, the hidden states [L, D], and each token's cross entropy [n] and squared error [m, C]."""

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    hidden: Tensor | None = None
    text_losses: Tensor | None = None
    image_losses: Tensor | None = None


class BagelForConditionalGeneration(PreTrainedModel):
    config: BagelConfig
    config_class = BagelConfig
    base_model_prefix = ""
    _no_split_modules = ["BagelLayer", "SiglipEncoderLayer"]
    _supports_sdpa = True

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        width = config.llm_config.hidden_size
        self.language_model = nn.Module()
        self.language_model.model = BagelTextModel(config.llm_config)
        self.language_model.lm_head = nn.Linear(width, config.llm_config.vocab_size, bias=False)
        self.time_embedder = TimeEmbedding(width)
        channels = config.latent_patch_size**2 * config.z_channels
        self.vae2llm, self.llm2vae = nn.Linear(channels, width), nn.Linear(width, channels)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        self.vit_model = nn.Module()
        self.vit_model.vision_model = VisionTower(config.vit_config)
        self.connector = Connector(config.vit_config.hidden_size, width, config.connector_act)
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionTable):
            module.reset()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def forward(
        self,
        text_ids: Tensor,
        text_indexes: Tensor,
        position_ids: Tensor,
        masks: list[Tensor],
        ce_indexes: Tensor | None = None,
        labels: Tensor | None = None,
        vit_patches: Tensor | None = None,
        vit_indexes: Tensor | None = None,
        vit_position_ids: Tensor | None = None,
        vit_lengths: Tensor | None = None,
        latents: Tensor | None = None,
        latent_indexes: Tensor | None = None,
        latent_position_ids: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
    ) -> BagelOutput:
        """One packed row of L tokens.

        Args:
            text_ids, text_indexes: [n] and their places in the row.
            position_ids: [L].
            masks: of each sample in turn, `sample_mask`.
            ce_indexes, labels: [k] places whose next token is the label.
            vit_patches: [N, p * p * 3] of `patchify`, with places, rows of the position table, lengths of
            images.
            latents: [M, p * p * C] clean patches, with places and rows of the position table.
            times: [M] in 0..1, 0 where the latent is clean and has no loss.
            noise: [M, p * p * C].
        """
        embedded = self.get_input_embeddings()(text_ids)
        x = embedded.new_zeros(len(position_ids), embedded.shape[1]).index_copy(0, text_indexes, embedded)
        generated = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if vit_patches is not None:
            rows = self.vit_model.vision_model(vit_patches, vit_position_ids, vit_lengths)
            x = x.index_copy(0, vit_indexes, self.connector(rows) + self.vit_pos_embed(vit_position_ids))
        if latents is not None:
            t = times[:, None].to(latents.dtype)
            rows = self.vae2llm((1 - t) * latents + t * noise)
            rows = rows + self.time_embedder(times) + self.latent_pos_embed(latent_position_ids)
            x = x.index_copy(0, latent_indexes, rows)
            generated[latent_indexes] = True
        hidden = self.language_model.model(x, generated, position_ids, masks)
        out = BagelOutput(hidden=hidden)
        loss = hidden.new_zeros(())
        if ce_indexes is not None and len(ce_indexes):
            logits = self.language_model.lm_head(hidden[ce_indexes])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            out.text_losses = F.cross_entropy(logits, labels, reduction="none")
            out.text_loss = out.text_losses.mean()
            loss = loss + text_weight * out.text_loss
        if latents is not None and bool((times > 0).any()):
            noised = times > 0
            velocity = self.llm2vae(hidden[latent_indexes[noised]])
            out.image_losses = (velocity - (noise - latents)[noised]).square()
            out.image_loss = out.image_losses.mean()
            loss = loss + image_weight * out.image_loss
        out.loss = loss
        return out

    def shifted(self, times: Tensor) -> Tensor:
        """Times in 0..1 with the config's shift s: s t / (1 + (s - 1) t)."""
        shift = self.config.timestep_shift
        return shift * times / (1 + (shift - 1) * times)


def build(values: dict[str, Any], **keywords: Any) -> BagelForConditionalGeneration:
    """A model with random weights of the values of a config."""
    return BagelForConditionalGeneration._from_config(BagelConfig(**values), **keywords)


def published_config(directory: Path) -> BagelConfig:
    """The config of a published directory: `llm_config.json` and `vit_config.json`, whose last layer is not
    used."""
    text = json.loads((directory / "llm_config.json").read_text())
    vision = json.loads((directory / "vit_config.json").read_text())
    vision["num_hidden_layers"] -= 1
    text |= {"qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer", "tie_word_embeddings": False}
    return BagelConfig(llm_config=text, vit_config=vision)
