"""Generative models: both experts of a pipeline at once, diffusers' names and the original code's of one tree."""

import argparse
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import keylists, layouts
from tests.convert.commands import ok, polymodal, run
from tests.convert.hubs import HUBS, WAN, transformer
from tests.convert.layouts import tensors
from tests.convert.test_adapters_and_sources import saved, wan_adapter

EXPERTS = ("transformer", "transformer_2")


@pytest.fixture
def pipeline(here):
    """Wan 2.2 as published: two transformers beside the other parts."""
    for seed, name in enumerate(EXPERTS):
        source = transformer("WanTransformer3DModel", **{**WAN, "num_layers": 3})(here / "wan2.2" / name)
        for path in source.glob("*.safetensors"):
            save_file({key: value + seed for key, value in load_file(path).items()}, path, {"format": "pt"})
    (here / "wan2.2/model_index.json").write_text("{}")
    return here / "wan2.2"


def test_both_experts_of_wan_2_2_in_one_command(pipeline, here):
    pp = "--cfg.target_parallel_config.pp_layers [1,2]"
    line = "mm-convert WanConverter {} --cfg.source_path {} --cfg.target_path {}"
    ok(f"{line.format('hf_to_mm', 'wan2.2', 'mm')} {pp}")
    ok(line.format("resplit", "mm", "one"))
    ok(line.format("mm_to_dcp", "one", "dcp"))
    ok(line.format("dcp_to_mm", "dcp", "again") + f" {pp}")
    ok(line.format("mm_to_hf", "again", "out") + " --cfg.hf_dir wan2.2")
    assert {p.name for p in (here / "mm").iterdir()} == set(EXPERTS)
    for name in EXPERTS:
        assert (here / "mm" / name / "latest_checkpointed_iteration.txt").read_text() == "release"
        layouts.same(layouts.tree(here / "mm" / name), layouts.tree(here / "again" / name))
        layouts.same(tensors(pipeline / name), tensors(here / "out" / name))
    one, two = (layouts.tree(here / "one" / name) for name in EXPERTS)
    assert not torch.equal(*(each["mp_rank_00/model:head.modulation"] for each in (one, two)))


def test_a_pipeline_may_be_converted_in_its_own_place(pipeline):
    ok("mm-convert WanConverter hf_to_mm --cfg.source_path wan2.2 --cfg.target_path wan2.2")
    assert all((pipeline / name / "release/mp_rank_00").is_dir() for name in EXPERTS)
    assert {p.name for p in pipeline.iterdir()} == {*EXPERTS, "model_index.json"}


def test_a_pipeline_is_recognised(pipeline, here):
    for line in (
        "convert wan2.2 mm --to mm --pp 1,2",
        "convert mm dcp --to dcp --hf-dir wan2.2",
        "convert dcp out --to hf --hf-dir wan2.2",
    ):
        assert polymodal(line)[0] == 0
    for name in EXPERTS:
        layouts.same(tensors(pipeline / name), tensors(here / "out" / name))


def test_nothing_is_written_when_the_second_expert_is_bad(pipeline, here, capsys):
    path = next((pipeline / "transformer_2").glob("*.safetensors"))
    save_file({**load_file(path), "odd": torch.ones(1)}, path)
    assert run("mm-convert WanConverter hf_to_mm --cfg.source_path wan2.2 --cfg.target_path mm") == 2
    said = capsys.readouterr()
    assert "1 tensors are unknown to this converter: odd" in said.err and not said.out
    assert not (here / "mm").exists()


def test_a_disk_for_one_expert_is_too_small(pipeline, here, capsys, monkeypatch):
    one = sum(path.stat().st_size for path in (pipeline / EXPERTS[0]).glob("*.safetensors"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: argparse.Namespace(free=int(1.5 * one) + (1 << 20))
    )
    assert run("mm-convert WanConverter hf_to_mm --cfg.source_path wan2.2 --cfg.target_path mm") == 2
    assert "its disk has" in capsys.readouterr().err and not (here / "mm").exists()


def test_adapters_of_both_experts_are_added(pipeline, here):
    for name in EXPERTS:
        (here / name).mkdir()
        save_file(wan_adapter(["transformer.blocks.1.attn1.to_q"]), here / name / "adapter_model.safetensors")
        line = f"mm-convert WanConverter lora_hf_to_mm --cfg.source_path {name} --cfg.target_path lora/{name}"
        ok(line)
    ok("mm-convert WanConverter hf_to_mm --cfg.source_path wan2.2 --cfg.target_path mm")
    line = "mm-convert WanConverter merge_lora_to_base --cfg.source_path mm --cfg.lora_path lora --cfg.target_path sum --lora_rank 2 --lora_alpha 2"
    ok(line)
    key = "mp_rank_00/model:blocks.1.self_attn.proj_q.weight"
    for name in EXPERTS:
        adapter = load_file(here / name / "adapter_model.safetensors")
        a, b = (adapter[f"transformer.blocks.1.attn1.to_q.lora_{x}.weight"] for x in "AB")
        want = layouts.tree(here / "mm" / name)[key] + b @ a
        torch.testing.assert_close(layouts.tree(here / "sum" / name)[key], want)


def test_hunyuan_video_by_diffusers_names_is_the_tree_of_the_original_code(here):
    """The original code's file through the library's own conversion and through ours: one tree, cut over TP."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    # the library's conversion knows single blocks of the published width only
    keys, single = keylists.hunyuan(singles=0), "single_blocks.0"
    keys |= {
        f"{single}.linear1.weight": (3 * 3072 + 48, 2), f"{single}.linear1.bias": (3 * 3072 + 48,), f"{single}.k_norm.weight": (8,),
        f"{single}.linear2.weight": (3072, 3072 + 48), f"{single}.linear2.bias": (3072,), f"{single}.q_norm.weight": (8,),
        f"{single}.modulation.linear.weight": (96, 32), f"{single}.modulation.linear.bias": (96,),
    }  # fmt: skip
    state = saved(keys, here / "original.pt", "module")
    theirs = convert_hunyuan_video_transformer_to_diffusers(dict(state))
    (here / "hf").mkdir()
    save_file(
        {key: value.contiguous() for key, value in theirs.items()},
        here / "hf/diffusion_pytorch_model.safetensors",
    )
    line = "mm-convert HunyuanVideoConverter {} --cfg.source_path {} --cfg.target_path {} --cfg.target_parallel_config.tp_size 2"
    ok(line.format("source_to_mm", "original.pt", "one"))
    ok(line.format("hf_to_mm", "hf", "two"))
    layouts.same(layouts.tree(here / "one"), layouts.tree(here / "two"))
    ok("mm-convert HunyuanVideoConverter mm_to_hf --cfg.source_path one --cfg.target_path out")
    layouts.same(tensors(here / "hf"), tensors(here / "out"))


def test_hunyuan_video_1_5_bears_the_original_codes_names(here):
    HUBS["hunyuan-video-1.5 diffusers"].make(here / "hf")
    line = "mm-convert HunyuanVideoConverter --version 1.5 {} --cfg.source_path {} --cfg.target_path {}"
    ok(line.format("hf_to_mm", "hf", "mm"))
    names = {key.partition(":")[2] for key in layouts.tree(here / "mm")}
    assert names == set(keylists.hunyuan_15(layers=2, refiners=1))
    ok(line.format("mm_to_source", "mm", "original"))
    hub, original = tensors(here / "hf"), tensors(here / "original")
    scale, shift = hub["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    fused = original["txt_in.individual_token_refiner.blocks.0.self_attn_qkv.bias"]
    block = "context_embedder.token_refiner.refiner_blocks.0.attn"
    assert torch.equal(fused, torch.cat([hub[f"{block}.to_{x}.bias"] for x in "qkv"]))
    ok(line.format("source_to_mm", "original", "again"))
    ok(line.format("mm_to_hf", "again", "out") + " --cfg.hf_dir hf")
    layouts.same(hub, tensors(here / "out"))


def test_an_alpha_without_adapters_is_refused(here, capsys):
    saved(keylists.hunyuan(), here / "base.pt", "module")
    line = "mm-convert HunyuanVideoConverter {} --cfg.source_path {} --cfg.target_path {}"
    ok(line.format("source_to_mm", "base.pt", "mm"))
    assert run(line.format("mm_to_source", "mm", "out") + " --lora_alpha 2") == 2
    assert "mm has no adapters for lora_alpha" in capsys.readouterr().err


def test_an_adapter_of_hunyuan_video_comes_back(here, capsys):
    prefix, keys = "Hunyuan_video_I2V_lora_", {}
    for name, rows, columns in (
        ("single_blocks_0_linear1", 144, 32),
        ("double_blocks_1_img_attn_qkv", 96, 32),
    ):
        keys |= {
            f"{prefix}{name}.lora_down.weight": (4, columns),
            f"{prefix}{name}.lora_up.weight": (rows, 4),
        }
    state = {key: torch.randn(shape) for key, shape in keys.items()}
    alpha = {
        key.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for key in state if "lora_down" in key
    }
    save_file(state | alpha, here / "kohya.safetensors")
    line = "mm-convert HunyuanVideoConverter --version i2v-lora {} --cfg.source_path {} --cfg.target_path {}"
    ok(line.format("source_to_mm", "kohya.safetensors", "mm"))
    assert "alpha 2 is not part of a tree" in capsys.readouterr().err
    tree = layouts.tree(here / "mm")
    up = state[f"{prefix}single_blocks_0_linear1.lora_up.weight"]
    for half, part in (("qkv", up[:96]), ("mlp", up[96:])):
        assert torch.equal(
            tree[f"mp_rank_00/model:single_blocks.0.linear1_{half}.lora_B.default.weight"], part
        )
    ok(line.format("resplit", "mm", "again"))
    ok(line.format("mm_to_source", "again", "out"))
    layouts.same(state, tensors(here / "out"))
    ok(line.format("mm_to_source", "again", "whole") + " --lora_alpha 2")
    layouts.same(state | alpha, tensors(here / "whole"))
