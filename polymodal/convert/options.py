"""What `mm-convert` takes on the command line, in YAML and from the environment: the documented names, typed.

Imports no torch, so that help is printed at once. The docstring under a field is its help.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

Lists = list[int] | list[list[int]]


@dataclass
class HubConfig:
    """A hub checkpoint on disk."""

    hf_dir: str
    """Directory with config.json and the safetensors files."""


@dataclass
class LanguageParallel:
    """How a tree of an understanding model is cut."""

    llm_pp_layers: Lists = field(default_factory=list)
    """Language layers on each stage: [6,10] for two pipeline ranks, [[3,5],[3,5]] for two virtual stages on
    each. Empty: not cut, or, reading, as the tree is."""
    vit_pp_layers: Lists = field(default_factory=list)
    """Vision layers on each stage, in the same form."""
    audio_pp_layers: Lists = field(default_factory=list)
    """Audio layers on each stage, in the same form."""
    tp_size: int = 1
    """Tensor parallel size."""
    vit_tp_size: int = 0
    """Tensor parallel size of the vision tower; 0 = tp_size."""
    audio_tp_size: int = 0
    """Tensor parallel size of the audio tower; 0 = tp_size."""
    ep_size: int = 1
    """Expert parallel size."""


@dataclass
class ModelOptions:
    """Which of a family's layouts is meant."""

    enable_canonical_hf_struct: bool = False
    """Keep q, k, v and gate, up apart, as the hub has them. Adapters need it."""
    new_transformers_weight_key: bool | None = None
    """LoRA: whether the hub's keys have model.language_model and model.visual, as the library's modules are
    called now. Left out: as the adapter has them; written, yes."""
    model_prefix: str = ""
    """LoRA: what the hub's keys begin with. Left out: base_model.model., as peft writes them."""


@dataclass(kw_only=True)
class OneTree:
    """A tree, and how it is cut."""

    mm_dir: str
    """The tree: where it goes, or where it is (or one iteration of it)."""
    parallel_config: LanguageParallel = field(default_factory=LanguageParallel)
    """How the tree is cut. Reading, lists may be left out: the tree is looked at, what is given is compared
    with it."""
    common_model_config: ModelOptions = field(default_factory=ModelOptions)
    """Which layout."""


@dataclass(kw_only=True)
class HubToTree(OneTree):
    """Hub checkpoint -> tree."""

    hf_config: HubConfig
    """The hub checkpoint."""
    llm_hf_config: HubConfig | None = None
    """Another hub checkpoint that the language model is taken from."""
    save_vit_only: bool = False
    """Only the vision tower and its projector."""
    trust_remote_code: bool = False
    """Accepted for scripts that give it; no code of a checkpoint is ever run, so nothing depends on it."""


@dataclass(kw_only=True)
class TreeToHub(OneTree):
    """Tree -> hub checkpoint."""

    save_hf_dir: str
    """Where the hub checkpoint goes."""
    hf_config: HubConfig
    """The hub checkpoint that it came from: config, tokenizer, cut into files."""
    trust_remote_code: bool = False
    """Accepted for scripts that give it; no code of a checkpoint is ever run, so nothing depends on it."""


@dataclass
class Adapter:
    """A LoRA adapter on disk."""

    hf_dir: str
    """Directory with adapter_model.safetensors, or such a file."""


@dataclass(kw_only=True)
class AdapterToTree(OneTree):
    """Adapter -> tree."""

    hf_config: Adapter
    """The adapter."""


@dataclass(kw_only=True)
class TreeToAdapter(OneTree):
    """Tree of a LoRA run -> adapter."""

    save_hf_dir: str
    """Where the adapter goes."""
    hf_config: HubConfig | None = None
    """The base model's hub checkpoint."""
    lora_alpha: float | None = None
    """For adapter_config.json; rank when left out, and the rank is read off the tensors."""


@dataclass
class Resplit:
    """Tree -> the same tree, cut otherwise."""

    source_dir: str
    """The tree."""
    target_dir: str
    """Where the new tree goes."""
    source_parallel_config: LanguageParallel = field(default_factory=LanguageParallel)
    """How the tree is cut. Lists may be left out."""
    target_parallel_config: LanguageParallel = field(default_factory=LanguageParallel)
    """How the new tree is cut."""
    hf_config: HubConfig | None = None
    """The hub checkpoint: needed for experts, for heads that TP does not divide, and to check the layer
    counts."""
    common_model_config: ModelOptions = field(default_factory=ModelOptions)
    """Which layout."""


@dataclass
class DiffusionParallel:
    """How a tree of a generative model is cut."""

    pp_layers: Lists = field(default_factory=list)
    """Layers on each stage: [7,8,8,7] for four pipeline ranks, [[4,4],[3,4]] for two virtual stages on each
    of two."""
    tp_size: int = 1
    """Tensor parallel size."""
    ep_size: int = 1
    """Expert parallel size."""


@dataclass
class Paths:
    """Source and target."""

    source_path: str
    """What is converted."""
    target_path: str
    """Where it goes; may be the source's own directory, to which only release/ and the tracker are added."""
    hf_dir: str = ""
    """Towards the hub: the checkpoint that it came from (config, cut into files)."""
    lora_path: str = ""
    """merge_lora_to_base: the tree with the adapters."""
    target_parallel_config: DiffusionParallel = field(default_factory=DiffusionParallel)
    """How the tree is cut."""


@dataclass(frozen=True)
class Settings:
    """verify: read back and compare; dry_run: print the plan only; workers: threads (0: one a core, at most
    8); allow_pickle: read tensors out of pickles that hold other objects; force: replace what is in the
    way."""

    verify: bool = True
    dry_run: bool = False
    workers: int = 0
    allow_pickle: bool = False
    force: bool = False

    @property
    def threads(self) -> int:
        affinity = getattr(os, "sched_getaffinity", None)
        return self.workers or min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)
