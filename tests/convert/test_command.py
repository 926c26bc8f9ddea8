"""Every `mm-convert` line of the documents runs as written, on tiny checkpoints; help lists what works, and only that."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.convert import layouts
from tests.convert.commands import ok
from tests.convert.hubs import HUBS, understanding
from tests.convert.layouts import tensors

QWEN_2_5 = """mm-convert Qwen2_5_VLConverter hf_to_mm \\
--cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
--cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
--cfg.parallel_config.llm_pp_layers [[36]] \\
--cfg.parallel_config.vit_pp_layers [[32]] \\
--cfg.parallel_config.tp_size 1"""


def test_qwen_2_5_vl_as_documented(here):
    source = understanding("qwen2.5-vl", text_config__num_hidden_layers=36, vision_config__depth=32)(
        here / "ckpt/hf_path/Qwen2.5-VL-3B-Instruct"
    )
    ok(QWEN_2_5)
    root = here / "ckpt/mm_path/Qwen2.5-VL-3B-Instruct"
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert [p.name for p in (root / "release").iterdir()] == ["mp_rank_00"]
    back = (
        QWEN_2_5.replace("hf_to_mm", "mm_to_hf").replace("[[36]]", "[36]").replace("[[32]]", "[32]")
        + " --cfg.save_hf_dir converted"
    )
    ok(back)
    layouts.same(tensors(source), tensors(here / "converted"))


WAN = """mm-convert WanConverter hf_to_mm \\
--cfg.source_path ./weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer/ \\
--cfg.target_path ./weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer/"""
WAN_PP = WAN + " \\\n--cfg.target_parallel_config.pp_layers '[[7,8,8,7]]'"


def test_wan_as_documented(here):
    from tests.convert.hubs import WAN as SIZES
    from tests.convert.hubs import transformer

    place = here / "weights/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer"
    transformer("WanTransformer3DModel", **{**SIZES, "num_layers": 30})(place)
    before = tensors(place)
    ok(WAN)
    ok(WAN_PP)  # again, over the first
    assert sorted(p.name for p in (place / "release").iterdir()) == [f"mp_rank_00_00{p}" for p in range(4)]
    assert {key.partition(":")[0] for key in layouts.tree(place)} == {
        f"mp_rank_00_00{p}/model" for p in range(4)
    }
    ok(
        f"mm-convert WanConverter mm_to_hf --cfg.source_path {place} --cfg.target_path out --cfg.hf_dir {place}"
    )
    layouts.same(before, tensors(here / "out"))
    import diffusers

    diffusers.WanTransformer3DModel.from_pretrained(here / "out")


QWEN_3 = """mm-convert  Qwen3VLMegatronConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen3-VL-8B" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen3-VL-8B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [[6,10,10,10]] \\
  --cfg.parallel_config.vit_pp_layers [[27,0,0,0]] \\
  --cfg.parallel_config.tp_size 1"""
QWEN_3_BACK = """mm-convert  Qwen3VLMegatronConverter mm_to_hf \\
  --cfg.save_hf_dir "ckpt/mm_to_hf/Qwen3-VL-8B" \\
  --cfg.mm_dir "ckpt/mm_path/Qwen3-VL-8B" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen3-VL-8B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [6,10,10,10] \\
  --cfg.parallel_config.vit_pp_layers [27,0,0,0] \\
  --cfg.parallel_config.tp_size 1"""
EXPERTS = " \\\n  --cfg.parallel_config.ep_size 1"


@pytest.mark.parametrize("size", ["8B", "30B"])
def test_qwen_3_vl_as_documented(here, size):
    name = "qwen3-vl" if size == "8B" else "qwen3-vl-moe"
    layers = 36 if size == "8B" else 48
    source = understanding(name, text_config__num_hidden_layers=layers, vision_config__depth=27)(
        here / f"ckpt/hf_path/Qwen3-VL-{size}-Instruct"
    )

    def line(text):
        text = text.replace("8B", size)
        return text if size == "8B" else text.replace("6,10,10,10", "6,14,14,14") + EXPERTS

    ok(line(QWEN_3))
    ok(line(QWEN_3_BACK))
    layouts.same(tensors(source), tensors(here / f"ckpt/mm_to_hf/Qwen3-VL-{size}"))


def test_deepseek_vl2_as_its_class_writes_it(here):
    """The keys of a checkpoint that the model's card trains, there and back over two stages and two ranks of experts."""
    from polymodal.generate.opening import load_hub

    source = understanding("deepseek-vl2")(here / "hf")
    places = "--cfg.mm_dir mm --cfg.hf_config.hf_dir hf"
    cut = "--cfg.parallel_config.{}_pp_layers {}".format
    ok(
        f"mm-convert DeepSeekVLConverter hf_to_mm {places} {cut('llm', '[[1,2]]')} {cut('vit', '[[4,0]]')} "
        "--cfg.parallel_config.tp_size 1 --cfg.parallel_config.ep_size 2"
    )
    ok(
        f"mm-convert DeepSeekVLConverter mm_to_hf --cfg.save_hf_dir out {places} {cut('llm', '[1,2]')} "
        f"{cut('vit', '[4,0]')} --cfg.parallel_config.tp_size 1 --cfg.parallel_config.ep_size 2"
    )
    layouts.same(tensors(source), tensors(here / "out"))
    opened, before = load_hub(here / "out"), load_hub(source)
    assert all(torch.equal(tensor, before.state_dict()[key]) for key, tensor in opened.state_dict().items())


TREE = {"hf_to_mm", "mm_to_hf", "resplit"}
SOURCE = {"source_to_mm", "mm_to_source"}
SHARDED = {
    "hf_to_dcp", "dcp_to_hf", "lora_hf_to_dcp", "lora_dcp_to_hf", "merge_mm_lora_dcp_weight_to_base_hf"
}  # fmt: skip
CONVERTERS = {
    "Qwen2VLConverter": TREE,
    "Qwen2_5_VLConverter": {*TREE, "lora_hf_to_mm", "lora_mm_to_hf"},
    "Qwen2_5_OmniConverter": TREE,
    "Qwen3VLMegatronConverter": TREE,
    "InternVLConverter": TREE,
    "GlmConverter": TREE,
    "DeepSeekVLConverter": TREE,
    "Qwen3VLConverter": SHARDED,
    "Mistral3Converter": SHARDED,
    "Qwen35Converter": {"hf_to_dcp", "dcp_to_hf"},
    "GenericDCPConverter": {"hf_to_dcp", "dcp_to_hf"},
    "ExpertMergeDcpConverter": {"hf_to_dcp", "dcp_to_hf", "merge", "split"},
    "WanConverter": {
        *TREE, "lora_hf_to_mm", "lora_mm_to_hf", "merge_lora_to_base", "mm_to_dcp", "dcp_to_mm"
    },
    "HunyuanVideoConverter": {*TREE, *SOURCE, "merge_lora_to_base", "t2v_text_encoder"},
    "CogVideoConverter": {*TREE, *SOURCE, "merge_lora_to_base"},
    "OpenSoraPlanConverter": {*TREE, *SOURCE},
    "OpenSoraConverter": TREE,
    "StepVideoConverter": TREE,
    "VACEConverter": {*TREE, "hf_diffusers_to_mm", "mm_to_hf_diffusers"},
    "LuminaConverter": TREE,
    "BagelConverter": TREE,
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTERS)
def test_help_lists_the_methods_that_work(name, capsys):
    ok(f"mm-convert {name} --help")
    text = capsys.readouterr().out
    listed = set(text.partition("Available subcommands:")[2].replace("(required)", "").split())
    assert CONVERTERS[name] <= listed
    for other in {method for methods in CONVERTERS.values() for method in methods} - CONVERTERS[name]:
        assert other not in listed


def test_help_of_all(capsys):
    ok("mm-convert --help")
    text = capsys.readouterr().out
    assert all(name in text for name in (*CONVERTERS, "moe_expert"))
    ok("mm-convert Qwen2VLConverter hf_to_mm --help")
    assert "Language layers on each stage" in " ".join(capsys.readouterr().out.split())


def test_values_from_yaml_and_from_the_environment(here, capsys, monkeypatch):
    source = HUBS["qwen2.5-vl"].make(here / "hf")
    ok("mm-convert Qwen2_5_VLConverter hf_to_mm --print_config=comments")
    printed = capsys.readouterr().out
    assert "# Tensor parallel size" in printed
    config = yaml.safe_load(printed)
    config["cfg"]["mm_dir"], config["cfg"]["hf_config"]["hf_dir"] = "one", str(source)
    (here / "c.yaml").write_text(yaml.safe_dump(config))
    ok("mm-convert Qwen2_5_VLConverter hf_to_mm --config c.yaml")
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for key, value in {
        "MM_DIR": "two",
        "HF_CONFIG__HF_DIR": str(source),
        "PARALLEL_CONFIG__TP_SIZE": "1",
    }.items():
        monkeypatch.setenv(f"MM_CONVERT_QWEN2_5_VLCONVERTER__HF_TO_MM__CFG__{key}", value)
    ok("mm-convert Qwen2_5_VLConverter hf_to_mm")
    layouts.same(layouts.tree(here / "one"), layouts.tree(here / "two"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(here, capsys):
    source = HUBS["qwen2.5-vl"].make(here / "hf")
    line = f"mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir {source} --cfg.parallel_config.tp_size 2 --dry-run"
    ok(line)
    out = capsys.readouterr().out
    assert (
        "release/mp_rank_01/model_optim_rng.pt" in out
        and "text_decoder.decoder.layers.0.mlp.linear_fc1.weight  [96, 64] bfloat16" in out
    )
    assert not (here / "mm").exists()


def test_the_installed_command():
    """The console script's own module, in a process of its own: errors are one message and exit code 2."""
    line = [
        sys.executable,
        "-m",
        "polymodal.convert.command",
        "WanConverter",
        "hf_to_mm",
        "--cfg.source_path",
        "nowhere",
        "--cfg.target_path",
        "out",
    ]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: nowhere")
    scripts = (layouts.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'mm-convert = "polymodal.convert.command:main"' in scripts
