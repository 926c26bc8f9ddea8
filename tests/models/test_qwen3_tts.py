"""Qwen3-TTS: its loss is the net's own, packed equals separate, keys load and save, published sizes."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message, Record, pack, padding_sample, without
from polymodal.data.speech_codes import SpeechCodesProcessor
from polymodal.models import catalog, weights
from polymodal.models.audio.qwen3_tts import CARD
from polymodal.models.nets import qwen3_tts
from polymodal.objectives.speech_codes import SpeechCodesObjective
from polymodal.recipe import Data, Model
from polymodal.train.step import inverse_weights
from tests.models import tiny_tts


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    directory = tiny_tts.checkpoint(tmp_path_factory.mktemp("tts") / "model", codec=False)
    return catalog.family(Model(source=str(directory)))


@pytest.fixture(scope="module")
def model(family):
    made = family.build()
    for parameter in made.parameters():
        parameter.data = parameter.data.double()
    weights.load(made, family, device=torch.device("cpu"))
    return made


@pytest.fixture(scope="module")
def samples(family):
    """With a recording, with a named speaker, with none."""
    media = family.media_processor(Data())
    processor = SpeechCodesProcessor(media, Data())
    out = []
    for number, voice in enumerate(
        ({"ref_audio": Media("audio", tiny_tts.wav(0.8, 1))}, {"speaker": "ann"}, {})
    ):
        said = Message("assistant", (tiny_tts.TEXTS[number],))
        extra = {"audio_codes": tiny_tts.codes(4 + 3 * number, number), "language": "en", **voice}
        out.append(processor.sample(Record((Message("user", ()), said), "a row", extra=extra), number))
    return out


def loss(family, model, batches, objective=None):
    objective = objective or SpeechCodesObjective()
    inverse = inverse_weights(objective, batches, None)
    found = [objective.loss(family.stage(model, None, batch), batch, inverse) for batch in batches]
    return sum(value for value, _ in found), [logs for _, logs in found]


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_the_nets(family, model, samples):
    """`forward` of the net, whose numbers are the published ones, on the same row."""
    torch.set_default_dtype(torch.float64)
    try:
        sample = samples[0]
        ours, logs = loss(family, model, [pack([sample])])
        mine = gradients(model, ours)
        codes = sample.tensors["codes"]
        frames = torch.where(codes[:, 1:2] >= 0, codes, qwen3_tts.NONE)
        with torch.no_grad():
            vector = model.speaker_encoder(sample.tensors["speaker_mels"][None].double())
        net = qwen3_tts.Qwen3TTSForConditionalGeneration._from_config(
            family.config, attn_implementation="sdpa"
        )
        net.load_state_dict(model.state_dict())
        out = net(sample.tensors["input_ids"][None], codes[None, :, 0], frames[None], vector)
        theirs = gradients(net, out.loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(ours) == pytest.approx(float(out.loss), rel=1e-9)
    assert float(logs[0]["codes"] / logs[0]["frames"]) == pytest.approx(float(out.code_loss), rel=1e-9)
    assert mine.keys() == theirs.keys() and not any(name.startswith("speaker") for name in mine)
    for name, value in mine.items():
        assert float((value - theirs[name]).norm()) <= 1e-9 * max(float(theirs[name].norm()), 1e-6), name


def test_packed_equals_separate(family, model, samples):
    apart, _ = loss(family, model, [pack([sample]) for sample in samples])
    expected = gradients(model, apart)
    together, _ = loss(family, model, [pack(samples), pack([padding_sample()])])
    found = gradients(model, together)
    assert float(together) == pytest.approx(float(apart), rel=1e-9)
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-9 * max(float(value.norm()), 1e-6), name


def test_samples_that_are_gone_change_nothing(family, model, samples):
    whole, lost = without(pack(samples), [False, True, False])
    assert [sample.id for sample in lost] == [1]
    assert torch.equal(lost[0].tensors["codes"], samples[1].tensors["codes"])
    found, _ = loss(family, model, [whole])
    expected, _ = loss(family, model, [pack([samples[0], samples[2]])])
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_each_code_is_predicted_of_the_state_before_its_frame(family, model, samples):
    """The four errors of the published script: another frame's codes do not change what precedes it."""
    batch = pack([samples[2]])
    other = {**batch.tensors, "codes": batch["codes"].clone()}
    other["codes"][0, -2, 1:] = (
        other["codes"][0, -2, 1:] + 1
    ) % tiny_tts.ENTRIES  # codes 1.. of the last frame
    with torch.no_grad():
        before = family.stage(model, None, batch).hidden_states
        after = family.stage(model, None, pack([samples[2]])).hidden_states
        batch.tensors = other
        changed = family.stage(model, None, batch).hidden_states
    assert torch.equal(before, after)
    assert torch.equal(before[:, :-2], changed[:, :-2]) and not torch.equal(before[:, -2], changed[:, -2])


@pytest.mark.parametrize("size", list(CARD.sizes))
def test_published_sizes(size):
    family = catalog.published(CARD, size)
    count = sum(parameter.numel() for parameter in family.build().parameters())
    assert count / 1e9 == pytest.approx(CARD.sizes[size].parameters, abs=0.001)


def test_tensors_of_a_published_file():
    """402 in 0.6B-CustomVoice, 478 with the speaker encoder (listings of the published files)."""
    for size, count in (("0.6b-custom", 402), ("0.6b-base", 478)):
        assert len(catalog.published(CARD, size).build().state_dict()) == count


def test_costs_are_the_operations(family, samples):
    from torch.utils.flop_counter import FlopCounterMode

    batch = pack([samples[2]])
    made = family.build()
    weights.load(made, family, device=torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        out = family.stage(made, None, batch)
        states = batch["codes"][0, :, 1] >= 0
        hidden = out.hidden_states[0][states.roll(-1)]
        heads = out.extra["predict"](hidden, batch["codes"][0][states])
        for number, head in enumerate(out.extra["heads"]):
            head(heads[:, number])
        out.head(torch.cat([hidden, hidden[:1]]))
    measure = samples[2].measure
    assert family.cost(measure) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_voice_is_as_long_as_measured(family, samples):
    assert samples[0].measure.media["speaker"] == (len(samples[0].tensors["speaker_mels"]),)


def test_a_recording_is_refused_where_no_encoder_hears_it(tmp_path):
    directory = tiny_tts.checkpoint(tmp_path / "custom", codec=False, kind="custom_voice")
    media = catalog.family(Model(source=str(directory))).media_processor(Data())
    with pytest.raises(PolymodalError, match="has no speaker encoder"):
        media.row("yes", torch.zeros(2, tiny_tts.GROUPS, dtype=torch.int64), None, True, None)
    ids, codes = media.row("yes", torch.zeros(2, tiny_tts.GROUPS, dtype=torch.int64), "Ann", False, "zh")
    assert codes[7, 0] == 41 and codes[5, 0] == 40, "the language, then the speaker's row"
    assert len(ids) == len(codes)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_texts_spoken_together_are_those_spoken_alone(family, temperature):
    """Padding on the left and the draws of others change nothing; speech of its own length ends each."""
    from polymodal.distributed import attention

    made = family.build()
    weights.load(made, family, device=torch.device("cpu"))
    attention.use(made.eval(), "sdpa")
    media = family.media_processor(None)
    prompts = []
    for text, speaker in zip(tiny_tts.TEXTS[:4], ("ann", None, torch.randn(32), None), strict=True):
        with torch.no_grad():
            prompts.append(made.prompt(torch.tensor(media.words(text)), speaker, "english", False))

    def spoken(which):
        draws = [torch.Generator().manual_seed(5 + i) for i in which]
        found = made.speak([prompts[i] for i in which], 24, temperature, 40, 1.05, draws)
        return [codes.tolist() for codes, _ in found]

    together = spoken(range(4))
    assert together == [spoken([i])[0] for i in range(4)]
    assert len({len(codes) for codes in together}) > 1 or temperature == 0
