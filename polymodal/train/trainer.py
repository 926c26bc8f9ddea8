"""The loop, readable from top to bottom: build, shard, load, resume, then step after step until done or told to stop.

Sees every room; owns the run directory. Nothing here knows a model, a format or a device by name.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_count
from polymodal.data.schedule import DECIDING_KEYS, Position
from polymodal.distributed import checkpoint
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.distributed.router_loss import load_figures
from polymodal.models import catalog, lora, storage, weights
from polymodal.recipe import Recipe
from polymodal.runtime import device as devices
from polymodal.runtime.process_group import Runtime, runtime
from polymodal.train import callbacks, monitor, optim, run_length
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel, meta_model
from polymodal.train.step import StepMetrics, drop_broken_samples, forward_backward, inverse_weights


def run(recipe: Recipe) -> int:
    """Train as the recipe says; join or be the world that the launcher made. Returns the exit code.

    0 also when SIGTERM came and a checkpoint was written: the same command goes on from there.
    """
    with runtime(recipe) as rt:
        trainer = Trainer(recipe, rt)
        try:
            return trainer.train()
        finally:
            trainer.close()


class Trainer:
    def __init__(self, recipe: Recipe, rt: Runtime):
        self.recipe, self.rt = recipe, rt
        self.main = rt.rank == 0
        self.run_dir = recipe.run_dir
        self.device = rt.device.torch
        self.offloaded = "parameters" in recipe.parallel.offload
        self.mesh = Mesh(ParallelSizes.of(recipe.parallel, rt.world), rt.device.kind, rt.rank)
        # A group of its own: a checkpoint written in the background must not mix its collectives with training's.
        self.save_group = dist.new_group(backend="gloo") if rt.world > 1 else None
        self.log_group = self.mesh.log_group if rt.world > 1 else None
        _determinism(recipe)

        self.family = catalog.family(recipe.model)
        self.card = self.family.card
        self.layout = layout_of(recipe, self.family)
        self.objective = self.layout.objective
        self.callbacks = callbacks.build(recipe.train.callbacks)
        self.should_stop = False
        """Set by a callback: training ends after this step as if it had been asked to by a signal."""
        self._build_data()
        self._build_model()
        self._build_optimizer()
        self._resume()
        self._build_monitor()

    # ---------------------------------------------------------------- building

    def _build_model(self) -> None:
        recipe, family = self.recipe, self.family
        measure = self.schedule.mean_sample()
        self.model = ParallelModel(
            lambda: meta_model(family, recipe), family, self.mesh, recipe, self.device, measure
        )
        self.shard_batches = self.layout.batch_sharding(self.mesh)
        self.weights_group = self.shard_batches.weights_group if self.rt.world > 1 else None
        self.same_samples_group = self.layout.same_samples_group(self.mesh)

        def load(model: torch.nn.Module) -> None:
            if recipe.model.init == "random":
                weights.initialise(model, family, recipe.train.seed, self.device, self.offloaded)
            else:
                weights.load(model, family, device=self.device, offloaded=self.offloaded)
            if recipe.model.lora is not None:
                lora.initialise(model, recipe.model.lora, recipe.train.seed)

        self.model.load_all(load)
        self.model.train()
        self.trainable = self.model.trainable
        self.sampler = self.layout.sampler(self.model.models[0], self.mesh, self.device)

    def _build_data(self) -> None:
        recipe = self.recipe
        self.layout.start(self.device, self.mesh)
        self.feed = self.layout.feed("datasets", self.rt.rank)
        self.schedule = self.feed.schedule
        self.validation = self.layout.feed("validation", self.rt.rank) if recipe.data.validation else None
        self.steps = recipe.train.steps or self.schedule.steps_in(recipe.train.epochs)
        note = run_length.warning(recipe, self.schedule, self.steps, self.mesh.sizes.dp)
        if note and self.rt.rank == 0:
            print(f"warning: {note}", file=sys.stderr, flush=True)

    def _build_optimizer(self) -> None:
        recipe = self.recipe
        self.optimizer = optim.build(self.trainable, recipe, self.card)
        self.average = optim.MovingAverage(self.trainable, recipe.train.ema) if recipe.train.ema else None
        self.scaler = optim.LossScaler(recipe.train.precision == "fp16")
        self.guard = monitor.Guard(recipe.train.guard, self.scaler.enabled)
        self.state = checkpoint.RunState()

    def _tensors(self, create: bool) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint by key; `create` makes a fresh optimizer's zeros to be filled."""
        held = self.trainable if create else self.model.owned
        tensors: dict[str, torch.Tensor] = {f"model.{n}": p for n, p in held.items()}
        if self.recipe.checkpoint.save == "full":
            state = self.optimizer.state(create)
            tensors.update({f"optim.{k}": v for k, v in state.items() if k.partition(".")[2] in held})
            if self.average is not None:
                tensors.update({f"ema.{n}": t for n, t in self.average.shadow.items() if n in held})
        return tensors

    def _resume(self) -> None:
        recipe = self.recipe
        self.resumed_at: int | None = None
        chosen = recipe.checkpoint.resume
        found = None
        if chosen != "never":
            found = checkpoint.agreed(
                self.rt,
                lambda: checkpoint.newest(self.run_dir) if chosen == "auto" else checkpoint.locate(chosen),
            )
        if found is None:
            if recipe.checkpoint.init_from:
                self._init_from(recipe.checkpoint.init_from)
            if self.average is not None:
                self.average = optim.MovingAverage(self.trainable, recipe.train.ema)
            return
        state = checkpoint.read_state(found)
        if state.recipe.get("checkpoint", {}).get("save") == "weights":
            raise PolymodalError(
                f"{found} holds weights only (checkpoint.save: weights), it cannot be resumed.",
                "Use checkpoint.init_from with it, or checkpoint.resume: never.",
            )
        if recipe.checkpoint.init_from and self.model.trained < self.model.total:
            self._init_from(
                recipe.checkpoint.init_from
            )  # what is not trained is in no checkpoint of this run
        tensors = self._tensors(create=True)
        checkpoint.load(found, tensors, self.save_group)
        self.model.after_load()
        self._check_position(found, state)
        self.state = state
        self.scaler.load(state.scaler)
        self.guard.mean = state.norm_mean
        self.resumed_at = state.step

    def _check_position(self, found: Path, state: checkpoint.RunState) -> None:
        """Raise PolymodalError when the position in the data that a checkpoint holds means other samples here."""
        same = state.data in ("", self.schedule.fingerprint)
        if same and state.lengths in ("", self.schedule.lengths):
            if state.data and not state.lengths and self.main:
                print(
                    f"warning: {found} does not say how long its samples were; if that has changed, some are now trained twice or never",
                    flush=True,
                )
            return
        what = "The samples have other lengths than" if same else "The batches hold other samples than"
        rest = "tokenizer, processor, chat template or media files" if same else "files of data.datasets"
        keys = recipes.changed(state.recipe, self.recipe, DECIDING_KEYS)
        why = (
            f"keys of the recipe that differ: {', '.join(keys)}"
            if keys
            else f"no key of the recipe differs, so the {rest} did"
        )
        raise PolymodalError(
            f"{what} when {found} was written ({why}).",
            "Resume with what the run began with (recipe.yaml beside it), or start anew from its weights with checkpoint.init_from.",
        )

    def _init_from(self, source: str) -> None:
        path, place = Path(source), {"device": self.device, "offloaded": self.offloaded}
        if catalog.is_whole(path):
            self.model.load_all(lambda m: weights.load(m, self.family, str(path), **place))
            return
        if lora.is_adapter(path):
            self.model.load_all(lambda m: lora.load(m, self.recipe.model.lora, path))
            return
        own = checkpoint.at(path)
        other = None if own else storage.foreign(path, weights.directory_of(None, self.family))
        if other is not None:
            self.model.load_all(lambda m: weights.load(m, self.family, files=other, **place))
            return
        found = checkpoint.agreed(self.rt, lambda: checkpoint.locate(path))
        assert found is not None
        have = checkpoint.names(found)
        # under adapters too, which rename the weights below them
        ours = {f"model.{name}": p for n, p in self.model.all.items() for name in (n, weights.plain(n))}
        known = {f"model.{name}" for n in self.model.names for name in (n, weights.plain(n))}
        fitting = {k: p for k, p in ours.items() if k in have}
        strange = sorted(k for k in have if k.startswith("model.") and k not in known)
        if not known & have or strange:
            raise PolymodalError(
                f"checkpoint.init_from: {found} has {len(strange)} tensors that this model has no place for (first: {strange[0][6:] if strange else 'none fits'}).",
                "A run with adapters starts only runs with model.lora; otherwise export it with --merge-lora and start from the export.",
            )
        checkpoint.load(found, fitting, self.save_group)
        self.model.after_load()

    def _build_monitor(self) -> None:
        recipe = self.recipe
        self.writer = checkpoint.Writer(
            self.run_dir,
            recipe.checkpoint.keep,
            recipe.checkpoint.asynchronous,
            self.rt.rank,
            self.save_group,
            lambda path: self.callbacks.on_save(self, path),
        )
        self.metrics = self.progress = None
        if self.main:
            (self.run_dir / "recipe.yaml").write_text(recipes.dump(recipe))
            self.metrics = monitor.Metrics(
                self.run_dir, recipe.monitor, recipe.name, recipe.model_dump(mode="json"), self.state.step
            )
            self.progress = monitor.Progress(recipe.name, self.steps, self.state.step)
            total, train = self.model.total, self.model.trained
            self.progress.say(
                f"{self.card.name}: {format_count(total)} parameters, {format_count(train)} trained, {self.rt.world} x {self.rt.device.kind}, {self.steps} steps"
            )
            if self.resumed_at is not None:
                done = (
                    ""
                    if self.resumed_at < self.steps
                    else ": nothing is left to do (train.steps or train.epochs say how much)"
                )
                self.progress.say(f"resumed at step {self.resumed_at}{done}")
        self.profiler = monitor.Profiler(self.run_dir, recipe.monitor.profile, self.rt.rank, self.rt.device)
        self.peak = devices.peak_flops(self.rt.device)

    # ---------------------------------------------------------------- the loop

    def train(self) -> int:
        self.rt.catch_signals()
        recipe, state = self.recipe, self.state
        loader = self.feed.loader(
            dp_rank=self.mesh.dp_rank, dp_size=self.mesh.sizes.dp, start=Position(**state.position),
            stop_after=self.steps - state.step, first=self.model.first, device=self.device,
        )  # fmt: skip
        saved = state.step
        self.callbacks.on_train_begin(self)
        began = time.perf_counter()
        try:
            for batch in loader:
                if state.step >= self.steps:
                    break
                step = state.step + 1
                self.profiler.before(step)
                stopping = self._step(step, batch, began)
                began = time.perf_counter()
                trace = self.profiler.after(step)
                if trace is not None:
                    print(f"trace written: {trace}", flush=True)
                self.writer.poll()
                if recipe.checkpoint.every and step % recipe.checkpoint.every == 0 and step < self.steps:
                    self._save()
                    saved = step
                if recipe.evaluate.every and step % recipe.evaluate.every == 0 and step < self.steps:
                    self._validate(step)
                    began = time.perf_counter()
                if self.sampler is not None and self.sampler.due(step, False) and step < self.steps:
                    self.sampler.after(step, self.metrics)
                    began = time.perf_counter()
                if stopping:
                    break
        finally:
            loader.close()
        if state.step != saved:
            self._save()
        self.writer.finish()
        if state.step < self.steps:
            self._say(f"stopped at step {state.step} as asked; the same command goes on from there")
            self.callbacks.on_train_end(self)
            return 0
        self._validate(state.step)
        if self.sampler is not None:
            self.sampler.after(state.step, self.metrics)
        self._finish()
        self.callbacks.on_train_end(self)
        return 0

    def _step(self, step: int, batch: Any, began: float) -> bool:
        """One optimizer step. Returns whether some rank was asked to stop."""
        recipe, state = self.recipe, self.state
        # Dropout is the only randomness left in a step; it depends on (seed, step, data rank), so resume needs no RNG.
        torch.manual_seed((recipe.train.seed * 1_000_003 + step) * 1_009 + self.mesh.dp_rank)
        batches = self.objective.prepare(
            self.layout.actors, drop_broken_samples(batch, self.layout, self.same_samples_group)
        )
        inverse = inverse_weights(self.objective, batches, self.weights_group)
        batches = self.shard_batches(batches)
        extra = ("samples", "seqtokens", "media", "flops", "wait")
        tally = StepMetrics(self.objective.parts, extra, self.family.routers())
        forward_backward(self.model.runner, self.objective, batches, inverse, tally, self.scaler.scale)
        stats = batch.stats
        once = (
            self.model.runner.has_last_stage and self.mesh.at["cp"] == 0
        )  # other ranks of these axes read the same
        tally.add({
            "samples": stats.samples * once, "seqtokens": stats.tokens * once, "media": stats.media * once, "flops": stats.flops * once,
            "wait": stats.wait_seconds,
        })  # fmt: skip
        total = tally.total(self.log_group) | load_figures(tally.choices)
        norm = self.model.gradients(self.scaler.scale)
        accepted, why = self.guard.accept(step, total["loss"], float(norm))
        self.scaler.update(math.isfinite(float(norm)))
        factor = optim.learning_rate(recipe.optim.schedule, step - 1, self.steps)
        if accepted:
            if recipe.optim.clip_norm:
                self.model.clip(norm, recipe.optim.clip_norm)
            self.optimizer.set_rate(factor)
            self.optimizer.step()
            self.model.after_step()
            if self.average is not None:
                self.average.update()
        else:
            self._say(f"step {step} skipped: {why}")
        self.optimizer.zero_grad()
        state.step = step
        state.position = asdict(batch.next)
        state.samples += int(total["samples"])
        state.tokens += int(total["seqtokens"])
        state.norm_mean = self.guard.mean
        if self.main and step % recipe.monitor.every == 0:
            self._log(
                step, total, float(norm), factor * recipe.optim.lr, time.perf_counter() - began, accepted
            )
        values = {
            "loss": total["loss"],
            "grad_norm": float(norm),
            "lr": factor * recipe.optim.lr,
            "skipped": not accepted,
        }
        self.callbacks.on_step_end(self, step, values)
        # Of the whole world, not of the loss group: ranks that hold other pieces of the model must stop at the same step.
        asked = self.rt.signal is not None or self.should_stop
        stop, profile = self.rt.any_rank(asked, self.profiler.asked())
        if profile:
            self.profiler.take(self.rt.share)
        return stop

    def _log(
        self, step: int, total: dict[str, float], norm: float, lr: float, seconds: float, accepted: bool
    ) -> None:
        tokens = total["seqtokens"]
        values: dict[str, Any] = {
            "loss": total["loss"], "grad_norm": norm, "lr": lr, "seconds": seconds,
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": tokens / seconds, "tokens_per_second_device": tokens / seconds / self.rt.world,
            "frames_per_second": total["media"] / seconds,
            "wait_seconds": total["wait"] / (self.mesh.fsdp_size * self.mesh.sizes.pp),
            "memory_gib": devices.memory(self.rt.device)["peak"] / 2**30,
            "samples": self.state.samples, "tokens": self.state.tokens, "skipped": not accepted,
        }  # fmt: skip
        for name in self.objective.parts:
            if total[f"tokens/{name}"]:
                values[f"loss/{name}"] = total[f"nll/{name}"] / total[f"tokens/{name}"]
        if self.objective.aux_weight:
            values["balance"] = total["balance"]
        values |= {key: value for key, value in total.items() if key.startswith("experts/")}
        if self.peak:
            values["mfu"] = self.model.passes * total["flops"] / seconds / self.rt.world / self.peak
        if self.scaler.enabled:
            values["loss_scale"] = self.scaler.scale
        self.metrics.log(step, values)
        self.progress.update(step, monitor.line(step, self.steps, values))

    def _validate(self, step: int) -> None:
        """Loss over the validation data with the same forward; equal work a rank by construction."""
        if self.validation is None:
            return
        objective = self.objective.validation()
        count = self.validation.schedule.steps_in_epoch(0)
        if self.recipe.evaluate.batches:
            count = min(count, self.recipe.evaluate.batches)
        loader = self.validation.loader(
            workers=0,  # starting workers costs seconds
            dp_rank=self.mesh.dp_rank, dp_size=self.mesh.sizes.dp, start=Position(0, 0, 0), stop_after=count,
            first=self.model.first, device=self.device,
        )  # fmt: skip
        self.model.train(False)
        tally, weight = StepMetrics(objective.parts), 0.0
        loss = 0.0
        try:
            for batch in loader:
                batches = objective.prepare(
                    self.layout.actors, drop_broken_samples(batch, self.layout, self.same_samples_group)
                )
                inverse = inverse_weights(objective, batches, self.weights_group)
                part, batches = StepMetrics(objective.parts), self.shard_batches(batches)
                forward_backward(self.model.runner, objective, batches, inverse, part, backward=False)
                terms = part.total(self.log_group)
                share = 1.0 / inverse[objective.term] if inverse[objective.term] else 0.0
                loss += terms["loss"] * share
                weight += share
                tally.add({k: v for k, v in terms.items() if "/" in k})
        finally:
            loader.close()
            self.model.train()
        values = {"validation/loss": loss / weight if weight else float("nan")}
        for name in objective.parts:
            tokens = float(tally.values.get(f"tokens/{name}", 0))
            if tokens:
                values[f"validation/loss/{name}"] = float(tally.values[f"nll/{name}"]) / tokens
        if self.main:
            self.metrics.log(step, values)
            self.progress.say(
                f"validation at step {step}: "
                + ", ".join(f"{k.partition('/')[2]} {v:.4f}" for k, v in values.items())
            )
        self.callbacks.on_evaluate(self, step, values)

    # ---------------------------------------------------------------- saving and ending

    def _save(self) -> None:
        state = self.state
        state.scaler = self.scaler.state()
        state.recipe = self.recipe.model_dump(mode="json")
        state.data, state.lengths = self.schedule.fingerprint, self.schedule.lengths
        state.source = {"path": str(self.family.source), "card": self.card.name}
        state.versions = checkpoint.versions()
        self.writer.save(self._tensors(create=False), state)

    def _finish(self) -> None:
        self._say(
            f"{self.state.step} steps done: {checkpoint.newest(self.run_dir)}; `polymodal export {self.run_dir} DIR` writes it for the hub"
        )
        if self.main:
            summary = {
                "step": self.state.step,
                "samples": self.state.samples,
                "tokens": self.state.tokens,
                "resumed_at": self.resumed_at,
            }
            (self.run_dir / "summary.json").write_text(json.dumps(summary))
        newest = self.rt.share(str(checkpoint.newest(self.run_dir)))  # rank 0's word, when it has its name
        if self.recipe.checkpoint.export:
            from polymodal.train.export import export

            export(str(newest), str(self.run_dir / "export"), force=True, group=self.save_group)

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)

    def close(self) -> None:
        """Leave nothing under way, whatever ended the run."""
        self.writer.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.progress is not None:
            self.progress.close()


def _determinism(recipe: Recipe) -> None:
    torch.manual_seed(recipe.train.seed)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
