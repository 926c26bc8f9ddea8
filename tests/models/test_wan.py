"""Wan: the card's patterns, sharded loading of a pipeline's denoiser, and its prediction and gradients against the library's."""

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models import catalog, pipelines, weights
from polymodal.parallel.apply import matching
from polymodal.recipe import Model
from polymodal.train import optim
from tests.bounds import assert_near
from tests.models import tiny_pipelines

WANS = ("wan", "wan-i2v", "wan-flf2v")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            found[name] = tiny_pipelines.pipeline(name, tmp_path_factory.mktemp(name) / "pipeline")
        return found[name]

    return get


def opened(made, name):
    family = catalog.family(Model(source=str(made(name))))
    model = family.build()
    assert all(p.is_meta for p in model.parameters())
    report = weights.load(model, family)
    assert report.bytes_held == sum(p.nbytes for p in model.parameters()) and not report.drawn
    return family, model


@pytest.mark.parametrize("name", WANS)
def test_a_pipeline_is_recognised_by_its_index_and_its_denoiser_loads_as_the_library_loads_it(made, name):
    from diffusers import WanTransformer3DModel

    family, model = opened(made, name)
    theirs = WanTransformer3DModel.from_pretrained(made(name) / "transformer")
    state = theirs.state_dict()
    assert family.card.name == "wan2.1" and state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    for (key, ours), (_, other) in zip(model.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(ours, other), key
    matching(model, family.card.blocks, "card")
    assert all(optim.tower_of(n, family.card.towers) for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", WANS)
def test_prediction_and_gradients_equal_the_librarys(made, name):
    from diffusers import WanTransformer3DModel

    family, model = opened(made, name)
    pipe = pipelines.open_pipeline(made(name), without=("transformer",))
    pixels = torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        text = family.encode_text(pipe, ["a red digit seven", "blue"])
        media = family.encode_media(pipe, pixels)
    assert set(text) == set(family.text) and set(media) == {"latents", *family.media}
    assert media["latents"].shape == (2, *family.grid().shape(5, 32, 48)) == (2, 4, 2, 4, 6)
    timestep = torch.tensor([700.0, 12.5])
    batch = Batch({**text, **media, "noisy": media["latents"], "timestep": timestep}, {})
    ours = family.stage(model, None, batch).hidden_states
    ours.square().sum().backward()
    theirs = WanTransformer3DModel.from_pretrained(made(name) / "transformer")
    arguments = {"encoder_hidden_states": text["encoder_hidden_states"]}
    latents = media["latents"]
    if family.conditioned:
        latents = torch.cat([latents, media["condition"]], dim=1)
        image = media["encoder_hidden_states_image"]
        arguments["encoder_hidden_states_image"] = image.reshape(-1, 257, 16)
    wanted = theirs(latents, timestep, **arguments).sample
    wanted.square().sum().backward()
    assert_near(ours, wanted)
    grads = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, grads[name].grad)


def test_image_conditions_are_those_that_the_pipeline_samples_with(made):
    """The library's own sampling, stopped at its first call of the denoiser, gives the same condition and image tokens."""
    family, _ = opened(made, "wan-i2v")
    pipe = pipelines.open_pipeline(made("wan-i2v"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)
        raise StopIteration

    pipe.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    with pytest.raises(StopIteration):
        pipe(
            picture,
            "a red circle",
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(1),
        )
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    clip = torch.cat([frame[None, :, None], torch.rand(1, 3, 4, 32, 48)], dim=2)
    with torch.no_grad():
        media = family.encode_media(pipe, clip)
        text = family.encode_text(pipe, ["a red circle"])
    assert torch.allclose(media["condition"], seen["hidden_states"][:1, 4:], atol=1e-4)
    assert torch.allclose(
        media["encoder_hidden_states_image"], seen["encoder_hidden_states_image"][:1], atol=1e-3
    )
    assert_near(text["encoder_hidden_states"], seen["encoder_hidden_states"][:1])


def test_latents_come_back_as_the_pixels_that_the_vae_makes_of_them(made):
    family, _ = opened(made, "wan")
    pipe = pipelines.open_pipeline(made("wan"), without=("transformer",))
    pixels = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = family.encode_media(pipe, pixels)["latents"]
        back = family.decode(pipe, latents)
        direct = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    assert torch.allclose(back, direct, atol=1e-4)


def test_captions_are_as_long_as_the_tokenizer_says(tmp_path):
    """Embeddings, and what the pipeline samples with; image tokens stand before 512 of text whatever it says."""
    pipe = tiny_pipelines.wan()
    pipe.tokenizer = tiny_pipelines.tokenizer(6)
    pipe.save_pretrained(tmp_path / "short")
    family = catalog.family(Model(source=str(tmp_path / "short")))
    (made,) = family.encode_text(pipe, ["a cat runs"]).values()
    assert made.shape == (1, 6, 16) and family.shapes((4, 1, 4, 4))["encoder_hidden_states"] == (6, 16)
    assert family.arguments({"prompt": ["a cat runs"]})["max_sequence_length"] == 6
    family.config["added_kv_proj_dim"] = 24
    assert family.max_length == 512


def test_missing_and_surplus_weights_are_errors(made, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(made("wan"), tmp_path / "copy")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    lost = state.pop(sorted(state)[3])
    save_file(state, file)
    with pytest.raises(PolymodalError, match="1 of .* parameters are not in the checkpoint"):
        pipelines.open_pipeline(copy)
    save_file(
        {**state, sorted(load_file(made("wan") / "vae" / file.name))[3]: lost, "extra": lost.clone()}, file
    )
    with pytest.raises(PolymodalError, match="have no place in the model: extra"):
        pipelines.open_pipeline(copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(PolymodalError, match="lacks vae/"):
        catalog.family(Model(source=str(copy)))
    with pytest.raises(PolymodalError, match="`num_layer` is not a key .*"):
        catalog.family(Model(source=str(made("wan")), config={"num_layer": 3}))


def test_a_model_from_nothing_is_drawn_by_name_and_ends_in_zeros(made):
    family = catalog.family(Model(source=str(made("wan")), init="random", config={"num_layers": 3}))
    first, second = family.build(), family.build()
    for model in (first, second):
        weights.initialise(model, family, 5)
    assert len(first.blocks) == 3
    state = second.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())
    assert (
        float(first.proj_out.weight.abs().max()) == 0 and float(first.blocks[2].attn1.to_q.weight.std()) > 0
    )
    assert float(first.blocks[0].attn1.norm_q.weight.min()) == 1
    assert 0.5 < float(first.scale_shift_table.std()) * 24**0.5 < 2


WAN_DEFAULTS = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "text_dim": 4096,
}
SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
IMAGE = {**LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
PUBLISHED = {
    "1.3b": SMALL,
    "14b": LARGE,
    "i2v-14b-480p": IMAGE,
    "i2v-14b-720p": IMAGE,
    "flf2v-14b": {**IMAGE, "pos_embed_seq_len": 514},
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_published_config_builds_the_model_the_card_describes(key):
    card = catalog.cards()["wan2.1"]
    config = {**WAN_DEFAULTS, **PUBLISHED[key], "_class_name": "WanTransformer3DModel"}
    family = card.family(card, config, "nowhere")
    model = family.build()
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert (
        count == pytest.approx(card.sizes[key].parameters, rel=0.01)
        and len(model.blocks) == card.sizes[key].layers
    )
    assert (
        family.size()[0] == card.sizes[key].layers
        and family.width() == PUBLISHED[key]["num_attention_heads"] * 128
    )


def test_every_published_size_is_listed_here():
    assert set(PUBLISHED) == set(catalog.cards()["wan2.1"].sizes)


def test_wan_2_2_is_recognised_by_its_index_and_its_experts_by_part(made):
    for name in ("wan2.2-5b", "wan2.2-a14b", "wan2.2-i2v-a14b"):
        assert catalog.find(made(name)).name == "wan2.2"
    assert catalog.find(made("wan")).name == "wan2.1"
    source = str(made("wan2.2-a14b"))
    high, low = (catalog.family(Model(source=source, part=part)) for part in (None, "transformer_2"))
    assert high.process().range == (0.875, 1.0) and low.process().range == (0.0, 0.875)
    assert high.encoders() == low.encoders() and set(high.encoders()) == {"vae", "text_encoder"}
    model = low.build()
    weights.load(model, low)
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(made("wan2.2-a14b") / "transformer_2").state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())
    with pytest.raises(PolymodalError, match="model.part = transformer_3: .* has no such denoiser"):
        catalog.family(Model(source=source, part="transformer_3"))


def test_given_tokens_have_timestep_zero(made):
    family, model = opened(made, "wan2.2-5b")
    seen = {}
    model.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, args: seen.update(t=args[0]))
    noisy = torch.randn(2, 6, 2, 4, 4)
    clean = torch.zeros(2, 1, 2, 4, 4)
    clean[1, :, 0] = 1
    batch = Batch(
        {
            "encoder_hidden_states": torch.randn(2, 512, 16),
            "noisy": noisy,
            "timestep": torch.tensor([700.0, 300.0]),
            "clean": clean,
        },
        {},
    )
    assert family.stage(model, None, batch).hidden_states.shape == noisy.shape
    assert seen["t"].view(2, 8).tolist() == [[700.0] * 8, [0.0] * 4 + [300.0] * 4]
