"""Rank functions of the spike: Qwen3-VL with LoRA on PP x FSDP2, a tied Qwen2-VL on PP. Used by tests only."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from polymodal.core.sample import Batch, pack
from polymodal.distributed.mesh import Mesh
from polymodal.models import weights
from polymodal.objectives.language import LanguageObjective
from polymodal.parallel.pipeline import Pipeline, TiedGradients, bind
from polymodal.parallel.pipeline_split import stage_to_rank
from polymodal.parallel.stages import Part, prune
from polymodal.recipe import Parallel
from polymodal.train.step import inverse_weights
from tests.parallel.spike import qwen
from tests.parallel.spike.comparison import (
    fill,
    finisher,
    gradients,
    mesh_of,
    one_process,
    shard,
    state_of,
    worst,
)
from tests.parallel.spike.qwen import example

LANGUAGE = r"model\.language_model\.layers\..*\.(q_proj|v_proj|down_proj)"
BOTH = LANGUAGE + r"|model\.visual\.blocks\..*\.(qkv|linear_fc1)"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def adapt(model: nn.Module, targets: str = LANGUAGE) -> None:
    """LoRA on the layers here that fit; the base frozen."""
    held = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=held)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=next(model.parameters()).is_meta)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def draw_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Values for both halves (with B = 0 half of the gradients would be zero)."""
    draw = torch.Generator().manual_seed(3)
    adapters = sorted((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)
    return {name: (torch.randn(p.shape, generator=draw) * 0.1).to(p.dtype) for name, p in adapters}


def _step(pipeline: Pipeline, mesh: Mesh, batches: list[Batch]) -> float:
    """Forward and backward of this rank's step; returns the global loss (on every rank)."""
    objective = LanguageObjective()
    inverse = inverse_weights(objective, batches, mesh.loss_group)
    logs = pipeline.step(batches, finisher(objective, inverse))
    total = torch.tensor(float(sum(entry["loss"] for entry in logs)), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _line(mesh: Mesh) -> dist.ProcessGroup:
    return mesh.world["pp"].get_group()


def qwen3_lora_pp_fsdp(rank: int, targets: str) -> dict[str, Any]:
    """PP 2 x dp_shard 2, cut 1 + 3, packs of all lengths, with and without pictures; built and initialised on meta."""
    family = qwen.tiny_qwen3_vl()
    model = family.build()
    adapt(model, targets)
    weights.initialise(model, family, seed=0)
    adapters = draw_adapters(model)
    fill(model, adapters)
    short = [
        pack([example(0, 5, (4, 4)), example(1, 4)]),
        pack([example(2, 3, (2, 4)), example(3, 6, (2, 2))]),
        pack([example(4, 7)]),
        pack([example(5, 5, (4, 6)), example(6, 2)]),
    ]
    long = [pack([example(10 + row, 9 + row, (2, 2 + 2 * row)), example(20 + row, 4)]) for row in range(4)]
    steps = (short, long, short)
    expected = [one_process(model, family, LanguageObjective(), batches) for batches in steps]
    names = sorted(name for name, _ in model.named_parameters())

    mesh = mesh_of(rank, pp=2, dp_shard=2)
    cut = family.build()
    stage = prune(cut, family, {"vision": (3, 0), "language": (1, 3)}, mesh.at["pp"])
    adapt(cut, targets)
    bind(cut, family, stage, torch.float32)
    shard(cut, family.card, mesh)
    weights.initialise(cut, family, seed=0)
    fill(cut, adapters)
    pipeline = Pipeline([Part(cut, stage)], family, _line(mesh), torch.device("cpu"), torch.float32)
    out: dict[str, Any] = {"names": sorted(name for name, _ in cut.named_parameters()), "all": names}
    out.update(loss=[], grad=[], trained=sorted(gradients(cut)))
    for batches, (loss, grads) in zip(steps, expected, strict=True):
        found = _step(pipeline, mesh, batches[mesh.dp_rank :: 2])
        out["loss"].append(abs(found - loss) / loss)
        out["grad"].append(worst(gradients(cut), grads))
        cut.zero_grad(set_to_none=True)
    travelling = family.carry_spec(short[0], {"vision": 3, "language": 1}, torch.float32)
    out["carry"] = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in travelling.items()}
    out["lengths"] = [batch["input_ids"].shape[1] for batch in short]
    out["unmoved"] = [name for name, grad in expected[0][1].items() if not float(grad.norm())]
    return out


def qwen2_tied_pp(rank: int, schedule: str = "1F1B", stages: int = 2) -> dict[str, Any]:
    """PP 2 with the head on the last stage tied to the embedding on the first; float64; one optimizer step."""
    parallel = Parallel(pp=2, pp_schedule=schedule, pp_virtual=stages // 2)  # type: ignore[arg-type]
    family = qwen.tiny_qwen2_vl(stages + 1)

    def build() -> nn.Module:
        return family.build().double()

    whole = build()
    weights.initialise(whole, family, seed=1)
    state = state_of(whole)
    batches = [
        pack([example(0, 5, (2, 4)), example(1, 3)]),
        pack([example(2, 8)]),
        pack([example(3, 4, (2, 2)), example(4, 6)]),
        pack([example(5, 3, (4, 2))]),
    ]
    loss, grads = one_process(whole, family, LanguageObjective(), batches)
    expected = {**grads, HEAD: grads[EMBEDDING]}

    mesh = mesh_of(rank, pp=2)
    parts = []
    counts = {"vision": (1, *[0] * (stages - 1)), "language": (2, *[1] * (stages - 1))}
    for index in (at for at in range(stages) if stage_to_rank(parallel, at) == rank):
        model = build()
        stage = prune(model, family, counts, index)
        bind(model, family, stage, torch.float64)
        weights.materialise(model)
        weights.rebuild_buffers(model)
        fill(model, {**state, HEAD: state[EMBEDDING]})
        parts.append(Part(model, stage))
    ties = TiedGradients(parts, mesh, lambda stage: stage_to_rank(parallel, stage))
    pipeline = Pipeline(parts, family, _line(mesh), torch.device("cpu"), torch.float64, schedule)
    found = _step(pipeline, mesh, batches)

    def error() -> float:
        return max(worst(gradients(part.model), expected)[0] for part in parts)

    out: dict[str, Any] = {"loss": abs(found - loss) / loss, "before": error()}
    ties.reduce()
    out.update(grad=error(), copies=[], start=state[EMBEDDING])
    for model, stage in ((part.model, part.stage) for part in parts):
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        if stage.first or stage.last:
            out["copies"].append(model.get_parameter(EMBEDDING if stage.first else HEAD).detach())
    out["unowned"] = sorted(name for part in parts for name in part.stage.copies)
    out["layers"] = [layer for part in parts for layer in part.stage.held["language"]]
    return out
