"""Everything that is wrong with an input is one sentence and exit code 2, and nothing is left half-written."""

import argparse
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.convert import page, reading, writing
from polymodal.core.errors import PolymodalError
from tests.convert import layouts
from tests.convert.commands import ok, run
from tests.convert.hubs import HUBS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    for name, key in (
        ("hf", "qwen2.5-vl"),
        ("tied", "qwen2-vl, tied"),
        ("moe", "qwen3-vl experts"),
        ("wan", "wan t2v"),
        ("vace", "vace"),
    ):
        HUBS[key].make(base / name)
    return base


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "tied", "moe", "wan", "vace"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


QWEN = "mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir hf"
PP = "--cfg.parallel_config.llm_pp_layers {} --cfg.parallel_config.vit_pp_layers {}"
WAN = "mm-convert WanConverter hf_to_mm --cfg.source_path wan --cfg.target_path mm"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{QWEN} {PP.format('[3,2]', '[4,0]')}", "llm_pp_layers [3,2] adds up to 5 layers, the model has 4."),
        (f"{QWEN} {PP.format('[[2,2]]', '[[4,1]]')}", "vit_pp_layers [4,1] adds up to 5 layers, the model has 4."),
        (f"{QWEN} {PP.format('[[1,1],[2]]', '[[4,0],[0,0]]')}", "every inner list stands for one virtual stage"),
        (f"{QWEN} {PP.format('[[1,1],[1,1]]', '[4,0]')}", "has 1 x 2 stages, the largest list 2 x 2"),
        (f"{QWEN} --cfg.parallel_config.tp_size 4", "tp_size 4 does not divide the 2 key-value heads. It may be 1, 2."),
        (f"{QWEN} --cfg.parallel_config.ep_size 2", "the model has no experts"),
        (f"{QWEN.replace('Qwen2_5_VLConverter', 'Qwen3VLMegatronConverter').replace('dir hf', 'dir moe')} --cfg.parallel_config.ep_size 3", "ep_size 3 does not divide the 4 experts"),
        (QWEN.replace("Qwen2_5_VLConverter", "InternVLConverter"), "is of Qwen2_5_VLForConditionalGeneration / qwen2_5_vl, not of InternVL"),
        (QWEN.replace("dir hf", "dir nowhere"), "nowhere is not a directory"),
        (f"{QWEN} --cfg.parallel_config.vit_tp_size 3 --cfg.parallel_config.tp_size 2", "tp_size 2 does not divide the largest TP size, 3"),
        (f"{WAN} --cfg.target_parallel_config.tp_size 2", "trees are not cut over TP"),
        (f"{WAN} --cfg.target_parallel_config.pp_layers [2,2]", "adds up to 4 layers, the model has 5"),
        ("mm-convert VACEConverter hf_to_mm --cfg.source_path vace --cfg.target_path mm --cfg.target_parallel_config.pp_layers [1,1]", "have no pipeline stages"),
        ("mm-convert WanConverter mm_to_hf --cfg.source_path wan --cfg.target_path out", "neither latest_checkpointed_iteration.txt nor mp_rank_* directories"),
        ("mm-convert WanConverter merge_lora_to_base --cfg.source_path wan --cfg.target_path out", "needs the tree with the adapters"),
        ("mm-convert Qwen3VLConverter dcp_to_hf --load_dir wan --save_dir out --model_assets_dir moe", "is not a DCP checkpoint"),
        ("mm-convert Qwen3VLConverter hf_to_dcp --hf_dir wan --dcp_dir out", "not of Qwen3-VL"),
        ("mm-convert moe_expert --style merge --hf_dir hf --save_dir out", "which this converter does not take"),
        ("mm-convert GenericDCPConverter hf_to_dcp --hf_dir hf --dcp_dir out --tie_weight_mapping '{\"a\": \"b\"}'", "has no tensor b to copy to a"),
        ("mm-convert HunyuanVideoConverter --version t2v t2v_text_encoder --cfg.source_path hf --cfg.target_path out", "has no tensor under language_model.*"),
        ("mm-convert StepVideoConverter hf_to_mm --cfg.source_path wan --cfg.target_path out", "not of Step-Video"),
    ],
)  # fmt: skip
def test_bad_requests(here, capsys, line, said):
    assert run(line) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (here / "mm").exists() and not (here / "out").exists()


def test_unknown_and_missing_tensors_are_named(here, capsys):
    shutil.copytree(here / "hf", here / "bad")
    state = load_file(here / "bad/model.safetensors")
    state["model.surprise"] = torch.ones(1)
    save_file(state, here / "bad/model.safetensors")
    assert run(QWEN.replace("dir hf", "dir bad")) == 2
    assert "1 tensors are unknown to this converter: model.surprise" in capsys.readouterr().err
    del state["model.surprise"], state["model.layers.0.self_attn.k_proj.weight"]
    save_file(state, here / "bad/model.safetensors")
    assert run(QWEN.replace("dir hf", "dir bad")) == 2
    assert "model.layers.0.self_attn.k_proj.weight is missing beside" in capsys.readouterr().err


@pytest.fixture
def tree(here):
    ok(f"{QWEN} {PP.format('[1,3]', '[4,0]')} --cfg.parallel_config.tp_size 2")
    return here / "mm"


BACK = "mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.mm_dir mm --cfg.save_hf_dir out --cfg.hf_config.hf_dir hf --cfg.parallel_config.tp_size 2"


def refused(capsys, line, said):
    capsys.readouterr()
    assert run(line) == 2
    error = capsys.readouterr().err
    assert said in error, error


def test_trees_that_are_not_whole(tree, here, capsys):
    refused(
        capsys,
        f"{BACK} {PP.format('[2,2]', '[4,0]')}",
        "llm_pp_layers is [1,3] in the tree, [2,2] in the command",
    )
    refused(capsys, BACK.replace("tp_size 2", "tp_size 1"), "is cut to TP 2")
    last = tree / "release/mp_rank_01_001"
    (last / "model_optim_rng.pt").rename(last / "x")
    refused(capsys, BACK, "mp_rank_01_001/model_optim_rng.pt is missing")
    shutil.rmtree(last)
    refused(capsys, BACK, "has 3 rank directories, whose numbers ask for 2 x 2")
    (tree / "latest_checkpointed_iteration.txt").write_text("77")
    refused(capsys, BACK, "points at iter_0000077, which is not there")
    (tree / "latest_checkpointed_iteration.txt").write_text("seven")
    refused(capsys, BACK, "neither `release` nor a step")
    assert not (here / "out").exists()


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_tensors_of_a_tree_that_do_not_belong(tree, capsys):
    path = tree / "release/mp_rank_00_000/model_optim_rng.pt"
    edit(path, lambda content: content["model"].update({"text_decoder.odd": torch.ones(2)}))
    refused(capsys, BACK, "text_decoder.odd")
    for gone in ("text_decoder.odd", "text_decoder.decoder.layers.0.self_attention.linear_qkv.bias"):
        edit(path, lambda content, gone=gone: content["model"].pop(gone))
    refused(capsys, BACK, "linear_qkv.bias")
    path.write_bytes(path.read_bytes()[:5000])
    refused(capsys, BACK, "is cut short or corrupt")
    path.write_bytes(b"")
    refused(capsys, BACK, "is empty")


def test_ranks_that_disagree_are_reported(tree, here, capsys):
    norm = "text_decoder.decoder.layers.0.input_layernorm.weight"
    edit(tree / "release/mp_rank_01_000/model_optim_rng.pt", lambda content: content["model"][norm].add_(1))
    ok(BACK)
    assert "1 tensors differ between ranks that should hold the same" in capsys.readouterr().err
    layouts.same(layouts.tensors(here / "hf"), layouts.tensors(here / "out"))


def test_a_tied_head_that_was_trained_by_itself(here, capsys):
    line = QWEN.replace("Qwen2_5_VL", "Qwen2VL").replace("dir hf", "dir tied")
    ok(f"{line} {PP.format('[1,2]', '[4,0]')}")
    head = "text_decoder.output_layer.weight"
    edit(
        here / "mm/release/mp_rank_00_001/model_optim_rng.pt", lambda content: content["model"][head].add_(1)
    )
    refused(
        capsys,
        BACK.replace("Qwen2_5_VL", "Qwen2VL").replace("dir hf", "dir tied").replace("tp_size 2", "tp_size 1"),
        "but config.json ties them",
    )


class Harmless:
    """Stands for an object of the training's code."""

    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_pickles_that_hold_more_than_tensors(tree, here, capsys):
    for path in tree.glob("release/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=True)
        torch.save(
            {**content, "args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16), "iteration": 3}, path
        )
    ok(BACK)  # plain settings are no danger
    shutil.rmtree(here / "out")
    for path in tree.glob("release/*/model_optim_rng.pt"):
        torch.save({**torch.load(path, weights_only=False), "rng_state": [Harmless()]}, path)
    refused(capsys, BACK, "holds more than tensors (print)")
    assert not (here / "out").exists()
    ok(f"{BACK} --allow-pickle")
    assert "code of the file ran" not in capsys.readouterr().out
    layouts.same(layouts.tensors(here / "hf"), layouts.tensors(here / "out"))


def test_trees_of_the_mindspore_back_end(tree, capsys):
    path = tree / "release/mp_rank_00_000/model_optim_rng.pt"
    path.write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00modelcmindspore.common.parameter\nParameter\n.")
    refused(capsys, BACK, "was written by the MindSpore back end")


def test_what_is_in_the_way(here, capsys):
    ok(QWEN)
    line = (
        "mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.mm_dir mm --cfg.hf_config.hf_dir hf --cfg.save_hf_dir "
    )
    (here / "mine").mkdir()
    (here / "mine/notes.txt").write_text("x")
    refused(capsys, line + "mine", "exists already")
    assert (here / "mine/notes.txt").read_text() == "x"
    refused(capsys, line + "hf", "is the checkpoint that the files are taken from")
    assert run(line + "out") == 0 and run(line + "out") == 0  # what a conversion wrote may be written again
    (here / "mm/latest_checkpointed_iteration.txt").write_text("100")
    refused(capsys, QWEN, "mm holds a training run (step 100)")


def test_a_disk_that_is_too_small(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    refused(capsys, QWEN, "GB, its disk has 0.00 GB free")
    assert not (here / "mm").exists()


def test_verification_finds_a_byte_that_changed(here, capsys, monkeypatch):
    pwrite = writing.pwrite

    def and_spoil(handle, data, at):
        pwrite(handle, data, at)
        pwrite(handle, memoryview(b"\xff" if data[0] != 0xFF else b"\x00"), at)

    monkeypatch.setattr(writing, "pwrite", and_spoil)
    refused(capsys, QWEN, "is not what was written")
    assert not (here / "mm").exists()
    ok(f"{QWEN} --no-verify")


def test_verification_finds_a_file_that_changed_around_its_values(here, capsys, monkeypatch):
    write_values = writing.write_values

    def and_spoil(items, *rest):
        write_values(items, *rest)
        path = items[0].location.path
        content = torch.load(path, weights_only=True)
        content["model"].popitem()
        torch.save(content, path)

    monkeypatch.setattr(writing, "write_values", and_spoil)
    refused(capsys, QWEN, "a file does not hold what was written")
    assert not (here / "mm").exists()


def test_a_failure_while_writing_leaves_the_old_tree(here, capsys, monkeypatch):
    ok(QWEN)
    before = {p: p.read_bytes() for p in (here / "mm").rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_values", full)
    refused(
        capsys, f"{QWEN} --cfg.parallel_config.tp_size 2", "could not be written: No space left on device"
    )
    assert {p: p.read_bytes() for p in (here / "mm").rglob("*") if p.is_file()} == before


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a zip")
    with pytest.raises(PolymodalError, match="not in torch's zip format"):
        reading.torch_file(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    with pytest.raises(PolymodalError, match="holds a list, not a table"):
        reading.torch_file(tmp_path / "b.pt")
    with pytest.raises(PolymodalError, match="is not a safetensors file"):
        reading.hub_files(tmp_path / "b.pt")
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(PolymodalError, match="is not the index of a DCP checkpoint"):
        reading.dcp(tmp_path)


def test_every_difference_has_its_reason():
    text = page.TEXT.read_text(encoding="utf-8").partition("## What differs")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    assert len(rows) > 20 and all(len(row) == 3 and all(row) for row in rows), rows


def test_the_page_is_the_printed_one():
    current = (layouts.Path(page.__file__).parents[2] / "docs/convert.md").read_text(encoding="utf-8")
    assert current == page.page(), "python -m polymodal.convert.page > docs/convert.md"
