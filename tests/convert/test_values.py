"""What lies where in a tree: rows of q, k and v, halves of gate and up, shards of every rank, names, files, permissions."""

import io
import stat

import pytest
import torch

from polymodal.convert import engine, output
from polymodal.convert.family import family
from polymodal.convert.tree import Parallel
from tests.convert import layouts
from tests.convert.hubs import HUBS, WAN, transformer
from tests.convert.layouts import SETTINGS, tensors


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return HUBS["qwen2.5-vl"].make(tmp_path_factory.mktemp("qwen") / "source")


def written(name, source, parallel, root, variant=""):
    output.to_tree(engine.hub(family(name), variant, source), parallel, root, SETTINGS)
    return layouts.tree(root)


def groups(q, k, v, count):
    """Query group by query group: [q of its heads; k; v]."""
    return torch.cat(
        [part for group in zip(q.chunk(count), k.chunk(count), v.chunk(count), strict=True) for part in group]
    )


def test_rows_of_fused_layers(qwen, tmp_path):
    hub, tree = tensors(qwen), written("qwen2.5-vl", qwen, Parallel(), tmp_path)
    text, vision = (
        "mp_rank_00/model:text_decoder.decoder.layers.2",
        "mp_rank_00/model:image_encoder.encoder.blocks.layers.1",
    )
    layer = "model.layers.2"
    for leaf in ("weight", "bias"):
        q, k, v = (hub[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv")
        assert torch.equal(tree[f"{text}.self_attention.linear_qkv.{leaf}"], groups(q, k, v, 2))
        q, k, v = hub[f"visual.blocks.1.attn.qkv.{leaf}"].chunk(3)
        assert torch.equal(tree[f"{vision}.self_attention.linear_qkv.{leaf}"], groups(q, k, v, 2))
    gate, up = (hub[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(tree[f"{text}.mlp.linear_fc1.weight"], torch.cat([gate, up]))


def test_ranks_hold_their_shards(qwen, tmp_path):
    hub, tree = tensors(qwen), written("qwen2.5-vl", qwen, Parallel(2), tmp_path)
    gate, up = (hub[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    down = hub["model.layers.0.mlp.down_proj.weight"]
    for rank in (0, 1):
        at = f"mp_rank_0{rank}/model:text_decoder.decoder.layers.0.mlp"
        assert torch.equal(
            tree[f"{at}.linear_fc1.weight"], torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        )
        assert torch.equal(tree[f"{at}.linear_fc2.weight"], down.chunk(2, 1)[rank])
        embedding = tree[f"mp_rank_0{rank}/model:text_decoder.embedding.word_embeddings.weight"]
        assert torch.equal(embedding, hub["model.embed_tokens.weight"].chunk(2)[rank])


def test_stages_count_their_layers_from_zero(qwen, tmp_path):
    cut = Parallel(1, 1, {"llm": ((1, 1), (2, 0)), "vit": ((1, 2), (1, 0))})
    hub, tree = tensors(qwen), written("qwen2.5-vl", qwen, cut, tmp_path)
    norm = "text_decoder.decoder.layers.{}.input_layernorm.weight"
    assert torch.equal(
        tree["mp_rank_00_000/model1:" + norm.format(1)], hub["model.layers.3.input_layernorm.weight"]
    )
    assert torch.equal(
        tree["mp_rank_00_001/model0:" + norm.format(0)], hub["model.layers.1.input_layernorm.weight"]
    )
    last = {key.partition(":")[0] for key in tree if "output_layer" in key or "final_layernorm" in key}
    assert last == {"mp_rank_00_000/model1"}  # the last stage with layers
    assert {key.partition(":")[0] for key in tree if "projector" in key} == {"mp_rank_00_000/model1"}
    assert {key.partition(":")[0] for key in tree if "patch_embed" in key} == {"mp_rank_00_000/model0"}


def test_a_vision_tower_may_have_its_own_tp(qwen, tmp_path):
    cut = Parallel(2, 1, {}, {"vit": 1})
    hub, tree = tensors(qwen), written("qwen2.5-vl", qwen, cut, tmp_path / "mm")
    for rank in (0, 1):
        proj = tree[
            f"mp_rank_0{rank}/model:image_encoder.encoder.blocks.layers.0.self_attention.linear_proj.weight"
        ]
        assert torch.equal(proj, hub["visual.blocks.0.attn.proj.weight"])
    back = engine.opened_tree(family("qwen2.5-vl"), "", tmp_path / "mm", qwen, cut, SETTINGS)
    output.to_hub(engine.unmapped(back, tmp_path, qwen), tmp_path / "hf", SETTINGS, qwen)
    layouts.same(hub, tensors(tmp_path / "hf"))


def test_experts_lie_on_their_ranks(tmp_path):
    source = HUBS["qwen3-vl experts"].make(tmp_path / "source")
    hub, tree = tensors(source), written("qwen3-vl", source, Parallel(1, 2), tmp_path / "mm")
    down = hub[
        "model.language_model.layers.1.mlp.experts.down_proj"
    ]  # saved by the library: [experts, out, in]
    local = "model:text_decoder.decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
    assert torch.equal(tree[f"mp_rank_00_001/{local}"], down[3])
    gate_up = hub["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(tree[f"mp_rank_00_000/{local.replace('fc2', 'fc1')}"], gate_up[1])


def test_published_experts_are_transposed(tmp_path):
    """On the hub they are [experts, in, out]."""
    from tests.models.test_weights import to_hub_layout

    library = HUBS["qwen3-vl experts"].make(tmp_path / "library")
    published = to_hub_layout(library, tmp_path / "published")
    one = written("qwen3-vl", library, Parallel(), tmp_path / "one")
    layouts.same(one, written("qwen3-vl", published, Parallel(), tmp_path / "other"))


def test_image_embedder_norms_survive_a_pipeline(tmp_path):
    source = HUBS["wan i2v"].make(tmp_path / "source")
    tree = written("wan", source, Parallel(1, 1, {"dit": ((2, 3),)}), tmp_path / "mm")
    hub = tensors(source)
    for ours, theirs in (("proj.0", "norm1"), ("proj.4", "norm2")):
        assert torch.equal(
            tree[f"mp_rank_00_000/model:img_emb.{ours}.weight"],
            hub[f"condition_embedder.image_embedder.{theirs}.weight"],
        )
    layers = {key for key in tree if ".modulation" in key and "blocks" in key}
    assert layers == {
        f"mp_rank_00_00{p}/model:blocks.{n}.modulation" for p, count in ((0, 2), (1, 3)) for n in range(count)
    }


def test_files_as_documented(qwen, tmp_path):
    written("qwen2.5-vl", qwen, Parallel(2, 1, {"llm": ((2, 2),), "vit": ((4, 0),)}), tmp_path / "mm")
    root = tmp_path / "mm"
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    assert sorted(p.name for p in (root / "release").iterdir()) == [
        f"mp_rank_0{t}_00{p}" for t in (0, 1) for p in (0, 1)
    ]
    content = torch.load(root / "release/mp_rank_00_000/model_optim_rng.pt", weights_only=True)
    assert content.keys() == {"model", "checkpoint_version"} and content["checkpoint_version"] == 3.0
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)


def test_frames_are_the_bytes_that_the_libraries_write(tmp_path):
    """A frame filled by hand reads like one that torch and safetensors wrote themselves."""
    from safetensors.torch import load_file, save_file

    from polymodal.convert import writing

    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "one": torch.tensor(2.5),
    }
    spec = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    for places in (
        writing.empty_safetensors(tmp_path / "f.safetensors", spec),
        writing.empty_torch_file(
            tmp_path / "f.pt", ["model"], {f"model:{key}": one for key, one in spec.items()}, {"n": 1}
        ),
    ):
        path = next(iter(places.values())).path
        with open(path, "r+b") as file:
            for key, place in places.items():
                file.seek(place.offset)
                file.write(state[key.removeprefix("model:")].reshape(-1).view(torch.uint8).numpy().tobytes())
    layouts.same(load_file(tmp_path / "f.safetensors"), state)
    layouts.same(torch.load(tmp_path / "f.pt", weights_only=True)["model"], state)
    layouts.same(torch.load(tmp_path / "f.pt", weights_only=True, mmap=True)["model"], state)
    own = io.BytesIO()
    torch.save({"model": state, "n": 1}, own)
    assert abs(len(own.getvalue()) - (tmp_path / "f.pt").stat().st_size) < 512
    save_file(state, tmp_path / "g.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "g.safetensors").stat().st_size == (tmp_path / "f.safetensors").stat().st_size


def test_a_conversion_beside_the_weights_adds_the_tree_only(tmp_path):
    source = transformer("WanTransformer3DModel", **WAN)(tmp_path / "transformer")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for _ in range(2):  # and may be run again
        written("wan", source, Parallel(), source)
    after = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    assert after.pop("latest_checkpointed_iteration.txt") == b"release"
    assert after == before and {p.name for p in source.iterdir() if p.is_dir()} == {"release"}
