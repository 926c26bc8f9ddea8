"""Pictures and clips as a generating model learns from them: which size and length each becomes, and its
frames.

The family gives its latent grid; a medium's bucket follows from its header alone, so that planning decodes
nothing. index.py measures through it, as through chat.py for language.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, MediaStream, Record, SampleLengths
from polymodal.data import audio, media
from polymodal.data.captions import GIVEN
from polymodal.recipe import Clip

NARROWEST = 4.0
"""Largest ratio of a size's long side to its short side."""


class Clips:
    """Records -> buckets and frames. Picklable.

    grid: the family's LatentGrid (side, fits, tokens); given: the roles of what a row's medium is made from
    that the family takes; needed: those that every row must have. Raises PolymodalError for sizes and
    lengths that the latents do not divide.
    """

    streams: tuple[MediaStream, ...] = ()  # there is no token stream that media stand in

    def __init__(self, clip: Clip, grid: Any, given: Sequence[str] = (), needed: Sequence[str] = ()):
        self.clip, self.grid, self.roles, self.needed = clip, grid, tuple(given), tuple(needed)
        self.sounds = "sound" in self.roles and clip.sound
        self.rate = clip.fps or 24.0
        """Frames a second that are asked of lists of frames and of pictures."""
        if self.sounds and not clip.fps:
            raise PolymodalError(
                "data.clip.fps is null: clips that are learned with their sound have one rate.",
                "Set data.clip.fps, e.g. 24, or data.clip.sound to false.",
            )
        for frames in () if grid.still else clip.frames:
            if not grid.fits(frames):
                below = next((f for f in range(frames - 1, 0, -1) if grid.fits(f)), 1)
                above = next(f for f in range(frames + 1, frames + 8 * grid.time + 2) if grid.fits(f))
                raise PolymodalError(
                    f"data.clip.frames: {frames} frames do not become whole latents, which join {grid.time} "
                    "frames after the first.",
                    f"Use {below} or {above}.",
                )
        only = grid.size
        for height, width in clip.sizes:
            if height % grid.side or width % grid.side:
                near = [max(grid.side, round(x / grid.side) * grid.side) for x in (height, width)]
                raise PolymodalError(
                    f"data.clip.sizes: {height} x {width} is not a multiple of {grid.side} pixels, which "
                    "this model's latents need.",
                    f"Use [{near[0]}, {near[1]}].",
                )
            if only not in (None, (height, width)):
                raise PolymodalError(
                    f"data.clip.sizes: {height} x {width} is not {only[0]} x {only[1]} pixels, which this "
                    "model's places were learned for.",
                    "Leave data.clip.sizes out.",
                )
        self.lengths = [1] if grid.still else sorted(set(clip.frames))
        self.sizes = [only] if only else [(h, w) for h, w in clip.sizes] or _sizes(clip.pixels, grid.side)
        keys = [
            clip.model_dump(mode="json"),
            grid.channels,
            grid.time,
            grid.space,
            list(grid.patch),
            "cut crop",
        ]
        keys += [list(self.roles), grid.references, grid.sound] if self.roles else []
        self.fingerprint = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]

    # -- measuring, from headers ---------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """For each record its SampleLengths, or why it cannot be used, as one sentence."""
        out: list[SampleLengths | str] = []
        for record in records:
            try:
                out.append(self.bucket(record))
            except PolymodalError as error:
                out.append(f"{record.where}: {error.message}")
        return out

    def pieces(self, record: Record) -> list[Record]:
        """A clip is never split."""
        return [record]

    def bucket(self, record: Record) -> SampleLengths:
        """Raises PolymodalError for a medium that cannot be read or is too short."""
        medium = medium_of(record)
        lacking = next((role for role in self.needed if role not in self._given(record)), None)
        if lacking is not None:
            columns = " or ".join(f"`{name}`" for name in GIVEN[lacking])
            raise PolymodalError(
                f"the row has no {columns}, the {lacking} that its own medium is made from.",
                "Name it in every row, or remove the row.",
            )
        if medium.kind == "image":
            self._check_picture(medium, record)
            height, width, frames = *media.image_size(_source(medium)), 1
        else:
            header = self._header(medium)
            height, width = header.height, header.width
            frames = self._length(medium, header, record)
        _, _, height, width = _region(record, height, width)
        ratio = math.log(height / width)
        height, width = min(self.sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1]))
        frames += self.grid.time * self._references(record)
        tokens = self.grid.tokens(frames, height, width)
        return SampleLengths(tokens, tokens, shape=(frames, height, width))

    def _check_picture(self, medium: Media, record: Record) -> None:
        name = media.label(medium.source)
        if self.sounds:
            raise PolymodalError(
                f"{name} is a picture, it has no sound.", "Remove the row, or set data.clip.sound to false."
            )
        if self.grid.least > 1:
            raise PolymodalError(
                f"{name} is a picture, this model learns from clips of {self.grid.least} frames and more.",
                "Remove the row, or name clips.",
            )
        if "cut" in record.extra:
            raise PolymodalError(f"{name} is a picture, the row's `cut` is of frames.", "Leave it out.")

    def _length(self, medium: Media, header: media.VideoHeader, record: Record) -> int:
        """Frames that are taken of a clip: the largest of the lengths that it has."""
        name, shortest = media.label(medium.source), self.lengths[0]
        if self.grid.still:
            raise PolymodalError(
                f"{name} is a video, this model makes pictures.", "Remove the row, or name pictures."
            )
        have = len(self._times(header, record))
        if self.sounds:
            self._check_sound(name, header)
        for role, shown in self._given(record).items():
            if shown[0].kind == "video":
                less = len(self._times(self._header(shown[0])))
                if less < min(have, shortest):
                    raise PolymodalError(
                        f"the {role} {media.label(shown[0].source)} has {less} frames, fewer than the "
                        f"shortest length {shortest}.",
                        "A clip and what it is made from have the same length: correct or remove the row.",
                    )
                have = min(have, less)
        if have < shortest:
            rate = f" at {self.clip.fps:g} a second" if self.clip.fps else ""
            raise PolymodalError(
                f"the video {name} has {have} frames{rate}, fewer than the shortest length {shortest}.",
                "Add a shorter length to data.clip.frames, raise data.clip.fps, or remove the row.",
            )
        return max(length for length in self.lengths if length <= have)

    def _check_sound(self, name: str, header: media.VideoHeader) -> None:
        assert self.clip.fps is not None
        if not header.sound:
            raise PolymodalError(
                f"the video {name} has no sound.",
                "Remove the row, or set data.clip.sound to false: all clips are then learned without sound.",
            )
        if header.fps < self.clip.fps * 0.999:
            raise PolymodalError(
                f"the video {name} has {header.fps:g} frames a second, fewer than data.clip.fps = "
                f"{self.clip.fps:g}.",
                "Clips that are learned with their sound have one rate: lower data.clip.fps, or remove the "
                "row.",
            )

    def _header(self, medium: Media) -> media.VideoHeader:
        return media.video_header(medium.source, self.rate)

    def _given(self, record: Record) -> dict[str, tuple[Media, ...]]:
        return {r: m for r, m in record.extra.get("given", {}).items() if r in self.roles}

    def _references(self, record: Record) -> int:
        """Pictures that stand as latent frames of their own before the clip's, where the family has them
        so."""
        return len(self._given(record).get("references", ())) if self.grid.references else 0

    def _times(self, header: media.VideoHeader, record: Record | None = None) -> list[int]:
        """Numbers of all frames that are taken at the asked rate; a slower video gives every frame. record:
        its `cut`."""
        first, stop = (0, header.frames) if record is None else record.extra.get("cut", (0, header.frames))
        if not 0 <= first < stop <= header.frames:
            raise PolymodalError(
                f"the row's `cut` [{first}, {stop}] does not lie in the video's {header.frames} frames.",
                "Write [first frame, frame after the last].",
            )
        step = max(1.0, header.fps / self.clip.fps) if self.clip.fps and not header.listed else 1.0
        return [first + round(i * step) for i in range(int((stop - first - 1) / step) + 1)]

    # -- decoding ------------------------------------------------------------

    def frames(self, record: Record, measure: SampleLengths) -> np.ndarray:
        """The medium in its bucket's size: uint8 [F, H, W, 3]. Raises PolymodalError with the row's file and
        line."""
        count = measure.shape[0] - self.grid.time * self._references(record)
        try:
            return self._decoded(medium_of(record), record, count, *measure.shape[1:])
        except PolymodalError as error:
            raise error.at(record.where) from None

    def given(self, record: Record, measure: SampleLengths) -> dict[str, np.ndarray]:
        """What comes with the medium, by role, uint8: source and mask [F, H, W, 3] at the medium's own times
        (a picture stands for all of them), references [N, H, W, 3], whole, on white; float32: sound [2,
        samples], and the rate in frames a second. Raises PolymodalError with the row's file and line."""
        try:
            return self._conditions(record, *measure.shape)
        except PolymodalError as error:
            raise error.at(record.where) from None

    def _conditions(self, record: Record, count: int, height: int, width: int) -> dict[str, np.ndarray]:
        count -= self.grid.time * self._references(record)
        out = {}
        for role, shown in self._given(record).items():
            if role == "references":
                out[role] = np.stack([self._whole(m, height, width) for m in shown])
                continue
            frames = self._decoded(shown[0], None, count, height, width)
            out[role] = np.repeat(frames, count, axis=0) if len(frames) < count else frames
        if "rate" in self.roles:
            medium = medium_of(record)
            rate = self._rate(medium)
            out["rate"] = np.array(rate, np.float32)
            if self.sounds:
                header = self._header(medium)
                begin = self._times(header, record)[0] / header.fps  # of the row's `cut`
                samples = round(count / rate * self.grid.sound)
                out["sound"] = audio.sound(_source(medium), self.grid.sound, samples, begin)
        return out

    def _rate(self, medium: Media) -> float:
        """Frames a second that a clip is taken at."""
        if medium.kind == "image":
            return self.rate
        header = self._header(medium)
        return header.fps if header.listed or not self.clip.fps else min(header.fps, self.clip.fps)

    def _whole(self, medium: Media, height: int, width: int) -> np.ndarray:
        """A picture scaled to lie within the size, in the middle of white."""
        picture = media.image(_source(medium))
        scale = min(height / picture.height, width / picture.width)
        size = max(1, int(picture.height * scale)), max(1, int(picture.width * scale))
        if (picture.height, picture.width) != size:
            picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        out = np.full((height, width, 3), 255, np.uint8)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        out[top : top + size[0], left : left + size[1]] = np.asarray(picture)
        return out

    def _decoded(self, medium: Media, own: Record | None, count: int, height: int, width: int) -> np.ndarray:
        """Frames of a medium; own: the record whose `cut` and `crop` are of this medium."""
        if medium.kind == "image":
            picture = media.image(_source(medium))
            if own is not None and "crop" in own.extra:
                top, left, tall, wide = _region(own, picture.height, picture.width)
                picture = picture.crop((left, top, left + wide, top + tall))
            return self._fit(picture, height, width)[None]
        header = self._header(medium)
        top, left, tall, wide = _region(own, header.height, header.width)
        cover = self._cover(tall, wide, height, width)
        y, x = cover[0] / tall, cover[1] / wide  # the whole frame is scaled while it is decoded
        size = round(header.height * y), round(header.width * x)
        frames = media.video(medium.source, header, self._times(header, own)[:count], size)
        if frames.shape[1:3] != size:  # frames given as pictures
            frames = np.stack(
                [np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC)) for f in frames]
            )
        top, left = min(round(top * y), size[0] - cover[0]), min(round(left * x), size[1] - cover[1])
        return _centre(frames[:, top : top + cover[0], left : left + cover[1]], height, width)

    def _cover(self, height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
        """The size a medium is scaled to before its centre is cut out."""
        if self.clip.crop == "stretch":
            return to_height, to_width
        scale = max(to_height / height, to_width / width)
        return max(to_height, round(height * scale)), max(to_width, round(width * scale))

    def _fit(self, picture: Image.Image, height: int, width: int) -> np.ndarray:
        size = self._cover(picture.height, picture.width, height, width)
        if (picture.height, picture.width) != size:
            picture = picture.resize(size[::-1], Image.Resampling.BICUBIC)
        return _centre(np.asarray(picture)[None], height, width)[0]


def medium_of(record: Record) -> Media:
    """The one picture or clip that a caption's record asks for. Raises PolymodalError."""
    if "captions" not in record.extra:
        raise PolymodalError(
            "the row is no picture or clip with a caption, which a generating model learns from.",
            'Write rows as {"path": "clip.mp4", "cap": "what it shows"}, or set format: caption.',
        )
    medium = record.media[-1]
    if medium.kind == "audio":
        raise PolymodalError(
            "the row's medium is audio, this model makes pictures and clips.", "Remove the row."
        )
    return medium


def _region(record: Record | None, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what a row takes of its medium's frames. Raises PolymodalError."""
    crop = None if record is None else record.extra.get("crop")
    if crop is None:
        return 0, 0, height, width
    left, right, top, bottom = crop
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise PolymodalError(
            f"the row's `crop` {list(crop)} does not lie in its {height} x {width} pixels.",
            "Write [left, right, top, bottom] in pixels of the file.",
        )
    return top, left, bottom - top, right - left


def _source(medium: Media) -> str | bytes:
    assert not isinstance(medium.source, tuple)
    return medium.source


def _centre(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def _sizes(pixels: int, side: int) -> list[tuple[int, int]]:
    """Sizes of at most `pixels`, sides multiples of `side`, one for each height, none narrower than 1 : 4."""
    out = []
    for height in range(side, int(math.sqrt(pixels * NARROWEST)) + 1, side):
        width = pixels // height // side * side
        if width and max(height / width, width / height) <= NARROWEST:
            out.append((height, width))
    if not out:
        raise PolymodalError(
            f"data.clip.pixels = {pixels} is less than the smallest frame of this model, {side} x {side}.",
            f"Set data.clip.pixels to at least {side * side}.",
        )
    return out
