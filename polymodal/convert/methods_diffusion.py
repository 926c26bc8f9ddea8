"""Methods of converters of generative models: hub, original code, trees, DCP directories and adapters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.convert.methods import Converter, method, method_on_torch_files
from polymodal.convert.options import Paths, Settings

if TYPE_CHECKING:
    from polymodal.convert.engine import Opened
    from polymodal.convert.output import Report


def for_each_transformer(function: Callable) -> Callable:
    """A method for one transformer, for every transformer of a pipeline's directory."""

    @functools.wraps(function)
    def run(self: Any, cfg: Paths, *, settings: Settings, **options: Any) -> Iterator[Report]:
        from polymodal.convert import pipeline

        def part(name: str) -> Paths:
            target = str(Path(cfg.target_path) / name)
            sources = {key: Path(value) for key in ("hf_dir", "lora_path") if (value := getattr(cfg, key))}
            inside = {key: str(pipeline.inside(path, name)) for key, path in sources.items()}
            return replace(cfg, source_path=str(Path(cfg.source_path) / name), target_path=target, **inside)

        parts = [part(name) for name in pipeline.parts(Path(cfg.source_path))] or [cfg]
        actions = [lambda how, one=one: function(self, one, settings=how, **options) for one in parts]
        yield from pipeline.each(actions, settings)

    return run


class Generative(Converter):
    """What all of them can do, and resplit; each offers the methods that hold for it."""

    _variant: str = ""

    def _tree(self, cfg: Paths, opened: Opened, settings: Settings) -> Report:
        from polymodal.convert import output
        from polymodal.convert.tree import Parallel, counts

        cut = cfg.target_parallel_config
        layers = counts("pp_layers", cut.pp_layers)
        parallel = Parallel(cut.tp_size, cut.ep_size, {"dit": layers} if layers else {})
        return output.to_tree(opened, parallel, Path(cfg.target_path), settings)

    def _opened(self, cfg: Paths, settings: Settings, variant: str | None = None) -> Opened:
        from polymodal.convert import engine

        hub = Path(cfg.hf_dir) if cfg.hf_dir and variant is None else None
        variant = self._variant if variant is None else variant
        return engine.opened_tree(self._of(), variant, Path(cfg.source_path), hub, None, settings)

    def _hub(self, cfg: Paths, settings: Settings, **more: Any) -> Callable[[Any], Report]:
        """Writes tensors as the hub has them."""
        from polymodal.convert import output

        origin = {"from": cfg.source_path, "converter": type(self).__name__}
        options = {"stem": self._of().stem, "origin": origin, **more}
        return functools.partial(output.to_hub, directory=Path(cfg.target_path), settings=settings, **options)

    def _to_mm(self, cfg: Paths, settings: Settings) -> Report:
        from polymodal.convert import engine

        return self._tree(cfg, engine.hub(self._of(), self._variant, Path(cfg.source_path)), settings)

    def _to_hf(self, cfg: Paths, settings: Settings) -> Report:
        from polymodal.convert import engine

        hub = Path(cfg.hf_dir) if cfg.hf_dir else None
        tensors = engine.unmapped(self._opened(cfg, settings), Path(cfg.source_path), hub)
        return self._hub(cfg, settings, template=hub)(tensors)

    @method_on_torch_files
    @for_each_transformer
    def resplit(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree -> the same tree, cut otherwise."""
        return self._tree(cfg, self._opened(cfg, settings), settings)


class Hub(Generative):
    """hf_to_mm and mm_to_hf."""

    @method
    @for_each_transformer
    def hf_to_mm(self, cfg: Paths, *, settings: Settings) -> Report:
        """Hub checkpoint -> tree."""
        return self._to_mm(cfg, settings)

    @method_on_torch_files
    @for_each_transformer
    def mm_to_hf(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree -> hub checkpoint."""
        return self._to_hf(cfg, settings)


class Original(Generative):
    """source_to_mm and mm_to_source: the original code's checkpoint, one torch or safetensors file."""

    _original: str = ""
    """The variant with its names."""

    @method_on_torch_files
    def source_to_mm(self, cfg: Paths, *, settings: Settings) -> Report:
        """The original code's checkpoint (or a tree, cut again) -> tree."""
        from polymodal.convert import engine, lora, reading, tree

        source = Path(cfg.source_path)
        if tree.is_tree(source):
            return self._tree(cfg, self._opened(cfg, settings), settings)
        inside = ("module", "ema_state_dict", "state_dict")
        tensors = reading.any_file(source, *inside, allow_pickle=settings.allow_pickle)
        if found := lora.alphas(tensors):
            print(
                f"{source}: alpha {', '.join(f'{alpha:g}' for alpha in found)} is not part of a tree: "
                "give it to merge_lora_to_base and mm_to_source",
                file=sys.stderr,
            )
        return self._tree(cfg, engine.hub(self._of(), self._original, source, tensors), settings)

    @method_on_torch_files
    def mm_to_source(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree -> the original code's names, as safetensors."""
        return self._to_source(cfg, settings)

    def _to_source(self, cfg: Paths, settings: Settings, alpha: float | None = None) -> Report:
        from polymodal.convert import engine, lora

        tensors = engine.unmapped(self._opened(cfg, settings, self._original), Path(cfg.source_path))
        if alpha is not None:
            tensors = lora.with_alpha(tensors, alpha, cfg.source_path)
        return self._hub(cfg, settings)(tensors)


class Mergeable(Generative):
    """merge_lora_to_base."""

    @method_on_torch_files
    @for_each_transformer
    def merge_lora_to_base(
        self, cfg: Paths, lora_rank: int = 8, lora_alpha: float = 16, *, settings: Settings
    ) -> Report:
        """Base tree + alpha / rank * B A of a LoRA run's tree -> tree.

        Args:
            cfg: source, target and options; lora_path: the tree with the adapters.
            lora_rank: rank of the adapters.
            lora_alpha: alpha of the adapters.
        """
        from polymodal.convert import engine, lora
        from polymodal.core.errors import PolymodalError

        if not cfg.lora_path:
            raise PolymodalError(
                "merge_lora_to_base needs the tree with the adapters.", "Give --cfg.lora_path."
            )
        base = self._opened(cfg, settings)
        table = lora.tree_adapters(base.table)
        adapters = engine.opened_table(table, Path(cfg.lora_path), base.facts, None, settings).source
        pairs = lora.pairs(adapters, base.source.shapes, cfg.lora_path)
        ranks = {adapters.shapes[a][0] for a, _ in pairs.values()}
        if ranks != {lora_rank}:
            raise PolymodalError(
                f"{cfg.lora_path}: its adapters have rank {', '.join(map(str, sorted(ranks)))}, "
                f"lora_rank is {lora_rank}.",
                "Give the rank that they were trained with.",
            )
        merged = lora.Merged(base.source, adapters, pairs, lora_alpha / lora_rank)
        return self._tree(cfg, base.but(merged), settings)


class Wan(Hub, Mergeable):
    """And adapters, and DCP directories."""

    @method
    def lora_hf_to_mm(self, cfg: Paths, *, settings: Settings) -> Report:
        """Adapter (diffusers' or the original code's names) -> tree."""
        from polymodal.convert import engine, lora, reading

        tensors, family = reading.hub_files(Path(cfg.source_path)), self._of()

        def prefix(name: str) -> str:
            return name if any(key.startswith(name) for key in tensors.shapes) else ""

        if prefix("transformer.") or any(".attn1." in key for key in tensors.shapes):
            table = lora.adapters(family.table(), prefix("transformer."))
        else:
            default = any(key.endswith(".default.weight") for key in tensors.shapes)
            table = lora.adapters(
                family.table("original"), prefix("diffusion_model."), ".default" if default else ""
            )
        return self._tree(cfg, engine.mapped(tensors, table, {}, cfg.source_path), settings)

    @method_on_torch_files
    def lora_mm_to_hf(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree of a LoRA run -> adapter as diffusers loads it."""
        from polymodal.convert import engine, lora

        table, source = lora.adapters(self._of().table(), "transformer."), Path(cfg.source_path)
        tensors = engine.unmapped(engine.opened_table(table, source, {}, None, settings), source)
        return self._hub(cfg, settings, stem="pytorch_lora_weights")(tensors)

    @method_on_torch_files
    @for_each_transformer
    def mm_to_dcp(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree -> DCP directory."""
        from polymodal.convert import output

        return output.to_dcp(self._opened(cfg, settings).source, Path(cfg.target_path), settings)

    @method
    @for_each_transformer
    def dcp_to_mm(self, cfg: Paths, *, settings: Settings) -> Report:
        """DCP directory -> tree."""
        from polymodal.convert import engine

        opened = engine.under(self._of(), "", None, engine.opened_dcp(Path(cfg.source_path)))
        return self._tree(cfg, engine.count_layers(opened), settings)


class HunyuanVideo(Hub, Original, Mergeable):
    """hf_to_mm and mm_to_hf with diffusers' names."""

    def __init__(self, version: Literal["t2v", "i2v", "t2v-lora", "i2v-lora", "1.5"] = "t2v"):
        """
        Args:
            version: the task; -lora: an adapter of the original code; 1.5: HunyuanVideo 1.5.
        """
        adapter = version.endswith("-lora")
        families = {"1.5": "hunyuan-video-1.5", **dict.fromkeys(("t2v", "i2v"), "hunyuan-video")}
        self._family = families.get(version, "hunyuan-video-lora")
        self._original = "i2v" if version == "i2v" else ""
        self._variant = "" if adapter else f"{self._original} diffusers".strip()

    @method_on_torch_files
    def mm_to_source(self, cfg: Paths, lora_alpha: float | None = None, *, settings: Settings) -> Report:
        """Tree -> the original code's names, as safetensors.

        Args:
            lora_alpha: alpha of the adapters of a -lora version; readers take the rank for it when it is left out.
        """
        return self._to_source(cfg, settings, lora_alpha)

    @method
    def t2v_text_encoder(self, cfg: Paths, *, settings: Settings) -> Report:
        """The language model of a LLaVA checkpoint, by itself, in fp16, with its tokenizer."""
        from polymodal.convert import changes

        source = Path(cfg.source_path)
        tensors, config = changes.language_model(source)
        beside = {"config.json": config}
        return self._hub(cfg, settings, stem="model", template=source, beside=beside, follow=False)(tensors)


class CogVideo(Hub, Original, Mergeable):
    """By diffusers' names and the original code's."""

    _original = "source"

    def __init__(self, version: Literal["t2v", "i2v"] = "t2v", remove_pos_emb: bool = False):
        """
        Args:
            version: the task; both are converted alike, by the tensors that are there.
            remove_pos_emb: leave the table of positions out.
        """
        self._remove_pos_emb = remove_pos_emb

    def _tree(self, cfg: Paths, opened: Opened, settings: Settings) -> Report:
        from polymodal.convert import changes

        opened = changes.without(opened, "pos_embed.") if self._remove_pos_emb else opened
        return super()._tree(cfg, opened, settings)


class OpenSoraPlan(Hub, Original):
    """By the hub's names and the original code's."""

    def __init__(self, version: Literal["v1.2", "v1.3", "v1.5"] = "v1.5"):
        """
        Args:
            version: v1.2 and v1.3 come from the hub, v1.5 from the original code's file.
        """
        self._variant = self._original = version


class VACE(Hub):
    """By the original code's names and diffusers'."""

    @method
    @for_each_transformer
    def hf_diffusers_to_mm(self, cfg: Paths, *, settings: Settings) -> Report:
        """Hub checkpoint with diffusers' names -> tree."""
        self._variant = "diffusers"
        return self._to_mm(cfg, settings)

    @method_on_torch_files
    @for_each_transformer
    def mm_to_hf_diffusers(self, cfg: Paths, *, settings: Settings) -> Report:
        """Tree -> hub checkpoint with diffusers' names."""
        self._variant = "diffusers"
        return self._to_hf(cfg, settings)
