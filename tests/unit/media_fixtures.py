"""Real pictures and videos, a model's media processor without a model, and files of rows: for the tests of the data room."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

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
