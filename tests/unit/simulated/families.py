"""A training step of tiny models on the CPU and on the simulated npu: a line of JSON a model, `python families.py NAMES`.

Run by tests/unit/test_simulated_families.py in a subprocess, with this directory on PYTHONPATH.
"""

import json
import sys
import tempfile

import torch
import torch_npu

from tests.models import tiny
from tests.parallel import dits, layouts, speech

ALONE = layouts.Layout("one process", 1)


def write(name: str, directory: str) -> None:
    if name in (*tiny.NAMES, *tiny.GLM, *tiny.INTERNVL, *tiny.OMNIS):
        tiny.checkpoint(name, directory)
    elif name == "whisper":
        speech.checkpoint(directory)
    else:
        dits.pipeline(name, directory)


def compare(name: str) -> dict[str, object]:
    """Losses, the worst gradient's error over the largest gradient, and what the device's step counted."""
    with tempfile.TemporaryDirectory() as directory:
        write(name, directory)
        expected = layouts.measure(directory, ALONE, torch.float32, 0, 0)
        counted: dict[str, dict[str, int]] = {}

        def begin() -> None:  # weights are there
            for counter in torch_npu.counts.values():
                counter.clear()

        def end() -> None:
            for kind in ("waits", "unpinned"):
                counted[kind] = {" ".join(key): count for key, count in torch_npu.counts[kind].items()}

        found = layouts.measure(directory, ALONE, torch.float32, 0, 0, "npu:0", around=(begin, end))
    largest = max(float(each.norm()) for each in expected.gradients.values())
    errors = [float((found.gradients[n].cpu() - g).norm()) for n, g in expected.gradients.items()]
    same = found.gradients.keys() == expected.gradients.keys()
    losses = {"loss": found.loss, "expected": expected.loss}
    return {"name": name, "same": same, "error": max(errors) / largest, **losses, **counted}


for each in sys.argv[1:]:
    print(json.dumps(compare(each)), flush=True)
