"""Runs the commands that a document shows, in a miniature of its files. Tests only."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def commands(page: Path) -> list[list[str]]:
    """The page's `polymodal` commands, in words: the lines of its ```bash blocks (```sh blocks want what is not here)."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    words = [word for word in words if word and word[0] not in ("make", "source")]
    assert words and all(word[0] == "polymodal" for word in words)
    return [word[1:] for word in words]


def run(words: Sequence[str], place: Path, smaller: Sequence[str]) -> str:
    """One command in the directory `place`; 8 processes become 2, `smaller` is added where a recipe is given.

    Returns what it printed; another exit code than 0 fails with it.
    """
    words = [*words]
    for option in ("--nproc", "--world"):
        if option in words:
            words[words.index(option) + 1] = "2"
    if words[0] in ("train", "check"):
        words += smaller
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.monotonic()
    if words[0] == "train" or "--nproc" in words:
        command = [sys.executable, "-m", "polymodal", *words]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        code, out = done.returncode, done.stdout + done.stderr
    else:  # in this process, which must stand in `place`: its libraries are loaded once
        from polymodal import cli

        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            result = CliRunner(env=environment).invoke(cli.app, words)
        code, out = result.exit_code, result.output + (repr(result.exception) if result.exception else "")
    print(f"{time.monotonic() - began:5.1f} s  polymodal {shlex.join(words)}", flush=True)
    assert code == 0, f"polymodal {shlex.join(words)}\n{out}"
    return out
