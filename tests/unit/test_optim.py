"""Learning rates by tower and pattern, schedules as pure functions, freezing, averages, loss scale."""

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.recipe import Group, Optim, Schedule
from polymodal.train import optim
from polymodal.train.optim import LossScaler, MovingAverage, Optimizer, Rate, learning_rate, rate

TOWERS = {
    "vision": ("model.visual",),
    "projector": ("model.visual.merger",),
    "language": ("model.language", "head"),
}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.visual = nn.Module()
        self.model.visual.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.model.visual.merger = nn.Linear(4, 4)
        self.model.language = nn.Module()
        self.model.language.layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.head = nn.Linear(4, 4, bias=False)


def test_a_tower_inside_a_tower_is_its_own():
    assert optim.tower_of("model.visual.merger.weight", TOWERS) == "projector"
    assert optim.tower_of("model.visual.blocks.0.weight", TOWERS) == "vision"
    toy = Toy()
    optim.freeze(toy, ["vision"], TOWERS)
    frozen = [name for name, parameter in toy.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.visual.blocks.0.weight", "model.visual.blocks.0.bias"]
    assert toy.model.visual.merger.weight.requires_grad


def test_freeze_takes_patterns_and_refuses_what_means_nothing():
    toy = Toy()
    optim.freeze(toy, ["*.bias"], TOWERS)
    assert [n for n, p in toy.named_parameters() if not p.requires_grad and not n.endswith("bias")] == []
    with pytest.raises(
        PolymodalError, match="`visoin` is neither a tower of this model .vision, projector, language."
    ):
        optim.freeze(toy, ["visoin"], TOWERS)
    with pytest.raises(PolymodalError, match="leaves nothing to train"):
        optim.freeze(Toy(), ["*"], TOWERS)


def test_rates_first_match_counts_and_vectors_do_not_decay():
    recipe = Optim(
        lr=1.0,
        weight_decay=0.1,
        groups=[Group(match="projector", lr=5.0), Group(match="vision", lr_scale=0.1, weight_decay=0.0)],
    )
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert rate("model.visual.merger.weight", matrix, recipe, TOWERS) == Rate(5.0, 0.1)
    assert rate("model.visual.blocks.0.weight", matrix, recipe, TOWERS) == Rate(0.1, 0.0)
    assert rate("model.language.layers.0.weight", matrix, recipe, TOWERS) == Rate(1.0, 0.1)
    assert rate("model.language.layers.0.bias", vector, recipe, TOWERS) == Rate(1.0, 0.0)


def test_schedules():
    steps = 100
    for name in ("cosine", "linear", "constant", "wsd"):
        schedule = Schedule(name=name, warmup=10, min_ratio=0.1)
        curve = [learning_rate(schedule, s, steps) for s in range(steps)]
        assert curve[:10] == sorted(curve[:10]) and 0 < curve[0] < 0.2 and curve[10] == pytest.approx(1.0)
        assert max(curve) <= 1.0
    assert [learning_rate(Schedule(name="constant", warmup=0), s, steps) for s in (0, 99)] == [1, 1]
    assert learning_rate(Schedule(name="cosine", warmup=0, min_ratio=0.1), 100, steps) == pytest.approx(0.1)
    stable = Schedule(name="wsd", warmup=0, decay=0.2)
    assert learning_rate(stable, 79, steps) == 1 and learning_rate(stable, 90, steps) == pytest.approx(0.5)


def test_groups_reach_the_optimizer_and_follow_the_schedule():
    toy = Toy()
    named = dict(toy.named_parameters())
    optimizer = Optimizer(
        named, Optim(lr=1e-2, weight_decay=0.1, groups=[Group(match="vision", lr=0.0)]), TOWERS
    )
    optimizer.set_rate(0.5)
    before = {n: p.detach().clone() for n, p in named.items()}
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {n: not torch.equal(before[n], p) for n, p in named.items()}
    assert (
        not moved["model.visual.blocks.0.weight"]
        and moved["model.visual.merger.weight"]
        and moved["head.weight"]
    )
    assert {g["lr"] for part in optimizer.parts for g in part.param_groups} == {0.0, 5e-3}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_restores_the_optimizer(name):
    torch.manual_seed(0)
    start = Toy().state_dict()
    gradients = [{n: torch.randn_like(v) for n, v in start.items()} for _ in range(4)]

    def advance(toy, optimizer, which):
        for g in which:
            for n, p in toy.named_parameters():
                p.grad = g[n].clone()
            optimizer.step()

    def fresh():
        toy = Toy()
        toy.load_state_dict(start)
        blocks = {"model.language.layers.0.weight"}
        return toy, Optimizer(dict(toy.named_parameters()), Optim(name=name, lr=1e-2), TOWERS, blocks)

    straight, optimizer = fresh()
    advance(straight, optimizer, gradients)
    first, optimizer = fresh()
    advance(first, optimizer, gradients[:2])
    saved = {k: v.clone() for k, v in optimizer.state().items()}
    kinds = {k.partition(".")[0] for k in saved}
    assert kinds == ({"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if name == "muon" else set()))
    second, optimizer = fresh()
    second.load_state_dict(first.state_dict())
    for key, value in optimizer.state(create=True).items():
        value.copy_(saved[key])
    advance(second, optimizer, gradients[2:])
    for key, value in straight.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=0, atol=0)


def test_moving_average_follows_its_formula():
    toy = Toy().bfloat16()
    average = MovingAverage(dict(toy.named_parameters()), 0.9)
    old = toy.head.weight.detach().float().clone()
    with torch.no_grad():
        toy.head.weight.add_(1.0)
    average.update()
    assert average.shadow["head.weight"].dtype == torch.float32
    torch.testing.assert_close(
        average.shadow["head.weight"], 0.9 * old + 0.1 * toy.head.weight.detach().float()
    )


def test_loss_scale_halves_on_overflow_and_grows_again():
    scaler = LossScaler(True, scale=8.0, growth=2)
    scaler.update(False)
    assert scaler.scale == 4
    scaler.update(True)
    scaler.update(True)
    assert scaler.scale == 8
    other = LossScaler(True)
    other.load(scaler.state())
    assert other.scale == 8
    assert LossScaler(False).scale == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_on_the_host_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optim, "HOST_PART", 100)  # several parts
    after, states = [], []
    for offload in (False, True):
        torch.manual_seed(0)
        toy = Toy()
        optimizer = Optimizer(
            dict(toy.named_parameters()), Optim(name=name), TOWERS, {"head.weight"}, offload=offload
        )
        for step in range(3):
            for parameter in list(toy.parameters())[step > 1 :]:  # one has no gradient in the last step
                parameter.grad = torch.full_like(parameter, 0.1) * (parameter + step)
            optimizer.step()
            assert all(p.grad is not None for p in list(toy.parameters())[step > 1 :])
            optimizer.zero_grad()
        after.append([p.detach().clone() for p in toy.parameters()])
        states.append(optimizer.state())
    torch.testing.assert_close(after[1], after[0], rtol=0, atol=0)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


class Counting(torch.optim.SGD):
    """Keeps a number in its groups, as Prodigy and schedule-free optimizers do."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("torch.optim:Adafactor", {}, "keeps `row_var` of a matrix"),
        ("torch.nn:Linear", {}, "is no torch.optim.Optimizer"),
        ("torch.optim:SGD", {"momentun": 0.9}, "is not given `momentun`"),
        ("torch.optim:SGD", {"lr": 0.9}, "is not given `lr`"),
        ("torch.optim:SGD", {"momentum": -1}, "fails on a matrix: ValueError"),
        (f"{__name__}:Counting", {}, "counts in its groups .k."),
        ("torch.optim:LBFGS", {}, "fails on a matrix"),
    ],
)
def test_a_class_that_cannot_be_resumed_is_refused_with_the_reason(name, arguments, message):
    with pytest.raises(PolymodalError, match=message) as caught:
        optim.named_class(Optim(name=name, arguments=arguments))
    assert caught.value.hint


@pytest.mark.parametrize("name, arguments", [("SGD", {"momentum": 0.9}), ("NAdam", {"betas": [0.8, 0.9]})])
def test_a_named_class_goes_on_from_its_state(name, arguments):
    settings = Optim(name=f"torch.optim:{name}", lr=0.1, arguments=arguments, weight_decay=0.1)

    def steps(toy, made, count):
        for _ in range(count):
            for number, parameter in enumerate(toy.parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
            made.step()
        return [p.detach().clone() for p in toy.parameters()]

    torch.manual_seed(0)
    toy, again = Toy(), Toy()
    made = Optimizer(dict(toy.named_parameters()), settings, TOWERS)
    assert made.parts[0].param_groups[0]["weight_decay"] == 0.1
    steps(toy, made, 2)
    again.load_state_dict(toy.state_dict())
    fresh = Optimizer(dict(again.named_parameters()), settings, TOWERS)
    state, stored = fresh.state(create=True), made.state()
    assert state.keys() == stored.keys() and state
    for key, value in state.items():
        value.copy_(stored[key])
    for one, other in zip(steps(toy, made, 2), steps(again, fresh, 2), strict=True):
        assert torch.equal(one, other)


def test_lora_plus_is_a_group_of_its_b_matrices():
    """Hayou et al. 2024 (arXiv:2402.12354): B learns faster than A."""
    settings = Optim(lr=1e-4, groups=[Group(match="*.lora_B.*", lr_scale=16)])
    matrix = torch.zeros(2, 2)
    assert rate("model.language.q.lora_A.default.weight", matrix, settings, TOWERS).lr == 1e-4
    assert rate("model.language.q.lora_B.default.weight", matrix, settings, TOWERS).lr == pytest.approx(
        1.6e-3
    )
