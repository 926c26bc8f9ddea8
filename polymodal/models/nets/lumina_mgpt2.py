"""Lumina-mGPT 2: pictures as tokens of a language model.

Formulas: the Lumina-mGPT 2 report and its public configuration (Apache-2.0). The model is transformers'
Chameleon; its query and key norms have one weight for all heads ([1, d]), no picture tokenizer is part of it
and picture tokens are not masked. The tokenizer is MoVQGAN, diffusers' `VQModel` (`ldm_autoencoder.movqgan`).

A picture of sides W, H (multiples of 32) is: start, a token for H / 32 and one for W / 32, rows of codes each
with a row end, end. A sample is bos, the prompt, a separator (no loss), the picture and a separator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ChameleonConfig, ChameleonModel, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.chameleon import modeling_chameleon as library

START, END, ROW_END, FIRST_CODE = 151665, 151666, 151670, 155000
CODE_SIDE, GRID_SIDE = 8, 32  # pixels of a code and of a step of the grid tokens


@strict
class LuminaMGPT2Config(ChameleonConfig):
    vocab_size: int = 171385
    max_position_embeddings: int = 10240
    z_loss_weight: float | int = 1e-5


class LuminaMGPT2Model(ChameleonModel):
    def __init__(self, config: LuminaMGPT2Config) -> None:
        super(ChameleonModel, self).__init__(config)  # without the picture tokenizer
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            library.ChameleonDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        head = config.hidden_size // config.num_attention_heads
        for layer in self.layers:
            layer.self_attn.q_norm = library.ChameleonLayerNorm((1, head))
            layer.self_attn.k_norm = library.ChameleonLayerNorm((1, head))
        self.norm = library.ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = library.ChameleonRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LuminaMGPT2ForCausalLM(library.ChameleonPreTrainedModel):
    config: LuminaMGPT2Config
    config_class = LuminaMGPT2Config
    _no_split_modules = ["ChameleonDecoderLayer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LuminaMGPT2Config) -> None:
        super().__init__(config)
        self.model = LuminaMGPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **keywords: Any
    ) -> CausalLMOutputWithPast:
        """Loss: shifted cross entropy + z_loss_weight * mean(logsumexp(logits)^2), both over labelled
        positions."""
        out = self.model(input_ids=input_ids, **keywords)
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            entropy, z = self.losses(logits, labels)
            loss = entropy + self.config.z_loss_weight * z
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and z-loss of logits [B, T, V] and labels [B, T] that are not shifted yet."""
        wanted = labels[:, 1:]
        found, wanted = logits[:, :-1][wanted != -100], wanted[wanted != -100]
        found = found if found.dtype == torch.float64 else found.float()
        return F.cross_entropy(found, wanted), found.logsumexp(-1).square().mean()

    @torch.no_grad()
    def generate_picture(
        self,
        prompt: list[int],
        width: int,
        height: int,
        grid_token: int,
        guidance: float = 4.0,
        top_k: int = 4096,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes [height / 8, width / 8]; the picture's other tokens are set by their place.

        `prompt` ends with its separator; `grid_token` is the id of the grid token for 0. Guidance: u + s (c -
        u) with u the picture's tokens alone. `top_k` 1 takes the most likely code.
        """
        rows, columns = height // CODE_SIDE, width // CODE_SIDE
        start = [START, grid_token + height // GRID_SIDE, grid_token + width // GRID_SIDE]
        streams = [[*prompt, *start], start][: 2 if guidance != 1 else 1]
        inputs = [torch.tensor([stream], device=self.device) for stream in streams]
        caches = [DynamicCache(config=self.config) for _ in streams]
        codes = torch.zeros(rows, columns, dtype=torch.long, device=self.device)
        last = FIRST_CODE + self.codes
        for row in range(rows):
            for column in range(columns):
                both = [
                    self(ids, past_key_values=cache, use_cache=True).logits[0, -1, FIRST_CODE:last].float()
                    for ids, cache in zip(inputs, caches, strict=True)
                ]
                logits = both[0] if len(both) == 1 else both[1] + guidance * (both[0] - both[1])
                best, ids = logits.topk(min(top_k, len(logits)))
                pick = torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)
                codes[row, column] = ids[pick[0]]
                following = [FIRST_CODE + int(codes[row, column])]
                following += [ROW_END] if column == columns - 1 else []
                inputs = [torch.tensor([following], device=self.device) for _ in streams]
        return codes

    @property
    def codes(self) -> int:
        return min(self.config.vocab_size - FIRST_CODE, 16384)


def crop_sizes(target: int, longest_ratio: float = 4.0) -> list[tuple[int, int]]:
    """Sides (width, height) of pictures with at most (target / 32)^2 cells of 32 pixels, from wide to
    tall."""
    cells = (target // GRID_SIDE) ** 2
    wide, high, found = cells, 1, []
    while wide:
        if max(wide, high) / min(wide, high) <= longest_ratio:
            found.append((wide * GRID_SIDE, high * GRID_SIDE))
        if wide * (high + 1) <= cells:
            high += 1
        else:
            wide -= 1
    return found


def crop_size(width: int, height: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size that keeps most of a picture after scaling and a centre crop."""

    def kept(size: tuple[int, int]) -> float:
        scales = (size[0] / width, size[1] / height)
        return min(scales) / max(scales)

    return max(sizes, key=lambda size: (kept(size), size))


def picture_tokens(codes: Tensor, grid_token: int) -> list[int]:
    """Tokens of codes [h, w]."""
    rows, columns = codes.shape
    steps = GRID_SIDE // CODE_SIDE
    tokens = [START, grid_token + rows // steps, grid_token + columns // steps]
    for row in codes.tolist():
        tokens += [FIRST_CODE + code for code in row] + [ROW_END]
    return [*tokens, END]


def prompt_text(caption: str, size: tuple[int, int] | None) -> str:
    """The question of a sample; with `size` (width, height) left out for one in ten, as published."""
    of = f" of {size[0]}x{size[1]}" if size else ""
    return f"Generate an image{of} according to the following prompt:\n{caption}"


def sample(
    prompt: list[int], codes: Tensor, bos: int, separator: int, grid_token: int
) -> tuple[list[int], list[int]]:
    """Tokens and labels (-100: no loss) of a prompt's tokens and a picture's codes [h, w]."""
    question = [bos, *prompt, separator]
    answer = [*picture_tokens(codes, grid_token), separator]
    return question + answer, [-100] * len(question) + answer


def build(values: dict[str, Any], **keywords: Any) -> LuminaMGPT2ForCausalLM:
    """A model with random weights of the values of a `config.json`."""
    return LuminaMGPT2ForCausalLM._from_config(LuminaMGPT2Config(**values), **keywords)
