"""Export: what is written opens with the library, computes the same, and replaces nothing by accident."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.distributed import checkpoint as checkpoints
from polymodal.generate.engine import Sampling
from polymodal.generate.opening import describe, kind_of, load_hub, open_engine
from polymodal.models import catalog, lora, saving
from polymodal.train.export import MARKER, export, run
from tests.models import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint("qwen2.5-vl", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run of the language tower with an average; (directory, weights by name, average by name)."""
    directory = tmp_path_factory.mktemp("run") / "mine"
    return write_run(directory, model, freeze=["vision"])


def write_run(directory, model, freeze=(), **data):
    template = data.pop("chat_template", None)
    recipe = recipes.Recipe(
        model=recipes.Model(source=str(model)), checkpoint=recipes.Checkpoint(dir=str(directory)), train=recipes.Train(freeze=list(freeze)),
        data=recipes.Data(chat_template=template, **data),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    own = {n: p.detach() for n, p in load_hub(model).named_parameters() if not (freeze and "visual" in n)}
    changed, average = (
        {n: p + torch.randn(p.shape, generator=generator) * 0.1 for n, p in own.items()} for _ in range(2)
    )
    writer = checkpoints.Writer(directory, 2, False, 0, None)
    tensors = {f"model.{n}": t for n, t in changed.items()} | {f"ema.{n}": t for n, t in average.items()}
    writer.save(tensors, checkpoints.RunState(step=7, recipe=recipe.model_dump(mode="json")))
    return directory, changed, average


def write_lora_run(directory, model, start=None, **chosen):
    """A LoRA run whose adapters do something; returns (directory, adapters by parameter name)."""
    section = recipes.Lora(
        rank=4, alpha=8, towers=["language", "vision"], targets=["q_proj", "down_proj", "qkv"], **chosen
    )
    recipe = recipes.Recipe(
        model=recipes.Model(source=str(model), lora=section),
        checkpoint=recipes.Checkpoint(dir=str(directory), init_from=start),
    )
    family = catalog.family(recipe.model)
    shapes = family.build()
    lora.attach(shapes, section, family.card)
    generator = torch.Generator().manual_seed(2)
    adapters = {
        n: torch.randn(p.shape, generator=generator) * 0.2
        for n, p in shapes.named_parameters()
        if p.requires_grad
    }
    checkpoints.Writer(directory, 2, False, 0, None).save(
        {f"model.{n}": t for n, t in adapters.items()},
        checkpoints.RunState(step=5, recipe=recipe.model_dump(mode="json")),
    )
    return directory, adapters


@pytest.mark.parametrize("name, rslora", [("qwen2.5-vl", False), ("qwen3-vl", True)])
def test_a_lora_run_becomes_an_adapter_or_is_merged(name, rslora, tmp_path):
    source = tiny.checkpoint(name, tmp_path / name)
    directory, adapters = write_lora_run(tmp_path / "run", source, rslora=rslora)
    done = export(directory, tmp_path / "adapter")
    assert done.what == "adapter" and done.dtype == "float32" and done.step == 5 and done.difference < 1e-4
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {k.removeprefix("base_model.model.") for k in stored} == {
        n.replace(".default.", ".") for n in adapters
    }
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(source)
    assert kind_of(tmp_path / "adapter") == "adapter" and (tmp_path / "adapter" / "tokenizer.json").is_file()
    merged = export(directory, tmp_path / "merged", merge_lora=True)
    assert merged.what == "merged" and merged.difference < 1e-4
    scale = 8 / (2 if rslora else 4)
    before, after = (
        dict(load_hub(source).named_parameters()),
        dict(load_hub(tmp_path / "merged").named_parameters()),
    )
    for key, value in after.items():
        layer = key.removesuffix(".weight")
        expected = before[key]
        if f"{layer}.lora_A.default.weight" in adapters:
            expected = (
                expected
                + scale
                * adapters[f"{layer}.lora_B.default.weight"]
                @ adapters[f"{layer}.lora_A.default.weight"]
            )
        assert torch.allclose(value, expected, atol=1e-5), key
    asked = (Message("user", ("What is in this picture?", Media("image", save_picture(tmp_path)))),)
    sampling = Sampling(max_new_tokens=6)
    said = {
        p: open_engine(tmp_path / p, device="cpu").answer(asked, sampling).text
        for p in ("run", "adapter", "merged", name)
    }
    assert said["run"] == said["adapter"] == said["merged"] != said[name]
    again = export(
        tmp_path / "adapter", tmp_path / "again", merge_lora=True
    )  # a peft directory, whoever wrote it
    assert again.what == "merged"
    for key, value in load_hub(tmp_path / "again").named_parameters():
        assert torch.allclose(value, after[key], atol=1e-6), key
    half = export(directory, tmp_path / "half", merge_lora=True, dtype="bf16")
    assert half.dtype == "bfloat16" and 1e-4 < half.difference < 0.1 * half.largest
    assert export(directory, tmp_path / "adapter", dtype="bf16").difference < 1e-4
    with pytest.raises(PolymodalError, match="is a peft adapter already.*--merge-lora"):
        export(tmp_path / "adapter", tmp_path / "other")
    assert left_behind(tmp_path) == []


def test_adapters_on_top_of_another_run_keep_its_weights(trained, model, tmp_path):
    """checkpoint.init_from: a run of the whole model under a LoRA run; the base is that run's, not model.source's."""
    first, changed, _ = trained
    second, adapters = write_lora_run(tmp_path / "second", model, start=str(first))
    export(second, tmp_path / "merged", merge_lora=True)
    after = dict(load_hub(tmp_path / "merged").named_parameters())
    for name, value in changed.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in adapters:
            value = (
                value
                + 2 * adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
            )
        assert torch.allclose(after[name], value, atol=1e-5), name
    with pytest.raises(PolymodalError, match="on top of another run .*--merge-lora"):
        export(second, tmp_path / "adapter")
    whole = export(first, tmp_path / "whole").directory
    third, _ = write_lora_run(tmp_path / "third", model, start=whole)  # the same, from an export
    assert export(third, tmp_path / "adapter").difference < 1e-4
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == whole


def save_picture(directory):
    tiny.picture(32, 24, seed=3).save(directory / "picture.png")
    return str(directory / "picture.png")


def left_behind(directory):
    return sorted(p.name for p in directory.iterdir() if p.name.startswith("."))


def test_a_run_becomes_a_hub_checkpoint_of_its_weights(trained, model, tmp_path, capsys):
    directory, changed, average = trained
    assert run(str(directory), tmp_path / "out") == 0
    assert "opened with transformers" in capsys.readouterr().out
    out = tmp_path / "out"
    got = dict(load_hub(out).named_parameters())
    for name, parameter in load_hub(model).named_parameters():
        assert torch.equal(got[name], changed.get(name, parameter)), name
    assert set(load_file(out / "model.safetensors")) == set(
        load_file(model / "model.safetensors")
    )  # the file's own keys
    record = json.loads((out / MARKER).read_text())
    assert (
        record["step"] == 7
        and record["what"] == "model"
        and record["difference"] < 1e-4
        and record["tokens"] > 20
    )
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "generation_config.json"} <= set(
        os.listdir(out)
    )
    export(
        directory / "checkpoints" / "step-00000007",
        tmp_path / "ema",
        ema=True,
        dtype="bf16",
        max_shard_bytes=100_000,
    )
    got = dict(load_hub(tmp_path / "ema").named_parameters())
    assert all(torch.equal(got[n], average[n].bfloat16()) for n in average)
    assert (tmp_path / "ema" / "model.safetensors.index.json").is_file() and len(
        list((tmp_path / "ema").glob("*.safetensors"))
    ) > 2
    assert json.loads((tmp_path / "ema" / "config.json").read_text())["dtype"] == "bfloat16"
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "name, tied, dtype",
    [("qwen2-vl", True, "fp16"), ("qwen3-vl", False, None), ("qwen3-vl-moe", False, "bf16")],
)
def test_hub_checkpoints_of_every_family(name, tied, dtype, tmp_path):
    source = tiny.checkpoint(name, tmp_path / name, tied=tied, dtype=torch.bfloat16)
    done = export(source, tmp_path / "out", dtype=dtype)
    assert (
        done.what == "model"
        and done.difference < 1e-4
        and done.dtype == {"fp16": "float16"}.get(dtype, "bfloat16")
    )
    with (
        safe_open(source / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as after,
    ):
        assert sorted(before.keys()) == sorted(after.keys())
        for key in before.keys():  # noqa: SIM118
            assert torch.equal(before.get_tensor(key).to(after.get_tensor(key).dtype), after.get_tensor(key))


def test_what_the_recipe_changes_goes_along(model, tmp_path):
    """Pixel limits and the chat template that a run was trained with are the export's own."""
    template = tmp_path / "own.jinja"
    template.write_text(tiny.TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>assistant: "))
    directory, *_ = write_run(
        tmp_path / "run",
        model,
        image=recipes.Image(max_pixels=1024),
        video=recipes.Video(max_pixels=512),
        chat_template=str(template),
    )
    export(directory, tmp_path / "out")
    engine = open_engine(tmp_path / "out", device="cpu")
    assert engine.processor.image_processor.size["longest_edge"] == 1024
    assert engine.processor.video_processor.size["longest_edge"] == 512
    assert "assistant: " in engine.processor.chat_template
    assert dict(open_engine(directory, device="cpu").processor.image_processor.size) == dict(
        engine.processor.image_processor.size
    )


def test_it_replaces_earlier_exports_only(trained, model, tmp_path):
    directory, changed, _ = trained
    out = tmp_path / "out"
    export(directory, out)
    first = (out / "model.safetensors").read_bytes()
    export(directory, out, ema=True)  # an earlier export: no --force needed
    assert (out / "model.safetensors").read_bytes() != first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(PolymodalError, match="not empty and not an earlier export.*--force"):
        export(directory, mine)
    assert (mine / "thesis.txt").is_file()
    export(directory, mine, force=True)
    assert not (mine / "thesis.txt").exists() and (mine / "config.json").is_file()
    inside = export(directory, directory / "export", force=True)  # what checkpoint.export does
    assert inside.what == "model" and kind_of(directory) == "run"
    for target in (model, model.parent, directory, directory.parent):
        with pytest.raises(PolymodalError, match="holds the checkpoint that is exported"):
            export(directory, target, force=True)
    assert (model / "model.safetensors").is_file() and checkpoints.newest(directory)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match="is a file"):
        export(directory, tmp_path / "file")
    shutil.rmtree(directory / "export")
    assert left_behind(tmp_path) == []


def test_a_difference_is_an_error_and_leaves_the_earlier_export(trained, tmp_path, monkeypatch):
    directory, *_ = trained
    out = tmp_path / "out"
    export(directory, out)
    before = (out / "model.safetensors").read_bytes()
    write = saving.write

    def wrong(state, model, made, path, *args, **options):
        write(state, model, made, path, *args, **options)
        tensors = load_file(path / "model.safetensors")
        key = next(k for k in tensors if k.endswith("down_proj.weight"))
        tensors[key] = tensors[key] * 1.5
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(saving, "write", wrong)
    with pytest.raises(PolymodalError, match="answers differently: logits differ by"):
        export(directory, out)
    with pytest.raises(PolymodalError, match="answers differently"):
        export(directory, tmp_path / "other")
    assert (out / "model.safetensors").read_bytes() == before and not (tmp_path / "other").exists()
    assert left_behind(tmp_path) == []


def test_a_processor_that_makes_other_tokens_is_an_error(trained, tmp_path, monkeypatch):
    directory, *_ = trained
    write_config = saving.write_config

    def wrong(model, config, origin, path, *args):
        write_config(model, config, origin, path, *args)
        config = json.loads((path / "preprocessor_config.json").read_text())
        config["size"]["longest_edge"] //= 4
        (path / "preprocessor_config.json").write_text(json.dumps(config))

    monkeypatch.setattr(saving, "write_config", wrong)
    with pytest.raises(PolymodalError, match="makes other tokens of the same sample"):
        export(directory, tmp_path / "out")


def test_what_cannot_be_exported_says_why(trained, model, tmp_path):
    directory, changed, _ = trained
    cases = [
        ((tmp_path / "nowhere",), {}, "does not exist"),
        ((directory,), {"merge_lora": True}, "has no adapters to merge"),
        ((model,), {"ema": True}, "only runs keep an average"),
        ((directory,), {"dtype": "int8"}, "dtype = int8 is not known"),
        (
            (directory,),
            {"base": str(tmp_path / "gone")},
            "started from a model that cannot be had: .*gone.* --base",
        ),
    ]
    for words, options, sentence in cases:
        with pytest.raises(PolymodalError, match=sentence):
            export(*words, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    state = checkpoints.read_state(checkpoints.newest(directory))
    assert describe(directory, base=str(moved)).family.source == str(moved) != state.recipe["model"]["source"]
