"""A golden file tried: our class, the config translated, weights filled by name, every case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.models import library
from polymodal.models.slices import Stored, copies
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
    entries = load(module, net, document)
    results = []
    for case, entry in document["cases"].items():
        results += [
            Result(model, case, *found) for found in _case(module, net, entries, case, entry, document)
        ]
    return results


def load(module: nn.Module, net: Net, document: dict[str, Any]) -> dict[str, Stored]:
    """Fill `module`, whose keys and shapes must be the file's; returns our name -> its boxes in the file's
    tensors: by `net.names` or, without it, by the class's own conversion rules (or `net.rules`)."""
    published: dict[str, Any] = document["state_dict"]
    state = module.state_dict(keep_vars=True)
    if net.names is not None:
        names = net.names(module, document)
        entries = {
            name: Stored.whole(key, tuple(state[name].shape) if name in state and same else shape)
            for key, shape in published.items()
            for name in [names.get(key, key)]
            for same in [name in state and _core(state[name].shape) == _core(shape)]
        }
        extra = sorted(entries[name].keys[0] for name in set(entries) - set(state))
    else:
        rules = net.rules(module, document) if net.rules else None
        found = library.layout(module, published, rules)
        entries, extra = found.entries, sorted(found.unexpected)
    # tables of the published module that no class needs to store
    extra = [key for key in extra if key not in (document.get("buffers") or ())]
    missing = sorted(set(state) - set(entries))
    if missing or extra:
        raise ValueError(f"keys differ: the file alone has {extra[:6]}, our class alone {missing[:6]}")
    shape = _core if net.names else list  # renamed, a 1x1 convolution may be a linear layer
    different = [name for name, stored in entries.items() if shape(state[name].shape) != shape(stored.shape)]
    if different:
        name = different[0]
        keys, shape = entries[name].keys, list(entries[name].shape)
        raise ValueError(f"shapes differ: {name} is {list(state[name].shape)}, in the file {keys} {shape}")
    kept = set(document.get("kept") or ())
    with torch.no_grad():
        for name, stored in entries.items():
            for key, box, view in copies(stored, state[name]):
                if not any(part in key for part in kept) and view.is_floating_point():
                    view.copy_(recipe.weight(key, published[key], document)[box].reshape(view.shape))
    return entries


def _core(shape: Sequence[int]) -> list[int]:
    kept = list(shape)
    while kept and kept[-1] == 1:
        kept.pop()
    return kept


def as_published(
    module: nn.Module, entries: dict[str, Stored], document: dict[str, Any]
) -> dict[str, Tensor | None]:
    """Gradients by the file's names, in the file's shapes; None where nothing came."""
    parts: dict[str, Tensor | None] = {}
    parameters = dict(module.named_parameters())
    for name, stored in entries.items():
        gradient = parameters[name].grad if name in parameters else None
        for key, box, view in [] if gradient is None else copies(stored, gradient):
            if parts.get(key) is None:
                parts[key] = view.new_zeros(document["state_dict"][key])
            parts[key][box] = view  # type: ignore[index]
    return parts


def _case(
    module: nn.Module,
    net: Net,
    entries: dict[str, Stored],
    case: str,
    entry: dict[str, Any],
    document: dict[str, Any],
) -> list[tuple[str, float, float]]:
    assert net.run is not None
    given = entry["inputs"]
    if "as_in" in given:  # those of another case
        given = document["cases"][given["as_in"]]["inputs"]
    inputs = {name: recipe.given(name, value) for name, value in given.items()}
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
    digests = {  # "as in CASE": that case's
        name: document["cases"][digest.removeprefix("as in ")]["outputs"][name]
        if isinstance(digest, str)
        else digest
        for name, digest in entry["outputs"].items()
    }
    found = [
        (f"output {name}", recipe.output_error(outputs[name], digest), net.outputs_bound)
        for name, digest in digests.items()
    ]
    if entry.get("scalars") and outcome.scalars is not None:
        shared = outcome.scalars.keys() & entry["scalars"].keys()
        errors = [recipe.scalar_error(outcome.scalars[k], entry["scalars"][k]) for k in shared]
        found.append(("scalars", max(errors, default=0.0), net.outputs_bound))
    if wanted is not None or of_inputs:
        recipe.probe_loss(outputs).backward()
        if net.names is None:
            published = as_published(module, entries, document)
        else:
            parameters = dict(module.named_parameters())  # those of now: a case may change its head
            published = {
                stored.keys[0]: parameters[name].grad
                for name, stored in entries.items()
                if name in parameters
            }
        gradients: dict[str, tuple[Tensor | None, list[float] | None]] = {
            name: (published.get(name), digest) for name, digest in (wanted or {}).items()
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
