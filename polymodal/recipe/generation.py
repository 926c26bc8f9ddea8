"""The recipe's sections of generating models: sizes of clips, the diffusion objective, samples while training.

Ground floor: pydantic only. Part of the one schema; see recipe.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polymodal.recipe.file import Section


class Clip(Section):
    """Sizes and lengths of the images and videos that a generating model learns from; each pair is a bucket."""

    frames: list[Annotated[int, Field(ge=1)]] = [81]
    """Lengths of videos in frames, each 1 more than a multiple of the frames the VAE joins; a video takes the longest it fills."""
    fps: Annotated[float, Field(gt=0)] | None = 16.0
    """Frames taken per second of video; null = every frame."""
    pixels: Annotated[int, Field(ge=64)] = 399360
    """Pixels of a frame: sizes of at most this area are made for every aspect ratio (399360 = 480 x 832)."""
    sizes: list[tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]]] = []
    """Sizes [height, width] in place of those made from pixels; a medium takes the nearest in shape."""
    crop: Literal["center", "stretch"] = "center"
    """A medium of another shape than its size: keep its centre, or squeeze it."""
    sound: bool = True
    """Models of clips with sound: learn it with the pictures, which every clip must then have; false = the pictures alone."""


class Diffusion(Section):
    """What a generating model is asked; `auto` is what its family was trained with."""

    density: Literal["auto", "uniform", "logit_normal", "mode", "cosmap"] = "auto"
    """How noise levels are drawn (Esser et al. 2024): u uniform; normal through a sigmoid; heavy in the middle; cosmap."""
    logit_mean: float = 0.0
    """logit_normal: mean of the normal; above 0 draws more noise."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """logit_normal: standard deviation of the normal."""
    mode_scale: float = 1.29
    """mode: how heavy the middle is."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto", "dynamic"] = "auto"
    """Flow: noise levels s become k s / (1 + (k - 1) s); dynamic = k from the latent tokens of the sample, as the scheduler's config says."""
    per_batch: bool = False
    """One noise level for all samples of a micro-batch (the described system's way) in place of one a sample."""
    weighting: Literal["auto", "none", "min_snr", "gaussian", "sigma_sqrt"] = "auto"
    """Weight of a noise level's loss: min_snr (Hang et al. 2023), gaussian over the timesteps with mean 1, or 1 / s^2."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """min_snr: the largest signal-to-noise ratio that counts."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """Families with discrete timesteps: what the model predicts."""
    zero_snr: bool | None = None
    """Families with discrete timesteps: rescale the betas to end in pure noise (Lin et al. 2023); null = the scheduler's config."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples trained on an empty caption, which guidance needs."""
    guidance: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Guidance-distilled models (FLUX.1 dev, FLUX.2 dev, HunyuanVideo): the scale that training shows them; auto = 1, no guidance."""
    first_frame: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of clips whose first latent frame is given, without noise and loss (models with a timestep a token: Wan2.2 5B)."""
    quantiles: Annotated[int, Field(ge=1)] = 4
    """Validation loss is measured at so many fixed noise levels."""


class Samples(Section):
    """Prompts that are sampled while a generating model trains, into <run>/samples and the trackers."""

    prompts: list[str] = []
    """What is sampled; none = nothing."""
    every: Annotated[int, Field(ge=0)] = 500
    """Steps between samples; 0 = only at the end."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale (default: the pipeline's)."""
    height: Annotated[int, Field(ge=8)] | None = None
    """Pixels (default: the pipeline's)."""
    width: Annotated[int, Field(ge=8)] | None = None
    """Pixels (default: the pipeline's)."""
    frames: Annotated[int, Field(ge=1)] | None = None
    """Frames of a clip (default: the pipeline's)."""
    images: list[str] = []
    """First frames, or pictures to start from, one a prompt, for models that want one."""
    last_images: list[str] = []
    """Last frames, one a prompt, for models that want one."""
    negative: str | None = None
    """What not to make, for all prompts."""
    fps: Annotated[float, Field(gt=0)] = 16.0
    """Frames a second of the mp4."""
