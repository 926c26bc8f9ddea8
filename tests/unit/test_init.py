"""Recipes that are written, and recipes that are shipped: each validates, fits its card and says what to do next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog
from polymodal.parallel import apply as layout
from polymodal.tools import init_recipe
from tests.models import tiny

ROOT = Path(__file__).parents[2]
CARDS = catalog.cards()
EVERY = [
    (card.name, key, task)
    for card in CARDS.values()
    for key in card.sizes
    for task in init_recipe.TASKS
    if task != "dreambooth" or task in card.methods
]


@pytest.mark.parametrize("name, size, task", EVERY, ids=["-".join(row) for row in EVERY])
@pytest.mark.parametrize("devices", [None, 1, 6, 64])
def test_what_is_written_validates_and_its_layout_divides(tmp_path, name, size, task, devices):
    path = tmp_path / "r.yaml"
    assert init_recipe.main(name, task, size, devices, "data/my file: 1.json", path, False) == 0
    r = recipe.load(path)
    chosen = init_recipe.plan(name, task, size, devices)
    assert r.model.source == CARDS[name].sizes[size].hub and r.data.datasets[0].path == "data/my file: 1.json"
    assert ParallelSizes.of(r.parallel, chosen.devices).world == chosen.devices
    assert (r.model.lora is not None) == (task in init_recipe.ADAPTERS) and (r.model.init == "random") == (
        task == "pretrain"
    )
    assert r.model.lora is None or set(r.model.lora.towers) <= set(CARDS[name].towers)
    assert all(group.match in CARDS[name].towers for group in r.optim.groups)
    for axis in CARDS[name].limits:
        assert getattr(r.parallel, axis, 1) in (1, None)


PUBLISHED = {  # hidden size, layers, heads and heads of keys and values, experts of the published config.json
    "qwen2-vl": {"2b": (1536, 28, 12, 2), "7b": (3584, 28, 28, 4), "72b": (8192, 80, 64, 8)},
    "qwen2.5-vl": {"3b": (2048, 36, 16, 2), "7b": (3584, 28, 28, 4), "32b": (5120, 64, 40, 8), "72b": (8192, 80, 64, 8)},
    "qwen3-vl": {"2b": (2048, 28, 16, 8), "4b": (2560, 36, 32, 8), "8b": (4096, 36, 32, 8), "32b": (5120, 64, 64, 8)},
    "qwen3-vl-moe": {"30b-a3b": (2048, 48, 32, 4), "235b-a22b": (4096, 94, 64, 4)},
}  # fmt: skip


@pytest.mark.parametrize("name, size", [(card, size) for card in PUBLISHED for size in PUBLISHED[card]])
def test_layouts_are_accepted_for_the_published_heads(name, size):
    """What is written for a size is what `check` accepts, whatever the task and the number of devices."""
    assert set(PUBLISHED[name]) == set(CARDS[name].sizes)
    width, layers, heads, shared = PUBLISHED[name][size]
    assert layers == CARDS[name].sizes[size].layers
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
    }
    shape |= {"intermediate_size": 4 * width}
    experts = (
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768} if "moe" in name else {}
    )
    config = tiny.config(
        name,
        **{f"text_config__{key}": value for key, value in {**shape, **experts}.items()},
        vision_config__num_heads=16,
    )
    for task in ("sft", "lora", "pretrain"):
        for devices in (None, 1, 6, 8, 64):
            chosen = init_recipe.plan(name, task, size, devices)
            r = recipe.validate(yaml.safe_load(init_recipe.text(chosen, "d.json")))
            sizes = ParallelSizes.of(r.parallel, chosen.devices)
            assert layout.check(CARDS[name], config, sizes, r.parallel, r.model.attention) == []


def test_dreambooth_is_written_for_the_cards_that_have_it():
    written = recipe.validate(
        yaml.safe_load(init_recipe.text(init_recipe.plan("sdxl", "dreambooth", None, 1), init_recipe.DATA))
    )
    subject, prior = written.data.datasets
    assert subject.path == "data/subject" and subject.caption == "a photo of sks dog" and not subject.generate
    assert prior.generate == 100 and prior.loss_weight == 1.0 and prior.weight == subject.weight
    assert written.train.steps == 500 and written.model.lora is not None
    with pytest.raises(PolymodalError, match="wan2.1 has no recipe for DreamBooth"):
        init_recipe.plan("wan2.1", "dreambooth", None, None)


def test_comments_are_true(tmp_path, capsys):
    out = init_recipe.text(init_recipe.plan("qwen2.5-vl", "sft", "7b", 8), "d.json")
    assert "about 15.4 GiB a device" in out  # 8.29e9 parameters x 16 bytes / 8
    assert "too much for 64 GB" in init_recipe.text(
        init_recipe.plan("qwen2.5-vl-72b", "sft", None, 8), "d.json"
    )
    assert "--nproc 8 on each of 4 nodes" in init_recipe.text(
        init_recipe.plan("qwen2.5-vl-72b", "sft", None, 32), "d.json"
    )
    assert "--nproc 1\n" in init_recipe.text(init_recipe.plan("qwen2.5-vl-3b", "lora", None, 1), "d.json")
    assert init_recipe.main("qwen2.5-vl-3b", "lora", None, 1, "d.json", tmp_path / "r.yaml", False) == 0
    assert ", 1 device\n" in capsys.readouterr().out


def test_names_sizes_and_hub_ids():
    assert init_recipe.plan("Qwen/Qwen2.5-VL-72B-Instruct", "sft", None, None).size == "72b"
    assert init_recipe.plan("qwen3-vl-moe", "sft", "235b", None).size == "235b-a22b"
    assert init_recipe.plan("qwen2.5-vl", "sft", None, None).size == "7b"


def test_a_directory_is_its_own_source_and_its_size_is_read(tmp_path):
    directory = tmp_path / "Qwen2.5-VL-3B-Instruct"
    directory.mkdir()
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {"num_hidden_layers": 36},
    }
    (directory / "config.json").write_text(json.dumps(config))
    chosen = init_recipe.plan(str(directory), "lora", None, 2)
    assert (chosen.size, chosen.source) == ("3b", str(directory))
    assert recipe.validate(
        __import__("yaml").safe_load(init_recipe.text(chosen, "d.json"))
    ).model.source == str(directory)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("qwen2.5-vll", "sft", None, None), "There is no model `qwen2.5-vll`. Did you mean qwen2.5-vl"),
        (("qwen2.5-vl", "sfd", None, None), "--task sfd is not known. Did you mean sft?"),
        (("qwen2.5-vl", "sft", "9b", None), "qwen2.5-vl has no size 9b. Its sizes: 3b, 7b, 32b, 72b."),
        (("step-video", "sft", None, None), "step-video has no card here yet."),
    ],
)
def test_wrong_wishes(arguments, message):
    with pytest.raises(PolymodalError) as caught:
        init_recipe.plan(*arguments)
    assert message in str(caught.value)


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "sub" / "r.yaml"
    init_recipe.write(path, "one")
    with pytest.raises(PolymodalError, match="exists. Choose another --out, or add --force"):
        init_recipe.write(path, "two")
    assert path.read_text() == "one"
    init_recipe.write(path, "two", force=True)
    assert path.read_text() == "two" and [p.name for p in path.parent.iterdir()] == ["r.yaml"]
    with pytest.raises(PolymodalError, match="cannot be written"):
        init_recipe.write(path / "below", "three")


@pytest.mark.parametrize("name", ["2024", "no", "a: b", "-", "1e3"])
def test_a_name_that_yaml_would_read_as_something_else(tmp_path, name):
    path = tmp_path / f"{name}.yaml"
    assert init_recipe.main("qwen2.5-vl", "sft", "3b", 1, "d.json", path, False) == 0
    assert recipe.load(path).name == name


def test_a_dash_is_the_terminal(capsys):
    assert init_recipe.main("qwen2.5-vl", "sft", "3b", 1, "d.json", Path("-"), False) == 0
    assert capsys.readouterr().out.startswith("# qwen2.5-vl 3b: full fine-tuning on 1 device.")


# ---- shipped ------------------------------------------------------------------------------------------------------

SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_shipped_recipes_validate(path):
    if path.name == "base.yaml":
        r = recipe.load(path, ["model.source=x"])
    else:
        r = recipe.load(path)
        assert (
            r.name == path.stem
            and path.read_text().count("\n") < 30
            and "base: ../base.yaml" in path.read_text()
        )
        found = catalog.named(r.model.source)
        assert found is not None and f"{found[0].name}-{found[1]}" in path.stem
    assert r.checkpoint.every == 500


def test_shipped_recipes_cover_every_size_and_are_what_init_writes():
    shipped = {
        str(path.relative_to(ROOT / "recipes")): path.read_text()
        for path in SHIPPED
        if path.name != "base.yaml"
    }
    assert shipped == init_recipe.standard(), (
        "run: python -c \"from polymodal.tools import init_recipe; init_recipe.refresh('recipes')\""
    )


def test_example_recipes_validate():
    found = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.yaml")]
    for path in found:
        recipe.load(path)
