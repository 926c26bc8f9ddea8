"""Open-Sora 1.2: the published configs as they lie, frames that are given, the null caption."""

import json

import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.sample import Batch
from polymodal.models import catalog, pipelines
from polymodal.models.storage import Files
from polymodal.objectives.diffusion import DiffusionObjective
from tests.models import tiny_pipelines

PUBLISHED = {
    "vae": {
        "model_type": "VideoAutoencoderPipeline", "shift": [-0.1, 0.34, 0.27, 0.98], "scale": [3.85, 2.32, 2.33, 3.06],
        "vae_2d": {"type": "VideoAutoencoderKL"}, "vae_temporal": {"type": "VAE_Temporal_SD"},
    },
    "transformer": {"model_type": "STDiT3", "architectures": ["STDiT3"], "input_size": [None, None, None], "enable_flash_attn": True},
}  # fmt: skip
"""Keys of the published configs that our classes do not have."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tiny_pipelines.pipeline("open-sora-1.2", tmp_path_factory.mktemp("open-sora") / "p")
    for part, more in PUBLISHED.items():
        path = directory / part / "config.json"
        config = {
            k: v for k, v in json.loads(path.read_text()).items() if not k.startswith(("_", "latent_s"))
        }
        path.write_text(json.dumps(config | more))
    return directory


@pytest.fixture(scope="module")
def opened(source):
    family = catalog.family(recipes.Model(source=str(source)))
    with pipelines.quiet():
        pipe = pipelines.open_pipeline(source)
    torch.manual_seed(1)
    for parameter in pipe.transformer.parameters():  # blocks over frames start as the identity
        parameter += 0.1 * torch.randn_like(parameter)
    return family, pipe


def test_a_first_frame_is_kept_and_moves_the_others(opened):
    family, pipe = opened
    asked = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}

    def sampled(**more):
        return pipe(["a red square"], generator=torch.Generator().manual_seed(1), **asked, **more).frames

    shown = Image.new("RGB", (32, 32), (200, 30, 30))
    pixels = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 32) / 127.5 - 1
    with torch.no_grad():
        wanted = family.encode_media(pipe, pixels.float())["latents"]
    made, plain = sampled(image=shown), sampled()
    torch.testing.assert_close(made[:, :, :1], wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(made[:, :, 1:], plain[:, :, 1:], atol=1e-3)


def test_a_given_frame_has_timestep_zero_no_noise_and_no_loss(opened):
    family, pipe = opened
    torch.manual_seed(0)
    tensors = {
        "latents": torch.rand(2, 4, 3, 8, 8),
        "weight": torch.ones(2),
        "fps": torch.tensor([24.0, 24.0]),
    }
    with torch.no_grad():
        tensors |= family.encode_text(pipe, ["a red square", "blue"])
    axes = {name: ("batch", *["none"] * (t.ndim - 1)) for name, t in tensors.items()}
    groups = {"seeds": (1, 2), "tokens": (48, 48), "shape": (9, 32, 32), "kind": "video"}
    objective = DiffusionObjective(family.process(), recipes.Diffusion(first_frame=1.0))
    (batch,) = objective.prepare(None, [Batch(tensors, axes, (0, 1), groups=groups)])
    assert torch.equal(batch["noisy"][:, :, 0], tensors["latents"][:, :, 0])
    seen = family.inputs(pipe.transformer, batch["noisy"], batch)["frame_mask"]
    assert seen.tolist() == [[False, True, True]] * 2
    with torch.no_grad():
        one = family.whole(pipe.transformer, batch)
        other = family.whole(pipe.transformer, Batch({**batch.tensors, "clean": batch["clean"] * 0}, {}))
    assert one.hidden_states.shape == batch["noisy"].shape
    assert not torch.allclose(one.hidden_states[:, :, 0], other.hidden_states[:, :, 0], atol=1e-4)
    before = objective.loss(one, batch, {"diffusion": 0.5})[0]
    one.hidden_states[:, :, 0] += 100
    assert torch.equal(before, objective.loss(one, batch, {"diffusion": 0.5})[0])


def test_a_dropped_caption_is_the_null_caption_of_the_file_under_its_own_mask(opened, source):
    family, pipe = opened
    null = Files(source / "transformer").whole("y_embedder.y_embedding")
    with torch.no_grad():
        empty, text = (family.encode_text(pipe, [caption]) for caption in ("", "a red square"))
    assert torch.equal(empty["encoder_hidden_states"][0], null)
    tensors = {
        "latents": torch.rand(1, 4, 3, 8, 8),
        "weight": torch.ones(1),
        "fps": torch.tensor([24.0]),
        **text,
    }
    axes = {name: ("batch", *["none"] * (t.ndim - 1)) for name, t in tensors.items()}
    groups = {"seeds": (1,), "tokens": (48,), "shape": (9, 32, 32), "kind": "video"}
    objective = DiffusionObjective(family.process(), recipes.Diffusion(drop=1 - 1e-6))
    objective.kept, objective.unconditional = family.kept, empty
    (batch,) = objective.prepare(None, [Batch(tensors, axes, (0,), groups=groups)])
    assert torch.equal(batch["encoder_hidden_states"][0], null)
    assert torch.equal(batch["encoder_attention_mask"], text["encoder_attention_mask"])
    assert not torch.equal(text["encoder_attention_mask"], empty["encoder_attention_mask"])
