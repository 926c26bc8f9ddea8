"""What the demonstrations with digits share: scikit-learn's scans, a tokenizer of words, the command, results.

Each demonstration adds this directory to sys.path and keeps for itself what it shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TRAIN = 1500  # scans to learn from; the other 297 are held out


def scans() -> tuple[np.ndarray, np.ndarray]:
    """(1,797 scans of 8 x 8 in 0..1, their digits), in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 16.0).astype(np.float32), found.target[order]


def tokenizer(words: Sequence[str], length: int) -> Any:
    """A word-level tokenizer of these words, of prompts of at most `length` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "</s>", "<unk>", *words]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def polymodal(*words: str) -> None:
    """A command, as a user would type it."""
    subprocess.run([sys.executable, "-m", "polymodal", *words], check=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def fitted(features: np.ndarray, digits: np.ndarray) -> Any:
    """A classifier of digits; features [N, 64] in 0..1."""
    from sklearn.svm import SVC

    return SVC(C=10, gamma=0.05).fit(features, digits)


def nearest(queries: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number, distance) of the nearest row of `known` to each query."""
    distances = np.sqrt(np.square(queries[:, None] - known[None]).sum(-1))
    return distances.argmin(1), distances.min(1)


def parameters(pipeline: Path) -> int:
    """Parameters of a pipeline's denoiser."""
    from safetensors import safe_open

    file = str(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    with safe_open(file, framework="pt") as weights:
        return sum(int(np.prod(weights.get_slice(key).get_shape())) for key in sorted(weights.keys()))


def write_result(path: Path, result: dict) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, path)
