"""Small real clips and pictures with captions, as data files of the documented kind."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}
CAPTIONS = (
    "a {colour} square moving {direction}",
    "{colour}",
    "the {colour} square of the video moving up and down to the {direction}",
)
"""Of unequal length, shorter and longer ones in one batch, as people write them."""


def caption(i: int, colour: str, direction: str = "left") -> str:
    """What sample i is said to show."""
    return CAPTIONS[i % len(CAPTIONS)].format(colour=colour, direction=direction)


def frames(colour: str, direction: str, count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A square of a colour that moves left or right over grey: uint8 [F, H, W, 3]."""
    out = np.full((count, height, width, 3), 90, np.uint8)
    for i in range(count):
        x = int((width - 16) * i / max(1, count - 1))
        x = width - 16 - x if direction == "left" else x
        out[i, 16:32, x : x + 16] = COLOURS[colour]
    return out


def tone(seconds: float, pitch: float = 440.0, rate: int = 16000) -> np.ndarray:
    """A sine in the left channel, silence in the right: float32 [2, samples]."""
    times = np.arange(round(seconds * rate)) / rate
    left = 0.5 * np.sin(2 * np.pi * pitch * times)
    return np.stack([left, 0 * left]).astype(np.float32)


def sounding(directory: Path, length: int = 9) -> Path:
    """Two clips with sound; returns the data file."""
    from polymodal.generate.media import write_video as write

    rows = []
    (directory / "sounding").mkdir(parents=True, exist_ok=True)
    for i, (colour, pitch) in enumerate((("red", 440.0), ("blue", 880.0))):
        path = directory / "sounding" / f"{i}.mp4"
        write(path, frames(colour, "left", length), 16, tone(length / 16, pitch), 16000)
        rows.append({"path": str(path.relative_to(directory)), "cap": caption(i, colour)})
    file = directory / "sounding.json"
    file.write_text(json.dumps(rows))
    return file


def write_video(path: Path, pixels: np.ndarray, fps: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def edits(directory: Path, length: int = 9) -> Path:
    """Two clips: one made from a source, a mask and two pictures, one from nothing; returns the data file."""
    folder = directory / "edits"
    mask = np.zeros((length, 48, 64, 3), np.uint8)
    mask[:, :, 32:] = 255
    made = {
        "target": frames("red", "left", length),
        "source": frames("blue", "left", length),
        "mask": mask,
    }
    paths = {
        name: str(write_video(folder / f"{name}.mp4", pixels).relative_to(directory))
        for name, pixels in made.items()
    }
    for colour in ("red", "green"):
        Image.fromarray(frames(colour, "left", 2, 40, 40)[0]).save(folder / f"{colour}.png")
    rows = [
        {
            "video": paths["target"], "cap": "a red square moving left", "src_video": paths["source"], "src_video_mask": paths["mask"],
            "src_ref_images": ["edits/red.png", "edits/green.png"],
        },
        {"video": paths["source"], "cap": "blue", "src_video": None, "src_video_mask": None, "src_ref_images": None},
    ]  # fmt: skip
    file = directory / "edits.json"
    file.write_text(json.dumps(rows))
    return file


def pairs(directory: Path) -> Path:
    """Edit pairs of pictures, each with its source; returns the data file."""
    rows = []
    for i, (colour, wanted) in enumerate((("red", "blue"), ("green", "red"), ("blue", "green"))):
        for name, shown in (("source", colour), ("result", wanted)):
            path = directory / "pairs" / f"{name}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frames(shown, "left", 2)[0]).save(path)
        shown = {"path": f"pairs/result{i}.png", "src_image": f"pairs/source{i}.png"}
        rows.append({**shown, "cap": caption(i, wanted)})
    file = directory / "pairs.json"
    file.write_text(json.dumps(rows))
    return file


def data(directory: Path, clips: int = 4, pictures: int = 0, length: int = 9) -> Path:
    """`clips` videos (one in two upright) and pictures in sub-folders, and data.json; returns the data file."""
    rows = []
    for i in range(clips + pictures):
        colour, direction = list(COLOURS)[i % 3], ("left", "right")[i // 3 % 2]
        size = (48, 64) if i % 2 == 0 else (64, 48)
        if i < clips:
            path = write_video(
                directory / "clips" / f"part{i % 2}" / "clip.mp4"
                if i < 2
                else directory / "clips" / f"clip{i}.mp4",
                frames(colour, direction, length, *size),
            )
            row = {"num_frames": length, "fps": 16, "resolution": {"height": size[0], "width": size[1]}}
        else:
            path = directory / "pictures" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frames(colour, direction, 2, *size)[0]).save(path)
            row = {}
        said = caption(i, colour, direction)
        rows.append(
            {
                "path": str(path.relative_to(directory)),
                "cap": [said, said.upper()] if i == 0 else said,
                **row,
            }
        )
    file = directory / "data.json"
    file.write_text(json.dumps(rows))
    return file
