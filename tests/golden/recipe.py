"""The recipes of golden files: weights and inputs from names, digests of outputs and gradients."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor


def read(path: Path) -> dict[str, Any]:
    """A golden file, plain or gzipped JSON."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)


def normal(name: str, shape: Any) -> Tensor:
    """g(name, shape): standard normal, float64, from the CRC-32 of the name."""
    generator = numpy.random.RandomState(zlib.crc32(name.encode("utf-8")))
    return torch.from_numpy(numpy.asarray(generator.standard_normal(tuple(shape)), dtype=numpy.float64))


def weight(name: str, shape: Any, document: dict[str, Any]) -> Tensor:
    """A parameter's value: scaled by its fan-in; near 1 for scales; small else."""
    g = normal(name, shape)
    if name.endswith(".cluster_usage") and "cluster_usage" in document["fill"]:
        return 1 + 0.1 * g
    if len(shape) >= 2 and not name.endswith(("table", "embedding")):
        return g / float(numpy.prod(shape[1:])) ** 0.5
    if len(shape) <= 1 and name.rpartition(".")[2] in ("weight", "scale", "gamma"):
        return 1 + 0.1 * g
    return 0.1 * g


def given(name: str, entry: Any) -> Any:
    """An input of a case: from its name and scale, or in full (with its dtype)."""
    if not isinstance(entry, dict) or not ("values" in entry or "scale" in entry):
        return entry
    if "values" in entry and "shape" not in entry:
        return entry["values"]
    if "values" in entry:
        dtype = getattr(torch, entry.get("dtype", "torch.float64").rpartition(".")[2])
        values = entry["values"]
        if "inf" in str(values):  # infinities are strings
            values = numpy.array(values, dtype=numpy.float64)
        return torch.as_tensor(values, dtype=dtype).reshape(entry["shape"])
    return entry["scale"] * normal(f"input:{name}", entry["shape"])


def probe(name: str, shape: Any) -> Tensor:
    return normal(f"probe:{name}", shape)


def probe_loss(outputs: dict[str, Tensor]) -> Tensor:
    """Sum over outputs of dot(output, probe): what the file's gradients are of."""
    return sum(
        ((value.double() * probe("output", value.shape)).sum() for value in outputs.values()), torch.zeros(())
    )


def output_error(value: Tensor, digest: dict[str, Any]) -> float:
    """Largest error over the largest value; of the norm over the norm; of the dot over the norms."""
    if list(value.shape) != list(digest["shape"]):
        return float("inf")
    flat = value.detach().double().flatten()
    wanted = torch.tensor(digest["values"], dtype=torch.float64).flatten()
    if len(wanted) != len(flat):
        steps = torch.arange(len(wanted), dtype=torch.int64) * len(flat) // len(wanted)
        flat_values = flat[steps]
    else:
        flat_values = flat
    largest = float(wanted.abs().max()) if len(wanted) else 0.0
    found = probe("output", value.shape).flatten()
    norm = max(abs(digest["norm"]), 1e-300)
    return max(
        float((flat_values - wanted).abs().max()) / max(largest, 1e-300) if len(wanted) else 0.0,
        abs(float(flat.norm()) - digest["norm"]) / norm,
        abs(float(flat @ found) - digest["dot"]) / max(norm, abs(digest["dot"])),
    )


def gradient_error(name: str, gradient: Tensor | None, digest: list[float] | None, largest: float) -> float:
    """Error of norm and dot over the norm. A gradient that is nothing but rounding (below 1e-3 of the largest of
    the net) is measured by that. No digest: the published net had no gradient there."""
    _, norm, dot = digest or (0.0, 0.0, 0.0)
    scale = max(norm, 1e-3 * largest, 1e-300)
    if gradient is None:
        return norm / scale
    flat = gradient.detach().double().flatten()
    along = float(flat @ probe(name, gradient.shape).flatten())
    return max(abs(float(flat.norm()) - norm), abs(along - dot)) / scale


def scalar_error(value: Any, wanted: Any) -> float:
    """Numbers by relative error, digests as outputs, everything else by equality (0 or infinity)."""
    if isinstance(wanted, dict) and "norm" in wanted and isinstance(value, Tensor):
        return output_error(value, wanted)
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(wanted, dict):
        return max((scalar_error(value[key], wanted[key]) for key in wanted), default=0.0)
    if isinstance(wanted, (list, tuple)):
        if len(value) != len(wanted):
            return float("inf")
        return max((scalar_error(a, b) for a, b in zip(value, wanted, strict=True)), default=0.0)
    if isinstance(wanted, float) and not isinstance(value, bool):
        return abs(value - wanted) / max(abs(wanted), 1e-300)
    return 0.0 if value == wanted else float("inf")
