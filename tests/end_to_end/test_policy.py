"""grpo from the command line: it learns, resumes to the same curve, keeps what was answered; mistakes are said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel import training
from tests.parallel.harness import run
from tests.parallel.policies import make


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("policy"), steps=4)


def curve(root: Path, rank: int, name: str, *words: str) -> list[dict]:
    """Metrics of a run."""
    (root / "recipe.yaml").write_text((root / "grpo.yaml").read_text())
    said = training._run(rank, 1, root, training.Job(name, words))
    assert not said.error, said.error
    return training.lines(root, f"{name}-1")


def several(rank: int, root: Path) -> dict[str, list[dict]]:
    validation = f"data.validation=[{{path: {root / 'grpo-validation.json'}}}]"
    twice = ("train.grpo.updates=2", "train.grpo.kl=0.1", validation)
    found = {"whole": curve(root, rank, "whole", *twice)}
    curve(root, rank, "again", *twice, "train.steps=2")
    found["again"] = curve(root, rank, "again", *twice)
    failing = "train.rewards=[{name: gone, url: 'http://127.0.0.1:9/', retries: 0}]"
    found["failing"] = curve(root, rank, "failing", failing, "train.steps=1")
    return found


@pytest.mark.slow
def test_a_run_resumes_and_failed_rewards_teach_nothing(root):
    (found,) = run(1, several, root, timeout=600)
    steps = {name: [line for line in found[name] if "reward" in line] for name in ("whole", "again")}
    assert len(steps["again"]) == len(steps["whole"]) == 4
    figures = ("loss", "reward", "kl", "entropy", "grad_norm", "clip_fraction", "lengths/answers")
    for a, b in zip(steps["again"], steps["whole"], strict=True):
        assert {f: a[f] for f in figures} == pytest.approx({f: b[f] for f in figures}, rel=1e-5, abs=1e-7)
    assert steps["whole"][0]["kl"] > 0, "of the second update"
    assert all(line["logp_difference"] < 1e-5 for line in steps["whole"])
    assert found["whole"][-1]["validation/reward"] > 0
    said = [json.loads(line) for line in (root / "whole-1" / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in said} == {1, 2, 3, 4} and all(len(line["made"]) == 4 for line in said)
    assert said[0]["made"][0]["rewards"]["vowels"] == said[0]["made"][0]["reward"]
    (failed,) = [line for line in found["failing"] if "failed" in line]
    assert failed["failed"] > 0 and failed["grad_norm"] == 0 and "reward" not in failed
