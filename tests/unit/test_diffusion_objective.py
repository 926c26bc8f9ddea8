"""The diffusion objective against its formulas, diffusers' schedulers, and itself under other cuts of the batch."""

import math

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Output, Process
from polymodal.objectives.diffusion import DiffusionObjective, dynamic_shift, gaussian_weight, shifted
from polymodal.recipe import Diffusion
from polymodal.train.step import inverse_weights

ALPHAS = tuple(
    (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0).tolist()
)


def batch(ids=(0, 1, 2), shape=(4, 2, 4, 4), weight=1.0, tokens=32, kind="video"):
    latents = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(90 + i)) for i in ids])
    tensors = {
        "latents": latents,
        "weight": torch.full((len(ids),), weight),
        "encoder_hidden_states": latents.new_ones(len(ids), 3, 5),
    }
    axes = {
        "latents": ("batch", "none", "frame", "none", "none"),
        "weight": ("batch",),
        "encoder_hidden_states": ("batch", "sequence", "none"),
    }
    return Batch(
        tensors,
        axes,
        tuple(ids),
        groups={"seeds": tuple(1000 + i for i in ids), "tokens": (tokens,) * len(ids), "kind": kind},
    )


def objective(process=None, **settings):
    return DiffusionObjective(process or Process(), Diffusion(**settings))


def many(density="uniform", count=20000, process=None, **settings):
    o = objective(process or Process(), density=density, **settings)
    u = (torch.arange(count) + 0.5) / count
    return o._levels(u, 64)[0].double()


def test_flow_mixes_and_asks_as_the_scheduler_integrates():
    (made,) = objective().prepare(None, [batch()])
    latents, s = batch()["latents"], made["timestep"] / 1000
    noise = made["target"] + latents
    mix = s.view(-1, 1, 1, 1, 1)
    assert torch.allclose(made["noisy"], (1 - mix) * latents + mix * noise, atol=1e-6)
    assert made["timestep"].dtype == torch.float32
    # one Euler step of diffusers along the target, from s to 0, gives the latents back
    scheduler = FlowMatchEulerDiscreteScheduler()
    for row in range(3):
        scheduler.set_timesteps(sigmas=[float(s[row])])
        back = scheduler.step(made["target"][row], scheduler.timesteps[0], made["noisy"][row]).prev_sample
        assert torch.allclose(back, latents[row], atol=1e-5)


def test_the_other_signs_of_flow():
    (plain,) = objective().prepare(None, [batch()])
    (reverse,) = objective(Process(reversed=True)).prepare(None, [batch()])
    assert torch.equal(plain["target"], -reverse["target"]) and torch.equal(plain["noisy"], reverse["noisy"])
    (lumina,) = objective(Process(reversed=True, ascending=True, scale=1.0)).prepare(None, [batch()])
    assert torch.allclose(lumina["timestep"], 1 - plain["timestep"] / 1000, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
def test_discrete_processes_equal_the_librarys_scheduler(prediction, zero):
    if zero and prediction == "epsilon":
        with pytest.raises(PolymodalError, match="nothing to be learned"):
            objective(Process("discrete", alphas=ALPHAS), prediction=prediction, zero_snr=zero)
        return
    o = objective(Process("discrete", alphas=ALPHAS, density="uniform"), prediction=prediction, zero_snr=zero)
    (made,) = o.prepare(None, [batch()])
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero
    )
    t, latents = made["timestep"].long(), batch()["latents"]
    assert torch.allclose(o.alphas, scheduler.alphas_cumprod, atol=1e-6)
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    noise = (made["noisy"] - a.sqrt() * latents) / (1 - a).sqrt()
    assert torch.allclose(made["noisy"], scheduler.add_noise(latents, noise, t), atol=1e-5)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, t)
    assert torch.allclose(made["target"], wanted, atol=1e-4)


def test_cogvideox_weighted_error_of_the_sample_is_the_error_of_v():
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=1.0, rescale_betas_zero_snr=False)
    x, n, v = torch.randn(3, 4, 8).unbind(0)
    t = torch.tensor([10, 400, 900, 990])
    a = scheduler.alphas_cumprod[t].view(-1, 1)
    guess = a.sqrt() * (a.sqrt() * x + (1 - a).sqrt() * n) - (1 - a).sqrt() * v
    ours = (v - (a.sqrt() * n - (1 - a).sqrt() * x)).square()
    assert torch.allclose((guess - x).square() / (1 - a), ours, rtol=1e-3, atol=1e-4)


def test_min_snr_equals_the_library():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.tensor([1, 50, 500, 998])
    snr = compute_snr(scheduler, t)
    least = torch.minimum(snr, torch.full_like(snr, 5.0))
    process = Process("discrete", alphas=ALPHAS)
    for prediction, wanted in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        o = objective(process, weighting="min_snr", prediction=prediction)
        assert torch.allclose(o._snr_weight(t), wanted, rtol=1e-4)


def test_densities_are_those_of_the_library_and_the_paper():
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", 200_000, 0.5, 0.8)
    ours = many("logit_normal", logit_mean=0.5, logit_std=0.8)
    for q in (0.05, 0.5, 0.95):
        assert float(ours.quantile(q)) == pytest.approx(float(theirs.double().quantile(q)), abs=0.01)
    theirs = compute_density_for_timestep_sampling("mode", 200_000, mode_scale=1.29)
    ours = many("mode", mode_scale=1.29)
    for q in (0.05, 0.5, 0.95):
        assert float(ours.quantile(q)) == pytest.approx(float(theirs.double().quantile(q)), abs=0.01)
    # cosmap: density 2 / (pi - 2 pi t + 2 pi t^2); its share below 1/4 by quadrature
    t = torch.linspace(0, 0.25, 10001, dtype=torch.float64)
    share = torch.trapezoid(2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t), t)
    assert float((many("cosmap") < 0.25).double().mean()) == pytest.approx(float(share), abs=1e-3)
    assert float(many().mean()) == pytest.approx(0.5, abs=1e-3)


def test_shifts_are_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert torch.allclose(shifted(plain.sigmas[:-1], 5.0), scheduler.sigmas[:-1], atol=1e-5)
    assert torch.allclose(many(process=Process(shift=5.0)), shifted(many(), 5.0))
    facts = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert dynamic_shift(256, facts) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(4096, facts) == pytest.approx(math.exp(1.15))
    with pytest.raises(PolymodalError, match="no lengths for it"):
        objective(shift="dynamic")


def test_the_gaussian_weight_has_mean_one_over_the_shifted_grid():
    grid = shifted(torch.linspace(1, 0.001, 1000, dtype=torch.float64), 5.0)
    weights = gaussian_weight(grid, 5.0)
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5) and float(weights.min()) == pytest.approx(
        0.0, abs=1e-6
    )
    assert float(grid[weights.argmax()]) == pytest.approx(0.5, abs=0.01)
    timesteps = grid.numpy() * 1000  # the described system's table, by its own steps
    bell = np.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    table = (bell - bell.min()) * (1000 / (bell - bell.min()).sum())
    assert np.allclose(weights.numpy(), table, atol=1e-5)


def test_the_weight_of_small_noise_is_that_of_the_library():
    (made,) = objective(weighting="sigma_sqrt").prepare(None, [batch((0, 1, 2))])
    theirs = compute_loss_weighting_for_sd3("sigma_sqrt", made["timestep"] / 1000)
    assert torch.allclose(made["level_weight"], theirs, rtol=1e-4)
    with pytest.raises(PolymodalError, match="weighting = sigma_sqrt does not fit this model"):
        objective(Process("discrete", alphas=ALPHAS), weighting="sigma_sqrt")


def test_the_dynamic_shift_of_a_batch_is_that_of_the_librarys_pipeline():
    facts = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    process = Process(shift="dynamic", dynamic=facts, density="uniform")
    made = batch((0, 1, 2), tokens=1024)
    (ours,) = objective(process).prepare(None, [made])
    (plain,) = objective(Process(density="uniform")).prepare(None, [made])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = calculate_shift(1024, 256, 4096, 0.5, 1.15)
    theirs = scheduler.time_shift(mu, 1.0, plain["timestep"] / 1000) * 1000
    assert torch.allclose(ours["timestep"], theirs, rtol=1e-4)


def test_draws_depend_on_the_samples_seed_alone():
    o = objective()
    (together,) = o.prepare(None, [batch((0, 1, 2))])
    apart = o.prepare(None, [batch((2,)), batch((0, 1))])
    for name in ("noisy", "target", "timestep"):
        torch.testing.assert_close(together[name], torch.cat([apart[1][name], apart[0][name]]))
    assert len(set(together["timestep"].tolist())) == 3
    (one,) = objective(per_batch=True).prepare(None, [batch((0, 1, 2))])
    assert len(set(one["timestep"].tolist())) == 1


def test_captions_are_dropped_at_the_asked_rate():
    o = objective(drop=0.25)
    o.unconditional = {"encoder_hidden_states": torch.full((1, 2, 5), 7.0)}
    made = o.prepare(None, [batch((i,)) for i in range(400)])
    gone = [b for b in made if b["encoder_hidden_states"][0, 0, 0] == 7]
    assert 70 < len(gone) < 130
    assert torch.equal(gone[0]["encoder_hidden_states"][0, 2], torch.zeros(5))  # padded to the batch's length
    held = o.validation().prepare(None, [batch((i,)) for i in range(40)])
    assert not any((b["encoder_hidden_states"] == 7).any() for b in held)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_dropped_caption_brings_its_own_length_and_mask(length):
    """Shorter than the batch's captions, as long or longer: nothing is cut away, nothing is broadcast along the mask."""
    o = objective(drop=0.999999)
    o.unconditional = {
        "encoder_hidden_states": torch.full((1, length, 5), 7.0),
        "mask": torch.ones(1, length, dtype=torch.long),
        "pooled": torch.full((1, 6), 7.0),
    }
    given = batch()
    given.tensors |= {"mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]), "pooled": torch.zeros(3, 6)}
    given.axes |= {"mask": ("batch", "sequence"), "pooled": ("batch", "none")}
    (made,) = o.prepare(None, [given])
    total = max(3, length)
    assert made["encoder_hidden_states"].shape == (3, total, 5) and made["mask"].shape == (3, total)
    for name, value in (("encoder_hidden_states", 7), ("mask", 1)):
        assert (made[name][:, :length] == value).all() and not made[name][:, length:].any(), name
    assert (made["pooled"] == 7).all() and made["mask"].dtype == torch.long
    (kept,) = objective(drop=0.0).prepare(None, [given])
    assert torch.equal(kept["mask"], given["mask"])


def test_the_order_of_a_seeds_draws_is_level_drop_noise_first_frame_streams():
    """Every number that a sample is given is the one that stands at its place in the generator's stream."""
    process = Process(per_token=True, density="uniform", streams=("audio", "depth"))
    settings = Diffusion(drop=0.5, first_frame=0.5)
    o = DiffusionObjective(process, settings)
    o.unconditional = {"encoder_hidden_states": torch.full((1, 3, 5), 7.0)}
    dropped, first = [], []
    for id in range(16):
        made = batch((id,))
        beside = {"audio": torch.randn(1, 7, 6), "depth": torch.randn(1, 2, 4)}
        for name, tensor in beside.items():
            made.tensors[f"{name}_latents"] = tensor
            made.axes[f"{name}_latents"] = ("batch", "none", "none")
        g = torch.Generator().manual_seed(1000 + id)
        level, drop = (torch.rand((), generator=g) for _ in range(2))
        noise = torch.randn((4, 2, 4, 4), generator=g)
        given = float(torch.rand((), generator=g)) < 0.5
        own = {name: torch.randn(tensor.shape[1:], generator=g) for name, tensor in beside.items()}
        (noised,) = o.prepare(None, [made])
        assert float(noised["timestep"]) == pytest.approx(1000 * float(level), rel=1e-5)
        assert bool((noised["encoder_hidden_states"] == 7).all()) == (float(drop) < 0.5)
        torch.testing.assert_close(noised["target"][0], noise - made["latents"][0])
        assert bool(noised["clean"].any()) == given
        for name, numbers in own.items():
            torch.testing.assert_close(noised[f"{name}_target"][0], numbers - beside[name][0])
        # the same noise without a level or a caption drawn: in validation, and where nothing is dropped
        for other in (o.validation(), DiffusionObjective(process, Diffusion(drop=0.0, first_frame=0.5))):
            torch.testing.assert_close(other.prepare(None, [made])[0]["target"], noised["target"])
        dropped.append(float(drop) < 0.5)
        first.append(given)
    assert len(set(dropped)) == len(set(first)) == 2, "both outcomes were seen"


def error_of(o, batches, wrong=0.5):
    inverse = inverse_weights(o, batches, None)
    return sum(float(o.loss(Output(b["target"] + wrong), b, inverse)[0]) for b in batches)


def test_the_loss_is_a_mean_over_samples_however_the_batch_is_cut():
    o = objective()
    whole = o.prepare(None, [batch((0, 1, 2, 3))])
    cut = o.prepare(None, [batch((0, 1)), batch((2,)), batch((3,)), batch((5,), weight=0.0)])
    assert error_of(o, whole) == pytest.approx(0.25, abs=1e-6)
    assert error_of(o, cut) == pytest.approx(0.25, abs=1e-6)


def test_given_cells_have_no_noise_and_no_loss():
    given = batch()
    clean = torch.zeros(3, 1, 2, 4, 4)
    clean[:, :, 0] = 1
    given.tensors["clean"] = clean
    o = objective()
    (made,) = o.prepare(None, [given])
    assert torch.equal(made["noisy"][:, :, 0], given["latents"][:, :, 0])
    prediction = made["target"].clone()
    prediction[:, :, 0] += 99
    prediction[:, :, 1] += 0.5
    loss, _ = o.loss(Output(prediction), made, {"diffusion": 1 / 3})
    assert float(loss) == pytest.approx(0.25, abs=1e-6)


def test_validation_is_at_fixed_levels_of_the_density():
    o = objective(Process(density="uniform", shift=3.0), quantiles=4).validation()
    made = o.prepare(None, [batch((0, 1))])
    assert [round(float(b["timestep"][0]), 3) for b in made] == [
        round(float(shifted(torch.tensor(q), 3.0)) * 1000, 3) for q in (0.125, 0.375, 0.625, 0.875)
    ]
    again = o.prepare(None, [batch((0, 1))])
    assert all(torch.equal(a["noisy"], b["noisy"]) for a, b in zip(made, again, strict=True))
    _, logs = o.loss(Output(made[1]["target"] + 1), made[1], {"diffusion": 0.5})
    assert float(logs["nll/noise 0.375"]) == pytest.approx(2.0) and float(logs["tokens/noise 0.375"]) == 2
    assert set(logs) <= {"loss", *(f"{k}/{p}" for k in ("nll", "tokens") for p in o.parts)}


@pytest.mark.parametrize(
    ("process", "settings", "words"),
    [
        (Process(), {"prediction": "epsilon"}, "prediction = epsilon does not fit this model, which is trained by flow matching"),
        (Process(), {"zero_snr": True}, "zero_snr = True does not fit"),
        (Process(), {"weighting": "min_snr"}, "weighting = min_snr does not fit"),
        (Process("discrete", alphas=ALPHAS), {"shift": 3.0}, "shift = 3.0 does not fit this model, which has discrete timesteps"),
        (Process("discrete", alphas=ALPHAS), {"weighting": "gaussian"}, "weighting = gaussian does not fit"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_process_are_refused(process, settings, words):
    with pytest.raises(PolymodalError, match=words) as caught:
        objective(process, **settings)
    assert "Leave train.diffusion" in caught.value.hint


def test_latents_of_another_model_are_reported():
    o = objective()
    (made,) = o.prepare(None, [batch()])
    with pytest.raises(
        PolymodalError, match=r"predicts \[3, 8, 2, 4, 4\], the latents are \[3, 4, 2, 4, 4\]"
    ):
        o.loss(Output(torch.zeros(3, 8, 2, 4, 4)), made, {"diffusion": 1.0})


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_two_models_share_the_levels_of_one_density(density):
    """Where a boundary parts the levels, each side draws the same density, restricted to its own part."""
    whole = many(density, process=Process(shift=3.0))
    for low, high in ((0.875, 1.0), (0.0, 0.875)):
        part = many(density, process=Process(shift=3.0, range=(low, high)))
        inside = whole[(whole > low) & (whole < high)]
        assert low - 1e-6 <= float(part.min()) and float(part.max()) <= high + 1e-6
        for q in (0.1, 0.5, 0.9):
            assert float(part.quantile(q)) == pytest.approx(float(inside.quantile(q)), abs=0.01)


def test_the_first_frame_is_given_to_the_asked_share_of_clips():
    o = objective(Process(per_token=True), first_frame=0.5)
    made = o.prepare(None, [batch((i,)) for i in range(100)])
    given = [b for b in made if float(b["clean"].sum()) > 0]
    assert 30 < len(given) < 70
    for b in given[:3]:
        (i,) = b.samples
        assert (
            torch.equal(b["noisy"][:, :, 0], batch((i,))["latents"][:, :, 0])
            and float(b["clean"][:, :, 1].sum()) == 0
        )
    (picture,) = o.prepare(None, [batch((0,), shape=(4, 1, 4, 4))])
    assert "clean" not in picture.tensors
    with pytest.raises(
        PolymodalError, match="first_frame = 0.5 does not fit this model, which has one timestep"
    ):
        objective(first_frame=0.5)


def test_a_model_that_always_has_its_first_frame_given_learns_the_rest_alone():
    o = objective(Process(first_frame=True))
    (made,) = o.prepare(None, [batch()])
    assert torch.equal(made["noisy"][:, :, 0], batch()["latents"][:, :, 0])
    assert (made["clean"][:, :, 0] == 1).all() and (made["clean"][:, :, 1:] == 0).all()
    wrong = made["target"].clone()
    wrong[:, :, 0] += 100  # what is said of the given frame does not count
    assert float(o.loss(Output(wrong), made, {"diffusion": 1.0})[0]) == 0
    with pytest.raises(PolymodalError, match="which always has its first frame given"):
        objective(Process(first_frame=True), first_frame=0.5)


def test_a_distilled_model_gets_the_guidance_of_the_recipe():
    tensors = {"latents": torch.zeros(2, 4, 2, 2), "weight": torch.ones(2)}
    batch = Batch(tensors, dict.fromkeys(tensors, ("batch",)), (0, 1), groups={"seeds": (1, 2), "tokens": (4, 4), "kind": "image"})  # fmt: skip
    distilled = Process(scale=1.0, guidance=1.0)
    for settings, wanted in ((Diffusion(drop=0.0), 1.0), (Diffusion(drop=0.0, guidance=3.5), 3.5)):
        (made,) = DiffusionObjective(distilled, settings).prepare(None, [batch])
        assert made["guidance"].tolist() == [wanted, wanted]
    (plain,) = DiffusionObjective(Process(), Diffusion(drop=0.0)).prepare(None, [batch])
    assert "guidance" not in plain.tensors
    with pytest.raises(PolymodalError, match="guidance = 3.5 does not fit .* no guidance scale as an input"):
        DiffusionObjective(Process(), Diffusion(guidance=3.5))


def test_a_second_stream_is_noised_at_the_same_level_and_its_error_is_added():
    o = objective(Process(streams=("audio",)))
    plain, both = batch(), batch()
    sound = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(5))
    both.tensors["audio_latents"], both.axes["audio_latents"] = sound, ("batch", "none", "none")
    (made,), (alone,) = o.prepare(None, [both]), o.prepare(None, [plain])
    assert torch.equal(made["noisy"], alone["noisy"])  # what comes beside changes no draw
    s = (made["timestep"] / 1000).view(-1, 1, 1)
    noise = made["audio_target"] + sound
    assert torch.allclose(made["audio_noisy"], (1 - s) * sound + s * noise, atol=1e-6)
    assert not torch.equal(noise[0], noise[1]) and float(noise.std()) == pytest.approx(1, abs=0.2)
    off = Output(made["target"] + 1, extra={"audio": made["audio_target"] + 2})
    loss, logs = o.loss(off, made, {"diffusion": 1 / 3})
    assert float(loss) == pytest.approx(1 + 4) and float(logs["nll/audio"]) == pytest.approx(12)
    assert "audio" in o.parts
    loss, logs = o.loss(Output(alone["target"] + 1), alone, {"diffusion": 1 / 3})
    assert float(loss) == pytest.approx(1) and "nll/audio" not in logs
