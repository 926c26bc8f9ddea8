"""Conversion to MLLM JSON: what the documents describe, any paths, nothing lost in silence, nothing half-written."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.data.source import open_corpus
from polymodal.recipe import Dataset
from polymodal.tools.data_convert import convert
from tests.models import tiny
from tests.unit.media_fixtures import picture_bytes, write_rows


def llava(n, image=True):
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?" if image else "Hi"},
        {"from": "gpt", "value": f"Answer {n}, ü中."},
        {"from": "human", "value": "More?"},
        {"from": "gpt", "value": "No."},
    ]
    return {"id": f"{n:012}", **({"image": f"{n:012}.jpg"} if image else {}), "conversations": turns}


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """The documents' layout: data/COCO2017/train2017/*.jpg and data/llava_instruct_150k.json; picture 2 is missing."""
    folder = tmp_path / "data" / "COCO2017" / "train2017"
    folder.mkdir(parents=True)
    for n in (0, 1, 3):
        tiny.picture(40, 24, n).save(folder / f"{n:012}.jpg")
    write_rows(
        tmp_path / "data" / "llava_instruct_150k.json",
        [llava(0), llava(1), llava(2), llava(3), llava(4, image=False)],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def described(n):
    roles = {"human": "user", "gpt": "assistant"}
    row = llava(n)
    return {
        "images": [f"./data/COCO2017/train2017/{n:012}.jpg"],
        "messages": [{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]],
    }


def test_the_documents_walk_through_on_coco_and_llava_instruct(coco):
    steps = []
    out = convert(
        "./data/llava_instruct_150k.json",
        "./data/mllm_format_llava_instruct_data.json",
        "llava",
        media_dir="./data/COCO2017/train2017",
        progress=lambda done, total: steps.append((done, total)),
    )
    rows = json.loads(Path("data/mllm_format_llava_instruct_data.json").read_text(encoding="utf-8"))
    assert rows[:3] == [described(0), described(1), described(3)]
    assert rows[3] == {
        "images": [],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Answer 4, ü中."},
            {"role": "user", "content": "More?"},
            {"role": "assistant", "content": "No."},
        ],
    }
    assert (out.rows, out.written, out.text_only, out.media) == (5, 4, 1, 3)
    assert out.missing == [
        ("./data/llava_instruct_150k.json, row 3", "./data/COCO2017/train2017/000000000002.jpg")
    ]
    assert (
        Path(out.report).read_text()
        == "./data/llava_instruct_150k.json, row 3\t./data/COCO2017/train2017/000000000002.jpg\n"
    )
    assert "4 of 5 rows" in str(out) and "1 media are missing" in str(out)
    assert steps[-1] == (5, 5)
    corpus = open_corpus([Dataset(path="./data/mllm_format_llava_instruct_data.json")])  # no media_dir needed
    assert all(os.path.isfile(m.source) for record in corpus for m in record.media)
    assert [len(r.media) for r in corpus] == [1, 1, 1, 0]


def test_it_can_be_run_again_and_forgets_an_old_report(coco):
    target = "data/out.json"
    first = convert("data/llava_instruct_150k.json", target, media_dir="data/COCO2017/train2017")
    once = Path(target).read_bytes()
    convert("data/llava_instruct_150k.json", target, media_dir="data/COCO2017/train2017")
    assert Path(target).read_bytes() == once
    tiny.picture().save("data/COCO2017/train2017/000000000002.jpg")
    again = convert("data/llava_instruct_150k.json", target, media_dir="data/COCO2017/train2017")
    assert (
        again.written == 5 and not again.missing and again.report is None and not os.path.exists(first.report)
    )
    assert not [f for f in os.listdir("data") if f.startswith(".writing")]


def test_missing_media_are_kept_or_fatal_by_choice(coco):
    kept = convert(
        "data/llava_instruct_150k.json",
        "data/kept.jsonl",
        media_dir="data/COCO2017/train2017",
        missing="keep",
    )
    assert kept.written == 5 and len(kept.missing) == 1
    assert [json.loads(line)["images"] for line in Path("data/kept.jsonl").read_text().splitlines()][2] == [
        "data/COCO2017/train2017/000000000002.jpg"
    ]
    with pytest.raises(
        PolymodalError,
        match="row 3: data/COCO2017/train2017/000000000002.jpg is not there.*Nothing was written",
    ):
        convert(
            "data/llava_instruct_150k.json",
            "data/none.json",
            media_dir="data/COCO2017/train2017",
            missing="fail",
        )
    assert not os.path.exists("data/none.json")


def test_paths_hold_from_the_destination_without_media_dir(tmp_path):
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    tiny.picture().save(tmp_path / "in" / "pictures" / "a.png")
    rows = [
        {"conversations": llava(0)["conversations"], "image": "pictures/a.png"},
        {"conversations": llava(0)["conversations"], "image": str(tmp_path / "in" / "pictures" / "a.png")},
    ]
    write_rows(tmp_path / "in" / "x.jsonl", rows)
    target = tmp_path / "deep" / "er" / "out.json"
    assert convert(str(tmp_path / "in" / "x.jsonl"), str(target)).written == 2
    assert [r["images"] for r in json.loads(target.read_text())] == [
        ["../../in/pictures/a.png"],
        [str(tmp_path / "in" / "pictures" / "a.png")],
    ]
    assert all(os.path.isfile(m.source) for r in open_corpus([Dataset(path=str(target))]) for m in r.media)


CASES = {
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
        "system": "s",
    },
    "alpaca": {"instruction": "i", "input": "n", "output": "o", "history": [["a", "b"]]},
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see "},
                    {"type": "image_url", "image_url": {"url": "DATA"}},
                ],
            },
            {"role": "assistant", "content": "a", "weight": 0.5, "reasoning_content": "hm"},
        ]
    },
    "auto": {"instruction": "i", "output": "o"},
}


@pytest.mark.parametrize("format", CASES)
def test_every_format_reads_the_same_after_conversion(tmp_path, format):
    source = tmp_path / "in.jsonl"
    data = picture_bytes()
    source.write_text(
        json.dumps(CASES[format]).replace("DATA", "data:image/png;base64," + base64.b64encode(data).decode())
        + "\n"
    )
    target = tmp_path / "out.jsonl"
    convert(str(source), str(target), format)
    before, after = (
        open_corpus([Dataset(path=str(p), format=f)])[0] for p, f in ((source, format), (target, "mllm"))
    )

    def content(record):
        parts = [
            [
                Path(p.source).read_bytes()
                if not isinstance(p, str) and isinstance(p.source, str)
                else getattr(p, "source", p)
                for p in m.content
                if p != ""
            ]
            for m in record.messages
        ]
        return parts, record.tools, [(m.role, m.weight, m.reasoning, m.tool_calls) for m in record.messages]

    assert content(after) == content(before)
    if format == "openai":
        assert json.loads(target.read_text())["images"][0].startswith("out_media/") and after.media


def test_several_files_and_own_field_names(tmp_path):
    from polymodal.recipe import Attr

    for name in "ab":
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{"talk": [{"role": "user", "content": name}, {"role": "assistant", "content": "x"}]}],
        )
    out = convert(str(tmp_path / "?.jsonl"), str(tmp_path / "out.json"), attr=Attr(messages="talk"))
    assert out.written == 2
    assert [r["messages"][0]["content"] for r in json.loads((tmp_path / "out.json").read_text())] == [
        "a",
        "b",
    ]


def test_a_killed_run_leaves_the_old_file(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"instruction": f"{n}" * 50, "output": "o"}) + "\n" for n in range(40_000))
    )
    target = tmp_path / "out.json"
    target.write_text("old")
    run = multiprocessing.get_context("fork").Process(target=convert, args=(str(source), str(target)))
    run.start()
    deadline = time.time() + 30
    while not any(p.stat().st_size > 0 for p in tmp_path.glob(".writing-*")) and time.time() < deadline:
        time.sleep(0.001)
    assert run.is_alive()
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL and target.read_text() == "old"


# bad input


def refused(match, source, target="out.json", **options):
    with pytest.raises(PolymodalError, match=match):
        convert(str(source), str(target), **options)
    assert not os.path.exists(target)


def test_bad_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_rows(tmp_path / "in.jsonl", [{"instruction": "i", "output": "o"}])
    refused("ends in neither .json nor .jsonl", source, "out.parquet")
    refused("--missing = drop is unknown", source, missing="drop")
    (tmp_path / "none.json").write_text("[]")
    refused("none.json holds no row", tmp_path / "none.json")
    refused("--media-dir none: the directory does not exist", source, media_dir="none")
    refused("SRC = .*nothing.jsonl: the file does not exist", tmp_path / "nothing.jsonl")
    with pytest.raises(PolymodalError, match="is the source itself"):
        convert(str(source), str(source))
    assert source.read_text()


def test_a_record_that_cannot_be_understood_stops_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        "in.jsonl, line 2: no known format",
        write_rows(tmp_path / "in.jsonl", [{"instruction": "i", "output": "o"}, {"x": 1}]),
    )


def test_plain_text_and_marks_in_the_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("line 1: the row is plain text", write_rows(tmp_path / "in.jsonl", [{"text": "x"}]))
    refused(
        "line 1: the text itself holds <image>",
        write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "the <image> tag"}]}]),
        format="openai",
    )


def test_no_record_has_its_media(coco):
    refused("not one of 1 rows has all its media", write_rows(coco / "in.jsonl", [llava(9)]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"instruction": "i", "output": "o"}])
    (tmp_path / "closed").mkdir(mode=0o500)
    refused("cannot be written: Permission denied", source, tmp_path / "closed" / "out.json")


def test_a_full_disk(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", [{"instruction": "i", "output": "o"}])
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused("cannot be written: No space left on device", source, tmp_path / "out.json")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]
