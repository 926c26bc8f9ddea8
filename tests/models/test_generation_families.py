"""Every generating family, on a tiny pipeline of the real classes: encode, train with its own objective, export, reopen.

Full weights and LoRA; the export is opened by diffusers alone and predicts as the trained model does; sampling from the
run and from its export gives the same.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.data import media
from polymodal.generate.media import save
from polymodal.generate.pipeline import Prompt, Settings, open_generator
from polymodal.models import catalog, pipelines
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.train import encode, trainer
from polymodal.train.actors import Encoders
from polymodal.train.export import export
from tests.bounds import assert_one_picture
from tests.models import clips, tiny_pipelines

QUICK = ("wan", "flux")
"""Families of the default run; the others are slow."""
FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny_pipelines.MAKERS
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    clips.edits(directory)
    clips.sounding(directory)
    return clips.data(directory, clips=2, pictures=1, length=9)


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stills")
    clips.edits(directory)
    clips.pairs(directory)
    return clips.data(directory, clips=0, pictures=3)


def recipe(source, family, data, stills, run, **model):
    still = family.grid().still
    if family.given:
        edits = "sounding.json" if family.grid().sound else "edits.json"
        data, stills = data.parent / edits, stills.parent / "pairs.json"
    return recipes.validate(
        {
            "name": "tiny",
            "model": {"source": str(source), **model},
            "data": {
                "datasets": [{"path": str(stills if still else data)}], "workers": 0, "on_error": "skip", "features": str(run / "features"),
                "clip": {"frames": [tiny_pipelines.FRAMES.get(family.config.get("patch_size_t"), 9)], "sizes": [tiny_pipelines.SIZES.get(family.card.name, (32, 32))]},
            },
            "train": {"steps": 3, "global_batch_size": 2, "micro_batch_size": 1 if "references" in family.given else 2, "precision": "fp32", "ema": 0.5, "diffusion": {"drop": 0.5}},
            "optim": {"lr": 1e-2, "schedule": {"name": "constant", "warmup": 0}},
            "checkpoint": {"dir": str(run / "run"), "asynchronous": False},
            "monitor": {"trackers": []},
        }
    )  # fmt: skip


def settings(family):
    height, width = tiny_pipelines.SIZES.get(family.card.name, (32, 32))
    return Settings(
        2, 2.0, height, width, None if family.grid().still else 5 if family.grid().patch[0] == 1 else 13
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_its_export_is_diffusers(name, data, stills, tmp_path):
    source = tiny_pipelines.pipeline(name, tmp_path / "pipeline")
    family = catalog.family(recipes.Model(source=str(source)))
    made = recipe(source, family, data, stills, tmp_path)
    encode.run(made)
    trainer.run(made)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and all(np.isfinite(losses))
    done = export(tmp_path / "run", tmp_path / "out")  # proves itself, or raises
    assert done.what == "model" and done.difference <= 1e-3 * max(1, done.largest)
    cls = pipelines.pipeline_class(source)
    opened, before = (cls.from_pretrained(place) for place in (tmp_path / "out", source))
    trained, base = (getattr(p, family.part).state_dict() for p in (opened, before))
    assert trained.keys() == base.keys() and any(not torch.equal(trained[k], base[k]) for k in base)
    image = str(next(stills.parent.glob("pictures/*.png")))
    conditioned = getattr(family, "conditioned", False)
    prompt = Prompt(
        "a red square moving left",
        None,
        image if conditioned else None,
        image if getattr(family, "last_frame", False) else None,
    )
    if family.given and family.grid().still:
        prompt.image = image
    elif "source" in family.given:
        shown = {name: str(stills.parent / "edits" / f"{name}.mp4") for name in ("source", "mask")}
        prompt.video, prompt.mask, prompt.references = shown["source"], shown["mask"], [image]
    samples = [
        open_generator(tmp_path / place).sample([prompt], settings(family))[0] for place in ("run", "out")
    ]
    assert_one_picture(*samples)
    assert samples[0].dtype == np.uint8
    if conditioned:
        with pytest.raises(PolymodalError, match="needs `image`"):
            open_generator(tmp_path / "out").sample([Prompt("a red square")], settings(family))
    other = open_generator(tmp_path / "run", ema=True).sample([prompt], settings(family))[0]
    assert not np.array_equal(samples[0], other)


@pytest.mark.parametrize("name", ["vace", pytest.param("ltx2", marks=pytest.mark.slow)])
def test_what_comes_with_a_clip_is_encoded_alike_before_and_while_training(name, data, stills, tmp_path):
    source = tiny_pipelines.pipeline(name, tmp_path / "pipeline")
    family = catalog.family(recipes.Model(source=str(source)))
    losses = {}
    for way in ("cached", "online"):
        made = recipe(source, family, data, stills, tmp_path / way)
        made.data.encode = way
        if way == "cached":
            encode.run(made)
        trainer.run(made)
        lines = (tmp_path / way / "run" / "metrics.jsonl").read_text().splitlines()
        losses[way] = [json.loads(line).get("loss") for line in lines]
    assert losses["online"] == pytest.approx(losses["cached"], rel=1e-4)


@pytest.mark.slow
def test_clips_are_learned_with_their_sound_or_without_it(data, stills, tmp_path):
    """With it both streams learn and are separate in the log; without it the other stream's weights stay."""
    source = tiny_pipelines.pipeline("ltx2", tmp_path / "pipeline")
    family = catalog.family(recipes.Model(source=str(source)))
    before = DiffusionPipeline.from_pretrained(source).transformer.state_dict()
    changed = {}
    for sound in (True, False):
        made = recipe(source, family, data, stills, tmp_path / str(sound))
        made.data.clip.sound, made.train.diffusion.first_frame, made.train.ema = sound, 0.5, None
        made.optim.weight_decay = 0.0
        encode.run(made)
        trainer.run(made)
        text = (tmp_path / str(sound) / "run" / "metrics.jsonl").read_text()
        assert ("audio" in text) == sound
        export(tmp_path / str(sound) / "run", tmp_path / str(sound) / "out")
        after = DiffusionPipeline.from_pretrained(tmp_path / str(sound) / "out").transformer.state_dict()
        changed[sound] = {key for key in before if not torch.equal(before[key], after[key])}
    assert "audio_proj_in.weight" in changed[True] and "proj_in.weight" in changed[True]
    assert "proj_in.weight" in changed[False]
    assert not any(key.startswith(("audio_proj", "audio_time")) for key in changed[False])


def test_samples_have_sound_and_their_files_too(data, stills, tmp_path):
    source = tiny_pipelines.pipeline("ltx2", tmp_path / "pipeline")
    prompts = [Prompt("a red square"), Prompt("a blue square")]
    asked = Settings(2, 1.0, 32, 64, 9, fps=16.0)
    generator = open_generator(source)
    frames = generator.sample(prompts, asked)
    heard = generator.sound_of(1)
    assert heard["rate"] == 16000 and heard["sound"].shape[0] == 2 and np.isfinite(heard["sound"]).all()
    assert not np.array_equal(generator.sound_of(0)["sound"], heard["sound"])
    assert save(tmp_path, 1, frames[1], 16.0, **heard) == "0001.mp4"
    assert media.video_header(str(tmp_path / "0001.mp4")).sound


SOURCES = {
    ("ltx2", "image"): "LTX2ImageToVideoPipeline",
    ("wan2.2-5b", "image"): "WanImageToVideoPipeline",
    ("wan", "video"): "WanVideoToVideoPipeline",
    ("cogvideox", "video"): "CogVideoXVideoToVideoPipeline",
    ("flux", "image"): "FluxImg2ImgPipeline",
    ("sdxl", "image"): "StableDiffusionXLImg2ImgPipeline",
}


@pytest.mark.parametrize(("name", "kind"), SOURCES)
def test_a_picture_or_a_clip_to_start_from_chooses_the_pipeline_for_it(name, kind, data, stills, tmp_path):
    family = catalog.family(recipes.Model(source=str(tiny_pipelines.pipeline(name, tmp_path / "p"))))
    pictures = sorted(stills.parent.glob("pictures/*.png"))
    files = pictures if kind == "image" else sorted(data.parent.glob("clips/*/clip.mp4"))
    asked = replace(
        settings(family), steps=4, strength=0.7 if name in ("wan", "cogvideox", "flux", "sdxl") else None
    )
    generator = open_generator(tmp_path / "p")
    made = [generator.sample([Prompt("a red square", seed=1, **{kind: str(f)})], asked)[0] for f in files[:2]]
    assert list(generator._variants) == [SOURCES[name, kind]]
    assert made[0].dtype == np.uint8 and not np.array_equal(*made)  # the picture acts
    plain = generator.sample([Prompt("a red square", seed=1)], replace(asked, strength=None))[0]
    assert plain.shape == made[0].shape and type(generator.pipeline).__name__ not in generator._variants


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("wan", ("image",), "WanPipeline takes no `image`"),
        ("wan2.2-a14b", ("video",), "WanPipeline takes no `video`"),
        ("cogvideox", ("image",), "CogVideoXPipeline takes no `image`"),
        ("wan-i2v", ("image", "last_image"), "looks at one picture, the first frame"),
        ("wan-i2v", (), "needs `image`"),
        ("wan-flf2v", ("image",), "needs `last_image`"),
        ("flux-guided", ("negative_prompt",), "was distilled for guidance: it takes no negative prompt"),
    ],
)
def test_conditions_that_a_checkpoint_cannot_follow_are_reported(name, given, words, data, stills, tmp_path):
    files = {
        "image": str(next(stills.parent.glob("pictures/*.png"))),
        "video": str(next(data.parent.glob("clips/*/clip.mp4"))),
    }
    source = tiny_pipelines.pipeline(name, tmp_path / "p")
    shown = {key: files[key.removeprefix("last_")] if key != "negative_prompt" else "blue" for key in given}
    with pytest.raises(PolymodalError, match=words):
        open_generator(source).sample([Prompt("a red square", **shown)], Settings(2, None, 32, 32))


def test_captions_of_unequal_length_are_encoded_together(tmp_path):
    """HunyuanVideo's pipeline for pictures gives as many tokens as a caption has: the shorter ones are masked at the end."""
    source = tiny_pipelines.pipeline("hunyuan-video-i2v", tmp_path / "p")
    family, pipe = catalog.family(recipes.Model(source=str(source))), pipelines.open_pipeline(source)
    captions = ["a red square moving left", "blue"]
    with torch.no_grad():
        together = family.encode_text(pipe, captions)
        apart = [family.encode_text(pipe, [caption]) for caption in captions]
    for i, alone in enumerate(apart):
        length = alone["encoder_attention_mask"].shape[1]
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            assert (
                torch.equal(together[name][i, :length], alone[name][0])
                and not together[name][i, length:].any()
            )
    assert len({alone["encoder_attention_mask"].shape[1] for alone in apart}) == 2


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch"])
def test_a_dropped_caption_is_the_empty_caption_whatever_is_beside_it(name, tmp_path):
    """Families whose text has as many tokens as a caption: the prediction is that of the sample alone, undropped."""
    source = tiny_pipelines.pipeline(name, tmp_path / "p")
    family = catalog.family(recipes.Model(source=str(source)))
    encoders = Encoders(family, torch.float32, torch.device("cpu"))
    model = pipelines.open_pipeline(source).components[family.part].double()
    # the second number of a seed's generator drops the caption: three samples, of which only the first and last lose it
    chance = {s: float(torch.rand(2, generator=torch.Generator().manual_seed(s))[1]) for s in range(40)}
    lost, kept = (
        [s for s, c in chance.items() if (c < 0.3) == dropped and abs(c - 0.3) > 0.1]
        for dropped in (True, False)
    )
    seeds = (lost[0], kept[0], lost[1])
    pixels = torch.randint(0, 256, (3, 1 if family.grid().still else 9, 32, 32, 3), dtype=torch.uint8)
    media = encoders.media(pixels)
    texts = encoders.text(["a red square moving left", "blue", "a red one"], pixels), encoders.text([""])
    masks = [text[next(n for n in text if "mask" in n)] for text in texts]
    assert len({(mask.shape[1], int(row.sum())) for mask in masks for row in mask}) > 1, "lengths differ"

    def predicted(tensors, of, drop):
        tensors = {**tensors, "weight": torch.ones(len(of))}
        axes = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
        groups = {"seeds": of, "tokens": (4,) * len(of), "kind": "image"}
        objective = DiffusionObjective(family.process(), recipes.Diffusion(drop=drop))
        objective.unconditional = texts[1]
        (made,) = objective.prepare(None, [Batch(tensors, axes, tuple(range(len(of))), groups=groups)])
        with torch.no_grad():
            return family.denoise(model, made["noisy"].double(), made["timestep"], made)

    together = predicted({**media, **texts[0]}, seeds, 0.3)
    for i, seed in enumerate(seeds):
        own = {n: t[i : i + 1] for n, t in texts[0].items()} if i == 1 else texts[1]
        alone = predicted({**{n: t[i : i + 1] for n, t in media.items()}, **own}, (seed,), 0.0)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together, predicted({**media, **texts[0]}, seeds, 0.0), rtol=1e-3, atol=1e-6)


def test_guidance_of_qwen_image_leads_away_from_a_blank(tmp_path):
    generator = open_generator(tiny_pipelines.pipeline("qwen-image", tmp_path / "p"))
    one, other, three = (
        generator.sample([Prompt("a red square", seed=1, negative_prompt=n)], Settings(2, g, 32, 32))[0]
        for g, n in ((1.0, None), (4.0, None), (4.0, "blue"))
    )
    assert not np.array_equal(one, other) and not np.array_equal(other, three)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_adapter_opens_in_diffusers(name, data, stills, tmp_path):
    source = tiny_pipelines.pipeline(name, tmp_path / "pipeline")
    family = catalog.family(recipes.Model(source=str(source)))
    made = recipe(source, family, data, stills, tmp_path, lora={"rank": 2, "alpha": 6})
    encode.run(made)
    trainer.run(made)
    adapter = export(tmp_path / "run", tmp_path / "adapter")
    assert adapter.what == "adapter" and adapter.difference <= 1e-3 * max(1, adapter.largest)
    merged = export(tmp_path / "run", tmp_path / "merged", merge_lora=True)
    assert merged.what == "merged"
    again = export(tmp_path / "adapter", tmp_path / "again", merge_lora=True)
    assert again.what == "merged"
    states = [
        pipelines.pipeline_class(source).from_pretrained(tmp_path / d).components[family.part].state_dict()
        for d in ("merged", "again")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    peft = not hasattr(pipelines.pipeline_class(source), "load_lora_weights")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() == peft
    if (
        peft
    ):  # diffusers has no LoRA format for it: peft's own opens on the denoiser, and generate samples with it
        image = (
            str(next(stills.parent.glob("pictures/*.png"))) if getattr(family, "conditioned", False) else None
        )
        asked = [Prompt("a red square", None, image)], settings(family)
        ours, theirs = (open_generator(tmp_path / d).sample(*asked)[0] for d in ("adapter", "merged"))
        assert_one_picture(ours, theirs)
        assert not np.array_equal(ours, open_generator(source).sample(*asked)[0])
