"""Adapters between programs: each is applied in full strength, or refused with its reason."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.generate import opening
from polymodal.models import adapter_files, catalog, lora
from polymodal.models.card import PrunedModule
from tests.models import tiny, tiny_pipelines

FAST = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
ORIGINAL = {  # Wan's own names of what diffusers calls otherwise
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
BLOCK = tuple(ORIGINAL)


def original(layer: str) -> str:
    head, end = re.match(r"(blocks\.\d+\.)(.*)", layer).groups()
    return head + ORIGINAL[end]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    where = tiny_pipelines.pipeline("wan", tmp_path_factory.mktemp("wan") / "base")
    return catalog.family(recipes.Model(source=str(where)))


@pytest.fixture(scope="module")
def denoiser(wan):
    return wan.build()


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    source = tmp_path_factory.mktemp("answering") / "base"
    tiny.checkpoint("qwen2.5-vl", source)
    return source, catalog.family(recipes.Model(source=str(source)))


Layers = dict[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Layer -> A, B, alpha."""


def layers_of(model, names, ranks, alphas, dtype) -> Layers:
    modules = dict(model.named_modules())
    draw, made = torch.Generator().manual_seed(0), {}
    for i, name in enumerate(names):
        out, into = modules[name].weight.shape
        rank, alpha = ranks[i % len(ranks)], alphas[i % len(alphas)]
        a, b = (torch.randn(*shape, generator=draw) for shape in ((rank, into), (out, rank)))
        made[name] = (a.to(dtype), b.to(dtype), float(alpha))
    return made


def deltas(layers: Layers) -> dict[str, torch.Tensor]:
    return {n: alpha / a.shape[0] * b.float() @ a.float() for n, (a, b, alpha) in layers.items()}


def with_alphas(layers: Layers, name, a="lora_down", b="lora_up") -> dict[str, torch.Tensor]:
    out = {}
    for layer, (down, up, alpha) in layers.items():
        out |= {f"{name(layer)}.{a}.weight": down, f"{name(layer)}.{b}.weight": up}
        out[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return out


def folded(layers: Layers, name, adapter: str = "") -> dict[str, torch.Tensor]:
    """Without alphas: B is multiplied, in float32."""
    out = {}
    for layer, (a, b, alpha) in layers.items():
        out[f"{name(layer)}.lora_A.{adapter}weight"] = a
        out[f"{name(layer)}.lora_B.{adapter}weight"] = b.float() * (alpha / a.shape[0])
    return out


def peft_config(layers: Layers, prefix: str = "") -> dict:
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA", "r": first[0].shape[0], "lora_alpha": first[2], "bias": "none",
        "target_modules": [prefix + n for n in layers], "base_model_name_or_path": "/gone",
        "rank_pattern": {prefix + n: a.shape[0] for n, (a, _, _) in layers.items()},
        "alpha_pattern": {prefix + n: alpha for n, (_, _, alpha) in layers.items()},
    }  # fmt: skip


def plain(layers: Layers, name) -> dict[str, torch.Tensor]:
    pairs = (
        (f"{name(n)}.lora_{x}.weight", t)
        for n, ab in layers.items()
        for x, t in zip("AB", ab[:2], strict=True)
    )
    return dict(pairs)


def write(layers: Layers, form: str, where: Path) -> Path:
    """The adapter as a program writes it; the path to give."""
    where.mkdir(parents=True, exist_ok=True)
    for file in where.iterdir():
        file.unlink()
    file = where / "pytorch_lora_weights.safetensors"
    if form == "peft":
        save_file(plain(layers, lambda n: f"base_model.model.{n}"), where / "adapter_model.safetensors")
        (where / "adapter_config.json").write_text(json.dumps(peft_config(layers)))
        return where
    if form == "diffusers":
        config = {f"transformer.{k}": v for k, v in peft_config(layers).items()}
        save_file(
            plain(layers, lambda n: f"transformer.{n}"), file, {"lora_adapter_metadata": json.dumps(config)}
        )
        return where
    made = {
        "comfy": lambda: folded(layers, lambda n: f"diffusion_model.{original(n)}"),
        "comfy with alphas": lambda: with_alphas(
            layers, lambda n: f"diffusion_model.{original(n)}", "lora_A", "lora_B"
        ),
        "kohya": lambda: with_alphas(layers, lambda n: f"lora_unet_{original(n).replace('.', '_')}"),
        "bare": lambda: folded(layers, str),
        "bare original": lambda: folded(layers, original),
        "named": lambda: folded(layers, original, "default."),
        "peft in a file": lambda: folded(layers, lambda n: f"base_model.model.{n}"),
    }[form]()
    file = where / "my adapter.safetensors" if form != "bare" else file
    save_file(made, file)
    return where if form == "named" else file


FORMS = (
    "peft", "diffusers", "comfy", "comfy with alphas", "kohya", "bare", "bare original", "named", "peft in a file",
)  # fmt: skip


@FAST
@given(
    st.sampled_from(FORMS),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.sampled_from((0.5, 1, 4, 6, 16, 33)), min_size=1, max_size=4),
    st.sampled_from(tuple(DTYPES)),
)
def test_any_programs_file_has_its_full_strength(wan, denoiser, tmp_path_factory, form, ranks, alphas, dtype):
    names = [f"blocks.{i}.{end}" for i in range(2) for end in BLOCK]
    layers = layers_of(denoiser, names, ranks, alphas, DTYPES[dtype])
    path = write(layers, form, tmp_path_factory.getbasetemp() / "any")
    state = adapter_files.of_denoiser(path, wan, {"transformer": denoiser})["transformer"]
    assert len(state) == 2 * len(layers)
    for name, wanted in deltas(layers).items():
        got = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), (form, name)


@FAST
@given(
    st.sampled_from([form for form in FORMS if form != "kohya"]),  # which diffusers takes whole only
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from((1.0, 5.0, 16.0)),
    st.sampled_from(([2.0], [4.0, 1.0])),
    st.booleans(),
    st.lists(st.sampled_from(("to_q", "to_out.0", "net.2")), min_size=1, unique=True),
)
def test_a_run_starts_from_it_whatever_its_own_rank_and_alpha(
    wan, tmp_path_factory, form, rank, more, alpha, alphas, rslora, ends
):
    model = wan.build()
    options = recipes.Lora(rank=rank + more, alpha=alpha, rslora=rslora, targets=ends)
    names = lora.attach(model, options, wan.card)
    layers = layers_of(wan.build(), names, [rank], alphas, torch.float32)
    path = write(layers, form, tmp_path_factory.getbasetemp() / "start")
    values = lora.read(model, path, wan, lora.initial_values(model, options, 0))
    factors = lora.scales(model)
    for name, wanted in deltas(layers).items():
        a, b = (values[f"{name}.lora_{x}.default.weight"] for x in "AB")
        assert torch.allclose(factors[name] * b @ a, wanted, rtol=1e-4, atol=1e-4)
        assert a.shape[0] == rank + more and (a[rank:] != 0).any(1).all()  # what is new learns
    if rank > 1:
        low = options.model_copy(update={"rank": rank - 1})
        less = wan.build()
        lora.attach(less, low, wan.card)
        with pytest.raises(PolymodalError, match=f"Set model.lora.rank to {rank}"):
            lora.read(less, path, wan)


DAMAGE = {
    "another key": lambda t, k: t | {f"{k[0]}.odd": torch.ones(2)},
    "a layer that is not there": lambda t, k: t | {k[0].replace("blocks", "blocks.9"): t[k[0]]},
    "A alone": lambda t, k: {key: v for key, v in t.items() if key != k[1]},
    "another width": lambda t, k: t | {k[0]: torch.ones(t[k[0]].shape[0], t[k[0]].shape[1] + 1)},
    "an empty alpha": lambda t, k: t | {re.sub(r"\.lora_A.*", ".alpha", k[0]): torch.ones(0)},
    "an alpha that is no number": lambda t, k: (
        t | {re.sub(r"\.lora_A.*", ".alpha", k[0]): torch.tensor(torch.nan)}
    ),
    "rank 0": lambda t, k: t | {k[0]: torch.ones(0, 24)},
    "a number for a matrix": lambda t, k: t | {k[0]: torch.tensor(1.0)},
    "LoHa": lambda t, k: t | {k[0].replace("lora_A", "hada_w1_a"): torch.ones(2, 2)},
    "LoKr": lambda t, k: t | {k[0].replace("lora_A", "lokr_w1"): torch.ones(2, 2)},
    "DoRA": lambda t, k: t | {re.sub("lora_A.*", "dora_scale", k[0]): torch.ones(2, 1)},
    "of a text encoder": lambda t, k: t | {"text_encoder.x.lora_A.weight": torch.ones(2, 2)},
}


@FAST
@given(
    st.sampled_from(tuple(DAMAGE)), st.sampled_from(("diffusers", "comfy", "bare", "bare original", "named"))
)
def test_nothing_of_a_file_is_passed_over(wan, denoiser, tmp_path_factory, damage, form):
    layers = layers_of(denoiser, [f"blocks.0.{end}" for end in BLOCK[:3]], [4], [4], torch.float32)
    path = write(layers, form, tmp_path_factory.getbasetemp() / "damaged")
    file = adapter_files.require(path).file
    tensors = load_file(file)
    keys = sorted(k for k in tensors if k.endswith("weight"))
    save_file({k: v.clone() for k, v in DAMAGE[damage](tensors, keys).items()}, file)
    with pytest.raises(PolymodalError) as caught:
        adapter_files.of_denoiser(path, wan, {"transformer": denoiser})
    assert caught.value.hint and str(file) in caught.value.message
    if damage in ("LoHa", "LoKr", "DoRA"):
        assert damage in caught.value.message


def test_an_export_has_its_strength_in_its_tensors(wan, tmp_path):
    from polymodal.models import pipelines

    options = recipes.Lora(rank=4, alpha=16, rslora=True, targets=["to_q"])
    model = wan.build()
    names = lora.attach(model, options, wan.card)
    layers = layers_of(wan.build(), names, [4], [16], torch.float32)
    state = {f"{n}.lora_{x}.default.weight": ab["AB".index(x)] for n, ab in layers.items() for x in "AB"}
    cls = pipelines.pipeline_class(wan.source)
    lora.save_for_pipeline(state, model, options, tmp_path, pipeline=cls, part="transformer")
    alone = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, (a, b, _) in layers.items():
        got = alone[f"transformer.{name}.lora_B.weight"] @ alone[f"transformer.{name}.lora_A.weight"]
        assert torch.allclose(got, 16 / 2 * b @ a, rtol=1e-5, atol=1e-5)
    values = lora.read(model, tmp_path, wan)
    assert all(torch.allclose(values[n], t, rtol=1e-6) for n, t in state.items())


OLD_NAMES = {
    "own": str,
    "before the language model had a name": lambda n: n.replace("model.language_model.", "model."),
    "without the outer model": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("names", OLD_NAMES)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r"^(model\..*)\.(q_proj|v_proj)$"])
def test_peft_directories_of_older_names(answering, tmp_path, names, targets):
    """As other trainers and releases wrote them; chat and init_from apply all of their tensors."""
    source, family = answering
    model, options = family.build(), recipes.Lora(rank=2, alpha=2, targets=["q_proj", "v_proj"])
    layers = layers_of(family.build(), lora.attach(model, options, family.card), [2], [8], torch.float32)
    save_file(
        plain(layers, lambda n: f"base_model.model.{OLD_NAMES[names](n)}"),
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 8,
        "target_modules": targets,
    }
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(source)})
    )
    values, factors = lora.read(model, tmp_path), lora.scales(model)
    opened, _ = opening.load_adapter(tmp_path, base=str(source))
    placed, theirs = dict(opened.named_parameters()), lora.scales(opened)
    assert len(lora.adapters(opened)) == 2 * len(layers)
    for layer, wanted in deltas(layers).items():
        for state, factor in ((values, factors), (placed, theirs)):
            a, b = (state[f"{layer}.lora_{x}.default.weight"].float() for x in "AB")
            assert torch.allclose(factor[layer] * b @ a, wanted, rtol=1e-2, atol=1e-2)


def test_a_tensor_that_peft_would_pass_over_is_named(answering, tmp_path):
    source, family = answering
    model, options = family.build(), recipes.Lora(rank=2, targets=["q_proj"])
    layers = layers_of(family.build(), lora.attach(model, options, family.card), [2], [2], torch.float32)
    tensors = plain(layers, lambda n: f"base_model.model.{n}")
    stray = {f"base_model.model.other.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors | stray, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(layers)))
    with pytest.raises(PolymodalError, match="2 do not meet .first: base_model.model.other.lora_"):
        opening.load_adapter(tmp_path, base=str(source))
    with pytest.raises(PolymodalError, match="it has layers named other, q_proj"):
        lora.read(model, tmp_path)


@pytest.mark.parametrize("form", ["peft", "comfy"])
def test_a_pipeline_stage_reads_its_own_layers(wan, denoiser, tmp_path, form):
    model, options = wan.build(), recipes.Lora(rank=2, targets=["to_q"])
    names = lora.attach(model, options, wan.card)
    path = write(layers_of(denoiser, names, [2], [2], torch.float32), form, tmp_path)
    model.blocks[0] = PrunedModule()
    values = lora.read(model, path, wan)
    assert sorted(values) == sorted(lora.adapters(model)) and all(
        name.startswith("blocks.1.") for name in values
    )


@FAST
@given(
    st.sampled_from(
        ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "peft_type")
    ),
    st.sampled_from(
        ("x", -1, 0, None, [], [1], {"a": "b"}, {"(": 1}, float("nan"), 10**400, True, "\x1b[0m")
    ),
)
def test_any_config_is_read_or_refused(wan, tmp_path_factory, key, value):
    model, options = wan.build(), recipes.Lora(rank=2, targets=["to_q"])
    layers = layers_of(wan.build(), lora.attach(model, options, wan.card), [2], [2], torch.float32)
    path = write(layers, "peft", tmp_path_factory.getbasetemp() / "config")
    (path / "adapter_config.json").write_text(json.dumps({**peft_config(layers), key: value}))
    try:
        values = lora.read(model, path, wan)
        assert all(torch.isfinite(values[name]).all() for name in values)
    except PolymodalError as error:
        assert error.hint


def test_which_file_of_a_directory(wan, denoiser, tmp_path):
    layers = layers_of(denoiser, ["blocks.0.attn1.to_q"], [2], [2], torch.float32)
    one = write(layers, "bare", tmp_path / "a")
    assert adapter_files.require(one).file == adapter_files.require(tmp_path / "a").file == one
    one.rename(tmp_path / "a" / "first.safetensors")
    assert adapter_files.require(tmp_path / "a").file.name == "first.safetensors"
    save_file(folded(layers, str), tmp_path / "a" / "second.safetensors")
    with pytest.raises(PolymodalError, match="holds 2 LoRA files: first.safetensors, second"):
        adapter_files.find(tmp_path / "a")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04.")
    assert (
        adapter_files.find(tmp_path / "other.safetensors")
        is None
        is adapter_files.find(tmp_path / "pickle.pt")
    )
    assert not lora.is_adapter(wan.source) and not lora.is_adapter(tmp_path / "gone")
