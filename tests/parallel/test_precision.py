"""Half precision: float32 masters and reductions, float32 rotary tables, and one result on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.parallel.apply import apply
from polymodal.recipe import Model, Parallel, Recipe, Train
from polymodal.train.step import bind
from tests.models import tiny
from tests.parallel import dits
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, batches, build, error, measure

BF16 = Layout("bf16", 1, precision="bf16")


def _measured(rank: int, directory: str, layout: Layout):
    return measure(directory, layout, torch.float32, rank, steps=2)


def test_bf16_is_the_same_on_any_number_of_ranks(tmp_path):
    source = str(tiny.checkpoint("qwen2.5-vl", tmp_path))
    one = run(1, _measured, source, BF16)[0]
    plain = run(1, _measured, source, Layout("fp32", 1))[0]
    two = run(2, _measured, source, Layout("bf16 x 2", 2, precision="bf16"))[0]
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert error(two.gradients, one.gradients)[0] < 1e-5  # sums of the same bf16 gradients, in float32
    assert error(two.weights, one.weights)[0] < 1e-4
    assert one.loss == pytest.approx(plain.loss, rel=1e-2) and one.loss != plain.loss


def _each(rank: int, directory: str) -> dict[str, Any]:
    return {
        precision: measure(directory, Layout(precision, 1, precision=precision), torch.float32, rank, steps=1)
        for precision in ("fp32", "bf16", "fp16", "pure_bf16")
    }


@pytest.mark.parametrize("name", (*tiny.NAMES, "glm4.5v"))
def test_every_card_computes_in_every_precision(tmp_path, name):
    """The loss within a hundredth of float32's; all gradients are there, finite, and point the same way."""
    found = run(1, _each, str(tiny.checkpoint(name, tmp_path, tied=name == "qwen2-vl")))[0]
    want = torch.cat([g.flatten() for g in found["fp32"].gradients.values()])
    for precision in ("bf16", "fp16", "pure_bf16"):
        got = found[precision]
        assert got.gradients.keys() == found["fp32"].gradients.keys()
        assert got.loss == pytest.approx(found["fp32"].loss, rel=1e-2) and got.loss != found["fp32"].loss
        gradients = torch.cat([g.float().flatten() for g in got.gradients.values()])
        assert gradients.isfinite().all() and torch.cosine_similarity(gradients, want, 0) > 0.98, precision


def _dtypes(
    rank: int, directory: str, precision: str, frozen: tuple[str, ...]
) -> dict[str, set[torch.dtype]]:
    recipe = Recipe(model=Model(source=directory), train=Train(precision=precision))  # type: ignore[arg-type]
    family = catalog.family(recipe.model)
    model = build(family, Layout("", 2, frozen=frozen), torch.float32)
    bind(model, family)
    apply(model, family.card, Mesh(ParallelSizes.of(Parallel(), 2), "cpu", rank), recipe)
    weights.load(model, family)
    seen: dict[str, set[torch.dtype]] = {}

    def watch(kind):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(f"{kind} activations", set()).add(hidden.dtype)
            seen.setdefault(f"{kind} tables", set()).update(t.dtype for t in kwargs["position_embeddings"])
            seen.setdefault(f"{kind} parameters", set()).update(p.dtype for p in module.parameters())

        return hook

    inner = model.model
    inner.visual.blocks[0].register_forward_pre_hook(watch("vision"), with_kwargs=True)
    inner.language_model.layers[0].register_forward_pre_hook(watch("text"), with_kwargs=True)
    batch = batches(family)[0]
    model(batch, lambda output, batch: output.hidden_states.float().square().sum()).backward()
    seen["masters"] = {p.dtype for p in model.parameters() if p.requires_grad}
    seen["frozen"] = {p.dtype for p in model.parameters() if not p.requires_grad}
    seen["gradients"] = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    seen["buffers"] = {b.dtype for name, b in model.named_buffers() if "inv_freq" in name}
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 8  # 4 + 3 blocks and the root
    return seen


@pytest.mark.parametrize(
    "precision, compute, master",
    [
        ("bf16", torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float32),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_is_kept_in_which_precision(tmp_path, precision, compute, master):
    source = str(tiny.checkpoint("qwen2.5-vl", tmp_path))
    seen = run(2, _dtypes, source, precision, ("model.visual.patch_embed",))[0]
    assert seen["vision activations"] == seen["text activations"] == {compute}
    assert seen["vision parameters"] == seen["text parameters"] == {compute}
    assert seen["vision tables"] == {torch.float32}  # the text's are rounded by the library itself
    assert seen["masters"] == seen["gradients"] == {master}
    assert seen["frozen"] == {compute}
    assert seen["buffers"] == {torch.float32}


def _timesteps(rank: int, directory: str) -> tuple[torch.Tensor, torch.Tensor]:
    recipe = Recipe(model=Model(source=directory), train=Train(precision="bf16"))
    family = catalog.family(recipe.model)
    model = build(family, BF16, torch.float32)
    bind(model, family)
    apply(model, family.card, Mesh(ParallelSizes.of(Parallel(), 2), "cpu", rank), recipe)
    weights.load(model, family)
    seen: list[torch.Tensor] = []
    model.condition_embedder.timesteps_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = dits.batches(directory, family, torch.float32)[0]
    model(batch, lambda output, batch: output.hidden_states.float().square().sum())
    return seen[0], batch["timestep"]


def test_timesteps_of_a_denoiser_are_not_rounded(tmp_path):
    source = dits.pipeline("wan", tmp_path / "wan")
    for embedded, drawn in run(2, _timesteps, str(source)):
        assert embedded.dtype == torch.float32 and torch.equal(embedded, drawn)
        assert not torch.equal(drawn, drawn.bfloat16().float()), "rounding would be seen here"
