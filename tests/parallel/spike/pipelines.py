"""Rank functions of the spike: Qwen3-VL with LoRA on PP x FSDP2, a tied Qwen2-VL on PP. Used by tests only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from polymodal.data.sample import Batch
from polymodal.objectives.language import LanguageObjective
from polymodal.parallel.mesh import Mesh
from polymodal.parallel.pipeline import Stage, TiedGradients, bind, build_schedule, prune, run
from polymodal.train.step import inverse_weights
from tests.parallel.spike import qwen
from tests.parallel.spike.comparison import fill, finisher, gradients, mesh_of, one_process, shard, state_of, worst


def adapt(model: nn.Module) -> None:
    """LoRA on the language blocks; the base frozen; B not zero, so that every adapter has a gradient."""
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model\.layers.*\.(q_proj|v_proj|down_proj)"), model
    )
    draw = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def _run_pipeline(
    model: nn.Module, family: Any, mesh: Mesh, stage: Stage, batches: list[Batch], dtype: torch.dtype, schedule: str = "1F1B"
) -> float:
    """Forward and backward of this rank's step; returns the global loss (on every rank)."""
    objective = LanguageObjective()
    inverse = inverse_weights(objective, batches, mesh.loss_group)

    def carry(layer: int):
        return family.carry_spec(batches[0], layer, dtype)

    pipeline = build_schedule(
        [(model, stage)], carry, len(batches), mesh.world["pp"].get_group(), torch.device("cpu"), schedule
    )
    logs = run(pipeline, batches, finisher(objective, inverse))
    total = torch.tensor(float(sum(entry["loss"] for entry in logs)), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def qwen3_lora_pp_fsdp(rank: int) -> dict[str, Any]:
    """PP 2 x dp_shard 2, unevenly cut, one text-only pack; two lengths of pack one after the other."""
    torch.manual_seed(0)
    model, family = qwen.qwen3_vl()
    adapt(model)
    state = state_of(model)
    steps = []
    for tokens, answer in ((32, 5), (48, 9)):
        samples = [
            [qwen.example(0, 10, answer, (4, 4)), qwen.example(1, 11, 4)],
            [qwen.example(2, 12, answer - 2, (2, 4)), qwen.example(3, 13, 6, (2, 2))],
            [qwen.example(4, 14, 7)],
            [qwen.example(5, 15, answer, (4, 6))],
        ]
        steps.append([qwen.padded(pack, tokens, 24) for pack in samples])
    expected = [one_process(model, family, LanguageObjective(), batches) for batches in steps]

    mesh = mesh_of(rank, pp=2, dp_shard=2)
    cut, _ = qwen.qwen3_vl()
    stage = prune(cut, family.card, mesh.at["pp"], 2, [1, 3])
    adapt(cut)
    bind(cut, family, () if stage.first else tuple(family.carry_spec(steps[0][0], stage.layers.start, torch.float32)))
    shard(cut, family.card, mesh)
    fill(cut, state)
    out: dict[str, Any] = {"names": sorted(name for name, _ in cut.named_parameters()), "all": sorted(state)}
    for batches, (loss, grads) in zip(steps, expected, strict=True):
        mine = batches[mesh.dp_rank :: 2]
        found = _run_pipeline(cut, family, mesh, stage, mine, torch.float32)
        out.setdefault("loss", []).append(abs(found - loss) / loss)
        out.setdefault("grad", []).append(worst(gradients(cut), grads))
        cut.zero_grad(set_to_none=True)
    travelling = family.carry_spec(steps[0][0], 1, torch.float32)
    out["carry"] = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in travelling.items()}
    out["trained"] = len(gradients(cut))
    return out


def qwen2_tied_pp(rank: int, schedule: str = "1F1B") -> dict[str, Any]:
    """PP 2 with the head on the last stage tied to the embedding on the first; float64; one optimizer step."""
    torch.manual_seed(1)
    model, family = qwen.qwen2_vl()
    model.double()
    state = state_of(model)
    batches = [
        qwen.padded([qwen.example(0, 20, 5, (2, 4)), qwen.example(1, 21, 3)], 24, 8),
        qwen.padded([qwen.example(2, 22, 8)], 24, 8),
        qwen.padded([qwen.example(3, 23, 4, (2, 2)), qwen.example(4, 24, 6)], 24, 8),
    ]
    loss, grads = one_process(model, family, LanguageObjective(), batches)
    mesh = mesh_of(rank, pp=2)
    stage = prune(model, family.card, rank, 2)
    bind(model, family, () if stage.first else tuple(family.carry_spec(batches[0], stage.layers.start, torch.float64)))
    ties = TiedGradients(model, stage, mesh)
    found = _run_pipeline(model, family, mesh, stage, batches, torch.float64, schedule)
    head, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    expected = {**grads, head: grads[embedding]}
    alone = worst(gradients(model), expected)
    ties.reduce()
    out = {"loss": abs(found - loss) / loss, "before": alone, "grad": worst(gradients(model), expected)}
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    weight = model.get_parameter(embedding if stage.first else head).detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight)
    out.update(apart=float((both[0] - both[1]).abs().max()), moved=float((weight - state[embedding]).abs().max()))
    out.update(copies=sorted(stage.copies), tied=stage.tied, layers=list(stage.layers))
    return out
