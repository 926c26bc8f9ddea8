"""What converters between the hub and trees of understanding models do, method by method."""

from __future__ import annotations

from pathlib import Path

from polymodal.convert import changes, engine, lora, output, reading
from polymodal.convert.converters import Call
from polymodal.convert.engine import Opened
from polymodal.convert.family import family
from polymodal.convert.options import (
    AdapterToTree,
    HubConfig,
    HubToTree,
    LanguageParallel,
    ModelOptions,
    Resplit,
    TreeToAdapter,
    TreeToHub,
)
from polymodal.convert.output import Report
from polymodal.convert.table import Table
from polymodal.convert.tree import Parallel, counts
from polymodal.core.errors import PolymodalError


def _parallel(options: LanguageParallel) -> Parallel:
    lists = {name: getattr(options, f"{name}_pp_layers") for name in ("llm", "vit", "audio")}
    layers = {name: counts(f"{name}_pp_layers", value) for name, value in lists.items() if value}
    tower_tp = {name: tp for name in ("vit", "audio") if (tp := getattr(options, f"{name}_tp_size"))}
    return Parallel(options.tp_size, options.ep_size, layers, tower_tp)


def _variant(options: ModelOptions) -> str:
    return "canonical" if options.enable_canonical_hf_struct else ""


def _opened(
    call: Call, root: str, hub: HubConfig | None, cut: LanguageParallel, options: ModelOptions
) -> Opened:
    """A tree under the family's own names."""
    config, parallel = Path(hub.hf_dir) if hub else None, _parallel(cut)
    return engine.opened_tree(
        family(call.family), _variant(options), Path(root), config, parallel, call.settings
    )


def hub_to_tree(call: Call, cfg: HubToTree) -> Report:
    model, source, language = family(call.family), Path(cfg.hf_config.hf_dir), cfg.llm_hf_config
    tensors = changes.with_language(source, Path(language.hf_dir)) if language else None
    opened = engine.hub(model, _variant(cfg.common_model_config), source, tensors)
    if cfg.save_vit_only:
        opened = changes.only(opened, "image_encoder.", model.title)
    return output.to_tree(opened, _parallel(cfg.parallel_config), Path(cfg.mm_dir), call.settings)


def tree_to_hub(call: Call, cfg: TreeToHub) -> Report:
    hub = Path(cfg.hf_config.hf_dir)
    opened = _opened(call, cfg.mm_dir, cfg.hf_config, cfg.parallel_config, cfg.common_model_config)
    tensors = engine.unmapped(opened, Path(cfg.mm_dir), hub)
    origin = {"from": cfg.mm_dir, "converter": call.converter}
    return output.to_hub(tensors, Path(cfg.save_hf_dir), call.settings, hub, family(call.family).stem, origin)


def resplit(call: Call, cfg: Resplit) -> Report:
    opened = _opened(call, cfg.source_dir, cfg.hf_config, cfg.source_parallel_config, cfg.common_model_config)
    opened = changes.without_head(opened, known=cfg.hf_config is not None)
    return output.to_tree(opened, _parallel(cfg.target_parallel_config), Path(cfg.target_dir), call.settings)


def _adapters(call: Call, options: ModelOptions, prefix: str, library_names: bool) -> Table:
    """The table of adapters, in the layout that keeps q, k, v and gate, up apart."""
    if not options.enable_canonical_hf_struct:
        raise PolymodalError(
            "Adapters of fused layers cannot be taken apart: q, k and v have an A matrix each.",
            "Train and convert with the canonical structure "
            "(--cfg.common_model_config.enable_canonical_hf_struct true).",
        )
    return lora.adapters(family(call.family).table("canonical"), prefix, library_names=library_names)


def adapter_to_tree(call: Call, cfg: AdapterToTree) -> Report:
    options, source = cfg.common_model_config, cfg.hf_config.hf_dir
    tensors = reading.hub_files(Path(source))
    peft = all(key.startswith(lora.PEFT) for key in tensors.shapes)
    prefix = options.model_prefix or (lora.PEFT if peft else "")
    library_names = options.new_transformers_weight_key
    if library_names is None:
        modules = (f"{prefix}model.language_model.", f"{prefix}model.visual.")
        library_names = any(key.startswith(modules) for key in tensors.shapes)
    opened = engine.mapped(tensors, _adapters(call, options, prefix, library_names), {}, source)
    return output.to_tree(opened, _parallel(cfg.parallel_config), Path(cfg.mm_dir), call.settings)


def tree_to_adapter(call: Call, cfg: TreeToAdapter) -> Report:
    options, source = cfg.common_model_config, Path(cfg.mm_dir)
    prefix = options.model_prefix or lora.PEFT
    table = _adapters(call, options, prefix, options.new_transformers_weight_key is not False)
    opened = engine.opened_table(table, source, {}, _parallel(cfg.parallel_config), call.settings)
    tensors = engine.unmapped(opened, source)
    config = lora.config(tensors, cfg.lora_alpha, cfg.hf_config.hf_dir if cfg.hf_config else "", prefix)
    return output.to_adapter(tensors, Path(cfg.save_hf_dir), call.settings, config, cfg.mm_dir)
