"""What comes from elsewhere stays data: indexes, links, names, messages of other processes, job scripts, secrets."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import pickle
import shlex
import string
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.redaction import HIDDEN, redact, redact_all
from polymodal.models import pipeline_index, storage
from polymodal.runtime import objects, rendezvous
from polymodal.tools import job_scripts
from polymodal.tools.job_scripts import JobRequest

often = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)

# ---- model_index.json ----------------------------------------------------------------------------------

modules = st.one_of(
    words,
    st.sampled_from(
        [
            "os",
            "subprocess",
            "diffusers.utils",
            "transformers.utils",
            "..",
            "torch",
            "builtins",
            "polymodal",
            "my_code",
        ]
    ),
    st.none(),
    st.integers(),
    st.lists(words, max_size=2),
)
entries = st.tuples(modules, st.one_of(words, st.sampled_from(["system", "Popen", "AutoModel"]), st.none()))


@often
@given(name=st.one_of(words, st.sampled_from(["vae", "../vae", "/vae"])), entry=entries)
@example(name="vae", entry=("os", "system"))
@example(name="../../x", entry=("diffusers", "AutoencoderKL"))
@example(name="vae", entry=("diffusers", "utils.get_class"))
def test_an_index_names_classes_of_the_libraries_alone(tmp_path, name, entry):
    assume(name != "_class_name")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", name: list(entry)}))
    try:
        found = pipeline_index.components(tmp_path)
    except PolymodalError as error:
        assert "\n" not in str(error).replace(repr(name), "")
        return
    for component, (library, cls) in found.items():
        assert Path(component).name == component and cls.isidentifier()
        assert library in pipeline_index.LIBRARIES or library in pipeline_index._modules_of_pipelines()


@pytest.mark.parametrize(
    "content",
    [
        {"_class_name": ["my_pipeline", "Mine"]},
        {"_class_name": "../pipeline.py"},
        {"_class_name": "P", "vae": ["os", "system"]},
        {"_class_name": "P", "vae": ["diffusers.utils", "get_objects_from_module"]},
        {"_class_name": "P", "vae": ["pipeline_utils", "os"]},
        {"_class_name": "P", "vae": ["diffusers", None], "x": [None, "Popen"], "y": ["subprocess", None]},
    ],
)
def test_code_of_others_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(PolymodalError, match="code of a checkpoint is not run"):
        pipeline_index.read_index(tmp_path)


def test_a_file_that_is_called_like_the_library_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/diffusers.py").write_text("raise SystemExit(9)")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(PolymodalError, match="vae/diffusers.py"):
        pipeline_index.read_index(tmp_path)


# ---- files of a checkpoint -----------------------------------------------------------------------------


@often
@given(
    name=st.one_of(
        words, st.sampled_from(["../../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b"])
    )
)
def test_shards_lie_beside_their_index(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": name}}))
    try:
        (path,) = storage.shards(index)[1]
    except PolymodalError as error:
        assert str(index) in str(error)
        return
    assert path.parent == tmp_path and path.name == name


def test_links_out_of_a_checkpoint_are_not_copied(tmp_path):
    outer, home = tmp_path / "secret", tmp_path / "model"
    outer.write_text("private")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/id").write_text("private")
    home.mkdir()
    (home / "real.txt").write_text("")
    (home / "inner.txt").symlink_to("real.txt")
    for name, target in {"far": outer, "up": "../secret", "deep": tmp_path / "folder"}.items():
        (home / name).symlink_to(target)
    (home / "chain").symlink_to("up")
    (tmp_path / "alias").symlink_to(home)
    for root in (home, tmp_path / "alias"):
        assert storage.to_publish(root, root / "inner.txt") == home / "real.txt"
        for name in ("far", "up", "chain", "deep/id"):
            with pytest.raises(PolymodalError, match="is a link to .*outside of the checkpoint"):
                storage.to_publish(root, root / name)


def test_the_hubs_cache_is_made_of_links(tmp_path):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs/0123").write_text("{}")
    (cache / "blobs/evil").symlink_to("/etc/hostname")
    root = cache / "snapshots/rev"
    (root / "vae").mkdir(parents=True)
    (root / "config.json").symlink_to("../../blobs/0123")
    (root / "vae/config.json").symlink_to("../../../blobs/0123")
    (root / "evil").symlink_to("../../blobs/evil")
    for name in ("config.json", "vae/config.json"):
        assert storage.to_publish(root, root / name) == cache / "blobs/0123"
    with pytest.raises(PolymodalError, match="outside of the checkpoint"):
        storage.to_publish(root, root / "evil")


@often
@given(name=st.one_of(words, st.sampled_from(["../x", "/x", "a/../../x", "a/b"])))
def test_runs_stay_in_the_directory_of_runs(name):
    recipe = recipes.validate({"name": name, "model": {"source": "x"}, "checkpoint": {"dir": "runs/{name}"}})
    try:
        run = recipe.run_dir
    except PolymodalError:
        return
    assert Path(os.path.normpath(run)).parts[:1] == ("runs",)


@pytest.mark.parametrize("text", ["{name.__class__}", "{name!r}", "{name:>99}", "{0}", "{", "{other}"])
def test_the_directory_of_a_run_has_one_placeholder(text):
    with pytest.raises(PolymodalError, match="only placeholder"):
        recipes.validate({"model": {"source": "x"}, "checkpoint": {"dir": text}})


# ---- what other processes send -------------------------------------------------------------------------


@dataclass
class Foreign:
    """A record of no module that is known."""

    x: int = 0


records = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        words,
        st.binary(max_size=8),
        st.datetimes(),
        st.just(torch.bfloat16),
        st.builds(Path, words),
        st.builds(PolymodalError, words, words),
        st.builds(OSError, st.integers(0, 99), words),
        st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3), st.tuples(inner)
    ),
    max_leaves=8,
)


@often
@given(records)
def test_records_of_other_ranks_arrive(value):
    found = objects.Records(io.BytesIO(pickle.dumps(value))).load()
    assert repr(found) == repr(value)


def test_tensors_of_other_ranks_arrive():
    for value in (torch.arange(6.0).reshape(2, 3).t(), torch.empty(3, device="meta")):
        found = objects.Records(io.BytesIO(pickle.dumps(value))).load()
        assert found.shape == value.shape and (value.is_meta or found.equal(value))
    for array in (np.arange(6.0).reshape(2, 3).T, np.float32(3), np.array(["a", "é"])):
        for protocol in (pickle.DEFAULT_PROTOCOL, 5):
            found = objects.Records(io.BytesIO(pickle.dumps(array, protocol=protocol))).load()
            assert found.dtype == array.dtype and (found == array).all()


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = [
    (os.system, "true"),
    (eval, "1"),
    (exec, "1"),
    (getattr, "x", "upper"),
    (__import__, "os"),
    (open, "/dev/null"),
    (subprocess.Popen, "true"),
    (Path.touch, Path("/nowhere/x")),
    (torch.load, "x"),
    (torch.hub.load, "x", "y"),
    (pickle.loads, b"N."),
    (print, "x"),
    (Foreign, 1),
    (shlex.split, "x"),
]


@often
@given(call=st.sampled_from(CALLS), protocol=st.integers(0, 5))
def test_nothing_that_other_ranks_send_is_called(call, protocol):
    text = pickle.dumps(Call(*call), protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="no plain record"):
        objects.Records(io.BytesIO(text)).load()


def test_a_pickle_inside_the_numbers_of_a_tensor_is_not_opened(tmp_path):
    buffer = io.BytesIO()
    torch.save(Call(Path.touch, tmp_path / "ran"), buffer)
    text = pickle.dumps(Call(torch.storage._load_from_bytes, buffer.getvalue()))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        objects.Records(io.BytesIO(text)).load()
    assert not (tmp_path / "ran").exists()


nodes = st.builds(dynamic_rendezvous._NodeDesc, words, st.integers(0, 9), st.integers(0, 9))
times = st.datetimes(timezones=st.just(datetime.timezone.utc))


@st.composite
def states(draw):
    state = dynamic_rendezvous._RendezvousState()
    state.round, state.complete, state.closed = (
        draw(st.integers(0, 9)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    state.deadline = draw(st.none() | times)
    state.participants = draw(st.dictionaries(nodes, st.integers(0, 9), max_size=3))
    state.last_heartbeats = draw(st.dictionaries(nodes, times, max_size=3))
    state.wait_list, state.redundancy_list = (
        draw(st.sets(nodes, max_size=3)),
        draw(st.sets(nodes, max_size=2)),
    )
    return state


@often
@given(state=states(), at=st.integers(0, 10_000), by=st.integers(1, 255), key=words.filter(bool))
def test_the_state_of_nodes_arrives_whole_or_not_at_all(state, at, by, key):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(rendezvous.SECRET, "of this run")
        sealed = rendezvous._sealed(pickle.dumps(state))
        assert vars(pickle.loads(rendezvous._unsealed(sealed))) == vars(state)
        at %= len(sealed)
        forged = sealed[:at] + bytes([sealed[at] ^ by]) + sealed[at + 1 :]
        for other in (forged, sealed[:at], pickle.dumps(Call(os.system, "true")), base64.b64encode(sealed)):
            with pytest.raises(PolymodalError, match="keep in their store"):
                rendezvous._unsealed(other)
        patch.setenv(rendezvous.SECRET, f"{key} of another")
        with pytest.raises(PolymodalError, match="does not know"):
            rendezvous._unsealed(sealed)


# ---- job scripts ---------------------------------------------------------------------------------------

awkward = st.text(st.sampled_from("ab /;|&$()`'\"\\<>{}#!*?~=%-.\t\né€"), min_size=1, max_size=14)


def expanded(text: str) -> str:
    """As Kubernetes expands a word of a command: $$ is $, $(NAME) a variable."""
    return string.Template(text.replace("$(", "$UNSET(")).safe_substitute()


@often
@given(recipe=awkward, override=awkward, image=awkward, host=awkward)
@example(recipe="a b.yaml", override="x='$(touch ran)'", image="img;touch ran", host="h}$(touch ran)")
@example(recipe="r.yaml", override="x=$(HF_TOKEN) $$ `id`", image="i", host="h\ntouch ran")
def test_words_of_a_job_arrive_as_they_were_given(tmp_path, recipe, override, image, host):
    made = recipes.validate(
        {"name": f"{recipe} x", "model": {"source": "x"}, "checkpoint": {"dir": "runs/a b;'$x"}}
    )
    job = JobRequest(recipe, (override,), nodes=2, nproc=1, image=image, hosts=(host, "second"))
    try:
        job_scripts.checked(made, job)
    except PolymodalError:
        return
    wanted = job_scripts.train_words(job)
    manifest = yaml.safe_load(job_scripts.kubernetes(made, job).text)
    (container,) = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    line = expanded(container["command"][2])
    assert shlex.split(line.removeprefix("exec ")) == wanted and container["image"] == image
    script = job_scripts.slurm(made, job).text
    (inner,) = shlex.split(script.rpartition("bash -c ")[2])
    assert shlex.split(inner.partition("; exec ")[2]) == wanted


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("a b.yaml", "x='$(touch ran)'"),
        ("`touch ran`.yaml", "x=a;touch ran"),
        ("r.yaml", 'x="$HOME" && touch ran #'),
    ],
)
def test_job_scripts_run_what_they_were_given(tmp_path, recipe, override):
    """Both kinds of script by a real shell, with stand-ins that record their words."""
    tools = tmp_path / "tools"
    tools.mkdir()
    record = f"printf '%s\\0' \"$@\" > {tmp_path}/argv"
    for name, body in {
        "python": record,
        "torchrun": record,
        "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
        "scontrol": "echo first",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    made = recipes.validate({"model": {"source": "x"}, "checkpoint": {"dir": "runs/$(touch ran) 'x'"}})
    job = JobRequest(recipe, (override,), nodes=2, nproc=1, hosts=("first", "second"))
    job_scripts.checked(made, job)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "NODE_RANK": "0", "SLURM_JOB_NODELIST": "first", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}  # fmt: skip
    for maker in (job_scripts.slurm, job_scripts.torchrun):
        (tmp_path / "script").write_text(maker(made, job).text)
        done = subprocess.run(["bash", "script"], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        argv = (tmp_path / "argv").read_text().split("\0")
        assert recipe in argv and override in argv and not (tmp_path / "ran").exists()
        assert (tmp_path / "runs/$(touch ran) 'x'/logs").is_dir()


@pytest.mark.parametrize("host", ["a;b", "a b", "$(x)", "-x", "a\nb", "a}b", "é", ""])
def test_hosts_are_names_or_addresses(host):
    made = recipes.validate({"model": {"source": "x"}})
    with pytest.raises(PolymodalError, match="is not the name or address of a host"):
        job_scripts.checked(made, JobRequest("r.yaml", nodes=2, nproc=1, hosts=(host, "b")))


# ---- secrets -------------------------------------------------------------------------------------------

secrets = st.text(string.ascii_letters + string.digits + "-_/+=.!", min_size=8, max_size=30).filter(
    lambda text: (
        any(c.isdigit() for c in text) and any(c.isalpha() for c in text) and not os.path.exists(text)
    )
)
variables = st.sampled_from(
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MY_SECRET",
        "DB_PASSWORD",
        "GH_PAT",
        "MLFLOW_TRACKING_TOKEN",
    ]
)


@often
@given(variable=variables, secret=secrets, before=words, after=words)
def test_secrets_of_the_environment_are_hidden(variable, secret, before, after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, secret)
        for text in (
            before + secret + after,
            f"{secret}\n{secret}",
            repr({"token": secret}),
            f"https://h/x?t={secret}",
        ):
            assert secret not in redact(text) and HIDDEN in redact(text)
        held = redact_all({"a": [before, {"b": secret}], secret: 1})
        assert secret not in json.dumps(held)


@often
@given(user=st.text(string.ascii_letters, min_size=1, max_size=8), secret=st.text(string.ascii_letters + string.digits + "-_.~", min_size=1, max_size=20))  # fmt: skip
def test_passwords_in_urls_are_hidden(user, secret):
    for text in (
        f"https://{user}:{secret}@host/path",
        f"https://host/x?token={secret}&b=1",
        f"s3://b/x?X-Amz-Signature={secret}",
    ):
        shown = redact(f"cannot open {text}.")
        assert f":{secret}@" not in shown and f"={secret}" not in shown.replace(f"={HIDDEN}", "")
        assert shown.startswith("cannot open ") and "host" in shown or "b/x" in shown


@pytest.mark.parametrize(
    "text", ["a = b", "runs/x/step-1", "https://host/path?page=2", "key=value", "1e-5", "a@b.c"]
)
def test_other_text_stays(text, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("PROJECT_KEY", "polymodal")
    monkeypatch.setenv("MAX_TOKENS", "4096")
    for each in (text, "false", "polymodal", "4096"):
        assert redact(each) == each
