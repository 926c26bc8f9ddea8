"""The catalogue: names lead to cards, sources to directories, overrides into configs; every wrong one to a sentence."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog, partial
from polymodal.models.understanding import glm4v, glm4v_moe, minicpmv
from polymodal.parallel import apply
from polymodal.recipe import Model, Parallel, Recipe
from tests.models import tiny


@pytest.mark.parametrize(
    "text,card,size",
    [
        ("qwen2.5-vl-7b", "qwen2.5-vl", "7b"),
        ("Qwen2.5-VL-7B", "qwen2.5-vl", "7b"),
        ("Qwen2.5-VL-7B-Instruct", "qwen2.5-vl", "7b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl", "7b"),
        ("qwen2.5vl:3b", "qwen2.5-vl", "3b"),
        ("qwen2_vl", "qwen2-vl", None),
        ("qwen3vl 8b", "qwen3-vl", "8b"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl-moe", "30b-a3b"),
        ("qwen3-vl-moe-235b-a22b", "qwen3-vl-moe", "235b-a22b"),
    ],
)
def test_names_that_people_write_lead_to_the_card(text, card, size):
    found = catalog.named(text)
    assert found is not None and (found[0].name, found[1]) == (card, size)
    assert catalog.find(text).name == card


def test_names_are_not_shared_by_two_cards():
    hubs = [size.hub for card in catalog.cards().values() for size in card.sizes.values()]
    names = [name for card in catalog.cards().values() for name in (card.name, *card.aliases)]
    for listed in (hubs, names):
        assert len(listed) == len(set(listed)), listed
    owners: dict[str, list[str]] = {}
    for card in catalog.cards().values():
        for architecture in card.architectures:
            owners.setdefault(architecture, []).append(card.name)
    shared = {tuple(cards) for cards in owners.values() if len(cards) > 1}
    assert shared == {("wan2.1", "wan2.2")}, "distinguished by Family.claims"
    for card in catalog.cards().values():
        assert set(card.seeds) <= set(card.sizes) and card.verified and card.keywords and card.tasks


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_directory_is_recognised_by_its_architectures(name, checkpoint):
    directory = checkpoint(name)
    assert catalog.find(directory).name == name
    assert catalog.resolve(str(directory)) == directory
    family = catalog.family(Model(source=str(directory), attention="sdpa"))
    assert family.card.name == name and family.source == str(directory) and family.attention == "sdpa"
    assert family.build().model.visual.config._attn_implementation == "sdpa"


def test_a_config_without_architectures_is_recognised_by_its_type(checkpoint, tmp_path):
    data = json.loads((checkpoint("qwen2-vl") / "config.json").read_text())
    del data["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert catalog.find(tmp_path).name == "qwen2-vl"
    assert catalog.family(Model(source=str(tmp_path), init="random")).card.name == "qwen2-vl"


def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("qwen2.5-vl"), tmp_path / "copy")


def refusal(source, match, **options):
    with pytest.raises(PolymodalError, match=match) as caught:
        catalog.resolve(source, **options)
    assert caught.value.hint, "every refusal says how it is mended"
    return caught.value.hint


def test_wrong_sources_are_refused_with_the_fix(checkpoint, tmp_path):
    assert "qwen2.5-vl-7b" in refusal("qwen25-vl-7b", "neither a directory nor a hub id")
    assert "Check the path" in refusal("/nowhere/at/all", "neither a directory")
    assert "qwen2.5-vl-3b, qwen2.5-vl-7b" in refusal("qwen2.5-vl", "several sizes")
    assert "holds config.json" in refusal(tmp_path, "no config.json")
    shutil.copytree(checkpoint("qwen2-vl"), tmp_path / "run" / "export")
    assert "run/export" in refusal(tmp_path / "run", "no config.json")


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"})
    )
    hint = refusal(tmp_path, "LoRA adapter of Qwen/Qwen2-VL-2B-Instruct")
    assert "checkpoint.init_from" in hint and "--merge-lora" in hint


def test_incomplete_weights_are_named(checkpoint, tmp_path):
    directory = copied(checkpoint, tmp_path)
    (directory / "model.safetensors").unlink()
    assert "model.init to random" in refusal(directory, "lacks model.safetensors")
    assert catalog.resolve(directory, weights=False) == directory
    assert catalog.family(Model(source=str(directory), init="random")).card.name == "qwen2.5-vl"
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"x" * 2000)
    refusal(directory, "lacks model-00002-of-00002.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model-00001-of-00002.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")
    assert "save_pretrained" in refusal(directory, "pickle format only")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_git_lfs_pointers_are_not_taken_for_files(file, checkpoint, tmp_path):
    directory = copied(checkpoint, tmp_path)
    (directory / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "git lfs pull" in refusal(directory, f"{file} is a git-lfs pointer")


def test_broken_and_unknown_configs(checkpoint, tmp_path):
    directory = copied(checkpoint, tmp_path)
    (directory / "config.json").write_text("{")
    with pytest.raises(PolymodalError, match=r"config\.json cannot be read"):
        catalog.find(directory)
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2_5_VLForTokenGeneration"], "model_type": "x"})
    )
    with pytest.raises(PolymodalError, match="Qwen2_5_VLForTokenGeneration / x has no card") as caught:
        catalog.find(directory)
    assert "Nearest: qwen2.5-vl" in caught.value.hint and "qwen3-vl-moe" in caught.value.hint


# the hub


def cached(checkpoint, root, name="Qwen/Qwen2.5-VL-3B-Instruct", without=()):
    """A tiny checkpoint laid out as huggingface_hub's cache lays out a repository."""
    base = root / f"models--{name.replace('/', '--')}"
    snapshot = base / "snapshots" / ("0" * 40)
    shutil.copytree(checkpoint("qwen2.5-vl"), snapshot)
    for file in without:
        (snapshot / file).unlink()
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_cached_repository_needs_no_network(checkpoint, hub):
    snapshot = cached(checkpoint, hub)
    for source in ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b"):
        assert catalog.resolve(source) == snapshot
        assert catalog.family(Model(source=source)).source == str(snapshot)


def test_offline_says_what_is_missing_and_the_command(checkpoint, hub):
    hint = refusal(
        "qwen2.5-vl-7b",
        "Qwen/Qwen2.5-VL-7B-Instruct is no directory here, .* it is not complete .*missing: config.json.* offline",
    )
    assert "`polymodal download Qwen/Qwen2.5-VL-7B-Instruct`" in hint
    cached(checkpoint, hub, without=["model.safetensors"])
    hint = refusal("qwen2.5-vl-3b", r"missing: model\.safetensors")
    cached(checkpoint, hub, name="someone/their-model")
    assert catalog.find("someone/their-model").name == "qwen2.5-vl"
    assert "--revision abc" in refusal("someone/their-model", "missing", revision="abc")


def test_a_hub_out_of_reach_is_one_sentence(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hint = refusal("someone/their-model", "the hub cannot be reached")
    assert "polymodal download someone/their-model" in hint


# overrides


def test_overrides_reach_the_config_and_the_model(checkpoint):
    changes = {
        "text_config.num_hidden_layers": 2,
        "vision_config": {"depth": 3, "fullatt_block_indexes": [0]},
        "text_config.rms_norm_eps": 1,
    }
    family = catalog.family(Model(source=str(checkpoint("qwen2.5-vl")), config=changes))
    model = family.build()
    assert len(model.model.language_model.layers) == 2 and len(model.model.visual.blocks) == 3
    assert family.config.text_config.layer_types == ["full_attention"] * 2
    assert (
        family.config.text_config.rms_norm_eps == 1.0
        and family.config.vision_config.fullatt_block_indexes == [0]
    )


@pytest.mark.parametrize(
    "changes,message,hint",
    [
        ({"num_hidden_layers": 2}, "`num_hidden_layers` is not a key", "`text_config.num_hidden_layers`"),
        ({"text_config.num_hiden_layers": 2}, "not a key", "`text_config.num_hidden_layers`"),
        ({"text.num_hidden_layers": 2}, "not a key", "`text_config.num_hidden_layers`"),
        ({"text_config.zzz": 2}, "not a key", "config.json"),
        ({"text_config.num_hidden_layers": "two"}, "is a str, the config has a int", "that type"),
        ({"text_config.num_hidden_layers": True}, "is a bool", "that type"),
        ({"vision_config.fullatt_block_indexes": 3}, "is a int, the config has a list", "that type"),
        ({"vision_config.depth": 2}, "fullatt_block_indexes names layer 3", "fullatt_block_indexes"),
        ({"text_config.hidden_size": 128}, "gives features of 64.* takes 128", "alike"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(changes, message, hint, checkpoint):
    with pytest.raises(PolymodalError, match=message) as caught:
        catalog.family(Model(source=str(checkpoint("qwen2.5-vl")), config=changes))
    assert hint in caught.value.hint


# published sizes: hidden, layers, heads, key heads, feed-forward, vocabulary, tied; depth and width of the vision tower


def qwen2(hidden, layers, heads, keys, wide, words, tied, vision):
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0}
    more = {"vocab_size": words, "tie_word_embeddings": tied, "vision_config": vision}
    return {**text, **rope, **more, "intermediate_size": wide}


def qwen3(hidden, layers, heads, keys, wide, tied, depth, width, tall, **more):
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
    }
    text |= {"intermediate_size": wide, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5000000, **more}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": tall, "out_hidden_size": hidden}
    vision["deepstack_visual_indexes"] = [depth // 4, depth // 2, 3 * depth // 4]
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def seen(out, wide):
    return {"depth": 32, "hidden_size": 1280, "intermediate_size": wide, "out_hidden_size": out}


def internvl(kind, hidden, layers, heads, keys, wide, words, large=False, **more):
    text = {"model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": words}
    text |= {"num_attention_heads": heads, "num_key_value_heads": keys, "intermediate_size": wide, **more}
    vision = {"attention_bias": True}
    if large:
        vision = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25}
        vision |= {"intermediate_size": 12800, "use_qk_norm": True, "norm_type": "rms_norm"}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


def llava(hidden, layers, heads, wide):
    text = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 32064}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": wide}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "intermediate_size": 4096, "image_size": 336, "patch_size": 14}
    vision |= {"projection_dim": 768}
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


def deepseek(layers, hidden, heads, wide, expert, experts, words, **more):
    text = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    text |= {"num_key_value_heads": heads, "intermediate_size": wide, "moe_intermediate_size": expert}
    text |= {
        "n_routed_experts": experts,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "vocab_size": words,
    }
    text |= {"first_k_dense_replace": 1, "q_lora_rank": None, "max_position_embeddings": 4096, **more}
    vision = {"layers": 27, "mlp_ratio": 3.7362, "patch_size": 14, "width": 1152, "heads": 16}
    projector = {"input_dim": 1152, "n_embed": hidden}
    sections = {"language_config": text, "vision_config": vision, "projector_config": projector}
    return {**sections, "image_token_id": 100003, "tie_word_embeddings": False}


PUBLISHED = {
    ("deepseek-vl2", "tiny"): deepseek(
        *(12, 1280, 10, 6848, 896, 64, 129280),
        **{
            "use_mla": False,
            "kv_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
        },
    ),
    ("deepseek-vl2", "small"): deepseek(27, 2048, 16, 10944, 1408, 64, 102400),
    ("deepseek-vl2", "base"): deepseek(
        *(30, 2560, 32, 12288, 1536, 72, 129280),
        **{
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.0,
        },
    ),
    ("minicpm-v", "2.5-8b"): minicpmv.LLAMA,
    ("minicpm-v", "2.6-8b"): minicpmv.QWEN,
    ("glm4.1v", "9b"): glm4v.CONFIG,
    ("glm4.5v", "106b-a12b"): glm4v_moe.CONFIG,
    ("internvl", "2-8b"): internvl("llama", 4096, 32, 32, 8, 14336, 92553),
    ("internvl", "2.5-1b"): internvl("qwen2", 896, 24, 14, 2, 4864, 151674),
    ("internvl", "2.5-4b"): internvl("qwen2", 2048, 36, 16, 2, 11008, 151674),
    ("internvl", "2.5-8b"): internvl("llama", 4096, 32, 32, 8, 14336, 92553),
    ("internvl", "2.5-26b"): internvl("llama", 6144, 48, 48, 8, 16384, 92553, True),
    ("internvl", "2.5-38b"): internvl("qwen2", 5120, 64, 40, 8, 27648, 151674, True),
    ("internvl", "2.5-78b"): internvl("qwen2", 8192, 80, 64, 8, 29568, 151674, True),
    ("internvl", "3-1b"): internvl("qwen2", 896, 24, 14, 2, 4864, 151674),
    ("internvl", "3-2b"): internvl("qwen2", 1536, 28, 12, 2, 8960, 151674),
    ("internvl", "3-8b"): internvl("qwen2", 3584, 28, 28, 4, 18944, 151674),
    ("internvl", "3-14b"): internvl("qwen2", 5120, 48, 40, 8, 13824, 151674),
    ("internvl", "3-38b"): internvl("qwen2", 5120, 64, 40, 8, 27648, 151674, True),
    ("internvl", "3-78b"): internvl("qwen2", 8192, 80, 64, 8, 29568, 151674, True),
    ("internvl", "3.5-4b"): internvl("qwen3", 2560, 36, 32, 8, 9728, 151936, head_dim=128),
    ("internvl", "3.5-8b"): internvl("qwen3", 4096, 36, 32, 8, 12288, 151936, head_dim=128),
    ("internvl", "3.5-30b-a3b"): internvl(
        "qwen3_moe",
        2048,
        48,
        32,
        4,
        6144,
        151936,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    ("llava-1.5", "7b"): llava(4096, 32, 32, 11008),
    ("llava-1.5", "13b"): llava(5120, 40, 40, 13824),
    ("qwen2-vl", "2b"): qwen2(1536, 28, 12, 2, 8960, 151936, True, {"embed_dim": 1280, "hidden_size": 1536}),
    ("qwen2-vl", "7b"): qwen2(
        3584, 28, 28, 4, 18944, 152064, False, {"embed_dim": 1280, "hidden_size": 3584}
    ),
    ("qwen2-vl", "72b"): qwen2(
        8192, 80, 64, 8, 29568, 152064, False, {"embed_dim": 1280, "hidden_size": 8192}
    ),
    ("qwen2.5-vl", "3b"): qwen2(2048, 36, 16, 2, 11008, 151936, True, seen(2048, 3420)),
    ("qwen2.5-vl", "7b"): qwen2(3584, 28, 28, 4, 18944, 152064, False, seen(3584, 3420)),
    ("qwen2.5-vl", "32b"): qwen2(5120, 64, 40, 8, 27648, 152064, False, seen(5120, 3456)),
    ("qwen2.5-vl", "72b"): qwen2(8192, 80, 64, 8, 29568, 152064, False, seen(8192, 3456)),
    ("qwen3-vl", "2b"): qwen3(2048, 28, 16, 8, 6144, True, 24, 1024, 4096),
    ("qwen3-vl", "4b"): qwen3(2560, 36, 32, 8, 9728, True, 24, 1024, 4096),
    ("qwen3-vl", "8b"): qwen3(4096, 36, 32, 8, 12288, False, 27, 1152, 4304),
    ("qwen3-vl", "32b"): qwen3(5120, 64, 64, 8, 25600, False, 27, 1152, 4304),
    ("qwen3-vl-moe", "30b-a3b"): qwen3(
        2048,
        48,
        32,
        4,
        6144,
        False,
        27,
        1152,
        4304,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    ("qwen3-vl-moe", "235b-a22b"): qwen3(
        4096,
        94,
        64,
        4,
        12288,
        False,
        27,
        1152,
        4304,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
    ),
}


def test_every_size_of_the_catalogue_is_listed_here():
    cards = [card for card in catalog.cards().values() if card.kind == "understanding"]
    assert set(PUBLISHED) == {(card.name, key) for card in cards for key in card.sizes}


@pytest.mark.parametrize("name,key", PUBLISHED)
def test_a_published_config_builds_the_model_the_card_describes(name, key, tmp_path):
    """The hub's own config layout (flat before Qwen3) -> the model on meta: layers, parameters, tied heads, cost."""
    card = catalog.cards()[name]
    size = card.sizes[key]
    data = {
        "architectures": [card.architectures[0]],
        "model_type": card.architectures[1],
        "tie_word_embeddings": False,
        **PUBLISHED[name, key],
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    family = catalog.family(Model(source=str(tmp_path), init="random"))
    model = family.build()
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(size.parameters, rel=0.01)
    blocks = partial.blocks(model, card.pipeline["vision"])
    assert (len(model.model.language_model.layers), len(blocks)) == (
        size.layers,
        size.vision_layers,
    )
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == data[
        "tie_word_embeddings"
    ]
    tokens = 10  # too few for attention to weigh: two operations for each weight that a token meets
    met = family.cost(SampleLengths(tokens, tokens)) / 2 / tokens / 1e9
    text = family.config.get_text_config()
    embedding = text.vocab_size * text.hidden_size / 1e9
    outside = (*card.towers["vision"], *card.towers["projector"])
    tower = sum(p.numel() for n, p in model.named_parameters() if n.startswith(outside)) / 1e9
    read = 0 if data["tie_word_embeddings"] else embedding  # looked up, not multiplied
    assert met == pytest.approx((size.active or count - tower) - read, rel=0.02)


def test_compile_is_refused_where_torch_makes_no_code_for_the_device(checkpoint):
    family = catalog.family(Model(source=str(checkpoint("qwen2.5-vl"))))
    sizes = ParallelSizes.of(Parallel(), 1)
    mesh: Any = SimpleNamespace(sizes=sizes, device_type="npu", view=lambda axis: None)
    recipe = Recipe(model=Model(source="x"), parallel=Parallel(compile=True))
    with pytest.raises(
        PolymodalError, match=r"parallel.compile: torch's compiler makes no code for npu here"
    ):
        apply.apply(family.build(), family.card, mesh, recipe)
