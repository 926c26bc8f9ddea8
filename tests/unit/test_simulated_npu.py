"""The NPU path of device.py, as far as torch's Python backend for PrivateUse1 goes: a subprocess with a simulated npu.

What this cannot show is listed in docs/ascend.md.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

START = """
import torch
from polymodal.runtime import device
info = device.find("auto", 1)
"""
CASES = {
    "selection": """
assert (info.kind, info.index, info.backend) == ("npu", 1, "cpu:gloo,npu:hccl")
assert info.torch == torch.device("npu", 1) and torch.npu.current_device() == 1
assert device.find("npu").index == 0 and device.find("cpu").backend == "gloo"
assert device.count() == 2 and device.count("cpu") == 1
assert device.backends() == [("gloo", 2), ("hccl", 2)]
assert device.peak_flops(info) == 376e12
torch.npu.get_device_name = lambda index: {"910B": "Ascend910B", "die": "Ascend910_9382"}[which]
for which, peak in (("910B", 320e12), ("die", 376e12)):
    assert device.peak_flops(info) == peak
assert device.compiles("cpu") and not device.compiles("npu")
""",
    "more processes than devices": """
from polymodal.core.errors import PolymodalError
for kind, rank, words in (("auto", 2, "torch sees 2 of kind npu"), ("cuda", 0, "torch sees npu here")):
    try:
        device.find(kind, rank)
    except PolymodalError as error:
        assert words in error.message, error
    else:
        raise AssertionError(kind)
""",
    "srun shows each process its own device": """
torch.npu.device_count = lambda: 1
torch.accelerator.device_count = lambda: 1
assert device.find("auto", 3, shown_alone=True).index == 0
from polymodal import recipe
from polymodal.runtime import process_group
names = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
         "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1"}
task = process_group.from_environment(environ=names)
assert task.local_rank == 3 and task.launcher == "slurm"
joined = []
process_group._join = lambda process, backend, *_: joined.append(backend)
rt = process_group.start(recipe.validate({"model": {"source": "x"}}), process=task)
assert rt.device.index == 0 and joined == ["cpu:gloo,npu:hccl"]
""",
    "memory": """
before = device.memory(info)["now"]
held = torch.zeros(1 << 20, device=info.torch)
now = device.memory(info)
assert now["now"] == before + (4 << 20) and now["peak"] >= now["now"]
del held
after = device.memory(info)
assert after["now"] == before and after["peak"] == now["peak"]
""",
    "survey": """
rows = {row[0]: row for row in device.survey()}
assert rows["npu:0"][1:3] == ("ok", "Ascend910B2, 64.0 of 64.0 GiB free") and "npu:1" in rows, rows
assert rows["CANN"][1] == "warn"  # the adapter is there, its software is not where it is looked for
""",
    "offloaded state, and a checkpoint that touches no stream": """
import tempfile
from pathlib import Path
from polymodal.distributed import checkpoint
with tempfile.TemporaryDirectory() as place:
    writer = checkpoint.Writer(Path(place), 1, True, 0, None)
    writer.save({"model.a": torch.arange(6.0)}, checkpoint.RunState(step=1))
    writer.finish()
    assert torch.equal(checkpoint.read_model(checkpoint.directory(Path(place), 1))["a"], torch.arange(6.0))
import torch.distributed as dist
import torch_npu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from polymodal.distributed import checkpoint
from polymodal.recipe import Optim
from polymodal.train import optim
device.find("npu", 0)

def steps(where, offload):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(where)
    made = optim.Optimizer(dict(model.named_parameters()), Optim(), {}, (), offload)
    made.state(create=True)
    for number in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) * number
        torch_npu.counts["unpinned"].clear()
        made.step()
        assert not torch_npu.counts["unpinned"], torch_npu.counts
    return made.state(), [p.detach().cpu() for p in model.parameters()]

state, weights = steps("npu:0", True)
for name, tensor in state.items():  # moments on the host, counts of steps on the device
    assert tensor.device.type == ("npu" if name.startswith("step.") else "cpu"), name
for a, b in zip(weights, steps("cpu", False)[1]):
    torch.testing.assert_close(a, b)

dist.init_process_group(info.backend, store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("npu", (1,))
there = DTensor.from_local(torch.ones(4, 4, device="npu:0"), mesh, [Replicate()])
held = {"exp_avg.a": there, "step.a": torch.zeros((), device="npu:0")}
optim.state_to_host(held)
assert held["exp_avg.a"].to_local().device.type == "cpu" and held["exp_avg.a"].device_mesh == mesh
staged = checkpoint._staged(held)["exp_avg.a"]  # not moved to the mesh's device to be written
assert staged.to_local().device.type == "cpu" and staged.to_local() is not held["exp_avg.a"].to_local()
optim.state_to_device(held, torch.device("npu:0"))
assert held["exp_avg.a"].to_local().device.type == "npu"
dist.destroy_process_group()
""",
    "a training step": """
info = device.find("npu", 0)  # autograd's queues know one device of a Python backend
def train(where):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)).to(where)
    inputs, targets = torch.randn(16, 4).to(where), torch.randn(16, 1).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    for _ in range(3):
        loss = (model(inputs) - targets).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.device.type == p.grad.device.type == where.type for p in model.parameters())
        optimizer.step()
    return loss.cpu(), [p.detach().cpu() for p in model.parameters()]

loss, weights = train(info.torch)
expected, wanted = train(torch.device("cpu"))
torch.testing.assert_close(loss, expected)
for a, b in zip(weights, wanted):
    torch.testing.assert_close(a, b)
""",
    "packed attention": """
kernel = device.packed_attention("npu", torch.bfloat16, 64)
assert device.packed_attention("npu", torch.float32, 64) is None
lengths, heads, kept, size = [5, 1, 7], 4, 2, 8
torch.manual_seed(0)
q, k, v = (torch.randn(13, h, size).bfloat16() for h in (heads, kept, kept))
ends = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
for causal, device.SEGMENTS in ((True, 1024), (False, 1024), (True, 2), (False, 1)):
    got = kernel(q.to(info.torch), k.to(info.torch), v.to(info.torch), ends.to(info.torch), lengths, 7, causal, None)
    assert got.device == info.torch and got.shape == (13, heads, size)
    parts = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist()):
        a, b, c = (x[None, start:stop].transpose(1, 2).float() for x in (q, k, v))
        one = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=True)
        parts.append(one[0].transpose(0, 1))
    torch.testing.assert_close(got.cpu().float(), torch.cat(parts), rtol=0.03, atol=0.03)
""",
    "profiler": """
import json, tempfile
import torch_npu
from pathlib import Path
from polymodal.recipe import Profile
from polymodal.train.monitor import Profiler
with tempfile.TemporaryDirectory() as directory:
    profiler = Profiler(Path(directory), Profile(start=1, steps=1), 0, info)
    profiler.before(1)
    torch.ones(4, 4, device=info.torch) @ torch.ones(4, 4, device=info.torch)
    trace = profiler.after(1)
    assert torch_npu.profiler.asked == [[torch.profiler.ProfilerActivity.CPU, "NPU"]]
    assert device.profiler("cpu") == (torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU])
    assert "aten::matmul" in {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
""",
    "process group": """
import torch.distributed as dist
dist.init_process_group(info.backend, store=dist.HashStore(), rank=0, world_size=1)
assert dist.get_backend_config() == "cpu:gloo,npu:hccl"
sum = torch.ones(2)
dist.all_reduce(sum)
assert sum.tolist() == [1, 1]
dist.destroy_process_group()
""",
}


@pytest.mark.parametrize("case", CASES)
def test_npu(case):
    paths = [str(ROOT / "tests/unit/simulated"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ASCEND")}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START + CASES[case]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
