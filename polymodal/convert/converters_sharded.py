"""The converters of `mm-convert` between the hub and DCP directories, and for experts merged and split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polymodal.convert.converters import offered, said, writes
from polymodal.convert.options import Settings

if TYPE_CHECKING:
    from polymodal.convert.family import Family
    from polymodal.convert.source import Source


def hub_to_dcp(
    made: Family, variant: str, source: Path, target: Path, how: Settings, ties: dict[str, str] | None = None
) -> None:
    from polymodal.convert import changes, engine, output, reading

    flat: Source = reading.hub_files(source)[0]
    flat = changes.also(flat, ties or {}, str(source))
    opened = engine.hub(made, variant, source, flat)
    said(output.to_dcp(opened.source, target, how), how)


def dcp_to_hub(
    made: Family, variant: str, source: Path, target: Path, template: Path, how: Settings, converter: str
) -> None:
    from polymodal.convert import engine, output

    opened = engine.dcp(made, variant, source, template)
    note = {"from": str(source), "converter": converter}
    said(output.to_hub(opened.source, target, how, template, made.stem, note), how)


class Sharded:
    """hf_to_dcp, dcp_to_hf and adapters of a model whose directories keep the hub's names behind prefixes."""

    _family: str = ""

    def _of(self) -> Family:
        from polymodal.convert.family_registry import family

        return family(self._family)

    @writes
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        tie_weight: bool = False,
        is_lora_base: bool = False,
        *,
        how: Settings,
    ) -> None:
        """Hub checkpoint -> DCP directory.

        Args:
            tie_weight: write the head as a copy of the embedding.
            is_lora_base: names as the base of a LoRA run has them.
        """
        ties = {"lm_head.weight": "model.language_model.embed_tokens.weight"} if tie_weight else {}
        hub_to_dcp(self._of(), "lora base" if is_lora_base else "", Path(hf_dir), Path(dcp_dir), how, ties)

    @writes
    def dcp_to_hf(
        self, load_dir: str, save_dir: str, model_assets_dir: str, to_bf16: bool = False, *, how: Settings
    ) -> None:
        """DCP directory -> hub checkpoint.

        Args:
            to_bf16: round floating values to bfloat16.
        """
        from polymodal.convert import changes, engine, output

        made = self._of()
        opened = engine.dcp(made, "", Path(load_dir), Path(model_assets_dir))
        source = changes.Rounded(opened.source, "bfloat16") if to_bf16 else opened.source
        note = {"from": load_dir, "converter": type(self).__name__}
        said(output.to_hub(source, Path(save_dir), how, Path(model_assets_dir), made.stem, note), how)

    @writes
    def lora_hf_to_dcp(self, hf_dir: str, dcp_dir: str, *, how: Settings) -> None:
        """Adapter in peft's format -> DCP directory."""
        from polymodal.convert.family_registry import family

        hub_to_dcp(family("adapter-dcp"), "", Path(hf_dir), Path(dcp_dir), how)

    @writes
    def lora_dcp_to_hf(
        self,
        lora_dcp_dir: str,
        save_dir: str,
        base_hf_dir: str = "",
        lora_alpha: float | None = None,
        *,
        how: Settings,
    ) -> None:
        """DCP directory of a LoRA run -> adapter in peft's format.

        Args:
            lora_alpha: for adapter_config.json; the rank, when left out.
        """
        from polymodal.convert import engine, lora, output
        from polymodal.convert.family_registry import family

        opened = engine.dcp(family("adapter-dcp"), "", Path(lora_dcp_dir), None)
        content = lora.config(opened.source, lora_alpha, base_hf_dir, lora.PEFT)
        said(
            output.to_hub(
                opened.source,
                Path(save_dir),
                how,
                stem="adapter_model",
                made={"from": lora_dcp_dir},
                beside={"adapter_config.json": content},
            ),
            how,
        )

    @writes
    def merge_mm_lora_dcp_weight_to_base_hf(
        self,
        base_hf_dir: str,
        lora_dcp_dir: str,
        save_merged_hf_dir: str,
        lora_target_modules: str = "",
        scaling: float = 1.0,
        *,
        how: Settings,
    ) -> None:
        """Base + scaling * B A of a LoRA run -> hub checkpoint.

        Args:
            lora_target_modules: names, with commas, of the modules whose adapters are added; all, when left out.
            scaling: alpha / rank.
        """
        from polymodal.convert import engine, lora, output

        base = engine.hub(self._of(), "modules", Path(base_hf_dir))
        adapters = engine.opened_dcp(Path(lora_dcp_dir))
        targets = [one.strip() for one in lora_target_modules.split(",")]
        found = lora.pairs(adapters, base.source.shapes, lora_dcp_dir, "base_model.model.model.", targets)
        merged = lora.Merged(base.source, adapters, found, scaling)
        source = engine.unmapped(base.but(merged), Path(base_hf_dir)).source
        said(
            output.to_hub(
                source,
                Path(save_merged_hf_dir),
                how,
                Path(base_hf_dir),
                made={"from": [base_hf_dir, lora_dcp_dir]},
            ),
            how,
        )


@offered
class Qwen3VLConverter(Sharded):
    """Qwen3-VL as a DCP directory, dense or with experts."""

    _family = "qwen3-vl-dcp"


@offered
class Mistral3Converter(Sharded):
    """Magistral and others of Mistral 3 as a DCP directory."""

    _family = "mistral3-dcp"


@offered
class Qwen35Converter:
    """Qwen3.5 as a DCP directory, experts transposed."""

    def _of(self, dcp_prefix: str, hf_prefix: str) -> Family:
        from dataclasses import replace

        from polymodal.convert.families.sharded import QWEN3_5_DCP, qwen3_5

        return replace(QWEN3_5_DCP, tables={"": qwen3_5(dcp_prefix, hf_prefix)})

    @writes
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        tie_weight_mapping: dict[str, str] | None = None,
        *,
        how: Settings,
    ) -> None:
        """Hub checkpoint -> DCP directory."""
        hub_to_dcp(self._of(dcp_prefix, hf_prefix), "", Path(hf_dir), Path(dcp_dir), how, tie_weight_mapping)

    @writes
    def dcp_to_hf(
        self,
        dcp_dir: str,
        save_hf_dir: str,
        origin_hf_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        *,
        how: Settings,
    ) -> None:
        """DCP directory -> hub checkpoint."""
        dcp_to_hub(
            self._of(dcp_prefix, hf_prefix),
            "",
            Path(dcp_dir),
            Path(save_hf_dir),
            Path(origin_hf_dir),
            how,
            type(self).__name__,
        )


@offered
class GenericDCPConverter:
    """Any model as a DCP directory."""

    @writes
    def hf_to_dcp(
        self,
        hf_dir: str,
        dcp_dir: str,
        dcp_prefix: str = "",
        hf_prefix: str = "",
        tie_weight_mapping: dict[str, str] | None = None,
        fused_linear_names: list[str] | None = None,
        *,
        how: Settings,
    ) -> None:
        """Hub checkpoint -> DCP directory."""
        from polymodal.convert.families.sharded import generic

        made = generic(dcp_prefix, hf_prefix, tuple(fused_linear_names or ()))
        hub_to_dcp(made, "", Path(hf_dir), Path(dcp_dir), how, tie_weight_mapping)

    @writes
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
        how: Settings,
    ) -> None:
        """DCP directory -> hub checkpoint.

        Args:
            trust_remote_code: accepted for scripts that give it; no code of a checkpoint is ever run.
        """
        from polymodal.convert.families.sharded import generic

        made = generic(dcp_prefix, hf_prefix, tuple(fused_linear_names or ()))
        dcp_to_hub(made, "", Path(load_dir), Path(save_dir), Path(model_assets_dir), how, type(self).__name__)


def _experts(directory: Path) -> Family:
    """Which of the models with experts a directory holds."""
    from polymodal.convert import engine
    from polymodal.convert.family_registry import family

    names = ("internvl3.5", "glm-4.5v", "qwen3-omni-moe")
    return engine.accepting(directory, [family(name) for name in names])


@offered
class ExpertMergeDcpConverter:
    """InternVL 3.5, GLM-4.5V and Qwen3-Omni as a DCP directory, experts in one tensor."""

    @writes
    def hf_to_dcp(self, hf_dir: str, save_dir: str, *, how: Settings) -> None:
        """Hub checkpoint -> DCP directory."""
        hub_to_dcp(_experts(Path(hf_dir)), "", Path(hf_dir), Path(save_dir), how)

    @writes
    def dcp_to_hf(self, hf_dir: str, dcp_dir: str, save_dir: str, *, how: Settings) -> None:
        """DCP directory -> hub checkpoint."""
        dcp_to_hub(
            _experts(Path(hf_dir)), "", Path(dcp_dir), Path(save_dir), Path(hf_dir), how, type(self).__name__
        )

    @writes
    def merge(self, hf_dir: str, save_dir: str, max_shard_size: str = "4GB", *, how: Settings) -> None:
        """Hub checkpoint -> the same with the experts in one tensor."""
        _moe("merge", hf_dir, save_dir, max_shard_size, how)

    @writes
    def split(self, hf_dir: str, save_dir: str, max_shard_size: str = "4GB", *, how: Settings) -> None:
        """Hub checkpoint with the experts in one tensor -> one tensor an expert."""
        _moe("split", hf_dir, save_dir, max_shard_size, how)


@offered
@writes
def moe_expert(
    style: Literal["merge", "split"],
    hf_dir: str,
    save_dir: str,
    max_shard_size: str = "4GB",
    *,
    how: Settings,
) -> None:
    """Experts of a hub checkpoint in one tensor, or one tensor an expert again.

    Args:
        style: merge or split.
    """
    _moe(style, hf_dir, save_dir, max_shard_size, how)


def _moe(style: str, hf_dir: str, save_dir: str, max_shard_size: str, how: Settings) -> None:
    from polymodal.convert import changes, engine, output, reading

    source = Path(hf_dir)
    made = _experts(source)
    if style == "merge":
        opened = engine.hub(made, "merged", source)
    else:
        flat, _ = reading.hub_files(source)
        opened = engine.unmapped(engine.under(made, "merged", source, flat), source)
    said(
        output.to_hub(
            opened.source,
            Path(save_dir),
            how,
            source,
            made.stem,
            {"from": hf_dir, "style": style},
            changes.size(max_shard_size),
            follow=False,
        ),
        how,
    )
