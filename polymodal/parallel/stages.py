"""The stages of a cut model, from a card's facts alone, and several of them on one rank as one model.

Parameter names never change: a module of another stage is replaced by `PrunedModule`, so indices inside lists
stay those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.models import partial
from polymodal.models.card import ModelCard, PrunedModule
from polymodal.models.family import Family
from polymodal.parallel.pipeline_split import Counts, counts, stage_to_rank, stages_per_rank
from polymodal.recipe import Parallel


@dataclass(frozen=True)
class Stage:
    """One stage of a cut model.

    held: tower -> its blocks here, by their numbers in the whole model.
    cuts: for each stage after the first, how many blocks of each tower are before it.
    trained_before: for each of these, whether gradients go back over the cut: something before is trained.
    tied: one entry for each weight that several stages hold: ((parameter name, stage), ...), owner first.
    """

    index: int
    stages: int
    held: Mapping[str, range]
    cuts: tuple[Mapping[str, int], ...] = ()
    trained_before: tuple[bool, ...] = ()
    tied: tuple[tuple[tuple[str, int], ...], ...] = ()

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.stages - 1

    @property
    def copies(self) -> dict[str, str]:
        """Parameters that another stage owns, with their owner's name: left out of norms and files."""
        return {
            name: owner
            for (owner, home), *others in self.tied
            for name, at in others
            if at == self.index and at != home
        }


@dataclass(frozen=True)
class Part:
    """A stage and its model; without a pipeline the whole model, as stage 0 of 1."""

    model: nn.Module
    stage: Stage


def whole(model: nn.Module) -> Part:
    return Part(model, Stage(0, 1, {}))


# ---- the cut -------------------------------------------------------------------------------------


def prune(model: nn.Module, family: Family, found: Counts, index: int) -> Stage:
    """Drop from `model`, in place, what stages other than `index` hold; names of what stays do not change.

    Kept everywhere: modules without parameters (rotary tables) and whatever the card assigns to no stage.
    Must come before sharding and loading, adapters are on already. Raises PolymodalError for a card that
    names what is not there.
    """
    card = family.card
    at, early = _homes(model, card, found, family.stage_neighbours())
    chains = card.pipeline.values() if len(card.block_streams) > 1 else ()
    several = {name for chain in chains for name in partial.blocks(model, chain)}
    stages = len(next(iter(found.values())))
    tied, trained = _parameters_by_stage(model, at, stages)
    for name in (name for name, stage in at.items() if stage != index):
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        if leaf in owner._parameters:
            partial.drop_parameter(owner, leaf)
            continue
        module = owner.get_submodule(leaf)
        if name in early and at[name] < index:
            owner._modules[leaf] = partial.ShapeStub(module)
        elif name in several:
            owner._modules[leaf] = partial.StreamPassthrough(module, card.block_streams)
        else:
            owner._modules[leaf] = PrunedModule()
    before = [
        {tower: sum(numbers[:stage]) for tower, numbers in found.items()} for stage in range(stages + 1)
    ]
    held = {tower: range(before[index][tower], before[index + 1][tower]) for tower in found}
    trained_before = tuple(any(trained[:stage]) for stage in range(1, stages))
    return Stage(index, stages, held, tuple(before[1:stages]), trained_before, tied)


def _parameters_by_stage(
    model: nn.Module, at: Mapping[str, int], stages: int
) -> tuple[tuple[tuple[tuple[str, int], ...], ...], list[bool]]:
    """(weights of several stages, as Stage.tied; by stage, whether it has trained parameters)."""
    shared: dict[int, list[tuple[str, int]]] = {}
    trained = [False] * stages
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stage = next((at[path] for path in at if name == path or name.startswith(f"{path}.")), None)
        if stage is not None:
            shared.setdefault(id(parameter), []).append((name, stage))
            trained[stage] |= parameter.requires_grad
    tied = tuple(
        tuple(sorted(names, key=lambda entry: entry[1]))
        for names in shared.values()
        if len({stage for _, stage in names}) > 1
    )
    return tied, trained


def _homes(
    model: nn.Module, card: ModelCard, found: Counts, beside: Mapping[str, str]
) -> tuple[dict[str, int], set[str]]:
    """(module or parameter -> its stage, those that prepare a chain's stream)."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))}
    at: dict[str, int] = {}
    early: set[str] = set()
    towers = list(card.pipeline)
    for tower, chain in card.pipeline.items():
        names = partial.blocks(model, chain)
        stages = [stage for stage, count in enumerate(found[tower]) for _ in range(count)]
        if len(stages) != len(names):
            raise PolymodalError(
                f"{len(names)} {tower} layers of {card.name} cannot be cut as {list(found[tower])}.",
                f"Give numbers that add up to {len(names)}.",
            )
        first, ends = partial.present(model, chain.first), partial.present(model, chain.last)
        for name in (*first, *ends):
            if name not in known:
                raise PolymodalError(
                    f"The pipeline of the card {card.name} names `{name}`, which this model does not have.",
                    "This is a defect of the model's card: please report it.",
                )
        last = len(found[tower]) - 1 if tower == towers[-1] else stages[-1]
        at |= dict.fromkeys(first, 0 if tower == towers[0] else stages[0])
        at |= dict(zip(names, stages, strict=True)) | dict.fromkeys(ends, last)
        early |= set(first)
    at |= {name: at[block] for name, block in beside.items()}
    return at, early


def build(
    make: Callable[[], nn.Module],
    family: Family,
    parallel: Parallel,
    rank: int,
    measure: SampleLengths | None = None,
) -> list[Part]:
    """The parts of one pipeline rank, each cut from a model of its own that `make` gives (on meta, adapters
    attached, frozen parameters marked). Raises PolymodalError as `counts` does."""
    if parallel.pp == 1:
        return [whole(make())]
    first = make()
    found = counts(first, family, parallel, measure)
    parts = []
    for index in range(parallel.pp * stages_per_rank(parallel)):
        if stage_to_rank(parallel, index) == rank:
            model = make() if parts else first
            parts.append(Part(model, prune(model, family, found, index)))
    return parts


# ---- several parts as one model ------------------------------------------------------------------


def named_parameters(parts: Iterable[Part], copies: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a rank by name; a tied weight's copy has its owner's name, and so its learning rate.

    A copy whose owner is on the same rank is left out: `sync_tied_copies` gives it the owner's values.
    copies: the copies alone.
    """
    own = _owned(parts)
    for part in parts:
        owners = part.stage.copies
        for name, parameter in part.model.named_parameters():
            if (name in owners) >= copies and (name not in owners or owners[name] not in own):
                yield owners.get(name, name), parameter


def _owned(parts: Iterable[Part]) -> dict[str, nn.Parameter]:
    """Parameters of a rank that are no copies of another stage's."""
    return {
        name: parameter
        for part in parts
        for name, parameter in part.model.named_parameters()
        if name not in part.stage.copies
    }


def sync_tied_copies(parts: Sequence[Part]) -> None:
    """Give copies of tied weights on the rank of their owner the owner's values: after loading and steps."""
    own = _owned(parts)
    for part in parts:
        mine = dict(part.model.named_parameters())
        for name, owner in part.stage.copies.items():
            if owner in own:
                _local(mine[name]).copy_(_local(own[owner]))
                mine[name].grad = None  # it went into the owner's


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
