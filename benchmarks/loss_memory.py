"""Peak memory of the loss at 8k tokens: our chunked head against whole logits and torch's cross entropy.

    python benchmarks/loss_memory.py [--tokens 8192] [--width 512] [--vocabulary 151936] [--json FILE]

Each variant runs forward and backward in a process of its own; what is compared is the rise of that process's
peak resident set over its value just before the loss. Wanted: at most 0.35 of the whole logits'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


def peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def one(variant: str, tokens: int, width: int, vocabulary: int) -> dict:
    from polymodal.objectives.language import head_loss

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False)
    labels = torch.randint(0, vocabulary, (tokens,))
    head.weight.grad = torch.zeros_like(head.weight)  # exists in any case: not part of the loss's own memory
    before, began = peak(), time.process_time()
    if variant == "whole":
        loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum") / tokens
    else:
        loss = head_loss(hidden, head, labels, torch.ones(tokens))[0] / tokens
    loss.backward()
    return {
        "bytes": peak() - before,
        "seconds": time.process_time() - began,
        "loss": loss.item(),
        "gradient": hidden.grad.norm().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.tokens, args.width, args.vocabulary)))
        return
    results = {}
    for variant in ("whole", "chunked"):
        words = [
            sys.executable,
            __file__,
            "--one",
            variant,
            "--tokens",
            str(args.tokens),
            "--width",
            str(args.width),
            "--vocabulary",
            str(args.vocabulary),
        ]
        results[variant] = json.loads(
            subprocess.run(words, check=True, capture_output=True, text=True).stdout
        )
    whole, chunked = results["whole"], results["chunked"]
    assert abs(whole["loss"] - chunked["loss"]) < 1e-4 * abs(whole["loss"]), "the two losses differ"
    ratio = chunked["bytes"] / whole["bytes"]
    out = {
        "tokens": args.tokens,
        "vocabulary": args.vocabulary,
        "ratio": ratio,
        "wanted": 0.35,
        "seconds_ratio": chunked["seconds"] / whole["seconds"],
        **results,
    }
    print(
        f"loss at {args.tokens} tokens, vocabulary {args.vocabulary}: {chunked['bytes'] / 2**30:.2f} GiB against {whole['bytes'] / 2**30:.2f} GiB = {ratio:.2f} (wanted <= 0.35); time {out['seconds_ratio']:.2f} x"
    )
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
