"""LoRA adapters both ways and added to their base; the original codes' files; the language model of a LLaVA."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import keylists, layouts
from tests.convert.commands import ok, run
from tests.convert.hubs import HUBS, keys_only, understanding
from tests.convert.layouts import tensors

CANONICAL = "--cfg.common_model_config.enable_canonical_hf_struct true"


def test_an_adapter_of_qwen_2_5_vl_goes_and_comes(here):
    import peft
    from transformers import Qwen2_5_VLForConditionalGeneration

    source = understanding("qwen2.5-vl")(here / "hf")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "qkv", "attn.proj"]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )
    model.save_pretrained(here / "lora")
    cut = "--cfg.parallel_config.llm_pp_layers [1,2] --cfg.parallel_config.vit_pp_layers [4,0] --cfg.parallel_config.tp_size 2"
    ok(
        f"mm-convert Qwen2_5_VLConverter lora_hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir lora {CANONICAL} {cut}"
    )
    tree, adapter = layouts.tree(here / "mm"), load_file(here / "lora/adapter_model.safetensors")
    down = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_{}.weight"
    at = "mp_rank_01_001/model:text_decoder.decoder.layers.0.mlp.linear_fc2.lora_{}.default.weight"
    assert torch.equal(tree[at.format("A")], adapter[down.format("A")].chunk(2, 1)[1])  # the input is cut
    assert torch.equal(tree[at.format("B")], adapter[down.format("B")])
    ok(
        f"mm-convert Qwen2_5_VLConverter lora_mm_to_hf --cfg.mm_dir mm --cfg.save_hf_dir out {CANONICAL} {cut} --cfg.lora_alpha 8"
    )
    layouts.same(adapter, load_file(here / "out/adapter_model.safetensors"))
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    again = peft.PeftModel.from_pretrained(base, here / "out").eval()
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]
        torch.testing.assert_close(again(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_adapters_of_fused_layers_are_refused(here, capsys):
    (here / "lora").mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, here / "lora/adapter_model.safetensors")
    assert (
        run("mm-convert Qwen2_5_VLConverter lora_hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir lora") == 2
    )
    assert "enable_canonical_hf_struct" in capsys.readouterr().err


def wan_adapter(names, a="lora_A.weight", b="lora_B.weight"):
    return {
        f"{name}.{leaf}": torch.randn(*shape)
        for name in names
        for leaf, shape in ((a, (2, 24)), (b, (24, 2)))
    }


@pytest.mark.parametrize("style", ["diffusers", "original", "prefixed"])
def test_adapters_of_wan(here, style):
    HUBS["wan t2v"].make(here / "hf")
    (here / "lora").mkdir()
    ours = [f"blocks.{n}.self_attn.proj_q" for n in range(5)] + [
        f"blocks.{n}.cross_attn.proj_out" for n in range(5)
    ]
    if style == "diffusers":
        names = [f"transformer.blocks.{n}.attn1.to_q" for n in range(5)] + [
            f"transformer.blocks.{n}.attn2.to_out.0" for n in range(5)
        ]
        adapter = wan_adapter(names)
    elif style == "original":
        names = [f"blocks.{n}.self_attn.q" for n in range(5)] + [f"blocks.{n}.cross_attn.o" for n in range(5)]
        adapter = wan_adapter(names, "lora_A.default.weight", "lora_B.default.weight")
    else:
        names = [f"diffusion_model.blocks.{n}.self_attn.q" for n in range(5)] + [
            f"diffusion_model.blocks.{n}.cross_attn.o" for n in range(5)
        ]
        adapter = wan_adapter(names)
    save_file(adapter, here / "lora/adapter_model.safetensors")
    pp = "--cfg.target_parallel_config.pp_layers [2,3]"
    ok(f"mm-convert WanConverter lora_hf_to_mm --cfg.source_path lora --cfg.target_path lora-mm {pp}")
    tree = layouts.tree(here / "lora-mm")
    for mine, theirs in zip(ours, names, strict=True):
        block, stage = int(mine.split(".")[1]), 0
        if block >= 2:
            block, stage = block - 2, 1
        local = f"blocks.{block}." + mine.split(".", 2)[2]
        leaf = next(key for key in adapter if key.startswith(theirs + ".") and "lora_B" in key)
        assert torch.equal(tree[f"mp_rank_00_00{stage}/model:{local}.lora_B.default.weight"], adapter[leaf])
    ok("mm-convert WanConverter lora_mm_to_hf --cfg.source_path lora-mm --cfg.target_path lora-out")
    out = load_file(here / "lora-out/pytorch_lora_weights.safetensors")
    assert len(out) == len(adapter) and all(key.startswith("transformer.blocks.") for key in out)
    if style == "diffusers":
        layouts.same(adapter, out)
    ok("mm-convert WanConverter hf_to_mm --cfg.source_path hf --cfg.target_path mm")
    line = "mm-convert WanConverter merge_lora_to_base --cfg.source_path mm --cfg.lora_path lora-mm --cfg.target_path sum --lora_rank 2 --lora-alpha 4"
    ok(line)
    base, merged = layouts.tree(here / "mm"), layouts.tree(here / "sum")
    changed = {
        key.partition(":")[2].removesuffix(".weight")
        for key in base
        if not torch.equal(base[key], merged[key])
    }
    assert changed == set(ours)
    key = "mp_rank_00/model:blocks.3.self_attn.proj_q.weight"
    a, b = (out[f"transformer.blocks.3.attn1.to_q.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(merged[key], base[key] + 2 * (b @ a))
    assert run(line.replace("--lora_rank 2", "--lora_rank 8")) == 2


@pytest.mark.slow
def test_adapters_open_in_diffusers(here):
    import diffusers

    HUBS["wan t2v"].make(here / "hf")
    (here / "lora").mkdir()
    save_file(
        wan_adapter(
            [f"blocks.{n}.self_attn.q" for n in range(5)], "lora_A.default.weight", "lora_B.default.weight"
        ),
        here / "lora/adapter_model.safetensors",
    )
    ok("mm-convert WanConverter lora_hf_to_mm --cfg.source_path lora --cfg.target_path lora-mm")
    ok("mm-convert WanConverter lora_mm_to_hf --cfg.source_path lora-mm --cfg.target_path lora-out")
    model = diffusers.WanTransformer3DModel.from_pretrained(here / "hf")
    model.load_lora_adapter(
        load_file(here / "lora-out/pytorch_lora_weights.safetensors"), prefix="transformer"
    )
    assert next(iter(model.peft_config.values())).r == 2


@pytest.mark.slow
def test_wan_to_dcp_and_back(here):
    source = HUBS["wan i2v"].make(here / "hf")
    ok(
        "mm-convert WanConverter hf_to_mm --cfg.source_path hf --cfg.target_path mm --cfg.target_parallel_config.pp_layers [[1,2],[1,1]]"
    )
    ok("mm-convert WanConverter mm_to_dcp --cfg.source_path mm --cfg.target_path dcp")
    from tests.convert.test_sharded import fqns

    assert "model.blocks.4.ffn.0.weight" in fqns(here / "dcp/release")
    ok(
        "mm-convert WanConverter dcp_to_mm --cfg.source_path dcp --cfg.target_path again --cfg.target_parallel_config.pp_layers [4,1]"
    )
    ok("mm-convert WanConverter mm_to_hf --cfg.source_path again --cfg.target_path out --cfg.hf_dir hf")
    layouts.same(tensors(source), tensors(here / "out"))


def saved(keys, path, inside):
    state = {key: torch.randn(shape) for key, shape in keys.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({inside: state, "step": 3} if inside else state, path)
    return state


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_hunyuan_video_from_its_original_file(here, tp):
    state = saved(keylists.hunyuan(), here / "hunyuan/mp_rank_00/model_states.pt", "module")
    line = f"mm-convert HunyuanVideoConverter --version t2v source_to_mm --cfg.source_path hunyuan/mp_rank_00/model_states.pt --cfg.target_path mm --cfg.target_parallel_config.tp_size={tp}"
    ok(line)
    tree = layouts.tree(here / "mm")
    columns = state["single_blocks.1.linear2.weight"]
    want = torch.cat([columns[:, :32].chunk(tp, 1)[-1], columns[:, 32:].chunk(tp, 1)[-1]], 1)
    assert torch.equal(tree[f"mp_rank_0{tp - 1}/model:single_blocks.1.linear2.weight"], want)
    qkv, mlp = state["single_blocks.1.linear1.bias"].split([96, 48])
    assert torch.equal(tree["mp_rank_00/model:single_blocks.1.linear1_mlp.bias"], mlp.chunk(tp)[0])
    assert torch.equal(
        tree["mp_rank_00/model:single_blocks.1.linear1_qkv.bias"],
        torch.cat([x.chunk(tp)[0] for x in qkv.chunk(3)]),
    )
    ok("mm-convert HunyuanVideoConverter mm_to_source --cfg.source_path mm --cfg.target_path out")
    layouts.same(state, tensors(here / "out"))
    # a tree is cut again by the same method
    ok(
        "mm-convert HunyuanVideoConverter --version t2v source_to_mm --cfg.source_path mm --cfg.target_path one"
    )
    assert {key.partition("/")[0] for key in layouts.tree(here / "one")} == {"mp_rank_00"}


@pytest.mark.slow
def test_hunyuan_video_adapter(here):
    prefix = "Hunyuan_video_I2V_lora_"
    keys = {}
    for name, rows, columns in (
        ("single_blocks_0_linear1", 144, 32),
        ("single_blocks_0_linear2", 32, 80),
        ("double_blocks_1_img_attn_qkv", 96, 32),
        ("double_blocks_1_txt_mlp_fc1", 48, 32),
    ):
        keys |= {
            f"{prefix}{name}.lora_down.weight": (4, columns),
            f"{prefix}{name}.lora_up.weight": (rows, 4),
            f"{prefix}{name}.alpha": (),
        }
    save_file({key: torch.randn(shape) for key, shape in keys.items()}, here / "kohya.safetensors")
    ok(
        "mm-convert HunyuanVideoConverter --version i2v-lora source_to_mm --cfg.source_path kohya.safetensors --cfg.target_path mm"
    )
    tree, state = layouts.tree(here / "mm"), load_file(here / "kohya.safetensors")
    for half, rows in (("qkv", slice(0, 96)), ("mlp", slice(96, 144))):
        at = f"mp_rank_00/model:single_blocks.0.linear1_{half}.lora_{{}}.default.weight"
        assert torch.equal(tree[at.format("A")], state[f"{prefix}single_blocks_0_linear1.lora_down.weight"])
        assert torch.equal(
            tree[at.format("B")], state[f"{prefix}single_blocks_0_linear1.lora_up.weight"][rows]
        )
    assert "mp_rank_00/model:double_blocks.1.txt_mlp.fc1.lora_A.default.weight" in tree
    assert (
        run(
            "mm-convert HunyuanVideoConverter --version i2v source_to_mm --cfg.source_path base.pt --cfg.target_path base"
        )
        == 2
    )  # not there
    base = saved(keylists.hunyuan(), here / "base.pt", "module")
    ok(
        "mm-convert HunyuanVideoConverter --version i2v source_to_mm --cfg.source_path base.pt --cfg.target_path base"
    )
    ok(
        "mm-convert HunyuanVideoConverter --version i2v merge_lora_to_base --cfg.source_path base --cfg.lora_path mm --cfg.target_path sum --lora-alpha 4 --lora-rank 4"
    )
    a, b = (state[f"{prefix}single_blocks_0_linear1.lora_{x}.weight"] for x in ("down", "up"))
    merged = layouts.tree(here / "sum")["mp_rank_00/model:single_blocks.0.linear1_mlp.weight"]
    torch.testing.assert_close(merged, base["single_blocks.0.linear1.weight"][96:] + (b @ a)[96:])


def test_hunyuan_video_1_5_keeps_its_names(here):
    source = keys_only(
        {"double_blocks.0.img_attn_q.weight": (8, 8), "byt5_in.x": (3,)}, None, "diffusion_pytorch_model"
    )(here / "hf")
    ok(
        "mm-convert HunyuanVideoConverter --version 1.5 source_to_mm --cfg.source_path hf --cfg.target_path mm"
    )
    ok(
        "mm-convert HunyuanVideoConverter --version 1.5 mm_to_source --cfg.source_path mm --cfg.target_path out"
    )
    layouts.same(tensors(source), tensors(here / "out"))


@pytest.mark.slow
def test_the_text_encoder_of_hunyuan_video(here):
    from transformers import (
        AutoModelForCausalLM,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    model.save_pretrained(here / "llava")
    ok(
        "mm-convert HunyuanVideoConverter --version t2v t2v_text_encoder --cfg.source_path llava --cfg.target_path encoder"
    )
    made = AutoModelForCausalLM.from_pretrained(here / "encoder", dtype="auto")
    assert made.dtype == torch.float16
    want = model.model.language_model.layers[1].mlp.up_proj.weight.half()
    assert torch.equal(made.model.layers[1].mlp.up_proj.weight, want)


def test_cogvideox_by_both_of_its_names_is_one_tree(here):
    source = HUBS["cogvideox"].make(here / "hf")
    tp = "--cfg.target_parallel_config.tp_size 2 --cfg.target_parallel_config.pp_layers [2,3]"
    ok(f"mm-convert CogVideoConverter --version t2v hf_to_mm --cfg.source_path hf --cfg.target_path mm {tp}")
    ok("mm-convert CogVideoConverter mm_to_source --cfg.source_path mm --cfg.target_path original")
    ok(f"mm-convert CogVideoConverter source_to_mm --cfg.source_path original --cfg.target_path again {tp}")
    layouts.same(layouts.tree(here / "mm"), layouts.tree(here / "again"))
    hub, original = tensors(source), tensors(here / "original")
    one, two = (hub[f"transformer_blocks.1.norm{n}.linear.bias"].chunk(6) for n in (1, 2))
    fused = original["model.diffusion_model.mixins.adaln_layer.adaLN_modulations.1.1.bias"]
    assert torch.equal(fused, torch.cat([*one[:3], *two[:3], *one[3:], *two[3:]]))


@pytest.mark.slow
def test_positions_of_cogvideox_may_be_left_out(here):
    saved(keylists.sat(), here / "sat.pt", "module")
    for flag, there in (("", True), ("--remove_pos_emb true", False)):
        ok(
            f"mm-convert CogVideoConverter --version i2v {flag} source_to_mm --cfg.source_path sat.pt --cfg.target_path mm"
        )
        assert any("pos_embed.freqs_cos" in key for key in layouts.tree(here / "mm")) is there


@pytest.mark.slow
def test_open_sora_plan_1_5_from_its_file(here):
    state = saved(keylists.open_sora_plan_15(), here / "osp.pt", "ema_state_dict")
    ok(
        "mm-convert OpenSoraPlanConverter --version v1.5 source_to_mm --cfg.source_path osp.pt --cfg.target_path mm --cfg.target_parallel_config.tp_size 2"
    )
    ok("mm-convert OpenSoraPlanConverter --version v1.5 resplit --cfg.source_path mm --cfg.target_path one")
    ok("mm-convert OpenSoraPlanConverter mm_to_source --cfg.source_path one --cfg.target_path out")
    layouts.same(state, tensors(here / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["OpenSoraConverter", "StepVideoConverter", "VACEConverter", "LuminaConverter", "BagelConverter"]
)
def test_other_sources_through_their_commands(here, line):
    name = {
        "OpenSoraConverter": "open-sora",
        "StepVideoConverter": "stepvideo",
        "VACEConverter": "vace",
        "LuminaConverter": "lumina",
        "BagelConverter": "bagel",
    }[line]
    source = HUBS[name].make(here / "hf")
    ok(f"mm-convert {line} hf_to_mm --cfg.source_path hf --cfg.target_path mm")
    ok(f"mm-convert {line} mm_to_hf --cfg.source_path mm --cfg.target_path out --cfg.hf_dir hf")
    layouts.same(tensors(source), tensors(here / "out"))
    assert json.loads((here / "out/polymodal_convert.json").read_text())["converter"] == line
