"""Qwen3-TTS 12 Hz: a talker that predicts the first code of each speech frame, a code predictor for the
others.

Formulas: the Qwen3-TTS report and its public configuration (Apache-2.0). The blocks are transformers' Qwen3;
M-RoPE with three equal rows is plain RoPE. The speaker encoder is transformers' ECAPA-TDNN. Keys are those of
the published files.

A position's input is projection(E_text) + its codec part: an id, a whole frame (the sum of its codes'
embeddings) or the speaker's vector. The talker's state at p - 1 predicts code 0 of the frame at p; the
predictor reads [that state, E_0(c_0) .. E_{G-2}(c_{G-2})], its head i - 1 at position i gives code i.
Training uses just these labels, so that the loss is of what generation does (the published fine-tuning script
shifts them twice).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForTextToWaveform,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import ECAPA_TimeDelayNet
from transformers.utils import ModelOutput

from polymodal.core.errors import PolymodalError

IGNORED = -100


@strict
class Qwen3TTSCodePredictorConfig(Qwen3Config):
    model_type = "qwen3_tts_talker_code_predictor"

    vocab_size: int = 2048
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 5
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    num_code_groups: int = 16


@strict
class Qwen3TTSTalkerConfig(Qwen3Config):
    model_type = "qwen3_tts_talker"
    base_config_key = "talker_config"
    ignore_keys_at_rope_validation = {"mrope_section", "interleaved"}  # its three rows of positions are equal
    sub_configs_defaults = {"code_predictor_config": Qwen3TTSCodePredictorConfig}

    code_predictor_config: dict | PreTrainedConfig | None = None
    vocab_size: int = 3072
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    num_code_groups: int = 16
    text_hidden_size: int = 2048
    text_vocab_size: int = 151936
    codec_pad_id: int = 2148
    codec_bos_id: int = 2149
    codec_eos_token_id: int = 2150
    codec_think_id: int = 2154
    codec_nothink_id: int = 2155
    codec_think_bos_id: int = 2156
    codec_think_eos_id: int = 2157
    codec_language_id: dict | None = None
    spk_id: dict | None = None
    spk_is_dialect: dict | None = None


@strict
class Qwen3TTSSpeakerEncoderConfig(PreTrainedConfig):
    model_type = "qwen3_tts_speaker_encoder"

    mel_dim: int = 128
    enc_dim: int = 1024
    enc_channels: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1536)
    enc_kernel_sizes: list[int] | tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: list[int] | tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 128
    enc_res2net_scale: int = 8
    enc_se_channels: int = 128
    sample_rate: int = 24000


@strict
class Qwen3TTSConfig(PreTrainedConfig):
    model_type = "qwen3_tts"
    sub_configs_defaults = {
        "talker_config": Qwen3TTSTalkerConfig,
        "speaker_encoder_config": Qwen3TTSSpeakerEncoderConfig,
    }

    talker_config: dict | PreTrainedConfig | None = None
    speaker_encoder_config: dict | PreTrainedConfig | None = None
    tts_model_type: str | None = "base"
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645
    tts_pad_token_id: int = 151671
    tts_bos_token_id: int = 151672
    tts_eos_token_id: int = 151673

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The talker: the decoder of this model."""
        return self.talker_config


class TextProjection(nn.Module):
    """Rows of the text vocabulary in the talker's width: fc2(silu(fc1 x))."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class TalkerModel(Qwen3Model):
    _input_embed_layer = "codec_embedding"

    def __init__(self, config: Qwen3TTSTalkerConfig) -> None:
        super().__init__(config)
        del self.embed_tokens
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)
        self.post_init()


class CodePredictorModel(Qwen3Model):
    def __init__(self, config: Qwen3TTSCodePredictorConfig, talker_width: int) -> None:
        super().__init__(config)
        del self.embed_tokens
        self.codec_embedding = nn.ModuleList(
            nn.Embedding(config.vocab_size, talker_width) for _ in range(config.num_code_groups - 1)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.codec_embedding[0]


class CodePredictor(nn.Module):
    """Codes 1..G-1 of a frame, one after another, from the talker's state and code 0."""

    def __init__(self, config: Qwen3TTSCodePredictorConfig, talker_width: int) -> None:
        super().__init__()
        self.model = CodePredictorModel(config, talker_width)
        self.lm_head = nn.ModuleList(
            nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            for _ in range(config.num_code_groups - 1)
        )
        if config.hidden_size != talker_width:
            self.small_to_mtp_projection = nn.Linear(talker_width, config.hidden_size)
        else:
            self.small_to_mtp_projection = nn.Identity()

    def states(self, state: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """What the heads of codes 1..k+1 read, [N, k + 1, D'], of states [N, D], E_0(c_0) [N, D] and codes
        1..k [N, k]."""
        known = [self.model.codec_embedding[i](codes[:, i]) for i in range(codes.shape[1])]
        rows = self.small_to_mtp_projection(torch.stack([state, first, *known], 1))
        return self.model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, 1:]

    def forward(self, state: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """Logits of codes 1..k+1, [N, k + 1, V], of the same."""
        hidden = self.states(state, first, codes)
        return torch.stack([self.lm_head[i](hidden[:, i]) for i in range(hidden.shape[1])], 1)


class Talker(nn.Module):
    def __init__(self, config: Qwen3TTSTalkerConfig) -> None:
        super().__init__()
        self.model = TalkerModel(config)
        self.text_projection = TextProjection(config.text_hidden_size, config.hidden_size)
        self.codec_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.code_predictor = CodePredictor(config.code_predictor_config, config.hidden_size)

    def text(self, ids: Tensor) -> Tensor:
        return self.text_projection(self.model.text_embedding(ids))

    def frames(self, codes: Tensor) -> Tensor:
        """The sum of the embeddings of each frame's codes: [..., G] -> [..., D]."""
        others = self.code_predictor.model.codec_embedding
        rows = [self.model.codec_embedding(codes[..., 0])]
        rows += [table(codes[..., i + 1]) for i, table in enumerate(others)]
        return torch.stack(rows).sum(0)


@dataclass
class Qwen3TTSOutput(ModelOutput):
    """Losses are scalars. `hidden` [B, T - 1, D]; `logits` [B, T - 1, V]; `code_logits` [frames, G - 1,
    V']."""

    loss: Tensor | None = None
    talker_loss: Tensor | None = None
    code_loss: Tensor | None = None
    hidden: Tensor | None = None
    logits: Tensor | None = None
    code_logits: Tensor | None = None


class Qwen3TTSForConditionalGeneration(PreTrainedModel):
    config: Qwen3TTSConfig
    config_class = Qwen3TTSConfig
    base_model_prefix = ""
    _no_split_modules = ["Qwen3DecoderLayer"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Qwen3TTSConfig) -> None:
        super().__init__(config)
        self.talker = Talker(config.talker_config)
        self.speaker_encoder: nn.Module | None = None
        if config.tts_model_type == "base":
            self.speaker_encoder = ECAPA_TimeDelayNet(config.speaker_encoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.talker.model.codec_embedding

    def forward(
        self,
        text_ids: Tensor,
        codec_ids: Tensor,
        codes: Tensor,
        speaker: Tensor | None = None,
        attention_mask: Tensor | None = None,
        code_loss_weight: float = 0.3,
    ) -> Qwen3TTSOutput:
        """Losses of rows that `training_row` makes.

        Args:
            text_ids: [B, T] ids of the text vocabulary; negative: no text.
            codec_ids: [B, T] ids of the codec vocabulary; at frames their code 0; `SPEAKER`: the speaker's
                vector; other negative: none.
            codes: [B, T, G], negative where there is no frame.
            speaker: [B, D] speaker vectors.
            attention_mask: [B, T], 1 at positions that are no padding.
        """
        embeds = self.embed(text_ids, codec_ids, codes, speaker)
        mask = None if attention_mask is None else attention_mask[:, :-1]
        hidden = self.talker.model(
            inputs_embeds=embeds[:, :-1], attention_mask=mask, use_cache=False
        ).last_hidden_state
        logits = self.talker.codec_head(hidden)
        is_frame = codes[..., 0] >= 0
        ends = codec_ids == self.config.talker_config.codec_eos_token_id
        labels = torch.where(is_frame | ends, codec_ids, IGNORED)[:, 1:]
        talker_loss = _cross_entropy(logits.flatten(0, 1), labels.flatten())
        frames = codes[:, 1:][is_frame[:, 1:]]
        code_logits = self.talker.code_predictor(
            hidden[is_frame[:, 1:]], self.talker.model.codec_embedding(frames[:, 0]), frames[:, 1:-1]
        )
        code_loss = _cross_entropy(code_logits.flatten(0, 1), frames[:, 1:].flatten())
        return Qwen3TTSOutput(
            loss=talker_loss + code_loss_weight * code_loss,
            talker_loss=talker_loss,
            code_loss=code_loss,
            hidden=hidden,
            logits=logits,
            code_logits=code_logits,
        )

    def embed(self, text_ids: Tensor, codec_ids: Tensor, codes: Tensor, speaker: Tensor | None) -> Tensor:
        """The talker's input [B, T, D], of what `forward` takes; without `speaker` nothing at its places."""
        talker, is_frame = self.talker, codes[..., 0] >= 0
        codec = talker.model.codec_embedding(codec_ids.clamp(min=0)) * (codec_ids >= 0)[..., None]
        codec = torch.where(is_frame[..., None], talker.frames(codes.clamp(min=0)), codec)
        if speaker is not None:
            codec = torch.where((codec_ids == SPEAKER)[..., None], speaker[:, None].to(codec.dtype), codec)
        return talker.text(text_ids.clamp(min=0)) * (text_ids >= 0)[..., None] + codec

    @torch.no_grad()
    def generate(
        self,
        text_ids: Tensor,
        speaker: str | Tensor | None = None,
        language: str | None = None,
        streaming_text: bool = False,
        max_frames: int = 2048,
        temperature: float = 0.0,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes [n, G] of one text, and the talker's state [n, D] before each frame.

        Args:
            text_ids: [L] ids of the role (three), the text, and nothing after it.
            speaker: a name of `spk_id`, a vector [D], or None.
            streaming_text: one row of text a frame, in place of the whole text first.
            temperature: 0 takes the most likely code.
        """
        rows, later = self.prompt(text_ids, speaker, language, streaming_text)
        generators = [generator] if generator is not None else None
        settings = (max_frames, temperature, top_k, repetition_penalty, generators)
        return self.speak([(rows, later)], *settings)[0]

    @torch.no_grad()
    def speak(
        self,
        prompts: list[tuple[Tensor, Tensor]],
        max_frames: int = 2048,
        temperature: float = 0.0,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        generators: list[torch.Generator] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """`generate` of several texts together; prompts: of `prompt`, padded on the left here.

        generators: of the CPU, one a text, so that its draws do not depend on the others.
        """
        config, talker = self.config.talker_config, self.talker
        longest = max(rows.shape[1] for rows, _ in prompts)
        inputs = torch.cat([F.pad(rows, (0, 0, longest - rows.shape[1], 0)) for rows, _ in prompts])
        device, count = inputs.device, len(prompts)
        places = torch.arange(longest, device=device)
        empty = torch.tensor([longest - rows.shape[1] for rows, _ in prompts], device=device)
        mask, padded = (places >= empty[:, None]).long(), bool(empty.any())
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        forbidden = torch.arange(config.vocab_size, device=device) >= config.vocab_size - 1024
        forbidden[config.codec_eos_token_id] = False
        pick = _Sampler(temperature, top_k, generators)
        cache = DynamicCache(config=config)
        found, states = [], []
        lengths = [-1] * count  # frames of those that have ended
        for step in range(max_frames):
            out = talker.model(
                inputs_embeds=inputs,
                attention_mask=mask if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            state = out.last_hidden_state[:, -1]
            logits = talker.codec_head(state).masked_fill(forbidden, -torch.inf)
            if found and repetition_penalty != 1.0:
                seen = torch.stack(found)[..., 0].T
                had = logits.gather(1, seen)
                had = torch.where(had > 0, had / repetition_penalty, had * repetition_penalty)
                logits = logits.scatter(1, seen, had)
            first = pick(logits)
            ended = (first == config.codec_eos_token_id).tolist()
            lengths = [step if now and n < 0 else n for n, now in zip(lengths, ended, strict=True)]
            if min(lengths) >= 0:
                break
            first = first.clamp(max=config.vocab_size - 1025)  # of texts that have ended, which are not read
            codes = first[:, None]
            for _ in range(config.num_code_groups - 1):
                head = talker.code_predictor(state, talker.model.codec_embedding(first), codes[:, 1:])
                codes = torch.cat([codes, pick(head[:, -1])[:, None]], 1)
            found.append(codes)
            states.append(state)
            texts = torch.stack([later[min(step, len(later) - 1)] for _, later in prompts])
            inputs = (talker.frames(codes) + texts)[:, None]
            mask = F.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
        if not found:
            none = inputs.new_zeros(0, config.hidden_size)
            return [(empty.new_zeros(0, config.num_code_groups), none) for _ in prompts]
        every, of = torch.stack(found, 1), torch.stack(states, 1)
        ends = [len(found) if n < 0 else n for n in lengths]
        return [(codes[:n], rows[:n]) for codes, rows, n in zip(every, of, ends, strict=True)]

    def prompt(
        self, text_ids: Tensor, speaker: str | Tensor | None, language: str | None, streaming: bool
    ) -> tuple[Tensor, Tensor]:
        """Input rows [1, P, D] before the first frame, and the rows of text [k, D] of the frames (the last
        repeats)."""
        vector = speaker if isinstance(speaker, Tensor) else None
        mark = SPEAKER if vector is not None else NONE
        if isinstance(speaker, str):
            config = self.config.talker_config
            mark = _id("speaker", config.spk_id, speaker)
            dialect = (config.spk_is_dialect or {}).get(speaker.lower())
            if dialect and (language is None or language.lower() == "chinese"):
                language = dialect
        text, codec = prompt(self.config, text_ids.tolist(), mark, language)
        row = torch.tensor([text, codec], device=text_ids.device)
        no_codes = row.new_full((1, row.shape[1], self.config.talker_config.num_code_groups), NONE)
        rows = self.embed(row[:1], row[1:], no_codes, None if vector is None else vector[None])
        pad = self.talker.text(text_ids.new_tensor([self.config.tts_pad_token_id]))
        if not streaming:
            return rows, pad
        # the first row of text meets the codec's bos; the others, and the end, go with the frames
        start = len(text) - (len(text_ids) - 3) - 2
        written = self.talker.text(row[0, start:-1])
        bos = self.talker.model.codec_embedding(row[1, -1:])
        return torch.cat([rows[:, :start], (written[:1] + bos)[None]], 1), torch.cat([written[1:], pad])


NONE, SPEAKER = -1, -2


def prompt(
    config: Qwen3TTSConfig, text_ids: list[int], speaker: int, language: str | None
) -> tuple[list[int], list[int]]:
    """Text and codec ids of the positions before the first frame.

    `text_ids` are the role's three ids and the text; `speaker` is an id of the codec vocabulary, `SPEAKER`
    for a vector, `NONE` to leave the position out.
    """
    talker = config.talker_config
    if language is None:
        thought = [talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id]
    else:
        thought = [talker.codec_think_id, talker.codec_think_bos_id]
        thought += [_id("language", talker.codec_language_id, language), talker.codec_think_eos_id]
    thought += [speaker] if speaker != NONE else []
    role, words = text_ids[:3], text_ids[3:]
    text = role + [config.tts_pad_token_id] * len(thought) + [config.tts_bos_token_id]
    text += [*words, config.tts_eos_token_id, config.tts_pad_token_id]
    codec = [NONE] * 3 + thought + [talker.codec_pad_id] * (len(words) + 2) + [talker.codec_bos_id]
    return text, codec


def _id(what: str, ids: dict[str, int] | None, name: str) -> int:
    if name.lower() not in (ids or {}):
        raise PolymodalError(
            f"{what} {name!r}: the model does not know it.",
            f"Choose one of: {', '.join(sorted(ids or {})) or 'none'}.",
        )
    return (ids or {})[name.lower()]


def training_row(
    config: Qwen3TTSConfig,
    text_ids: list[int],
    codes: Tensor,
    speaker: int = SPEAKER,
    language: str | None = None,
) -> dict[str, Tensor]:
    """`text_ids` [T], `codec_ids` [T], `codes` [T, G] of one sample: prompt, frames, end."""
    text, codec = prompt(config, text_ids, speaker, language)
    text += [config.tts_pad_token_id] * (len(codes) + 1)
    codec += [*codes[:, 0].tolist(), config.talker_config.codec_eos_token_id]
    rows = codes.new_full((len(text), codes.shape[1]), NONE)
    rows[-1 - len(codes) : -1] = codes
    return {"text_ids": torch.tensor(text), "codec_ids": torch.tensor(codec), "codes": rows}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, ignore_index=IGNORED)


class _Sampler:
    """The next id of each row of logits [B, V]: the largest, or a draw by Gumbel noise (Gumbel 1954) of the
    row's own generator."""

    def __init__(self, temperature: float, top_k: int, generators: list[torch.Generator] | None) -> None:
        self.temperature, self.top_k, self.generators = temperature, top_k, generators

    def __call__(self, logits: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        best, ids = logits.float().topk(min(self.top_k, logits.shape[-1]))
        own = self.generators or [None] * len(logits)
        waits = torch.stack([torch.empty(best.shape[-1]).exponential_(generator=g) for g in own])
        noise = waits.clamp_min_(1e-30).log_().to(best.device)
        return ids.gather(1, (best / self.temperature - noise).argmax(-1)[:, None])[:, 0]


def build(values: dict[str, Any], **keywords: Any) -> Qwen3TTSForConditionalGeneration:
    """A model with random weights of the values of a `config.json`."""
    return Qwen3TTSForConditionalGeneration._from_config(Qwen3TTSConfig(**values), **keywords)


AutoConfig.register(Qwen3TTSConfig.model_type, Qwen3TTSConfig, exist_ok=True)
AutoModelForTextToWaveform.register(Qwen3TTSConfig, Qwen3TTSForConditionalGeneration, exist_ok=True)
