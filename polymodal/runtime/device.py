"""The only file that names cuda or npu: backend, memory, streams, random state, peak FLOP/s, environment.

Ground floor: imports torch (late, inside functions) and the recipe's Device section.
"""

from __future__ import annotations

import difflib
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import PolymodalError
from polymodal.runtime.cann import find_cann

if TYPE_CHECKING:
    import torch

    from polymodal import recipe


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


def rng_state() -> dict[str, Any]:
    """Random state of the CPU and the accelerator of this process."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    kind = _accelerator()
    if kind is not None:
        state[kind] = _module(kind).get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    import torch

    for kind, value in state.items():
        if kind == "cpu":
            torch.set_rng_state(value)
        elif kind == _accelerator():
            _module(kind).set_rng_state(value)


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


@dataclass(frozen=True)
class Variable:
    """One environment variable of the documented table."""

    name: str
    what: str
    values: tuple[str, ...] = ()  # the only values there are
    low: int | None = None  # or a whole number from low to high
    high: int | None = None
    default: str = ""  # what counts when it is not set
    boolean: bool = False  # true/false, in the spelling the reader wants
    prefix: tuple[str, ...] = ()  # or comma-separated options `name:value` with these names
    lead: tuple[str, ...] = ()  # or one of these, then further options after a comma
    by: str = "recipe"  # "start": read when processes are started, so the shell sets it

    @property
    def range(self) -> str:
        if self.values or self.lead:
            return " | ".join(self.values or self.lead)
        if self.boolean:
            return "true | false"
        if self.low is not None:
            return f"{self.low:,} to {self.high:,}" if self.high is not None else f"from {self.low}"
        return ", ".join(f"{name}:..." for name in self.prefix[:2]) if self.prefix else "text"


_SWITCH = ("0", "1")
ENVIRONMENT: tuple[Variable, ...] = (
    Variable("ASCEND_SLOG_PRINT_TO_STDOUT", "print the device log on the terminal", _SWITCH, default="0"),
    Variable("ASCEND_GLOBAL_LOG_LEVEL", "device log: 0 debug, 1 info, 2 warning, 3 error, 4 none", ("0", "1", "2", "3", "4"), default="3"),
    Variable("TASK_QUEUE_ENABLE", "operator dispatch queue: 0 off, 1 and 2 levels of overlap", ("0", "1", "2"), default="1"),
    Variable("COMBINED_ENABLE", "join pairs of non-contiguous operators", _SWITCH, default="0"),
    Variable("CPU_AFFINITY_CONF", "bind threads to cores: 0 off, 1 coarse, 2 fine (options may follow a comma)", lead=("0", "1", "2"), default="0"),
    Variable("HCCL_CONNECT_TIMEOUT", "seconds to wait for the other devices' sockets", low=120, high=7200, default="120"),
    Variable("HCCL_EXEC_TIMEOUT", "seconds one collective may wait for the others", low=68, high=17340, default="1800"),
    Variable("HCCL_SOCKET_IFNAME", "network interface of HCCL, e.g. eth0"),
    Variable("HCCL_BUFFSIZE", "MiB of buffer a communicator", low=1, default="200"),
    Variable("HCCL_WHITELIST_DISABLE", "do not check the list of allowed peers", _SWITCH, default="1"),
    Variable("PYTORCH_NPU_ALLOC_CONF", "allocator, e.g. expandable_segments:True", prefix=("expandable_segments", "max_split_size_mb", "garbage_collection_threshold", "base_addr_aligned_kb", "page_size")),
    Variable("ACLNN_CACHE_LIMIT", "operators kept in the host's cache", low=1, high=10_000_000, default="10000"),
    Variable("TOKENIZERS_PARALLELISM", "threads inside tokenizers", boolean=True, default="true"),
    Variable("MULTI_STREAM_MEMORY_REUSE", "reuse memory across streams", ("0", "1", "2"), default="1"),
    Variable("NPU_ASD_ENABLE", "watch for silent data errors: 0 off, 1 log, 2 alarm, 3 alarm and record", ("0", "1", "2", "3"), default="0"),
    Variable("ASCEND_LAUNCH_BLOCKING", "run every operator synchronously (debugging)", _SWITCH, default="0"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", "devices this run may use, e.g. 0,1"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", "hardware queues: 1 orders Megatron's overlap, FSDP2 wants more than 1", low=1, high=32, default="8"),
    Variable("CUDA_VISIBLE_DEVICES", "devices this run may use, e.g. 0,1"),
    Variable("PYTORCH_CUDA_ALLOC_CONF", "allocator, e.g. expandable_segments:True", prefix=("expandable_segments", "max_split_size_mb", "garbage_collection_threshold", "backend", "roundup_power2_divisions", "pinned_use_background_threads")),
    Variable("NCCL_DEBUG", "NCCL's log", ("VERSION", "WARN", "INFO", "TRACE")),
    Variable("NCCL_SOCKET_IFNAME", "network interface of NCCL, e.g. eth0"),
    Variable("NCCL_IB_DISABLE", "do not use InfiniBand", _SWITCH, default="0"),
    Variable("NCCL_P2P_DISABLE", "do not copy between devices directly", _SWITCH, default="0"),
    Variable("GLOO_SOCKET_IFNAME", "network interface of gloo, e.g. eth0"),
    Variable("OMP_NUM_THREADS", "CPU threads of numeric libraries (device.threads sets torch's)", low=1, high=4096),
    Variable("THP_MEM_ALLOC_ENABLE", "host tensors of 2 MiB and more in large pages, where the system allows it on request", _SWITCH, default="1"),
    Variable("HF_HOME", "directory of downloaded checkpoints"),
    Variable("HF_ENDPOINT", "mirror of the hub, an https address"),
    Variable("HF_HUB_OFFLINE", "never ask the hub", _SWITCH, default="0"),
    Variable("MASTER_ADDR", "address of the first node", by="start"),
    Variable("MASTER_PORT", "port of the first node", low=1, high=65535, default="free, or 29500", by="start"),
    Variable("NNODES", "nodes of the run", low=1, default="1", by="start"),
    Variable("NODE_RANK", "number of this node, from 0", low=0, default="0", by="start"),
    Variable("NPUS_PER_NODE", "processes to start on this node (as --nproc)", low=1, by="start"),
)  # fmt: skip
"""The documented environment variables with their ranges; `polymodal doctor --env` prints them."""

OWN = {"THP_MEM_ALLOC_ENABLE": "1"}
"""What is set when neither the recipe nor the shell says otherwise. Large pages: a training step on a CPU spends a fifth
of its time on page faults without (logits, gradients and activations come and go in every micro-batch)."""


def checked_variable(name: str, value: str | int | bool) -> str:
    """The value as it goes into the environment. Raises PolymodalError for an unknown name or a value out of range."""
    variable = next((v for v in ENVIRONMENT if v.name == name), None)
    if variable is None:
        near = difflib.get_close_matches(name.upper(), [v.name for v in ENVIRONMENT], 1, 0.6)
        raise PolymodalError(
            f"device.env: {name} is not a known environment variable.",
            f"Did you mean {near[0]}?"
            if near
            else "`polymodal doctor --env` lists the known ones; set others in the shell.",
        )
    if variable.by == "start":
        raise PolymodalError(
            f"device.env: {name} is needed before the recipe is read.",
            f"Set it in the shell: export {name}={value}",
        )
    if variable.boolean:
        if str(value).lower() not in ("true", "false", "0", "1"):
            raise PolymodalError(
                f"device.env: {name} = {value!r} is neither true nor false.",
                f"Set it to true or false: {variable.what}.",
            )
        return "true" if str(value).lower() in ("true", "1") else "false"
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if (variable.values and text not in variable.values) or (
        variable.lead and text.partition(",")[0].strip() not in variable.lead
    ):
        raise PolymodalError(
            f"device.env: {name} = {text} is not one of {', '.join(variable.values or variable.lead)}.",
            f"It means: {variable.what}.",
        )
    if variable.low is not None:
        number = int(text) if text.lstrip("-").isdigit() else None
        if number is None or number < variable.low or (variable.high is not None and number > variable.high):
            raise PolymodalError(
                f"device.env: {name} = {text} is outside its range, {variable.range}.",
                f"It means: {variable.what}.",
            )
    if variable.prefix:
        for option in text.split(","):
            key = option.partition(":")[0].strip()
            if key not in variable.prefix or ":" not in option:
                near = difflib.get_close_matches(key, variable.prefix, 1, 0.5)
                raise PolymodalError(
                    f"device.env: {name}: the option `{option}` is not of the form name:value with a known name.",
                    f"Did you mean {near[0]}:...?" if near else f"Known: {', '.join(variable.prefix)}.",
                )
    return text


def apply_environment(section: recipe.Device, environ: Any = None) -> dict[str, str]:
    """Check device.env and set it in `environ` (default os.environ), before torch starts. Returns what was set of it.

    What is in OWN is set too where nobody has said otherwise. Raises PolymodalError naming the key; nothing is set then.
    """
    values = {name: checked_variable(name, value) for name, value in section.env.items()}
    into = os.environ if environ is None else environ
    into.update(values)
    for name, value in OWN.items():
        into.setdefault(name, value)
    return values
