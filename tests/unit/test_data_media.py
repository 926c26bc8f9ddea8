"""Pictures and videos from real files: sizes from headers equal sizes of pixels; a broken file is named."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from polymodal.core.errors import PolymodalError
from polymodal.data import media as files
from polymodal.recipe import Video
from tests.models import tiny
from tests.unit.media_fixtures import picture_bytes, write_mp4


def saved(picture, format="PNG", **options):
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


# pictures


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_real_photograph(name):
    from importlib.util import find_spec

    spec = find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations
    path = f"{spec.submodule_search_locations[0]}/datasets/images/{name}"
    picture = files.image(path)
    assert files.image_size(path) == (picture.height, picture.width) == (427, 640)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(path).convert("RGB")))
    with open(path, "rb") as file:
        assert np.array_equal(np.asarray(files.image(file.read())), np.asarray(picture))


@pytest.mark.parametrize(
    ("orientation", "format"), [(o, "JPEG") for o in range(1, 9)] + [(6, "PNG"), (6, "WEBP"), (6, "TIFF")]
)
def test_pictures_are_turned_upright_by_exif(orientation, format):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(tiny.picture(40, 24), format, exif=exif)
    picture = files.image(data)
    assert (
        files.image_size(data)
        == (picture.height, picture.width)
        == ((40, 24) if orientation >= 5 else (24, 40))
    )
    assert np.array_equal(
        np.asarray(picture), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    )


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    clear.putpixel((2, 0), (0, 0, 0, 128))
    for data in (saved(clear), saved(clear, "WEBP", lossless=True)):
        pixels = np.asarray(files.image(data))
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 1].tolist() == [10, 20, 30]
        assert abs(int(pixels[0, 2, 0]) - 127) <= 1
    palette = clear.quantize(8)
    assert np.asarray(files.image(saved(palette)))[1, 3].tolist() == [255, 255, 255]
    grey = Image.new("LA", (2, 2), (0, 0))
    assert np.asarray(files.image(saved(grey))).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_are_what_pillow_makes_of_them(mode):
    format = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    picture = tiny.picture(16, 8).convert(mode)
    data = saved(picture, format)
    assert np.array_equal(
        np.asarray(files.image(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_sixteen_bit_pictures_keep_their_greys():
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = np.asarray(files.image(saved(Image.fromarray(values))))
    assert np.abs(pixels[..., 0].astype(int).ravel() - np.arange(256)).max() <= 1


def test_an_animated_gif_as_a_picture_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(3)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(files.image(data)).max() == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_picture_is_found_though_its_header_is_whole(format, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries leave it
    data = picture_bytes(format, 80, 60)
    cut = data[: len(data) // 2]
    if format != "WEBP":
        assert files.image_size(cut) == (60, 80)
    with pytest.raises(PolymodalError, match="bytes inside the row cannot be read|no known format"):
        files.image(cut)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"<svg>not a picture</svg>")
    cases = {
        "none.png": "does not exist. Check the path",
        "a.png": "of no known format",
        "b.png": "of no known format",
        "": "is a directory",
    }
    for call, (name, words) in itertools.product((files.image, files.image_size), cases.items()):
        with pytest.raises(PolymodalError, match=words) as error:
            call(str(tmp_path / name))
        assert str(tmp_path / name) in error.value.message and error.value.hint


def test_paths_of_other_systems_are_reported_with_their_cause(tmp_path):
    for name in ("caf\u00e9.png", "plain.png"):
        (tmp_path / name).write_bytes(picture_bytes())
    for name, words in {
        "pictures\\plain.png": "backslashes.*forward slashes",
        "plain.png\n": "a line's end",
        "cafe\u0301.png": "accents composed otherwise",
        "plan.png": "Did you mean .*plain.png",
    }.items():
        with pytest.raises(PolymodalError, match=words):
            files.image(str(tmp_path / name))


def test_a_bomb_is_refused():
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
        for k, d in ((b"IHDR", header), (b"IDAT", b"x"))
    )
    with pytest.raises(PolymodalError, match="larger than can be decoded safely"):
        files.image_size(b"\x89PNG\r\n\x1a\n" + chunks)


# videos


def greys(frames):
    return frames[:, -4, -4, 0].astype(int)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_header_and_frames_of_a_real_video(tmp_path, as_bytes):
    source = write_mp4(tmp_path / "v.mp4", frames=30, fps=10)
    source = source.read_bytes() if as_bytes else str(source)
    header = files.video_header(source)
    assert (header.height, header.width, header.frames, header.fps, header.duration) == (
        48,
        64,
        30,
        10.0,
        3.0,
    )
    every = files.video(source, header, range(30))
    assert every.shape == (30, 48, 64, 3) and every.dtype == np.uint8
    assert np.abs(greys(every) - np.arange(30) * 8).max() <= 4
    assert np.array_equal(files.video(source, header, [0, 7, 7, 29]), every[[0, 7, 7, 29]])


@pytest.mark.parametrize("key_every", [5, 200])
def test_jumps_over_long_gaps_give_the_same_frames(tmp_path, key_every):
    values = [(i * 37) % 200 for i in range(160)]
    source = str(write_mp4(tmp_path / "v.mp4", frames=160, fps=8, key_every=key_every, values=values))
    header = files.video_header(source)
    wanted = [0, 3, 60, 61, 100, 150, 159]  # gaps of up to 7 s
    assert np.abs(greys(files.video(source, header, wanted)) - np.array(values)[wanted]).max() <= 4


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_videos_are_turned_upright(tmp_path, rotation):
    source = str(write_mp4(tmp_path / "v.mp4", frames=4, rotation=rotation, values=[0] * 4))
    header = files.video_header(source)
    frames = files.video(source, header, [1])
    assert (
        frames.shape[1:3] == (header.height, header.width) == ((48, 64) if rotation in (0, 180) else (64, 48))
    )
    corners = {(y, x): frames[0, y, x, 0] > 128 for y in (4, -4) for x in (4, -4)}
    white = {0: (4, 4), 90: (-4, 4), -90: (4, -4), 180: (-4, -4)}[rotation]
    assert [place for place, bright in corners.items() if bright] == [white]


def test_containers_that_do_not_say_their_number_of_frames(tmp_path):
    import av

    pictures = [Image.new("RGB", (16, 8), (i * 40, 0, 0)) for i in range(6)]
    gif = saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=100)
    header = files.video_header(gif)
    assert (header.frames, round(header.fps), header.height, header.width) == (6, 10, 8, 16)
    assert np.abs(files.video(gif, header, range(6))[:, 4, 4, 0].astype(int) - np.arange(6) * 40).max() <= 8
    path = str(tmp_path / "v.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(50):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    header = files.video_header(path)
    assert (header.frames, header.fps) == (50, 25.0)
    assert files.video(path, header, [0, 49]).shape == (2, 32, 32, 3)


def test_a_list_of_frames_is_a_video(tmp_path):
    paths = []
    for i in range(6):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (16, 8), (i, 0, 0)).save(paths[-1])
    header = files.video_header(tuple(paths), fps=4.0)
    assert (header.height, header.width, header.frames, header.duration) == (8, 16, 6, 1.5)
    clip = files.clip(header, Video(fps=4.0))
    assert clip.indices == tuple(range(6)) and clip.fps == 4.0  # sampled already: none is left out
    assert files.video(tuple(paths), header, [1, 4])[:, 0, 0, 0].tolist() == [1, 4]
    assert len(files.clip(header, Video(max_frames=4)).indices) == 4


@given(
    frames=st.integers(1, 5000),
    rate=st.floats(0.5, 120),
    fps=st.floats(0.1, 30),
    least=st.integers(1, 16),
    more=st.integers(0, 200),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_the_frames_taken_keep_the_promised_bounds(frames, rate, fps, least, more, multiple):
    video = Video(fps=fps, min_frames=least, max_frames=least + more)
    header = files.VideoHeader(10, 10, frames, rate)
    clip = files.clip(header, video, multiple)
    n = len(clip.indices)
    assert 1 <= n <= max(video.max_frames, multiple) and n <= frames
    assert n % multiple == 0 or n == frames < multiple
    if frames >= multiple and n < min(frames // multiple * multiple, video.max_frames // multiple * multiple):
        assert n >= least // multiple * multiple
    assert clip.indices[0] == 0 and (n == 1 or clip.indices[-1] == frames - 1)
    assert all(a < b for a, b in itertools.pairwise(clip.indices))
    assert clip.seconds == pytest.approx([i / rate for i in clip.indices])


def test_the_sampling_rule_on_a_known_case():
    header = files.VideoHeader(10, 10, 300, 30.0)  # ten seconds
    assert len(files.clip(header, Video(fps=2.0)).indices) == 20
    assert len(files.clip(header, Video(fps=2.0, max_frames=9)).indices) == 8
    assert len(files.clip(header, Video(fps=0.1, min_frames=5)).indices) == 6
    assert files.clip(header, Video(fps=2.0)).fps == 2.0


def test_bad_videos_are_named(tmp_path):
    whole = write_mp4(tmp_path / "v.mp4", frames=60, values=[(i * 53) % 256 for i in range(60)]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 800)
    cases = {
        "none.mp4": "does not exist",
        "cut.mp4": "cannot be read",
        "text.mp4": "cannot be read",
        "sound.wav": "holds no video stream",
        "": "is a directory",
    }
    for name, words in cases.items():
        with pytest.raises(PolymodalError, match=words) as error:
            files.video_header(str(tmp_path / name))
        assert str(tmp_path / name) in error.value.message


def test_a_video_that_ends_before_its_header_says(tmp_path):
    import av

    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(60):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(noise.integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode())
    data = path.read_bytes()[: int(path.stat().st_size * 0.6)]
    header = files.video_header(data)
    assert header.frames == 60
    with pytest.raises(PolymodalError, match=r"ends at \d.\d s, its header says 6.0 s|cannot be read"):
        files.video(data, header, [0, 30, 59])


def test_frames_of_two_sizes_are_refused(tmp_path):
    for name, size in (("a.png", (8, 8)), ("b.png", (8, 4))):
        Image.new("RGB", size).save(tmp_path / name)
    paths = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    with pytest.raises(PolymodalError, match="differ in size: .*a.png and .*b.png"):
        files.video(paths, files.video_header(paths), [0, 1])
