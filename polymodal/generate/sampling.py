"""How the next token is chosen: options, and random draws that belong to a question, not to its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polymodal.core.errors import PolymodalError


class Noise(LogitsProcessor):
    """Adds Gumbel noise, so that the largest score is a sample of softmax(scores) (Gumbel 1954, "Gumbel-max
    trick").

    Each row has its own generator: its draws do not depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self.generators]
        )
        return scores.float() - waits.clamp_min_(1e-30).log_().to(scores.device)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 = greedy; top_k 0 and top_p 1 = no cut."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no cut) or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 = none)"),
        }
        for name, (good, rule) in rules.items():
            if not good:
                raise PolymodalError(
                    f"{name} = {getattr(self, name)} is not possible.", f"Give a value of {rule}."
                )

    def processors(self, keys: Sequence[str]) -> LogitsProcessorList:
        """Processors of a batch's scores before the largest is taken; `keys` name the rows' draws."""
        chain = LogitsProcessorList()
        if self.temperature > 0:
            if self.temperature != 1:
                chain.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                chain.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                chain.append(TopPLogitsWarper(self.top_p))
            chain.append(Noise([_seed(self.seed, key) for key in keys]))
        return chain
