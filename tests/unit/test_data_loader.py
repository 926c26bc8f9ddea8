"""Steps arrive whole, in order and alike whoever makes them; what goes wrong is one sentence."""

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, pack, padding_sample, without
from polymodal.data import loader
from polymodal.data.index import build_index
from polymodal.data.loader import Loader
from polymodal.data.schedule import Position, Schedule
from polymodal.data.workers import memory_files_work, receive, send
from polymodal.recipe import Data, Train
from polymodal.runtime import host
from tests.unit.data_fakes import VISION, CountingChat, LinesCorpus, write_rows


def loader_of(
    path,
    *,
    batch=4,
    seed=0,
    dp=(0, 1),
    start=Position(),
    stop_after=None,
    edit=None,
    device=None,
    **data,
):
    data = Data(**{"max_length": 64, "workers": 0, **data})
    corpus, chat = LinesCorpus(path), CountingChat(data.max_length, rows=4)
    index = build_index(
        corpus, chat, data.model_copy(update={"cache_dir": str(Path(path).parent)}), progress=lambda *_: None
    )
    if edit:
        write_rows(path, edit)
        corpus = LinesCorpus(path)
    train = Train(seed=seed, global_batch_size=batch, micro_batch_size=2)
    schedule = Schedule(index, corpus.parts, data, train, lambda m: float(m.tokens))
    return Loader(
        schedule,
        corpus,
        chat,
        data,
        dp_rank=dp[0],
        dp_size=dp[1],
        start=start,
        stop_after=stop_after,
        rows=4,
        device=device,
    )


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [{"n": 8 + i % 30, "media": [4] * (i % 3)} for i in range(60)])


def take(loader, count):
    with loader:
        return [step for step, _ in zip(loader, range(count), strict=False)]


def same(a, b):
    assert (a.position, a.next, len(a.micro_batches)) == (b.position, b.next, len(b.micro_batches))
    for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
        assert x.samples == y.samples and x.axes == y.axes and x.tensors.keys() == y.tensors.keys()
        assert x.groups == y.groups and x.streams == y.streams
        assert all(torch.equal(x.tensors[k], y.tensors[k]) for k in x.tensors)
        assert torch.equal(x.segments["text"], y.segments["text"])


def data_processes():
    """They are children of the process that they are forked from."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [p for server in servers for p in server.children() if p.status() != psutil.STATUS_ZOMBIE]


def test_steps_are_the_plan(rows):
    loader = loader_of(rows)
    plan = loader.schedule.batches()
    for step, _ in zip(loader, range(12), strict=False):
        expected = next(plan)
        assert (step.position, step.next) == (expected.position, expected.next)
        assert [b.samples for b in step.micro_batches] == expected.for_rank(0, 1)
        for b in step.micro_batches:
            lengths = torch.tensor([8 + i % 30 for i in b.samples])
            assert b["input_ids"][0].tolist() == [
                i for i, n in zip(b.samples, lengths, strict=True) for _ in range(n)
            ]
            assert b.segments["text"].tolist() == [0, *lengths.cumsum(0).tolist()]
            assert b["position_ids"].shape == (4, 1, lengths.sum())
        ids = [i for b in step.micro_batches for i in b.samples]
        assert step.stats.samples == len(ids) and step.stats.media == sum(i % 3 for i in ids)
        assert (
            step.stats.tokens == step.stats.flops == sum(8 + i % 30 for i in ids)
        )  # the tests' cost is a token
        assert step.stats.trained == sum((b["labels"] != IGNORE).sum() for b in step.micro_batches)
    loader.close()


def test_worker_processes_give_the_same_steps_and_none_is_left(rows):
    here = take(loader_of(rows, seed=3), 30)  # two epochs and more
    assert here[-1].position.epoch >= 1
    loader = loader_of(rows, seed=3, workers=2)
    assert len(data_processes()) == 2
    with loader:
        there = []
        for step, _ in zip(loader, range(30), strict=False):
            there.append(step)
            step.micro_batches[0].tensors["weights"] += 0  # the memory is ours to write
    assert not data_processes() and not multiprocessing.active_children()
    for a, b in zip(here, there, strict=True):
        same(a, b)
    chances = {}  # a sample's randomness: its own, new in every epoch
    for step in here:
        for b in step.micro_batches:
            if "pixel_values" in b.tensors:
                chances.setdefault(step.position.epoch, set()).update(b["pixel_values"][:, 0].tolist())
    assert len(chances[0]) == 40 and not chances[0] & chances[1]
    loader.close()
    assert list(loader) == []


def test_ranks_share_a_batch_and_wait_with_fillers(rows):
    ranks = [take(loader_of(rows, dp=(r, 3)), 6) for r in range(3)]
    plan = loader_of(rows, stop_after=6)
    for steps in zip(*ranks, plan, strict=True):
        *parts, whole = steps
        assert {len(p.micro_batches) for p in parts} == {2}  # four packs on three ranks
        real = [b.samples for p in parts for b in p.micro_batches if b.samples != (-1,)]
        assert sorted(real) == sorted(b.samples for b in whole.micro_batches)
        fillers = [b for p in parts for b in p.micro_batches if b.samples == (-1,)]
        assert len(fillers) == 2 and all(
            b["weights"].sum() == 0 and b["position_ids"].shape[0] == 4 for b in fillers
        )
        assert sum(p.stats.tokens for p in parts) == sum(p.stats.flops for p in parts) == whole.stats.tokens


def test_resume_is_the_identical_continuation(rows):
    whole = take(loader_of(rows), 20)
    for cut in (1, 7, 13):
        resumed = take(loader_of(rows, start=whole[cut - 1].next, stop_after=20 - cut), 99)
        assert len(resumed) == 20 - cut
        for a, b in zip(whole[cut:], resumed, strict=True):
            same(a, b)


def test_a_broken_sample_is_padding_or_the_end(tmp_path, caplog):
    rows = [{"n": 20} for _ in range(12)]
    rows[5]["bad"] = "cat.png is cut short"
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING, "polymodal.data"):
        steps = take(loader_of(path, on_error="skip", batch=2), 6)  # three packs of three, twice an epoch
    broken = [s.stats.broken for s in steps if s.stats.broken]
    assert len(broken) >= 2 and all("line 6: cat.png is cut short" in b[0] for b in broken)
    assert len([r for r in caplog.records if "cat.png" in r.message]) == 1  # said once
    (batch,) = (b for b in steps[0].micro_batches + steps[1].micro_batches if 5 in b.samples)
    place = batch.samples.index(5)
    start, stop = batch.segments["text"][place : place + 2].tolist()
    assert stop - start == 2 and batch["weights"][0, start:stop].sum() == 0
    assert (batch["labels"][0, start:stop] == IGNORE).all()
    loader = loader_of(path, batch=2)
    with pytest.raises(PolymodalError, match="line 6: cat.png is cut short") as error:
        list(loader)
    assert error.value.hint == "Correct the file."
    assert list(loader) == []  # it has ended, and its thread with it
    assert not [t for t in threading.enumerate() if t.name == "polymodal-data"]


@pytest.mark.parametrize("pixels", [True, False])
def test_padding_in_a_packed_batch_has_the_shape_of_the_sample(tmp_path, pixels):
    """What a pipeline stage does with a sample that another one could not read."""
    rows = [{"n": 6, "media": [4]}, {"n": 7, "media": [4, 8]}, {"n": 5}, {"n": 8, "media": [2]}]
    corpus, chat = LinesCorpus(write_rows(tmp_path / "rows.jsonl", rows)), CountingChat(64, rows=4)
    samples = []
    for i in range(4):
        record = corpus[i]
        record.extra["seed"] = i
        samples.append(chat.sample(record, i, pixels))
    made, lost = without(pack(samples), [False, True, False, True])
    padding = [padding_sample(2, 4, i, broken="cat.png") for i in range(4)]
    wanted = pack([samples[0], padding[1], samples[2], padding[3]])
    assert made.tensors.keys() == wanted.tensors.keys() and ("pixel_values" in made.tensors) == pixels
    assert all(torch.equal(made[name], wanted[name]) for name in made.tensors)
    assert torch.equal(made.segments["text"], wanted.segments["text"]) and made.groups == wanted.groups
    assert [(s.measure.tokens, s.measure.trained, len(s.tensors.get("grid_thw", ()))) for s in lost] == [
        (7, 4, 2),
        (8, 4, 1),
    ]
    assert without(made, [False, True, False, False])[1] == [], "padding already"


def test_faults_of_worker_processes_are_reported(tmp_path):
    rows = [{"n": 20} for _ in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    rows[5]["bad"] = "cat.png is cut short"
    with pytest.raises(PolymodalError, match="line 6: cat.png") as error:
        list(loader_of(path, workers=1, edit=rows))
    assert error.value.hint == "Correct the file." and not data_processes()
    rows[5] = {"n": 20, "bug": "divided"}
    with pytest.raises(RuntimeError, match="ZeroDivisionError: divided"):
        list(loader_of(path, workers=1, edit=rows))
    assert not data_processes()


def test_a_killed_worker_is_one_sentence_and_no_hang(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 60, "slow": 0.2} for i in range(200)])
    loader = loader_of(path, workers=2)
    next(loader)
    victim = data_processes()[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(
        PolymodalError,
        match=f"process {victim.pid}. was killed by SIGKILL while it prepared .*rows.jsonl, line",
    ) as error:
        for _ in loader:
            pass
    assert "out of memory" in error.value.hint and "data.workers" in error.value.hint
    assert not data_processes()


def test_a_worker_killed_while_it_waits_is_blamed_on_no_file(rows):
    loader = loader_of(rows, workers=1, prefetch=1, stop_after=3)
    next(loader)
    deadline = time.monotonic() + 30
    while not all(part.future.done() for step in loader._steps for part in step.parts):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (victim,) = data_processes()
    victim.kill()
    victim.wait(30)
    next(loader)  # it was made before
    with pytest.raises(PolymodalError, match=r"process \d+. was killed by SIGKILL\. Most") as error:
        next(loader)
    assert "out of memory" in error.value.hint and not data_processes()


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 60, "slow": 30.0} for _ in range(20)])
    loader = loader_of(path, workers=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(loader)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not data_processes() and list(loader) == []
    assert not [t for t in threading.enumerate() if t.name == "polymodal-data"]


@pytest.mark.slow
def test_a_crash_in_a_decoder_names_the_file(tmp_path):
    rows = [{"n": 60} for _ in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    rows[3]["exit"] = int(signal.SIGSEGV)
    with pytest.raises(
        PolymodalError, match=r"killed by SIGSEGV while it prepared \S*rows.jsonl, line 4\."
    ) as error:
        list(loader_of(path, workers=1, edit=rows))
    assert "decoder" in error.value.hint


ORPHANS = """
import sys, time
from tests.unit.test_data_loader import loader_of, data_processes
if __name__ == "__main__":
    loader = loader_of(sys.argv[1], workers=1)
    next(loader)
    print([p.pid for p in data_processes()], flush=True)
    if sys.argv[2] == "wait":
        time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "exit"])
def test_no_worker_outlives_a_trainer_that_never_closed(rows, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    root = str(Path(__file__).parents[2])
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(rows), "wait" if end == "kill" else "go"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    (pid,) = map(int, trainer.stdout.readline().decode().strip()[1:-1].split(","))
    if end == "kill":
        trainer.kill()
    assert (trainer.wait(60) == 0) == (end == "exit")
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_container_without_shared_memory_is_no_obstacle(rows):
    """/dev/shm of 4 KiB, and steps of several hundred: prepared samples are not passed through it."""
    code = (
        "from tests.unit.test_data_loader import loader_of, take; import sys\n"
        "if __name__ == '__main__': print(len(take(loader_of(sys.argv[1], workers=1), 5)))"
    )
    root = str(Path(__file__).parents[2])
    mount = "mount -t tmpfs -o size=4k none /dev/shm && df /dev/shm | tail -1 >&2 && exec "
    command = ["unshare", "-m", "sh", "-c", mount + '"$@"', "sh", sys.executable, "-c", code, str(rows)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=120
    )
    if "denied" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("no right to mount")
    assert done.stdout.split() == ["5"], done.stderr


def test_little_memory_holds_preparation_back(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 60, "media": [8000]} for _ in range(40)])  # 256 kB each

    def ahead(enough, **data):
        """Bytes prepared and not taken: as soon as they are `enough`, else after a long wait."""
        with loader_of(path, batch=1, prefetch=30, **data) as loader:
            next(loader)
            next(loader)
            deadline = time.monotonic() + 30
            while held(loader) < enough and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)
            return held(loader)

    def held(loader):
        parts = [part for step in loader._steps for part in step.parts]
        return sum(part.bytes for part in parts if part.future and part.future.done())

    assert ahead(25 * 256_000) >= 25 * 256_000  # as many as prefetch says
    assert 256_000 <= ahead(256_000, memory_budget=1) <= 1 << 20
    steps = take(loader_of(path, batch=8, memory_budget=1), 5)  # a step of 2 MB: still comes
    assert [len(s.micro_batches) for s in steps] == [8] * 5


def test_a_file_that_changed_after_it_was_measured(tmp_path):
    rows = [{"n": 20} for _ in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    rows[5]["grown"] = 7
    with pytest.raises(PolymodalError, match="line 6: the sample has 27 tokens, its index says 20"):
        list(loader_of(path, edit=rows))


def test_pieces_of_a_split_record(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 50}, {"n": 150}, {"n": 60}])
    (step,) = take(loader_of(path, overlong="split", batch=9, stop_after=1), 9)
    assert step.stats.tokens == 260 and step.stats.samples == 5
    assert sorted(len(b["input_ids"][0]) for b in step.micro_batches) == [22, 50, 60, 64, 64]


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_through_a_socket(shared):
    if shared and not memory_files_work():
        pytest.skip("no memory files here")
    batch = pack([padding_sample(3, 4, 7), padding_sample(2, 4, 8)])
    batch.tensors |= {
        "pixel_values": torch.randn(5, 3).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.5),
        "strided": torch.arange(6).view(2, 3).T,
    }
    batch.groups = {"pairs": [(0, 1)], "given": ({"frames": torch.arange(6.0).view(2, 3)},)}
    batch.streams = (VISION,)
    ours, theirs = Pipe()
    send(theirs, (batch, "note"), shared)
    back, notes = receive(ours)
    assert (notes, back.samples, back.axes, back.streams) == ("note", (7, 8), batch.axes, (VISION,))
    assert back.groups["pairs"] == [(0, 1)]
    assert torch.equal(back.groups["given"][0]["frames"], torch.arange(6.0).view(2, 3))
    for name, tensor in batch.tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
        back[name].copy_(tensor)  # the memory is ours to write
    assert torch.equal(back.segments["text"], batch.segments["text"])
    send(theirs, PolymodalError("cut short", "Correct it."), shared)
    assert receive(ours).hint == "Correct it."


def test_the_budget_grows_with_the_machine_and_shrinks_with_its_ranks(monkeypatch):
    monkeypatch.setattr(host, "memory", lambda: host.Space("memory", 2048 << 30, 800 << 30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert loader.budget(None) == 800 * 2**30 // 8 // 16 and loader.budget(5) == 5 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert loader.budget(None) == 8 << 30
    monkeypatch.setattr(host, "memory", lambda: None)
    assert loader.budget(None) == 1 << 30


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_batches_for_an_accelerator_are_page_locked(rows):
    device = torch.accelerator.current_accelerator()
    assert device is not None
    for workers in (0, 1):
        (step,) = take(loader_of(rows, workers=workers, device=device), 1)
        assert all(t.is_pinned() for b in step.micro_batches for t in b.tensors.values())


def test_without_memory_files_bytes_go_through_the_socket_with_a_warning(rows, caplog, monkeypatch):
    monkeypatch.setattr("polymodal.data.workers.memory_files_work", lambda: False)
    with caplog.at_level(logging.WARNING, "polymodal.data"):
        there = take(loader_of(rows, workers=1), 4)
    assert [r for r in caplog.records if "anonymous memory files" in r.message]
    for a, b in zip(take(loader_of(rows), 4), there, strict=True):
        same(a, b)


def test_the_real_corpus_and_processor(tmp_path):
    """Rows with pictures, from file to batch: every length that was planned is the length that arrives."""
    from polymodal import recipe
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.source import open_corpus
    from polymodal.models import catalog
    from tests.models import tiny

    for i in range(5):
        tiny.picture(16 + 8 * i, 16 + 8 * (i % 3), i).save(tmp_path / f"{i}.png")
    rows = []
    for i in range(40):
        pictures = [f"{(i + k) % 5}.png" for k in range(i % 3)]
        question = "<image>" * len(pictures) + "What is in this picture? " * (i % 4 + 1)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "It is a three. " * (i % 7 + 1)},
        ]
        rows.append({"messages": messages, "images": pictures})
    rows[7]["images"] = ["absent.png"]
    rows[8]["messages"] *= 9
    rows[8]["images"] *= 9
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = Data(
        datasets=[recipe.Dataset(path=str(path))],
        max_length=256,
        workers=0,
        on_error="skip",
        overlong="split",
    )
    family = catalog.family(recipe.Model(source=str(tiny.checkpoint("qwen2.5-vl", tmp_path / "model"))))
    chat = ChatProcessor(family.media_processor(data), data)
    corpus = open_corpus(data.datasets, data.attr)
    index = build_index(corpus, chat, data, progress=lambda *_: None)
    assert len(index) > 40 and [w for places in index.dropped.values() for w in places] == [f"{path}, line 8"]
    schedule = Schedule(index, corpus.parts, data, Train(global_batch_size=2), family.cost)
    seen = []
    with Loader(
        schedule, corpus, chat, data, rows=chat.media.rows, stop_after=schedule.steps_in_epoch()
    ) as loader:
        for step in loader:
            assert not step.stats.broken and step.stats.flops > 0
            for b in step.micro_batches:
                ids = list(b.samples)
                seen += ids
                assert b["input_ids"].shape[1] == index.tokens[ids].sum() <= 256
                assert (b["labels"] != IGNORE).sum() == index.trained[ids].sum()
                assert len(b.tensors.get("pixel_values", ())) == index.media["vision"][ids].sum()
                assert b["position_ids"].shape[0] == 4
    assert sorted(seen) == [i for i in range(len(index)) if index.usable[i]]


def test_data_that_change_under_a_run_are_named_with_the_row_that_broke(rows, monkeypatch, caplog):
    monkeypatch.setattr("polymodal.data.loader.LOOK_SECONDS", 0.0)
    with loader_of(rows) as loader:
        next(loader)
        assert not caplog.records
        loader.corpus.changed = lambda: {"a.jsonl": "removed", "b.jsonl": "changed"}
        next(loader), next(loader)
        [record] = caplog.records
        assert "While it is trained on, a.jsonl was removed, b.jsonl was changed:" in record.getMessage()
        loader.corpus.lines = ["{"] * 60
        with pytest.raises(
            PolymodalError, match="not valid JSON. Since the run began, a.jsonl was removed"
        ) as error:
            while True:
                next(loader)
    assert "Put the data back as they were" in error.value.hint
