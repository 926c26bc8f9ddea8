"""Writes recipes: a commented starting point for a model, a task and a number of devices, with the
recommended layout.

Sees the cards, the planner's formulas and the recipe. The layout is the one that the formulas rank first
among those that fit; with a checkpoint's config at hand it is that model's, else the published size's.
With the data at hand the batch, the epochs and the length of packs are theirs. What is written always
validates.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean, format_bytes, format_count
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.plan import accelerators, estimate, planner, recommend, search, shape
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.search import Candidate
from polymodal.recipe import Recipe
from polymodal.tools import advise
from polymodal.train import run_length
from polymodal.train.parallel_model import meta_model

TASKS = {
    "sft": "full fine-tuning",
    "lora": "LoRA fine-tuning",
    "pretrain": "pretraining from random weights",
    "dreambooth": "DreamBooth, LoRA on a few pictures of one subject",
}
ADAPTERS = ("lora", "dreambooth")
DATA = "data/train.json"
ACCELERATOR = "910b"
"""What layouts are recommended for unless --device names another: the least memory of the table (64 GiB)."""
BATCH = 32
"""Packs or samples a step, where there are enough of them and no more devices."""
MAX_LENGTH = 4096
PICTURE = 1024 * 1024
"""Pixels of a picture where the card says nothing."""


@dataclass(frozen=True)
class Rows:
    """Data that were measured, or counted."""

    rows: int
    tokens: int = 0  # of all rows; 0 where only rows were counted
    max_length: int = MAX_LENGTH
    pack_length: int | None = None
    patches: float = 0.0  # a token


@dataclass(frozen=True)
class Plan:
    """What is written: the source, the layout for `devices` accelerators, and what is predicted of it."""

    card: ModelCard
    size: str  # published size, or "" of a checkpoint that is none of them
    source: str
    task: str
    devices: int
    parameters: int
    best: Candidate
    accelerator: Accelerator
    fits: bool
    known: bool  # counted by the checkpoint's config, not by a published size
    data: Rows | None = None
    length: run_length.RunLength | None = None

    @property
    def name(self) -> str:
        return f"{self.card.name}-{self.size}" if self.size else self.card.name

    @property
    def layout(self) -> dict[str, Any]:
        """Keys of `parallel` that are written."""
        parallel, sizes = self.best.recipe.parallel, self.best.sizes
        axes = {
            axis: getattr(sizes, axis)
            for axis in ("dp_replicate", "cp", "tp", "pp", "ep")
            if getattr(sizes, axis) > 1
        }
        if sizes.pp > 1 and parallel.zero is not None:
            axes["zero"] = parallel.zero
        return axes | ({"recompute": parallel.recompute} if parallel.recompute != "none" else {})


def plan(
    model: str,
    task: str,
    size: str | None,
    devices: int | None,
    *,
    data: str = DATA,
    device: str = ACCELERATOR,
    search_it: bool = False,
) -> Plan:
    """Choose the size, the layout, and what the data ask for. Raises PolymodalError for unknown names,
    tasks and devices."""
    if task not in TASKS:
        raise PolymodalError(f"--task {task} is not known.", did_you_mean(task, TASKS))
    accelerator = accelerators.named(device)
    card, key, source = _identify(model)
    if size is not None:
        key = _size(model, card, size)
    if task == "dreambooth" and task not in card.methods:
        does = ", ".join(c.name for c in catalog.cards().values() if task in c.methods)
        raise PolymodalError(f"{card.name} has no recipe for DreamBooth.", f"These have: {does}.")
    of_version = [k for k in card.sizes if catalog.named(f"{model}-{k.partition('-')[2]}") == (card, k)]
    key = key or (None if source else advise.middle(card, of_version))
    place = source or card.sizes[str(key)].hub
    family = _family(place, bool(source) or search_it)
    if family is not None:
        counted = shape.shape_of(family, meta_model(family, _bare(card, task, place, data)))
        key = key or _size_of(place, card, counted.total)
    else:
        counted = shape.published(card, str(key), task in ADAPTERS)
    count = devices or _devices(card, key, task) or recommend.device_count(counted, accelerator)
    measured = _measured(family, card, task, data)
    most = -(-max(4 if task == "dreambooth" else BATCH, count) // count) * count
    made = _bare(card, task, place, data, measured, key, most)
    patches = measured.patches if measured and measured.tokens else None
    question = planner.Question(count, accelerator)
    if search_it:
        assert family is not None
        share = 0.25 if patches is None else estimate.media_share(family, patches)
        best, fits = search.rank(made, family, replace(question, media=share), _say)[0], True
    else:
        best, fits = recommend.fastest(made, card, str(key), family, counted, question, patches)
    best, length = _batch(best, measured)
    return Plan(
        card,
        key or "",
        place,
        task,
        count,
        counted.total,
        best,
        accelerator,
        fits,
        family is not None,
        measured,
        length,
    )


def _devices(card: ModelCard, key: str | None, task: str) -> int | None:
    """Those of a published size; adapters need half of them."""
    if key is None:
        return None
    many = card.sizes[key].devices
    return many if task not in ADAPTERS else max(1, min(8, many // 2))


def _say(text: str) -> None:
    print(text, "...", file=sys.stderr, flush=True)


def _size(model: str, card: ModelCard, size: str) -> str:
    found = size.lower()
    joined = catalog.named(f"{model}-{found}")
    if joined is not None and joined[0] is card and joined[1] is not None:
        return joined[1]
    if found in card.sizes:
        return found
    begins = [k for k in card.sizes if k.split("-")[0] == found]  # 235b for 235b-a22b
    if len(begins) != 1:
        raise PolymodalError(f"{card.name} has no size {size}.", f"Its sizes: {', '.join(card.sizes)}.")
    return begins[0]


def _family(source: str, asked: bool) -> Family | None:
    """The family of a checkpoint whose config is on this machine (a directory, or the hub's cache); else
    None, or with `asked` fetched. Raises PolymodalError for a directory that is no checkpoint."""
    if not asked:
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(source, name) for name in ("config.json", "model_index.json"))
        if not any(isinstance(path, str) for path in cached):
            return None
    return catalog.family(recipe.Model(source=source, init="random"))


def _bare(
    card: ModelCard,
    task: str,
    source: str,
    data: str,
    measured: Rows | None = None,
    key: str | None = None,
    batch: int = BATCH,
) -> Recipe:
    """The recipe before its layout is chosen: what the formulas and the search are asked about."""
    section: dict[str, Any] = {"datasets": [{"path": data}]}
    if card.kind == "generation":
        section["clip"] = _clip(card, key, task)
    else:
        section["max_length"] = measured.max_length if measured else MAX_LENGTH
        section["pack_length"] = measured.pack_length if measured else None
    model: dict[str, Any] = {"source": source}
    if task in ADAPTERS:
        model["lora"] = {"rank": 16, "alpha": 32, "towers": [card.main]}
    return recipe.validate(
        {"name": card.name, "model": model, "data": section, "train": {"global_batch_size": batch}}
    )


def _clip(card: ModelCard, key: str | None, task: str) -> dict[str, Any]:
    if task == "dreambooth":
        return {"pixels": 262144}
    own = card.sizes[key].clip if key else {}
    return {**card.clip, **own} or {"pixels": PICTURE}


def _batch(best: Candidate, measured: Rows | None) -> tuple[Candidate, run_length.RunLength | None]:
    """The layout with the batch that suits the data, and how long a run becomes with it."""
    if measured is None:
        return best, None
    one, sizes = best.recipe, best.sizes
    length = (one.data.pack_length or one.data.max_length) if measured.tokens else None
    multiple = sizes.dp * one.train.micro_batch_size * sizes.pp
    found = run_length.choose(
        run_length.units(measured.tokens, measured.rows, length), multiple, one.train.global_batch_size
    )
    train = one.train.model_copy(update={"global_batch_size": found.batch, "epochs": float(found.epochs)})
    ratio = found.batch / one.train.global_batch_size
    changed = replace(best, recipe=one.model_copy(update={"train": train}), seconds=best.seconds * ratio)
    return changed, found


def _measured(family: Family | None, card: ModelCard, task: str, data: str) -> Rows | None:
    """What lies at `data`, measured with the checkpoint's processor, or counted where that is not here;
    None without data."""
    if task == "dreambooth" or not os.path.exists(os.path.expanduser(data)):
        return None
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.index import build_index
    from polymodal.data.source import open_corpus

    section = recipe.Data(
        datasets=[recipe.Dataset(path=data)], on_error="skip", max_length=run_length.LONGEST
    )
    corpus = open_corpus(section.datasets, section.attr, "--data")
    if family is None or card.kind == "generation":
        return Rows(len(corpus))
    try:
        chat = ChatProcessor(family.media_processor(section), section)
    except PolymodalError as error:  # a config without a tokenizer
        _say(f"--data {data} is counted, not measured: {error}")
        return Rows(len(corpus))
    index = build_index(corpus, chat, section)
    tokens = index.tokens[index.usable]
    if not len(tokens):
        raise PolymodalError(
            f"--data {data}: no row of {len(corpus)} can be trained on.",
            f"Run `polymodal data check {data}`.",
        )
    total, longest = int(tokens.sum(dtype="int64")), run_length.max_length(tokens)
    plenty = run_length.units(total, len(tokens), MAX_LENGTH) / BATCH >= run_length.ENOUGH_STEPS
    pack = MAX_LENGTH if plenty and longest < MAX_LENGTH else None
    seen = sum(int(lengths[index.usable].sum(dtype="int64")) for lengths in index.media.values())
    return Rows(len(tokens), total, longest, pack, seen / total)


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
    return catalog.find(model), None, model


def _size_of(source: str, card: ModelCard, parameters: int) -> str | None:
    """The published size that a checkpoint of so many parameters is: of several, the one that its name
    names."""
    fits = [key for key, size in card.sizes.items() if abs(size.parameters * 1e9 / parameters - 1) < 0.05]
    return next((key for key in fits if key in source.lower()), fits[0] if fits else None)


def text(
    plan: Plan, data: str, *, name: str | None = None, base: str | None = None, file: str | None = None
) -> str:
    """The recipe as commented YAML. With `base`, what every recipe shares is left to that file."""
    name = name or f"{plan.name}-{plan.task}"
    file = file or f"{name}.yaml"
    nodes = f" on each of {-(-plan.devices // 8)} nodes" if plan.devices > 8 else ""
    what = (
        plan.name.replace("-" + plan.size, " " + plan.size)
        if plan.size
        else f"{plan.card.name}, {format_count(plan.parameters)} parameters"
    )
    one = plan.best.recipe
    lines = [
        f"# {what}: {TASKS[plan.task]} on {plan.devices} device{'s' * (plan.devices > 1)}.",
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
    layout = ", ".join(f"{axis}: {value}" for axis, value in (plan.layout or {"dp_shard": -1}).items())
    lines += [f"parallel: {{{layout}}}  # {predicted(plan)}", "train:"]
    if plan.task == "dreambooth":
        lines += ["  steps: 500"]
    elif not base or plan.length:
        lines += [f"  epochs: {one.train.epochs:g}{_told(plan)}"]
    if not base:
        lines += ["  precision: bf16"]
    unit = "samples" if generation else "packs"
    lines += [f"  global_batch_size: {one.train.global_batch_size}  # {unit}, over all devices"]
    if one.train.micro_batch_size > 1:
        lines += [f"  micro_batch_size: {one.train.micro_batch_size}"]
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
    if plan.card.expert_plan and plan.task not in ADAPTERS:
        lines[lines.index("train:") + 1 : lines.index("train:") + 1] = [
            "  router_aux_loss: 0.001  # balance of the experts"
        ]
    return "\n".join(lines) + "\n"


def predicted(plan: Plan) -> str:
    """What the formulas say of the layout: memory, utilisation, time, and whether it fits."""
    best, accelerator = plan.best, plan.accelerator
    traced = best.traced
    held, share, step = (
        (traced.peak, traced.mfu, traced.step) if traced else (best.memory, best.mfu, best.seconds)
    )
    room = accelerator.usable_memory
    by = (
        "traced"
        if traced
        else "estimated by its config"
        if plan.known
        else "estimated for the published size"
    )
    said = f"{by}: {format_bytes(int(held))} of {format_bytes(int(room))} of {accelerator.name}"
    if not plan.fits:
        return f"{said}, which does not fit for certain: use more devices"
    return f"{said}, MFU {share:.0%}, {step:.3g} s a step"


def _told(plan: Plan) -> str:
    """What the data come to."""
    if plan.data is None or plan.length is None:
        return ""
    how = f"{plan.data.rows:,} rows" + (
        f" of {format_count(plan.data.tokens)} tokens" if plan.data.tokens else ""
    )
    return f"  # {how}: about {plan.length.steps:,} steps"


def _chats(plan: Plan, data: str, base: str | None) -> list[str]:
    """The data section of a model that answers."""
    lines = [
        "data:",
        "  datasets:",
        f"    - path: {_scalar(data)}  # json, jsonl, parquet, csv, tar; MLLM, ShareGPT, LLaVA, Alpaca, OpenAI",
    ]
    if not base:
        lines += ["      # media_dir: data  # where relative picture paths start (default: beside the file)"]
    section = plan.best.recipe.data
    lines += [
        f"  max_length: {section.max_length}  # longer samples are dropped and counted; pictures are never cut"
    ]
    if section.pack_length is not None:
        lines += [f"  pack_length: {section.pack_length}  # tokens of a pack: several samples"]
    return [*lines, "  train_on: all"] if plan.task == "pretrain" else lines


def _clips(plan: Plan, data: str, file: str) -> list[str]:
    """The data section of a model that generates."""
    facts = _clip(plan.card, plan.size or None, plan.task)
    shape = "{" + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "}"
    return [
        f"data:  # polymodal encode {file} --nproc {min(8, plan.devices)}, before training",
        f"  datasets: [{{path: {_scalar(data)}}}]  # rows of path and cap, or a data.txt of folder,annotation lines",
        f"  clip: {shape}  # sizes of about so many pixels, for every aspect ratio",
    ]


def _subject(plan: Plan, data: str, file: str) -> list[str]:
    """The data section of DreamBooth: the subject's pictures, and pictures of its class that keep the
    class as it is."""
    place = "data/subject" if data == DATA else data
    return [
        f"data:  # polymodal encode {file} --nproc {min(8, plan.devices)}, before training: it also draws the pictures of the class",
        "  datasets:  # equal weights: as many samples of the one as of the other",
        f"    - {{path: {_scalar(place)}, caption: a photo of sks dog, weight: 1}}  # directory of 4 to 20 pictures; sks: a word without a meaning",
        "    - {path: data/class, caption: a photo of a dog, weight: 1, generate: 100, loss_weight: 1.0}  # the class; remove for none",
        "  clip: {pixels: 262144}  # sizes of about so many pixels, for every aspect ratio",
    ]


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


def main(
    model: str,
    task: str,
    size: str | None,
    devices: int | None,
    data: str,
    out: Path | None,
    force: bool,
    device: str = ACCELERATOR,
    search_it: bool = False,
) -> int:
    """The command: prints the recipe (`out` absent or "-"), or writes it and says what comes next."""
    out = None if out == Path("-") else out
    if out is not None and out.exists() and not force:
        raise PolymodalError(f"{out} exists.", "Choose another --out, or add --force to replace it.")
    chosen = plan(model, task, size, devices, data=data, device=device, search_it=search_it)
    content = text(chosen, data, name=out.stem if out else None, file=str(out) if out else None)
    recipe.validate(yaml.safe_load(content))
    if out is None:
        print(content, end="")
        return 0
    write(out, content, force)
    many = f"{chosen.devices} device{'s' * (chosen.devices > 1)}"
    what = chosen.size or f"of {format_count(chosen.parameters)} parameters"
    print(f"{out} written: {chosen.card.name} {what}, {TASKS[task]}, {many}")
    print(predicted(chosen))
    if chosen.length is not None and chosen.length.steps < run_length.FEW_STEPS:
        print(f"warning: only about {chosen.length.steps} optimizer steps: use fewer devices or more data")
    print(f"next: polymodal check {out} --world {chosen.devices}")
    return 0
