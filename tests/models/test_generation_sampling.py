"""What a family is trained to predict is what diffusers' own pipeline samples with: the same arguments, the same sign and time.

An oracle stands where the denoiser stood: it answers what the objective asks for, of one known sample. If the family
has the pipeline's noise process right, the pipeline's own sampling loop ends at that sample.
"""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal.core.sample import Batch
from polymodal.models import catalog, pipelines
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.recipe import Diffusion, Model
from tests.models import tiny_pipelines

KNOWN = 0.3  # every value of the sample that the oracle knows: the same however its tokens are packed


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    found = {}

    def get(name):
        if name not in found:
            source = tiny_pipelines.pipeline(name, tmp_path_factory.mktemp(name) / "pipeline")
            found[name] = catalog.family(Model(source=str(source))), pipelines.open_pipeline(source)
        return found[name]

    return get


def picture(family, seed=0):
    height, width = size(family)
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def edit(family):
    """What comes with a clip, as Clips gives it, of the family's roles: uint8 [F, H, W, 3]; a waveform and a rate."""
    frames = [picture(family, i) for i in range(length(family))]
    mask = np.zeros_like(np.stack(frames))
    mask[2:, 16:] = 255
    count = round(length(family) / 24 * family.grid().sound)
    made = {
        "source": np.stack(frames), "mask": mask, "references": np.stack([picture(family, i) for i in (50, 60)]),
        "sound": np.random.default_rng(1).uniform(-1, 1, (2, count)).astype(np.float32), "rate": np.float32(24),
    }  # fmt: skip
    return {role: made[role] for role in family.given}


def length(family):
    """Frames of a clip that becomes whole latents and tokens."""
    grid = family.grid()
    return 1 if grid.still else next(f for f in range(9, 64) if grid.fits(f))


def size(family):
    """(height, width): not square, where the tiny model's tables allow it."""
    square = {"cogvideox": (32, 32)}
    side = family.grid().side
    wide = (32, -(-48 // side) * side)
    return square.get(family.card.name) or tiny_pipelines.SIZES.get(family.card.name, wide)


def named(model, args, kwargs):
    """All arguments of a call of the denoiser by name."""
    return dict(inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments)


def call(family, pipe, steps):
    """Sample without guidance; what the pipeline gives, latents as they are at the end."""
    height, width = size(family)
    asked = {
        "prompt": ["a red circle"], "num_inference_steps": steps, "guidance_scale": 1.0, "height": height, "width": width,
        "num_frames": length(family) if not family.grid().still else None, "generator": torch.Generator().manual_seed(3), "output_type": "latent",
    }  # fmt: skip
    if getattr(family, "conditioned", False):
        asked["image"] = Image.fromarray(picture(family))
        asked["last_image"] = asked["image"] if getattr(family, "last_frame", False) else None
    if family.given and family.grid().still:
        asked["image"] = Image.fromarray(edit(family)["source"][0])
    elif "source" in family.given:
        names = {"source": "video", "mask": "mask", "references": "references"}
        asked |= {names[role]: [Image.fromarray(f) for f in shown] for role, shown in edit(family).items()}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        asked["use_resolution_binning"] = False  # the size asked for, not the nearest of the library's table
    asked = family.tune(pipe, {k: v for k, v in asked.items() if v is not None})
    return pipe(**{k: v for k, v in asked.items() if v is not None})


def stream(args, kwargs):
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def time(args, kwargs):
    return next(
        (kwargs[k] for k in ("timestep", "timesteps") if k in kwargs), args[1] if len(args) > 1 else None
    )


NAMES = list(tiny_pipelines.MAKERS)


def both(answer, kwargs, made):
    """The answers for each stream, where there are two."""
    if "audio_hidden_states" not in kwargs:
        return (made,)
    heard = kwargs["audio_hidden_states"]
    return made, answer(heard, time((), kwargs).flatten()[0].double()).to(heard)


def spied_on(family, model, answer):
    """Put answer(noisy, timestep) where the denoiser stands; returns the list of its calls' (args, kwargs)."""
    halves = (
        getattr(model, "out_channels", 0) == 2 * family.grid().channels
    )  # the other is a learned variance
    axis = 2 if family.card.name in ("cogvideox", "step-video") else 1
    seen = []

    def forward(*args, **kwargs):
        seen.append((args, kwargs))
        noisy = stream(args, kwargs)
        if noisy.ndim > 3:  # conditions are further channels
            noisy = noisy.narrow(axis, 0, family.grid().channels)
        made = answer(noisy, time(args, kwargs).flatten()[0].double()).to(noisy)
        return both(answer, kwargs, torch.cat([made, torch.zeros_like(made)], dim=axis) if halves else made)

    model.forward = forward
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_samples_what_the_objective_asks_for(opened, name):
    family, pipe = opened(name)
    process = family.process()
    objective = DiffusionObjective(process, Diffusion())

    def oracle(noisy, t):
        if process.kind == "flow":
            s = t / process.scale
            s = 1 - s if process.ascending else s
            velocity = (noisy - KNOWN) / s.clamp(min=1e-6)
            return -velocity if process.reversed else velocity
        alpha = objective.alphas[int(t)].double()
        noise = (noisy - alpha.sqrt() * KNOWN) / (1 - alpha).sqrt()
        return noise if process.prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * KNOWN

    other = pipe.components.get("transformer_2")  # the second of two experts by noise level
    models = [getattr(pipe, family.part), *([other] if other is not None else [])]
    seen, *_ = [spied_on(family, model, oracle) for model in models]
    try:
        out = call(family, pipe, 24)
    finally:
        for model in models:
            del model.forward
    first = float(time(*seen[0]).flatten()[0])
    end = 0.0 if process.ascending else process.scale
    wanted = end if process.kind == "flow" else len(process.alphas) - 1
    assert first == pytest.approx(wanted, abs=0.02 * max(wanted, 1.0))
    latents = out.frames if hasattr(out, "frames") else out.images
    if process.first_frame:  # is what was given
        latents = latents[:, :, 1:]
    ends = [latents, *(getattr(out, stream) for stream in process.streams)]  # sound beside the pictures
    for end in ends:
        assert float((end.float() - KNOWN).abs().mean()) < 0.05  # the noise that it begins with has 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_is_given_what_the_pipeline_gives_it(opened, name):
    """Every argument but the noise and its level: embeddings, masks, rotary tables, sizes, guidance."""
    family, pipe = opened(name)
    model = getattr(pipe, family.part)
    seen = spied_on(family, model, lambda noisy, t: torch.zeros_like(noisy))
    try:
        call(family, pipe, 2)
    finally:
        del model.forward
    theirs_args, theirs = seen[0]
    given = named(model, theirs_args, theirs)
    frames = length(family)
    height, width = size(family)
    with torch.no_grad():
        seen = {"pixels": moved(picture(family)[None])} if family.sees else {}
        text = family.encode_text(pipe, ["a red circle"], **seen)
    latents = torch.zeros(1, *family.grid().shape(frames, height, width))
    extra = {}
    if family.media:
        clip = moved(picture(family)[None]).repeat(1, 1, frames, 1, 1)
        shown = {
            role: moved(s) if s.dtype == np.uint8 else torch.as_tensor(s)[None]
            for role, s in edit(family).items()
        }
        with torch.no_grad():
            extra = family.encode_media(pipe, clip, **shown)
        latents = torch.zeros_like(extra.pop("latents"))
    for name in family.process().streams:
        extra[f"{name}_noisy"] = extra.pop(f"{name}_latents")
    batch = Batch(
        {**text, **extra, "noisy": latents, "timestep": time(theirs_args, theirs).reshape(-1).float()}, {}
    )
    ours = {}

    def record(*args, **kwargs):
        ours.update(kwargs, args=args)
        return both(lambda noisy, t: noisy, kwargs, torch.zeros_like(stream(args, kwargs)))

    family.forward = lambda model: record
    try:
        family.denoise(model, latents, batch["timestep"], batch)
    except (RuntimeError, ValueError):
        pass  # the answer's shape does not matter here
    finally:
        del family.forward
    args = ours.pop("args")
    ours_named = named(model, args, ours)
    skip = {
        "self",
        "sample",
        "return_dict",
        "attention_kwargs",
        "joint_attention_kwargs",
        "cross_attention_kwargs",
        "hidden_states",
        "audio_hidden_states",
        "timestep",
        "timestep_cond",
    }
    assert stream(args, ours).shape == stream(theirs_args, theirs).shape
    if "audio_hidden_states" in theirs:
        assert ours["audio_hidden_states"].shape == theirs["audio_hidden_states"].shape
    for key in (ours_named.keys() | given.keys()) - skip:
        compare(key, ours_named.get(key), given.get(key))


def moved(frames):
    """uint8 [F, H, W, 3] -> [1, 3, F, H, W] in -1..1."""
    return (torch.from_numpy(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def compare(key, ours, theirs):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), key
        for part in theirs:
            compare(f"{key}.{part}", ours[part], theirs[part])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), key
        for a, b in zip(ours, theirs, strict=True):
            compare(key, a, b)
    elif isinstance(theirs, torch.Tensor):
        assert ours is not None, f"{key} is not given"
        assert ours.shape == theirs.shape, (key, ours.shape, theirs.shape)
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-3), key
    elif theirs is not None or not isinstance(ours, torch.Tensor) or not bool((ours == 1).all()):
        assert ours == theirs, (key, ours, theirs)  # a mask of ones may be left out


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("wan", "vace"))])
def test_pipelines_of_one_class_are_distinguished_by_their_index(opened, name):
    wanted = "wan2.2" if name.startswith("wan2.2") else "vace" if name.startswith("vace") else "wan2.1"
    assert opened(name)[0].card.name == wanted
