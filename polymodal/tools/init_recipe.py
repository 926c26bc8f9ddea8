"""Writes recipes: a commented starting point for a model, a task and a number of devices, with the recommended layout.

Sees the cards and the recipe. What it writes always validates; figures in its comments are estimates and say so.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.tools import advise

TASKS = {
    "sft": "full fine-tuning",
    "lora": "LoRA fine-tuning",
    "pretrain": "pretraining from random weights",
    "dreambooth": "DreamBooth, LoRA on a few pictures of one subject",
}
ADAPTERS = ("lora", "dreambooth")
DATA = "data/train.json"
DEVICE_GIB = 64
"""Memory of the accelerators that recommendations are made for."""
FULL_BYTES = 16
"""A trained parameter in mixed precision: float32 weight, gradient, and Adam's two moments."""
FROZEN_BYTES = 2
PICTURE = 1024 * 1024
"""Pixels of a picture where the card says nothing."""


@dataclass(frozen=True)
class Plan:
    """What is written: the source and the layout for `devices` accelerators."""

    card: ModelCard
    size: str
    source: str
    task: str
    devices: int
    layout: dict[str, Any]
    state_gib: float  # weights, gradients and optimizer a device: an estimate
    activation_gib: float  # kept activations a device without recompute: an estimate


def plan(model: str, task: str, size: str | None, devices: int | None) -> Plan:
    """Choose the size and the layout. Raises PolymodalError for unknown names, tasks and impossible device counts."""
    if task not in TASKS:
        raise PolymodalError(f"--task {task} is not known.", did_you_mean(task, TASKS))
    card, key, source = _identify(model)
    if size is not None:
        found = size.lower()
        if found not in card.sizes:
            begins = [k for k in card.sizes if k.split("-")[0] == found]  # 235b for 235b-a22b
            if len(begins) != 1:
                raise PolymodalError(
                    f"{card.name} has no size {size}.", f"Its sizes: {', '.join(card.sizes)}."
                )
            found = begins[0]
        key = found
    key = key or advise.middle(card)
    if task == "dreambooth" and task not in card.methods:
        does = ", ".join(c.name for c in catalog.cards().values() if task in c.methods)
        raise PolymodalError(f"{card.name} has no recipe for DreamBooth.", f"These have: {does}.")
    facts = card.sizes[key]
    count = devices or (facts.devices if task not in ADAPTERS else max(1, min(8, facts.devices // 2)))
    layout = {
        axis: n
        for axis, n in facts.layout.items()
        if axis != "dp_shard" and n != 1 and axis not in card.limits
    }
    if task in ADAPTERS and facts.parameters * FROZEN_BYTES < 0.6 * DEVICE_GIB * count:
        layout.pop("tp", None)  # frozen weights are small enough for FSDP alone
    if "tp" in layout:
        layout["tp"] = math.gcd(int(layout["tp"]), count)
        if layout["tp"] == 1:
            del layout["tp"]
    each = FROZEN_BYTES if task in ADAPTERS else FULL_BYTES
    state = facts.parameters * 1e9 * each / count / 2**30
    dense = facts.active or facts.parameters
    hidden = math.sqrt(dense * 1e9 / facts.layers / 12)  # a layer has about 12 x hidden^2 weights
    # Korthikanti et al. 2022: 34 bytes a token, layer and hidden unit, without the scores that flash attention never keeps
    activations = 34 * hidden * facts.layers * 4096 / layout.get("tp", 1) / 2**30
    if state + activations > 0.8 * DEVICE_GIB:
        layout["recompute"] = "full"
    return Plan(card, key, source or facts.hub, task, count, layout, state, activations)


def _identify(model: str) -> tuple[ModelCard, str | None, str]:
    """(card, size, source) of a name, hub id or directory; source "" = the size's own hub id."""
    known = None if os.path.isdir(model) else catalog.named(model)
    if known is not None:
        return (*known, "")
    later = next((f for f in advise.PLANNED if model.lower() in (f.name, *f.aliases)), None)
    if later is not None and not os.path.exists(model):
        raise PolymodalError(f"{later.name} has no card here yet.", "`polymodal models` lists what there is.")
    near = catalog.nearest(model)
    if not os.path.isdir(model) and not catalog.HUB_ID.match(model):
        raise PolymodalError(
            f"There is no model `{model}`.",
            f"Did you mean {' or '.join(near)}?" if near else "`polymodal models` lists them.",
        )
    card = catalog.find(model)
    return card, _size_of(model, card), model


def _size_of(directory: str, card: ModelCard) -> str | None:
    """The published size whose layers the directory's config.json has."""
    part = getattr(card.family, "part", "") if card.kind == "generation" else ""
    path = Path(directory) / part / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    text = config.get("text_config") or config
    layers = text.get("num_hidden_layers", config.get("num_hidden_layers", config.get("num_layers")))
    fits = [key for key, size in card.sizes.items() if size.layers == layers]
    named = [key for key in fits if key.split("-")[0] in directory.lower()]
    return next(iter(named or fits), None)


def text(
    plan: Plan, data: str, *, name: str | None = None, base: str | None = None, file: str | None = None
) -> str:
    """The recipe as commented YAML. With `base`, what every recipe shares is left to that file."""
    facts = plan.card.sizes[plan.size]
    name = name or f"{plan.card.name}-{plan.size}-{plan.task}"
    file = file or f"{name}.yaml"
    nodes = f" on each of {-(-plan.devices // 8)} nodes" if plan.devices > 8 else ""
    fits = "" if plan.state_gib < 0.85 * DEVICE_GIB else f"; too much for {DEVICE_GIB} GB: use more devices"
    lines = [
        f"# {plan.card.name} {plan.size}: {TASKS[plan.task]} on {plan.devices} device{'s' * (plan.devices > 1)}.",
        f"# polymodal check {file} --world {plan.devices}",
        f"# polymodal train {file} --nproc {min(8, plan.devices)}{nodes}",
        *([f"base: {base}"] if base else []),
        f"name: {_scalar(name)}",
        "model:",
        f"  source: {_scalar(plan.source)}  # hub id, or the directory of its files",
    ]
    if plan.task in ADAPTERS:
        lines += [
            f"  lora: {{rank: 16, alpha: 32, towers: [{plan.card.main}]}}  # towers: {', '.join(plan.card.towers)}"
        ]
    if plan.task == "pretrain":
        lines += [
            "  init: random  # weights from the config and the seed; shrink with config: {text_config.num_hidden_layers: 4}"
        ]
    generation = plan.card.kind == "generation"
    if plan.task == "dreambooth":
        lines += _subject(plan, data, file)
    else:
        lines += _clips(plan, data, file) if generation else _chats(plan, data, base)
    if plan.layout:
        lines += [
            f"parallel:  # weights, gradients, optimizer: about {plan.state_gib:.1f} GiB a device{fits}"
        ]
        lines += [f"  {axis}: {value}" for axis, value in plan.layout.items()]
    else:
        lines += [
            f"parallel: {{dp_shard: -1}}  # FSDP2: weights, gradients, optimizer: about {plan.state_gib:.1f} GiB a device{fits}"
        ]
    lines += ["train:"]
    if plan.task == "dreambooth":
        lines += ["  steps: 500"]
    elif not base:
        lines += ["  epochs: 1"]
    if not base:
        lines += ["  precision: bf16"]
    what = "samples" if generation else "packed sequences of max_length tokens"
    lines += [f"  global_batch_size: {_batch(plan)}  # {what}, over all devices"]
    if plan.task == "sft":
        lines += [f"  freeze: []  # any of {', '.join(plan.card.towers)}"]
    rate = {"sft": "1.0e-5", "lora": "1.0e-4", "pretrain": "3.0e-4", "dreambooth": "1.0e-4"}[plan.task]
    lines += ["optim:", f"  lr: {rate}"]
    if plan.task == "sft" and "vision" in plan.card.towers:
        lines += ["  groups: [{match: vision, lr_scale: 0.2}]  # the tower learns slower"]
    if plan.task == "pretrain":
        lines += ["  weight_decay: 0.1"]
    if not base:
        lines += [
            "  schedule: {name: cosine, warmup: 0.03}",
            "checkpoint:",
            "  dir: runs/{name}",
            "  every: 500",
            "  keep: 2",
        ]
    if facts.active is not None and plan.task not in ADAPTERS:
        lines[lines.index("train:") + 1 : lines.index("train:") + 1] = [
            "  router_aux_loss: 0.001  # balance of the experts"
        ]
    return "\n".join(lines) + "\n"


def _chats(plan: Plan, data: str, base: str | None) -> list[str]:
    """The data section of a model that answers."""
    lines = [
        "data:",
        "  datasets:",
        f"    - path: {_scalar(data)}  # json, jsonl, parquet, csv, tar; MLLM, ShareGPT, LLaVA, Alpaca, OpenAI",
    ]
    if not base:
        lines += ["      # media_dir: data  # where relative picture paths start (default: beside the file)"]
    lines += ["  max_length: 4096  # longer samples are dropped and counted; pictures are never cut"]
    return [*lines, "  train_on: all"] if plan.task == "pretrain" else lines


def _clips(plan: Plan, data: str, file: str) -> list[str]:
    """The data section of a model that generates."""
    facts = {**plan.card.clip, **plan.card.sizes[plan.size].clip} or {"pixels": PICTURE}
    shape = "{" + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "}"
    return [
        f"data:  # polymodal encode {file} --nproc {min(8, plan.devices)}, before training",
        f"  datasets: [{{path: {_scalar(data)}}}]  # rows of path and cap, or a data.txt of folder,annotation lines",
        f"  clip: {shape}  # sizes of about so many pixels, for every aspect ratio",
    ]


def _subject(plan: Plan, data: str, file: str) -> list[str]:
    """The data section of DreamBooth: the subject's pictures, and pictures of its class that keep the class as it is."""
    place = "data/subject" if data == DATA else data
    return [
        f"data:  # polymodal encode {file} --nproc {min(8, plan.devices)}, before training: it also draws the pictures of the class",
        "  datasets:  # equal weights: as many samples of the one as of the other",
        f"    - {{path: {_scalar(place)}, caption: a photo of sks dog, weight: 1}}  # directory of 4 to 20 pictures; sks: a word without a meaning",
        "    - {path: data/class, caption: a photo of a dog, weight: 1, generate: 100, loss_weight: 1.0}  # the class; remove for none",
        "  clip: {pixels: 262144}  # sizes of about so many pixels, for every aspect ratio",
    ]


def _batch(plan: Plan) -> int:
    least = 4 if plan.task == "dreambooth" else 32
    return max(least, 2 ** math.ceil(math.log2(plan.devices)))


def _scalar(value: str) -> str:
    """A string as YAML, quoted where it must be: 1e3 is a number in recipes, though not to the writer."""
    with contextlib.suppress(ValueError):
        float(value)
        return json.dumps(value)
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def write(path: Path, content: str, force: bool = False) -> None:
    """Write a file whole or not at all. Raises PolymodalError when it exists or cannot be written."""
    if path.exists() and not force:
        raise PolymodalError(f"{path} exists.", "Choose another --out, or add --force to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror}.", "Choose another --out."
        ) from None


def folder(card: ModelCard) -> str:
    """Directory under recipes/: that of a card's line of models, or the card's own file."""
    return card.family.line or card.family.__module__.rpartition(".")[2].replace("_", "-")


def standard() -> dict[str, str]:
    """The recipes that the repository ships: path under recipes/ -> content, for every card and size, sft and lora."""
    out = {}
    for card in catalog.cards().values():
        for key in card.sizes:
            for task in ("sft", "lora", *card.methods):
                if task in card.limits:
                    continue
                chosen = plan(f"{card.name}-{key}", task, None, None)
                path = f"{folder(card)}/{card.name}-{key}-{task}.yaml"
                out[path] = text(chosen, DATA, base="../base.yaml", file=f"recipes/{path}")
    return out


def refresh(directory: str | os.PathLike) -> None:
    """Write `standard()` into a directory."""
    for path, content in standard().items():
        write(Path(directory) / path, content, force=True)


def main(
    model: str, task: str, size: str | None, devices: int | None, data: str, out: Path | None, force: bool
) -> int:
    """The command: prints the recipe (`out` absent or "-"), or writes it and says what comes next."""
    out = None if out == Path("-") else out
    chosen = plan(model, task, size, devices)
    content = text(chosen, data, name=out.stem if out else None, file=str(out) if out else None)
    recipe.validate(yaml.safe_load(content))
    if out is None:
        print(content, end="")
        return 0
    write(out, content, force)
    many = f"{chosen.devices} device{'s' * (chosen.devices > 1)}"
    print(f"{out} written: {chosen.card.name} {chosen.size}, {TASKS[task]}, {many}")
    print(f"next: polymodal check {out} --world {chosen.devices}")
    return 0
