"""The recipe's section `parallel`.

Ground floor: imports pydantic only. A part of recipe.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from polymodal.recipe.file import Section

Count = Annotated[int, Field(ge=0)]


class Parallel(Section):
    dp_replicate: Annotated[int, Field(ge=1)] = 1
    """HSDP: copies of the sharded model."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """FSDP2: ranks that parameters are sharded over; -1 = all that are left."""
    cp: Annotated[int, Field(ge=1)] = 1
    """Context parallel: ranks that share one sequence."""
    ulysses: Annotated[int, Field(ge=1)] | None = None
    """Of cp, ranks that trade heads (Ulysses); the other factor is a ring. Default: as many as divide the heads."""
    balance_media: bool = False
    """Deal pictures and video frames out over the dp_shard x cp ranks by their cost, instead of each rank its own."""
    replicate: list[str] = []
    """Towers (by the card's names) that every rank keeps whole instead of sharding them: no gathers, one sum a step."""
    tp: Annotated[int, Field(ge=1)] = 1
    """Tensor parallel: ranks that share one layer."""
    sp: bool | None = None
    """Sequence parallel inside the tp group (norms and residuals sharded); default: on when tp > 1."""
    pp: Annotated[int, Field(ge=1)] = 1
    """Pipeline parallel: ranks that share the layers of the model, one after the other."""
    pp_schedule: Literal["1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"] = (
        "1F1B"
    )
    """Order of a pipeline's work; the last three keep several stages a rank (virtual stages) and idle less."""
    pp_layers: Literal["auto"] | dict[str, list[Count] | list[list[Count]]] = "auto"
    """Layers of each stage by tower, e.g. {language: [6, 10, 10, 10], vision: [27, 0, 0, 0]}, nested for virtual stages; auto = by cost. A tower that is not named lies on the first stage."""
    pp_virtual: Annotated[int, Field(ge=1)] | None = None
    """Stages a rank (default: as pp_layers are nested, else as few as the schedule can have)."""
    ep: Annotated[int, Field(ge=1)] = 1
    """Expert parallel: ranks that experts are spread over."""
    zero: Literal[1, 2, 3] | None = None
    """Over dp_shard x cp are sharded: 1 = the optimizer's state (default with pp), 2 = gradients too, 3 = parameters too (FSDP2; default)."""
    reshard_after_forward: bool | None = None
    """zero 3: free gathered parameters after a block's forward (default, but for pipeline schedules that gather whole stages: all but 1F1B and GPipe), or keep them for its backward (false)."""
    prefetch: Annotated[int, Field(ge=0)] = 1
    """Blocks whose parameters are gathered ahead while one computes, forward and backward; 0 = none."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recompute: full = whole blocks; selective = all but the results of recompute_keep."""
    recompute_keep: list[Literal["matmul", "attention", "experts", "exchange"]] | None = None
    """selective keeps (default: all): matrix products, attention, experts' grouped products, tokens from other ranks."""
    recompute_blocks: list[str] | None = None
    """Towers by the card's names, or patterns of blocks, to recompute (default: all of the card's blocks)."""
    recompute_first: Annotated[int, Field(ge=1)] | None = None
    """Recompute only the first so many of these blocks, tower by tower (the `block` method)."""
    recompute_every: Annotated[int, Field(ge=1)] | None = None
    """Recompute only every n-th of these blocks, tower by tower (the `uniform` method)."""
    offload: list[Literal["activations", "parameters", "optimizer"]] = []
    """Kept on the host: what blocks save for backward; sharded parameters (with gradients and optimizer); optimizer state."""
    compile: bool = False
    """torch.compile each block."""

    @field_validator("pp_layers", mode="before")
    @classmethod
    def _by_tower(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("says not of which tower; name it: {language: [6, 10, 10, 10]}")
        numbers = [n for part in value.values() if isinstance(part, list) for n in part] if isinstance(value, dict) else []  # fmt: skip
        flat = [n for part in numbers for n in (part if isinstance(part, list) else [part])]
        if wrong := [n for n in flat if not isinstance(n, int) or n < 0]:
            raise ValueError(f"counts layers with {wrong[0]}; write whole numbers from 0")
        return value

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO: a pipeline would gather parameters and reduce gradients for every micro-batch under 2 and 3."""
        return self.zero if self.zero is not None else 3 if self.pp == 1 else 1

    @property
    def reshards(self) -> bool:
        """Are a block's gathered parameters freed after its forward?"""
        return self.zero_stage == 3 and self.reshard_after_forward is not False
