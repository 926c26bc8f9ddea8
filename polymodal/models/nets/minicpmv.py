"""MiniCPM-V 2.5 and 2.6: Idefics2's tower over slices, a resampler to a fixed number of rows, Llama or Qwen2.

Formulas and names of tensors: https://github.com/OpenBMB/MiniCPM-V and the published checkpoints'
modeling_minicpmv.py and resampler.py. Blocks of the tower and language models are transformers'; the slices
of all pictures are one packed line of patches, so that a slice never sees another's padding. 2.5 gives its
tower no grid: a slice is one line of patches there, and in a batch every line is as long as the longest, with
zeros that patches do see; only its resampler knows what is padding (`batch_vision_input`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.idefics2 import modeling_idefics2 as idefics2
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from polymodal.distributed import attention as packed_attention

Grids = Sequence[tuple[int, int]]
"""(rows, columns) of patches of each slice."""


class LineConfig(Idefics2VisionConfig):
    """Of the tower of 2.5, which takes a slice as one line."""

    model_type = "idefics2"
    intermediate_size: int = 4304
    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 980
    patch_size: int = 14


class GridConfig(LineConfig):
    """Of the tower of 2.6, which is given the grid of each slice."""

    model_type = "siglip_vision_model"


class MiniCPMVConfig(PreTrainedConfig):
    """config.json as published: the language model's keys at the top, vision_config, query_num.

    image_token_id: the placeholder of a slice's rows (published files leave it to the tokenizer).
    """

    model_type = "minicpmv"
    sub_configs = {"vision_config": LineConfig}
    query_num: int = 64
    drop_vision_last_layer: bool = True
    batch_vision_input: bool = True
    slice_config: dict | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.vision_config or {}
        if isinstance(given, dict):
            kind = GridConfig if "siglip" in given.get("model_type", "siglip") else LineConfig
            self.vision_config = kind(**{key: value for key, value in given.items() if key != "model_type"})
        super().__post_init__(**kwargs)

    @property
    def grids(self) -> bool:
        """Whether the tower is given the grid of each slice."""
        return isinstance(self.vision_config, GridConfig)

    @property
    def vision_layers(self) -> int:
        """Layers of the tower."""
        return self.vision_config.num_hidden_layers - self.drop_vision_last_layer

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """The language model's config, made of the keys at the top."""
        own = {*MiniCPMVConfig.__annotations__, "model_type", "architectures"} - {"tie_word_embeddings"}
        options = {key: value for key, value in self.to_dict().items() if key not in own}
        text = (Qwen2Config if self.grids else LlamaConfig)(**options)
        text.base_config_key = ""
        return text


def sine_table(side: int, width: int) -> Tensor:
    """Positions of patches [side, side, width] float32: sine and cosine of the column, then of the row."""
    omega = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    angles = np.arange(side, dtype=np.float32)[:, None] * (np.float32(1.0) / np.float32(10000) ** omega)
    each = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))
    columns, rows = each[None].expand(side, -1, -1), each[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1)


class PatchEmbedding(nn.Conv2d):
    """A convolution over patches that do not overlap, as the product that it is: much faster."""

    def forward(self, patches: Tensor) -> Tensor:
        """[N, 3, P, P] -> [N, D]."""
        return F.linear(patches.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Embeddings(idefics2.Idefics2VisionEmbeddings):
    """Idefics2's, of patches in a line: their places are fractions of the slice's sides, in float32."""

    def __init__(self, config: LineConfig):
        super().__init__(config)
        size = config.patch_size
        self.patch_embedding = PatchEmbedding(config.num_channels, config.hidden_size, size, size)

    def places(self, count: int) -> Tensor:
        """Of so many patches along a side, the column (or row) of the table [count] int64."""
        side = self.num_patches_per_side
        step = (1 / torch.tensor(count)).item()  # rounded to float32, as published
        return torch.bucketize(
            torch.arange(0, 1 - 1e-6, step)[:count], torch.arange(1 / side, 1.0, 1 / side), right=True
        )

    def forward(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        """Patches [N, 3, P, P] of slices, row by row -> [1, N, D]."""
        side = self.num_patches_per_side
        places = [(self.places(h)[:, None] * side + self.places(w)).flatten() for h, w in grids]
        device = self.position_embedding.weight.device
        found = self.position_embedding(torch.cat(places).to(device))
        return (self.patch_embedding(pixel_values) + found)[None]


class Attention(idefics2.Idefics2VisionAttention):
    """Idefics2's, which hands on the lengths of a packed line (transformers' own drops them)."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries, keys, values = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, idefics2.eager_attention_forward
        )
        options = {"is_causal": False, "scaling": self.scale, "dropout": 0.0}
        found, weights = attend(self, queries, keys, values, attention_mask, **options, **kwargs)
        return self.out_proj(found.flatten(2)), weights


class VisionTower(idefics2.Idefics2VisionTransformer):
    def __init__(self, config: LineConfig, layers: int):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        del self.encoder.layers[layers:]
        for layer in self.encoder.layers:
            layer.self_attn = Attention(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, grids: Grids) -> BaseModelOutput:  # type: ignore[override]
        """Patches [N, 3, P, P] of slices, row by row -> their states [1, N, D]."""
        lengths = [h * w for h, w in grids]
        hidden = self.embeddings(pixel_values, grids)
        mask, packed = None, {}
        if self.config._attn_implementation == packed_attention.NAME:
            packed["cu_seq_lens_q"] = packed_attention.cumulative(lengths, hidden.device)
        elif len(lengths) > 1:
            owner = torch.repeat_interleave(torch.tensor(lengths)).to(hidden.device)
            apart = owner[:, None] != owner
            mask = torch.zeros_like(apart, dtype=hidden.dtype).masked_fill(
                apart, torch.finfo(hidden.dtype).min
            )
            mask = mask[None, None]
        out = self.encoder(inputs_embeds=hidden, attention_mask=mask, **packed)
        return BaseModelOutput(self.post_layernorm(out.last_hidden_state))


class CrossAttention(nn.Module):
    """torch.nn.MultiheadAttention with its projections as modules of their own."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
        """Queries [Q, D] over each of some sequences, keys and values [N, D] in one line -> [B, Q, D]."""
        parts = [self.q_proj(queries).expand(len(lengths), -1, -1)]
        for line in (self.k_proj(keys), self.v_proj(values)):
            parts.append(pad_sequence(list(line.split(list(lengths))), batch_first=True))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None].to(keys.device)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """A fixed number of learned queries over a slice's patches, whose keys carry their positions."""

    def __init__(self, queries: int, width: int, vision: int, side: int = 70):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision, width, bias=False)
        self.attn = CrossAttention(width, width // 128)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(width, width))
        self.positions = nn.Buffer(sine_table(side, width), persistent=False)

    def forward(self, patches: Tensor, grids: Grids) -> Tensor:
        """Patches [1, N, V] of slices, row by row -> [slices, queries, D]."""
        table = self.positions
        if max(max(grid) for grid in grids) > len(table):
            table = sine_table(max(max(grid) for grid in grids), table.shape[-1]).to(table.device)
        values = self.ln_kv(self.kv_proj(patches[0]))
        positions = torch.cat([table[:h, :w].flatten(0, 1) for h, w in grids]).to(values)
        out = self.attn(self.ln_q(self.query), values + positions, values, [h * w for h, w in grids])
        return self.ln_post(out) @ self.proj


class MiniCPMVPreTrainedModel(PreTrainedModel):
    config: MiniCPMVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "Idefics2EncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
            init.copy_(module.positions, sine_table(*module.positions.shape[1:]))


class MiniCPMVModel(MiniCPMVPreTrainedModel):
    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        text, vision = config.get_text_config(), config.vision_config
        for part in (text, vision):
            part._attn_implementation = config._attn_implementation
        self.vision_tower = VisionTower(vision, config.vision_layers)
        self.resampler = Resampler(config.query_num, text.hidden_size, vision.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def tower_grids(self, grids: Grids) -> Grids:
        """Grids of slices as the tower is given them."""
        return grids if self.config.grids else [(1, h * w) for h, w in grids]

    def slice_features(self, patches: Tensor, grids: Grids) -> Tensor:
        """Patches [N, 3, P, P] of slices, row by row -> [slices, query_num, D]."""
        states = self.vision_tower(patches, self.tower_grids(grids)).last_hidden_state
        return self.resampler(states, grids)

    def get_image_features(self, patches: Tensor, grids: Grids) -> Tensor:
        """As slice_features; of a config with batch_vision_input and no grids as published, with zeros behind
        shorter slices."""
        if self.config.grids or not self.config.batch_vision_input:
            return self.slice_features(patches, grids)
        lengths = [h * w for h, w in grids]
        longest = max(lengths)
        lines = pad_sequence(list(patches.split(lengths)), batch_first=True)
        states = self.vision_tower(lines.flatten(0, 1), [(1, longest)] * len(grids)).last_hidden_state
        own = zip(states[0].split(longest), lengths, strict=True)
        return self.resampler(torch.cat([state[:length] for state, length in own])[None], grids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """pixel_values: patches [N, 3, P, P] of all slices in reading order; image_grids: of each picture
        [M, 6] (rows and columns of patches of the whole, rows and columns of its slices, rows and columns of
        patches of each); images_seq_mask: bool [B, T], the places of their rows; None: those of the config's
        image_token_id."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            if images_seq_mask is None:
                images_seq_mask = input_ids == self.config.image_token_id
            assert image_grids is not None
            rows = self.get_image_features(pixel_values, slices(image_grids.tolist())).flatten(0, 1)
            inputs_embeds = inputs_embeds.masked_scatter(images_seq_mask[..., None], rows.to(inputs_embeds))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


def slices(grids: Sequence[Sequence[int]]) -> Grids:
    """Of pictures (see MiniCPMVModel.forward) the grid of each slice, the whole picture first."""
    return [
        each
        for h, w, rows, columns, high, wide in grids
        for each in ((h, w), *[(high, wide)] * (rows * columns))
    ]


class MiniCPMVForConditionalGeneration(MiniCPMVPreTrainedModel, GenerationMixin):
    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        self.model = MiniCPMVModel(config)
        text = self.model.language_model.config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The inputs of MiniCPMVModel.forward, and labels [B, T] with -100 where nothing is learned."""
        media = pixel_values, image_grids, images_seq_mask
        out = self.model(input_ids, *media, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.lm_head.out_features)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_grids", "images_seq_mask"):
                made[name] = None
        return made


RULES = [
    WeightRenaming(r"^llm\.lm_head", "lm_head"),
    WeightRenaming(r"^llm\.model", "model.language_model"),
    WeightRenaming(r"^vpm", "model.vision_tower"),
    WeightRenaming(r"^resampler", "model.resampler"),
    *(
        WeightConverter(
            f"resampler.attn.in_proj_{what}",
            [f"resampler.attn.{each}_proj.{what}" for each in "qkv"],
            operations=[Chunk(dim=0)],
        )
        for what in ("weight", "bias")
    ),
]
register_checkpoint_conversion_mapping(MiniCPMVConfig.model_type, RULES, overwrite=True)
AutoConfig.register(MiniCPMVConfig.model_type, MiniCPMVConfig, exist_ok=True)
AutoModelForImageTextToText.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration, exist_ok=True)
