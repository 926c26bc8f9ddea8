"""Chat and its engine: batches equal single questions, seeds give equal answers, every checkpoint opens."""

import functools
import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.core.terminal import plain
from polymodal.data.chat import ChatProcessor
from polymodal.distributed import checkpoint as checkpoints
from polymodal.generate import chat, rows
from polymodal.generate.engine import Answer, Engine, Sampling
from polymodal.generate.opening import kind_of, load_hub, open_engine, processor_of
from polymodal.models import catalog
from tests.models import tiny

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    base = tmp_path_factory.mktemp("model")

    @functools.cache
    def write(name):
        return tiny.checkpoint(name, base / name)

    return write


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of("qwen2.5-vl")


@pytest.fixture(scope="module")
def engine(model):
    return open_engine(model, device="cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "picture.png"
    tiny.picture(32, 24, seed=3).save(path)
    return str(path)


def questions(directory, count=6):
    """Conversations of unlike lengths: without media, with one or two pictures, with a video."""
    records = [
        tiny.record(directory, images=i % 3, videos=int(i == 4), seed=i, question="What is this? " * (1 + i))
        for i in range(count)
    ]
    return [(str(i), record.messages[:-1]) for i, record in enumerate(records)]


@pytest.mark.parametrize("name", (*tiny.NAMES, *tiny.GLM))
def test_a_batch_answers_as_single_questions_do(name, tmp_path, checkpoint_of):
    engine = open_engine(checkpoint_of(name), device="cpu")
    asked = questions(tmp_path)
    batched = dict(engine.answers(asked, SHORT, batch_size=4))
    assert sorted(batched) == list(range(6))
    for i, (key, conversation) in enumerate(asked):
        assert batched[i] == engine.answer(conversation, SHORT, key=key)
    assert len({a.text for a in batched.values()}) > 1


@pytest.mark.parametrize("name", (*tiny.NAMES, *tiny.GLM))
def test_the_model_is_fed_what_training_feeds_it(name, tmp_path, checkpoint_of):
    """Tokens and pixels of a question equal those of training, with media of both kinds and with none."""
    source = checkpoint_of(name)
    data = recipes.Data(image=recipes.Image(max_pixels=512), video=recipes.Video(min_frames=2, fps=1.0))
    processor = ChatProcessor(catalog.family(recipes.Model(source=str(source))).media_processor(data), data)
    engine = Engine(load_hub(source), processor_of(source, data), video=data.video)
    for images, videos in ((0, 0), (2, 0), (0, 2), (1, 1)):
        record = tiny.record(tmp_path, images, videos, seed=images + 3 * videos)
        before = (
            Message("system", ("Be short.",)),
            Message("user", ("Hello",)),
            Message("assistant", ("Hi",)),
        )
        record = replace(record, messages=(*before, *record.messages))
        expected = processor.prompt(record).tensors
        got = engine._encode([engine._prepare(0, "0", record.messages[:-1])])
        assert torch.equal(got["input_ids"][0], expected["input_ids"])
        kinds = [k for k in ("pixel_values", "pixel_values_videos") if k in got]
        both = images > 0 and videos > 0
        assert len(kinds) == 2 - (name in tiny.GLM) if both else len(kinds) == (images > 0) + (videos > 0)
        if kinds:
            assert torch.equal(
                torch.cat([got[k] for k in kinds]), expected["pixel_values"]
            )  # the record names images first
            grids = torch.cat([got[k] for k in ("image_grid_thw", "video_grid_thw") if k in got])
            if both and name in tiny.GLM:  # whose library takes frames as pictures beside others
                expected["grid_thw"] = expected["grid_thw"].repeat_interleave(expected["grid_thw"][:, 0], 0)
                expected["grid_thw"][:, 0] = 1
            assert torch.equal(grids, expected["grid_thw"])


def test_greedy_is_the_librarys_own_answer(engine, model, picture):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = AutoModelForImageTextToText.from_pretrained(model).generate(
        **inputs, max_new_tokens=6, do_sample=False
    )
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert chat.once(engine, "What is this?", [Media("image", picture)], sampling=SHORT).text == expected


def test_samples_depend_on_seed_and_key_alone(engine, tmp_path):
    asked = questions(tmp_path)
    hot = Sampling(max_new_tokens=6, temperature=1.2, top_p=0.95, top_k=50)
    whole = dict(engine.answers(asked, hot, batch_size=6))
    turned = dict(engine.answers(asked[::-1], hot, batch_size=2))
    assert [whole[i].text for i in range(6)] == [turned[5 - i].text for i in range(6)]
    other = dict(engine.answers(asked, Sampling(max_new_tokens=6, temperature=1.2, seed=7), batch_size=6))
    assert [other[i].text for i in range(6)] != [whole[i].text for i in range(6)]


def test_sampling_follows_the_models_distribution(engine):
    """First tokens of many seeds against the probabilities that top-k 3 leaves."""
    conversation = (Message("user", ("yes or no?",)),)
    hot = Sampling(max_new_tokens=1, temperature=2.0, top_k=3)
    got = [
        a.text for _, a in engine.answers([(f"{k}", conversation) for k in range(600)], hot, batch_size=100)
    ]
    inputs = engine._encode([engine._prepare(0, "0", conversation)])
    with torch.no_grad():
        top = (engine.model(**inputs).logits[0, -1] / 2.0).topk(3)
    for share, token in zip(top.values.softmax(-1).tolist(), top.indices.tolist(), strict=True):
        seen = got.count(engine.tokenizer.decode([token], skip_special_tokens=True).strip()) / len(got)
        assert abs(seen - share) < 4 * (share * (1 - share) / len(got)) ** 0.5 + 0.01


def test_likelihood_of_options_in_batches_and_alone(engine, tmp_path):
    asked = questions(tmp_path)
    options = [
        ["yes", "no", "three"],
        ["yes", "a three"],
        ["1", "2"],
        ["It is", "no"],
        ["1", "7"],
        ["yes", "no"],
    ]
    batched = dict(
        engine.choices([(k, c, o) for (k, c), o in zip(asked, options, strict=True)], batch_size=4)
    )
    for i, (key, conversation) in enumerate(asked):
        ((_, alone),) = engine.choices([(key, conversation, options[i])], batch_size=1)
        assert batched[i].text == alone.text == options[i][alone.scores.index(max(alone.scores))]
        assert batched[i].scores == pytest.approx(alone.scores, abs=1e-4)
    # against a plain pass over the whole text
    prepared = engine._prepare(0, "0", asked[0][1])
    inputs = engine._encode([prepared])
    ids = engine.tokenizer("a three", add_special_tokens=False)["input_ids"] + [engine.tokenizer.eos_token_id]
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    with torch.no_grad():
        logits = engine.model(input_ids=whole).logits.log_softmax(-1)[0, -len(ids) - 1 : -1]
    expected = sum(float(logits[i, token]) for i, token in enumerate(ids))
    ((_, got),) = engine.choices([("0", asked[0][1], ["yes", "a three"])])
    assert got.scores[1] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(PolymodalError, match="no options"):
        list(engine.choices([("0", asked[0][1], [])]))


def test_a_broken_picture_fails_its_own_question_only(engine, tmp_path, picture):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    conversations = [
        ("0", (Message("user", (Media("image", str(bad)), "what?")),)),
        ("1", (Message("user", (Media("image", picture), "what?")),)),
    ]
    got = dict(engine.answers(conversations, SHORT))
    assert isinstance(got[0], PolymodalError) and "bad.png" in str(got[0])
    assert isinstance(got[1], Answer)


def test_a_picture_of_a_shape_that_the_processor_refuses(engine, tmp_path):
    tiny.picture(2000, 2).save(tmp_path / "thin.png")
    got = dict(
        engine.answers(
            [
                ("0", (Message("user", (Media("image", str(tmp_path / "thin.png")), "what?")),)),
                ("1", (Message("user", ("hi",)),)),
            ],
            SHORT,
        )
    )
    assert "aspect ratio" in str(got[0]) and isinstance(got[1], Answer)


def test_between_answers_nothing_of_inference_leaks_out(model):
    opened = open_engine(model, device="cpu")
    opened.model.train()
    for _ in opened.answers([(str(i), (Message("user", ("hi",)),)) for i in range(3)], SHORT, batch_size=1):
        assert torch.is_grad_enabled() and opened.model.training


def test_a_text_only_model(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    net = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes))
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = open_engine(tmp_path, device="cpu")
    asked = [(str(i), (Message("user", ("what is this? " * (i + 1),)),)) for i in range(4)]
    batched = dict(opened.answers(asked, SHORT))
    assert [batched[i] for i in range(4)] == [opened.answer(c, SHORT) for _, c in asked]
    with pytest.raises(PolymodalError, match="reads text only"):
        opened.answer((Message("user", (Media("image", "x.png"), "what?")),))


def test_control_tokens_in_a_question_are_text(engine):
    prepared = engine._prepare(0, "0", (Message("user", ("end <|im_end|> here",)),))
    ids = engine._encode([prepared])["input_ids"][0].tolist()
    assert ids.count(engine.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_an_engine_leaves_the_model_as_it_was(model):
    opened = open_engine(model, device="cpu")
    net = opened.model.train()
    own, identity = net.generation_config, Engine(net, opened.processor).identity
    net.forward = "bound by training"
    assert opened.answer((Message("user", ("hello",)),), SHORT).tokens
    assert (
        net.training and net.generation_config is own and net.__dict__.pop("forward") == "bound by training"
    )
    assert Engine(net, opened.processor).identity == identity
    with torch.no_grad():
        net.lm_head.weight[0, 0] += 1
    assert Engine(net, opened.processor).identity != identity


# --- what can be opened ---------------------------------------------------------------------------


def test_a_run_answers_as_its_weights_do(model, engine, tmp_path, picture):
    """A run whose checkpoint holds the language tower only: the vision tower comes from model.source."""
    run = tmp_path / "run"
    recipe = recipes.Recipe(
        model=recipes.Model(source=str(model)),
        checkpoint=recipes.Checkpoint(dir=str(run)),
        train=recipes.Train(freeze=["vision"]),
    )
    generator = torch.Generator().manual_seed(1)
    changed = {
        n: p + torch.randn(p.shape, generator=generator) * 0.1
        for n, p in engine.model.named_parameters()
        if "visual" not in n
    }
    writer = checkpoints.Writer(run, 2, False, 0, None)
    tensors = {f"model.{n}": t for n, t in changed.items()} | {
        f"ema.{n}": dict(engine.model.named_parameters())[n].detach() for n in changed
    }
    writer.save(tensors, checkpoints.RunState(step=3, recipe=recipe.model_dump(mode="json")))
    places = (run, run / "checkpoints", run / "checkpoints" / "step-00000003")
    assert {kind_of(place) for place in places} == {"run"}
    assert {checkpoints.locate(place) for place in places} == {places[2]}
    opened = open_engine(run, device="cpu")
    for name, parameter in opened.model.named_parameters():
        expected = changed.get(name, dict(engine.model.named_parameters())[name])
        assert torch.equal(parameter, expected), name
    asked = (Message("user", (Media("image", picture), "What is this?")),)
    assert open_engine(run, device="cpu", ema=True).answer(asked, SHORT) == engine.answer(asked, SHORT)
    reference = open_engine(model, device="cpu")
    reference.model.load_state_dict(changed, strict=False)
    assert opened.answer(asked, SHORT) == reference.answer(asked, SHORT) != engine.answer(asked, SHORT)
    assert opened.identity != open_engine(run, device="cpu", ema=True).identity
    bf16 = open_engine(run, device="cpu", dtype="bf16")
    assert next(bf16.model.parameters()).dtype == torch.bfloat16 and bf16.answer(asked, SHORT).tokens


def test_a_peft_adapter_answers_as_peft_does(model, engine, tmp_path, picture):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    adapted = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(model),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(tmp_path / "adapter")
    opened = open_engine(tmp_path / "adapter", device="cpu")
    asked = (Message("user", (Media("image", picture), "What is this?")),)
    assert (
        opened.answer(asked, SHORT)
        == Engine(adapted.get_base_model(), processor_of(model)).answer(asked, SHORT)
        != engine.answer(asked, SHORT)
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/nowhere/base", "peft_type": "LORA"})
    )
    with pytest.raises(PolymodalError, match="base /nowhere/base of the adapter"):
        open_engine(tmp_path / "adapter", device="cpu")


def test_what_cannot_be_opened_says_why(tmp_path, model):
    cases = {"/nowhere/model": "does not exist", str(model / "config.json"): "is a file"}
    for source, sentence in cases.items():
        with pytest.raises(PolymodalError, match=sentence):
            open_engine(source, device="cpu")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: {source: x}")
    with pytest.raises(PolymodalError, match="no checkpoint yet"):
        open_engine(run, device="cpu")
    with pytest.raises(PolymodalError, match="only runs keep an average"):
        open_engine(model, device="cpu", ema=True)
    with pytest.raises(PolymodalError, match="dtype = int4"):
        open_engine(model, device="cpu", dtype="int4")
    with pytest.raises(PolymodalError, match="temperature = -1"):
        Sampling(temperature=-1)


# --- the terminal ---------------------------------------------------------------------------------


def test_a_conversation_in_the_terminal(engine, picture, tmp_path):
    bad = tmp_path / "notes.txt"
    bad.write_text("no picture")
    script = [
        "hello",
        f"/image {picture}",
        "what is this?",
        "/image /nowhere.png",
        f"/image {bad}",
        "/video",
        "/dance",
        "",
        "/reset",
        "<image> again",
        "/quit",
        "never",
    ]
    lines, printed = iter(script), []
    terminal = chat.Terminal(
        engine, system="You are short.", sampling=SHORT, read=lambda prompt: next(lines), write=printed.append
    )
    seen = []
    say = terminal.say

    def say_and_note(text):
        say(text)
        seen.append([*terminal.history])

    terminal.say = say_and_note
    terminal.run()
    text = "".join(printed)
    assert next(lines) == "never"
    first, second = seen[0], seen[1]
    assert [m.role for m in second] == ["user", "assistant", "user", "assistant"] and first == second[:2]
    assert second[2].content == (Media("image", picture), "what is this?")
    system = Message("system", ("You are short.",))
    expected = engine.answer((system, first[0]), SHORT)
    assert first[1].content == (expected.text,) and expected.text in text
    assert second[3].content == (engine.answer((system, *second[:3]), SHORT).text,)
    assert "/nowhere.png does not exist" in text and "notes.txt is of no known format" in text
    assert "/video needs a file" in text and "there is no /dance" in text and "forgotten" in text
    assert seen[2] == [] and "1 <image> in the text" in text  # a turn that fails leaves no trace


def test_stopping_an_answer_keeps_its_text(engine):
    said = []

    def once(text):
        said.append(text)
        if text.strip() and text != " [stopped]":
            raise KeyboardInterrupt

    terminal = chat.Terminal(engine, sampling=Sampling(max_new_tokens=64), write=once)
    terminal.say("hello")
    assert " [stopped]" in said and terminal.history[-1].role == "assistant"


# --- rows -----------------------------------------------------------------------------------------


def test_records_in_records_out_and_on_after_a_stop(model, engine, picture, tmp_path, monkeypatch, capsys):
    asked = [
        {"prompt": "hello", "id": 7},
        {"prompt": "what is this?", "image": picture},
        {
            "messages": [
                {"role": "user", "content": "<image>and this?"},
                {"role": "assistant", "content": "old"},
            ],
            "images": [picture],
        },
        {"prompt": "gone", "image": "/nowhere.png"},
        {"question": "a question", "answer": "expected"},
        {"nothing": 1},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, asked)) + "\nnot json\n")

    def run():
        return chat.main(str(model), json_file=str(source), out=str(out), sampling=SHORT, device="cpu")

    assert run() == 2
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(got) == 7 and got[0]["id"] == 7 and got[4]["expected"] == "expected"
    assert (
        got[1]["answer"] == chat.once(engine, "what is this?", [Media("image", picture)], sampling=SHORT).text
    )
    assert (
        got[2]["answer"]
        == chat.once(engine, "<image>and this?", [Media("image", picture)], sampling=SHORT).text
    )
    assert "nowhere.png" in got[3]["error"] and got[3]["answer"] is None
    assert "line 6: there is no `prompt`" in got[5]["error"] and "line 7: not valid JSON" in got[6]["error"]
    assert "3 rows could not be answered" in capsys.readouterr().err
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a row
    kept = whole[: whole.rfind(b"\n", 0, len(whole) // 2) + 1].count(b"\n")
    assert run() == 2 and out.read_bytes() == whole
    assert f"{7 - kept} rows answered, {kept} were there before" in capsys.readouterr().err
    source.write_text(json.dumps({"prompt": "other"}) + "\n")
    with pytest.raises(PolymodalError, match="in.jsonl, line 1 is not an answer to it"):
        run()
    source.write_text(json.dumps(asked[0]) + "\n")
    with pytest.raises(PolymodalError, match="has 7 rows"):
        run()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked[0]) + "\n"))
    assert chat.main(str(model), json_file="-", sampling=SHORT, device="cpu") == 0
    assert json.loads(capsys.readouterr().out) == got[0]


def test_many_records_come_back_in_order_whatever_the_batches(model, tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"prompt": "number " * (1 + i % 3), "id": i}) for i in range(20)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = {"sampling": Sampling(max_new_tokens=2), "device": "cpu", "batch_size": 1}
    assert (
        chat.main(
            str(model), json_file=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out.jsonl"), **options
        )
        == 0
    )
    written = (tmp_path / "out.jsonl").read_text()
    assert [json.loads(line)["id"] for line in written.splitlines()] == list(range(20))
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert chat.main(str(model), json_file="-", **options) == 0
    assert capsys.readouterr().out == written


def test_a_line_is_answered_while_the_next_is_still_to_come():
    import queue

    lines: queue.Queue = queue.Queue()
    chunks = rows._available(rows._parsed(iter(lines.get, None), "line"), 4)
    lines.put('{"prompt": "a"}')
    assert [row.value for row in next(chunks)] == [{"prompt": "a"}]
    for _ in range(9):
        lines.put('{"prompt": "b"}')
    lines.put(None)
    rest = [len(chunk) for chunk in chunks]
    assert sum(rest) == 9 and max(rest) <= 4


def test_one_answer_and_bad_input(model, engine, picture, monkeypatch, capsys, tmp_path):
    expected = chat.once(
        engine, "what is this?", [Media("image", picture)], system="Be short.", sampling=SHORT
    ).text
    assert (
        chat.main(
            str(model),
            image=[picture],
            prompt="what is this?",
            system="Be short.",
            sampling=SHORT,
            device="cpu",
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == plain(expected).strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this?\n"))
    assert chat.main(str(model), image=[picture], system="Be short.", sampling=SHORT, device="cpu") == 0
    assert capsys.readouterr().out.strip() == plain(expected).strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0 cut")
    cases = [
        ({"prompt": " "}, "The prompt is empty"),
        ({"image": ["/nowhere.png"], "prompt": "x"}, "/nowhere.png does not exist"),
        ({"image": [str(tmp_path)], "prompt": "x"}, "is a directory"),
        ({"image": [str(bad)], "prompt": "x"}, "bad.jpg"),
        ({"video": [picture.replace(".png", ".mp4")], "prompt": "x"}, "does not exist"),
        ({"json_file": "/nowhere.jsonl"}, "does not exist"),
        ({"json_file": str(bad), "prompt": "x"}, "--json brings its own prompts"),
        ({"json_file": str(bad), "out": str(bad)}, "same file"),
        ({}, "There is no prompt"),
    ]
    for options, sentence in cases:
        with pytest.raises(PolymodalError, match=sentence):
            chat.main(str(model), device="cpu", **options)
