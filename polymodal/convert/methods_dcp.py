"""Methods of converters between the hub and DCP directories, and for experts merged and split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polymodal.convert.methods import Converter, method
from polymodal.convert.options import Settings

if TYPE_CHECKING:
    from polymodal.convert.family import Family
    from polymodal.convert.output import Report
    from polymodal.convert.source import Source


def hub_to_dcp(
    family: Family,
    source: str,
    target: str,
    settings: Settings,
    variant: str = "",
    copies: dict[str, str] | None = None,
) -> Report:
    """copies: tensors that are written as copies of others, new name -> name."""
    from polymodal.convert import changes, engine, output, reading

    tensors = changes.with_copies(reading.hub_files(Path(source)), copies or {}, source)
    opened = engine.hub(family, variant, Path(source), tensors)
    return output.to_dcp(opened.source, Path(target), settings)


def dcp_to_hub(
    family: Family,
    source: str,
    target: str,
    template: str,
    settings: Settings,
    converter: str,
    bf16: bool = False,
) -> Report:
    """converter: its name, for the marker file; bf16: round floating-point values."""
    import torch

    from polymodal.convert import changes, engine, output

    tensors: Source = engine.dcp(family, Path(source), Path(template))
    if bf16:
        tensors = changes.Rounded(tensors, torch.bfloat16)
    origin = {"from": source, "converter": converter}
    return output.to_hub(tensors, Path(target), settings, Path(template), family.stem, origin)


class Sharded(Converter):
    """hf_to_dcp, dcp_to_hf and adapters of a model whose directories keep the hub's names behind prefixes."""

    @method
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        tie_weight: bool = False,
        is_lora_base: bool = False,
        *,
        settings: Settings,
    ) -> Report:
        """Hub checkpoint -> DCP directory.

        Args:
            tie_weight: write the head as a copy of the embedding.
            is_lora_base: names as the base of a LoRA run has them.
        """
        copies = {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tie_weight else None
        variant = "lora base" if is_lora_base else ""
        return hub_to_dcp(self._of(), hf_dir, dcp_dir, settings, variant, copies)

    @method
    def dcp_to_hf(
        self,
        load_dir: str,
        save_dir: str,
        model_assets_dir: str,
        to_bf16: bool = False,
        *,
        settings: Settings,
    ) -> Report:
        """DCP directory -> hub checkpoint.

        Args:
            to_bf16: round floating-point values to bfloat16.
        """
        name = type(self).__name__
        return dcp_to_hub(self._of(), load_dir, save_dir, model_assets_dir, settings, name, to_bf16)

    @method
    def lora_hf_to_dcp(self, hf_dir: str, dcp_dir: str, *, settings: Settings) -> Report:
        """Adapter in peft's format -> DCP directory."""
        from polymodal.convert.family import family

        return hub_to_dcp(family("adapter-dcp"), hf_dir, dcp_dir, settings)

    @method
    def lora_dcp_to_hf(
        self,
        lora_dcp_dir: str,
        save_dir: str,
        base_hf_dir: str = "",
        lora_alpha: float | None = None,
        *,
        settings: Settings,
    ) -> Report:
        """DCP directory of a LoRA run -> adapter in peft's format.

        Args:
            lora_alpha: for adapter_config.json; the rank, when left out.
        """
        from polymodal.convert import engine, lora, output
        from polymodal.convert.family import family

        tensors = engine.dcp(family("adapter-dcp"), Path(lora_dcp_dir), None)
        config = lora.config(tensors, lora_alpha, base_hf_dir, lora.PEFT)
        return output.to_adapter(tensors, Path(save_dir), settings, config, lora_dcp_dir)

    @method
    def merge_mm_lora_dcp_weight_to_base_hf(
        self,
        base_hf_dir: str,
        lora_dcp_dir: str,
        save_merged_hf_dir: str,
        lora_target_modules: str = "",
        scaling: float = 1.0,
        *,
        settings: Settings,
    ) -> Report:
        """Base + scaling * B A of a LoRA run -> hub checkpoint.

        Args:
            lora_target_modules: names, with commas, of the modules whose adapters are added; all, when left out.
            scaling: alpha / rank.
        """
        from polymodal.convert import engine, lora, output

        hub = Path(base_hf_dir)
        base, adapters = engine.hub(self._of(), "modules", hub), engine.opened_dcp(Path(lora_dcp_dir))
        targets = [module.strip() for module in lora_target_modules.split(",")]
        prefix = f"{lora.PEFT}model."
        pairs = lora.pairs(adapters, base.source.shapes, lora_dcp_dir, prefix, targets)
        merged = lora.Merged(base.source, adapters, pairs, scaling)
        tensors = engine.unmapped(base.but(merged), hub)
        origin = {"from": [base_hf_dir, lora_dcp_dir]}
        return output.to_hub(tensors, Path(save_merged_hf_dir), settings, hub, origin=origin)


class Qwen35(Converter):
    """hf_to_dcp and dcp_to_hf with prefixes that the user sets."""

    def _prefixed(self, dcp_prefix: str, hf_prefix: str) -> Family:
        return replace(self._of(), values={"prefix": dcp_prefix, "hub_prefix": hf_prefix})

    @method
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        tie_weight_mapping: dict[str, str] | None = None,
        *,
        settings: Settings,
    ) -> Report:
        """Hub checkpoint -> DCP directory."""
        family = self._prefixed(dcp_prefix, hf_prefix)
        return hub_to_dcp(family, hf_dir, dcp_dir, settings, copies=tie_weight_mapping)

    @method
    def dcp_to_hf(
        self,
        dcp_dir: str,
        save_hf_dir: str,
        origin_hf_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        *,
        settings: Settings,
    ) -> Report:
        """DCP directory -> hub checkpoint."""
        family = self._prefixed(dcp_prefix, hf_prefix)
        return dcp_to_hub(family, dcp_dir, save_hf_dir, origin_hf_dir, settings, type(self).__name__)


class AnyModel(Converter):
    """hf_to_dcp and dcp_to_hf of any model."""

    @method
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        tie_weight_mapping: dict[str, str] | None = None,
        fused_linear_names: list[str] | None = None,
        *,
        settings: Settings,
    ) -> Report:
        """Hub checkpoint -> DCP directory."""
        from polymodal.convert.family import generic

        family = generic(dcp_prefix, hf_prefix, fused_linear_names or ())
        return hub_to_dcp(family, hf_dir, dcp_dir, settings, copies=tie_weight_mapping)

    @method
    def dcp_to_hf(
        self,
        load_dir: str,
        save_dir: str,
        model_assets_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        fused_linear_names: list[str] | None = None,
        trust_remote_code: bool = False,
        *,
        settings: Settings,
    ) -> Report:
        """DCP directory -> hub checkpoint."""
        from polymodal.convert.family import generic

        family = generic(dcp_prefix, hf_prefix, fused_linear_names or ())
        return dcp_to_hub(family, load_dir, save_dir, model_assets_dir, settings, type(self).__name__)


def _with_experts(directory: str) -> Family:
    """Which of the models with experts a directory holds."""
    from polymodal.convert import engine
    from polymodal.convert.family import family

    names = ("internvl3.5", "glm-4.5v", "qwen3-omni-moe")
    return engine.accepting(Path(directory), [family(name) for name in names])


class ExpertMerge(Converter):
    """hf_to_dcp, dcp_to_hf, merge and split of the models with one linear layer an expert."""

    @method
    def hf_to_dcp(self, hf_dir: str, save_dir: str, *, settings: Settings) -> Report:
        """Hub checkpoint -> DCP directory."""
        return hub_to_dcp(_with_experts(hf_dir), hf_dir, save_dir, settings)

    @method
    def dcp_to_hf(self, hf_dir: str, dcp_dir: str, save_dir: str, *, settings: Settings) -> Report:
        """DCP directory -> hub checkpoint."""
        return dcp_to_hub(_with_experts(hf_dir), dcp_dir, save_dir, hf_dir, settings, type(self).__name__)

    @method
    def merge(self, hf_dir: str, save_dir: str, max_shard_size: str = "4GB", *, settings: Settings) -> Report:
        """Hub checkpoint -> the same with the experts in one tensor."""
        return _merge_or_split("merge", hf_dir, save_dir, max_shard_size, settings)

    @method
    def split(self, hf_dir: str, save_dir: str, max_shard_size: str = "4GB", *, settings: Settings) -> Report:
        """Hub checkpoint with the experts in one tensor -> one tensor an expert."""
        return _merge_or_split("split", hf_dir, save_dir, max_shard_size, settings)


@method
def moe_expert(
    style: Literal["merge", "split"],
    hf_dir: str,
    save_dir: str,
    max_shard_size: str = "4GB",
    *,
    settings: Settings,
) -> Report:
    """Experts of a hub checkpoint in one tensor, or one tensor an expert again.

    Args:
        style: merge or split.
    """
    return _merge_or_split(style, hf_dir, save_dir, max_shard_size, settings)


def _merge_or_split(
    style: str, hf_dir: str, save_dir: str, max_shard_size: str, settings: Settings
) -> Report:
    from polymodal.convert import changes, engine, output, reading

    source, family = Path(hf_dir), _with_experts(hf_dir)
    if style == "merge":
        tensors: Source = engine.hub(family, "merged", source).source
    else:
        opened = engine.under(family, "merged", source, reading.hub_files(source))
        tensors = engine.unmapped(opened, source)
    origin, limit = {"from": hf_dir, "style": style}, changes.size(max_shard_size)
    return output.to_hub(
        tensors, Path(save_dir), settings, source, family.stem, origin, shard=limit, follow=False
    )
