"""Adapters: peft opens what is written with the same logits, merging changes nothing, start values follow peft."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.models import catalog, lora, weights
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.recipe import Lora
from tests.bounds import assert_near
from tests.models import gather, tiny

CARD = ModelCard(
    name="tiny",
    family=Family,
    architectures=(),
    tasks=(),
    blocks=("model.visual.blocks.*", "model.language_model.layers.*"),
    towers={"vision": ("model.visual",), "language": ("model.language_model", "lm_head")},
    head="lm_head",
    embedding="model.language_model.embed_tokens",
)
NAMES = [("qwen2-vl", True), ("qwen2.5-vl", False), ("qwen3-vl", False), ("qwen3-vl-moe", False)]


def on_meta(source) -> nn.Module:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def adapted(source, options: Lora, seed: int = 3, trained: bool = True) -> nn.Module:
    """A model with adapters that do something, loaded in the order of a run."""
    model = on_meta(source)
    lora.attach(model, options, CARD)
    weights.load(model, None, source)
    lora.initialise(model, options, seed)
    if trained:
        with torch.no_grad():
            for number, (name, parameter) in enumerate(lora.adapters(model).items()):
                if ".lora_B." in name:
                    generator = torch.Generator().manual_seed(number)
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def logits(model: nn.Module, source) -> torch.Tensor:
    """Of a text with a picture, by the library's own forward."""
    media = catalog.family(_recipe(source)).media_processor(_data())
    sample = tiny.sample(media, ["What is in this picture? ", tiny.picture(24, 16), " It is a three."])
    ids = sample.tensors["input_ids"]
    kinds = {
        "pixel_values": sample.tensors["pixel_values"],
        "image_grid_thw": sample.tensors["grid_thw"],
        "mm_token_type_ids": (ids == model.config.image_token_id).long()[None],
    }
    with torch.no_grad():
        return model(input_ids=ids[None], **kinds, use_cache=False).logits


def _recipe(source):
    from polymodal.recipe import Model

    return Model(source=str(source))


def _data():
    from polymodal.recipe import Data

    return Data()


def plain(source) -> nn.Module:
    return transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()


def by_peft(source, directory) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(source), str(directory)).eval()


@pytest.mark.parametrize(("name", "tied"), NAMES)
def test_peft_opens_what_is_saved(checkpoint, tmp_path, name, tied):
    """Same logits; with both towers, one of them, chosen endings, rank-stabilised."""
    source = checkpoint(name, tied)
    base = logits(plain(source), source)
    for number, options in enumerate(
        [
            Lora(rank=4, alpha=8, towers=["language", "vision"]),
            Lora(rank=3, alpha=5, towers=["language"], rslora=True),
            Lora(rank=2, towers=["vision"], targets=["qkv", "proj"]),
        ]
    ):
        model = adapted(source, options)
        out = gather.save_adapter(
            gather.adapters(model), model, options, tmp_path / str(number), base=str(source)
        )
        assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        ours, theirs = logits(model, source), logits(by_peft(source, out).get_base_model(), source)
        assert_near(ours, theirs)
        assert (ours - base).abs().max() > 1e-3


EXPERTS = Lora(rank=3, alpha=9, targets=["gate_up_proj", "experts.down_proj", "q_proj"])


def test_peft_opens_adapters_on_stacked_experts(checkpoint, tmp_path):
    """Both stacks and a linear layer; again after merging, and after reading the directory back."""
    source = checkpoint("qwen3-vl-moe")
    model = adapted(source, EXPERTS)
    assert {n.rpartition(".lora_")[0].rpartition("layers.1.")[2] for n in lora.adapters(model) if "layers.1." in n} == {
        "self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer",
    }  # fmt: skip
    out = gather.save_adapter(gather.adapters(model), model, EXPERTS, tmp_path / "out", base=str(source))
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert settings["target_modules"] == ["q_proj"]
    ours, theirs = logits(model, source), logits(by_peft(source, out).get_base_model(), source)
    assert_near(ours, theirs)
    assert (ours - logits(plain(source), source)).abs().max() > 1e-3
    merged = gather.save(gather.merged(model), tmp_path / "merged", model=on_meta(source), source=source)
    torch.testing.assert_close(logits(plain(merged), source), ours, rtol=1e-4, atol=1e-4)
    again = adapted(source, EXPERTS, seed=9, trained=False)
    lora.load(again, EXPERTS, out)
    assert_near(logits(again, source), ours)
    only = adapted(source, Lora(targets=["experts.down_proj"]))
    out = gather.save_adapter(
        gather.adapters(only), only, Lora(targets=["experts.down_proj"]), tmp_path / "only", base=str(source)
    )
    assert_near(logits(by_peft(source, out).get_base_model(), source), logits(only, source))


@pytest.mark.parametrize(("name", "tied"), NAMES)
def test_merged_weights_give_the_same_logits(checkpoint, tmp_path, name, tied):
    """From a live model and from files; the merged checkpoint has the source's keys and plain transformers opens it."""
    source = checkpoint(name, tied)
    options = Lora(rank=4, alpha=6, rslora=True, towers=["language", "vision"])
    model = adapted(source, options)
    out = gather.save(gather.merged(model), tmp_path / "live", model=on_meta(source), source=source)
    merged = plain(out)
    torch.testing.assert_close(logits(merged, source), logits(model, source), rtol=1e-4, atol=1e-4)
    assert load_file(out / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    stream = lora.merged(weights.read(on_meta(source), source), gather.adapters(model), lora.scales(model))
    again = gather.save(stream, tmp_path / "files", model=on_meta(source), source=source)
    assert all(torch.equal(p, dict(merged.named_parameters())[n]) for n, p in plain(again).named_parameters())


def test_nothing_changes_at_step_zero(checkpoint):
    source = checkpoint("qwen2.5-vl")
    for options in (Lora(rank=4), Lora(rank=4, init="gaussian")):
        model = adapted(source, options, trained=False)
        assert_near(logits(model, source), logits(plain(source), source))
        first = {n: p.clone() for n, p in lora.adapters(model).items()}
        again = adapted(source, options, trained=False)
        assert all(torch.equal(first[n], p) for n, p in lora.adapters(again).items())
        other = adapted(source, options, seed=4, trained=False)
        assert not any(torch.equal(first[n], p) for n, p in lora.adapters(other).items() if "lora_A" in n)


def test_start_values_are_distributed_as_pefts(checkpoint):
    from peft import LoraConfig, get_peft_model

    source = checkpoint("qwen2.5-vl")
    for init in (True, "gaussian"):
        options = Lora(rank=64, init="default" if init is True else "gaussian")
        mine = adapted(source, options, trained=False)
        theirs = get_peft_model(
            plain(source), LoraConfig(r=64, init_lora_weights=init, target_modules=["q_proj", "down_proj"])
        )
        reference = {
            n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "lora_" in n
        }
        checked = 0
        for name, parameter in lora.adapters(mine).items():
            if name in reference and "language_model" in name:
                want = reference[name]
                assert parameter.shape == want.shape and parameter.dtype == want.dtype == torch.float32
                assert abs(parameter.std() - want.std()) <= 0.05 * want.std()
                assert parameter.abs().max() <= want.abs().max() * 1.5
                checked += 1
        assert checked == 12


def test_only_adapters_are_trained(checkpoint):
    model = adapted(checkpoint("qwen3-vl-moe"), Lora(rank=2))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == set(lora.adapters(model))
    assert all(
        ".self_attn." in n for n in names
    )  # experts are stacked parameters, the router is no linear layer
    assert all(p.dtype == torch.float32 for p in lora.adapters(model).values())


def test_continued_from_a_directory(checkpoint, tmp_path):
    """Adapters that were saved are read back bit for bit, into other numbers at the same strength; a lower rank or
    another set of layers is refused."""
    source = checkpoint("qwen2.5-vl")
    options = Lora(rank=4, alpha=8)
    model = adapted(source, options)
    out = gather.save_adapter(gather.adapters(model), model, options, tmp_path / "adapter", base=str(source))
    again = adapted(source, options, seed=9, trained=False)
    lora.load(again, options, out)
    want = gather.adapters(model)
    assert all(torch.equal(want[n], t) for n, t in gather.adapters(again).items())
    for change in ({"rank": 6}, {"alpha": 5.0}, {"rslora": True}):  # the same function by other numbers
        other = options.model_copy(update=change)
        changed = adapted(source, other, seed=9, trained=False)
        lora.load(changed, other, out)
        have = gather.adapters(changed)
        for layer, factor in lora.scales(changed).items():
            (a, b), (c, d) = (
                [state[f"{layer}.lora_{x}.default.weight"] for x in "AB"] for state in (want, have)
            )
            assert torch.allclose(factor * d @ c, 8 / 4 * b @ a, rtol=1e-5, atol=1e-6)
    low = options.model_copy(update={"rank": 3})
    with pytest.raises(PolymodalError, match="has the rank 4, more than .* Set model.lora.rank to 4"):
        lora.load(adapted(source, low), low, out)
    fewer = options.model_copy(update={"targets": ["q_proj"]})
    with pytest.raises(PolymodalError, match="has .* layers' weights that the recipe's model.lora does not"):
        lora.load(adapted(source, fewer), fewer, out)
    more = options.model_copy(update={"towers": ["language", "vision"]})
    with pytest.raises(PolymodalError, match="lacks .* layers' weights that the recipe's model.lora wants"):
        lora.load(adapted(source, more), more, out)
    with pytest.raises(PolymodalError, match="is a LoRA adapter, but the recipe has no model.lora"):
        lora.load(again, None, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(PolymodalError, match="LoRA with DoRA"):
        lora.load(again, options, out)


def test_a_training_step_on_a_resumed_adapter_is_the_same(checkpoint, tmp_path):
    source = checkpoint("qwen2-vl", True)
    options = Lora(rank=4, dropout=0.0)

    def step(model, optimizer):
        ids = torch.arange(20).view(1, 20)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    straight = adapted(source, options)
    optimizer = torch.optim.SGD(lora.adapters(straight).values(), lr=0.1)
    step(straight, optimizer)
    out = gather.save_adapter(gather.adapters(straight), straight, options, tmp_path / "a", base=str(source))
    step(straight, optimizer)
    resumed = adapted(source, options, seed=8)
    lora.load(resumed, options, out)
    step(resumed, torch.optim.SGD(lora.adapters(resumed).values(), lr=0.1))
    want = gather.adapters(straight)
    assert all(torch.equal(want[n], t) for n, t in gather.adapters(resumed).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Lora(towers=["audio"]), "has the towers vision, language"),
        (Lora(targets=["q_porj"]), "fits no linear layer .* Did you mean q_proj"),
        (Lora(targets=["lm_head"]), "is the output projection"),
        (Lora(targets=["embed_tokens"]), "is a Embedding .*adapters go on linear layers"),
        (Lora(targets=["gate_up_proj"], dropout=0.1), "dropout = 0.1: adapters on stacked experts are added"),
        (Lora(targets=[]), "targets is empty"),
    ],
)
def test_what_is_refused(checkpoint, options, message):
    with pytest.raises(PolymodalError, match=message):
        lora.attach(on_meta(checkpoint("qwen3-vl-moe")), options, CARD)


def test_layers_are_named_shortly():
    """Endings where they are enough, else a pattern, else the list; each selects exactly the layers."""
    linear = [f"{t}.layers.{i}.{n}" for t in ("text", "vision") for i in range(12) for n in ("q", "v")] + [
        "head"
    ]
    text = [n for n in linear if n.startswith("text")]
    assert lora._selector([n for n in linear if n != "head"], linear) == ["q", "v"]
    pattern = lora._selector(text, linear)
    import re

    assert isinstance(pattern, str) and len(pattern) < 60
    assert [n for n in linear if re.fullmatch(pattern, n)] == text
    assert lora._selector(text[:3], linear) == sorted(text[:3])


def test_an_incomplete_or_foreign_state(checkpoint, tmp_path):
    source = checkpoint("qwen2.5-vl")
    options = Lora(rank=2, targets=["q_proj"])
    model = adapted(source, options)
    state = gather.adapters(model)
    short = dict(list(state.items())[1:])
    with pytest.raises(PolymodalError, match="The state lacks 1 adapters"):
        gather.save_adapter(short, model, options, tmp_path / "out", base="x")
    assert not list(tmp_path.iterdir())
    state["model.elsewhere.lora_A.default.weight"] = state["model.elsewhere.lora_B.default.weight"] = (
        torch.ones(1, 1)
    )
    with pytest.raises(
        PolymodalError, match="1 adapters have no weight to be added to .first: model.elsewhere"
    ):
        list(lora.merged(gather.weights(model), state, lora.scales(model)))
