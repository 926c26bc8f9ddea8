"""How good generated pictures and clips are: by models that the user names by path, and by the pixels alone.

Figures depend on the model that measures: they compare runs that were measured with the same one.
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
from polymodal.core.tensors import require_finite
from polymodal.core.text import did_you_mean
from polymodal.data import media
from polymodal.data.files import IMAGE, VIDEO
from polymodal.generate.opening import library_errors

FRAMES = 16
"""Frames of a clip that models look at, evenly spread; motion is measured over all of them."""
BATCH = 32
"""Pictures that a model looks at together."""


@dataclass
class Measured:
    """Of one sample. vector: its features, float32 [D] (a clip's: mean over frames); label: the class."""

    values: dict[str, float] = field(default_factory=dict)
    vector: np.ndarray | None = None
    label: str | None = None


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions fitted to two sets of features [N, D], N at least
    2.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6), in float64.
    """
    means, roots, traces = [], [], []
    for x in (torch.from_numpy(np.asarray(v, np.float64)) for v in (a, b)):
        centred = x - x.mean(0)
        means.append(x.mean(0))
        traces.append(float((centred**2).sum() / (len(x) - 1)))
        root = centred / (len(x) - 1) ** 0.5
        roots.append(torch.linalg.qr(root, mode="r").R if len(x) > x.shape[1] else root)
    # tr (S1 S2)^(1/2) is the nuclear norm of X1 X2^T, S = X^T X: exact also for fewer samples than features
    product = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return float((means[0] - means[1]).square().sum()) + traces[0] + traces[1] - 2 * product


def motion(frames: np.ndarray) -> float:
    """Mean change of a pixel from frame to frame, as a share of its range. uint8 [F >= 2, H, W, 3]."""
    steps = [np.abs(b.astype(np.int16) - a).mean() for a, b in zip(frames[:-1], frames[1:], strict=True)]
    return float(np.mean(steps)) / 255


def consistency(features: Tensor) -> float:
    """How alike a clip's frames are: mean of their cosines to the first frame and to the one before. [F, D].

    The formula of VBench's subject consistency (Huang et al. 2023, arXiv:2311.17982).
    """
    unit = nn.functional.normalize(features.float(), dim=-1)
    first, before = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(-1)
    return float(((first.clamp(min=0) + before.clamp(min=0)) / 2).mean())


# --- files ----------------------------------------------------------------------------------------


def files_of(directory: str | os.PathLike) -> list[Path]:
    """Pictures and clips of a directory and those inside it, by name. Raises PolymodalError for too few."""
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise PolymodalError(f"The directory of real pictures {root} does not exist.", "Check --real.")
    known = IMAGE | VIDEO
    files = sorted(p for p in root.rglob("*") if p.suffix.lower().removeprefix(".") in known and p.is_file())
    if len(files) < 2:
        raise PolymodalError(
            f"{root} holds {len(files)} pictures or clips; a distance of distributions needs at least 2, "
            "and means something from some hundreds on.",
            "Name a directory of real pictures with --real.",
        )
    return files


def is_video(path: str | os.PathLike) -> bool:
    return Path(path).suffix.lower().removeprefix(".") in VIDEO


def read(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]; a picture has one frame. Raises PolymodalError."""
    if not is_video(path):
        return np.asarray(media.image(str(path)).convert("RGB"))[None]
    header = media.video_header(str(path))
    return media.video(str(path), header, range(header.frames))


# --- models ---------------------------------------------------------------------------------------


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
        self.vision: Any = None
        self.classifier: Any = None
        if clip is not None:
            self.clip, missing = self._open(AutoModel, clip, "--clip")
            if not hasattr(self.clip, "get_text_features") or missing:
                what = type(self.clip).__name__ + (" without all of its weights" if missing else "")
                raise PolymodalError(
                    f"--clip {clip} is {what}, not a model of texts and pictures.",
                    "Give a whole CLIP or SigLIP checkpoint.",
                )
            self.clip_processor = _processor(AutoProcessor, clip, "--clip")
        if features is not None:
            self.vision, missing = self._open(AutoModel, features, "--features")
            if any("pooler" not in name for name in missing):
                raise PolymodalError(
                    f"--features {features} lacks weights (first: {min(missing)}).", "Fetch it again."
                )
            self.pooled = not missing  # a pooler that the checkpoint lacks would be random
            self.vision_processor = _processor(AutoImageProcessor, features, "--features")
        if classifier is not None:
            self.classifier, missing = self._open(AutoModelForImageClassification, classifier, "--classifier")
            if missing:
                raise PolymodalError(
                    f"--classifier {classifier} lacks weights (first: {min(missing)}): "
                    "it was not trained to classify.",
                    "Give a fine-tuned classifier.",
                )
            self.classifier_processor = _processor(AutoImageProcessor, classifier, "--classifier")
            names = self.classifier.config.id2label
            self.classes = [str(names[i]) for i in range(len(names))]

    def _open(self, auto: Any, path: str, option: str) -> tuple[Any, set[str]]:
        """A model by path or hub id, and the names that its checkpoint lacks. Raises PolymodalError."""
        from polymodal.models import pipelines

        with library_errors(f"{option} {path} cannot be opened", "Give a checkpoint of transformers."):
            with pipelines.quiet():
                model, info = auto.from_pretrained(
                    path, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
                )
        require_finite(model.named_parameters(), f"{option} {path}")
        return model.eval().requires_grad_(False).to(self.device), set(info["missing_keys"])

    def known_label(self, label: str, where: str) -> str:
        """A row's label as the classifier calls it. Raises PolymodalError."""
        classes = {c.casefold(): c for c in self.classes}
        same = classes.get(label.strip().casefold())
        if same is None:
            raise PolymodalError(
                f"{where}: `label` = {label} is no class of the classifier.",
                did_you_mean(label, self.classes, f"It knows {', '.join(self.classes[:8])}, ..."),
            )
        return same

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU: projected image features, else pooled output, else mean over tokens."""
        out = []
        for pixels in self._batches(self.vision_processor, pictures):
            if hasattr(self.vision, "get_image_features"):
                vectors = _tensor(self.vision.get_image_features(pixel_values=pixels))
            else:
                made = self.vision(pixel_values=pixels)
                vectors = getattr(made, "pooler_output", None) if self.pooled else None
                if vectors is None:
                    hidden = made.last_hidden_state
                    vectors = hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))
            out.append(vectors.flatten(1).float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def likeness(self, pictures: Sequence[Image.Image], prompt: str) -> Tensor:
        """[N]: 100 x cosine of each picture and the prompt, at least 0.

        Hessel et al. 2021 (arXiv:2104.08718), without its factor.
        """
        tokens = self.clip_processor.tokenizer(
            [prompt], padding="max_length", truncation=True, return_tensors="pt"
        )
        text = _tensor(self.clip.get_text_features(**tokens.to(self.device)))
        batches = self._batches(self.clip_processor.image_processor, pictures)
        images = [_tensor(self.clip.get_image_features(pixel_values=pixels)) for pixels in batches]
        cosines = nn.functional.cosine_similarity(torch.cat(images).float(), text.float())
        return 100 * cosines.clamp(min=0).cpu()

    @torch.no_grad()
    def logits(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The classifier's, mean over the pictures, [classes]."""
        batches = self._batches(self.classifier_processor, pictures)
        return torch.cat([self.classifier(pixel_values=p).logits for p in batches]).float().mean(0).cpu()

    def _batches(self, processor: Any, pictures: Sequence[Image.Image]) -> Iterable[Tensor]:
        for at in range(0, len(pictures), BATCH):
            pixels = processor(images=list(pictures[at : at + BATCH]), return_tensors="pt")["pixel_values"]
            yield pixels.to(self.device, torch.float32)

    def vector(self, path: Path) -> np.ndarray:
        """Features of a file, float32 [D]: of a clip the mean over its frames."""
        return self.features(_shown(read(path))).mean(0).numpy()

    def of(self, path: Path, prompt: str) -> Measured:
        """What the named models and the pixels give for a sample's file."""
        frames = read(path)
        pictures = _shown(frames)
        out = Measured()
        if self.clip is not None:
            out.values["clip"] = float(self.likeness(pictures, prompt).mean())
        if self.vision is not None:
            vectors = self.features(pictures)
            out.vector = vectors.mean(0).numpy()
            if len(pictures) > 1:
                out.values["consistency"] = consistency(vectors)
        if self.classifier is not None:
            out.label = self.classes[int(self.logits(pictures).argmax())]
        if len(frames) > 1:
            out.values["motion"] = motion(frames)
        return out


def _processor(auto: Any, path: str, option: str) -> Any:
    with library_errors(f"{option} {path} has no processor", "Copy its preprocessor_config.json there."):
        return auto.from_pretrained(path, trust_remote_code=False)


def _shown(frames: np.ndarray) -> list[Image.Image]:
    chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    return [Image.fromarray(frames[i]) for i in chosen]
