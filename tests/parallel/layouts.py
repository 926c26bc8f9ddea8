"""One model, one global batch, any layout: what test_layouts.py and the parity table compare with one process.

Real families on tiny checkpoints, the real objective and weights read by the real loader; tests only.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polymodal.core.sample import Batch, pack, padding_sample
from polymodal.distributed.collectives import clip_
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.models import lora as adapters
from polymodal.models.audio.encoder_decoder import EncoderDecoder
from polymodal.models.diffusion import Generation
from polymodal.models.family import Family
from polymodal.models.understanding import language
from polymodal.objectives.language import LanguageObjective
from polymodal.objectives.speech_codes import SpeechCodesObjective
from polymodal.parallel import dit_context_parallel
from polymodal.recipe import Data, Model, Parallel, Recipe, Train
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import Runner, StepMetrics, bind, forward_backward, inverse_weights
from tests.models import tiny, tiny_tts
from tests.parallel import dits, speech
from tests.parallel.exact import float64

MICRO_BATCHES = 4  # of a global batch; one of them has no picture
STEPS = 5  # of AdamW, after the gradients were compared
TARGETS = r"(talker\.)?model\..*\.(q_proj|v_proj|o_proj|up_proj|down_proj|qkv|proj|projection_layer|linear_fc1|linear_fc2|fc1|fc2)"
DENOISER_TARGETS = r".*blocks\..*\.(to_q|to_v|to_out\.0|proj_mlp|proj_out|net\.0\.proj|net\.2|q_proj|v_mlp|linear2|wqkv|wkv|wo)"


@dataclass(frozen=True)
class Layout:
    """A way to lay a model out, and what else is asked of it.

    parallel: the recipe's keys; frozen: prefixes of parameters that are not trained; lora: adapters instead of weights,
    on linear layers or on stacked experts too; only: the models that can be laid out so (all, if empty).
    """

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    lora: bool | Literal["experts"] = False
    precision: str = "fp32"
    only: tuple[str, ...] = ()

    def fits(self, model: str) -> bool:
        return not self.only or model in self.only


@dataclass(frozen=True)
class Result:
    """Loss, gradients by name, norm of all gradients, and weights after STEPS steps."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]
    names: tuple[str, ...]


def batches(family: Family) -> list[Batch]:
    """A global batch: packs of several samples with pictures, a video and sound if the model reads any, and one
    of text only."""
    media: Any = family.media_processor(Data.model_validate(tiny.DATA.get(family.card.name, {})))

    def picture(width: int, height: int, seed: int) -> Any:
        """Or a sound, for those that do not see."""
        return tiny.picture(width, height, seed) if "image" in media.reads else tiny.sound(width / 10, seed)

    video: Any = tiny.clip(4, seed=4) if "video" in media.reads else picture(24, 24, 4)
    heard = [] if "audio" not in media.reads else [tiny.sound(0.31, 1)]
    if heard and "video" in media.reads:
        video = video, tiny.sound(0.77, 2)
    packs: list[list[list[Any]]] = [
        [
            ["What is in this picture?", picture(24, 16, 1), "It is a three."],
            [*heard, "Describe seven words"],
        ],
        [["The first", picture(16, 24, 2), picture(32, 16, 3), "second a nine."]],
        [["one two three four five"], ["How many red squares are there?"]],
        [
            ["Describe the video.", video, "A bar that moves."],
            [picture(16, 16, 5), *heard, "yes no"],
        ],
    ]
    return [
        pack([tiny.sample(media, parts, id=10 * i + j) for j, parts in enumerate(samples)])
        for i, samples in enumerate(packs)
    ]


def seen(batch: Batch, first: bool) -> Batch:
    """What the loader gives: pictures for the first stage of a pipeline only."""
    media = () if first else {stream.tensor for stream in batch.streams}
    kept = {name: tensor for name, tensor in batch.tensors.items() if name not in media}
    return replace(batch, tensors=kept)


def build(family: Family, layout: Layout, dtype: torch.dtype) -> nn.Module:
    """The model on meta in `dtype`, adapters attached, frozen where the layout says."""
    model = family.build()
    packed = not isinstance(family, Generation)
    if dtype == torch.float64 and packed and language.experts(family.config.get_text_config()):
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if layout.lora:
        from peft import LoraConfig, inject_adapter_in_model

        targets = TARGETS if packed else DENOISER_TARGETS
        for name in adapters.taken(model):  # what peft would take for experts
            targets = targets.replace(f"|{name}", "")
        stacks = ["experts.gate_up_proj", "experts.down_proj"] if layout.lora == "experts" else None
        settings = LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, target_parameters=stacks, init_lora_weights=False
        )
        inject_adapter_in_model(settings, model)
    always = tuple(prefix for tower in family.frozen for prefix in family.card.towers[tower])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not name.startswith((*layout.frozen, *always)) and ("lora_" in name) >= bool(layout.lora)
        )
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.train()


@torch.no_grad()
def draw_adapters(model: nn.Module) -> None:
    """The same values in every layout: drawn whole by name, then each rank keeps its piece."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            whole = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
            if isinstance(parameter, DTensor):
                from torch.distributed.tensor import distribute_tensor

                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.to_local().copy_(
                    distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
                )
            else:
                parameter.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def measure(
    directory: str,
    layout: Layout,
    dtype: torch.dtype,
    rank: int,
    steps: int,
    device: str = "cpu",
    around: Sequence[Callable[[], None]] = (),
) -> Result:
    """Loss and gradients of the global batch, then `steps` AdamW steps on it, in this world. around: called before
    and after the first forward and backward."""
    where = torch.device(device)
    warnings.simplefilter("ignore")
    world = dist.get_world_size() if dist.is_initialized() else 1
    recipe = Recipe(
        model=Model(source=directory),
        parallel=Parallel(**layout.parallel),
        train=Train(precision=layout.precision),  # type: ignore[arg-type]
    )
    family = catalog.family(recipe.model)

    def make() -> nn.Module:
        return build(family, layout, dtype)

    objective: Any
    if isinstance(family, EncoderDecoder):
        data = speech.batches(family, dtype)
        empty = speech.filler(data[0])
        objective = LanguageObjective("per_token")
    elif family.card.speaks:
        data, empty = tiny_tts.batches(family, dtype), tiny_tts.filler()
        objective = SpeechCodesObjective.from_recipe(recipe, family)
    elif not isinstance(family, Generation):
        data, empty = batches(family), pack([padding_sample(rows=family.position_rows)])
        objective = LanguageObjective("per_token", **family.balance(None))
    else:
        data = dits.batches(directory, family, dtype)
        empty = dits.filler(data[0])
        objective = dits.objective(family)
    if world > 1 or layout.world > 1 or layout.precision != "fp32" or layout.parallel:
        mesh = Mesh(ParallelSizes.of(recipe.parallel, world), where.type, rank)
        model = ParallelModel(make, family, mesh, recipe, where)
        while len(data) % mesh.sizes.dp:  # equal work a rank, as the schedule gives it
            data.append(empty)
        mine = [seen(batch, model.first) for batch in data[mesh.dp_rank :: mesh.sizes.dp]]
        shard_batches = layout_of(recipe, family).batch_sharding(mesh)
        inverse = inverse_weights(objective, mine, shard_batches.weights_group)
        mine = shard_batches(mine)
        parts, names, runner = model.models, tuple(model.names), model.runner
    else:
        mesh, model, mine = None, None, data
        inverse = inverse_weights(objective, mine, None)
        plain = make()
        bind(plain, family)
        if where.type != "cpu" and isinstance(family, Generation):  # as parallel.apply does
            dit_context_parallel.use(plain, family.card)
        parts, names = [plain], tuple(name for name, _ in plain.named_parameters())
        runner = Runner(plain, where)

    def load(part: nn.Module) -> None:
        weights.load(part, family, device=where)
        draw_adapters(part)

    if model is not None:
        model.load_all(load)
        trainable, owned = model.trainable, model.owned
    else:
        load(parts[0])
        trainable = owned = {name: p for name, p in parts[0].named_parameters() if p.requires_grad}

    def step() -> tuple[float, Tensor]:
        """Forward and backward; the global loss, and the norm of gradients that are complete."""
        tally = StepMetrics(objective.parts)
        forward_backward(runner, objective, mine, inverse, tally)
        loss = tally.total(mesh.log_group if mesh is not None else None)
        total = loss["loss"] + objective.aux_weight * loss["balance"]
        norm = model.gradients() if model is not None else None
        for p in (
            trainable.values()
        ):  # what is computed for nothing: zeros where shards are reduced, none elsewhere
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if norm is None:
            norm = torch.stack(torch._foreach_norm([p.grad for p in trainable.values()])).norm()
        return total, norm

    with float64() if dtype == torch.float64 else contextlib.nullcontext():
        for call in around[:1]:
            call()
        loss, norm = step()
        for call in around[1:]:
            call()
        gradients = {name: whole(p.grad) for name, p in owned.items() if p.grad is not None}
        first = float(norm)
        optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, foreach=False) if trainable else None
        for index in range(steps):
            if index:
                _, norm = step()
            clip_(trainable.values(), norm, 1.0)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if model is not None:
                model.after_step()
    after = {name: whole(p) for name, p in owned.items()} if steps else {}
    if mesh is not None and mesh.sizes.pp > 1:
        gradients, after = gathered(gradients, mesh), gathered(after, mesh)
    return Result(loss, gradients, first, after, names)


def gathered(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What all stages hold, on every rank."""
    found: list[Any] = [None] * mesh.sizes.pp
    dist.all_gather_object(found, tensors, group=mesh.world["pp"].get_group())
    assert sum(map(len, found)) == len(set().union(*found)), "every tensor is of one stage"
    return {name: tensor for held in found for name, tensor in held.items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative L2 error of a tensor and its name; norms below 1e-6 of the largest are not divided by."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    floor = 1e-6 * max(float(tensor.norm()) for tensor in expected.values())
    errors = {
        name: float((tensor - expected[name]).norm()) / max(float(expected[name].norm()), floor)
        for name, tensor in found.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


@dataclass(frozen=True)
class Parity:
    """Relative errors of a layout against one process; `where` is the worst gradient's name."""

    layout: str
    loss: float
    gradients: float
    norm: float
    weights: float
    where: str


def compare(
    rank: int,
    directory: str,
    layouts: Sequence[Layout],
    reference: dict[str, Result],
    dtype: torch.dtype,
    steps: int,
) -> list[Parity]:
    """Run layouts one after the other in this world; `reference` by `kind`. Parameter names must be the same."""
    results = []
    for layout in layouts:
        expected = reference[kind(layout)]
        found = measure(directory, layout, dtype, rank, steps)
        assert found.names == expected.names
        gradients, where = error(found.gradients, expected.gradients)
        results.append(
            Parity(
                layout.name,
                abs(found.loss - expected.loss) / abs(expected.loss),
                gradients,
                abs(found.norm - expected.norm) / expected.norm,
                error(found.weights, expected.weights)[0] if steps else 0.0,
                where,
            )
        )
    return results


def kind(layout: Layout) -> str:
    """Layouts of one kind share their single process."""
    return f"{layout.lora} {layout.frozen}"


def one_process(
    rank: int, directory: str, layouts: Sequence[Layout], dtype: torch.dtype, steps: int
) -> dict[str, Result]:
    """The reference of every kind among the layouts, without any mesh."""
    found = {}
    for layout in layouts:
        if kind(layout) not in found:
            plain = Layout("one process", 1, {}, layout.frozen, layout.lora)
            found[kind(layout)] = measure(directory, plain, dtype, rank, steps)
    return found
