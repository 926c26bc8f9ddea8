"""Opens whatever holds a model: hub checkpoints and exports, runs, single checkpoints, LoRA adapters.

Hub formats are opened by transformers; of a training checkpoint the model is built, and its tensors are read
one by one (`describe`), which export shares.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import MediaShape
from polymodal.core.tensors import LazyTensors, require_finite
from polymodal.data.boxes import BoxWriter
from polymodal.distributed import attention
from polymodal.distributed import checkpoint as checkpoints
from polymodal.generate.engine import Engine
from polymodal.models import adapter_files, agreement, catalog, library, lora, quantised, weights
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.runtime import device as devices
from polymodal.runtime import process_group
from polymodal.runtime.process_group import Runtime

Kind = Literal["hub", "adapter", "run"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = (".safetensors", ".bin", ".distcp", ".json", ".jinja", ".metadata")

# What transformers, peft and diffusers raise on files they cannot use.
LIBRARY_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@contextlib.contextmanager
def library_errors(
    message: str, hint: str, errors: tuple[type[Exception], ...] = LIBRARY_ERRORS
) -> Iterator[None]:
    """A library's error becomes PolymodalError("message: first line of its reason", hint)."""
    try:
        yield
    except errors as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise PolymodalError(f"{message}: {reason}", hint) from None


def kind_of(source: str | os.PathLike) -> Kind:
    """What a path holds: "run" (a run directory or one of its checkpoints), "adapter" (peft), "hub" (all
    else).

    Raises PolymodalError for a path that does not exist or a directory that holds none of them.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if not path.exists():
        if text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise PolymodalError(
                f"The checkpoint {text} does not exist.",
                "Give a directory, or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct.",
            )
        return "hub"
    if not path.is_dir():
        if lora.is_adapter(path):
            return "adapter"
        raise PolymodalError(
            f"The checkpoint {text} is a file, and no LoRA adapter (.safetensors).",
            "Give the directory that holds config.json, or a run.",
        )
    if checkpoints.at(path) is not None:
        return "run"
    if lora.is_adapter(path):
        return "adapter"
    if (path / "recipe.yaml").is_file() and not (path / "config.json").is_file():
        raise PolymodalError(
            f"The run {text} has no checkpoint yet.",
            "Train it to its first checkpoint (checkpoint.every), or give model.source itself.",
        )
    return "hub"


def fingerprint(directory: Path) -> str:
    """Changes when a file of a checkpoint does: names, sizes and times of its files, not their content."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in SUFFIXES or file.name == ".metadata":
            info = file.stat()
            digest.update(f"{file.name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# --- training checkpoints -------------------------------------------------------------------------


@dataclass
class Assembled:
    """A model on meta (until `fill`), with adapters apart from their base, and where its values come from.

    tensors: whole, by plain parameter name, adapters by their own; each is read when it is asked for.
    rounded: of a run on a base of few bits, whose weights `tensors` has as they were computed with.
    """

    model: nn.Module
    family: Family
    recipe: recipes.Recipe
    checkpoint: Path
    tensors: LazyTensors
    rounded: quantised.Rounded | None = None

    @torch.no_grad()
    def fill(self, dtype: torch.dtype = torch.float32) -> Assembled:
        """Read the values, on the CPU in `dtype`, one tensor after the other, for inference."""
        model, tensors = self.model, self.tensors
        cast(model, dtype)
        weights.materialise(model, "cpu")
        weights.rebuild_buffers(model, persistent=any(n not in tensors for n in library.targets(model)))
        for tensor, names in library.aliases(model):
            name = next((n for n in names if n in tensors), None)
            if name is not None:
                tensor.copy_(tensors[name])
        for name, parameter in lora.adapters(model).items():
            parameter.copy_(tensors[name])
        model.eval()
        return self

    def merged(self) -> LazyTensors:
        """The weights by plain name, adapters added in."""
        adapters = {name: self.tensors[name] for name in lora.adapters(self.model)}
        if not adapters:
            return self.tensors
        rest = self.tensors.renamed({n: n for n in self.tensors if n not in adapters})
        return lora.merged(rest, adapters, lora.scales(self.model), self.model)


Locate = Callable[[str | os.PathLike], Path]
"""How a run's checkpoint is found; where several ranks open one, `alike` has all of them find the same."""


def alike(rt: Runtime) -> Locate:
    """For a run that every rank opens: each gets the checkpoint that rank 0 finds. Collective."""
    return lambda path: checkpoints.agreed(rt, lambda: checkpoints.locate(path))  # type: ignore[return-value]


def describe(
    source: str | os.PathLike,
    *,
    ema: bool = False,
    base: str | None = None,
    locate: Locate = checkpoints.locate,
    quantise: bool = True,
) -> Assembled:
    """The model of a run or of one checkpoint: what it started from, where needed, under the trained tensors.

    ema: the average instead of the last weights. base: where model.source lies now, when it was moved.
    quantise: weights that model.base kept in few bits are rounded as they were; False: as the files have
    them. Raises PolymodalError: no checkpoint, no average, a base that is gone, tensors that do not fit.
    """
    checkpoint = locate(source)
    state = checkpoints.read_state(checkpoint)
    if not state.recipe:
        raise PolymodalError(
            f"{checkpoint / checkpoints.STATE} holds no recipe.",
            "Give a checkpoint that `polymodal train` wrote, or the export of one.",
        )
    recipe = recipes.validate(state.recipe)
    recipe.model.trust_remote_code = False  # a file of a run does not decide what may run here
    if base is not None:
        recipe.model.source = base
    try:
        catalog.resolve(recipe.model.source, recipe.model.revision, weights=False)
    except PolymodalError as error:
        raise PolymodalError(
            f"The run {source} started from a model that cannot be had: {error.message}",
            "Give the model's directory with --base.",
        ) from None
    lora_recipe = recipe.model.lora
    shapes = recipe.model if lora_recipe is not None else recipe.model.model_copy(update={"init": "random"})
    family = catalog.family(shapes)  # weights of the base are asked for only when they are needed
    model = family.build()
    if lora_recipe is not None:
        lora.attach(model, lora_recipe, family.card)
    tensors = _of_run(model, checkpoint, "ema." if ema else "model.", strict=True)
    frozen = any(not set(names) & set(tensors) for _, names in library.aliases(model))
    if frozen or set(lora.adapters(model)) - set(tensors):
        tensors = _initial(model, family, recipe, locate) | tensors
    rounded = None
    if recipe.model.base != "bf16" and quantise:
        names = [f"{name}.weight" for name in quantised.choose(model, family.card)]
        rounded = quantised.Rounded(tensors, names, recipe.model.base)
    return Assembled(
        model, family, recipe, checkpoint, rounded.tensors if rounded is not None else tensors, rounded
    )


def _initial(model: nn.Module, family: Family, recipe: recipes.Recipe, locate: Locate) -> LazyTensors:
    """What the run started from: frozen parameters, and the base under adapters."""
    if recipe.model.init == "random":
        tensors = weights.initial_buffers(model) | weights.random(model, family, recipe.train.seed)
    else:
        source = catalog.resolve(recipe.model.source, recipe.model.revision)
        tensors = weights.read(model, weights.directory_of(source, family))
    if recipe.model.lora is not None:
        tensors |= lora.initial_values(model, recipe.model.lora, recipe.train.seed)
    start = recipe.checkpoint.init_from
    if start and catalog.is_whole(start):
        tensors |= weights.read(model, weights.directory_of(start, family))
    elif start and lora.is_adapter(start):
        tensors |= lora.read(model, start, family)
    elif start and not checkpoints.at(start) and (files := _foreign(start, family)) is not None:
        tensors |= weights.read(model, start, files)
    elif start:  # another run, perhaps a whole one under this one's adapters
        tensors |= _of_run(model, locate(start), "model.", strict=False)
    return tensors


def _foreign(start: str, family: Family) -> Any:
    """Another system's checkpoint as storage.Files; None for what is none."""
    from polymodal.convert import recognise

    return recognise.reader(Path(start), weights.directory_of(None, family))


def _of_run(model: nn.Module, checkpoint: Path, prefix: str, *, strict: bool) -> LazyTensors:
    """A checkpoint's tensors by the plain names of a model's parameters.

    strict: all of them must be the model's. Raises PolymodalError; for another shape when the tensor is read.
    """

    def plain(name: str) -> str:
        return name if library.ADAPTER.search(name) else weights.plain(name)

    with warnings.catch_warnings():  # torch warns that one process reads alone, as it is meant to
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        tensors = checkpoints.read_model(checkpoint, prefix)
    shapes = {plain(n): p.shape for n, p in model.named_parameters()}
    unknown = sorted(n for n in tensors if plain(n) not in shapes)
    if unknown and strict:
        raise PolymodalError(
            f"{checkpoint} has {len(unknown)} tensors that the model of its recipe has not "
            f"(first: {unknown[0]}).",
            "Give the model.source and model.config that it was trained with.",
        )
    stored = tensors.renamed({n: plain(n) for n in tensors if plain(n) in shapes})

    def fitting(name: str) -> torch.Tensor:
        value = stored[name]
        if value.shape != shapes[name]:
            raise PolymodalError(
                f"{checkpoint} has {name} of shape {list(value.shape)}, the model {list(shapes[name])}.",
                "Give the model.config that it was trained with.",
            )
        require_finite([(name, value)], checkpoint, "The run had diverged: take an earlier checkpoint.")
        return value

    return LazyTensors(dict.fromkeys(stored, fitting))


def of_hub(source: str | os.PathLike) -> Assembled:
    """A hub checkpoint on meta, and its tensors to be read one by one. Raises PolymodalError."""
    recipe = recipes.Recipe(model=recipes.Model(source=os.fspath(source)))
    family = catalog.family(recipe.model)
    model = family.build()
    tensors = weights.read(model, weights.directory_of(None, family))
    return Assembled(model, family, recipe, Path(family.source), tensors)


# --- processors -----------------------------------------------------------------------------------


def processor_of(
    directory: str | os.PathLike,
    data: recipes.Data | None = None,
    family: Family | None = None,
    *,
    trust: bool = False,
) -> Any:
    """The library's processor of a checkpoint, with what a recipe changes: pixel limits and chat template.

    family: where its processor limits the pixels of a whole video, which the recipe does by the frame, the
    checkpoint's own limit of videos stays, with a warning. Raises PolymodalError.
    """
    hint = "Copy the checkpoint's tokenizer and preprocessor files beside its weights."
    with library_errors(f"The processor of {directory} cannot be read", hint):
        reader = catalog.reader(directory)
        processor = reader.read_processor(Path(directory), trust)
    if data is None:
        return processor
    if family is None or not family.limit_media(processor, data):
        _limit(getattr(processor, "image_processor", None), data.image, reader.picture_frames)
        video = getattr(processor, "video_processor", None)
        limited = data.video.min_pixels is not None or data.video.max_pixels is not None
        if video is not None and limited and family is not None and _limits_whole_videos(family):
            warnings.warn(
                "data.video.min_pixels and max_pixels are pixels of a frame, this model's processor limits "
                "whole videos: videos are sized by the checkpoint's own limits here.",
                stacklevel=2,
            )
        else:
            _limit(video, data.video)
    if data.chat_template:
        try:
            template = Path(data.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise PolymodalError(
                f"data.chat_template = {data.chat_template} of the run cannot be read: {error.strerror}.",
                "Put the file back, or export where it is.",
            ) from None
        processor.chat_template = template
        if hasattr(processor, "tokenizer"):
            processor.tokenizer.chat_template = template
    return processor


def processor_beside(adapter: Path, base: Path, *, trust: bool = False) -> Any:
    """The processor of an adapter's directory; its base's where only that one's card can read more than the
    tokenizer, or where it has none."""
    processor = processor_of(base, trust=trust)
    if (adapter / "tokenizer_config.json").is_file():
        own = processor_of(adapter, trust=trust)
        return own if hasattr(own, "tokenizer") or not hasattr(processor, "tokenizer") else processor
    return processor


def _limit(part: Any, limits: recipes.Image | recipes.Video, frames: int = 1) -> None:
    """Write a recipe's pixel limits into an image or video processor; frames: what it counts a picture as."""
    if part is None or (limits.min_pixels is None and limits.max_pixels is None):
        return
    size = dict(part.size)
    size["shortest_edge"] = frames * (limits.min_pixels or 0) or size["shortest_edge"]
    size["longest_edge"] = frames * (limits.max_pixels or 0) or size["longest_edge"]
    part.size = size if isinstance(part.size, dict) else type(part.size)(**size)


def _limits_whole_videos(family: Family) -> bool:
    """Whether the checkpoint's own limits make the frames of a long video smaller than of a short one."""
    media = family.media_processor(recipes.Data())
    spans = [media.span(MediaShape("video", 1024, 1024, frames)) for frames in (2, 64)]
    return len({tuple(span.parts[0].size[1:]) for span in spans}) > 1


# --- hub checkpoints and adapters -----------------------------------------------------------------


def load_hub(directory: Path, dtype: str | torch.dtype = "auto", trust: bool = False) -> nn.Module:
    """A hub checkpoint by transformers, on the CPU. Raises PolymodalError when keys are missing."""
    import transformers

    hint = "Is it a whole checkpoint in the hub's format? Fetch or export it again."
    with library.quietly(), library_errors(f"{directory} cannot be opened", hint):
        reader = catalog.reader(directory)
        config = reader.read_config(directory, trust)
        names = [n for n in (config.architectures or ()) if hasattr(transformers, n)]
        auto: Any = getattr(transformers, names[0] if names else reader.auto)
        with library.named_by(config.model_type, reader.tensor_names(directory)):
            model, info = auto.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=trust,
            )
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise PolymodalError(
            f"{directory} lacks {len(missing)} tensors of {type(model).__name__} (first: {missing[0]}).",
            "Fetch or export it again.",
        )
    require_finite(model.named_parameters(), directory)
    return model


def adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a peft directory. Raises PolymodalError."""
    path = directory / "adapter_config.json"
    return read_json(path, "Give the directory of a peft adapter.")


def of_pipeline(directory: Path, base: str | None = None) -> bool:
    """Whether an adapter is of a denoiser: diffusers' file, or peft's whose base is a part of a pipeline."""
    if not (directory / "adapter_config.json").is_file():  # a LoRA file too
        return True
    pipeline = base or Path(adapter_config(directory).get("base_model_name_or_path") or "").parent
    return (Path(pipeline).expanduser() / "model_index.json").is_file()


def base_of(directory: Path, config: dict[str, Any], base: str | None = None) -> Path:
    """The directory of an adapter's base: `base`, else what its config names. Raises PolymodalError."""
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise PolymodalError(
            f"{directory / 'adapter_config.json'} does not name the adapter's base.",
            "Give it with --base.",
        )
    try:
        return catalog.resolve(named, None if base else config.get("revision"))
    except PolymodalError as error:
        raise PolymodalError(
            f"The base {named} of the adapter {directory} cannot be had: {error.message}",
            "Give its directory with --base.",
        ) from None


def put_on(model: nn.Module, directory: Path, base: str) -> nn.Module:
    """The model with a peft adapter in place, put on by peft. Raises PolymodalError when they do not fit."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    message, hint = f"The adapter {directory} does not fit its base {base}", "Give its base with --base."
    with library_errors(message, hint), warnings.catch_warnings():
        # between two versions of the libraries, of no use to users
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
        tensors, config = load_peft_weights(str(directory), device="cpu"), None
        renamed = lora.peft_names(model, {key: tuple(value.shape) for key, value in tensors.items()})
        if any(adapter_files.PREFIX + name != key for key, name in renamed.items()):
            config = PeftConfig.from_pretrained(str(directory))
            config.target_modules = sorted({name.split(".lora_")[0] for name in renamed.values()})
            tensors = {adapter_files.PREFIX + renamed[key]: value for key, value in tensors.items()}
        opened = PeftModel.from_pretrained(model, str(directory), config=config)
        result = set_peft_model_state_dict(opened, tensors)
    lost = result.unexpected_keys + [key for key in result.missing_keys if library.ADAPTER.search(key)]
    if lost:
        raise PolymodalError(
            f"{message}: of its {len(tensors)} tensors and the model's layers, {len(lost)} do not meet "
            f"(first: {lost[0]}).",
            hint,
        )
    adapted = opened.get_base_model()
    require_finite(lora.adapters(adapted).items(), directory)
    return adapted


def load_adapter(
    directory: Path, dtype: str | torch.dtype = "auto", base: str | None = None, trust: bool = False
) -> tuple[nn.Module, Path]:
    """A peft adapter on its base by the libraries alone: (base model with adapters, the base's directory)."""
    base_directory = base_of(directory, adapter_config(directory), base)
    model = load_hub(base_directory, dtype, trust)
    return put_on(model, directory, str(base_directory)).eval(), base_directory


# --- opening --------------------------------------------------------------------------------------


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to a dtype; rotary tables and other buffers stay float32, as the library keeps them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass
class Opened:
    """A model ready for inference, with the library's processor. recipe: of a run, how its data were read.

    name: for reports; identity: changes when the weights do; card: None where there is none for the model;
    source: the directory of its other files, such as a codec.
    """

    model: nn.Module
    processor: Any
    name: str
    identity: str
    recipe: recipes.Recipe | None = None
    card: ModelCard | None = None
    source: str = ""


def check_options(
    checkpoint: str | os.PathLike, device: torch.device | str, dtype: str, ema: bool
) -> tuple[Kind, torch.device]:
    """A checkpoint's kind, and the device; a str is a name of `--device`. Raises PolymodalError."""
    if dtype != "auto" and dtype not in DTYPES:
        raise PolymodalError(f"dtype = {dtype} is not known.", f"Use auto, {', '.join(DTYPES)}.")
    kind = kind_of(checkpoint)
    if ema and kind != "run":
        raise PolymodalError(
            f"{checkpoint} is no run, only runs keep an average (train.ema).", "Leave out --ema."
        )
    if not isinstance(device, torch.device):
        device = devices.find(device, int(os.environ.get("LOCAL_RANK", "0"))).torch  # type: ignore[arg-type]
    return kind, device


def open_model(
    checkpoint: str | os.PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Opened:
    """Any checkpoint's model: hub directory or id, export, run, one of its checkpoints, peft adapter.

    device: or a name (auto: the accelerator, if there is one). dtype: auto (the checkpoint's; for runs
    float32 on the CPU, else the precision trained in), fp32, bf16, fp16. ema: a run's average. base: where an
    adapter's or a run's base lies now. locate: `alike(rt)` where several ranks open one run.
    """
    kind, device = check_options(checkpoint, device, dtype, ema)
    text = os.fspath(checkpoint).rstrip("/")
    path = Path(text).expanduser()
    if kind == "run":
        made = describe(checkpoint, ema=ema, base=base, locate=locate).fill()
        model, recipe, source = made.model, made.recipe, made.family.source
        trained = DTYPES.get(recipe.train.precision.removeprefix("pure_"), torch.float32)
        cast(model, DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else trained))
        _generates(model, source)
        processor = processor_of(source, recipe.data, made.family, trust=recipe.model.trust_remote_code)
        identity = fingerprint(made.checkpoint) + (" ema" if ema else "")
        name = path.name if made.checkpoint.name in text else f"{path.name} ({made.checkpoint.name})"
        return Opened(model.to(device), processor, name, identity, recipe, made.family.card, source)
    library_dtype = DTYPES.get(dtype, "auto")
    if kind == "adapter":
        path = path.parent if path.is_file() else path
        model, directory = load_adapter(path, library_dtype, base)
        processor = processor_beside(path, directory)
        name, identity = path.name, f"{fingerprint(path)} on {fingerprint(directory)}"
    else:
        directory = catalog.resolve(checkpoint, revision)
        model, processor = load_hub(directory, library_dtype).eval(), processor_of(directory)
        name = text if "/" in text and not path.is_dir() else path.name
        identity = fingerprint(directory)
    if (tokenizer := getattr(processor, "tokenizer", None)) is not None:
        agreement.require_tokens(tokenizer, model.config, directory)
    return Opened(
        model.to(device), processor, name, identity, None, catalog.card_of(directory), str(directory)
    )


def _generates(model: Any, source: str) -> None:
    """A model built for training becomes one to generate with: the library's attention, with its cache."""
    from transformers import GenerationConfig

    attention.use(model, "sdpa")
    for config in (model.config, getattr(model.config, "text_config", None)):
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = True
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    else:
        model.generation_config = GenerationConfig.from_model_config(copy.deepcopy(model.config))


def engine_of(opened: Opened) -> Engine:
    """An engine that prepares media and prompts as the run did."""
    own: dict[str, Any] = {}
    if opened.recipe is not None:
        data = opened.recipe.data
        own = {"video": data.video, "template_kwargs": data.template_kwargs}
        own["special_tokens"] = data.special_tokens
    if opened.card is not None:
        resized = functools.partial(opened.card.family.picture_size, opened.processor)
        own["boxes"] = BoxWriter(opened.card.boxes, resized)
    return Engine(opened.model, opened.processor, name=opened.name, identity=opened.identity, **own)


def open_engine(checkpoint: str | os.PathLike, **options: Any) -> Engine:
    """Any checkpoint that answers questions, as an Engine. options: those of `open_model`."""
    return engine_of(open_model(checkpoint, **options))


def command_recipe(checkpoint: str, device: str) -> recipes.Recipe:
    """What the runtime of a command needs, whose only recipe is a checkpoint and a device's name."""
    return recipes.validate({"model": {"source": checkpoint}, "device": {"kind": device}})


def card_at(checkpoint: str | os.PathLike, base: str | None = None) -> ModelCard | None:
    """The card of whatever holds a model, by its files alone; None where they do not tell."""
    try:
        kind = kind_of(checkpoint)
        if kind == "run":
            stored = checkpoints.read_state(checkpoints.locate(checkpoint)).recipe or {}
            return catalog.find(base or recipes.validate(stored).model.source)
        if kind == "adapter":
            path = Path(checkpoint).expanduser()
            return (
                None if of_pipeline(path, base) else catalog.find(base_of(path, adapter_config(path), base))
            )
        return catalog.find(checkpoint)
    except PolymodalError:
        return None


@contextlib.contextmanager
def opened_model(checkpoint: str, *, device: str = "auto", **options: Any) -> Iterator[Opened]:
    """The checkpoint's model inside a command's runtime. options: those of `open_model`."""
    with process_group.runtime(command_recipe(checkpoint, device)) as rt:
        yield open_model(checkpoint, device=rt.device.torch, locate=alike(rt), **options)
