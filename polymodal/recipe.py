"""The recipe: one typed, documented, closed schema for everything a run does.

Ground floor: imports pydantic and yaml only (never torch), so that `polymodal --help` stays fast.
`load` reads YAML with `base:`, applies `a.b=c` overrides, and turns every mistake into one sentence with
the file, the line and the nearest known name.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polymodal.errors import PolymodalError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class Lora(Section):
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank r of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale numerator: the adapter's output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """`all-linear`, or name endings such as [q_proj, v_proj]."""
    towers: list[str] = ["language"]
    """Towers that get adapters, by the card's names (`polymodal models NAME` lists them)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilised LoRA)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How adapters start; all but pissa and olora leave the model unchanged at step 0."""


class Model(Section):
    source: str
    """Directory of a hub checkpoint, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds weights from the config and the seed, for pretraining."""
    config: dict[str, Any] = {}
    """Overrides of the checkpoint's config.json by dotted name, e.g. {text_config.num_hidden_layers: 4}."""
    lora: Lora | None = None
    """Train adapters instead of the weights."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel: auto = the fastest the device has; eager is for debugging."""
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """How mixture-of-experts layers multiply."""
    trust_remote_code: bool = False
    """Run code from the checkpoint's repository."""


class Attr(Section):
    """Names of the fields in the data file, for files that are not in a known format's own names."""

    messages: str | None = None
    """Column with the conversation (default: messages, then conversations)."""
    role: str | None = None
    """Key of the speaker in a message (default: role, then from)."""
    content: str | None = None
    """Key of the text in a message (default: content, then value)."""
    images: str | None = None
    """Column with image paths (default: images, then image)."""
    videos: str | None = None
    """Column with video paths (default: videos, then video)."""
    audios: str | None = None
    """Column with audio paths (default: audios, then audio)."""
    system: str | None = None
    """Column with the system prompt (default: system)."""
    tools: str | None = None
    """Column with the tool list (default: tools)."""
    prompt: str | None = None
    """Alpaca: column with the instruction (default: instruction, then prompt)."""
    query: str | None = None
    """Alpaca: column with the input (default: input, then query)."""
    response: str | None = None
    """Alpaca: column with the answer (default: output, then response)."""
    history: str | None = None
    """Alpaca: column with earlier turns (default: history)."""
    user: str | None = None
    """The user's name in role (default: user, human)."""
    assistant: str | None = None
    """The assistant's name in role (default: assistant, gpt)."""
    observation: str | None = None
    """The tool's name in role (default: tool, observation, tool_response)."""
    function: str | None = None
    """The name of a tool call in role (default: function_call, tool_call)."""


class Dataset(Section):
    path: str
    """File or directory: json, jsonl, parquet, csv, tsv, webdataset tar (globs allowed)."""
    name: str | None = None
    """Name in logs and reports (default: the file's name)."""
    format: Literal["auto", "mllm", "sharegpt", "llava", "alpaca", "openai", "text"] = "auto"
    """How a row becomes messages; `text` is plain text for pretraining."""
    media_dir: str | None = None
    """Directory that relative media paths start from (default: the file's own directory)."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share in the mix, relative to the other datasets; without it every row is used once an epoch."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """Times a row is used in an epoch; 0.25 uses a fixed quarter."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many rows (fewer in the file is no error)."""
    attr: Attr | None = None
    """Field names of this file; keys not given come from data.attr."""


class Image(Section):
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    """Smaller images are enlarged to this many pixels (default: the checkpoint's)."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Larger images are reduced to this many pixels (default: the checkpoint's)."""


class Video(Section):
    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames taken per second of video."""
    min_frames: Annotated[int, Field(ge=1)] = 4
    """Frames taken at least."""
    max_frames: Annotated[int, Field(ge=1)] = 128
    """Frames taken at most."""
    min_pixels: Annotated[int, Field(ge=1)] | None = None
    """Smallest frame in pixels (default: the checkpoint's)."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Largest frame in pixels (default: the checkpoint's)."""


class Data(Section):
    datasets: list[Dataset] = []
    """What is learned from."""
    validation: list[Dataset] = []
    """What validation loss is measured on."""
    attr: Attr = Attr()
    """Field names for every dataset that has no own."""
    max_length: Annotated[int, Field(ge=16)] = 4096
    """Longest sample in tokens, media included."""
    overlong: Literal["drop", "split", "error"] = "drop"
    """Samples longer than max_length: drop, split between messages, or stop. Media are never cut."""
    pack: bool = True
    """Put several samples into one sequence of pack_length tokens; attention never crosses samples."""
    pack_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens in a packed sequence (default: max_length)."""
    train_on: Literal["assistant", "all", "last"] = "assistant"
    """Tokens with loss: every assistant message, everything, or the last assistant message."""
    on_error: Literal["skip", "fail"] = "fail"
    """A broken row or file: report it and go on, or stop. It is never replaced by another."""
    image: Image = Image()
    video: Video = Video()
    chat_template: str | None = None
    """File with a Jinja chat template (default: the checkpoint's)."""
    template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template, e.g. {enable_thinking: false}."""
    shuffle: bool = True
    """Shuffle every epoch by (seed, epoch)."""
    window: Annotated[int, Field(ge=1)] = 65536
    """Samples planned at a time."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes a rank that decode media."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Steps prepared ahead."""
    memory_budget: Annotated[int, Field(ge=1)] = 1024
    """MiB of prepared samples a rank may hold."""
    cache_dir: str | None = None
    """Where indexes are kept (default: beside the data, or a node-local directory when that is read-only or remote)."""


class Parallel(Section):
    dp_replicate: Annotated[int, Field(ge=1)] = 1
    """HSDP: copies of the sharded model."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """FSDP2: ranks that parameters are sharded over; -1 = all that are left."""
    cp: Annotated[int, Field(ge=1)] = 1
    """Context parallel: ranks that share one sequence."""
    tp: Annotated[int, Field(ge=1)] = 1
    """Tensor parallel: ranks that share one layer."""
    sp: bool | None = None
    """Sequence parallel inside the tp group (norms and residuals sharded); default: on when tp > 1."""
    pp: Annotated[int, Field(ge=1)] = 1
    """Pipeline parallel: stages."""
    ep: Annotated[int, Field(ge=1)] = 1
    """Expert parallel: ranks that experts are spread over."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recompute: full = whole blocks; selective = keep matmul and attention outputs."""
    recompute_blocks: list[str] | None = None
    """Patterns of blocks to recompute (default: all of the card's), e.g. [model.language_model.layers.*]."""
    reshard_after_forward: bool = True
    """Free gathered parameters after a block's forward (ZeRO-3); false keeps them for backward (ZeRO-2)."""
    compile: bool = False
    """torch.compile each block."""


class LossGuard(Section):
    nan: Literal["skip", "stop"] = "stop"
    """A loss or gradient that is not a number: skip the step, or stop."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """Skip the step when the gradient norm exceeds this multiple of its running mean."""
    max_skips: Annotated[int, Field(ge=1)] = 10
    """Stop after so many skipped steps in a row."""


class Train(Section):
    seed: int = 42
    """Seed of everything random."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; without it, epochs decides."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data, when steps is not given."""
    global_batch_size: Annotated[int, Field(ge=1)] = 8
    """Packed sequences a step over all ranks (samples, when data.pack is false)."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples joined in one forward when data.pack is false."""
    precision: Literal["fp32", "bf16", "fp16", "pure_bf16"] = "bf16"
    """Arithmetic: bf16/fp16 keep float32 master weights; pure_bf16 keeps none; fp16 scales the loss dynamically."""
    loss: Literal["per_token", "per_sample", "per_micro_batch"] = "per_token"
    """Weight of a token: 1, 1 / tokens of its sample, or 1 / tokens of its micro-batch."""
    router_aux_loss: Annotated[float, Field(ge=0)] | None = None
    """Weight of the experts' balance loss (default: the checkpoint's config)."""
    freeze: list[str] = []
    """Towers (by the card's names) or parameter patterns that are not trained."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, kept in float32."""
    deterministic: bool = False
    """Deterministic kernels; slower."""
    guard: LossGuard = LossGuard()


class Schedule(Section):
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd = constant, then a linear decay at the end."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Warm-up: steps when >= 1, else share of all steps."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a share of the peak."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """wsd: share of all steps spent decaying."""


class Group(Section):
    match: str
    """Tower name of the card, or a parameter pattern (shell wildcards)."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate of these parameters."""
    lr_scale: Annotated[float, Field(ge=0)] | None = None
    """Or: multiple of optim.lr."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of these parameters."""


class Optim(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer; muon takes the blocks' 2-D weights and leaves the rest to adamw."""
    lr: Annotated[float, Field(ge=0)] = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; biases and norms never decay."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    muon_steps: Annotated[int, Field(ge=1)] = 5
    """Newton-Schulz iterations."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null = no clipping."""
    schedule: Schedule = Schedule()
    groups: list[Group] = []
    """Own learning rate and weight decay by tower or pattern; the first match counts."""


class Checkpoint(Section):
    dir: str = "runs/{name}"
    """Directory of the run: checkpoints, metrics, resolved recipe."""
    every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept."""
    save: Literal["full", "weights"] = "full"
    """`weights` leaves out optimizer and data state: half the disk or less, cannot resume."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    resume: Literal["auto", "never"] | str = "auto"
    """auto = the run's newest checkpoint if there is one; never; or a checkpoint's directory."""
    init_from: str | None = None
    """Start from the weights of another run, checkpoint or export, with a fresh optimizer."""
    export: bool = False
    """Export to the hub format at the end, into <dir>/export."""


class Profile(Section):
    start: Annotated[int, Field(ge=1)] = 10
    """First step traced."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Steps traced."""
    ranks: list[int] = [0]
    """Ranks that write a trace."""
    memory: bool = False
    """Also write a memory snapshot (devices that have one)."""
    stacks: bool = False
    """Record Python stacks and shapes."""


class Monitor(Section):
    every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines of the log."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl."""
    project: str = "polymodal"
    """Project name for wandb and mlflow."""
    profile: Profile | None = None
    """Trace a range of steps; traces open in Perfetto."""


class Evaluate(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between validation losses; 0 = only at the end when data.validation is given."""
    batches: Annotated[int, Field(ge=1)] | None = None
    """Global batches of validation data used each time (default: all)."""


class Device(Section):
    kind: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Which accelerator; auto takes what is there."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads a process (default: cores / local processes)."""
    env: dict[str, str | int | bool] = {}
    """Environment variables set before torch starts; names and ranges are checked (`polymodal doctor --env`)."""


class Recipe(Section):
    """Everything a run does. See each section's keys."""

    name: str = "run"
    """Name of the run."""
    model: Model
    data: Data = Data()
    parallel: Parallel = Parallel()
    train: Train = Train()
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    evaluate: Evaluate = Evaluate()
    device: Device = Device()

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoint.dir.format(name=self.name))


class _Positions(dict):
    """A mapping of dotted key -> (file, line) filled while YAML is read."""


def _compose(path: Path) -> tuple[dict, dict[str, tuple[str, int]]]:
    """YAML file -> (plain data, {dotted key: (file, line)})."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PolymodalError(f"The recipe {path} does not exist.", "Check the path, or write one with `polymodal init MODEL`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PolymodalError(f"The recipe {path} cannot be read: {error}.") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise PolymodalError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}.") from None
    places: dict[str, tuple[str, int]] = {}

    def walk(node, prefix):
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                if name in seen:
                    raise PolymodalError(f"{path}, line {key.start_mark.line + 1}: `{name}` is given twice.", "Remove one of them.")
                seen.add(name)
                places[name] = (str(path), key.start_mark.line + 1)
                walk(value, name + ".")
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                places[f"{prefix}{i}"] = (str(path), value.start_mark.line + 1)
                walk(value, f"{prefix}{i}.")

    if node is not None:
        walk(node, "")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise PolymodalError(f"{path}: a recipe is a mapping of sections, this file holds a {type(data).__name__}.")
    return data, places


def _merge(base: dict, over: dict, path: tuple = ()) -> dict:
    out = dict(base)
    for key, value in over.items():
        free = path in {("model", "config"), ("device", "env"), ("data", "template_kwargs")}
        if isinstance(value, dict) and isinstance(out.get(key), dict) and not free:
            out[key] = _merge(out[key], value, (*path, key))
        else:
            out[key] = value
    return out


def _read(path: Path, chain: tuple[Path, ...] = ()) -> tuple[dict, dict]:
    path = path.resolve() if not chain else path
    if path in chain:
        raise PolymodalError(f"{path}: `base:` goes in a circle ({' -> '.join(p.name for p in (*chain, path))}).")
    data, places = _compose(path)
    base = data.pop("base", None)
    if base is None:
        return data, places
    merged: dict = {}
    merged_places: dict = {}
    for name in [base] if isinstance(base, str) else base:
        child, child_places = _read((path.parent / name).resolve(), (*chain, path))
        merged = _merge(merged, child)
        merged_places.update(child_places)
    merged_places.update(places)
    return _merge(merged, data), merged_places


def _override(data: dict, places: dict, text: str) -> None:
    key, sep, value = text.partition("=")
    key = key.strip().lstrip("-")
    if not sep or not key:
        raise PolymodalError(f"The override `{text}` is not of the form a.b=c.")
    try:
        parsed = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-5 as text
        try:
            parsed = float(parsed)
        except ValueError:
            parsed = value
    target: Any = data
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        if parts[:i] in (["model", "config"], ["device", "env"], ["data", "template_kwargs"]):
            parts = [*parts[:i], ".".join(parts[i:])]  # free mappings keep dotted keys
            break
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise PolymodalError(f"The override `{text}`: `{'.'.join(parts[:i])}` is a list of {len(target)}, `{part}` is not one of its numbers.")
            target = target[int(part)]
        else:
            if not isinstance(target.get(part), (dict, list)):
                target[part] = {}
            target = target[part]
    if isinstance(target, list):
        if not parts[-1].isdigit() or int(parts[-1]) >= len(target):
            raise PolymodalError(f"The override `{text}`: there is no number `{parts[-1]}` in that list.")
        target[int(parts[-1])] = parsed
    else:
        target[parts[-1]] = parsed
    places[key] = (f"override `{text}`", 0)


def _sections(annotation: Any) -> list[type[Section]]:
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []
    for arg in getattr(annotation, "__args__", ()) or ():
        found += _sections(arg)
    return found


def _known(location: tuple) -> list[str]:
    """Names allowed at a dotted location (its parent section's fields)."""
    section: type[Section] | None = Recipe
    for part in location:
        if isinstance(part, int) or section is None:
            continue
        info = section.model_fields.get(part)
        if info is None:
            continue
        children = _sections(info.annotation)
        section = children[0] if children else None
    return list(section.model_fields) if section else []


def all_keys(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        for child in _sections(info.annotation):
            keys += all_keys(child, f"{prefix}{name}.")
    return keys


def _explain(error: ValidationError, places: dict, path: Path | None) -> PolymodalError:
    sentences = []
    for item in error.errors():
        location = tuple(p for p in item["loc"] if not (isinstance(p, str) and (p.startswith("list[") or "literal" in p or p in ("str", "int", "float", "bool"))))
        dotted = ".".join(str(p) for p in location)
        probe, where = dotted, None
        while probe and where is None:
            where = places.get(probe)
            probe = probe.rpartition(".")[0]
        place = f"{where[0]}, line {where[1]}" if where and where[1] else (where[0] if where else str(path or "recipe"))
        if item["type"] == "extra_forbidden":
            name = str(location[-1])
            near = difflib.get_close_matches(name, _known(location[:-1]), 1, 0.5)
            elsewhere = [k for k in all_keys() if k.rpartition(".")[2] == name]
            if near:
                mend = f"Did you mean `{'.'.join([*map(str, location[:-1]), near[0]])}`?"
            elif elsewhere:
                mend = f"Did you mean `{elsewhere[0]}`?"
            else:
                mend = f"Known keys here: {', '.join(_known(location[:-1])) or 'none'}."
            sentences.append((f"{place}: unknown key `{dotted}`.", mend))
        elif item["type"] == "missing":
            sentences.append((f"{place}: the key `{dotted}` is missing.", "Add it."))
        else:
            value = item.get("input")
            sentences.append((f"{place}: `{dotted}` = {value!r}: {item['msg'][0].lower() + item['msg'][1:]}.", ""))
    seen = list(dict.fromkeys(sentences))
    if len(seen) == 1:
        return PolymodalError(*seen[0])
    return PolymodalError("\n".join(f"{m} {h}".strip() for m, h in seen))


def load(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, validate.

    Relative paths in the recipe stay relative to the working directory, as on a command line.
    Raises PolymodalError with file, line and the nearest known name.
    """
    path = Path(path)
    data, places = _read(path)
    for text in overrides:
        _override(data, places, text)
    return validate(data, places, path)


def validate(data: dict, places: dict | None = None, path: Path | None = None) -> Recipe:
    """A plain mapping -> Recipe; every mistake is one sentence."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, places or {}, path) from None


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML; `load` of it gives the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def schema() -> dict:
    """JSON schema of a recipe, with every key's documentation."""
    out = Recipe.model_json_schema()
    out["properties"] = {"base": {"description": "Recipe(s) that this one starts from, relative to this file.", "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, **out["properties"]}
    return out
