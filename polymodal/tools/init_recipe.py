"""Writes recipes: a commented starting point for a model, a task and a number of devices (recipe.yaml.j2).

The layout is the one that the planner's formulas rank first among those that fit: of the checkpoint's config
where it is here, else of the published size's facts. With the data at hand the batch, the epochs and the
length of packs are chosen for them. What is written always validates.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import line, say, say_lines
from polymodal.core.text import did_you_mean, format_bytes, format_count
from polymodal.models import catalog
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.plan import accelerators, estimate, planner, recommend, search, shape
from polymodal.plan.accelerators import Accelerator
from polymodal.plan.search import Candidate
from polymodal.recipe import Recipe
from polymodal.tools import advise
from polymodal.tools.templates import template
from polymodal.train import run_length
from polymodal.train.layouts import fills_by_tokens, layout_of, objectives_of
from polymodal.train.parallel_model import meta_model

TASKS = {
    "sft": "full fine-tuning",
    "lora": "LoRA fine-tuning",
    "pretrain": "pretraining from random weights",
    "dpo": "preference training (DPO), LoRA",
    "kto": "preference training without pairs (KTO), LoRA",
    "grpo": "learning from rewards of its own answers (GRPO), LoRA",
    "dreambooth": "DreamBooth, LoRA on a few pictures of one subject",
}
RATES = {"sft": "1.0e-5", "lora": "1.0e-4", "pretrain": "3.0e-4", "dreambooth": "1.0e-4"}
COMPARING = ("dpo", "kto")
RATES |= {**dict.fromkeys(COMPARING, "2.0e-5"), "grpo": "1.0e-5"}
"""Learning rate of each task."""
ANSWERS = (*COMPARING, "grpo")
"""Tasks that are named as the objectives of models that answer in chats."""
ADAPTERS = ("lora", "dreambooth", *ANSWERS)
DATA = "data/train.json"
ACCELERATOR = "910b"
"""What layouts are recommended for unless --device names another: the least memory of the table (64 GiB)."""
BATCH = 32
"""Packs or samples a step, where there are enough of them and no more devices."""
MAX_LENGTH = 4096
GROUP_LENGTH = 16384
"""grpo: of eight answers with their prompts."""
SPEECH = {"language": "en"}
"""data.speech, to be edited where records that name no language are spoken in another one."""
PICTURE = 1024 * 1024
"""Pixels of a picture where the card has none."""


@dataclass(frozen=True)
class Rows:
    """Data that were measured, or counted."""

    rows: int
    tokens: int = 0  # of all rows; 0 where only rows were counted
    max_length: int = MAX_LENGTH
    pack_length: int | None = None
    units: Mapping[str, float] = field(default_factory=dict)  # patches, frames a token, by stream


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
    smaller: int = 1  # what pixels and lengths were divided by, to fit --vram

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
        axes |= {"recompute": parallel.recompute} if parallel.recompute != "none" else {}
        return axes | ({"offload": parallel.offload} if parallel.offload else {})


def plan(
    model: str,
    task: str,
    size: str | None,
    devices: int | None,
    *,
    data: str = DATA,
    device: str = ACCELERATOR,
    search_it: bool = False,
    vram: int | None = None,
) -> Plan:
    """Choose the size, the layout, and what the data ask for. Raises PolymodalError for unknown names,
    tasks and devices.

    vram: GiB of one card that adapters are to be trained on: model.base, recompute, offload, micro-batch and,
    last, pixels or lengths are chosen for it.
    """
    if task not in TASKS:
        raise PolymodalError(f"--task {task} is not known.", did_you_mean(task, TASKS))
    if vram is not None:
        _check_card(vram, task, devices, search_it)
        device = accelerators.nearest(vram) if device == ACCELERATOR else device
    accelerator = accelerators.named(device)
    if vram is not None:
        accelerator, devices = replace(accelerator, memory=float(vram * accelerators.GIB)), 1
    card, key, source = _identify(model)
    if size is not None:
        key = _size(model, card, size)
    if task == "dreambooth" and task not in card.methods:
        does = ", ".join(c.name for c in catalog.cards().values() if task in c.methods)
        raise PolymodalError(f"{card.name} has no recipe for DreamBooth.", f"These have: {does}.")
    of_version = [k for k in card.sizes if catalog.named(f"{model}-{k.partition('-')[2]}") == (card, k)]
    if task in ANSWERS and objective(card, task) not in objectives_of(card.family):
        raise PolymodalError(
            f"--task {task} is for models that answer in chats, {card.name} is none.", "Choose sft or lora."
        )
    key = key or (None if source else advise.middle(card, of_version))
    place = source or card.sizes[str(key)].hub
    local = _family(place, bool(source) or search_it)
    family = local or catalog.published(card, key)
    if family is not None:
        counted = shape.shape_of(family, meta_model(family, _bare(card, task, place, data)))
        key = key or _size_of(place, card, counted.total)
    else:
        counted = shape.published(card, str(key), task in ADAPTERS)
    count = devices or _devices(card, key, task) or recommend.device_count(counted, accelerator)
    measured = _measured(local, card, task, place, data)
    most = -(-max(4 if task == "dreambooth" else BATCH, count) // count) * count
    made = _bare(card, task, place, data, measured, key, most)
    units = measured.units if measured and measured.tokens else None
    question, smaller = planner.Question(count, accelerator), 1
    if vram is not None:
        for smaller, changes in _on_one_card(measured is None):
            made = _bare(card, task, place, data, measured, key, most, smaller, changes)
            if family is not None:
                counted = shape.shape_of(family, meta_model(family, made))
            else:
                counted = shape.published(card, str(key), True, made.model.base)
            best, fits = recommend.fastest(made, card, str(key), family, counted, question, units)
            if fits:
                break
    elif search_it:
        assert family is not None
        if units is not None:
            media, sound = estimate.media_shares(family, units)
            question = replace(question, media=media, sound=sound)
        best, fits = search.rank(made, family, question, _say)[0], True
    else:
        best, fits = recommend.fastest(made, card, str(key), family, counted, question, units)
    best, length = _batch(best, measured)
    return Plan(
        card=card,
        size=key or "",
        source=place,
        task=task,
        devices=count,
        parameters=counted.total,
        best=best,
        accelerator=accelerator,
        fits=fits,
        known=family is not None,
        data=measured,
        length=length,
        smaller=smaller,
    )


def objective(card: ModelCard, task: str) -> str:
    """train.objective of a task that compares."""
    return "diffusion_dpo" if (card.kind, task) == ("generation", "dpo") else task


def _check_card(vram: int, task: str, devices: int | None, search_it: bool) -> None:
    if task not in ADAPTERS:
        raise PolymodalError(
            f"--vram {vram} is for adapters on a frozen base, --task {task} trains the weights.",
            f"Choose {', '.join(ADAPTERS)}.",
        )
    if search_it or devices not in (None, 1):
        given = "--search" if search_it else f"--devices {devices}"
        raise PolymodalError(f"--vram {vram} is for one card, and {given} for several.", "Leave one out.")


def _on_one_card(free: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """(what sizes are divided by, sections of a recipe), from the best to what takes the least memory: the
    base in fewer bits before smaller pictures or shorter samples, which only data that are not measured are
    `free` for."""
    for smaller in (1, 2, 4) if free else (1,):
        for base in ("bf16", "int8", "nf4"):
            for offload in ([], ["activations"]):
                yield smaller, {"model": {"base": base}, "parallel": {"offload": offload}}


def _devices(card: ModelCard, key: str | None, task: str) -> int | None:
    """Those of a published size; adapters need half of them."""
    if key is None:
        return None
    many = card.sizes[key].devices
    return many if task not in ADAPTERS else max(1, min(8, many // 2))

    return "diffusion_dpo" if (card.kind, task) == ("generation", "dpo") else task


def _say(text: str) -> None:
    say(text, "...", error=True)


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
    smaller: int = 1,
    changes: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe before its layout is chosen: what the formulas and the search are asked about."""
    section: dict[str, Any] = {"datasets": [{"path": data}]}
    changes = changes or {}
    if card.kind == "generation":
        section["clip"] = _clip(card, key, task, smaller)
    elif card.transcribes:
        section["speech"] = SPEECH
    if fills_by_tokens(card.family):
        longest = GROUP_LENGTH if task == "grpo" else MAX_LENGTH
        section["max_length"] = measured.max_length if measured else longest // smaller
        section["pack_length"] = measured.pack_length if measured else None
    model: dict[str, Any] = {"source": source, **changes.get("model", {})}
    if task in ADAPTERS:
        model["lora"] = {"rank": 16, "alpha": 32, "towers": [card.main]}
    train: dict[str, Any] = {"global_batch_size": batch}
    if task in ANSWERS:
        train["objective"] = objective(card, task)
    if task == "grpo":
        train["rewards"] = [{"name": "exact"}]
    parallel = changes.get("parallel", {})
    sections = {"model": model, "data": section, "parallel": parallel, "train": train}
    return recipe.validate({"name": card.name, **sections})


def _clip(card: ModelCard, key: str | None, task: str, smaller: int = 1) -> dict[str, Any]:
    own = card.sizes[key].clip if key else {}
    clip = {**card.clip, **own} or {"pixels": PICTURE}
    if task == "dreambooth":
        clip = {"pixels": 262144}
    return {**clip, "pixels": clip["pixels"] // smaller} if smaller > 1 else clip


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


def _measured(family: Family | None, card: ModelCard, task: str, source: str, data: str) -> Rows | None:
    """What lies at `data`, measured with the checkpoint's processor, or counted where that is not here;
    None without data."""
    if task == "dreambooth" or not os.path.exists(os.path.expanduser(data)):
        return None
    from polymodal.data.index import build_index
    from polymodal.data.source import open_corpus

    bare = _bare(card, task, source, data)
    section = bare.data.model_copy(update={"on_error": "skip", "max_length": run_length.LONGEST})
    corpus = open_corpus(section.datasets, section.attr, "--data")
    if family is None or card.kind == "generation":
        return Rows(len(corpus))
    try:
        layout: Any = layout_of(bare.model_copy(update={"data": section}), family)
        processor, section = layout.processor(), layout.section_data("datasets")
        corpus = layout.corpus(layout.datasets("datasets"), section, "--data")
    except PolymodalError as error:  # a config without a tokenizer
        _say(f"--data {data} is counted, not measured: {error}")
        return Rows(len(corpus))
    index = build_index(corpus, processor, section)
    tokens = index.tokens[index.usable]
    if not len(tokens):
        raise PolymodalError(
            f"--data {data}: no row of {len(corpus)} can be trained on"
            + (f"; the first: {index.problems[0].reason.rstrip('.')}." if index.problems else "."),
            f"Run `polymodal data check {shlex.quote(str(data))}`.",
        )
    if not fills_by_tokens(card.family):  # a sample is a record, whatever its length
        return Rows(len(tokens))
    total, longest = int(tokens.sum(dtype="int64")), run_length.max_length(tokens)
    plenty = run_length.units(total, len(tokens), MAX_LENGTH) / BATCH >= run_length.ENOUGH_STEPS
    pack = MAX_LENGTH if plenty and longest < MAX_LENGTH else None
    seen = {name: int(n[index.usable].sum(dtype="int64")) / total for name, n in index.media.items()}
    return Rows(len(tokens), total, longest, pack, seen)


def _identify(model: str) -> tuple[ModelCard, str | None, str]:
    """(card, size, source) of a name, hub id or directory; source "" = the size's own hub id."""
    known = None if os.path.isdir(model) else catalog.named(model)
    if known is not None:
        return (*known, "")
    planned = advise.planned_family(model)
    if planned is not None and not os.path.exists(model):
        raise PolymodalError(
            f"{planned.name} has no card here yet.", "`polymodal models` lists what there is."
        )
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


def text(plan: Plan, data: str, *, name: str | None = None, file: str | None = None) -> str:
    """The recipe as commented YAML. file: where it will be, for the commands in its comments."""
    name = name or f"{plan.name}-{plan.task}"
    title = f"{plan.card.name} {plan.size}"
    if not plan.size:
        title = f"{plan.card.name}, {format_count(plan.parameters)} parameters"
    return template("recipe.yaml.j2", scalar=_scalar, flow=_flow).render(
        plan=plan,
        recipe=plan.best.recipe,
        title=title,
        what=TASKS[plan.task],
        rate=RATES[plan.task],
        name=name,
        file=file or f"{name}.yaml",
        data=data,
        subject="data/subject" if data == DATA else data,
        speech=SPEECH,
        packed=fills_by_tokens(plan.card.family),
        clip=_clip(plan.card, plan.size or None, plan.task, plan.smaller),
        predicted=predicted(plan),
        data_words=_data_words(plan),
    )


def predicted(plan: Plan) -> str:
    """The layout's memory, utilisation and time by formula or trace, and whether it fits."""
    best, accelerator = plan.best, plan.accelerator
    by = "estimated by its config" if plan.known else "estimated for the published size"
    if best.traced:
        by = "traced"
    usable = format_bytes(int(accelerator.usable_memory))
    memory = f"{by}: {format_bytes(best.peak)} of {usable} of {accelerator.name}"
    if not plan.fits:
        more = "a larger card" if plan.devices == 1 else "more devices"
        return f"{memory}, which does not fit for certain: use {more}"
    mfu = best.traced.mfu if best.traced else best.mfu
    return f"{memory}, MFU {mfu:.0%}, {best.step:.3g} s a step"


def _data_words(plan: Plan) -> str:
    """How many rows and tokens the data have, and the steps of a run."""
    if plan.data is None or plan.length is None:
        return ""
    tokens = f" of {format_count(plan.data.tokens)} tokens" if plan.data.tokens else ""
    return f"{plan.data.rows:,} rows{tokens}: about {plan.length.steps:,} steps"


def _scalar(value: str) -> str:
    """A string as YAML, quoted where it must be: 1e3 is a number in recipes, though not to the writer."""
    with contextlib.suppress(ValueError):
        float(value)
        return json.dumps(value)
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def _flow(facts: dict[str, Any]) -> str:
    """A mapping as YAML on one line."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "}"


def write(path: Path, content: str, force: bool = False) -> None:
    """Write a file whole or not at all. Raises PolymodalError when it exists or cannot be written."""
    if path.exists() and not force:
        raise PolymodalError(f"{path} exists.", "Choose another --out, or add --force to replace it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
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
    vram: int | None = None,
) -> int:
    """The command: prints the recipe (`out` absent or "-"), or writes it and prints the next command."""
    out = None if out == Path("-") else out
    if out is not None and out.exists() and not force:
        raise PolymodalError(f"{out} exists.", "Choose another --out, or add --force to replace it.")
    chosen = plan(model, task, size, devices, data=data, device=device, search_it=search_it, vram=vram)
    content = text(
        chosen, data, name=out.stem if out else None, file=line(shlex.quote(str(out))) if out else None
    )
    recipe.validate(yaml.safe_load(content))
    if out is None:
        say_lines(content)
        return 0
    write(out, content, force)
    many = f"{chosen.devices} device{'s' * (chosen.devices > 1)}"
    what = chosen.size or f"of {format_count(chosen.parameters)} parameters"
    say(f"{out} written: {chosen.card.name} {what}, {TASKS[task]}, {many}")
    say_lines(predicted(chosen), "\n")
    if chosen.length is not None and chosen.length.steps < run_length.FEW_STEPS:
        say(f"warning: only about {chosen.length.steps} optimizer steps: use fewer devices or more data")
    say(f"next: polymodal check {shlex.quote(str(out))} --world {chosen.devices}")
    return 0
