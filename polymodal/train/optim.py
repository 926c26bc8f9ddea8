"""Optimizers, learning rates by tower or pattern, schedules, loss scaling and the weights' moving average.

State is kept by parameter name, so that a checkpoint fits any layout.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import to_device, to_host
from polymodal.core.user_code import load_object
from polymodal.distributed.collectives import with_local
from polymodal.models.card import ModelCard
from polymodal.recipe import Optim, Recipe, Schedule
from polymodal.runtime import device as devices

Towers = Mapping[str, tuple[str, ...]]


def in_tower(name: str, modules: Iterable[str]) -> bool:
    """Does a parameter belong to one of these module paths (`*` = one dotted part)?"""
    parts = name.split(".")
    for module in modules:
        pattern = module.split(".")
        if len(parts) >= len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern)):
            return True
    return False


def tower_of(name: str, towers: Towers) -> str | None:
    """Tower of a parameter; the longest module path wins, so that a projector inside a tower is its own."""
    paths = [(module, tower) for tower, modules in towers.items() for module in modules]
    holding = [(module.count("."), tower) for module, tower in paths if in_tower(name, (module,))]
    return max(holding, key=lambda each: each[0])[1] if holding else None


def matches(name: str, match: str, towers: Towers) -> bool:
    """Does `match` (a tower's name or a pattern with shell wildcards) mean this parameter?"""
    if match in towers:
        return tower_of(name, towers) == match
    return fnmatch.fnmatchcase(name, match) or in_tower(name, (match,))


def freeze(model: nn.Module, patterns: list[str], towers: Towers, always: tuple[str, ...] = ()) -> None:
    """Freeze the parameters that the patterns match, and those of the towers `always`. Raises PolymodalError
    where a pattern matches none."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if tower_of(name, towers) in always:
            parameter.requires_grad_(False)
    for pattern in patterns:
        matching = [name for name in parameters if matches(name, pattern, towers)]
        if not matching:
            raise PolymodalError(
                f"train.freeze: `{pattern}` is neither a tower of this model ({', '.join(towers)}) "
                "nor the pattern of a parameter.",
                "Name a tower, or a pattern of names with shell wildcards, such as *.visual.blocks.*",
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise PolymodalError(
            f"train.freeze = {patterns} leaves nothing to train.", "Freeze less, or add model.lora."
        )


@dataclass(frozen=True)
class Rate:
    """Peak learning rate and weight decay of a parameter."""

    lr: float
    weight_decay: float


def rate(name: str, parameter: Tensor, optim: Optim, towers: Towers) -> Rate:
    """From the first group that matches; 1-D parameters do not decay unless a group says so."""
    lr, decay = optim.lr, optim.weight_decay if parameter.ndim >= 2 else 0.0
    group = next((group for group in optim.groups if matches(name, group.match, towers)), None)
    if group is not None:
        if group.lr is not None:
            lr = group.lr
        elif group.lr_scale is not None:
            lr = optim.lr * group.lr_scale
        if group.weight_decay is not None:
            decay = group.weight_decay
    return Rate(lr, decay)


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """Factor of the peak learning rate at optimizer step `step` (from 0) of `steps`: a pure function."""
    warmup = schedule.warmup if schedule.warmup >= 1 else schedule.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    low = schedule.min_ratio
    progress = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return low + (1 - low) * (1 - progress)
    if schedule.name == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    start = steps * (1 - schedule.decay)  # wsd: warm up, stay, decay
    if step < start:
        return 1.0
    return low + (1 - low) * max(0.0, (steps - step) / max(1.0, steps - start))


OWN = ("adamw", "muon")
TRIED = (64, 128)
"""A matrix that is large enough for optimizers that compress what they keep to do so."""


def named_class(settings: Optim) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """(class, its arguments, what it keeps) of optim.name = module:Class, which is tried on a small matrix.

    A run must go on from a checkpoint at any number of processes, and step on shards alone: everything that
    an optimizer keeps has to be a plain tensor of its parameter's shape or of one element. Raises
    PolymodalError for anything else (means of rows and columns, codes of 8 bits, numbers in groups), for
    unknown arguments and for what fails.
    """
    named = f"optim.name = {settings.name}"
    cls, arguments = load_object(settings.name, "optim.name"), dict(settings.arguments)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise PolymodalError(f"{named} is no torch.optim.Optimizer.", "Name a class, e.g. torch.optim:NAdam.")
    known = set(inspect.signature(cls).parameters) - {"params", "lr", "weight_decay"}
    for key in (key for key in arguments if key not in known):
        own = key in ("params", "lr", "weight_decay")
        hint = f"Set optim.{key}." if own and key != "params" else f"It takes {', '.join(sorted(known))}."
        raise PolymodalError(f"optim.arguments: {settings.name} is not given `{key}` there.", hint)
    return cls, arguments, _tried(cls, settings)


def _tried(cls: Any, settings: Optim) -> dict[str, Tensor]:
    named, instead = (
        f"optim.name = {settings.name}",
        "Use adamw or muon, or a class that keeps tensors alone.",
    )
    parameter = nn.Parameter(torch.ones(TRIED))
    try:
        part = cls([{"params": [parameter]}], **_common(cls, settings), **settings.arguments)
        before: list[dict[str, Any]] = []
        for step in (1.0, 2.0):
            parameter.grad = torch.full(TRIED, step)
            part.step()
            before.append({k: v for k, v in part.param_groups[0].items() if k != "params"})
    except Exception as error:
        raise PolymodalError(
            f"{named} fails on a matrix: {type(error).__name__}: {error}.", "Correct optim.arguments."
        ) from error
    changed = [key for key in before[1] if before[1][key] != before[0].get(key)]
    if changed:
        raise PolymodalError(
            f"{named} counts in its groups ({', '.join(changed)}), which no checkpoint holds.", instead
        )
    kept = {kind: value for kind, value in part.state[parameter].items() if value is not None}
    for kind, value in kept.items():
        if type(value) is not Tensor or (value.numel() != 1 and value.shape != parameter.shape):
            shape = f" of {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise PolymodalError(
                f"{named} keeps `{kind}` of a matrix {list(TRIED)} as {type(value).__name__}{shape}, which "
                "cannot be cut and resumed with it.",
                instead,
            )
    return kept


def _common(cls: Any, settings: Optim) -> dict[str, Any]:
    """lr and weight_decay, as far as a class takes them."""
    takes = inspect.signature(cls).parameters
    return {k: getattr(settings, k) for k in ("lr", "weight_decay") if k in takes}


class Optimizer:
    """AdamW, Muon for the blocks' matrices with AdamW for the rest, or a class; one object for the trainer.

    named: trainable parameters by name. Parameters on different meshes (FSDP, FSDP x TP, experts) are in
    separate groups, as torch's multi-tensor kernels want. offload: the state stays on the host between steps,
    and is moved to its parameters' device HOST_PART bytes at a time.
    """

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        optim: Optim,
        towers: Towers,
        muon_names: Iterable[str] = (),
        offload: bool = False,
    ):
        self.named, self.offload = named, offload
        muon_names = set(muon_names) if optim.name == "muon" else set()
        groups: dict[tuple, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            use_muon = name in muon_names and parameter.ndim == 2
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            key = (use_muon, rate(name, parameter, optim, towers), mesh, parameter.dtype)
            groups.setdefault(key, []).append(parameter)
        adam: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for (use_muon, peak, _, _), parameters in groups.items():
            group = {"params": parameters, "lr": peak.lr, "weight_decay": peak.weight_decay}
            (muon if use_muon else adam).append(group)
        self.parts: list[torch.optim.Optimizer] = []
        self.kept: dict[str, Tensor] = {}
        if adam and optim.name not in OWN:
            cls, arguments, self.kept = named_class(optim)
            self.parts.append(cls(adam, **_common(cls, optim), **arguments))
        elif adam:
            fused = next(iter(named.values())).device.type != "meta"
            self.parts.append(
                torch.optim.AdamW(adam, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
            )
        if muon:
            options: dict[str, Any] = {"momentum": optim.muon_momentum, "ns_steps": optim.muon_steps}
            self.parts.append(torch.optim.Muon(muon, lr=optim.lr, adjust_lr_fn="match_rms_adamw", **options))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_rate(self, factor: float) -> None:
        """Learning rate = peak * factor, group by group."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        for part in self.parts:
            if self.offload:
                _step_from_host(part)
            else:
                part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self, create: bool = False) -> dict[str, Tensor]:
        """{"<kind>.<parameter name>": tensor}; `create` makes the zero state of a fresh optimizer."""
        names = {id(p): n for n, p in self.named.items()}
        out: dict[str, Tensor] = {}
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if create and not part.state[parameter]:
                    part.state[parameter] = _zero_state(part, parameter, self.kept)
                for kind, value in part.state[parameter].items():
                    if isinstance(value, Tensor):
                        out[f"{kind}.{names[id(parameter)]}"] = value
        return out


def build(trainable: dict[str, nn.Parameter], recipe: Recipe, card: ModelCard) -> Optimizer:
    """The optimizer of a run. Muon takes the matrices of the card's blocks."""
    blocks = [name for name in trainable if in_tower(name, card.blocks)]
    return Optimizer(trainable, recipe.optim, card.towers, blocks, "optimizer" in recipe.parallel.offload)


def _zero_state(part: torch.optim.Optimizer, parameter: Tensor, kept: dict[str, Tensor]) -> dict[str, Any]:
    if kept:
        device = _local(parameter).device
        return {
            kind: torch.zeros_like(parameter, dtype=value.dtype)
            if value.numel() != 1
            else torch.zeros_like(value, device=device)
            for kind, value in kept.items()
        }
    if isinstance(part, torch.optim.Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
    return {**moments, "step": torch.zeros((), dtype=torch.float32, device=_local(parameter).device)}


HOST_PART = 256 << 20
"""Bytes of parameters whose state is on the device at a time when it is kept on the host."""


def _step_from_host(part: torch.optim.Optimizer) -> None:
    """One step of an optimizer whose state is on the host; parameters without a gradient are skipped."""
    gradients = {p: p.grad for group in part.param_groups for p in group["params"] if p.grad is not None}
    for parameter in gradients:
        parameter.grad = None
    for parameters in _host_parts(gradients):
        for parameter in parameters:
            parameter.grad = gradients[parameter]
            state_to_device(part.state[parameter], _local(parameter).device)
        part.step()
        for parameter in parameters:
            parameter.grad = None
            state_to_host(part.state[parameter])
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    if gradients:
        devices.synchronize(_local(next(iter(gradients))).device.type)  # the host may read its state now


def _host_parts(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters, each as long as it begins below HOST_PART bytes."""
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if part and size >= HOST_PART:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += _local(parameter).nbytes
    if part:
        yield part


def state_to_device(state: dict[str, Any], device: torch.device) -> None:
    """A parameter's optimizer state to its device."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device.type != device.type:
            state[key] = with_local(value, lambda part: to_device(part, device))


def state_to_host(state: dict[str, Any]) -> None:
    """And back to page-locked memory of the host, without waiting; the count of steps stays where it is."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim and value.device.type != "cpu":
            state[key] = with_local(value, to_host)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """Exponential moving average of the trainable parameters, float32, placed like them."""

    def __init__(self, named: dict[str, nn.Parameter], decay: float):
        self.named, self.decay = named, decay
        self.shadow = {name: p.detach().clone().to(torch.float32) for name, p in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.named.items():
            _local(self.shadow[name]).lerp_(_local(parameter.detach()).to(torch.float32), 1 - self.decay)


class LossScaler:
    """Halves the fp16 loss scale on overflow, doubles it after `growth` good steps (arXiv:1710.03740)."""

    def __init__(self, enabled: bool, scale: float = 2.0**16, growth: int = 2000):
        self.enabled, self.growth = enabled, growth
        self.scale = scale if enabled else 1.0
        self.good = 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good = max(1.0, self.scale / 2), 0
            return
        self.good += 1
        if self.good >= self.growth:
            self.scale, self.good = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good": self.good}

    def load(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            self.scale, self.good = float(state["scale"]), int(state["good"])
