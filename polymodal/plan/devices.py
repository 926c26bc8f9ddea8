"""Accelerators for planning (accelerators.yaml): peak arithmetic, memory, bandwidths; and what these make of work.

Sees runtime/device.py only, whose table of peaks is the one that a run's MFU is measured against. No device is needed.
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


@dataclass(frozen=True)
class Accelerator:
    """One device of a cluster. FLOP/s are dense; bandwidths are bytes a second in one direction.

    link: to the other devices of its node; network: its share of what leaves the node; node: devices of a node.
    """

    name: str
    half_flops: float  # bfloat16 and float16
    single_flops: float  # float32, with the tensor cores' reduced mantissa where they have one
    memory: float  # bytes
    bandwidth: float
    link: float
    network: float
    node: int
    source: str
    matmul: float  # share of the peak that large matrix products reach
    stream: float  # share of the memory bandwidth that elementwise operators reach
    wire: float  # share of link and network bandwidth that collectives reach
    host: float  # bytes a second between the device and its host
    host_memory: (
        float  # bytes a second: a device's share of its host's memory, for an optimizer that steps there
    )
    usable: float  # share of the memory that the allocator can hand out


GIGA = ("bandwidth", "link", "network", "host", "host_memory")
"""Figures of the file in GB/s."""


@functools.cache
def table() -> dict[str, Accelerator]:
    """Every accelerator of accelerators.yaml by its name."""
    data = yaml.safe_load(resources.files("polymodal.plan").joinpath("accelerators.yaml").read_text())
    found = {}
    for name, row in data["devices"].items():
        facts = {**data["assumed"], **row}
        facts |= {key: facts[key] * 1e9 for key in GIGA}
        facts["half_flops"] = device.PEAK_FLOPS[facts.pop("peak")]
        facts["single_flops"] = facts.pop("single") * 1e12
        found[name] = Accelerator(name, **{**facts, "memory": facts["memory"] * GIB})
    return found


def named(name: str) -> Accelerator:
    """A row of the table. Raises PolymodalError with the nearest name."""
    found = table().get(name.lower())
    if found is None:
        raise PolymodalError(
            f"--device {name} is not in the table of accelerators.", did_you_mean(name, table())
        )
    return found


def seconds(accelerator: Accelerator, half: bool, flops: float, touched: int) -> float:
    """Time of one operator: arithmetic or memory, whichever is longer (Williams et al. 2009, the roofline)."""
    peak = accelerator.half_flops if half else accelerator.single_flops
    return max(flops / (peak * accelerator.matmul), touched / (accelerator.bandwidth * accelerator.stream))


LATENCY = {True: 10e-6, False: 25e-6}
"""Seconds until a collective within a node (True) or across nodes begins to move data: an assumption."""


def transfer(
    accelerator: Accelerator, kind: str, ranks: tuple[int, ...], size: float, calls: int = 1
) -> float:
    """Time of `calls` collectives that together move tensors of `size` bytes (whole, before or after they are cut).

    Ring costs: (n - 1) / n of the tensor a rank, twice for an all-reduce. Between nodes the members of one node share
    the node's ports, each brings its own.
    """
    count = max(len(ranks), 2)
    nodes = {rank // accelerator.node for rank in ranks}
    inside = len(nodes) <= 1
    if inside:
        speed = accelerator.link
    else:
        speed = min(accelerator.link, accelerator.network * max(1, len(ranks) // len(nodes)))
    share = {"all_reduce": 2 * (count - 1) / count, "send": 1.0, "recv": 0.0, "broadcast": 1.0}.get(
        kind, (count - 1) / count
    )
    return size * share / (speed * accelerator.wire) + calls * LATENCY[inside] * (kind != "recv")
