"""What a golden file needs of a net."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# inside the published code some operations are float32: its own figures have this much noise
SINGLE_OUTPUTS, SINGLE_GRADIENTS = 1e-5, 5e-5
DOUBLE = 1e-9


@dataclass
class Outcome:
    """What a case gave. `outputs` are those of the file; `scalars` are compared where the file has them."""

    outputs: dict[str, Tensor]
    scalars: dict[str, Any] | None = None


@dataclass
class Net:
    """A class of ours for golden files.

    models: beginnings of the `model` line of the files that this entry is for.
    build(document): the module in eval mode, from `document["config"]`; its weights are filled by the caller.
    run(module, case, inputs, document): `inputs` are tensors by name; floating ones are float64 and need gradients
        where the file has them. Return an `Outcome` with the outputs of this case, named as in the file.
    names(module, document): published name -> our name, where they differ.
    rules(module, document): in its place, the library's conversion rules; by default those of the class, so that
        a tensor of ours may be made of several published ones.
    outputs_bound, gradients_bound: largest relative error; the file's notes say where the reference is float32 inside.
    compare(document): in place of all of the above, for files of another shape: (case, what, relative error).
    """

    models: tuple[str, ...]
    build: Callable[[dict[str, Any]], nn.Module] | None = None
    run: Callable[[Any, str, dict[str, Tensor], dict[str, Any]], Outcome] | None = None
    names: Callable[[Any, dict[str, Any]], dict[str, str]] | None = None
    outputs_bound: float = DOUBLE
    gradients_bound: float = DOUBLE
    compare: Callable[[dict[str, Any]], list[tuple[str, str, float]]] | None = None
    rules: Callable[[Any, dict[str, Any]], list[Any]] | None = None
