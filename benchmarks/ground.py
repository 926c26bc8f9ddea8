"""What the benchmarks of training share: one small Qwen2.5-VL, one set of data, one recipe, and runs in turns.

The model is the library's class with random weights: about 40 million parameters, three quarters of them the head of
151,936 words. The data are conversations of real words about crops of real photographs; lengths spread as a mix of
text-only rows and rows with one to four pictures has them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "digits"))

LONGEST = 1024  # tokens of a sample
PACK = 2048  # tokens of a packed sequence
SIZES = ((112, 112), (168, 112), (224, 168), (280, 224))  # of pictures in pixels: 16 to 80 tokens
PICTURES, SHARES = (0, 1, 2, 4), (3, 4, 2, 1)  # how many a row has, and how often


def words() -> list[str]:
    """Real words in real order: the sources of a few modules of Python."""
    import inspect
    import logging
    import typing

    modules = (random, argparse, inspect, logging, typing, statistics, subprocess)
    return [w for m in modules for w in Path(str(m.__file__)).read_text(encoding="utf-8").split()]


def conversation(draw: random.Random, text: list[str], pictures: int) -> list[dict]:
    """A question of log-normal length, median 16 words, and an answer of median 24; both at most 120 words."""
    start = draw.randrange(len(text) - 400)
    question, answer = (int(min(120, 1 + draw.lognormvariate(mu, 0.9))) for mu in (2.8, 3.2))
    return [
        {"role": "user", "content": "<image>" * pictures + " ".join(text[start : start + question])},
        {"role": "assistant", "content": " ".join(text[start + 200 : start + 200 + answer])},
    ]


def write_checkpoint(directory: Path) -> Path:
    """The model in the hub's format, with a byte-level BPE of 8,192 words trained on the same text."""
    import build as digits
    import torch
    import transformers as hf

    text = words()
    texts = [" ".join(text[i : i + 50]) for i in range(0, len(text), 50)]
    fast = digits.tokenizer(texts, vocabulary=8192)
    ids = {name: fast.convert_tokens_to_ids(name) for name in digits.SPECIALS}
    config = hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 10, 10]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": 192, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [2, 5], "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
    size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=size), tokenizer=fast,
        video_processor=hf.Qwen2VLVideoProcessor(size=size), chat_template=digits.TEMPLATE,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def photographs() -> list[Any]:
    """uint8 [427, 640, 3]: scikit-learn's two, or smooth noise where it is not installed."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        import numpy as np
        from PIL import Image

        draw = np.random.default_rng(0)
        small = (Image.fromarray(draw.integers(0, 256, (27, 40, 3), dtype=np.uint8)) for _ in range(2))
        return [np.asarray(each.resize((640, 427), Image.Resampling.BICUBIC)) for each in small]
    return list(load_sample_images().images)


def write_data(directory: Path, rows: int, pictures: Sequence[int] = PICTURES, seed: int = 0) -> Path:
    """train.json in the MLLM JSON format, and its pictures: JPEG crops of scikit-learn's two photographs."""
    from PIL import Image

    draw, text = random.Random(seed), words()
    scenes = [Image.fromarray(image) for image in photographs()]
    (directory / "images").mkdir(parents=True, exist_ok=True)
    data = []
    for i in range(rows):
        count = draw.choices(pictures, SHARES[: len(pictures)])[0]
        names = []
        for k in range(count):
            scene, (width, height) = draw.choice(scenes), draw.choice(SIZES)
            x, y = draw.randrange(scene.width - width), draw.randrange(scene.height - height)
            names.append(f"images/{i}-{k}.jpg")
            scene.crop((x, y, x + width, y + height)).save(directory / names[-1])
        data.append({"messages": conversation(draw, text, count), "images": names})
    path = directory / "train.json"
    path.write_text(json.dumps(data))
    return path


def recipe(
    root: Path, data: Path, out: Path, steps: int, precision: str = "fp32", packs: int = 1, workers: int = 1
) -> Any:
    """Full fine-tuning as a user would write it, without checkpoints on the way."""
    from polymodal import recipe as recipes

    return recipes.validate({
        "name": "benchmark", "model": {"source": str(root / "model")},
        "data": {"datasets": [{"path": str(data)}], "max_length": LONGEST, "pack_length": PACK, "workers": workers},
        "train": {"steps": steps, "global_batch_size": packs, "precision": precision}, "optim": {"lr": 1e-4},
        "checkpoint": {"dir": str(out), "every": 0, "save": "weights", "resume": "never"}, "monitor": {"trackers": []},
    })  # fmt: skip


def one_rank(name: str, title: str | None) -> argparse.Namespace:
    """Options of a benchmark of one training step in one process."""
    parser = argparse.ArgumentParser(
        name, description=title, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="the first two are not counted")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextmanager
def opened(chosen: Any, steps: int) -> Iterator[tuple[Any, list[Any]]]:
    """The trainer of a recipe on one core, and the steps of its first batches, made beforehand."""
    from polymodal.runtime import environment

    environment.apply(chosen.device)
    import torch

    from polymodal.runtime.process_group import runtime
    from polymodal.train.trainer import Trainer

    with runtime(chosen) as rt:
        torch.set_num_threads(1)
        made = Trainer(chosen, rt)
        yield made, list(made.feed.loader(stop_after=steps))
        made.close()


@contextmanager
def trainer(args: argparse.Namespace) -> Iterator[tuple[Any, list[Any]]]:
    """`opened` with the small language model and the options of one_rank."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_checkpoint(root / "model")
        data = write_data(root / "mixed", args.rows)
        chosen = recipe(root, data, root / "run", args.steps, args.precision, workers=0)
        with opened(chosen, args.steps) as found:
            yield found


def alternate(
    script: str,
    variants: Sequence[str],
    rounds: int,
    words: Sequence[str],
    figure: Callable[[dict], float],
    threads: int,
) -> dict[str, list[float]]:
    """Each variant in a process of its own, in turns (A B A B): `script --one VARIANT *words` prints RESULT {json}.

    Returns the figure of each run by variant; prints it. A variant that fails is reported with its last line and left out.
    """
    fixed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **fixed}
    out: dict[str, list[float]] = {}
    for number in range(rounds):
        for variant in variants:
            done = subprocess.run(
                [sys.executable, script, "--one", variant, *words],
                env=environment,
                capture_output=True,
                text=True,
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                print(f"{variant}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", flush=True)
                continue
            result = json.loads(found[-1].removeprefix("RESULT "))
            out.setdefault(variant, []).append(figure(result))
            print(f"round {number + 1}, {variant}: {out[variant][-1]:.0f} ({json.dumps(result)})", flush=True)
    return out


def spread(values: Sequence[float]) -> str:
    """Half of largest less smallest over the median, as ± percent."""
    return f"± {50 * (max(values) - min(values)) / statistics.median(values):.0f} %"


def add_to(path: Path, tables: dict[str, dict], **facts: Any) -> None:
    """Writes facts and tables as JSON; rows of a table that an earlier run left in the file stay beside new ones."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {name: {**before.get(name, {}), **rows} for name, rows in tables.items()}
    path.write_text(json.dumps({**facts, **merged}, indent=1) + "\n")
