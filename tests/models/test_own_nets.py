"""Own nets beyond the published numbers: files and configs, forms that are one net, odd sides, borders of chunks."""

import pytest
import torch

from polymodal.models.nets.autoencoder_open_sora_1_2 import AutoencoderOpenSora
from polymodal.models.nets.autoencoder_step_video import AutoencoderStepVideo
from polymodal.models.nets.blocks import grid_positions
from polymodal.models.nets.open_sora_2 import OpenSora2Transformer
from polymodal.models.nets.pt_dit import PTDiT
from polymodal.models.nets.stdit3 import STDiT3
from polymodal.models.nets.step_llm import Step1Config, Step1Model
from tests.golden.nets import find
from tests.golden.recipe import read
from tests.golden.test_golden import FILES

NETS = [path for path in FILES if path.name.startswith(("stdit", "open_sora_2", "qihoo", "step_"))]


@pytest.mark.parametrize("path", NETS, ids=lambda path: path.name.partition(".")[0])
def test_a_saved_net_opens_with_its_config_and_weights(path, tmp_path):
    document = read(path)
    model = find(document).build(document)
    model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    state, again = model.state_dict(), opened.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)


def test_both_forms_of_open_sora_2_are_one_net():
    """q and k by halves are those of neighbouring pairs with their rows in another order."""
    sizes = {
        "in_channels": 8, "vec_in_dim": 6, "context_in_dim": 10, "hidden_size": 32, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": (4, 6, 6), "cond_embed": False,
    }  # fmt: skip
    torch.manual_seed(0)
    pairs = OpenSora2Transformer(**sizes, fused_qkv=True, use_liger_rope=False).double()
    halves = OpenSora2Transformer(**sizes).double()
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    rows = torch.cat([order, order + 16])
    state = {}
    for name, tensor in pairs.state_dict().items():
        place, _, end = name.rpartition(".")
        if place.endswith("qkv"):
            query, key, value = tensor.chunk(3)
            for part, kept in (("q", query[rows]), ("k", key[rows]), ("v", value)):
                state[f"{place[:-3]}{part}_proj.{end}"] = kept
        elif place.endswith("linear1"):
            query, key, rest = tensor.split([32, 32, len(tensor) - 64])
            for part, kept in (("q_proj", query[rows]), ("k_proj", key[rows]), ("v_mlp", rest)):
                state[f"{place[: -len('linear1')]}{part}.{end}"] = kept
        else:
            state[name] = tensor[order] if end == "scale" else tensor
    halves.load_state_dict(state)
    places = grid_positions(2, 2, 3, torch.device("cpu"))
    given = (torch.rand(2, 12, 8), torch.tensor([0.3, 0.8]), torch.rand(2, 4, 10), torch.rand(2, 6))
    one, other = (net(*(t.double() for t in given), places).sample for net in (pairs, halves))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # norms are float32 inside


def test_sides_that_are_no_multiple_of_the_patch_are_padded_and_cut():
    torch.manual_seed(0)
    net = STDiT3(hidden_size=24, depth=1, num_heads=2, caption_channels=8, model_max_length=4).double()
    latents, rest = torch.rand(1, 4, 3, 5, 7).double(), (torch.tensor([300.0]), torch.rand(1, 4, 8).double())
    sizes = {"fps": torch.tensor([24.0]), "height": 40.0, "width": 56.0}
    made = net(latents, *rest, **sizes).sample
    padded = net(torch.nn.functional.pad(latents, (0, 1, 0, 1)), *rest, **sizes).sample
    assert made.shape == (1, 8, 3, 5, 7)
    torch.testing.assert_close(made, padded[..., :5, :7])


def test_a_wide_grid_has_height_and_width_exchanged():
    """Of 2 x 4 tokens the i-th of a frame is where a grid with rows of 2 has its i-th."""
    net = PTDiT(2, 16, 4, 8, 1, 32, caption_channels=8, sample_size=8, compress_ratios=(1, 2, 2), proxy_compress_ratios=(1, 2, 2))  # fmt: skip
    wide, square = net.pos_embed.table((1, 2, 4))[0, 0], net.pos_embed.table((1, 4, 4))[0, 0].view(4, 4, -1)
    assert torch.equal(wide, square[:, :2].reshape(8, -1))


def test_frames_on_both_sides_of_a_border_are_mixed():
    sizes = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "z_channels": 2}
    vae = AutoencoderStepVideo(sizes | {"down_sampling_layer": []}, sizes | {"temporal_up_layers": []}, 3)
    made = vae.blend(torch.arange(9.0).view(1, 1, 9, 1, 1)).flatten()
    first, second = 0.6 * 3 + 0.4 * 2, 0.6 * 6 + 0.4 * 5  # the later frame first, then the earlier one by it
    wanted = [0, 1, 0.6 * 2 + 0.4 * first, first, 4, 0.6 * 5 + 0.4 * second, second, 7, 8]
    assert made.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("frames", [1, 9, 14, 18])
def test_clips_of_open_sora_are_coded_in_chunks(frames):
    spatial = {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [4, 8],
        "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    }  # fmt: skip
    temporal = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
    torch.manual_seed(0)
    vae = AutoencoderOpenSora(spatial, temporal, micro_frame_size=9).eval().requires_grad_(False)
    pixels = torch.rand(1, 3, frames, 8, 8) * 2 - 1
    latents = vae.encode(pixels)["latents"]
    assert latents.shape == (1, 4, vae.latent_frames(frames), 4, 4)
    made = vae.decode(latents, frames).sample
    assert made.shape == pixels.shape
    chunk = min(frames, 9)
    alone = vae.decode(vae.encode(pixels[:, :, :chunk])["latents"], chunk).sample
    torch.testing.assert_close(made[:, :, :chunk], alone, rtol=1e-4, atol=1e-5)


def test_step_llm_sees_no_later_token():
    config = Step1Config(24, 3, 1, 1, 32, 1e-5, 20, 16)
    model = Step1Model(config).eval()
    ids = torch.tensor([[1, 5, 7, 9, 2]])
    with torch.no_grad():
        whole, part = (model(tokens).last_hidden_state for tokens in (ids, ids[:, :3]))
    torch.testing.assert_close(whole[:, :3], part)
