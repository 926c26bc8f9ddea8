"""Weights into a model: each rank reads, or draws, only the slices that it holds. saving.py is the way out.

Works on plain tensors and DTensors alike. library.py has transformers' rules for keys and initial values,
storage.py reads the files, slices.py has the arithmetic of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import LazyTensors, has_nan, require_finite
from polymodal.core.text import nearest
from polymodal.models import catalog, library, quantised
from polymodal.models.card import PrunedModule
from polymodal.models.family import Family
from polymodal.models.initial import draw, shielded
from polymodal.models.library import Layout, plain
from polymodal.models.slices import Stored, copies, local_part, local_spans, reads, scatter
from polymodal.models.storage import Files, dtype_of


@dataclass
class LoadReport:
    """What `load` did on this rank. drawn: parameters that the files may lack and do."""

    bytes_read: int = 0
    bytes_held: int = 0
    drawn: list[str] = field(default_factory=list)


def load(
    model: nn.Module,
    family: Family | None = None,
    source: Any = None,
    *,
    device: torch.device | str | None = None,
    offloaded: bool = False,
    files: Any = None,
) -> LoadReport:
    """Fill a model, sharded or not, from a checkpoint; each rank reads only the slices that it holds.

    model:  on meta or real; parameters plain or DTensors. They keep their dtype, whatever the file's.
    source: directory, hub id, or the recipe's model section; None: the family's own.
    device: target; None: where the parameters are, or the device type of their mesh.
    files: tensors under the hub's names (storage.foreign), instead of the source's own.
    offloaded: parameters stay on the host (FSDP2's CPUOffloadPolicy), only buffers go to the device. Adapters
    are given memory and left empty (lora.initialise fills them); non-persistent buffers are rebuilt.
    Collective when the model is distributed: a failure of one rank is raised on all. Raises PolymodalError
    for anything missing, unexpected, of another shape, not a number, or not readable.
    """
    directory = directory_of(source, family)
    report = LoadReport()

    def work() -> None:
        held = Files(directory) if files is None else files
        names = catalog.reader(directory).tensor_names(directory) if files is None else None
        with quantised.unpacked(model):
            plan = library.layout(model, held.shapes, names)
            report.drawn = _check(model, plan, held)
        materialise(model, device, offloaded)
        known = dict(model.named_parameters())
        rebuild_buffers(model, persistent=any(name not in known for name in report.drawn))
        written = _read(model, plan, held, report)  # last, so that no initialiser overwrites what was read
        whole = library.targets(model)
        values = random(model) if report.drawn else {}
        for name in report.drawn:
            if name in values:
                scatter(values[name], whole[name])
        for name, (local, version) in written.items():
            if local._version != version:
                raise RuntimeError(f"{name} was changed after it was read from {held.directory}")

    _raise_on_all_ranks(model, work)
    return report


def directory_of(source: Any, family: Family | None) -> Path:
    """The local directory of a source, or of the family's own weights."""
    if source is None:
        source = getattr(family, "weights_source", None) or getattr(family, "source", None)
    if source is None:
        raise ValueError("a family or a source is needed")
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        part = Path(source) / getattr(family, "part", "")  # of a pipeline, the denoiser's directory
        return part if part.is_dir() else Path(source)
    return Path(catalog.resolve(getattr(source, "source", source), getattr(source, "revision", None)))


def _raise_on_all_ranks(model: nn.Module, work: Callable[[], None]) -> None:
    """Run `work`; when the model is distributed, a failure of one rank is raised on all."""
    distributed = (
        dist.is_initialized()
        and dist.get_world_size() > 1
        and (
            any(isinstance(p, DTensor) for p in model.parameters())
            or any(isinstance(m, PrunedModule) for m in model.modules())  # a stage of a pipeline
        )
    )
    if not distributed:
        return work()
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    shown = failure
    if failure is not None and not isinstance(failure, PolymodalError):
        shown = PolymodalError(f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}")
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, shown)
    for error in (failure, *failures):
        if error is not None:
            raise error


def _check(model: nn.Module, plan: Layout, files: Files) -> list[str]:
    """Compare names and shapes; give tied weights their file key. Returns the parameters to be drawn."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise PolymodalError(
            f"{files.directory} holds quantised weights (quantization_config in config.json).",
            "Train from the checkpoint that is not quantised.",
        )
    key_of = {name: key for key, name in plan.unexpected.items()}
    missing: list[str] = []
    drawn: list[str] = []
    misshapen: list[str] = []
    tensors = library.aliases(model)
    for tensor, names in tensors:
        found = next((n for n in names if plan.shape(n) is not None), None)
        if found is None and names[-1] in key_of:  # tied to a parameter that another stage holds
            key = key_of[names[-1]]
            found = names[0]
            plan.entries[found] = Stored.whole(key, files.shapes[key])
            del plan.unexpected[key]
        if found is None:
            (drawn if library.optional(model, names[0]) else missing).append(names[0])
        elif plan.shape(found) != tuple(tensor.shape):
            shapes = list(plan.shape(found) or ()), list(tensor.shape)
            misshapen.append(f"{found} is {shapes[0]} in the file, {shapes[1]} in the model")
    whole = library.targets(model)
    for name, other in library.tied(model).items():
        if name in whole and other in whole and whole[name] is not whole[other]:
            raise RuntimeError(
                f"{name} and {other} are tied by the config, but are two parameters of this model"
            )
    what = f"{files.directory} for {library.class_of(model).__name__}"
    unexpected = _unexpected(model, plan, files.directory)
    if missing:
        raise PolymodalError(
            f"{what}: {len(missing)} of {len(tensors)} parameters are not in the checkpoint: "
            f"{_some(missing)}.",
            _nearest(missing[0], unexpected or list(plan.entries)),
        )
    if misshapen:
        raise PolymodalError(
            f"{what}: {len(misshapen)} tensors have another shape: {misshapen[0]}.",
            "Drop the model.config overrides that change sizes, or set model.init: random.",
        )
    if unexpected:
        raise PolymodalError(
            f"{what}: {len(unexpected)} tensors of the checkpoint have no place in the model: "
            f"{_some(unexpected)}.",
            _nearest(plan.unexpected[unexpected[0]], [n for _, names in tensors for n in names]),
        )
    return drawn


def _unexpected(model: nn.Module, plan: Layout, directory: Path) -> list[str]:
    """File keys without a parameter that are an error: not those of blocks that model.config cut off."""
    keys = [key for key, name in plan.unexpected.items() if not library.ignorable(model, key, name)]
    cut_off = {key for key in keys if library.beyond(model, plan.unexpected[key])}
    if cut_off and (directory / "config.json").is_file():
        if library.overridden(model, catalog.read_config(directory)):
            return [key for key in keys if key not in cut_off]
    return keys


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _nearest(name: str, have: Sequence[str]) -> str:
    near = nearest(name, have, most=2)
    if not near:
        return "Is it a checkpoint of this architecture, and whole?"
    return f"Nearest to {name}: {', '.join(near)}."


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device | str | None = None, offloaded: bool = False) -> None:
    """Give memory, uninitialised, to every parameter and buffer that is on meta; tied parameters stay one.

    offloaded: to parameters on the host, whatever the device.
    """
    target = torch.device(device) if device is not None else _device_of(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                owners.setdefault(id(parameter), []).append((module, name))
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept: its id must not be given again

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            home = torch.device("cpu") if offloaded and isinstance(tensor, nn.Parameter) else target
            made[id(tensor)] = (tensor, torch.empty_like(tensor, device=home))
        return made[id(tensor)][1]

    # not to_empty, which would wipe what is real already; FSDP2 renews its references in here
    model._apply(real)
    for (module, name), *others in owners.values():
        for other, label in others:
            other._parameters[label] = module._parameters[name]
    for module in model.modules():  # diffusers' models are built with their buffers' values, on the CPU
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device.type != target.type:
                module._buffers[name] = buffer.to(target)


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
            return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return torch.device("cpu")


@torch.no_grad()
def _read(model: nn.Module, plan: Layout, files: Files, report: LoadReport) -> dict[str, tuple[Tensor, int]]:
    """Fill what the files have. Returns of each name the local tensor and the version that it has now."""
    written: dict[str, tuple[Tensor, int]] = {}
    held: dict[str, Tensor] = {}  # by the name that the files have
    twins: list[tuple[str, str]] = []  # tied weights that the files hold twice
    for tensor, names in library.aliases(model):
        first, *more = [name for name in names if plan.shape(name) is not None] or [""]
        if first:
            held[first] = tensor
            twins += [(first, other) for other in more if other in plan.entries]

    low = quantised.layers(model)
    for name in sorted(held.keys() & plan.entries.keys(), key=lambda n: files.order[plan.entries[n].keys[0]]):
        stored, local = plan.entries[name], local_part(held[name])
        if name in low:
            _read_quantised(low[name], stored, held[name], files)
        for key, box, view in copies(stored, held[name]) if name not in low else ():
            files.read(key, box, view)
        written[name] = (local, local._version)
        report.bytes_held += local.numel() * local.element_size()
        buffer = not isinstance(held[name], nn.Parameter)
        require_finite([(name, local)], files.where(stored.keys[0]), infinite=buffer)
    for name, other in twins:
        if not all(files.equals(*part) for part in copies(plan.entries[other], held[name])):
            raise PolymodalError(
                f"{files.directory}: config.json ties {other} to {name}, "
                "but the files hold two different tensors.",
                "Set tie_word_embeddings to false in config.json, or model.config.tie_word_embeddings=false.",
            )
    files.close()
    report.bytes_read = files.bytes_read
    return written


def _read_quantised(layer: nn.Linear, stored: Stored, weight: Tensor, files: Files) -> None:
    """Fill this rank's rows of a quantised weight: read whole, one layer at a time, and packed."""
    rows, local = local_spans(weight)[0], local_part(weight)
    whole = torch.empty(local.shape[0], layer.in_features)
    for key, box, view in reads(stored, [rows, [(0, layer.in_features)]], whole):
        files.read(key, box, view)
    require_finite([(stored.keys[0], whole)], files.where(stored.keys[0]))
    local.copy_(quantised.pack(whole.to(local.device), layer.base_kind))  # type: ignore[arg-type]


def read(model: nn.Module, source: str | Path, files: Any = None) -> LazyTensors:
    """The parameters of a checkpoint by plain name, whole, in the file's dtype, in the order of the files.

    model: for names and shapes; may be on meta. files: as in `load`. For merging and re-writing without
    holding a model. Raises PolymodalError as `load` does for names and shapes.
    """
    names = catalog.reader(source).tensor_names(Path(source)) if files is None else None
    files = Files(Path(source)) if files is None else files
    plan = library.layout(model, files.shapes, names)
    drawn = _check(model, plan, files)
    whole = library.targets(model)

    def stored(name: str) -> Tensor:
        pieces = plan.entries[name]
        tensor = torch.empty(pieces.shape, dtype=dtype_of(files.dtypes[pieces.keys[0]]))
        for part in copies(pieces, tensor):
            files.read(*part)
        files.close()
        buffer = not isinstance(whole.get(name), nn.Parameter)
        require_finite([(name, tensor)], files.where(pieces.keys[0]), infinite=buffer)
        return tensor

    names = sorted(plan.entries, key=lambda n: files.order[plan.entries[n].keys[0]])
    readers: dict[str, Callable[[str], Tensor]] = dict.fromkeys(names, stored)
    if drawn:
        given = random(model)
        readers |= {name: given.__getitem__ for name in drawn if name in given}
    return LazyTensors(readers)


# -- random values, buffers


def random(model: nn.Module, family: Family | None = None, seed: int = 0) -> LazyTensors:
    """Every parameter as the library would draw it, from (seed, its name), by plain name; no adapters.

    model: may be on meta. Asking raises PolymodalError for a parameter that the library has no rule for.
    """
    ties = library.tied(model)
    zero = getattr(family, "zero", ())

    def drawn(name: str, module: nn.Module, own: str, rule: Any) -> Tensor:
        if any(fnmatchcase(name, pattern) for pattern in zero):
            return torch.zeros(module._parameters[own].shape)  # type: ignore[union-attr]
        value = None if rule is None else draw(module, own, rule, ties.get(name, name), seed)
        if value is None:
            raise PolymodalError(
                f"There is no rule to draw {name} ({library.class_of(module).__name__}).",
                "Start from a checkpoint that has it.",
            )
        return value

    readers: dict[str, Callable[[str], Tensor]] = {}
    for path, module, rule in library.rules(model):
        for own, parameter in module._parameters.items():
            full = f"{path}.{own}" if path else own
            if parameter is not None and not library.ADAPTER.search(full):
                readers.setdefault(plain(full), partial(drawn, module=module, own=own, rule=rule))
    return LazyTensors(readers)


def initial_buffers(model: nn.Module) -> LazyTensors:
    """Persistent buffers as the library sets them, by plain name; a model on meta keeps them, on the CPU."""
    parameters = {id(p) for p in model.parameters()}
    names = [name for name, tensor in library.targets(model).items() if id(tensor) not in parameters]
    if names:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
        rebuild_buffers(model, persistent=True)
    return LazyTensors(dict.fromkeys(names, lambda name: library.targets(model)[name]))


@torch.no_grad()
def initialise(
    model: nn.Module,
    family: Family | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    offloaded: bool = False,
) -> None:
    """Draw every parameter as the library would, from (seed, its name): the same values under every layout.

    Adapters get memory and stay empty; buffers get the library's values. Raises PolymodalError without a
    rule.
    """
    materialise(model, device, offloaded)
    rebuild_buffers(model, persistent=True)
    low, found = quantised.layers(model), library.aliases(model)
    with quantised.unpacked(model):
        values = random(model, family, seed)
        for tensor, names in found:
            if names[0] in values:
                value = values[names[0]]
                layer = low.get(names[0])
                scatter(value if layer is None else quantised.pack(value, str(layer.base_kind)), tensor)


@torch.no_grad()
def rebuild_buffers(model: nn.Module, persistent: bool = False) -> None:
    """Compute again each buffer that no checkpoint has (rotary tables); persistent: all buffers.

    The library's initialiser is run on each module that has some, with all parameters of the module and of
    its
    children shielded: some initialisers draw for their children too (CLIPVisionEmbeddings). A buffer that it
    does not set is taken from a fresh module of the same class and config. Raises if neither sets it.
    """
    if library.builds_buffers(model):
        return
    for path, module, rule in library.rules(model):
        names = {n for n, buffer in module._buffers.items() if buffer is not None}
        if not persistent:
            names &= module._non_persistent_buffers_set
        if not names:
            continue
        before = {n: (module.get_buffer(n), module.get_buffer(n)._version) for n in names}
        if rule is not None:
            with shielded(module, buffers=names):
                rule(module)
        for name, (held, version) in sorted(before.items()):
            buffer = module.get_buffer(name)
            unchanged = buffer is held and buffer._version == version
            known = not unchanged or _set_as_new(module, name)
            if not known or buffer.is_meta or has_nan(local_part(buffer)):
                raise PolymodalError(
                    f"The buffer {path}.{name} of {library.class_of(module).__name__} has no values.",
                    "This is a defect: please report it.",
                )


def _set_as_new(module: nn.Module, name: str) -> bool:
    """Set a buffer as in a fresh module of the same class and config. False if none can be made."""
    try:
        with torch.device("cpu"):
            fresh = library.class_of(module)(module.config).get_buffer(name)
    except (AttributeError, TypeError, ValueError):
        return False
    module.get_buffer(name).copy_(fresh)
    return True
