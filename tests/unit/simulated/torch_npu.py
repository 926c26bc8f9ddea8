"""Stands for Ascend's torch_npu in one subprocess of a test: an "npu" whose tensors live on the CPU.

Importing it does what importing the real one does: it renames PrivateUse1, gives torch its `torch.npu` module and
registers hccl. A tensor here is a wrapper around a CPU tensor; every operator unwraps, runs there, and wraps again.
It is strict: an operator that mixes tensors of the device with CPU tensors (but for numbers) raises, as on hardware.
`counts` has where the host waited for the device, and the copies to it, also those that an accelerator cannot do
beside its work. Needs torch's experimental Python backend for PrivateUse1. Nothing of CANN is simulated.
"""

import collections
import sys
import types
import weakref

import torch
import torch.distributed as dist
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICES = 2
generators = [torch.Generator().manual_seed(i) for i in range(DEVICES)]
state = {"device": 0, "now": 0, "peak": 0, "synchronized": 0}
counts = {kind: collections.Counter() for kind in ("operators", "waits", "copies", "unpinned")}
"""Of operators by name; of waits, copies to the device, and those of them from pageable memory: by operator and
the line that called it, "" in a backward pass."""
pinned = []

COPIES = ("copy_", "_to_copy")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
"""Operators whose result's size or value the host needs."""


def caller():
    """The line outside torch that led here."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in (name := frame.f_code.co_filename) or name == __file__):
        frame = frame.f_back
    return "" if frame is None else f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


def check(operator, args, kwargs):
    """Raise for tensors of two devices; count what waits and what is copied."""
    name = operator.overloadpacket.__name__
    counts["operators"][name] += 1
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    host = [each for each in tensors if not isinstance(each, Tensor)]
    if name in COPIES:
        to_host = isinstance(args[0], torch.Tensor) and not isinstance(args[0], Tensor)
        to_host = to_host if name == "copy_" else "cpu" in str(kwargs.get("device"))
        if to_host:
            counts["waits"][name, caller()] += 1
        elif host:
            counts["copies"][name, caller()] += 1
            source = host[-1]
            if not source.is_pinned():
                counts["unpinned"][name, caller()] += 1
        return
    if any(each.ndim for each in host):
        found = ", ".join(f"{each.device.type}{list(each.shape)}" for each in tensors)
        raise RuntimeError(f"{operator}: Expected all tensors to be on the same device, but found {found}")
    masked = name in ("index", "index_put", "index_put_") and any(
        each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
    )
    if masked or name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        counts["waits"][name, caller()] += 1


def pin_memory(tensor, device=None):
    copy = tensor.clone()
    pinned.append(copy)  # alive, so that its address is of no other tensor
    return copy


def is_pinned(tensor, device=None):
    at = tensor.data_ptr()
    return any(copy.data_ptr() <= at <= copy.data_ptr() + copy.nbytes for copy in pinned)


class Tensor(torch.Tensor):
    """A tensor on npu: shape, dtype and strides of `raw`, which holds the numbers."""

    @staticmethod
    def __new__(cls, raw):
        raw = raw.resolve_conj().resolve_neg()  # bits of the raw tensor, which a wrapper does not have
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"npu:{state['device']}",
        )
        made.raw = raw
        state["now"] += raw.nbytes
        state["peak"] = max(state["peak"], state["now"])
        weakref.finalize(made, free, raw.nbytes)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        inputs = {}  # id of a CPU tensor -> the argument it stands for: in-place operators give their argument back

        def unwrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            raw = value.raw if isinstance(value, Tensor) else value
            inputs[id(raw)] = value
            return raw

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            return inputs[id(value)] if id(value) in inputs else Tensor(value)

        check(operator, args, kwargs)
        locked = kwargs.pop("pin_memory", False)
        if target is not None:
            kwargs["device"] = "cpu"
        if operator.overloadpacket is torch.ops.aten.histc and not args[0].is_floating_point():
            args = (args[0].float(), *args[1:])  # torch's CPU kernel is for floating point only
        with torch._C._DisableTorchDispatch():
            out = operator(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if target is not None and torch.device(target).type == "cpu":
            return pin_memory(out) if locked else out
        return tree_map(wrap, out)

    def tolist(self):
        counts["waits"]["tolist", caller()] += 1
        return self.raw.tolist()

    def __repr__(self):
        return f"npu({self.raw!r})"


def free(size):
    state["now"] -= size


def empty(size, dtype=None, **_):
    return Tensor(torch.empty(size, dtype=dtype))


def empty_strided(size, stride, dtype=None, **_):
    return Tensor(torch.empty_strided(size, stride, dtype=dtype))


def factory(operator):
    """torch makes these empty and lets the kernel resize them, which a wrapper cannot follow."""

    def make(*args, device=None, pin_memory=None, **kwargs):
        return Tensor(operator(*args, device="cpu", **kwargs))

    return make


def copy_from(source, target, non_blocking=False):
    """What is left of copy_ where no tensor's own dispatch is asked, as in torch.tensor(.., device=)."""
    check(torch.ops.aten.copy_.default, (target, source), {})
    a, b = (each.raw if isinstance(each, Tensor) else each for each in (source, target))
    with torch._C._DisableTorchDispatch():
        b.copy_(a)
    return target


def npu_fusion_attention(
    query, key, value, head_num, input_layout, *, atten_mask=None, scale=1.0, keep_prob=1.0, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0,
):  # fmt: skip
    """Attention as the manual of npu_fusion_attention defines it for the TND layout; a tuple whose first is the output.

    Sparse mode 3 takes the compressed 2048 x 2048 upper triangle (True: masked), aligned at the lower right.
    """
    assert input_layout == "TND" and keep_prob == 1.0 and head_num == query.shape[1]
    assert (sparse_mode, atten_mask is None) in ((0, True), (3, False))
    if atten_mask is not None:
        assert atten_mask.shape == (2048, 2048) and atten_mask.dtype == torch.bool
        assert torch.equal(atten_mask.cpu(), torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    assert all(isinstance(end, int) for end in (*actual_seq_qlen, *actual_seq_kvlen))
    out, start, key_start = [], 0, 0
    groups = query.shape[1] // key.shape[1]
    for end, key_end in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
        q = query[start:end].transpose(0, 1)
        k = key[key_start:key_end].repeat_interleave(groups, 1).transpose(0, 1)
        v = value[key_start:key_end].repeat_interleave(groups, 1).transpose(0, 1)
        scores = (q @ k.transpose(1, 2)).float() * scale
        if sparse_mode == 3:
            rows, columns = end - start, key_end - key_start
            hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows).to(query.device)
            scores = scores.masked_fill(hidden, float("-inf"))
        out.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
        start, key_start = end, key_end
    return (torch.cat(out),)


def index(device=None):
    number = torch.device(device).index if isinstance(device, (str, torch.device)) else device
    return state["device"] if number is None else number


def set_device(device):
    state["device"] = index(device)


def manual_seed_all(seed):
    for generator in generators:
        generator.manual_seed(seed)


def synchronize(device=None):
    state["synchronized"] += 1


module = types.ModuleType("torch.npu")
module.is_available = lambda: True
module.is_initialized = lambda: True
module._is_in_bad_fork = lambda: False
module.device_count = lambda: DEVICES
module.current_device = lambda: state["device"]
module.set_device = set_device
module.synchronize = synchronize
module.get_device_name = lambda device=None: "Ascend910B2"
module.memory_allocated = lambda device=None: state["now"]
module.max_memory_allocated = lambda device=None: state["peak"]
module.mem_get_info = lambda device=None: ((64 << 30) - state["now"], 64 << 30)
module.empty_cache = lambda: None
module.reset_peak_memory_stats = lambda device=None: state.update(peak=state["now"])
module.manual_seed_all = manual_seed_all
module.get_rng_state = lambda device=None: generators[index(device)].get_state()
module.set_rng_state = lambda new, device=None: generators[index(device)].set_state(new)

backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module)
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", empty, "PrivateUse1")
_library.impl("empty_strided", empty_strided, "PrivateUse1")
_library.impl("_copy_from", copy_from, "PrivateUse1")
for name in ("arange.start_step", "arange.start", "arange", "linspace", "eye", "randperm"):
    packet, _, overload = name.partition(".")
    _library.impl(
        name, factory(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1"
    )


def _hccl(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout)


torch.Tensor.pin_memory = pin_memory
torch.Tensor.is_pinned = is_pinned
dist.Backend.register_backend("hccl", _hccl, devices=["npu"])

profiler = types.ModuleType("torch_npu.profiler")
profiler.asked = []
profiler.ProfilerActivity = types.SimpleNamespace(CPU=torch.profiler.ProfilerActivity.CPU, NPU="NPU")


def profile(activities, **options):
    """torch's, without the device's events; keeps what it was asked for."""
    profiler.asked.append(activities)
    return torch.profiler.profile(activities=[each for each in activities if each != "NPU"], **options)


profiler.profile = profile
sys.modules["torch_npu.profiler"] = profiler
