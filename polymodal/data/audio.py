"""Audio files and the sound of videos: their length from the header, and their samples at any rate.

Every call opens, reads and closes. PyAV (FFmpeg) decodes; here are the choice of the header to trust, the
sample grid of excerpts, and the detection of damaged files. Errors name the file; the caller adds the record.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.data.media import Source, VideoHeader, decoding, label, open_container, opened, video_stream

_PREROLL = 1.0  # seconds decoded before an excerpt, until decoder and resampler have settled
MAX_SECONDS = 7 * 24 * 3600  # of one file
_MAX_SAMPLES = 1 << 28  # of one decoded excerpt: 1 GiB of float32, 4.6 hours at 16 kHz


@dataclass(frozen=True)
class AudioHeader:
    """Length in seconds, sampling rate in Hz and channels of the first audio track of a file."""

    seconds: float
    rate: int
    channels: int

    def samples(self, rate: int, start: float = 0.0, stop: float | None = None) -> int:
        """Samples that `decode_audio` gives of start..stop seconds at a sampling rate."""
        return max(1, round(self._end(stop) * rate) - round(start * rate))

    def excerpt(self, source: Source, start: float = 0.0, stop: float | None = None) -> float:
        """Seconds of start..stop (default: to the end). Raises PolymodalError where the track lacks some."""
        if not 0 <= start < self._end(stop) or (stop is not None and stop > self.seconds + self.slack):
            raise PolymodalError(
                f"{start:g} to {self.seconds if stop is None else stop:g} s does not lie in "
                f"the audio {label(source)}, which has {self.seconds:.2f} s.",
                "Correct the row's start and end; they are in seconds.",
            )
        return self._end(stop) - start

    @property
    def slack(self) -> float:
        """Seconds that a header and what is decoded may differ by."""
        return 0.1 + 0.01 * self.seconds

    def _end(self, stop: float | None) -> float:
        return self.seconds if stop is None else min(stop, self.seconds)


def audio_header(source: Source) -> AudioHeader:
    """Length of an audio file, or of a video's sound, without decoding. Raises PolymodalError.

    The container's own word counts where it is one: sample tables (mp4), byte counts (wav), sample counts
    (flac), the last page (ogg, less Opus' pre-skip), the LAME tag (mp3). Elsewhere the header only
    estimates from the bit rate, leaves the length out, or rounds it: there packets are counted, which reads
    the file but decodes nothing.
    """
    with decoding(source, "audio"):
        with open_container(source) as container:
            track = _track(container, source)
            formats = set(container.format.name.split(","))
            seconds = float(track.duration * track.time_base) if track.duration else 0.0
            if "ogg" in formats and track.codec_context.name == "opus":
                seconds -= int.from_bytes((track.codec_context.extradata or b"")[10:12], "little") / 48000
            told = formats & {"wav", "w64", "flac", "mov", "ogg", "aiff", "caf"} or (
                "mp3" in formats
                and track.start_time  # a LAME tag says how much the encoder added before and after
            )
            if not told or seconds <= 0:
                ends = ((p.pts + (p.duration or 0)) for p in container.demux(track) if p.pts is not None)
                seconds = float((max(ends, default=0) - (track.start_time or 0)) * track.time_base)
            if "wav" in formats:
                _check_riff(source)
            if seconds <= 0:
                raise PolymodalError(
                    f"the audio {label(source)} holds no sound.", "Fetch it again, or remove the row."
                )
            if seconds > MAX_SECONDS:
                raise PolymodalError(
                    f"the audio {label(source)} claims {seconds / 3600:,.0f} hours.",
                    f"At most {MAX_SECONDS // 3600} hours are read: fetch it again, or cut it.",
                )
            return AudioHeader(seconds, track.rate, track.channels)


def decode_audio(
    source: Source, header: AudioHeader, rate: int, start: float = 0.0, stop: float | None = None
) -> np.ndarray:
    """Samples of start..stop seconds (default: to the end) at `rate` Hz, the mean of the channels, float32
    [samples].

    There are exactly `header.samples(rate, start, stop)` of them: what a header and a decoder may differ in
    (encoders pad the last frame) is cut off or filled with silence. Values lie in [-1, 1] but for overshoot
    of resampling. Raises PolymodalError when the file is damaged, holds a tenth of a second and one percent
    less or more than its header says, or when start..stop does not lie in it.
    """
    seconds, slack = header.excerpt(source, start, stop), header.slack
    count = header.samples(rate, start, stop)
    if count > _MAX_SAMPLES:
        raise PolymodalError(
            f"the audio {label(source)} has {seconds / 3600:.1f} hours, more than can be decoded at once.",
            "Cut it into shorter files, or into rows with start and end in seconds.",
        )
    parts: list[np.ndarray] = []
    have = 0
    most = count if stop is not None else count + int(slack * rate)
    for piece in _resampled(source, rate, start):
        parts.append(piece.mean(axis=0))
        have += parts[-1].shape[0]
        if have > most or (have == most and stop is not None):
            break
    if have < count - slack * rate or (stop is None and have > most):
        found = (
            f"ends at {start + have / rate:.1f} s"
            if have < count
            else f"goes on after {start + have / rate:.1f} s"
        )
        raise PolymodalError(
            f"the audio {label(source)} {found}, its header says {header.seconds:.1f} s.",
            "Fetch it again, it may be cut short; or write it anew, e.g. `ffmpeg -i FILE new.flac`.",
        )
    out = np.zeros(count, np.float32)
    joined = np.concatenate(parts)[:count] if parts else out[:0]
    out[: len(joined)] = joined
    return out


def sound_samples(source: Source | tuple[str, ...], header: VideoHeader, rate: int) -> int:
    """Samples of a video's sound at `rate` a second, as long as its frames. Raises PolymodalError where it
    has none."""
    if not header.sound:
        raise PolymodalError(
            f"the video {label(source)} has no sound.",
            "Remove the row, or set data.video.sound to false: all videos are then learned without sound.",
        )
    return max(1, round(header.duration * rate))


def sound(source: Source, rate: int, count: int, after: float = 0.0) -> np.ndarray:
    """`count` samples of a video's sound from `after` seconds of its first frame on, float32 [2, count] in
    -1..1 at `rate` a second.

    One channel stands for both; silence fills what is missing before and after. Raises PolymodalError
    without a track.
    """
    out = np.zeros((2, count), np.float32)
    with decoding(source, "video"):
        with open_container(source) as container:
            if not container.streams.audio:
                raise PolymodalError(f"the video {label(source)} has no sound.", "Remove the row.")
            track, picture = container.streams.audio[0], video_stream(container, source)
            begin = float((picture.start_time or 0) * picture.time_base) + after
            late = float((track.start_time or 0) * track.time_base) - begin
    have = max(0, round(late * rate))  # silence before the sound begins
    mixed = "stereo" if track.channels > 2 else None
    for piece in _resampled(source, rate, max(0.0, -late), mixed) if have < count else ():
        stop = min(have + piece.shape[1], count)
        out[:, have:stop] = piece[:, : stop - have]
        have = stop
        if have == count:
            break
    return out


def _track(container: Any, source: Source) -> Any:
    track = next(iter(container.streams.audio), None)
    if track is None or not getattr(track, "rate", None):
        raise PolymodalError(
            f"the audio {label(source)} holds no sound"
            + (" that can be decoded." if track is not None else "."),
            "Name a wav, flac, mp3, ogg, opus, m4a or aac file, or a video with sound.",
        )
    return track


def _resampled(
    source: Source, rate: int, start: float, layout: str | None = None, jump: bool = True
) -> Iterator[np.ndarray]:
    """The first audio track from `start` seconds of its beginning on: pieces float32 [channels, n] at
    `rate` Hz.

    A jump to a later place keeps the samples' grid: the resampler begins at a sample of the file that falls
    on a sample of `rate`, so that an excerpt is the slice of the whole. It needs time stamps as fine as the
    samples (Matroska's are milliseconds); without these all is decoded from the beginning. Channels stay as
    they are unless a layout is asked for: FFmpeg's own mixing makes mono of two equal channels louder by 3
    dB, beyond 1.
    """
    import av

    with decoding(source, "audio"):
        with open_container(source) as container:
            track = _track(container, source)
            own, base, origin = track.rate, track.time_base, track.start_time or 0
            jump = jump and start > 2 * _PREROLL and 1 / base >= own
            if jump:
                container.seek(origin + int((start - _PREROLL) / base), stream=track)
            frames = container.decode(track)
            at = 0  # index of the resampler's first sample, at `rate`
            if jump:
                first = next(frames, None)
                place = round((first.pts - origin) * base * own) if first and first.pts is not None else None
                step = own // math.gcd(own, rate)
                skip = -(place or 0) % step
                if first is None or place is None or place + skip > start * own:
                    yield from _resampled(source, rate, start, layout, jump=False)
                    return
                at = (place + skip) * rate // own
                frames = itertools.chain([first], frames)
            else:
                skip = 0
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            drop = round(start * rate) - at
            for frame in itertools.chain(frames, [None]):
                if skip and frame is not None:
                    if frame.samples <= skip:
                        skip -= frame.samples
                        continue
                    frame, skip = _without_first(frame, skip), 0
                for piece in resampler.resample(frame):
                    samples = piece.to_ndarray()
                    cut = min(drop, samples.shape[1])
                    drop -= cut
                    if cut < samples.shape[1]:
                        yield samples[:, cut:]


def _without_first(frame: Any, count: int) -> Any:
    """An audio frame without its first `count` samples."""
    import av

    values = frame.to_ndarray()
    channels = len(frame.layout.channels) if frame.format.is_packed else 1
    rest = np.ascontiguousarray(values[:, count * channels :])
    out = av.AudioFrame.from_ndarray(rest, format=frame.format.name, layout=frame.layout)
    out.sample_rate = frame.sample_rate
    return out


def _check_riff(source: Source) -> None:
    """Raises PolymodalError when a wav file is shorter than its header says: decoders take what is there in
    silence.

    Sizes of 0 and of the largest numbers are those of programs that wrote to a pipe and could not know.
    """
    with opened(source) as file:
        end = file.seek(0, 2)
        at = file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            at += 8
            if head[:4] == b"data":
                if 0 < size < 0xFFFFFF00 and size > end - at:
                    raise PolymodalError(
                        f"the audio {label(source)} is cut short: {end - at} of {size} bytes of sound are "
                        "there.",
                        "Fetch it again.",
                    )
                return
            at = file.seek(at + size + size % 2)
