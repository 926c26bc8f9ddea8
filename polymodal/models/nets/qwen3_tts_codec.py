"""Qwen3-TTS's 12 Hz codec; its encoder is transformers' Mimi without a decoder. Its decoder: codes [B, 16, n]
to a 24 kHz wave of 1920 n samples.

Formulas: the Qwen3-TTS report and its public configuration (Apache-2.0). Split residual quantizers as in
Mimi, a causal convolution, a transformer with a sliding window, ConvNeXt upsampling and SnakeBeta blocks. All
blocks are transformers' (Qwen3-Omni's `Code2Wav`); the differences are the quantizers, the projections around
the transformer and the transposed convolutions, which here drop their right end alone. Keys are those of
`decoder.*` in the published files.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import MimiConfig, MimiModel, PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as library
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig


@strict
class Qwen3TTSCodecDecoderConfig(Qwen3OmniMoeCode2WavConfig):
    model_type = "qwen3_tts_codec_decoder"

    codebook_dim: int = 512
    latent_dim: int = 1024
    hidden_size: int = 512
    intermediate_size: int = 1024
    head_dim: int = 64
    num_semantic_quantizers: int = 1


class TransposedConv(library.Qwen3OmniMoeCausalTransConvNet):
    """Causal: the output has exactly `stride` times the input's length."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride)
        self.left_pad, self.right_pad = 0, kernel_size - stride


class Codebook(nn.Module):
    """A table that is stored as running sums and usage counts."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.cluster_usage = nn.Parameter(torch.ones(size))
        self.embedding_sum = nn.Parameter(torch.zeros(size, width))

    def forward(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None])


class ResidualQuantizer(nn.Module):
    """[B, k, n] codes to the projected sum of their rows, [B, C, n]."""

    def __init__(self, count: int, size: int, width: int, channels: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv1d(channels, width, 1, bias=False)  # of the encoder
        self.output_proj = nn.Conv1d(width, channels, 1, bias=False)
        self.vq = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    nn.ModuleDict({"_codebook": Codebook(size, width)}) for _ in range(count)
                )
            }
        )

    def decode(self, codes: Tensor) -> Tensor:
        rows = [layer["_codebook"](codes[:, i]) for i, layer in enumerate(self.vq["layers"])]
        return self.output_proj(torch.stack(rows).sum(0).transpose(1, 2))


class SplitQuantizer(nn.Module):
    def __init__(self, config: Qwen3TTSCodecDecoderConfig) -> None:
        super().__init__()
        self.first = config.num_semantic_quantizers
        sizes = (config.codebook_size, config.codebook_dim // 2, config.codebook_dim)
        self.rvq_first = ResidualQuantizer(self.first, *sizes)
        self.rvq_rest = ResidualQuantizer(config.num_quantizers - self.first, *sizes)

    def decode(self, codes: Tensor) -> Tensor:
        found = self.rvq_first.decode(codes[:, : self.first])
        if codes.shape[1] > self.first:
            found = found + self.rvq_rest.decode(codes[:, self.first :])
        return found


class Transformer(library.Qwen3OmniMoeCode2WavTransformerModel):
    def __init__(self, config: Qwen3TTSCodecDecoderConfig) -> None:
        super().__init__(config)
        self.input_proj = nn.Linear(config.latent_dim, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, config.latent_dim)

    def project(self, x: Tensor) -> Tensor:
        """[B, n, latent] to the same."""
        out = self(inputs_embeds=self.input_proj(x), use_cache=False)
        return self.output_proj(out.last_hidden_state)


def _block(width: int, rate: int) -> nn.Module:
    block = nn.Module()
    block.block = nn.ModuleList(
        [
            library.Qwen3OmniMoeSnakeBeta(width),
            TransposedConv(width, width // 2, 2 * rate, rate),
            *(
                library.Qwen3OmniMoeCode2WavDecoderResidualUnit(width // 2, dilation)
                for dilation in (1, 3, 9)
            ),
        ]
    )
    return block


class Qwen3TTSCodecDecoder(PreTrainedModel):
    config: Qwen3TTSCodecDecoderConfig
    config_class = Qwen3TTSCodecDecoderConfig
    base_model_prefix = ""
    input_modalities = ("audio",)
    _supports_sdpa = True

    def __init__(self, config: Qwen3TTSCodecDecoderConfig) -> None:
        super().__init__(config)
        latent, width = config.latent_dim, config.decoder_dim
        self.quantizer = SplitQuantizer(config)
        self.pre_conv = library.Qwen3OmniMoeCausalConvNet(config.codebook_dim, latent, 3)
        self.pre_transformer = Transformer._from_config(config)
        self.upsample = nn.ModuleList(
            nn.ModuleList(
                [TransposedConv(latent, latent, factor, factor), library.Qwen3OmniMoeConvNeXtBlock(latent)]
            )
            for factor in config.upsampling_ratios
        )
        blocks = [_block(width // 2**i, rate) for i, rate in enumerate(config.upsample_rates)]
        last = width // 2 ** len(blocks)
        self.decoder = nn.ModuleList(
            [
                library.Qwen3OmniMoeCausalConvNet(latent, width, 7),
                *blocks,
                library.Qwen3OmniMoeSnakeBeta(last),
                library.Qwen3OmniMoeCausalConvNet(last, 1, 7),
            ]
        )
        self.samples_per_frame = math.prod([*config.upsample_rates, *config.upsampling_ratios])
        self.post_init()

    def states(self, quantized: Tensor) -> Tensor:
        """[B, codebook_dim, n] to the transformer's output [B, n, latent]."""
        return self.pre_transformer.project(self.pre_conv(quantized).transpose(1, 2))

    def wave(self, codes: Tensor) -> Tensor:
        """Codes [B, K, n] to a wave [B, 1, n * samples_per_frame] that is not clamped."""
        x = self.states(self.quantizer.decode(codes)).transpose(1, 2)
        for upsample, convnext in self.upsample:
            x = convnext(upsample(x))
        first, *blocks, snake, last = self.decoder
        x = first(x)
        for block in blocks:
            for layer in block.block:
                x = layer(x)
        return last(snake(x))

    def forward(self, codes: Tensor) -> Tensor:
        return self.wave(codes).clamp(-1, 1)

    def chunked_decode(self, codes: Tensor, chunk_size: int = 300, left_context_size: int = 25) -> Tensor:
        """`forward` by chunks of frames, each with some frames before it: the memory of one chunk."""
        waves = []
        for start in range(0, codes.shape[-1], chunk_size):
            context = min(start, left_context_size)
            wave = self(codes[..., start - context : start + chunk_size])
            waves.append(wave[..., context * self.samples_per_frame :])
        return torch.cat(waves, -1)


@strict
class Qwen3TTSCodecConfig(PreTrainedConfig):
    """Of the published directory `speech_tokenizer/`."""

    model_type = "qwen3_tts_tokenizer_12hz"
    sub_configs_defaults = {"encoder_config": MimiConfig, "decoder_config": Qwen3TTSCodecDecoderConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    encoder_valid_num_quantizers: int = 16
    input_sample_rate: int = 24000
    output_sample_rate: int = 24000
    encode_downsample_rate: int = 1920
    decode_upsample_rate: int = 1920

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.encoder_config.decoder_config = None


class Qwen3TTSCodec(PreTrainedModel):
    """Waves of 24 kHz to codes, and back."""

    config: Qwen3TTSCodecConfig
    config_class = Qwen3TTSCodecConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: Qwen3TTSCodecConfig) -> None:
        super().__init__(config)
        self.encoder = MimiModel._from_config(config.encoder_config)
        self.decoder = Qwen3TTSCodecDecoder._from_config(config.decoder_config)
        self.post_init()

    @torch.no_grad()
    def encode(self, waves: list[Tensor]) -> list[Tensor]:
        """Codes [n, K] of each wave [N] in -1..1, n = N / encode_downsample_rate, rounded up."""
        rate, count = self.config.encode_downsample_rate, self.config.encoder_valid_num_quantizers
        found = []
        for wave in waves:
            codes = self.encoder.encode(wave[None, None].to(self.dtype), num_quantizers=count).audio_codes
            found.append(codes[0, :count, : -(-len(wave) // rate)].T)
        return found

    @torch.no_grad()
    def decode(self, codes: list[Tensor]) -> list[Tensor]:
        """Waves [n * decode_upsample_rate] of codes [n, K] each."""
        return [self.decoder.chunked_decode(rows.T[None])[0, 0] for rows in codes]


def build(values: dict[str, Any], **keywords: Any) -> Qwen3TTSCodecDecoder:
    """A model with random weights of the values of a `config.json`."""
    return Qwen3TTSCodecDecoder._from_config(Qwen3TTSCodecDecoderConfig(**values), **keywords)
