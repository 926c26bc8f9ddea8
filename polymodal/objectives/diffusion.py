"""Diffusion losses: noise is mixed into latents, and the model predicts what was mixed.

Flow matching and discrete processes (epsilon, v), their noise levels and weightings, condition dropping,
validation at fixed levels. All that is random comes from a sample's own seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Output, Process
from polymodal.models.diffusion import Generation
from polymodal.recipe import Diffusion, Recipe

KINDS = ("image", "video")


def level(u: Tensor, density: str, settings: Diffusion) -> Tensor:
    """Uniform draws in (0, 1) -> noise levels in (0, 1) of a density, by its inverse distribution function.

    Esser et al. 2024 (arXiv:2403.03206), section 3.1: logit-normal, mode with heavy tails (eq. 20), cosmap
    (eq. 21).
    """
    if density == "logit_normal":
        return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
    if density == "mode":
        return 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    if density == "cosmap":
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
    return u


def shifted(s: Tensor, k: float) -> Tensor:
    """Noise levels for larger samples: k s / (1 + (k - 1) s) (arXiv:2403.03206, eq. 23)."""
    return k * s / (1 + (k - 1) * s)


def dynamic_shift(tokens: int, facts: Any) -> float:
    """The shift k = exp(mu) for so many latent tokens, mu linear between two lengths (as in FLUX)."""
    short, long = facts["base_image_seq_len"], facts["max_image_seq_len"]
    low, high = facts["base_shift"], facts["max_shift"]
    return math.exp(low + (high - low) * (tokens - short) / (long - short))


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Rescaled so that the last step is pure noise (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = alphas.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


def gaussian_weight(s: Tensor, shift: float, steps: int = 1000) -> Tensor:
    """A Gaussian over timesteps whose mean over the shifted grid of `steps` levels is 1."""
    grid = shifted(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), shift)

    def bell(x: Tensor) -> Tensor:
        return torch.exp(-2 * (x - 0.5) ** 2)

    floor = bell(grid).min()
    return ((bell(s.double()) - floor) / (bell(grid) - floor).mean()).float()


class DiffusionObjective:
    """Mean squared error of the prediction: mean over a sample's elements, weighted mean over samples.

    A process with further streams sums their errors, each its own mean over elements: `<name>_latents`
    becomes `<name>_noisy` and `<name>_target`, and the prediction is extra[<name>] of the model's output.

    process: what the family was trained with; settings: the recipe's train.diffusion; tokens: latent tokens
    of a batch's samples, for the dynamic shift. Batches bring `latents` [B, ...], `weight` [B] (0 for a
    filler), `loss_weight` [B] where datasets have one, and in groups `seeds` (one an item, from (seed, epoch,
    sample)) and `tokens`. Raises PolymodalError for settings that do not fit the process.
    """

    term = "diffusion"
    aux_weight = 0.0

    def __init__(self, process: Process, settings: Diffusion):
        self.process, self.settings = process, settings
        self.kept: tuple[str, ...] = ()
        """Text tensors that stay when a caption is dropped."""
        self.unconditional: dict[str, Tensor] = {}
        """Text tensors of the empty caption, [1, ...], for samples whose caption is dropped."""
        self.fixed = False
        self.density = process.density if settings.density == "auto" else settings.density
        self.weighting = process.weighting if settings.weighting == "auto" else settings.weighting
        self.shift = process.shift if settings.shift == "auto" else settings.shift
        self.prediction = process.prediction if settings.prediction == "auto" else settings.prediction
        self.guidance = process.guidance if settings.guidance == "auto" else settings.guidance
        if self.guidance is not None and process.guidance is None:
            raise _misfit("guidance", settings.guidance, "takes no guidance scale as an input")
        flow = process.kind == "flow"
        if flow and settings.prediction != "auto":
            raise _misfit("prediction", settings.prediction, "is trained by flow matching")
        if flow and settings.zero_snr is not None:
            raise _misfit("zero_snr", settings.zero_snr, "is trained by flow matching")
        if flow and self.weighting == "min_snr":
            raise _misfit("weighting", "min_snr", "is trained by flow matching")
        if not flow and settings.shift != "auto":
            raise _misfit("shift", settings.shift, "has discrete timesteps")
        if not flow and self.weighting in ("gaussian", "sigma_sqrt"):
            raise _misfit("weighting", self.weighting, "has discrete timesteps")
        if settings.first_frame and process.first_frame:
            raise _misfit("first_frame", settings.first_frame, "always has its first frame given")
        if settings.first_frame and not (process.per_token or process.frame_input):
            raise _misfit("first_frame", settings.first_frame, "has one timestep for all tokens")
        if self.shift == "dynamic" and not process.dynamic and process.by_size is None:
            raise _misfit("shift", "dynamic", "has no lengths for it in its scheduler's config")
        if not flow:
            self.alphas = self._alphas()
        names = [f"noise {self._quantile(i):.3g}" for i in range(settings.quantiles)]
        self.parts: tuple[str, ...] = (*KINDS, *names, *process.streams)
        """Parts of the loss in logs: nll/<part> and tokens/<part>."""

    @classmethod
    def from_recipe(cls, recipe: Recipe, family: Generation) -> DiffusionObjective:
        made = cls(family.process(), recipe.train.diffusion)
        made.kept = family.kept
        return made

    def _alphas(self) -> Tensor:
        """Cumulative products of the process' steps, down to pure noise where zero_snr asks for it."""
        alphas, zero_snr = torch.tensor(self.process.alphas, dtype=torch.float64), self.settings.zero_snr
        ends_in_noise = float(alphas[-1]) < 1e-7
        if zero_snr is False and ends_in_noise:
            raise PolymodalError(
                "train.diffusion.zero_snr = false: this model's scheduler ends in pure noise.",
                "Leave train.diffusion.zero_snr out.",
            )
        if (zero_snr or ends_in_noise) and self.prediction == "epsilon":
            raise PolymodalError(
                "train.diffusion.zero_snr: at pure noise there is nothing to be learned from predicting it.",
                "Set train.diffusion.prediction to v_prediction.",
            )
        return (zero_terminal_snr(alphas) if zero_snr and not ends_in_noise else alphas).float()

    def _quantile(self, i: int) -> float:
        return (i + 0.5) / self.settings.quantiles

    def validation(self) -> DiffusionObjective:
        """The same at fixed noise levels (quantiles of the density), fixed noise and with every caption."""
        other = copy.copy(self)
        other.fixed = True
        return other

    # ------------------------------------------------------------------ before the forward pass

    def weights(self, batch: Batch) -> dict[str, float]:
        """Samples that count."""
        return {self.term: float(batch["weight"].sum(dtype=torch.float64))}

    def prepare(self, actors: Any, batches: Sequence[Batch]) -> list[Batch]:
        """Noise, levels and targets; of validation one batch a quantile. actors.encode: pixels to latents."""
        out = []
        if actors is not None:
            with actors.on_device():
                batches = [actors.encode(batch) for batch in batches]
        for batch in batches:
            if self.fixed:
                out += [self._noised(batch, i) for i in range(self.settings.quantiles)]
            else:
                out.append(self._noised(batch, None))
        return out

    def _noised(self, batch: Batch, quantile: int | None) -> Batch:
        """A batch with noise: at the levels drawn, or all at the middle of a quantile.

        Every sample has a generator of its own, from its seed, and the order of draws is part of what a seed
        means: a draw that is moved, added before others or left out changes every run of a recipe, and
        resumed runs differ from uninterrupted ones. The order:

        1. one uniform number for the noise level,
        2. one uniform number that drops the caption,
        3. normal numbers of the latents' shape: the noise,
        4. one uniform number that gives the first frame, where the process or the recipe may give it and the
           sample is a clip,
        5. for each further stream of the batch, in the process' order, normal numbers of its shape.

        1 and 2 are drawn in validation too, and with drop = 0, though they are not used: the noise is then
        the same. All numbers are float32, drawn on the CPU.
        """
        latents = batch["latents"].float()
        seeds = batch.groups["seeds"]
        draws = [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]
        u = torch.stack([torch.rand((), generator=g) for g in draws]).clamp(1e-5, 1 - 1e-5)
        chance = [float(torch.rand((), generator=g)) for g in draws]
        tensors = dict(batch.tensors)
        if quantile is not None:
            u = torch.full_like(u, self._quantile(quantile))
        else:
            if self.settings.per_batch:
                u = u[:1].expand_as(u).clone()
            dropped = torch.tensor([c < self.settings.drop for c in chance])
            for name, empty in self.unconditional.items() if bool(dropped.any()) else ():
                if name not in self.kept:
                    tensors[name] = _replaced(tensors[name], dropped, empty)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws]).to(latents.device)
        tokens, shape = batch.groups["tokens"][0], batch.groups.get("shape", ())
        s, timestep, weight = self._levels(u, tokens, shape)
        mixed, target = self._mixed(latents, noise, s.to(latents.device))
        share = 1.0 if self.process.first_frame else self.settings.first_frame
        if share and latents.ndim == 5 and latents.shape[2] > 1:
            given = torch.tensor([float(torch.rand((), generator=g)) < share for g in draws])
            given = given.to(latents.device)
            if self.process.frame_input:
                tensors["given"] = given.float()
            else:
                tensors["clean"] = torch.zeros(len(draws), 1, *latents.shape[2:], device=latents.device)
                tensors["clean"][given, :, 0] = 1
        clean = tensors.get("clean")  # cells that are given, not generated: no noise, no loss
        if clean is not None:
            mixed = torch.where(clean.bool(), latents, mixed)
        if self.guidance is not None:
            tensors["guidance"] = torch.full((len(draws),), self.guidance, device=latents.device)
        factor = tensors.pop("loss_weight", None)
        if factor is not None:
            weight = weight * factor
        axes: dict[str, Any] = {"noisy": batch.axes["latents"], "target": batch.axes["latents"]}
        for name in self.process.streams:
            beside = tensors.pop(f"{name}_latents", None)
            if beside is not None:
                own = torch.stack([torch.randn(beside.shape[1:], generator=g) for g in draws])
                pair = self._mixed(beside.float(), own.to(beside.device), s.to(beside.device))
                for part, tensor in zip(("noisy", "target"), pair, strict=True):
                    tensors[f"{name}_{part}"] = tensor
                    axes[f"{name}_{part}"] = batch.axes[f"{name}_latents"]
        # one weight for the sum over the batch, one for level and dataset: only the first is in the
        # denominator
        tensors |= {"noisy": mixed, "target": target, "timestep": timestep, "level_weight": weight}
        del tensors["latents"]
        axes = {n: axes.get(n) or batch.axes.get(n, ("batch",)) for n in tensors}
        return replace(batch, tensors=tensors, axes=axes, groups={**batch.groups, "quantile": quantile})

    def _levels(self, u: Tensor, tokens: int, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform draws [B] -> (noise level, the model's timestep float32, weight of the loss), each [B].

        tokens, (frames, height, width): of each sample, for a dynamic shift."""
        process = self.process
        s = level(u, self.density, self.settings)
        if process.kind == "discrete":
            count = len(self.alphas)
            t = (s * count).long().clamp(0, count - 1)
            return t, t.float(), self._snr_weight(t)
        if self.shift != "dynamic":
            k = float(self.shift)
        elif process.by_size is not None:
            k = process.by_size(*shape)
        else:
            k = dynamic_shift(tokens, process.dynamic)
        s = shifted(s, k)
        if process.range != (0.0, 1.0):
            ends = [self._uniform_of(edge, k) for edge in process.range]
            s = shifted(level(ends[0] + (ends[1] - ends[0]) * u, self.density, self.settings), k)
        if self.weighting == "gaussian":
            weight = gaussian_weight(s, k)
        elif self.weighting == "sigma_sqrt":
            weight = s**-2.0
        else:
            weight = torch.ones_like(s)
        return s, (1 - s if process.ascending else s) * process.scale, weight

    def _uniform_of(self, s: float, k: float) -> float:
        """The uniform draw that becomes the level s: inverts density and shift by bisection."""

        def level_of(u: float) -> float:
            return float(shifted(level(torch.tensor(u, dtype=torch.float64), self.density, self.settings), k))

        low, high = 0.0, 1.0
        rising = level_of(1 - 1e-9) > level_of(1e-9)
        for _ in range(50):
            middle = (low + high) / 2
            if (level_of(middle) < s) == rising:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def _snr_weight(self, t: Tensor) -> Tensor:
        """Min-SNR (arXiv:2303.09556): min(snr, gamma) / snr for epsilon, / (snr + 1) for v."""
        if self.weighting != "min_snr":
            return torch.ones(len(t))
        snr = self.alphas[t] / (1 - self.alphas[t])
        least = snr.clamp(max=self.settings.snr_gamma)
        return least / (snr + 1) if self.prediction == "v_prediction" else least / snr

    def _mixed(self, latents: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s.view(-1, *[1] * (latents.ndim - 1))
        if self.process.kind == "flow":
            target = latents - noise if self.process.reversed else noise - latents
            return (1 - s) * latents + s * noise, target
        alphas = self.alphas.to(latents.device)[s]
        signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        target = noise if self.prediction == "epsilon" else signal * noise - sigma * latents
        return signal * latents + sigma * noise, target

    # ------------------------------------------------------------------ after it

    def loss(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scaled loss (a scalar, to be summed over ranks and micro-batches) and logs, sums over samples."""
        per_sample, beside = self.errors(output, batch)
        weight = batch["weight"]
        loss = (per_sample * batch["level_weight"] * weight).sum() * inverse[self.term]
        logs = {"loss": loss.detach()}
        counted, count = (per_sample.detach() * weight).sum(), weight.sum()
        parts: list[str] = [batch.groups["kind"]]
        if batch.groups.get("quantile") is not None:
            parts.append(self.parts[len(KINDS) + batch.groups["quantile"]])
        for part in parts:
            logs |= {f"nll/{part}": counted, f"tokens/{part}": count}
        for name, own in beside.items():
            logs |= {f"nll/{name}": (own.detach() * weight).sum(), f"tokens/{name}": count}
        return loss, logs

    def errors(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean squared error of each sample [B], of all streams; that of each further stream)."""
        prediction, target = output.hidden_states.float(), batch["target"]
        if prediction.shape != target.shape:
            raise PolymodalError(
                f"The denoiser predicts {list(prediction.shape)}, the latents are {list(target.shape)}.",
                "The features were made for another model: run `polymodal encode` with this recipe.",
            )
        error = (prediction - target).square()
        clean = batch.get("clean")
        if clean is not None:
            asked = (~clean.bool()).expand_as(error)
            per_sample = (error * asked).flatten(1).sum(1) / asked.flatten(1).sum(1)
        else:
            per_sample = error.flatten(1).mean(1)
        beside: dict[str, Tensor] = {}
        for name in self.process.streams:
            own_target = batch.get(f"{name}_target")
            if own_target is not None:
                beside[name] = (output.extra[name].float() - own_target).square().flatten(1).mean(1)
                per_sample = per_sample + beside[name]
        return per_sample, beside


def _replaced(text: Tensor, dropped: Tensor, empty: Tensor) -> Tensor:
    """A text tensor [B, L, ...] with the empty caption's [1, M, ...] in the rows where dropped [B] is true.

    Lengths that differ are both padded with zeros to the longer one, masks as well as embeddings: a masked
    token more changes no prediction, whereas a token less, or one broadcast along the mask, would.
    """
    empty = empty.to(text.device, text.dtype)
    if text.ndim > 1 and text.shape[1] != empty.shape[1]:
        length = max(text.shape[1], empty.shape[1])
        text, empty = (
            torch.cat([t, t.new_zeros(len(t), length - t.shape[1], *t.shape[2:])], dim=1)
            for t in (text, empty)
        )
    where = dropped.to(text.device).view(-1, *[1] * (text.ndim - 1))
    return torch.where(where, empty, text)


def _misfit(key: str, value: Any, why: str) -> PolymodalError:
    return PolymodalError(
        f"train.diffusion.{key} = {value} does not fit this model, which {why}.",
        f"Leave train.diffusion.{key} out.",
    )
