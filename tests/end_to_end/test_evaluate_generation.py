"""What a model generates is measured by models named by path: formulas, files, and nothing is made twice."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.evaluate import generation, measures
from polymodal.generate.pipeline import Generator, Settings, open_generator
from tests.models import clips, tiny_pipelines

SETTINGS = Settings(2, height=32, width=32)
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    ids = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    text = {**TOWER, "vocab_size": 48, "max_position_embeddings": 77, **ids}
    vision = {**TOWER, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    pictures = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    CLIPProcessor(pictures, tiny_pipelines.tokenizer(77)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Two classes, random weights: what it says is arbitrary and always the same."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    labels = {"id2label": {0: "Red", 1: "Blue"}, "label2id": {"Red": 0, "Blue": 1}}
    config = ViTConfig(**TOWER, **labels, image_size=32, patch_size=8)
    folder = tmp_path_factory.mktemp("classifier")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return open_generator(tiny_pipelines.pipeline("flux", tmp_path_factory.mktemp("flux") / "pipeline"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"id": "one", "prompt": "a red circle", "label": "red", "category": "circles"},
        {"id": "two", "prompt": "a blue square", "label": "Blue", "category": "squares", "seed": 5},
        {"id": "three", "prompt": "a blue circle", "category": "circles"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_the_frechet_distance_is_that_of_the_fitted_normal_distributions():
    random = np.random.default_rng(0)
    for count in (40, 5):  # more and fewer samples than features
        a, b = random.normal(size=(count, 8)), random.normal(size=(count + 3, 8)) @ random.normal(size=(8, 8))
        s = [torch.from_numpy(np.cov(x.T)) for x in (a, b)]
        values, vectors = torch.linalg.eigh(s[0])
        root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        product = torch.linalg.eigvalsh(root @ s[1] @ root).clamp(min=0).sqrt().sum()
        wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + s[0].trace() + s[1].trace() - 2 * product
        assert measures.frechet(a, b) == pytest.approx(float(wanted), rel=1e-5)
        assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)
        assert measures.frechet(a, a + 3.0) == pytest.approx(8 * 9.0)


def test_motion_and_consistency_of_frames():
    still = np.full((4, 8, 8, 3), 100, np.uint8)
    moving = still.copy()
    moving[1::2] = 151  # each step changes every pixel by 51 = a fifth of the range
    assert measures.motion(still) == 0 and measures.motion(moving) == pytest.approx(0.2)
    assert measures.consistency(torch.ones(3, 4)) == pytest.approx(1.0)
    turned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert measures.consistency(turned) == pytest.approx((0 + 0 + 0 + 1) / 4)


def test_samples_are_made_measured_and_never_made_twice(
    flux, prompts, real, clip, classifier, tmp_path, monkeypatch
):
    real_sample, made = Generator.sample, []

    def dies(self, given, settings, first=0):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(given[0].prompt)
        return real_sample(self, given, settings, first)

    out = tmp_path / "out"
    monkeypatch.setattr(Generator, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        generation.evaluate(flux, str(prompts), out, settings=SETTINGS)
    made.clear()
    asked = {"settings": SETTINGS, "clip": str(clip), "real": str(real), "features": str(clip)}
    result = generation.evaluate(flux, str(prompts), out, **asked)
    assert made == ["a blue circle"] and result.resumed == 2
    assert set(result.measures) == {"clip", "frechet"} and result.score is None and result.n == 3
    assert result.by["category"]["circles"]["n"] == 2

    # each figure is what the library's own model says of the files
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
    pictures = [Image.open(out / "samples" / f"000{i}.png") for i in range(3)]
    words = ["a red circle", "a blue square", "a blue circle"]
    with torch.no_grad():
        said = model(**processor(text=words, images=pictures, padding=True, return_tensors="pt"))
    cosines = (said.logits_per_image / model.logit_scale.exp()).diagonal().clamp(min=0)
    assert [s.measures["clip"] for s in result.samples] == pytest.approx((100 * cosines).tolist(), abs=1e-3)

    again = generation.evaluate(flux, str(prompts), out, settings=SETTINGS, classifier=str(classifier))
    assert made == ["a blue circle"]  # another measure makes nothing
    assert again.scored == 2 and again.score == np.mean([s.score for s in again.samples[:2]])
    assert [s.expected for s in again.samples] == [("Red",), ("Blue",), ()]
    assert {s.extracted for s in again.samples} <= {"Red", "Blue"}
    assert (out / "report.html").read_text().count("<img") == 3
    assert json.loads((out / "result.json").read_text())["settings"]["settings"]["steps"] == 2
    with pytest.raises(PolymodalError, match="holds answers of other settings .*settings"):
        generation.evaluate(flux, str(prompts), out, settings=Settings(3, height=32, width=32))


@pytest.mark.slow
def test_ranks_make_what_one_process_makes(flux, prompts, real, clip, tmp_path):
    one = generation.evaluate(
        flux, str(prompts), tmp_path / "one", settings=SETTINGS, real=str(real), features=str(clip)
    )
    command = [sys.executable, "-m", "polymodal", "evaluate", flux.family.source, "generation"]
    command += ["--data", prompts, "--out", tmp_path / "two", "--steps", 2, "--height", 32, "--width", 32]
    command += ["--real", real, "--features", clip, "--nproc", 2, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["measures"]["frechet"] == pytest.approx(one.measures["frechet"], rel=1e-4)
    assert len(list((tmp_path / "two" / "parts").iterdir())) == 2
    for name in ("0000.png", "0001.png", "0002.png"):
        assert (tmp_path / "one" / "samples" / name).read_bytes() == (
            tmp_path / "two" / "samples" / name
        ).read_bytes()


def test_clips_lie_as_vbench_looks_for_them(clip, tmp_path):
    wan = open_generator(tiny_pipelines.pipeline("wan", tmp_path / "wan"))
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps([{"prompt_en": "a red circle", "dimension": ["color", "object_class"]}]))
    settings = Settings(1, height=32, width=32, frames=5)
    options = {"samples": 2, "settings": settings, "features": str(clip)}
    result = generation.evaluate(wan, str(info), tmp_path / "out", benchmark="vbench", **options)
    found = sorted(p.name for p in (tmp_path / "out" / "vbench").iterdir())
    assert found == ["a red circle-0.mp4", "a red circle-1.mp4"]
    assert set(result.measures) == {"consistency", "motion"} and 0 < result.measures["motion"] < 1
    made = [(tmp_path / "out" / "vbench" / name).read_bytes() for name in found]
    assert made[0] != made[1]  # each has a seed of its own


def test_what_cannot_be_measured_is_reported_before_anything_is_made(
    flux, prompts, real, clip, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr(Generator, "sample", lambda *a, **k: pytest.fail("made"))

    def refused(match, data=prompts, **options):
        with pytest.raises(PolymodalError, match=match) as caught:
            generation.evaluate(flux, str(data), tmp_path / "out", **options)
        return caught.value.hint

    assert "--features" in refused("--real needs a model that sees", real=str(real))
    assert "--real" in refused("pictures have no frames", features=str(clip))
    (tmp_path / "one").mkdir()
    refused("holds 0 pictures", real=str(tmp_path / "one"), features=str(clip))
    clips.write_video(tmp_path / "one" / "a.mp4", clips.frames("red", "left", 5))
    clips.write_video(tmp_path / "one" / "b.mp4", clips.frames("red", "left", 5))
    refused("is a clip, this model makes pictures", real=str(tmp_path / "one"), features=str(clip))
    refused("VBench judges clips", benchmark="vbench")
    refused("is ViTModel, not a model of texts and pictures|is ViTModel without", clip=str(classifier))
    refused("was not trained to classify", classifier=str(clip))
    refused("cannot be opened", clip=str(tmp_path / "one"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "label": "rad"}\n')
    assert (
        refused("line 1: `label` = rad is no class", bad, classifier=str(classifier)) == "Did you mean Red?"
    )
    bad.write_text('{"question": "x"}\n')
    refused(r"line 1: there is no prompt \(columns: question", bad)
    bad.write_text('{"prompt": "x", "seed": "y"}\n')
    refused("line 1: `seed` = y is no whole number", bad)
    refused("does not exist", tmp_path / "none.jsonl")


def test_a_record_whose_picture_is_broken_is_named_and_the_rest_are_made(flux, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "red", "image": "gone.png"}\n{"prompt": "blue"}\n')
    result = generation.evaluate(flux, str(data), tmp_path / "out", settings=SETTINGS)
    assert result.errors == 1 and "line 1: the image" in result.samples[0].error
    assert "gone.png does not exist" in result.samples[0].error
    assert result.samples[1].answer == "0001.png"


def test_options_of_the_other_kind_are_refused(tmp_path):
    from typer.testing import CliRunner

    from polymodal.cli import app

    said = CliRunner().invoke(app, ["evaluate", "x", "ai2d", "--data", "y", "--clip", "z"])
    assert said.exit_code == 2 and "`ai2d` is for models that answer, it has no --clip" in said.output
    said = CliRunner().invoke(app, ["evaluate", "x", "generation", "--data", "y", "--metric", "exact"])
    assert said.exit_code == 2 and "is for models that generate, it has no --metric" in said.output
