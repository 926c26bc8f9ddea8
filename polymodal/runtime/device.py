"""The only file that names cuda or npu: backend, memory, peak FLOP/s, kernels. torch is imported late."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import PolymodalError
from polymodal.runtime import host
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

PEAK_FLOPS = {  # dense bf16 FLOP/s, from the makers' data sheets
    "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "4090": 165e12, "B200": 2250e12, "910B2": 376e12, "910B3": 313e12, "910B4": 280e12, "910B": 320e12,
    "910_93": 376e12, "910C": 752e12,
    "3060": 25.5e12, "3090": 71e12, "4060 Ti": 44e12, "4070": 58e12, "4080": 97.5e12,
    "5060 Ti": 47e12, "5070 Ti": 88e12, "5070": 62e12, "5080": 113e12, "5090": 209.5e12,
}  # fmt: skip
"""The first key that a device's name holds counts. Of 910B's variants by public descriptions; devices named
Ascend910_93xx are dies, two of which are a 910C."""


def slurm_resource(kind: str, count: int) -> str:
    """SLURM's generic resource for `count` devices of a node, "" for the CPU; sites may name it otherwise."""
    name = {"npu": "npu", "cpu": ""}.get(kind, "gpu")
    return name and f"{name}:{count}"


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
    """torch.cuda or torch.npu, for memory and names: torch.accelerator stops with an internal error where an
    adapter's allocator does not have what it asks for."""
    import torch

    return getattr(torch, kind)


def _accelerator() -> str | None:
    """Kind of this machine's accelerator, None without one."""
    import torch

    _import_npu()
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if current is None else current.type


def find(kind: str = "auto", local_rank: int = 0, shown_alone: bool = False) -> DeviceInfo:
    """The device this process should use. Raises PolymodalError when there is none of that kind.

    shown_alone: the launcher may show each process its own device and no other (srun --gpus-per-task=1).
    """
    import torch

    present = _accelerator() or "cpu"
    if kind == "auto" and present == "cpu" and (unseen := driver_unseen()):
        hint = (
            "Install a torch for this driver, or a driver for this torch; device.kind: cpu trains on the CPU."
        )
        raise PolymodalError(f"{unseen}.", hint)
    kind = present if kind == "auto" else kind
    if kind == "cpu":
        return DeviceInfo("cpu", 0, BACKENDS["cpu"])
    if kind != present:
        raise PolymodalError(
            f"device.kind = {kind}, but torch sees {present} here.",
            "Run `polymodal doctor` for what is missing, or set device.kind to auto.",
        )
    devices = torch.accelerator.device_count()
    index = 0 if devices == 1 and shown_alone else local_rank
    if index >= devices:
        raise PolymodalError(
            f"Process {local_rank} of this node has no device: torch sees {devices} of kind {kind}.",
            f"Start at most {devices} processes here (--nproc {devices}).",
        )
    _module(kind).set_device(index)
    return DeviceInfo(kind, index, BACKENDS.get(kind, "gloo"))


DRIVERS = {"/dev/nvidiactl": "CUDA_VISIBLE_DEVICES", "/dev/davinci_manager": "ASCEND_RT_VISIBLE_DEVICES"}
"""What a maker's driver makes on a machine with devices, and the variable that hides them."""


def driver_unseen() -> str:
    """What is wrong where a driver is loaded and torch sees no device, "" where nothing is.

    A driver too old for torch's CUDA looks like that, as do a torch for the CPU and CANN that is not sourced.
    """
    import torch

    for file, variable in DRIVERS.items():
        if os.path.exists(file) and os.environ.get(variable) not in ("", "-1", "NoDevFiles"):
            version = torch.version.cuda
            built = f"built for CUDA {version}" if version else "built without CUDA"
            return f"A driver is loaded ({file}), but torch {torch.__version__} ({built}) sees no device"
    return ""


def count(kind: str = "auto") -> int:
    """Accelerators of this node; 1 for the CPU."""
    import torch

    return 1 if kind == "cpu" or _accelerator() is None else torch.accelerator.device_count()


def backends() -> list[tuple[str, int]]:
    """(process-group backend, processes it can be tried with on this node), gloo first."""
    import torch
    import torch.distributed as dist

    backend = BACKENDS.get(_accelerator() or "", "").rpartition(":")[2]
    if not backend or not dist.is_backend_available(backend):
        return [("gloo", 2)]
    return [("gloo", 2), (backend, min(2, torch.accelerator.device_count()))]


def survey() -> Iterator[tuple[str, str, str, str]]:
    """(what, ok | warn | fail, what was found, hint) of Ascend's software and the accelerators torch sees."""
    import importlib.util

    import torch

    adapter, cann = importlib.util.find_spec("torch_npu") is not None, find_cann()
    imported = adapter and _import_npu()
    if adapter and not imported:
        hint = "Install CANN, or a torch_npu made for this torch (torch_npu's version starts with torch's)."
        hint = f"Run: {cann.command}" if cann.command and not cann.sourced else hint
        yield "torch_npu", "fail", "installed, but cannot be imported", hint
    version = f"CANN {cann.version or ''}".strip()
    if cann.toolkit is not None and cann.sourced:
        yield "CANN", "ok", f"{version}, prepared in this shell", ""
    elif cann.toolkit is not None:
        yield "CANN", "warn", f"{version} found, not prepared in this shell", f"Run: {cann.command}"
    elif imported:
        hint = "Set ASCEND_HOME_PATH, or source its set_env.sh."
        yield "CANN", "warn", "not under its usual directories", hint
    if cann.toolkit is not None and not adapter:
        yield (
            "torch_npu",
            "warn",
            "not installed",
            "Run `pip install torch_npu` in the version of this torch.",
        )
    kind = _accelerator()
    if kind is None:
        if unseen := driver_unseen():
            yield "accelerator", "fail", unseen, "See that driver, torch and its CUDA or CANN fit together."
            return
        verdict = "ok" if cann.toolkit is None else "warn"
        yield "accelerator", verdict, "none: training runs on the CPU", ""
        return
    module = _module(kind)
    for index in range(torch.accelerator.device_count()):
        free, total = module.mem_get_info(index)
        memory = f"{free / host.GIB:.1f} of {total / host.GIB:.1f} GiB free"
        what, found = f"{kind}:{index}", f"{module.get_device_name(index)}, {memory}"
        if free < 0.9 * total:
            yield what, "warn", found, "Another process uses it."
        else:
            yield what, "ok", found, ""


def peak_flops(info: DeviceInfo) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, None when unknown (then no MFU is printed)."""
    if info.kind == "cpu":
        return None
    name = str(_module(info.kind).get_device_name(info.index))
    return next((flops for key, flops in PEAK_FLOPS.items() if key.lower() in name.lower()), None)


def fused_attention() -> list[Any]:
    """The operators of the accelerators' own attention that are not in aten, as far as they are here."""
    import torch

    with contextlib.suppress(ImportError):
        import torch.nn.attention.varlen  # registers its operator
    names = (("npu", "npu_fusion_attention"), ("torch_attn", "_varlen_attn"))
    found = (getattr(getattr(torch.ops, space), name, None) for space, name in names)
    return [packet for packet in found if packet is not None]


@functools.cache
def has_kernel(operator: str, kind: str) -> bool:
    """Whether a kind of device has its own kernel of an operator ("aten::name"), not a copy to the host."""
    import torch

    key = torch._C._dispatch_key_for_device(kind)
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def ascend_operators(kind: str) -> Any | None:
    """The operators of Ascend's library (torch_npu's namespace in torch.ops), on such a device only."""
    import torch

    return torch.ops.npu if kind == "npu" and _import_npu() else None


def compiles(kind: str) -> bool:
    """Whether torch's compiler (inductor) makes code for a kind of device; adapters bring their own part."""
    from torch._inductor.codegen import common

    common.init_backend_registration()
    return common.get_scheduling_for_device(kind) is not None


def profiler(kind: str) -> tuple[Any, list[Any]]:
    """(profiler with torch.profiler.profile's arguments, activities to record) for a kind of device.

    torch's own sees nothing of an NPU; torch_npu has one of its own.
    """
    import torch.profiler

    if kind == "npu":
        import torch_npu.profiler

        activity = torch_npu.profiler.ProfilerActivity
        return torch_npu.profiler.profile, [activity.CPU, activity.NPU]
    every = torch.profiler.supported_activities()
    return torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU] if kind == "cpu" else list(every)


def memory(info: DeviceInfo) -> dict[str, int]:
    """Bytes: allocated now and at peak. On CPU: this process's resident set."""
    if info.kind == "cpu":
        sizes = host.proc_sizes("/proc/self/status")
        return {"now": sizes.get("VmRSS", 0), "peak": sizes.get("VmHWM", 0)}
    module = _module(info.kind)
    return {"now": module.memory_allocated(), "peak": module.max_memory_allocated()}


def synchronize(kind: str) -> None:
    """Wait for what a kind of device was given to do."""
    if kind != "cpu":
        _module(kind).synchronize()


def empty_cache(kind: str) -> None:
    """Give the allocator's free blocks back to a kind of device."""
    if kind != "cpu":
        _module(kind).empty_cache()


def make_deterministic() -> None:
    """Kernels that give the same bits every time; torch raises where a device has none for an operator.

    Not as a warning: flash attention's backward and cuBLAS are deterministic only where torch is strict.
    """
    import torch

    # read when the libraries are first used
    for name, value in {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HCCL_DETERMINISTIC": "true"}.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def set_threads(threads: int | None, local_world: int) -> int:
    """CPU threads of this process: `threads`, or OMP_NUM_THREADS, or its share of the usable cores."""
    import torch

    if threads is None:
        with contextlib.suppress(ValueError):
            threads = int(os.environ.get("OMP_NUM_THREADS", ""))
    if threads is None or threads < 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        threads = max(1, cores // max(1, local_world))
    torch.set_num_threads(threads)
    return threads


def packed_attention(kind: str, dtype: torch.dtype, head_dim: int) -> Any | None:
    """The device's own kernel for packed attention; None = call dense attention by segment length.

    The kernel is called as (query [T, H, D], key [T, K, D], value [T, K, D], cu_seqlens [S + 1] int32 on the
    device, lengths on the host, longest, causal, scale) and gives [T, H, D]. float16 and bfloat16 only,
    head_dim <= 256.
    """
    import torch

    if kind == "cpu" or dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return None
    return _packed_kernel(kind)


@functools.cache
def _packed_kernel(kind: str) -> Any | None:

    if kind == "npu":
        return _npu_packed if _import_npu() else None
    flash = has_kernel("aten::_flash_attention_forward", kind) and _varlen_is_whole()
    return _flash_packed if flash else None


def _varlen_is_whole() -> bool:
    """Whether this torch's varlen_attn takes all that we ask of it (from 2.12 on)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _flash_packed(query, key, value, cu_seqlens, lengths, longest, causal, scale):
    """torch's flash attention over segments of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    window, grouped = (-1, 0 if causal else -1), query.shape[1] != key.shape[1]
    ends = (cu_seqlens, cu_seqlens, longest, longest)
    return varlen_attn(query, key, value, *ends, scale=scale, window_size=window, enable_gqa=grouped)


SEGMENTS = 1024
"""Segments in one call of Ascend's attention; its manual allows about 2,000 lengths (a long video has more
windows)."""


def _npu_packed(query, key, value, cu_seqlens, lengths, longest, causal, scale):
    """Ascend's fused attention in its TND layout; it wants the ends of the segments on the host.

    Arguments as in the Ascend manual of npu_fusion_attention (sparse mode 3: causal, aligned at the lower
    right, with the compressed 2048 x 2048 mask). Not run here: no such device.
    """
    import torch
    from torch_npu import npu_fusion_attention

    if len(lengths) > SEGMENTS:
        groups = [lengths[at : at + SEGMENTS] for at in range(0, len(lengths), SEGMENTS)]
        parts = zip(
            *(rows.split([sum(each) for each in groups]) for rows in (query, key, value)), strict=True
        )
        each = zip(parts, groups, strict=True)
        return torch.cat([_npu_packed(*rows, None, own, longest, causal, scale) for rows, own in each])
    ends = list(itertools.accumulate(lengths))
    return npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        input_layout="TND",
        atten_mask=_npu_mask(query.device) if causal else None,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        keep_prob=1.0,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=3 if causal else 0,
    )[0]


@functools.cache
def _npu_mask(on: torch.device) -> torch.Tensor:
    import torch

    return torch.ones(2048, 2048, dtype=torch.bool, device=on).triu(1)
