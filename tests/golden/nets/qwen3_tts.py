import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.loss.loss_utils import ForCausalLMLoss

from polymodal.models.nets import qwen3_tts, qwen3_tts_codec
from tests.golden.net import Net, Outcome


def build(document):
    return qwen3_tts.build(document["config"], attn_implementation="eager")


def run(module, case, inputs, document):
    if case == "speaker_encoder":
        return Outcome({"speaker_embedding": module.speaker_encoder(inputs["ref_mels"])})
    if case.startswith("greedy"):
        count = len(document["cases"][case]["scalars"]["codes"])
        codes, states = module.generate(
            inputs["input_id"][0, :-5],
            "ann",
            "english",
            streaming_text=case == "greedy_streaming_text",
            max_frames=count,
        )
        return Outcome({"talker_hidden": states}, {"codes": codes})
    with torch.no_grad():
        speaker = module.speaker_encoder(inputs["ref_mels"])
    count = sum(name.startswith("text_ids_") for name in inputs)
    rows = [
        qwen3_tts.training_row(module.config, inputs[f"text_ids_{j}"][0].tolist(), inputs[f"audio_codes_{j}"])
        for j in range(count)
    ]
    mask = pad_sequence([torch.ones_like(row["text_ids"]) for row in rows], batch_first=True)
    assert mask.tolist() == document["batch"]["attention_mask"]
    names = ("text_ids", "codec_ids", "codes")
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=qwen3_tts.NONE)
        for name in names
    }
    if case == "script_loss":
        return script_loss(module, batch, speaker, mask)
    out = module(**batch, speaker=speaker, attention_mask=mask)
    scalars = {"loss": out.loss, "talker_loss": out.talker_loss, "sub_talker_loss": out.code_loss}
    if case == "contract_loss":
        valid = int(mask[0, :-1].sum())
        wanted = document["cases"][case]["scalars"]["talker_logits_first_columns_of_row_0"]
        if valid == wanted["shape"][0]:
            scalars["talker_logits_first_columns_of_row_0"] = out.logits[0, :, : wanted["shape"][1]]
        return Outcome({"loss": out.loss}, scalars)
    outputs = {
        "hidden_of_valid_positions": out.hidden[mask[:, :-1] == 1],
        "sub_talker_logits": out.code_logits,
    }
    return Outcome(outputs, scalars)


def script_loss(module, batch, speaker, mask):
    """What the published fine-tuning script computes, with its errors; where both widths of text are one."""
    talker, codes = module.talker, batch["codes"]
    projection, talker.text_projection = talker.text_projection, nn.Identity()
    embeds = module.embed(batch["text_ids"], batch["codec_ids"], codes, speaker)
    talker.text_projection = projection
    hidden = talker.model(inputs_embeds=embeds[:, :-1], attention_mask=mask[:, :-1]).last_hidden_state
    logits = talker.codec_head(hidden)
    is_frame = codes[..., 0] >= 0
    ends = batch["codec_ids"] == module.config.talker_config.codec_eos_token_id
    labels = torch.where(is_frame | ends, batch["codec_ids"], -100)[:, 1:]
    talker_loss = ForCausalLMLoss(logits, labels, logits.shape[-1])
    frames = codes[is_frame]
    first = talker.model.codec_embedding(frames[:, 0])
    code_logits = talker.code_predictor(hidden[is_frame[:, :-1]], first, frames[:, 1:-1])
    code_loss = ForCausalLMLoss(code_logits, frames[:, 1:], code_logits.shape[-1])
    loss = talker_loss + 0.3 * code_loss
    return Outcome({"loss": loss}, {"loss": loss, "talker_loss": talker_loss, "sub_talker_loss": code_loss})


NETS = [
    Net(
        models=("Qwen3-TTS 12 Hz talker",),
        build=build,
        run=run,
        outputs_bound=1e-6,
        gradients_bound=5e-6,
    )
]


def build_codec(document):
    return qwen3_tts_codec.build(document["config"], attn_implementation="eager")


def run_codec(module, case, inputs, document):
    codes = inputs["codes"]
    if case == "parts":
        quantized = module.quantizer.decode(codes)
        return Outcome({"quantized": quantized, "pre_transformer": module.states(quantized)})
    if case == "decode":
        return Outcome({"wav_before_clamp": module.wave(codes)})
    if case == "chunked":
        return Outcome({"wav": module.chunked_decode(codes, chunk_size=4, left_context_size=2)})
    return Outcome({"wav": module(codes)})


NETS.append(
    Net(
        models=("Qwen3-TTS 12 Hz codec, decoder",),
        build=build_codec,
        run=run_codec,
        outputs_bound=1e-6,
        gradients_bound=5e-6,
    )
)
