"""Every file format is read by row number alike; a broken file or row is named by file and line."""

from __future__ import annotations

import io
import json
import pickle
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media
from polymodal.data.files import CHUNK, JsonArray, Tar, open_rows
from polymodal.data.source import expand, open_corpus
from polymodal.recipe import Attr, Dataset
from tests.unit.media_fixtures import picture_bytes, write_rows

ROWS = [{"instruction": f"Frage {i} ü中\n{'x' * (i * 7)}", "output": f'say "{i}", ok'} for i in range(8)]


def chat(i, **more):
    return {
        "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}],
        **more,
    }


def corpus(path, **options):
    return open_corpus([Dataset(path=str(path), **options)])


def texts(records):
    return ["".join(p for m in r.messages for p in m.content if isinstance(p, str)) for r in records]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records_in_any_order_and_after_pickling(tmp_path, ending):
    path = write_rows(tmp_path / f"data.{ending}", ROWS)
    rows = open_rows(str(path))
    assert len(rows) == 8
    assert [rows[i] for i in (7, 0, 3)] == [ROWS[i] for i in (7, 0, 3)]
    again = pickle.loads(pickle.dumps(rows))
    assert [again[i] for i in range(8)] == ROWS
    made = corpus(path)
    assert (
        len(made) == 8
        and texts(pickle.loads(pickle.dumps(made)))[5] == ROWS[5]["instruction"] + ROWS[5]["output"]
    )
    assert made[-1].where == made.where(7)
    with pytest.raises(IndexError):
        made[8]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii=st.booleans(),
    chunk=st.sampled_from([1, 2, 7, 64, CHUNK]),
)
def test_a_json_list_is_read_record_by_record_whatever_its_layout(
    tmp_path, monkeypatch, rows, indent, ascii, chunk
):
    monkeypatch.setattr("polymodal.data.files.CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps(rows, indent=indent, ensure_ascii=ascii), encoding="utf-8", errors="surrogatepass"
    ) if ascii else path.write_bytes(
        json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", "replace")
    )
    expected = json.loads(path.read_text(encoding="utf-8"))
    read = JsonArray(str(path))
    assert [read[i] for i in range(len(read))] == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.sampled_from(["", "  ", "\t", '{"a": 1}', '{"a": "é"}', '{"a": "' + "x" * 90 + '"}']), max_size=8
    ),
    end=st.booleans(),
    crlf=st.booleans(),
)
def test_json_lines_pass_over_blank_lines_and_keep_line_numbers(tmp_path, lines, end, crlf):
    path = tmp_path / "data.jsonl"
    path.write_bytes((("\r\n" if crlf else "\n").join(lines) + ("\n" if end else "")).encode())
    rows = open_rows(str(path))
    expected = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
    assert [(rows.where(i), rows[i]) for i in range(len(rows))] == [
        (f"{path}, line {n}", row) for n, row in expected
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            st.text('ab,"\n\t ;', min_size=1),
        ),
        min_size=1,
        max_size=5,
    ),
    ending=st.sampled_from(["csv", "tsv"]),
)
def test_csv_fields_may_hold_separators_quotes_and_line_breaks(tmp_path, values, ending):
    rows = [{"text": a, "other": b} for a, b in values]
    read = open_rows(str(write_rows(tmp_path / f"data.{ending}", rows)))
    assert [read[i] for i in range(len(read))] == rows


def test_json_with_one_object_a_line_is_read_as_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("".join(json.dumps(chat(i)) + "\n" for i in range(3)))
    assert texts(corpus(path)) == ["q0a0", "q1a1", "q2a2"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(corpus(path)) == 3


def test_a_large_field_of_a_benchmark_table_is_read(tmp_path):
    path = write_rows(tmp_path / "data.tsv", [{"text": "a", "image": "A" * 400_000}])
    assert len(open_rows(str(path))[0]["image"]) == 400_000


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_a_webdataset_shard_joins_members_of_one_stem(tmp_path):
    jpg, png = picture_bytes("JPEG"), picture_bytes("PNG", seed=1)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        add(tar, "a/0001.jpg", jpg)
        add(tar, "a/0001.json", json.dumps(chat(1)).encode())
        add(tar, "a/0002.txt", b"a red square")
        add(tar, "a/0002.png", png)
        add(tar, "a/0003.1.png", png)
        add(tar, "a/0003.json", json.dumps({**chat(3), "images": ["0003.1.png", "0003.0.jpg"]}).encode())
        add(tar, "a/0003.0.jpg", jpg)
        add(tar, "a/0004.cls", b"7")
        add(tar, "a/._0005.txt", b"not data")
    made = corpus(tmp_path / "shard.tar")
    assert len(made) == 4
    assert made[0].messages[0].content == (Media("image", jpg), "q1")
    assert made[1].plain and made[1].messages[0].content == (Media("image", png), "a red square")
    assert [m.source for m in made[2].media] == [png, jpg]  # as its json names them
    assert made.row(3) == {"cls": "7", "__key__": "a/0004"}
    assert made[0].where.endswith("shard.tar, row 1 (a/0001)")
    assert pickle.loads(pickle.dumps(made))[2].media == made[2].media


def test_directories_and_globs_join_files_in_order_of_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, i in (("b.jsonl", 2), ("a.json", 1), ("sub/c.jsonl", 3), (".hidden.jsonl", 9)):
        write_rows(tmp_path / name, [chat(i)])
    (tmp_path / "readme.md").write_text("x")
    assert texts(corpus(tmp_path)) == ["q1a1", "q2a2"]
    assert texts(corpus(tmp_path / "**" / "*.jsonl")) == ["q2a2", "q3a3"]


def test_parts_hold_what_the_schedule_needs(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [chat(i) for i in range(5)])
    two = write_rows(tmp_path / "two.json", [chat(i) for i in range(3)])
    sets = [
        Dataset(path=str(one), max_samples=4, weight=2.0),
        Dataset(path=str(two), max_samples=99, repeat=0.5),
        Dataset(path=str(one)),
    ]
    made = open_corpus(sets)
    assert [(p.name, p.start, p.stop, p.weight, p.repeat) for p in made.parts] == [
        ("one.jsonl", 0, 4, 2.0, 1.0),
        ("two.json", 4, 7, None, 0.5),
        ("one.jsonl (2)", 7, 12, None, 1.0),
    ]
    assert texts(made)[4] == "q0a0" and made[4].where.endswith("two.json, row 1")


def test_max_samples_counts_over_the_files_of_a_dataset(tmp_path):
    for name in "abc":
        write_rows(tmp_path / f"{name}.jsonl", [chat(name + str(i)) for i in range(2)])
    made = corpus(tmp_path, max_samples=3)
    assert texts(made) == ["qa0aa0", "qa1aa1", "qb0ab0"]


def test_the_fingerprint_follows_content_and_settings_not_paths(tmp_path):
    def mark(path, **options):
        return corpus(path, **options).parts[0].fingerprint

    first = write_rows(tmp_path / "a.jsonl", [chat(1), chat(2)])
    (tmp_path / "other").mkdir()
    moved = write_rows(tmp_path / "other" / "b.jsonl", [chat(1), chat(2)])
    assert mark(first) == mark(moved)
    changed = write_rows(tmp_path / "c.jsonl", [chat(1), chat(3)])
    assert changed.stat().st_size == first.stat().st_size and mark(changed) != mark(first)
    assert (
        len(
            {
                mark(first),
                mark(first, format="openai"),
                mark(first, attr=Attr(role="role")),
                mark(first, max_samples=1),
                mark(first, media_dir=str(tmp_path)),
            }
        )
        == 5
    )
    for ending in ("json", "csv", "parquet"):
        marks = {
            mark(write_rows(tmp_path / f"x.{ending}", [{"instruction": "a", "output": o}])) for o in "bc"
        }
        assert len(marks) == 2


def test_a_shards_fingerprint_sees_text_and_headers_of_media(tmp_path):
    def mark(text, data):
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            add(tar, "1.txt", text)
            add(tar, "1.png", data)
        return Tar(str(tmp_path / "s.tar")).fingerprint

    data = picture_bytes()
    other = bytes([*data[:20], data[20] ^ 1, *data[21:]])
    assert len({mark(b"aa", data), mark(b"ab", data), mark(b"aa", other)}) == 3
    assert mark(b"aa", data) == mark(b"aa", data)


def test_the_files_of_the_data_set_are_not_held_in_memory(tmp_path):
    row = chat(0, note="x" * 4000)
    path = write_rows(tmp_path / "big.jsonl", [row] * 2000)
    made = corpus(path)
    assert len(pickle.dumps(made)) < path.stat().st_size / 100


# bad input: one sentence with file, line, cause and fix


def bad(tmp_path, name, content, *words, at_open=True, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PolymodalError) as error:
        made = corpus(path, **options)
        assert not at_open
        list(made)
    for word in (name, *words):
        assert word in str(error.value), str(error.value)
    return error.value


def test_missing_file_names_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl", [chat(1)])
    with pytest.raises(
        PolymodalError,
        match=r"data.datasets.0.path = .*trian.jsonl: the file does not exist. Did you mean .*train.jsonl\?",
    ):
        corpus(tmp_path / "trian.jsonl")


def test_missing_directory(tmp_path):
    with pytest.raises(PolymodalError, match="the directory .*none does not exist"):
        corpus(tmp_path / "none" / "a.jsonl")


def test_directory_without_data(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(PolymodalError, match="holds no data file"):
        corpus(tmp_path)


def test_glob_without_match(tmp_path):
    with pytest.raises(PolymodalError, match="no file matches"):
        corpus(tmp_path / "*.jsonl")


def test_address_on_the_network():
    with pytest.raises(PolymodalError, match="local files.*Download"):
        expand("hf://datasets/x/y.parquet")


def test_missing_media_dir(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(PolymodalError, match="data.datasets.0.media_dir = .*does not exist"):
        corpus(path, media_dir=str(tmp_path / "pictures"))


def test_unknown_ending(tmp_path):
    bad(tmp_path, "a.xlsx", "x", "ending in .xlsx", ".parquet")


def test_compressed_file(tmp_path):
    bad(tmp_path, "a.jsonl.gz", "x", "Unpack")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_file_without_records(tmp_path, name):
    if name == "a.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
        content = (tmp_path / name).read_bytes()
    else:
        content = {"a.jsonl": "\n\n", "a.csv": "text\n", "a.json": "[]"}[name]
    bad(tmp_path, name, content, "not a single row")


def test_broken_line_of_json_lines_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat(0)) + '\n\n{"messages": [}\n' + json.dumps(chat(2)) + "\n")
    made = corpus(path)
    assert len(made) == 3 and texts([made[0], made[2]]) == ["q0a0", "q2a2"]
    with pytest.raises(PolymodalError, match="a.jsonl, line 3: not valid JSON"):
        made[1]


def test_record_that_is_no_object(tmp_path):
    bad(tmp_path, "a.jsonl", '{"text": "a"}\n[1]\n', "line 2", "is a list", at_open=False)


def test_json_under_another_name_is_recognised_by_its_content(tmp_path):
    for indent in (None, 2):
        (tmp_path / "list.jsonl").write_text(json.dumps([chat(1), chat(2)], indent=indent))
        assert texts(corpus(tmp_path / "list.jsonl")) == ["q1a1", "q2a2"]
    for name in ("objects.jsonl", "objects.json"):
        content = "\n".join(json.dumps(chat(i), indent=2) for i in range(3))
        bad(tmp_path, name, content, "line 1", "JSON objects over several lines", "jq -c")


def test_half_of_a_character_is_named(tmp_path):
    bad(tmp_path, "a.jsonl", '{"text": "a \\ud83d b"}\n', "line 1", "half of a character", at_open=False)
    (tmp_path / "b.jsonl").write_text('{"text": "a \\ud83d\\ude00 b"}\n')
    assert texts(corpus(tmp_path / "b.jsonl")) == ["a \U0001f600 b"]


def test_record_that_is_not_utf8(tmp_path):
    bad(tmp_path, "a.jsonl", b'{"text": "\xff"}\n', "line 1", "UTF-8", at_open=False)
    bad(tmp_path, "a.json", b'[{"text": "a"}, {"text": "\xff"}]', "row 2", "UTF-8", at_open=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["the file is empty"]),
        ('{\n"a": 1\n}', ["line 1", "over several lines"]),
        ('"text"', ["begins with '\"'"]),
        ('[{"a": 1},\n{"a" 2}]', ["line 2", "after row 1"]),
        ('[{"a": 1}\n{"a": 2}]', ["line 2", "a comma is missing"]),
        ('[{"a": 1},\n{"a": 2}', ["line 2", "the list is not closed"]),
        ('[{"a": 1}]\n\n[]', ["line 3", "something follows the list"]),
        ('[{"a": "b\n', ["line 1"]),
    ],
)
def test_broken_json_list(tmp_path, content, words):
    bad(tmp_path, "a.json", content, *words)


def test_json_list_of_other_things(tmp_path):
    bad(tmp_path, "a.json", "[1, 2]", "row 1", "is a number", at_open=False)


def test_csv_row_with_too_many_fields(tmp_path):
    bad(
        tmp_path,
        "a.csv",
        "text,id\nhello,1\nhello, world,2\n",
        "line 3",
        "3 fields, but the header has 2",
        at_open=False,
    )


def test_csv_with_a_column_twice(tmp_path):
    bad(tmp_path, "a.csv", "text,text\na,b\n", "line 1", "twice")


def test_csv_that_is_not_utf8(tmp_path):
    bad(tmp_path, "a.csv", b"text\n\xff\xfe\n", "UTF-8")


def test_broken_parquet(tmp_path):
    bad(tmp_path, "a.parquet", b"PAR1 nonsense", "not a readable parquet file")


def test_broken_tar(tmp_path):
    bad(tmp_path, "a.tar", b"x" * 2000, "not a readable tar file")


def test_tar_that_is_cut_short(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        add(tar, "1.txt", b"x" * 3000)
    bad(tmp_path, "a.tar", (tmp_path / "whole.tar").read_bytes()[:1500], "beyond the end")


def test_tar_text_that_is_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.txt", b"\xff")
    with pytest.raises(PolymodalError, match=r"a.tar, row 1 \(1\): the member 1.txt is not UTF-8"):
        corpus(tmp_path / "a.tar")[0]


# polymodal data check


def test_data_check_lists_what_is_broken_and_counts_the_rest(tmp_path, capsys):
    from polymodal.tools.data_check import main
    from tests.unit.media_fixtures import write_mp4

    (tmp_path / "a.png").write_bytes(picture_bytes("PNG", 24, 16))
    write_mp4(tmp_path / "v.mp4", frames=20, fps=10)
    rows = [
        chat(0),
        chat(1, images=["a.png"]),
        chat(2, videos=["v.mp4"]),
        chat(3, images=["lost.png"]),
        {"messages": [{"role": "robot"}]},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main([str(path)], as_json=True) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["rows"], found["text_only"], found["unanswered"]) == (False, 6, 2, 1)
    assert (
        found["media"] == {"image": 2, "video": 1}
        and found["pixels"]["image"] == [384] * 3
        and found["seconds"] == {"video": [2.0] * 3}
    )
    assert [p.split(": ")[0] for p in found["problems"]] == [f"{path}, line 4", f"{path}, line 5"]
    assert main([str(path)], limit=1) == 2
    text = capsys.readouterr().out
    assert (
        "line 4: the image" in text
        and "line 5" not in text
        and "2 of 6 rows are broken; 1 are not listed" in text
    )
    assert main([str(write_rows(tmp_path / "good.jsonl", rows[:3]))]) == 0
    assert "3 rows: 6 turns" in capsys.readouterr().out


def test_files_that_are_no_longer_as_they_were_are_known(tmp_path):
    files = [write_rows(tmp_path / f"{i}.jsonl", [chat(0), chat(1)]) for i in range(4)]
    made = open_corpus([Dataset(path=str(file)) for file in files])
    assert made.changed() == {}
    with open(files[0], "a") as file:
        file.write("\n")
    files[1].unlink()
    other = write_rows(tmp_path / "other.jsonl", [chat(0), chat(1)])
    other.replace(files[2])
    assert pickle.loads(pickle.dumps(made)).changed() == made.changed()
    assert made.changed() == {
        str(file): how for file, how in zip(files, ("changed", "removed", "replaced"), strict=False)
    }
