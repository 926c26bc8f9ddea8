"""What converters of generative models do: hub, original code, trees, DCP directories, adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from polymodal.convert import changes, engine, lora, output, pipeline, reading, tree
from polymodal.convert.converters import Call
from polymodal.convert.engine import Opened
from polymodal.convert.family import family
from polymodal.convert.options import Paths, Settings
from polymodal.convert.output import Report
from polymodal.convert.source import Source
from polymodal.convert.tree import Parallel, counts
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say


def for_each_transformer(function: Callable[..., Report]) -> Callable[..., Iterator[Report]]:
    """An action on one transformer, for every transformer of a pipeline's directory."""

    @functools.wraps(function)
    def run(call: Call, cfg: Paths, **options: Any) -> Iterator[Report]:
        def part(name: str) -> Paths:
            target = str(Path(cfg.target_path) / name)
            sources = {key: Path(value) for key in ("hf_dir", "lora_path") if (value := getattr(cfg, key))}
            inside = {key: str(pipeline.inside(path, name)) for key, path in sources.items()}
            return replace(cfg, source_path=str(Path(cfg.source_path) / name), target_path=target, **inside)

        def action(one: Paths, settings: Settings) -> Report:
            return function(replace(call, settings=settings), one, **options)

        parts = [part(name) for name in pipeline.parts(Path(cfg.source_path))] or [cfg]
        yield from pipeline.each([functools.partial(action, one) for one in parts], call.settings)

    return run


def _tree(call: Call, cfg: Paths, opened: Opened) -> Report:
    """Write a tree."""
    cut = cfg.target_parallel_config
    layers = counts("pp_layers", cut.pp_layers)
    parallel = Parallel(cut.tp_size, cut.ep_size, {"dit": layers} if layers else {})
    opened = changes.without(opened, "pos_embed.") if call.remove_pos_emb else opened
    return output.to_tree(opened, parallel, Path(cfg.target_path), call.settings)


def _hub(call: Call, cfg: Paths, tensors: Source, **options: Any) -> Report:
    """Write hub files."""
    options.setdefault("stem", family(call.family).stem)
    origin = {"from": cfg.source_path, "converter": call.converter}
    return output.to_hub(tensors, Path(cfg.target_path), call.settings, origin=origin, **options)


def _opened(call: Call, cfg: Paths, variant: str, hub: Path | None) -> Opened:
    """A tree under the family's own names."""
    return engine.opened_tree(family(call.family), variant, Path(cfg.source_path), hub, None, call.settings)


def _template(cfg: Paths) -> Path | None:
    return Path(cfg.hf_dir) if cfg.hf_dir else None


@for_each_transformer
def hub_to_tree(call: Call, cfg: Paths) -> Report:
    return _tree(call, cfg, engine.hub(family(call.family), call.variant, Path(cfg.source_path)))


@for_each_transformer
def tree_to_hub(call: Call, cfg: Paths) -> Report:
    hub = _template(cfg)
    tensors = engine.unmapped(_opened(call, cfg, call.variant, hub), Path(cfg.source_path), hub)
    return _hub(call, cfg, tensors, template=hub)


@for_each_transformer
def resplit(call: Call, cfg: Paths) -> Report:
    return _tree(call, cfg, _opened(call, cfg, call.variant, _template(cfg)))


def original_to_tree(call: Call, cfg: Paths) -> Report:
    source = Path(cfg.source_path)
    if tree.is_tree(source):
        return _tree(call, cfg, _opened(call, cfg, call.variant, _template(cfg)))
    inside = ("module", "ema_state_dict", "state_dict")
    tensors = reading.any_file(source, *inside, allow_pickle=call.settings.allow_pickle)
    if found := lora.alphas(tensors):
        say(
            f"{source}: alpha {', '.join(f'{alpha:g}' for alpha in found)} is not part of a tree: "
            "give it to merge_lora_to_base and mm_to_source",
            error=True,
        )
    return _tree(call, cfg, engine.hub(family(call.family), call.original, source, tensors))


def tree_to_original(call: Call, cfg: Paths, alpha: float | None = None) -> Report:
    tensors = engine.unmapped(_opened(call, cfg, call.original, None), Path(cfg.source_path))
    if alpha is not None:
        tensors = lora.with_alpha(tensors, alpha, cfg.source_path)
    return _hub(call, cfg, tensors)


@for_each_transformer
def merge_adapters(call: Call, cfg: Paths, rank: int, alpha: float) -> Report:
    if not cfg.lora_path:
        raise PolymodalError("merge_lora_to_base needs the tree with the adapters.", "Give --cfg.lora_path.")
    base = _opened(call, cfg, call.variant, _template(cfg))
    table = lora.tree_adapters(base.table)
    adapters = engine.opened_table(table, Path(cfg.lora_path), base.facts, None, call.settings).source
    pairs = lora.pairs(adapters, base.source.shapes, cfg.lora_path)
    ranks = {adapters.shapes[a][0] for a, _ in pairs.values()}
    if ranks != {rank}:
        have = ", ".join(map(str, sorted(ranks)))
        raise PolymodalError(
            f"{cfg.lora_path}: its adapters have rank {have}, lora_rank is {rank}.",
            "Give the rank that they were trained with.",
        )
    return _tree(call, cfg, base.but(lora.Merged(base.source, adapters, pairs, alpha / rank)))


def adapter_to_tree(call: Call, cfg: Paths) -> Report:
    tensors, model = reading.hub_files(Path(cfg.source_path)), family(call.family)

    def prefix(name: str) -> str:
        return name if any(key.startswith(name) for key in tensors.shapes) else ""

    if prefix("transformer.") or any(".attn1." in key for key in tensors.shapes):
        table = lora.adapters(model.table(), prefix("transformer."))
    else:
        suffix = ".default" if any(key.endswith(".default.weight") for key in tensors.shapes) else ""
        table = lora.adapters(model.table("original"), prefix("diffusion_model."), suffix)
    return _tree(call, cfg, engine.mapped(tensors, table, {}, cfg.source_path))


def tree_to_adapter(call: Call, cfg: Paths) -> Report:
    table, source = lora.adapters(family(call.family).table(), "transformer."), Path(cfg.source_path)
    tensors = engine.unmapped(engine.opened_table(table, source, {}, None, call.settings), source)
    return _hub(call, cfg, tensors, stem="pytorch_lora_weights")


@for_each_transformer
def tree_to_dcp(call: Call, cfg: Paths) -> Report:
    opened = _opened(call, cfg, call.variant, _template(cfg))
    return output.to_dcp(opened.source, Path(cfg.target_path), call.settings)


@for_each_transformer
def dcp_to_tree(call: Call, cfg: Paths) -> Report:
    opened = engine.under(family(call.family), "", None, engine.opened_dcp(Path(cfg.source_path)))
    return _tree(call, cfg, engine.count_layers(opened))


def text_encoder(call: Call, cfg: Paths) -> Report:
    source = Path(cfg.source_path)
    tensors, config = changes.language_model(source)
    beside = {"config.json": config}
    return _hub(call, cfg, tensors, stem="model", template=source, beside=beside, follow=False)
