"""The only file that names cuda or npu: backend, memory, streams, peak FLOP/s, kernels.

Imports torch late, inside functions: `polymodal --help` and the launcher do without it.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import PolymodalError
from polymodal.runtime.cann import find_cann

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


def slurm_resource(kind: str, count: int) -> str:
    """SLURM's generic resource for so many devices of a node; sites may name theirs otherwise."""
    return f"npu:{count}" if kind == "npu" else "" if kind == "cpu" else f"gpu:{count}"


def kubernetes_resource(kind: str) -> str:
    """Name under which the makers' device plugins offer their devices; "" for the CPU."""
    return {"npu": "huawei.com/Ascend910", "cpu": ""}.get(kind, "nvidia.com/gpu")


def _import_npu() -> bool:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _module(kind: str) -> Any:
    """torch.cuda or torch.npu. Memory, streams and random state are asked there and not of torch.accelerator: an
    adapter's allocator need not be one that torch.accelerator can ask (it stops with an internal error then)."""
    import torch

    return getattr(torch, kind)


def _accelerator() -> str | None:
    """Kind of the accelerator that is there, None on a machine without one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def find(kind: str = "auto", local_rank: int = 0) -> DeviceInfo:
    """The device this process should use. Raises PolymodalError when the asked kind is not there."""
    import torch

    _import_npu()
    found = _accelerator() or "cpu"
    if kind == "auto":
        kind = found
    if kind != "cpu" and kind != found:
        raise PolymodalError(
            f"device.kind = {kind}, but torch sees {found} here.",
            "Run `polymodal doctor` for what is missing, or set device.kind to auto.",
        )
    if kind == "cpu":
        return DeviceInfo("cpu", 0, BACKENDS["cpu"])
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise PolymodalError(
            f"Process {local_rank} of this node has no device: torch sees {count} of kind {kind}.",
            f"Start at most {count} processes here (--nproc {count}).",
        )
    _module(kind).set_device(local_rank)
    return DeviceInfo(kind, local_rank, BACKENDS.get(kind, "gloo"))


def count(kind: str = "auto") -> int:
    """Accelerators of this node; 1 for the CPU."""
    import torch

    _import_npu()
    if kind == "cpu" or not torch.accelerator.is_available():
        return 1
    return max(1, torch.accelerator.device_count())


def backends() -> list[tuple[str, int]]:
    """(process-group backend, processes it can be tried with on this node), gloo first."""
    import torch
    import torch.distributed as dist

    found = [("gloo", 2)]
    _import_npu()
    kind = _accelerator()
    if kind is not None:
        name = BACKENDS.get(kind, "").rpartition(":")[2]
        if name and dist.is_backend_available(name):
            found.append((name, min(2, torch.accelerator.device_count())))
    return found


def survey() -> list[tuple[str, str, str, str]]:
    """(what, ok | warn | fail, found, mend): the accelerators torch sees, and Ascend's software."""
    import importlib.util

    import torch

    rows = []
    adapter, cann = importlib.util.find_spec("torch_npu") is not None, find_cann()
    imported = _import_npu() if adapter else False
    if adapter and not imported:
        mend = (
            f"Run: {cann.line}"
            if cann.line and not cann.sourced
            else "Install CANN, or a torch_npu made for this torch (torch_npu's version starts with torch's)."
        )
        rows.append(("torch_npu", "fail", "installed, but cannot be imported", mend))
    if cann.toolkit is not None:
        version = f"CANN {cann.version or ''}".strip()
        if cann.sourced:
            rows.append(("CANN", "ok", f"{version}, prepared in this shell", ""))
        else:
            rows.append(("CANN", "warn", f"{version} found, not prepared in this shell", f"Run: {cann.line}"))
        if not adapter:
            rows.append(
                (
                    "torch_npu",
                    "warn",
                    "not installed",
                    "Run `pip install torch_npu` in the version of this torch.",
                )
            )
    elif imported:
        rows.append(
            (
                "CANN",
                "warn",
                "not under its usual directories",
                "Set ASCEND_HOME_PATH, or source its set_env.sh.",
            )
        )
    kind = _accelerator()
    if kind is None:
        rows.append(
            ("accelerator", "ok" if cann.toolkit is None else "warn", "none: training runs on the CPU", "")
        )
        return rows
    module = _module(kind)
    for index in range(torch.accelerator.device_count()):
        free, total = module.mem_get_info(index)
        busy = free < 0.9 * total
        rows.append(
            (
                f"{kind}:{index}",
                "warn" if busy else "ok",
                f"{module.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "Another process uses it." if busy else "",
            )
        )
    return rows


def peak_flops(info: DeviceInfo) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, None when unknown (then no MFU is printed)."""
    if info.kind == "cpu":
        return None
    name = str(_module(info.kind).get_device_name(info.index))
    return next((flops for key, flops in PEAK_FLOPS.items() if key.lower() in name.lower()), None)


def fused_attention() -> Any | None:
    """The operator of the accelerator's own attention that lies outside aten; None where there is none."""
    import torch

    library = getattr(torch.ops, "npu", None)
    return getattr(library, "npu_fusion_attention", None) if library is not None else None


def ascend_operators(kind: str) -> Any | None:
    """The operators of Ascend's library (torch_npu's namespace in torch.ops), on such a device only."""
    import torch

    return torch.ops.npu if kind == "npu" and _import_npu() else None


def synchronize(info: DeviceInfo) -> None:
    """Wait until the device has done what it was given."""
    if info.kind != "cpu":
        _module(info.kind).synchronize()


def memory(info: DeviceInfo) -> dict[str, int]:
    """Bytes: allocated now and at peak. On CPU: this process's resident set."""
    if info.kind != "cpu":
        module = _module(info.kind)
        return {"now": module.memory_allocated(), "peak": module.max_memory_allocated()}
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
    """CPU threads of this process: asked, or OMP_NUM_THREADS, or the usable cores shared by the local processes."""
    import torch

    said = os.environ.get("OMP_NUM_THREADS", "")
    if threads is None and said.isdigit() and int(said) > 0:
        threads = int(said)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    count = threads or max(1, cores // max(1, local_world))
    torch.set_num_threads(count)
    return count


def packed_attention(kind: str, dtype: torch.dtype, head_dim: int) -> Any | None:
    """The device's own kernel for packed attention, or None (then dense attention is called by segment length).

    The kernel is called as (query [T, H, D], key [T, K, D], value [T, K, D], cu_seqlens [S + 1] int32 on the device,
    lengths on the host, longest, causal, scale) and gives [T, H, D]. float16 and bfloat16 only, head_dim <= 256.
    """
    import torch

    if kind == "cpu" or dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return None
    return _packed_kernel(kind)


@functools.cache
def _packed_kernel(kind: str) -> Any | None:
    import torch

    if kind == "npu":
        return _npu_packed if _import_npu() else None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::_flash_attention_forward", torch._C._dispatch_key_for_device(kind)
    ):
        return None
    from torch.nn.attention.varlen import varlen_attn

    def packed(query, key, value, cu_seqlens, lengths, longest, causal, scale):
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale,
            window_size=(-1, 0) if causal else (-1, -1), enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    return packed


def _npu_packed(query, key, value, cu_seqlens, lengths, longest, causal, scale):
    """Ascend's fused attention in its TND layout; it wants the ends of the segments on the host.

    Arguments as in the Ascend manual of npu_fusion_attention (sparse mode 3: causal, aligned at the lower right, with
    the compressed 2048 x 2048 mask). Not run here: no such device.
    """
    import itertools

    from torch_npu import npu_fusion_attention

    ends = list(itertools.accumulate(lengths))
    return npu_fusion_attention(
        query, key, value, query.shape[1], input_layout="TND", atten_mask=_npu_mask(query.device) if causal else None, scale=query.shape[-1] ** -0.5 if scale is None else scale,
        keep_prob=1.0, actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=3 if causal else 0,
    )[0]  # fmt: skip


@functools.cache
def _npu_mask(on: torch.device) -> torch.Tensor:
    import torch

    return torch.ones(2048, 2048, dtype=torch.bool, device=on).triu(1)
