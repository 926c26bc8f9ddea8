"""Writes what starts a run on a cluster: an sbatch script, a Kubernetes manifest, or torchrun's line for each host.

Sees the ground floor and the recipe. Nothing here joins a world: `launch` reads what these leave in the environment,
`spawn` starts a node's processes and starts them again. What is written is complete and meant to be read and kept.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.recipe import Recipe
from polymodal.runtime import device, environment
from polymodal.runtime.process_group import DEFAULT_PORT

WAYS = ("slurm", "kubernetes", "torchrun")
GRACE_SECONDS = 300
"""Between the warning that time is up and the end: enough to finish a step and to write a checkpoint."""


@dataclass(frozen=True)
class JobRequest:
    """What is to be started: the recipe as on a command line, and the nodes to start it on.

    options: for slurm further sbatch options ("--partition=big"); image: container, with Kubernetes always.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    nproc: int = 8
    min_nodes: int | None = None
    restarts: int = 3
    options: tuple[str, ...] = ()
    setup: str = ""
    image: str = ""
    hosts: tuple[str, ...] = ()
    kind: str = "pytorchjob"
    namespace: str = "default"
    claim: str = ""
    shared_memory: str = "64Gi"


@dataclass(frozen=True)
class JobFile:
    """A file, how it is submitted (empty: by hand), and what the user should know."""

    text: str
    suffix: str
    submit: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def checked(recipe: Recipe, wish: JobRequest) -> None:
    """Raises PolymodalError for what would fail on the cluster within the first second."""
    ParallelSizes.of(recipe.parallel, wish.nodes * wish.nproc)
    for name, value in recipe.device.env.items():
        environment.check(name, value)
    if wish.min_nodes is not None:
        if wish.min_nodes > wish.nodes:
            raise PolymodalError(
                f"--min-nodes {wish.min_nodes} is more than --nodes {wish.nodes}.",
                "Lower --min-nodes, or leave it out.",
            )
        try:
            ParallelSizes.of(recipe.parallel, wish.min_nodes * wish.nproc)
        except PolymodalError as error:
            raise PolymodalError(
                f"--min-nodes {wish.min_nodes}: the layout cannot be had on so few nodes: {error.message}",
                "Set parallel.dp_shard to -1, or raise --min-nodes.",
            ) from None


def name_of(recipe: Recipe) -> str:
    """The run's name as DNS and SLURM take it."""
    return re.sub(r"[^a-z0-9-]+", "-", recipe.name.lower()).strip("-")[:50] or "run"


def train_words(wish: JobRequest) -> list[str]:
    """`polymodal train ...` of one node; NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from the environment."""
    words = ["python", "-m", "polymodal", "train", wish.recipe, *wish.overrides, "--nproc", str(wish.nproc)]
    if wish.restarts:
        words += ["--restarts", str(wish.restarts)]
    if wish.min_nodes is not None:
        words += ["--min-nodes", str(wish.min_nodes)]
    return words


def device_env(recipe: Recipe) -> dict[str, str]:
    """device.env as it goes into the environment."""
    return {name: environment.check(name, value) for name, value in recipe.device.env.items()}


def _opening(logs: Path, setup: str) -> list[str]:
    """A script's first lines. The scripts that a setup sources (conda's, CANN's) read variables that nobody set."""
    return ["set -eo pipefail", *([setup] if setup else []), "set -u", f"mkdir -p {shlex.quote(str(logs))}"]


# ---- SLURM --------------------------------------------------------------------------------------------------------


def slurm(recipe: Recipe, wish: JobRequest) -> JobFile:
    """An sbatch script: one task a node, which starts the node's processes and starts them again."""
    name = name_of(recipe)
    logs = recipe.run_dir / "logs"
    directives = {
        "job-name": name, "nodes": str(wish.nodes), "ntasks-per-node": "1", "exclusive": "",
        "output": "%x-%j.log", "open-mode": "append",
        "requeue": "", "signal": f"TERM@{GRACE_SECONDS}",
    }  # fmt: skip
    if wish.min_nodes is not None:
        directives["no-kill"] = ""  # else SLURM ends the whole job with its first lost node
    if resource := device.slurm_resource(recipe.device.kind, wish.nproc):
        directives["gres"] = resource
    for option in wish.options:
        key, _, value = option.lstrip("-").partition("=")
        directives[key] = value
    container = ""
    if wish.image:
        container = f' --container-image={shlex.quote(wish.image)} --container-mounts="$PWD:$PWD" --container-workdir="$PWD"'
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in directives.items()
    ]
    lines += [
        "# Submit with `sbatch` from the directory that the recipe's paths start from. Submitted or requeued again, it goes on",
        f"# from the newest checkpoint. {GRACE_SECONDS} s before the time limit every process gets SIGTERM, saves and ends.",
        *_opening(logs, "" if container else wish.setup),
        'export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"',
        'export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"',
        'export NNODES="${NNODES:-$SLURM_JOB_NUM_NODES}"',
    ]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in device_env(recipe).items()]
    stop = " --kill-on-bad-exit=1" if wish.min_nodes is None else " --no-kill --kill-on-bad-exit=0"
    command = shlex.join(train_words(wish))
    inside = f"{wish.setup} && " if container and wish.setup else ""  # what it names is in the image
    inner = f'export NODE_RANK="${{NODE_RANK:-$SLURM_NODEID}}"; {inside}exec {command}'
    lines += [  # one task starts the processes of a whole node: it must not be bound to one core
        f"srun --cpu-bind=none{stop}{container} --label --output={shlex.quote(f'{logs}/%j-node%n.log')} \\",
        f"  bash -c {shlex.quote(inner)}",
        "",
    ]
    notes = [f"logs: {name}-JOB.log here, and of each node {logs}/JOB-nodeN.log"]
    if wish.image:
        notes.append(
            "the container options of srun are pyxis'; give the image the host's shared memory (pyxis does)"
        )
    return JobFile("\n".join(lines), ".sbatch", ("sbatch",), tuple(notes))


# ---- Kubernetes ---------------------------------------------------------------------------------------------------


def kubernetes(recipe: Recipe, wish: JobRequest) -> JobFile:
    """A PyTorchJob (training operator v1) or a TrainJob (trainer from 2.2 on), one pod a node."""
    if not wish.image:
        raise PolymodalError("A Kubernetes job needs a container image.", "Add --image REGISTRY/IMAGE:TAG.")
    if wish.kind not in ("pytorchjob", "trainjob"):
        raise PolymodalError(f"--kind {wish.kind} is not known.", "Use pytorchjob or trainjob.")
    made = _pytorchjob(recipe, wish) if wish.kind == "pytorchjob" else _trainjob(recipe, wish)
    head = (
        "# Submit with `kubectl apply -f`. A pod that fails is started again and goes on from the newest checkpoint,\n"
        "# so checkpoint.dir must lie on a volume that all pods share. /dev/shm holds batches on their way to the\n"
        "# training processes: the default of 64 MiB is too small. IPC_LOCK lets RDMA pin memory; no pod is privileged.\n"
    )
    notes = ["logs: kubectl logs -f POD"]
    if not wish.claim:
        notes.append("no --claim: the run directory is lost with its pod")
    return JobFile(
        head + yaml.safe_dump(made, sort_keys=False), ".job.yaml", ("kubectl", "apply", "-f"), tuple(notes)
    )


def _container(recipe: Recipe, wish: JobRequest) -> dict[str, Any]:
    command = shlex.join(train_words(wish))
    resource = device.kubernetes_resource(recipe.device.kind)
    begin = (["cd /data"] if wish.claim else []) + ([wish.setup] if wish.setup else [])
    container: dict[str, Any] = {
        "name": "pytorch",
        "image": wish.image,
        "command": ["bash", "-c", f"{' && '.join([*begin, ''])}exec {command}"],
        "env": [{"name": key, "value": value} for key, value in device_env(recipe).items()],
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if resource:
        container["resources"] = {"limits": {resource: wish.nproc}}
    if wish.claim:
        container["volumeMounts"].append({"name": "data", "mountPath": "/data"})
    return container


def _volumes(wish: JobRequest) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": wish.shared_memory}}
    ]
    if wish.claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": wish.claim}})
    return volumes


def _pytorchjob(recipe: Recipe, wish: JobRequest) -> dict[str, Any]:
    def replica(count: int) -> dict[str, Any]:
        pod = {
            "containers": [_container(recipe, wish)],
            "volumes": _volumes(wish),
            "terminationGracePeriodSeconds": GRACE_SECONDS,
        }
        return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}

    replicas = {"Master": replica(1)}
    if wish.nodes > 1:
        replicas["Worker"] = replica(wish.nodes - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name_of(recipe), "namespace": wish.namespace},
        "spec": {
            "nprocPerNode": str(wish.nproc),
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": wish.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _trainjob(recipe: Recipe, wish: JobRequest) -> dict[str, Any]:
    container = _container(recipe, wish)
    trainer: dict[str, Any] = {
        "image": container["image"],
        "command": container["command"],
        "numNodes": wish.nodes,
        "numProcPerNode": wish.nproc,
        "env": container["env"],
    }
    if "resources" in container:
        trainer["resourcesPerNode"] = container["resources"]
    node = {
        "name": "node",
        "securityContext": container["securityContext"],
        "volumeMounts": container["volumeMounts"],
    }
    pod = {
        "containers": [node],
        "volumes": _volumes(wish),
        "terminationGracePeriodSeconds": GRACE_SECONDS,
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {
        "manager": "polymodal/launch",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}},
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name_of(recipe), "namespace": wish.namespace},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": trainer,
            "runtimePatches": [patch],
        },
    }


# ---- torchrun -----------------------------------------------------------------------------------------------------


def torchrun(recipe: Recipe, wish: JobRequest) -> JobFile:
    """A shell script with torchrun's line; run on every host, or one line a host when --hosts names them."""
    if wish.hosts and len(wish.hosts) != wish.nodes:
        raise PolymodalError(
            f"--hosts names {len(wish.hosts)} hosts for --nodes {wish.nodes}.", "Name every host once."
        )
    logs = recipe.run_dir / "logs"
    first = wish.hosts[0] if wish.hosts else "FIRST-HOST"
    at_least = "" if wish.min_nodes is None else f"{wish.min_nodes}:"
    lines = [
        "#!/bin/bash",
        "# Run this on every host, from the directory that the recipe's paths start from:",
    ]
    lines += [
        f"#   {host}: NODE_RANK={rank} bash THIS-FILE"
        for rank, host in enumerate(wish.hosts or [f"host {rank}" for rank in range(wish.nodes)])
    ]
    lines += [
        "# A process that dies is started again, with all others, from the newest checkpoint. Host 0 keeps the meeting place.",
        "# In a container: --ipc=host (or --shm-size=16g) and --network=host; no further privileges are needed.",
        *_opening(logs, wish.setup),
    ]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in device_env(recipe).items()]
    lines.append(
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart must not find the addresses of those who died"
    )
    train = shlex.join(["polymodal", "train", wish.recipe, *wish.overrides])
    lines += [
        f'MASTER_ADDR="${{MASTER_ADDR:-{first}}}"; MASTER_PORT="${{MASTER_PORT:-{DEFAULT_PORT}}}"',
        f'NNODES="${{NNODES:-{wish.nodes}}}"; NODE_RANK="${{NODE_RANK:?say which host this is, from 0}}"',
        'HOST=false; [ "$NODE_RANK" = 0 ] && HOST=true',
        f'exec torchrun --nnodes "{at_least}$NNODES" --nproc-per-node {wish.nproc} --max-restarts {wish.restarts} \\',
        '  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-conf "is_host=$HOST" \\',
        f"  --rdzv-id {name_of(recipe)} --log-dir {shlex.quote(str(logs))} --redirects 3 --tee 3 \\",
        f"  -m {train}",
        "",
    ]
    return JobFile("\n".join(lines), ".sh", (), (f"logs: {logs}",))


MAKERS: dict[str, Callable[[Recipe, JobRequest], JobFile]] = {
    "slurm": slurm,
    "kubernetes": kubernetes,
    "torchrun": torchrun,
}


def main(way: str, recipe: Recipe, wish: JobRequest, out: Path | None = None, submit: bool = False) -> int:
    """The command: writes the file (`-` prints it), submits it on request."""
    if way not in MAKERS:
        raise PolymodalError(f"launch {way} is not known.", f"Use {', '.join(WAYS[:-1])} or {WAYS[-1]}.")
    checked(recipe, wish)
    written = MAKERS[way](recipe, wish)
    if str(out) == "-":
        if submit:
            raise PolymodalError("--submit needs a file.", "Give -o FILE, or leave -o out.")
        print(written.text, end="")
        return 0
    path = out or Path(f"{name_of(recipe)}{written.suffix}")
    if path.exists() and Path(wish.recipe).exists() and path.samefile(wish.recipe):
        raise PolymodalError(f"{path} is the recipe.", "Choose another file with -o.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(written.text)
        os.replace(partial, path)
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror}.", "Choose another file with -o."
        ) from None
    print(path)
    for note in written.notes:
        print("note:", note)
    if not submit:
        if written.submit:
            print("submit with:", shlex.join([*written.submit, str(path)]))
        return 0
    return _submit(written.submit, path, way)


def _submit(command: Sequence[str], path: Path, way: str) -> int:
    if not command:
        raise PolymodalError(
            f"launch {way} has nothing to submit to: its script is run on each host.", "Leave out --submit."
        )
    if shutil.which(command[0]) is None:
        raise PolymodalError(
            f"{path} is written, but {command[0]} is not on this machine.",
            f"Run `{shlex.join([*command, str(path)])}` where it is.",
        )
    done = subprocess.run([*command, str(path)], check=False)
    if done.returncode:
        raise PolymodalError(
            f"{command[0]} refused {path} with exit code {done.returncode}.", "Its reason is above."
        )
    return 0
