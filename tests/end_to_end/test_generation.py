"""A generating model from raw clips to a trained checkpoint, on a tiny Wan of the real classes."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data import media
from polymodal.models import catalog
from polymodal.runtime.lock import DirectoryLock
from polymodal.train import encode, trainer
from polymodal.train.layouts import layout_of
from tests.bounds import CURVE, assert_one_picture
from tests.models import clips, tiny_pipelines
from tests.parallel import harness

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_pipelines.pipeline("wan", tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clips.data(tmp_path_factory.mktemp("clips"), clips=5, pictures=2)


def recipe(source, data, run, **changes):
    made = {
        "name": "tiny",
        "model": {"source": str(source)},
        "data": {
            "datasets": [{"path": str(data)}], "workers": 0, "features": str(run / "features"),
            "clip": {"frames": [5, 9], "pixels": 32 * 48, "fps": 16},
        },
        "train": {"steps": 4, "global_batch_size": 3, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3},
        "checkpoint": {"dir": str(run / "run"), "asynchronous": False},
        "monitor": {"trackers": []},
    }  # fmt: skip
    for key, value in changes.items():
        *path, leaf = key.split("__")
        section = made
        for name in path:
            section = section.setdefault(name, {})
        section[leaf] = value
    return recipes.validate(made)


def losses(run):
    return [
        json.loads(line)["loss"]
        for line in (run / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]


def test_clips_are_encoded_once_and_trained_on(wan, data, tmp_path, capsys):
    made = recipe(wan, data, tmp_path)
    encode.run(made)
    assert "7 samples, 7 encoded, 0 kept" in capsys.readouterr().out
    root = tmp_path / "features"
    rows = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    assert len({row["file"] for row in rows}) == 7  # two clips have one name in two folders
    assert {row["sample_size"] for row in rows} == {"9x32x48", "9x48x32", "1x32x48", "1x48x32"}
    sample = load_file(root / rows[0]["file"])
    assert sample["latents"].shape == (4, 3, 4, 6) and sample["text.1.encoder_hidden_states"].shape == (
        512,
        16,
    )
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["settings"]["data.clip.frames"] == [5, 9] and {"vae", "text_encoder"} <= set(
        manifest["settings"]
    )
    before = {p: p.stat().st_mtime_ns for p in root.glob("features/*")}
    encode.run(made)
    assert "7 samples, 0 encoded, 7 kept" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in root.glob("features/*")}
    trainer.run(made)
    assert len(losses(tmp_path)) == 4 and all(0 < x < 20 for x in losses(tmp_path))


def test_samples_are_written_while_the_next_are_encoded(wan, data, tmp_path, monkeypatch, capsys):
    from polymodal.data import features
    from polymodal.train.actors import Encoders

    media, write, calls, second = Encoders.media, features.write_sample, [], threading.Event()

    def counted(self, *args):
        calls.append(args)
        if len(calls) == 2:
            second.set()
        return media(self, *args)

    def late(path, *args):
        assert second.wait(60), "the encoders wait for the disk"
        if path.name == broken:
            raise OSError(5, "Input/output error", str(path))
        return write(path, *args)

    monkeypatch.setattr(Encoders, "media", counted)
    monkeypatch.setattr(features, "write_sample", late)
    broken = ""
    encode.run(recipe(wan, data, tmp_path))
    assert "7 samples, 7 encoded" in capsys.readouterr().out
    broken = next((tmp_path / "features" / "features").iterdir()).name
    with pytest.raises(PolymodalError, match=rf"{broken} cannot be written or read: Input/output error"):
        encode.run(recipe(wan, data, tmp_path / "broken"))


def test_training_on_clips_online_is_training_on_their_features(wan, data, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cached = recipe(wan, data, tmp_path / "a", train__steps=2)
    encode.run(cached)
    trainer.run(cached)
    online = recipe(wan, data, tmp_path / "b", train__steps=2, data__encode="online")
    trainer.run(online)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=10 * CURVE)


def test_encoders_wait_on_the_cpu_between_steps(wan, data, tmp_path, monkeypatch):
    """The same losses; and they are moved once a step, not once a sample."""
    from polymodal.train.actors import Encoders

    held, moves, real = [], [], Encoders.on_device

    @contextlib.contextmanager
    def watched(self):
        if not held:
            held.append(self)
            place = self.pipeline.to
            monkeypatch.setattr(
                self.pipeline, "to", lambda where: (moves.append(str(where)), place(where))[1]
            )
        with real(self):
            yield

    for way in ("replicate", "offload"):
        if way == "offload":
            monkeypatch.setattr(Encoders, "on_device", watched)
        trainer.run(
            recipe(wan, data, tmp_path / way, train__steps=2, data__encode="online", data__encoders=way)
        )
    assert losses(tmp_path / "offload") == losses(tmp_path / "replicate")
    assert (
        moves == ["cpu"] * 6
    )  # for the empty caption, and for each step: there, which is the CPU here, and back
    with pytest.raises(
        PolymodalError, match="data.encoders = offload: training from features holds no encoders"
    ):
        trainer.run(recipe(wan, data, tmp_path, data__encoders="offload"))


def held_by_a_rank(rank, sources):
    from polymodal.distributed.mesh import Mesh, ParallelSizes
    from polymodal.train.actors import Encoders

    mesh = Mesh(ParallelSizes.of(recipes.Parallel(), 2), "cpu", rank)
    out = []
    for source in sources:
        family = catalog.family(recipes.Model(source=source))
        whole = Encoders(family, torch.float32, "cpu")
        cut = Encoders(family, torch.float32, "cpu", "shard", mesh)
        pixels = torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8)
        theirs, ours = ({**e.text(["a red square"]), **e.media(pixels)} for e in (whole, cut))
        differences = [float((theirs[name] - ours[name]).abs().max()) for name in theirs]
        own = sum(p.to_local().numel() for p in cut.pipeline.text_encoder.parameters())
        out.append((max(differences), own / sum(p.numel() for p in whole.pipeline.text_encoder.parameters())))
    return out


def test_encoders_of_text_and_pictures_are_cut_over_the_ranks(tmp_path):
    """One gives its last layer's states, of the others (CLIP of both kinds) states inside are taken."""
    sources = [str(tiny_pipelines.pipeline(name, tmp_path / name)) for name in ("wan-i2v", "sdxl")]
    for found in harness.run(2, held_by_a_rank, sources):
        for difference, share in found:
            assert difference < 1e-4 and share < 0.6


@pytest.mark.slow
def test_sequences_cut_over_ranks_give_the_same_curve(wan, data, tmp_path):
    """Ulysses on 2 processes, FSDP2 x 2 with a ring of 2 on 4, and a ring of 2 in both stages of a pipeline: rows that do
    not divide, pictures and clips."""
    ring = {"cp": 2, "ulysses": 1}
    stages = {"pp": 2, "pp_schedule": "GPipe", "recompute": "full"}
    runs = {"one": (1, {}), "ulysses": (2, {"cp": 2}), "ring": (4, ring), "stages": (4, {**ring, **stages})}
    for name, (world, parallel) in runs.items():
        made = recipe(wan, data, tmp_path / name, train__steps=2, parallel=parallel, data__features=str(tmp_path / "features"))  # fmt: skip
        if name == "one":
            encode.run(made)
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipes.dump(made))
        command = [sys.executable, "-m", "polymodal", "train", str(path), "--nproc", str(world)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "ulysses") == pytest.approx(losses(tmp_path / "one"), rel=CURVE)
    assert losses(tmp_path / "ring") == pytest.approx(losses(tmp_path / "one"), rel=CURVE)
    assert losses(tmp_path / "stages") == pytest.approx(losses(tmp_path / "one"), rel=CURVE)


def test_a_killed_encode_goes_on_and_new_records_are_added(wan, data, tmp_path, monkeypatch, capsys):
    made = recipe(wan, data, tmp_path)
    real, count = encode.Encoding._encode, []

    def dies(self, ready):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(1)
        real(self, ready)

    monkeypatch.setattr(encode.Encoding, "_encode", dies)
    with pytest.raises(KeyboardInterrupt):
        encode.run(made)
    with pytest.raises(PolymodalError, match="holds no finished features") as caught:
        trainer.run(made)
    assert "goes on where it stopped" in caught.value.hint
    monkeypatch.setattr(encode.Encoding, "_encode", real)
    stale = tmp_path / "features" / ".part-7.jsonl"  # of the eighth process of the run that was killed
    stale.write_text('{"record": 0, "file": "features/gone.safetensors", "sample_size": "9x32x48"}\n')
    encode.run(made)
    assert "7 samples, 4 encoded, 3 kept" in capsys.readouterr().out and not stale.exists()
    for _ in range(2):  # every sample has the hash of its medium, also those that were kept
        rows = [json.loads(r) for r in (tmp_path / "features" / "data.jsonl").read_text().splitlines()]
        assert [row["record"] for row in rows] == list(range(7))
        for row, asked in zip(rows, json.loads(data.read_text()), strict=True):
            digest = hashlib.blake2b((data.parent / asked["path"]).read_bytes(), digest_size=16)
            assert row["hash"] == digest.hexdigest()
        encode.run(made)


def test_a_medium_and_its_caption_are_read_by_all_documented_names(wan, data, tmp_path):
    """Rows that a model that answers would read as plain text, or as a prompt."""
    clip, picture = str(data.parent / "clips" / "clip2.mp4"), str(data.parent / "pictures" / "5.png")
    file = tmp_path / "rows.jsonl"
    rows = [{"video": clip, "text": "one"}, {"image": picture, "prompt": "two"}, {"path": clip}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PolymodalError, match="rows.jsonl, line 3: the row has no caption"):
        encode.run(recipe(wan, file, tmp_path))
    encode.run(recipe(wan, file, tmp_path, data__on_error="skip"))
    found = (tmp_path / "features" / "data.jsonl").read_text().splitlines()
    assert [json.loads(row)["cap"] for row in found] == [["one"], ["two"]]
    online = recipe(wan, file, tmp_path / "b", data__encode="online", data__on_error="skip", train__steps=1)
    trainer.run(online)
    assert len(losses(tmp_path / "b")) == 1


class Small:
    """Encoders of a device that runs out of memory unless `fits(samples, tiled)`."""

    def __init__(self, encoders, fits):
        self._encoders, self._fits = encoders, fits

    def __getattr__(self, name):
        return getattr(self._encoders, name)

    def media(self, pixels, given=()):
        if not self._fits(len(pixels), self._encoders.pipeline.vae.use_tiling):
            raise torch.OutOfMemoryError("simulated")
        return self._encoders.media(pixels, given)


def test_out_of_memory_means_fewer_at_once_then_tiles_then_a_sentence(
    wan, data, tmp_path, monkeypatch, capsys
):
    real = encode.Encoding._encoders
    monkeypatch.setattr(
        encode.Encoding, "_encoders", lambda self: Small(real(self), lambda n, tiled: n == 1 and tiled)
    )
    made = recipe(wan, data, tmp_path, data__encode_batch=4)
    encode.run(made)
    said = capsys.readouterr()
    assert "7 samples, 7 encoded" in said.out
    assert "encoding 1 samples at once" in said.err and said.err.count("encoding in tiles") == 1
    monkeypatch.setattr(encode.Encoding, "_encoders", lambda self: Small(real(self), lambda n, tiled: False))
    with pytest.raises(PolymodalError, match="does not fit the device, even in tiles") as caught:
        encode.run(recipe(wan, data, tmp_path, data__features=str(tmp_path / "more")))
    assert "data.clip.pixels" in caught.value.hint


def test_features_of_other_settings_are_refused_by_name(wan, data, tmp_path):
    made = recipe(wan, data, tmp_path)
    encode.run(made)
    other = recipe(wan, data, tmp_path, data__clip__fps=8)
    for run in (trainer.run, encode.run):
        with pytest.raises(PolymodalError, match=r"other settings: data.clip.fps \(there 16.0, here 8.0\)"):
            run(other)
    copy = shutil.copytree(wan, tmp_path / "other")
    vae = tiny_pipelines.wan_vae(z=4)
    vae.save_pretrained(copy / "vae")
    with pytest.raises(PolymodalError, match="other settings: vae"):
        trainer.run(recipe(copy, data, tmp_path))


def test_the_documented_layout_is_written_and_read(wan, data, tmp_path, capsys):
    made = recipe(wan, data, tmp_path, data__feature_files="pt", train__steps=2, train__diffusion__drop=0.0)
    encode.run(made)
    root = tmp_path / "features"
    rows = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    first = torch.load(root / rows[0]["file"], weights_only=True)
    assert set(first) == {"video", "prompt_ids"} and len(first["prompt_ids"]) == 2
    assert first["video"].shape == (4, 3, 4, 6) and rows[0]["sample_num_frames"] == 9
    trainer.run(made)
    same = losses(tmp_path)
    for name in ("manifest.json", "settings.json", "empty.safetensors"):
        (root / name).unlink()  # another system's extraction has none of them
    trainer.run(
        recipe(
            wan,
            data,
            tmp_path,
            train__steps=2,
            train__diffusion__drop=0.0,
            data__datasets=[],
            checkpoint__resume="never",
        )
    )
    assert losses(tmp_path) == pytest.approx(same, rel=CURVE)
    nested = tmp_path / "deep" / "features"
    shutil.copytree(root / "features", nested / "features" / "features")
    shutil.copy(root / "data.jsonl", nested)
    with pytest.raises(PolymodalError, match="does not exist") as caught:
        trainer.run(recipe(wan, data, tmp_path, data__features=str(nested), train__diffusion__drop=0.0))
    assert "features/features: move them one level up" in caught.value.hint
    with pytest.raises(PolymodalError, match=r"features/features holds no finished features") as caught:
        trainer.run(recipe(wan, data, tmp_path, data__features=str(root / "features")))
    assert caught.value.hint == f"data.features is one level too deep: set it to {root}."


def test_features_of_latents_with_other_channels_are_reported(wan, data, tmp_path):
    """Documented files say nothing of the VAE that made them."""
    made = recipe(wan, data, tmp_path, data__feature_files="pt", data__workers=0, train__diffusion__drop=0.0)
    encode.run(made)
    root = tmp_path / "features"
    for name in ("manifest.json", "settings.json", "empty.safetensors"):
        (root / name).unlink()
    for file in root.glob("features/*.pt"):
        held = torch.load(file, weights_only=True)
        torch.save({**held, "video": torch.cat([held["video"]] * 4)}, file)
    with pytest.raises(PolymodalError, match=r"\.pt.*\[16, \d, \d, \d\].*\[4, \d, \d, \d\]"):
        trainer.run(made)


def test_a_first_frame_that_documented_features_lack_is_reported(wan, data, tmp_path):
    made = recipe(wan, data, tmp_path, data__feature_files="pt", train__diffusion__drop=0.0)
    encode.run(made)
    for name in ("manifest.json", "settings.json", "empty.safetensors"):
        (tmp_path / "features" / name).unlink()
    made.model.source = str(tiny_pipelines.pipeline("wan-i2v", tmp_path / "i2v"))
    made.data.datasets = []
    with pytest.raises(PolymodalError, match=r"\.pt holds no `i2v_vae_feature`, which this model is given"):
        trainer.run(made)


def test_a_scheduler_of_another_process_is_refused(wan, tmp_path):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = shutil.copytree(wan, tmp_path / "wan")
    DDIMScheduler().save_pretrained(flow / "scheduler")
    with pytest.raises(PolymodalError, match="DDIMScheduler, is none of flow matching, which wan2.1"):
        catalog.family(recipes.Model(source=str(flow)))
    discrete = tiny_pipelines.pipeline("sdxl", tmp_path / "sdxl")
    FlowMatchEulerDiscreteScheduler().save_pretrained(discrete / "scheduler")
    family = catalog.family(recipes.Model(source=str(discrete)))
    with pytest.raises(PolymodalError, match="FlowMatchEulerDiscreteScheduler, has no discrete timesteps"):
        family.process()


def test_a_broken_clip_is_named_and_fatal_or_left_out(wan, tmp_path, capsys):
    file = clips.data(tmp_path / "data", clips=3)
    (tmp_path / "data" / "clips" / "clip2.mp4").write_bytes(b"no video")
    with pytest.raises(
        PolymodalError, match=r"data.json, row 3: the video .*clip2.mp4 cannot be read"
    ) as caught:
        encode.run(recipe(wan, file, tmp_path))
    assert "data.on_error to skip" in caught.value.hint
    encode.run(recipe(wan, file, tmp_path, data__on_error="skip"))
    said = capsys.readouterr()
    assert "2 samples, 2 encoded, 0 kept, 1 left out" in said.out and "clip2.mp4" in said.err


def test_features_are_compared_with_the_present_data_and_written_by_one_process(wan, tmp_path):
    file = clips.data(tmp_path / "data", clips=3)
    (tmp_path / "data" / "clips" / "clip2.mp4").write_bytes(b"no video")
    made = recipe(wan, file, tmp_path, data__on_error="skip")
    with DirectoryLock(tmp_path / "features", "encoding"):
        with pytest.raises(PolymodalError, match=f"features is in use by process {os.getpid()} on host"):
            encode.run(made)
    (tmp_path / "features" / "features").mkdir()
    (tmp_path / "features" / "features" / ".cut.safetensors.1.tmp").write_bytes(
        b"of a process that was killed"
    )
    encode.run(made)
    assert not list((tmp_path / "features").rglob(".*"))

    def feed():
        return layout_of(made, catalog.family(made.model)).feed("datasets", 0)

    assert len(feed().schedule.index) == 2  # what was left out then is no new row
    rows = json.loads(file.read_text())
    rows[0]["cap"] = "another caption"
    file.write_text(json.dumps(rows[:2] + [{**rows[1], "cap": "a new row"}]))
    with pytest.raises(
        PolymodalError, match=r"changed captions, cuts, crops or scores: 1 \(first: .*row 1\)"
    ) as error:
        feed()
    assert "new rows: 1" in error.value.message and "polymodal encode" in error.value.hint
    encode.run(made)
    assert len(feed().schedule.index) == 3
    first, second = (tmp_path / "data" / "clips" / f"part{i}" / "clip.mp4" for i in range(2))
    shutil.copyfile(second, first)
    with pytest.raises(PolymodalError, match="changed media: 1"):
        feed()


def test_validation_is_at_fixed_noise_levels(wan, data, tmp_path):
    made = recipe(
        wan,
        data,
        tmp_path,
        train__steps=1,
        data__validation=[{"path": str(data), "max_samples": 2}],
        train__diffusion__quantiles=2,
    )
    encode.run(made)
    trainer.run(made)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {
        "validation/loss",
        "validation/loss/video",
        "validation/loss/noise 0.25",
        "validation/loss/noise 0.75",
    } <= set(line)
    parts = (line["validation/loss/noise 0.25"] + line["validation/loss/noise 0.75"]) / 2
    assert line["validation/loss"] == pytest.approx(parts, rel=10 * CURVE)


def command(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "polymodal", *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_ranks_share_the_encoding_and_give_one_processs_curve_also_after_a_resume(wan, data, tmp_path):
    made = recipe(
        wan,
        data,
        tmp_path,
        checkpoint__every=2,
        train__global_batch_size=4,
        data__clip={"frames": [9], "sizes": [[32, 48]]},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(made))
    assert "7 samples, 7 encoded" in command("encode", file, "--nproc", 2)
    command("train", file, "--nproc", 2)
    two = losses(tmp_path)
    trainer.run(
        made.model_copy(
            update={"checkpoint": made.checkpoint.model_copy(update={"dir": str(tmp_path / "one" / "run")})}
        )
    )
    assert two == pytest.approx(losses(tmp_path / "one"), rel=CURVE) and len(two) == 4
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    trainer.run(made)  # one process goes on where two were
    assert losses(tmp_path) == pytest.approx(two, rel=CURVE)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_at"] == 2


@pytest.mark.slow
def test_samples_do_not_depend_on_ranks_and_batches(wan, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": p, **more}) + "\n"
            for p, more in (
                ("a red circle", {}),
                ("blue", {"seed": 5}),
                ("a digit", {"negative_prompt": "red"}),
            )
        )
    )
    shape = ("--steps", 2, "--height", 32, "--width", 32, "--frames", 5, "--guidance", 3)
    command("generate", wan, "--prompts", prompts, "--out", tmp_path / "a", *shape, "--nproc", 2)
    command("generate", wan, "--prompts", prompts, "--out", tmp_path / "b", *shape, "--batch-size", 2)
    # The sheet shows every frame of these clips. Of the same frames the H.264 encoder may write other bytes.
    a, b = ((tmp_path / d / "sheet.png").read_bytes() for d in "ab")
    assert a == b and len(a) > 100
    for name in ("0000.mp4", "0001.mp4", "0002.mp4"):
        assert all(media.video_header(str(tmp_path / d / name)).frames == 5 for d in "ab"), name
    # two processes that make each sample together
    command("generate", wan, "--prompts", prompts, "--out", tmp_path / "c", *shape, "--nproc", 2, "--cp", 2)
    sheets = [np.asarray(Image.open(tmp_path / d / "sheet.png"), dtype=int) for d in "ac"]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    about = json.loads((tmp_path / "c" / "samples.json").read_text())
    assert [s["number"] for s in about["samples"]] == [0, 1, 2]
    about = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [s["seed"] for s in about["samples"]] == [42 * 1_000_003, 5, 42 * 1_000_003 + 2]
    assert (
        about["settings"]["steps"] == 2 and about["pipeline"] == "WanPipeline" and about["card"] == "wan2.1"
    )


def test_options_and_checkpoints_that_do_not_fit_are_reported(wan, tmp_path):
    from polymodal.generate.media import main, read_prompts
    from polymodal.generate.pipeline import Prompt, Settings, suspicion

    with pytest.raises(PolymodalError, match="WanPipeline: .*divisible by 16"):
        main(
            str(wan),
            prompts=[Prompt("x")],
            settings=Settings(2, height=30, width=32),
            out=str(tmp_path / "o"),
        )
    picture = tmp_path / "x.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
    with pytest.raises(PolymodalError, match="takes no `image`"):
        main(
            str(wan), prompts=[Prompt("x", image=str(picture))], settings=Settings(2), out=str(tmp_path / "o")
        )
    with pytest.raises(PolymodalError, match=r"1 processes cannot be divided by .* cp 2"):
        main(str(wan), prompts=[Prompt("x")], settings=Settings(2), out=str(tmp_path / "o"), cp=2)
    with pytest.raises(PolymodalError, match="There is no prompt"):
        main(str(wan), prompts=[], settings=Settings(), out=str(tmp_path / "o"))
    bad = tmp_path / "p.jsonl"
    bad.write_text('{"prompt": "x", "sead": 1}\n')
    with pytest.raises(PolymodalError, match="line 1: `sead` is not known"):
        read_prompts(str(bad))
    still = np.full((3, 8, 8, 3), 128, np.uint8)
    still[:, :4] = 9
    for frames, words in (
        (np.full((1, 8, 8, 3), np.nan), "not numbers"), (np.zeros((1, 8, 8, 3), np.uint8), "all black"),
        (np.full((1, 8, 8, 3), 77, np.uint8), "one colour"), (still, "does not move"),
    ):  # fmt: skip
        assert words in suspicion(frames)
    assert suspicion(np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)) is None


def test_a_model_that_answers_has_nothing_to_encode_and_one_that_generates_no_tokens_to_show(
    wan, checkpoint_of_a_vlm
):
    from polymodal.tools import preflight

    with pytest.raises(PolymodalError, match="wan2.1 generates: it is trained on pictures and clips"):
        preflight.show(recipes.validate({"model": {"source": str(wan)}}), Path("page.html"), 1, 0)
    with pytest.raises(PolymodalError, match="is trained on its data as they are"):
        encode.run(recipes.validate({"model": {"source": str(checkpoint_of_a_vlm)}}))


@pytest.fixture(scope="module")
def checkpoint_of_a_vlm(tmp_path_factory):
    from tests.models import tiny

    return tiny.checkpoint("qwen2-vl", tmp_path_factory.mktemp("vlm"))


def test_prompts_are_sampled_while_the_model_trains(wan, data, tmp_path):
    samples = {
        "prompts": ["a red square", "blue", "green"],
        "every": 2,
        "steps": 2,
        "height": 32,
        "width": 32,
        "frames": 5,
        "guidance": 3.0,
    }
    made = recipe(
        wan,
        data,
        tmp_path,
        evaluate={"samples": samples},
        monitor={"trackers": ["tensorboard"]},
        train__precision="bf16",
        checkpoint__every=2,
    )
    encode.run(made)
    trainer.run(made)
    folders = sorted((tmp_path / "run" / "samples").iterdir())
    assert [f.name for f in folders] == ["step-00000002", "step-00000004"]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == ["0000.mp4", "0001.mp4", "0002.mp4", "sheet.png"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<figure><img") == 2 and "step 4<" in page and "mean squared error" in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    assert [e.step for e in events.Images("samples")] == [2, 4]
    # the curve is that of a run that samples nothing
    plain = recipe(
        wan, data, tmp_path, train__precision="bf16", checkpoint__dir=str(tmp_path / "plain" / "run")
    )
    trainer.run(plain)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), rel=CURVE)


@pytest.mark.slow
def test_ranks_sample_together_what_one_process_samples(wan, data, tmp_path):
    samples = {
        "prompts": ["a red square", "blue", "green"],
        "negative": "a circle",
        "steps": 2,
        "height": 32,
        "width": 32,
        "frames": 5,
    }
    still = {
        "optim__lr": 1e-7
    }  # so that what is compared is the sampling: a first step enlarges rounding to lr
    made = recipe(
        wan,
        data,
        tmp_path,
        evaluate={"samples": samples},
        train__steps=1,
        checkpoint__resume="never",
        **still,
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(made))
    encode.run(made)
    sheets = []
    for layout in ((), ("--nproc", 2), ("--nproc", 2, "parallel.cp=2"), ("--nproc", 2, "parallel.tp=2")):
        command("train", file, *layout)
        folder = tmp_path / "run" / "samples" / "step-00000001"
        sheets.append(np.asarray(Image.open(folder / "sheet.png"), dtype=int))
        assert len(list(folder.glob("*.mp4"))) == 3
        shutil.rmtree(folder)
    for other in sheets[1:]:
        assert_one_picture(other, sheets[0])


def test_samples_while_training_want_their_pictures_before_the_first_step(data, tmp_path):
    flf2v = tiny_pipelines.pipeline("wan-flf2v", tmp_path / "pipeline")
    picture = str(data.parent / "pictures" / "5.png")
    size = {"steps": 2, "height": 32, "width": 32, "frames": 5}
    for given, words in (
        ({}, "evaluate.samples.images is empty, wan2.1 makes no sample without"),
        ({"images": [picture]}, "evaluate.samples.last_images is empty"),
        ({"images": [picture] * 2}, "has 1 prompts and 2 images"),
        ({"images": [picture], "last_images": ["gone.png"]}, "last_images: gone.png does not exist"),
    ):
        samples = {"prompts": ["a red square"], **size, **given}
        made = recipe(flf2v, data, tmp_path, evaluate={"samples": samples}, data__on_error="skip")
        made.data.datasets[0].path = str(data)
        if not given:
            encode.run(made)
        with pytest.raises(PolymodalError, match=words):
            trainer.run(made)
    samples = {"prompts": ["a red square"], "images": [picture], "last_images": [picture], **size}
    trainer.run(
        recipe(flf2v, data, tmp_path, evaluate={"samples": samples}, data__on_error="skip", train__steps=1)
    )
    assert (tmp_path / "run" / "samples" / "step-00000001" / "0000.mp4").is_file()


def test_check_counts_buckets_and_says_what_train_would_refuse(wan, data, tmp_path, capsys):
    from polymodal.tools import preflight, preflight_report

    made = recipe(wan, data, tmp_path)
    with pytest.raises(PolymodalError, match="holds no finished features"):
        preflight_report.main(made)
    encode.run(made)
    capsys.readouterr()
    assert preflight_report.main(made) == 0
    said = capsys.readouterr().out
    assert "9x32x48" in said and "1x48x32" in said and "of 3 samples" in said and "packs" not in said
    report = preflight.check(made)
    assert sum(n for _, n in report.data.buckets) == 7 and report.estimate["activations"] > 0


def test_out_of_memory_lowers_the_batch_then_encodes_in_tiles_then_says_what_to_cut(
    wan, data, tmp_path, monkeypatch, capsys
):
    from polymodal.train.actors import Encoders

    real, limit = Encoders.media, {"samples": 1, "tiles": False}

    def small(self, pixels, given=()):
        if len(pixels) > limit["samples"] or (limit["tiles"] and not self.pipeline.vae.use_tiling):
            raise torch.OutOfMemoryError("too much")
        return real(self, pixels, given)

    monkeypatch.setattr(Encoders, "media", small)
    made = recipe(wan, data, tmp_path, data__encode_batch=2)
    encode.run(made)
    said = capsys.readouterr()
    assert (
        "7 samples, 7 encoded" in said.out
        and "out of memory: encoding 1 samples at once" in said.err
        and "tiles" not in said.err
    )
    limit["tiles"] = True
    encode.run(recipe(wan, data, tmp_path / "tiled"))
    assert "out of memory: encoding in tiles" in capsys.readouterr().err
    limit["samples"] = 0
    with pytest.raises(
        PolymodalError, match=r"One sample of \d frames of \d+ x \d+ does not fit the device"
    ) as caught:
        encode.run(recipe(wan, data, tmp_path / "none"))
    assert "data.clip.pixels" in caught.value.hint
