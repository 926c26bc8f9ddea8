"""DreamBooth is datasets with a caption, a factor of their loss, and pictures that the model draws of the class itself."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.data.source import open_corpus
from polymodal.models import catalog
from polymodal.models.card import Output, Process
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.train import encode, trainer
from polymodal.train.layouts import layout_of
from tests.models import tiny_pipelines


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_pipelines.pipeline("sdxl", tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return folder


def recipe(source, subject, prior, run, weight=1.0, generate=2, **data):
    return recipes.validate(
        {
            "model": {"source": str(source)},
            "data": {
                "datasets": [
                    {"path": str(subject), "caption": "a red circle", "weight": 1},
                    {"path": str(prior), "caption": "a circle", "weight": 1, "generate": generate, "loss_weight": weight},
                ],
                "clip": {"sizes": [[32, 32]]}, "workers": 0, "features": str(run / "features"), **data,
            },
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
            "checkpoint": {"dir": str(run / "run"), "asynchronous": False},
            "monitor": {"trackers": []},
        }
    )  # fmt: skip


def weights_of(made):
    from polymodal.generate.opening import describe

    trainer.run(made)
    return {n: p.detach() for n, p in describe(made.run_dir).fill().model.named_parameters()}


def test_pictures_of_the_class_are_drawn_once_and_their_weight_acts(source, subject, tmp_path, capsys):
    prior = tmp_path / "class"
    made = recipe(source, subject, prior, tmp_path)
    online = recipe(source, subject, prior, tmp_path, encode="online")
    with pytest.raises(PolymodalError, match=r"datasets.1.path = .*class lacks 2 of the 2 pictures"):
        layout_of(online, catalog.family(online.model)).feed("datasets", 0)
    encode.run(made)
    drawn = sorted((prior / "made").glob("*.png"))
    assert [p.name for p in drawn] == ["0000.png", "0001.png"] and Image.open(drawn[0]).size == (32, 32)
    assert "4 samples, 4 encoded" in capsys.readouterr().out
    before = [p.stat().st_mtime_ns for p in drawn]
    first = drawn[1].read_bytes()
    encode.run(made)
    assert before == [p.stat().st_mtime_ns for p in drawn]
    drawn[1].unlink()
    encode.run(made)  # the one that is missing, and the same picture
    assert drawn[1].read_bytes() == first and drawn[0].stat().st_mtime_ns == before[0]
    Image.new("RGB", (32, 32), (9, 200, 9)).save(prior / "own.png")
    more = recipe(source, subject, prior, tmp_path / "more", generate=3)
    encode.run(more)  # a picture of one's own counts
    assert len(list((prior / "made").glob("*.png"))) == 2

    other = tmp_path / "other"  # another class: the weight 0 does not see it, the weight 1 does
    for i in range(3):
        other.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (200, 9, 80 * i)).save(other / f"{i}.png")
    found = {}
    for name, place, weight in (("0", prior, 0.0), ("0 other", other, 0.0), ("1", prior, 1.0), ("1 other", other, 1.0), ("9", prior, 9.0)):  # fmt: skip
        run = tmp_path / name
        one = recipe(source, subject, place, run, weight, generate=3)
        encode.run(one)
        found[name] = weights_of(one)

    def distance(a, b):
        return sum(float((found[a][n] - found[b][n]).square().sum()) for n in found[a]) ** 0.5

    learned = distance("0", "1")
    assert distance("0", "0 other") < 1e-2 * learned  # of weight 0: other pictures change nothing
    assert distance("1", "1 other") > 0.1 * learned and distance("1", "9") > 0.1 * learned


def test_online_training_draws_them_too(source, subject, tmp_path):
    trainer.run(recipe(source, subject, tmp_path / "class", tmp_path, encode="online"))
    assert len(list((tmp_path / "class" / "made").glob("*.png"))) == 2


def test_the_factor_multiplies_a_samples_loss_and_not_the_count():
    objective = DiffusionObjective(Process(scale=1.0), recipes.Diffusion(drop=0.0))
    tensors = {"latents": torch.randn(2, 4, 2, 2), "weight": torch.ones(2), "loss_weight": torch.tensor([1.0, 0.3])}  # fmt: skip
    axes = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
    batch = Batch(tensors, axes, (0, 1), groups={"seeds": (1, 2), "tokens": (4, 4), "kind": "image"})
    assert objective.weights(batch) == {"diffusion": 2.0}
    (noised,) = objective.prepare(None, [batch])
    assert "loss_weight" not in noised.tensors
    guess = torch.zeros(2, 4, 2, 2)
    loss, _ = objective.loss(Output(guess), noised, {"diffusion": 0.5})
    each = noised["target"].square().flatten(1).mean(1)
    assert loss == pytest.approx(float((each[0] + 0.3 * each[1]) / 2), rel=1e-6)


def test_what_does_not_fit_is_reported(source, subject, tmp_path):
    from tests.models import tiny

    with pytest.raises(PolymodalError, match="data.datasets.1.generate needs a caption"):
        bad = recipe(source, subject, tmp_path / "c", tmp_path)
        bad.data.datasets[1].caption = None
        encode.run(bad)
    with pytest.raises(PolymodalError, match="is a file"):
        (tmp_path / "f").write_text("")
        encode.run(recipe(source, subject, tmp_path / "f", tmp_path))
    made = tmp_path / "drawn"
    encode.run(recipe(source, subject, made, tmp_path / "a"))
    shutil.rmtree(tmp_path / "a" / "features")
    with pytest.raises(PolymodalError, match="were drawn otherwise: caption .there 'a circle', here 'a dog'"):
        bad = recipe(source, subject, made, tmp_path / "a")
        bad.data.datasets[1].caption = "a dog"
        encode.run(bad)
    bad.model.init = "random"
    with pytest.raises(PolymodalError, match="random weights .model.init. has nothing to draw"):
        encode.run(bad)
    wan = tiny_pipelines.pipeline("wan", tmp_path / "wan")
    with pytest.raises(PolymodalError, match="draws pictures, wan2.1 makes clips"):
        one = recipe(wan, subject, tmp_path / "c", tmp_path)
        one.data.clip.frames = [5]
        encode.run(one)
    vlm = tiny.checkpoint("qwen2-vl", tmp_path / "vlm")
    with pytest.raises(
        PolymodalError, match="datasets.0.caption is for models that generate, qwen2-vl answers"
    ):
        trainer.run(recipe(vlm, subject, tmp_path / "c", tmp_path))


def test_a_directory_of_pictures_is_a_dataset_and_records_keep_their_own_caption(subject, tmp_path):
    folder = open_corpus([recipes.Dataset(path=str(subject), caption="a red circle")])
    assert len(folder) == 2 and folder[0].extra["captions"] == ("a red circle",)
    assert folder[1].media[0].source == str(subject / "1.jpg")
    rows = tmp_path / "rows.json"
    rows.write_text('[{"path": "a.png"}, {"path": "b.png", "cap": "own"}]')
    listed = open_corpus([recipes.Dataset(path=str(rows), caption="all")])
    assert [r.extra["captions"] for r in listed] == [("all",), ("own",)]
    assert listed.parts[0].fingerprint != open_corpus([recipes.Dataset(path=str(rows), caption="x")]).parts[0].fingerprint  # fmt: skip


def test_the_command_asks_no_data_file_of_a_directory_of_pictures(source, subject, tmp_path):
    from polymodal.tools.preflight import Problems, static

    made = recipe(source, subject, tmp_path / "not there yet", tmp_path)
    problems = Problems()
    static(made, 1, problems)
    assert not problems.errors
    (tmp_path / "empty").mkdir()
    made.data.datasets[0].path = str(tmp_path / "empty")
    static(made, 1, problems)
    assert len(problems.errors) == 1 and "neither data files nor pictures" in str(problems.errors[0])
