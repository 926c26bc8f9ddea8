"""Sections of the recipe for generating models: sizes of clips, diffusion objective, samples in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polymodal.recipe.file import (
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    ShareBelowOne,
)


class Clip(Section):
    """Sizes and lengths of images and videos that a generating model learns from; each pair is a bucket."""

    frames: list[Positive] = [81]
    """Frames of videos, 1 + a multiple of what the VAE joins; a video takes the longest length it fills."""
    fps: PositiveFloat | None = 16.0
    """Frames taken per second of video; null = every frame."""
    pixels: Annotated[int, Field(ge=64)] = 399360
    """Pixels of a frame: sizes of at most this area are made for every aspect ratio (399360 = 480 x 832)."""
    sizes: list[tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]]] = []
    """Sizes [height, width] in place of those made from pixels; a medium takes the nearest in shape."""
    crop: Literal["center", "stretch"] = "center"
    """A medium of another shape than its size: keep its centre, or squeeze it."""
    sound: bool = True
    """Models of clips with sound: learn the sound, which every clip must have; false = pictures alone."""


class Diffusion(Section):
    """The diffusion objective; `auto` is what the model's family was trained with."""

    density: Literal["auto", "uniform", "logit_normal", "mode", "cosmap"] = "auto"
    """How noise levels are drawn (Esser et al. 2024); logit_normal = a normal through a sigmoid."""
    logit_mean: float = 0.0
    """logit_normal: mean of the normal; above 0 draws more noise."""
    logit_std: PositiveFloat = 1.0
    """logit_normal: standard deviation of the normal."""
    mode_scale: float = 1.29
    """mode: how heavy the middle is."""
    shift: PositiveFloat | Literal["auto", "dynamic"] = "auto"
    """Flow: noise levels s become k s / (1 + (k - 1) s); dynamic = k by the scheduler from latent tokens."""
    per_batch: bool = False
    """One noise level for all samples of a micro-batch in place of one a sample."""
    weighting: Literal["auto", "none", "min_snr", "gaussian", "sigma_sqrt"] = "auto"
    """Weight of noise level s: min_snr (Hang et al. 2023), gaussian over timesteps of mean 1, or 1 / s^2."""
    snr_gamma: PositiveFloat = 5.0
    """min_snr: the largest signal-to-noise ratio that counts."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """Families with discrete timesteps: what the model predicts."""
    zero_snr: bool | None = None
    """Discrete timesteps: betas rescaled to end in pure noise (Lin et al. 2023; null = by the scheduler)."""
    drop: ShareBelowOne = 0.1
    """Share of samples trained on an empty caption, which guidance needs."""
    guidance: NotNegativeFloat | Literal["auto"] = "auto"
    """Guidance-distilled models (FLUX.1 dev, FLUX.2 dev, HunyuanVideo): the scale they get in training; auto
    = 1, no guidance."""
    first_frame: Share = 0.0
    """Share of clips whose first latent frame is given: it has no noise and no loss (a timestep a token:
    Wan2.2 5B), or is an input of its own (Open-Sora 2.0)."""
    quantiles: Positive = 4
    """Validation loss is measured at so many fixed noise levels."""


class Samples(Section):
    """Prompts that are sampled while a generating model trains, into <run>/samples and the trackers."""

    prompts: list[str] = []
    """What is sampled; none = nothing."""
    every: NotNegative = 500
    """Steps between samples; 0 = only at the end."""
    steps: Positive = 25
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale (default: the pipeline's)."""
    height: Annotated[int, Field(ge=8)] | None = None
    """Pixels (default: the pipeline's)."""
    width: Annotated[int, Field(ge=8)] | None = None
    """Pixels (default: the pipeline's)."""
    frames: Positive | None = None
    """Frames of a clip (default: the pipeline's)."""
    images: list[str] = []
    """First frames, or pictures to start from, one a prompt, for models that want one."""
    last_images: list[str] = []
    """Last frames, one a prompt, for models that want one."""
    negative: str | None = None
    """What not to make, for all prompts."""
    fps: PositiveFloat = 16.0
    """Frames a second of the mp4."""
