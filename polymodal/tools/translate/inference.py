"""Inference and evaluation files as command lines: `polymodal generate`, `chat` and `evaluate`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch
from polymodal.tools.translate.ledger import Given, Origin, read_config

BENCHMARKS = {"ai2d_test": "ai2d", "mmmu_dev_val": "mmmu", "chartqa_test": "chartqa", "docvqa_val": "docvqa"}
PRECISIONS = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


class Command:
    """The words of a command of ours, with a row for each in the ledger."""

    def __init__(self, launch: Launch, *words: str):
        self.launch, self.words = launch, ["polymodal", *words]

    def add(self, flag: str, value: Any, origin: Origin, given: Any = None) -> None:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        self.words += [flag, text]
        self.launch.ledger.write(f"{flag} {text}", value, origin, value if given is None else given)
        del self.launch.ledger.values[f"{flag} {text}"]  # a word of the command, no key of a recipe


def translate(launch: Launch) -> list[str]:
    """The words of the command."""
    path = launch.flags.take("mm-model")
    if not isinstance(path, str):
        raise PolymodalError(f"{launch.file}: it names no file of the model.", "Add mm-model FILE to it.")
    section = {"generate": "generate", "chat": "chat", "evaluate": "chat"}[launch.kind]
    given = Given(section, path, read_config(launch.open(path)))
    command = {"generate": _generate, "chat": _chat, "evaluate": _evaluate}[launch.kind](launch, given)
    if launch.flags.has("seed") and launch.kind == "generate":
        command.add("--seed", launch.number("seed"), launch.where("seed"))
    _placement(command, given)
    for name in list(launch.flags.values):  # of training, given there only to satisfy a parser
        launch.flags.take(name)
    given.report_rest(launch.ledger)
    return command.words


def _placement(command: Command, given: Given) -> None:
    dtype, device = given.take("dtype"), given.take("device")
    if dtype in PRECISIONS:
        command.add("--dtype", PRECISIONS[dtype], given.origin("dtype"), dtype)
    if device is not None:
        command.launch.ledger.note(
            "checked", given.origin("device"), device, "the device that is there is taken: --device auto"
        )
    if command.launch.nproc > 1:
        command.add("--nproc", command.launch.nproc, Origin("the launcher", command.launch.file))


def _checkpoint(launch: Launch, hub: Any, origin: Origin) -> str:
    """What is opened: --load where it is one of ours or the hub's, else the hub's directory."""
    load = launch.flags.values.get("load")
    if launch.source is not None:
        return launch.source
    if isinstance(load, str):
        path = Path(launch.path(load))
        if path.name in ("transformer", "transformer_2"):
            return str(path.parent)
        tree = (path / "latest_checkpointed_iteration.txt").is_file() and not (path / "checkpoints").is_dir()
        if not tree and (not isinstance(hub, str) or path.is_dir()):
            return str(path)
    if isinstance(hub, str):
        if isinstance(load, str):
            launch.ledger.note(
                "changed",
                launch.where("load"),
                load,
                f"a converted tree of the model: {hub} is its hub directory. For trained weights run "
                f"`polymodal convert {load} DIR --to hf --hf-dir {hub}` and name DIR as --source",
            )
        launch.ledger.note("mapped", origin, hub, "CHECKPOINT")
        return launch.path(hub)
    raise PolymodalError(
        f"{launch.file}: no file of it names a checkpoint.", "Name it: --source DIR or a hub id."
    )


def _generate(launch: Launch, given: Given) -> Command:
    command = Command(
        launch, "generate", _checkpoint(launch, None, given.origin("predictor.from_pretrained"))
    )
    if isinstance(launch.flags.values.get("load"), str) and launch.source is None:
        launch.ledger.note(
            "mapped", launch.where("load"), launch.flags.values["load"], f"CHECKPOINT {command.words[2]}"
        )
    prompt = given.take("prompt")
    if isinstance(prompt, str):
        is_file = os.path.isfile(launch.path(prompt))
        command.add(
            "--prompts" if is_file else "--prompt",
            launch.path(prompt) if is_file else prompt,
            given.origin("prompt"),
        )
        if is_file:
            launch.notes.append("they read only the first 100 prompts of a file; all of them are taken here")
    for key, flag in (("image", "--image"), ("video", "--video")):
        value = given.take(key)
        if isinstance(value, str) and value.endswith(".txt"):
            launch.ledger.note(
                "unsupported",
                given.origin(key),
                value,
                f"one {key} a prompt: write rows of prompt and {key} into a .jsonl for --prompts",
            )
        elif isinstance(value, str):
            command.add(flag, launch.path(value), given.origin(key), value)
    size = given.take("pipeline_config.input_size") or given.take("predictor.input_size")
    if isinstance(size, list) and len(size) == 3:
        for flag, value in zip(("--frames", "--height", "--width"), size, strict=True):
            command.add(flag, value, given.origin("pipeline_config.input_size"))
    for key, flag in (
        ("diffusion.num_inference_steps", "--steps"),
        ("diffusion.num_inference_timesteps", "--steps"),
        ("pipeline_config.guidance_scale", "--guidance"),
        ("diffusion.guidance_scale", "--guidance"),
        ("diffusion.cfg_scale", "--guidance"),
        ("strength", "--strength"),
    ):
        value = given.take(key)
        if value is not None and flag not in command.words:
            command.add(flag, value, given.origin(key))
    fps, interval = given.take("fps"), int(given.take("frame_interval", 1))
    if fps is not None:
        command.add("--fps", int(fps) // interval, given.origin("fps"), [fps, interval])
    for key in (
        "diffusion.flow_shift",
        "diffusion.shift",
        "pipeline_config.flow_shift",
        "pipeline_config.embedded_guidance_scale",
    ):
        value = given.take(key)
        if value is not None:
            launch.ledger.note(
                "checked",
                given.origin(key),
                value,
                "the pipeline's scheduler_config.json decides: compare it",
            )
    given.take("pipeline_config.seed")
    out = given.take("save_path")
    if out is not None:
        command.add("--out", launch.path(out), given.origin("save_path"))
    batch = launch.flags.take("micro-batch-size")
    given.take("micro_batch_size")
    if batch is not None and int(batch) > 1:
        command.add("--batch-size", int(batch), launch.where("micro-batch-size"))
    return command


def _answers(command: Command, given: Given) -> None:
    """Sampling of answers; top_k 1 or a temperature near 0 is the likeliest token."""
    launch, key = command.launch, "generation_config"
    most = given.take(f"{key}.max_new_tokens")
    if most is not None:
        command.add("--max-new-tokens", most, given.origin(f"{key}.max_new_tokens"))
    for name in ("num_beams", "num_return_sequences"):
        value = given.take(f"{key}.{name}")
        if value not in (None, 1):
            launch.ledger.note("unsupported", given.origin(f"{key}.{name}"), value, "beam search of answers")
    sample = given.take(f"{key}.do_sample", False)
    temperature, top_k = given.take(f"{key}.temperature"), given.take(f"{key}.top_k")
    top_p = given.take(f"{key}.top_p")
    penalty = given.take(f"{key}.repetition_penalty")
    if launch.kind == "evaluate":
        return
    greedy = not sample or top_k == 1 or (temperature is not None and float(temperature) <= 0.01)
    command.add(
        "--temperature",
        0 if greedy else float(temperature or 1.0),
        given.origin(f"{key}.temperature"),
        temperature,
    )
    if not greedy:
        if top_k is not None:
            command.add("--top-k", top_k, given.origin(f"{key}.top_k"))
        if top_p is not None:
            command.add("--top-p", top_p, given.origin(f"{key}.top_p"))
    if penalty not in (None, 1, 1.0):
        command.add("--repetition-penalty", penalty, given.origin(f"{key}.repetition_penalty"))


def _limits(launch: Launch, given: Given) -> None:
    for key in ("min_pixels", "max_pixels"):
        value = given.take(key)
        if value is not None:
            launch.ledger.note(
                "checked",
                given.origin(key),
                value,
                f"the checkpoint's processor, or data.image.{key} of the run, decides",
            )


def _chat(launch: Launch, given: Given) -> Command:
    hub = given.take("tokenizer.from_pretrained")
    command = Command(launch, "chat", _checkpoint(launch, hub, given.origin("tokenizer.from_pretrained")))
    kind = given.take("infer_data_type", "image")
    for key in ("image_path", "file_path", "video_path"):
        value = given.take(key)
        if isinstance(value, str):
            flag = "--video" if key == "video_path" or (key == "file_path" and kind == "video") else "--image"
            command.add(flag, launch.path(value), given.origin(key), value)
    prompt = given.take("prompts")
    if isinstance(prompt, str):
        command.add("--prompt", prompt, given.origin("prompts"))
    _answers(command, given)
    _limits(launch, given)
    return command


def _evaluate(launch: Launch, given: Given) -> Command:
    hub = given.take("tokenizer.from_pretrained")
    checkpoint = _checkpoint(launch, hub, given.origin("tokenizer.from_pretrained"))
    name = str(given.take("evaluation_dataset"))
    if name not in BENCHMARKS:
        raise PolymodalError(
            f"{given.file}: evaluation_dataset {name} is no benchmark of these files.",
            f"Known are {', '.join(BENCHMARKS)}.",
        )
    command = Command(launch, "evaluate", checkpoint, BENCHMARKS[name])
    launch.ledger.note("mapped", given.origin("evaluation_dataset"), name, f"BENCHMARK {BENCHMARKS[name]}")
    for key, flag in (("dataset_path", "--data"), ("result_output_path", "--out")):
        value = given.take(key)
        if isinstance(value, str):
            command.add(flag, launch.path(value), given.origin(key), value)
    custom = given.take("use_custom_prompt")
    if custom:
        launch.ledger.note(
            "checked",
            given.origin("use_custom_prompt"),
            custom,
            "questions are worded as the benchmark has them",
        )
    _answers(command, given)
    _limits(launch, given)
    return command
