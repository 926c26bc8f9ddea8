"""A user's own code in a run: callbacks, an objective and a reader of rows, each in a real small run from the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.user_code import load_object
from tests.models import tiny

MODULE = '''
import json
from polymodal.objectives.language import LanguageObjective
from polymodal.train.callbacks import Callback

class Journal(Callback):
    """Writes down what happens on rank 0, and ends the run after its third step."""

    def note(self, trainer, what, **values):
        if trainer.main:
            with open(trainer.run_dir / "journal.jsonl", "a") as file:
                file.write(json.dumps({"what": what, **values}) + "\\n")

    def on_train_begin(self, trainer):
        self.note(trainer, "begin", step=trainer.state.step)

    def on_step_end(self, trainer, step, metrics):
        self.note(trainer, "step", step=step, **metrics)
        trainer.should_stop = step == 3 and trainer.rt.rank == trainer.rt.world - 1

    def on_save(self, trainer, directory):
        self.note(trainer, "save", name=directory.name, whole=(directory / "state.json").is_file())

    def on_evaluate(self, trainer, step, metrics):
        self.note(trainer, "evaluate", step=step, **metrics)

    def on_train_end(self, trainer):
        self.note(trainer, "end", step=trainer.state.step)

class Misspelt(Callback):
    def on_steps_end(self, trainer, step, metrics):
        pass

class Doubled(LanguageObjective):
    """Twice the loss."""

    def loss(self, output, batch, inverse):
        return super().loss(output, batch, {term: 2 * value for term, value in inverse.items()})

class Numbers:
    """Rows that lie in no file; path says how many."""

    def __init__(self, path):
        self.count = int(path)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i < 0 or i >= self.count:
            raise IndexError(i)
        answer = {"role": "assistant", "content": f"It is {i % 7}."}
        return {"messages": [{"role": "user", "content": f"Say number {i % 7}."}, answer]}

def pairs(path):
    return {"rows": []}
'''


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    tiny.checkpoint("qwen2.5-vl", root / "model")
    (root / "code").mkdir()
    (root / "code" / "mine.py").write_text(MODULE)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say number {i % 7} please."},
                {"role": "assistant", "content": f"It is {i % 7}, " * (1 + i % 3)},
            ]
        }
        for i in range(16)
    ]
    (root / "train.json").write_text(json.dumps(rows))
    recipe = {
        "name": "t",
        "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.json")}], "max_length": 64, "workers": 0},
        "train": {"steps": 2, "global_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3},
        "monitor": {"trackers": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def train(ground: Path, run: Path, *overrides: str, nproc: int = 1, path: str = "", expect: int = 0) -> str:
    paths = [p for p in (path, os.environ.get("PYTHONPATH", "")) if p]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "polymodal", "train", str(ground / "recipe.yaml"), "--nproc", str(nproc)]
    done = subprocess.run(
        [*command, f"checkpoint.dir={run}", *overrides], env=environment, capture_output=True, text=True,
        timeout=300, cwd=ground / "code",
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_callbacks_see_a_run_and_may_end_it(ground, tmp_path):
    more = ("train.steps=9", "checkpoint.every=2", "evaluate.every=2")
    validation = f"data.validation=[{{path: {ground / 'train.json'}}}]"
    code = str(ground / "code")
    said = train(
        ground, tmp_path / "run", "train.callbacks=[mine:Journal]", validation, *more, nproc=2, path=code
    )
    assert "stopped at step 3 as asked" in said
    notes = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [n["what"] for n in notes if n["what"] != "save"] == [
        "begin", "step", "step", "evaluate", "step", "end",
    ]  # fmt: skip
    saves = [n for n in notes if n["what"] == "save"]
    assert [n["name"] for n in saves] == ["step-00000002", "step-00000003"] and all(n["whole"] for n in saves)
    assert [n["loss"] for n in notes if n["what"] == "step"] == losses(tmp_path / "run")
    assert next(n for n in notes if n["what"] == "evaluate")["validation/loss"] > 0
    assert notes[-1] == {"what": "end", "step": 3}


@pytest.mark.slow
def test_an_own_objective_is_what_is_learned(ground, tmp_path):
    code = str(ground / "code")
    train(ground, tmp_path / "plain")
    train(ground, tmp_path / "own", "train.objective=mine:Doubled", path=code)
    (plain, *_), (own, *_) = losses(tmp_path / "plain"), losses(tmp_path / "own")
    assert own == pytest.approx(2 * plain, rel=1e-6)


@pytest.mark.slow
def test_records_of_an_own_reader_are_learned_from_in_worker_processes_too(ground, tmp_path):
    datasets = "data.datasets=[{path: '12', reader: 'mine:Numbers', name: numbers}]"
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    said = train(
        ground, tmp_path / "run", datasets, cache, "data.workers=1", "train.epochs=1", "train.steps=null",
        path=str(ground / "code"),
    )  # fmt: skip
    assert "steps done" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 12


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.callbacks=[mine:Misspelt]", "method on_steps_end, which is never called. Did you mean on_step_end?"),
        ("train.callbacks=[mine:Journey]", "mine has no `Journey`. Did you mean Journal?"),
        ("train.callbacks=[mine:Doubled]", "is no callback class"),
        ("train.objective=mine:Journal", "train.objective = mine:Journal has no `term`"),
        ("train.objective=mine.Doubled", "is not of the form module:name"),
        ("data.datasets=[{path: x, reader: 'mine:absent'}]", "data.datasets.0.reader = mine:absent: mine has no `absent`"),
        ("data.datasets=[{path: x, reader: 'yours:rows'}]", "there is no module yours"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported_before_anything_starts(ground, tmp_path, monkeypatch, override, words):
    from polymodal import recipe
    from polymodal.tools import preflight

    monkeypatch.syspath_prepend(str(ground / "code"))
    made = recipe.load(ground / "recipe.yaml", [f"checkpoint.dir={tmp_path}", override])
    with pytest.raises(PolymodalError) as caught:
        preflight.refuse(made, 1)
    assert words in str(caught.value)


def test_the_working_directory_is_not_searched_unless_it_is_named(ground, tmp_path):
    said = train(ground, tmp_path / "run", "train.objective=mine:Doubled", expect=2)
    assert "there is no module mine" in said and "PYTHONPATH" in said and not (tmp_path / "run").exists()


def test_a_reader_that_gives_no_records_is_refused(ground, monkeypatch):
    from polymodal.data.source import open_corpus
    from polymodal.recipe import Dataset

    monkeypatch.syspath_prepend(str(ground / "code"))
    with pytest.raises(PolymodalError, match="returned a dict, not a sequence of rows"):
        open_corpus([Dataset(path="x", reader="mine:pairs")])


def test_a_module_that_fails_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text("1 / 0\n")
    (tmp_path / "lacking_one.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PolymodalError, match="importing broken_one failed: ZeroDivisionError"):
        load_object("broken_one:x", "train.objective")
    with pytest.raises(PolymodalError, match="lacking_one imports surely_not_installed, which is not"):
        load_object("lacking_one:x", "train.objective")
