"""Samples as a page: pictures, and every token coloured by the weight of its label (`polymodal data show`).

Part of the data room: sees a corpus and a chat processor. The page holds everything it needs; nothing of the data
reaches it without being escaped.
"""

from __future__ import annotations

import base64
import html
import io
import os
import random
from collections.abc import Sequence
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Media, Record, Sample
from polymodal.data import audio
from polymodal.data import media as files
from polymodal.data.chat import ChatProcessor
from polymodal.data.source import Corpus
from polymodal.tools.data_convert import whole_file

STYLE = """
:root { color-scheme: light dark; --card: #fff; --page: #f4f5f7; --text: #1c2024; --faint: #6b7280; --line: #e2e4e9; --on: 22, 163, 74; }
@media (prefers-color-scheme: dark) { :root { --card: #1b1e24; --page: #111317; --text: #e6e8ec; --faint: #9aa1ad; --line: #2d323b; --on: 74, 222, 128; } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--text); font: 15px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); font-size: .87rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.media { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0; }
figure { margin: 0; } figure div { display: flex; flex-wrap: wrap; gap: 3px; } figure img { display: block; max-width: 100%; border-radius: 6px; border: 1px solid var(--line); }
figcaption { color: var(--faint); font-size: .78rem; max-width: 40rem; overflow-wrap: anywhere; }
.tokens { font: 13.5px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .8rem 0 0; }
.tokens span { border-radius: 3px; padding: 1px 0; box-shadow: inset 0 0 0 .5px var(--line); }
.tokens .medium { background: rgba(59, 130, 246, .22); padding: 1px 5px; }
.key { padding: 1px 6px; border-radius: 3px; } .broken { color: #dc2626; }
"""


def show(
    corpus: Corpus, chat: ChatProcessor, path: str, n: int = 8, seed: int = 0, title: str = "Training samples"
) -> list[int]:
    """Write a page with n samples, spread over the datasets and drawn by the seed. Returns their numbers.

    A sample that cannot be made is shown with its reason. Raises PolymodalError when the page cannot be written.
    """
    chosen = choose(corpus, n, seed)
    cards = []
    for i in chosen:
        try:
            record = corpus[i]
            cards.append(_card(i, record, chat.sample(record, i), chat))
        except PolymodalError as error:
            cards.append(
                f'<article><h2>{html.escape(corpus.where(i))}</h2><p class="broken">{html.escape(str(error))}</p></article>'
            )
    parts = "; ".join(f"{p.name}: {len(p)}" for p in corpus.parts)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="faint">{len(chosen)} of {len(corpus)} records ({html.escape(parts)}). Tokens on
<span class="key" style="background:rgba(var(--on),.30)">green</span> are learned, the stronger the greater their weight;
<span class="key" style="background:rgba(59,130,246,.22)">blue</span> stands for a medium's tokens; the rest is read only.</p>
{"".join(cards)}
</body></html>
"""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with whole_file(path) as file:
            file.write(page)
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror or error}.", "Choose another place with -o."
        ) from None
    return chosen


def choose(corpus: Corpus, n: int, seed: int) -> list[int]:
    """Numbers of n records: from each dataset its share, at least one while there is room."""
    draw = random.Random(seed)
    shares = {k: max(1, round(n * len(p) / len(corpus))) for k, p in enumerate(corpus.parts)}
    lists = [draw.sample(range(p.start, p.stop), min(shares[k], len(p))) for k, p in enumerate(corpus.parts)]
    turns = [i for row in range(max(map(len, lists))) for numbers in lists for i in numbers[row : row + 1]]
    return sorted(turns[:n])


def _card(i: int, record: Record, sample: Sample, chat: ChatProcessor) -> str:
    measure = sample.measure
    facts = [f"record {i}", f"{measure.tokens} tokens", f"{measure.trained} learned"]
    facts += [
        f"{stream} {sum(lengths)} in {len(record.media)} media" for stream, lengths in measure.media.items()
    ]
    if measure.tokens > chat.max_length:
        facts.append(f"longer than max_length {chat.max_length}")
    pictures = "".join(_figure(n, m, chat) for n, m in enumerate(record.media, 1))
    return (
        f'<article><h2>{html.escape(record.where)}</h2><div class="faint">{html.escape(", ".join(facts))}</div>'
        f'<div class="media">{pictures}</div><div class="tokens">{_tokens(record, sample, chat)}</div></article>'
    )


def _figure(number: int, medium: Media, chat: ChatProcessor) -> str:
    if medium.kind == "audio":
        heard = audio.audio_header(medium.source)  # type: ignore[arg-type]
        note = f"{heard.seconds:.1f} s, {heard.rate} Hz"
        return f"<figure><figcaption>{number}. {html.escape(files.label(medium.source))}, {note}</figcaption></figure>"
    if medium.kind == "video":
        header = files.video_header(medium.source, chat.video.fps)
        clip = files.clip(header, chat.video, chat.media.frame_multiple)
        step = max(1, len(clip.indices) // 4)
        from PIL import Image

        frames = [Image.fromarray(f) for f in files.video(medium.source, header, clip.indices[::step][:4])]
        note = f"{len(clip.indices)} of {header.frames} frames, {header.width} x {header.height}, {header.duration:.1f} s"
    else:
        frames = [files.image(medium.source)]  # type: ignore[arg-type]
        note = f"{frames[0].width} x {frames[0].height}"
    images = "".join(
        f'<img alt="" src="data:image/jpeg;base64,{_thumbnail(f, 256 if len(frames) == 1 else 160)}">'
        for f in frames
    )
    return f"<figure><div>{images}</div><figcaption>{number}. {html.escape(files.label(medium.source))}, {note}</figcaption></figure>"


def _thumbnail(picture: Any, size: int) -> str:
    small = picture.copy()
    small.thumbnail((size, size))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()


def _tokens(record: Record, sample: Sample, chat: ChatProcessor) -> str:
    ids = sample.tensors["input_ids"].tolist()
    labels, weights = sample.tensors["labels"].tolist(), sample.tensors["weights"].tolist()
    learned = [0.0, *(w if label != IGNORE else 0.0 for w, label in zip(weights, labels, strict=True))]
    waiting = [(m.kind, list(chat.span(m).ids)) for m in record.media]
    tokenizer = chat.media.tokenizer
    out = []
    at = number = 0
    while at < len(ids):
        kind, span = waiting[number] if number < len(waiting) else ("", [])
        if span and ids[at : at + len(span)] == span:
            number += 1
            title = f"tokens {at} to {at + len(span) - 1}"
            out.append(f'<span class="medium" title="{title}">{kind} {number}: {len(span)} tokens</span>')
            at += len(span)
            continue
        end = at + 1
        text = tokenizer.decode(ids[at:end])
        while "\ufffd" in text and end < min(len(ids), at + 4):  # one character in several tokens
            end += 1
            text = tokenizer.decode(ids[at:end])
        out.append(_token(text, ids[at:end], learned[at]))
        at = end
    return "".join(out)


def _token(text: str, ids: Sequence[int], weight: float) -> str:
    style = f' style="background:rgba(var(--on),{min(0.12 + 0.18 * weight, 0.7):.2f})"' if weight > 0 else ""
    visible = html.escape(text).replace("\n", "&#8629;\n")
    return f'<span{style} title="{", ".join(map(str, ids))}: weight {weight:g}">{visible}</span>'
