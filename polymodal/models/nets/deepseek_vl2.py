"""DeepSeek-VL2: SigLIP tiles, a projector that joins patches 2 x 2, and a mixture-of-experts language model.

Formulas and names of tensors: https://github.com/deepseek-ai/DeepSeek-VL2 (ef9f91e), deepseek_vl2/models.
Blocks are transformers' (SigLIP, DeepSeek-V3, Llama attention); here are the router, the order of a picture's
rows, and the rules that read and write the published files (one tensor an expert, fused q, k and v of the
tower) as they lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.modeling_outputs import ModelOutput
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.siglip.modeling_siglip import SiglipMLP, SiglipVisionModel

from polymodal.models.nets.conversions import Unsqueezed


class DeepseekVL2VisionConfig(PreTrainedConfig):
    """The tower, in timm's words. What SigLIP's layers ask besides is fixed."""

    model_type = "vision"
    base_config_key = "vision_config"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    num_channels = 3
    layer_norm_eps = 1e-6
    hidden_act = "gelu_pytorch_tanh"
    attention_dropout = 0.0
    vision_use_head = False
    initializer_factor = 1.0

    @property
    def intermediate_size(self) -> int:
        return int(self.width * self.mlp_ratio)


@strict
class DeepseekVL2TextConfig(DeepseekV3Config):
    """DeepSeek-V2's keys. use_mla: latent attention, or plain heads of hidden_size / heads."""

    model_type = "deepseek_v2"
    base_config_key = "language_config"
    attribute_map = {**DeepseekV3Config.attribute_map, "num_experts": "n_routed_experts"}
    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    n_shared_experts: int = 2
    n_routed_experts: int = 64
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    topk_method: str = "greedy"
    n_group: int | None = 1
    topk_group: int | None = 1
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    max_position_embeddings: int = 2048
    use_mla: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.use_mla:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @property
    def mlp_only_layers(self) -> list[int]:
        """Layers without experts."""
        first, step = self.first_k_dense_replace or 0, self.moe_layer_freq
        return [i for i in range(self.num_hidden_layers) if i < first or i % step]


class DeepseekVL2Config(PreTrainedConfig):
    """config.json as published: language_config, vision_config and projector_config.

    projector_config: projector_type (downsample_mlp_gelu), input_dim, n_embed, depth, mlp_ratio,
    downsample_ratio. tile_tag: 2D (the only one known here). global_view_pos: the whole picture's view before
    ("head") or behind ("tail") its tiles. candidate_resolutions: [width, height] in pixels of pictures made
    of tiles. image_token_id: the placeholder of a picture's rows (published files leave it to the tokenizer).
    """

    model_type = "deepseek_vl_v2"
    sub_configs_defaults = {
        "vision_config": DeepseekVL2VisionConfig,
        "language_config": DeepseekVL2TextConfig,
    }
    vision_config: dict | PreTrainedConfig | None = None
    language_config: dict | PreTrainedConfig | None = None
    projector_config: dict | None = None
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: list | tuple = ((384, 384),)
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        usual = {"projector_type": "downsample_mlp_gelu", "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2}
        self.projector_config = {**usual, **(self.projector_config or {})}
        super().__post_init__(**kwargs)
        for key, value, known in (
            ("tile_tag", self.tile_tag, ("2D",)),
            ("global_view_pos", self.global_view_pos, ("head", "tail")),
            ("projector_type", self.projector_config["projector_type"], ("downsample_mlp_gelu",)),
        ):
            if value not in known:
                raise ValueError(f"{key} = {value} is not known for DeepSeek-VL2 (known: {', '.join(known)})")

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        return self.language_config

    @property
    def tile_side(self) -> int:
        """Rows, and columns, of a tile's features."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return -(-side // self.projector_config["downsample_ratio"])


class Router(v3.DeepseekV3TopkRouter):
    """Scores (softmax or sigmoid of the logits, float32), the best k, their weights.

    topk_method: greedy; group_limited_greedy (groups by their best expert); noaux_tc (a stored bias moves the
    choice, not the weights; groups by their two best experts).
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.method, self.scoring = config.topk_method, config.scoring_func
        if self.method != "noaux_tc":
            del self.e_score_correction_bias

    def scores(self, logits: Tensor) -> Tensor:
        return (
            logits.sigmoid() if self.scoring == "sigmoid" else F.softmax(logits, dim=-1, dtype=torch.float32)
        )

    def choose(self, scores: Tensor) -> Tensor:
        """[T, E] -> the experts of each token, int64 [T, k]."""
        if self.method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if self.method in ("noaux_tc", "group_limited_greedy") and (self.num_group or 1) > 1:
            groups = scores.unflatten(-1, (self.num_group, -1))
            best = groups.topk(2 if self.method == "noaux_tc" else 1, dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(best).scatter_(1, best.topk(self.topk_group, dim=-1).indices, 1)
            scores = groups.masked_fill(kept[..., None] == 0, 0.0).flatten(1)
        return scores.topk(self.top_k, dim=-1, sorted=False).indices

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(flat.float(), self.weight.float())
        scores = self.scores(logits)
        chosen = self.choose(scores)
        weights = scores.gather(1, chosen)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, chosen

    def balance(self, logits: Tensor, rows: int, by_row: bool) -> Tensor:
        """The balance loss of this layer: sum over experts of (its share of choices * E) * its mean score; of
        each of `rows` sequences by itself, then their mean, or of all tokens together."""
        scores = self.scores(logits)
        chosen = F.one_hot(self.choose(scores), self.num_experts).sum(dim=1)
        if not by_row:
            rows = 1
        share = chosen.to(scores.dtype).unflatten(0, (rows, -1)).mean(dim=1) * self.num_experts / self.top_k
        return (share * scores.unflatten(0, (rows, -1)).mean(dim=1)).sum(dim=1).mean()


class DecoderLayer(v3.DeepseekV3DecoderLayer):
    """DeepSeek-V3's, with the attention and the MLP that the config names for this layer."""

    def __init__(self, config: DeepseekVL2TextConfig, number: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = (v3.DeepseekV3Attention if config.use_mla else LlamaAttention)(config, number)
        if number in config.mlp_only_layers:
            self.mlp = v3.DeepseekV3MLP(config)
        else:
            self.mlp = v3.DeepseekV3MoE(config)
            self.mlp.gate = Router(config)
        norms = (v3.DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        self.input_layernorm, self.post_attention_layernorm = norms


class DeepseekVL2TextModel(v3.DeepseekV3Model):
    config: DeepseekVL2TextConfig
    _keys_to_ignore_on_load_unexpected = None

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file; the experts are in its own

    def __init__(self, config: DeepseekVL2TextConfig):
        v3.DeepseekV3PreTrainedModel.__init__(self, config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.norm = v3.DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = v3.DeepseekV3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router) and module.method != "noaux_tc":
            init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class Pool(nn.Module):
    """timm's attention pooling of the tower. Stored, never used."""

    def __init__(self, config: Any):
        super().__init__()
        width = config.hidden_size
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)


class DeepseekVL2VisionModel(SiglipVisionModel):
    config: DeepseekVL2VisionConfig

    def __init__(self, config: DeepseekVL2VisionConfig):
        super().__init__(config)
        self.attn_pool = Pool(config)
        self.attn_pool.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Pool):
            init.normal_(module.latent, std=module.latent.shape[-1] ** -0.5)


class Projector(nn.Module):
    """Patches 2 x 2 side by side (zeros fill a last row and column), then an MLP to the language model's
    width."""

    def __init__(self, config: DeepseekVL2Config):
        super().__init__()
        options = config.projector_config
        self.ratio = options["downsample_ratio"]
        inner, width = options["n_embed"] * options["mlp_ratio"], options["n_embed"]
        sizes = [config.vision_config.width * self.ratio**2, *[inner] * (options["depth"] - 1), width]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.GELU(), nn.Linear(before, after)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, L * L, C] -> [N, S * S, D]."""
        side = int(hidden.shape[1] ** 0.5)
        square = hidden.transpose(1, 2).unflatten(2, (side, side))
        fill = -side % self.ratio
        return self.layers(
            F.unfold(F.pad(square, (0, fill, 0, fill)), self.ratio, stride=self.ratio).transpose(1, 2)
        )


class Row(nn.Module):
    """A learned row [D] of the language model's stream: behind a line of tiles, or between two views."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, like: Tensor) -> Tensor:
        return like.new_zeros(()) + self.weight.to(like)  # not the parameter itself, which may be gathered


class DeepseekVL2PreTrainedModel(PreTrainedModel):
    config: DeepseekVL2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV3DecoderLayer", "SiglipEncoderLayer"]
    _supports_flash_attn = _supports_sdpa = _supports_attention_backend = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Row):
            init.normal_(module.weight, std=len(module.weight) ** -0.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=self.config.language_config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class DeepseekVL2Model(DeepseekVL2PreTrainedModel):
    def __init__(self, config: DeepseekVL2Config):
        super().__init__(config)
        self.vision_tower = DeepseekVL2VisionModel(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.language_model = DeepseekVL2TextModel(config.language_config)
        width = config.projector_config["n_embed"]
        self.image_newline, self.view_seperator = Row(width), Row(width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def bands(self, tiles: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """Tiles [N, S * S, D] as bands of so many tiles side by side, a newline behind each line of a band;
        0: the view of a whole picture, with the separator towards its tiles. Each: its rows [n, D]."""
        side = int(tiles.shape[1] ** 0.5)
        newline, separator = self.image_newline(tiles), self.view_seperator(tiles)[None]
        last = self.config.global_view_pos == "tail"
        found = []
        for band, width in zip(tiles.split([width or 1 for width in widths]), widths, strict=True):
            lines = band.unflatten(1, (side, side)).transpose(0, 1).flatten(1, 2)
            rows = torch.cat([lines, newline.expand(side, 1, -1)], dim=1).flatten(0, 1)
            found.append(rows if width else torch.cat([separator, rows] if last else [rows, separator]))
        if 0 not in widths:  # every rank of a sharded model uses every parameter
            found[0] = found[0] + 0.0 * separator
        return found

    def get_image_features(self, pixel_values: Tensor, images_spatial_crop: Tensor) -> Tensor:
        """Tiles [N, 3, S, S] of pictures, the whole view first, whose other tiles are (width, height) [M, 2]
        -> all their rows [n, D]."""
        tiles = self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)
        crops = images_spatial_crop.tolist()
        found = iter(self.bands(tiles, [band for width, height in crops for band in (0, *[width] * height)]))
        rows: list[Tensor] = []
        for _, height in crops:
            whole, local = next(found), [next(found) for _ in range(height)]
            rows += [whole, *local] if self.config.global_view_pos == "head" else [*local, whole]
        return torch.cat(rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """images_seq_mask: bool [B, T], the places that pictures' rows take in reading order; None: those of
        the config's image_token_id."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            if images_seq_mask is None:
                images_seq_mask = input_ids == self.config.image_token_id
            rows = self.get_image_features(pixel_values, images_spatial_crop).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(images_seq_mask[..., None], rows)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


@dataclass
class DeepseekVL2Output(ModelOutput):
    """loss: cross-entropy of the next tokens. aux_loss: the routers' balance loss, which training adds to
    it."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    aux_loss: Tensor | None = None


class DeepseekVL2ForConditionalGeneration(DeepseekVL2PreTrainedModel, GenerationMixin):
    def __init__(self, config: DeepseekVL2Config):
        super().__init__(config)
        self.model = DeepseekVL2Model(config)
        text = config.language_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DeepseekVL2Output:
        """The inputs of DeepseekVL2Model.forward, and labels [B, T] with -100 where nothing is learned."""
        text = self.config.language_config
        balance = self.training and labels is not None and text.aux_loss_alpha > 0
        if balance:
            kwargs["output_router_logits"] = True
        media = pixel_values, images_spatial_crop, images_seq_mask
        out = self.model(input_ids, *media, attention_mask=attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = aux = None
        if labels is not None:
            loss = F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if balance:
            routers = [
                layer.mlp.gate for layer in self.model.language_model.layers if hasattr(layer.mlp, "gate")
            ]
            found = zip(routers, out.router_logits, strict=True)
            assert labels is not None
            terms = [router.balance(each, len(labels), text.seq_aux) for router, each in found]
            aux = text.aux_loss_alpha * torch.stack(terms).sum() if terms else None
        return DeepseekVL2Output(loss, logits, out.past_key_values, aux)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in ("pixel_values", "images_spatial_crop", "images_seq_mask"):
                made[name] = None
        return made


TOWER_RULES = [  # of names below `vision.`
    WeightRenaming(r"patch_embed\.proj", "embeddings.patch_embedding"),
    WeightRenaming(r"blocks\.", "encoder.layers."),
    WeightRenaming(r"^norm\.", "post_layernorm."),
    WeightRenaming(r"\.norm1\.", ".layer_norm1."),
    WeightRenaming(r"\.norm2\.", ".layer_norm2."),
    WeightRenaming(r"\.attn\.proj\.", ".self_attn.out_proj."),
    WeightConverter("pos_embed", "embeddings.position_embedding.weight", operations=[Unsqueezed()]),
    *(
        WeightConverter(
            f"attn.qkv.{what}", [f"self_attn.{x}_proj.{what}" for x in "qkv"], operations=[Chunk(dim=0)]
        )
        for what in ("weight", "bias")
    ),
]
EXPERT_RULES = [
    WeightConverter(
        ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
        "mlp.experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter(
        "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]
    ),
]
RULES = [
    WeightRenaming(r"^language\.lm_head", "lm_head"),
    WeightRenaming(r"^language\.model", "model.language_model"),
    WeightRenaming(r"^projector", "model.multi_modal_projector"),
    WeightRenaming(r"^image_newline", "model.image_newline.weight"),
    WeightRenaming(r"^view_seperator", "model.view_seperator.weight"),
    WeightRenaming(r"^vision\.", "model.vision_tower."),
    *EXPERT_RULES,
]
register_checkpoint_conversion_mapping(DeepseekVL2Config.model_type, RULES, overwrite=True)
register_checkpoint_conversion_mapping(DeepseekVL2VisionModel.__name__, TOWER_RULES, overwrite=True)
AutoConfig.register(DeepseekVL2Config.model_type, DeepseekVL2Config, exist_ok=True)
AutoModelForImageTextToText.register(DeepseekVL2Config, DeepseekVL2ForConditionalGeneration, exist_ok=True)
