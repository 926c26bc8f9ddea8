"""A base in few bits: what it rounds to, what is read, and that adapters on it learn as on the same base made plain."""

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog, library, lora, quantised, weights
from polymodal.recipe import Lora, Model, Parallel
from tests.models import tiny
from tests.models.test_lora import CARD, on_meta

KINDS = ("nf4", "int8", "fp8")
ERRORS = {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}
"""Of normal values, root of squares over root of squares; nf4's is 0.09 by Dettmers et al."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(tiny.checkpoint("qwen2.5-vl", tmp_path_factory.mktemp("quantised") / "base", tied=False))


def loaded(source: str, kind: str | None, options: Lora | None = None) -> nn.Module:
    """A model with adapters that do something, as a run loads it; kind None: plain."""
    options = options or Lora(rank=4, alpha=8)
    model = on_meta(source)
    lora.attach(model, options, CARD)
    if kind is not None:
        quantised.quantise(model, kind, CARD)
    weights.load(model, None, source)
    lora.initialise(model, options, 3)
    with torch.no_grad():
        for name, parameter in lora.adapters(model).items():
            if ".lora_B." in name:
                parameter.add_(0.01)
    return model


def learnt(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(3))
    out = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    loss = -model.lm_head(out).log_softmax(-1)[..., 5].mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in lora.adapters(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rounded_each_by_itself(kind):
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0.0
    packed = quantised.pack(weight, kind)
    assert packed.dtype == torch.uint8 and packed.shape == (24, quantised.row_bytes(kind, 192))
    again = quantised.unpack(packed, kind, 192, torch.float32)
    error = float((again - weight).norm() / weight.norm())
    assert 0 < error < ERRORS[kind] and not again[3].any()
    assert torch.equal(quantised.pack(weight[7:13], kind), packed[7:13])
    rounded = quantised.pack(again, kind)  # of values that codes can say, it keeps the codes
    assert torch.equal(quantised.unpack(rounded, kind, 192, torch.float32), again) or kind != "nf4"


def test_nf4_has_the_codes_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = torch.ops.bitsandbytes.quantize_4bit(weight, quantised.BLOCK, "nf4", torch.uint8)
    packed = quantised.pack(weight, "nf4")
    own = packed[:, :64], packed[:, 64:].contiguous().view(torch.bfloat16)
    assert (own[0] == codes.view(16, 64)).float().mean() > 0.97  # ours are of scales rounded to bfloat16
    assert torch.equal(own[1], scales.view(16, 2).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_as_on_the_same_base_made_plain(kind, source):
    model, plain = loaded(source, kind), loaded(source, None)
    low = quantised.layers(model)
    assert low and all(".layers." in name or ".blocks." in name for name in low)
    with torch.no_grad():
        for name, parameter in library.targets(plain).items():
            if name in low:
                parameter.copy_(
                    quantised.unpack(low[name].weight, kind, low[name].in_features, torch.float32)
                )
    loss, gradients = learnt(model)
    expected, of_plain = learnt(plain)
    assert loss == expected
    for name, gradient in gradients.items():
        assert torch.equal(gradient, of_plain[name]), name
    whole, _ = learnt(loaded(source, None))
    assert loss == pytest.approx(whole, rel=ERRORS[kind]) and loss != whole


def test_random_weights_are_those_of_a_plain_model(source):
    family = catalog.family(Model(source=source, init="random"))
    models = [family.build() for _ in range(2)]
    for model in models:
        lora.attach(model, Lora(), family.card)
    quantised.quantise(models[0], "int8", family.card)
    for model in models:
        weights.initialise(model, family, 5)
    low = quantised.layers(models[0])
    for name, parameter in library.targets(models[1]).items():
        if name in low:
            assert torch.equal(low[name].weight, quantised.pack(parameter, "int8")), name


def test_loading_holds_one_layer_whole_at_a_time(source, monkeypatch):
    made: list[int] = []
    pack = quantised.pack
    monkeypatch.setattr(
        quantised, "pack", lambda weight, kind: made.append(weight.numel()) or pack(weight, kind)
    )
    model = loaded(source, "nf4")
    low = quantised.layers(model)
    sizes = [layer.in_features * layer.out_features for layer in low.values()]
    assert sorted(made) == sorted(sizes)  # each once, and never two together
    assert sum(layer.weight.nbytes for layer in low.values()) == sum(sizes) * 4.25 / 8
    assert all(layer.weight.dtype == torch.uint8 for layer in low.values())


def test_what_cannot_be_quantised_is_refused(source):
    sizes = ParallelSizes.of(Parallel(), 1)
    assert quantised.check(Model(source="x"), sizes) == []
    (error,) = quantised.check(Model(source="x", base="nf4"), sizes)
    assert "model.lora" in error.message and error.hint
    (error,) = quantised.check(
        Model(source="x", base="nf4", lora=Lora()), ParallelSizes.of(Parallel(tp=2), 2)
    )
    assert "parallel.tp = 2" in error.message
    model = on_meta(source)
    with pytest.raises(PolymodalError, match="no frozen linear layers"):
        quantised.quantise(model, "nf4", CARD)
