"""The spike's cases gathered into two worlds, so that processes are started twice only. Used by tests only."""

from __future__ import annotations

import warnings
from typing import Any

from tests.parallel.spike import pipelines, preference, wan, whisper


def four(rank: int) -> dict[str, Any]:
    warnings.filterwarnings(
        "error", "FSDP2-wrapped module .* returned a view"
    )  # of a stage: see pipeline.bind
    return {
        "qwen3_language": pipelines.qwen3_lora_pp_fsdp(rank, pipelines.LANGUAGE),
        "qwen3_both": pipelines.qwen3_lora_pp_fsdp(rank, pipelines.BOTH),
        "wan": wan.wan_fsdp_ulysses(rank),
    }


def two(rank: int) -> dict[str, Any]:
    return {
        "qwen2": pipelines.qwen2_tied_pp(rank),
        "whisper_per_token": whisper.whisper_fsdp(rank, "per_token"),
        "whisper_per_sample": whisper.whisper_fsdp(rank, "per_sample"),
        "dpo": preference.dpo_fsdp(rank),
    }
