"""Packed equals separate, for every card: hidden states and gradients; nothing leaks through positions or windows."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.sample import pack, padding_sample
from polymodal.models import catalog
from polymodal.recipe import Data, Model
from tests.bounds import EXACT
from tests.models import tiny
from tests.models.test_qwen_vl import CASES, gradients, model_of, ours, token_loss
from tests.parallel.exact import float64


@pytest.fixture(scope="module", params=(*tiny.NAMES, *tiny.GLM))
def setting(request, checkpoint):
    source = checkpoint(request.param)
    family = catalog.family(Model(source=str(source), experts="eager"))
    media = family.media_processor(Data())
    samples = [tiny.sample(media, parts, id) for id, parts in enumerate(CASES.values())]
    return family, source, samples


@pytest.fixture(autouse=True)
def wide():
    """Also where the library routes and resamples in float32."""
    with float64():
        yield


def separately(family, source, samples):
    """Hidden states of each sample alone, and the sum of their gradients."""
    model = model_of(source, "polymodal")
    hidden = []
    for sample in samples:
        out, logits = ours(family, model, pack([sample]))
        token_loss(logits, sample.tensors["labels"]).backward()
        hidden.append(out.hidden_states.detach())
    return torch.cat(hidden, dim=1), gradients(model)


def together(family, source, batches):
    model = model_of(source, "polymodal")
    hidden = []
    for batch in batches:
        out, logits = ours(family, model, batch)
        token_loss(logits, batch["labels"]).backward()
        hidden.append(out.hidden_states.detach())
    return torch.cat(hidden, dim=1), gradients(model)


def assert_close(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-9)
    for name, grad in expected[1].items():
        torch.testing.assert_close(
            got[1][name],
            grad,
            rtol=1e-8,
            atol=1e-8 * max(1.0, float(grad.abs().max())),
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_a_pack_of_everything_equals_its_samples_alone(setting):
    family, source, samples = setting
    assert_close(together(family, source, [pack(samples)]), separately(family, source, samples))


def test_any_cut_of_the_batch_gives_the_same_gradient(setting):
    family, source, samples = setting
    batches = [pack(samples[:2]), pack(samples[4:]), pack(samples[2:4])]
    order = [*samples[:2], *samples[4:], *samples[2:4]]
    assert_close(together(family, source, batches), separately(family, source, order))


def test_no_sample_sees_another(setting):
    """Changing one sample of a pack changes nothing of the others, but for rounding of float64."""
    family, source, samples = setting
    model = model_of(source, "polymodal")
    media = family.media_processor(Data())
    other = tiny.sample(media, ["no ", tiny.picture(40, 24, 9), "Who was it? It was a nine."])
    changed = [*samples[:1], other, *samples[2:]]
    before, _ = ours(family, model, pack(samples))
    after, _ = ours(family, model, pack(changed))
    lengths = [sample.measure.tokens for sample in samples]
    first = slice(0, lengths[0])
    torch.testing.assert_close(
        before.hidden_states[:, first], after.hidden_states[:, first], rtol=EXACT, atol=EXACT
    )
    rest = sum(lengths[2:])
    torch.testing.assert_close(
        before.hidden_states[:, -rest:], after.hidden_states[:, -rest:], rtol=EXACT, atol=EXACT
    )
    assert (
        before.hidden_states[:, lengths[0] : lengths[0] + 5]
        - after.hidden_states[:, lengths[0] : lengths[0] + 5]
    ).abs().max() > 1e-3


def test_padding_gives_nothing_but_runs_every_module(setting):
    """A rank that has only filler runs the tower as all others do, and adds exactly zero."""
    family, source, _ = setting
    model = model_of(source, "polymodal")
    ran = []
    for name in ("model.visual", "model.visual.merger", "model.language_model"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    batch = pack([padding_sample(rows=4)])
    out, logits = ours(family, model, batch)
    (logits * batch["weights"][..., None]).sum().backward()
    assert sorted(ran) == ["model.language_model", "model.visual", "model.visual.merger"]
    expected_without = ("mlp.experts",)  # experts that no token chose
    for name, grad in gradients(model).items():
        assert grad is not None or any(part in name for part in expected_without), name
        assert grad is None or not grad.any(), name
