"""A tiny Whisper of the real class in padded batches, on FSDP2.

Toy pieces of the spike; used by tests only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import IGNORE, Batch
from polymodal.models.card import ModelCard, Output
from polymodal.models.family import Family
from polymodal.objectives.language import LanguageObjective
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

MELS, FRAMES, PAD = 8, 24, 2


class WhisperFamily(Family):
    layout = "padded"

    def stage(self, model: nn.Module, carry: Any, batch: Batch) -> Output:
        # causal and padded on the right: no mask is needed, padding has no weight
        out = model.model(batch["input_features"], decoder_input_ids=batch["input_ids"], use_cache=False)
        return Output(out.last_hidden_state, model.proj_out)


CARD = ModelCard(
    name="whisper",
    family=WhisperFamily,
    architectures=("WhisperForConditionalGeneration",),
    tasks=("automatic-speech-recognition",),
    blocks=("model.encoder.layers.*", "model.decoder.layers.*"),
    towers={"audio": ("model.encoder",), "language": ("model.decoder", "proj_out")},
    head="proj_out",
    limits={"pp": "an encoder and a decoder do not form one line of blocks."},
)


def whisper() -> tuple[nn.Module, WhisperFamily]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50, num_mel_bins=MELS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=FRAMES // 2,
        max_target_positions=20, pad_token_id=PAD, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), WhisperFamily(CARD, config, "whisper")


def _speech(id: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + id)
    ids = torch.randint(3, 50, (length,), generator=draw)
    labels = torch.cat([ids[1:], torch.tensor([1])])
    labels[0] = IGNORE  # a prompt token
    weights = torch.rand(length, generator=draw) * (labels != IGNORE)
    return {
        "input_ids": ids,
        "labels": labels,
        "weights": weights,
        "input_features": torch.randn(MELS, FRAMES, generator=draw).double(),
    }


def padded(ids: tuple[int, ...], lengths: tuple[int, ...]) -> Batch:
    """[B, T] with T the longest; segments["text"] are the rows of the flattened batch."""
    rows, longest = [_speech(id, length) for id, length in zip(ids, lengths, strict=True)], max(lengths)
    filler = {"input_ids": PAD, "labels": IGNORE, "weights": 0.0}
    tensors = {
        name: torch.stack(
            [nn.functional.pad(row[name], (0, longest - len(row[name])), value=value) for row in rows]
        )
        for name, value in filler.items()
    }
    tensors["input_features"] = torch.stack([row["input_features"] for row in rows])
    axes = dict.fromkeys(filler, ("batch", "sequence")) | {"input_features": ("batch", "none", "frame")}
    cu = torch.arange(len(rows) + 1, dtype=torch.int32) * longest
    return Batch(tensors, axes, ids, {"text": cu})


def whisper_fsdp(rank: int, weighting: str) -> dict[str, Any]:
    """Two ranks with different rows, lengths and weights; one process takes every sample alone and unpadded. float64."""
    torch.manual_seed(4)
    model, family = whisper()
    model.double()
    state = state_of(model)
    objective = LanguageObjective(weighting)
    lengths = (5, 11, 3, 16, 7, 4, 9)
    loss, grads = one_process(
        model, family, objective, [padded((id,), (length,)) for id, length in enumerate(lengths)]
    )

    cut = {0: [(0, 1), (2,)], 1: [(3, 4, 5), (6,)]}
    mesh = mesh_of(rank, dp_shard=2)
    bind(model, family)
    shard(model, CARD, mesh)
    fill(model, state)
    batches = [padded(ids, tuple(lengths[id] for id in ids)) for ids in cut[rank]]
    total = forward_backward(model, objective, batches, mesh.loss_group)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    return {
        "loss": abs(total - loss) / loss,
        "grad": worst(gradients(model), grads),
        "share": held / sum(parameter.numel() for parameter in model.parameters()),
    }
