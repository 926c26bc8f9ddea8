"""Accelerators that can be planned for (accelerators.yaml), and the time that operators and collectives take
there.

Peaks of arithmetic are those that a run's MFU is measured against (runtime/device.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean
from polymodal.runtime import device

GIB = 2**30
GIGA = ("bandwidth", "link", "network", "host", "host_memory")
"""Keys of the file that are in GB/s."""
LATENCY = {True: 10e-6, False: 25e-6}
"""Seconds until a collective within a node (True) or across nodes begins to move data: an assumption."""


@dataclass(frozen=True)
class Accelerator:
    """An entry of accelerators.yaml, whose first lines say what the keys mean: here in FLOP/s, bytes and
    bytes/s."""

    name: str
    half_flops: float  # bfloat16 and float16
    single_flops: float  # float32
    memory: float
    bandwidth: float
    link: float
    network: float
    node: int
    source: str
    matmul: float
    stream: float
    wire: float
    host: float
    host_memory: float
    usable: float

    @property
    def usable_memory(self) -> float:
        """Bytes that its allocator can hand out."""
        return self.memory * self.usable

    @property
    def stream_bandwidth(self) -> float:
        """Bytes a second that elementwise operators reach."""
        return self.bandwidth * self.stream


@functools.cache
def table() -> dict[str, Accelerator]:
    """Every accelerator of accelerators.yaml by its name."""
    data = yaml.safe_load(resources.files("polymodal.plan").joinpath("accelerators.yaml").read_text())
    accelerators = {}
    for name, entry in data["devices"].items():
        facts = {**data["assumed"], **entry}
        facts |= {key: facts[key] * 1e9 for key in GIGA}
        facts["half_flops"] = device.PEAK_FLOPS[facts.pop("peak")]
        facts["single_flops"] = facts.pop("single") * 1e12
        facts["memory"] *= GIB
        accelerators[name] = Accelerator(name, **facts)
    return accelerators


def named(name: str) -> Accelerator:
    """An entry of the table. Raises PolymodalError with the nearest name."""
    if name.lower() not in table():
        raise PolymodalError(
            f"--device {name} is not in the table of accelerators.", did_you_mean(name, table())
        )
    return table()[name.lower()]


def nearest(memory: float) -> str:
    """The name of the accelerator with the memory nearest to so many GiB, the slowest of several."""
    return min(table().values(), key=lambda one: (abs(one.memory / GIB - memory), one.half_flops)).name


def seconds(accelerator: Accelerator, half: bool, flops: float, bytes_moved: float) -> float:
    """Time of one operator: arithmetic or memory, whichever is longer (Williams et al. 2009, the
    roofline)."""
    peak = accelerator.half_flops if half else accelerator.single_flops
    return max(flops / (peak * accelerator.matmul), bytes_moved / accelerator.stream_bandwidth)


def transfer(
    accelerator: Accelerator, kind: str, ranks: tuple[int, ...], size: float, calls: int = 1
) -> float:
    """Time of `calls` collectives on tensors of together `size` bytes (whole, before or after they are cut).

    Ring costs: (n - 1) / n of the tensor a rank, twice for an all-reduce. Between nodes the members of one
    node share the node's ports, each brings its own.
    """
    count = max(len(ranks), 2)
    nodes = len({rank // accelerator.node for rank in ranks})
    speed = accelerator.link
    if nodes > 1:
        speed = min(accelerator.link, accelerator.network * max(1, len(ranks) // nodes))
    ring = (count - 1) / count
    share = {"all_reduce": 2 * ring, "send": 1.0, "recv": 0.0, "broadcast": 1.0}.get(kind, ring)
    return size * share / (speed * accelerator.wire) + calls * LATENCY[nodes <= 1] * (kind != "recv")
