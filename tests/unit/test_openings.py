"""Checkpoints that bring code: neither asked about nor run, whatever opens them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.generate import opening
from polymodal.models import catalog, pipelines
from polymodal.models.understanding.media import TokenMedia
from tests.models import tiny

CODE = "open({mark!r}, 'w').close()\nclass Mine: pass\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("openings") / "model"
    tiny.checkpoint("qwen2.5-vl", directory)
    return directory


AUTO = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"), "mine.Mine") | {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}  # fmt: skip


def change(path: Path, **values) -> None:
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | values))


@pytest.mark.parametrize(
    "unknown",
    [
        {},
        {"config.json": {"model_type": "mine"}},
        {"tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": AUTO}},
        {"processor_config.json": {"processor_class": "Mine", "auto_map": AUTO}},
        {
            "preprocessor_config.json": {
                "image_processor_type": "Mine",
                "processor_class": "Mine",
                "auto_map": AUTO,
            }
        },
        {"processor_config.json": {"processor_class": "os.system"}},
        {"config.json": {"architectures": ["os", "Mine"], "auto_map": AUTO}},
    ],
)
def test_code_beside_a_checkpoint_is_not_run(model, tmp_path, monkeypatch, unknown):
    """With names that the library knows, and with others; somebody who says yes to everything is not asked."""
    place, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model, place)
    for name in ("mine.py", "os.py", "transformers.py"):
        (place / name).write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (place / name).is_file() or name in unknown:
            change(place / name, **{"auto_map": AUTO, **unknown.get(name, {})})
    asked = io.StringIO("y\n" * 20)
    monkeypatch.setattr("sys.stdin", asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for read in (
        lambda: catalog.find(place),
        lambda: catalog.read_config(place),
        lambda: opening.processor_of(place),
        lambda: opening.load_hub(place),
        lambda: TokenMedia(str(place)),
    ):
        try:
            read()
        except PolymodalError as error:
            assert "Traceback" not in str(error)
        assert not mark.exists() and asked.tell() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"scheduler": ["mine", "Mine"]},
        {"scheduler": ["os", "system"]},
        {"scheduler": ["diffusers", "Mine"]},
        {"scheduler": ["transformers", "pipeline"]},
        {"_class_name": ["mine", "Mine"]},
        {"_class_name": "Mine"},
        {"_class_name": "utils"},
    ],
)
def test_code_beside_a_pipeline_is_not_run(tmp_path, monkeypatch, changes):
    place, mark = tmp_path / "model", tmp_path / "ran"
    (place / "scheduler").mkdir(parents=True)
    (place / "scheduler/scheduler_config.json").write_text("{}")
    for name in ("mine.py", "pipeline.py", "scheduler/mine.py", "scheduler/os.py"):
        (place / name).write_text(CODE.format(mark=str(mark)))
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": [None, None]}
    (place / "model_index.json").write_text(json.dumps(index | changes))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "nowhere"))
    with pytest.raises(PolymodalError):
        pipelines.open_pipeline(place, without=["unet"])
    with pytest.raises(PolymodalError):
        (
            pipelines.pipeline_class(place),
            pipelines.sizes(place),
            pipelines.open_pipeline(place, without=["unet"]),
        )
    assert not mark.exists()
