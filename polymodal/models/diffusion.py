"""Generation, the family of denoisers: latents, noise process, encoding, the denoiser's call, sampling.

Architecture, VAE, text encoders and sampling loop are diffusers'; a model's own file names their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import Batch, SampleLengths
from polymodal.models import library, pipeline_index, pipelines
from polymodal.models.card import ModelCard, Output, Process
from polymodal.models.family import Family

DYNAMIC_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def flow_process(scheduler: Mapping[str, Any], **facts: Any) -> Process:
    """Flow matching with the shift of a FlowMatchEulerDiscreteScheduler's config."""
    if scheduler.get("use_dynamic_shifting"):
        dynamic = {key: float(scheduler.get(key, default)) for key, default in DYNAMIC_SHIFT.items()}
        return Process(shift="dynamic", dynamic=dynamic, **facts)
    return Process(shift=float(scheduler.get("shift", 1.0)), **facts)


def discrete_process(scheduler: Mapping[str, Any]) -> Process:
    """The discrete process of a scheduler's config: its own class computes the products."""
    import diffusers

    name = str(scheduler["_class_name"])
    made = getattr(diffusers, name).from_config(scheduler)
    if not hasattr(made, "alphas_cumprod"):
        raise PolymodalError(
            f"The pipeline's scheduler, {name}, has no discrete timesteps, "
            "which this model is trained and sampled by.",
            "Take the directory `scheduler` of the published checkpoint.",
        )
    alphas = tuple(made.alphas_cumprod.double().tolist())
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    return Process("discrete", density="uniform", alphas=alphas, prediction=prediction)


NOT_OF_LATENTS = re.compile(
    r"\.(norm\w*|\w+_mod|\w+_context|add_\w+|to_add_out|txt_\w+|attn2\.(to|add)_[kv]\w*)(\.|$)"
)
"""Parameters of diffusers' blocks that compute no tokens of the latents: of the text, and modulation."""


@dataclass(frozen=True)
class LatentGrid:
    """How pixels become latents and latents tokens: lengths in frames, sides in pixels."""

    channels: int  # of the latents
    time: int  # video frames that one latent frame holds (but the first, which holds one)
    space: int  # pixels along a side of a latent cell
    patch: tuple[int, int, int] = (1, 1, 1)  # latent cells that one token holds (frames, height, width)
    still: bool = False  # pictures only: latents have no axis of frames
    least: int = 1  # frames that a sample must have: more than one where a picture does not do
    sound: int = 0  # sample rate of the sound that clips are trained with; 0 = none
    size: tuple[int, int] | None = None  # (height, width) of every frame, if positions are learned
    references: bool = False  # reference pictures are latent frames of their own, before the clip's

    @property
    def side(self) -> int:
        """Sides of frames are multiples of this many pixels."""
        return self.space * max(self.patch[1], self.patch[2])

    def _cells(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return (frames - 1) // self.time + 1, height // self.space, width // self.space

    def shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """[channels, frames, height, width] of the latents; [channels, height, width] of pictures."""
        cells = self._cells(frames, height, width)
        return (self.channels, *(cells[1:] if self.still else cells))

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens that the denoiser sees."""
        f, h, w = self._cells(frames, height, width)
        return -(-f // self.patch[0]) * (h // self.patch[1]) * (w // self.patch[2])

    def fits(self, frames: int) -> bool:
        """Whether a video of so many frames becomes whole latents, and those whole tokens."""
        latent_frames, rest = divmod(frames - 1, self.time)
        return frames >= self.least and not rest and (latent_frames + 1) % self.patch[0] == 0


@dataclass(frozen=True)
class ChunkGrid(LatentGrid):
    """Clips are coded in chunks of so many frames, each to ceil(chunk / time) latent frames of its own."""

    chunk: int = 17

    def _cells(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        whole, rest = divmod(frames, self.chunk)
        count = whole * -(-self.chunk // self.time) + -(-rest // self.time)
        return count, height // self.space, width // self.space

    def fits(self, frames: int) -> bool:
        return frames == 1 or frames % self.chunk == 0


class Generation(Family):
    """A denoiser between frozen encoders. config: its config.json; source: the pipeline's directory.

    Tensors of a sample are named as the denoiser's arguments: `latents` [B, C, F, H, W] (images: F = 1 where
    the denoiser has frames, else [B, C, H, W]), text embeddings in `text`, image conditions in `media`. All
    are batch-first. A `condition` in `media` is concatenated to the latents' channels.
    """

    layout = "uniform"
    part = "transformer"  # the denoiser's name in the pipeline and its directory
    denoisers: tuple[str, ...] = ()  # all of the pipeline's, where there are more than `part`
    text: tuple[str, ...] = ("encoder_hidden_states",)  # made of a caption, dropped for guidance
    kept: tuple[str, ...] = ()  # of these, the ones that a dropped caption keeps: its mask
    prompt_outputs: tuple[str, ...] = ("encoder_hidden_states",)  # what encode_prompt returns; "": not used
    media: tuple[str, ...] = ()  # made of pixels besides the latents
    given: tuple[str, ...] = ()  # roles of what a sample is made from that encode_media takes, by name
    needed: tuple[str, ...] = ()  # of these, those that every sample must have
    asks: tuple[str, ...] = ()  # options that sampling needs, beside those that the pipeline's call demands
    sees: bool = False  # captions are encoded together with the first frame
    alone: bool = False  # the pipeline makes one sample at a time
    documented: Mapping[str, str] = {}  # our name -> the name in the documented features/*.pt
    zero: tuple[str, ...] = ()  # patterns of parameters that are zeros in a model trained from nothing
    noise: Mapping[str, Any] = {}  # facts of Process that the scheduler's config does not have
    distilled: bool = False  # a guidance scale is an input of the denoiser
    shipped: Mapping[str, Mapping[str, Any]] = {}  # configs of parts, in the place of a directory's

    @classmethod
    def published(cls, card: ModelCard, key: str) -> Generation:
        """The family of a published size by the configs of its card alone: part -> what its class does not
        have by default. There is no directory."""
        size = card.sizes[key]
        made = cls(card, {}, size.hub)
        made.shipped = size.config
        made.config = {**dict(size.config[cls.part])}
        made.config = dict(made.build().config)  # type: ignore[arg-type]
        return made

    @property
    def routes(self) -> Mapping[str, str]:
        """Task -> diffusers' pipeline class, of what this checkpoint can do."""
        return self.card.pipelines

    # -- facts, from the directory's config files

    def grid(self) -> LatentGrid:
        """From the VAE's config and the denoiser's patch size."""
        raise NotImplementedError

    def process(self) -> Process:
        """The noise process, from the scheduler's config."""
        guidance = 1.0 if self.distilled else None
        return flow_process(self.component_config("scheduler"), guidance=guidance, **self.noise)

    def encoders(self) -> list[str]:
        """The pipeline's parts with weights that are no denoiser."""
        skipped = self.denoisers or (self.part,)
        return [name for name in pipeline_index.models_of(self.source) if name not in skipped]

    def component_config(self, name: str) -> dict[str, Any]:
        """A component's config file (scheduler_config.json, tokenizer_config.json) or {}."""
        files = ("scheduler_config.json", "tokenizer_config.json", "config.json")
        paths = (Path(self.source) / name / file for file in files)
        return next((read_json(path) for path in paths if path.is_file()), dict(self.shipped.get(name, {})))

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return pipeline_index.read_index(self.source)

    @property
    def weights_source(self) -> Path:
        """The denoiser's own directory."""
        return Path(self.source) / self.part

    # -- building

    def build(self) -> nn.Module:
        return pipelines.empty(self.config).train()

    def check(self) -> None:
        """Raise PolymodalError for a pipeline that this family cannot train."""
        parts = () if self.shipped else (self.part, "vae")
        missing = [name for name in parts if not (Path(self.source) / name).is_dir()]
        if missing:
            raise PolymodalError(
                f"{self.source} has no directory {' and no '.join(missing)}, "
                f"so it is not a whole pipeline of {self.card.name}.",
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
                f"The scheduler of {self.source}, {name}, is none of flow matching, "
                f"which {self.card.name} is trained and sampled by.",
                "Take the directory `scheduler` of the published checkpoint.",
            )

    # -- encoding, by the pipeline's own code

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> the tensors of `text`, batch-first, on the pipeline's device.

        A family that `sees` takes `pixels` [B, 3, F, H, W] in -1..1 besides; without them the frame is black.
        """
        made = pipeline.encode_prompt(list(captions), **self.prompt_options())
        return {name: tensor for name, tensor in zip(self.prompt_outputs, made, strict=False) if name}

    def prompt_options(self) -> dict[str, Any]:
        """Arguments of encode_prompt beside the captions."""
        return {"do_classifier_free_guidance": False}

    @staticmethod
    def shown(frames: Tensor) -> list[Any]:
        """Frames [B, 3, H, W] in -1..1 -> uint8 arrays [H, W, 3], as image processors take them."""
        moved = (frames.float().permute(0, 2, 3, 1) + 1) * 127.5
        return list(moved.round().clamp(0, 255).byte().cpu().numpy())

    def encode_media(self, pipeline: Any, pixels: Tensor, **given: Tensor) -> dict[str, Tensor]:
        """Pixels [B, 3, F, H, W] in -1..1 -> normalised `latents` and the tensors of `media`.

        given: of the roles of `given` those that a sample has, alike in shape and range (references: F
        pictures; sound [B, 2, samples]; rate [B], frames a second); B is then 1.
        """
        raise NotImplementedError

    def trial(self, frames: int) -> dict[str, Tensor]:
        """What encode_media is given beside random pixels when an export is checked, by role."""
        return {}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them -> pixels [B, 3, F, H, W] in -1..1."""
        raise NotImplementedError

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample's text and media tensors beside such latents, by the config alone, for
        `plan`."""
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

    # -- the denoiser

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """One call of the denoiser: the prediction, of the latents' shape."""
        given = self.inputs(model, latents, batch)
        condition = given.pop("condition", None)
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        (prediction,) = self.forward(model)(latents, timestep=timestep, return_dict=False, **given)
        return prediction

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        """Arguments of the denoiser beside the latents and the timestep: `text` and `media` in its dtype."""
        return dict(self.conditions(model, batch, (*self.text, *self.media)))

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        return Output(self.denoise(model, batch["noisy"].to(self.dtype(model)), batch["timestep"], batch))

    def dtype(self, model: nn.Module) -> torch.dtype:
        """What the denoiser computes in: that of the first parameter that is no block's (gathered while it
        runs). float32 in a pipeline stage that has blocks only, where nothing but shapes counts."""
        heads = tuple(pattern.partition("*")[0].rstrip(".") + "." for pattern in self.card.blocks)
        outside = (p for n, p in model.named_parameters() if not n.startswith(heads))
        return next((p.dtype for p in outside if p.is_floating_point()), torch.float32)

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
        """The class's own forward: the instance's ends in the loss (train.step.bind). Where sequences are cut
        over ranks by the root's arguments (a sequence_plan for ""), these are cut on the way."""
        own = library.class_of(model).forward.__get__(model)
        cut = getattr(model, "sequence_cut", None)
        return own if cut is None else cut.around(own)

    # -- sampling

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Options of `polymodal generate` -> arguments of the pipeline's call."""
        return asked

    def tune(self, pipeline: Any, asked: dict[str, Any]) -> dict[str, Any]:
        """The same, where some options are settings of the pipeline's parts, or depend on them."""
        return self.arguments(asked)

    # -- cost

    def cost(self, measure: SampleLengths) -> float:
        """Forward FLOPs: 2 x parameters that a token meets x tokens, and 4 x tokens^2 x width a layer."""
        tokens = measure.tokens
        layers, width, parameters = self.size()
        return 2.0 * parameters * tokens + 4.0 * layers * width * tokens * tokens

    def size(self) -> tuple[int, int, float]:
        """(layers, width, parameters of the blocks that each token of the latents meets), counted on meta."""
        if not hasattr(self, "_size"):
            patterns = (re.escape(p).replace(r"\*", r"[^.]+") + r"(?=\.)" for p in self.card.blocks)
            block = re.compile("|".join(patterns))
            parameters = dict(self.build().named_parameters())
            found = {name: hit[0] for name in parameters if (hit := block.match(name))}
            meets = [name for name, at in found.items() if not NOT_OF_LATENTS.search(name[len(at) :])]
            count = sum(parameters[name].numel() for name in meets)
            self._size = max(1, len(set(found.values()))), self.width(), float(count)
        return self._size

    def width(self) -> int:
        """Hidden size of the blocks."""
        return int(self.config["num_attention_heads"]) * int(self.config["attention_head_dim"])


class FirstFrameChannels(Generation):
    """A denoiser of clips that sees a first frame where it has more channels than it predicts."""

    @property
    def conditioned(self) -> bool:
        return int(self.config["in_channels"]) > int(self.config["out_channels"])

    @property
    def routes(self) -> Mapping[str, str]:
        image = "image-to-video"
        return {t: p for t, p in self.card.pipelines.items() if (t == image) == self.conditioned}


class GuidanceDistilled(Generation):
    """A denoiser whose distilled checkpoints take a guidance scale and no negative prompt."""

    @property
    def distilled(self) -> bool:  # type: ignore[override]
        return bool(self.config.get("guidance_embeds"))

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.distilled and any(asked.get("negative_prompt") or ()):
            raise PolymodalError(
                f"{self.card.name} was distilled for guidance: it takes no negative prompt.",
                "Leave it out; --guidance is an input of this model.",
            )
        return asked


def one_prompt(asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline that takes one prompt and not a list of one."""
    texts = ("prompt", "negative_prompt")
    return {n: v[0] if n in texts and isinstance(v, list) else v for n, v in asked.items()}
