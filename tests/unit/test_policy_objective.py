"""Every variant of grpo equals its definition, written out token by token in float64 over whole log-softmax; its
gradient is autograd's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Sample, SampleLengths, pack
from polymodal.models.card import Output
from polymodal.objectives.policy import PolicyObjective, Rollout, advantages, equal_groups, overlong
from polymodal.recipe import Grpo, Recipe, Reward
from polymodal.train.layouts.packed import Packed
from tests.bounds import EXACT

V, D, LONGEST = 31, 10, 6
LENGTHS = [[3, 5, 1], [2, 6], [4, 4, 4]]  # tokens of the answers of each group
REWARDS = [[1.0, 0.0, 0.5], [0.0, 2.0], [1.0, 1.0, 1.0]]
DRAW = torch.Generator().manual_seed(3)
EMBED = nn.Embedding(V, D, dtype=torch.float64)
HEAD = nn.Linear(D, V, bias=False, dtype=torch.float64)
with torch.no_grad():
    for _parameter in (EMBED.weight, HEAD.weight):
        _parameter.copy_(torch.randn(V, D, dtype=torch.float64, generator=DRAW))


def sample(number: int, answers: list[int]) -> Sample:
    ids, labels, positions, lengths = [], [], [], []
    for count in answers:
        own = torch.randint(0, V, (4 + count,), generator=DRAW)
        label = torch.full((4 + count,), IGNORE)
        label[3:-1] = own[4:]
        ids.append(own)
        labels.append(label)
        positions.append(torch.arange(4 + count))
        lengths.append(4 + count)
    tensors = {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        "weights": (torch.cat(labels) != IGNORE).double(),
        "position_ids": torch.cat(positions)[None],
    }
    return Sample(number, tensors, SampleLengths(sum(lengths), sum(answers)), sequences=tuple(lengths))


SAMPLES = [sample(n, lengths) for n, lengths in enumerate(LENGTHS)]


def drifted(seed: int, spread: float) -> list[torch.Tensor]:
    """Of each sample's tokens, log-probabilities near the model's own."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for each in SAMPLES:
        labels = each.tensors["labels"]
        with torch.no_grad():
            rows = HEAD(EMBED(each.tensors["input_ids"])).log_softmax(-1)
        own = rows.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        out.append(own + spread * torch.randn(len(labels), dtype=torch.float64, generator=draw))
    return out


OLD, REFERENCE = drifted(1, 0.5), drifted(2, 0.3)


class _Actors:
    """Answers and log-probabilities that are known; cut: of which samples a batch consists."""

    def __init__(self, cut: list[list[int]], finished: bool = True):
        self.cut, self.finished = cut, finished

    def rollout(self, batches, greedy):
        out = []
        for batch, numbers in zip(batches, self.cut, strict=True):
            total = torch.tensor([r for n in numbers for r in REWARDS[n]], dtype=torch.float64)
            lengths = torch.tensor([length for n in numbers for length in LENGTHS[n]])
            finished = torch.tensor([self.finished or length < 6 for length in lengths.tolist()])
            sampled = torch.cat([OLD[n] for n in numbers])
            none = torch.zeros(len(total), 1, dtype=torch.bool)
            out.append(Rollout(batch, total, total[:, None], none, finished, lengths, sampled, 1.0))
        return out

    def policy(self, batches):
        return [torch.cat([OLD[n] for n in numbers]) for numbers in self.cut]

    def reference(self, batches):
        return [torch.cat([REFERENCE[n] for n in numbers]) for numbers in self.cut]


def step(settings: Grpo, cut: list[list[int]], finished: bool = True):
    objective = PolicyObjective(settings, [Reward(name="exact")])
    batches = objective.prepare(_Actors(cut, finished), [pack([SAMPLES[n] for n in own]) for own in cut])
    inverse = {"policy": 1 / sum(objective.weights(b)["policy"] for b in batches)}
    for p in (EMBED.weight, HEAD.weight):
        p.grad = None
    loss, total = 0.0, dict.fromkeys(objective.keys, 0.0)
    for batch in batches:
        part, logs = objective.loss(Output(EMBED(batch["input_ids"]), HEAD), batch, inverse)
        part.backward()
        loss += part.item()
        with torch.no_grad():
            still = objective.loss(Output(EMBED(batch["input_ids"]), HEAD), batch, inverse)[0].item()
        assert still == pytest.approx(part.item(), rel=EXACT, abs=EXACT)
        total = {key: v + float(torch.as_tensor(logs.get(key, 0.0)).detach()) for key, v in total.items()}
    return loss, EMBED.weight.grad.clone(), HEAD.weight.grad.clone(), objective.shown(total)


def scaled(rewards: list[float], kind: str) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    if kind == "rloo":
        return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (spread + 1e-4 if kind == "group" else 1) for r in rewards]


def defined(settings: Grpo, finished: bool = True):
    """The loss by its definition, a token at a time."""
    terms, answers, tokens = [], [], 0
    for n, each in enumerate(SAMPLES):
        rewards, at = list(REWARDS[n]), 0
        places = []
        for length in each.sequences:
            labels = each.tensors["labels"][at : at + length]
            places.append([at + t for t in range(length) if labels[t] != IGNORE])
            at += length
        for m, own in enumerate(places):
            if settings.overlong_buffer:
                start = LONGEST - settings.overlong_buffer
                rewards[m] -= min(max((len(own) - start) / settings.overlong_buffer, 0), 1)
            if settings.kl_in == "reward":
                rewards[m] -= settings.kl * sum((OLD[n][t] - REFERENCE[n][t]).item() for t in own)
        if settings.filter and len(set(REWARDS[n])) == 1:
            continue
        logits = HEAD(EMBED(each.tensors["input_ids"])) / settings.temperature
        rows = logits.log_softmax(-1)
        for own, advantage in zip(places, scaled(rewards, settings.advantage), strict=True):
            if settings.mask_truncated and not finished and len(own) >= 6:
                continue
            now = [rows[t, each.tensors["labels"][t]] for t in own]
            old = [OLD[n][t] if settings.updates > 1 or settings.kl_in == "reward" else lp.detach() for t, lp in zip(own, now, strict=True)]  # fmt: skip
            losses = []
            whole = torch.exp(sum(a - b for a, b in zip(now, old, strict=True)) / len(own))
            for t, lp, before in zip(own, now, old, strict=True):
                ratio = torch.exp(lp - before)
                value = ratio if settings.ratio == "token" else whole.detach() * torch.exp(lp - lp.detach())
                high = settings.clip_low if settings.clip_high is None else settings.clip_high
                bounded = torch.clamp(value, 1 - settings.clip_low, 1 + high)
                gain = torch.min(value * advantage, bounded * advantage)
                if settings.dual_clip and advantage < 0:
                    gain = torch.max(gain, torch.tensor(settings.dual_clip * advantage, dtype=torch.float64))
                loss = -gain
                if settings.kl and settings.kl_in == "loss":
                    gap = REFERENCE[n][t] - lp
                    value = (torch.exp(gap) - gap - 1).detach()
                    slope = (ratio * (lp - REFERENCE[n][t])).detach()
                    loss = loss + settings.kl * (value + slope * lp - (slope * lp).detach())
                losses.append(loss)
            tokens += len(own)
            answers.append(len(own))
            share = {"token": 1.0, "sequence": 1 / len(own), "constant": 1 / LONGEST}[settings.aggregate]
            terms.append(share * sum(losses))
    return sum(terms) / (tokens if settings.aggregate == "token" else len(answers))


VARIANTS = {
    "grpo": {},
    "several updates": {"updates": 2},
    "dapo": {"updates": 2, "clip_high": 0.28, "filter": "exact", "overlong_buffer": 3},
    "dr grpo": {"updates": 2, "advantage": "centered", "aggregate": "constant"},
    "rloo": {"advantage": "rloo", "aggregate": "sequence"},
    "gspo": {"updates": 2, "ratio": "sequence", "aggregate": "sequence", "clip_low": 0.05, "clip_high": 0.1},
    "dual clip": {"updates": 2, "dual_clip": 1.1},
    "temperature": {"updates": 2, "temperature": 0.7},
    "kl in the loss": {"updates": 2, "kl": 0.3},
    "kl in the reward": {"kl": 0.3, "kl_in": "reward"},
    "truncated masked": {"mask_truncated": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_are_the_definition(name):
    settings, finished = Grpo(max_new_tokens=LONGEST, **VARIANTS[name]), name != "truncated masked"
    found = step(settings, [[0, 1], [2]], finished)
    for p in (EMBED.weight, HEAD.weight):
        p.grad = None
    loss = defined(settings, finished)
    loss.backward()
    assert found[0] == pytest.approx(loss.item(), rel=EXACT, abs=EXACT)
    torch.testing.assert_close(found[1], EMBED.weight.grad, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found[2], HEAD.weight.grad, rtol=EXACT, atol=EXACT)
    assert found[1].abs().max() > 1e-4
    again = step(settings, [[2], [1], [0]], finished)
    assert again[0] == pytest.approx(found[0], rel=EXACT, abs=EXACT)
    torch.testing.assert_close(again[2], found[2], rtol=EXACT, atol=EXACT)


def test_figures():
    shown = step(Grpo(max_new_tokens=LONGEST, updates=2, kl=0.1), [[0, 1], [2]])[3]
    assert shown["reward"] == pytest.approx(6.5 / 8) and shown["rewards/exact"] == pytest.approx(6.5 / 8)
    assert shown["lengths/answers"] == pytest.approx(29 / 8) and shown["equal_groups"] == pytest.approx(1 / 3)
    assert shown["reward_std"] == pytest.approx((0.5 + math.sqrt(2)) / 3)
    assert shown["failed"] == 0 and shown["learned"] == 1 and 0 < shown["clip_fraction"] < 1 < 1 + shown["kl"]


def test_a_step_without_anything_to_learn_has_gradients_of_zero():
    found = step(Grpo(max_new_tokens=LONGEST), [[2]])
    assert found[0] == 0 and not found[1].any() and not found[2].any()


def test_groups():
    nan = math.nan
    total = torch.tensor([0.31, 0.3, 1.0, nan, nan, 2.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = advantages(total, [2, 2, 2, 3], "group")
    assert found[0] > 0 > found[1] and found[6:].tolist() == [0.0] * 3
    assert found[2:6].isnan().all(), "an answer that is alone is compared with none"
    assert equal_groups(total, [2, 2, 2, 3]).tolist() == [False] * 2 + [True] * 7
    assert overlong(torch.tensor([1, 6, 8, 10]), 10, 4).tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"parallel": {"tp": 2}}, "parallel.tp = 2"),
        ({"parallel": {"cp": 2}}, "parallel.cp = 2"),
        ({"parallel": {"pp": 2}}, "parallel.pp = 2"),
        ({"train": {"grpo": {"filter": "exakt"}}}, "none of train.rewards"),
        ({"train": {"grpo": {"reference": "x"}}}, "train.grpo.kl is 0"),
        ({"train": {"grpo": {"kl_in": "reward"}}}, "train.grpo.kl is 0"),
        ({"train": {"grpo": {"overlong_buffer": 512}}}, "overlong_buffer"),
        ({"train": {"loss": "per_sample"}}, "train.loss"),
        ({"data": {"overlong": "split"}}, "data.overlong"),
        ({"data": {"train_on": "all"}}, "data.train_on"),
        ({"model": {"lora": {"dropout": 0.1}}}, "model.lora.dropout"),
        ({"model": {"attention": "sdpa"}}, "model.attention"),
        ({"train": {"rewards": []}}, "train.rewards is empty"),
        ({"train": {"rewards": [{"name": "exakt"}]}}, "exakt is no rule"),
        ({"train": {"objective": "dpo"}}, "are for train.objective grpo"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(changes, said):
    raw = {
        "model": {"source": "x"},
        "train": {"objective": "grpo", "rewards": [{"name": "exact"}]},
    }
    for section, keys in changes.items():
        raw.setdefault(section, {}).update(keys)

    class _Family:
        streams = ()
        card = type("Card", (), {"name": "some model"})

        def balance(self, weight):
            return {}

    with pytest.raises(PolymodalError, match=said) as found:
        _ = Packed(Recipe.model_validate(raw), _Family()).objective
    assert found.value.hint
