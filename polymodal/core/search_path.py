"""The working directory is no place that modules are imported from: a data set may hold a yaml.py.

Imports nothing but what Python itself has loaded, so that commands can call it before any other import.
"""

import os
import sys


def leave_working_directory() -> None:
    """Take the working directory off sys.path, here and in all Python processes that are started from here.

    `python -m` puts it there, multiprocessing in its processes (unless PYTHONSAFEPATH, of Python 3.11, is
    set), and an empty entry of PYTHONPATH. It stays where PYTHONPATH names it, and where this package lies in
    it, not installed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was removed
        here = ""
    if here == os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))):
        named.append(here)
    if named or "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    if not here or here in map(os.path.realpath, named):
        return
    library = os.path.dirname(os.__file__)  # what comes after it was installed
    end = sys.path.index(library) if library in sys.path else 1
    sys.path[:end] = [path for path in sys.path[:end] if os.path.realpath(path or here) != here]
