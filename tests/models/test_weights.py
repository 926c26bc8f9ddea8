"""Loading, random weights and saving on one process: bit-exact, the file's own keys, and one sentence for each fault."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import core_model_loading

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import LazyTensors
from polymodal.models import catalog, initial, library, weights
from polymodal.models.card import PrunedModule
from polymodal.models.slices import NotASlice, Stored
from polymodal.models.storage import Files
from polymodal.recipe import Model
from tests.models import gather, tiny

MOE = {"text_config__moe_intermediate_size": 24}


def to_hub_layout(source: Path, directory: Path) -> Path:
    """Experts as Qwen3-VL-MoE's published files have them: [experts, in, out]."""
    shutil.copytree(source, directory)
    state = load_file(directory / "model.safetensors")
    state = {k: (v.transpose(1, 2).contiguous() if ".experts." in k else v) for k, v in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    made = {
        "qwen2-vl tied": tiny.checkpoint("qwen2-vl", base / "a", tied=True),
        "qwen2.5-vl": tiny.checkpoint("qwen2.5-vl", base / "b", dtype=torch.bfloat16),
        "qwen3-vl": tiny.checkpoint("qwen3-vl", base / "c"),
        "qwen3-vl-moe": tiny.checkpoint("qwen3-vl-moe", base / "d", **MOE),
    }
    made["qwen3-vl-moe hub"] = to_hub_layout(made["qwen3-vl-moe"], base / "e")
    return made


def auto(config):
    kind = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModelForCausalLM"
    return getattr(transformers, kind)


def on_meta(source, **changes) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(source)
    for key, value in changes.items():
        part = config
        *path, leaf = key.split("__")
        for name in path:
            part = getattr(part, name)
        setattr(part, leaf, value)
    with torch.device("meta"):
        return auto(config).from_config(config, dtype=torch.float32)


def loaded(source, **changes) -> nn.Module:
    model = on_meta(source, **changes)
    weights.load(model, None, source)
    return model


def keys(directory) -> dict[str, list[int]]:
    files = [safe_open(str(p), "pt") for p in sorted(Path(directory).glob("*.safetensors"))]
    return {k: f.get_slice(k).get_shape() for f in files for k in f.offset_keys()}


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        got, want = dict(getattr(model, kind)()), dict(getattr(reference, kind)())
        assert got.keys() == want.keys()
        assert [n for n in want if not torch.equal(got[n], want[n]) or got[n].dtype != want[n].dtype] == []


NAMES = ["qwen2-vl tied", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "qwen3-vl-moe hub"]


@pytest.mark.parametrize("name", NAMES)
def test_loaded_as_the_library_loads(checkpoints, name):
    """Every parameter and every buffer, bit for bit; a tied head stays the embedding."""
    source = checkpoints[name]
    model = loaded(source)
    assert_same(model, auto(model.config).from_pretrained(source, dtype=torch.float32))
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_it_lay_on_disk(checkpoints, name, tmp_path):
    """Same keys, shapes and values in several shards; plain transformers opens the directory."""
    source = checkpoints[name]
    model = loaded(source)
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=source, limit=150_000)
    assert keys(out) == keys(source)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(keys(source))
    assert all((out / shard).stat().st_size < 160_000 for shard in index["weight_map"].values())
    again = auto(model.config).from_pretrained(out)
    assert again.dtype == torch.float32  # config.json says what was written
    assert_same(model, again)
    assert_same(loaded(out), again)  # our own reading of several shards
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert not [key for key in config if "attn" in key]
    for file in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saved_in_another_dtype(checkpoints, tmp_path):
    source = checkpoints["qwen3-vl"]
    model = loaded(source)
    out = gather.save(
        dict(model.state_dict()), tmp_path / "out", model=model, source=source, dtype=torch.bfloat16
    )
    again = auto(model.config).from_pretrained(out)
    assert again.dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    got, want = again.state_dict(), model.state_dict()
    assert all(torch.equal(got[n], want[n].bfloat16()) for n in want)


def test_a_source_without_weights_gives_the_librarys_layout(checkpoints, tmp_path):
    """Pretraining from a config: the keys are those that save_pretrained writes."""
    for name in ("qwen2-vl tied", "qwen3-vl-moe"):
        bare = tmp_path / f"bare {name}"
        bare.mkdir()
        shutil.copy(checkpoints[name] / "config.json", bare)
        model = loaded(checkpoints[name])
        out = gather.save(gather.weights(model), tmp_path / f"out {name}", model=model, source=bare)
        assert keys(out) == keys(checkpoints[name])


def test_a_resized_model_is_saved_with_its_own_shapes(checkpoints, tmp_path):
    """Random weights of another size than the source's: names from the source, shapes from the model."""
    model = on_meta(checkpoints["qwen2.5-vl"], vision_config__depth=5, text_config__intermediate_size=80)
    weights.initialise(model, None, seed=1)
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=checkpoints["qwen2.5-vl"])
    found = keys(out)
    assert found["model.layers.2.mlp.up_proj.weight"] == [80, 64]
    assert found["visual.blocks.4.mlp.up_proj.weight"] == [48, 32]
    assert_same(model, auto(model.config).from_pretrained(out))


def tiny_experts(directory: Path) -> Path:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_conversions(tmp_path):
    """One file tensor an expert against one parameter for all."""
    source = tiny_experts(tmp_path / "source")
    model = loaded(source)
    assert_same(model, auto(model.config).from_pretrained(source))
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=source)
    got, want = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    read = dict(weights.read(model, source))
    assert all(torch.equal(read[n], p) for n, p in model.named_parameters())


def test_a_conversion_that_computes_is_refused(tmp_path):
    model = loaded(tiny_experts(tmp_path / "source"))

    class Doubled:
        supports_many_to_many = False

        def convert(self, input_dict, source_patterns, target_patterns, **_):
            return {target_patterns[0]: 2 * input_dict[source_patterns[0]][0]}

    rules = [core_model_loading.WeightConverter("lm_head.weight", "lm_head.weight", operations=[Doubled()])]
    with pytest.raises(PolymodalError, match="lm_head.weight is computed .* slice by slice"):
        library.layout(model, {"lm_head.weight": (64, 32)}, rules)


def test_stand_ins_keep_the_books():
    """Every operation on boxes gives what torch gives on values."""
    parts = {f"e{i}": torch.randn(3, 4) for i in range(4)}

    def both(make):
        want = make(dict(parts))
        stored = make({k: Stored.whole(k, v.shape) for k, v in parts.items()})
        got = torch.full(tuple(stored.shape), float("nan"))
        for piece in stored.pieces:
            piece.view(got).copy_(parts[piece.key][piece.box])
        assert stored.complete and torch.equal(got, want)

    both(lambda t: torch.cat([torch.stack([t["e0"], t["e1"]]), torch.stack([t["e2"], t["e3"]])], dim=1))
    both(lambda t: torch.stack(list(t.values()), dim=2).transpose(0, 1).contiguous())
    both(lambda t: torch.cat(torch.chunk(t["e1"], 2, dim=1)[::-1], dim=-1))
    both(lambda t: torch.stack([c.squeeze(0) for c in torch.split(t["e2"], [1, 1, 1], dim=0)], dim=-1))
    both(lambda t: torch.transpose(t["e3"], 0, 1).narrow(0, 1, 2).unsqueeze(1))
    for operation in (lambda s: s.view(-1), lambda s: s[0], lambda s: torch.exp(s), lambda s: s.reshape(12)):
        with pytest.raises(NotASlice):
            operation(Stored.whole("e0", (3, 4)))


def test_parts_of_other_pipeline_stages_are_passed_over(checkpoints):
    """A stage holds its own blocks; a tied head without the embedding reads the embedding's tensor."""
    source = checkpoints["qwen2-vl tied"]
    model = on_meta(source)
    model.model.visual = PrunedModule()
    model.model.language_model.layers[0] = PrunedModule()
    model.model.language_model.embed_tokens = PrunedModule()
    weights.load(model, None, source)
    reference = dict(auto(model.config).from_pretrained(source).named_parameters(remove_duplicate=False))
    assert model.lm_head.weight is not None
    assert all(torch.equal(p, reference[n]) for n, p in model.named_parameters())


def test_fewer_layers_by_the_config(checkpoints, tmp_path):
    """Blocks that the recipe cut off are passed over; in a checkpoint that contradicts its own config they are not."""
    source = checkpoints["qwen3-vl"]
    model = loaded(source, text_config__num_hidden_layers=2)
    assert len(model.model.language_model.layers) == 2
    shutil.copytree(source, tmp_path / "odd")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"].pop("layer_types", None)
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PolymodalError, match="have no place in the model: model.language_model.layers.2"):
        loaded(tmp_path / "odd")


def change(source: Path, directory: Path, edit) -> Path:
    shutil.copytree(source, directory)
    state = load_file(directory / "model.safetensors")
    edit(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_what_a_checkpoint_lacks_or_has_too_much(checkpoints, tmp_path):
    source = checkpoints["qwen2.5-vl"]

    def renamed(state):
        state["model.layers.1.mlp.up_projection.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")

    odd = change(source, tmp_path / "renamed", renamed)
    with pytest.raises(PolymodalError) as error:
        loaded(odd)
    assert (
        "1 of 93 parameters are not in the checkpoint: model.language_model.layers.1.mlp.up_proj.weight"
        in str(error.value)
    )
    assert "Nearest" in error.value.hint and "up_projection" in error.value.hint

    lost = change(source, tmp_path / "lost", lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    model = on_meta(lost)
    model._keys_to_ignore_on_load_missing = [r"layers\.1\.mlp\.up_proj"]  # as the library lets files lack it
    report = weights.load(model, None, lost)
    assert report.drawn == ["model.language_model.layers.1.mlp.up_proj.weight"]
    drawn = model.get_parameter(report.drawn[0])
    assert 0.01 < drawn.std() < 0.03

    more = change(
        source, tmp_path / "more", lambda state: state.update({"model.extra.weight": torch.ones(2)})
    )
    with pytest.raises(
        PolymodalError, match="1 tensors of the checkpoint have no place in the model: model.extra.weight"
    ):
        loaded(more)

    with pytest.raises(
        PolymodalError, match=r"another shape: .*mlp.*\[96, 64\] in the file, \[80, 64\] in the model"
    ):
        loaded(source, text_config__intermediate_size=80)


def test_values_that_are_no_numbers(checkpoints, tmp_path):
    def spoil(state):
        state["model.norm.weight"][3] = float("nan")

    with pytest.raises(
        PolymodalError,
        match=r"model.safetensors: model.language_model.norm.weight holds values that are not numbers",
    ):
        loaded(change(checkpoints["qwen2.5-vl"], tmp_path / "nan", spoil))


def test_a_tied_head_with_two_tensors(checkpoints, tmp_path):
    """The same tensor twice is taken; two different ones are a contradiction (the library silently unties)."""
    source = checkpoints["qwen2-vl tied"]

    def twice(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    twin = change(source, tmp_path / "twice", twice)
    model = loaded(twin)
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=twin)
    assert keys(out) == keys(twin)

    def different(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1

    with pytest.raises(
        PolymodalError, match="ties lm_head.weight to .*embed_tokens.weight, but the files hold two different"
    ):
        loaded(change(source, tmp_path / "different", different))
    only_head = change(
        source, tmp_path / "head", lambda s: s.update({"lm_head.weight": s.pop("model.embed_tokens.weight")})
    )
    assert_same(loaded(only_head), model)


def test_what_the_files_hold_decides_about_ties(checkpoints, tmp_path):
    """Two different tensors under a config that ties are two parameters, trained and saved as such."""
    source = checkpoints["qwen2-vl tied"]

    def head(change):
        return lambda s: s.update(
            {
                "lm_head.weight": s["model.embed_tokens.weight"].flip(0)
                if change
                else s["model.embed_tokens.weight"].clone()
            }
        )

    apart = change(source, tmp_path / "apart", head(True))
    twice = change(source, tmp_path / "twice", head(False))
    for directory, tied in ((source, True), (twice, True), (apart, False)):
        family = catalog.family(Model(source=str(directory)))
        assert family.config.tie_word_embeddings is tied
        model = family.build()
        weights.load(model, family)
        stored = load_file(directory / "model.safetensors")
        embedding = model.model.language_model.embed_tokens.weight
        assert (model.lm_head.weight is embedding) is tied
        assert torch.equal(embedding, stored["model.embed_tokens.weight"])
        assert torch.equal(model.lm_head.weight, stored.get("lm_head.weight", embedding))
    out = gather.save(gather.weights(model), tmp_path / "out", model=model, source=apart)
    assert (
        keys(out) == keys(apart)
        and json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert_same(model, auto(model.config).from_pretrained(out))
    with pytest.raises(
        PolymodalError, match="but the files hold two different"
    ):  # the recipe's word is kept to
        asked = catalog.family(Model(source=str(apart), config={"tie_word_embeddings": True}))
        weights.load(asked.build(), asked)


@pytest.mark.parametrize(
    "kind", ["InternVLConfig", "Mistral3Config", "JanusConfig", "LlavaConfig", "Qwen2_5_VLConfig"]
)
@pytest.mark.parametrize("flag", [True, False])
def test_the_text_configs_tie_counts(kind, flag, tmp_path):
    """Top-level configs default to tied whatever their text part says; a flag that is written there counts more.

    LLaVA's and Qwen2.5-VL's classes themselves take the text part's over the top level's."""
    names = ("lm_head", "model.language_model.embed_tokens")
    for top in (None, True, False) if kind not in ("LlavaConfig", "Qwen2_5_VLConfig") else (None,):
        said = getattr(transformers, kind)().to_dict()
        said["text_config"]["tie_word_embeddings"] = flag
        said.pop("tie_word_embeddings", None)
        if top is not None:
            said["tie_word_embeddings"] = top
        (tmp_path / "config.json").write_text(json.dumps(said))
        config = getattr(transformers, kind).from_pretrained(tmp_path)
        library.settle_ties(config, tmp_path, *names)
        assert config.tie_word_embeddings is (flag if top is None else top)


def test_broken_downloads(checkpoints, tmp_path):
    """One sentence each, with the file and the cause."""
    source = checkpoints["qwen3-vl"]
    model = loaded(source)
    sharded = gather.save(
        gather.weights(model), tmp_path / "sharded", model=model, source=source, limit=300_000
    )
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))

    def broken(name: str, edit) -> Path:
        directory = tmp_path / name
        shutil.copytree(sharded, directory)
        edit(directory)
        return directory

    def cut(directory):
        data = (directory / shards[1]).read_bytes()
        (directory / shards[1]).write_bytes(data[: len(data) // 2])

    def pickled(directory):
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        torch.save({}, directory / "pytorch_model.bin")

    def other_names(directory):
        for number, shard in enumerate(shards):
            (directory / shard).rename(directory / f"consolidated.{number}.safetensors")
        (directory / "model.safetensors.index.json").unlink()

    def wrong_index(directory):
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        index["weight_map"]["ghost.weight"] = shards[0]
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    cases = {
        f"{shards[1]} is cut short or corrupt": cut,
        f"{shards[0]} is a git-lfs pointer": lambda d: (d / shards[0]).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        f"{shards[0]} is empty": lambda d: (d / shards[0]).write_bytes(b""),
        f"{shards[0]} is a web page": lambda d: (d / shards[0]).write_text("<!DOCTYPE html><html>404</html>"),
        f"lacks 1 of the {len(shards)} files .*first: {shards[2]}": lambda d: (d / shards[2]).unlink(),
        "as pickles only .pytorch_model.bin": pickled,
        "has consolidated.0.safetensors": other_names,
        "cannot be read": lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "lacks 1 of the tensors that .* lists for it .first: ghost.weight": wrong_index,
        "has no weights": lambda d: [p.unlink() for p in d.glob("*.safetensors*")],
    }
    for number, (message, edit) in enumerate(cases.items()):
        directory = broken(str(number), edit)
        with pytest.raises(PolymodalError, match=message) as error:
            weights.load(on_meta(directory), None, directory)
        assert error.value.hint
    (sharded / "model.safetensors.index.json").unlink()  # complete by their names
    assert set(Files(sharded).shapes) == set(keys(source))
    (sharded / shards[-1]).unlink()
    with pytest.raises(PolymodalError, match="shards but their names say"):
        Files(sharded)


def test_an_expert_too_few(tmp_path):
    source = tiny_experts(tmp_path / "source")
    odd = change(source, tmp_path / "odd", lambda s: s.pop("model.layers.0.mlp.experts.3.up_proj.weight"))
    with pytest.raises(
        PolymodalError, match="model.layers.0.mlp.experts.gate_up_proj cannot be put together from 7 tensors"
    ):
        loaded(odd)


def test_quantised_checkpoints_are_refused(checkpoints):
    model = on_meta(checkpoints["qwen3-vl"])
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PolymodalError, match="quantised"):
        weights.load(model, None, checkpoints["qwen3-vl"])


def test_saving_refuses_what_would_be_lost(checkpoints, tmp_path):
    source = checkpoints["qwen3-vl"]
    model = loaded(source)
    state = gather.weights(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    options = {"model": model, "source": source}
    with pytest.raises(PolymodalError, match="full exists already"):
        gather.save(state, tmp_path / "full", **options)
    assert (tmp_path / "full" / "notes").read_text() == "mine"
    norm = state.pop("model.language_model.norm.weight")
    with pytest.raises(
        PolymodalError, match="The state lacks 1 parameters: model.language_model.norm.weight"
    ):
        gather.save(state, tmp_path / "out", **options)
    with pytest.raises(
        PolymodalError,
        match="The state has model.language_model.nrom.weight, which .* does not. Nearest: model.language_model.norm",
    ):
        gather.save({**state, "model.language_model.nrom.weight": norm}, tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]  # nothing half-written
    state["model.language_model.norm.weight"] = norm
    gather.save(state, tmp_path / "full", overwrite=True, **options)
    assert keys(tmp_path / "full") == keys(source) and not (tmp_path / "full" / "notes").exists()


def test_one_file_is_held(checkpoints, tmp_path):
    """Tensors are asked for file by file: before the third file's are, the first one is on disk."""
    source = checkpoints["qwen3-vl"]
    state = gather.weights(loaded(source))
    partial = tmp_path / ".out.partial"
    asked, unwritten = set(), []

    def read(name):
        asked.add(name)
        given = sum(state[n].numel() * 4 for n in asked)
        unwritten.append(given - sum(p.stat().st_size for p in partial.glob("*.safetensors")))
        return state[name]

    given = LazyTensors(dict.fromkeys(state, read))
    gather.save(given, tmp_path / "out", model=on_meta(source), source=source, limit=200_000)
    assert asked == set(state)
    assert max(unwritten) < 200_000 + 464 * 64 * 4 < sum(t.numel() * 4 for t in state.values()) / 3


def test_random_weights_follow_the_library(checkpoints):
    """Distribution of each parameter as the library draws it; (seed, name) decides, nothing else."""
    for name in ("qwen2-vl tied", "qwen3-vl-moe"):
        model = on_meta(checkpoints[name])
        weights.initialise(model, None, seed=7)
        torch.manual_seed(0)
        reference = auto(model.config).from_config(model.config)
        got, want = dict(model.named_parameters()), dict(reference.named_parameters())
        for n, p in want.items():
            if p.std() == 0 or p.numel() == 1:
                assert torch.equal(got[n], p), n
            else:
                assert abs(got[n].std() / p.std() - 1) < 6 / p.numel() ** 0.5, n
                assert abs(got[n].mean()) < 6 * p.std() / p.numel() ** 0.5, n
        for n, b in reference.named_buffers():
            assert torch.equal(model.get_buffer(n), b), n
        values = [p.flatten()[:4] for n, p in got.items() if p.ndim > 1]
        assert len({tuple(v.tolist()) for v in values}) == len(values)  # no two parameters alike
        again = on_meta(checkpoints[name])
        torch.manual_seed(99)
        weights.initialise(again, None, seed=7)
        assert_same(model, again)
        other = on_meta(checkpoints[name])
        weights.initialise(other, None, seed=8)
        assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_random_weights_from_a_rule():
    """A parameter is drawn by (seed, name) alone: whole, beside torch's own generator, its neighbours untouched."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(500, 70, device="meta"))
            self.bias = nn.Parameter(torch.zeros(3))
            self.inner = nn.Linear(3, 3)

    def rule(module):
        nn.init.normal_(module.bias)
        nn.init.trunc_normal_(module.weight, std=0.5, a=-1, b=1)
        module.weight[432].zero_()
        module.inner.weight.data.fill_(7.0)

    table = Table()
    before = table.inner.weight.clone()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = initial.draw(table, "weight", rule, "some.weight", 3)
    assert torch.equal(torch.rand(3), expected)
    assert 0.42 < drawn.std() < 0.46 and drawn.abs().max() <= 1.0 and not drawn[432].any()
    assert torch.equal(drawn, initial.draw(table, "weight", rule, "some.weight", 3))
    assert not torch.equal(drawn, initial.draw(table, "weight", rule, "other.weight", 3))
    assert not torch.equal(drawn, initial.draw(table, "weight", rule, "some.weight", 4))
    assert table.weight.is_meta and not table.bias.any() and torch.equal(table.inner.weight, before)
    assert initial.draw(table, "weight", lambda module: module.weight[:9].zero_(), "w", 1) is None


def test_memory_is_given_once():
    """Tied parameters stay one, a module that hangs in two places too; what is real already keeps its values."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.device("meta"):
                self.first = nn.Linear(3, 3)
                self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.shared = self.first
            self.real = nn.Linear(3, 3)

    model = Twice()
    before = model.real.weight.clone()
    weights.materialise(model)
    assert not any(p.is_meta for p in model.parameters())
    assert model.second.weight is model.first.weight and model.shared is model.first
    assert torch.equal(model.real.weight, before)
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters())) == 4


def test_every_buffer_is_computed_again(checkpoints):
    """to_empty leaves rotary tables as whatever memory held; a buffer that nobody can set is an error."""
    source = checkpoints["qwen2.5-vl"]
    model = loaded(source)
    want = {n: b.clone() for n, b in model.named_buffers()}
    assert want
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    weights.rebuild_buffers(model)
    assert all(torch.equal(b, want[n]) for n, b in model.named_buffers())

    class Fixed(nn.Module):  # sets its table in __init__ only
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    model.fixed = Fixed(model.config)
    model.fixed.table.zero_()
    weights.rebuild_buffers(model)
    assert torch.equal(model.fixed.table, torch.arange(4.0))
    model.lost = Lost()
    with pytest.raises(PolymodalError, match="The buffer lost.table of Lost has no values"):
        weights.rebuild_buffers(model)


class Tower(nn.Module):
    """A library's vision model inside of another model, as in a LLaVA."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision = model


TOWERS = {
    "CLIPVisionModel": {"image_size": 16, "patch_size": 4},
    "SiglipVisionModel": {"image_size": 16, "patch_size": 4},
    "SiglipVisionModel of NaViT": {"num_patches": 16, "patch_size": 4},
}


@pytest.mark.parametrize("name", TOWERS)
def test_no_initialiser_changes_what_was_read(name, tmp_path):
    """CLIP's and SigLIP's embeddings have a buffer, and their initialiser draws the weights of the modules below them."""
    kind = name.partition(" ")[0].replace("Siglip", "Siglip2" if "NaViT" in name else "Siglip")
    cls = getattr(transformers, kind)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = cls.config_class(**size, **TOWERS[name])
    saved = Tower(cls(config))
    state = {n: torch.randn_like(p) for n, p in saved.state_dict().items()}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with torch.device("meta"):
        model = Tower(cls(config))
    weights.load(model, None, tmp_path / "source")
    assert [n for n, p in model.named_parameters() if not torch.equal(p, state[n])] == []
    for buffer, want in zip(model.buffers(), saved.buffers(), strict=True):
        assert torch.equal(buffer, want)
    weights.rebuild_buffers(model)  # nor later on
    assert [n for n, p in model.named_parameters() if not torch.equal(p, state[n])] == []


def test_buffers_of_checkpoints_that_a_run_does_not_have(tmp_path):
    """What the library starts them from, on the CPU, of a model on meta."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = transformers.DeepseekV3Config(
        vocab_size=64, **sizes, **heads, n_group=1, topk_group=1, first_k_dense_replace=1
    )
    config.save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    given = weights.initial_buffers(model)
    assert (
        given.keys() == {n for n in library.targets(model) if n.endswith("e_score_correction_bias")} != set()
    )
    assert all(not given[n].is_meta and not given[n].any() for n in given)
    assert all(p.is_meta for p in model.parameters())


def test_a_parameter_that_is_changed_after_it_was_read_is_a_fault(tmp_path):
    class Careless(transformers.CLIPVisionModel):
        _keys_to_ignore_on_load_missing = ["visual_projection"]

        def _init_weights(self, module):
            if module is getattr(self, "visual_projection", None):
                self.post_layernorm.weight.fill_(3.0)
            super()._init_weights(module)

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=4)
    model = Careless(config)
    model.visual_projection = nn.Linear(16, 4)
    state = {n: p.clone() for n, p in model.state_dict().items() if "visual_projection" not in n}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="post_layernorm.weight was changed after it was read"):
        weights.load(model, None, tmp_path)


def test_canary_of_private_names():
    """Fails when transformers changes what polymodal/models/library.py builds on; adapt that file."""
    import inspect

    from transformers import PreTrainedModel, conversion_mapping, core_model_loading

    where = "transformers {} has changed: see polymodal/models/library.py".format
    signatures = {
        conversion_mapping.get_model_conversion_mapping: ["model", "key_mapping", "hf_quantizer", "add_legacy"],
        core_model_loading.rename_source_key: [
            "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict", "reverse",
        ],
        core_model_loading.revert_weight_conversion: ["model", "state_dict"],
        core_model_loading.dot_natural_key: ["s"],
        core_model_loading.WeightConverter.convert: ["self", "layer_name", "model", "config", "hf_quantizer", "loading_info"],
        core_model_loading.WeightConverter.add_tensor: ["self", "target_key", "source_key", "source_pattern", "future"],
        PreTrainedModel._init_weights: ["self", "module"],
    }  # fmt: skip
    for function, names in signatures.items():
        assert list(inspect.signature(function).parameters) == names, where(function.__qualname__)
    assert issubclass(core_model_loading.WeightRenaming, core_model_loading.WeightTransform), where(
        "WeightRenaming"
    )
    asked = inspect.getsource(core_model_loading.Transpose.convert)
    assert 'kwargs["model"].get_parameter(' in asked, where(
        "Transpose"
    )  # of the model, converters ask no more
    model = transformers.AutoModelForImageTextToText.from_config(tiny.config("qwen2-vl", tied=True))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}, (
        where("all_tied_weights_keys")
    )
    for name in (
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "base_model_prefix",
    ):
        assert hasattr(model, name), where(name)
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    found, pattern = core_model_loading.rename_source_key(
        "visual.merger.ln_q.weight", mapping, [], "model", dict(model.named_parameters())
    )
    assert (found, pattern) == ("model.visual.merger.ln_q.weight", None), where("the registry of conversions")
