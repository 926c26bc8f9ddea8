"""Pictures and videos: their size from the header alone, and their pixels. Audio: data/audio.py.

Every call opens, reads and closes, so that a worker holds no decoder between samples. Errors are
PolymodalErrors that name the file; the caller adds the row. Pictures are turned upright by EXIF, videos by
their display matrix, transparency becomes white.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import open_file
from polymodal.core.text import nearest
from polymodal.recipe import Video

Source = str | bytes
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""
_HEAD = 4096  # bytes in which a JPEG's frame header is looked for
PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")
"""Pillow's decoders that may run. Others start programs (PostScript) or follow what a file names."""
CONTAINERS = "mov,matroska,avi,asf,flv,mpeg,mpegts,gif,apng,ogg,wav,w64,flac,mp3,aac,aiff,caf,amr,au"
"""FFmpeg's demuxers that may run: none that opens what its file names (playlists, concat, image patterns)."""
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 26)  # of a picture or a frame: where Pillow refuses, 179 M
MAX_FRAMES = 1 << 22  # of a video: 38 hours of 30 a second
_SEEK = 2.0  # seconds to the next frame from which a jump to a key frame may pay


def label(source: Any) -> str:
    """How an error names a medium: its path, or its size when it came as bytes."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes inside the row"
    if not isinstance(source, str):
        return f"{source[0]} and {len(source) - 1} more frames"
    return source if len(source) <= 300 else f"{source[:60]}... ({len(source)} characters)"


# Pictures -------------------------------------------------------------------


@contextlib.contextmanager
def decoding(source: Any, kind: str) -> Iterator[None]:
    """Whatever a decoder raises within becomes a PolymodalError that names the medium."""
    try:
        yield
    except PolymodalError:
        raise
    except Exception as error:  # decoders raise errors of every type
        raise _fault(source, kind, error) from None


def _fault(source: Any, kind: str, error: Exception) -> PolymodalError:
    again = "Fetch it again; it may be cut short."
    if isinstance(error, FileNotFoundError):
        problem, hint = "does not exist", _why_missing(str(source))
    elif isinstance(error, IsADirectoryError):
        problem, hint = "is a directory", "Name a file."
    elif isinstance(error, PermissionError):
        problem, hint = "may not be read", "Change its permissions."
    elif isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        problem, hint = f"is larger than can be decoded safely: {cause(error)}", "Reduce it before training."
    elif isinstance(error, UnidentifiedImageError):
        problem = "is of no known format or its header is broken"
        hint = "Fetch it again, or convert it to JPEG or PNG."
    elif "not on whitelist" in str(error):
        problem, hint = (
            "is no recording, but of a kind that names other files",
            "Convert it to mp4, wav or flac.",
        )
    elif type(error) is OSError:  # a pipe, a loop of links, a name that is too long
        problem, hint = f"cannot be read: {cause(error)}", "Name a regular file."
    else:
        problem, hint = f"cannot be read: {cause(error)}", again
    return PolymodalError(f"the {kind} {label(source)} {problem}.", hint)


def _why_missing(path: str) -> str:
    """How to fix a path that names no file."""
    if "\\" in path:
        return "It has backslashes, as Windows writes paths: use forward slashes (and media_dir for a drive)."
    folder, name = os.path.split(path)
    if path != path.strip() or name != name.strip() or "\n" in path:
        return "There is a blank or a line's end at its beginning or end: remove it."
    with contextlib.suppress(OSError, ValueError):
        if os.path.islink(path):
            return f"It is a link to {os.readlink(path)[:200]!r}, which is not there."
        there = os.listdir(folder or ".")
        if unicodedata.normalize("NFC", name) in (unicodedata.normalize("NFC", n) for n in there):
            return (
                "A file's name has the same letters with accents composed otherwise (Unicode NFC and NFD): "
                "write it as the file has it."
            )
        if near := nearest(name, there, 0.8):
            return f"Did you mean {os.path.join(folder, near[0])}?"
    return (
        "Check the path; relative ones start from media_dir (--media-dir), or from the data file's directory."
    )


def opened(source: Source) -> BinaryIO:
    """The bytes of a medium. Raises OSError, also for what is no regular file."""
    return open_file(source) if isinstance(source, str) else io.BytesIO(source)


def _open(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=PICTURES)


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8 from the header. TIFF and AVIF are turned by their decoders already."""
    if picture.format not in ("JPEG", "MPO", "PNG", "WEBP") or "exif" not in picture.info:
        return 1
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # of a broken EXIF
        return 1


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) in pixels, upright, from the header. Raises PolymodalError."""
    with decoding(source, "image"), opened(source) as file:
        quick = _jpeg_size(file.read(_HEAD))
        if quick is not None:
            return quick
        file.seek(0)
        with _open(file) as picture:
            width, height = picture.size
            return (width, height) if _orientation(picture) >= 5 else (height, width)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG without EXIF, three times faster than Pillow; None for all else."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        mark, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if 0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return (height, width) if 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 1 << 60) else None
        if mark in (0xE1, 0xFF, 0xDA) or size < 2:
            return None  # EXIF, filling, or a stream without a frame header
        at += 2 + size
    return None


def image(source: Source) -> Image.Image:
    """The upright RGB picture. Raises PolymodalError, also when the file is cut short."""
    with decoding(source, "image"), opened(source) as file, _open(file) as picture:
        turn = _TURNS.get(_orientation(picture))
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            picture.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient
        out = _rgb(picture)
        return out.transpose(turn) if turn is not None else out


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture.copy()
    if picture.mode[0] in "IF" and picture.mode != "1":  # 16 and 32 bits a pixel: brought to 8
        values = np.nan_to_num(np.asarray(picture))
        top = 65535 if values.dtype.kind in "iu" and values.size and values.max() > 255 else 255
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        out = Image.new("RGB", clear.size, (255, 255, 255))
        out.paste(clear, mask=clear.getchannel("A"))
        return out
    return picture.convert("RGB")


# Videos ---------------------------------------------------------------------


@dataclass(frozen=True)
class VideoHeader:
    """Upright size in pixels, number of frames, frames per second, seconds."""

    height: int
    width: int
    frames: int
    fps: float
    listed: bool = False  # a list of frame images: these were sampled already
    sound: bool = False  # there is a sound track

    @property
    def duration(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Clip:
    """The frames that training takes from a video: their numbers, their times, and the rate they come to."""

    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    fps: float


def clip(header: VideoHeader, video: Video, multiple: int = 2) -> Clip:
    """Frames at video.fps between min_frames and max_frames, evenly spread; their number divides by
    `multiple`.

    The rule of qwen-vl-utils (smart_nframes): n = total / fps * target, at least min, at most max and
    total, rounded down; first and last frame included. A list of frame images counts as sampled at
    video.fps and is thinned only above max_frames.
    """
    most = max(multiple, video.max_frames // multiple * multiple)
    if header.listed:
        count = min(header.frames, most)
    else:
        least = -(-video.min_frames // multiple) * multiple
        target = min(max(header.frames / header.fps * video.fps, least), most, header.frames)
        count = max(int(target // multiple) * multiple, min(multiple, header.frames))
    indices = tuple(int(i) for i in np.linspace(0, header.frames - 1, count).round())
    return Clip(indices, tuple(i / header.fps for i in indices), count / header.frames * header.fps)


def video_header(source: Source | tuple[str, ...], fps: float = 2.0) -> VideoHeader:
    """Size, frames and rate without decoding pixels; `fps` is the rate of a list of frame images.

    Packets are counted in a container without a number of frames. Raises PolymodalError.
    """
    if isinstance(source, tuple):
        height, width = image_size(source[0])
        return VideoHeader(height, width, len(source), fps, listed=True)
    import av

    with decoding(source, "video"):
        with open_container(source) as container:
            stream = video_stream(container, source)
            sound = bool(container.streams.audio)
            width, height = stream.codec_context.width, stream.codec_context.height
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            frames = int(stream.frames)
            if not frames and rate and stream.duration and stream.time_base:
                frames = round(float(stream.duration * stream.time_base) * rate)
            if not frames and rate and container.duration and container.format.name != "gif":
                frames = round(container.duration / av.time_base * rate)
            if not frames or not rate:
                times = [float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None]
                frames = len(times)
                span = max(times) - min(times) if times else 0.0
                rate = rate or ((frames - 1) / span if span > 0 else 0.0)
            if frames <= 0 or width <= 0 or height <= 0:
                raise PolymodalError(
                    f"the video {label(source)} holds no frames.", "Fetch it again, or remove the row."
                )
            if frames > MAX_FRAMES or height * width > MAX_PIXELS or not 0 <= rate <= 1e6:
                raise PolymodalError(
                    f"the video {label(source)} claims {frames:,} frames of {height} x {width} pixels, "
                    f"{rate:g} a second.",
                    f"At most {MAX_FRAMES:,} frames of {MAX_PIXELS:,} pixels are read: fetch it again.",
                )
            if _sideways(source):
                height, width = width, height
    return VideoHeader(height, width, frames, rate or 25.0, sound=sound)


def video(
    source: Source | tuple[str, ...],
    header: VideoHeader,
    indices: Sequence[int],
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Frames with these numbers (ascending), upright, uint8 [F, H, W, 3].

    size: (height, width) that frames of a container are scaled to as they are decoded, bicubic. Jumps to key
    frames over long gaps. Raises PolymodalError when the video is damaged, or ends more than a twentieth
    before its header's duration.
    """
    if isinstance(source, tuple):
        pictures = [np.asarray(image(source[i])) for i in indices]
        for i, picture in zip(indices, pictures, strict=True):
            if picture.shape != pictures[0].shape:
                raise PolymodalError(
                    f"the frames of a video differ in size: {source[indices[0]]} and {source[i]}.",
                    "Bring all frames of a video to one size.",
                )
        return np.stack(pictures)
    with decoding(source, "video"), open_container(source) as container:
        frames = _Frames(container, source, header)
        return np.stack([_pixels(frames.at(index / header.fps), size) for index in indices])


class _Frames:
    """Frames of an open video by their times, asked for in ascending order."""

    def __init__(self, container: Any, source: Source, header: VideoHeader):
        self.container, self.source, self.header = container, source, header
        self.stream = video_stream(container, source)
        self.stream.thread_type = "NONE"  # a worker is one thread among many
        self.begin = float((self.stream.start_time or 0) * self.stream.time_base)
        self.decoded = container.decode(self.stream)
        self.current: Any = None
        self.last: Any = None  # the last frame that was given
        self.time = -1.0  # of the last decoded frame
        self.jump = _SEEK

    def at(self, time: float) -> Any:
        """The frame at `time`; the last one where the video ends a little earlier."""
        before, jumped = self.time, False
        if self.time >= 0 and time - self.time > self.jump:
            jumped = self._seek(time)
        while self.current is None or self.time < time - 0.5 / self.header.fps:
            frame = next(self.decoded, None)
            if frame is None:
                self._check_end(time)
                break
            self.current = frame
            self.time = self.time + 1 / self.header.fps
            if frame.pts is not None:
                self.time = float(frame.pts * frame.time_base) - self.begin
            if jumped and self.time <= before:  # it led back: key frames are farther apart
                self.jump = max(self.jump, 2 * (time - before))
            jumped = False
        self.last = self.last if self.current is None else self.current
        return self.last

    def _seek(self, time: float) -> bool:
        import av

        try:
            self.container.seek(int((time + self.begin) / self.stream.time_base), stream=self.stream)
        except av.FFmpegError:
            self.jump = float("inf")
            return False
        self.decoded, self.current = self.container.decode(self.stream), None
        return True

    def _check_end(self, time: float) -> None:
        name = label(self.source)
        if self.current is None and self.last is None:
            raise PolymodalError(
                f"the video {name} holds no frame that can be decoded.", "Fetch it again, or remove the row."
            )
        if time - self.time > max(2 / self.header.fps, 0.05 * self.header.duration):
            seconds = f"{max(self.time, 0):.1f} s, its header says {self.header.duration:.1f} s"
            raise PolymodalError(f"the video {name} ends at {seconds}.", "Fetch it again; it is cut short.")


def open_container(source: Source) -> Any:
    """A file or bytes opened by PyAV, which opens nothing else. Use it within `decoding`."""
    import av

    av.logging.set_level(av.logging.PANIC)
    opened(source).close()  # a regular file, or the cause why not
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    container = av.open(f"file:{source}" if isinstance(source, str) else io.BytesIO(source), options=options)
    for stream in container.streams.video:
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


def video_stream(container: Any, source: Source) -> Any:
    """The picture of a video. Raises PolymodalError when there is none."""
    if not container.streams.video:
        raise PolymodalError(
            f"the video {label(source)} holds no video stream.", "Remove the row, or name a video file."
        )
    return container.streams.video[0]


def _pixels(frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4
    if size is not None:
        height, width = size if turns % 2 == 0 else size[::-1]
        if (frame.height, frame.width) != (height, width):
            frame = frame.reformat(width=width, height=height, interpolation="BICUBIC")
    if any(c.is_alpha for c in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        pixels = ((rgba[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, turns))


def _sideways(source: Source) -> bool:
    """Whether an mp4 or mov is shown turned by a quarter: the matrix of its video track's header (ISO
    14496-12)."""
    with opened(source) as file:
        if file.read(12)[4:8] != b"ftyp":
            return False
        for start, stop in _boxes(file, (b"moov", b"trak", b"tkhd"), 0, file.seek(0, 2)):
            file.seek(start)
            data = file.read(stop - start)
            at = 52 if data[:1] == b"\x01" else 40
            if len(data) >= at + 44:
                m = struct.unpack(">9i2I", data[at : at + 44])
                if m[9] and m[10]:  # the audio track has no size
                    return m[0] == 0 and m[4] == 0 and m[1] != 0
        return False


def _boxes(file: BinaryIO, path: Sequence[bytes], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of the contents of boxes of these types, each inside the one
    before."""
    while start + 8 <= stop:
        file.seek(start)
        head = file.read(16)
        size, skip = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, skip = int.from_bytes(head[8:16], "big"), 16
        size = size or stop - start
        if size < skip:
            return
        if head[4:8] == path[0]:
            inner = start + skip, min(start + size, stop)
            yield from _boxes(file, path[1:], *inner) if len(path) > 1 else [inner]
        start += size
