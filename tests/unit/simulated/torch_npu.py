"""Stands for Ascend's torch_npu in one subprocess of a test: an "npu" whose tensors live on the CPU.

Importing it does what importing the real one does: it renames PrivateUse1, gives torch its `torch.npu` module and
registers hccl. A tensor here is a wrapper around a CPU tensor; every operator unwraps, runs there, and wraps again.
Needs torch's experimental Python backend for PrivateUse1. Nothing of CANN is simulated.
"""

import types
import weakref

import torch
import torch.distributed as dist
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

DEVICES = 2
generators = [torch.Generator().manual_seed(i) for i in range(DEVICES)]
state = {"device": 0, "now": 0, "peak": 0, "synchronized": 0}


class Tensor(torch.Tensor):
    """A tensor on npu: shape, dtype and strides of `raw`, which holds the numbers."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=f"npu:{state['device']}"
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

        if target is not None:
            kwargs["device"] = "cpu"
        with torch._C._DisableTorchDispatch():
            out = operator(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if target is not None and torch.device(target).type == "cpu":
            return out
        return tree_map(wrap, out)

    def __repr__(self):
        return f"npu({self.raw!r})"


def free(size):
    state["now"] -= size


def empty(size, dtype=None, **_):
    return Tensor(torch.empty(size, dtype=dtype))


def empty_strided(size, stride, dtype=None, **_):
    return Tensor(torch.empty_strided(size, stride, dtype=dtype))


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
module.manual_seed_all = manual_seed_all
module.get_rng_state = lambda device=None: generators[index(device)].get_state()
module.set_rng_state = lambda new, device=None: generators[index(device)].set_state(new)

backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module)
_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", empty, "PrivateUse1")
_library.impl("empty_strided", empty_strided, "PrivateUse1")


def _hccl(store, rank, size, timeout):
    return dist.ProcessGroupGloo(store, rank, size, timeout)


dist.Backend.register_backend("hccl", _hccl, devices=["npu"])
