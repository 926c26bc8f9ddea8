"""Three steps of the trainer on the simulated npu; after each a line of JSON with what the host waited for and copied.

Run by tests/unit/test_simulated_families.py: `python run.py DIRECTORY`.
"""

import json
import sys
from pathlib import Path

import torch_npu

from polymodal import recipe as recipes
from polymodal.train import trainer
from tests.parallel import training

ROOT = training.make(Path(sys.argv[1]), "qwen3-vl")


def between_steps(self, step: int) -> bool:
    counted = {
        kind: {" ".join(key): count for key, count in torch_npu.counts[kind].items()}
        for kind in ("waits", "unpinned")
    }
    kind = self.rt.device.kind
    print(json.dumps({"step": step, "device": kind, **counted}), flush=True)
    for counter in torch_npu.counts.values():
        counter.clear()
    return False


trainer.Trainer._between_steps = between_steps
trainer.Trainer._save = trainer.Trainer._finish = lambda self: None  # the simulated device has no streams
overrides = [f"checkpoint.dir={ROOT / 'run'}", "monitor.every=100"]
sys.exit(trainer.run(recipes.load(ROOT / "recipe.yaml", overrides)))
