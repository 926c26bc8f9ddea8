"""The training loop, from top to bottom: build, shard, load, resume, then one optimizer step after another.

It owns the run directory and knows no model, file format or device by name.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.sample import Batch
from polymodal.core.terminal import Bar, say
from polymodal.core.text import format_count
from polymodal.data import workers
from polymodal.data.loader import Loader, RankStep, StepStats
from polymodal.data.schedule import DECIDING_KEYS, Position
from polymodal.distributed import checkpoint
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.distributed.router_loss import load_figures
from polymodal.models import catalog
from polymodal.recipe import Recipe
from polymodal.runtime import device as devices
from polymodal.runtime.lock import DirectoryLock
from polymodal.runtime.process_group import Runtime, runtime
from polymodal.train import callbacks, monitor, optim, run_length
from polymodal.train.layouts import Feed, layout_of
from polymodal.train.parallel_model import ParallelModel, meta_model
from polymodal.train.reference import Actors
from polymodal.train.rollout import PolicyActors
from polymodal.train.starting_weights import StartingWeights
from polymodal.train.step import StepMetrics, drop_broken_samples, forward_backward, inverse_weights

STEP_TOTALS = ("samples", "seqtokens", "media", "flops", "wait")
"""What a step's metrics sum over ranks besides losses."""


def run(recipe: Recipe) -> int:
    """Train a recipe, as one of the processes that the launcher started. Returns the exit code.

    It is 0 also when SIGTERM came and a checkpoint was written: the same command then continues.
    """
    hint = "Wait until it ends or stop it; or set checkpoint.dir to another directory."
    with runtime(recipe) as rt:
        lock = DirectoryLock(recipe.run_dir, "training", hint)
        with lock if rt.is_main else contextlib.nullcontext():
            trainer = Trainer(recipe, rt, lock if rt.is_main else None)
            try:
                return trainer.train()
            finally:
                trainer.close()


class Trainer:
    def __init__(self, recipe: Recipe, rt: Runtime, lock: DirectoryLock | None = None):
        """lock: rank 0's, held, of the run directory."""
        self.recipe, self.rt, self.lock = recipe, rt, lock
        self.main = rt.rank == 0
        self.run_dir = recipe.run_dir
        self.device = rt.device.torch
        if recipe.data.workers:
            workers.prepare()
        self.mesh = Mesh(ParallelSizes.of(recipe.parallel, rt.world), rt.device.kind, rt.rank)
        # a group of its own, as checkpoints are written in the background
        self.save_group = dist.new_group(backend="gloo") if rt.world > 1 else None
        self.log_group = self.mesh.log_group if rt.world > 1 else None
        torch.manual_seed(recipe.train.seed)
        if recipe.train.deterministic:
            devices.make_deterministic()

        self.family = catalog.family(recipe.model)
        self.card = self.family.card
        self.layout = layout_of(recipe, self.family)
        self.objective = self.layout.objective
        self.callbacks = callbacks.build(recipe.train.callbacks)
        self.should_stop = False
        """Set by a callback: training ends after this step, as after a signal."""
        self._build_data()
        self._build_model()
        self._build_optimizer()
        self._resume()
        self._build_monitor()

    # ---------------------------------------------------------------- building

    def _build_data(self) -> None:
        recipe = self.recipe
        self.layout.start(self.device, self.mesh)
        self.feed = self.layout.feed("datasets", self.rt.rank)
        self.schedule = self.feed.schedule
        self.validation = self.layout.feed("validation", self.rt.rank) if recipe.data.validation else None
        self.steps = recipe.train.steps or self.schedule.steps_in(recipe.train.epochs)
        warning = run_length.warning(recipe, self.schedule, self.steps, self.mesh.sizes.dp)
        if warning and self.main:
            say(f"warning: {warning}", error=True)

    def _build_model(self) -> None:
        make, sample = partial(meta_model, self.family, self.recipe), self.schedule.mean_sample()
        self.model = ParallelModel(make, self.family, self.mesh, self.recipe, self.device, sample)
        self.shard_batches = self.layout.batch_sharding(self.mesh)
        self.weights_group = self.shard_batches.weights_group if self.rt.world > 1 else None
        self.same_samples_group = self.layout.same_samples_group(self.mesh)
        self.weights = StartingWeights(self.model, self.family, self.recipe, self.device)
        self.weights.load_source()
        self.model.train()
        self.trainable = self.model.trainable
        self.sampler = self.layout.sampler(self.model.models[0], self.mesh, self.device)
        if self.layout.asks or getattr(self.objective, "needs_reference", False):
            frozen = self.layout.actors
            kind = PolicyActors if self.layout.asks else Actors
            self.layout.actors = kind(
                self.model, self.recipe, self.mesh, self.device, self.shard_batches, self.layout, frozen
            )

    def _build_optimizer(self) -> None:
        recipe = self.recipe
        self.optimizer = optim.build(self.trainable, recipe, self.card)
        self.average = optim.MovingAverage(self.trainable, recipe.train.ema) if recipe.train.ema else None
        self.scaler = optim.LossScaler(recipe.train.precision == "fp16")
        self.guard = monitor.Guard(recipe.train.guard, self.scaler.enabled)
        self.state = checkpoint.RunState()

    def _build_monitor(self) -> None:
        recipe, rt = self.recipe, self.rt
        self.writer = checkpoint.Writer(
            self.run_dir,
            recipe.checkpoint.keep,
            recipe.checkpoint.asynchronous,
            rt.rank,
            self.save_group,
            lambda path: self.callbacks.on_save(self, path),
        )
        self.profiler = monitor.Profiler(self.run_dir, recipe.monitor.profile, rt.rank, rt.device)
        self.peak = devices.peak_flops(rt.device)
        self.metrics = self.progress = None
        if not self.main:
            return
        step = self.state.step
        self._open_logs()
        self.progress = Bar(recipe.name, self.steps, step, error=False)
        total, trained = format_count(self.model.total), format_count(self.model.trained)
        self._print(
            f"{self.card.name}: {total} parameters, {trained} trained, "
            f"{rt.world} x {rt.device.kind}, {self.steps} steps"
        )
        if self.resumed_at is not None:
            done = ": nothing is left to do (train.steps or train.epochs set the length of a run)"
            self._print(f"resumed at step {step}{done if step >= self.steps else ''}")

    def _open_logs(self) -> None:
        recipe = self.recipe
        replace_file(self.run_dir / "recipe.yaml", recipes.dump(recipe))
        config = recipes.plain(recipe)
        self.metrics = monitor.Metrics(self.run_dir, recipe.monitor, recipe.name, config, self.state.step)

    # ---------------------------------------------------------------- resuming

    def _resume(self) -> None:
        """The state of checkpoint.resume; without one, a new run from checkpoint.init_from."""
        recipe = self.recipe
        self.resumed_at: int | None = None
        self.saved: Path | None = None
        directory = self._resume_directory(())
        # parameters that are not trained are in no checkpoint of this run
        started = directory is None or self.model.trained < self.model.total

        def load_start() -> None:
            if recipe.checkpoint.init_from:
                self.weights.load_init_from(self.rt, self.save_group)

        if started:
            load_start()
        if isinstance(self.layout.actors, Actors):
            again = (lambda: None) if started else load_start
            self.layout.actors.start(self.rt, self.save_group, again)
        if directory is None:
            if self.average is not None:
                self.average = optim.MovingAverage(self.trainable, recipe.train.ema)
            return
        directory, state = self._load_state(directory)
        self.saved = directory
        self.model.after_load()
        self._check_position(directory, state)
        self.state = state
        self.scaler.load(state.scaler)
        self.guard.mean = state.norm_mean
        self.resumed_at = state.step

    def _resume_directory(self, but: Collection[Path]) -> Path | None:
        """but: checkpoints of this run that are damaged."""
        chosen = self.recipe.checkpoint.resume
        if chosen == "never":
            return None
        if chosen == "auto":
            return checkpoint.agreed(self.rt, lambda: checkpoint.newest_whole(self.run_dir, but))
        return checkpoint.agreed(self.rt, lambda: checkpoint.locate(chosen))

    def _load_state(self, directory: Path) -> tuple[Path, checkpoint.RunState]:
        """Tensors and state of a checkpoint, or of the one before it where its tensors turn out damaged."""
        damaged: list[Path] = []
        while True:
            state = checkpoint.read_state(directory)
            match state.recipe:
                case {"checkpoint": {"save": "weights"}}:
                    raise PolymodalError(
                        f"{directory} holds weights only (checkpoint.save: weights), it cannot be resumed.",
                        "Use checkpoint.init_from with it, or checkpoint.resume: never.",
                    )
            trained = state.source.get("card", self.card.name)
            if trained != self.card.name:
                raise PolymodalError(
                    f"{directory} is of a training of {trained}, this recipe trains {self.card.name}.",
                    "Set checkpoint.dir to another directory; `checkpoint.resume: never` starts anew here.",
                )
            try:
                checkpoint.load(directory, self._tensors(create=True), self.save_group)
                return directory, state
            except checkpoint.Damaged as error:
                if self.recipe.checkpoint.resume != "auto":
                    raise
                if self.main:
                    say(f"warning: {error.message} The one before it is taken.", error=True)
                damaged.append(directory)
                before = self._resume_directory(damaged)
                assert before is not None
                directory = before

    def _check_position(self, directory: Path, state: checkpoint.RunState) -> None:
        """Raise PolymodalError when the data position of a checkpoint would mean other samples here."""
        same_batches = state.data in ("", self.schedule.fingerprint)
        if same_batches and state.lengths in ("", self.schedule.lengths):
            if state.data and not state.lengths and self.main:
                say(
                    f"warning: {directory} does not say how long its samples were; if that has changed, "
                    "some are now trained twice or never",
                )
            return
        if same_batches:
            what = "The samples have other lengths than"
            cause = "tokenizer, processor, chat template or media files"
        else:
            what, cause = "The batches hold other samples than", "files of data.datasets"
        keys = recipes.changed(state.recipe, self.recipe, DECIDING_KEYS)
        why = f"no key of the recipe differs, so the {cause} did"
        if keys:
            why = f"keys of the recipe that differ: {', '.join(keys)}"
        raise PolymodalError(
            f"{what} when {directory} was written ({why}).",
            "Resume with what the run began with (recipe.yaml beside it), or start anew from its weights "
            "with checkpoint.init_from.",
        )

    def _tensors(self, create: bool) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by key; `create` gives a fresh optimizer zero state to be filled."""
        parameters = self.trainable if create else self.model.owned
        tensors: dict[str, Tensor] = {f"model.{n}": p for n, p in parameters.items()}
        if self.recipe.checkpoint.save == "full":
            state = self.optimizer.state(create)
            tensors |= {f"optim.{k}": v for k, v in state.items() if k.partition(".")[2] in parameters}
            if self.average is not None:
                tensors |= {f"ema.{n}": t for n, t in self.average.shadow.items() if n in parameters}
        return tensors

    # ---------------------------------------------------------------- the loop

    def train(self) -> int:
        """Step after step until the run is done or asked to stop; returns the exit code."""
        self.rt.catch_signals()
        state = self.state
        loader = self._loader(self.feed, Position(**state.position), max(0, self.steps - state.step))
        self.saved_at = state.step
        self.callbacks.on_train_begin(self)
        began = time.perf_counter()
        try:
            for batch in loader:
                if state.step >= self.steps:
                    break
                step = state.step + 1
                self.profiler.before(step)
                stop = self._step(step, batch, began)
                began = time.perf_counter()
                if (trace := self.profiler.after(step)) is not None:
                    with contextlib.suppress(OSError):  # of the terminal
                        say(f"trace written: {trace}")
                self.writer.poll()
                if step < self.steps and self._between_steps(step):
                    began = time.perf_counter()
                if stop:
                    break
        finally:
            loader.close()
        if state.step != self.saved_at:
            self._save()
        self.writer.finish()
        if state.step < self.steps:
            self._print(f"stopped at step {state.step} as asked; the same command continues from there")
        else:
            self._finish()
        self.callbacks.on_train_end(self)
        return 0

    def _loader(self, feed: Feed, start: Position, steps: int, **options: Any) -> Loader:
        ranks = {"dp_rank": self.mesh.dp_rank, "dp_size": self.mesh.sizes.dp}
        here = {"first": self.model.first, "device": self.device}
        return feed.loader(start=start, stop_after=steps, **ranks, **here, **options)

    def _between_steps(self, step: int) -> bool:
        """Save, validate and sample when it is time to; whether the time it took belongs to no step."""
        recipe = self.recipe
        if _due(recipe.checkpoint.every, step):
            self._save()
        validate = _due(recipe.evaluate.every, step)
        if validate:
            self._validate(step)
        sample = self.sampler is not None and _due(recipe.evaluate.samples.every, step)
        if sample:
            self.sampler.sample(step, self.metrics)
        return validate or sample

    def _step(self, step: int, batch: RankStep, began: float) -> bool:
        """One optimizer step. Returns whether some rank was asked to stop."""
        # Only dropout is random in a step, by (seed, step, data rank): a resumed run needs no RNG state.
        torch.manual_seed((self.recipe.train.seed * 1_000_003 + step) * 1_009 + self.mesh.dp_rank)
        lr_factor = optim.learning_rate(self.recipe.optim.schedule, step - 1, self.steps)
        if isinstance(self.layout.actors, PolicyActors):
            self.layout.actors.step = step
        prepared = self._prepare(self.objective, batch)
        for _ in range(getattr(self.objective, "updates", 1)):
            norm, total = self._forward_backward(batch, *prepared)
            applied = self._update(step, total, norm, lr_factor)
        self._advance(step, batch, total)
        values = {
            "loss": total["loss"],
            "grad_norm": total["grad_norm"],
            "lr": lr_factor * self.recipe.optim.lr,
            "skipped": not applied,
            "seconds": time.perf_counter() - began,
        }
        if self.main and _due(self.recipe.monitor.every, step):
            self._log(step, total, values)
        self.callbacks.on_step_end(self, step, values)
        return self._asked_to_stop()

    def _prepare(self, objective: Any, batch: RankStep) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro-batches, and the factors that make losses means over the global batch."""
        whole = drop_broken_samples(batch, self.layout, self.same_samples_group)
        batches = objective.prepare(self.layout.actors, whole)
        inverse = inverse_weights(objective, batches, self.weights_group)
        return self.shard_batches(batches), inverse

    def _forward_backward(
        self, batch: RankStep, batches: list[Batch], inverse: dict[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Gradients of the step, accumulated into .grad; returns their norm, and the step's metrics, summed
        over ranks. batches, inverse: what `_prepare` made of it."""
        extra = (*STEP_TOTALS, *getattr(self.objective, "keys", ()))
        tally = StepMetrics(self.objective.parts, extra, self.family.routers())
        forward_backward(self.model.runner, self.objective, batches, inverse, tally, self.scaler.scale)
        # other pipeline stages and context-parallel ranks read the same samples
        counts_here = self.model.runner.has_last_stage and self.mesh.at["cp"] == 0
        stats = batch.stats if counts_here else StepStats()
        if self.layout.asks and counts_here:  # its answers too, and the prompt for each of them
            stats.tokens = sum(each["input_ids"].numel() for each in batches)
        counts = (stats.samples, stats.tokens, stats.media, stats.flops, batch.stats.wait_seconds)
        tally.add(dict(zip(STEP_TOTALS, counts, strict=True)))
        norm = self.model.gradients(self.scaler.scale)
        total = tally.total(self.log_group, norm)
        return norm, total | load_figures(tally.choices)

    def _update(self, step: int, total: dict[str, float], norm: Tensor, lr_factor: float) -> bool:
        """Clip and apply the gradients, unless the guard skips them; whether they were applied."""
        applied, why = self.guard.accept(step, total["loss"], total["grad_norm"])
        self.scaler.update(math.isfinite(total["grad_norm"]))
        if applied:
            if self.recipe.optim.clip_norm:
                self.model.clip(norm, self.recipe.optim.clip_norm)
            self.optimizer.set_rate(lr_factor)
            self.optimizer.step()
            self.model.after_step()
            if self.average is not None:
                self.average.update()
        else:
            self._print(f"step {step} skipped: {why}")
        self.optimizer.zero_grad()
        return applied

    def _advance(self, step: int, batch: RankStep, total: dict[str, float]) -> None:
        state = self.state
        state.step = step
        state.position = asdict(batch.next)
        state.samples += int(total["samples"])
        state.tokens += int(total["seqtokens"])
        state.norm_mean = self.guard.mean

    def _asked_to_stop(self) -> bool:
        """Of the whole world: ranks that hold other pieces of the model must stop after the same step."""
        asked = self.rt.signal is not None or self.should_stop
        stop, profile = self.rt.any_rank(asked, self.profiler.asked())
        if profile:
            self.profiler.take(self.rt.share)
        return stop

    def _log(self, step: int, total: dict[str, float], values: dict[str, Any]) -> None:
        tokens, world, seconds = total["seqtokens"], self.rt.world, values["seconds"]
        values = values | {
            "samples_per_second": total["samples"] / seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_device": tokens / seconds / world,
            "frames_per_second": total["media"] / seconds,
            "wait_seconds": total["wait"] / (self.mesh.fsdp_size * self.mesh.sizes.pp),
            "memory_gib": devices.memory(self.rt.device)["peak"] / 2**30,
            "samples": self.state.samples,
            "tokens": self.state.tokens,
        }
        for name in self.objective.parts:
            if total[f"tokens/{name}"]:
                values[f"loss/{name}"] = total[f"nll/{name}"] / total[f"tokens/{name}"]
        if hasattr(self.objective, "shown"):
            values |= self.objective.shown(total)
        if self.objective.aux_weight:
            values["balance"] = total["balance"]
        values |= {key: value for key, value in total.items() if key.startswith("experts/")}
        if self.peak:
            values["mfu"] = self.model.passes * total["flops"] / seconds / world / self.peak
        if self.scaler.enabled:
            values["loss_scale"] = self.scaler.scale
        self.metrics.log(step, values)
        line = monitor.line(step, self.steps, values)
        self.progress.update(step, below=line.partition(" | ")[2])
        if not self.progress.live:
            self._print(line)

    def _validate(self, step: int) -> None:
        """Loss over the validation data with the same forward; equal work a rank by construction."""
        if self.validation is None:
            return
        objective = self.objective.validation()
        count = self.validation.schedule.steps_in_epoch(0)
        if self.recipe.evaluate.batches:
            count = min(count, self.recipe.evaluate.batches)
        loader = self._loader(
            self.validation, Position(0, 0, 0), count, workers=0
        )  # workers start in seconds
        keys = getattr(objective, "keys", ())
        tally, loss, weight = StepMetrics(objective.parts), 0.0, 0.0
        self.model.train(False)
        self._ask("validation")
        try:
            for batch in loader:
                batches, inverse = self._prepare(objective, batch)
                part = StepMetrics(objective.parts, keys)
                forward_backward(self.model.runner, objective, batches, inverse, part, backward=False)
                total = part.total(self.log_group)
                share = 1.0 / inverse[objective.term] if inverse[objective.term] else 0.0
                loss += total["loss"] * share
                weight += share
                tally.add({k: v for k, v in total.items() if "/" in k or k in keys})
        finally:
            loader.close()
            self.model.train()
            self._ask("datasets")
        values = {"validation/loss": loss / weight if weight else float("nan")}
        for name in objective.parts:
            if tokens := float(tally.values.get(f"tokens/{name}", 0)):
                values[f"validation/loss/{name}"] = float(tally.values[f"nll/{name}"]) / tokens
        if keys:
            shown = objective.shown({key: float(tally.values.get(key, 0.0)) for key in keys})
            values |= {f"validation/{name}": value for name, value in shown.items()}
        if self.main:
            self.metrics.log(step, values)
            losses = (f"{k.partition('/')[2]} {v:.4f}" for k, v in values.items())
            self._print(f"validation at step {step}: {', '.join(losses)}")
        self.callbacks.on_evaluate(self, step, values)

    def _ask(self, section: str) -> None:
        """Which section of the data batches now come from, where a table knows the reference of each."""
        if isinstance(self.layout.actors, Actors):
            self.layout.actors.section = section

    # ---------------------------------------------------------------- saving and ending

    def _save(self) -> None:
        if self.lock is not None:
            self._hold_directory(self.lock)
        state = self.state
        state.scaler = self.scaler.state()
        state.recipe = recipes.plain(self.recipe)
        state.data, state.lengths = self.schedule.fingerprint, self.schedule.lengths
        state.source = {"path": str(self.family.source), "card": self.card.name}
        state.versions = checkpoint.versions()
        self.saved = self.writer.save(self._tensors(create=False), state)
        self.saved_at = state.step

    def _hold_directory(self, lock: DirectoryLock) -> None:
        """Where the run directory was removed or renamed, go on in a new one, so that this step is not lost.

        Raises PolymodalError where another run now has it.
        """
        try:
            lock.check()
        except PolymodalError as error:
            lock.release()
            lock.acquire()
            self._print(
                f"warning: {error.message} It goes on in {self.run_dir}, made anew where it was gone."
            )
            if not (self.run_dir / "recipe.yaml").is_file():
                self.metrics.close()
                self._open_logs()

    def _finish(self) -> None:
        """After the last step: validation, samples, summary and export."""
        state = self.state
        self._validate(state.step)
        if self.sampler is not None:
            self.sampler.sample(state.step, self.metrics)
        directory = self.saved
        export_command = f"polymodal export {shlex.quote(str(self.run_dir))} DIR"
        self._print(f"{state.step} steps done: {directory}; `{export_command}` writes it for the hub")
        if self.main:
            summary = {key: getattr(state, key) for key in ("step", "samples", "tokens")}
            (self.run_dir / "summary.json").write_text(json.dumps(summary | {"resumed_at": self.resumed_at}))
        newest = self.rt.share(str(directory))  # as rank 0 sees it, once the directory has its name
        if self.recipe.checkpoint.export:
            from polymodal.train.export import export

            export(str(newest), str(self.run_dir / "export"), force=True, group=self.save_group)

    def _print(self, text: str) -> None:
        if self.progress is not None:
            self.progress.print(text)

    def close(self) -> None:
        """Leave nothing running, whatever ended the run."""
        self.writer.close()
        for each in (self.metrics, self.progress):
            if each is not None:
                each.close()


def _due(every: int | None, step: int) -> bool:
    return bool(every) and step % every == 0
