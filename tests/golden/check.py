"""A golden file tried: our class, the config translated, weights filled by name, every case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden import recipe
from tests.golden.net import Net
from tests.golden.nets import find


@dataclass
class Result:
    model: str
    case: str
    what: str
    error: float
    bound: float

    @property
    def fine(self) -> bool:
        return self.error <= self.bound  # a NaN is not fine

    def __str__(self) -> str:
        return (
            f"{self.model} | {self.case} | {self.what} | {self.error:.2e} "
            f"{'<=' if self.fine else 'ABOVE'} {self.bound:.0e}"
        )


def check(path: Path) -> list[Result]:
    """Every case of a file. Raises LookupError without a net for it, ValueError where keys or shapes differ."""
    document = recipe.read(path)
    # some files have no model line: the file's name then chooses the net
    document.setdefault("model", path.name.partition(".")[0])
    net = find(document)
    model = document["model"]
    if net.compare is not None:
        return [Result(model, *found, net.outputs_bound) for found in net.compare(document)]
    assert net.build is not None
    module = net.build(document).double().eval()
    names = load(module, net, document)
    results = []
    for case, entry in document["cases"].items():
        results += [Result(model, case, *found) for found in _case(module, net, names, case, entry, document)]
    return results


def load(module: nn.Module, net: Net, document: dict[str, Any]) -> dict[str, str]:
    """Fill `module`, whose keys and shapes must be the file's; returns published name -> ours."""
    published: dict[str, Any] = document["state_dict"]
    names = net.names(module, document) if net.names else {}
    ours = {names.get(name, name): name for name in published}
    state = module.state_dict()
    missing, extra = sorted(set(ours) - set(state)), sorted(set(state) - set(ours))
    if missing or extra:
        raise ValueError(f"keys differ: the file alone has {missing[:6]}, our class alone {extra[:6]}")
    shape = _core if net.names else list  # renamed, a 1x1 convolution may be a linear layer
    different = [n for n, name in ours.items() if shape(state[n].shape) != shape(published[name])]
    if different:
        name = different[0]
        raise ValueError(
            f"shapes differ: {name} is {list(state[name].shape)}, in the file {published[ours[name]]}"
        )
    kept = set(document.get("kept") or ())
    with torch.no_grad():
        for name, published_name in ours.items():
            if not any(part in published_name for part in kept) and state[name].is_floating_point():
                filled = recipe.weight(published_name, published[published_name], document)
                state[name].copy_(filled.reshape(state[name].shape))
    return {published_name: name for name, published_name in ours.items()}


def _core(shape: Sequence[int]) -> list[int]:
    kept = list(shape)
    while kept and kept[-1] == 1:
        kept.pop()
    return kept


def _case(
    module: nn.Module,
    net: Net,
    names: dict[str, str],
    case: str,
    entry: dict[str, Any],
    document: dict[str, Any],
) -> list[tuple[str, float, float]]:
    assert net.run is not None
    inputs = {name: recipe.given(name, value) for name, value in entry["inputs"].items()}
    wanted = entry.get("grads")
    of_inputs = entry.get("grad_inputs") or {}
    for name in of_inputs:
        inputs[name] = inputs[name].requires_grad_()
    module.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(wanted is not None or bool(of_inputs)):
        outcome = net.run(module, case, inputs, document)
    missing = sorted(set(entry["outputs"]) - set(outcome.outputs))
    if missing:
        raise ValueError(f"{case}: our class gave no {missing}")
    outputs = {name: outcome.outputs[name] for name in entry["outputs"]}
    found = [
        (f"output {name}", recipe.output_error(outputs[name], digest), net.outputs_bound)
        for name, digest in entry["outputs"].items()
    ]
    if entry.get("scalars") and outcome.scalars is not None:
        shared = outcome.scalars.keys() & entry["scalars"].keys()
        errors = [recipe.scalar_error(outcome.scalars[k], entry["scalars"][k]) for k in shared]
        found.append(("scalars", max(errors, default=0.0), net.outputs_bound))
    if wanted is not None or of_inputs:
        recipe.probe_loss(outputs).backward()
        parameters = dict(module.named_parameters())
        gradients: dict[str, tuple[Tensor | None, list[float] | None]] = {
            name: (getattr(parameters.get(names[name]), "grad", None), digest)  # a buffer has none
            for name, digest in (wanted or {}).items()
        }
        gradients |= {name: (inputs[name].grad, digest) for name, digest in of_inputs.items()}
        largest = max((digest[1] for _, digest in gradients.values() if digest), default=0.0)
        errors_by_name = {
            name: recipe.gradient_error(name, gradient, digest, largest)
            for name, (gradient, digest) in gradients.items()
        }
        worst = max(errors_by_name, key=lambda name: errors_by_name[name], default="")
        found.append((f"gradients (worst: {worst})", errors_by_name.get(worst, 0.0), net.gradients_bound))
    return found
