"""What `launch` writes: scripts that a shell accepts, manifests with what their controllers require, one sentence for each mistake."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.runtime import process_group
from polymodal.tools import job_scripts
from polymodal.tools.job_scripts import JobRequest


def made(**sections) -> recipes.Recipe:
    return recipes.validate({"name": "My run", "model": {"source": "x"}, **sections})


def start_of(line: str, environ: dict[str, str]) -> process_group.LaunchRequest:
    """What the written `polymodal train ...` of a node sees in such an environment."""
    words = line.split()
    start = process_group.from_environment(int(words[words.index("--nproc") + 1]), environ)
    assert isinstance(start, process_group.LaunchRequest)
    return start


def run_script(text: str, tmp_path: Path, **environ: str) -> list[str]:
    """Runs a script with stand-ins for the cluster's commands; returns what these were called with."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    for tool in ("srun", "torchrun", "python"):
        (tools / tool).write_text(f'#!/bin/bash\necho {tool} "$@" >> {calls}\nenv > {tmp_path}/env-{tool}\n' + (
            'while [ "$1" != bash ]; do shift; done; exec "$@"\n' if tool == "srun" else ""
        ))  # fmt: skip
    (tools / "scontrol").write_text("#!/bin/bash\necho first-node\necho second-node\n")
    for tool in tools.iterdir():
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "script"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", **environ}
    done = subprocess.run(["bash", script], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


def test_the_sbatch_script_gives_every_node_its_place(tmp_path):
    recipe = made(device={"env": {"HCCL_CONNECT_TIMEOUT": 1200}}, checkpoint={"dir": str(tmp_path / "run")})
    job = JobRequest(
        "r.yaml", ("train.steps=3",), nodes=2, nproc=4, min_nodes=1, options=("--partition=big", "--time=1:00:00")
    )  # fmt: skip
    text = job_scripts.slurm(recipe, job).text
    for line in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--partition=big",
        "--time=1:00:00",
        "--requeue",
        "--gres=gpu:4",
    ):
        assert f"#SBATCH {line}\n" in text
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1"
    }  # fmt: skip
    calls = run_script(text, tmp_path, **slurm)
    assert calls[1] == "python -m polymodal train r.yaml train.steps=3 --nproc 4 --restarts 3 --min-nodes 1"
    environ = dict(
        line.split("=", 1) for line in (tmp_path / "env-python").read_text().splitlines() if "=" in line
    )
    assert environ["HCCL_CONNECT_TIMEOUT"] == "1200" and (tmp_path / "run" / "logs").is_dir()
    assert start_of(calls[1], environ) == process_group.LaunchRequest(
        4, 1, 2, "first-node", 20007, "MASTER_PORT"
    )


def test_a_lost_node_does_not_end_a_job_that_can_do_with_fewer():
    elastic = job_scripts.slurm(made(), JobRequest("r.yaml", nodes=4, min_nodes=2)).text
    assert "#SBATCH --no-kill\n" in elastic and "srun --cpu-bind=none --no-kill " in elastic
    assert "--no-kill" not in job_scripts.slurm(made(), JobRequest("r.yaml", nodes=4)).text


@pytest.mark.parametrize("way", ["slurm", "torchrun"])
def test_a_setup_may_read_variables_that_are_not_set(tmp_path, way):
    recipe = made(checkpoint={"dir": str(tmp_path / "run")})
    job = JobRequest("r.yaml", setup='export LIBRARIES="/opt/lib:$NEVER_SET"')
    slurm = {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    assert run_script(job_scripts.MAKERS[way](recipe, job).text, tmp_path, NODE_RANK="0", **slurm)


def test_a_setup_runs_in_the_container_that_has_what_it_names(tmp_path):
    recipe = made(checkpoint={"dir": str(tmp_path / "run")})
    text = job_scripts.slurm(
        recipe, JobRequest("r.yaml", image="i:1", setup="source /opt/image/activate")
    ).text
    before, _, inside = text.partition("srun ")
    assert "/opt/image" not in before and "source /opt/image/activate && exec python" in inside


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_a_pod_works_in_its_volume(kind):
    manifest = yaml.safe_load(
        job_scripts.kubernetes(made(), JobRequest("r.yaml", image="i", claim="disk", kind=kind)).text
    )
    spec = manifest["spec"]
    command = (
        spec["trainer"]["command"] if kind == "trainjob" else pods(manifest)[0]["containers"][0]["command"]
    )
    assert command[2].startswith("cd /data && exec python -m polymodal train r.yaml")


def test_what_the_user_sets_is_honoured(tmp_path):
    text = job_scripts.slurm(
        made(checkpoint={"dir": str(tmp_path / "run")}), JobRequest("r.yaml", nodes=2)
    ).text
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4444", "NNODES": "3", "NODE_RANK": "2"}
    slurm = {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "1",
    }
    calls = run_script(text, tmp_path, **slurm, **given)
    environ = dict(
        line.split("=", 1) for line in (tmp_path / "env-python").read_text().splitlines() if "=" in line
    )
    assert start_of(calls[1], environ) == process_group.LaunchRequest(
        8, 2, 3, "10.0.0.1", 4444, "MASTER_PORT"
    )


def test_a_container_is_asked_of_srun(tmp_path):
    text = job_scripts.slurm(made(), JobRequest("r.yaml", image="registry/polymodal:1")).text
    assert '--container-image=registry/polymodal:1 --container-mounts="$PWD:$PWD"' in text


@pytest.mark.parametrize("rank", [0, 1])
def test_torchruns_line_on_each_host(tmp_path, rank):
    recipe = made(checkpoint={"dir": str(tmp_path / "run")})
    job = JobRequest("r.yaml", nodes=2, nproc=4, min_nodes=1, hosts=("alpha", "beta"), restarts=2)
    (line,) = run_script(job_scripts.torchrun(recipe, job).text, tmp_path, NODE_RANK=str(rank))
    for words in (
        "--nnodes 1:2", "--nproc-per-node 4", "--max-restarts 2", "--rdzv-backend c10d", "--rdzv-endpoint alpha:29500",
        f"--rdzv-conf is_host={'true' if rank == 0 else 'false'}", "-m polymodal train r.yaml",
    ):  # fmt: skip
        assert words in line
    from torch.distributed.run import parse_args

    parsed = parse_args(line.split()[1:])
    assert parsed.nnodes == "1:2" and parsed.training_script == "polymodal"
    assert parsed.training_script_args == ["train", "r.yaml"] and parsed.module


def pods(manifest: dict) -> list[dict]:
    return [replica["template"]["spec"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]


def test_the_pytorchjob_has_what_its_controller_requires():
    recipe = made(device={"env": {"NCCL_DEBUG": "WARN"}})
    job = JobRequest("r.yaml", nodes=3, nproc=8, image="registry/polymodal:1", claim="disk")
    manifest = yaml.safe_load(job_scripts.kubernetes(recipe, job).text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert manifest["metadata"]["name"] == "my-run"
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    for pod in pods(manifest):
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the controller looks for this name"
        assert container["image"] and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared-memory": "/dev/shm", "data": "/data"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    # as the training operator sets it in the second worker's pod
    operator = {
        "RANK": "2", "WORLD_SIZE": "24", "PET_NPROC_PER_NODE": "8", "MASTER_ADDR": "my-run-master-0", "MASTER_PORT": "23456"
    }  # fmt: skip
    line = pods(manifest)[1]["containers"][0]["command"][2]
    assert start_of(line, operator) == process_group.LaunchRequest(
        8, 2, 3, "my-run-master-0", 23456, "MASTER_PORT"
    )


def test_the_trainjob_has_what_its_controller_requires():
    job = JobRequest("r.yaml", nodes=3, nproc=8, image="registry/polymodal:1", kind="trainjob")
    manifest = yaml.safe_load(job_scripts.kubernetes(made(device={"kind": "npu"}), job).text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = manifest["spec"]
    assert spec["runtimeRef"]["name"] and spec["trainer"]["numNodes"] == 3
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"huawei.com/Ascend910": 8}
    (patch,) = spec["runtimePatches"]
    assert patch["manager"], "whose patch it is: the trainer's key of the list"
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert job["name"] == "node" and [container["name"] for container in pod["containers"]] == ["node"]
    assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
    assert pod["containers"][0]["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    trainer = {
        "PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "n0", "PET_MASTER_PORT": "29400"
    }  # fmt: skip
    line = spec["trainer"]["command"][2]
    assert start_of(line, trainer) == process_group.LaunchRequest(8, 1, 3, "n0", 29400, "PET_MASTER_PORT")


def test_submitting_calls_the_clusters_command(tmp_path, monkeypatch, capfd):
    tool = tmp_path / "sbatch"
    tool.write_text('#!/bin/bash\necho submitted "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    out = tmp_path / "job.sbatch"
    assert job_scripts.main("slurm", made(), JobRequest("r.yaml"), out, submit=True) == 0
    assert f"submitted {out}" in capfd.readouterr().out


@pytest.mark.parametrize(
    "way, job, sections, submit, said",
    [
        ("slurm", JobRequest("r", nodes=2, nproc=3), {"parallel": {"tp": 4}}, False, "6 processes cannot be divided by"),
        ("slurm", JobRequest("r", min_nodes=2), {}, False, "--min-nodes 2 is more than --nodes 1"),
        ("slurm", JobRequest("r", nodes=4, min_nodes=1), {"parallel": {"dp_shard": 32}}, False, "--min-nodes 1: the layout cannot be had"),
        ("slurm", JobRequest("r"), {"device": {"env": {"NCCL_DEBUGG": 1}}}, False, "Did you mean NCCL_DEBUG?"),
        ("slurm", JobRequest("r"), {}, True, "sbatch is not on this machine"),
        ("kubernetes", JobRequest("r"), {}, False, "needs a container image"),
        ("kubernetes", JobRequest("r", image="i", kind="job"), {}, False, "--kind job is not known"),
        ("torchrun", JobRequest("r", nodes=2, hosts=("a",)), {}, False, "--hosts names 1 hosts for --nodes 2"),
        ("torchrun", JobRequest("r"), {}, True, "nothing to submit to"),
        ("pbs", JobRequest("r"), {}, False, "launch pbs is not known"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, way, job, sections, submit, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PolymodalError) as caught:
        job_scripts.main(way, made(**sections), job, tmp_path / "out", submit)
    assert said in str(caught.value)


@pytest.mark.parametrize("way", list(job_scripts.MAKERS))
def test_the_recipe_is_never_written_over(tmp_path, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("the recipe")
    job = JobRequest("mine.yaml", image="i")
    assert job_scripts.main(way, made(name="mine"), job) == 0
    assert Path("mine.yaml").read_text() == "the recipe"
    with pytest.raises(PolymodalError, match="out.yaml is the recipe"):
        job_scripts.main(way, made(), replace(job, recipe="out.yaml"), Path("mine.yaml").rename("out.yaml"))
    assert Path("out.yaml").read_text() == "the recipe"


def test_printing_and_submitting_exclude_each_other():
    with pytest.raises(PolymodalError, match="--submit needs a file"):
        job_scripts.main("slurm", made(), JobRequest("r"), Path("-"), submit=True)
