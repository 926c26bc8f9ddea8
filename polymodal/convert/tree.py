"""The Megatron-style tree: which file holds which tensor under which name, for any TP, PP, virtual PP and
EP.

`place` is the one description; reading a tree asks it where everything would be and inverts the answer. File
names, the tracker and the renumbering of layers and experts are here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from polymodal.convert import reading
from polymodal.convert.operations import Facts, Shape
from polymodal.convert.source import Duplicate, FileTensors, Location, Remapped, invert
from polymodal.convert.table import Table
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
    """How a tree is cut. layers: tower -> Layers (absent: all on one stage); tower_tp: tower -> its own TP
    size."""

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
    def largest_tp(self) -> int:
        return max([self.tp, *self.tower_tp.values()])

    @property
    def slots(self) -> list[str]:
        """The entries of a rank's file that hold its virtual stages."""
        return [f"model{virtual}" for virtual in range(self.vpp)] if self.vpp > 1 else ["model"]

    def tp_of(self, table: Table, key: str) -> int:
        """The TP size of the tower that a tensor belongs to."""
        towers = (tower for tower in table.towers if tower.prefix and key.startswith(tower.prefix))
        tower = next(towers, None)
        return self.tower_tp.get(tower.name, self.tp) if tower else self.tp

    def directory(self, tp: int, pp: int, ep: int) -> str:
        """Name of a rank's directory."""
        stage = f"_{pp:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp:02d}{stage}" + (f"_{ep:03d}" if self.ep > 1 else "")

    def __str__(self) -> str:
        towers = "".join(f", {name} TP {size}" for name, size in self.tower_tp.items() if size != self.tp)
        virtual = f" x VPP {self.vpp}" if self.vpp > 1 else ""
        lists = "".join(f", {name} {shown(one)}" for name, one in self.layers.items())
        return f"TP {self.tp}{towers}, EP {self.ep}, PP {self.pp}{virtual}{lists}"


def shown(layers: Layers) -> str:
    """Layer counts as people write them: flat without virtual stages."""
    lists = [list(one) for one in layers]
    return str(lists[0] if len(lists) == 1 else lists).replace(" ", "")


def counts(option: str, value: Sequence | None) -> Layers | None:
    """Layer counts from a flat or a nested list; None for an empty one."""
    if not value:
        return None
    nested = [isinstance(one, (list, tuple)) for one in value]
    if any(nested) and not all(nested):
        raise PolymodalError(f"{option} mixes numbers and lists: {value}.", "Write [6,10] or [[3,5],[3,5]].")
    layers = tuple(tuple(map(int, one)) for one in (value if nested[0] else [value]))
    if len({len(one) for one in layers}) != 1 or any(count < 0 for one in layers for count in one):
        raise PolymodalError(
            f"{option} = {value}: every inner list stands for one virtual stage "
            "and has one number a pipeline rank.",
            "Give lists of one length.",
        )
    return layers


def check(parallel: Parallel, table: Table, facts: Facts) -> None:
    """Raises PolymodalError for what cannot be cut so: layer counts, groups, experts, sizes that do not fit
    together."""
    for tower in table.towers:
        layers, total = parallel.layers.get(tower.name), facts.get(tower.count)
        if layers is not None and total is not None and (given := sum(map(sum, layers))) != total:
            raise PolymodalError(
                f"{tower.name}_pp_layers {shown(layers)} adds up to {given} layers, the model has {total}.",
                f"Give numbers that add up to {total}.",
            )
    for name, layers in parallel.layers.items():
        virtual, stages = len(layers), len(layers[0])
        if virtual != parallel.vpp or parallel.pp % stages:
            raise PolymodalError(
                f"{name}_pp_layers {shown(layers)} has {virtual} x {stages} stages, "
                f"the largest list {parallel.vpp} x {parallel.pp}.",
                "Give every list as many inner lists, of a length that divides the longest.",
            )
    if parallel.pp > 1 and not table.pipeline:
        raise PolymodalError("This model's trees have no pipeline stages.", "Leave pp_layers out.")
    if parallel.largest_tp > 1 and not table.tensor_parallel:
        raise PolymodalError("This model's trees are not cut over TP.", "Set tp_size to 1.")
    for name, size in {"": parallel.tp, **{f"{name}_": tp for name, tp in parallel.tower_tp.items()}}.items():
        if parallel.largest_tp % size:
            raise PolymodalError(
                f"{name}tp_size {size} does not divide the largest TP size, {parallel.largest_tp}.",
                "Choose divisors of it.",
            )
    groups, experts = facts.get("kv_heads", 0), facts.get("experts", 0)
    if groups % parallel.tp:
        fits = [n for n in range(1, groups + 1) if groups % n == 0]
        raise PolymodalError(
            f"tp_size {parallel.tp} does not divide the {groups} key-value heads.",
            f"It may be {', '.join(map(str, fits))}.",
        )
    if parallel.ep > 1 and not experts:
        raise PolymodalError(f"ep_size is {parallel.ep}, but the model has no experts.", "Set ep_size to 1.")
    if experts % parallel.ep:
        raise PolymodalError(
            f"ep_size {parallel.ep} does not divide the {experts} experts.", "Choose a divisor of it."
        )


# ------------------------------------------------------------------------------------------- where tensors go


def _begin(layers: Layers, stage: int) -> int:
    """Number of the first layer of a stage."""
    return sum([count for one in layers for count in one][:stage])


def _stages(table: Table, parallel: Parallel, key: str) -> Iterator[tuple[int, int, str]]:
    """(virtual stage, pipeline rank, name there) of every stage that holds a tensor."""
    everything = [(v, p) for v in range(parallel.vpp) for p in range(parallel.pp)]
    if len(everything) == 1:
        yield 0, 0, key
        return
    for tower in table.towers:
        layers = parallel.layers.get(tower.name)
        if layers is None:
            continue
        stages = [count for one in layers for count in one]
        used = [stage for stage, count in enumerate(stages) if count]
        number, local = tower.layer(key), key
        if number is not None:
            stage = next((s for s in used if _begin(layers, s + 1) > number), -1)
            if stage < 0:
                raise PolymodalError(
                    f"{key} is beyond the {sum(stages)} layers of the list {shown(layers)}.",
                    "Give all layers.",
                )
            local = tower.renumbered(key, number - _begin(layers, stage))
        elif key.startswith(tower.first):
            stage = used[0]
        elif key.startswith(tower.last):
            stage = used[-1]
        else:
            continue
        width = len(layers[0])
        yield from ((v, p, local) for v, p in everything if v * width + p % width == stage)
        return
    if not key.startswith(table.everywhere):
        raise PolymodalError(
            f"The table does not say which pipeline stage holds {key}.", "This is a defect: please report it."
        )
    yield from ((v, p, key) for v, p in everything)


Files = dict[str, dict[str, Stored]]
"""Rank directory -> slot:name of a tensor there -> its boxes of the whole tensors."""


def place(table: Table, shapes: Mapping[str, Shape], parallel: Parallel, facts: Facts) -> Files:
    """Where every part of the whole tensors (key -> shape) goes in a tree cut so."""
    experts = facts.get("experts", 0) // parallel.ep if parallel.ep > 1 else 0
    sizes = (parallel.largest_tp, parallel.pp, parallel.ep)
    ranks = [(t, p, e) for t in range(sizes[0]) for p in range(sizes[1]) for e in range(sizes[2])]
    out: Files = {parallel.directory(*rank): {} for rank in ranks}
    for key, shape in shapes.items():
        size = parallel.tp_of(table, key)
        stored, shard = Stored.whole(key, shape), table.shard_of(key)
        shards = shard.apply(stored, size, facts, key) if size > 1 else [stored]
        for virtual, stage, local in _stages(table, parallel, key):
            expert_ranks: Sequence[int] = range(parallel.ep)
            found = table.row_of(local) if experts else None
            if found and found.expert is not None:
                expert_ranks = [found.expert // experts]
                local = found.with_expert(found.expert % experts)
            for e in expert_ranks:
                for t in range(parallel.largest_tp):
                    name = f"{parallel.slots[virtual]}:{local}"
                    out[parallel.directory(t, stage, e)][name] = shards[t % size]
    return out


# ---------------------------------------------------------------------------------------------------- reading


@dataclass
class Tree:
    """A tree on disk as whole tensors. source: them; duplicates: what it holds more than once."""

    directory: Path
    parallel: Parallel
    files: FileTensors
    source: Remapped
    duplicates: list[Duplicate]


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
    step = tracker.read_text().strip()
    if step != RELEASE and not step.isdigit():
        raise PolymodalError(
            f"{tracker} says {step!r}: neither `release` nor a step.", "Put the step's number there."
        )
    found = root / (step if step == RELEASE else f"iter_{int(step):07d}")
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


Rank = tuple[int, ...]
"""The numbers in the name of a rank's directory; or all of (tp, pp, ep)."""
Held = dict[Rank, list[dict[str, Location]]]
"""What each rank holds: by virtual stage, tensor name -> where it is stored."""


def open_files(where: Path, allow_pickle: bool = False) -> Held:
    """The files of an iteration, by the numbers in their directories' names."""
    found: Held = {}
    for one in sorted(where.iterdir()):
        named = RANK.match(one.name)
        if named is None:
            continue
        path = one / FILE
        if not path.is_file():
            raise PolymodalError(f"{path} is missing.", "Copy the whole tree.")
        content = reading.torch_file(path, allow_pickle)
        slots = {
            int(str(key)[5:] or 0): value
            for key, value in content.items()
            if re.fullmatch(r"model\d*", str(key)) and isinstance(value, dict)
        }
        if not slots:
            raise PolymodalError(
                f"{path} holds no `model` (only {', '.join(map(str, list(content)[:4]))}).",
                "Give the checkpoint that the training wrote (mp_rank_*/model_optim_rng.pt).",
            )
        rank = tuple(int(number) for number in named.groups() if number is not None)
        found[rank] = [reading.locations(path, slots[number]) for number in sorted(slots)]
    if len({(len(rank), len(stages)) for rank, stages in found.items()}) != 1:
        raise PolymodalError(
            f"{where} mixes rank directories of several layouts.", "Remove those of the other save."
        )
    numbers = [set(column) for column in zip(*found, strict=True)]
    highest = [max(column) + 1 for column in numbers]
    if prod(map(len, numbers)) != len(found) or highest != list(map(len, numbers)):
        raise PolymodalError(
            f"{where} has {len(found)} rank directories, "
            f"whose numbers ask for {' x '.join(map(str, highest))}.",
            "Copy the missing ones.",
        )
    return found


def read(
    table: Table, root: Path, facts: Facts, given: Parallel | None = None, allow_pickle: bool = False
) -> Tree:
    """Open a tree. given: how the caller believes it is cut (checked); None: recognised.

    Raises PolymodalError for files that are missing, keys that are unknown or left over, and a tree that is
    cut otherwise than given."""
    where = iteration(root)
    files = open_files(where, allow_pickle)
    parallel = recognise(table, files, facts, where, given)
    ranks = {_full(rank, parallel): stages for rank, stages in files.items()}
    shapes = _whole_shapes(table, ranks, parallel, facts)
    if table.tie and table.tie[0] in shapes and table.embedding not in shapes:
        raise PolymodalError(f"{where}: {table.embedding} is missing.", "Copy the whole tree.")
    layout: dict[str, Stored] = {}
    locations: dict[str, Location] = {}
    placed = place(table, shapes, parallel, table.from_shapes(facts, shapes))
    for rank, stages in ranks.items():
        name = parallel.directory(*rank)
        held = {
            f"{slot}:{key}": location
            for slot, tensors in zip(parallel.slots, stages, strict=True)
            for key, location in tensors.items()
        }
        _compare(where / name / FILE, held, placed[name], parallel)
        layout |= {f"{name}/{key}": placed[name][key] for key in held}
        locations |= {f"{name}/{key}": location for key, location in held.items()}
    inverse, duplicates = invert(layout, shapes)
    tensors = FileTensors(locations)
    return Tree(where, parallel, tensors, Remapped(tensors, inverse), duplicates)


def _compare(
    path: Path, held: Mapping[str, Location], expected: Mapping[str, Stored], parallel: Parallel
) -> None:
    """Raises PolymodalError when a rank's file does not hold what its layout says."""
    if odd := sorted(held.keys() ^ expected.keys()):
        key = odd[0].partition(":")[2]
        has, expects = ("has", "does not expect") if odd[0] in held else ("lacks", "expects")
        raise PolymodalError(
            f"{path} {has} {key}, which its layout ({parallel}) {expects}.",
            "The tree is of another model, or not whole.",
        )
    for key, location in held.items():
        shape = tuple(expected[key].shape)
        if shape != location.shape:
            raise PolymodalError(
                f"{path}: {key.partition(':')[2]} is {list(location.shape)}, "
                f"its layout ({parallel}) says {list(shape)}.",
                "Give the layout that the tree was written with.",
            )


def _full(rank: Rank, parallel: Parallel) -> Rank:
    """(tp, pp, ep) of the numbers in a directory's name."""
    if len(rank) == 2:
        return (*rank, 0) if parallel.ep == 1 else (rank[0], 0, rank[1])
    return rank if len(rank) == 3 else (rank[0], 0, 0)


def recognise(
    table: Table, files: Held, facts: Facts, where: Path, given: Parallel | None = None
) -> Parallel:
    """How a tree is cut, from its names and what each rank holds."""
    sample = next(iter(files))
    pp = len({rank[1] for rank in files}) if len(sample) > 1 else 1
    ep = len({rank[2] for rank in files}) if len(sample) == 3 else 1
    if len(sample) == 2 and pp > 1 and facts.get("experts"):
        # the second number counts stages or ranks of experts: only the latter hold the same names
        names = [{*stages[0]} for rank, stages in files.items() if rank[0] == 0]
        pp, ep = (1, pp) if all(one == names[0] for one in names) else (pp, ep)
    vpp = len(files[sample])
    layers: dict[str, Layers] = {}
    for tower in table.towers:
        stages, starts = [], []
        for virtual in range(vpp):
            for p in range(pp):
                held = files[(0, p, 0)[: len(sample)]][virtual]
                stages.append(len({n for key in held if (n := tower.layer(key)) is not None}))
                if any(key.startswith(tower.first) for key in held):
                    starts.append((virtual, p))
        # a tower cut into fewer stages than the others is stored several times
        repeats = sorted({p for v, p in starts if v == starts[0][0]})
        width = repeats[1] - repeats[0] if len(repeats) > 1 else pp
        if sum(stages):
            layers[tower.name] = tuple(tuple(stages[v * pp : v * pp + width]) for v in range(vpp))
    tower_tp = dict(given.tower_tp) if given else {}
    tp = given.tp if given and tower_tp else len({rank[0] for rank in files})
    parallel = Parallel(tp, ep, layers, tower_tp)
    if given is not None:
        _agree(given, parallel, where)
    return parallel


def _agree(given: Parallel, found: Parallel, where: Path) -> None:
    if (given.largest_tp, given.ep) != (found.largest_tp, found.ep):
        raise PolymodalError(
            f"{where} is cut to {found}, not to {given}.", "Give the sizes that it was written with."
        )
    for name, layers in given.layers.items():
        if name in found.layers and found.layers[name] != layers:
            raise PolymodalError(
                f"{where}: {name}_pp_layers is {shown(found.layers[name])} in the tree, "
                f"{shown(layers)} in the command.",
                "Give the list that it was written with.",
            )


def _whole_shapes(table: Table, ranks: Held, parallel: Parallel, facts: Facts) -> dict[str, Shape]:
    """The shape of every whole tensor, under its name without stages."""
    shards: dict[str, dict[int, Shape]] = defaultdict(dict)
    experts = facts.get("experts", 0) // parallel.ep if parallel.ep > 1 else 0
    for (t, p, e), stages in ranks.items():
        for virtual, held in enumerate(stages):
            for key, location in held.items():
                whole = _global_key(table, parallel, key, virtual, p, e * experts)
                shards[whole].setdefault(t, location.shape)
    return {
        key: table.shard_of(key).whole([parts[t] for t in range(parallel.tp_of(table, key)) if t in parts])
        for key, parts in shards.items()
    }


def _global_key(table: Table, parallel: Parallel, key: str, virtual: int, stage: int, expert: int) -> str:
    """A tensor's name with the number of its layer and expert in the whole model. expert: the rank's
    first."""
    for tower in table.towers:
        number, layers = tower.layer(key), parallel.layers.get(tower.name)
        if number is not None and layers is not None:
            width = len(layers[0])
            key = tower.renumbered(key, number + _begin(layers, virtual * width + stage % width))
            break
    found = table.row_of(key) if expert else None
    return found.with_expert(found.expert + expert) if found and found.expert is not None else key


def one_stage(table: Table, facts: Facts) -> dict[str, Layers]:
    """Every tower whole on one stage."""
    return {tower.name: ((facts[tower.count],),) for tower in table.towers if facts.get(tower.count)}
