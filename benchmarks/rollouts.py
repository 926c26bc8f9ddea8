"""Tokens a CPU second of a training model's own answers (train/rollout.py) beside transformers' generate.

    python benchmarks/rollouts.py [--checkpoint DIR] [--prompts 8] [--group 8] [--tokens 32]

Both sample the same number of tokens for the same rows of one batch, from the same weights in float32, with
pictures: transformers' generate reads every row's prompt and picture, ours one of each group. Without a checkpoint the
small random Qwen2.5-VL of the demonstrations is made. Medians of several runs; time is the process's on all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from polymodal.core.sample import pack
from polymodal.generate.sampling import Sampling
from polymodal.models import catalog, weights
from polymodal.recipe import Recipe
from polymodal.train.layouts import layout_of
from polymodal.train.rollout import generate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(measure(args, Path(made)), indent=1))


def measure(args: argparse.Namespace, root: Path) -> dict[str, float]:
    import build

    train, _ = build.data(root / "data", held_out=1700)
    rows = json.loads(train.read_text())
    source = args.checkpoint or build.model(
        root / "model", [m["content"] for row in rows for m in row["messages"]]
    )
    recipe = Recipe.model_validate(
        {
            "model": {"source": str(source)},
            "data": {"datasets": [{"path": str(train)}], "max_length": 8192},
            "train": {
                "objective": "grpo",
                "precision": "fp32",
                "grpo": {"group": args.group, "max_new_tokens": args.tokens},
                "rewards": [{"name": "exact"}],
            },
        }
    )
    family = catalog.family(recipe.model)
    layout = layout_of(recipe, family)
    processor, corpus = layout.processor(), layout.corpus(layout.datasets("datasets"), recipe.data)
    with_picture = [i for i in range(len(corpus)) if corpus[i].media][: args.prompts]
    prompts = [processor.sample(corpus[i], i) for i in with_picture]
    model = family.build()
    weights.load(model.eval(), family)
    count, device = args.group * len(prompts), torch.device("cpu")

    def ours() -> int:
        keys = [[f"{p.id}/{n}" for n in range(args.group)] for p in prompts]
        sampling = Sampling(args.tokens, temperature=1.0)
        found = generate(model, family, prompts, keys, sampling, set(), set(), device)
        return sum(len(answer.ids) for own in found for answer in own)

    inputs = left_padded(model, prompts, args.group)
    config = GenerationConfig(
        max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=True, top_k=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model.generation_config = config

    @torch.no_grad()
    def theirs() -> int:
        out = model.generate(**inputs, generation_config=config)
        return count * (out.shape[1] - inputs["input_ids"].shape[1])

    result: dict[str, float] = {"rows": count, "tokens": args.tokens}
    for name, call in (("polymodal", ours), ("transformers", theirs)):
        rates = []
        for _ in range(args.runs + 1):
            began = time.process_time()
            made = call()
            rates.append(made / (time.process_time() - began))
        result[name] = round(statistics.median(rates[1:]), 1)
    return result | {"factor": round(result["polymodal"] / result["transformers"], 2)}


def left_padded(model: nn.Module, prompts: list, group: int) -> dict[str, torch.Tensor]:
    """The prompts, each `group` times, as transformers' generate takes them."""
    batch = pack(prompts)
    parts = [prompt.tensors["input_ids"] for prompt in prompts]
    longest = max(map(len, parts))
    ids = torch.stack([nn.functional.pad(part, (longest - len(part), 0)) for part in parts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(part)).long() for part in parts])
    kinds = (ids == model.config.image_token_id).int()
    every = torch.arange(len(prompts)).repeat_interleave(group)
    rows = batch["pixel_values"].split(batch["grid_thw"].prod(1).tolist())
    return {
        "input_ids": ids[every],
        "attention_mask": mask[every],
        "mm_token_type_ids": kinds[every],
        "pixel_values": torch.cat([rows[n] for n in every.tolist()]),
        "image_grid_thw": batch["grid_thw"][every],
    }


if __name__ == "__main__":
    main()
