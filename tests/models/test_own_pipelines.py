"""Open-Sora 2.0, Step-Video and Open-Sora Plan 1.5: frames that are given, tokens, configs that the cards ship."""

import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.models import catalog, pipelines
from polymodal.models.nets.autoencoder_step_video import AutoencoderStepVideo
from polymodal.models.nets.pipeline_open_sora_2 import guidance_at, packed, unpacked
from polymodal.models.nets.step_llm import StepTokenizer
from polymodal.objectives.diffusion import DiffusionObjective
from tests.models import tiny_pipelines


def opened(name, directory):
    source = tiny_pipelines.pipeline(name, directory)
    family = catalog.family(recipes.Model(source=str(source)))
    with pipelines.quiet():
        pipe = pipelines.open_pipeline(source)
    torch.manual_seed(1)
    for parameter in pipe.transformer.parameters():  # the input for a frame starts at zero
        parameter += 0.1 * torch.randn_like(parameter)
    return family, pipe


@pytest.mark.parametrize("name", ["open-sora-2", "step-video-i2v"])
def test_a_first_frame_moves_the_sample(name, tmp_path):
    family, pipe = opened(name, tmp_path)
    asked = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}

    def sampled(colour):
        shown = Image.new("RGB", (32, 32), colour)
        draw = torch.Generator().manual_seed(1)
        return pipe(["a red square"], image=shown, generator=draw, **asked).frames

    made, other = sampled((200, 30, 30)), sampled((30, 30, 200))
    assert not torch.equal(made[:, :, 1:], other[:, :, 1:])
    if name == "open-sora-2":  # which puts it back
        pixels = torch.tensor([200, 30, 30]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 32, 32) / 127.5 - 1
        with torch.no_grad():
            wanted = family.encode_media(pipe, pixels.float())["latents"]
        torch.testing.assert_close(made[:, :, :1], wanted, rtol=1e-3, atol=1e-3)


def test_open_sora_2_sees_the_frame_of_the_samples_that_have_it(tmp_path):
    """Latents all have noise and loss; without a share, and for pictures, nothing is shown."""
    family, pipe = opened("open-sora-2", tmp_path)
    torch.manual_seed(0)
    tensors = {"latents": torch.rand(2, 4, 3, 4, 4), "first_frame": torch.rand(2, 4, 1, 4, 4), "weight": torch.ones(2)}  # fmt: skip
    with torch.no_grad():
        tensors |= family.encode_text(pipe, ["a red square", "blue"])
    axes = {name: ("batch", *["none"] * (t.ndim - 1)) for name, t in tensors.items()}
    groups = {"seeds": (1, 2), "tokens": (12, 12), "shape": (9, 32, 32), "kind": "video"}

    def shown(share):
        objective = DiffusionObjective(family.process(), recipes.Diffusion(first_frame=share))
        (batch,) = objective.prepare(None, [Batch(tensors, axes, (0, 1), groups=groups)])
        assert "clean" not in batch.tensors
        condition = family.inputs(pipe.transformer, batch["noisy"], batch)["condition"]
        return unpacked(condition, 3, 4, 4), batch

    every, batch = shown(1.0)
    assert torch.equal(every[:, 1:, :1], tensors["first_frame"]) and not every[:, :, 1:].any()
    assert bool((every[:, 0, 0] == 1).all())
    assert not torch.equal(batch["noisy"][:, :, 0], tensors["latents"][:, :, 0])
    none, _ = shown(0.0)
    assert not none.any()
    with pytest.raises(PolymodalError, match="first_frame"):
        step = catalog.cards()["step-video"]
        DiffusionObjective(
            step.family(step, {"patch_size": 1}, "nowhere").process(), recipes.Diffusion(first_frame=0.5)
        )


def test_cells_are_packed_in_the_published_order():
    """b c t (h 2) (w 2) -> b (t h w) (c 2 2)."""
    latents = torch.arange(2 * 3 * 2 * 4 * 6.0).view(2, 3, 2, 4, 6)
    tokens = packed(latents)
    assert tokens.shape == (2, 12, 12)
    place = tokens[1, 1 * 6 + 1 * 3 + 2].view(3, 2, 2)  # frame 1, row 1, column 2
    assert torch.equal(place, latents[1, :, 1, 2:4, 4:6])
    assert torch.equal(unpacked(tokens, 2, 4, 6), latents)


def test_guidance_rests_at_odd_steps_after_the_tenth():
    assert [guidance_at(7.5, step) for step in (0, 9, 10, 11, 12)] == [7.5, 7.5, 7.5, 1.0, 7.5]


def test_steps_tokens_are_bounded_and_padded_with_the_last(tmp_path):
    tokenizer = StepTokenizer(tiny_pipelines.pieces())
    tokenizer.save_pretrained(tmp_path)
    again = StepTokenizer.from_pretrained(tmp_path)
    asked = {"padding": "max_length", "truncation": True, "max_length": 9}
    made = again(["a red square moving left of the circle", "blue"], **asked)
    long, short = made["input_ids"]
    assert made == tokenizer(["a red square moving left of the circle", "blue"], **asked)
    assert long[0] == short[0] == 1 and long[-1] == 2 and len(long) == len(short) == 9
    end = sum(made["attention_mask"][1])
    assert short[end - 1 :] == [2] * (10 - end) and short[1 : end - 1] == again.pieces.encode("blue")


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (17, 3), (34, 6), (204, 36)])
def test_frames_of_step_video_are_counted_alike(frames, latents):
    with torch.device("meta"):
        vae = AutoencoderStepVideo()
    card = catalog.cards()["step-video"]
    grid = catalog.published(card, "t2v-30b").grid()
    assert vae.latent_frames(frames) == latents and grid.shape(frames, 544, 992) == (64, latents, 34, 62)
    assert grid.fits(frames) and not grid.fits(frames + 1)


SHIPPED = [(c.name, k) for c in catalog.cards().values() if c.kind == "generation" for k in c.sizes if c.sizes[k].config]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), SHIPPED)
def test_a_published_size_is_planned_without_its_files(name, key):
    card = catalog.cards()[name]
    family = catalog.published(card, key)
    family.check()
    frames = {**card.clip, **card.sizes[key].clip}["frames"][0]
    measure = SampleLengths(family.grid().tokens(frames, 64, 64), 0, shape=(frames, 64, 64))
    batch = family.example(measure)
    assert set(batch.tensors) == {"latents", "weight", *family.text, *family.media}
    assert family.size()[0] == card.sizes[key].layers and family.cost(measure) > 0


def test_cards_ship_the_configs_that_the_documents_name():
    assert {name for name, _ in SHIPPED} >= {"open-sora-2", "step-video", "open-sora-plan-1.5"}
