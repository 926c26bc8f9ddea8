"""A tiny Wan of the real class, its card, and flow matching. Used by tests only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Output
from polymodal.models.family import Family


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
