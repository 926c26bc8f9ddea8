"""From a request in plain words to a model, a task and the steps to take. English and Chinese.

Phrases, planned families and the steps of every way are data, in advise.yaml.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polymodal.models.card import ModelCard
from polymodal.recipe import PREFERENCE
from polymodal.train.layouts import objectives_of

TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TASKS: dict[str, str] = TABLES["tasks"]
NOT_YET: dict[str, str] = TABLES["not_yet"]
METHODS: dict[str, list[str]] = TABLES["task_phrases"]
FILES: dict[str, str] = TABLES["benchmark_files"]


@dataclass(frozen=True)
class PlannedFamily:
    """A family that the documents name and that has no card here yet; its fields are explained in
    advise.yaml."""

    name: str
    kind: str
    tasks: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    features: bool = False
    converts: str = ""
    status: str = "not yet"


PLANNED = tuple(
    PlannedFamily(**{key: tuple(v) if isinstance(v, list) else v for key, v in family.items()})
    for family in TABLES["planned"]
)


def planned_family(name: str) -> PlannedFamily | None:
    """The planned family of this name or alias."""
    return next((family for family in PLANNED if name.lower() in (family.name, *family.aliases)), None)


def _weights(table: Mapping[str, Mapping[int, list[str]]]) -> dict[str, dict[str, int]]:
    """name -> phrase -> weight, of a table that lists the phrases of each weight."""
    return {
        name: {phrase: weight for weight, phrases in groups.items() for phrase in phrases}
        for name, groups in table.items()
    }


KIND_PHRASES, USE_PHRASES = _weights(TABLES["kind_phrases"]), _weights(TABLES["use_phrases"])


@dataclass(frozen=True)
class Stage:
    """One step of the way: what to run, what it reads and writes. `command` "" = nothing to run; `here` False
    = not yet."""

    title: str
    command: str = ""
    reads: str = ""
    writes: str = ""
    note: str = ""
    here: bool = True


@dataclass(frozen=True)
class Route:
    """The answer to a request. `card` None when no card here does it; `coming` are the families that will."""

    kind: str | None
    task: str
    card: ModelCard | None = None
    size: str | None = None
    devices: int | None = None
    others: tuple[ModelCard, ...] = ()
    coming: tuple[PlannedFamily, ...] = ()
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = field(default=())


def _plain(text: str) -> str:
    """Lower case, words apart by single spaces, also from Chinese beside them; dots stay inside words (names
    have them)."""
    text = re.sub(r"[^\w.]+|_|\.(?!\w)|(?<!\w)\.", " ", text.lower())
    text = re.sub(r"(?<=[\u4e00-\u9fff])(?=[a-z0-9])|(?<=[a-z0-9])(?=[\u4e00-\u9fff])", " ", text)
    return " " + " ".join(text.split()) + " "


def _holds(text: str, phrase: str) -> bool:
    """Whether a plain text holds the phrase: whole words, or anywhere for Chinese."""
    if any("\u4e00" <= letter <= "\u9fff" for letter in phrase):
        return phrase in text.replace(" ", "")
    return _plain(phrase) in text


def _score(text: str, words: Mapping[str, int]) -> int:
    """Sum of the weights of the phrases in the text; a phrase inside a longer one that is there counts
    not."""
    hits = [phrase for phrase in words if _holds(text, phrase)]
    return sum(
        words[phrase] for phrase in hits if not any(phrase != other and phrase in other for other in hits)
    )


def _compact(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "", text.lower())


def _mentioned(text: str, names: Iterable[str]) -> int:
    """Length of the longest of the names that the text mentions, written together or apart; 0 for none."""
    squeezed, words = _compact(text), " ".join(map(_compact, text.split()))
    longest = 0
    for name in names:
        short = _compact(name)
        joined = re.compile(rf"(?<![a-z0-9.]){re.escape(short)}(?![0-9.]*[0-9])")
        together = len(short) > 4 and joined.search(squeezed if len(short) > 6 else words)
        if _plain(name) in text or together:
            longest = max(longest, len(short))
    return longest


def _count(text: str) -> int | None:
    found = re.search(r"\b(\d{1,5})\s*(?:x\s*)?(?:[a-z]{0,4}pus?|cards?|devices?|accelerators?|张|卡)", text)
    return int(found[1]) if found else None


def _size(text: str, sizes: Iterable[str]) -> str | None:
    words = text.split()
    for key in sorted(sizes, key=len, reverse=True):
        if key in words or any(word.endswith(f"-{key}") for word in words) or _plain(key) in text:
            return key
        if key.split("-")[0] in words:
            return key
    return None


def route(request: str, cards: Mapping[str, ModelCard]) -> Route:
    """What a request in plain words means: kind of model, task, the card (with size) or the planned families.

    A model that is named decides; else the words of each kind are weighed. The stages are those of the whole
    way.
    """
    text = _plain(request)
    task, notes = _task(text), []
    if task in NOT_YET:
        notes.append(NOT_YET[task])
    kind, chosen, planned = _named(text, cards)
    if kind is None:
        kind, chosen, planned = _weighed(text, task, cards)
    if kind is None:
        return Route(None, task, notes=tuple(notes))
    size = _size(text, {key for card in chosen for key in card.sizes})
    if size is not None:
        chosen = [card for card in chosen if size in card.sizes]
    if task == "dreambooth":  # named or not, what has a recipe for it goes first
        able = [card for card in chosen if task in card.methods]
        if chosen and not able:
            notes.append(
                f"{chosen[0].name} has no recipe for DreamBooth; LoRA on the same pictures comes nearest."
            )
            task = "lora"
        chosen = able or chosen
    card = _preferred(chosen, text)
    others = tuple(other for other in chosen if other is not card)
    devices = _count(text)
    stages = way(card, size, task, devices, _benchmark(text)) if card else foreseen(planned, task)
    return Route(kind, task, card, size, devices, others, planned, tuple(notes), stages)


Choice = tuple[str | None, list[ModelCard], tuple[PlannedFamily, ...]]
"""Kind of model (None: unknown), the cards that fit, and the planned families that will."""


def _named(text: str, cards: Mapping[str, ModelCard]) -> Choice:
    """By the longest name of a model in the text."""
    lengths = {name: _mentioned(text, _names(card)) for name, card in cards.items()}
    planned = [family for family in PLANNED if family.name not in cards]
    planned_lengths = [_mentioned(text, (family.name, *family.aliases)) for family in planned]
    longest, longest_planned = max(lengths.values(), default=0), max(planned_lengths, default=0)
    if longest and longest >= longest_planned:
        chosen = [cards[name] for name, length in lengths.items() if length == longest]
        return chosen[0].kind, chosen, ()
    if longest_planned:
        pairs = zip(planned, planned_lengths, strict=True)
        later = tuple(family for family, length in pairs if length == longest_planned)
        return later[0].kind, [], later
    return None, [], ()


def _weighed(text: str, task: str, cards: Mapping[str, ModelCard]) -> Choice:
    """By the words of each kind, and of what a model is used for."""
    scores = {
        kind: _score(text, {**_own_words(cards, kind), **words}) for kind, words in KIND_PHRASES.items()
    }
    uses = {use: _score(text, words) for use, words in USE_PHRASES.items()}
    use = max(uses, key=lambda name: uses[name]) if any(uses.values()) else None
    kind = TABLES["kind_of_task"].get(task)
    if any(scores.values()):
        kind = max(scores, key=lambda name: scores[name])
    if kind is None:
        return None, [], ()
    fits = [card for card in cards.values() if card.kind == kind]
    chosen = [card for card in fits if use in card.tasks]
    if not chosen and (use is None or kind == "understanding"):
        chosen = fits
    of_kind = [family for family in PLANNED if family.kind == kind]
    planned = [family for family in of_kind if family.name not in cards]
    if any(use in each.tasks for each in (*of_kind, *cards.values())):
        planned = [family for family in planned if use in family.tasks]
    return kind, chosen, tuple(planned)


def _own_words(cards: Mapping[str, ModelCard], kind: str) -> dict[str, int]:
    """What the cards of a kind call themselves: a word weighs 1, a phrase 3."""
    return {
        word: 3 if " " in word or "-" in word else 1
        for card in cards.values()
        if card.kind == kind
        for word in card.keywords
    }


def _names(card: ModelCard) -> set[str]:
    """Everything people write for a card: its names, alone and with a size, and its hub names."""
    hubs = {size.hub.rpartition("/")[2].removesuffix("-Instruct") for size in card.sizes.values()}
    return {
        card.name,
        *card.aliases,
        *hubs,
        *(f"{name}-{key}" for name in (card.name, *card.aliases) for key in card.sizes),
    }


def _task(text: str) -> str:
    for task, words in METHODS.items():
        if any(_holds(text, word) for word in words):
            return task
    return "sft"


def _benchmark(text: str) -> str:
    """The benchmark that a request names: a key of FILES; the first when it names none."""
    return next((name for name in FILES if _holds(text, name)), next(iter(FILES)))


def _preferred(cards: list[ModelCard], text: str) -> ModelCard | None:
    """A card with a word of the text that is its own among them (subtitles: Whisper); else the newest dense
    one: the name that sorts last among those with the fewest limits and no experts."""
    if not cards:
        return None
    shared = Counter(word for card in cards for word in card.keywords)

    def own(card: ModelCard) -> int:
        return max((len(w) for w in card.keywords if shared[w] == 1 and _holds(text, w)), default=0)

    return max(
        cards,
        key=lambda card: (
            own(card),
            not any(size.active for size in card.sizes.values()),
            -len(card.limits),
            card.name,
        ),
    )


def middle(card: ModelCard, among: Iterable[str] = ()) -> str:
    """The size to begin with when none is named: of those that the documents name, the one nearest to 7
    billion parameters.

    among: sizes to choose from, all if empty.
    """
    sizes = [key for key in card.sizes if key in among] or list(card.sizes)
    return min(
        [key for key in sizes if key in card.seeds] or sizes,
        key=lambda key: (abs(card.sizes[key].parameters - 7), key),
    )


def _steps(names: Iterable[str], facts: Mapping[str, Any], without: Iterable[str] = ()) -> tuple[Stage, ...]:
    """The named steps of advise.yaml with the facts in their places, but for those in `without`."""
    return tuple(
        Stage(
            **{
                key: value.format_map(facts) if isinstance(value, str) else value
                for key, value in TABLES["steps"][name].items()
            }
        )
        for name in names
        if name not in without
    )


def _conversion(weights: str, to: str) -> dict[str, str]:
    """Facts of the step `convert`."""
    tree = "a DCP directory" if to == "dcp" else "Megatron-style"
    return {
        "to": to,
        "name": weights.rpartition("/")[2],
        "tree": tree,
        "cut": "" if to == "dcp" else " --tp, --pp cut it;",
    }


def way(
    card: ModelCard, size: str | None, task: str, devices: int | None = None, benchmark: str = "ai2d"
) -> tuple[Stage, ...]:
    """The way for a model that is here, each stage with its paths and its command; `benchmark` is a key of
    FILES."""
    key, generates = size or middle(card), card.kind == "generation"
    facts = card.sizes[key]
    compared = ("dpo" if name == "diffusion_dpo" else name for name in objectives_of(card.family))
    own = (*compared, *card.methods)
    method = task if task in ("sft", "lora", "pretrain", *own) else "sft"
    count, run = devices or facts.devices, f"{card.name}-{key}-{method}"
    weights = f"model_from_hf/{facts.hub.rpartition('/')[2]}"
    subject = weights if task in ("chat", "evaluate") else f"runs/{run}"
    pictures = method == "dreambooth"  # a directory of pictures, and captions in the recipe
    data = "data/train.jsonl" if card.kind == "audio" else "data/train.json"
    if generates:
        data = "pictures/subject" if pictures else "dataset/data.json"
    nodes = f"{-(-count // 8)} nodes: the same on each, with NNODES, NODE_RANK and MASTER_ADDR"
    kind = "speaking" if card.speaks else card.kind
    ways = TABLES["ways"][kind if kind in TABLES["ways"] else "understanding"]
    left_out = [name for name, there in (("not_yet", task in NOT_YET), ("look", not pictures)) if not there]
    return _steps(
        ways.get(task, ways["train"]),
        {
            "hub": facts.hub,
            "key": key,
            "method": method,
            "devices": count,
            "nproc": min(count, 8),
            "run": run,
            "weights": weights,
            "data": data,
            "learned_from": f"runs/{run}/features/" if generates else data,
            "subject": subject,
            "subject_name": subject.rpartition("/")[2],
            "benchmark": benchmark,
            "file": FILES[benchmark],
            "TASK": task.upper(),
            "index": "model_index.json" if generates else "config.json",
            "nodes": nodes if count > 8 and not generates else "",
            "merge": " --merge-lora" if method in ("lora", "dreambooth", "grpo", *PREFERENCE) else "",
            "not_yet": NOT_YET.get(task, ""),
            "format": "diffusers' layout" if generates else "hub format",
            **_conversion(weights, "mm"),
        },
        left_out,
    )


def foreseen(families: tuple[PlannedFamily, ...], task: str) -> tuple[Stage, ...]:
    """The way for families without a card: what the stages will be. None trains yet; some convert today."""
    if not families:
        return ()
    first, features = families[0], any(family.features for family in families)
    names = TABLES["ways"]["planned"][first.kind]
    data, weights = TABLES["data_of_planned"][first.kind], f"weights/{first.name}"
    facts = {
        "weights": weights,
        "data": data,
        "learned_from": "dataset/features/" if features else data.split(" (")[0],
        "training": f"{task.upper()} training" if task in NOT_YET else "Train",
        "samples": f"runs/{first.name}/samples/" if first.kind == "generation" else "",
        **_conversion(weights, first.converts),
    }
    left_out = [
        name for name, there in (("convert", first.converts), ("features_later", features)) if not there
    ]
    return _steps(names[: 3 if task == "convert" else None], facts, left_out)
