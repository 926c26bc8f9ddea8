"""LTX-2's sound: the spectrogram against another library's way of making it, latents of the pipeline's length."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from polymodal.core.errors import PolymodalError
from polymodal.models import catalog, pipelines
from polymodal.models.generation import ltx2
from polymodal.recipe import Model
from tests.models import clips, tiny_pipelines
from tests.models.test_generation_sampling import compare, moved, named, spied_on


def test_the_spectrogram_is_that_of_transformers():
    sound = torch.from_numpy(clips.tone(0.5))[None] + 0.1 * torch.randn(
        1, 2, 8000, generator=torch.Generator().manual_seed(0)
    )
    ours = ltx2.spectrogram(sound, 16000, 160, 64)
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    for channel in range(2):
        theirs = spectrogram(
            sound[0, channel].numpy(), window_function(1024, "hann"), 1024, 160, power=1.0, center=True, pad_mode="reflect",
            mel_filters=filters, mel_floor=1e-5, log_mel="log",
        )  # fmt: skip
        assert ours.shape == (1, 2, 51, 64)
        assert np.abs(ours[0, channel].numpy().T - theirs).max() < 1e-3


@pytest.mark.parametrize(("frames", "rate"), [(9, 24.0), (17, 16.0), (33, 24.0)])
def test_sound_becomes_as_many_latents_as_the_pipeline_samples(tmp_path, frames, rate):
    source = tiny_pipelines.pipeline("ltx2", tmp_path / "pipeline")
    family, pipe = catalog.family(Model(source=str(source))), pipelines.open_pipeline(source)
    sound = torch.from_numpy(clips.tone(frames / rate))[None]
    with torch.no_grad():
        made = family.encode_media(
            pipe, torch.zeros(1, 3, frames, 32, 32), sound=sound, rate=torch.tensor([rate])
        )
    assert made["audio_latents"].shape == (1, round(frames / rate * 25), 8)
    pipe.audio_vae.latents_mean.fill_(1.0)
    pipe.audio_vae.latents_std.fill_(2.0)
    with torch.no_grad():
        other = family.encode_media(
            pipe, torch.zeros(1, 3, frames, 32, 32), sound=sound, rate=torch.tensor([rate])
        )
    assert torch.allclose(other["audio_latents"], (made["audio_latents"] - 1) / 2, atol=1e-5)


def test_latents_come_back_as_the_pixels_that_the_vae_makes_of_them(tmp_path):
    source = tiny_pipelines.pipeline("ltx2", tmp_path / "pipeline")
    family = catalog.family(Model(source=str(source)))
    pipe = pipelines.open_pipeline(source, without=("transformer",))
    pipe.vae.latents_mean.uniform_(-1, 1)
    pipe.vae.latents_std.uniform_(0.5, 2)
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = family.encode_media(pipe, pixels)["latents"]
        back = family.decode(pipe, latents)
        direct = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode(), None, return_dict=False)[0]
    assert latents.shape == (1, *family.grid().shape(5, 32, 32)) and torch.allclose(back, direct, atol=1e-4)


def test_a_given_first_frame_is_shown_to_the_denoiser_as_the_pipeline_shows_it(tmp_path):
    """Image to video: the frame's latents without noise, timestep 0 for its tokens, all other arguments alike."""
    from PIL import Image

    from polymodal.core.sample import Batch
    from polymodal.generate.pipeline import open_generator

    generator = open_generator(tiny_pipelines.pipeline("ltx2", tmp_path / "pipeline"))
    family, pipe, model = generator.family, generator.pipeline, generator.pipeline.transformer
    shown = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    seen = spied_on(family, model, lambda noisy, t: torch.zeros_like(noisy))
    asked = {
        "prompt": ["a red circle"],
        "image": Image.fromarray(shown),
        "guidance_scale": 1.0,
        "height": 32,
        "width": 64,
    }
    asked |= {
        "num_frames": 9,
        "num_inference_steps": 2,
        "output_type": "latent",
        "image_crf": 0,
    }  # not compressed before
    generator.pipeline_for({"image"})(**family.tune(pipe, asked))
    del model.forward
    theirs = named(model, *seen[0])
    with torch.no_grad():
        first = family.encode_media(pipe, moved(shown[None]))["latents"]
        text = family.encode_text(pipe, ["a red circle"])
    cells = family.grid().shape(9, 32, 64)
    packed = theirs["hidden_states"]
    noisy = type(pipe)._unpack_latents(packed, *cells[1:], 1, 1)
    torch.testing.assert_close(noisy[:, :, :1], first, atol=1e-5, rtol=1e-4)
    clean = torch.zeros(1, 1, *cells[1:])
    clean[:, :, 0] = 1
    tensors = {"noisy": noisy, "clean": clean, "timestep": theirs["audio_timestep"].reshape(-1).float()}
    tensors |= {"audio_noisy": theirs["audio_hidden_states"], "frame_rate": torch.tensor([24.0])}
    seen = spied_on(family, model, lambda noisy, t: torch.zeros_like(noisy))
    family.forward = lambda model: model.forward
    family.whole(model, Batch({**text, **tensors}, {}))
    ours = named(model, *seen[0])
    for key in (ours.keys() | theirs.keys()) - {"self", "return_dict", "attention_kwargs"}:
        compare(key, ours.get(key), theirs.get(key))


def test_a_directory_of_a_pipelines_name_is_not_taken_for_its_module(tmp_path, monkeypatch):
    (tmp_path / "ltx2").mkdir()  # where one keeps the checkpoint, beside which commands are started
    monkeypatch.syspath_prepend(tmp_path)
    assert pipelines._class("ltx2", "LTX2TextConnectors").__name__ == "LTX2TextConnectors"
    assert pipelines._class("transformers", "T5EncoderModel").__name__ == "T5EncoderModel"
    with pytest.raises(PolymodalError, match="nowhere has no class X"):
        pipelines._class("nowhere", "X")
