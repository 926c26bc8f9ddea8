"""What trainers of denoisers share: folders with captions, sizes, noise levels, adapters, length, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import TABLES, Given, Origin, read_config
from polymodal.tools.translate.peers import trainer
from polymodal.tools.translate.peers.files import checkpoint
from polymodal.tools.translate.peers.trainer import number

SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
}
CAPTIONS = (".txt", ".caption", "txt", "caption")


def source(launch: Launch, value: Any, origin: Origin, model: str = "") -> None:
    """model.source: diffusers' directory or id. model: their name of it, for the hint, where the weights
    are single files of another layout."""
    single = isinstance(value, str) and value.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".gguf"))
    if launch.source is None and (single or value is None):
        hub = TABLES["pipelines"].get(model)
        example = hub or "the id of a pipeline of diffusers"
        found = f"{value} is a file of its own layout" if value else "it names no pipeline"
        raise PolymodalError(
            f"{launch.file}: {found}, the recipe wants diffusers' directory of the model.",
            f"Name it: --source {example}" + ("." if hub is None else ", or a directory of that layout."),
        )
    checkpoint(launch, "model.source", value, origin)


def folder(
    launch: Launch,
    path: Any,
    origin: Origin,
    repeat: Any = 1,
    caption: Any = None,
    prefix: Any = None,
    suffix: Any = None,
) -> dict[str, Any]:
    """A directory of pictures or clips with captions beside them, or rows, as an entry of data.datasets."""
    if not isinstance(path, str):
        raise PolymodalError(f"{origin.file}: a data set has no path.", f"Give it {origin.name}.")
    out: dict[str, Any] = {"path": trainer.dataset(launch, path, path, origin)}
    if float(repeat) != 1:
        out["repeat"] = float(repeat)
    texts = {"caption": caption, "caption_prefix": prefix, "caption_suffix": suffix}
    return out | {key: text for key, text in texts.items() if text}


def datasets(launch: Launch, sets: list[dict[str, Any]], origin: Origin, given: Any) -> None:
    """Writes data.datasets. Raises PolymodalError for none."""
    if not sets:
        raise PolymodalError(
            f"{origin.file}: it names no data.", "Name a directory of pictures or clips in it."
        )
    launch.ledger.write("data.datasets", sets, origin, given)


def sizes(launch: Launch, areas: Sequence[Any], origin: Origin, buckets: bool, value: Any) -> None:
    """data.clip.pixels or sizes. areas: sides of squares or [width, height]; buckets: of every shape."""
    found = list[tuple[int, int]]()
    for area in areas:
        width, height = area if isinstance(area, list | tuple) else (area, area)
        found.append((int(width), int(height)))
    if not found:
        return
    largest = max(found, key=lambda size: size[0] * size[1])
    ledger = launch.ledger
    why = "sizes of this area for every shape"
    if len(set(found)) > 1 and buckets:
        why += "; one area here, the largest: each row is at all of them there"
    if buckets:
        ledger.write("data.clip.pixels", largest[0] * largest[1], origin, value, why)
    else:
        ledger.write(
            "data.clip.sizes", [[h, w] for w, h in dict.fromkeys(found)], origin, value, "[height, width]"
        )


def frames(launch: Launch, counts: Sequence[Any], origin: Origin, value: Any) -> None:
    """data.clip.frames from lengths of clips, each cut to 1 + a multiple of 4."""
    kept = sorted({1 + (int(count) - 1) // 4 * 4 for count in counts})
    why = "" if kept == sorted(int(count) for count in counts) else "1 + a multiple of 4"
    launch.ledger.write("data.clip.frames", kept, origin, value, why)


def captions(launch: Launch, extension: Any, origin: Origin) -> None:
    """Only captions in .txt and .caption are read."""
    if extension in (None, *CAPTIONS):
        if extension is not None:
            launch.ledger.note("mapped", origin, extension, "captions beside the media are read")
    else:
        launch.ledger.note("unsupported", origin, extension, "captions are read from .txt and .caption")


def adapters(launch: Launch, given: Given, rank: str, alpha: str, own: Any = None, dropout: str = "") -> None:
    """model.lora. rank, alpha, dropout: keys of theirs; own: alpha where they give none, None = the rank."""
    ledger = launch.ledger
    size = number(given, rank, None, int)
    if size is None:
        raise PolymodalError(f"{given.file}: {rank} is not given.", "Write the rank of the adapters there.")
    ledger.write("model.lora.rank", size, given.origin(rank))
    value = number(given, alpha)
    if value is not None:
        ledger.write("model.lora.alpha", value, given.origin(alpha))
    else:
        ledger.default("model.lora.alpha", own or size, given.origin(alpha), "" if own else "the rank there")
    if dropout and (share := number(given, dropout, 0.0)):
        ledger.write("model.lora.dropout", share, given.origin(dropout))


def length(launch: Launch, micro: int, accumulation: int, where: Mapping[str, Origin]) -> None:
    """The batch. where: origins of `micro` and `accumulation`."""
    ledger = launch.ledger
    ledger.write("train.micro_batch_size", micro, where["micro"])
    whole = micro * accumulation * launch.world
    why = f"{micro} x {accumulation} accumulated x {launch.world} processes"
    ledger.write("train.global_batch_size", whole, where["accumulation"], accumulation, why)
    if launch.world > 1:
        origin = Origin("distributed data parallel", launch.file)
        ledger.default("parallel.dp_replicate", launch.world, origin, "every process holds the model")
        ledger.default("parallel.dp_shard", 1, origin)


def schedule(launch: Launch, given: Given, name: str, warmup: str, otherwise: str = "constant") -> None:
    """optim.schedule. name, warmup: keys of theirs."""
    ledger = launch.ledger
    value = str(given.take(name, otherwise))
    if value not in SCHEDULES:
        ledger.note("unsupported", given.origin(name), value, f"known are {', '.join(SCHEDULES)}")
    elif given.has(name):
        ledger.write("optim.schedule.name", SCHEDULES[value], given.origin(name), value)
    else:
        ledger.default("optim.schedule.name", SCHEDULES[value], given.origin(name))
    steps = number(given, warmup, 0)
    steps = int(steps) if steps >= 1 else steps
    if given.has(warmup):
        ledger.write("optim.schedule.warmup", steps, given.origin(warmup))
    else:
        ledger.default("optim.schedule.warmup", 0, given.origin(warmup))


def noise(launch: Launch, density: str, origin: Origin, given: Any) -> None:
    """train.diffusion.density from what it is called there."""
    launch.ledger.write("train.diffusion.density", density, origin, given)


def shift(launch: Launch, value: Any, origin: Origin, given: Any = None) -> None:
    """train.diffusion.shift: a number or `dynamic`. given: what stood there, None where nothing did."""
    if given is None:
        launch.ledger.default("train.diffusion.shift", value, origin)
    elif given == value:
        launch.ledger.write("train.diffusion.shift", value, origin)
    else:
        launch.ledger.write("train.diffusion.shift", value, origin, given)


def guidance(launch: Launch, value: float, origin: Origin, stated: bool = True) -> None:
    """train.diffusion.guidance, unless the pipeline is on this machine and its denoiser has no such input."""
    file = Path(str(launch.ledger.get("model.source"))) / "transformer" / "config.json"
    if file.is_file() and not read_config(file).get("guidance_embeds", True):
        launch.ledger.note("no effect", origin, value, "this denoiser takes no guidance scale")
    elif stated:
        launch.ledger.write("train.diffusion.guidance", value, origin)
    else:
        launch.ledger.default("train.diffusion.guidance", value, origin)


def prompts(launch: Launch, texts: Sequence[str], origin: Origin, given: Any) -> None:
    if texts:
        launch.ledger.write("evaluate.samples.prompts", list(texts), origin, given)


def option_line(text: str) -> tuple[str, dict[str, str]]:
    """A prompt with options behind it (`a cat --w 832 --f 81`): the prompt, and option -> value."""
    prompt, *parts = text.split(" --")
    options = dict[str, str]()
    for part in parts:
        name, _, value = part.partition(" ")
        options[name.strip()] = value.strip()
    return prompt.strip(), options


def read_prompts(launch: Launch, given: Given, name: str) -> None:
    """evaluate.samples from a text file of prompts, one a line, with the options of the first."""
    value = given.take(name)
    if value is None:
        return
    path: Path = launch.open(str(value))
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [option_line(line) for line in lines if line and not line.startswith("#")]
    prompts(launch, [prompt for prompt, _ in found], given.origin(name), value)
    keys = {
        "w": ("width", int),
        "h": ("height", int),
        "f": ("frames", int),
        "s": ("steps", int),
        "n": ("negative", str),
        "l": ("guidance", float),
    }
    for option, value in (found[0][1] if found else {}).items():
        if option in keys:
            key, kind = keys[option]
            launch.ledger.write(f"evaluate.samples.{key}", kind(value), Origin(f"--{option}", str(path)))
        else:
            why = "samples have the run's seed" if option == "d" else "no such option of samples here"
            launch.ledger.note("no effect", Origin(f"--{option}", str(path)), value, why)
