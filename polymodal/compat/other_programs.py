"""Documented programs that start no training: the converter of data, and that of weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from polymodal.core.errors import PolymodalError


def find(entry: str) -> Callable[[Sequence[str]], int] | None:
    """The program of a name."""
    return {
        "llava_instruct_2_mllm_demo_format.py": _conversations,
        "convert_cli.py": _weights,
    }.get(entry.rpartition("/")[2])


def _conversations(arguments: Sequence[str]) -> int:
    """llava_instruct_2_mllm_demo_format.py: LLaVA's rows whose picture is there, as messages and images."""
    from polymodal.core.terminal import say_lines
    from polymodal.tools import data_convert

    parser = argparse.ArgumentParser(prog="llava_instruct_2_mllm_demo_format.py")
    parser.add_argument("--llava_json_path", default="./data/llava_instruct_150k.json")
    parser.add_argument("--coco_path", default="./data/COCO2017/train2017")
    parser.add_argument("--output_json_path", default="./data/mllm_format_llava_instruct_data.json")
    given = parser.parse_args([*arguments])
    if os.path.exists(given.output_json_path):
        raise PolymodalError(f"{given.output_json_path} exists already.", "Remove it, or move it away.")
    options = {"format": "auto", "media_dir": given.coco_path, "missing": "skip"}
    say_lines(data_convert.convert(given.llava_json_path, given.output_json_path, **options), "\n")
    return 0


def _weights(arguments: Sequence[str]) -> int:
    """checkpoint/convert_cli.py, which the console command mm-convert calls there."""
    from polymodal.convert import command

    command.main(arguments)
    return 0
