"""What users and attackers put into files: read, or refused in one sentence, within bounds, nothing else opened."""

from __future__ import annotations

import base64
import json
import os
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.files import open_file, private_directory, read_json, written_whole
from polymodal.data import audio, files, index_file, media
from polymodal.data.files import open_rows
from polymodal.data.references import References
from polymodal.data.source import open_corpus
from polymodal.recipe import Attr, Data, Dataset
from tests.models import tiny
from tests.properties.corpus import READERS, damaged, read, valid_files

EDITS = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0, 1), st.sampled_from((0, 1, 4, 40)), st.integers(0, 63)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, name -> content) of valid files, read once without a complaint."""
    folder = tmp_path_factory.mktemp("files")
    found = valid_files(folder)
    for name, data in found.items():
        (folder / name).write_bytes(data)
        assert "cannot" not in read(folder / name), name
    return folder, found


def _survives(whole, name: str, edits: list) -> None:
    folder, found = whole
    path = folder / f"damaged{Path(name).suffix}" if name != "config.json" else folder / name
    path.write_bytes(damaged(found[name], edits))
    read(path)


def _examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True)


@_examples(120)
@given(
    st.sampled_from(("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.tar")), EDITS
)
def test_damaged_rows(whole, name, edits):
    _survives(whole, name, edits)


@_examples(100)
@given(st.sampled_from(("p.png", "p.jpg", "p.webp", "p.gif", "p.tiff", "p.bmp", "p.avif", "p.ppm")), EDITS)
def test_damaged_pictures(whole, name, edits):
    _survives(whole, name, edits)


@_examples(80)
@given(st.sampled_from(("v.mp4", "a.webm", "a.wav", "a.flac", "a.mp3", "a.ogg", "a.m4a", "a.aac")), EDITS)
def test_damaged_recordings(whole, name, edits):
    _survives(whole, name, edits)


@_examples(120)
@given(st.sampled_from(("recipe.yaml", "config.json", "model.safetensors", "lengths.arrow")), EDITS)
def test_damaged_recipes_weights_and_indexes(whole, name, edits):
    _survives(whole, name, edits)


# ---- text ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    ("messages", "images", "videos", "audio", "text", "path", "cap", "cut", "crop", "start", "end", "offset")
    + ("duration", "conversations", "instruction", "output", "history", "tools", "weight", "system", "bbox")
)


@_examples(150)
@given(row=st.dictionaries(COLUMNS, VALUES, max_size=5))
def test_rows_of_any_values(whole, row):
    path = whole[0] / "any.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    read(path)


@_examples(40)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=12),
    mark=st.booleans(),
    end=st.sampled_from(("\n", "\r\n")),
)
def test_texts_arrive_as_they_are_written(whole, text, mark, end):
    lines = [json.dumps({"text": f"a{text}\u2028\x85b", "n": n}, ensure_ascii=False) for n in range(3)]
    path = whole[0] / "text.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + end.join(lines).encode())
    rows = open_rows(str(path))
    assert [rows[i] for i in range(len(rows))] == [json.loads(line) for line in lines]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_named(tmp_path, ending, coding):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"" + '{"text": "caf\u00e9"}\n{"text": "caf\u00e9"}\n'.encode(coding))
    with pytest.raises(PolymodalError, match=r"UTF-8|not valid JSON"):
        rows = open_rows(str(path))
        rows[0]


# ---- paths and base64 ---------------------------------------------------------------------------------------------


def _refusal(source: str, folder: Path) -> str:
    try:
        found = (
            References(Attr(), str(folder / "rows.jsonl"), None).medium("image", source, "images[0]").source
        )
        media.image_size(found)
    except PolymodalError as error:
        return str(error)
    return ""


@_examples(60)
@given(
    name=st.sampled_from(("Bild \u00e9.png", "\u30c9\u30e9.png", "a b (1)#%.png")),
    folder=st.sampled_from(("", "My Pictures/", "\u00fc/")),
    how=st.sampled_from(
        ("as it is", "back", "drive", "share", "NFD", "blank", "line", "case", "ending", "before")
    ),
)
def test_paths_of_other_systems(tmp_path_factory, name, folder, how):
    root = tmp_path_factory.mktemp("paths")
    (root / folder).mkdir(exist_ok=True)
    tiny.picture(8, 8, 0).save(root / folder / name)
    plain = folder + name
    changed = {
        "as it is": (plain, ""),
        "back": (plain.replace("/", "\\") if folder else "x\\" + plain, "backslashes"),
        "drive": ("C:\\" + plain.replace("/", "\\"), "backslashes"),
        "share": ("\\\\server\\" + plain, "backslashes"),
        "NFD": (unicodedata.normalize("NFD", plain), "NFD" if name.isascii() is False else ""),
        "blank": (plain + " ", "blank"),
        "line": (plain + "\n", "line's end"),
        "case": (plain.replace(".png", ".PNG"), "Did you mean"),
        "ending": (plain.replace(".png", ".pgn"), "Did you mean"),
        "before": (f"file://{root}/{plain}".replace("%", "%25"), ""),
    }
    source, said = changed[how]
    seen = _refusal(source, root)
    if how == "NFD" and folder == "\u00fc/":
        assert "does not exist" in seen  # the directory's name differs too
    else:
        assert said in seen if said else not seen, seen


@_examples(60)
@given(cut=st.integers(1, 200), edits=EDITS)
def test_base64_is_read_or_refused_shortly(whole, cut, edits):
    text = base64.b64encode(whole[1]["p.png"]).decode()
    for source in (
        text,
        text[:-cut],
        f"data:image/png;base64,{text[cut:]}",
        damaged(text.encode(), edits).decode("latin-1"),
    ):
        seen = _refusal(source, whole[0])
        assert len(seen) < 700, seen[:100]
    assert not _refusal(text, whole[0])


# ---- what is opened -----------------------------------------------------------------------------------------------


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for head in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
        b"%PDF-1.4\n",
        b"\xd7\xcd\xc6\x9a",
    ):
        for reader in (media.image_size, media.image):
            with pytest.raises(PolymodalError, match="no known format"):
                reader(head + b"\0" * 100)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile v.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder}/v.mp4\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/v.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>',
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "sdp", "mpd"])
def test_recordings_name_no_other_files(whole, text, ending):
    path = whole[0] / f"list.{ending}"
    path.write_text(text.format(folder=whole[0]))
    for reader in (media.video_header, audio.audio_header):
        for source in (str(path), path.read_bytes()):
            with pytest.raises(PolymodalError, match=r"names other files|cannot be read"):
                reader(source)


@pytest.mark.parametrize(
    "name", ["concat:v.mp4|v.mp4", "subfile,,start,0,end,9,,:v.mp4", "v%01d.mp4", "/dev/zero", "."]
)
def test_a_path_is_a_file_and_nothing_else(whole, monkeypatch, name):
    monkeypatch.chdir(whole[0])
    for reader in (media.image_size, media.video_header, audio.audio_header):
        with pytest.raises(PolymodalError, match=r"does not exist|not a file|is a directory"):
            reader(name)


@pytest.mark.parametrize("ending", sorted(READERS))
def test_what_is_no_file(tmp_path, ending):
    place = tmp_path / f"x.{ending}"
    reader = READERS[ending]

    def refused() -> None:
        if ending == "arrow":
            assert reader(place) is None
        else:
            with pytest.raises(PolymodalError):
                reader(place)

    os.mkfifo(place)
    refused()
    place.unlink()
    place.symlink_to(place.name)  # a loop
    refused()
    place.unlink()
    place.mkdir()
    refused()
    place.rmdir()
    refused()


def test_open_file_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError):
            open_file(path)


# ---- bounds -------------------------------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_picture_of_too_many_pixels():
    for reader in (media.image_size, media.image):
        with pytest.raises(PolymodalError, match="larger than can be decoded"):
            reader(_png(60000, 60000))


def test_a_video_that_claims_too_many_frames(whole):
    data = whole[1]["v.mp4"]
    at = data.index(b"stts") + 12
    with pytest.raises(PolymodalError, match=r"claims 1,000,000,000 frames"):
        media.video_header(data[:at] + struct.pack(">I", 10**9) + data[at + 4 :])


def test_sound_that_claims_months(whole):
    data = whole[1]["a.flac"]
    with pytest.raises(PolymodalError, match=r"claims [0-9,]+ hours"):
        audio.audio_header(data[:21] + bytes([data[21] | 15]) + b"\xff" * 4 + data[26:])


def test_few_bytes_of_parquet_that_unpack_to_much(tmp_path):
    path = tmp_path / "a.parquet"
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3_000_000, np.int8)), pa.array(["a"]))
    pq.write_table(pa.table({"text": same}), path)
    with pytest.raises(PolymodalError, match=r"3,000,000 rows in [0-9,]+ bytes are copies"):
        open_rows(str(path))
    text = pa.array(["x" * 1_000_000])  # 90 GB, if each row had its own
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(90_000, np.int32)), text)
    pq.write_table(pa.table({"text": same, "n": np.arange(90_000)}), path, compression="zstd")
    row = open_rows(str(path))[70_000]
    assert len(row["text"]) == 1_000_000 and row["n"] == 70_000


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_row_longer_than_a_row_may_be(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(files, "MAX_ROW", 1 << 20)
    monkeypatch.setattr(files, "CHUNK", 1 << 18)
    long = "x" * (2 << 20)
    text = {"jsonl": '{"text": "%s"}\n', "json": '[{"text": "%s"}]', "csv": 'text\n"%s"\n'}[ending] % long
    (tmp_path / f"a.{ending}").write_text(text)
    with pytest.raises(PolymodalError, match="longer than 1 MiB"):
        open_rows(str(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 120 + "]" * 120, "9" * 400, "9" * 5000]
)
def test_json_within_bounds(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {text}}}\n')
    rows = open_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        PolymodalError, match=r"line 2: not valid JSON: (nested deeper|a number of|Expecting|.*delimiter)"
    ):
        rows[1]
    (tmp_path / "a.json").write_text(f'{{"a": {text}}}')
    if len(text) > 400:
        with pytest.raises(PolymodalError):
            read_json(tmp_path / "a.json")


def test_a_hundred_thousand_columns(tmp_path):
    names = [f"c{n}" for n in range(100_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(names, 1)) + "\n")
    with pytest.raises(PolymodalError, match="100,000 columns"):
        open_rows(str(tmp_path / "a.csv"))
    with pytest.raises(PolymodalError, match="100,000 columns"):
        open_corpus([Dataset(path=str(tmp_path / "a.jsonl"))])[0]


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x, x]\n"
        + "".join(
            f"{'bcdefghijklmnop'[i]}: &{'bcdefghijklmnop'[i]} [{', '.join(['*' + 'abcdefghijklmno'[i]] * 9)}]\n"
            for i in range(15)
        ),
        "a: &a [*a]\n",
        "a: " + "[" * 5000,
        "train: {steps: " + "9" * 400 + "}\n",
        "train: {steps: 0b_}\n",
        "train: {steps: 2001-99-99}\n",
        "optim: {lr: .inf}\n",
        "optim: {lr: 1e999}\n",
        "#" * (2 << 20),
    ],
)
def test_recipes_within_bounds(tmp_path, content):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(PolymodalError) as seen:
        recipe.load(tmp_path / "r.yaml")
    assert len(str(seen.value)) < 600


@_examples(60)
@given(
    st.sampled_from(
        ("train.steps", "optim.lr", "data.datasets.0", "data.datasets.\u00b2", "a", "model.config.x")
    ),
    st.sampled_from(
        (
            "9" * 400,
            "9" * 5000,
            ".inf",
            ".nan",
            "2001-99-99",
            "!foo",
            "&a [*a]",
            "[" * 2000,
            "0x",
            "{",
            "-1",
            "1e999",
        )
    ),
)
def test_overrides_of_any_value(whole, key, value):
    (whole[0] / "o.yaml").write_text("model: {source: x}\ndata: {datasets: [{path: a.json}]}\n")
    try:
        recipe.load(whole[0] / "o.yaml", [f"{key}={value}"])
    except PolymodalError as error:
        assert len(str(error)) < 1000


def test_bases_that_name_each_other_many_times_are_read_once(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.yaml").write_text(f"base: [{n + 1}.yaml, {n + 1}.yaml]\n")
    (tmp_path / "40.yaml").write_text("model: {source: x}\ndata: {datasets: [{path: a.json}]}\n")
    assert recipe.load(tmp_path / "0.yaml").model.source == "x"


FIELDS = st.sampled_from(
    ((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100))
)


@_examples(120)
@given(
    field=FIELDS,
    value=st.binary(max_size=12)
    | st.sampled_from((b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7" * 11, b"\xff" * 10 + b"\xfc\0")),
    pax=st.dictionaries(
        st.sampled_from(
            ("size", "path", "mtime", "uid", "linkpath", "GNU.sparse.map", "GNU.sparse.size", "hdrcharset")
            + ("GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.realsize", "GNU.sparse.name")
        ),
        st.sampled_from(
            (
                "-5",
                "-1024",
                "abc",
                "1",
                "0",
                "nan",
                "9" * 30,
                "a\0b",
                "../../x.json",
                "a,b",
                "\x1b[2J",
                "x" * 5000,
            )
        ),
        max_size=3,
    ),
)
def test_tars_whose_headers_lie(whole, field, value, pax):
    path, (at, size) = whole[0] / "lies.tar", field
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "a.json"):
            member = tarfile.TarInfo(name)
            member.pax_headers = dict(pax)
            member.size = (whole[0] / "p.png").stat().st_size
            tar.addfile(member, open_file(whole[0] / "p.png"))
    data = bytearray(path.read_bytes())
    value = value[:size]
    data[at : at + len(value)] = value
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    read(path)


# ---- places that others may write ---------------------------------------------------------------------------------


def test_a_directory_that_others_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file.tempfile, "gettempdir", lambda: str(tmp_path))
    place, victim = tmp_path / f"polymodal-{os.getuid()}", tmp_path / "victim"
    victim.mkdir()
    place.symlink_to(victim)
    data = Data(datasets=[Dataset(path=str(tmp_path / "a.json"))])
    assert place not in index_file.cache_places(data)
    with pytest.raises(PermissionError):
        private_directory(place)
    place.unlink()
    assert place in index_file.cache_places(data)
    place.mkdir(mode=0o777)
    private_directory(place)
    assert place.stat().st_mode & 0o777 == 0o700
    if os.getuid() == 0:
        os.chown(place, 65534, 65534)
        assert place not in index_file.cache_places(data)


@pytest.mark.parametrize("how", ["soft", "hard", "pipe"])
def test_a_lock_file_is_not_followed(tmp_path, how):
    precious, lock = tmp_path / "precious", tmp_path / "a.lock"
    precious.write_text("of another file")
    {
        "soft": lambda: lock.symlink_to(precious),
        "hard": lambda: os.link(precious, lock),
        "pipe": lambda: os.mkfifo(lock),
    }[how]()
    with pytest.raises(PolymodalError, match="lock file"), index_file.lock(lock, lambda done, total: None):
        pass
    assert precious.read_text() == "of another file"


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path):
    precious, target = tmp_path / "precious", tmp_path / "a.json"
    precious.write_text("of another file")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(precious)
    with written_whole(target) as temporary:
        temporary.write_text("new")
    assert precious.read_text() == "of another file" and target.read_text() == "new"
    with written_whole(
        tmp_path / ("\u00e9" * 110)
    ) as temporary:  # 220 bytes: the longest that fits with .tmp's rest
        temporary.write_text("new")
