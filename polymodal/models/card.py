"""What a model is to the rest of the house: ModelCard (facts), Family (the few calls that differ), Output.

Sees the ground floor only. A model's own file holds one ModelCard and, where a fact is not enough, a Family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.data.sample import Batch, Measure, MediaProcessor

Style = str
"""How a module is cut over ranks: a name known to parallel/tensor.py (STYLES)."""


@dataclass(frozen=True)
class Size:
    """A published size. `layout` is the recommended one, as recipe keys of `parallel`, by task."""

    hub: str  # "Qwen/Qwen2.5-VL-7B-Instruct"
    parameters: float  # in billions
    layers: int  # language layers
    vision_layers: int = 0
    active: float | None = None  # billions of parameters a token meets (experts)
    devices: int = 8  # accelerators of 64-80 GB recommended for full fine-tuning
    layout: Mapping[str, Any] = field(default_factory=dict)
    clip: Mapping[str, Any] = field(default_factory=dict)  # where it differs from the card's


@dataclass(frozen=True)
class Chain:
    """Blocks that run one after the other, and that a pipeline may be cut between.

    blocks: their pattern, or several, one kind of blocks after the other; first, last: modules or parameters that lie
    with the first and with the last of them, the first name of `last` being what takes the last block's output; carry:
    modules of `first` whose outputs every block reads, so that they travel from stage to stage. A name that not every
    model of the card has ends in `?`.
    """

    blocks: str | tuple[str, ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    carry: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """Facts. Patterns are module or parameter names with `*` for one dotted part."""

    name: str  # "qwen2.5-vl"
    family: type[Family]
    architectures: tuple[str, ...]  # names in config.json that choose this card
    tasks: tuple[str, ...]  # "image-text-to-text", "video-text-to-text", ...
    blocks: tuple[str, ...]  # FSDP unit = recompute unit = compile unit
    towers: Mapping[str, tuple[str, ...]]  # {"vision": ("model.visual",), ...}: freeze, lr, LoRA, balance
    streams: tuple[str, ...] = ("hidden_states",)
    """Arguments of blocks that are handed on from block to block, in the order in which blocks give them back."""
    leading: str = ""
    """Argument of blocks that counts rows at the beginning of the stream which are treated apart, if there is one."""
    pipeline: Mapping[str, Chain] = field(default_factory=dict)
    """What pipeline stages are cut from: tower -> its chain of blocks, in the order of the forward pass."""
    sequence_plan: Mapping[str, Mapping[str | int, int]] = field(default_factory=dict)
    """Where a sequence is cut for CP: module -> {argument name, or output index: dimension}."""
    sequence_entry: str = ""  # module where the sequence is cut for CP
    sequence_exit: str = ""  # module whose output is gathered
    tensor_plan: Mapping[str, Style] = field(
        default_factory=dict
    )  # a pattern that may fit nothing ends in `?`
    expert_plan: Mapping[str, Style] = field(default_factory=dict)  # styles of parallel/expert.py
    head: str = "lm_head"  # module name of the output projection
    embedding: str = ""  # module name of the input embedding
    sizes: Mapping[str, Size] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)  # {"pp": "why not"}
    aliases: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()  # what people type when they mean it
    kind: Literal["understanding", "generation", "omni", "audio"] = "understanding"
    title: str = ""  # as its authors write it, where the table's rule for names does not
    pipelines: Mapping[str, str] = field(
        default_factory=dict
    )  # generation: task -> diffusers' pipeline class
    clip: Mapping[str, Any] = field(default_factory=dict)
    """Generation: frames, rate and pixels that it was made for, as keys of data.clip; what recipes begin with."""
    verified: str = ""  # how it is checked here: "logits, gradients, keys on tiny models of the class"
    seeds: tuple[str, ...] = ()  # sizes named by the documents this follows
    methods: tuple[str, ...] = ()  # recipes besides sft and lora: "dreambooth"

    @property
    def main(self) -> str:
        """The tower that adapters go to unless the recipe says otherwise."""
        return "language" if "language" in self.towers else next(iter(self.towers))


@dataclass(frozen=True)
class Process:
    """The noise process that a family was trained with: what `auto` means in train.diffusion.

    flow:     x_s = (1 - s) x0 + s n, s in (0, 1); the model is asked for n - x0, or x0 - n where `reversed`.
    discrete: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) n over `alphas`; epsilon = n, v_prediction = sqrt(a_t) n - sqrt(1 - a_t) x0.
    """

    kind: Literal["flow", "discrete"] = "flow"
    reversed: bool = False
    ascending: bool = False  # the model's timestep is 1 at the data (Lumina): it is given 1 - s
    scale: float = 1000.0  # the model's timestep is s times this
    density: str = "logit_normal"
    shift: float | Literal["dynamic"] = 1.0
    dynamic: Mapping[str, float] = field(
        default_factory=dict
    )  # base_image_seq_len, max_image_seq_len, base_shift, max_shift
    weighting: str = "none"
    prediction: str = "epsilon"
    alphas: tuple[float, ...] = ()  # a_t: cumulated products, as the scheduler has them
    range: tuple[float, float] = (0.0, 1.0)  # of s, where two models share the levels
    streams: tuple[str, ...] = ()
    """What is noised and learned beside the latents, at the same level: `<name>_latents` of a sample; it may be missing."""
    first_frame: bool = False  # the first latent frame of a clip is always given: no noise, no loss
    guidance: float | None = (
        None  # the scale that training shows a guidance-distilled model; None: no such input
    )
    per_token: bool = False  # each token has its timestep: 0 where a cell is given


@dataclass
class Output:
    """What a model's forward hands to an objective.

    hidden_states: [1, T, D] after the last norm (language models), or the prediction (diffusion).
    head:          the output projection's module; the objective multiplies by it in chunks, logits are never whole.
    extra:         router_logits (list of [T, E]) and the like.
    """

    hidden_states: Tensor
    head: nn.Module | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Components:
    """The parts of a model: `trained` is what the optimizer sees; `frozen` are VAE, text encoders and the like."""

    trained: nn.Module
    frozen: dict[str, nn.Module] = field(default_factory=dict)


class Dropped(nn.Module):
    """Stands where a module of another pipeline stage was; hands its first argument through, has no parameters."""

    def forward(self, first: Any = None, *args: Any, **kwargs: Any) -> Any:
        return first


class Family:
    """The calls that differ between families. One instance a run; holds the config and the card, no weights."""

    layout: Literal["packed", "padded", "uniform"] = "packed"
    line: str = ""  # what several cards have in common, as the directory of their recipes is called

    def __init__(self, card: ModelCard, config: Any, source: str):
        self.card = card
        self.config = config
        self.source = source

    def build(self) -> Components:
        """The model on the meta device, parameters float32, attention set to the house's own."""
        raise NotImplementedError

    def media_processor(self, data: Any) -> MediaProcessor:
        """Knowledge of tokens and pixels; `data` is the recipe's data section."""
        raise NotImplementedError

    def cost(self, measure: Measure) -> float:
        """Forward FLOPs of one sample on the whole model (x 3 for training); balance, MFU and plan share it."""
        return sum(self.costs(measure).values())

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        """The whole model on a batch, by its own forward. What `stage` cuts, unless a family cuts itself."""
        raise NotImplementedError

    def stage(self, model: nn.Module, carry: Any, batch: Batch) -> Any:
        """One pipeline stage: carry (None on the first) -> carry, or Output on the last. Without a pipeline, all.

        By default the model's own forward between the blocks that are here, as the card's chain says.
        """
        from polymodal.models import partial

        return partial.stage(self, model, carry, batch)

    def carry_spec(self, batch: Batch, before: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """What travels over a cut for such a batch: meta tensors in wire order.

        before: how many blocks of each chain lie before the cut; dtype: of the activations. What the batch holds or
        can tell need not travel: every stage has the batch. By default the stream and what the card's chain carries.
        """
        from polymodal.models import partial

        return partial.carry_spec(self, batch, dtype)

    def beside(self) -> dict[str, str]:
        """Modules that lie in a pipeline stage with a certain block, as the config says: module -> block."""
        return {}

    def costs(self, measure: Measure) -> dict[str, float]:
        """Forward FLOPs of one sample, by the module pattern that spends them; their sum is `cost`."""
        raise NotImplementedError

    def places(self, batch: Batch) -> Tensor:
        """Where media features stand among the tokens of a batch: bool [1, T]."""
        raise NotImplementedError

    def media_parts(self, grid: Tensor) -> list[tuple[int, int, int]]:
        """The smallest parts of media [M, 3] that the tower computes independently of each other, as grids in the
        order of their patches."""
        return [(t, h, w) for t, h, w in grid.tolist()]

    def media_tokens(self, part: tuple[int, int, int]) -> int:
        """Tokens of the text stream that features of such a part stand at."""
        raise NotImplementedError

    def example(self, measure: Measure) -> Batch:
        """A micro-batch of one sample of these sizes, without data: what `plan` runs. Floating-point tensors are zeros."""
        raise NotImplementedError

    def balance(self, weight: float | None) -> dict[str, Any]:
        """Arguments of the objective's router term: {} without experts; weight None = the checkpoint's own."""
        text = getattr(self.config, "text_config", self.config)
        chosen = getattr(text, "num_experts_per_tok", 0) if getattr(text, "num_experts", 0) else 0
        if not chosen:
            return {}
        own = getattr(text, "router_aux_loss_coef", 0.0)
        return {"aux_weight": own if weight is None else weight, "experts_per_token": chosen}

    def routers(self) -> tuple[int, int]:
        """Layers with experts, and experts of each; (0, 0) without any."""
        text = getattr(self.config, "text_config", self.config)
        experts = getattr(text, "num_experts", 0) or 0
        return (text.num_hidden_layers, experts) if experts else (0, 0)

    def generate(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Sampling, by the library's own model."""
        raise NotImplementedError
