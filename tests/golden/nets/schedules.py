"""Noise levels, losses and steps of the published trainers: a section of the file for each."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from polymodal import recipe as recipes
from polymodal.core.sample import Batch
from polymodal.models import catalog
from polymodal.models.card import Output
from polymodal.models.nets import pipeline_open_sora_2, pipeline_open_sora_plan
from polymodal.models.nets.clip_pipeline import ClipPipeline, shifted_levels
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


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _open_sora_2(section: dict[str, Any]) -> Found:
    """Shifts by the latents' size, and the levels of a sampler so shifted."""
    found = []
    for name, value in section.items():
        if name.startswith("alpha"):
            for size, shift in value.items():
                height, width, frames = _numbers(size)
                made = pipeline_open_sora_2.shift_of(frames, height, width)
                found.append((f"shift {size}", recipe.scalar_error([made], [shift])))
        else:  # schedule_<steps>_first<count> at <height>,<width>,<frames>
            steps, count, height, width, frames = _numbers(name)
            levels = shifted_levels(steps, pipeline_open_sora_2.shift_of(frames, height, width))
            found.append((name, recipe.scalar_error(levels[:count], value)))
    return found


def _step_video(section: dict[str, Any]) -> Found:
    """Times of Euler's steps from noise to data, and what so many steps come to."""
    found, given = [], _inputs(section)
    for name, value in section.items():
        if name.startswith("times"):
            for asked, times in value.items():
                steps, shift = _numbers(asked)
                made = 1 - shifted_levels(steps, shift)
                # published in float32, so by the largest, as outputs are
                found.append((asked, float((made - torch.tensor(times, dtype=made.dtype)).abs().max())))
        elif name.startswith("after"):
            steps, shift = _numbers(name)
            times = 1 - shifted_levels(steps, shift)
            pipeline: Any = SimpleNamespace(progress_bar=list)
            made = ClipPipeline.flow(pipeline, given["start"], times, lambda x, t, k: given[f"velocity_{k}"])
            found.append((name, recipe.output_error(made, value)))
    return found


def _masks(section: dict[str, Any]) -> Found:
    """Open-Sora Plan 1.3 I2V: a mask of pixels over the latents' cells."""
    found = []
    for name, case in section.items():
        if not isinstance(case, dict):
            continue
        frames, height, width = case["size"]
        mask = torch.ones(1, 1, frames, height, width, dtype=torch.float64)
        for part in case["mask"].split(",", 1)[1].split(", 0 on rows"):
            rows = re.search(r"(\d+)\.\.(\d+), columns (\d+)\.\.(\d+) of the last frame", part)
            if rows:
                top, bottom, left, right = map(int, rows.groups())
                mask[:, :, -1, top : bottom + 1, left : right + 1] = 0
        mask[:, :, 0] = 0
        time, cells = case["output"]["shape"][1], case["output"]["shape"][2:]
        made = pipeline_open_sora_plan.cells_of_mask(mask, time, tuple(cells[1:]))
        found.append((name, recipe.output_error(made, case["output"])))
    return found


def _self_forcing(section: dict[str, Any]) -> Found:
    """Levels of its few steps, and of the steps at which a teacher's states are kept."""
    few = section["denoising_steps"]
    found = [("denoising_steps", recipe.scalar_error(1000 * shifted_levels(len(few), 5.0)[:-1], few))]
    for name, levels in section.items():
        if name.startswith("ode_pairs") and isinstance(levels, list):
            (steps,) = _numbers(name)
            made = shifted_levels(steps, section["ode_pairs_shift"])[: -1 : steps // len(levels)]
            found.append((name, recipe.scalar_error(made, levels)))
    return found


SECTIONS: dict[str, Callable[[dict[str, Any]], Found]] = {
    "open_sora_1_2_rflow": _rectified_flow,
    "open_sora_2_shift": _open_sora_2,
    "step_video_euler": _step_video,
    "open_sora_plan_1_3_mask": _masks,
    "self_forcing": _self_forcing,
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
