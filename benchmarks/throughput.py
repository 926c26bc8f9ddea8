"""Useful tokens a second, from files to optimizer step: ours against the transformers Trainer, TRL and a bare loop.

    python benchmarks/throughput.py [--rounds 2] [--precision fp32] [--json FILE]

One Qwen2.5-VL of about 40 M parameters (vocabulary 151,936), one data set with a realistic spread of lengths (text
only to several pictures), the same rows, one process on the same cores. Variants run one after the other, A B A B;
each figure is the median over rounds. A useful token is one that is not padding. TRL is measured when it is
installed; it refuses to pack pictures, so it runs with its own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "digits"))

VARIANTS = ("ours", "bare", "trainer", "trainer-grouped", "trl")
WANTED = {"trainer": 2.0, "trainer-grouped": 1.3, "trl": 1.0, "bare": 1 / 1.03}
BATCH = 8  # samples a step of the padded trainers
PACKS, PACK = 2, 2048  # our step: as many packed sequences of so many tokens


def build(root: Path, rows: int) -> None:
    """The checkpoint and train.json: log-normal text lengths, none to four pictures of several sizes."""
    import build as digits
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    draw = random.Random(0)
    words = Path(random.__file__).read_text().split()  # real words: the text of a module of Python
    scenes = [Image.fromarray(image) for image in load_sample_images().images]
    (root / "images").mkdir(parents=True)
    data = []
    for i in range(rows):
        count = draw.choices([0, 1, 2, 4], [3, 4, 2, 1])[0]
        row: dict = {"images": []}
        for k in range(count):
            width, height = draw.choice([(112, 112), (168, 112), (224, 168), (280, 224)])
            x, y = draw.randrange(640 - width), draw.randrange(427 - height)
            name = f"images/{i}-{k}.jpg"
            draw.choice(scenes).crop((x, y, x + width, y + height)).save(root / name)
            row["images"].append(name)
        start = draw.randrange(len(words) - 400)
        question = " ".join(words[start : start + int(min(250, draw.lognormvariate(2.8, 0.8)))])
        answer = " ".join(words[start + 100 : start + 100 + int(min(250, 1 + draw.lognormvariate(3.2, 0.9)))])
        row["messages"] = [
            {"role": "user", "content": "<image>" * count + question},
            {"role": "assistant", "content": answer},
        ]
        data.append(row)
    (root / "train.json").write_text(json.dumps(data))
    small = digits.model(root / "small", [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)])
    config = AutoConfig.from_pretrained(small)
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers = 151_936, 192, 768, 8
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    text.rope_parameters["mrope_section"] = [4, 10, 10]
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.out_hidden_size = 256, 768, 6, 192
    vision.window_size, vision.fullatt_block_indexes = 112, [2, 5]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(root / "model")
    AutoProcessor.from_pretrained(small).save_pretrained(root / "model")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {rows} rows", flush=True)


def ours(root: Path, steps: int, precision: str, out: Path) -> dict:
    """The trainer as a user starts it; figures from its own metrics, the first two steps left out."""
    from polymodal import recipe as recipes
    from polymodal.train import trainer

    recipe = recipes.validate({
        "name": "throughput", "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.json")}], "max_length": PACK, "pack_length": PACK, "workers": 1},
        "train": {"steps": steps, "global_batch_size": PACKS, "precision": precision}, "optim": {"lr": 1e-4},
        "checkpoint": {"dir": str(out), "every": 0, "save": "weights", "resume": "never"}, "monitor": {"trackers": []},
    })  # fmt: skip
    trainer.run(recipe)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
    seconds = sum(m["seconds"] for m in lines)
    return {
        "tokens": sum(m["tokens_per_second"] * m["seconds"] for m in lines),
        "seconds": seconds,
        "wait": sum(m["wait_seconds"] for m in lines),
    }


def bare(root: Path, steps: int, precision: str, out: Path) -> dict:
    """A loop over the same packed batches, made beforehand, with the library's pieces and nothing around them."""
    import torch

    from polymodal import recipe as recipes
    from polymodal.device import find
    from polymodal.launch import runtime
    from polymodal.train.step import inverse_weights
    from polymodal.train.trainer import Trainer

    find("cpu")
    recipe = recipes.validate({
        "name": "bare", "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(root / "train.json")}], "max_length": PACK, "pack_length": PACK, "workers": 0},
        "train": {"steps": steps, "global_batch_size": PACKS, "precision": precision}, "optim": {"lr": 1e-4},
        "checkpoint": {"dir": str(out), "resume": "never"}, "monitor": {"trackers": []},
    })  # fmt: skip
    from polymodal.data.loader import Loader

    with runtime(recipe) as rt:
        t = Trainer(recipe, rt)
        loader = Loader(t.schedule, t.corpus, t.chat, recipe.data, stop_after=steps, rows=t.chat.media.rows)
        batches = list(loader)
        optimizer = torch.optim.AdamW(t.model.parameters(), lr=1e-4, fused=True)
        tokens = seconds = 0.0
        for i, step in enumerate(batches):
            began = time.perf_counter()
            inverse = inverse_weights(t.objective, step.micro_batches, None)
            for batch in step.micro_batches:
                t.model(batch, lambda output, b: t.objective.loss(output, b, inverse))[0].backward()  # noqa: B023
            torch.nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if i >= 2:
                seconds += time.perf_counter() - began
                tokens += step.stats.tokens
        t.close()
    return {"tokens": tokens, "seconds": seconds}


class Rows:
    """The same file as a map dataset for the padded trainers; `lengths` for length grouping."""

    def __init__(self, root: Path):
        self.root = root
        self.rows = json.loads((root / "train.json").read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        return {"row": row, "length": len(str(row["messages"])) + 200 * len(row["images"])}


def _messages(row: dict, root: Path) -> tuple[list, list]:
    from PIL import Image

    pictures = [Image.open(root / name) for name in row["images"]]
    question, answer = row["messages"][0]["content"].replace("<image>", ""), row["messages"][1]["content"]
    content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ], pictures


def huggingface(root: Path, steps: int, precision: str, out: Path, grouped: bool) -> dict:
    """The transformers Trainer with its defaults and the usual VLM collator; loss on the answers."""
    import torch
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    processor = AutoProcessor.from_pretrained(root / "model")
    model = AutoModelForImageTextToText.from_pretrained(root / "model")
    start = processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
    counted = {"tokens": 0.0}

    def collate(items: list) -> dict:
        chats = [_messages(item["row"], root)[0] for item in items]
        batch = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(batch["input_ids"].tolist()):
            at = max(k for k in range(len(row)) if row[k : k + len(start)] == start) + len(start)
            labels[i, at:] = batch["input_ids"][i, at:]
        labels[batch["attention_mask"] == 0] = -100
        counted["tokens"] += float(batch["attention_mask"].sum())
        return {**batch, "labels": labels}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.began, self.tokens = time.perf_counter(), counted["tokens"]
            if state.global_step == steps:
                self.seconds, self.end = time.perf_counter() - self.began, counted["tokens"]

    clock = Clock()
    options = (
        {"train_sampling_strategy": "group_by_length", "length_column_name": "length"} if grouped else {}
    )
    args = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4, report_to=[], save_strategy="no",
        remove_unused_columns=False, bf16=precision == "bf16", use_cpu=True, disable_tqdm=True, logging_steps=1000, **options,
    )  # fmt: skip
    Trainer(
        model=model, args=args, train_dataset=Rows(root), data_collator=collate, callbacks=[clock]
    ).train()
    return {"tokens": clock.end - clock.tokens, "seconds": clock.seconds}


def trl(root: Path, steps: int, precision: str, out: Path) -> dict:
    """TRL's SFTTrainer with its own collator and defaults."""
    from datasets import Dataset, Features, Image, List, Value
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    table = []
    for row in json.loads((root / "train.json").read_text()):
        text = row["messages"][0]["content"].replace("<image>", "")
        table.append({
            "images": [str(root / name) for name in row["images"]], "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": row["messages"][1]["content"]}],
        })  # fmt: skip
    turn = List({"role": Value("string"), "content": Value("string")})
    data = Dataset.from_list(
        table, features=Features({"images": List(Image()), "prompt": turn, "completion": turn})
    )
    counted = {"tokens": 0.0}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.began, self.tokens = time.perf_counter(), counted["tokens"]
            if state.global_step == steps:
                self.seconds, self.end = time.perf_counter() - self.began, counted["tokens"]

    clock = Clock()
    config = SFTConfig(
        output_dir=str(out), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4, report_to=[], save_strategy="no",
        bf16=precision == "bf16", use_cpu=True, disable_tqdm=True, logging_steps=1000, max_length=None,
    )  # fmt: skip
    trainer = SFTTrainer(model=str(root / "model"), args=config, train_dataset=data, callbacks=[clock])
    inner = trainer.data_collator

    def collate(items: list) -> dict:
        batch = inner(items)
        counted["tokens"] += float(batch["attention_mask"].sum())
        return batch

    trainer.data_collator = collate
    trainer.train()
    return {"tokens": clock.end - clock.tokens, "seconds": clock.seconds}


def one(variant: str, root: Path, steps: int, precision: str, out: Path) -> dict:
    if variant == "ours":
        return ours(root, steps, precision, out)
    if variant == "bare":
        return bare(root, steps, precision, out)
    if variant == "trl":
        return trl(root, steps, precision, out)
    return huggingface(root, steps, precision, out, grouped=variant == "trainer-grouped")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as out:
            result = one(args.one, args.root, args.steps, args.precision, Path(out) / "run")
        print("RESULT " + json.dumps(result), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "ground"
        build(root, args.rows)
        rates: dict[str, list[float]] = {}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        for number in range(args.rounds):
            for variant in args.variants:
                words = [
                    sys.executable,
                    __file__,
                    "--one",
                    variant,
                    "--root",
                    str(root),
                    "--steps",
                    str(args.steps),
                    "--precision",
                    args.precision,
                ]
                done = subprocess.run(words, env=environment, capture_output=True, text=True)
                found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not found:
                    print(f"{variant}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", flush=True)
                    continue
                result = json.loads(found[-1][7:])
                rates.setdefault(variant, []).append(result["tokens"] / result["seconds"])
                print(f"round {number + 1} {variant}: {rates[variant][-1]:.0f} useful tokens/s", flush=True)
    median = {k: statistics.median(v) for k, v in rates.items()}
    out = {"precision": args.precision, "tokens_per_second": median, "rounds": rates, "ratio": {}}
    for variant, wanted in WANTED.items():
        if variant in median and "ours" in median:
            out["ratio"][variant] = median["ours"] / median[variant]
            print(f"ours / {variant}: {out['ratio'][variant]:.2f} (wanted >= {wanted:.2f})")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
