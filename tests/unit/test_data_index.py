"""Lengths are measured once, by one process, found again by content, and never believed when broken."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from polymodal.core.errors import PolymodalError
from polymodal.data.index import UNTRAINED, build_index, cache_key
from polymodal.data.index_file import cache_directory, is_remote
from polymodal.recipe import Data, Dataset
from tests.unit.data_fakes import CountingChat, LinesCorpus, write_rows


def data_of(path, **keys):
    return Data(**{"datasets": [Dataset(path=str(path))], "max_length": 100, **keys})


def build(path, tally=None, processes=1, **keys):
    data = data_of(path, **keys)
    return build_index(
        LinesCorpus(path),
        CountingChat(data.max_length, tally),
        data,
        processes=processes,
        progress=lambda *_: None,
    )


def measured(tally):
    return len(tally.read_text().splitlines()) if tally.exists() else 0


@pytest.fixture
def rows(tmp_path):
    return write_rows(
        tmp_path / "rows.jsonl", [{"n": 10 + i % 50, "media": [4] * (i % 3)} for i in range(600)]
    )


def test_lengths_and_patches(rows, tmp_path):
    index = build(rows)
    assert len(index) == 600 and index.usable.all() and index.tokens.dtype == np.int32
    assert index.tokens[7] == 17 and index.media["vision"][[0, 1, 2]].tolist() == [0, 4, 8]
    assert index.measure(5).media == {"vision": (4, 4)} and index.measure(3).media == {}
    assert index.locate(9) == (9, -1) and index.dropped == {}


def test_measured_once_and_found_by_content(rows, tmp_path):
    tally = tmp_path / "tally"
    first = build(rows, tally)
    assert measured(tally) == 600
    (file,) = (tmp_path / ".polymodal").iterdir()
    assert file.suffix == ".arrow"  # no lock and no temporary file stays behind
    again = build(rows, tally, max_length=30, on_error="skip")  # the limit does not change a length
    assert measured(tally) == 600
    assert not again.tokens.flags.owndata and not again.tokens.flags.writeable  # a view of the mapped file
    assert (again.tokens == first.tokens).all() and (~again.usable).sum() == (first.tokens > 30).sum()
    build(rows, tally, train_on="all")
    assert measured(tally) == 1200
    rows.write_text(rows.read_text() + json.dumps({"n": 3}) + "\n")
    assert len(build(rows, tally)) == 601 and measured(tally) == 1801


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other"])
def test_a_broken_cache_is_measured_again(rows, tmp_path, harm):
    tally = tmp_path / "tally"
    good = build(rows, tally).tokens.copy()
    (file,) = (tmp_path / ".polymodal").iterdir()
    content = bytearray(file.read_bytes())
    if harm == "cut":
        content = content[: len(content) // 2]
    elif harm == "flip":
        place = content.index(good.tobytes()) + 40
        content[place] ^= 1
    elif harm == "empty":
        content = b""
    else:
        content = b"not an arrow file" * 100
    file.write_bytes(content)
    assert (build(rows, tally).tokens == good).all() and measured(tally) == 1200
    assert (build(rows, tally).tokens == good).all() and measured(tally) == 1200  # mended


def test_what_is_dropped_is_counted_with_its_place(tmp_path):
    rows = write_rows(
        tmp_path / "r.jsonl",
        [
            {"n": 10},
            "{broken",
            {"n": 500},
            {"n": 20, "trained": 0},
            {"n": 9, "unreadable": "cat.png is not an image"},
            {"n": 30},
        ],
    )
    index = build(rows, on_error="skip")
    assert index.usable.tolist() == [True, False, False, False, False, True]
    place = f"{rows}, line "
    assert index.dropped["longer than data.max_length = 100"] == [place + "3"]
    assert index.dropped[UNTRAINED] == [place + "4"]
    assert index.dropped["cat.png is not an image"] == [place + "5"]
    assert index.dropped["not valid JSON"] == [place + "2"]
    assert sum(map(len, index.dropped.values())) == (~index.usable).sum()
    copy = pickle.loads(pickle.dumps(index))
    assert copy.corpus is None and (copy.tokens == index.tokens).all()
    for _ in range(2):  # measured, and from the cache
        with pytest.raises(
            PolymodalError, match=r"line 2: not valid JSON.* first of 2 broken records among 6"
        ) as error:
            build(rows)
        assert "data.on_error" in error.value.hint
    with pytest.raises(
        PolymodalError,
        match=r"line 3: the sample has 500 tokens, more than data.max_length = 100; so have 1 of 6",
    ):
        build(rows, on_error="skip", overlong="error")


def test_long_records_become_pieces(tmp_path):
    rows = write_rows(tmp_path / "r.jsonl", [{"n": 50}, {"n": 250}, {"n": 60}, {"n": 300, "message": 150}])
    for _ in range(2):
        index = build(rows, overlong="split")
        assert index.tokens.tolist() == [50, 100, 100, 50, 60, 150, 150]
        assert [index.locate(i) for i in range(7)] == [
            (0, -1),
            (1, 0),
            (1, 1),
            (1, 2),
            (2, -1),
            (3, 0),
            (3, 1),
        ]
        assert index.usable.tolist() == [True] * 5 + [False] * 2
        (reason,) = index.dropped
        assert "even when split" in reason and index.dropped[reason][1].endswith("line 4, piece 2")
    assert len(build(rows, overlong="split", max_length=200)) == 4 + 2  # the limit decides about pieces


def test_many_records_are_measured_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("polymodal.data.index._START_SECONDS", 0.5)
    tally = tmp_path / "tally"
    rows = write_rows(tmp_path / "r.jsonl", [{"n": 10 + i % 7, "measure_slow": 0.003} for i in range(1500)])
    seen = []
    index = build_index(
        LinesCorpus(rows),
        CountingChat(100, tally),
        data_of(rows),
        processes=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert index.tokens.tolist() == [10 + i % 7 for i in range(1500)]
    assert len(set(tally.read_text().split())) > 1  # this one, which saw that it takes long, and others
    assert seen[0] == (0, 1500) and seen[-1] == (1500, 1500) and seen == sorted(seen)


@pytest.mark.slow
def test_a_killed_measuring_process_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("polymodal.data.index._START_SECONDS", 0.5)
    rows = [{"n": 10, "measure_slow": 0.003} for _ in range(1000)]
    rows[300]["measure_exit"] = int(signal.SIGKILL)
    rows = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(PolymodalError, match="ran out of memory"):
        build(rows, processes=2)
    assert not list((tmp_path / ".polymodal").iterdir())


def _rank(path, tally, queue):
    index = build(Path(path), Path(tally))
    queue.put((int(index.tokens.sum()), len(index)))


def test_processes_of_a_node_wait_for_the_one_that_measures(tmp_path):
    tally = tmp_path / "tally"
    rows = write_rows(tmp_path / "r.jsonl", [{"n": 10, "measure_slow": 0.005} for _ in range(300)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(str(rows), str(tally), queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [queue.get(timeout=60) for _ in ranks] == [(3000, 300)] * 4
    for rank in ranks:
        rank.join()
    assert measured(tally) == 300 and len(set(tally.read_text().split())) == 1


def test_a_lock_left_by_a_dead_process_does_not_block(rows, tmp_path):
    (tmp_path / ".polymodal").mkdir()
    context = multiprocessing.get_context("fork")
    slow = write_rows(tmp_path / "slow.jsonl", [{"n": 10, "measure_slow": 30}])
    queue = context.Queue()
    holder = context.Process(target=_rank, args=(str(slow), str(tmp_path / "t"), queue))
    holder.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".polymodal").glob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list((tmp_path / ".polymodal").glob("*.lock"))
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    write_rows(slow, [{"n": 10}])
    (left,) = (tmp_path / ".polymodal").glob("*.lock")
    key = cache_key(LinesCorpus(slow), CountingChat(100), data_of(slow))
    left.rename(left.with_name(f"{key}.lock"))
    assert len(build(slow)) == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    assert cache_directory(data_of(folder / "a.jsonl")) == folder / ".polymodal"
    assert cache_directory(data_of(folder)) == folder / ".polymodal"
    assert cache_directory(data_of(folder / "shard-*.jsonl")) == folder / ".polymodal"
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {folder} nfs4 rw 0 0\n")
    node = tmp_path / "home" / "polymodal" / "index"
    assert cache_directory(data_of(folder / "a.jsonl"), str(mounts)) == node
    assert cache_directory(data_of(folder, cache_dir=str(folder / "c")), str(mounts)) == folder / "c"
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match="data.cache_dir = .*cannot be written"):
        cache_directory(data_of(folder, cache_dir=str(tmp_path / "file" / "c")))


def test_an_index_beside_data_that_became_read_only_is_still_used(rows, tmp_path, monkeypatch):
    tally = tmp_path / "tally"
    build(rows, tally)
    monkeypatch.setattr(
        "polymodal.data.index.cache_directory", lambda data: pytest.fail("looked for a place")
    )
    build(rows, tally)
    assert measured(tally) == 600


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        ("ext4", False),
        ("nfs4", True),
        ("lustre", True),
        ("fuse.sshfs", True),
        ("fuseblk", False),
        ("tmpfs", False),
        ("cifs", True),
        ("overlay", False),
    ],
)
def test_remote_mounts_are_known_by_type(tmp_path, kind, remote):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nx /mnt/my\\040data {kind} rw 0 0\ny /mnt nfs rw 0 0\n")
    assert is_remote(Path("/mnt/my data/set/.polymodal"), str(mounts)) is remote
    assert is_remote(Path("/mnt/my"), str(mounts)) is True
    assert is_remote(Path("/mntx"), str(mounts)) is False
    assert is_remote(Path("/home"), str(tmp_path / "none")) is False
