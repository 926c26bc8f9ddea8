"""What a clip is made from: rows that name a source, a mask and pictures, their frames, and the documented files of VACE."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.data import audio, features
from polymodal.data.clips import Clips
from polymodal.data.features import Features
from polymodal.data.source import open_corpus
from polymodal.models.diffusion import LatentGrid
from polymodal.recipe import Clip, Dataset
from tests.models import clips as made

GRID = LatentGrid(16, 4, 8, (1, 2, 2), references=True)
ROLES = ("source", "mask", "references")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return made.edits(tmp_path_factory.mktemp("edits"), length=12)


def records(file, rows=None):
    if rows is not None:
        file = file.with_name("other.json")
        file.write_text(json.dumps(rows))
    corpus = open_corpus([Dataset(path=str(file))])
    return [corpus[i] for i in range(len(corpus))]


def clips(roles=ROLES, **settings):
    return Clips(Clip(**{"frames": [5, 9], "sizes": [(48, 64)], "fps": None, **settings}), GRID, roles)


def test_a_clip_and_what_it_is_made_from_have_the_same_frames(file):
    full, plain = records(file)
    assert {role: len(media) for role, media in full.extra["given"].items()} == {
        "source": 1,
        "mask": 1,
        "references": 2,
    }
    assert plain.extra["given"] == {} and full.media[-1].source.endswith("target.mp4")
    measure = clips().bucket(full)
    assert measure.shape == (9 + 2 * 4, 48, 64)  # two pictures are two latent frames more
    assert GRID.shape(*measure.shape)[1] == 2 + 3 and clips().bucket(plain).shape == (9, 48, 64)
    frames, given = clips().frames(full, measure), clips().given(full, measure)
    assert {role: shown.shape for role, shown in given.items()} == {
        "source": (9, 48, 64, 3),
        "mask": (9, 48, 64, 3),
        "references": (2, 48, 64, 3),
    }
    red, blue = (
        np.asarray(made.frames(colour, "left", 12)[:9], int) for colour in ("red", "blue")
    )  # as they were written
    assert np.abs(frames - red).mean() < 6 and np.abs(given["source"] - blue).mean() < 6
    assert given["mask"][..., :24, :].mean() < 20 and given["mask"][..., 40:, :].mean() > 235
    assert (given["references"][:, :, :8] == 255).all()  # a square picture lies whole, on white
    assert clips(()).bucket(full).shape == (9, 48, 64) and clips(()).given(full, measure) == {}


def test_a_mask_that_is_a_picture_counts_for_every_frame(file):
    rows = json.loads(file.read_text())[:1]
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(file.parent / "mask.png")
    rows[0] |= {"src_video_mask": "mask.png", "src_ref_images": []}
    (record,) = records(file, rows)
    given = clips().given(record, clips().bucket(record))
    assert given["mask"].shape == (9, 48, 64, 3) and (given["mask"] == half).all()


def test_a_source_that_is_too_short_or_no_picture_is_named(file):
    rows = json.loads(file.read_text())[:1]
    made.write_video(file.parent / "short.mp4", made.frames("blue", "left", 3))
    (record,) = records(file, [{**rows[0], "src_video": "short.mp4"}])
    with pytest.raises(PolymodalError, match="source .*short.mp4 has 3 frames, fewer than the shortest"):
        clips().bucket(record)
    with pytest.raises(PolymodalError, match="`src_ref_images` names a video, references are pictures"):
        records(file, [{**rows[0], "src_ref_images": ["short.mp4"]}])


def test_features_depend_on_what_a_clip_is_made_from(file):
    rows = json.loads(file.read_text())[:1]
    first, other = records(file, [rows[0], {**rows[0], "src_ref_images": ["edits/red.png"]}])
    assert features.identity(first, ROLES) != features.identity(other, ROLES)
    assert features.identity(first) == features.identity(other)
    assert features.content_hash(first, ROLES) != features.content_hash(other, ROLES)


def test_the_documented_files_of_vace_are_read(tmp_path):
    """Its list has no sizes; its files hold the latents with the pictures before them, and their control."""
    (tmp_path / "features").mkdir()
    latents = torch.randn(16, 4, 6, 8)
    torch.save(
        {"video": latents, "prompt_ids": torch.randn(512, 8), "vace_context": torch.randn(96, 4, 6, 8)},
        tmp_path / "features/a.pt",
    )
    row = {"video": "a.mp4", "cap": "a cat", "src_video": None, "file": "features/a.pt"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    names = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "control_hidden_states": "vace_context",
    }
    found = Features(tmp_path, names, GRID)
    assert found.shapes.tolist() == [[13, 48, 64]]
    ((media, captions),) = found.samples(0)
    assert set(media) == {"latents", "control_hidden_states"} and torch.equal(media["latents"], latents)
    assert captions[0]["encoder_hidden_states"].shape == (512, 8)


def test_a_record_without_a_source_that_the_family_needs_is_named(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"path": "a.png", "cap": "x", "src_image": "b.png"}, {"path": "a.png", "cap": "x"}]))  # fmt: skip
    pair, lone = open_corpus([Dataset(path=str(tmp_path / "rows.json"))])
    pictures = Clips(Clip(sizes=[(48, 64)]), LatentGrid(16, 1, 8, (1, 2, 2), still=True), ("source",), ("source",))  # fmt: skip
    measure = pictures.bucket(pair)
    assert pictures.given(pair, measure)["source"].shape == (1, 48, 64, 3)
    with pytest.raises(PolymodalError, match="the row has no `src_video` or `src_image`, the source"):
        pictures.bucket(lone)


# ---- sound --------------------------------------------------------------------------------------------------------

SOUND = LatentGrid(4, 4, 4, sound=16000)


@pytest.fixture(scope="module")
def sounding(tmp_path_factory):
    return made.sounding(tmp_path_factory.mktemp("sounding"), length=20)


def hearing(**settings):
    return Clips(
        Clip(**{"frames": [9, 17], "sizes": [(48, 64)], "fps": 16, **settings}), SOUND, ("sound", "rate")
    )


def test_a_clip_has_the_sound_of_its_frames(sounding):
    first, second = records(sounding)
    measure = hearing().bucket(first)
    given = hearing().given(first, measure)
    assert measure.shape == (17, 48, 64) and given["rate"] == 16
    assert given["sound"].shape == (2, 17000) and given["sound"].dtype == np.float32
    for record, pitch in ((first, 440), (second, 880)):
        left, right = hearing().given(record, measure)["sound"]
        loudest = np.abs(np.fft.rfft(left)).argmax() * 16000 / len(left)
        assert loudest == pytest.approx(pitch, abs=2) and np.abs(right).max() < 0.05
    assert set(hearing(sound=False).given(first, measure)) == {"rate"}
    every_other = hearing(fps=8).given(first, hearing(fps=8).bucket(first))
    assert every_other["rate"] == 8 and every_other["sound"].shape == (2, 18000)  # 9 frames last longer


def test_sound_is_cut_with_the_frames(sounding):
    rows = json.loads(sounding.read_text())[:1]
    (whole,) = records(sounding, rows)
    (part,) = records(sounding, [{**rows[0], "cut": [8, 20]}])
    measure = hearing().bucket(part)
    assert measure.shape == (9, 48, 64)
    cut = hearing().given(part, measure)["sound"]
    late = hearing().given(whole, hearing().bucket(whole))["sound"][:, 8000:17000]
    assert cut.shape == late.shape and np.abs(cut - late).max() < 0.02


def test_silence_fills_what_a_track_lacks(sounding):
    source = str(sounding.parent / "sounding/0.mp4")
    long = audio.sound(source, 8000, 40000)
    assert np.abs(long[0, :8000]).max() > 0.3 and np.abs(long[:, 20000:]).max() == 0


def test_clips_that_cannot_be_learned_with_their_sound_are_named(sounding, file):
    silent = records(file)[1]
    with pytest.raises(PolymodalError, match="source.mp4 has no sound") as caught:
        hearing().bucket(silent)
    assert "data.clip.sound to false" in caught.value.hint
    assert hearing(sound=False).bucket(silent).shape == (9, 48, 64)
    heard = records(sounding)[0]
    with pytest.raises(
        PolymodalError, match="has 16 frames a second, fewer than data.clip.fps = 24"
    ) as caught:
        hearing(fps=24).bucket(heard)
    with pytest.raises(
        PolymodalError, match="data.clip.fps is null: clips that are learned with their sound"
    ):
        hearing(fps=None)
    (picture,) = records(file, [{"path": "edits/red.png", "cap": "red"}])
    with pytest.raises(PolymodalError, match="red.png is a picture, it has no sound"):
        hearing().bucket(picture)
