"""LLaVA equals the library's own model: tokens, squares, logits, gradients, stages."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import IGNORE, MediaShape, SampleLengths, pack
from polymodal.generate.opening import processor_of
from polymodal.models import catalog
from polymodal.recipe import Data, Model
from tests.models import test_qwen_vl, tiny
from tests.models.staged import assert_two_stages_equal_the_whole, loaded
from tests.models.test_internvl import library_inputs, model_of
from tests.models.test_qwen_vl import CASES, ours, token_loss

CASES = {name: CASES[name] for name in ("image", "several images", "text")}
UNUSED = ("model.vision_tower.encoder.layers.3.", "model.vision_tower.post_layernorm.")


@pytest.fixture(scope="module")
def family(checkpoint):
    return catalog.family(Model(source=str(checkpoint("llava"))))


@pytest.fixture(scope="module")
def media(family):
    return family.media_processor(Data())


def gradients(model):
    return {n: grad for n, grad in test_qwen_vl.gradients(model).items() if not n.startswith(UNUSED)}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_the_librarys_own_forward(case, family, media, checkpoint):
    sample = tiny.sample(media, CASES[case])
    reference, mine = model_of(checkpoint("llava")), loaded(family)
    expected = reference(**library_inputs(sample), use_cache=False).logits
    _, got = ours(family, mine, pack([sample]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    labels = sample.tensors["labels"][None]
    token_loss(expected, labels).backward()
    token_loss(got, labels).backward()
    for model in (reference, mine):
        without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
        assert without >= {key for key, _ in model.named_parameters() if key.startswith(UNUSED)}
    theirs, found = gradients(reference), gradients(mine)
    if case == "text":  # the library leaves its tower out; ours runs it for nothing
        outside = {key for key, grad in theirs.items() if grad is None}
        assert outside and not any(found[key].any() for key in outside)
        theirs |= {key: torch.zeros_like(found[key]) for key in outside}
    test_qwen_vl.assert_same(found, theirs)


def test_a_pack_equals_its_samples_alone(family, media):
    samples = [tiny.sample(media, CASES[case]) for case in ("several images", "text", "image")]
    model = loaded(family)
    _, together = ours(family, model, pack(samples))
    apart = torch.cat([ours(family, model, pack([sample]))[1] for sample in samples], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut, layers", [((4, 0), (1, 2)), ((3, 1), (0, 3)), ((2, 2), (0, 3))])
def test_two_pipeline_stages_equal_the_whole(cut, layers, family, media):
    for cases in (["several images", "text"], ["text"]):
        batch = pack([tiny.sample(media, CASES[case]) for case in cases])
        assert_two_stages_equal_the_whole(family, batch, {"vision": cut, "language": layers}, UNUSED)


def test_cost_is_the_operations_that_run(family, media):
    sample = tiny.sample(media, CASES["several images"])
    model = loaded(family).float()
    model.set_attn_implementation("eager")
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = family.stage(model, None, batch)
        out.head(out.hidden_states[batch["labels"] != IGNORE])
    text = family.text
    uncausal = 2 * text.num_hidden_layers * 64 * sample.measure.tokens**2
    assert counter.get_total_flops() == family.cost(sample.measure) + uncausal


def test_token_ids_and_squares_are_the_librarys(media, checkpoint):
    processor = processor_of(checkpoint("llava"))
    images = [tiny.picture(40, 24), tiny.picture(16, 60, 1)]
    sample = tiny.sample(media, ["USER: ", images[0], "\nand ", images[1], "\nWhat is it? ASSISTANT:"])
    inputs = processor(
        text=["USER: <image>\nand <image>\nWhat is it? ASSISTANT:"], images=images, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == sample.tensors["input_ids"].tolist()
    assert torch.equal(inputs["pixel_values"], sample.tensors["pixel_values"])
    with pytest.raises(PolymodalError, match="not video"):
        media.placeholder("video")


def test_an_old_processor_config_is_completed(checkpoint, tmp_path):
    """Checkpoints from before patch_size was in processor_config.json give the same number of tokens."""
    old = shutil.copytree(checkpoint("llava"), tmp_path / "old")
    written = json.loads((old / "processor_config.json").read_text())
    for key in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del written[key]
    (old / "processor_config.json").write_text(json.dumps(written))
    processor = processor_of(old, Data(), catalog.family(Model(source=str(old))))
    inputs = processor(text=["<image> hi"], images=[tiny.picture()], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 16


def test_what_cannot_be_run_is_refused(checkpoint):
    for changes, said in (
        ({"vision_feature_layer": -9}, "vision_feature_layer = -9"),
        ({"vision_feature_select_strategy": "full"}, "= full"),
    ):
        with pytest.raises(PolymodalError, match=said):
            catalog.family(Model(source=str(checkpoint("llava")), config=changes))
    with pytest.raises(PolymodalError, match="fixed size"):
        catalog.family(Model(source=str(checkpoint("llava")))).media_processor(
            Data.model_validate({"image": {"max_pixels": 800}})
        )


def test_towers_hold_every_parameter_once_and_an_example_fits(family):
    model = family.build()
    for parameter, _ in model.named_parameters():
        homes = [
            t for t, names in family.card.towers.items() if any(parameter.startswith(f"{n}.") for n in names)
        ]
        assert len(homes) == 1, (parameter, homes)
    batch = family.example(SampleLengths(60, 20, {"vision": (16, 16)}))
    assert batch["tiles"].tolist() == [[1], [1]] and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert family.media_processor(Data()).span(MediaShape("image", 480, 640)).ids == [batch_id(family)] * 16


def batch_id(family):
    return family.config.image_token_id
