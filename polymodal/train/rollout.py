"""The model answers while it trains: prompts of a step -> its answers, with the weights that are trained.

Prompts are read in one packed forward, which is training's own, whose keys and values are kept; each group
then continues from its prompt's, one token of all answers at a time. So a prompt and its pictures are read
once, however large its group, and nothing is padded but the keys. Blocks that are sharded are gathered once
before and freed behind: no rank waits for another while it generates, however long its answers are.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, Batch, Sample, SampleLengths, pack, unpack
from polymodal.core.terminal import say
from polymodal.data import media
from polymodal.evaluate.metrics import BOX_METRICS
from polymodal.evaluate.rewards import Answered, Rewards, Scores
from polymodal.generate.sampling import Noise, Sampling
from polymodal.models.card import Output
from polymodal.models.weights import directory_of
from polymodal.objectives.policy import Rollout, answer_log_probs
from polymodal.train.reference import Actors

SHOWN = 2  # prompts of a step whose answers are written to rollouts.jsonl


@dataclass
class Answer:
    """ids: the tokens, the one that ends it included. finished: it ended by itself. entropy: sum over its
    tokens of that of the distribution they were drawn from."""

    ids: list[int]
    log_probs: list[float]
    entropy: float = 0.0
    finished: bool = False


@contextlib.contextmanager
def gathered(model: nn.Module, reshards: bool) -> Iterator[None]:
    """The sharded blocks of a model whole while inside; within a call of the model itself, whose own weights
    are then whole. reshards: whether a block's forward frees its weights. Collective."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(reshards, recurse=False)


def ends_of(family: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end an answer."""
    found = [tokenizer.eos_token_id, getattr(family.config.get_text_config(), "eos_token_id", None)]
    directory = directory_of(family.source, None)
    if (directory / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(directory).eos_token_id)
    flat = [each for ids in found for each in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return {each for each in flat if each is not None}


@torch.no_grad()
def generate(
    model: nn.Module,
    family: Any,
    prompts: Sequence[Sample],
    keys: Sequence[Sequence[str]],
    sampling: Sampling,
    ends: set[int],
    cut: set[int],
    device: torch.device,
) -> list[list[Answer]]:
    """Answers to prompts, one for each of their keys, which name the random draws; within the model's call.

    cut: ids that no answer may hold, as they stand for media: it ends before one, unfinished.
    Raises PolymodalError for a model that keeps no keys and values of every layer.
    """
    counts = [len(own) for own in keys]
    batch = pack(prompts).to(device)
    text, read = family.language_model(model), DynamicCache()
    hook = text.register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "past_key_values": read, "use_cache": True}), with_kwargs=True
    )
    try:
        output = family.stage(model, None, batch)
    finally:
        hook.remove()
    lengths = [len(each.tensors["input_ids"]) for each in prompts]
    total, longest = sum(lengths), max(lengths)
    layers = [layer for layer in read.layers if getattr(layer, "keys", None) is not None]
    if len(layers) != len(text.layers) or any(layer.keys.shape[-2] != total for layer in layers):
        raise PolymodalError(
            f"train.objective = grpo: {family.card.name} keeps no keys and values of every layer and token.",
            "Choose another model (`polymodal models`).",
        )
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    places = torch.arange(longest) - (longest - torch.tensor(lengths))[:, None]  # right-aligned
    real = places >= 0
    number = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts))
    index = (first[:, None] + places.clamp_min(0))[number].to(device)
    cache = DynamicCache()
    for layer_index, layer in enumerate(layers):
        pair = (t[0][:, index].transpose(0, 1).contiguous() for t in (layer.keys, layer.values))
        cache.update(*pair, layer_index)
    del layers
    mask = real[number].to(device, torch.int64)
    last = (first + torch.tensor(lengths) - 1).to(device)
    head = output.head
    hidden = output.hidden_states[0, last][number.to(device)]
    positions = batch["position_ids"][:, 0, last][:, number.to(device)]  # [R, rows]
    embed = model.get_submodule(family.card.embedding)

    answers = [Answer([], []) for _ in number]
    owner = list(range(len(answers)))  # of each row that is still generated, its answer
    chain = sampling.processors([key for own in keys for key in own])
    warp = LogitsProcessorList(each for each in chain if not isinstance(each, Noise))
    noise = next((each for each in chain if isinstance(each, Noise)), None)
    scale = sampling.temperature or 1.0
    alive = torch.ones(len(owner), dtype=torch.bool)
    for step in range(sampling.max_new_tokens):
        logits = head(hidden)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        normal = (wide / scale).log_softmax(-1)
        scores = warp(None, wide) if warp else wide
        chosen = (noise(None, scores) if noise is not None else scores).argmax(-1)
        drawn = normal.gather(-1, chosen[:, None])[:, 0].tolist()
        entropy = (normal.exp() * -normal).nan_to_num(0.0).sum(-1).tolist()
        tokens = chosen.tolist()
        for row, token in enumerate(tokens):
            if not alive[row]:
                continue
            answer = answers[owner[row]]
            if token in cut:
                alive[row] = False
                continue
            answer.ids.append(token)
            answer.log_probs.append(drawn[row])
            answer.entropy += entropy[row]
            if token in ends:
                answer.finished, alive[row] = True, False
        left = int(alive.sum())
        if left == 0 or step + 1 == sampling.max_new_tokens:
            break
        positions = positions + 1
        if 2 * left <= len(owner):  # rows that are done cost as much as others
            kept = alive.nonzero()[:, 0]
            there = kept.to(device)
            cache.batch_select_indices(there)
            mask, positions, chosen = mask[there], positions[:, there], chosen[there]
            owner = [owner[n] for n in kept.tolist()]
            if noise is not None:
                noise.generators = [noise.generators[n] for n in kept.tolist()]
            alive = torch.ones(left, dtype=torch.bool)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        asked = Batch({"position_ids": positions[:, :, None]}, {})
        out = text(
            inputs_embeds=embed(chosen[:, None]),
            position_ids=family.positions(asked, True),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, -1]
    found = iter(answers)
    return [[next(found) for _ in range(count)] for count in counts]


def answered(prompt: Sample, answers: Sequence[Answer]) -> Sample:
    """One sample of the prompt with each of its answers, whose tokens are learned; media are in it once."""
    ids, positions = prompt.tensors["input_ids"], prompt.tensors["position_ids"]
    parts: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "weights": [], "position_ids": []}
    for answer in answers:
        made = torch.tensor(answer.ids, dtype=torch.int64)
        start, count = len(ids) - 1, len(made)
        labels = torch.full((len(ids) + count,), IGNORE)
        labels[start : start + count] = made
        further = positions[:, -1:] + torch.arange(1, count + 1)
        parts["input_ids"].append(torch.cat([ids, made]))
        parts["labels"].append(labels)
        parts["weights"].append((labels != IGNORE).float())
        parts["position_ids"].append(torch.cat([positions, further], dim=1))
    tensors = {name: torch.cat(each, dim=-1) for name, each in parts.items()}
    lengths = tuple(len(each) for each in parts["input_ids"])
    trained = sum(len(answer.ids) for answer in answers)
    return replace(
        prompt,
        tensors={**prompt.tensors, **tensors},
        measure=SampleLengths(sum(lengths), trained),
        sequences=lengths,
        shared=any(stream.sizes in prompt.tensors for stream in prompt.streams),
    )


class PolicyActors(Actors):
    """What grpo's objective asks: answers of the model that it trains, their rewards, and log-probabilities
    of each of their tokens. step: of the run, of which random draws depend; set by the trainer."""

    step = 0

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.grpo = self.recipe.train.grpo
        self.rewards = Rewards(self.recipe.train.rewards)
        self.processor = self.layout.processor()
        self.tokenizer = self.processor.media.tokenizer
        family = self.layout.family
        self.ends = ends_of(family, self.tokenizer)
        self.cut = {each for stream in family.streams for each in family.media_ids(stream)}
        self.boxes = any(each.name in BOX_METRICS for each in self.recipe.train.rewards)

    def start(self, *args: Any) -> None:
        if self.grpo.kl:
            super().start(*args)

    # ---------------------------------------------------------------- log-probabilities of tokens

    def _finish(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        log_probs, rows = answer_log_probs(output, batch, self.grpo.temperature)
        whole = log_probs.new_zeros(batch["labels"].numel()).index_copy(0, rows.keep, log_probs)
        return whole.sum(), {"values": whole}

    def _own(self, values: Tensor, batch: Batch) -> Tensor:
        return values

    # ---------------------------------------------------------------- answers

    def rollout(self, batches: Sequence[Batch], greedy: bool = False) -> list[Rollout]:
        """The answers to each batch's prompts: train.grpo.group of them, or the likeliest one."""
        samples = [unpack(batch) for batch in batches]
        asked = [each for own in samples for each in own if each.row is not None]
        made = self._answers(asked, greedy)
        items = [self._item(s, a) for s, own in zip(asked, made, strict=True) for a in own]
        scores = self.rewards(items)
        for problem in scores.problems:
            say(f"warning: step {self.step}: {problem}", error=True)
        if not greedy:
            self._write(asked, made, scores)
        answers, at, out = iter(made), 0, []
        for own in samples:
            of = [next(answers) if each.row is not None else None for each in own]
            rollout, at = self._joined(own, of, scores, at)
            out.append(rollout)
        return out

    def _answers(self, asked: Sequence[Sample], greedy: bool) -> list[list[Answer]]:
        grpo, count = self.grpo, 1 if greedy else self.grpo.group
        sampling = Sampling(grpo.max_new_tokens, seed=self.recipe.train.seed)
        if not greedy:
            sampling = replace(sampling, temperature=grpo.temperature, top_p=grpo.top_p)
        each = max(1, grpo.rollout_rows // count)
        model, family = self.model.models[0], self.layout.family

        def work(whole: nn.Module) -> list[list[Answer]]:
            found = []
            with gathered(whole, self.recipe.parallel.reshards):
                for start in range(0, len(asked), each):
                    prompts = asked[start : start + each]
                    keys = [[f"{self.step}/{s.id}/{n}" for n in range(count)] for s in prompts]
                    found += generate(
                        whole, family, prompts, keys, sampling, self.ends, self.cut, self.device
                    )
            return found

        training = model.training
        self.model.train(False)
        try:
            with torch.no_grad():
                return model(work)
        finally:
            self.model.train(training)

    def _text(self, answer: Answer) -> str:
        ids = answer.ids[:-1] if answer.finished else answer.ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _item(self, sample: Sample, answer: Answer) -> Answered:
        row, text, boxes = sample.row or {}, self._text(answer), ""
        picture = next((m for m in row.get("media", ()) if m.kind == "image"), None)
        if self.boxes and picture is not None:
            size = media.image_size(picture.source)
            boxes = ", ".join(str(list(box)) for box in self.processor.boxes.found(text, *size))
        return Answered(
            text,
            row.get("prompt", ""),
            tuple(row.get("answers", ())),
            row.get("options", {}),
            tuple(row.get("media", ())),
            row.get("columns", {}),
            boxes,
        )

    def _joined(
        self, samples: list[Sample], answers: Sequence[list[Answer] | None], scores: Scores, at: int
    ) -> tuple[Rollout, int]:
        """Samples with their answers as a Rollout; at: of their scores, the first; and of the next ones."""
        rewards = len(self.rewards.names)
        whole, flat, places = [], [], []
        for sample, own in zip(samples, answers, strict=True):
            whole.append(sample if own is None else answered(sample, own))
            flat += [None] if own is None else own
            places += [-1] if own is None else range(at, at + len(own))
            at += 0 if own is None else len(own)
        known = torch.tensor([place >= 0 for place in places])
        own_scores = torch.tensor([place for place in places if place >= 0], dtype=torch.int64)
        total = torch.full((len(places),), math.nan, dtype=torch.float64)
        values = torch.full((len(places), rewards), math.nan, dtype=torch.float64)
        failed = torch.zeros(len(places), rewards, dtype=torch.bool)
        total[known], values[known], failed[known] = (
            t[own_scores] for t in (scores.total, scores.values, scores.failed)
        )
        batch = pack(whole)
        wide = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        sampled = torch.zeros(batch["labels"].numel(), dtype=wide)
        drawn = [value for each in flat if each is not None for value in each.log_probs]
        sampled[(batch["labels"][0] != IGNORE)] = torch.tensor(drawn, dtype=wide)
        rollout = Rollout(
            batch,
            total,
            values,
            failed,
            torch.tensor([each is None or each.finished for each in flat]),
            torch.tensor([-1 if each is None else len(each.ids) for each in flat]),
            sampled,
            sum(each.entropy for each in flat if each is not None),
        )
        return rollout, at

    def _write(self, asked: Sequence[Sample], made: Sequence[list[Answer]], scores: Scores) -> None:
        """A few prompts with all of their answers, into <run>/rollouts.jsonl."""
        every = self.grpo.log_every
        if self.mesh.rank or not every or self.step % every:
            return
        lines, at = [], 0
        for sample, own in zip(asked[:SHOWN], made, strict=False):
            row, said = sample.row or {}, []
            for n, answer in enumerate(own, at):
                values = dict(zip(self.rewards.names, map(_number, scores.values[n].tolist()), strict=True))
                said.append(
                    {
                        "text": self._text(answer),
                        "tokens": len(answer.ids),
                        "finished": answer.finished,
                        "reward": _number(float(scores.total[n])),
                        "rewards": values,
                    }
                )
            at += len(own)
            line = {"step": self.step, "where": row.get("where", ""), "prompt": row.get("prompt", "")}
            lines.append(json.dumps({**line, "answers": row.get("answers", ()), "made": said}) + "\n")
        self.recipe.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.recipe.run_dir / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
