"""Writes what starts a run on a cluster: an sbatch script, a Kubernetes manifest, or torchrun's line for each
host.

The scripts are templates in jobs/, to be read and checked there. Nothing here joins a world: process_group.py
reads what these leave in the environment, launcher.py starts a node's processes and starts them again.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.redaction import redact
from polymodal.core.terminal import say, say_lines
from polymodal.core.text import did_you_mean
from polymodal.distributed.mesh import ParallelSizes
from polymodal.recipe import Recipe
from polymodal.runtime import device, environment
from polymodal.runtime.process_group import DEFAULT_PORT
from polymodal.tools.templates import template

GRACE_SECONDS = 300
"""Between the warning that time is up and the end: enough to finish a step and to write a checkpoint."""

FILTERS: dict[str, Callable] = {
    "q": shlex.quote,
    "y": lambda value: json.dumps(value, ensure_ascii=False),  # JSON is YAML
    "block": lambda text, width: textwrap.indent(text.strip("\n"), " " * width).lstrip(),
}


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


def checked(recipe: Recipe, job: JobRequest) -> None:
    """Raises PolymodalError for what would fail on the cluster within the first second."""
    for text in (job.recipe, *job.overrides, *job.options, job.image, job.namespace, job.claim, job.setup):
        if redact(text) != text:
            raise PolymodalError(
                f"{redact(text)} holds a secret, and scripts and manifests are read by others.",
                "Leave it out: set it in the environment that the job starts with (Kubernetes: a Secret).",
            )
        if not text.isprintable() and text != job.setup:
            raise PolymodalError(f"{text!r:.80} holds control characters.", "Remove them.")
    for host in job.hosts:
        if not re.fullmatch(r"[A-Za-z0-9][\w.:-]*|\[[0-9A-Fa-f:.]+\]", host, re.ASCII):
            raise PolymodalError(
                f"--hosts: {host!r:.80} is not the name or address of a host.", "Correct it."
            )
    ParallelSizes.of(recipe.parallel, job.nodes * job.nproc)
    for name, value in recipe.device.env.items():
        environment.check(name, value)
    if job.min_nodes is not None:
        if job.min_nodes > job.nodes:
            raise PolymodalError(
                f"--min-nodes {job.min_nodes} is more than --nodes {job.nodes}.",
                "Lower --min-nodes, or leave it out.",
            )
        try:
            ParallelSizes.of(recipe.parallel, job.min_nodes * job.nproc)
        except PolymodalError as error:
            raise PolymodalError(
                f"--min-nodes {job.min_nodes}: the layout cannot be had on so few nodes: {error.message}",
                "Set parallel.dp_shard to -1, or raise --min-nodes.",
            ) from None


def name_of(recipe: Recipe) -> str:
    """The run's name as DNS and SLURM take it."""
    return re.sub(r"[^a-z0-9-]+", "-", recipe.name.lower()).strip("-")[:50] or "run"


def train_words(job: JobRequest) -> list[str]:
    """`polymodal train ...` of one node; NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from the
    environment."""
    words = ["python", "-m", "polymodal", "train", job.recipe, *job.overrides, "--nproc", str(job.nproc)]
    if job.restarts:
        words += ["--restarts", str(job.restarts)]
    if job.min_nodes is not None:
        words += ["--min-nodes", str(job.min_nodes)]
    return words


def _filled(name: str, recipe: Recipe, job: JobRequest, **more: object) -> str:
    values = {
        "job": job,
        "name": name_of(recipe),
        "grace": GRACE_SECONDS,
        "logs": str(recipe.run_dir / "logs"),
        "env": {"PYTHONSAFEPATH": "1"}  # python files of the working directory are not imported
        | {name: environment.check(name, value) for name, value in recipe.device.env.items()},
        **more,
    }
    return template(f"jobs/{name}", **FILTERS).render(values)


def slurm(recipe: Recipe, job: JobRequest) -> JobFile:
    """An sbatch script. Options of the user replace and extend those that are set here."""
    name = name_of(recipe)
    directives = {
        "job-name": name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "exclusive": "",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": f"TERM@{GRACE_SECONDS}",
    }
    if job.min_nodes is not None:
        directives["no-kill"] = ""  # else SLURM ends the whole job with its first lost node
    if resource := device.slurm_resource(recipe.device.kind, job.nproc):
        directives["gres"] = resource
    for option in job.options:
        key, _, value = option.lstrip("-").partition("=")
        directives[key] = value
    text = _filled("slurm.sbatch.j2", recipe, job, directives=directives, train=shlex.join(train_words(job)))
    notes = [f"logs: {name}-JOB.log here, and of each node {recipe.run_dir / 'logs'}/JOB-nodeN.log"]
    if job.image:
        notes.append(
            "the container options of srun are pyxis'; give the image the host's shared memory (pyxis does)"
        )
    return JobFile(text, ".sbatch", ("sbatch",), tuple(notes))


def kubernetes(recipe: Recipe, job: JobRequest) -> JobFile:
    """A PyTorchJob or a TrainJob, one pod a node."""
    if not job.image:
        raise PolymodalError("A Kubernetes job needs a container image.", "Add --image REGISTRY/IMAGE:TAG.")
    if job.kind not in ("pytorchjob", "trainjob"):
        raise PolymodalError(f"--kind {job.kind} is not known.", "Use pytorchjob or trainjob.")
    begin = (["cd /data"] if job.claim else []) + ([job.setup] if job.setup else [])
    line = " && ".join([*begin, f"exec {shlex.join(train_words(job))}"])
    command = ["bash", "-c", line.replace("$", "$$")]  # Kubernetes reads $(NAME) as a variable, $$ as $
    resource = device.kubernetes_resource(recipe.device.kind)
    text = _filled(f"{job.kind}.yaml.j2", recipe, job, command=command, resource=resource)
    notes = ["logs: kubectl logs -f POD"]
    if not job.claim:
        notes.append("no --claim: the run directory is lost with its pod")
    return JobFile(text, ".job.yaml", ("kubectl", "apply", "-f"), tuple(notes))


def torchrun(recipe: Recipe, job: JobRequest) -> JobFile:
    """A shell script with torchrun's line; run on every host, or one line a host when --hosts names them."""
    if job.hosts and len(job.hosts) != job.nodes:
        raise PolymodalError(
            f"--hosts names {len(job.hosts)} hosts for --nodes {job.nodes}.", "Name every host once."
        )
    text = _filled(
        "torchrun.sh.j2",
        recipe,
        job,
        hosts=job.hosts or [f"host {rank}" for rank in range(job.nodes)],
        first=job.hosts[0] if job.hosts else "FIRST-HOST",
        port=DEFAULT_PORT,
        alone=shlex.join(["polymodal", "train", job.recipe, *job.overrides]),
    )
    return JobFile(text, ".sh", (), (f"logs: {recipe.run_dir / 'logs'}",))


MAKERS: dict[str, Callable[[Recipe, JobRequest], JobFile]] = {
    "slurm": slurm,
    "kubernetes": kubernetes,
    "torchrun": torchrun,
}


def main(way: str, recipe: Recipe, job: JobRequest, out: Path | None = None, submit: bool = False) -> int:
    """The command: writes the file (`-` prints it), submits it on request."""
    if way not in MAKERS:
        raise PolymodalError(f"launch {way} is not known.", did_you_mean(way, MAKERS))
    checked(recipe, job)
    written = MAKERS[way](recipe, job)
    if str(out) == "-":
        if submit:
            raise PolymodalError("--submit needs a file.", "Give -o FILE, or leave -o out.")
        say_lines(written.text)
        return 0
    path = out or Path(f"{name_of(recipe)}{written.suffix}")
    if path.exists() and Path(job.recipe).exists() and path.samefile(job.recipe):
        raise PolymodalError(f"{path} is the recipe.", "Choose another file with -o.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, written.text)
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be written: {error.strerror}.", "Choose another file with -o."
        ) from None
    say(path)
    for note in written.notes:
        say("note:", note)
    if not submit:
        if written.submit:
            say("submit with:", shlex.join([*written.submit, str(path)]))
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
