"""Useful tokens a second, from files to optimizer step: Polymodal against the transformers Trainer and TRL.

    python benchmarks/throughput.py [--rounds 2] [--steps 6] [--precision fp32|bf16] [--variants ours trl] [--json FILE]

Same checkpoint (about 40 million parameters, vocabulary 151,936), same rows, same cores, same dtype, same learning
rate, about as many samples a step; each run in a process of its own on one core, in turns: A B A B, timed in CPU
seconds of all its processes, so that other work on the machine counts little (--clock seconds takes the wall's; then
give --threads the cores). The first step of a run is left out. A useful token is one that is not padding. The others run as their documentation shows a vision-language
model: the Trainer with its defaults and a collator that calls the processor, then with length grouping; SFTTrainer
with its own collator, gradient checkpointing off as everywhere here. TRL refuses to pack pictures and to train them
without padding; so its packing is compared on text alone, in turns of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ground

MIXED = ("ours", "trainer", "trainer-grouped", "trl")
TEXT = ("ours-text", "trl-text-packed")
WANTED = {"trainer": 2.0, "trainer-grouped": 1.3, "trl": 1.0, "trl-text-packed": 1.0}
BATCH = 8  # samples a step of the others; ours packs about as many into one sequence of 2,048 tokens
SKIPPED = 1  # step


def ours(root: Path, data: Path, steps: int, precision: str, out: Path) -> dict:
    """The trainer as a user starts it. CPU seconds: of its process, and what its worker took to make these batches."""
    from polymodal.runtime import environment

    recipe = ground.recipe(root, data, out, steps, precision)
    environment.apply(recipe.device)  # as the command does before torch starts
    from polymodal.runtime.process_group import runtime
    from polymodal.train.trainer import Trainer

    marks: list[tuple[float, float, float]] = []  # after each step: clock, CPU clock, seconds of the worker
    tokens = 0.0

    class Timed(Trainer):
        def _step(self, step, batch, began):
            nonlocal tokens
            stopping = super()._step(step, batch, began)
            tokens += batch.stats.tokens * (step > SKIPPED)
            made = batch.stats.make_seconds + (marks[-1][2] if marks else 0.0)
            marks.append((time.perf_counter(), time.process_time(), made))
            return stopping

    with runtime(recipe) as rt:
        trainer = Timed(recipe, rt)
        trainer.train()
        trainer.close()
    wall, cpu, made = (b - a for a, b in zip(marks[SKIPPED - 1], marks[-1], strict=True))
    return {"tokens": tokens, "seconds": wall, "cpu_seconds": cpu + made, "of_data": made}


class Clock:
    """Tokens and seconds of a transformers trainer between the end of step SKIPPED and its last one.

    `collate` counts what a batch brings; the trainers make one batch ahead at most, the same number at both ends.
    """

    def __init__(self, inner: Any):
        self.inner, self.batches, self.marks = inner, [], []

    def __call__(self, items: list) -> dict:
        batch = self.inner(items)
        mask = batch.get("attention_mask")
        self.batches.append(float(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch

    def callback(self, steps: int) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step in (SKIPPED, steps):
                    clock.marks.append((time.perf_counter(), time.process_time()))

        return Watch()

    def result(self, steps: int) -> dict:
        wall, cpu = (b - a for a, b in zip(*self.marks, strict=True))
        return {"tokens": sum(self.batches[SKIPPED:steps]), "seconds": wall, "cpu_seconds": cpu}


def options(out: Path, steps: int, precision: str) -> dict[str, Any]:
    return {
        "output_dir": str(out), "per_device_train_batch_size": BATCH, "max_steps": steps, "learning_rate": 1e-4, "report_to": [],
        "save_strategy": "no", "bf16": precision == "bf16", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1000,
    }  # fmt: skip


def huggingface(root: Path, data: Path, steps: int, precision: str, out: Path, grouped: bool) -> dict:
    """The transformers Trainer with its defaults and the usual collator; loss on the answers, as ours."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    processor = AutoProcessor.from_pretrained(root / "model")
    model = AutoModelForImageTextToText.from_pretrained(root / "model", dtype=torch.float32)
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    rows = json.loads(data.read_text())
    lengths = [  # measured beforehand: it costs this trainer nothing
        len(processor.tokenizer("".join(m["content"] for m in row["messages"]))["input_ids"])
        + sum((image.width // 28) * (image.height // 28) for image in (Image.open(data.parent / name) for name in row["images"]))
        for row in rows
    ]  # fmt: skip
    table = Dataset.from_dict({"row": [json.dumps(row) for row in rows], "length": lengths})

    def messages(row: dict) -> list[dict]:
        question = row["messages"][0]["content"].replace("<image>", "")
        content: list[dict] = [
            {"type": "image", "image": Image.open(data.parent / name)} for name in row["images"]
        ]
        return [
            {"role": "user", "content": [*content, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["messages"][1]["content"]}]},
        ]

    def collate(items: list) -> dict:
        batch = processor.apply_chat_template(
            [messages(json.loads(item["row"])) for item in items], tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        labels = torch.full_like(batch["input_ids"], -100)
        for i, ids in enumerate(batch["input_ids"].tolist()):
            at = max(k for k in range(len(ids)) if ids[k : k + len(start)] == start) + len(start)
            labels[i, at:] = batch["input_ids"][i, at:]
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}

    clock = Clock(collate)
    chosen: dict[str, Any] = (
        {"train_sampling_strategy": "group_by_length", "length_column_name": "length"} if grouped else {}
    )
    arguments = TrainingArguments(remove_unused_columns=False, **chosen, **options(out, steps, precision))
    Trainer(
        model=model, args=arguments, train_dataset=table, data_collator=clock, callbacks=[clock.callback(steps)]
    ).train()  # fmt: skip
    return clock.result(steps)


def trl(root: Path, data: Path, steps: int, precision: str, out: Path, packed: bool) -> dict:
    """TRL's SFTTrainer: with pictures its own collator, on text alone its packing; loss on the answers."""
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    table: list[dict] = []
    for row in json.loads(data.read_text()):
        text = row["messages"][0]["content"].replace("<image>", "")
        table.append({
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": row["messages"][1]["content"]}],
            **({} if packed else {"images": [str(data.parent / name) for name in row["images"]]}),
        })  # fmt: skip
    turn = List({"role": Value("string"), "content": Value("string")})
    features = {"prompt": turn, "completion": turn, **({} if packed else {"images": List(Image())})}
    rows = Dataset.from_list(table, features=Features(features))
    chosen: dict[str, Any] = options(out, steps, precision) | {"gradient_checkpointing": False}
    chosen |= (
        {"packing": True, "max_length": ground.PACK, "per_device_train_batch_size": 1}
        if packed
        else {"max_length": None}
    )
    arguments = SFTConfig(model_init_kwargs={"dtype": "float32"}, **chosen)
    given = {"processing_class": AutoTokenizer.from_pretrained(root / "model")} if packed else {}
    trainer = SFTTrainer(model=str(root / "model"), args=arguments, train_dataset=rows, **given)
    clock = Clock(trainer.data_collator)
    trainer.data_collator = clock
    trainer.add_callback(clock.callback(steps))
    trainer.train()
    return clock.result(steps)


def one(variant: str, root: Path, steps: int, precision: str, out: Path) -> dict:
    data = root / ("text" if "text" in variant else "mixed") / "train.json"
    if variant.startswith("ours"):
        return ours(root, data, steps, precision, out)
    if variant.startswith("trl"):
        return trl(root, data, steps, precision, out, packed="packed" in variant)
    return huggingface(root, data, steps, precision, out, grouped="grouped" in variant)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="of each run, the first not counted")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of each run; 1 with --clock cpu_seconds: waiting threads burn CPU",
    )
    parser.add_argument(
        "--clock",
        default="cpu_seconds",
        choices=["cpu_seconds", "seconds"],
        help="the shared machine's, or the wall's",
    )
    parser.add_argument("--variants", nargs="*", default=[*MIXED, *TEXT], choices=[*MIXED, *TEXT])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as out:
            result = one(args.one, args.root, args.steps, args.precision, Path(out) / "run")
        print("RESULT " + json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        ground.write_checkpoint(root / "model")
        ground.write_data(root / "mixed", args.rows)
        ground.write_data(root / "text", 2 * args.rows, pictures=(0,))
        words = ["--root", str(root), "--steps", str(args.steps), "--precision", args.precision]
        rates: dict[str, list[float]] = {}
        for turns in (MIXED, TEXT):
            chosen = [v for v in turns if v in args.variants]
            rates |= ground.alternate(
                __file__, chosen, args.rounds, words, lambda r: r["tokens"] / r[args.clock], args.threads
            )
    ratio, spread = {}, {variant: ground.spread(values) for variant, values in rates.items()}
    for variant, wanted in WANTED.items():
        base = "ours-text" if "text" in variant else "ours"
        if variant in rates and base in rates:
            ratio[variant] = statistics.median(rates[base]) / statistics.median(rates[variant])
            print(
                f"ours / {variant}: {ratio[variant]:.2f} (wanted >= {wanted}; runs within {spread[base]} and {spread[variant]})"
            )
    if args.json:
        tables = {"ratio": ratio, "rounds": rates, "spread": spread}
        ground.add_to(args.json, tables, precision=args.precision, clock=args.clock, threads=args.threads)


if __name__ == "__main__":
    main()
