"""Diffusion DPO against its formula in float64, the weights of pairs, and the rows that compare media."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.data.formats import RowReader
from polymodal.data.media_pairs import PairClips
from polymodal.models.card import Output, Process
from polymodal.models.diffusion import LatentGrid
from polymodal.objectives.diffusion_preference import DiffusionPreference, ScoreHistogram
from polymodal.objectives.preference import losses_of
from polymodal.recipe import Attr, Clip, Diffusion, Preference
from polymodal.train.step import inverse_weights

ALPHAS = tuple((1 - torch.linspace(0.03, 0.11, 1000, dtype=torch.float64).square()).cumprod(0).tolist())
PROCESSES = {
    "flow": Process(),
    "epsilon": Process("discrete", density="uniform", alphas=ALPHAS, prediction="epsilon"),
    "v": Process("discrete", density="uniform", alphas=ALPHAS, prediction="v_prediction"),
}


def pairs(ids=(0, 1, 2), weight=1.0, scores=None, factor=None):
    """Pairs as the collators give them: chosen and rejected latents one after the other, one seed."""
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(2 * len(ids), 4, 2, 4, 4, generator=draw)
    tensors = {"latents": latents, "weight": torch.full((len(latents),), weight)}
    if factor is not None:
        tensors["loss_weight"] = torch.full((len(latents),), factor)
    axes = {"latents": ("batch", "none", "frame", "none", "none"), "weight": ("batch",)}
    twice = [i for i in ids for _ in range(2)]
    groups = {"seeds": tuple(1000 + i for i in twice), "tokens": (32,) * len(twice), "kind": "video"}
    groups |= {"shape": (5, 32, 32), "scores": scores or (None,) * len(ids), "members": 2}
    return Batch(tensors, axes, tuple(twice), groups=groups)


def objective(target, histogram=None, diffusion=None, **settings):
    preference = Preference(**settings)
    return DiffusionPreference(
        PROCESSES[target], diffusion or Diffusion(), losses_of(preference), preference, histogram
    )


class Reference:
    """Actors whose reference predicts other numbers."""

    def __init__(self, made):
        self.made, self.seen = made, []

    def on_device(self):
        return contextlib.nullcontext()

    def encode(self, batch):
        return batch

    def reference(self, batches):
        self.seen = batches
        return [self.made.compared(Output(prediction(b, 11)), b) for b in batches]


def prediction(batch, seed):
    """Numbers near the targets, by the seed a little different."""
    draws = [torch.Generator().manual_seed(n) for n in (3, seed)]
    far, near = (torch.randn(batch["target"].shape, generator=g, dtype=torch.float64) for g in draws)
    return batch["target"].double() + far / 2 + near / 100


@pytest.mark.parametrize("target", PROCESSES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 70.0, "label_smoothing": 0.2, "loss": {"sigmoid": 0.7, "sft": 0.3}},
        {"beta": 0.05, "time_weight": "t"},
    ],
    ids=["plain", "smoothed, sft", "t"],
)
def test_the_loss_is_the_formula(target, settings):
    histogram = ScoreHistogram((0.0, 0.5), (0.5, 1.0), (30.0, 70.0), 100.0, 70.0)
    scores = ((0.9, 0.2), (0.6, 0.55), (0.4, 0.1))
    made = objective(target, histogram, weight_alpha=0.5, **settings)
    (batch,) = made.prepare(Reference(made), [pairs(scores=scores, factor=1.5)])
    own = prediction(batch, 7).requires_grad_()
    batch.groups["reference"] = made.compared(Output(prediction(batch, 11)), batch)
    loss, logs = made.loss(Output(own), batch, inverse_weights(made, [batch], None))
    loss.backward()

    latents, goal = pairs()["latents"].double(), []
    beta = settings.get("beta") or (500 if target == "flow" else 2000)
    for i in range(6):  # every sample by itself
        draw = torch.Generator().manual_seed(1000 + i // 2)
        torch.rand((), generator=draw), torch.rand((), generator=draw)
        noise = torch.randn(latents.shape[1:], generator=draw).double()
        if target == "flow":
            goal.append(noise - latents[i])
        elif target == "epsilon":
            goal.append(noise)
        else:
            a = ALPHAS[int(batch["timestep"][i])]
            goal.append(a**0.5 * noise - (1 - a) ** 0.5 * latents[i])
    plain = own.detach().clone().requires_grad_()
    other = prediction(batch, 11)
    total, margins = 0.0, []
    share, smooth = settings.get("loss", {"sigmoid": 1.0}), settings.get("label_smoothing", 0.0)
    for k, p in enumerate([(0.7 * 0.3) ** 0.5, 0.7, 0.3]):
        m = [((plain[2 * k + j] - goal[2 * k + j]) ** 2).mean() for j in range(2)]
        ref = [((other[2 * k + j] - goal[2 * k + j]) ** 2).mean() for j in range(2)]
        t = float(batch["timestep"][2 * k]) if settings.get("time_weight") else 1.0
        logit = -beta / 2 * t * ((m[0] - m[1]) - (ref[0] - ref[1]))
        margins.append(float(logit.detach()))
        dpo = -(1 - smooth) * torch.log(torch.sigmoid(logit)) - smooth * torch.log(torch.sigmoid(-logit))
        total = total + share["sigmoid"] * 1.5 * (0.7 / p) ** 0.5 * dpo + share.get("sft", 0.0) * 1.5 * m[0]
    (total / 3).backward()
    near = 1e-5  # the objective's targets and errors are float32
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / 3, rel=near)
    assert float((own.grad - plain.grad).norm() / plain.grad.norm()) < 10 * near
    shown = made.shown({k: float(v) for k, v in logs.items()})
    assert shown["rewards/margin"] == pytest.approx(sum(margins) / 3, rel=near, abs=1e-4)
    assert shown["rewards/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert shown["pair_weight"] == pytest.approx(
        sum((0.7 / p) ** 0.5 for p in ((0.21) ** 0.5, 0.7, 0.3)) / 3 * 1.5
    )


def test_halves_and_the_reference_see_one_noise_and_one_timestep():
    made = objective("flow", diffusion=Diffusion(drop=0.5))
    made.unconditional = {"text": torch.zeros(1, 3, 5)}
    batch = pairs()
    batch.tensors["text"] = torch.ones(6, 3, 5)
    batch.axes["text"] = ("batch", "sequence", "none")
    asked = Reference(made)
    (noised,) = made.prepare(asked, [batch])
    assert torch.equal(noised["timestep"][0::2], noised["timestep"][1::2])
    noise = noised["target"] + batch["latents"]  # flow: noise - latents
    torch.testing.assert_close(noise[0::2], noise[1::2], rtol=0, atol=1e-6)
    assert torch.equal(noised["text"][0::2], noised["text"][1::2])
    assert asked.seen[0]["noisy"] is noised["noisy"]
    assert len(noised["timestep"].unique()) == 3


def test_policy_and_reference_alike_are_log_2_and_a_cut_changes_nothing():
    made = objective("epsilon")

    def value(batches):
        batches = made.prepare(None, batches)
        for batch in batches:
            batch.groups["reference"] = made.compared(Output(batch["noisy"]), batch)
        inverse = inverse_weights(made, batches, None)
        return [made.loss(Output(b["noisy"] * 1.01), b, inverse)[0] for b in batches], [
            made.loss(Output(b["noisy"]), b, inverse)[0] for b in batches
        ]

    whole = pairs((0, 1, 2))
    parts = []
    for k in range(3):
        tensors = {n: t[2 * k : 2 * k + 2] for n, t in whole.tensors.items()}
        groups = {**whole.groups, "seeds": whole.groups["seeds"][2 * k : 2 * k + 2], "scores": (None,)}
        parts.append(Batch(tensors, whole.axes, (k, k), groups=groups))
    filler = pairs((7,), weight=0.0)
    one, same = value([whole])
    cut, _ = value([*parts, filler])
    assert float(same[0]) == pytest.approx(math.log(2))
    assert float(sum(cut)) == pytest.approx(float(one[0]), rel=1e-6)
    assert float(cut[-1]) == 0.0


def test_bins_of_scores_are_found_by_value(tmp_path):
    file = tmp_path / "histogram.json"
    width = 0.1
    counts = [4, 0, 10, 6]
    edges = [0.2]
    for _ in counts:
        edges.append(edges[-1] + width)
    named = {f"{a}-{b}": n for a, b, n in zip(edges, edges[1:], counts, strict=False)}
    assert "0.30000000000000004-0.4" in named  # a name that no formatted float finds
    file.write_text(json.dumps({"bin_width": width, "total_num": 20, "max_num": 10, **named}))
    made = ScoreHistogram.read(str(file))
    assert [made.probability(s) for s in (0.2, 0.35, 0.41, edges[-1], 0.1, 0.7)] == [0.2, 0.0, 0.5, 0.3, 0, 0]
    assert made.weight((0.41, 0.41), 1.0, None) == 1.0 and made.weight((0.41, 0.2), 0.0, None) == 1.0
    assert made.weight((0.41, 0.2), 1.0, None) == pytest.approx(0.5 / 0.1**0.5)
    assert made.weight((0.41, 0.35), 2.0, 0.01) == pytest.approx((0.01 / 1e-3) ** 2)  # bounded by the floor
    file.write_text('{"-0.5--0.1": 1, "-0.1-1e-1": 3}')
    assert ScoreHistogram.read(str(file)).probability(-0.3) == 0.25
    for broken in ('{"a": 1}', '{"0.5-0.1": 2}', '{"0-1": "x"}', '{"0-1": 0}'):
        file.write_text(broken)
        with pytest.raises(PolymodalError, match=r"train\.preference\.histogram"):
            ScoreHistogram.read(str(file))
    with pytest.raises(PolymodalError, match="does not exist"):
        ScoreHistogram.read(str(tmp_path / "none.json"))
    scored = objective("flow", made, weight_alpha=1.0)
    with pytest.raises(PolymodalError, match="pairs without scores"):
        scored.prepare(None, [pairs()])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"preference": {"loss": "ipo"}}, "knows sigmoid"),
        ({"preference": {"loss": {"sft": 1}}}, "knows sigmoid"),
        ({"preference": {"gamma": 1.0}}, "gamma is for models that answer"),
        ({"preference": {"cache_reference": True}}, "cache_reference keeps nothing"),
        ({"preference": {"pairs": "all"}}, "best and the worst"),
        ({"preference": {"weight_alpha": 1.0}}, "histogram of scores"),
        ({"preference": {"histogram": "h.json"}}, "weight_alpha is 0"),
        ({"parallel": {"pp": 2}}, r"parallel\.pp = 2"),
        ({"model": {"source": "x", "lora": {"dropout": 0.1}}}, "dropout"),
    ],
)
def test_keys_of_answers_are_refused(change, said):
    raw = {"model": {"source": "x"}, "train": {"objective": "diffusion_dpo"}}
    raw["train"] = {**raw["train"], "preference": change.get("preference", {})}
    raw |= {k: v for k, v in change.items() if k != "preference"}
    with pytest.raises(PolymodalError, match=said) as error:
        DiffusionPreference.from_recipe(recipes.validate(raw), None)  # type: ignore[arg-type]
    assert error.value.hint


# ---- rows


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(out, "PNG")
    return out.getvalue()


def read(row, format="preference", attr=None, path="rows.json"):
    return RowReader(format, attr or Attr(), path, None).record(row, "rows, line 1")


def test_rows_of_every_kind_become_a_better_and_a_worse_medium(tmp_path):
    red, blue = png("red"), png("blue")
    picked = {"jpg_0": red, "jpg_1": blue, "label_0": 0, "label_1": 1, "caption": "a circle"}
    for row, better, worse, scores in (
        (picked, blue, red, (1.0, 0.0)),
        ({**picked, "label_0": 1.0}, red, blue, (1.0, 0.0)),
        ({"chosen": {"bytes": red}, "rejected": {"bytes": blue}, "caption": "a"}, red, blue, ()),
        ({"chosen": "a.png", "rejected": "b.png", "caption": "a"}, "a.png", "b.png", ()),
        ({"chosen": "a.mp4", "rejected": "b.mp4", "prompt": "a", "score": 0.9, "score_rejected": 0.2}, "a.mp4", "b.mp4", (0.9, 0.2)),
        ({"images": ["a.png", "b.png", "c.png"], "scores": [0.1, 0.7, 0.4], "prompt": "p"}, "b.png", "a.png", (0.7, 0.1)),
        ({"image_path": ["a.png", "b.png"], "rank": [2, 1], "prompt": "p"}, "b.png", "a.png", (-1.0, -2.0)),
        ({"image_path": ["a.png", "b.png"], "human_preference": [1, 0], "prompt": "p"}, "a.png", "b.png", (1.0, 0.0)),
        ({"videos": '["a.mp4", "b.mp4"]', "scores": "[1, 3]", "caption": "p"}, "b.mp4", "a.mp4", (3.0, 1.0)),
    ):  # fmt: skip
        for format in ("preference", "auto"):
            record = read(row, format)
            found = [c.media[-1].source for c in record.conversations]
            assert found == [better, worse] and record.scores == scores
            assert record.extra["captions"] and len(record.conversations) == 2
    named = read({"win": "a.png", "lose": "b.png", "text": "p"}, attr=Attr(chosen="win", rejected="lose"))
    assert [c.media[-1].source for c in named.conversations] == ["a.png", "b.png"]
    for row, said in (
        ({**picked, "label_0": "x"}, "label_0"),
        ({"chosen": "a.png", "rejected": "b.png", "caption": "a", "score": 0.1}, "score of one"),
        (
            {"chosen": "a.png", "rejected": "b.png", "caption": "a", "score": 0.1, "score_rejected": 0.2},
            "below",
        ),
        ({"images": ["a.png", "b.png"], "scores": [1], "caption": "a"}, "as many numbers"),
    ):
        with pytest.raises(PolymodalError, match=said):
            read(row)
    scored = {"prompt": "Which?", "images": ["a.png", "b.png"], "responses": ["one", "two"], "scores": [1, 2]}
    assert "captions" not in read(scored).extra  # the scores are of answers to a prompt with two pictures
    spoken = {"prompt": "Which file?", "chosen": "the first one", "rejected": "none"}
    assert all(not c.media for c in read(spoken).conversations)  # answers that are text


def test_both_media_of_a_pair_have_one_bucket_and_ties_are_left_out(tmp_path):
    for name, size in (("wide", (48, 24)), ("tall", (24, 48))):
        Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(tmp_path / f"{name}.png")
    grid = LatentGrid(channels=4, time=1, space=8, still=True)
    clips = PairClips(Clip(sizes=[(16, 32), (32, 16)]), grid, min_gap=0.2)

    def row(**more):
        made = {
            "chosen": str(tmp_path / "wide.png"),
            "rejected": str(tmp_path / "tall.png"),
            "cap": "a",
            **more,
        }
        return read(made)

    for measure, usable in zip(
        clips.measure([row(), row(score=1, score_rejected=0.5), row(score=1, score_rejected=0.9), row(score=1, score_rejected=1)]),
        (True, True, False, False),
        strict=True,
    ):  # fmt: skip
        assert (measure.tokens > 0) == usable
    measure = clips.bucket(row())
    assert measure.shape == (1, 16, 32)
    shapes = [clips.frames(side, measure).shape for side in row().conversations]
    assert shapes == [(1, 16, 32, 3)] * 2
    alone = read({"path": str(tmp_path / "wide.png"), "cap": "a"}, "caption")
    with pytest.raises(PolymodalError, match="compares two"):
        clips.bucket(alone)
    other = PairClips(Clip(sizes=[(16, 32), (32, 16)]), grid)
    assert other.fingerprint != clips.fingerprint
