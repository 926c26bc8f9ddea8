"""diffusion_dpo from the command line: pairs are encoded, references agree, a run resumes to the same curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.tools import data_check, preflight
from polymodal.train import encode, trainer
from tests.models import tiny_pipelines


def make(root: Path, name: str) -> Path:
    """A tiny pipeline, eight pairs of pictures or lists of frames, the last one a tie."""
    tiny_pipelines.pipeline(name, root / "pipeline")
    rows = []
    for i in range(8):
        row = {"caption": "a red circle" if i % 2 else "blue", "score": 0.5 + i / 20, "score_rejected": 0.35}
        for side, shade in (("chosen", 180), ("rejected", 0)):
            files = []
            for frame in range(5 if name == "wan" else 1):
                noise = np.random.default_rng(100 * i + frame).integers(0, 70, (32, 32, 3), dtype=np.uint8)
                files.append(root / f"{side}-{i}-{frame}.png")
                Image.fromarray(noise + np.uint8(shade)).save(files[-1])
            row[side] = files[0].name
            if len(files) > 1:
                gif = root / f"{side}-{i}.gif"
                frames = [Image.open(f) for f in files]
                frames[0].save(gif, save_all=True, append_images=frames[1:], duration=60)
                row[side] = gif.name
        rows.append(row)
    rows[-1]["score"] = rows[-1]["score_rejected"]
    (root / "pairs.json").write_text(json.dumps(rows))
    (root / "scores.json").write_text(json.dumps({"total_num": 4, "max_num": 2, "0.3-0.6": 2, "0.6-0.9": 2}))
    return root


def recipe(root: Path, run: str, steps: int = 4, **changes):
    raw = {
        "name": run,
        "model": {"source": str(root / "pipeline"), **changes.get("model", {})},
        "data": {
            "datasets": [{"path": str(root / "pairs.json")}], "clip": {"sizes": [[32, 32]], "frames": [5], "fps": None}, "workers": 0,
            "features": str(root / "features"), **changes.get("data", {}),
        },
        "train": {
            "objective": "diffusion_dpo", "steps": steps, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32",
            "preference": changes.get("preference", {}),
        },
        "optim": {"lr": 2e-3, "schedule": {"name": "constant", "warmup": 0}},
        "checkpoint": {"dir": str(root / run), "asynchronous": False},
        "monitor": {"trackers": []},
    }  # fmt: skip
    return recipes.validate(raw)


def curve(made) -> list[dict]:
    trainer.run(made)
    lines = (made.run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


FIGURES = ("loss", "rewards/margin", "rewards/accuracy", "error/chosen", "error/rejected_reference")
LORA = {"lora": {"rank": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_pairs_are_encoded_learned_and_resumed(name, tmp_path, capsys):
    root = make(tmp_path, name)
    assert data_check.main([str(root / "pairs.json")]) == 0
    assert (
        "8 rows have two pictures or clips to compare (diffusion_dpo), 1 of them ties"
        in capsys.readouterr().out
    )
    lora = recipe(root, "lora", model=LORA)
    with pytest.raises(PolymodalError, match="holds no finished features"):
        trainer.run(lora)
    encode.run(lora)
    assert "7 samples, 14 encoded" in capsys.readouterr().out
    rows = [json.loads(line) for line in (root / "features" / "data.jsonl").read_text().splitlines()]
    assert all(row["file"] != row["file_rejected"] and row["score"] > row["score_rejected"] for row in rows)
    encode.run(lora)
    assert "7 samples, 0 encoded, 14 kept" in capsys.readouterr().out

    whole = curve(lora)
    assert whole[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (
        whole[0]["rewards/margin"] == 0.0 and whole[0]["error/chosen"] == whole[0]["error/chosen_reference"]
    )
    assert whole[-1]["rewards/margin"] != 0.0 and len({line["error/chosen"] for line in whole}) == 4
    curve(recipe(root, "parts", 2, model=LORA))
    resumed = curve(recipe(root, "parts", 4, model=LORA))
    for a, b in zip(whole, resumed, strict=True):
        assert {f: a[f] for f in FIGURES} == pytest.approx({f: b[f] for f in FIGURES}, rel=1e-5, abs=1e-6)
    copy, path = curve(recipe(root, "copy", 2)), {"reference": str(root / "pipeline")}
    named = curve(recipe(root, "named", 2, preference=path))
    assert copy[0]["rewards/margin"] == 0.0 and copy[1]["loss"] == pytest.approx(named[1]["loss"], rel=1e-5)
    if name == "flux":
        assert preflight.show(lora, root / "samples.html", 3, 0) == 0
        assert "rejected, score 0.35" in (root / "samples.html").read_text()
        weighed = {
            "histogram": str(root / "scores.json"),
            "weight_alpha": 1.0,
            "loss": {"sigmoid": 1, "sft": 0.1},
        }
        online = {"encode": "online", "features": None, "validation": [{"path": str(root / "pairs.json")}]}
        made = recipe(root, "online", 2, model=LORA, data=online, preference=weighed)
        assert curve(made)[0]["pair_weight"] >= 1.0
        said = (made.run_dir / "metrics.jsonl").read_text()
        assert "validation/rewards/accuracy" in said and "validation/loss/noise" in said
