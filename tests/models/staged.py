"""What tests of cards share: two stages of a pipeline against the whole model; a tiny checkpoint's weights."""

from __future__ import annotations

import torch

from polymodal.models import weights
from polymodal.parallel.stages import prune
from tests.models.test_qwen_vl import assert_same, gradients, ours, token_loss


def loaded(family):
    model = family.build()
    weights.load(model, family)
    return model.double()


def assert_two_stages_equal_the_whole(family, batch, cuts, ignored=(), tolerance=1e-9):
    """Outputs, gradients and the shapes that are sent. cuts: tower -> its blocks in either stage; ignored: beginnings
    of names of parameters without gradients."""
    whole = loaded(family)
    _, expected = ours(family, whole, batch)
    token_loss(expected, batch["labels"]).backward()
    stages = [loaded(family) for _ in range(2)]
    for index, stage in enumerate(stages):
        prune(stage, family, cuts, index)
    carry = family.stage(stages[0], None, batch)
    spec = family.carry_spec(batch, {tower: cut[0] for tower, cut in cuts.items()}, torch.float64)
    assert {k: t.shape for k, t in carry.items()} == {k: t.shape for k, t in spec.items()}
    received = {key: tensor.detach().requires_grad_() for key, tensor in carry.items()}
    out = family.stage(stages[1], received, batch)
    got = out.head(out.hidden_states)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    token_loss(got, batch["labels"]).backward()
    sent = [key for key in carry if received[key].grad is not None]
    torch.autograd.backward([carry[key] for key in sent], [received[key].grad for key in sent])
    wanted = gradients(whole)
    for stage in stages:
        found = {name: grad for name, grad in gradients(stage).items() if not name.startswith(tuple(ignored))}
        assert_same(found, {name: wanted[name] for name in found}, tolerance)
