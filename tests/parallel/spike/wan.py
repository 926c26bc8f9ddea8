"""A tiny Wan of the real class, flow matching, and its cut along the sequence (FSDP2 x Ulysses).

Toy pieces of the spike; used by tests only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh
from polymodal.models.card import Chain, ModelCard, Output
from polymodal.models.family import Family
from polymodal.parallel import dit_context_parallel
from polymodal.train.step import bind
from tests.parallel.spike.comparison import (
    fill,
    forward_backward,
    gradients,
    mesh_of,
    one_process,
    shard,
    state_of,
    worst,
)


class WanFamily(Family):
    layout = "uniform"

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        # the root unit casts nothing, so that timesteps stay float32: activations take the parameters' dtype here
        held = getattr(
            model.patch_embedding, "weight", batch["noisy"]
        )  # elsewhere, in a later pipeline stage
        dtype = held.dtype
        latents, text = batch["noisy"].to(dtype), batch["text"].to(dtype)
        # the class's own forward: the instance's ends in the loss
        (prediction,) = type(model).forward(model, latents, batch["timestep"], text, return_dict=False)
        return Output(prediction)


CARD = ModelCard(
    name="wan",
    family=WanFamily,
    architectures=("WanTransformer3DModel",),
    tasks=("text-to-video",),
    blocks=("blocks.*",),
    towers={"transformer": ("",)},
    pipeline={
        "transformer": Chain(
            "blocks.*",
            first=("patch_embedding", "condition_embedder"),
            last=("norm_out", "proj_out", "scale_shift_table"),
            carry=("condition_embedder",),
        )
    },
    sequence_plan={"rope": {0: 1, 1: 1}, "blocks.0": {"hidden_states": 1}},
    sequence_exit="proj_out",
)


def wan() -> tuple[nn.Module, WanFamily]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32,
        num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    return model, WanFamily(CARD, model.config, "wan")


class FlowMatching:
    """x_s = (1 - s) x + s n, target n - x, one s a sample; mean over a sample's elements, mean over samples."""

    def __init__(self, seed: int):
        self.seed = seed

    def weights(self, batch: Batch) -> dict[str, float]:
        return {"flow": float(len(batch.samples))}

    def prepare(self, actors: Any, batches: Sequence[Batch]) -> list[Batch]:
        """Noise of the full sample from (seed, sample id) alone: the same under every layout, cut only afterwards."""
        out = []
        for batch in batches:
            latents = batch["latents"]
            noise, sigma = torch.empty_like(latents), torch.empty(len(latents))
            for row, sample in enumerate(batch.samples):
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + sample)
                noise[row] = torch.randn(latents[row].shape, generator=draw)
                sigma[row] = torch.rand((), generator=draw)
            mix = sigma.view(-1, 1, 1, 1, 1)
            made = {
                "noisy": (1 - mix) * latents + mix * noise,
                "target": noise - latents,
                "timestep": sigma * 1000,
            }
            out.append(replace(batch, tensors={**batch.tensors, **made}))
        return out

    def loss(
        self, output: Output, batch: Batch, inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = (output.hidden_states.float() - batch["target"]).square().flatten(1).mean(dim=1)
        loss = error.sum() * inverse["flow"]
        return loss, {"loss": loss.detach()}


def cut_sequence(model: nn.Module, card: ModelCard, mesh: Mesh) -> None:
    """Ulysses over the two ranks of cp, as parallel.apply sets it up."""
    dit_context_parallel.apply(model, card, mesh.context(mesh.sizes.cp))


def _batches() -> list[Batch]:
    draw = torch.Generator().manual_seed(5)
    axes = {"latents": ("batch", "none", "frame", "none", "none"), "text": ("batch", "sequence", "none")}
    shapes = [(1, 4, 3, 4, 8), (2, 4, 1, 4, 4), (1, 4, 2, 4, 4), (1, 4, 3, 8, 4)]
    made, count = [], 0
    for shape in shapes:
        tensors = {
            "latents": torch.randn(shape, generator=draw),
            "text": torch.randn(shape[0], 6, 16, generator=draw),
        }
        made.append(Batch(tensors, axes, tuple(range(count, count + shape[0]))))
        count += shape[0]
    return made


def _step(model: nn.Module, mesh: Mesh) -> float:
    """Forward and backward of this rank's share, denominators over the loss group; the global loss."""
    objective = FlowMatching(7)
    mine = objective.prepare(None, _batches()[mesh.dp_rank :: mesh.sizes.dp])
    return forward_backward(model, objective, mine, mesh.loss_group)


def _clock_error(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    clock = {name: grad for name, grad in grads.items() if "time_embedder" in name}
    return worst(clock, {name: expected[name] for name in clock})[0]


def wan_fsdp_ulysses(rank: int) -> dict[str, Any]:
    """dp_shard 2 x cp 2: float32 against one process; then bf16, with timesteps kept and with timesteps rounded."""
    torch.manual_seed(2)
    model, family = wan()
    state = state_of(model)
    objective = FlowMatching(7)
    loss, grads = one_process(model, family, objective, objective.prepare(None, _batches()))

    mesh = mesh_of(rank, dp_shard=2, cp=2)
    bind(model, family)
    cut_sequence(model, CARD, mesh)
    shard(model, CARD, mesh)
    fill(model, state)
    found = _step(model, mesh)
    out = {"loss": abs(found - loss) / loss, "grad": worst(gradients(model), grads)}

    seen: list[Tensor] = []
    for key, rounded in (("kept", False), ("rounded", True)):
        half, _ = wan()
        bind(half, family)
        cut_sequence(half, CARD, mesh)
        clock = half.condition_embedder.timesteps_proj
        if rounded:
            clock.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16).float(),))
        else:
            clock.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        shard(half, CARD, mesh, "bf16")
        fill(half, state)
        out[f"loss_{key}"] = abs(_step(half, mesh) - loss) / loss
        out[f"clock_{key}"] = _clock_error(gradients(half), grads)
    drawn = [batch["timestep"] for batch in objective.prepare(None, _batches()[mesh.dp_rank :: 2])]
    out["timesteps"] = all(
        a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(seen, drawn, strict=True)
    )
    return out
