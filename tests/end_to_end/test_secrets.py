"""No secret of the environment or of the recipe in anything that commands print or write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models import tiny

ENVIRONMENT = {
    "HF_TOKEN": "hf-MARKED-token-1",
    "WANDB_API_KEY": "MARKEDwandb2key",
    "AWS_SECRET_ACCESS_KEY": "MARKED/aws+3==",
    "HTTPS_PROXY": "http://me:MARKED4proxy@127.0.0.1:9",
    "HF_ENDPOINT": "https://me:MARKED5mirror@127.0.0.1:9",
    "POLYMODAL_SECRET": "MARKED-6-of-the-run",
}
URL = "https://me:MARKED7url@127.0.0.1:9/x?token=MARKED8query"


def run(place: Path, *given: str, code: int = 0) -> str:
    environ = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "COLUMNS": "40"}
    command = [sys.executable, "-m", "polymodal", *given]
    done = subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_whose_environment_and_recipe_hold_secrets(tmp_path):
    tiny.checkpoint("qwen2.5-vl", tmp_path / "model")
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    recipe = {
        "name": f"n {ENVIRONMENT['HF_TOKEN']}",
        "model": {"source": "model"},
        "data": {"datasets": [{"path": "rows.jsonl", "name": URL}], "max_length": 128, "workers": 1},
        "train": {"steps": 2, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"dir": "run"},
        "monitor": {"project": f"p {ENVIRONMENT['WANDB_API_KEY']} {URL}"},
        "device": {"kind": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    printed = [
        run(tmp_path, "check", "recipe.yaml"),
        run(tmp_path, "train", "recipe.yaml", "--nproc", "2"),
        run(tmp_path, "train", "recipe.yaml", "train.steps=3"),  # what it resumes from is what it is
        run(tmp_path, "train", "recipe.yaml", f"model.source={URL}", "checkpoint.dir=other", code=2),
        run(tmp_path, "train", "recipe.yaml", f"optim.lr={ENVIRONMENT['HF_TOKEN']}", code=2),
        run(tmp_path, "train", "recipe.yaml", f"device.env={{HF_TOKEN: {ENVIRONMENT['HF_TOKEN']}}}", code=2),
        run(tmp_path, "download", "a/b", code=2),
        run(tmp_path, "launch", "slurm", "recipe.yaml", "--nodes", "1", "--nproc", "1"),
        run(tmp_path, "launch", "slurm", "recipe.yaml", f"monitor.project={URL}", code=2),
        run(tmp_path, "export", "run", "out"),
        run(tmp_path, "chat", "run", "--prompt", "hello", "--max-new-tokens", "2"),
        run(tmp_path, "doctor", "--env"),
        run(tmp_path, "doctor", "--env", "--json"),
    ]
    assert "resumed at step 2" in printed[2]
    assert not [text for text in printed if "MARKED" in text]
    (tmp_path / "recipe.yaml").unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"state.json", "recipe.yaml", "metrics.jsonl"} <= {path.name for path in written}
    assert not [path for path in written if b"MARKED" in path.read_bytes() or "MARKED" in path.name]
