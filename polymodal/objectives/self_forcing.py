"""Losses of Self-Forcing: a causal video model learns from its own rollouts.

Formulas: the Self-Forcing paper (arXiv 2506.08009) and its public code (Apache-2.0). Three nets: the
generator (causal), the real score (frozen) and the fake score (learns the generator's distribution). All
predict the flow v = noise - x0 on x_s = (1 - s) x0 + s noise. Latents are [B, C, F, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]  # (x, timestep [B]) -> flow
STEPS = (1000, 750, 500, 250)  # before the shift


def levels(shift: float = 5.0, count: int = 1000) -> Tensor:
    """Noise levels s [count], float32, from 1 down; a timestep is 1000 s. There is no level 0: the last is
    0.005."""
    u = torch.linspace(1, 0, count + 1)[:-1]
    return shift * u / (1 + (shift - 1) * u)


def level(timestep: Tensor, table: Tensor) -> Tensor:
    """The table's level nearest to each timestep, of the same shape."""
    table = table.to(timestep.device)
    return table[(table * 1000 - timestep[..., None]).abs().argmin(-1)]


def _wide(s: Tensor, x: Tensor) -> Tensor:
    """Levels [B] or [B, F], to multiply [B, C, F, H, W]."""
    return s[:, None, None, None, None] if s.dim() == 1 else s[:, None, :, None, None]


def add_noise(x: Tensor, noise: Tensor, timestep: Tensor, table: Tensor) -> Tensor:
    s = _wide(level(timestep, table), x).double()
    return ((1 - s) * x.double() + s * noise.double()).to(x.dtype)


def clean(flow: Tensor, x: Tensor, timestep: Tensor, table: Tensor) -> Tensor:
    """x0 of a predicted flow, computed in double precision."""
    return (x.double() - _wide(level(timestep, table), x).double() * flow.double()).to(flow.dtype)


def shifted_steps(table: Tensor, steps: Sequence[int] = STEPS) -> list[float]:
    """Timesteps of the step list after the table's shift: 1000, 937.5, 833.3, 625 at shift 5."""
    return [float(table[1000 - step]) * 1000 for step in steps]


def rollout(
    generator: Any,
    noise: Tensor,
    context: Tensor,
    exit_step: int,
    fresh: Callable[[Tensor], Tensor],
    table: Tensor,
    steps: Sequence[int] = STEPS,
) -> Tensor:
    """Clips x0 of the generator, block by block with a cache; gradients come through one step of each block
    alone.

    generator: a `CausalWanTransformer`. exit_step: index in `steps` of the step whose x0 is the block's
    output, alike on all ranks. fresh(x): noise like x. The cache's entries of a block are of its output at
    timestep 0, noised to the table's last level, as published.
    """
    size, times = generator.config.num_frame_per_block, shifted_steps(table, steps)
    past: list[tuple[Tensor, Tensor]] | None = None
    blocks = []
    for start in range(0, noise.shape[2], size):
        x = noise[:, :, start : start + size]
        at = x.new_tensor(times)[:, None, None].expand(-1, len(x), x.shape[2])
        with torch.no_grad():
            for step in range(exit_step):
                flow = generator(x, at[step], context, past=past, return_dict=False)[0]
                x0 = clean(flow, x, at[step], table)
                x = add_noise(x0, fresh(x0), at[step + 1], table)
        flow = generator(x, at[exit_step], context, past=past, return_dict=False)[0]
        blocks.append(clean(flow, x, at[exit_step], table))
        with torch.no_grad():
            done, zero = blocks[-1].detach(), torch.zeros_like(at[0])
            written: list[tuple[Tensor, Tensor]] = []
            generator(add_noise(done, fresh(done), zero, table), zero, context, past=past, written=written)
            past = written
    return torch.cat(blocks, dim=2)


def training_timestep(
    drawn: Tensor, shift: float = 5.0, lowest: float = 20.0, highest: float = 980.0
) -> Tensor:
    """Timesteps [B] of uniform draws 0..999."""
    u = drawn.float() / 1000
    return (shift * u / (1 + (shift - 1) * u) * 1000).clamp(lowest, highest)


def distribution_matching(
    x: Tensor,
    noise: Tensor,
    timestep: Tensor,
    fake: Score,
    real: Score,
    real_without_text: Score,
    table: Tensor,
    guidance: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """The generator's loss on its clips x, and the gradient before its division by the number of elements.

    Real: c + guidance (c - u). The gradient is (fake - real) / mean |x - real| of each sample; NaN counts as
    0.
    """
    with torch.no_grad():
        noised = add_noise(x, noise, timestep, table)
        of_fake, c, u = (
            clean(score(noised, timestep), noised, timestep, table)
            for score in (fake, real, real_without_text)
        )
        of_real = c + guidance * (c - u)
        scale = (x - of_real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        gradient = torch.nan_to_num((of_fake - of_real) / scale)
    target = (x.double() - gradient.double()).detach()
    return 0.5 * (x.double() - target).square().mean(), gradient


def critic(x: Tensor, noise: Tensor, timestep: Tensor, fake: Score, table: Tensor) -> Tensor:
    """The fake score's flow-matching loss on the generator's clips x, which get no gradient."""
    x = x.detach()
    flow = fake(add_noise(x, noise, timestep, table), timestep)
    return (flow - (noise - x)).square().mean()


def ode_regression(
    generator: Any,
    states: Tensor,
    index: Tensor,
    context: Tensor,
    table: Tensor,
    steps: Sequence[int] = STEPS,
) -> Tensor:
    """Mean square error of x0 from a teacher's states.

    states [B, K, C, F, H, W] at the steps and, last, the clean clip. index [B, F]: whose state each frame is
    given, alike within a block; frames at timestep 0 (the last state) do not count.
    """
    at = states.new_tensor([*shifted_steps(table, steps), 0.0])[index]
    pick = index[:, None, None, :, None, None].expand(-1, 1, states.shape[2], -1, *states.shape[4:])
    x = states.gather(1, pick)[:, 0]
    found = clean(generator(x, at, context, return_dict=False)[0], x, at, table)
    counted = (at != 0)[:, None, :, None, None].expand_as(found)
    return (found - states[:, -1])[counted].square().mean()
