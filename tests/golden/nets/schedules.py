"""Noise levels, losses and steps of the published trainers: a section of the file for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polymodal import recipe as recipes
from polymodal.core.sample import Batch
from polymodal.models import catalog
from polymodal.models.card import Output
from polymodal.models.nets.pipeline_open_sora import shift_of
from polymodal.objectives.diffusion import DiffusionObjective, shifted
from tests.golden import recipe
from tests.golden.net import Net

Found = list[tuple[str, float]]


def _inputs(section: dict[str, Any]) -> dict[str, Tensor]:
    return {name: recipe.given(name, entry) for name, entry in section["inputs"].items()}


def _rectified_flow(section: dict[str, Any]) -> Found:
    """Open-Sora 1.2: shifts by size, noise, loss, with and without frames that are given."""
    found = []
    before = torch.tensor(section["t_before"], dtype=torch.float64)
    for size, after in section["t_after"].items():
        height, width, frames = map(int, size.split("x"))
        made = 1000 * shifted(before / 1000, shift_of(frames, height, width))
        found.append((f"shift {size}", recipe.scalar_error(made, after)))
    card = catalog.cards()["open-sora-1.2"]
    process = card.family(card, {}, "nowhere").process()
    objective = DiffusionObjective(process, recipes.Diffusion())
    given = {name: tensor.float() for name, tensor in _inputs(section).items()}
    levels = torch.tensor(section["t"]) / process.scale
    mixed, target = objective._mixed(given["x"], given["noise"], levels)
    seen = torch.tensor(section["mask (false = given)"])[:, None, :, None, None]
    clean = (~seen).float().expand(-1, 1, *given["x"].shape[2:])
    for name, cells in (("", None), ("_masked", clean)):
        noisy = mixed if cells is None else torch.where(cells.bool(), given["x"], mixed)
        found.append((f"noisy{name}", recipe.output_error(noisy, section[f"noisy{name}"])))
        tensors = {"target": target, "weight": torch.ones(2), "level_weight": torch.ones(2)}
        if cells is not None:
            tensors["clean"] = cells
        losses = []
        for item in range(2):  # the published loss is one number a sample
            one = Batch({n: t[item : item + 1] for n, t in tensors.items()}, {}, groups={"kind": "video"})
            output = Output(given["prediction"][item : item + 1, : target.shape[1]])
            losses.append(float(objective.loss(output, one, {objective.term: 1.0})[0]))
        found.append((f"loss{name}", recipe.scalar_error(losses, section[f"loss{name}"])))
    return found


SECTIONS: dict[str, Callable[[dict[str, Any]], Found]] = {
    "open_sora_1_2_rflow": _rectified_flow,
}
"""A section of the file without an entry here is an error: what it is of is not built, or not compared."""


def _compare(document: dict[str, Any]) -> list[tuple[str, str, float]]:
    found = []
    for name, section in document.items():
        if not isinstance(section, dict):
            continue
        if name in SECTIONS:
            found += [(name, what, error) for what, error in SECTIONS[name](section)]
        else:
            found.append((name, "no comparison", float("inf")))
    return found


# levels, noise and losses are float32 here and there
NETS = [Net(("schedules",), compare=_compare, outputs_bound=1e-6)]
