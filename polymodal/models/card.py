"""The facts of a model: ModelCard, and the types that its Family (family.py) takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from polymodal.data.boxes import BoxFormat

Style = str
"""How a module is cut over ranks: a name known to parallel/tensor.py (STYLES)."""


def optional(plan: Mapping[str, Style]) -> dict[str, Style]:
    """A plan whose patterns need not match a module in every model of the card."""
    return {name if name.endswith("?") else f"{name}?": style for name, style in plan.items()}


@dataclass(frozen=True)
class Size:
    """A published size. `layout` is the recommended one, as recipe keys of `parallel`."""

    hub: str  # "Qwen/Qwen2.5-VL-7B-Instruct"
    parameters: float  # in billions
    layers: int  # language layers
    vision_layers: int = 0
    active: float | None = None  # billions of parameters a token meets (experts)
    devices: int = 8  # accelerators of 64-80 GB recommended for full fine-tuning
    layout: Mapping[str, Any] = field(default_factory=lambda: {"dp_shard": -1})
    clip: Mapping[str, Any] = field(default_factory=dict)  # where it differs from the card's
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its config, of models whose parameters and layers alone do not tell what a run takes; else empty."""


@dataclass(frozen=True)
class Chain:
    """Blocks that run one after the other, and between which a pipeline may be cut.

    blocks: their pattern, or several, one kind of blocks after the other; first, last: modules or parameters
    that are in one stage with the first and with the last of them, the first name of `last` being what takes
    the last block's output; carry: modules of `first` whose outputs every block reads, so that stages send
    them on. A name that not every model of the card has ends in `?`.
    """

    blocks: str | tuple[str, ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    carry: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """Facts. Patterns are module or parameter names with `*` for one dotted part."""

    name: str  # "qwen2.5-vl"
    family: type  # a subclass of models/family.py: Family
    architectures: tuple[str, ...]  # names in config.json that choose this card
    tasks: tuple[str, ...]  # "image-text-to-text", "video-text-to-text", ...
    blocks: tuple[str, ...]  # FSDP unit = recompute unit = compile unit
    towers: Mapping[str, tuple[str, ...]]  # {"vision": ("model.visual",), ...}: freeze, lr, LoRA, balance
    block_streams: tuple[str, ...] = ("hidden_states",)
    """Arguments of blocks that are passed from block to block, in the order in which blocks return them."""
    masked_rows: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the language model that go together: a mask of rows of the stream [1, T] -> a list of
    tensors that have one row for each True (or None); sequence parallelism cuts them alike."""
    num_leading_rows: str = ""
    """Argument of blocks that counts rows at the beginning of the stream that are treated apart, if any."""
    pipeline: Mapping[str, Chain] = field(default_factory=dict)
    """What pipeline stages are cut from: tower -> its chain of blocks, in the order of the forward pass."""
    sequence_plan: Mapping[str, Mapping[str | int, int]] = field(default_factory=dict)
    """Where a sequence is cut for CP: module -> {argument name, or output index: dimension}."""
    sequence_entry: str = ""  # module where the sequence is cut for CP
    sequence_exit: str = ""  # module whose output is gathered
    tensor_plan: Mapping[str, Style] = field(default_factory=dict)  # optional patterns end in `?`
    expert_plan: Mapping[str, Style] = field(default_factory=dict)  # styles of parallel/expert.py
    head: str = "lm_head"  # module name of the output projection
    embedding: str = ""  # module name of the input embedding
    sizes: Mapping[str, Size] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)  # {"pp": "why not"}
    aliases: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()  # what users type when they mean it
    kind: Literal["understanding", "generation", "omni", "audio"] = "understanding"
    title: str = ""  # as its authors write it, where the table's rule for names does not
    pipelines: Mapping[str, str] = field(
        default_factory=dict
    )  # generation: task -> diffusers' pipeline class
    clip: Mapping[str, Any] = field(default_factory=dict)
    """Generation: frames, rate and pixels that it was made for, as keys of data.clip of a new recipe."""
    verified: str = ""  # how it is checked here: "logits, gradients, keys on tiny models of the class"
    seeds: tuple[str, ...] = ()  # sizes named by the documents this follows
    boxes: BoxFormat | None = None  # how it writes boxes and points of pictures; None: not known
    methods: tuple[str, ...] = ()  # recipes besides sft and lora: "dreambooth"

    @property
    def speaks(self) -> bool:
        return self.kind == "audio" and "text-to-speech" in self.tasks

    @property
    def transcribes(self) -> bool:
        return "speech-recognition" in self.tasks

    @property
    def main(self) -> str:
        """The tower that gets adapters by default."""
        return "language" if "language" in self.towers else next(iter(self.towers))


@dataclass(frozen=True)
class Process:
    """The noise process that a family was trained with: what `auto` means in train.diffusion.

    flow:     x_s = (1 - s) x0 + s n, s in (0, 1); the model is asked for n - x0, or x0 - n where `reversed`.
    discrete: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) n over `alphas`; v_prediction = sqrt(a_t) n - sqrt(1 - a_t)
    x0.
    """

    kind: Literal["flow", "discrete"] = "flow"
    reversed: bool = False
    ascending: bool = False  # the model's timestep is 1 at the data (Lumina): it is given 1 - s
    scale: float = 1000.0  # the model's timestep is s times this
    density: str = "logit_normal"
    shift: float | Literal["dynamic"] = 1.0
    dynamic: Mapping[str, float] = field(
        default_factory=dict
    )  # {base,max}_image_seq_len, base_shift, max_shift
    by_size: Callable[[int, int, int], float] | None = None
    """(frames, height, width) of a sample -> its shift, where that is dynamic and does not go by tokens."""
    weighting: str = "none"
    prediction: str = "epsilon"
    alphas: tuple[float, ...] = ()  # a_t: cumulated products, as the scheduler has them
    range: tuple[float, float] = (0.0, 1.0)  # of s, where two models share the levels
    streams: tuple[str, ...] = ()
    """What is noised and trained beside the latents, at the same level: `<name>_latents` of a sample."""
    first_frame: bool = False  # the first latent frame of a clip is always given: no noise, no loss
    frame_input: bool = False
    """A given first frame is an input beside the latents, all of which have noise and loss."""
    guidance: float | None = (
        None  # the scale that a guidance-distilled model is trained with; None: no such input
    )
    per_token: bool = False  # each token has its timestep: 0 where a cell is given


@dataclass
class Output:
    """What a model's forward hands to an objective.

    hidden_states: [1, T, D] after the last norm (language models), or the prediction (diffusion).
    head:          the output projection's module; the objective multiplies by it in chunks, logits are never
    whole.
    extra:         router_logits (list of [T, E]) and the like.
    """

    hidden_states: Tensor
    head: nn.Module | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class PrunedModule(nn.Module):
    """In the place of a module of another pipeline stage: returns its first argument, has no parameters."""

    def forward(self, first: Any = None, *args: Any, **kwargs: Any) -> Any:
        return first
