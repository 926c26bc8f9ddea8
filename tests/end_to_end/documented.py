"""A directory laid out as the documents of another system say, and its lines called there. Tests only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

TOOLS = {
    "torchrun": "-m torch.distributed.run",
    "polymodal": "-m polymodal",
    "polymodal-compat": "-m polymodal.compat",
    "mm-convert": "-m polymodal.convert.command",
    "accelerate": "-m accelerate.commands.accelerate_cli",
    "python": "",
}
DISTRIBUTED = """NPUS_PER_NODE=2
MASTER_ADDR=localhost
MASTER_PORT={port}
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \\
    --nnodes $NNODES \\
    --node_rank $NODE_RANK \\
    --master_addr $MASTER_ADDR \\
    --master_port $MASTER_PORT
"
"""
ITERATION = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| elapsed time per "
    r"iteration \(ms\): ([\d.]+) \| learning rate: [\d.]+E[+-]\d\d \| global batch size: +(\d+) \|.* loss: [\d.]+E[+-]\d\d \|",
    re.M,
)


class Place:
    """A directory that the documents' lines are called in."""

    def __init__(self, root: Path, port: int):
        self.root, self.port = root, port
        tools = root.parent / "bin"
        tools.mkdir()
        for name, arguments in TOOLS.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
            (tools / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        root.mkdir()

    def write(self, name: str, content: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))

    def script(self, name: str, text: str) -> None:
        head = "#!/bin/bash\nsource /usr/local/Ascend/cann/set_env.sh\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n"
        self.write(name, head + DISTRIBUTED.format(port=self.port) + text)

    def bash(self, line: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def iterations(text: str) -> list[tuple[str, ...]]:
    found = ITERATION.findall(text)
    assert found, text
    return found


def port_of(name: str) -> int:
    """A port of a test's own."""
    return 29400 + zlib.crc32(name.encode()) % 400
