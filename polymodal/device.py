"""The only file that names cuda or npu: backend, memory, streams, random state, peak FLOP/s, environment.

Ground floor: imports torch (late, inside functions) and the recipe's Device section.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceInfo:
    """The accelerator of this process."""

    kind: str  # "cpu", "cuda", "npu"
    index: int
    backend: str  # process-group backend: "gloo", "nccl", "hccl"; with "cpu:gloo," in front on accelerators

    @property
    def torch(self) -> torch.device:
        import torch

        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}

PEAK_FLOPS: dict[str, float] = {  # dense bf16 FLOP/s, from the makers' data sheets
    "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "4090": 165e12,
    "B200": 2250e12, "910B": 320e12, "910C": 752e12,
}  # fmt: skip


def _import_npu() -> bool:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def find(kind: str = "auto", local_rank: int = 0) -> DeviceInfo:
    """The device this process should use. Raises PolymodalError when the asked kind is not there."""
    import torch

    from polymodal.errors import PolymodalError

    _import_npu()
    have = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = have.type if have is not None else "cpu"
    if kind == "auto":
        kind = found
    if kind != "cpu" and kind != found:
        raise PolymodalError(f"device.kind = {kind}, but torch sees {found} here.", "Run `polymodal doctor` for what is missing, or set device.kind to auto.")
    if kind == "cpu":
        return DeviceInfo("cpu", 0, BACKENDS["cpu"])
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise PolymodalError(f"Process {local_rank} of this node has no device: torch sees {count} of kind {kind}.", f"Start at most {count} processes here (--nproc {count}).")
    torch.accelerator.set_device_index(local_rank)
    return DeviceInfo(kind, local_rank, BACKENDS.get(kind, "gloo"))


def peak_flops(info: DeviceInfo) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, None when unknown (then no MFU is printed)."""
    import torch

    if info.kind == "cpu":
        return None
    name = str(getattr(torch, info.kind).get_device_name(info.index))
    return next((flops for key, flops in PEAK_FLOPS.items() if key.lower() in name.lower()), None)


def synchronize(info: DeviceInfo) -> None:
    import torch

    if info.kind != "cpu":
        torch.accelerator.synchronize()


def memory(info: DeviceInfo) -> dict[str, int]:
    """Bytes: allocated now and at peak. On CPU: this process's resident set."""
    import torch

    if info.kind != "cpu":
        return {"now": torch.accelerator.memory_allocated(), "peak": torch.accelerator.max_memory_allocated()}
    now = peak = 0
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    now = int(line.split()[1]) * 1024
                elif line.startswith("VmHWM:"):
                    peak = int(line.split()[1]) * 1024
    except OSError:
        pass
    return {"now": now, "peak": peak}


def set_threads(threads: int | None, local_world: int) -> int:
    """CPU threads of this process: asked, or the cores this process may use shared by the local processes."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    count = threads or max(1, cores // max(1, local_world))
    torch.set_num_threads(count)
    return count


def rng_state() -> dict[str, Any]:
    """Random state of the CPU and the accelerator of this process."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        state[kind] = getattr(torch, kind).get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    import torch

    for kind, value in state.items():
        if kind == "cpu":
            torch.set_rng_state(value)
        elif torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == kind:
            getattr(torch, kind).set_rng_state(value)
