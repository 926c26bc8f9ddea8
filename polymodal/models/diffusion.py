"""What a model that generates is to the rest of the house: its latents, its noise process, and the Generation family.

Sees the ground floor, card.py and diffusers. The architecture, the VAE, the text encoders and the sampling loop are
diffusers' and transformers'; a model's own file says which of their arguments are which.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.models.card import Components, Output, Process
from polymodal.models.family import Family

JOINT_BLOCKS = {
    "transformer_blocks.*.attn": "joint_attention",
    "transformer_blocks.*.attn.to_q": "colwise",
    "transformer_blocks.*.attn.to_k": "colwise",
    "transformer_blocks.*.attn.to_v": "colwise",
    "transformer_blocks.*.attn.add_q_proj": "colwise",
    "transformer_blocks.*.attn.add_k_proj": "colwise",
    "transformer_blocks.*.attn.add_v_proj": "colwise",
    "transformer_blocks.*.attn.to_out.0": "rowwise",
    "transformer_blocks.*.attn.to_add_out": "rowwise",
    "transformer_blocks.*.ff": "feed_forward",
    "transformer_blocks.*.ff.net.0.proj": "colwise",
    "transformer_blocks.*.ff.net.2": "rowwise",
    "transformer_blocks.*.ff_context": "feed_forward",
    "transformer_blocks.*.ff_context.net.0.proj": "colwise",
    "transformer_blocks.*.ff_context.net.2": "rowwise",
}
"""Tensor plan of blocks with a stream of the picture and one of text, as FLUX's and HunyuanVideo's are."""


NOT_OF_LATENTS = re.compile(
    r"\.(norm\w*|\w+_mod|\w+_context|add_\w+|to_add_out|txt_\w+|attn2\.(to|add)_[kv]\w*)(\.|$)"
)
"""Parameters of diffusers' blocks that compute no tokens of the latents: of the text, and modulation, once a sample."""


@dataclass(frozen=True)
class LatentGrid:
    """How pixels become latents and latents tokens: lengths in frames, sides in pixels."""

    channels: int  # of the latents
    time: int  # video frames that one latent frame holds (but the first, which holds one)
    space: int  # pixels along a side of a latent cell
    patch: tuple[int, int, int] = (1, 1, 1)  # latent cells that one token holds (frames, height, width)
    still: bool = False  # pictures only: latents have no axis of frames
    least: int = 1  # frames that a sample must have: more than one where a picture does not do
    sound: int = 0  # samples a second of the sound that clips are learned with; 0 = none
    size: tuple[int, int] | None = (
        None  # height and width of every frame, where the denoiser's places are learned
    )
    references: bool = False  # pictures referred to are latent frames of their own, before the clip's

    @property
    def side(self) -> int:
        """Sides of frames are multiples of this many pixels."""
        return self.space * max(self.patch[1], self.patch[2])

    def shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """[channels, frames, height, width] of the latents; [channels, height, width] of pictures."""
        cells = (height // self.space, width // self.space)
        return (
            (self.channels, *cells) if self.still else (self.channels, (frames - 1) // self.time + 1, *cells)
        )

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens that the denoiser sees."""
        f, h, w = (frames - 1) // self.time + 1, height // self.space, width // self.space
        return -(-f // self.patch[0]) * (h // self.patch[1]) * (w // self.patch[2])

    def fits(self, frames: int) -> bool:
        """Whether a video of so many frames becomes whole latents, and those whole tokens."""
        whole = (frames - 1) % self.time == 0
        return frames >= self.least and whole and ((frames - 1) // self.time + 1) % self.patch[0] == 0


class Generation(Family):
    """A denoiser between frozen encoders. config: the denoiser's config.json; source: the pipeline's directory.

    Tensors of a sample are named by what the denoiser calls them, so that `denoise` hands them through: `latents`
    [B, C, F, H, W] (images: F = 1 where the denoiser has frames, else [B, C, H, W]), text embeddings in `text`,
    image conditions in `media`. All are batch-first. A recipe's choices: attention.
    """

    layout = "uniform"
    part = "transformer"  # the denoiser's name in the pipeline and its directory
    denoisers: tuple[str, ...] = ()  # all of the pipeline's, where there are more than `part`
    text: tuple[str, ...] = ("encoder_hidden_states",)  # made of a caption, dropped for guidance
    media: tuple[str, ...] = ()  # made of pixels besides the latents
    given: tuple[str, ...] = ()  # roles of what a sample is made from that encode_media takes, by name
    needed: tuple[str, ...] = ()  # of these, those that every sample must have
    asks: tuple[
        str, ...
    ] = ()  # options that sampling needs, beside those that the pipeline's own call demands
    sees: bool = False  # captions are encoded together with the first frame
    alone: bool = False  # the pipeline makes one sample at a time
    documented: Mapping[str, str] = {}  # our name -> the name in the documented features/*.pt
    zero: tuple[
        str, ...
    ] = ()  # patterns of parameters that a model trained from nothing starts with as zeros
    attention = "auto"
    experts = "auto"

    @property
    def routes(self) -> Mapping[str, str]:
        """Task -> diffusers' pipeline class, of what this checkpoint can do: the card's, unless its config rules some out."""
        return self.card.pipelines

    @classmethod
    def claims(cls, index: Mapping[str, Any]) -> bool:
        """Whether a pipeline of the card's class is of this family, by its model_index.json."""
        return True

    # ------------------------------------------------------------------ facts, from the directory's config files

    def grid(self) -> LatentGrid:
        """From the VAE's config and the denoiser's patch size."""
        raise NotImplementedError

    def process(self) -> Process:
        """The noise process, from the scheduler's config."""
        raise NotImplementedError

    def encoders(self) -> list[str]:
        """The pipeline's parts with weights that are no denoiser."""
        from polymodal.models import pipelines

        skipped = self.denoisers or (self.part,)
        return [name for name in pipelines.models_of(self.source) if name not in skipped]

    def component_config(self, name: str) -> dict[str, Any]:
        """A component's config file (scheduler_config.json, tokenizer_config.json), {} when it is not there."""
        folder = Path(self.source) / name
        for file in ("scheduler_config.json", "tokenizer_config.json", "config.json"):
            if (folder / file).is_file():
                return dict(json.loads((folder / file).read_text(encoding="utf-8")))
        return {}

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return dict(json.loads((Path(self.source) / "model_index.json").read_text(encoding="utf-8")))

    @property
    def weights_source(self) -> Path:
        """The denoiser's own directory."""
        return Path(self.source) / self.part

    # ------------------------------------------------------------------ building

    def build(self) -> Components:
        from polymodal.models import pipelines

        model = pipelines.empty(self.config)
        return Components(model.train())

    def check(self) -> None:
        """Raise PolymodalError for a pipeline that this family cannot train."""
        missing = [name for name in (self.part, "vae") if not (Path(self.source) / name).is_dir()]
        if missing:
            raise PolymodalError(
                f"{self.source} has no directory {' and no '.join(missing)}, so it is not a whole pipeline of {self.card.name}.",
                "Fetch the checkpoint in diffusers' layout (its name often ends in -Diffusers).",
            )
        scheduler = self.component_config("scheduler")
        name = str(scheduler.get("_class_name", ""))
        flow = (
            name.startswith("FlowMatch")
            or bool(scheduler.get("use_flow_sigmas"))
            or scheduler.get("prediction_type") == "flow_prediction"
        )
        if scheduler and not flow and self.process().kind == "flow":
            raise PolymodalError(
                f"The scheduler of {self.source}, {name}, is none of flow matching, which {self.card.name} is trained and sampled by.",
                "Take the directory `scheduler` of the published checkpoint.",
            )

    # ------------------------------------------------------------------ encoding, by the pipeline's own code

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> the tensors of `text`, batch-first, on the pipeline's device.

        A family that `sees` takes `pixels` [B, 3, F, H, W] in -1..1 besides; without them the frame is black.
        """
        raise NotImplementedError

    @staticmethod
    def shown(frames: Tensor) -> list[Any]:
        """Frames [B, 3, H, W] in -1..1 -> uint8 arrays [H, W, 3], as image processors take them."""
        moved = (frames.float().permute(0, 2, 3, 1) + 1) * 127.5
        return list(moved.round().clamp(0, 255).byte().cpu().numpy())

    def encode_media(self, pipeline: Any, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, F, H, W] in -1..1 -> `latents` as the denoiser sees them (normalised), and the tensors of `media`.

        given: of the roles of `given` those that a sample has, alike in shape and range (references: F pictures; sound
        [B, 2, samples]; rate [B], frames a second); B is then 1.
        """
        raise NotImplementedError

    def trial(self, frames: int) -> dict[str, Tensor]:
        """What encode_media is given beside random pixels when an export is proven, by role."""
        return {}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them -> pixels [B, 3, F, H, W] in -1..1."""
        raise NotImplementedError

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of one sample's text and media tensors beside latents of this shape, by the config alone: what `plan` runs."""
        raise NotImplementedError

    def example(self, measure: SampleLengths) -> Batch:
        frames, height, width = measure.shape
        grid = self.grid()
        latents = grid.shape(frames, height, width)
        beside = self.shapes(latents)
        if {*self.text, *self.media} - set(beside):
            raise NotImplementedError
        tensors = {n: torch.zeros(1, *shape) for n, shape in {"latents": latents, **beside}.items()}
        tensors["weight"] = torch.ones(1)
        axes: dict[str, Any] = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
        if not grid.still:
            axes["latents"] = ("batch", "none", "frame", "none", "none")
        kind = "video" if frames > 1 else "image"
        groups = {"seeds": (0,), "tokens": (measure.tokens,), "shape": measure.shape, "kind": kind}
        return Batch(tensors, axes, (0,), groups=groups)

    # ------------------------------------------------------------------ the denoiser

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """One call of the denoiser: the prediction, of the latents' shape. latents, text and media in its dtype."""
        raise NotImplementedError

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        return Output(self.denoise(model, batch["noisy"].to(self.dtype(model)), batch["timestep"], batch))

    def dtype(self, model: nn.Module) -> torch.dtype:
        """What the denoiser computes in: that of the first parameter that is no block's (gathered while it runs).
        float32 in a pipeline stage that has blocks only: nothing but shapes is looked at there."""
        heads = tuple(pattern.partition("*")[0].rstrip(".") + "." for pattern in self.card.blocks)
        own = (
            p.dtype for n, p in model.named_parameters() if not n.startswith(heads) and p.is_floating_point()
        )
        return next(own, torch.float32)

    def conditions(self, model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """These tensors of a batch in the denoiser's dtype, those that are there."""
        dtype = self.dtype(model)
        found = {name: batch[name] for name in names if name in batch.tensors}
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}

    @staticmethod
    def guidance(batch: Batch, latents: Tensor) -> Tensor:
        """The scale shown to a guidance-distilled model, float32 [B]: the batch's, else 1."""
        shown = batch.get("guidance")
        return latents.new_ones(len(latents), dtype=torch.float32) if shown is None else shown.float()

    @staticmethod
    def forward(model: nn.Module) -> Any:
        """The class's own forward: the instance's ends in the loss (train.step.bind). Where sequences are cut over
        ranks by the root's arguments (a sequence_plan for ""), these are cut on the way."""
        from polymodal.models import library

        own = library.class_of(model).forward.__get__(model)
        cut = getattr(model, "sequence_cut", None)
        return own if cut is None else cut.around(own)

    # ------------------------------------------------------------------ sampling

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of `polymodal generate` -> arguments of the pipeline's call."""
        return asked

    def tune(self, pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """The same, where some options are settings of the pipeline's parts, or depend on them."""
        return self.arguments(asked)

    # ------------------------------------------------------------------ cost

    def cost(self, measure: SampleLengths) -> float:
        """Forward FLOPs: 2 x parameters that a token meets x tokens, and 4 x tokens^2 x width a layer for attention."""
        tokens = measure.tokens
        layers, width, parameters = self.size()
        return 2.0 * parameters * tokens + 4.0 * layers * width * tokens * tokens

    def size(self) -> tuple[int, int, float]:
        """(layers, width, parameters of the blocks that every token of the latents meets), counted once on meta."""
        if not hasattr(self, "_size"):
            names = {n: p.numel() for n, p in self.build().trained.named_parameters()}
            expressions = [
                re.compile(re.escape(p).replace(r"\*", r"[^.]+") + r"(?=\.)") for p in self.card.blocks
            ]
            found = [(hit[0], n) for n in names for e in expressions if (hit := e.match(n))]
            count = sum(names[n] for block, n in found if not NOT_OF_LATENTS.search(n[len(block) :]))
            self._size = max(1, len({block for block, _ in found})), self.width(), float(count)
        return self._size

    def width(self) -> int:
        """Hidden size of the blocks."""
        return int(self.config["num_attention_heads"]) * int(self.config["attention_head_dim"])
