"""Pictures and clips to be generated: rows, lists of folders, buckets, sampling of frames, and the plan of buckets."""

import json

import numpy as np
import pytest
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.data import media
from polymodal.data.clips import Clips
from polymodal.data.schedule import Position, Schedule
from polymodal.data.source import open_corpus
from polymodal.models.diffusion import LatentGrid
from polymodal.recipe import Clip, Data, Dataset, Train
from tests.models.clips import frames, write_video

GRID = LatentGrid(16, 4, 8, (1, 2, 2))


def corpus(tmp_path, rows, name="data.json", **options):
    file = tmp_path / name
    if name.endswith(".json"):
        file.write_text(json.dumps(rows))
    return open_corpus([Dataset(path=str(file), **options)])


def clips(grid=GRID, **settings):
    return Clips(Clip(**{"frames": [5, 9], "pixels": 48 * 64, "fps": 16, **settings}), grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    write_video(root / "wide.mp4", frames("red", "right", 12, 48, 64))
    write_video(root / "fast.mp4", frames("blue", "right", 24, 64, 48), fps=48)
    write_video(root / "short.mp4", frames("blue", "left", 3, 48, 64))
    Image.fromarray(frames("green", "left", 2, 96, 64)[0]).save(root / "tall.png")
    return root


def test_records_of_all_known_names_and_files_are_read(folder, tmp_path):
    rows = [
        {
            "path": "wide.mp4",
            "cap": "one",
            "num_frames": 12,
            "fps": 16,
            "resolution": {"height": 48, "width": 64},
        },
        {"video": "wide.mp4", "caption": "two"},
        {"image": "tall.png", "captions": ["a", "b"]},
    ]
    found = list(corpus(tmp_path, rows, media_dir=str(folder)))
    assert [r.media[0].kind for r in found] == ["video", "video", "image"]
    assert [r.extra["captions"] for r in found] == [("one",), ("two",), ("a", "b")]
    assert found[0].extra["num_frames"] == 12
    (tmp_path / "rows.csv").write_text('path,cap\nwide.mp4,"x, y"\n')
    (csv,) = corpus(tmp_path, None, "rows.csv", media_dir=str(folder))
    assert csv.extra["captions"] == ("x, y",) and csv.media[0].source == str(folder / "wide.mp4")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"path": ["tall.png"], "cap": [["p", "q"]]}), tmp_path / "rows.parquet")
    (row,) = corpus(tmp_path, None, "rows.parquet", media_dir=str(folder))
    assert row.extra["captions"] == ("p", "q")


def test_a_list_names_folders_and_their_annotations(folder, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"path": "wide.mp4", "cap": "one"}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"path": "tall.png", "cap": "two"}) + "\n")
    (tmp_path / "data.txt").write_text(f"{folder},a.json\n\n{folder},{tmp_path / 'b.jsonl'}\n")
    found = list(open_corpus([Dataset(path=str(tmp_path / "data.txt"))]))
    assert [r.media[0].source for r in found] == [str(folder / "wide.mp4"), str(folder / "tall.png")]
    for text, words in (
        ("only-one-part\n", "line 1: `only-one-part` is not of the form"),
        ("nowhere,a.json\n", "the folder .*nowhere does not exist"),
        ("\n", "names no data"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(PolymodalError, match=words):
            open_corpus([Dataset(path=str(tmp_path / "bad.txt"))])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"path": "wide.mp4", "cap": ""}, "row 1: the row has no caption"),
        ({"path": "wide.mp4"}, "row 1: the row has no caption"),
        ({"cap": "x"}, "row 1: the row names no picture or clip"),
        ({"path": "x.doc", "cap": "x"}, "neither a known picture nor a known video"),
    ],
)
def test_records_that_cannot_be_used_are_named(row, words, tmp_path):
    with pytest.raises(PolymodalError, match=words):
        _ = corpus(tmp_path, [row], format="caption")[0]


def test_buckets_are_the_nearest_shape_and_the_longest_length(folder, tmp_path):
    rows = [{"path": p, "cap": "x"} for p in ("wide.mp4", "fast.mp4", "tall.png", "short.mp4")]
    found = corpus(tmp_path, rows, media_dir=str(folder))
    wide, fast, tall, short = clips().measure(list(found))
    assert wide.shape == (9, 48, 64) and fast.shape == (5, 64, 48)  # 24 frames at 48 are 8 at 16
    assert tall.shape[0] == 1 and tall.shape[1] / tall.shape[2] == pytest.approx(1.5, rel=0.2)
    assert (
        short
        == f"{tmp_path / 'data.json'}, row 4: the video {folder / 'short.mp4'} has 3 frames at 16 a second, fewer than the shortest length 5."
    )
    assert wide.tokens == 3 * 3 * 4 == GRID.tokens(9, 48, 64)
    assert clips(sizes=[[32, 32], [48, 64]], frames=[9]).bucket(found[0]).shape == (9, 48, 64)


def test_frames_are_sampled_at_the_rate_scaled_and_cut(folder, tmp_path):
    rows = [{"path": p, "cap": "x"} for p in ("fast.mp4", "tall.png")]
    fast, tall = corpus(tmp_path, rows, media_dir=str(folder))
    c = clips()
    got = c.frames(fast, c.bucket(fast))
    whole = media.video(
        str(folder / "fast.mp4"), media.video_header(str(folder / "fast.mp4")), range(0, 15, 3)
    )
    assert got.shape == (5, 64, 48, 3) and np.array_equal(got, whole)
    half = clips(sizes=[[32, 32]])
    small = half.frames(fast, half.bucket(fast))
    assert small.shape == (5, 32, 32, 3)
    reference = np.asarray(Image.fromarray(whole[0]).resize((32, 43), Image.Resampling.BICUBIC))[5:37]
    assert np.abs(small[0].astype(int) - reference).mean() < 3  # scaled as it is decoded
    squeezed = clips(sizes=[[32, 32]], crop="stretch")
    picture = squeezed.frames(tall, squeezed.bucket(tall))
    assert picture.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("settings", "words", "hint"),
    [
        ({"frames": [80]}, "80 frames do not become whole latents", "Use 77 or 81."),
        ({"sizes": [[50, 64]]}, "50 x 64 is not a multiple of 16 pixels", r"Use \[48, 64\]."),
        ({"pixels": 100}, "less than the smallest frame of this model, 16 x 16", "at least 256"),
    ],
)
def test_sizes_and_lengths_that_latents_do_not_divide_are_refused(settings, words, hint):
    with pytest.raises(PolymodalError, match=words) as caught:
        clips(**settings)
    import re

    assert re.search(hint, caught.value.hint)


def test_videos_are_no_pictures_and_pictures_have_no_last_frame(folder, tmp_path):
    rows = [{"path": p, "cap": "x"} for p in ("wide.mp4", "tall.png")]
    wide, tall = corpus(tmp_path, rows, media_dir=str(folder))
    with pytest.raises(PolymodalError, match="is a video, this model makes pictures"):
        clips(LatentGrid(4, 1, 8, (1, 2, 2), still=True)).bucket(wide)
    with pytest.raises(PolymodalError, match="is a picture, this model learns from clips"):
        clips(LatentGrid(16, 4, 8, (1, 2, 2), least=2)).bucket(tall)


class Buckets:
    """An index of samples in buckets."""

    def __init__(self, bucket):
        self.bucket = np.array(bucket, np.int32)
        self.tokens = 10 * (1 + self.bucket)
        self.media = {}
        self.usable = np.ones(len(bucket), bool)
        self.record = None

    def measure(self, i):
        from polymodal.core.sample import SampleLengths

        return SampleLengths(int(self.tokens[i]), int(self.tokens[i]))

    def locate(self, i):
        return i, -1


class Whole:
    name, start, weight, repeat, fingerprint = "all", 0, None, 1.0, "x"

    def __init__(self, stop):
        self.stop = stop


def plan(bucket, batch, micro, **data):
    return Schedule(
        Buckets(bucket),
        [Whole(len(bucket))],
        Data(**data),
        Train(global_batch_size=batch, micro_batch_size=micro),
        lambda m: float(m.tokens),
    )


def test_micro_batches_are_of_one_bucket_and_none_is_left_out():
    bucket = [i % 3 if i < 60 else 3 for i in range(61)]  # one bucket of a single sample
    schedule = plan(bucket, 8, 4)
    for epoch in (0, 1):
        batches = list(schedule.batches(Position(epoch, 0, 0), epochs=epoch + 1))
        packs = [pack for b in batches for pack in b.packs]
        assert sorted(i for pack in packs for i in pack) == list(range(61))
        assert all(len({bucket[i] for i in pack}) == 1 and len(pack) <= 4 for pack in packs)
        assert len(batches) == schedule.steps_in_epoch(epoch) and all(len(b.packs) <= 2 for b in batches)
    first, second = ([b.packs for b in schedule.batches(Position(e, 0, 0), epochs=e + 1)] for e in (0, 1))
    assert first != second and first == [b.packs for b in plan(bucket, 8, 4).batches(epochs=1)]


def test_a_bucketed_run_goes_on_where_it_stopped_and_balances_ranks():
    bucket = [i % 5 for i in range(200)]
    schedule = plan(bucket, 16, 2, window=64)
    batches = list(schedule.batches(epochs=1))
    later = list(schedule.batches(batches[4].next, epochs=1))
    assert [b.packs for b in later] == [b.packs for b in batches[5:]]
    ours = [sum(schedule.index.tokens[i] for i in pack) for pack in batches[0].for_rank(0, 2)]
    theirs = [sum(schedule.index.tokens[i] for i in pack) for pack in batches[0].for_rank(1, 2)]
    assert abs(sum(ours) - sum(theirs)) <= 40 and len(ours) == len(theirs)


def test_two_samples_of_two_shapes_are_enough():
    batches = list(plan([0, 1], 8, 4).batches(epochs=2))
    assert len(batches) == 2 and all(sorted(batches[0].packs) == [(0,), (1,)] for _ in batches)
    ordered = list(plan([1, 0, 1], 2, 2, shuffle=False).batches(epochs=1))
    assert ordered[0].packs[0] == (0, 2)


def test_a_record_takes_a_cut_and_a_crop_of_its_medium(tmp_path):
    """Frames and pixels that tell their own place: the frame's number in red, the column in green, the row in blue."""
    place = np.zeros((12, 48, 64, 3), np.uint8)
    place[..., 0] = np.arange(12)[:, None, None] * 20
    place[..., 1] = np.arange(64)[None, None, :] * 4
    place[..., 2] = np.arange(48)[None, :, None] * 5
    for i, frame in enumerate(place):
        Image.fromarray(frame).save(tmp_path / f"{i:02d}.png")
    listed = [f"{i:02d}.png" for i in range(12)]
    rows = [
        {"video": listed, "cap": "a", "cut": [3, 9], "crop": [16, 48, 8, 40]},
        {"video": listed, "cap": "b"},
        {"path": "05.png", "cap": "c", "crop": "[32, 64, 16, 48]"},
    ]
    cut, whole, picture = corpus(tmp_path, rows)
    made = clips(sizes=[[32, 32]], fps=None)
    measure = made.bucket(cut)
    assert measure.shape == (5, 32, 32) and made.bucket(whole).shape[0] == 9
    assert np.array_equal(made.frames(cut, measure), place[3:8, 8:40, 16:48])
    assert np.array_equal(made.frames(picture, made.bucket(picture))[0], place[5, 16:48, 32:64])
    half = clips(sizes=[[16, 16]], fps=None)
    small = half.frames(cut, half.bucket(cut)).astype(int)
    assert (
        abs(small[0, 8, 8] - place[3, 24, 32]).max() <= 6
        and abs(small[0, 0, 15] - place[3, 9, 46]).max() <= 12
    )
    for video, size in ((write_video(tmp_path / "v.mp4", place), (32, 32)), (tmp_path / "v.mp4", (16, 32))):
        (row,) = corpus(tmp_path, [{"path": str(video), "cap": "d", "cut": [4, 12], "crop": [0, 64, 16, 48]}])
        one = clips(frames=[5], sizes=[list(size)], fps=None)
        found = one.frames(row, one.bucket(row)).astype(int)
        assert found.shape == (5, *size, 3) and abs(found[0, :, :, 0].mean() - 80) < 12
        assert abs(found[0, :, :, 2].mean() - place[0, 16:48, 0, 2].mean()) < 12


@pytest.mark.parametrize(
    "row, words",
    [
        ({"path": "wide.mp4", "cut": [0, 40]}, r"`cut` \[0, 40\] does not lie in the video's 12 frames"),
        ({"path": "wide.mp4", "cut": [5, 5]}, "does not lie in"),
        ({"path": "wide.mp4", "crop": [0, 80, 0, 48]}, r"`crop` \[0, 80, 0, 48\] does not lie in its 48 x 64 pixels"),
        ({"path": "tall.png", "cut": [0, 1]}, "is a picture, the row's `cut` is of frames"),
        ({"path": "wide.mp4", "cut": [0, 9, 3]}, "`cut` = .* is no list of 2 whole numbers"),
        ({"path": "wide.mp4", "crop": [0, 1.5, 2, 3]}, "`crop` = .* is no list of 4 whole numbers"),
        ({"path": "wide.mp4", "cut": [0, 9], "src_video": "wide.mp4"}, "`cut` cuts the row's medium alone"),
    ],
)  # fmt: skip
def test_a_cut_or_a_crop_that_does_not_fit_is_reported(folder, tmp_path, row, words):
    with pytest.raises(PolymodalError, match=words):
        (found,) = corpus(tmp_path, [{**row, "cap": "x"}], media_dir=str(folder))
        clips().bucket(found)


def test_two_cuts_of_a_clip_are_two_samples(folder, tmp_path):
    from polymodal.data.features import file_name, identity

    rows = [{"path": "wide.mp4", "cap": "x", "cut": [0, 6]}, {"path": "wide.mp4", "cap": "x", "cut": [6, 12]}]
    names = {file_name(identity(r), "safetensors") for r in corpus(tmp_path, rows, media_dir=str(folder))}
    assert len(names) == 2
