"""Own nets of speech and of pictures as tokens, beyond the published numbers (tests/golden): files, generation."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.models.nets import bagel, cosyvoice3, ldm_autoencoder, lumina_mgpt2, qwen3_tts, qwen3_tts_codec
from polymodal.models.nets.cosyvoice3_flow import CosyVoice3Flow
from polymodal.models.nets.cosyvoice3_vocoder import CosyVoice3Vocoder
from polymodal.models.nets.cosyvoice3_vocoder import from_published as published_vocoder
from polymodal.models.nets.log_mel import COSYVOICE3, SPEAKER, log_mel
from polymodal.models.nets.videoalign import VideoAlignRewardModel

FILES = Path(__file__).parents[1] / "golden" / "files"


def config(name):
    return json.loads(gzip.decompress((FILES / f"{name}.json.gz").read_bytes()))["config"]


def tiny_tts(**others):
    torch.manual_seed(0)
    values = config("qwen3_tts_b")
    values["talker_config"] |= others
    return qwen3_tts.build(values).eval()


@pytest.mark.parametrize(
    "make",
    [
        tiny_tts,
        lambda: cosyvoice3.build(config("cosyvoice3_llm_b")),
        lambda: CosyVoice3Flow(**config("cosyvoice3_flow_b")),
        lambda: CosyVoice3Vocoder(**config("cosyvoice3_hift_b")),
        lambda: bagel.build(config("bagel_b")),
        lambda: lumina_mgpt2.build(config("lumina_mgpt2")),
    ],
    ids=["qwen3_tts", "cosyvoice3", "flow", "vocoder", "bagel", "lumina_mgpt2"],
)
def test_what_is_saved_is_loaded(tmp_path: Path, make):
    model = make()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_generated_codes_are_the_most_likely_of_a_training_row():
    """The labels of training are those of generation: its greedy codes have the largest logits there."""
    model = tiny_tts()
    text = torch.tensor([50, 7, 8, 1, 11, 35])
    model.talker.codec_head.weight.data[22] = 0  # does not end
    vector = torch.randn(24)
    codes, states = model.generate(text, vector, max_frames=4)
    row = qwen3_tts.training_row(model.config, text.tolist(), codes)
    with torch.no_grad():
        out = model(**{name: value[None] for name, value in row.items()}, speaker=vector[None])
    places = (row["codes"][1:, 0] >= 0).nonzero()[:, 0]
    assert torch.allclose(out.hidden[0, places], states, atol=1e-5)
    allowed = [*range(20), 22]  # codes and the end
    assert torch.equal(torch.tensor(allowed)[out.logits[0, places][:, allowed].argmax(-1)], codes[:, 0])
    assert torch.equal(out.code_logits.argmax(-1), codes[:, 1:])


def test_a_narrower_code_predictor_projects_its_rows():
    values = config("qwen3_tts_b")
    values["talker_config"]["code_predictor_config"]["hidden_size"] = 16
    values["tts_model_type"] = "custom_voice"
    names = qwen3_tts.build(values).state_dict()
    assert names["talker.code_predictor.small_to_mtp_projection.weight"].shape == (16, 24)
    assert not any(name.startswith("speaker_encoder") for name in names)


def test_an_unknown_speaker_is_refused():
    with pytest.raises(PolymodalError, match="speaker 'bob'"):
        tiny_tts().generate(torch.arange(5), "bob")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_loss_is_the_divergence(smoothing):
    logits, wanted = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 3, 8, 2, 2])
    target = torch.full_like(logits, smoothing / 8).scatter(1, wanted[:, None], 1 - smoothing)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    found = cosyvoice3.smoothed_divergence(logits, wanted, smoothing)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_speech_tokens_end_within_their_bounds():
    model = cosyvoice3.build(config("cosyvoice3_llm_b")).eval()
    tokens = model.generate([1, 2, 3], generator=torch.Generator().manual_seed(0))
    assert 6 <= len(tokens) <= 60
    assert max(tokens) < model.config.speech_token_size


def test_a_vocoder_is_read_from_a_training_checkpoint(tmp_path: Path):
    values = config("cosyvoice3_hift_b")
    model = CosyVoice3Vocoder(**values)
    state = {f"generator.{name}": value for name, value in model.state_dict().items()}
    torch.save(state | {"mpd.weight": torch.zeros(1), "step": 3}, tmp_path / "hift.pt")
    again = published_vocoder(tmp_path / "hift.pt", **values)
    mel = torch.randn(1, 8, 8)
    noises = {"rand_ini": torch.rand(1, 9), "noise_waves": torch.rand(1, 384, 9)}
    assert torch.equal(model(mel, **noises)[0], again(mel, **noises)[0])
    (tmp_path / "hift.pt").write_bytes(b"no")
    with pytest.raises(PolymodalError, match="no readable file of tensors"):
        published_vocoder(tmp_path / "hift.pt", **values)


def test_who_sees_whom():
    mask = bagel.sample_mask([("full", 2), ("causal", 2), ("noise", 2), ("causal", 1)])
    rows = ["".join("01"[int(seen)] for seen in row) for row in mask.tolist()]
    assert rows == ["1100000", "1100000", "1110000", "1111000", "1111110", "1111110", "1111001"]


def test_text_alone_leaves_the_drawing_weights_without_gradient():
    model = bagel.build(config("bagel_b"))
    ids = torch.arange(6)
    out = model(
        ids,
        ids,
        ids,
        [bagel.sample_mask([("causal", 6)])],
        ce_indexes=ids[2:5],
        labels=torch.tensor([1, 2, 3]),
    )
    out.loss.backward()
    drawing = [value for name, value in model.named_parameters() if "moe_gen" in name]
    assert drawing and all(value.grad is None for value in drawing)


def test_a_picture_by_caches_is_that_of_whole_forwards():
    torch.manual_seed(0)
    model = lumina_mgpt2.build(config("lumina_mgpt2") | {"vocab_size": 155032}).eval()
    codes = model.generate_picture([1, 5, 9], 64, 32, 151671, guidance=4.0, top_k=1)
    picture = lumina_mgpt2.picture_tokens(codes, 151671)
    with torch.no_grad():
        given = model(torch.tensor([[1, 5, 9, *picture]])).logits[0, 3:]
        alone = model(torch.tensor([picture])).logits[0]
    logits = (alone + 4 * (given - alone))[:-1, lumina_mgpt2.FIRST_CODE :]
    places = torch.tensor(picture[1:]) >= lumina_mgpt2.FIRST_CODE
    assert torch.equal(logits[places].argmax(-1), codes.flatten())


def test_published_names_of_an_autoencoder_go_both_ways():
    model = ldm_autoencoder.autoencoder_kl(config("bagel_autoencoder_b"))
    other = ldm_autoencoder.autoencoder_kl(config("bagel_autoencoder_b"))
    names = ldm_autoencoder.published_names(model)
    state = {names[name]: value for name, value in model.state_dict().items()}
    state = {
        key: v[..., None, None] if ".attn_1.q" in key and v.dim() == 2 else v for key, v in state.items()
    }
    ldm_autoencoder.load_published(other, state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        ldm_autoencoder.load_published(other, {k: v for k, v in state.items() if k != "decoder.conv_in.bias"})


def test_a_reward_model_reads_and_writes_the_published_names(tmp_path: Path):
    document = json.loads(gzip.decompress((FILES / "videoalign_reward_b.json.gz").read_bytes()))
    from safetensors.torch import load_file, save_file

    state = {name: torch.randn(shape) for name, shape in document["state_dict"].items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(document["config"] | {"model_type": "qwen2_vl"}))
    model, found = VideoAlignRewardModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_a_codec_reads_and_writes_the_published_names(tmp_path: Path):
    """Its encoder has the names of a published Mimi, its decoder those of the golden file."""
    from safetensors.torch import load_file

    encoder = {
        "hidden_size": 16,
        "num_filters": 4,
        "upsampling_ratios": [3, 2, 2],
        "frame_rate": 1000.0,
        "codebook_size": 8,
        "codebook_dim": 6,
        "vector_quantization_hidden_dimension": 6,
        "num_quantizers": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "head_dim": 8,
        "sliding_window": 4,
        "upsample_groups": 16,
    }
    decoder = json.loads(gzip.decompress((FILES / "qwen3_tts_codec_decoder_b.json.gz").read_bytes()))
    values = qwen3_tts_codec.Qwen3TTSCodecConfig(
        encoder_config=encoder,
        decoder_config=decoder["config"],
        encoder_valid_num_quantizers=3,
        encode_downsample_rate=24,
        decode_upsample_rate=24,
    )
    codec = qwen3_tts_codec.Qwen3TTSCodec._from_config(values).eval()
    codec.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    parts = {name.removeprefix("encoder.").split(".")[0] for name in names if name.startswith("encoder.")}
    assert parts == {"encoder", "encoder_transformer", "downsample", "quantizer"}
    assert "encoder.encoder.layers.0.conv.weight" in names
    assert {n.removeprefix("decoder.") for n in names if n.startswith("decoder.")} == decoder[
        "state_dict"
    ].keys()
    again, found = qwen3_tts_codec.Qwen3TTSCodec.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    wave = torch.rand(240) - 0.5
    codes = codec.encode([wave, wave[:100]])
    assert [rows.shape for rows in codes] == [(10, 3), (5, 3)]
    assert torch.equal(again.encode([wave])[0], codes[0])
    assert again.decode(codes)[1].shape == (120,)


@pytest.mark.parametrize("form", [SPEAKER, COSYVOICE3])
def test_log_mel_is_the_librarys(form):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    wave = 0.5 * torch.sin(torch.arange(9600) * 0.1) + 0.1 * torch.randn(9600)
    border = (form.window - form.hop) // 2
    padded = torch.nn.functional.pad(wave[None], (border, border), mode="reflect")[0]
    expected = spectrogram(
        padded.double().numpy(),
        window_function(form.window, "hann"),
        form.window,
        form.hop,
        power=1.0,
        center=False,
        mel_filters=mel_filter_bank(
            form.window // 2 + 1, form.bins, 0.0, form.highest, form.rate, norm="slaney", mel_scale="slaney"
        ),
        mel_floor=1e-5,
        log_mel="log",
    )
    assert torch.allclose(log_mel(wave, form), torch.from_numpy(expected).float().T, atol=1e-3)
    assert log_mel(torch.stack([wave, wave]), form)[1].equal(log_mel(wave, form))
