"""dpo from the command line: the kinds of reference agree, a run resumes to the same curve, mistakes are said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.parallel import training
from tests.parallel.harness import run
from tests.parallel.preferences import make


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("preference"), steps=4)


def curve(root: Path, rank: int, name: str, recipe: str, *words: str) -> list[dict]:
    """Metrics of a run."""
    (root / "recipe.yaml").write_text((root / f"{recipe}.yaml").read_text())
    said = training._run(rank, 1, root, training.Job(name, words))
    assert not said.error, said.error
    return training.lines(root, f"{name}-1")


def several(rank: int, root: Path) -> dict[str, list[dict]]:
    lora, cached = "model.lora={}", "train.preference.cache_reference=true"
    other = f"train.preference.reference={root / 'other'}"
    validation = f"data.validation=[{{path: {root / 'dpo-validation.json'}}}]"
    found = {
        "lora": curve(root, rank, "lora", "dpo", lora),
        "copy": curve(root, rank, "copy", "dpo", validation),
        "cached": curve(root, rank, "cached", "dpo", cached, validation),
        "lora, cached": curve(root, rank, "lora-cached", "dpo", lora, cached),
        "other": curve(root, rank, "other", "dpo", other),
        "other, cached": curve(root, rank, "other-cached", "dpo", other, cached),
        "kto": curve(root, rank, "kto", "kto"),
    }
    curve(root, rank, "again", "dpo", "train.steps=2", cached)
    found["again"] = curve(root, rank, "again", "dpo", cached, validation)
    tables = list((root / "again-1").glob("reference-*.safetensors"))
    assert len(tables) == 2
    for table in tables:
        table.unlink()
    resumed = curve(
        root, rank, "again", "dpo", cached, "train.steps=5"
    )  # the table is made of the start again
    found["again, table lost"] = resumed
    return found


@pytest.mark.slow
def test_references_agree_and_a_run_resumes(root):
    (found,) = run(1, several, root, timeout=600)
    figures = (
        "loss",
        "rewards/margin",
        "rewards/chosen",
        "kl",
        "validation/loss",
        "validation/rewards/accuracy",
    )
    for name, same in (
        ("cached", "copy"),
        ("lora, cached", "lora"),
        ("other, cached", "other"),
        ("again", "copy"),
    ):
        assert len(found[name]) == len(found[same]), name
        for a, b in zip(found[name], found[same], strict=True):
            known = [f for f in figures if f in a]
            assert {f: a[f] for f in known} == pytest.approx({f: b[f] for f in known}, rel=1e-5, abs=1e-7), (
                name
            )
    assert any("validation/rewards/accuracy" in line for line in found["copy"])
    for name in ("lora", "copy", "cached"):
        first = found[name][0]
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6), name
        assert first["rewards/margin"] == first["kl"] == 0.0, "policy and reference are the same computation"
        assert found[name][3]["rewards/accuracy"] == 1.0 and found[name][3]["loss"] < 0.6
    assert found["other"][0]["rewards/margin"] != 0.0
    assert found["kto"][0]["loss"] == pytest.approx(0.5) and found["kto"][3]["loss"] < 0.5
    steps = [line for line in found["again, table lost"] if "loss" in line]
    assert steps[-1]["step"] == 5 and steps[-1]["rewards/margin"] > steps[1]["rewards/margin"]


def test_the_rows_are_known_to_data_check(root, capsys):
    from polymodal.tools import data_check

    assert data_check.main([str(root / "dpo.json")]) == 0
    assert "16 rows have 2 answers to compare (dpo)" in capsys.readouterr().out
    assert data_check.main([str(root / "kto.json")], format="preference") == 0
    assert "16 rows have an answer with a label (kto)" in capsys.readouterr().out
    assert data_check.main([str(root / "kto.json")], format="preference", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == {"1": 16}
