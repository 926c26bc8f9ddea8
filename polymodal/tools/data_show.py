"""Samples as a page: pictures, and every token coloured by the weight of its label (`polymodal data
show`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Box, Media, Record, Sample
from polymodal.data import audio
from polymodal.data import media as files
from polymodal.data.boxes import BoxWriter
from polymodal.data.chat import ChatProcessor
from polymodal.data.media_pairs import PairClips
from polymodal.data.source import Corpus

MAGENTA = (255, 0, 255)  # of boxes
PLAYED = 30.0  # seconds of audio that the page can hold: a megabyte
Token = tuple[str, str, float | None]
"""Text, what a pointer over it shows, and the weight of its label; None for the tokens of a medium."""


def show(
    corpus: Corpus, chat: ChatProcessor, path: str, n: int = 8, seed: int = 0, title: str = "Training samples"
) -> list[int]:
    """Write a page with n samples, spread over the datasets and drawn by the seed. Returns their numbers.

    A sample that cannot be made is shown with its reason. Raises PolymodalError when the page cannot be
    written.
    """

    def shown(i: int) -> dict[str, Any]:
        record = corpus[i]
        return _shown(i, record, chat.sample(record, i), chat)

    return _page(corpus, shown, path, n, seed, title)


def show_pairs(corpus: Corpus, clips: PairClips, path: str, n: int = 8, seed: int = 0) -> list[int]:
    """The same of pairs of pictures or clips of a caption, in the size that they are learned in."""

    def shown(i: int) -> dict[str, Any]:
        record = corpus[i]
        measure = clips.bucket(record)
        facts = [f"record {i}", " x ".join(map(str, measure.shape)), f"{measure.tokens} tokens each"]
        scores = [f", score {score:g}" for score in record.scores] or ["", ""]
        facts += ["a tie, left out"] if clips.tied(record) else []
        media = []
        for name, score, side in zip(("chosen", "rejected"), scores, record.conversations, strict=True):
            frames = clips.frames(side, measure)
            drawn = [
                pages.thumbnail(Image.fromarray(f), 256) for f in frames[:: max(1, len(frames) // 4)][:4]
            ]
            media.append((f"{name}{score}: {files.label(side.media[-1].source)}", drawn, ""))
        texts = [(caption + "\n", "", 0.0) for caption in record.extra["captions"]]
        return {
            "where": record.where,
            "error": "",
            "facts": ", ".join(facts),
            "media": media,
            "tokens": texts,
        }

    return _page(corpus, shown, path, n, seed, "Training samples")


def _page(
    corpus: Corpus, shown: Callable[[int], dict[str, Any]], path: str, n: int, seed: int, title: str
) -> list[int]:
    chosen = choose(corpus, n, seed)
    samples: list[dict[str, Any]] = []
    for i in chosen:
        try:
            samples.append(shown(i))
        except PolymodalError as error:
            samples.append({"where": corpus.where(i), "error": str(error)})
    datasets = "; ".join(f"{p.name}: {len(p)}" for p in corpus.parts)
    text = pages.render(
        "samples.html", title=title, lead="", samples=samples, total=len(corpus), datasets=datasets
    )
    pages.write(Path(path), text, "Choose another place with -o.")
    return chosen


def choose(corpus: Corpus, n: int, seed: int) -> list[int]:
    """Numbers of n records: from each dataset its share, at least one while there is room."""
    draw = random.Random(seed)
    shares = {k: max(1, round(n * len(p) / len(corpus))) for k, p in enumerate(corpus.parts)}
    lists = [draw.sample(range(p.start, p.stop), min(shares[k], len(p))) for k, p in enumerate(corpus.parts)]
    turns = [i for row in range(max(map(len, lists))) for numbers in lists for i in numbers[row : row + 1]]
    return sorted(turns[:n])


def _shown(i: int, record: Record, sample: Sample, chat: ChatProcessor) -> dict[str, Any]:
    """What the template shows of a sample."""
    measure = sample.measure
    facts = [f"record {i}", f"{measure.tokens} tokens", f"{measure.trained} learned"]
    facts += [
        f"{stream} {sum(lengths)} in {len(record.media)} media" for stream, lengths in measure.media.items()
    ]
    if sample.sequences:
        facts.append(f"sequences of {' + '.join(map(str, sample.sequences))} tokens")
    facts += [f"answer {a + 1} preferred to {b + 1}" for a, b, _ in sample.pairs if a != b]
    if measure.tokens > chat.max_length:
        facts.append(f"longer than max_length {chat.max_length}")
    return {
        "where": record.where,
        "error": "",
        "facts": ", ".join(facts),
        "media": [_figure(medium, record, chat) for medium in dict.fromkeys(_media(record))],
        "tokens": list(_tokens(record, sample, chat)),
    }


def _media(record: Record) -> list[Media]:
    """In reading order, of all conversations that are compared."""
    return [medium for each in record.conversations for medium in each.media]


def _figure(medium: Media, record: Record, chat: ChatProcessor) -> tuple[str, list[pages.Picture], str]:
    """Caption, pictures (an image, four frames of a video, the waveform of audio), and what can be played:
    audio of at most PLAYED seconds as the model hears it, else ""."""
    source: Any = medium.source
    label = files.label(medium.source)
    if medium.kind == "audio":
        header = audio.audio_header(source)
        start, stop = record.extra.get("start", 0.0), record.extra.get("end", header.seconds)
        part = "" if (start, stop) == (0.0, header.seconds) else f", {start:g} to {stop:g} s of it"
        rate = chat.media.sample_rate
        heard = audio.decode_audio(source, header, rate, start, record.extra.get("end"))
        player = pages.recording(heard, rate) if len(heard) <= PLAYED * rate else ""
        return f"{label}, {header.seconds:.1f} s, {header.rate} Hz{part}", [pages.waveform(heard)], player
    if medium.kind == "video":
        header = files.video_header(medium.source, chat.video.fps)
        clip = files.clip(header, chat.video, chat.media.frame_multiple)
        step = max(1, len(clip.indices) // 4)
        frames = files.video(medium.source, header, clip.indices[::step][:4])
        shape = f"{header.width} x {header.height}, {header.duration:.1f} s"
        caption = f"{label}, {len(clip.indices)} of {header.frames} frames, {shape}"
        return caption, [pages.thumbnail(Image.fromarray(frame), 160) for frame in frames], ""
    picture = files.image(medium.source)  # type: ignore[arg-type]
    caption = f"{label}, {picture.width} x {picture.height}"
    own = [box for box in record.boxes if box.picture == medium]
    if not own:
        return caption, [pages.thumbnail(picture, 256)], ""
    drawn, shown = _drawn(picture, own, chat.boxes)
    caption += f", for the model {drawn.width} x {drawn.height}: {shown}"
    return caption, [pages.thumbnail(drawn, 256)], ""


def _drawn(picture: Image.Image, own: list[Box], writer: BoxWriter) -> tuple[Image.Image, str]:
    """The picture in the size that the model sees, with the boxes where the model's numbers put them, and
    these."""
    height, width = writer.resized(picture.height, picture.width)
    drawn = picture.resize((width, height))
    pen = ImageDraw.Draw(drawn)
    texts = []
    for box in dict.fromkeys(own):
        values = writer.values(box)
        texts.append(str(list(values)))
        at = writer.pixels(values, picture.height, picture.width) or ()
        scales = (width / picture.width, height / picture.height) * 2
        corners = [round(v * scale) for v, scale in zip((*at, *at)[:4], scales, strict=False)]
        pen.rectangle(corners, outline=MAGENTA, width=max(1, min(width, height) // 128))
    return drawn, ", ".join(texts)


def _tokens(record: Record, sample: Sample, chat: ChatProcessor) -> Iterator[Token]:
    ids = sample.tensors["input_ids"].tolist()
    labels, weights = sample.tensors["labels"].tolist(), sample.tensors["weights"].tolist()
    learned = [0.0, *(w if label != IGNORE else 0.0 for w, label in zip(weights, labels, strict=True))]
    waiting = [(m.kind, list(chat.span(m, record).ids)) for m in _media(record)]
    codes = sample.tensors.get("codes")
    at = number = 0
    while at < len(ids):
        kind, span = waiting[number] if number < len(waiting) else ("", [])
        if span and ids[at : at + len(span)] == span:
            number += 1
            yield f"{kind} {number}: {len(span)} tokens", f"tokens {at} to {at + len(span) - 1}", None
            at += len(span)
            continue
        end = at + 1
        decode = chat.media.tokenizer.decode
        text = decode(ids[at:end])
        while "\ufffd" in text and end < min(len(ids), at + 4):  # one character in several tokens
            end += 1
            text = decode(ids[at:end])
        title = f"{', '.join(map(str, ids[at:end]))}: weight {learned[at]:g}"
        if codes is not None and int(codes[at, 0]) != -1:  # the other channel at this place
            end = at + 1
            text = f"{decode(ids[at:end])}\u00b7{int(codes[at, 0])}"
            title = f"codes {', '.join(map(str, codes[at].tolist()))}; {title}"
        yield text.replace("\n", "\u21b5\n"), title, learned[at]
        at = end
