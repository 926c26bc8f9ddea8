"""The converters of `mm-convert`, each method a few lines into the engine.

Methods are what the command line offers: a class has those that work for it, and no others. Imports of torch wait for
the call, so that help comes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.convert.options import (
    AdapterToTree,
    HubToTree,
    LanguageParallel,
    Paths,
    Resplit,
    TreeToAdapter,
    TreeToHub,
)

if TYPE_CHECKING:
    from polymodal.convert.engine import Report, Settings
    from polymodal.convert.family import Family
    from polymodal.convert.tree import Parallel

CONVERTERS: list[Callable] = []
"""What the command offers, in the order of the documents."""


def offered(converter: Any) -> Any:
    CONVERTERS.append(converter)
    return converter


def settings(verify: bool, dry_run: bool, workers: int, allow_pickle: bool = False) -> Settings:
    from polymodal.convert.engine import Settings

    return Settings(verify=verify, dry_run=dry_run, workers=workers, allow_pickle=allow_pickle)


def said(report: Report, dry_run: bool) -> None:
    """Print what was done, or what would be."""
    if dry_run:
        print("\n".join(report.lines))
        print(f"would write {report.directory}: {report.tensors} tensors in {report.files} files, {report.bytes / 1e9:.3f} GB")
    else:
        print(report)


def parallel(one: LanguageParallel) -> Parallel:
    from polymodal.convert.tree import Parallel, counts

    lists = {name: counts(f"{name}_pp_layers", getattr(one, f"{name}_pp_layers")) for name in ("llm", "vit", "audio")}
    own = {name: getattr(one, f"{name}_tp_size") for name in ("vit", "audio")}
    return Parallel(one.tp_size, one.ep_size, {k: v for k, v in lists.items() if v}, {k: v for k, v in own.items() if v})


class Understanding:
    """hf_to_mm, mm_to_hf and resplit of one family."""

    _family: str = ""

    def _of(self) -> Family:
        from polymodal.convert.shelf import family

        return family(self._family)

    def _variant(self, options: Any) -> str:
        return "canonical" if options.enable_canonical_hf_struct else ""

    def hf_to_mm(self, cfg: HubToTree, verify: bool = True, dry_run: bool = False, workers: int = 0) -> None:
        """Hub checkpoint -> tree.

        Args:
            cfg: what, where, how.
            verify: read everything back and compare.
            dry_run: print files, keys, shapes and bytes; write nothing.
            workers: threads; 0 = one a core.
        """
        from polymodal.convert import engine

        made, source = self._of(), Path(cfg.hf_config.hf_dir)
        language = engine.with_language(source, cfg.llm_hf_config and Path(cfg.llm_hf_config.hf_dir))
        opened = engine.hub(made, self._variant(cfg.common_model_config), source, language)
        if cfg.save_vit_only:
            opened = engine.only(opened, "image_encoder.", made.title)
        said(engine.to_tree(opened, parallel(cfg.parallel_config), Path(cfg.mm_dir), settings(verify, dry_run, workers)), dry_run)

    def mm_to_hf(self, cfg: TreeToHub, verify: bool = True, dry_run: bool = False, workers: int = 0, allow_pickle: bool = False) -> None:
        """Tree -> hub checkpoint.

        Args:
            cfg: what, where, how.
            verify: read everything back and compare.
            dry_run: print files, keys, shapes and bytes; write nothing.
            workers: threads; 0 = one a core.
            allow_pickle: read trees whose files hold more than tensors; the rest is replaced by inert objects.
        """
        from polymodal.convert import engine

        made, hub = self._of(), Path(cfg.hf_config.hf_dir)
        how, variant = settings(verify, dry_run, workers, allow_pickle), self._variant(cfg.common_model_config)
        opened = engine.opened_tree(made, variant, Path(cfg.mm_dir), hub, parallel(cfg.parallel_config), how)
        opened = engine.unmapped(opened, Path(cfg.mm_dir), hub)
        note = {"from": str(cfg.mm_dir), "converter": type(self).__name__}
        said(engine.to_hub(opened.source, Path(cfg.save_hf_dir), how, hub, made.stem, note), dry_run)

    def resplit(self, cfg: Resplit, verify: bool = True, dry_run: bool = False, workers: int = 0, allow_pickle: bool = False) -> None:
        """Tree -> the same tree, cut otherwise.

        Args:
            cfg: what, where, how.
            verify: read everything back and compare.
            dry_run: print files, keys, shapes and bytes; write nothing.
            workers: threads; 0 = one a core.
            allow_pickle: read trees whose files hold more than tensors; the rest is replaced by inert objects.
        """
        from polymodal.convert import engine

        made = self._of()
        how, variant = settings(verify, dry_run, workers, allow_pickle), self._variant(cfg.common_model_config)
        hub = Path(cfg.hf_config.hf_dir) if cfg.hf_config else None
        opened = engine.opened_tree(made, variant, Path(cfg.source_dir), hub, parallel(cfg.source_parallel_config), how)
        opened = engine.without_head(opened, known=hub is not None)
        said(engine.to_tree(opened, parallel(cfg.target_parallel_config), Path(cfg.target_dir), how), dry_run)


@offered
class Qwen2VLConverter(Understanding):
    """Qwen2-VL."""

    _family = "qwen2-vl"


@offered
class Qwen2_5_VLConverter(Understanding):
    """Qwen2.5-VL."""

    _family = "qwen2.5-vl"
