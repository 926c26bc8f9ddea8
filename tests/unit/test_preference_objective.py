"""Every preference loss equals its definition, written out in float64 over whole log-softmax; its gradient autograd's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Sample, SampleLengths, pack
from polymodal.models.card import Output
from polymodal.objectives.preference import LOSSES, PreferenceObjective
from polymodal.recipe import Preference, Recipe
from polymodal.train.layouts import Layout
from polymodal.train.layouts.packed import Packed
from tests.bounds import EXACT

V, D = 31, 10
BETA, SMOOTH, GAMMA = 0.3, 0.2, 0.7


def sequence(seed: int, length: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) of a sequence whose last `answer` tokens are learned."""
    ids = torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed))
    labels = torch.full((length,), IGNORE)
    labels[length - answer - 1 : -1] = ids[length - answer :]
    return ids, labels


def sample(number: int, parts: list[tuple[int, int]], pairs) -> Sample:
    made = [sequence(100 * number + n, length, answer) for n, (length, answer) in enumerate(parts)]
    labels = torch.cat([labels for _, labels in made])
    tensors = {
        "input_ids": torch.cat([ids for ids, _ in made]),
        "labels": labels,
        "weights": (labels != IGNORE).float(),
        "position_ids": torch.cat([torch.arange(length) for length, _ in parts])[None],
    }
    lengths = tuple(length for length, _ in parts)
    measure = SampleLengths(sum(lengths), int((labels != IGNORE).sum()))
    return Sample(number, tensors, measure, sequences=lengths, pairs=pairs)


PAIRS = [
    sample(1, [(9, 3), (12, 5)], ((0, 1, 1.0),)),
    sample(2, [(7, 2), (6, 1), (10, 4)], ((0, 1, 1.0), (0, 2, 2.0), (1, 2, 1.0))),  # all of three answers
    sample(3, [(11, 6), (8, 3)], ((1, 0, 0.5),)),
]
ALONE = [sample(4, [(9, 3)], ((0, 0, 1.0),)), sample(5, [(8, 4)], ((0, 0, -1.0),)), sample(6, [(7, 2)], ((0, 0, 1.0),))]  # fmt: skip
EMBED = nn.Embedding(V, D, dtype=torch.float64)
HEAD = nn.Linear(D, V, bias=False, dtype=torch.float64)
with torch.no_grad():
    for _number, _parameter in enumerate((EMBED.weight, HEAD.weight)):
        _parameter.copy_(
            torch.randn(V, D, dtype=torch.float64, generator=torch.Generator().manual_seed(_number))
        )


def log_probs(samples: list[Sample]) -> list[list[tuple[torch.Tensor, int]]]:
    """Of each sample's sequences (sum of the answer's log-probabilities, its tokens), by whole log-softmax."""
    out = []
    for each in samples:
        cut = [t.split(each.sequences) for t in (each.tensors["input_ids"], each.tensors["labels"])]
        own = []
        for ids, labels in zip(*cut, strict=True):
            rows = HEAD(EMBED(ids)).log_softmax(-1)
            places = (labels != IGNORE).nonzero()[:, 0]
            own.append((rows[places, labels[places]].sum(), len(places)))
        out.append(own)
    return out


def references(samples: list[Sample]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return [-8 * torch.rand(len(s.sequences), dtype=torch.float64, generator=draw).abs() - 1 for s in samples]


def sig(x):
    return 1 / (1 + torch.exp(-x))


def defined(name: str, c, r, fc, fr, n, m):
    """The definition: log-probabilities c, r of chosen and rejected, of the reference fc, fr, lengths n, m."""
    odds = lambda mean: torch.log(torch.exp(mean) / (1 - torch.exp(mean)))  # noqa: E731
    d, norm = BETA * ((c - fc) - (r - fr)), (c - fc) / n - (r - fr) / m
    plain, swapped = -torch.log(sig(d)), -torch.log(sig(-d))
    return {
        "sigmoid": (1 - SMOOTH) * plain + SMOOTH * swapped,
        "robust": ((1 - SMOOTH) * plain - SMOOTH * swapped) / (1 - 2 * SMOOTH),
        "hinge": torch.clamp(1 - d, min=0),
        "ipo": (norm - 1 / (2 * BETA)) ** 2,
        "sigmoid_norm": -torch.log(sig(BETA * norm)),
        "apo_zero": 1 - sig(BETA * (c - fc)) + sig(BETA * (r - fr)),
        "apo_down": sig(BETA * (c - fc)) + 1 - sig(d),
        "bco_pair": -torch.log(sig(BETA * (c - fc))) - torch.log(sig(-BETA * (r - fr))),
        "simpo": -torch.log(sig(BETA * (c / n - r / m) - GAMMA)),
        "orpo": -c / n - BETA * torch.log(sig(odds(c / n) - odds(r / m))),
        "sft": -c / n,
    }[name]


def step(objective: PreferenceObjective, packs, **groups):
    """Loss, gradients and figures of a step, and of the step without gradients."""
    batches = [pack(samples) for samples in packs]
    at = 0
    for batch, samples in zip(batches, packs, strict=True):
        known = references([s for p in packs for s in p])[at : at + len(samples)]
        batch.groups |= {"reference": torch.cat(known), **groups}
        at += len(samples)
    inverse = {"pairs": 1 / sum(objective.weights(b)["pairs"] for b in batches)}
    for p in (EMBED.weight, HEAD.weight):
        p.grad = None
    loss, total, still = 0.0, dict.fromkeys(objective.keys, 0.0), 0.0
    for batch in batches:
        part, logs = objective.loss(Output(EMBED(batch["input_ids"]), HEAD), batch, inverse)
        part.backward()
        loss += part.item()
        total = {
            key: value + float(torch.as_tensor(logs.get(key, 0.0)).detach()) for key, value in total.items()
        }
        with torch.no_grad():
            still += objective.loss(Output(EMBED(batch["input_ids"]), HEAD), batch, inverse)[0].item()
    assert still == pytest.approx(loss, rel=EXACT)
    return loss, EMBED.weight.grad.clone(), HEAD.weight.grad.clone(), objective.shown(total)


def settings(names) -> Preference:
    smooth = SMOOTH if {"sigmoid", "robust"} & set(names) else 0.0
    return Preference(beta=BETA, label_smoothing=smooth, gamma=GAMMA)


@pytest.mark.parametrize(
    "losses", [*({n: 1.0} for n in LOSSES), {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}]
)
def test_loss_and_gradient_are_the_definition(losses):
    objective = PreferenceObjective(losses, settings(losses))
    found = step(objective, [PAIRS[:2], PAIRS[2:]])
    for p in (EMBED.weight, HEAD.weight):
        p.grad = None
    values = []
    for each, own, known in zip(PAIRS, log_probs(PAIRS), references(PAIRS), strict=True):
        for a, b, _ in each.pairs:
            (c, n), (r, m) = own[a], own[b]
            values.append(sum(w * defined(k, c, r, known[a], known[b], n, m) for k, w in losses.items()))
    assert len(values) == 5
    loss = torch.stack(values).mean()
    loss.backward()
    assert found[0] == pytest.approx(loss.item(), rel=EXACT)
    torch.testing.assert_close(found[1], EMBED.weight.grad, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found[2], HEAD.weight.grad, rtol=EXACT, atol=EXACT)
    again = step(objective, [PAIRS[:1], PAIRS[1:2], PAIRS[2:]])
    assert again[0] == pytest.approx(found[0], rel=EXACT)
    torch.testing.assert_close(again[2], found[2], rtol=EXACT, atol=EXACT)


def test_figures_are_means_over_pairs():
    objective = PreferenceObjective({"sigmoid": 1.0}, Preference(beta=BETA))
    shown = step(objective, [PAIRS])[3]
    rewards, wins, kl = [], [], []
    for each, own, known in zip(PAIRS, log_probs(PAIRS), references(PAIRS), strict=True):
        for a, b, _ in each.pairs:
            pair = [BETA * (own[n][0] - known[n]).item() for n in (a, b)]
            rewards.append(pair)
            wins.append(pair[0] > pair[1])
            for n in (a, b):
                gap = ((known[n] - own[n][0]) / own[n][1]).item()
                kl.append(math.exp(gap) - 1 - gap)
    chosen, rejected = (sum(column) / 5 for column in zip(*rewards, strict=True))
    assert shown["rewards/chosen"] == pytest.approx(chosen, rel=EXACT)
    assert shown["rewards/rejected"] == pytest.approx(rejected, rel=EXACT)
    assert shown["rewards/margin"] == pytest.approx(chosen - rejected, rel=EXACT)
    assert shown["rewards/accuracy"] == sum(wins) / 5
    assert shown["kl"] == pytest.approx(sum(kl) / 10, rel=EXACT)
    assert shown["lengths/chosen"] == (3 + 2 + 2 + 1 + 3) / 5


def test_kto_is_the_definition():
    made = Preference(beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    objective, z = PreferenceObjective({"kto": 1.0}, made), 0.4
    found = step(objective, [ALONE[:2], ALONE[2:]], divergence=z)
    for p in (EMBED.weight, HEAD.weight):
        p.grad = None
    values = []
    for each, own, known in zip(ALONE, log_probs(ALONE), references(ALONE), strict=True):
        gain, good = own[0][0] - known[0], each.pairs[0][2] > 0
        values.append(1.5 * (1 - sig(BETA * (gain - z))) if good else 0.5 * (1 - sig(BETA * (z - gain))))
    loss = torch.stack(values).mean()
    loss.backward()
    assert found[0] == pytest.approx(loss.item(), rel=EXACT)
    torch.testing.assert_close(found[1], EMBED.weight.grad, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found[2], HEAD.weight.grad, rtol=EXACT, atol=EXACT)
    assert found[3]["kl"] == pytest.approx(z)


class _Actors:
    """Log-probabilities by segment, as numbers that tell where they come from."""

    def policy(self, batches):
        return [100.0 * b["input_ids"][0, b.segments["text"][:-1].long()].double() for b in batches]

    def reference(self, batches):
        return [b["input_ids"][0, b.segments["text"][:-1].long()].double() for b in batches]

    def mean(self, total):
        return float(total[0] / total[1])


def test_kto_estimates_divergence_from_mismatched_answers():
    """groups["divergence"] is the mean gain of the second sequences; these then leave the batch."""
    samples = [sample(n, [(9, 3), (7, 2)], ((0, 1, 1.0),)) for n in (1, 2, 3)]
    objective = PreferenceObjective({"kto": 1.0}, Preference())
    first, second = objective.prepare(_Actors(), [pack(samples[:2]), pack(samples[2:])])
    heads = [float(s.tensors["input_ids"][9]) for s in samples]
    assert first.groups["divergence"] == second.groups["divergence"] == pytest.approx(99 * sum(heads) / 3)
    assert first["input_ids"].shape == (1, 18) and second["input_ids"].shape == (1, 9)
    assert first.groups["reference"].tolist() == [float(s.tensors["input_ids"][0]) for s in samples[:2]]
    assert objective.weights(first) == {"pairs": 2.0}


def recipe(train: dict, **more) -> Recipe:
    return Recipe.model_validate({"model": {"source": "x"}, "train": {"objective": "dpo", **train}, **more})


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (recipe({"preference": {"gamma": 1, "loss": "ipo"}}), "gamma is for simpo"),
        (recipe({"preference": {"label_smoothing": 0.1, "loss": "ipo"}}), "label_smoothing is for sigmoid and robust"),
        (recipe({"preference": {"loss": "simpo", "reference": "a"}}), "uses no reference"),
        (recipe({"preference": {"desirable_weight": 2}}), "are for kto"),
        (recipe({"preference": {"loss": {}}}), "names no loss"),
        (recipe({"objective": "kto", "preference": {"loss": "ipo"}}), "loss is for pairs"),
        (recipe({}, parallel={"pp": 2}), "hold the whole model"),
        (recipe({"loss": "per_sample"}), "weighting of next-token loss"),
        (recipe({}, data={"train_on": "all"}), "compared alone"),
        (recipe({}, data={"overlong": "split"}), "cannot be split"),
        (recipe({}, model={"source": "x", "lora": {"dropout": 0.1}}), "noise"),
        (recipe({"objective": None, "preference": {"beta": 1}}), "is for train.objective dpo, kto and diffusion_dpo"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused(made, says):
    with pytest.raises(PolymodalError, match=says) as error:
        _ = Layout.objective.func(Packed(made, None))
    assert error.value.hint
