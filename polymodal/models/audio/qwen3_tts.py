"""Qwen3-TTS 12 Hz: text and a voice -> frames of sixteen codes, twelve and a half a second.

The nets are nets/qwen3_tts.py (talker and code predictor) and nets/qwen3_tts_codec.py (codes to sound, and
back). Two channels are added at each place of the talker's input: text, and the codec's ids. The speaker
encoder is frozen, as where it was published; the codec is a part of the checkpoint's directory that training
does not load.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import AXES, IGNORE, Batch, SampleLengths
from polymodal.core.tensors import to_device
from polymodal.distributed import attention
from polymodal.models import library
from polymodal.models.audio.qwen3_tts_voice import SPEAKER_MEL, Qwen3TTSVoice
from polymodal.models.card import ModelCard, Output, Size
from polymodal.models.family import Family
from polymodal.models.nets import qwen3_tts
from polymodal.models.understanding import language
from polymodal.models.understanding.media import readable

LAYERS, PREDICTOR = "talker.model.layers.*", "talker.code_predictor.model.layers.*"
NO_SOURCE = ("dtype", "architectures", "transformers_version")


class Qwen3TTS(Family):
    """Packed samples: `input_ids` are those of the text channel, `codes` [1, T, 16] the codec's: in column 0
    its id (code 0 at frames, nets.qwen3_tts.SPEAKER, NONE), in the others codes 1..15 at frames."""

    layout = "speech_codes"
    line = "qwen3-tts"
    frozen = ("speaker",)
    auto = "AutoModelForTextToWaveform"
    beside_files = ("speech_tokenizer/*",)
    position_rows = 1
    codes_weight = 0.3  # of the code predictor's loss, as published

    @property
    def talker(self) -> Any:
        """Its config."""
        return self.config.talker_config

    @property
    def decoders(self) -> tuple[tuple[Any, int], ...]:  # type: ignore[override]
        return ((self.talker.code_predictor_config, self.talker.num_code_groups),)

    # -- files, as published

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        """config.json as the source has it, with the values that differ from the source's."""
        raw = read_json(origin / "config.json")
        _update(raw, cls.read_config(origin).to_dict(), config.to_dict())
        raw["architectures"] = config.architectures
        if config.dtype is not None:
            raw["dtype" if "dtype" in raw else "torch_dtype"] = str(config.dtype).removeprefix("torch.")
        text = json.dumps(raw, indent=2, ensure_ascii=False)
        (directory / "config.json").write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True)

    @classmethod
    def read_codec(cls, directory: Path) -> Any:
        """The codec (nets/qwen3_tts_codec.py) beside a checkpoint, in float32. Raises PolymodalError."""
        from polymodal.models.nets.qwen3_tts_codec import Qwen3TTSCodec

        path = directory / "speech_tokenizer"
        if not (path / "config.json").is_file():
            raise PolymodalError(
                f"{directory} has no codec: {path.name}/config.json is missing.",
                f"Copy {path.name}/ from the published checkpoint: Qwen/Qwen3-TTS-Tokenizer-12Hz has it too.",
            )

        def read() -> Any:
            options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
            with library.quietly():
                codec, info = Qwen3TTSCodec.from_pretrained(path, **options)
            if info["missing_keys"]:
                raise ValueError(f"{len(info['missing_keys'])} tensors are missing")
            return codec.eval()

        return readable(str(path), "codec", read)

    def check(self) -> None:
        """Raise PolymodalError for a config that cannot be run."""
        if self.talker.num_code_groups != self.talker.code_predictor_config.num_code_groups:
            raise PolymodalError(
                "config.json: talker_config and its code_predictor_config have other num_code_groups.",
                "Copy config.json again from the checkpoint's origin.",
            )

    # -- building and running

    def build(self) -> nn.Module:
        """The net on meta in float32: packed attention in the talker, torch's own over the codes of a
        frame."""
        with torch.device("meta"):
            model = qwen3_tts.Qwen3TTSForConditionalGeneration._from_config(
                copy.deepcopy(self.config), dtype=torch.float32, attn_implementation="sdpa"
            )
        attention.use(model, self.attention)
        attention.use(model.talker.code_predictor, self.attention, padded=True)
        return model.train()

    def media_processor(self, data: Any) -> Qwen3TTSVoice:  # type: ignore[override]
        return Qwen3TTSVoice(self.source, self.config)

    def stage(self, model: Any, carry: Any, batch: Batch) -> Output:
        """The whole model: the talker's hidden states [1, T, D] after its norm, its head, and the predictor
        in `extra` (objectives/speech_codes.py)."""
        talker = model.talker
        hidden = self._embed(model, batch)
        arguments: dict[str, Any] = {}
        if talker.model.config._attn_implementation == attention.NAME:
            attention.plan(batch.segments["text"], batch.host.get("text"))
            # of four dimensions: passed on unread, packed attention takes the lengths instead
            arguments["attention_mask"] = hidden.new_ones(1, 1, 1, 1, dtype=torch.bool)
            arguments["cu_seq_lens_q"] = batch.segments["text"]
        if batch.cut is not None:
            arguments["cut"] = batch.cut
        out = talker.model(
            inputs_embeds=hidden, position_ids=batch["position_ids"][0], use_cache=False, **arguments
        )
        predictor = talker.code_predictor

        def predict(states: Tensor, codes: Tensor) -> Tensor:
            return predictor.states(states, talker.model.codec_embedding(codes[:, 0]), codes[:, 1:-1])

        extra = {"predict": predict, "heads": list(predictor.lm_head)}
        return Output(out.last_hidden_state, talker.codec_head, extra)

    def _embed(self, model: Any, batch: Batch) -> Tensor:
        """The talker's input, of this rank's places [1, n, D]."""
        ids, codes, rows = batch["input_ids"], batch.get("codes"), batch.get("rows")
        on_host = batch.on_host("codes")
        if codes is None or on_host is None:  # padding alone
            codes = ids.new_full((*ids.shape, self.talker.num_code_groups), qwen3_tts.NONE)
            return model.embed(ids, codes[..., 0], codes, None)
        asked = on_host[0, :, 0] == qwen3_tts.SPEAKER
        numbers = asked.cumsum(0) - 1
        if rows is not None:
            held = batch.on_host("rows")
            codes, asked, numbers = codes.index_select(1, rows), asked[held], numbers[held]
        frames = torch.where(codes[..., 1:2] >= 0, codes, qwen3_tts.NONE)
        hidden = model.embed(ids, codes[..., 0], frames, None)
        places = asked.nonzero()[:, 0]
        if not len(places):
            return hidden
        vectors = self._voices(model, batch)[to_device(numbers[places], ids.device)]
        return hidden.index_add(1, to_device(places, ids.device), vectors[None].to(hidden.dtype))

    def _voices(self, model: Any, batch: Batch) -> Tensor:
        """Speaker vectors [M, D] of the batch's recordings. The encoder pads its convolutions by reflection
        and takes means over all frames, so that recordings of different lengths do not go together."""
        sizes = batch.on_host(SPEAKER_MEL.sizes)
        assert sizes is not None
        weight = next(model.speaker_encoder.parameters())
        mels = batch[SPEAKER_MEL.tensor].to(weight.dtype).split(sizes[:, 0].tolist())
        with torch.no_grad():
            return torch.cat([model.speaker_encoder(mel[None]) for mel in mels])

    # -- shapes and costs without data

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs of one sample, whose labels are its frames and one end."""
        talker, predictor = self.talker, self.talker.code_predictor_config
        frames, groups = max(0, measure.trained - 1), self.talker.num_code_groups
        layers, head = language.costs(talker, measure.tokens, measure.trained)
        each, _ = language.costs(predictor, groups, 0)
        wide = talker.text_hidden_size
        heads = 2.0 * frames * (groups - 1) * predictor.hidden_size * predictor.vocab_size
        return {
            "talker.text_projection": 2.0 * measure.tokens * wide * (wide + talker.hidden_size),
            LAYERS: layers,
            PREDICTOR: frames * each,
            "talker.code_predictor.lm_head": heads,
            self.card.head: head,
        }

    def example(self, measure: SampleLengths) -> Batch:
        """One sample whose last `trained` places have labels: frames, and the end."""
        tokens, frames = measure.tokens, max(0, measure.trained - 1)
        ids = torch.ones(1, tokens, dtype=torch.int64)
        codes = torch.full((1, tokens, self.talker.num_code_groups), qwen3_tts.NONE)
        codes[0, tokens - frames :] = 0
        trained = torch.arange(tokens)[None] >= tokens - measure.trained
        tensors = {
            "input_ids": ids,
            "labels": torch.where(trained, 0, IGNORE),
            "weights": trained.float(),
            "position_ids": torch.arange(tokens).expand(1, 1, -1).clone(),
            "codes": codes,
        }
        groups = {"modality": ("audio",), "media": {}, "broken": (False,)}
        segments = {"text": attention.cumulative([tokens])}
        return Batch(tensors, {name: AXES[name] for name in tensors}, (0,), segments, groups)


def _update(raw: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write what differs between two configs, as dictionaries, into one read from a file. In place."""
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and isinstance(raw.get(key), dict):
            _update(raw[key], old, value)
        elif key not in NO_SOURCE and value != old:
            raw[key] = value


def _decoder_plan(prefix: str) -> dict[str, str]:
    """Of Qwen3 blocks below `prefix`."""
    text = {**language.TEXT_PLAN, **language.DENSE_PLAN}
    named = {n: s for n, s in text.items() if n != "lm_head" and not n.endswith("embed_tokens")}
    return {name.replace("model.language_model", prefix): style for name, style in named.items()}


def _size(name: str, parameters: float, *, kind: str, devices: int) -> Size:
    """A published size."""
    large = name.startswith("1.7b")
    width = 2048 if large else 1024
    rope = {"rope_theta": 1000000.0}
    blocks = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
    predictor = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5, **blocks, **rope}
    talker = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 28,
        **blocks,
        **rope,
        "code_predictor_config": {"vocab_size": 2048, "num_code_groups": 16, **predictor},
    }
    config = {
        "model_type": "qwen3_tts",
        "tts_model_type": kind,
        "talker_config": talker,
        "speaker_encoder_config": {"enc_dim": width},
    }
    suffix = {"base": "Base", "custom_voice": "CustomVoice"}[kind]
    hub = f"Qwen/Qwen3-TTS-12Hz-{'1.7B' if large else '0.6B'}-{suffix}"
    return Size(hub, parameters, 28, devices=devices, config=config)


CARD = ModelCard(
    name="qwen3-tts",
    title="Qwen3-TTS",
    family=Qwen3TTS,
    architectures=("Qwen3TTSForConditionalGeneration", "qwen3_tts"),
    tasks=("text-to-speech",),
    blocks=(LAYERS, PREDICTOR),
    towers={
        "talker": ("talker.model", "talker.text_projection", "talker.codec_head"),
        "code_predictor": ("talker.code_predictor",),
        "speaker": ("speaker_encoder",),
    },
    sequence_entry="talker.model",
    sequence_exit="talker.model",
    # tables of text and codes, and the predictor's heads, are whole on every rank
    tensor_plan={
        **_decoder_plan("talker.model"),
        "talker.codec_head": "head",
        **_decoder_plan("talker.code_predictor.model"),
    },
    head="talker.codec_head",
    limits={
        "pp": "its codes' tables are read at both ends of the talker, by the input and by the code "
        "predictor. Use dp_shard, tp or cp.",
        "ep": "it has no experts.",
    },
    sizes={
        "0.6b-base": _size("0.6b-base", 0.915, kind="base", devices=1),
        "1.7b-base": _size("1.7b-base", 1.929, kind="base", devices=2),
        "0.6b-custom": _size("0.6b-custom", 0.906, kind="custom_voice", devices=1),
        "1.7b-custom": _size("1.7b-custom", 1.917, kind="custom_voice", devices=2),
    },
    keywords=(
        "text to speech",
        "tts",
        "speech synthesis",
        "voice cloning",
        "clone a voice",
        "speak",
        "voice",
    ),
    aliases=("qwen3tts",),
    kind="audio",
    verified="published numbers on a small config; tiny models: loss and gradients equal the net's, keys "
    "load and save, packed equals separate",
)
