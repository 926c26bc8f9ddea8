"""benchmarks/accelerator.py at small sizes: every part runs and is right, and what goes wrong is a row and an exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator

    return accelerator


def test_a_part_that_fails_or_hangs_is_a_row(accelerator, monkeypatch, tmp_path, capsys):
    part = tmp_path / "part.py"
    part.write_text("""
import json, sys, time
print("ROW " + json.dumps({"name": "first", "said": "a long figure of many words " * 4, "ok": True}), flush=True)
time.sleep(600 if "wan" in sys.argv else 0)
raise RuntimeError("device-side assert")
""")
    monkeypatch.setattr(accelerator, "__file__", str(part))
    hung = list(accelerator.child("wan", True, 2.0))
    assert [each["ok"] for each in hung] == [True, False] and hung[1]["said"] == "stopped after 2 s"
    out = tmp_path / "found.json"
    for chosen, code in (("attention", 1), ("flux", 0)):  # a part of speed is no question of correctness
        monkeypatch.setattr(sys, "argv", ["accelerator.py", "--tiny", "--only", chosen, "--json", str(out)])
        assert accelerator.main() == code
        found = json.loads(out.read_text())
        assert found["correct"] is (code == 0) and [each["ok"] for each in found["rows"]] == [True, False]
        assert found["rows"][1]["said"] == "exit code 1: RuntimeError: device-side assert"
    shown = capsys.readouterr().out
    assert "FAILED" in shown and all(len(line) <= 80 for line in shown.splitlines())


def run(*options, out):
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--tiny", "--json", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done, json.loads(out.read_text())


@pytest.mark.nightly
def test_every_part_at_small_sizes(tmp_path):
    done, found = run(out=tmp_path / "found.json")
    assert done.returncode == 0 and found["correct"], done.stdout
    rows = found["rows"]
    assert {each["part"] for each in rows} == {
        "device", "attention", "layouts", "training", "vlm", "wan", "flux", "encode",
    }  # fmt: skip
    assert not [each for each in rows if each["ok"] is False], done.stdout
    for part, unit in (("vlm", "tokens/s"), ("wan", "frames/s"), ("flux", "images/s")):
        own = [each for each in rows if each["part"] == part and "rate" in each and "seconds" in each]
        assert len(own) == 3 and all(unit in each["said"] and each["rate"] > 0 for each in own)
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.nightly
def test_others_in_the_same_run(tmp_path):
    pytest.importorskip("accelerate")
    done, found = run("--only", "peers", out=tmp_path / "found.json")
    assert [each["name"] for each in found["rows"]] == ["transformers' Trainer", "diffusers' loop"], (
        done.stdout
    )
    assert all(each["ratio"] > 0 for each in found["rows"]), done.stdout
