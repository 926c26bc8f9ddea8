"""Reading pickles from elsewhere as data, without running code of the file.

`pickle` alone imports whatever a file names and calls it. Here every name is first passed to `known`; where
that returns None, the name becomes a class made for this one load, whose objects only keep what they were
given. No class of the program is used by default, because a pickle could also set attributes of it.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from typing import Any


class Inert:
    """Stands for any object of a pickle and keeps its arguments and state; all its methods do nothing."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def append(self, item: Any) -> None:
        pass

    extend = add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def unpickler(known: Callable[[str, str], Any]) -> type[pickle.Unpickler]:
    """An unpickler that runs no code of the file. known(module, name): what a name stands for; None makes it
    inert."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            value = known(module, name)
            return type(name, (Inert,), {"__slots__": (), "__module__": module}) if value is None else value

    return Unpickler


def pickle_module(known: Callable[[str, str], Any]) -> Any:
    """The same as a stand-in for the module `pickle`, as torch.load takes one."""
    made: Any = types.ModuleType("inert_pickle")
    made.Unpickler = unpickler(known)
    made.load = lambda file, **options: made.Unpickler(file, **options).load()
    return made
