"""Recipes that are written, and recipes that are shipped: each validates, fits its card and says what to do next."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_count
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog
from polymodal.parallel import apply as layout
from polymodal.tools import init_recipe, preflight
from polymodal.train import run_length
from polymodal.train.layouts import objectives_of
from tests.models import tiny, tiny_speech

ROOT = Path(__file__).parents[2]
CARDS = catalog.cards()


@pytest.mark.parametrize("name", CARDS)
def test_what_is_written_validates_and_its_layout_divides(name):
    """Every size and every task of a model, on the recommended number of devices, on one, few, and many."""
    card = CARDS[name]
    answers = {"dpo", "diffusion_dpo"} & set(objectives_of(card.family))
    unfit = {
        "kto",
        *(() if "dreambooth" in card.methods else ("dreambooth",)),
        *(() if answers else ("dpo",)),
        *(() if "grpo" in objectives_of(card.family) else ("grpo",)),
    }
    tasks = [t for t in init_recipe.TASKS if t not in unfit]
    first = next(
        iter(card.sizes)
    )  # in all tasks, and on few and many devices; the others as they are recommended
    asked = [(first, task, None) for task in tasks] + [(size, "sft", None) for size in [*card.sizes][1:]]
    asked += itertools.product((first,), ("sft", "lora"), (1, 6, 64))
    for size, task, devices in asked:
        chosen = init_recipe.plan(name, task, size, devices, data="data/my file: 1.json")
        r = recipe.validate(yaml.safe_load(init_recipe.text(chosen, "data/my file: 1.json")))
        assert r.model.source == card.sizes[size].hub and r.data.datasets[0].path == "data/my file: 1.json"
        sizes = ParallelSizes.of(r.parallel, chosen.devices)
        assert sizes.world == chosen.devices and r.train.global_batch_size % sizes.dp == 0
        assert (r.model.lora is not None) == (task in init_recipe.ADAPTERS)
        assert (r.model.init == "random") == (task == "pretrain")
        if task == "dpo":
            assert r.train.objective in objectives_of(card.family)
        assert r.model.lora is None or set(r.model.lora.towers) <= set(card.towers)
        assert all(group.match in card.towers for group in r.optim.groups)
        for axis in card.limits:
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
            assert layout.check(CARDS[name], config, sizes, r.parallel, r.model) == []


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


def test_names_sizes_and_hub_ids():
    assert init_recipe.plan("Qwen/Qwen2.5-VL-72B-Instruct", "sft", None, None).size == "72b"
    assert init_recipe.plan("qwen3-vl-moe", "sft", "235b", None).size == "235b-a22b"
    assert init_recipe.plan("qwen2.5-vl", "sft", None, None).size == "7b"


def test_published_sizes_say_so_and_what_does_not_fit(tmp_path, capsys):
    out = init_recipe.text(init_recipe.plan("qwen2.5-vl", "sft", "7b", 8), "d.json")
    assert "estimated for the published size" in out and "MFU" in out and "use more devices" not in out
    small = init_recipe.text(init_recipe.plan("qwen2.5-vl-72b", "sft", None, 8), "d.json")
    assert "which does not fit for certain: use more devices" in small
    many = init_recipe.text(init_recipe.plan("qwen2.5-vl-72b", "sft", None, 32), "d.json")
    assert "--nproc 8 on each of 4 nodes" in many
    assert init_recipe.main("qwen2.5-vl-3b", "lora", None, 1, "d.json", tmp_path / "r.yaml", False) == 0
    assert ", 1 device\n" in capsys.readouterr().out


def test_many_devices_are_filled_and_not_left_waiting_for_collectives():
    """The first of the ranking: nothing is cut over a node where sharding alone hides its gathers."""
    chosen = init_recipe.plan("qwen2.5-vl", "sft", "72b", 512, device="h100")
    sizes = chosen.best.sizes
    assert chosen.fits and sizes.tp <= 2 and chosen.best.mfu > 0.3
    assert chosen.best.recipe.train.global_batch_size >= sizes.dp * sizes.pp
    assert chosen.best.recipe.train.global_batch_size % sizes.dp == 0


# ---- a checkpoint that is here ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.checkpoint("qwen2.5-vl", tmp_path_factory.mktemp("Qwen2.5-VL-7B-like"))


def test_a_directory_is_counted_and_not_taken_for_a_published_size(checkpoint, tmp_path, capsys):
    out = tmp_path / "r.yaml"
    assert init_recipe.main(str(checkpoint), "sft", None, 2, init_recipe.DATA, out, False) == 0
    count = sum(p.numel() for p in catalog.family(recipe.Model(source=str(checkpoint))).build().parameters())
    written, said = out.read_text(), capsys.readouterr().out
    assert f"# qwen2.5-vl, {format_count(count)} parameters: full fine-tuning on 2 devices." in written
    assert "estimated by its config" in said and "GiB of 58.9" not in said.replace("MiB of 58.9", "")
    assert "does not fit" not in written and recipe.load(out).model.source == str(checkpoint)
    assert init_recipe.plan(str(checkpoint), "sft", None, None).devices == 1, "as many as its states fill"


def test_recipes_of_models_that_transcribe(tmp_path, capsys):
    """Rows are measured with the audio processor: what is too long for it is not counted."""
    tiny_speech.checkpoint(tmp_path / "model")
    for name, seconds in (("a", 1.0), ("b", 1.5), ("long", 9.0)):
        tiny_speech.recording(tmp_path / f"{name}.wav", "one two", seconds)
    rows = [{"audio": f"{name}.wav", "text": "one two"} for name in ("a", "b", "long")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = init_recipe.plan(str(tmp_path / "model"), "sft", None, 1, data=str(tmp_path / "d.jsonl"))
    written = init_recipe.text(chosen, str(tmp_path / "d.jsonl"))
    assert chosen.data.rows == 2 and "# 2 rows: about" in written and "# samples, over all devices" in written
    made = recipe.validate(yaml.safe_load(written))
    assert made.data.speech.language == "en" and "max_length" not in written
    (tmp_path / "d.jsonl").write_text(json.dumps(rows[2]))
    with pytest.raises(PolymodalError, match="no row of 1 can be trained on"):
        init_recipe.plan(str(tmp_path / "model"), "sft", None, 1, data=str(tmp_path / "d.jsonl"))
    english = init_recipe.text(init_recipe.plan("whisper-tiny.en", "lora", None, 1), "d.json")
    assert "speech:" not in english and "towers: [language]" in english
    large = init_recipe.plan("whisper", "sft", "large-v3", 1)
    assert large.parameters == 1_543_490_560 and large.fits, "of the published config, which is not here"


def test_a_published_config_is_known_by_its_parameters(tmp_path):
    width, layers, heads, shared = PUBLISHED["qwen2.5-vl"]["3b"]
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
    }
    shape |= {"intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": width,
        "patch_size": 14,
    }
    config = tiny.config(
        "qwen2.5-vl", **{f"text_config__{k}": v for k, v in shape.items()}, **{f"vision_config__{k}": v for k, v in vision.items()}
    )  # fmt: skip
    config.tie_word_embeddings = True
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    chosen = init_recipe.plan(str(tmp_path), "lora", None, None)
    assert (chosen.size, chosen.source, chosen.known) == ("3b", str(tmp_path), True) and chosen.devices == 4


def test_small_data_decide_batch_epochs_and_length(checkpoint, tmp_path, capsys):
    """639 short rows: with the defaults one optimizer step; `check` says so and names what init chooses."""
    rows = [{"messages": [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": "It is. " * (1 + i % 9)}]} for i in range(639)]  # fmt: skip
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "r.yaml"
    assert init_recipe.main(str(checkpoint), "sft", None, 2, str(data), out, False) == 0
    made = recipe.load(out)
    assert made.data.max_length == 256 and made.train.global_batch_size % 2 == 0
    assert "# 639 rows of " in out.read_text()
    good = preflight.check(made, 2)
    assert good.problems == [] and not any("optimizer step" in note for note in good.notes)
    assert good.steps is not None and run_length.FEW_STEPS <= good.steps <= 400
    said = int(re.search(r"about ([\d,]+) steps", out.read_text())[1].replace(",", ""))
    assert abs(good.steps - said) <= 0.15 * said + 2, "init says about what training does"
    plain = recipe.load(out, ["train.global_batch_size=32", "train.epochs=1", "data.max_length=4096"])
    (note,) = [n for n in preflight.check(plain, 2).notes if "optimizer step" in n]
    assert "fewer than 20" in note
    changes = re.search(r"About \d+: (.*)$", note)[1].split()
    changed = preflight.check(recipe.load(out, ["train.global_batch_size=32", *changes]), 2)
    assert changed.steps >= run_length.FEW_STEPS and not any("optimizer step" in n for n in changed.notes)
    asked = preflight.check(recipe.load(out, ["train.steps=2"]), 2)
    assert not any("optimizer step" in n for n in asked.notes), "who names the steps knows them"


@pytest.mark.parametrize("units", [1, 7, 162, 5_000, 10**6])
@pytest.mark.parametrize("multiple", [1, 6, 64])
def test_run_lengths(units, multiple):
    found = run_length.choose(units, multiple, 32)
    assert found.batch % multiple == 0 and found.batch <= max(32 + multiple, 4)
    assert found.steps >= run_length.FEW_STEPS
    assert found.epochs == 1 or units / found.batch < run_length.ENOUGH_STEPS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("qwen2.5-vll", "sft", None, None), "There is no model `qwen2.5-vll`. Did you mean qwen2.5-vl"),
        (("qwen2.5-vl", "sfd", None, None), "--task sfd is not known. Did you mean sft?"),
        (("qwen2.5-vl", "sft", "9b", None), "qwen2.5-vl has no size 9b. Its sizes: 3b, 7b, 32b, 72b."),
        (("bagel", "sft", None, None), "bagel has no card here yet."),
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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_validate(path):
    """One worked example a kind, over base.yaml."""
    if path.name == "base.yaml":
        assert recipe.load(path, ["model.source=x"]).checkpoint.every == 500
        return
    r, lines = recipe.load(path), path.read_text().splitlines()
    assert r.name == path.stem and len(lines) < 30 and "base: ../base.yaml" in lines
    found = catalog.named(r.model.source)
    assert found is not None and f"{found[0].name}-{found[1]}" in path.stem
    world = int(re.search(r"--world (\d+)", lines[1])[1])
    assert r.train.global_batch_size % ParallelSizes.of(r.parallel, world).dp == 0


def test_example_recipes_validate():
    found = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.yaml")]
    for path in found:
        recipe.load(path)


@pytest.mark.parametrize(
    "name, vram, base",
    [("qwen2.5-vl-7b", 80, "bf16"), ("qwen2.5-vl-7b", 10, "nf4"), ("flux.1-dev", 12, "nf4")],
)
def test_one_card_gets_the_base_that_fits_it(name, vram, base):
    chosen = init_recipe.plan(name, "lora", None, None, vram=vram)
    made = recipe.validate(yaml.safe_load(init_recipe.text(chosen, "d.json")))
    assert chosen.fits and chosen.devices == 1 and chosen.smaller == 1
    assert made.model.base == base and made.model.lora is not None
    assert made.parallel == chosen.best.recipe.parallel.model_copy(
        update={"dp_shard": made.parallel.dp_shard}
    )
    assert chosen.best.memory <= 0.92 * vram * 2**30


def test_a_small_card_gets_shorter_samples_and_one_too_small_is_told():
    short = init_recipe.plan("qwen2.5-vl-7b", "lora", None, None, vram=8)
    assert short.smaller > 1 and short.best.recipe.data.max_length == 4096 // short.smaller
    none = init_recipe.plan("qwen2.5-vl-72b", "lora", None, None, vram=8)
    assert not none.fits and "use a larger card" in init_recipe.predicted(none)


@pytest.mark.parametrize(
    "task, devices, search, words",
    [
        ("sft", None, False, "--task sft trains the weights"),
        ("lora", 8, False, "--devices 8"),
        ("lora", None, True, "--search"),
    ],
)
def test_vram_is_for_adapters_on_one_card(task, devices, search, words):
    with pytest.raises(PolymodalError, match=words):
        init_recipe.plan("qwen2.5-vl-7b", task, None, devices, search_it=search, vram=24)
