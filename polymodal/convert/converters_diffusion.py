"""The converters of `mm-convert` for generative models: hub, original code, trees, DCP directories and adapters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.convert.converters import offered, reads, said, writes
from polymodal.convert.options import Paths, Settings

if TYPE_CHECKING:
    from polymodal.convert.engine import Opened
    from polymodal.convert.family import Family
    from polymodal.convert.tree import Parallel


def parallel(paths: Paths) -> Parallel:
    from polymodal.convert.tree import Parallel, counts

    one = paths.target_parallel_config
    lists = counts("pp_layers", one.pp_layers)
    return Parallel(one.tp_size, one.ep_size, {"dit": lists} if lists else {})


def each(method: Callable) -> Callable:
    """A method for one transformer, for every transformer of a pipeline's directory."""

    @functools.wraps(method)
    def run(self: Any, cfg: Paths, *, how: Settings, **more: Any) -> None:
        from polymodal.convert import pipeline

        def inside(path: str, name: str) -> str:
            return str(pipeline.inside(Path(path), name)) if path else path

        source, target = Path(cfg.source_path), Path(cfg.target_path)
        several = [
            replace(
                cfg, source_path=str(source / name), target_path=str(target / name),
                hf_dir=inside(cfg.hf_dir, name), lora_path=inside(cfg.lora_path, name),
            )
            for name in pipeline.parts(source)
        ]  # fmt: skip
        actions = [functools.partial(method, self, one, **more) for one in several or [cfg]]
        pipeline.each([lambda how, act=act: act(how=how) for act in actions], how)

    return run


class Generative:
    """What all of them can do; each offers the methods that hold for it."""

    _family: str = ""
    _variant: str = ""

    def _of(self) -> Family:
        from polymodal.convert.family_registry import family

        return family(self._family)

    def _tree(self, cfg: Paths, opened: Opened, how: Settings) -> None:
        from polymodal.convert import output

        said(output.to_tree(opened, parallel(cfg), Path(cfg.target_path), how), how)

    def _opened(self, cfg: Paths, how: Settings, path: str = "") -> Opened:
        from polymodal.convert import engine

        hub = Path(cfg.hf_dir) if cfg.hf_dir else None
        return engine.opened_tree(self._of(), self._variant, Path(path or cfg.source_path), hub, None, how)

    def _to_mm(self, cfg: Paths, how: Settings) -> None:
        from polymodal.convert import engine

        self._tree(cfg, engine.hub(self._of(), self._variant, Path(cfg.source_path)), how)

    def _to_hf(self, cfg: Paths, how: Settings) -> None:
        from polymodal.convert import engine, output

        made, hub = self._of(), Path(cfg.hf_dir) if cfg.hf_dir else None
        opened = engine.unmapped(self._opened(cfg, how), Path(cfg.source_path), hub)
        said(
            output.to_hub(
                opened.source,
                Path(cfg.target_path),
                how,
                hub,
                made.stem,
                {"from": cfg.source_path, "converter": type(self).__name__},
            ),
            how,
        )

    @reads
    @each
    def resplit(self, cfg: Paths, *, how: Settings) -> None:
        """Tree -> the same tree, cut otherwise."""
        self._tree(cfg, self._opened(cfg, how), how)


class Hub(Generative):
    """hf_to_mm and mm_to_hf."""

    @writes
    @each
    def hf_to_mm(self, cfg: Paths, *, how: Settings) -> None:
        """Hub checkpoint -> tree."""
        self._to_mm(cfg, how)

    @reads
    @each
    def mm_to_hf(self, cfg: Paths, *, how: Settings) -> None:
        """Tree -> hub checkpoint."""
        self._to_hf(cfg, how)


class Original(Generative):
    """source_to_mm and mm_to_source: the original code's checkpoint, one torch or safetensors file."""

    _inside: tuple[str, ...] = ("module", "ema_state_dict", "state_dict")
    _original: str = ""

    @reads
    def source_to_mm(self, cfg: Paths, *, how: Settings) -> None:
        """The original code's checkpoint (or a tree, cut again) -> tree."""
        from polymodal.convert import engine, lora, reading, tree

        source = Path(cfg.source_path)
        if tree.is_tree(source):
            self._tree(cfg, self._opened(cfg, how), how)
            return
        flat = reading.any_file(source, *self._inside, allow_pickle=how.allow_pickle)
        if found := lora.alphas(flat):
            print(
                f"{source}: alpha {', '.join(f'{alpha:g}' for alpha in found)} is not part of a tree: give it to merge_lora_to_base and mm_to_source",
                file=sys.stderr,
            )
        self._tree(cfg, engine.hub(self._of(), self._original, source, flat), how)

    @reads
    def mm_to_source(self, cfg: Paths, *, how: Settings) -> None:
        """Tree -> the original code's names, as safetensors."""
        self._to_source(cfg, how)

    def _to_source(self, cfg: Paths, how: Settings, alpha: float | None = None) -> None:
        from polymodal.convert import engine, lora, output

        made = self._of()
        opened = engine.opened_tree(made, self._original, Path(cfg.source_path), None, None, how)
        source = engine.unmapped(opened, Path(cfg.source_path)).source
        if alpha is not None:
            source = lora.with_alpha(source, alpha, cfg.source_path)
        said(
            output.to_hub(
                source,
                Path(cfg.target_path),
                how,
                stem=made.stem,
                made={"from": cfg.source_path, "converter": type(self).__name__},
            ),
            how,
        )


class Mergeable(Generative):
    """merge_lora_to_base."""

    _targets: tuple[str, ...] = ()

    @reads
    @each
    def merge_lora_to_base(
        self, cfg: Paths, lora_rank: int = 8, lora_alpha: float = 16, *, how: Settings
    ) -> None:
        """Base tree + alpha / rank * B A of a LoRA run's tree -> tree.

        Args:
            cfg: what, where, how; lora_path: the tree with the adapters.
            lora_rank: rank of the adapters.
            lora_alpha: alpha of the adapters.
        """
        from polymodal.convert import engine, lora
        from polymodal.core.errors import PolymodalError

        if not cfg.lora_path:
            raise PolymodalError(
                "merge_lora_to_base needs the tree with the adapters.", "Give --cfg.lora_path."
            )
        base = self._opened(cfg, how)
        adapters = engine.opened_table(
            self._adapters(base), Path(cfg.lora_path), base.facts, None, how
        ).source
        found = lora.pairs(adapters, base.source.shapes, cfg.lora_path)
        ranks = {adapters.shapes[a][0] for a, _ in found.values()}
        if ranks != {lora_rank}:
            raise PolymodalError(
                f"{cfg.lora_path}: its adapters have rank {', '.join(map(str, sorted(ranks)))}, lora_rank is {lora_rank}.",
                "Give the rank that they were trained with.",
            )
        self._tree(cfg, base.but(lora.Merged(base.source, adapters, found, lora_alpha / lora_rank)), how)

    def _adapters(self, base: Opened) -> Any:
        """A table of adapters under the tree's own names."""
        from polymodal.convert import lora

        return lora.own(base.table)


@offered
class WanConverter(Hub, Mergeable):
    """Wan 2.1 and 2.2: a transformer, or a pipeline's directory with the two experts of 2.2."""

    _family = "wan"

    @writes
    def lora_hf_to_mm(self, cfg: Paths, *, how: Settings) -> None:
        """Adapter (diffusers' or the original code's names) -> tree."""
        from polymodal.convert import engine, lora, reading
        from polymodal.convert.families.vace import original

        source = Path(cfg.source_path)
        flat, _ = reading.hub_files(source)
        table = self._of().table()
        if any(".attn1." in key or key.startswith("transformer.") for key in flat.shapes):
            made = lora.adapters(
                table, "transformer." if any(key.startswith("transformer.") for key in flat.shapes) else ""
            )
        else:
            suffix = ".default" if any(key.endswith(".default.weight") for key in flat.shapes) else ""
            prefix = (
                "diffusion_model." if any(key.startswith("diffusion_model.") for key in flat.shapes) else ""
            )
            made = lora.adapters(table, prefix, suffix, rename=lora.originals(table, original))
        self._tree(cfg, engine.mapped(flat, made, {}, str(source)), how)

    @reads
    def lora_mm_to_hf(self, cfg: Paths, *, how: Settings) -> None:
        """Tree of a LoRA run -> adapter as diffusers loads it."""
        from polymodal.convert import engine, lora, output

        table = lora.adapters(self._of().table(), "transformer.")
        opened = engine.unmapped(
            engine.opened_table(table, Path(cfg.source_path), {}, None, how), Path(cfg.source_path)
        )
        said(
            output.to_hub(
                opened.source,
                Path(cfg.target_path),
                how,
                stem="pytorch_lora_weights",
                made={"from": cfg.source_path},
            ),
            how,
        )

    @reads
    @each
    def mm_to_dcp(self, cfg: Paths, *, how: Settings) -> None:
        """Tree -> DCP directory."""
        from polymodal.convert import output

        said(output.to_dcp(self._opened(cfg, how).source, Path(cfg.target_path), how), how)

    @writes
    @each
    def dcp_to_mm(self, cfg: Paths, *, how: Settings) -> None:
        """DCP directory -> tree."""
        from polymodal.convert import engine

        opened = engine.by_layers(
            engine.under(self._of(), "", None, engine.opened_dcp(Path(cfg.source_path)))
        )
        self._tree(cfg, opened, how)


@offered
class HunyuanVideoConverter(Hub, Original, Mergeable):
    """HunyuanVideo and HunyuanVideo 1.5: hf_to_mm and mm_to_hf with diffusers' names."""

    def __init__(self, version: Literal["t2v", "i2v", "t2v-lora", "i2v-lora", "1.5"] = "t2v"):
        """
        Args:
            version: the task; -lora: an adapter of the original code; 1.5: HunyuanVideo 1.5.
        """
        self._original = "i2v" if version == "i2v" else ""
        adapter = version.endswith("-lora")
        self._variant = "" if adapter else f"{self._original} diffusers".strip()
        self._family = {"1.5": "hunyuan-video-1.5"}.get(
            version, "hunyuan-video-lora" if adapter else "hunyuan-video"
        )

    @reads
    def mm_to_source(self, cfg: Paths, lora_alpha: float | None = None, *, how: Settings) -> None:
        """Tree -> the original code's names, as safetensors.

        Args:
            lora_alpha: alpha of the adapters of a -lora version; readers take the rank for it when it is left out.
        """
        self._to_source(cfg, how, lora_alpha)

    @writes
    def t2v_text_encoder(self, cfg: Paths, *, how: Settings) -> None:
        """The language model of a LLaVA checkpoint, by itself, in fp16, with its tokenizer."""
        from polymodal.convert import changes, output

        source, config = changes.language_model(Path(cfg.source_path))
        said(
            output.to_hub(
                source,
                Path(cfg.target_path),
                how,
                Path(cfg.source_path),
                made={"from": cfg.source_path},
                beside={"config.json": config},
                follow=False,
            ),
            how,
        )


@offered
class CogVideoConverter(Hub, Original, Mergeable):
    """CogVideoX 1.0 and 1.5."""

    _family = "cogvideox"
    _original = "source"

    def __init__(self, version: Literal["t2v", "i2v"] = "t2v", remove_pos_emb: bool = False):
        """
        Args:
            version: the task; the tensors tell, so that both are converted alike.
            remove_pos_emb: leave the table of positions out.
        """
        self._without = ("pos_embed.",) if remove_pos_emb else ()

    def _tree(self, cfg: Paths, opened: Opened, how: Settings) -> None:
        from polymodal.convert import changes

        super()._tree(cfg, changes.without(opened, self._without), how)


@offered
class OpenSoraPlanConverter(Hub, Original):
    """Open-Sora Plan 1.2, 1.3 and 1.5."""

    _family = "open-sora-plan"

    def __init__(self, version: Literal["v1.2", "v1.3", "v1.5"] = "v1.5"):
        """
        Args:
            version: v1.2 and v1.3 come from the hub, v1.5 from the original code's file.
        """
        self._variant = self._original = version


@offered
class OpenSoraConverter(Hub):
    """Open-Sora 2.0."""

    _family = "open-sora"


@offered
class StepVideoConverter(Hub):
    """Step-Video."""

    _family = "stepvideo"


@offered
class VACEConverter(Hub):
    """VACE on Wan 2.1 and 2.2; hf_to_mm and mm_to_hf with the original code's names."""

    _family = "vace"

    @writes
    @each
    def hf_diffusers_to_mm(self, cfg: Paths, *, how: Settings) -> None:
        """Hub checkpoint with diffusers' names -> tree."""
        self._variant = "diffusers"
        self._to_mm(cfg, how)

    @reads
    @each
    def mm_to_hf_diffusers(self, cfg: Paths, *, how: Settings) -> None:
        """Tree -> hub checkpoint with diffusers' names."""
        self._variant = "diffusers"
        self._to_hf(cfg, how)


@offered
class LuminaConverter(Hub):
    """Lumina-mGPT 2."""

    _family = "lumina"


@offered
class BagelConverter(Hub):
    """BAGEL."""

    _family = "bagel"
