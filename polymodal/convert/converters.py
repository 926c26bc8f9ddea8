"""The converters of `mm-convert`, each method a few lines into the engine.

Methods are what the command line offers: a class has those that work for it, and no others. Imports of torch wait for
the call, so that help comes at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.convert.options import (
    AdapterToTree,
    HubToTree,
    LanguageParallel,
    Resplit,
    Settings,
    TreeToAdapter,
    TreeToHub,
)

if TYPE_CHECKING:
    from polymodal.convert.family import Family
    from polymodal.convert.output import Report
    from polymodal.convert.tree import Parallel

CONVERTERS: list[Callable] = []
"""What the command offers, in the order of the documents."""


def offered(converter: Any) -> Any:
    CONVERTERS.append(converter)
    return converter


def said(report: Report, how: Settings) -> None:
    """Print what was done, or what would be."""
    if how.dry_run:
        print("\n".join(report.lines))
        print(
            f"would write {report.directory}: {report.tensors} tensors in {report.files} files, {report.bytes / 1e9:.3f} GB"
        )
    else:
        print(report)


HELP = {
    "verify": "read everything back and compare.",
    "dry_run": "print files, keys, shapes and bytes; write nothing.",
    "workers": "threads; 0 = one a core.",
    "force": "replace a target that was not written by a conversion.",
    "allow_pickle": "read files that hold more than tensors; the rest is replaced by inert objects.",
}
"""Options of every method: fields of Settings."""
ARGUMENTS = {
    "cfg": "what, where, how.",
    "hf_dir": "directory of the hub checkpoint.",
    "dcp_dir": "the DCP directory (towards the hub: release or iter_..., or the one above it).",
    "load_dir": "the DCP directory (release or iter_...), or the one above it.",
    "lora_dcp_dir": "DCP directory of the LoRA run.",
    "save_dir": "where the result goes.",
    "save_hf_dir": "where the hub checkpoint goes.",
    "save_merged_hf_dir": "where the sum goes.",
    "model_assets_dir": "the hub checkpoint that it came from: config, processor, cut into files.",
    "origin_hf_dir": "the hub checkpoint that it came from.",
    "base_hf_dir": "the base's hub checkpoint.",
    "dcp_prefix": "what the directory's names begin with.",
    "hf_prefix": "what the hub's names begin with instead.",
    "tie_weight_mapping": "tensors that are written as copies: {\"lm_head.weight\": \"model.embed_tokens.weight\"}.",
    "fused_linear_names": "expert tensors that lie one below the other in the directory, such as gate_up_proj.",
    "max_shard_size": "largest weight file.",
}  # fmt: skip
"""Arguments that mean the same wherever they are taken."""


def _method(function: Callable, names: tuple[str, ...]) -> Callable:
    """A method that takes Settings as one that takes their fields, for the command line."""
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "how"]
    kinds = {field.name: field for field in fields(Settings)}
    more = [
        inspect.Parameter(
            n, inspect.Parameter.KEYWORD_ONLY, default=kinds[n].default, annotation=type(kinds[n].default)
        )
        for n in names
    ]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        function(*args, **kwargs, how=Settings(**given))

    run.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {
        p.name: p.annotation for p in run.__signature__.parameters.values() if p.annotation is not p.empty
    }  # type: ignore[attr-defined]
    text = inspect.cleandoc(function.__doc__ or "")
    text += "" if "Args:" in text else "\n\nArgs:"
    shared = [p.name for p in own if p.name in ARGUMENTS and f"\n    {p.name}: " not in text]
    text += "".join(f"\n    {name}: {ARGUMENTS[name]}" for name in shared)
    run.__doc__ = text + "".join(f"\n    {name}: {HELP[name]}" for name in names)
    return run


def writes(function: Callable) -> Callable:
    """A method that reads what needs no trust."""
    return _method(function, ("verify", "dry_run", "workers", "force"))


def reads(function: Callable) -> Callable:
    """A method that reads torch's files."""
    return _method(function, ("verify", "dry_run", "workers", "force", "allow_pickle"))


def parallel(one: LanguageParallel) -> Parallel:
    from polymodal.convert.tree import Parallel, counts

    lists = {
        name: counts(f"{name}_pp_layers", getattr(one, f"{name}_pp_layers"))
        for name in ("llm", "vit", "audio")
    }
    own = {name: getattr(one, f"{name}_tp_size") for name in ("vit", "audio")}
    return Parallel(
        one.tp_size, one.ep_size, {k: v for k, v in lists.items() if v}, {k: v for k, v in own.items() if v}
    )


class Understanding:
    """hf_to_mm, mm_to_hf and resplit of one family."""

    _family: str = ""

    def _of(self) -> Family:
        from polymodal.convert.family_registry import family

        return family(self._family)

    def _variant(self, options: Any) -> str:
        return "canonical" if options.enable_canonical_hf_struct else ""

    @writes
    def hf_to_mm(self, cfg: HubToTree, *, how: Settings) -> None:
        """Hub checkpoint -> tree."""
        from polymodal.convert import changes, engine, output

        made, source = self._of(), Path(cfg.hf_config.hf_dir)
        language = changes.with_language(source, cfg.llm_hf_config and Path(cfg.llm_hf_config.hf_dir))
        opened = engine.hub(made, self._variant(cfg.common_model_config), source, language)
        if cfg.save_vit_only:
            opened = changes.only(opened, "image_encoder.", made.title)
        said(output.to_tree(opened, parallel(cfg.parallel_config), Path(cfg.mm_dir), how), how)

    @reads
    def mm_to_hf(self, cfg: TreeToHub, *, how: Settings) -> None:
        """Tree -> hub checkpoint."""
        from polymodal.convert import engine, output

        made, hub = self._of(), Path(cfg.hf_config.hf_dir)
        variant = self._variant(cfg.common_model_config)
        opened = engine.opened_tree(made, variant, Path(cfg.mm_dir), hub, parallel(cfg.parallel_config), how)
        opened = engine.unmapped(opened, Path(cfg.mm_dir), hub)
        note = {"from": str(cfg.mm_dir), "converter": type(self).__name__}
        said(output.to_hub(opened.source, Path(cfg.save_hf_dir), how, hub, made.stem, note), how)

    @reads
    def resplit(self, cfg: Resplit, *, how: Settings) -> None:
        """Tree -> the same tree, cut otherwise."""
        from polymodal.convert import changes, engine, output

        made = self._of()
        variant = self._variant(cfg.common_model_config)
        hub = Path(cfg.hf_config.hf_dir) if cfg.hf_config else None
        opened = engine.opened_tree(
            made, variant, Path(cfg.source_dir), hub, parallel(cfg.source_parallel_config), how
        )
        opened = changes.without_head(opened, known=hub is not None)
        said(output.to_tree(opened, parallel(cfg.target_parallel_config), Path(cfg.target_dir), how), how)


class Adapters(Understanding):
    """And LoRA adapters, in the layout that keeps q, k, v and gate, up apart."""

    def _table(self, options: Any, hub_prefix: str, new: bool) -> Any:
        from polymodal.convert import lora
        from polymodal.core.errors import PolymodalError

        if not options.enable_canonical_hf_struct:
            raise PolymodalError(
                "Adapters of fused layers cannot be taken apart: q, k and v have an A matrix each.",
                "Train and convert with the canonical structure (--cfg.common_model_config.enable_canonical_hf_struct true).",
            )
        return lora.adapters(self._of().table("canonical"), hub_prefix, new_names=new)

    @writes
    def lora_hf_to_mm(self, cfg: AdapterToTree, *, how: Settings) -> None:
        """Adapter -> tree."""
        from polymodal.convert import engine, lora, output, reading

        options, source = cfg.common_model_config, Path(cfg.hf_config.hf_dir)
        flat, _ = reading.hub_files(source)
        prefix = options.model_prefix or (
            lora.PEFT if all(key.startswith(lora.PEFT) for key in flat.shapes) else ""
        )
        new = options.new_transformers_weight_key
        if new is None:
            new = any(
                key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual."))
                for key in flat.shapes
            )
        opened = engine.mapped(flat, self._table(options, prefix, new), {}, str(source))
        said(output.to_tree(opened, parallel(cfg.parallel_config), Path(cfg.mm_dir), how), how)

    @reads
    def lora_mm_to_hf(self, cfg: TreeToAdapter, *, how: Settings) -> None:
        """Tree of a LoRA run -> adapter in peft's format."""
        from polymodal.convert import engine, lora, output

        options, target = cfg.common_model_config, Path(cfg.save_hf_dir)
        prefix = options.model_prefix or lora.PEFT
        new = True if options.new_transformers_weight_key is None else options.new_transformers_weight_key
        table = self._table(options, prefix, new)
        opened = engine.unmapped(
            engine.opened_table(table, Path(cfg.mm_dir), {}, parallel(cfg.parallel_config), how),
            Path(cfg.mm_dir),
        )
        base = cfg.hf_config.hf_dir if cfg.hf_config else ""
        content = lora.config(opened.source, cfg.lora_alpha, base, prefix)
        said(
            output.to_hub(
                opened.source,
                target,
                how,
                stem="adapter_model",
                made={"from": cfg.mm_dir},
                beside={"adapter_config.json": content},
            ),
            how,
        )


@offered
class Qwen2VLConverter(Understanding):
    """Qwen2-VL."""

    _family = "qwen2-vl"


@offered
class Qwen2_5_VLConverter(Adapters):
    """Qwen2.5-VL."""

    _family = "qwen2.5-vl"


@offered
class Qwen2_5_OmniConverter(Understanding):
    """Qwen2.5-Omni: the thinker; the rest is taken over from the hub checkpoint."""

    _family = "qwen2.5-omni"


@offered
class Qwen3VLMegatronConverter(Understanding):
    """Qwen3-VL as a tree, dense or with experts."""

    _family = "qwen3-vl"


@offered
class InternVLConverter(Understanding):
    """InternVL 2, 2.5 and 3."""

    _family = "internvl"


@offered
class GlmConverter(Understanding):
    """GLM-4.1V."""

    _family = "glm-4.1v"


@offered
class DeepSeekVLConverter(Understanding):
    """DeepSeek-VL2."""

    _family = "deepseek-vl2"
