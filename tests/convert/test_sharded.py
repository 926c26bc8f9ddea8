"""DCP directories: exact both ways, names and shapes as documented, several prefixes, experts merged and split, adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from tests.convert import keylists, layouts
from tests.convert.commands import ok
from tests.convert.hubs import HUBS, keys_only
from tests.convert.layouts import tensors


def fqns(directory):
    """Name -> shape of a DCP directory, by torch's own reader."""
    table = FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in table.items() if hasattr(entry, "size")}


@pytest.mark.parametrize("name", ["qwen3-vl, tied", "qwen3-vl experts"])
def test_qwen_3_vl(here, name):
    source = HUBS[name].make(here / "hf")
    ok("mm-convert Qwen3VLConverter hf_to_dcp --hf_dir hf --dcp_dir dcp")
    assert (here / "dcp/latest_checkpointed_iteration.txt").read_text() == "release"
    hub, made = tensors(source), fqns(here / "dcp/release")
    assert made.keys() == {f"model.model.{key}" for key in hub}
    for key, value in hub.items():
        shape = tuple(value.shape)
        flat = (shape[0] * shape[1], shape[2]) if ".experts." in key else shape
        assert made[f"model.model.{key}"] == flat
    ok("mm-convert Qwen3VLConverter dcp_to_hf --load_dir dcp/release --save_dir out --model_assets_dir hf")
    layouts.same(hub, tensors(here / "out"))


@pytest.mark.slow
def test_qwen_3_vl_head_and_lora_base(here):
    source = HUBS["qwen3-vl, tied"].make(here / "hf")
    ok(
        "mm-convert Qwen3VLConverter hf_to_dcp --hf_dir hf --dcp_dir dcp --tie_weight True --is_lora_base true"
    )
    made = fqns(here / "dcp/release")
    prefix = "model.base_model.model.model."
    assert made[f"{prefix}lm_head.weight"] == made[f"{prefix}model.language_model.embed_tokens.weight"]
    assert {f"{prefix}{key}" for key in tensors(source)} <= made.keys()


def test_an_adapter_goes_and_comes_and_is_added(here):
    source = HUBS["qwen3-vl, tied"].make(here / "hf")
    base, (one, two) = (
        tensors(source),
        ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.2.mlp.down_proj"),
    )
    (here / "lora").mkdir()
    adapter = {}
    for name in (one, two):
        rows, columns = base[f"{name}.weight"].shape
        adapter[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
        adapter[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(adapter, here / "lora/adapter_model.safetensors")
    ok("mm-convert Qwen3VLConverter lora_hf_to_dcp --hf_dir lora --dcp_dir lora-dcp")
    assert f"model.base_model.model.model.{one}.lora_A.default.weight" in fqns(here / "lora-dcp/release")
    ok(
        "mm-convert Qwen3VLConverter lora_dcp_to_hf --lora_dcp_dir lora-dcp --save_dir lora-out --lora_alpha 8"
    )
    layouts.same(adapter, load_file(here / "lora-out/adapter_model.safetensors"))
    config = json.loads((here / "lora-out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, sorted([one, two]))
    line = "mm-convert Qwen3VLConverter merge_mm_lora_dcp_weight_to_base_hf --base_hf_dir hf --lora_dcp_dir lora-dcp --save_merged_hf_dir sum --scaling 2.0 --lora_target_modules q_proj"
    ok(line)
    merged = tensors(here / "sum")
    a, b = (adapter[f"base_model.model.{one}.lora_{x}.weight"] for x in "AB")
    want = (base[f"{one}.weight"].float() + (b @ a) * 2.0).to(torch.bfloat16)
    torch.testing.assert_close(merged[f"{one}.weight"], want)
    assert torch.equal(
        merged[f"{two}.weight"], base[f"{two}.weight"]
    )  # not among the modules that were asked for


@pytest.mark.parametrize("scheme", ["merge", "split"])
def test_experts_merged_and_split(here, scheme):
    keys = keylists.internvl_chat(experts=4)
    source = keys_only(keys, keylists.chat_config(experts=4))(here / "hf")
    ok("mm-convert moe_expert --style merge --hf_dir hf --save_dir merged --max_shard_size 20KB")
    merged, hub, layer = (
        tensors(here / "merged"),
        tensors(source),
        "language_model.model.layers.1.mlp.experts",
    )
    parts = [torch.cat([hub[f"{layer}.{e}.{x}_proj.weight"] for x in ("gate", "up")]).T for e in range(4)]
    assert torch.equal(merged[f"{layer}.gate_up_proj"], torch.cat(parts))
    assert torch.equal(
        merged[f"{layer}.down_proj"], torch.cat([hub[f"{layer}.{e}.down_proj.weight"].T for e in range(4)])
    )
    assert (here / "merged/config.json").is_file() and len(
        list((here / "merged").glob("model-*.safetensors"))
    ) > 2
    command = "moe_expert --style split" if scheme == "split" else "ExpertMergeDcpConverter split"
    ok(f"mm-convert {command} --hf_dir merged --save_dir apart")
    layouts.same(hub, tensors(here / "apart"))


def thinker():
    keys = {
        "thinker.model.embed_tokens.weight": (16, 8),
        "talker.model.layers.0.mlp.experts.0.down_proj.weight": (8, 4),
        "code2wav.x": (3,),
    }
    for e in range(4):
        keys |= keylists.expert(f"thinker.model.layers.0.mlp.experts.{e}", 8, 4)
    return keys, {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": {"text_config": {"num_experts": 4}},
    }


def glm():
    keys = {"lm_head.weight": (16, 8)} | keylists.expert("model.language_model.layers.0.mlp", 8, 12)
    for e in range(4):
        keys |= keylists.expert(f"model.language_model.layers.1.mlp.experts.{e}", 8, 4)
    return keys, {
        "architectures": ["Glm4vMoeForConditionalGeneration"],
        "text_config": {"n_routed_experts": 4},
    }


@pytest.mark.parametrize("which", ["internvl", "glm", "omni"])
def test_expert_merge_dcp(here, which):
    keys, config = {
        "internvl": lambda: (keylists.internvl_chat(experts=4), keylists.chat_config(experts=4)),
        "glm": glm,
        "omni": thinker,
    }[which]()
    source = keys_only(keys, config)(here / "hf")
    ok("mm-convert ExpertMergeDcpConverter hf_to_dcp --hf_dir hf --save_dir dcp")
    made = fqns(here / "dcp/release")
    name = {
        "internvl": "model.model.language_model.model.layers.0.mlp",
        "glm": "model.model.model.language_model.layers.1.mlp",
        "omni": "model.model.model.layers.0.mlp",
    }[which]
    sizes = {
        "internvl": (128, 24),
        "glm": (32, 8),
        "omni": (4, 8, 8),
    }  # flat; Qwen3-Omni's keep their three dimensions
    assert made[f"{name}.experts.gate_up_proj"] == sizes[which]
    ok("mm-convert ExpertMergeDcpConverter dcp_to_hf --hf_dir hf --dcp_dir dcp/release --save_dir out")
    layouts.same(tensors(source), tensors(here / "out"))


def test_qwen_3_5(here):
    keys = {
        "lm_head.weight": (16, 8),
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 6, 8),
        "model.language_model.layers.0.mlp.experts.down_proj": (4, 8, 3),
        "mtp.norm.weight": (8,),
    }
    for e in range(4):
        keys |= keylists.expert(f"mtp.layers.0.mlp.experts.{e}", 8, 3)
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": {"num_experts": 4}}
    source = keys_only(keys, config)(here / "hf")
    ok(
        'mm-convert Qwen35Converter hf_to_dcp --hf_dir hf --dcp_dir dcp --tie_weight_mapping \'{"head.weight":"lm_head.weight"}\''
    )
    made = fqns(here / "dcp/release")
    assert made["model.model.language_model.layers.0.mlp.experts.gate_up_proj"] == (4, 8, 6)
    assert made["model.mtp.layers.0.mlp.experts.gate_up_proj"] == (4, 8, 6) and made["model.head.weight"] == (
        16,
        8,
    )
    ok("mm-convert Qwen35Converter hf_to_dcp --hf_dir hf --dcp_dir dcp")
    ok("mm-convert Qwen35Converter dcp_to_hf --dcp_dir dcp/release --save_hf_dir out --origin_hf_dir hf")
    layouts.same(tensors(source), tensors(here / "out"))


@pytest.mark.slow
def test_any_model_behind_any_prefix(here):
    source = keys_only(
        {"model.a.weight": (4, 3), "model.experts.gate_up_proj": (2, 3, 5), "lm_head.weight": (4, 3)},
        {"num_experts": 2, "text_config": {"num_experts": 2}},
    )(here / "hf")
    line = "--dcp_prefix net. --fused_linear_names '[gate_up_proj]'"
    ok(f"mm-convert GenericDCPConverter hf_to_dcp --hf_dir hf --dcp_dir dcp {line}")
    assert fqns(here / "dcp/release")["model.net.model.experts.gate_up_proj"] == (6, 5)
    ok(
        f"mm-convert GenericDCPConverter dcp_to_hf --load_dir dcp/release --save_dir out --model_assets_dir hf {line}"
    )
    layouts.same(tensors(source), tensors(here / "out"))


def test_mistral_names_are_the_librarys(here):
    """The table says what the library's registry of conversions says."""
    import transformers

    from polymodal.convert.family import family
    from polymodal.convert.table import forward
    from polymodal.models import library

    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
        "head_dim": 8,
    }
    text = {
        "model_type": "mistral",
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "head_dim": 8,
    }
    config = transformers.Mistral3Config(vision_config={"model_type": "pixtral", **vision}, text_config=text)
    model = transformers.Mistral3ForConditionalGeneration(config)
    model.save_pretrained(here / "hf")
    hub = tensors(here / "hf")
    published = {key for key in hub if key.startswith("language_model.")}
    assert published, "the library saves the published names"
    plan = library.layout(model, {key: tuple(value.shape) for key, value in hub.items()})
    library_names = {stored.keys[0]: name for name, stored in plan.entries.items()}
    table = family("mistral3-dcp").table()
    ours = forward(table, {key: tuple(value.shape) for key, value in hub.items()}, {}, "hf")
    for name, stored in ours.items():
        assert name == "model." + library_names[stored.keys[0]]
    ok("mm-convert Mistral3Converter hf_to_dcp --hf_dir hf --dcp_dir dcp")
    ok("mm-convert Mistral3Converter dcp_to_hf --load_dir dcp/release --save_dir out --model_assets_dir hf")
    layouts.same(hub, tensors(here / "out"))
