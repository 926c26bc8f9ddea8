"""The recipe's section `parallel`: how the work is spread over processes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from polymodal.recipe.file import NotNegative, Positive, Section


class Parallel(Section):
    dp_replicate: Positive = 1
    """HSDP: copies of the sharded model."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """FSDP2: ranks that parameters are sharded over; -1 = all that are left."""
    cp: Positive = 1
    """Context parallel: ranks that share one sequence."""
    ulysses: Positive | None = None
    """Of cp, ranks that exchange heads (Ulysses; default: as many as divide them); the rest is a ring."""
    balance_media: bool = False
    """Assign pictures and video frames to the dp_shard x cp ranks by cost; false = each rank has its own."""
    replicate: list[str] = []
    """Towers (by the card's names) that every rank keeps whole, not sharded: no gathers, one sum a step."""
    tp: Positive = 1
    """Tensor parallel: ranks that share one layer."""
    sp: bool | None = None
    """Sequence parallel inside the tp group (norms and residuals sharded); default: on when tp > 1."""
    pp: Positive = 1
    """Pipeline parallel: ranks that share the layers of the model, one after the other."""
    pp_schedule: Literal["1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"] = (
        "1F1B"
    )
    """Order of a pipeline's work; the last three have several (virtual) stages a rank and idle less."""
    pp_layers: Literal["auto"] | dict[str, list[NotNegative] | list[list[NotNegative]]] = "auto"
    """Layers of each stage by tower, e.g. {language: [6, 10, 10, 10], vision: [27, 0, 0, 0]}, nested for
    virtual stages; auto = by cost. A tower that is not named is on the first stage."""
    pp_virtual: Positive | None = None
    """Stages a rank (default: as pp_layers are nested, else as few as the schedule can have)."""
    ep: Positive = 1
    """Expert parallel: ranks that experts are spread over."""
    zero: Literal[1, 2, 3] | None = None
    """Over dp_shard x cp are sharded: 1 = the optimizer's state (default with pp), 2 = gradients too, 3 =
    parameters too (FSDP2; default)."""
    reshard_after_forward: bool | None = None
    """zero 3: free gathered parameters after a block's forward (default, but for pipeline schedules that
    gather whole stages: all but 1F1B and GPipe), or keep them for its backward (false)."""
    prefetch: NotNegative = 1
    """Blocks whose parameters are gathered ahead while one computes, forward and backward; 0 = none."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recompute: full = whole blocks; selective = all but the results of recompute_keep."""
    recompute_keep: list[Literal["matmul", "attention", "experts", "exchange"]] | None = None
    """What selective keeps (default: all): matmul, attention, grouped matmul of experts, exchanged tokens."""
    recompute_blocks: list[str] | None = None
    """Towers by the card's names, or patterns of blocks, to recompute (default: all of the card's blocks)."""
    recompute_first: Positive | None = None
    """Recompute only the first so many of these blocks, tower by tower (the `block` method)."""
    recompute_every: Positive | None = None
    """Recompute only every n-th of these blocks, tower by tower (the `uniform` method)."""
    offload: list[Literal["activations", "parameters", "optimizer"]] = []
    """Kept on the host: what blocks save for backward; sharded parameters (with gradients and optimizer);
    optimizer state."""
    compile: bool = False
    """torch.compile each block."""

    @field_validator("pp_layers", mode="before")
    @classmethod
    def _by_tower(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("names no tower; write e.g. {language: [6, 10, 10, 10]}")
        towers = value.values() if isinstance(value, dict) else ()
        stages = [stage for tower in towers if isinstance(tower, list) for stage in tower]
        for stage in stages:
            for layers in stage if isinstance(stage, list) else [stage]:
                if not isinstance(layers, int) or layers < 0:
                    raise ValueError(f"counts layers with {layers}; write whole numbers from 0")
        return value

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO. Under 2 and 3 a pipeline would communicate for every micro-batch: default 1."""
        return self.zero or (3 if self.pp == 1 else 1)

    @property
    def reshards(self) -> bool:
        """Whether a block's gathered parameters are freed after its forward."""
        return self.zero_stage == 3 and self.reshard_after_forward is not False
