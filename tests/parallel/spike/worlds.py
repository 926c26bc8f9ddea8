"""The spike's cases gathered into two worlds, so that processes are started twice only. Used by tests only."""

from __future__ import annotations

import warnings
from typing import Any

from tests.parallel.spike import pipelines, preference


def four(rank: int) -> dict[str, Any]:
    warnings.filterwarnings(
        "error", "FSDP2-wrapped module .* returned a view"
    )  # of a stage: see pipeline.bind
    return {
        "qwen3_language": pipelines.qwen3_lora_pp_fsdp(rank, pipelines.LANGUAGE),
        "qwen3_both": pipelines.qwen3_lora_pp_fsdp(rank, pipelines.BOTH),
    }


def two(rank: int) -> dict[str, Any]:
    return {
        "qwen2": pipelines.qwen2_tied_pp(rank),
        "dpo": preference.dpo_fsdp(rank),
    }
