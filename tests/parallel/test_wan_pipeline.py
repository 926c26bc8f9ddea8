"""Wan's stages are cut from its card's facts alone; its time and text embeddings are sent. Equal to one process."""

from typing import Any

import pytest
import torch

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import weights
from polymodal.recipe import Model, Parallel, Recipe, Train
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import Runner, StepMetrics, forward_backward, inverse_weights
from polymodal.train.step import bind as bind_whole
from tests.parallel.harness import run
from tests.parallel.spike.comparison import fill, state_of, worst
from tests.parallel.spike.wan import CARD, FlowMatching, WanFamily, _batches

CPU = torch.device("cpu")


class TinyWan(WanFamily):
    """The spike's toy of diffusers' class, any number of layers, built on meta in float64."""

    @classmethod
    def make(cls, layers: int) -> "TinyWan":
        settings = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32,
            "ffn_dim": 32, "num_layers": layers, "cross_attn_norm": True, "rope_max_seq_len": 16,
        }  # fmt: skip
        return cls(CARD, settings, "wan")

    def build(self) -> torch.nn.Module:
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            return WanTransformer3DModel(**self.config).double()


class Flow(FlowMatching):
    """In float64: a real difference cannot hide behind rounding."""

    aux_weight = 0.0

    def prepare(self, actors: Any, batches: Any) -> Any:
        made = super().prepare(actors, batches)
        for batch in made:
            for name in ("noisy", "target", "text", "latents"):
                batch.tensors[name] = batch.tensors[name].double()
        return made

    def loss(self, output: Any, batch: Any, inverse: dict[str, float]) -> Any:
        error = (output.hidden_states - batch["target"]).square().flatten(1).mean(dim=1)
        loss = error.sum() * inverse["flow"]
        return loss, {"loss": loss.detach()}


def wan_pp(rank: int, layers: int, parallels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and gradients of each layout against one process, float64."""
    from tests.parallel.exact import float64

    family = TinyWan.make(layers)
    objective = Flow(7)
    torch.manual_seed(2)
    model = family.build().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    tables = _tables(model)
    state = state_of(model)
    bind_whole(model, family)
    out = []
    with float64():
        batches = objective.prepare(None, _batches())
        tally = StepMetrics()
        inverse = inverse_weights(objective, batches, None)
        forward_backward(Runner(model, CPU), objective, batches, inverse, tally)
        loss = tally.total(None)["loss"]
        wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for settings in parallels:
            parallel = Parallel(**settings)
            mesh = Mesh(ParallelSizes.of(parallel, torch.distributed.get_world_size()), "cpu", rank)
            recipe = Recipe(model=Model(source="wan"), parallel=parallel, train=Train(precision="fp32"))
            laid = ParallelModel(lambda: family.build(), family, mesh, recipe, CPU)

            def load(part: torch.nn.Module) -> None:
                weights.materialise(part)
                fill(part, state)
                for name, buffer in tables.items():
                    part.rope.register_buffer(name, buffer, persistent=False)

            laid.load_all(load)
            mine = batches[mesh.dp_rank :: mesh.sizes.dp]
            inverse = inverse_weights(objective, mine, mesh.loss_group)
            tally = StepMetrics()
            forward_backward(laid.runner, objective, mine, inverse, tally)
            found = {n: _whole(p.grad) for n, p in laid.owned.items() if p.grad is not None}
            cut = laid.parts[0].stage.cuts[0]
            carry = family.carry_spec(mine[0], cut, torch.float64)
            tally_loss = tally.total(mesh.log_group)["loss"]
            out.append({
                "loss": abs(tally_loss - loss) / loss, "grad": worst(found, wanted)[0], "names": sorted(found),
                "carry": {name: tuple(tensor.shape) for name, tensor in carry.items()},
                "held": [list(part.stage.held["transformer"]) for part in laid.parts],
                "memory": sum(p.numel() for m in laid.models for p in m.parameters()),
            })  # fmt: skip
    return [*out, {"names": sorted(wanted)}]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _tables(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The rotary tables that meta tensors lost, made anew by their own class."""
    rope = model.rope
    made = dict(type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).named_buffers())
    for name, buffer in made.items():
        rope.register_buffer(name, buffer, persistent=False)
    return made


UNEVEN = {"pp": 2, "pp_layers": {"transformer": [1, 3]}}
VIRTUAL = {"pp": 2, "pp_schedule": "Interleaved1F1B", "pp_layers": {"transformer": [[1, 0], [2, 1]]}}
ZERO_BUBBLE = {"pp": 2, "pp_schedule": "ZBVZeroBubble"}


def _check(ranks: list[list[dict[str, Any]]]) -> None:
    for results in zip(*(found[:-1] for found in ranks), strict=True):
        for result in results:
            assert result["loss"] < 1e-9 and result["grad"] < 1e-9, result
        names = set().union(*(set(result["names"]) for result in results))
        assert names == set(ranks[0][-1]["names"]), "every trained parameter has a gradient on some stage"


def test_wan_is_cut_from_its_card_alone():
    ranks = run(
        2, wan_pp, 4, [UNEVEN, {**VIRTUAL, "pp_layers": {"transformer": [[1, 1], [1, 1]]}}, ZERO_BUBBLE]
    )
    _check(ranks)
    assert [rank[0]["held"] for rank in ranks] == [[[0]], [[1, 2, 3]]]
    carry = ranks[0][0]["carry"]
    assert set(carry) == {"hidden_states", *(f"condition_embedder.{i}" for i in range(3))}
    assert carry["hidden_states"] == (1, 24, 24) and carry["condition_embedder.2"] == (1, 6, 24)


@pytest.mark.slow
def test_wan_on_pipeline_and_fsdp():
    _check(run(4, wan_pp, 4, [UNEVEN, ZERO_BUBBLE, {"pp": 2, "dp_replicate": 2}, {"pp": 4}]))
