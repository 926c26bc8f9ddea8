"""The `polymodal` command, also as `python -m polymodal`; the launcher starts its processes this way.

A process that was in a process group ends with os._exit once all exit handlers have run. A gloo thread that
drops the last reference to a tensor of a finished collective takes the GIL for it. When the interpreter is
being finalized, CPython 3.11 answers such a thread with pthread_exit, whose unwinding through noexcept C++
ends in std::terminate: a run that had written everything died by SIGABRT. destroy_process_group ends these
threads only if nothing refers to a group any more, and caches of DTensor and FSDP do.
"""

from polymodal.core.search_path import leave_working_directory

leave_working_directory()  # before any other import

import atexit  # noqa: E402
import contextlib  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402


def run(command: Callable[[], None] | None = None) -> None:
    """The entry point of the console script. command: another one that ends in the same way."""
    status = [1]
    atexit.register(_end, status)  # registered first, so it runs last
    from polymodal.core import terminal

    terminal.start()
    from polymodal.cli import main

    try:
        (command or main)()
        status[0] = 0
    except SystemExit as error:
        status[0] = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


def _end(status: list[int]) -> None:
    module = sys.modules.get("polymodal.runtime.process_group")
    if module is None or not module.was_started:
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status[0])


if __name__ == "__main__":
    run()
