"""`polymodal export`: a run or checkpoint in the hub's format, proven by opening what was written.

It is a stream: generate/opening.py reads each tensor when it is needed, models/saving.py writes one file at a
time, and each process writes files of its own. Then rank 0 opens the result with the library that users will
open it with and compares outputs; a model that does not fit into memory is compared by names and shapes. The
directory gets its name only when they agree.
"""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polymodal import __version__
from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record, pack
from polymodal.core.terminal import say
from polymodal.data.chat import ChatProcessor
from polymodal.data.formats import RowReader
from polymodal.generate.engine import Engine
from polymodal.generate.opening import (
    DTYPES,
    Assembled,
    adapter_config,
    base_of,
    describe,
    kind_of,
    load_adapter,
    load_hub,
    of_hub,
    of_pipeline,
    processor_beside,
    processor_of,
)
from polymodal.models import catalog, lora, saving, weights
from polymodal.models.audio.encoder_decoder import EncoderDecoder
from polymodal.models.diffusion import Generation
from polymodal.models.saving import Together
from polymodal.recipe import Attr
from polymodal.train import export_pipeline, export_speech
from polymodal.train.export_pipeline import Proof

MARKER = "polymodal_export.json"
"""In every export: where it came from and how it was proven; a directory that has it may be written again."""
NOT_PLAIN_LORA = ("use_dora", "modules_to_save", "trainable_token_indices", "megatron_config")
"""Keys of peft's adapter_config.json that only peft itself can merge."""


@dataclass(frozen=True)
class Exported:
    """What was written; tokens to computed are those of its Proof."""

    directory: str
    source: str
    what: str  # "model", "adapter", "merged"
    dtype: str
    step: int | None
    tokens: int
    difference: float
    largest: float
    computed: str
    seconds: float
    model_base: str = "bf16"  # of the run
    rounding: float | None = None  # Rounded.error of a merge, of what this process wrote
    version: str = __version__


def export(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    merge_lora: bool = False,
    dtype: str | None = None,
    ema: bool = False,
    force: bool = False,
    base: str | None = None,
    other: str | None = None,
    layout: str = "source",
    max_shard_bytes: int = 5 << 30,
    group: dist.ProcessGroup | None = None,
) -> Exported | None:
    """Write a run, one of its checkpoints, a hub checkpoint or a peft adapter as a hub directory.

    merge_lora: adapters are added into the weights; without it a LoRA run gives a peft adapter directory.
    dtype:      fp32, bf16, fp16; None: the base checkpoint's, fp32 for an adapter alone.
    ema:        the average of a run's weights. base: where the base is now.
    other:      a run of the other denoiser of a pipeline that has two: both are written.
    layout:     "source": keys and files as the source has them; "transformers": as the library has them.
    force:      replace a directory that is not empty and no earlier export.
    group:      of the processes that write together, on disks that they share; None: this process alone.
                Ranks over 0 return None as soon as their own files are written, and wait in no collective
                while rank 0 proves them.
    Raises PolymodalError; nothing is left under `directory` then, an earlier export stays as it was.
    """
    began = time.perf_counter()
    if dtype is not None and dtype not in DTYPES:
        raise PolymodalError(f"dtype = {dtype} is not known.", f"Use {', '.join(DTYPES)}.")
    kind = kind_of(source)
    final = Path(directory).expanduser()
    _check_directory(final, source, force)
    if kind == "adapter" and not merge_lora:
        raise PolymodalError(f"{source} is a peft adapter already.", "Add --merge-lora for a whole model.")
    if ema and kind != "run":
        raise PolymodalError(
            f"{source} is no run, only runs keep an average (train.ema).", "Leave out --ema."
        )
    made = _opened(source, kind, ema, base, merge_lora)
    adapted = made.recipe.model.lora is not None
    if merge_lora and not adapted:
        raise PolymodalError(f"{source} has no adapters to merge.", "Leave out --merge-lora.")
    _check_directory(final, made.family.source, force)
    generation = isinstance(made.family, Generation)
    second = None
    if other is not None:
        if not generation:
            raise PolymodalError(
                f"{source} has no denoiser, --with is for models that generate.", "Leave out --with."
            )
        second = export_pipeline.second(made, source, other, ema, base, merge_lora)
    adapter = adapted and not merge_lora
    if layout == "transformers" and (adapter or generation):
        what = "an adapter" if adapter else "a pipeline of diffusers"
        raise PolymodalError(
            f"--format transformers: {source} is written as {what}.",
            "Add --merge-lora." if adapter else "Leave out --format.",
        )
    chosen = DTYPES[dtype] if dtype else torch.float32 if adapter else _stored_dtype(made.family)
    with Together(final, group) as together:
        partial = together.directory
        if generation:
            what = export_pipeline.write(made, chosen, merge_lora, max_shard_bytes, together, second)
        else:
            what = _write(made, chosen, merge_lora, max_shard_bytes, together, layout == "transformers")
        rounding = made.rounded.error if made.rounded is not None else None
        if together.rank > 0:
            return None
        together.wait()
        if generation:
            proof = export_pipeline.prove(made, partial, what, chosen, second)
        else:
            _write_processor(made, partial)
            proof = _prove(made, partial, what, chosen)
        kept = {"model_base": made.recipe.model.base, "rounding": rounding}
        step = int(made.checkpoint.name.rpartition("-")[2]) if kind == "run" else None
        seconds = round(time.perf_counter() - began, 2)
        name = str(chosen).removeprefix("torch.")
        result = Exported(str(final), os.fspath(source), what, name, step, *proof, seconds, **kept)
        marker = asdict(result) | ({"base": _base_name(made.recipe)} if adapter else {})
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
    return result


def run(source: str, directory: str | os.PathLike, **options: Any) -> int:
    """The command: export, and print what was written and how it was proven. Returns the exit code."""
    done = export(source, directory, **options)
    assert done is not None
    written = Path(done.directory)
    size = sum(f.stat().st_size for f in written.rglob("*.safetensors"))
    pipeline = of_pipeline(written) if done.what == "adapter" else (written / "model_index.json").is_file()
    peft = (written / "adapter_config.json").is_file()
    library = "peft" if peft else "diffusers" if pipeline else "transformers"
    say(f"{done.directory}: {done.what}, {done.dtype}, {size / 2**20:.1f} MiB")
    if done.rounding is not None:
        say(
            f"merged into the {done.model_base} base that was trained on, made plain again: "
            f"its weights differ from the source's by {done.rounding:.1%} (root of squares)"
        )
    elif done.model_base != "bf16":
        say(
            f"trained on a base in {done.model_base}; "
            "on the source's own weights it acts a little differently"
        )
    if done.computed:
        compared = f"logits of {done.tokens} tokens (text and media)"
        if pipeline:
            compared = f"predictions of {done.tokens} values"
        say(
            f"opened with {library}: {compared} differ by {done.difference:.1e} at most "
            f"(largest {done.largest:.1f}, computed in {done.computed})"
        )
    else:
        say(
            f"not opened with {library}, as the model does not fit into this machine's memory; the names and "
            "shapes of all tensors in the files' headers are the model's"
        )
    return 0


# --- directories ----------------------------------------------------------------------------------


def _check_directory(final: Path, source: str | os.PathLike, force: bool) -> None:
    """`final` may not be what is exported, and may replace foreign files only with `force`."""
    origin = Path(source).expanduser()
    if origin.exists() and final.resolve() in (origin.resolve(), *origin.resolve().parents):
        raise PolymodalError(f"{final} holds the checkpoint that is exported.", "Choose another directory.")
    if final.exists() and not final.is_dir():
        raise PolymodalError(f"{final} is a file.", "Choose a directory.")
    if final.is_dir() and any(final.iterdir()) and not (final / MARKER).is_file() and not force:
        raise PolymodalError(
            f"{final} is not empty and not an earlier export.",
            "Choose another directory, or --force to replace it.",
        )


# --- reading and writing --------------------------------------------------------------------------


def _opened(source: str | os.PathLike, kind: str, ema: bool, base: str | None, merge: bool) -> Assembled:
    """Any source as a model on meta with the attention of training, and its tensors; adapters apart.

    merge: adapters go into a base of few bits as they were trained on it; alone, they are opened on the
    base's files.
    """
    if kind == "run":
        return describe(source, ema=ema, base=base, quantise=merge)
    if kind == "adapter":
        if of_pipeline(Path(source), base):
            return export_pipeline.open_adapter(Path(source), base)
        return _adapter(Path(source), base)
    return of_hub(source)


def _adapter(directory: Path, base: str | None) -> Assembled:
    """A peft adapter on its base, attached by peft. Raises PolymodalError."""
    from peft import LoraConfig, inject_adapter_in_model

    config = adapter_config(directory)
    extra = [key for key in NOT_PLAIN_LORA if config.get(key)]
    if config.get("peft_type") != "LORA" or extra or config.get("bias", "none") != "none":
        what = ", ".join(extra) or f"{config.get('peft_type')}, bias {config.get('bias')}"
        raise PolymodalError(
            f"{directory} is not plain LoRA ({what}).", "Merge it with peft itself: merge_and_unload()."
        )
    origin = base_of(directory, config, base)
    made = of_hub(origin)
    made.recipe.model.lora = recipes.Lora(
        rank=config["r"], alpha=config["lora_alpha"], rslora=bool(config.get("use_rslora"))
    )
    try:
        chosen = LoraConfig.from_pretrained(str(directory))
        inject_adapter_in_model(chosen, made.model, lora.NAME, low_cpu_mem_usage=True)
    except (OSError, ValueError, TypeError) as error:
        raise PolymodalError(
            f"The adapter {directory} does not fit its base {origin}: {str(error).strip().splitlines()[0]}",
            "Give the base it was trained on with --base.",
        ) from None
    made.tensors |= lora.read(made.model, directory)
    made.checkpoint = directory
    return made


def _stored_dtype(family: Any) -> torch.dtype:
    """The dtype of the base checkpoint; float32 when its config names none."""
    if isinstance(family, Generation):
        return export_pipeline.stored_dtype(family)
    configs = (family.config, getattr(family.config, "text_config", None))
    name = next((str(c.dtype) for c in configs if getattr(c, "dtype", None) is not None), "float32")
    return getattr(torch, name.removeprefix("torch."))


def _write(
    made: Assembled, dtype: torch.dtype, merge: bool, limit: int, together: Together, convert: bool
) -> str:
    """Weights and config; returns what they are."""
    partial, options = together.directory, made.recipe.model.lora
    if options is not None and not merge:
        if together.rank == 0:
            values = {name: made.tensors[name] for name in lora.adapters(made.model)}
            base = _base_name(made.recipe)
            lora.write(values, made.model, options, partial, base=base, dtype=dtype)
        return "adapter"
    origin = Path(made.family.source)
    files = saving.outputs(made.model, None if convert else origin, dtype)
    ranks = {"rank": together.rank, "world": together.world}
    saving.write(made.merged(), made.model, files, partial, limit, origin=origin, **ranks)
    if together.rank == 0:
        saving.write_config(made.model, made.family.config, origin, partial, files, convert)
    return "model" if options is None else "merged"


def _base_name(recipe: recipes.Recipe) -> str:
    """An adapter's base_model_name_or_path: the hub id, or the full path, so that it opens from anywhere.

    Raises PolymodalError when the base is the checkpoint of another run, which peft cannot open.
    """
    source = recipe.model.source
    start = recipe.checkpoint.init_from
    if start and not lora.is_adapter(start):
        if not catalog.is_whole(start):
            raise PolymodalError(
                f"The run's adapters are on top of another run (checkpoint.init_from = {start}), which peft "
                "cannot open.",
                "Add --merge-lora; or export that run, and train adapters from its export.",
            )
        source = start
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    known = catalog.named(source)
    return known[0].sizes[known[1]].hub if known is not None and known[1] is not None else source


def _write_processor(made: Assembled, partial: Path) -> None:
    """The source's processor files; written anew where the recipe changes them, or beside an adapter."""
    data = made.recipe.data
    changed = data.chat_template or any(
        v is not None for part in (data.image, data.video) for v in (part.min_pixels, part.max_pixels)
    )
    if not changed and (partial / "config.json").is_file():
        return
    processor = processor_of(made.family.source, data, made.family, trust=made.recipe.model.trust_remote_code)
    catalog.reader(partial).write_processor(processor, partial)


# --- the proof ------------------------------------------------------------------------------------


def _picture() -> bytes:
    """A small picture with structure, the same every time."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:96, 0:128]
    pixels = np.stack([x * 2 % 256, y * 255 // 95, (x // 8 + y // 8) % 2 * 200], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _question(rate: int = 0, picture: bool = True) -> Record:
    """A question about a picture, and about sound at this rate unless it is 0."""
    sound = [{"type": "audio", "audio": export_speech.sound(rate)}] if rate else []
    text = {"type": "text", "text": "Describe this picture in one sentence."}
    content = [*([{"type": "image", "image": _picture()}] if picture else []), *sound, text]
    row = {"messages": [{"role": "user", "content": content}]}
    return RowReader("openai", Attr(), "", None).record(row, "the sample")


def _prove(made: Assembled, partial: Path, what: str, dtype: torch.dtype) -> Proof:
    """Compare logits of one sample: of the model that was trained, filled from the source, and of what the
    library opens. Raises PolymodalError when they differ."""
    model, family, data = made.model, made.family, made.recipe.data
    count = sum(p.numel() for p in model.parameters())
    dtypes = (torch.float32, dtype if dtype != torch.float32 else torch.bfloat16)
    arithmetic = next((d for d in dtypes if export_pipeline.room_for(count * d.itemsize)), None)
    if arithmetic is None:
        if what != "adapter":
            weights.read(family.build(), partial)
        return Proof()
    made.fill(arithmetic)
    _round(model, what, dtype)
    record = _question()
    if isinstance(family, EncoderDecoder):
        batch = export_speech.sample(family, data)
    elif family.card.speaks:
        batch = export_speech.spoken(family, data)
    else:
        media = family.media_processor(data)
        record = _question(media.sample_rate, "image" in media.reads)
        batch = pack([ChatProcessor(media, data).prompt(record)])
    with torch.no_grad():
        out = family.stage(model, None, batch)
        ours = out.head(out.hidden_states)[0].float()
    made.model = model = out = None  # type: ignore[assignment]
    theirs, ids = _library_logits(made, partial, what, arithmetic, record)
    own = batch["input_ids"][0]
    if not torch.equal(ids, own):
        raise PolymodalError(
            f"The exported processor makes other tokens of the same sample ({len(ids)} against {len(own)}); "
            "nothing was kept.",
            "This is a defect: report it with the model's name.",
        )
    low = arithmetic != torch.float32 or (what == "merged" and dtype != torch.float32)
    difference, largest = export_pipeline.compare(ours, theirs, low, f"{made.checkpoint} answers", "logits")
    return Proof(len(ids), difference, largest, str(arithmetic).removeprefix("torch."))


def _round(model: nn.Module, what: str, dtype: torch.dtype) -> None:
    """Round what was written in `dtype`: weights of a model, or the adapters of one."""
    if what == "merged" or dtype == torch.float32:
        return  # merged weights are compared with the exact sum
    for name, parameter in model.named_parameters():
        if what == "model" or "lora_" in name:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _library_logits(
    made: Assembled, partial: Path, what: str, arithmetic: torch.dtype, record: Record
) -> tuple[Tensor, Tensor]:
    """(logits [T, V] float32, input_ids [T]) of the sample by the library, from the written files alone."""
    trust = made.recipe.model.trust_remote_code
    if what == "adapter":
        model, base = load_adapter(partial, arithmetic, base=_base_name(made.recipe), trust=trust)
        processor = processor_beside(partial, base, trust=trust)
    else:
        model, processor = load_hub(partial, arithmetic, trust), processor_of(partial, trust=trust)
    data = made.recipe.data
    if isinstance(made.family, EncoderDecoder):
        return export_speech.library_logits(model.eval(), processor)
    if made.family.card.speaks:
        source = made.family.source if what == "adapter" else str(partial)
        family = type(made.family)(made.family.card, model.config, source)
        return export_speech.spoken_logits(model.eval(), export_speech.spoken(family, data))
    options = {"video": data.video, "template_kwargs": data.template_kwargs, "name": str(partial)}
    options["special_tokens"] = data.special_tokens
    engine = Engine(model.eval(), processor, **options)
    inputs = engine._encode([engine._prepare(0, "0", record.messages)])
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].float(), inputs["input_ids"][0]
