"""The recipe: files with bases, overrides, and one sentence with file and line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.recipe import file, reference

ROOT = Path(__file__).parents[2]


def write(directory: Path, text: str, name: str = "r.yaml") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path, *overrides) -> str:
    with pytest.raises(PolymodalError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_short_recipe_is_whole(tmp_path):
    r = recipe.load(write(tmp_path, "model: {source: some/model}\n"))
    assert r.model.source == "some/model" and r.train.global_batch_size == 8 and str(r.run_dir) == "runs/run"


def test_bases_are_merged_in_order_and_relative_to_their_file(tmp_path):
    write(
        tmp_path,
        "model: {source: a, config: {x: 1, y: {deep: 1}}}\noptim: {lr: 1e-4, eps: 1e-7}\n",
        "base/one.yaml",
    )
    write(tmp_path, "optim: {lr: 2e-4}\ntrain: {freeze: [vision]}\n", "base/two.yaml")
    r = recipe.load(
        write(
            tmp_path,
            "base: [../base/one.yaml, ../base/two.yaml]\nmodel: {config: {y: {other: 2}}}\ntrain: {freeze: []}\n",
            "sub/r.yaml",
        )
    )
    assert r.optim.lr == 2e-4 and r.optim.eps == 1e-7 and r.train.freeze == []
    assert r.model.config == {"x": 1, "y": {"other": 2}}


def test_numbers_of_yaml_1_2(tmp_path):
    r = recipe.load(
        write(
            tmp_path,
            "model: {source: a, config: {theta: 1e6, eps: 1E-6, name: no, n: 12, f: .5}}\noptim: {lr: 1e-5}\n",
        )
    )
    assert r.model.config == {"theta": 1e6, "eps": 1e-6, "name": "no", "n": 12, "f": 0.5}
    assert r.optim.lr == 1e-5


def test_overrides(tmp_path):
    path = write(tmp_path, "model: {source: a}\ndata: {datasets: [{path: x.json}, {path: y.json}]}\n")
    r = recipe.load(
        path,
        ["data.datasets.1.path=z.json", "--optim.lr=3e-4", "model.config.text_config.num_hidden_layers=4", "train.freeze=[vision, language]",
         "optim.clip_norm=null", "model.lora.rank=4", "name=my run", "data.template_kwargs={enable_thinking: false}"],
    )  # fmt: skip
    assert [d.path for d in r.data.datasets] == ["x.json", "z.json"]
    assert r.optim.lr == 3e-4 and r.optim.clip_norm is None and r.name == "my run"
    assert r.model.config == {"text_config.num_hidden_layers": 4} and r.model.lora.rank == 4
    assert r.train.freeze == ["vision", "language"] and r.data.template_kwargs == {"enable_thinking": False}


def test_defaults_are_not_shared(tmp_path):
    one, two = (recipe.validate({"model": {"source": "a"}}) for _ in range(2))
    one.train.freeze.append("vision")
    one.data.attr.role = "speaker"
    one.device.env["HF_HOME"] = "x"
    assert two.train.freeze == [] and two.data.attr.role is None and two.device.env == {}


# ---- one sentence a mistake ---------------------------------------------------------------------------------------

MISTAKES = [
    ("model: {source: a}\ntrain:\n  stepss: 3\n", "line 3: unknown key `train.stepss`. Did you mean `train.steps`?"),
    ("model: {source: a}\ntrain:\n  lr: 3\n", "line 3: unknown key `train.lr`. Did you mean `optim.lr`?"),
    ("model: {source: a}\nlearning_rat: 3\n", "line 2: unknown key `learning_rat`. Known keys here: name, model"),
    ("model: {source: a}\nwarmupp: 3\n", "Did you mean `optim.schedule.warmup`?"),
    ("train: {steps: 3}\n", "the key `model` is missing. Add it: what is trained."),
    ("model: {init: random}\n", "line 1: the key `model.source` is missing. Add it: directory of a hub checkpoint"),
    ("model: {source: a}\ntrain: {steps: 0}\n", "line 2: `train.steps` = 0 must be at least 1."),
    ("model: {source: a}\ntrain: {steps: many}\n", "`train.steps` = 'many' is not a whole number."),
    ("model: {source: a}\ntrain: {steps: 1.5}\n", "`train.steps` = 1.5 is not a whole number."),
    ("model: {source: a}\noptim: {lr: fast}\n", "`optim.lr` = 'fast' is not a number."),
    ("model: {source: a}\noptim: {betas: [0.9, 1.5]}\n", "`optim.betas.1` = 1.5 must be less than 1."),
    ("model: {source: a}\noptim: {name: adam}\n", "`optim.name` = 'adam' is not one of adamw, muon, and no module:Class. Did you mean adamw?"),
    ("model: {source: a}\nparallel: {sp: maybe}\n", "`parallel.sp` = 'maybe' is neither true nor false."),
    ("model: {source: a}\nparallel: 8\n", "`parallel` = 8 is a section, not a single value. Write its keys indented below it: dp_replicate"),
    ("model: some/model\n", "`model` = 'some/model' is a section, not a single value. Write its keys indented below it: source"),
    ("model: {source: a, lora: true}\n", "`model.lora` = True is a section"),
    ("model: {source: 7}\n", "`model.source` = 7 is not text. Put it in quotes."),
    ("model: {source: a}\ndata: {datasets: a.json}\n", "`data.datasets` = 'a.json' is not a list."),
    ("model: {source: a}\ndata:\n  datasets:\n    - {path: a}\n    - {pathe: b}\n", "line 5: unknown key `data.datasets.1.pathe`. Did you mean `data.datasets.1.path`?"),
    ("model: {source: a, lora: {targets: 5}}\n", "`model.lora.targets` = 5 is not one of all-linear, and is not a list."),
    ("model: {source: a}\nmonitor: {trackers: [wandbb]}\n", "`monitor.trackers.0` = 'wandbb' is not one of tensorboard, wandb, mlflow. Did you mean wandb?"),
    ("model: {source: a}\ncheckpoint: {dir: 'runs/{job}'}\n", "`checkpoint.dir` = 'runs/{job}' the only placeholder is {name}"),
    ("model: {source: a}\ndevice:\n  env:\n    A: [1]\n", "line 4: `device.env.A` = [1] is not text"),
    ("model: {source: a}\nparallel:\n  pp_layers: [[6, 10]]\n", "line 3: `parallel.pp_layers` = [[6, 10]] names no tower; write e.g. {language: [6, 10, 10, 10]}."),
    ("model: {source: a}\nparallel:\n  pp_layers: {language: [[6, 10], [-1, 5]]}\n", "counts layers with -1; write whole numbers from 0."),
    ("model: {source: a}\nmodel: {source: b}\n", "line 2: `model` is given twice. Remove one of them."),
    ("model: {source: a\n", "not valid YAML"),
    ("model:\n\tsource: a\n", "line 2: not valid YAML: found character '\\t' that cannot start any token. YAML is indented with spaces, not tabs."),
    ("- model\n", "a recipe is a mapping of sections, this file holds a list. Start from `polymodal init MODEL`."),
    ("base: none.yaml\nmodel: {source: a}\n", "line 1: the base recipe"),
    ("base: 3\n", "line 1: `base:` = 3 is not a file name or a list of them."),
    ("base: r.yaml\nmodel: {source: a}\n", "`base:` goes in a circle (r.yaml -> r.yaml)."),
]  # fmt: skip


@pytest.mark.parametrize("text, sentence", MISTAKES, ids=[sentence[:40] for _, sentence in MISTAKES])
def test_mistakes(tmp_path, text, sentence):
    path = write(tmp_path, text)
    message = refused(path)
    assert sentence in message and "\n" not in message
    assert message.startswith(str(path))


def test_all_mistakes_are_reported_at_once(tmp_path):
    lines = refused(write(tmp_path, "model: {source: a, sauce: b}\noptim: {lr: -1}\n")).splitlines()
    assert len(lines) == 2 and "sauce" in lines[0] and "optim.lr" in lines[1]


def test_a_mistake_in_a_base_names_the_base(tmp_path):
    base = write(tmp_path, "train:\n  steps: 0\n", "base.yaml")
    assert refused(write(tmp_path, "base: base.yaml\nmodel: {source: a}\n")).startswith(
        f"{base}, line 2: `train.steps`"
    )


def test_mistakes_of_overrides(tmp_path):
    path = write(tmp_path, "model: {source: a}\ndata: {datasets: [{path: x}]}\n")
    assert (
        refused(path, "train.steps")
        == "The override `train.steps` is not of the form a.b=c. Write e.g. train.steps=100; quote values with spaces."
    )
    assert "is a list of 1, `1` is not one of its numbers" in refused(path, "data.datasets.1.path=y")
    assert refused(path, "train.stpes=1").startswith(
        "override `train.stpes=1`: unknown key `train.stpes`. Did you mean `train.steps`?"
    )
    assert refused(path, "parallel=8").startswith("override `parallel=8`: `parallel` = 8 is a section")
    freeze = ["train.freeze=[vision]", "train.freeze.0.x=1"]
    assert refused(path, *freeze).endswith("`train.freeze.0` = {'x': 1} is not text.")
    assert refused(path, "optim.betas=[0.9]").endswith("`optim.betas.1` is missing. Add it.")
    assert "given twice" in refused(write(tmp_path, "train: {steps: 1, steps: 2}\n"))


def test_no_such_file(tmp_path):
    assert refused(tmp_path / "no.yaml").endswith(
        "does not exist. Check the path, or write one with `polymodal init MODEL`."
    )
    assert "cannot be read: it is a directory" in refused(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "b.yaml")


# ---- writing ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    lr=st.floats(1e-12, 1e3),
    steps=st.none() | st.integers(1, 10**9),
    name=st.text(min_size=1),
    freeze=st.lists(st.text()),
    config=st.dictionaries(
        st.text(min_size=1),
        st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.booleans() | st.none(),
    ),
)
@example(
    1.0,
    None,
    "1e5",
    ["1_0", "yes", "0x1f", "1:30", "~"],
    {"a": "1e-5", "b": float("inf"), "c": "no", "d": "2020-01-01"},
)
def test_the_resolved_recipe_gives_the_same_recipe(tmp_path_factory, lr, steps, name, freeze, config):
    r = recipe.validate(
        {
            "name": name,
            "model": {"source": "a", "config": config, "lora": {}},
            "optim": {"lr": lr},
            "train": {"steps": steps, "freeze": freeze},
        }
    )
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(recipe.dump(r), encoding="utf-8")
    assert recipe.load(path) == r


def test_every_key_is_documented():
    def walk(section, prefix=""):
        for name, info in section.model_fields.items():
            assert info.description and info.description.strip(), f"{prefix}{name} has no documentation"
            for child in file.sections(info.annotation):
                walk(child, f"{prefix}{name}.")

    walk(recipe.Recipe)
    assert "optim.groups.lr_scale" in recipe.all_keys()


def test_the_schema_is_closed_and_documented():
    schema = json.loads(json.dumps(recipe.json_schema()))
    assert "base" in schema["properties"] and schema["required"] == ["model"]
    assert all(d.get("additionalProperties") is False for d in schema["$defs"].values())
    assert all("description" in p for d in schema["$defs"].values() for p in d["properties"].values())


def test_the_committed_reference_page_is_up_to_date():
    page = ROOT / "docs/recipe.md"
    assert page.read_text() == reference.markdown(), "run: polymodal recipe docs > docs/recipe.md"
    for key in recipe.all_keys():
        assert f"`{key.rpartition('.')[2]}`" in page.read_text()


def test_reading_a_recipe_imports_no_torch(tmp_path):
    path = write(tmp_path, "model: {source: a}\n")
    code = f"import sys; from polymodal import recipe; from polymodal.recipe import reference; recipe.load({str(path)!r}); recipe.json_schema(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
