"""Data files (`--mm-data`) as the `data` section of a recipe: chat rows, clips, encoded features, speech."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.tools.translate.launch import Launch, scalar
from polymodal.tools.translate.ledger import Given

PARAM, BASIC, PREPARE = (
    "dataset_param",
    "dataset_param.basic_parameters",
    "dataset_param.preprocess_parameters",
)
COLUMNS = {  # attr of their file -> data.attr
    "system": "system",
    "images": "images",
    "videos": "videos",
    "messages": "messages",
    "audios": "audios",
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function",
}
TEMPLATES = ("default", "empty")  # of theirs that no checkpoint has


def chat(launch: Launch, given: Given) -> None:
    """Rows of conversations."""
    if not given.values:
        return
    ledger = launch.ledger
    given.take(f"{PARAM}.dataset_type")
    if given.has(f"{BASIC}.data_path") or not given.has(f"{BASIC}.dataset"):
        _tiles(launch, given)
    else:
        _rows(launch, given)
    for key, column in COLUMNS.items():
        value = given.take(f"{PARAM}.attr.{key}")
        if value is not None:
            ledger.write(f"data.attr.{column}", value, given.origin(f"{PARAM}.attr.{key}"))
    for key in ("chosen", "rejected"):
        column = given.take(f"{PARAM}.attr.{key}")
        if column is not None:
            ledger.write(f"data.attr.{key}", column, given.origin(f"{PARAM}.attr.{key}"))
    ranking = given.take(f"{PARAM}.attr.ranking")
    if ranking:
        ledger.note(
            "mapped", given.origin(f"{PARAM}.attr.ranking"), True, "rows are pairs: train.objective dpo"
        )
    sound = given.take(f"{PREPARE}.use_audio_in_video")
    if sound is not None:
        ledger.write("data.video.sound", bool(sound), given.origin(f"{PREPARE}.use_audio_in_video"))
    _sizes(launch, given)
    _learned(launch, given)
    packing = given.take(f"{PARAM}.attr.packing") or launch.flags.take("use-txt-dynamic-batching")
    origin = given.origin(f"{PARAM}.attr.packing")
    if packing:
        ledger.write("data.pack", True, origin)
    else:
        ledger.default("data.pack", False, origin, "one sample after the other, as there")
    longest = given.take(f"{BASIC}.cutoff_len")
    if longest is not None:
        ledger.write("data.max_length", int(longest), given.origin(f"{BASIC}.cutoff_len"))
    if launch.flags.has("seq-length"):
        ledger.write("data.max_length", launch.number("seq-length"), launch.where("seq-length"))
    _shuffle(launch, given)


def _rows(launch: Launch, given: Given) -> None:
    """dataset: one or several files, media from dataset_dir or the working directory."""
    ledger = launch.ledger
    names = given.take(f"{BASIC}.dataset")
    if not isinstance(names, str) or not names.strip():
        raise PolymodalError(f"{given.file}: {BASIC}.dataset names no file.", "Write it there.")
    origin, directory = given.origin(f"{BASIC}.dataset"), given.take(f"{BASIC}.dataset_dir")
    most = given.take(f"{BASIC}.max_samples")
    sets = list[dict[str, Any]]()
    for name in names.split(","):
        entry: dict[str, Any] = {"path": launch.path(name.strip())}
        media = launch.path(directory) if isinstance(directory, str) else None
        if media is not None and _media_below(entry["path"], media):
            entry["media_dir"] = media
        sets.append(entry)
    if most is not None:
        sets[0]["max_samples"] = int(most)
        why = "" if len(sets) == 1 else "of all files together there, of the first here"
        ledger.note(
            "mapped" if len(sets) == 1 else "changed", given.origin(f"{BASIC}.max_samples"), most, why
        )
    ledger.write("data.datasets", sets, origin, names)
    if isinstance(directory, str):
        used = any("media_dir" in entry for entry in sets)
        why = (
            "data.datasets.media_dir"
            if used
            else (
                "paths of media start beside the file or in the working directory here; set "
                "data.datasets.0.media_dir where they start elsewhere"
            )
        )
        ledger.note("mapped" if used else "checked", given.origin(f"{BASIC}.dataset_dir"), directory, why)
    cache = given.take(f"{BASIC}.cache_dir")
    if cache is not None:
        ledger.write("data.cache_dir", launch.path(cache), given.origin(f"{BASIC}.cache_dir"))


def _media_below(path: str, directory: str) -> bool:
    """Whether media of the file's first rows lie below the directory, and not beside the file."""
    from polymodal.data.source import open_corpus
    from polymodal.recipe import Attr, Dataset

    try:
        corpus = open_corpus([Dataset(path=path)], Attr())
        media = [
            m.source for i in range(min(len(corpus), 5)) for m in corpus[i].media if isinstance(m.source, str)
        ]
    except (PolymodalError, OSError):
        return False
    beside = os.path.dirname(path)
    relative = [name for name in media if not os.path.isabs(name)]
    inside = [
        os.path.relpath(name, beside) if beside and name.startswith(beside) else name for name in relative
    ]
    found = [Path(directory, name).is_file() for name in inside]
    return bool(found) and all(found) and not all(Path(beside, name).is_file() for name in inside)


def _tiles(launch: Launch, given: Given) -> None:
    """data_path and data_folder, one section or a list of them (InternVL, LLaVA, DeepSeek-VL2)."""
    parts = given.take(BASIC)
    sets = list[dict[str, Any]]()
    for part in parts if isinstance(parts, list) else [parts]:
        entry: dict[str, Any] = {"path": launch.path(str(part.get("data_path")))}
        if part.get("data_folder"):
            entry["media_dir"] = launch.path(str(part["data_folder"]))
        repeat = part.get("repeat_time", 1)
        if float(repeat) != 1:
            entry["repeat"] = float(repeat)
        sets.append(entry)
        unknown = set(part) - {"data_path", "data_folder", "repeat_time"}
        for key in unknown:
            launch.ledger.note(
                "unknown", given.origin(f"{BASIC}[].{key}"), part[key], "no such name in the tables"
            )
    launch.ledger.write("data.datasets", sets, given.origin(BASIC), f"{len(sets)} sets")
    for key, ours in (("min_num_frame", "min_frames"), ("max_num_frame", "max_frames")):
        value = given.take(f"{PARAM}.{key}")
        if value is not None:
            launch.ledger.write(f"data.video.{ours}", int(value), given.origin(f"{PARAM}.{key}"))
    method = given.take(f"{PARAM}.sampling_method")
    if method is not None:
        why = "frames are taken at data.video.fps here, not at random places"
        launch.ledger.note("checked", given.origin(f"{PARAM}.sampling_method"), method, why)


def _sizes(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    areas = (
        ("image_max_pixels", "data.image.max_pixels", 589824),
        ("image_min_pixels", "data.image.min_pixels", None),
        ("video_max_pixels", "data.video.max_pixels", 65536),
        ("video_min_pixels", "data.video.min_pixels", None),
    )
    older = {"image_max_pixels": "image_resolution", "video_max_pixels": "video_resolution"}
    rows = given.has(f"{BASIC}.dataset")
    for key, ours, otherwise in areas:
        name = f"{PREPARE}.{key}"
        value = given.take(name)
        if value is None and key in older and given.has(f"{PREPARE}.{older[key]}"):
            name = f"{PREPARE}.{older[key]}"
            value = given.take(name)
        origin = given.origin(name)
        if value is not None and int(value) > 0:
            ledger.write(ours, int(value), origin)
        elif value is not None:
            ledger.note("no effect", origin, value, "no least size; the processor's own holds in both")
        elif otherwise is not None and rows:
            ledger.default(ours, otherwise, origin)
    for key, ours, kind in (("video_fps", "fps", float), ("video_maxlen", "max_frames", int)):
        value = given.take(f"{PREPARE}.{key}")
        if value is not None:
            origin = given.origin(f"{PREPARE}.{key}")
            ledger.write(f"data.video.{ours}", scalar(value, origin, kind), origin)
    if rows:
        ledger.default(
            "data.video.min_frames", 1, given.origin(f"{PREPARE}.video_maxlen"), "4 by default here"
        )
    rate = given.take(f"{PREPARE}.audio_sampling_rate")
    if rate is not None:
        ledger.note(
            "checked",
            given.origin(f"{PREPARE}.audio_sampling_rate"),
            rate,
            "sound is resampled to the model's rate",
        )


def _learned(launch: Launch, given: Given) -> None:
    ledger = launch.ledger
    everything, last = given.take(f"{BASIC}.train_on_prompt"), given.take(f"{BASIC}.mask_history")
    if everything and last:
        origin = given.origin(f"{BASIC}.mask_history")
        ledger.note("unsupported", origin, True, "train_on_prompt and mask_history exclude each other")
    elif everything or last:
        key = "train_on_prompt" if everything else "mask_history"
        ledger.write("data.train_on", "all" if everything else "last", given.origin(f"{BASIC}.{key}"), True)
    template = given.take(f"{BASIC}.template")
    origin = given.origin(f"{BASIC}.template")
    if template in TEMPLATES:
        ledger.note("unsupported", origin, template, "give its text as data.chat_template")
    elif template is not None:
        ledger.note("checked", origin, template, "the checkpoint's chat template is used")
    thinking = given.take(f"{BASIC}.enable_thinking")
    if thinking is not None or str(template).endswith("_nothink"):
        kwargs = {"enable_thinking": bool(thinking)}
        ledger.write("data.template_kwargs", kwargs, given.origin(f"{BASIC}.enable_thinking"), thinking)


def _shuffle(launch: Launch, given: Given) -> None:
    shuffle = given.take("dataloader_param.shuffle")
    if given.has("dataloader_param.shuffle") and not shuffle:
        launch.ledger.write("data.shuffle", False, given.origin("dataloader_param.shuffle"), shuffle)
    elif given.has("dataloader_param.shuffle"):
        launch.ledger.note("mapped", given.origin("dataloader_param.shuffle"), shuffle, "the default here")


# ---- what generating models learn from -------------------------------------


def clips(launch: Launch, given: Given, encoding: bool = False) -> None:
    """Clips and pictures (t2v, i2v), or features that were encoded before."""
    if not given.values:
        return
    ledger = launch.ledger
    kind = given.take(f"{PARAM}.dataset_type")
    path, folder = given.take(f"{BASIC}.data_path"), given.take(f"{BASIC}.data_folder")
    origin = given.origin(f"{BASIC}.data_path")
    if kind == "feature":
        directory = os.path.dirname(str(path)) or "."
        if folder is not None and os.path.normpath(str(folder)) != os.path.normpath(directory):
            raise PolymodalError(
                f"{given.file}: features are read from the directory of data.jsonl ({directory}), "
                f"{BASIC}.data_folder names {folder}.",
                "Move data.jsonl into that directory.",
            )
        ledger.write("data.encode", "cached", given.origin(f"{PARAM}.dataset_type"), kind)
        ledger.write("data.features", launch.path(directory), origin, path)
        _clip(launch, given, encoded=True)  # compared with what encoded them
        _shuffle(launch, given)
        return
    entry: dict[str, Any] = {"path": launch.path(str(path))}
    if folder is not None:
        entry["media_dir"] = launch.path(str(folder))
    ledger.write("data.datasets", [entry], origin, path)
    if not encoding:
        ledger.write("data.encode", "online", given.origin(f"{PARAM}.dataset_type"), kind)
    _clip(launch, given)
    drop = given.take(f"{PREPARE}.cfg", 0.1)
    if encoding and float(drop) > 0:
        ledger.note(
            "changed",
            given.origin(f"{PREPARE}.cfg"),
            drop,
            f"captions are not dropped into features here: train.diffusion.drop: {drop} in the training "
            "recipe does it",
        )
    elif not encoding and given.has(f"{PREPARE}.cfg"):
        ledger.write("train.diffusion.drop", float(drop), given.origin(f"{PREPARE}.cfg"))
    _shuffle(launch, given)


def _clip(launch: Launch, given: Given, encoded: bool = False) -> None:
    ledger = launch.ledger

    def take(name: str, otherwise: Any = None) -> Any:
        return given.take(f"{PREPARE}.{name}", otherwise)

    most, least, short = take("num_frames"), take("min_num_frames"), float(take("drop_short_ratio", 1.0))
    if most is not None:
        longest = (int(most) - 1) // 4 * 4 + 1
        frames = [longest]
        if least is not None and short < 1:
            frames = list(range((int(least) + 2) // 4 * 4 + 1, longest + 1, 4))
        given_frames = [least, most] if len(frames) > 1 else most
        ledger.write("data.clip.frames", frames, given.origin(f"{PREPARE}.num_frames"), given_frames)
        if encoded and given.has(f"{PREPARE}.drop_short_ratio"):
            origin = given.origin(f"{PREPARE}.drop_short_ratio")
            ledger.note("no effect", origin, short, "what was encoded is not decided again")
        elif encoded:
            pass
        elif short >= 1:
            ledger.write(
                "data.on_error",
                "skip",
                given.origin(f"{PREPARE}.drop_short_ratio"),
                short,
                "clips too short are left out",
            )
        elif given.has(f"{PREPARE}.drop_short_ratio"):
            ledger.note(
                "mapped",
                given.origin(f"{PREPARE}.drop_short_ratio"),
                short,
                "several lengths in data.clip.frames",
            )
    fps, every = take("train_fps", take("fps")), take("frame_interval", 1)
    if take("auto_interval", True) is False:
        if int(every) > 1:
            ledger.note(
                "unsupported",
                given.origin(f"{PREPARE}.frame_interval"),
                every,
                "every n-th frame of any rate",
            )
        else:
            ledger.write(
                "data.clip.fps", None, given.origin(f"{PREPARE}.auto_interval"), False, "every frame"
            )
    elif fps is not None:
        ledger.write("data.clip.fps", float(fps), given.origin(f"{PREPARE}.train_fps"))
    height, width, area = take("max_height"), take("max_width"), take("max_hxw")
    forced = take("force_resolution", True)
    if area is not None and not forced:
        ledger.write("data.clip.pixels", int(area), given.origin(f"{PREPARE}.max_hxw"))
        ledger.note(
            "no effect", given.origin(f"{PREPARE}.max_height"), [height, width], "force_resolution is false"
        )
    elif height is not None and width is not None:
        ledger.write(
            "data.clip.sizes",
            [[int(height), int(width)]],
            given.origin(f"{PREPARE}.max_height"),
            [height, width],
        )
    sizes = take("resolution")
    if sizes is not None and height is None:
        both = [sizes, sizes] if isinstance(sizes, int) else list(sizes)[-2:]
        ledger.write("data.clip.sizes", [both], given.origin(f"{PREPARE}.resolution"), sizes)


def speech(launch: Launch, given: Given) -> None:
    """Recordings with their text (Whisper)."""
    if not given.values:
        return
    path = given.take(f"{BASIC}.dataset_name_or_path")
    launch.ledger.write(
        "data.datasets",
        [{"path": launch.path(str(path)), "format": "asr"}],
        given.origin(f"{BASIC}.dataset_name_or_path"),
        path,
    )
    for key in ("language", "task"):
        value = given.take(f"{PREPARE}.{key}")
        if value is not None:
            launch.ledger.write(f"data.speech.{key}", value, given.origin(f"{PREPARE}.{key}"))
    if launch.flags.has("seq-length"):
        launch.ledger.note(
            "checked", launch.where("seq-length"), launch.flags.take("seq-length"), "the decoder's own length"
        )
    _shuffle(launch, given)
