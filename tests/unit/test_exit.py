"""A process that was in a process group ends without finalizing the interpreter; others end as Python does."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
import polymodal.cli
from polymodal import __main__, recipe
from polymodal.runtime import process_group

class Kept:
    def __del__(self):
        print("finalized")

def main():
    sys.modules["kept"] = Kept()
    atexit.register(print, "exit handler")
    if {grouped}:
        settings = {{"name": "t", "model": {{"source": "m"}}, "data": {{"datasets": [{{"path": "d"}}]}}}}
        process_group.stop(process_group.start(recipe.validate(settings | {{"device": {{"kind": "cpu"}}}})))
    {ending}

polymodal.cli.main = main
__main__.run()
"""


@pytest.mark.parametrize("ending, code", [("pass", 0), ("sys.exit(3)", 3), ("raise ValueError('boom')", 1)])
@pytest.mark.parametrize("grouped", [True, False])
def test_exit_code_and_exit_handlers_stay(grouped, ending, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(grouped=grouped, ending=ending)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == (["exit handler"] if grouped else ["exit handler", "finalized"])
    assert ("ValueError: boom" in done.stderr) == ("boom" in ending)
