"""The plan of a run: every sample once, nothing over the budget, the same at any world size and after any resume."""

import itertools
import json
import tracemalloc
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymodal.core.errors import PolymodalError
from polymodal.data.packing import cut_to_multiple, first_fit_decreasing, next_fit
from polymodal.data.permute import permute
from polymodal.data.schedule import GlobalBatch, Position, Schedule
from polymodal.recipe import Data, Train

slow_machine = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def lengths_of(count, seed=0, low=1, high=256):
    """Log-normal lengths, cut to low..high."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(high / 8), 1.0, count), low, high).astype(np.int32)


def index_of(tokens, usable=None):
    tokens = np.asarray(tokens, dtype=np.int32)
    usable = np.ones(len(tokens), dtype=bool) if usable is None else np.asarray(usable, dtype=bool)
    return SimpleNamespace(
        tokens=tokens, usable=usable, record=None, measure=lambda i: SimpleNamespace(tokens=int(tokens[i]))
    )


def part(start, stop, weight=None, repeat=1.0, name="a"):
    return SimpleNamespace(
        name=name, start=start, stop=stop, weight=weight, repeat=repeat, fingerprint=f"{name}{start}"
    )


def cost(measure):
    return measure.tokens * 10.0 + measure.tokens**2


def schedule_of(index, parts=None, *, seed=0, batch=4, micro=1, **data):
    data = {"max_length": 256, **data}
    train = Train(seed=seed, global_batch_size=batch, micro_batch_size=micro)
    return Schedule(index, parts or [part(0, len(index.tokens))], Data(**data), train, cost)


def ids(batches):
    return [i for b in batches for pack in b.packs for i in pack]


def epoch_of(schedule, epoch=0):
    return list(schedule.batches(Position(epoch, 0, 0), epochs=epoch + 1))


recipes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 9),
        "micro": st.integers(1, 4),
        "pack": st.booleans(),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 5),
        "window": st.sampled_from([1, 50, 300, 65536]),
        "pack_length": st.sampled_from([256, 700]),
    }
)


@slow_machine
@given(
    count=st.integers(1, 900), holes=st.sampled_from([0.0, 0.1, 0.8]), recipe=recipes, epoch=st.integers(0, 2)
)
def test_every_usable_sample_once_an_epoch_and_no_pack_over_the_budget(count, holes, recipe, epoch):
    tokens = lengths_of(count, seed=count)
    usable = np.random.default_rng(count).random(count) >= holes
    usable[count // 2] = True
    schedule = schedule_of(index_of(tokens, usable), **recipe)
    batches = epoch_of(schedule, epoch)
    assert sorted(ids(batches)) == np.flatnonzero(usable).tolist()
    if not recipe["shuffle"]:
        assert ids(batches) == np.flatnonzero(usable).tolist()
    assert len(batches) == schedule.steps_in_epoch(epoch)
    for b in batches:
        assert all(b.packs) and b.cost == tuple(
            sum(cost(SimpleNamespace(tokens=int(tokens[i]))) for i in p) for p in b.packs
        )
        if recipe["pack"]:
            assert all(tokens[list(p)].sum() <= recipe["pack_length"] for p in b.packs)
            assert len(b.packs) <= recipe["batch"]
        else:
            assert all(len(p) <= recipe["micro"] for p in b.packs)
            assert sum(map(len, b.packs)) <= recipe["batch"]
    short = [
        b
        for b in batches
        if (len if recipe["pack"] else lambda p: sum(map(len, p)))(b.packs) < recipe["batch"]
    ]
    if recipe[
        "pack"
    ]:  # packs are cut until batches are whole: short ones only when all packs are single samples
        assert not short or all(len(p) == 1 for b in batches for p in b.packs)
    else:
        assert short in ([], [batches[-1]])


@slow_machine
@given(count=st.integers(1, 300), recipe=recipes, dp_size=st.sampled_from([1, 2, 3, 4, 8]))
def test_the_union_over_ranks_is_the_batch_at_any_world_size(count, recipe, dp_size):
    for b in itertools.islice(schedule_of(index_of(lengths_of(count)), **recipe).batches(), 6):
        ranks = [b.for_rank(r, dp_size) for r in range(dp_size)]
        assert {len(r) for r in ranks} == {-(-len(b.packs) // dp_size)}
        assert Counter(p for r in ranks for p in r if p) == Counter(b.packs)
        fillers = [step for r in ranks for step, p in enumerate(r) if not p]
        assert len(fillers) == -len(b.packs) % dp_size
        assert set(fillers) <= {len(ranks[0]) - 1}  # the last micro-step's
        assert ranks == [b.for_rank(r, dp_size) for r in range(dp_size)]


@slow_machine
@given(count=st.integers(1, 900), recipe=recipes, stop=st.integers(0, 400))
def test_resuming_anywhere_is_the_identical_continuation(count, recipe, stop):
    tokens = lengths_of(count)
    whole = list(itertools.islice(schedule_of(index_of(tokens), **recipe).batches(), stop + 20))
    position = whole[stop].position
    position = Position(**json.loads(json.dumps(asdict(position))))
    if stop:
        assert whole[stop - 1].next == position
    resumed = list(itertools.islice(schedule_of(index_of(tokens), **recipe).batches(position), 20))
    assert resumed == whole[stop:]


def test_windows_are_planned_alone_and_resume_crosses_them():
    schedule = schedule_of(index_of(lengths_of(3000)), window=400)
    assert schedule.windows > 3
    whole = list(schedule.batches(epochs=2))
    assert {b.position.window for b in whole} == set(range(schedule.windows))
    for i in range(0, len(whole), 37):
        assert (
            list(schedule_of(index_of(lengths_of(3000)), window=400).batches(whole[i].position, epochs=2))
            == whole[i:]
        )


def test_seed_and_epoch_change_the_order_and_nothing_else():
    tokens = lengths_of(500)
    one, two = (epoch_of(schedule_of(index_of(tokens), seed=s)) for s in (1, 2))
    assert ids(one) != ids(two) and sorted(ids(one)) == sorted(ids(two))
    later = epoch_of(schedule_of(index_of(tokens), seed=1), 1)
    assert ids(one) != ids(later) and sorted(ids(one)) == sorted(ids(later))


def test_samples_meet_new_neighbours_in_every_epoch():
    tokens = lengths_of(300, low=8, high=4096)
    schedule = schedule_of(index_of(tokens), max_length=4096)
    one, two = (
        {p for b in epoch_of(schedule, e) for p in map(frozenset, b.packs) if len(p) > 1} for e in (0, 1)
    )
    assert len(one & two) < 0.3 * len(one)


def test_the_plan_is_the_same_on_every_machine():
    """A digest from the machine this was written on: a change here changes the data order of every resumed run."""
    schedule = schedule_of(index_of(np.arange(1, 201)), batch=3)
    first = next(schedule.batches(Position(1, 0, 2)))
    assert first.packs == PINNED


def test_shares_of_weighted_datasets():
    tokens = np.full(1300, 16)
    parts = [
        part(0, 1000, weight=1, name="large"),
        part(1000, 1100, weight=3, name="small"),
        part(1100, 1300, name="all"),
    ]
    schedule = schedule_of(index_of(tokens), parts, seed=3)
    assert [tuple(s) for s in schedule.shares] == [
        ("large", 1000, 1000),
        ("small", 100, 3000),
        ("all", 200, 200),
    ]
    use = Counter(ids(epoch_of(schedule)))
    assert all(use[i] == 1 for i in range(1000)) and all(use[i] == 1 for i in range(1100, 1300))
    assert all(use[i] == 30 for i in range(1000, 1100))
    early = ids(itertools.islice(schedule.batches(), 20))  # 20 batches x 4 packs x 16 samples
    assert 0.64 < np.mean([1000 <= i < 1100 for i in early]) < 0.79  # 3000 of 4200


def test_a_dataset_larger_than_its_share_goes_on_where_the_last_epoch_ended():
    parts = [part(0, 100, weight=1, name="a"), part(100, 1000, weight=1, name="b")]
    usable = np.ones(1000, dtype=bool)
    usable[100:400:3] = False
    schedule = schedule_of(index_of(np.full(1000, 16), usable), parts)
    assert [s.draws for s in schedule.shares] == [800, 800]
    use = Counter(ids(b for e in range(3) for b in epoch_of(schedule, e)))
    assert {use[i] for i in range(100)} == {24}
    assert {use[i] for i in range(100, 1000) if usable[i]} == {3}
    parts[1] = part(
        100, 1000, weight=0.4, name="b"
    )  # 800 usable at 0.4 -> scale 2000: a gives 2000, b gives 800
    parts[0] = part(
        0, 100, weight=1, repeat=30, name="a"
    )  # scale 3000: a gives 3000, b 1200: one and a half passes
    schedule = schedule_of(index_of(np.full(1000, 16), usable), parts)
    assert [s.draws for s in schedule.shares] == [3000, 1200]
    use = Counter(ids(epoch_of(schedule)))
    assert {use[i] for i in range(100, 1000) if usable[i]} == {1, 2}
    use += Counter(ids(epoch_of(schedule, 1)))
    assert {use[i] for i in range(100, 1000) if usable[i]} == {3}


@pytest.mark.parametrize("shuffle", [True, False])
def test_repeat_and_its_fixed_fraction(shuffle):
    tokens = np.full(400, 16)
    schedule = schedule_of(index_of(tokens), [part(0, 400, repeat=0.25)], shuffle=shuffle)
    first, second = (ids(epoch_of(schedule, e)) for e in (0, 1))
    assert len(first) == 100 == len(set(first)) and set(first) == set(second)
    assert {i // 4 for i in first} == set(range(100))  # one row of every four
    assert set(first) != set(range(0, 400, 4))
    if not shuffle:
        assert first == sorted(first)
    use = Counter(ids(epoch_of(schedule_of(index_of(tokens), [part(0, 400, repeat=2.5)], shuffle=shuffle))))
    assert Counter(use.values()) == {2: 200, 3: 200}


def test_split_records_stay_in_their_dataset():
    index = index_of(np.full(6, 16))
    index.record = np.array([0, 0, 0, 1, 2, 2])  # parts count records, record 0 has three pieces
    schedule = schedule_of(index, [part(0, 1, weight=1, name="a"), part(1, 3, weight=1, name="b")])
    assert [s.usable for s in schedule.shares] == [3, 3]


def test_batches_of_a_window_are_whole_by_cutting_the_fullest_packs():
    cuts = cut_to_multiple(np.full(20, 10), np.array([0, 9, 10, 20]), 5)
    assert cuts.tolist() == [0, 4, 9, 10, 15, 20] or cuts.tolist() == [0, 5, 9, 10, 15, 20]
    assert cut_to_multiple(np.array([5, 5]), np.array([0, 2]), 4).tolist() == [0, 1, 2]  # no more to cut
    batches = epoch_of(schedule_of(index_of(np.full(100, 25)), batch=8))  # 10 to a pack: 10 packs
    assert [len(b.packs) for b in batches] == [8, 8]


@pytest.mark.parametrize("pack", [True, False])
def test_fewer_samples_than_a_batch(pack):
    batches = epoch_of(schedule_of(index_of([10, 200, 250]), batch=16, pack=pack))
    assert len(batches) == 1 and sorted(ids(batches)) == [0, 1, 2]
    assert batches[0].next == Position(1, 0, 0)


def test_first_fit_decreasing_is_first_fit_and_close_to_full():
    lengths = lengths_of(400, 3)
    order, cuts = first_fit_decreasing(lengths, 256)
    room, content = [], []
    for i in np.argsort(-lengths.astype(int), kind="stable").tolist():  # by the book
        b = next((b for b, left in enumerate(room) if left >= lengths[i]), len(room))
        if b == len(room):
            room.append(256)
            content.append([])
        room[b] -= lengths[i]
        content[b].append(i)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(cuts)] == content
    big = np.clip(np.random.default_rng(0).lognormal(6, 1, 65536), 8, 4096).astype(np.int32)
    _, cuts = first_fit_decreasing(big, 4096)
    assert big.sum() / 4096 / (len(cuts) - 1) > 0.99
    assert next_fit(np.array([3, 3, 3, 4, 6, 1]), 6).tolist() == [0, 2, 3, 4, 5, 6]


def test_permute_is_a_bijection_and_looks_random():
    for size in (1, 2, 3, 7, 64, 1000, 4097):
        assert sorted(permute(np.arange(size, dtype=np.uint64), size, 9).tolist()) == list(range(size))
    seen = Counter(tuple(permute(np.arange(4, dtype=np.uint64), 4, k).tolist()) for k in range(4800))
    assert len(seen) == 24 and min(seen.values()) > 120 and max(seen.values()) < 280  # 200 each
    x = permute(np.arange(100_000, dtype=np.uint64), 100_000, 1).astype(float)
    assert (
        abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02 and abs(np.corrcoef(x, np.arange(100_000))[0, 1]) < 0.02
    )


def test_micro_steps_hold_packs_of_like_cost():
    costs = np.random.default_rng(0).lognormal(0, 0.7, 64)
    b = GlobalBatch(Position(), Position(), tuple((i,) for i in range(64)), tuple(costs))
    ranks = [b.for_rank(r, 8) for r in range(8)]
    table = np.array([[costs[p[0]] for p in r] for r in ranks])  # [rank, micro-step]
    waiting = table.max(0).sum() / table.sum() * 8
    dealt = costs.reshape(8, 8).max(0).sum() / costs.sum() * 8  # packs as they come
    assert waiting < 1.2 < dealt
    assert table.sum(1).max() / table.sum(1).mean() < 1.1


def test_memory_does_not_grow_with_the_data():
    def peak(count):
        index = index_of(np.full(count, 100), np.arange(count) % 50 != 0)
        tracemalloc.start()
        next(schedule_of(index, window=8192).batches())
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(30_000), peak(3_000_000)
    assert large < 1.5 * small + 8 * 3_000_000 * 0.02 + (1 << 18)  # the list of the 2 % that are unusable


def test_what_cannot_be_planned_is_said():
    with pytest.raises(PolymodalError, match="No sample"):
        schedule_of(index_of([5, 5], [False, False]))
    with pytest.raises(PolymodalError, match="data.pack_length = 100 is smaller than data.max_length = 256"):
        schedule_of(index_of([5, 5]), pack_length=100)
    with pytest.raises(PolymodalError, match="window 7"):
        next(schedule_of(index_of([5, 5])).batches(Position(0, 7, 0)))


def test_lengths_tell_plans_apart_where_they_decide_them():
    tokens, usable = lengths_of(300), np.arange(300) % 7 != 0
    longer = tokens + (np.arange(300) == 150)
    other = np.roll(usable, 1)
    other[0] = usable[0]
    for pack in (True, False):
        first = schedule_of(index_of(tokens, usable), pack=pack)
        same = schedule_of(index_of(tokens.copy(), usable.copy()), pack=pack)
        assert first.lengths == same.lengths
        assert (schedule_of(index_of(longer, usable), pack=pack).lengths == first.lengths) is not pack
        assert schedule_of(index_of(tokens, other), pack=pack).lengths != first.lengths


def test_the_fingerprint_tells_plans_apart():
    tokens = lengths_of(300)
    same = [schedule_of(index_of(tokens)).fingerprint for _ in range(2)]
    assert same[0] == same[1]
    others = [
        schedule_of(index_of(tokens), seed=1),
        schedule_of(index_of(tokens), batch=5),
        schedule_of(index_of(tokens), [part(0, 300, repeat=2.0)]),
    ]
    assert len({same[0], *(s.fingerprint for s in others)}) == 4


PINNED = ((136, 118), (126, 52, 49, 25), (145, 107))
