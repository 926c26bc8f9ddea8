"""Real pictures and videos, a model's media processor without a model, files of rows, and what of a record is learned.

For the tests of polymodal/data; the fixtures `qwen` and `folder` are in conftest.py.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Media, Message, Record
from polymodal.recipe import Data
from tests.models import tiny


def write_mp4(
    path: str | Path,
    frames: int = 30,
    fps: int = 10,
    width: int = 64,
    height: int = 48,
    rotation: int = 0,
    key_every: int = 12,
    values: Any = None,
) -> Path:
    """A real H.264 file whose frame i is grey of value 8 i (or values[i]), with a white upper left quarter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": str(key_every), "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            pixels = np.full((height, width, 3), (i * 8 if values is None else values[i]) % 256, np.uint8)
            pixels[: height // 2, : width // 2] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def sweep(seconds: float, rate: int, low: float = 200.0, high: float = 2000.0) -> np.ndarray:
    """A sine that rises from low to high Hz: every place of it sounds different. float32 [samples], half of full scale."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds)))).astype(np.float32)


AUDIO = {
    "wav": ("pcm_s16le", 16000),
    "flac": ("flac", 44100),
    "mp3": ("libmp3lame", 44100),
    "opus": ("libopus", 48000),
    "ogg": ("vorbis", 44100),
    "m4a": ("aac", 44100),
    "aac": ("aac", 22050),
    "webm": ("libopus", 48000),
    "mkv": ("aac", 48000),
}


def write_audio(
    path: str | Path,
    seconds: float = 2.0,
    channels: tuple[float, ...] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A sweep as a real file, by the ending; channels: the sweep's factor in each."""
    import av

    codec, rate = AUDIO[Path(path).suffix[1:]]
    layout = {1: "mono", 2: "stereo"}[len(channels or (1, 1) if codec == "vorbis" else channels or (1,))]
    values = np.outer(channels or (1,) * (1 + (layout == "stereo")), sweep(seconds, rate)).astype(np.float32)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        frame = av.AudioFrame.from_ndarray(values, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def picture_bytes(
    format: str = "PNG", width: int = 24, height: int = 16, seed: int = 0, **options: Any
) -> bytes:
    data = io.BytesIO()
    tiny.picture(width, height, seed).save(data, format, **options)
    return data.getvalue()


def qwen_media(name: str, directory: str | Path, data: Data | None = None) -> Any:
    """The MediaProcessor that the card's family makes, from real processor files and no weights."""
    from polymodal.models import catalog
    from polymodal.recipe import Model

    directory = Path(directory)
    if not (directory / "config.json").exists():
        config = tiny.config(name)
        kind = {
            "qwen2-vl": "Qwen2VL",
            "qwen2.5-vl": "Qwen2_5_VL",
            "qwen3-vl": "Qwen3VL",
            "qwen3-vl-moe": "Qwen3VLMoe",
        }[name]
        config.architectures = [f"{kind}ForConditionalGeneration"]
        config.save_pretrained(directory)
        tiny.tokenizer().save_pretrained(directory)
        for processor in tiny.processors(name):
            processor.save_pretrained(directory)
    return catalog.family(Model(source=str(directory), init="random")).media_processor(data or Data())


def write_rows(path: str | Path, rows: list[dict]) -> Path:
    """Rows as json, jsonl, csv, tsv or parquet, by the ending."""
    path = Path(path)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows(r.values() for r in rows)
    return path


WHERE = "rows.jsonl, line 3"


def record(*turns, **options):
    """Turns as (role, text or parts[, weight])."""
    messages = []
    for role, content, *weight in turns:
        parts = (content,) if isinstance(content, str) else tuple(content)
        messages.append(Message(role, parts, *weight))
    return Record(tuple(messages), WHERE, **options)


def image(folder, n):
    return Media("image", str(folder / f"{n}.png"))


def short(chat, limit):
    """The same processor with another max_length."""
    chat = copy.copy(chat)
    chat.max_length = limit
    return chat


def learned(chat, row):
    """The text that is learned, turn by turn, and its weights."""
    tensors = chat.sample(row).tensors
    ids, labels, weights = (tensors[k] for k in ("input_ids", "labels", "weights"))
    keep = labels != IGNORE
    assert torch.equal(labels[:-1][keep[:-1]], ids[1:][keep[:-1]]) and not keep[-1]
    assert torch.equal(keep, weights > 0)
    runs, previous = [], -2
    for at in keep.nonzero()[:, 0].tolist():
        if at != previous + 1:
            runs.append([[], set()])
        runs[-1][0].append(labels[at].item())
        runs[-1][1].add(round(weights[at].item(), 4))
        previous = at
    return [(chat.media.tokenizer.decode(i), *sorted(w)) for i, w in runs]


TALK = [
    ("system", "sys"),
    ("user", "one?"),
    ("assistant", "first"),
    ("user", "two?"),
    ("assistant", "second"),
]


TRIMMING = "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' + m.content | trim + '<|object_ref_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"


def templated(qwen, tmp_path, template, kwargs=None, **keys):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return qwen(chat_template=str(path), template_kwargs=kwargs or {}, **keys)


def refused(chat, row, *words):
    """The same words from measure (as a reason) and from sample (with the place)."""
    reason = chat.measure([row])[0]
    assert isinstance(reason, str) and WHERE not in reason
    with pytest.raises(PolymodalError) as error:
        chat.sample(row)
    assert error.value.message.startswith(f"{WHERE}: ")
    for word in words:
        assert word in reason and word in str(error.value), reason
