"""CosyVoice3's speech language model: text and speech tokens in one row of a Qwen2, the next speech token
out.

Formulas: the CosyVoice 2 and 3 papers and the public configuration (Apache-2.0). The decoder is transformers'
Qwen2; keys are those of the published `llm.pt`.

A row is [sos] instruction, text [task] speech (its target: speech and eos, aligned with the input: no shift).
In the streaming form blocks of `mix_ratio[0]` text tokens and `mix_ratio[1]` speech tokens take turns; after
each full block the target is `fill`, and the rest follows as text [task] speech.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import ModelOutput

from polymodal.models.nets.published import tensors

NONE, IGNORED = -1, -1
STOPS = 200  # ids above the speech tokens: sos, eos, task, fill and spare ones; all end a generation


@strict
class CosyVoice3Config(PreTrainedConfig):
    model_type = "cosyvoice3"
    sub_configs_defaults = {"qwen2": Qwen2Config}

    qwen2: dict | PreTrainedConfig | None = None
    speech_token_size: int = 6561
    mix_ratio: list[int] | tuple[int, ...] = (5, 15)
    lsm_weight: float | int = 0.0
    length_normalized_loss: bool = True

    @property
    def special(self) -> dict[str, int]:
        return {name: self.speech_token_size + i for i, name in enumerate(("sos", "eos", "task", "fill"))}

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> PreTrainedConfig:
        return self.qwen2


@dataclass
class CosyVoice3Output(ModelOutput):
    """`logits` [B, T, speech_token_size + 200]; `accuracy` over the labelled positions."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    accuracy: Tensor | None = None


def training_row(
    config: CosyVoice3Config, instruct: list[int], text: list[int], speech: list[int], streaming: bool = False
) -> dict[str, list[int]]:
    """`text_ids`, `speech_ids` (`NONE` where a position has the other kind) and `labels` of one sample.

    `streaming` asks for blocks; a sample with too little speech for its text has none.
    """
    special = config.special
    text_block, speech_block = config.mix_ratio
    streaming = streaming and len(speech) / max(len(text), 1) > speech_block / text_block
    row: dict[str, list[int]] = {"text_ids": [], "speech_ids": [], "labels": []}

    def add(texts: list[int], speeches: list[int], labels: list[int]) -> None:
        row["text_ids"] += texts + [NONE] * len(speeches)
        row["speech_ids"] += [NONE] * len(texts) + speeches
        row["labels"] += labels

    add([], [special["sos"]], [IGNORED])
    add(instruct, [], [IGNORED] * len(instruct))
    blocks = len(text) // text_block if streaming else 0
    for i in range(blocks):
        said = speech[i * speech_block : (i + 1) * speech_block]
        words = text[i * text_block : (i + 1) * text_block]
        add(words, said, [IGNORED] * (len(words) - 1) + said + [special["fill"]])
    words, said = text[blocks * text_block :], speech[blocks * speech_block :]
    add(words, [special["task"], *said], [IGNORED] * len(words) + said + [special["eos"]])
    return row


class CosyVoice3LanguageModel(PreTrainedModel):
    config: CosyVoice3Config
    config_class = CosyVoice3Config
    base_model_prefix = ""
    _no_split_modules = ["Qwen2DecoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CosyVoice3Config) -> None:
        super().__init__(config)
        size = config.speech_token_size + STOPS
        self.llm = nn.ModuleDict({"model": Qwen2ForCausalLM._from_config(config.qwen2)})
        self.llm_decoder = nn.Linear(config.qwen2.hidden_size, size, bias=False)
        self.speech_embedding = nn.Embedding(size, config.qwen2.hidden_size)
        self.post_init()

    @property
    def decoder(self) -> nn.Module:
        return self.llm["model"].model

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def forward(
        self,
        text_ids: Tensor,
        speech_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> CosyVoice3Output:
        """Loss of rows of `training_row`, [B, T] each; `attention_mask` [B, T] is 0 at padding."""
        hidden = self.decoder(
            inputs_embeds=self.embed(text_ids, speech_ids), attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        logits = self.llm_decoder(hidden)
        if labels is None:
            return CosyVoice3Output(logits=logits)
        valid = labels != IGNORED
        wanted, found = labels[valid], logits[valid]
        found = found if found.dtype == torch.float64 else found.float()
        loss = smoothed_divergence(found, wanted, self.config.lsm_weight).sum()
        loss = loss / (len(wanted) if self.config.length_normalized_loss else len(labels))
        return CosyVoice3Output(
            loss=loss, logits=logits, accuracy=(found.argmax(-1) == wanted).double().mean()
        )

    def embed(self, text_ids: Tensor, speech_ids: Tensor) -> Tensor:
        text = self.decoder.embed_tokens(text_ids.clamp(min=0)) * (text_ids >= 0)[..., None]
        return text + self.speech_embedding(speech_ids.clamp(min=0)) * (speech_ids >= 0)[..., None]

    @torch.no_grad()
    def generate(
        self,
        text: list[int],
        prompt_text: list[int] | None = None,
        prompt_speech: list[int] | None = None,
        shortest: float = 2,
        longest: float = 20,
        top_p: float = 0.8,
        top_k: int = 25,
        window: int = 10,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Speech tokens of `text`, between `shortest` and `longest` times as many as its tokens.

        `prompt_text` is the instruction and the words of `prompt_speech`. Repetition-aware sampling: nucleus
        sampling, and where its token occurs in the last `window`, one of all other tokens; `top_p` 0 takes
        the most likely token.
        """
        special, device = self.config.special, self.device
        words = [*(prompt_text or []), *text]
        said = [special["task"], *(prompt_speech or [])]
        rows = torch.tensor(
            [
                [NONE, *words, *[NONE] * len(said)],
                [special["sos"], *[NONE] * len(words), *said],
            ],
            device=device,
        )
        cache, found = DynamicCache(config=self.config.qwen2), []
        for step in range(int(len(text) * longest)):
            out = self.decoder(
                inputs_embeds=self.embed(rows[:1], rows[1:]), past_key_values=cache, use_cache=True
            )
            chances = self.llm_decoder(out.last_hidden_state[0, -1]).float().softmax(-1)
            if step < len(text) * shortest:
                chances[self.config.speech_token_size :] = 0
            token = _sample(chances, found[-window:], top_p, top_k, generator)
            if token >= self.config.speech_token_size:
                break
            found.append(token)
            rows = torch.tensor([[NONE], [token]], device=device)
        return found


def _sample(
    chances: Tensor, recent: list[int], top_p: float, top_k: int, generator: torch.Generator | None
) -> int:
    best, ids = chances.sort(descending=True, stable=True)
    before = best.cumsum(0) - best
    best = best[:top_k] * (before[:top_k] < max(top_p, 1e-9))
    token = int(ids[torch.multinomial(best, 1, generator=generator)[0]])
    if token in recent and top_p:
        chances = chances.clone()
        chances[token] = 0
        token = int(torch.multinomial(chances, 1, generator=generator)[0])
    return token


def smoothed_divergence(logits: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """KL(target | model) of each row [n]: the target has 1 - smoothing at `wanted`, the rest spread over the
    others."""
    logs = logits.log_softmax(-1)
    at = logs.gather(-1, wanted[:, None])[:, 0]
    if not smoothing:
        return -at
    others = smoothing / (logits.shape[-1] - 1)
    entropy = (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(others)
    return entropy - (1 - smoothing) * at - others * (logs.sum(-1) - at)


def build(values: dict[str, Any], **keywords: Any) -> CosyVoice3LanguageModel:
    """A model with random weights of the values of a config."""
    return CosyVoice3LanguageModel._from_config(CosyVoice3Config(**values), **keywords)


def from_published(directory: Path, file: str = "llm.pt") -> CosyVoice3LanguageModel:
    """The model of a published directory: `CosyVoice-BlankEN/config.json`, and `llm.pt` or `llm.rl.pt`."""
    state = tensors(directory / file)
    qwen2 = Qwen2Config.from_pretrained(directory / "CosyVoice-BlankEN")
    size = len(state["speech_embedding.weight"]) - STOPS
    model = build({"qwen2": qwen2, "speech_token_size": size})
    model.load_state_dict(state)
    return model
