"""The loss is sum(w * nll) / sum(w) over the global batch: equal to the library's cross entropy, however it is cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polymodal.core.sample import IGNORE, Sample, SampleLengths, pack
from polymodal.distributed.router_loss import balance_loss, expert_choices, load_figures, router_sums
from polymodal.models.card import Output
from polymodal.objectives import language
from polymodal.objectives.language import LanguageObjective, head_loss, token_weights
from tests.bounds import EXACT

torch.manual_seed(0)
VOCABULARY, WIDTH = 37, 12


def sample(number: int, length: int, trained: int, modality: str = "text") -> Sample:
    generator = torch.Generator().manual_seed(number)
    labels = torch.full((length,), IGNORE)
    labels[-trained - 1 : -1] = torch.randint(0, VOCABULARY, (trained,), generator=generator)
    tensors = {
        "input_ids": torch.randint(0, VOCABULARY, (length,), generator=generator),
        "labels": labels,
        "weights": (labels != IGNORE).float(),
        "position_ids": torch.arange(length)[None],
    }
    return Sample(number, tensors, SampleLengths(length, trained), modality=modality)


SAMPLES = [sample(1, 9, 3), sample(2, 14, 7, "image"), sample(3, 6, 1), sample(4, 11, 5, "image")]
EMBED = nn.Embedding(VOCABULARY, WIDTH).double()
HEAD = nn.Linear(WIDTH, VOCABULARY, bias=False).double()


def step(objective, batches):
    """Loss and gradients of a global batch cut into these micro-batches."""
    totals: dict[str, float] = {}
    for batch in batches:
        for term, value in objective.weights(batch).items():
            totals[term] = totals.get(term, 0) + value
    inverse = {k: 1 / v for k, v in totals.items()}
    EMBED.zero_grad()
    HEAD.zero_grad()
    loss = 0.0
    for batch in batches:
        part, _ = objective.loss(Output(EMBED(batch["input_ids"]), HEAD), batch, inverse)
        part.backward()
        loss += part.item()
    return loss, EMBED.weight.grad.clone(), HEAD.weight.grad.clone()


def reference(weighting):
    """The documented definitions, sample by sample, with torch's own cross entropy."""
    EMBED.zero_grad()
    HEAD.zero_grad()
    numerator, denominator = 0.0, 0.0
    for s in SAMPLES:
        logits = HEAD(EMBED(s.tensors["input_ids"]))
        losses = F.cross_entropy(logits, s.tensors["labels"], reduction="none", ignore_index=IGNORE)
        weights = s.tensors["weights"].double()
        if weighting == "per_sample":
            weights = weights / weights.sum()
        numerator = numerator + (losses * weights).sum()
        denominator += weights.sum().item()
    loss = numerator / denominator
    loss.backward()
    return loss.item(), EMBED.weight.grad.clone(), HEAD.weight.grad.clone()


@pytest.mark.parametrize("weighting", ["per_token", "per_sample"])
@pytest.mark.parametrize("cut", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_the_cut_into_micro_batches_does_not_matter(weighting, cut):
    batches, start = [], 0
    for size in cut:
        batches.append(pack(SAMPLES[start : start + size]))
        start += size
    got, want = step(LanguageObjective(weighting), batches), reference(weighting)
    # the token weights are passed as float32, so per_sample is exact to its precision
    tolerance = EXACT if weighting == "per_token" else 1e-6
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_per_micro_batch_is_the_mean_of_micro_batch_means():
    batches = [pack(SAMPLES[:1]), pack(SAMPLES[1:])]
    means = []
    for batch in batches:
        logits = HEAD(EMBED(batch["input_ids"]))[0]
        means.append(F.cross_entropy(logits, batch["labels"][0], ignore_index=IGNORE).item())
    assert step(LanguageObjective("per_micro_batch"), batches)[0] == pytest.approx(sum(means) / 2, rel=1e-6)


def test_chunks_blocks_and_bias_change_nothing(monkeypatch):
    hidden = torch.randn(200, WIDTH, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY).double()
    labels = torch.randint(0, VOCABULARY, (200,))
    labels[::3] = IGNORE
    weights = torch.rand(200)
    results = []
    for rows, block in ((16, 5), (1000, VOCABULARY)):
        monkeypatch.setattr(language, "CHUNK_BYTES", VOCABULARY * 8 * rows)
        monkeypatch.setitem(language.BLOCK_ELEMENTS, "cpu", block * min(rows, 200))
        hidden.grad = None
        head.zero_grad()
        loss, _, _ = head_loss(hidden, head, labels, weights)
        (loss * 2.5).backward()
        results.append([loss.detach(), hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()])
    want = (F.cross_entropy(head(hidden), labels, reduction="none", ignore_index=IGNORE) * weights).sum()
    torch.testing.assert_close(results[0][0], want.detach())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_without_labels_takes_part_with_zero_gradients():
    hidden = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    HEAD.zero_grad()
    loss, losses, kept = head_loss(hidden, HEAD, torch.full((5,), IGNORE), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and len(losses) == len(kept) == 0
    assert hidden.grad.abs().sum() == 0 and HEAD.weight.grad.abs().sum() == 0


def test_logs_split_the_loss_by_modality():
    batch = pack(SAMPLES)
    _, logs = LanguageObjective().loss(Output(EMBED(batch["input_ids"]), HEAD), batch, {"text": 1 / 16})
    assert logs["tokens/text"] == 4 and logs["tokens/image"] == 12
    assert float(logs["nll/text"] + logs["nll/image"]) / 16 == pytest.approx(float(logs["loss"]))


def test_a_message_weight_of_two_counts_twice():
    heavy = sample(1, 9, 3)
    heavy.tensors["weights"] = heavy.tensors["weights"] * 2
    assert float(token_weights(pack([heavy]), "per_token").sum()) == 6


def test_balance_loss_equals_the_librarys():
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    routers = [torch.randn(20, 8) for _ in range(3)]
    torch.testing.assert_close(
        balance_loss(router_sums(routers, 2), 3), load_balancing_loss_func(tuple(routers), 8, 2)
    )


def test_without_gradients_none_are_made(monkeypatch):
    asked, forward = [], language._HeadLoss.forward

    def spy(ctx, *arguments):
        asked.append(any(ctx.needs_input_grad))
        return forward(ctx, *arguments)

    monkeypatch.setattr(language._HeadLoss, "forward", staticmethod(spy))
    hidden, labels, weights = torch.randn(9, WIDTH, dtype=torch.float64), torch.arange(9), torch.ones(9)
    with torch.no_grad():
        loss = head_loss(hidden, HEAD, labels, weights)[0]
    head_loss(hidden, HEAD, labels, weights)
    assert asked == [False, True]
    torch.testing.assert_close(loss, F.cross_entropy(HEAD(hidden), labels, reduction="sum").detach())


def test_choices_of_experts_are_counted_by_layer():
    """4 tokens of 2 layers choose 2 of 4 experts; in the second layer all choose the same two."""
    even = torch.tensor([[2.0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]])
    choices = expert_choices([even, torch.tensor([[2.0, 1, 0, 0]]).expand(4, 4)], 2)
    assert choices.tolist() == [[2, 2, 2, 2], [4, 4, 0, 0]]
    assert load_figures(choices) == {"experts/busiest": 2.0, "experts/idle": 0.25}
    assert load_figures(torch.cat([torch.zeros(3, 4), choices[:1]])) == {
        "experts/busiest": 1.0,
        "experts/idle": 0.0,
    }
    assert load_figures(torch.zeros(0, 0)) == {}
