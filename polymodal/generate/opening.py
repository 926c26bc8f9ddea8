"""Opens whatever holds a model for inference: hub checkpoints and exports, runs, single checkpoints, LoRA adapters.

Hub formats are opened by the library itself, training's checkpoints by the house's own path (`assemble`), which
export shares. Sees models, distributed/checkpoint.py, recipe and errors; the engine it hands out knows none of this.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaShape
from polymodal.core.tensors import LazyTensors
from polymodal.distributed import checkpoint as checkpoints
from polymodal.generate.engine import Engine
from polymodal.models import catalog, library, lora, weights
from polymodal.models.family import Family
from polymodal.runtime.process_group import Runtime

Kind = Literal["hub", "adapter", "run"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def kind_of(source: str | os.PathLike) -> Kind:
    """What lies there: "run" (a run directory or one of its checkpoints), "adapter" (peft), "hub" (all else).

    Raises PolymodalError for a path that is not there or a directory that holds none of them.
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
        raise PolymodalError(
            f"The checkpoint {text} is a file.", "Give the directory that holds config.json, or a run."
        )
    if (path / checkpoints.STATE).is_file() or checkpoints.newest(path) is not None:
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
        if (
            file.is_file()
            and file.suffix in (".safetensors", ".bin", ".distcp", ".json", ".jinja", ".metadata")
            or file.name == ".metadata"
        ):
            info = file.stat()
            digest.update(f"{file.name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# --- training's checkpoints ------------------------------------------------------------------------------------------


@dataclass
class Assembled:
    """A model and where its values come from: on meta until `fill`, the house's attention, adapters still
    apart.

    tensors: whole, by plain parameter name, adapters by their own; each is read when it is asked for.
    """

    model: nn.Module
    family: Family
    recipe: recipes.Recipe
    checkpoint: Path
    tensors: LazyTensors

    @torch.no_grad()
    def fill(self, dtype: torch.dtype = torch.float32) -> None:
        """Give the model its values, on the CPU, in `dtype`, one tensor after the other. It is ready for
        inference."""
        model, held = self.model, self.tensors
        cast(model, dtype)
        weights.materialise(model, "cpu")
        weights.rebuild_buffers(model, persistent=any(n not in held for n in library.targets(model)))
        for tensor, names in library.aliases(model):
            name = next((n for n in names if n in held), None)
            if name is not None:
                tensor.copy_(held[name])
        for name, parameter in lora.adapters(model).items():
            parameter.copy_(held[name])
        model.eval()

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
    """Collective: every rank opens the run, and gets the checkpoint that rank 0 finds. Raises PolymodalError."""

    def locate(path: str | os.PathLike) -> Path:
        found = checkpoints.agreed(rt, lambda: checkpoints.locate(path))
        assert found is not None
        return found

    return locate


def assemble(
    source: str | os.PathLike,
    *,
    ema: bool = False,
    base: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Assembled:
    """The model of a run or of one checkpoint, filled: its base (where one is needed) with the trained
    tensors on top.

    Raises PolymodalError as `describe` does.
    """
    made = describe(source, ema=ema, base=base, locate=locate)
    made.fill()
    return made


def describe(
    source: str | os.PathLike,
    *,
    ema: bool = False,
    base: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Assembled:
    """The model of a run or of one checkpoint on meta, and its tensors to be read one by one.

    ema: the average instead of the last weights. base: where model.source lies now, when it was moved.
    Raises PolymodalError: no checkpoint, no average, a base that is gone, tensors that do not fit.
    """
    found = locate(source)
    state = checkpoints.read_state(found)
    if not state.recipe:
        raise PolymodalError(
            f"{found / checkpoints.STATE} holds no recipe.",
            "The checkpoint was not written by `polymodal train`.",
        )
    recipe = recipes.validate(state.recipe)
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
    model = family.build().trained
    if lora_recipe is not None:
        lora.attach(model, lora_recipe, family.card)
    own = _of_run(model, found, "ema." if ema else "model.", strict=True)
    lacking = [names for _, names in library.aliases(model) if not set(names) & set(own)]
    if lacking or set(lora.adapters(model)) - set(own):
        own = _base(model, family, recipe, locate) | own
    return Assembled(model, family, recipe, found, own)


def _base(model: nn.Module, family: Family, recipe: recipes.Recipe, locate: Locate) -> LazyTensors:
    """What the run started from: frozen parameters, and the base under adapters."""
    if recipe.model.init == "random":
        held = weights.initial_buffers(model) | weights.random(model, family, recipe.train.seed)
    else:
        source = catalog.resolve(recipe.model.source, recipe.model.revision)
        held = weights.read(model, weights.directory_of(source, family))
    if recipe.model.lora is not None:
        held |= lora.initial_values(model, recipe.model.lora, recipe.train.seed)
    start = recipe.checkpoint.init_from
    if start and catalog.is_whole(start):
        held |= weights.read(model, weights.directory_of(start, family))
    elif start and lora.is_adapter(start):
        held |= lora.read(model, Path(start))
    elif start:  # another run, perhaps a whole one under this one's adapters
        held |= _of_run(model, locate(start), "model.", strict=False)
    return held


def _of_run(model: nn.Module, found: Path, prefix: str, *, strict: bool) -> LazyTensors:
    """A checkpoint's tensors by the plain names of a model's parameters.

    strict: all of them must be the model's. Raises PolymodalError; for another shape when the tensor is asked
    for.
    """
    with (
        warnings.catch_warnings()
    ):  # torch says each time that one process reads alone; that is what is wanted
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        held = checkpoints.read_model(found, prefix)
    shapes = {
        n if library.ADAPTER.search(n) else weights.plain(n): p.shape for n, p in model.named_parameters()
    }
    names = {n: n if library.ADAPTER.search(n) else weights.plain(n) for n in held}
    strange = sorted(n for n, plain in names.items() if plain not in shapes)
    if strange and strict:
        raise PolymodalError(
            f"{found} has {len(strange)} tensors that the model of its recipe has not (first: {strange[0]}).",
            "Give the model.source and model.config that it was trained with.",
        )
    stored = held.renamed({n: plain for n, plain in names.items() if plain in shapes})

    def fitting(name: str) -> torch.Tensor:
        value = stored[name]
        if value.shape != shapes[name]:
            raise PolymodalError(
                f"{found} has {name} of shape {list(value.shape)}, the model {list(shapes[name])}.",
                "Give the model.config that it was trained with.",
            )
        return value

    return LazyTensors(dict.fromkeys(stored, fitting))


def of_hub(source: str | os.PathLike) -> Assembled:
    """A hub checkpoint on meta, and its tensors to be read one by one. Raises PolymodalError."""
    recipe = recipes.Recipe(model=recipes.Model(source=os.fspath(source)))
    family = catalog.family(recipe.model)
    model = family.build().trained
    held = weights.read(model, weights.directory_of(None, family))
    return Assembled(model, family, recipe, Path(family.source), held)


def processor_of(
    directory: str | os.PathLike,
    data: recipes.Data | None = None,
    family: Family | None = None,
    *,
    trust: bool = False,
) -> Any:
    """The library's processor of a checkpoint, with what a recipe changes about it: pixel limits and chat template.

    family: tells whether the library counts a video's pixels by the frame, as the recipe does, or as a whole; in the
    latter case the recipe's limits have no place in its files and the checkpoint's stay, with a warning.
    Raises PolymodalError when the processor's files are missing.
    """
    try:
        processor = catalog.reader(directory).read_processor(Path(directory), trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PolymodalError(
            f"The processor of {directory} cannot be read: {reason}",
            "Copy the checkpoint's tokenizer and preprocessor files beside its weights.",
        ) from None
    if data is None:
        return processor
    image = getattr(processor, "image_processor", None)
    video = getattr(processor, "video_processor", None)
    done = family is not None and family.limit_media(processor, data)
    for part, limits in () if done else ((image, data.image), (video, data.video)):
        if part is None or (limits.min_pixels is None and limits.max_pixels is None):
            continue
        if part is video and family is not None and _by_volume(family):
            warnings.warn(
                "data.video.min_pixels and max_pixels are pixels of a frame, this model's processor limits whole videos: videos are sized by the checkpoint's own limits here.",
                stacklevel=2,
            )
            continue
        size = dict(part.size)
        size["shortest_edge"] = limits.min_pixels or size["shortest_edge"]
        size["longest_edge"] = limits.max_pixels or size["longest_edge"]
        part.size = type(part.size)(**size) if not isinstance(part.size, dict) else size
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


def _by_volume(family: Family) -> bool:
    """Whether the checkpoint's own limits make the frames of a long video smaller than those of a short one."""
    media = family.media_processor(recipes.Data())
    spans = [media.span(MediaShape("video", 1024, 1024, frames)) for frames in (2, 64)]
    return len({tuple(span.parts[0].size[1:]) for span in spans}) > 1


# --- opening ---------------------------------------------------------------------------------------------------------


def load_hub(directory: Path, dtype: str | torch.dtype = "auto", trust: bool = False) -> nn.Module:
    """A hub checkpoint by the library's from_pretrained, on the CPU. Raises PolymodalError when keys are missing."""
    import transformers

    bars = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    shown = transformers.utils.logging.is_progress_bar_enabled()
    if not bars:
        transformers.utils.logging.disable_progress_bar()
    try:
        reader = catalog.reader(directory)
        config = reader.read_config(directory, trust)
        names = [n for n in (config.architectures or ()) if hasattr(transformers, n)]
        auto: Any = getattr(transformers, names[0]) if names else transformers.AutoModelForImageTextToText
        with library.named_by(config.model_type, reader.tensor_names(directory)):
            model, info = auto.from_pretrained(
                directory, config=config, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).strip().split("\n")[:1])[:300]
        raise PolymodalError(
            f"{directory} cannot be opened: {reason}",
            "Is it a whole checkpoint in the hub's format? Fetch or export it again.",
        ) from None
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise PolymodalError(
            f"{directory} lacks {len(missing)} tensors of {type(model).__name__} (first: {missing[0]}).",
            "Fetch or export it again.",
        )
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to a dtype; rotary tables and other buffers stay float32, as the library keeps them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@dataclass
class Opened:
    """A model ready for inference, with the library's processor. recipe: of a run, which says how its data were read.

    name: for reports; identity: changes when the weights do.
    """

    model: nn.Module
    processor: Any
    name: str
    identity: str
    recipe: recipes.Recipe | None = None


def open_model(
    checkpoint: str | os.PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    locate: Locate = checkpoints.locate,
) -> Opened:
    """Any checkpoint's model: hub directory or id, export, run, one of its checkpoints, peft adapter.

    device: None = the accelerator that is there. dtype: auto (the checkpoint's; for runs float32 on the CPU, else the
    precision trained in), fp32, bf16, fp16. ema: a run's average. base: where an adapter's or a run's base lies now.
    locate: `alike(rt)` where several ranks open one run.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise PolymodalError(f"dtype = {dtype} is not known.", f"Use auto, {', '.join(DTYPES)}.")
    if device is None:
        from polymodal.runtime import device as devices

        device = devices.find("auto", int(os.environ.get("LOCAL_RANK", "0"))).torch
    device = torch.device(device)
    kind = kind_of(checkpoint)
    if ema and kind != "run":
        raise PolymodalError(
            f"{checkpoint} is no run, only runs keep an average (train.ema).", "Leave out --ema."
        )
    text = os.fspath(checkpoint).rstrip("/")
    if kind == "run":
        made = assemble(checkpoint, ema=ema, base=base, locate=locate)
        model, recipe = made.model, made.recipe
        chosen = DTYPES.get(dtype) or (
            torch.float32
            if device.type == "cpu"
            else DTYPES.get(recipe.train.precision.removeprefix("pure_"), torch.float32)
        )
        cast(model, chosen)
        as_library(model)
        processor = processor_of(
            made.family.source, recipe.data, made.family, trust=recipe.model.trust_remote_code
        )
        model.generation_config = _generation(made.family.source, model)
        identity = fingerprint(made.checkpoint) + (" ema" if ema else "")
        name = (
            f"{Path(text).name}"
            if made.checkpoint.name in text
            else f"{Path(text).name} ({made.checkpoint.name})"
        )
        return Opened(model.to(device), processor, name, identity, recipe)
    wanted = DTYPES.get(dtype, "auto")
    if kind == "adapter":
        model, directory = load_adapter(Path(text).expanduser(), wanted, base, trust_remote_code)
        own = Path(text).expanduser()
        processor = processor_of(
            own if (own / "tokenizer_config.json").is_file() else directory, trust=trust_remote_code
        )
        identity = f"{fingerprint(own)} on {fingerprint(directory)}"
        return Opened(model.to(device), processor, Path(text).name, identity)
    directory = catalog.resolve(checkpoint, revision)
    model = load_hub(directory, wanted, trust_remote_code)
    processor = processor_of(directory, trust=trust_remote_code)
    name = text if "/" in text and not Path(text).is_dir() else Path(text).name
    return Opened(model.to(device).eval(), processor, name, fingerprint(directory))


def open_engine(checkpoint: str | os.PathLike, **options: Any) -> Engine:
    """Any checkpoint that answers questions, as an Engine. options: those of `open_model`."""
    made = open_model(checkpoint, **options)
    data = made.recipe.data if made.recipe is not None else None
    own = {} if data is None else {"video": data.video, "template_kwargs": data.template_kwargs}
    return Engine(made.model, made.processor, name=made.name, identity=made.identity, **own)


def adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a peft directory. Raises PolymodalError."""
    try:
        return dict(json.loads((directory / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PolymodalError(
            f"{directory / 'adapter_config.json'} cannot be read: {error}.",
            "Give the directory of a peft adapter.",
        ) from None


def of_pipeline(directory: Path, base: str | None = None) -> bool:
    """Whether an adapter is of a denoiser: a file of diffusers, or peft's whose base is a part of a pipeline."""
    if not (directory / "adapter_config.json").is_file():
        return True
    place = base or Path(adapter_config(directory).get("base_model_name_or_path") or "").parent
    return (Path(place).expanduser() / "model_index.json").is_file()


def base_of(directory: Path, config: dict[str, Any], base: str | None = None) -> Path:
    """The directory of an adapter's base: `base`, else what its config names. Raises PolymodalError."""
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise PolymodalError(
            f"{directory / 'adapter_config.json'} does not say which base the adapter belongs to.",
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
    from peft import PeftModel

    try:
        with warnings.catch_warnings():  # between two versions of the libraries, of no use to who chats
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return PeftModel.from_pretrained(model, str(directory)).get_base_model()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise PolymodalError(
            f"The adapter {directory} does not fit its base {base}: {str(error).strip().splitlines()[0]}",
            "Give the base it was trained on with --base.",
        ) from None


def load_adapter(
    directory: Path, dtype: str | torch.dtype = "auto", base: str | None = None, trust: bool = False
) -> tuple[nn.Module, Path]:
    """A peft adapter on its base by the libraries alone: (the base model with adapters in place, the base's directory)."""
    place = base_of(directory, adapter_config(directory), base)
    return put_on(load_hub(place, dtype, trust), directory, str(place)).eval(), place


def as_library(model: Any) -> None:
    """A model built for training -> one to generate with: the library's attention, its cache switched on."""
    model.set_attn_implementation("sdpa")
    for config in (model.config, getattr(model.config, "text_config", None)):
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = True


def _generation(directory: str, model: Any) -> Any:
    from transformers import GenerationConfig

    if (Path(directory) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(copy.deepcopy(model.config))
