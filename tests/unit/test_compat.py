"""`polymodal-compat`: what is installed, what becomes of a command line in torchrun's world, and what is printed."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

from polymodal.compat import install, lines, other_programs, outputs, running
from polymodal.core.errors import PolymodalError
from polymodal.tools.translate import command, ledger
from polymodal.tools.translate.launch import program
from tests.unit.test_translate import DATA, MODEL, place  # noqa: F401

WORDS = [
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "4",
    "--lr",
    "1e-5",
    "--train-iters",
    "2",
    "--bf16",
    "--use-distributed-optimizer",
    "--tensor-model-parallel-size",
    "2",
    "--mm-data",
    "data.json",
    "--mm-model",
    "model.json",
    "--save",
    "out/run",
]


@pytest.fixture(autouse=True)
def torchrun(monkeypatch):
    """This process as the second of four that torchrun started."""
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 4,
        "LOCAL_RANK": 1,
        "LOCAL_WORLD_SIZE": 4,
        "GROUP_WORLD_SIZE": 1,
    }.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def started(monkeypatch) -> list:
    """What would be run: recipes of trainings, words of commands."""
    from polymodal import cli
    from polymodal.cli import training

    found: list = []
    monkeypatch.setattr(training, "start", lambda recipe: found.append(recipe) or 0)
    monkeypatch.setattr(cli, "app", lambda words, **_: found.append(words) or 0)
    return found


# ---- in torchrun's world ----------------------------------------------------------------------------------


def test_a_line_is_a_recipe_for_the_world_that_is_there(place, started, capsys):  # noqa: F811
    assert running.run("pretrain_vlm.py", WORDS) == 0
    [recipe] = started
    assert (recipe.train.global_batch_size, recipe.parallel.tp, recipe.train.steps) == (4, 2, 2)
    assert recipe.train.callbacks == [running.LINE] and str(recipe.run_dir).endswith("out/run")
    assert capsys.readouterr().out == ""  # rank 1


def test_rank_0_prints_the_table_once(place, started, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    running.run("pretrain_vlm.py", [*WORDS, "--clip-grad", "0.0"], tree=True)
    out = capsys.readouterr().out
    assert out.startswith("pretrain_vlm.py: polymodal train (") and "0 is off" in out
    assert started[0].train.callbacks == [running.LINE, running.TREE] and started[0].checkpoint.export


@pytest.mark.parametrize(
    "entry, more, sentence",
    [
        ("pretrain_vlm.py", ["--no-such-flag", "1"], "1 flags and keys without a translation:.*no-such-flag"),
        (
            "pretrain_vlm.py",
            ["--global-batch-size", "5"],
            "^the command line: the global batch size 5 is no multiple.*4 is",
        ),
        (
            "pretrain_vlm.py",
            ["--mm-data", "dats.json"],
            r"dats.json that it names is not there.*Did you mean data.json\?",
        ),
        ("pretain_vlm.py", [], r"no program that is known here\. Did you mean pretrain_vlm.py\?"),
        ("pretrain_ae.py", [], "pretrain_ae.py becomes nothing here"),
        ("mindspeed_mm/fsdp/tasks/funasr/trainer.py", [], "FunASR is not trained here"),
    ],
)
def test_what_is_wrong_is_one_sentence_on_every_rank(place, started, entry, more, sentence):  # noqa: F811
    with pytest.raises(PolymodalError) as found:
        running.run(entry, [*WORDS, *more])
    assert re.search(sentence, " ".join(str(found.value).split())) and not started
    assert found.value.code == 2


@pytest.mark.parametrize(
    "wrong", ['{"model_id": "qwen2_5vl",}', '{\n"model_id": "qwen2_5vl" // a comment\n}']
)
def test_json_that_is_none_is_named_with_its_line(place, started, wrong):  # noqa: F811
    Path("model.json").write_text(wrong)
    with pytest.raises(PolymodalError, match=r"model.json:\d: not valid JSON.*no comments and no comma"):
        running.run("pretrain_vlm.py", WORDS)


def test_a_missing_file_of_a_script_is_named_with_its_line(place):  # noqa: F811
    Path("finetune.sh").write_text(Path("finetune.sh").read_text().replace("./data.json", "./dat.json"))
    line = next(
        n for n, text in enumerate(Path("finetune.sh").read_text().split("\n"), 1) if "dat.json" in text
    )
    with pytest.raises(
        PolymodalError, match=rf"finetune.sh:{line}: the file ./dat.json .*Did you mean data.json\?"
    ):
        command.main("finetune.sh", [], None, None, None, [], False, False)


def test_commands_join_the_world_by_themselves(place, started, monkeypatch):  # noqa: F811
    monkeypatch.setattr(outputs, "name", lambda *_: None)
    chat = {"pipeline_class": "Qwen2VlPipeline", "tokenizer": {"from_pretrained": "weights/q"}}
    Path("chat.json").write_text(json.dumps({**chat, "prompts": "What?"}))
    assert running.run("inference_vlm.py", ["--mm-model", "chat.json"]) == 0
    assert not started  # the first process answers
    asked = {
        **chat,
        "evaluation_dataset": "ai2d_test",
        "evaluation_model": "m",
        "dataset_path": "a.tsv",
        "result_output_path": "o/",
    }
    Path("ask.json").write_text(json.dumps(asked))
    running.run("evaluate_vlm.py", ["--mm-model", "ask.json"])
    assert started == [["evaluate", "weights/q", "ai2d", "--data", "a.tsv", "--out", "o/m_ai2d_test"]]


def test_accelerates_file_is_read_from_what_it_set(monkeypatch, tmp_path, started):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "subject").mkdir()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    words = (
        "--pretrained_model_name_or_path=w --instance_data_dir=subject --max_train_steps=2 --cache_latents"
    )
    running.run("train_dreambooth_flux.py", words.split())
    [recipe] = started
    assert (
        recipe.parallel.zero == 2 and recipe.optim.clip_norm == 0.5 and recipe.train.global_batch_size == 16
    )
    assert recipe.data.encode == "online"


def test_without_a_launcher_it_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert running.this_process().world == 1
    monkeypatch.setenv("NPUS_PER_NODE", "8")
    monkeypatch.setenv("RANK", "")
    assert running.this_process().world == 1


# ---- installed files --------------------------------------------------------------------------------------


def test_installed_files(tmp_path, capsys):
    (tmp_path / "pretrain_vlm.py").write_text("import megatron\n")
    with pytest.raises(PolymodalError, match="pretrain_vlm.py exists already"):
        install.main(tmp_path, False, False)
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain_vlm.py"]
    for _ in range(2):  # ours are replaced
        install.main(tmp_path, True, True)
    install.main(tmp_path, False, False)
    for name in install.ENTRIES["files"]:
        compile((tmp_path / name).read_text(), name, "exec")
        assert program(name) is not None or other_programs.find(name) is not None
    assert (
        'entry("mindspeed_mm/fsdp/train/trainer.py")'
        in (tmp_path / "mindspeed_mm/fsdp/train/trainer.py").read_text()
    )


PEERS = yaml.safe_load((Path(ledger.__file__).parent / "peers.yaml").read_text())


def test_every_program_of_the_tables_has_a_file():
    names = {program(name) for name in install.ENTRIES["files"]}
    left = {name for name in (*command_entries(), *refused_entries()) if name not in names}
    others = [*PEERS["entries"], *PEERS["refused"]]  # of other trainers
    assert left <= {"verl.trainer.main_ppo", "finetune_t2i.py", *others}


def command_entries() -> list[str]:
    from polymodal.tools.translate.ledger import TABLES

    return [*TABLES["entries"]]


def refused_entries() -> list[str]:
    from polymodal.tools.translate.ledger import TABLES

    return [*TABLES["refused"]]


# ---- lines and files that scripts read --------------------------------------------------------------------


def test_scripts_find_the_time_in_the_fifth_field(capsys):
    text = lines.line(2, 10, 32, 123.456, 1e-5, 16, 1024.0, 1.5, 0.25, 0)
    assert text.split(":")[4].split("|")[0].strip() == "123.5"
    assert re.search(r"tokens per sample: *([^|]*)\|", text)[1].strip() == "1.024000E+03"
    printer = lines.IterationLine()
    recipe = SimpleNamespace(monitor=SimpleNamespace(every=2), train=SimpleNamespace(global_batch_size=8))
    state, scaler = SimpleNamespace(samples=0, tokens=0), SimpleNamespace(enabled=False)
    trainer = SimpleNamespace(main=True, recipe=recipe, state=state, scaler=scaler, progress=None, steps=4)
    printer.on_train_begin(trainer)
    for step, seconds in enumerate((0.1, 0.3, 0.5, 0.7), 1):
        state.samples, state.tokens = 8 * step, 80 * step
        printer.on_step_end(
            trainer,
            step,
            {"seconds": seconds, "skipped": step == 3, "loss": float(step), "lr": 1e-5, "grad_norm": 1.0},
        )
    printer.on_train_end(trainer)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[4].split("|")[0].strip() for line in said[:2]] == ["200.0", "600.0"]
    assert "loss: 1.500000E+00" in said[0] and "loss: 4.000000E+00" in said[1]
    assert "skipped iterations:   1" in said[1] and "tokens per sample: 1.000000E+01" in said[1]
    assert said[2:] == ["Elapsed Time Per iteration: 400.0", "Average Samples per Second: 20.000"]


def test_a_sheet_is_xml_with_every_cell(tmp_path):
    outputs.write_sheet(tmp_path / "a.xlsx", [["index", "answer"], [1, "<a> & \x1b b"], [0.5, None]])
    with zipfile.ZipFile(tmp_path / "a.xlsx") as book:
        trees = {name: ElementTree.fromstring(book.read(name)) for name in book.namelist()}
    cells = trees["xl/sheet1.xml"].iter(f"{{{outputs.SHEETS}}}c")
    assert ["".join(cell.itertext()) for cell in cells] == [
        "index",
        "answer",
        "1",
        "<a> & \\u001b b",
        "0.5",
        "",
    ]


# ---- one file of a set-up ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, key, value",
    [
        (DATA, "data.image.max_pixels", 262144),
        (MODEL, "train.freeze", ["vision"]),
        ({"sharding_size": 4, "param_dtype": "bf16", "num_to_forward_prefetch": 2}, "parallel.dp_shard", 4),
        ({"zero3_size": 8, "param_dtype": "bf16"}, "parallel.zero", 3),
        ({"sorafeature": {"save_path": "./f"}}, "data.features", "./f"),
        ({"predictor": {"model_id": "wandit"}, "diffusion": {"model_id": "w", "shift": 3.0}}, "train.diffusion.shift", 3.0),
        ({"training": {"lr": 1e-6}, "model": {"model_name_or_path": "w"}, "data": DATA}, "optim.lr", 1e-6),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_file_alone_is_recognised_by_its_content(tmp_path, monkeypatch, content, key, value, ending):
    if "training" in content and ending == "json":
        pytest.skip("the native trainer takes YAML")
    monkeypatch.chdir(tmp_path)
    Path(f"x.{ending}").write_text(json.dumps(content))
    command.main(f"x.{ending}", [], Path("out.yaml"), None, None, [], False, False)
    found = yaml.safe_load(Path("out.yaml").read_text())
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_a_file_of_another_kind_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text('{"name": 1}')
    with pytest.raises(PolymodalError, match="x.json is no config file that is known here"):
        command.main("x.json", [], None, None, None, [], False, False)
