"""The Megatron-style tree: which tensor lies in which file under which name, for any TP, PP, virtual PP and EP.

`place` is the one description; reading a tree asks it where everything would be and turns the answer round. File
names, the tracker and the renumbering of layers and experts are here. Sees table.py, source.py and reading.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polymodal.convert.operations import WHOLE, Facts, Shape
from polymodal.convert.reading import iterate, torch_file
from polymodal.convert.reading import place as place_of
from polymodal.convert.source import Copy, Flat, Mapped, Place, invert
from polymodal.convert.table import Row, Table, Tower, fill, match
from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Stored

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
RELEASE = "release"
VERSION = 3.0
RANK = re.compile(r"mp_rank_(\d\d+)(?:_(\d{3,}))?(?:_(\d{3,}))?\Z")
Layers = tuple[tuple[int, ...], ...]
"""Layers on each stage: [virtual stage][pipeline rank]."""


@dataclass(frozen=True)
class Parallel:
    """How a tree is cut. layers: tower -> Layers (absent: all on one stage); tower_tp: tower -> its own TP size."""

    tp: int = 1
    ep: int = 1
    layers: Mapping[str, Layers] = field(default_factory=dict)
    tower_tp: Mapping[str, int] = field(default_factory=dict)

    @property
    def pp(self) -> int:
        return max((len(one[0]) for one in self.layers.values()), default=1)

    @property
    def vpp(self) -> int:
        return max((len(one) for one in self.layers.values()), default=1)

    @property
    def files(self) -> int:
        return max([self.tp, *self.tower_tp.values()])

    def __str__(self) -> str:
        lists = "".join(f", {name} {shown(one)}" for name, one in self.layers.items())
        own = "".join(f", {name} TP {size}" for name, size in self.tower_tp.items() if size != self.tp)
        return (
            f"TP {self.tp}{own}, EP {self.ep}, PP {self.pp}"
            + (f" x VPP {self.vpp}" if self.vpp > 1 else "")
            + lists
        )


def shown(layers: Layers) -> str:
    """Layer counts as people write them: flat without virtual stages."""
    lists = [list(one) for one in layers]
    return str(lists[0] if len(lists) == 1 else lists).replace(" ", "")


def counts(option: str, value: Sequence | None) -> Layers | None:
    """Layer counts from a flat or a nested list; None for an empty one."""
    if not value:
        return None
    nested = [list(one) if isinstance(one, (list, tuple)) else None for one in value]
    rows = [[int(v) for v in value]] if nested[0] is None else nested
    if any(one is None for one in rows) or (nested[0] is None and any(one is not None for one in nested)):
        raise PolymodalError(f"{option} mixes numbers and lists: {value}.", "Write [6,10] or [[3,5],[3,5]].")
    if len({len(one) for one in rows}) != 1 or any(n < 0 for one in rows for n in one):
        raise PolymodalError(
            f"{option} = {value}: every inner list stands for one virtual stage and has one number a pipeline rank.",
            "Give lists of one length.",
        )
    return tuple(tuple(one) for one in rows)


def check(parallel: Parallel, table: Table, facts: Facts, option: str = "{}_pp_layers") -> None:
    """Raises PolymodalError for what cannot be cut so: layer counts, groups, experts, sizes that do not fit together."""
    for tower in table.towers:
        layers, total = parallel.layers.get(tower.name), facts.get(tower.count)
        if layers is not None and total is not None and sum(map(sum, layers)) != total:
            raise PolymodalError(
                f"{option.format(tower.name)} {shown(layers)} adds up to {sum(map(sum, layers))} layers, the model has {total}.",
                f"Give numbers that add up to {total}.",
            )
    sizes = {name: (len(one), len(one[0])) for name, one in parallel.layers.items()}
    for name, (virtual, stages) in sizes.items():
        if virtual != parallel.vpp or parallel.pp % stages:
            raise PolymodalError(
                f"{option.format(name)} {shown(parallel.layers[name])} has {virtual} x {stages} stages, the largest list {parallel.vpp} x {parallel.pp}.",
                "Give every list as many inner lists, of a length that divides the longest.",
            )
    if parallel.pp > 1 and not table.pipeline:
        raise PolymodalError("This model's trees have no pipeline stages.", "Leave pp_layers out.")
    if parallel.files > 1 and not table.tensor_parallel:
        raise PolymodalError("This model's trees are not cut over TP.", "Set tp_size to 1.")
    for name, size in (
        ("tp_size", parallel.tp),
        *((f"{n}_tp_size", s) for n, s in parallel.tower_tp.items()),
    ):
        if parallel.files % size:
            raise PolymodalError(
                f"{name} {size} does not divide the largest TP size, {parallel.files}.",
                "Choose divisors of it.",
            )
    groups = facts.get("kv_heads", 0)
    if groups % parallel.tp:
        fits = [n for n in range(1, groups + 1) if groups % n == 0]
        raise PolymodalError(
            f"tp_size {parallel.tp} does not divide the {groups} key-value heads.",
            f"It may be {', '.join(map(str, fits))}.",
        )
    experts = facts.get("experts", 0)
    if parallel.ep > 1 and (experts == 0 or experts % parallel.ep):
        raise PolymodalError(
            f"ep_size {parallel.ep} does not divide the {experts} experts."
            if experts
            else f"ep_size is {parallel.ep}, but the model has no experts.",
            "Choose a divisor of it." if experts else "Set ep_size to 1.",
        )


# ------------------------------------------------------------------------------------------------------ where things go


def directory(parallel: Parallel, tp: int, pp: int, ep: int) -> str:
    """Name of a rank's directory."""
    stage = f"_{pp:03d}" if parallel.pp > 1 else ""
    expert = f"_{ep:03d}" if parallel.ep > 1 else ""
    return f"mp_rank_{tp:02d}{stage}{expert}"


def slot(parallel: Parallel, virtual: int) -> str:
    return f"model{virtual}" if parallel.vpp > 1 else "model"


def tower_of(table: Table, key: str) -> Tower | None:
    """The tower whose TP size rules a tensor."""
    return next((tower for tower in table.towers if tower.prefix and key.startswith(tower.prefix)), None)


def row_of(table: Table, key: str) -> tuple[Row, int, dict[str, str]] | None:
    for one in table.rows:
        for position, pattern in enumerate(one.other):
            values = match(pattern, key)
            if values is not None:
                return one, position, values
    return None


def _stages(table: Table, parallel: Parallel, key: str) -> Iterator[tuple[int, int, str]]:
    """(virtual stage, pipeline rank, name there) of everywhere a tensor lies."""
    everything = [(v, p) for v in range(parallel.vpp) for p in range(parallel.pp)]
    if len(everything) == 1:
        yield 0, 0, key
        return
    for tower in table.towers:
        layers = parallel.layers.get(tower.name)
        if layers is None:
            continue
        flat = [n for one in layers for n in one]
        used = [at for at, n in enumerate(flat) if n]
        local = key
        if key.startswith(tower.layers):
            number, rest = re.match(r"(\d+)(.*)\Z", key[len(tower.layers) :]).groups()  # type: ignore[union-attr]
            ends = [sum(flat[: at + 1]) for at in range(len(flat))]
            stage = next((at for at, end in enumerate(ends) if int(number) < end), None)
            if stage is None:
                raise PolymodalError(
                    f"{key} is beyond the {ends[-1]} layers of the list {shown(layers)}.", "Give all layers."
                )
            local = f"{tower.layers}{int(number) - (ends[stage] - flat[stage])}{rest}"
        elif key.startswith(tower.first):
            stage = used[0]
        elif key.startswith(tower.last):
            stage = used[-1]
        else:
            continue
        virtual, rank = divmod(stage, len(layers[0]))
        for v, p in everything:
            if v == virtual and p % len(layers[0]) == rank:
                yield v, p, local
        return
    if not key.startswith(table.everywhere):
        raise PolymodalError(
            f"The table does not say which pipeline stage holds {key}.", "This is a defect: please report it."
        )
    for v, p in everything:
        yield v, p, key


Files = dict[str, dict[str, dict[str, Stored]]]
"""Rank directory -> slot ("model", "model0") -> tensor name there -> its boxes of the whole tensors."""


def place(table: Table, shapes: Mapping[str, Shape], parallel: Parallel, facts: Facts) -> Files:
    """Where every part of the whole tensors (key -> shape) lies in a tree cut so."""
    experts = facts.get("experts", 0) // parallel.ep if parallel.ep > 1 else 0
    out: Files = {
        directory(parallel, t, p, e): {slot(parallel, v): {} for v in range(parallel.vpp)}
        for t in range(parallel.files)
        for p in range(parallel.pp)
        for e in range(parallel.ep)
    }
    for key, shape in shapes.items():
        found = row_of(table, key)
        cut = found[0].cut_of(found[1]) if found else WHOLE
        tower = tower_of(table, key)
        size = parallel.tower_tp.get(tower.name, parallel.tp) if tower else parallel.tp
        stored = Stored.whole(key, shape)
        shards = cut.apply(stored, size, facts, key) if cut is not WHOLE and size > 1 else [stored] * size
        for virtual, stage, local in _stages(table, parallel, key):
            ranks: Sequence[int] = range(parallel.ep)
            values = match(found[0].other[found[1]], local) if found and experts else None
            if values and "e" in values and found:
                expert = int(values["e"])
                ranks = [expert // experts]
                local = fill(found[0].other[found[1]], {**values, "e": str(expert % experts)})
            for e in ranks:
                for t in range(parallel.files):
                    out[directory(parallel, t, stage, e)][slot(parallel, virtual)][local] = shards[t % size]
    return out


# --------------------------------------------------------------------------------------------------------- reading


@dataclass
class Tree:
    """A tree on disk as whole tensors. source: them; copies: what lies there more than once."""

    directory: Path
    parallel: Parallel
    flat: Flat
    source: Mapped
    copies: list[Copy]


def iteration(root: Path) -> Path:
    """The directory with the ranks: root itself, or what its tracker points at."""
    if not root.is_dir():
        raise PolymodalError(f"{root} is not a directory.", "Give a tree, or one of its iterations.")
    if any(RANK.match(one.name) for one in root.iterdir()):
        return root
    tracker = root / TRACKER
    if not tracker.is_file():
        raise PolymodalError(
            f"{root} is not a tree: it has neither {TRACKER} nor mp_rank_* directories.",
            "Give the directory that holds the tracker, or an iteration.",
        )
    text = tracker.read_text().strip()
    if text != RELEASE and not text.isdigit():
        raise PolymodalError(
            f"{tracker} says {text!r}: neither `release` nor a step.", "Put the step's number there."
        )
    found = root / (text if text == RELEASE else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise PolymodalError(
            f"{tracker} points at {found.name}, which is not there.", "Copy it, or correct the tracker."
        )
    return found


def is_tree(root: Path) -> bool:
    """Whether a directory is a tree or an iteration of one."""
    try:
        return any(RANK.match(one.name) for one in iteration(root).iterdir())
    except PolymodalError:
        return False


Tensors = dict[str, dict[str, Place]]
"""Slot -> tensor name -> where it lies."""


def open_files(where: Path, allow_pickle: bool = False) -> dict[tuple[int, ...], Tensors]:
    """The files of an iteration by the numbers in their directories' names."""
    found: dict[tuple[int, ...], Tensors] = {}
    for one in sorted(where.iterdir()):
        named = RANK.match(one.name)
        if named is None:
            continue
        path = one / FILE
        if not path.is_file():
            raise PolymodalError(f"{path} is missing.", "Copy the whole tree.")
        table = torch_file(path, allow_pickle)
        slots = {
            key: value
            for key, value in table.items()
            if re.fullmatch(r"model\d*", str(key)) and isinstance(value, dict)
        }
        if not slots:
            raise PolymodalError(
                f"{path} holds no `model` (only {', '.join(map(str, list(table)[:4]))}).",
                "Is it a checkpoint of the training?",
            )
        found[tuple(int(n) for n in named.groups() if n is not None)] = {
            name: {key: place_of(path, value) for key, value in iterate(held)} for name, held in slots.items()
        }
    lengths = {len(key) for key in found}
    if len(lengths) != 1:
        raise PolymodalError(
            f"{where} mixes rank directories of several layouts.", "Remove those of the other save."
        )
    sizes = [len({key[at] for key in found}) for at in range(lengths.pop())]
    expected = 1
    for size in sizes:
        expected *= size
    highest = [max(key[at] for key in found) + 1 for at in range(len(sizes))]
    if expected != len(found) or highest != sizes:
        raise PolymodalError(
            f"{where} has {len(found)} rank directories, whose numbers ask for {' x '.join(map(str, highest))}.",
            "Copy the missing ones.",
        )
    return found


def read(
    table: Table, root: Path, facts: Facts, given: Parallel | None = None, allow_pickle: bool = False
) -> Tree:
    """Open a tree. given: how it is said to be cut (checked); None: recognised.

    Raises PolymodalError for files that are missing, keys that are unknown or left over, and a tree that is cut
    otherwise than it was said to be.
    """
    where = iteration(root)
    files = open_files(where, allow_pickle)
    parallel = recognise(table, files, facts, where, given)
    ranks = _ranks(files, parallel)
    shapes = _wholes(table, ranks, parallel, facts, where)
    if table.tie and table.tie[0] in shapes and table.tie[1] not in shapes:
        raise PolymodalError(f"{where}: {table.tie[1]} is missing.", "Copy the whole tree.")
    placed = place(table, shapes, parallel, table.seen(facts, shapes))
    layout: dict[str, Stored] = {}
    places: dict[str, Place] = {}
    for (t, p, e), slots in ranks.items():
        name = directory(parallel, t, p, e)
        for number, (held_name, held) in enumerate(sorted(slots.items())):
            wanted = placed[name][slot(parallel, number)]
            odd = sorted(held.keys() ^ wanted.keys())
            if odd:
                here = odd[0] in held
                raise PolymodalError(
                    f"{where / name / FILE} {'has' if here else 'lacks'} {odd[0]}, which its layout ({parallel}) {'does not expect' if here else 'expects'}.",
                    "The tree is of another model, or not whole.",
                )
            for key, spot in held.items():
                label = f"{name}/{held_name}:{key}"
                if tuple(wanted[key].shape) != spot.shape:
                    raise PolymodalError(
                        f"{where / name / FILE}: {key} is {list(spot.shape)}, its layout ({parallel}) says {list(wanted[key].shape)}.",
                        "Give the layout that the tree was made with.",
                    )
                layout[label], places[label] = wanted[key], spot
    inverse, copies = invert(layout, shapes)
    flat = Flat(places)
    return Tree(where, parallel, flat, Mapped(flat, inverse), copies)


def _ranks(files: dict[tuple[int, ...], Tensors], parallel: Parallel) -> dict[tuple[int, int, int], Tensors]:
    def full(key: tuple[int, ...]) -> tuple[int, int, int]:
        if len(key) == 3:
            return key  # type: ignore[return-value]
        if len(key) == 1:
            return key[0], 0, 0
        return (key[0], key[1], 0) if parallel.ep == 1 else (key[0], 0, key[1])

    return {full(key): slots for key, slots in files.items()}


def _layer(tower: Tower, key: str) -> int | None:
    if not key.startswith(tower.layers):
        return None
    found = re.match(r"\d+", key[len(tower.layers) :])
    return int(found[0]) if found else None


def recognise(
    table: Table,
    files: dict[tuple[int, ...], Tensors],
    facts: Facts,
    where: Path,
    given: Parallel | None = None,
) -> Parallel:
    """How a tree is cut, from its names and what lies where."""
    sample = next(iter(files))
    second = len({key[1] for key in files}) if len(sample) > 1 else 1
    ep = len({key[2] for key in files}) if len(sample) == 3 else 1
    if len(sample) == 2 and second > 1:
        keys = [set().union(*slots.values()) for key, slots in sorted(files.items()) if key[0] == 0]
        if facts.get("experts") and all(one == keys[0] for one in keys):
            ep, second = second, 1
    slots = sorted(files[sample], key=lambda name: int(name[5:] or 0))
    layers: dict[str, Layers] = {}
    for tower in table.towers:
        stages, starts = [], []
        for number, name in enumerate(slots):
            for p in range(second):
                held = files[(0, p, 0)[: len(sample)]] if ep == 1 or len(sample) == 3 else files[(0, 0)]
                found = {n for key in held[name] if (n := _layer(tower, key)) is not None}
                stages.append(len(found))
                starts += [(number, p)] if any(key.startswith(tower.first) for key in held[name]) else []
        repeats = sorted({p for v, p in starts if v == starts[0][0]}) if starts and tower.first else []
        width = repeats[1] - repeats[0] if len(repeats) > 1 else second
        if sum(stages):
            layers[tower.name] = tuple(
                tuple(stages[v * second : v * second + width]) for v in range(len(slots))
            )
    own = dict(given.tower_tp) if given else {}
    tp = given.tp if given and own else len({key[0] for key in files})
    parallel = Parallel(tp, ep, layers, own)
    if given is not None:
        _agree(given, parallel, where)
    return parallel


def _agree(given: Parallel, found: Parallel, where: Path) -> None:
    if (given.files, given.ep) != (found.files, found.ep):
        raise PolymodalError(
            f"{where} is cut to {found}, not to {given}.", "Give the sizes that it was made with."
        )
    for name, layers in given.layers.items():
        if name in found.layers and found.layers[name] != layers:
            raise PolymodalError(
                f"{where}: {name}_pp_layers is {shown(found.layers[name])} in the tree, {shown(layers)} in the command.",
                "Give the list that it was made with.",
            )


def _wholes(
    table: Table, ranks: dict[tuple[int, int, int], Tensors], parallel: Parallel, facts: Facts, where: Path
) -> dict[str, Shape]:
    """The shape of every whole tensor, under its name without stages."""
    shards: dict[str, dict[int, Shape]] = defaultdict(dict)
    experts = facts.get("experts", 0) // parallel.ep if parallel.ep > 1 else 0
    for (t, p, e), slots in ranks.items():
        for number, (_, held) in enumerate(sorted(slots.items())):
            for key, spot in held.items():
                shards[_global(table, parallel, key, number, p, e, experts)].setdefault(t, spot.shape)
    out: dict[str, Shape] = {}
    for key, parts in shards.items():
        found = row_of(table, key)
        cut = found[0].cut_of(found[1]) if found else WHOLE
        tower = tower_of(table, key)
        size = parallel.tower_tp.get(tower.name, parallel.tp) if tower else parallel.tp
        out[key] = cut.whole([parts[t] for t in range(size) if t in parts])
    return out


def _global(
    table: Table, parallel: Parallel, key: str, virtual: int, stage: int, ep: int, experts: int
) -> str:
    for tower in table.towers:
        number, layers = _layer(tower, key), parallel.layers.get(tower.name)
        if number is not None and layers is not None:
            flat = [n for one in layers for n in one]
            at = virtual * len(layers[0]) + stage % len(layers[0])
            rest = key[len(tower.layers) + len(str(number)) :]
            key = f"{tower.layers}{number + sum(flat[:at])}{rest}"
            break
    if experts:
        found = row_of(table, key)
        if found and "e" in found[2]:
            key = fill(found[0].other[found[1]], {**found[2], "e": str(int(found[2]["e"]) + ep * experts)})
    return key


def one_stage(table: Table, facts: Facts) -> dict[str, Layers]:
    """Every tower whole on one stage."""
    return {tower.name: ((facts[tower.count],),) for tower in table.towers if facts.get(tower.count)}
