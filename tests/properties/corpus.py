"""Small valid files of every format that is read, the public readers of each, and ways to damage them."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media
from polymodal.data import audio, index_file, media
from polymodal.data.source import open_corpus
from polymodal.models.storage import Files, read_json
from polymodal.recipe import Dataset, Video
from tests.models import tiny
from tests.unit.media_fixtures import write_audio, write_mp4

KEY = "0" * 32  # of the index
NUMBERS = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0" * 4, b"\x80" + b"\xff" * 11, b"\x01\0\0\0")
TEXTS = (
    b"9" * 400,
    b"NaN",
    b"1e999",
    b"[" * 500,
    b'{"a":' * 120,
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"\t",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\x1b[2J",
    b"null",
    b"-1",
    b"<image>",
    b"&a [*a]",
    b"",
)
Edit = tuple[int, float, int, int]
"""What is done (0 to 4), where (0 to 1), to how many bytes, and the number of what is written there."""


def damaged(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The data cut, overwritten, shortened, repeated, or with a bit turned, as the edits say."""
    for what, place, length, value in edits:
        at = int(place * len(data))
        if what == 0:
            data = data[:at]
        elif what == 1:
            new = NUMBERS[value % len(NUMBERS)]
            data = data[:at] + new + data[at + len(new) :]
        elif what == 2:
            data = data[:at] + TEXTS[value % len(TEXTS)] + data[at + length :]
        elif what == 3:
            data = data[: at + length] + data[at:]
        elif data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]
    return data


def _png() -> bytes:
    out = io.BytesIO()
    tiny.picture(24, 16, 0).save(out, "PNG")
    return out.getvalue()


def valid_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of small valid files; some are also written to `folder`, where the rows find them."""
    for ending, options in {
        "png": {},
        "jpg": {"quality": 80},
        "webp": {},
        "gif": {},
        "tiff": {"compression": "tiff_lzw"},
        "bmp": {},
        "avif": {},
        "ppm": {},
    }.items():
        tiny.picture(24, 16, 0).save(folder / f"p.{ending}", **options)
    write_mp4(folder / "v.mp4", frames=6, width=32, height=24)
    for ending in ("wav", "flac", "mp3", "ogg", "m4a", "aac", "webm"):
        write_audio(folder / f"a.{ending}", 0.4)
    turn = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A \u2028 card."}]
    rows = [
        {"images": ["p.png"], "messages": turn},
        {
            "image": base64.b64encode(_png()).decode(),
            "conversations": [{"from": "human", "value": "<image>?"}],
        },
        {"audio": "a.wav", "text": "words", "start": 0.1, "end": 0.3},
        {"path": "v.mp4", "cap": ["a", "b"], "cut": [0, 4], "crop": [0, 8, 0, 8]},
        {"instruction": "x", "input": "y", "output": "z", "history": [["a", "b"]]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}]}, turn[1]]},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files |= {"rows.jsonl": lines.encode(), "rows.json": json.dumps(rows, indent=1).encode()}
    table = [
        ("path", "cap", "crop"),
        ("p.png", '"a, ""card"""', ""),
        ("v.mp4", '"two\nlines"', '"[0,8,0,8]"'),
    ]
    files |= {"rows.csv": "".join(",".join(row) + "\r\n" for row in table).encode()}
    files |= {"rows.tsv": b"audio\ttext\na.wav\twords\n"}
    out = io.BytesIO()
    names = {"image": [{"bytes": _png(), "path": "x.png"}] * 3, "cap": ["one", "two", "two"]}
    pq.write_table(pa.table({**names, "n": [1, 2, None], "l": [["a"], [], None]}), out)
    files["rows.parquet"] = out.getvalue()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("a.png", _png()),
            ("a.json", json.dumps({"messages": turn}).encode()),
            ("b.txt", b"t"),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "x"}
            tar.addfile(member, io.BytesIO(data))
    files["rows.tar"] = out.getvalue()
    files["recipe.yaml"] = (
        b"model: {source: nowhere, config: &c {a: 1e-5}}\ntrain: {steps: 3}\noptim: {lr: 1.5e-4}\n"
        b"data:\n  max_length: 256\n  template_kwargs: *c\n  datasets:\n  - path: rows.jsonl\n    weight: 0.5\n"
    )
    save_file({"a.weight": torch.zeros(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    files["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    files["config.json"] = json.dumps({"model_type": "x", "hidden_size": 8, "rope": {"theta": 1e4}}).encode()
    place = folder / "lengths.arrow"
    index_file.write(place, KEY, {"tokens": torch.arange(4).numpy()}, [index_file.Problem(1, "x", "y")])
    files["lengths.arrow"] = place.read_bytes()
    return files


def _picture(path: Path) -> None:
    media.image_size(str(path))
    media.image(path.read_bytes())


def _video(path: Path) -> None:
    header = media.video_header(str(path))
    media.video(str(path), header, media.clip(header, Video(min_frames=2, max_frames=4)).indices, (16, 16))


def _sound(path: Path) -> None:
    header = audio.audio_header(str(path))
    audio.decode_audio(str(path), header, 16000, 0.0, min(0.2, header.seconds))
    audio.decode_audio(path.read_bytes(), header, 8000)


def _rows(path: Path) -> None:
    corpus = open_corpus([Dataset(path=str(path), media_dir=str(path.parent))])
    for i in range(min(len(corpus), 20)):
        try:
            shown: tuple[Media, ...] = corpus[i].media
        except PolymodalError as error:
            assert len(str(error)) < 3000, str(error)[:200]
            continue
        for medium in shown:
            reader = {"image": media.image_size, "video": media.video_header, "audio": audio.audio_header}
            try:
                reader[medium.kind](medium.source)
            except PolymodalError as error:
                assert len(str(error)) < 3000, str(error)[:200]


def _tensors(path: Path) -> None:
    files = Files(path.parent, (path.stem,))
    for key, shape in files.shapes.items():
        files.read(key, tuple(slice(0, size) for size in shape), torch.empty(tuple(shape)))


READERS = {
    **dict.fromkeys(("png", "jpg", "webp", "gif", "tiff", "bmp", "avif", "ppm"), _picture),
    **dict.fromkeys(("wav", "flac", "mp3", "ogg", "m4a", "aac"), _sound),
    **dict.fromkeys(("mp4", "webm"), _video),
    **dict.fromkeys(("jsonl", "json", "csv", "tsv", "parquet", "tar"), _rows),
    "yaml": recipe.load,
    "safetensors": _tensors,
    "arrow": lambda path: index_file.read(path, KEY),
}


def read(path: Path) -> str:
    """What the readers of a file say of it: "" or the PolymodalError's sentence. Other exceptions leave."""
    reader = read_json if path.name == "config.json" else READERS[path.suffix[1:]]
    try:
        reader(path)
    except PolymodalError as error:
        assert error.message and len(str(error)) < 3000, str(error)[:200]
        return str(error)
    return ""
