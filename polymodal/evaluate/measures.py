"""How good generated pictures and clips are: by models that the user names by path, and by the pixels alone.

Opens the models with transformers; nothing is downloaded. Sees the data room and errors; knows no rank and no
generator. Figures depend on the model that measures: they compare runs that were measured with the same one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.text import did_you_mean
from polymodal.data import media
from polymodal.data.files import IMAGE, VIDEO

FRAMES = 16
"""Frames of a clip that models look at, evenly spread; motion is measured over all of them."""
BATCH = 32
"""Pictures that a model looks at together."""


@dataclass
class Measured:
    """Of one sample. vector: its features, float32 [D] (a clip's: the mean over frames); label: the class seen."""

    values: dict[str, float] = field(default_factory=dict)
    vector: np.ndarray | None = None
    label: str | None = None


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions fitted to two sets of features [N, D], N at least 2.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6), in float64.
    """
    means, roots, traces = [], [], []
    for x in (torch.from_numpy(np.asarray(v, np.float64)) for v in (a, b)):
        centred = x - x.mean(0)
        means.append(x.mean(0))
        traces.append(float((centred**2).sum() / (len(x) - 1)))
        root = centred / (len(x) - 1) ** 0.5
        roots.append(torch.linalg.qr(root, mode="r").R if len(x) > x.shape[1] else root)
    # tr (S1 S2)^(1/2) is the nuclear norm of X1 X2^T, where S = X^T X: exact also for fewer samples than features
    product = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return float((means[0] - means[1]).square().sum()) + traces[0] + traces[1] - 2 * product


def motion(frames: np.ndarray) -> float:
    """Mean absolute change of a pixel from frame to frame, as a share of its range; uint8 [F, H, W, 3], F at least 2."""
    steps = [np.abs(b.astype(np.int16) - a).mean() for a, b in zip(frames[:-1], frames[1:], strict=True)]
    return float(np.mean(steps)) / 255


def consistency(features: Tensor) -> float:
    """How alike a clip's frames are, of features [F, D]: mean over frames of the cosines to the first and to the one before.

    The formula of VBench's subject consistency (Huang et al. 2023, arXiv:2311.17982).
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    first, before = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(-1)
    return float(((first.clamp(min=0) + before.clamp(min=0)) / 2).mean())


# ---- files ----------------------------------------------------------------------------------------------------------


def files_of(directory: str | os.PathLike) -> list[Path]:
    """Pictures and clips of a directory and those inside it, by name. Raises PolymodalError when there are too few."""
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise PolymodalError(f"The directory of real pictures {root} does not exist.", "Check --real.")
    known = IMAGE | VIDEO
    found = sorted(p for p in root.rglob("*") if p.suffix.lower().removeprefix(".") in known and p.is_file())
    if len(found) < 2:
        raise PolymodalError(
            f"{root} holds {len(found)} pictures or clips; a distance of distributions needs at least 2, and means something from some hundreds on.",
            "Name a directory of real pictures with --real.",
        )
    return found


def is_video(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower().removeprefix(".") in VIDEO


def read(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]; a picture has one frame. Raises PolymodalError."""
    if not is_video(path):
        return np.asarray(media.image(str(path)).convert("RGB"))[None]
    header = media.video_header(str(path))
    return media.video(str(path), header, range(header.frames))


# ---- models ---------------------------------------------------------------------------------------------------------


def _open(auto: Any, path: str, option: str) -> tuple[nn.Module, set[str]]:
    """A model by path or hub id, and the names that its checkpoint lacks. Raises PolymodalError."""
    from polymodal.models import pipelines

    try:
        with pipelines.quiet():
            model, info = auto.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise PolymodalError(
            f"{option} {path} cannot be opened: {reason}",
            "Give the directory of a checkpoint of transformers.",
        ) from None
    return model.eval().requires_grad_(False), set(info["missing_keys"])


def _processor(path: str, option: str, auto: Any) -> Any:
    try:
        return auto.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise PolymodalError(
            f"{option} {path} has no processor: {reason}", "Copy preprocessor_config.json beside the weights."
        ) from None


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


class Measures:
    """The models that were named, on a device in float32. Paths that are None measure nothing.

    clip: a checkpoint with towers for text and pictures (CLIP, SigLIP): `clip` = 100 x cosine, at least 0.
    features: a vision model: the vectors of `frechet` and, of clips, `consistency`. classifier: `label`.
    """

    def __init__(
        self,
        clip: str | None,
        features: str | None,
        classifier: str | None,
        device: torch.device | str = "cpu",
    ):
        from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor

        self.device = torch.device(device)
        self.clip: Any = None
        self.seer: Any = None
        self.classifier: Any = None
        if clip is not None:
            self.clip, lost = _open(AutoModel, clip, "--clip")
            if not hasattr(self.clip, "get_text_features") or lost:
                raise PolymodalError(
                    f"--clip {clip} is {type(self.clip).__name__}{' without all of its weights' if lost else ''}, not a model of texts and pictures.",
                    "Give a whole CLIP or SigLIP checkpoint.",
                )
            self.clip.to(self.device)
            self.clip_processor = _processor(clip, "--clip", AutoProcessor)
        if features is not None:
            self.seer, lost = _open(AutoModel, features, "--features")
            if any("pooler" not in name for name in lost):
                raise PolymodalError(
                    f"--features {features} lacks weights (first: {min(lost)}).", "Fetch it again."
                )
            self.pooled = not lost  # a pooler that the checkpoint lacks would be random
            self.seer.to(self.device)
            self.seer_processor = _processor(features, "--features", AutoImageProcessor)
        if classifier is not None:
            self.classifier, lost = _open(AutoModelForImageClassification, classifier, "--classifier")
            if lost:
                raise PolymodalError(
                    f"--classifier {classifier} lacks weights (first: {min(lost)}): it was not trained to classify.",
                    "Give a fine-tuned classifier.",
                )
            self.classifier.to(self.device)
            self.classifier_processor = _processor(classifier, "--classifier", AutoImageProcessor)
            names = self.classifier.config.id2label
            self.classes = [str(names[i]) for i in range(len(names))]

    def known_label(self, label: str, where: str) -> str:
        """A row's label as the classifier calls it. Raises PolymodalError."""
        same = {c.casefold(): c for c in self.classes}
        found = same.get(label.strip().casefold())
        if found is None:
            raise PolymodalError(
                f"{where}: `label` = {label} is no class of the classifier.",
                did_you_mean(label, self.classes, f"It knows {', '.join(self.classes[:8])}, ..."),
            )
        return found

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU: projected image features, else the pooled output, else the mean over tokens."""
        out = []
        for pixels in self._batches(self.seer_processor, pictures):
            if hasattr(self.seer, "get_image_features"):
                found = _tensor(self.seer.get_image_features(pixel_values=pixels))
            else:
                made = self.seer(pixel_values=pixels)
                pooled = getattr(made, "pooler_output", None) if self.pooled else None
                hidden = made.last_hidden_state
                if pooled is None:
                    pooled = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
                found = pooled
            out.append(found.flatten(1).float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def likeness(self, pictures: Sequence[Image.Image], prompt: str) -> Tensor:
        """[N]: 100 x cosine of each picture and the prompt, at least 0 (Hessel et al. 2021, arXiv:2104.08718, without its factor)."""
        words = self.clip_processor.tokenizer(
            [prompt], padding="max_length", truncation=True, return_tensors="pt"
        )
        text = _tensor(self.clip.get_text_features(**words.to(self.device)))
        seen = [
            _tensor(self.clip.get_image_features(pixel_values=pixels))
            for pixels in self._batches(self.clip_processor.image_processor, pictures)
        ]
        cosines = nn.functional.cosine_similarity(torch.cat(seen).float(), text.float())
        return 100 * cosines.clamp(min=0).cpu()

    @torch.no_grad()
    def classes_of(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Mean logits over the pictures, [classes]."""
        found = [
            self.classifier(pixel_values=p).logits for p in self._batches(self.classifier_processor, pictures)
        ]
        return torch.cat(found).float().mean(0).cpu()

    def _batches(self, processor: Any, pictures: Sequence[Image.Image]) -> Iterable[Tensor]:
        for at in range(0, len(pictures), BATCH):
            pixels = processor(images=list(pictures[at : at + BATCH]), return_tensors="pt")["pixel_values"]
            yield pixels.to(self.device, torch.float32)

    def vector(self, path: Path) -> np.ndarray:
        """Features of a file, float32 [D]: of a clip the mean over its frames."""
        return self.features(_shown(read(path))).mean(0).numpy()

    def of(self, path: Path, prompt: str) -> Measured:
        """All that the named models and the pixels say about a sample's file."""
        frames = read(path)
        pictures = _shown(frames)
        out = Measured()
        if self.clip is not None:
            out.values["clip"] = float(self.likeness(pictures, prompt).mean())
        if self.seer is not None:
            found = self.features(pictures)
            out.vector = found.mean(0).numpy()
            if len(pictures) > 1:
                out.values["consistency"] = consistency(found)
        if self.classifier is not None:
            out.label = self.classes[int(self.classes_of(pictures).argmax())]
        if len(frames) > 1:
            out.values["motion"] = motion(frames)
        return out


def _shown(frames: np.ndarray) -> list[Image.Image]:
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    return [Image.fromarray(frames[i]) for i in chosen]
