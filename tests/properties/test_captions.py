"""Pictures with captions between a collection, its features and training: what differs is noticed, what does
not is accepted, wherever the files lie and however they are named."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from polymodal.core.errors import PolymodalError
from polymodal.core.files import file_stem, replace_file
from polymodal.core.tensors import require_finite
from polymodal.data import features as store
from polymodal.data.freshness import Comparison
from polymodal.data.source import open_corpus
from polymodal.models import catalog
from polymodal.recipe import Dataset, Model, Recipe
from polymodal.train.layouts import layout_of
from tests.models import tiny


class Grid:
    """A latent grid of a picture model."""

    def tokens(self, frames, height, width):
        return height * width

    def shape(self, frames, height, width):
        return (4, frames, height, width)


def write_rows(folder: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"image": name, "cap": caption}) for name, caption in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def write_features(folder: Path, data: Path) -> None:
    """A finished list and manifest of the data, as `encode` leaves them, over empty feature files."""
    corpus = open_corpus([Dataset(path=str(data / "rows.jsonl"), format="caption")])
    (folder / store.FOLDER).mkdir(parents=True)
    rows = []
    for number, record in enumerate(corpus):
        identity = store.identity(record)
        file = store.file_name(identity, "safetensors")
        (folder / file).write_bytes(b"")
        about = {"stamp": store.stamp(identity), "media_bytes": identity["files"][0][1]}
        about |= {"hash": store.content_hash(record), "record": number, "dataset": 0, "bytes": 1}
        rows.append({"cap": list(record.extra["captions"]), "file": file, "sample_size": "1x8x8", **about})
    store.write_list(folder, rows)
    parts = [{"fingerprint": part.fingerprint} for part in corpus.parts]
    store.write_json(folder / store.MANIFEST, {"settings": {}, "datasets": parts})


def older(features: Path, data: Path, ranks: int) -> str | None:
    corpus = open_corpus([Dataset(path=str(data / "rows.jsonl"), format="caption")])
    found = store.Features(features, {}, Grid())
    records, rows = [], []
    for rank in range(ranks):
        comparison = Comparison(found, corpus, (), lambda record: True)
        more = comparison.differing(range(rank, comparison.numbers, ranks))
        records += more[0]
        rows += more[1]
    return comparison.report(sorted(records), sorted(rows))


HARMLESS = ("nothing", "shuffled", "moved", "copied", "touched", "media removed")
CHANGES = {
    "caption": "changed captions",
    "picture": "changed media",
    "picture of the same size and time": None,
    "row added": "new rows: 1",
    "row first": "new rows: 1",
    "row removed": "rows no longer there: 1",
    "row doubled": "new rows: 1",
    "broken": "rows that are broken now: 1",
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.text(min_size=1, max_size=4).filter(str.strip), min_size=2, max_size=6),
    st.sampled_from([*HARMLESS, *CHANGES]),
    st.sampled_from(HARMLESS),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_features_are_older_than_their_data_exactly_when_something_changed(
    captions, change, also, ranks, draw
):
    with tempfile.TemporaryDirectory() as place:
        data, features = Path(place) / "data", Path(place) / "features"
        data.mkdir()
        captions = [c for c in captions if c.encode("utf-8", "ignore").decode() == c] or ["a"]
        rows = [(f"{i}.png", caption) for i, caption in enumerate(captions)]
        for i, (name, _) in enumerate(rows):
            (data / name).write_bytes(bytes([i]) * 100)
        write_rows(data, rows)
        write_features(features, data)
        at = draw.randrange(len(rows))
        file = data / rows[at][0]
        if change == "caption":
            rows[at] = (rows[at][0], rows[at][1] + " more")
        elif change.startswith("picture"):
            before = file.stat()
            file.write_bytes(b"x" * 100)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "picture")))
        elif change == "row added":
            (data / "new.png").write_bytes(b"new")
            rows.append(("new.png", "new"))
        elif change == "row first":
            rows.insert(0, ("0.png", "another caption of it"))
        elif change == "row removed" and len(rows) > 1:
            rows.pop(at)
        elif change == "row doubled":
            rows.append(rows[at])
        elif change == "broken":
            rows[at] = (rows[at][0], " ")
        for what in (also, change):
            if what == "shuffled":
                draw.shuffle(rows)
            elif what == "touched":
                for path in data.glob("*.png"):
                    os.utime(path)
            elif what == "copied" and data.name == "data":
                shutil.copytree(data, Path(place) / "copy", copy_function=shutil.copyfile)
                shutil.rmtree(data)
                data = Path(place) / "copy"
            elif what == "moved" and data.name != "elsewhere":
                data = data.rename(Path(place) / "elsewhere")
        write_rows(data, rows)
        if "media removed" in (change, also) and not change.startswith(("picture", "row")):
            for path in data.glob("*.png"):
                path.unlink()
        said = older(features, data, ranks)
        expected = CHANGES.get(change)
        if change == "row removed" and len(captions) == 1:
            expected = None
        if expected is None:
            assert said is None or change in CHANGES, said
        elif also == "shuffled" or also == "media removed":
            assert said is not None  # which of two changed rows is which cannot be known by their numbers
        else:
            assert said is not None and expected in said, said


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=300), st.integers(1, 200))
def test_any_text_is_part_of_a_files_name(text, most):
    stem = file_stem(text, most)
    assert 0 < len(os.fsencode(stem)) <= max(most, 6) and not stem.startswith(("-", "."))
    with tempfile.TemporaryDirectory() as place:
        replace_file(Path(place) / f"{stem}.json", "{}")
        assert [stem + ".json"] == os.listdir(place)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), None]),
    st.randoms(use_true_random=False),
)
def test_a_weight_that_is_no_number_is_found_wherever_it_is(shape, dtype, value, draw):
    largest = torch.finfo(dtype).max
    tensor = torch.full(shape, draw.choice([0.0, largest, -largest]), dtype=torch.float64).to(dtype)
    if value is not None and not (dtype == torch.float8_e4m3fn and value == value):  # which has no infinity
        tensor.view(-1)[draw.randrange(tensor.numel())] = value
        with pytest.raises(PolymodalError, match="model.safetensors: a.weight holds values that are"):
            require_finite([("a.weight", tensor)], "model.safetensors")
        if value == value:
            require_finite([("a.mask", tensor)], "model.safetensors", infinite=True)
    else:
        require_finite(
            [("a.weight", tensor), ("ids", torch.zeros(2, dtype=torch.int64))], "model.safetensors"
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    where = tmp_path_factory.mktemp("agreement") / "model"
    tiny.checkpoint("qwen2.5-vl", where)
    return where


@pytest.mark.parametrize(
    "part, key, value, words",
    [
        ("config.json", "image_token_id", 3, "image_token_id = 3 of config.json is the token"),
        ("config.json", "video_token_id", 10**6, "video_token_id = 1000000 of config.json is beyond"),
        ("vision_config", "patch_size", 7, r"patch_size = \d+ of the image processor, patch_size = 7"),
        ("vision_config", "temporal_patch_size", 4, "temporal_patch_size = 2 of the image processor"),
        ("vision_config", "spatial_merge_size", 1, "merge_size = 2 of the image processor"),
        ("tokenizer", "added", 400, "the model's embedding has"),
        ("nothing", "", 0, None),
    ],
)
def test_files_of_one_checkpoint_agree_or_are_named(checkpoint, tmp_path, part, key, value, words):
    here = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((here / "config.json").read_text())
    if part == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(here)
        tokenizer.add_tokens([f"<loc_{i}>" for i in range(value)])
        tokenizer.save_pretrained(here)
    elif part != "nothing":
        (config if part == "config.json" else config[part])[key] = value
        (here / "config.json").write_text(json.dumps(config))
    recipe = Recipe(model=Model(source=str(here)))
    layout = layout_of(recipe, catalog.family(recipe.model))
    if words is None:
        layout.processor()
        return
    with pytest.raises(PolymodalError, match=words) as error:
        layout.processor()
    assert str(here) in error.value.message and error.value.hint
