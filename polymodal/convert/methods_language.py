"""Methods of converters between the hub and trees of understanding models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.convert.methods import Converter, method, method_on_torch_files
from polymodal.convert.options import (
    AdapterToTree,
    HubConfig,
    HubToTree,
    LanguageParallel,
    ModelOptions,
    Resplit,
    Settings,
    TreeToAdapter,
    TreeToHub,
)

if TYPE_CHECKING:
    from polymodal.convert.engine import Opened
    from polymodal.convert.output import Report
    from polymodal.convert.table import Table
    from polymodal.convert.tree import Parallel


def _parallel(options: LanguageParallel) -> Parallel:
    from polymodal.convert.tree import Parallel, counts

    lists = {name: getattr(options, f"{name}_pp_layers") for name in ("llm", "vit", "audio")}
    layers = {name: counts(f"{name}_pp_layers", value) for name, value in lists.items() if value}
    tower_tp = {name: tp for name in ("vit", "audio") if (tp := getattr(options, f"{name}_tp_size"))}
    return Parallel(options.tp_size, options.ep_size, layers, tower_tp)


class Language(Converter):
    """hf_to_mm, mm_to_hf and resplit."""

    def _opened(
        self,
        root: str,
        hub: HubConfig | None,
        cut: LanguageParallel,
        options: ModelOptions,
        settings: Settings,
    ) -> Opened:
        from polymodal.convert import engine

        config = Path(hub.hf_dir) if hub else None
        return engine.opened_tree(self._of(), _variant(options), Path(root), config, _parallel(cut), settings)

    @method
    def hf_to_mm(self, cfg: HubToTree, *, settings: Settings) -> Report:
        """Hub checkpoint -> tree."""
        from polymodal.convert import changes, engine, output

        family, source, language = self._of(), Path(cfg.hf_config.hf_dir), cfg.llm_hf_config
        tensors = changes.with_language(source, Path(language.hf_dir)) if language else None
        opened = engine.hub(family, _variant(cfg.common_model_config), source, tensors)
        if cfg.save_vit_only:
            opened = changes.only(opened, "image_encoder.", family.title)
        return output.to_tree(opened, _parallel(cfg.parallel_config), Path(cfg.mm_dir), settings)

    @method_on_torch_files
    def mm_to_hf(self, cfg: TreeToHub, *, settings: Settings) -> Report:
        """Tree -> hub checkpoint."""
        from polymodal.convert import engine, output

        hub = Path(cfg.hf_config.hf_dir)
        opened = self._opened(
            cfg.mm_dir, cfg.hf_config, cfg.parallel_config, cfg.common_model_config, settings
        )
        tensors = engine.unmapped(opened, Path(cfg.mm_dir), hub)
        origin = {"from": cfg.mm_dir, "converter": type(self).__name__}
        return output.to_hub(tensors, Path(cfg.save_hf_dir), settings, hub, self._of().stem, origin)

    @method_on_torch_files
    def resplit(self, cfg: Resplit, *, settings: Settings) -> Report:
        """Tree -> the same tree, cut otherwise."""
        from polymodal.convert import changes, output

        opened = self._opened(
            cfg.source_dir, cfg.hf_config, cfg.source_parallel_config, cfg.common_model_config, settings
        )
        opened = changes.without_head(opened, known=cfg.hf_config is not None)
        return output.to_tree(opened, _parallel(cfg.target_parallel_config), Path(cfg.target_dir), settings)


def _variant(options: ModelOptions) -> str:
    return "canonical" if options.enable_canonical_hf_struct else ""


class LanguageWithAdapters(Language):
    """And LoRA adapters, in the layout that keeps q, k, v and gate, up apart."""

    def _adapters(self, options: ModelOptions, prefix: str, library_names: bool) -> Table:
        from polymodal.convert import lora
        from polymodal.core.errors import PolymodalError

        if not options.enable_canonical_hf_struct:
            raise PolymodalError(
                "Adapters of fused layers cannot be taken apart: q, k and v have an A matrix each.",
                "Train and convert with the canonical structure "
                "(--cfg.common_model_config.enable_canonical_hf_struct true).",
            )
        return lora.adapters(self._of().table("canonical"), prefix, library_names=library_names)

    @method
    def lora_hf_to_mm(self, cfg: AdapterToTree, *, settings: Settings) -> Report:
        """Adapter -> tree."""
        from polymodal.convert import engine, lora, output, reading

        options, source = cfg.common_model_config, cfg.hf_config.hf_dir
        tensors = reading.hub_files(Path(source))
        peft = all(key.startswith(lora.PEFT) for key in tensors.shapes)
        prefix = options.model_prefix or (lora.PEFT if peft else "")
        library_names = options.new_transformers_weight_key
        if library_names is None:
            modules = (f"{prefix}model.language_model.", f"{prefix}model.visual.")
            library_names = any(key.startswith(modules) for key in tensors.shapes)
        opened = engine.mapped(tensors, self._adapters(options, prefix, library_names), {}, source)
        return output.to_tree(opened, _parallel(cfg.parallel_config), Path(cfg.mm_dir), settings)

    @method_on_torch_files
    def lora_mm_to_hf(self, cfg: TreeToAdapter, *, settings: Settings) -> Report:
        """Tree of a LoRA run -> adapter in peft's format."""
        from polymodal.convert import engine, lora, output

        options, source = cfg.common_model_config, Path(cfg.mm_dir)
        prefix = options.model_prefix or lora.PEFT
        table = self._adapters(options, prefix, options.new_transformers_weight_key is not False)
        opened = engine.opened_table(table, source, {}, _parallel(cfg.parallel_config), settings)
        base = cfg.hf_config.hf_dir if cfg.hf_config else ""
        tensors = engine.unmapped(opened, source)
        config = lora.config(tensors, cfg.lora_alpha, base, prefix)
        return output.to_adapter(tensors, Path(cfg.save_hf_dir), settings, config, cfg.mm_dir)
