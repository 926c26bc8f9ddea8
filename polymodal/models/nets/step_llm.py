"""Step LLM, the language model that Step-Video reads prompts with.

Formulas and keys: stepfun-ai/Step-Video-T2V (MIT; its attention is a closed kernel) and, for the bias of
attention, the Ascend port of it. Causal, without rotary positions: scores have a bias of -slope *
sqrt(distance) with the slopes of ALiBi (arXiv 2108.12409); padding is seen, as the published encoder sees it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 (diffusers looks for it)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.modeling_outputs import BaseModelOutput

from polymodal.models.nets.blocks import RMSNorm, angle_dtype

WIDTH_MULTIPLE = 256  # the inner width of feed-forward layers is rounded up to it


class Step1Config(PreTrainedConfig):
    """num_attention_groups: of heads that share a key and a value."""

    model_type = "step1"

    has_no_defaults_at_init = True  # sizes of the published one are those of its config.json

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_attention_groups: int,
        num_layers: int,
        ffn_hidden_size: int,
        layernorm_epsilon: float,
        padded_vocab_size: int,
        seq_length: int,
        **rest: Any,
    ):
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.num_attention_heads, self.num_attention_groups = num_attention_heads, num_attention_groups
        self.num_layers, self.layernorm_epsilon = num_layers, layernorm_epsilon
        self.padded_vocab_size, self.seq_length = padded_vocab_size, seq_length
        super().__init__(**rest)


def slopes(heads: int) -> list[float]:
    """ALiBi's: powers of 2^(-8 / n), n the largest power of two in `heads`; the rest are odd powers of
    2^(-4 / n)."""
    whole = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (k + 1) / whole) for k in range(whole)]
    return first + [2.0 ** (-4 * (2 * k + 1) / whole) for k in range(heads - whole)]


def attention_bias(heads: int, tokens: int, like: Tensor) -> Tensor:
    """[heads, N, N]: -slope * sqrt(i - j) for j <= i, else -infinity."""
    places = torch.arange(tokens, device=like.device)
    distance = places[:, None] - places
    roots = distance.clamp(min=0).to(angle_dtype(like.dtype)).sqrt()
    slope = torch.tensor(slopes(heads), device=like.device, dtype=roots.dtype)
    bias = -slope[:, None, None] * roots
    return bias.masked_fill(distance < 0, float("-inf")).to(like.dtype)


class Attention(nn.Module):
    """`wqkv`: q of all heads, then for each group its k and v."""

    def __init__(self, config: Step1Config):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_attention_groups
        self.size = config.hidden_size // self.heads
        rows = (self.heads + 2 * self.groups) * self.size
        self.wqkv = nn.Linear(config.hidden_size, rows, bias=False)
        self.wo = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        shared = 2 * self.groups * self.size
        query, both = self.wqkv(x).split([self.heads * self.size, shared], dim=-1)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = both.unflatten(-1, (self.groups, 2, -1)).permute(3, 0, 2, 1, 4)
        made = scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        return self.wo(made.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU; `w1` has the rows of the gate first."""

    def __init__(self, config: Step1Config):
        super().__init__()
        width = -(-config.ffn_hidden_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.w1 = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.w2 = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        return self.w2(silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: Step1Config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.ffn_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.ffn_norm(x))


class _Embeddings(nn.Module):
    def __init__(self, config: Step1Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class _Layers(nn.Module):
    def __init__(self, config: Step1Config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class Step1Model(PreTrainedModel):
    """Token ids [B, N] -> hidden states [B, N, hidden_size]; there is no last norm."""

    config_class = Step1Config
    base_model_prefix = ""
    _no_split_modules = ("Layer",)

    def __init__(self, config: Step1Config):
        super().__init__(config)
        self.tok_embeddings, self.transformer = _Embeddings(config), _Layers(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings.word_embeddings

    def forward(self, input_ids: Tensor, return_dict: bool = True) -> Any:
        x = self.tok_embeddings.word_embeddings(input_ids)
        bias = attention_bias(self.config.num_attention_heads, x.shape[1], x)
        for layer in self.transformer.layers:
            x = layer(x, bias)
        return BaseModelOutput(last_hidden_state=x) if return_dict else (x,)


class StepTokenizer(PreTrainedTokenizer):
    """Step LLM's: a model of sentencepiece; token 1, the text, token 2; padded with token 2."""

    # not `vocab_file`: transformers takes the end of this file's name for that of another tokenizer's
    vocab_files_names = {"model_file": "step1_chat_tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, model_file: str, **rest: Any):
        self.model_file = model_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
        begin, end = (self.pieces.id_to_piece(number) for number in (1, 2))
        named = {
            "bos_token": begin,
            "eos_token": end,
            "pad_token": end,
            "unk_token": self.pieces.id_to_piece(0),
        }
        super().__init__(**{**rest, **named})

    @property
    def vocab_size(self) -> int:
        return self.pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.pieces.id_to_piece(number): number for number in range(self.vocab_size)}

    def _tokenize(self, text: str, **rest: Any) -> list[str]:
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces.id_to_piece(index)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [1, *token_ids_0, 2]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / self.vocab_files_names["model_file"]
        if path.resolve() != Path(self.model_file).resolve():
            shutil.copyfile(self.model_file, path)
        return (str(path),)
