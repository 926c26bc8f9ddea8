"""Accelerators as data for planning: peak arithmetic, memory, bandwidths. No device is asked or needed.

This room may touch `device` only, whose table of peaks is the one that a run's MFU is measured against.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    matmul: float = 0.7
    """Share of the peak that large matrix products reach: an assumption, not measured here."""
    stream: float = 0.8
    """Share of the memory bandwidth that elementwise operators reach: an assumption."""
    wire: float = 0.8
    """Share of link and network bandwidth that collectives reach: an assumption."""
    host: float = 25e9
    """Bytes a second between the device and its host (16 lanes of PCIe 4 reach that): an assumption."""
    host_memory: float = 25e9
    """A device's share of its host's memory bandwidth, for an optimizer that steps there: an assumption."""
    usable: float = 0.92
    """Share of the memory that the allocator can hand out: contexts, communicators and fragmentation take the rest."""


def _table() -> dict[str, Accelerator]:
    peak = device.PEAK_FLOPS
    rows = (
        Accelerator("h100", peak["H100"], 494e12, 80 * GIB, 3.35e12, 450e9, 50e9, 8, "maker's data sheet (SXM5), one 400 Gbit/s port a device"),
        Accelerator("h200", peak["H200"], 494e12, 141 * GIB, 4.8e12, 450e9, 50e9, 8, "maker's data sheet (SXM5), one 400 Gbit/s port a device"),
        Accelerator("h800", peak["H800"], 494e12, 80 * GIB, 3.35e12, 200e9, 50e9, 8, "maker's data sheet (SXM5), one 400 Gbit/s port a device"),
        Accelerator("b200", peak["B200"], 1100e12, 180 * GIB, 7.7e12, 900e9, 50e9, 8, "maker's data sheet (HGX), one 400 Gbit/s port a device"),
        Accelerator("a100", peak["A100"], 156e12, 80 * GIB, 2.04e12, 300e9, 25e9, 8, "maker's data sheet (SXM4 80 GB), one 200 Gbit/s port a device"),
        Accelerator("a800", peak["A800"], 156e12, 80 * GIB, 2.04e12, 200e9, 25e9, 8, "maker's data sheet (SXM4 80 GB), one 200 Gbit/s port a device"),
        Accelerator("910b", peak["910B"], 80e12, 64 * GIB, 1.6e12, 196e9, 25e9, 8, "public descriptions of Atlas 800T A2, one 200 Gbit/s port a device"),
        Accelerator("910c", peak["910C"], 188e12, 128 * GIB, 3.2e12, 392e9, 50e9, 8, "public description of the 384-device supernode (one package of two dies)"),
    )  # fmt: skip
    return {row.name: row for row in rows}


DEVICES = _table()


def named(name: str) -> Accelerator:
    """A row of the table. Raises PolymodalError with the nearest name."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise PolymodalError(
            f"--device {name} is not in the table of accelerators.", did_you_mean(name, DEVICES)
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
