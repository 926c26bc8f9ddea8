"""The launch of a script or command line: program, processes, flags with their lines, where paths start."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest
from polymodal.runtime import environment
from polymodal.tools.translate import shell
from polymodal.tools.translate.ledger import TABLES, Given, Ledger, Origin

OWN_FLAGS = (
    "train-chat",
    "train-transformers",
    "train-generation",
    "train-speech",
    "native",
    "chat",
    "generate",
)
OWN_FLAGS += ("evaluate", "encode")  # kinds of launch whose flags are Megatron's
FLAG = re.compile(r"--?[A-Za-z]")
_PLACEHOLDER = re.compile(r"path[ _]to|your[ _]|/path/|^xxx|\.\.\.$|<.*>", re.I)


@dataclass
class Launch:
    """What is started, and the ledger that its translation fills.

    root: the directory that relative paths of the script start from; ours are relative to the working
    directory. accelerate: keys of accelerate's own file, where no option names one."""

    file: str
    entry: str
    kind: str  # of TABLES["entries"]
    options: Given
    flags: Given
    positional: list[shell.Word]
    variables: dict[str, shell.Value]
    root: Path
    nproc: int
    nodes: int
    source: str | None = None
    known: bool = False  # the number of processes is said somewhere
    accelerate: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def world(self) -> int:
        return self.nproc * self.nodes

    def path(self, text: str) -> str:
        """A path of the script as a path of ours, from the working directory."""
        text = text.rstrip("/") if len(text) > 1 else text
        if os.path.isabs(text) or self.root == Path():
            return text
        return os.path.relpath(self.root / text)

    def open(self, text: str) -> Path:
        """A file that the script names. Raises PolymodalError where it is not there."""
        path = Path(self.path(text))
        if not path.is_file():
            named = (name for name, value in self.flags.values.items() if value == text)
            line = self.flags.lines.get(next(named, ""), 0)
            beside = path.parent.iterdir() if path.parent.is_dir() else ()
            near = nearest(path.name, [each.name for each in beside if each.suffix == path.suffix])
            raise PolymodalError(
                f"{Origin(text, self.file, line).place}: the file {text} that it names is not there (looked "
                f"for {path}).",
                f"Did you mean {path.with_name(near[0])}?"
                if near
                else "Call from the directory that the script is called from.",
            )
        return path

    def number(self, name: str, otherwise: int | None = None) -> int:
        """A whole number of a flag."""
        value = self.flags.take(name)
        if value is None and otherwise is not None:
            return otherwise
        return int(scalar(value, self.flags.origin(name), int))

    def where(self, name: str) -> Origin:
        return self.flags.origin(name)


def scalar(value: Any, origin: Origin, kind: type = float) -> Any:
    """A number of a flag or key. Raises PolymodalError with its line."""
    try:
        number = float(str(value).replace("_", ""))
        if kind is int and number == int(number):
            return int(number)
        if kind is float:
            return number
    except (ValueError, OverflowError):
        pass
    raise PolymodalError(
        f"{origin.place}: {origin.name} is {str(value)[:80]!r}, a {'whole ' if kind is int else ''}number is "
        "wanted.",
        "Correct it there.",
    )


def typed(text: Any) -> Any:
    """A flag's text as a number where it is one."""
    if isinstance(text, str):
        if re.fullmatch(r"[-+]?\d+", text):
            return int(text)
        if re.fullmatch(r"[-+]?(\d+\.\d*|\.?\d+)([eE][-+]?\d+)?", text):
            return float(text)
    return text


def is_launch(words: list[shell.Word]) -> bool:
    entry = _entry(words)
    return entry is not None and program(words[entry].text) is not None


def of_script(
    path: Path, arguments: Sequence[str], given: dict[str, str], nodes: int | None, source: str | None
) -> Launch:
    """The launch of a start script. given: values of variables, in place of the script's."""
    variables = {**given, **({"NNODES": str(nodes)} if nodes else {})}
    script = shell.read(path, arguments, variables, is_launch)
    words = [shell.Word(script.known(word), word.line) for word in script.words]
    launch = of_words(words, str(path), nodes, source, script.variables)
    launch.notes += script.notes
    return launch


def of_words(
    words: list[shell.Word],
    file: str,
    nodes: int | None,
    source: str | None,
    variables: dict[str, shell.Value] | None = None,
) -> Launch:
    """The launch of a command line. Raises PolymodalError for a program that is not known."""
    at = _entry(words)
    variables = {**(variables or {}), **_assigned(words[: at or 0], file)}
    entry = program(words[at].text) if at is not None else None
    if at is None or entry is None:
        named = words[at].text if at is not None else words[0].text
        names = [*TABLES["entries"], *TABLES["programs"], *TABLES["refused"]]
        near = nearest(named.rpartition("/")[2], names)
        raise PolymodalError(
            f"{Origin(named, file, words[at or 0].line).place}: {named} is no program that is known here.",
            f"Did you mean {near[0]}?" if near else "`polymodal translate --help` lists what is read.",
        )
    if entry in TABLES["refused"]:
        where = Origin(entry, file, words[at].line).place
        raise PolymodalError(f"{where}: {entry} becomes nothing here.", TABLES["refused"][entry])
    options, _ = _flags(words[1:at], file, "launcher")
    kind = TABLES["entries"].get(entry) or TABLES["programs"][entry]
    own = "flags" if kind in OWN_FLAGS else kind
    flags, positional = _flags(words[at + 1 :], file, own)
    launch = Launch(
        file,
        entry,
        kind,
        options,
        flags,
        positional,
        variables,
        _root(Path(file), flags, positional),
        1,
        1,
    )
    launch.source = source
    _processes(launch, nodes)
    return launch


def of_file(path: Path, kind: str, variables: dict[str, shell.Value], source: str | None) -> Launch:
    """The launch of a config file alone, of another trainer."""
    flags = Given(kind, str(path), {})
    words = [shell.Word(str(path), 0)]
    options = Given("launcher", str(path), {})
    launch = Launch(str(path), path.name, kind, options, flags, words, variables, Path(), 1, 1, source)
    _processes(launch, None)
    return launch


def _assigned(words: list[shell.Word], file: str) -> dict[str, shell.Value]:
    """NAME=value in front of a program."""
    found = dict[str, shell.Value]()
    for word in words:
        name, sign, value = word.text.partition("=")
        if not sign or not name.isidentifier():
            break
        found[name] = shell.Value(value, word.line)
    return found


def program(text: str) -> str | None:
    """The name in the tables of a program, by the longest end of its path that is there; None for others."""
    known = [*TABLES["entries"], *TABLES["programs"], *TABLES["refused"]]
    return max((name for name in known if f"/{text}".endswith(f"/{name}")), key=len, default=None)


def _entry(words: list[shell.Word]) -> int | None:
    """Place of the program: the first word that ends in .py, or a module behind -m that is no launcher."""
    for i, word in enumerate(words):
        if word.text.endswith(".py") or word.text.rpartition("/")[2] in TABLES["programs"]:
            return i
        if word.text == "-m" and i + 1 < len(words) and not words[i + 1].text.startswith("torch.distributed"):
            return i + 1
    return None


def _flags(words: list[shell.Word], file: str, kind: str) -> tuple[Given, list[shell.Word]]:
    """Flags with their values (True without one, a list of several); and the words before the first flag."""
    values, lines = dict[str, Any](), dict[str, int]()
    positional, name = list[shell.Word](), ""
    for text, line in words:
        if FLAG.match(text):
            name, sign, value = text.lstrip("-").partition("=")
            if kind not in ("flags", "launcher"):
                name = name.replace("-", "_")
            values[name], lines[name] = (value if sign else True), line
        elif not name:
            positional.append(shell.Word(text, line))
        elif values[name] is True:
            values[name] = text
        else:
            before = values[name]
            values[name] = [*before, text] if isinstance(before, list) else [before, text]
    for name, value in values.items():
        several = name in TABLES.get(kind, {}).get("several", ()) or name in (
            "lora-target-modules",
            "lora-target-parameters",
            "lora-apply-modules",
            "validation_prompt",
            "lr-scale-modules",
            "weight-decay-exclude-modules",
            "ranks",
        )
        if isinstance(value, list) and not several:
            raise PolymodalError(
                f"{Origin(name, file, lines[name]).place}: --{name} is followed by several words: "
                f"{' '.join(value)[:80]}.",
                "It is still a placeholder, or needs quotes.",
            )
        if (
            isinstance(value, str)
            and name in ("load", "save", "mm-data", "mm-model")
            and _PLACEHOLDER.search(value)
        ):
            raise PolymodalError(
                f"{Origin(name, file, lines[name]).place}: --{name} is still the placeholder {value!r}.",
                "Write the path there.",
            )
    return Given(kind, file, values, lines), positional


def _root(script: Path, flags: Given, positional: list[shell.Word]) -> Path:
    """Where relative paths start: the working directory, else the script's or one above it, by its config
    files."""
    named = [flags.values.get(key) for key in ("mm-data", "mm-model", "mm-tool", "fsdp2-config-path")]
    named += [word.text for word in positional if word.text.endswith((".yaml", ".yml", ".json"))]
    files = [name for name in named if isinstance(name, str) and not os.path.isabs(name)]
    places = [Path(), script.parent, *list(script.resolve().parents)[1:5]]
    found = [place for place in places if any((place / name).is_file() for name in files)]
    return found[0] if found else Path()


def _processes(launch: Launch, nodes: int | None) -> None:
    options = launch.options

    def one(*names: str) -> Any:
        return next((options.take(name) for name in names if options.has(name)), None)

    def variable(*names: str) -> str | None:
        return next((launch.variables[name].text for name in names if name in launch.variables), None)

    nproc = one("nproc_per_node", "nproc-per-node", "local_worker_num", "num_gpus", "num_processes")
    nproc = nproc or variable("NPROC_PER_NODE")
    visible = variable("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
    if nproc is None and visible and launch.entry in TABLES["programs"]:
        nproc = len(visible.split(","))
    count = one("nnodes", "num_machines") or (
        variable("NNODES") if launch.entry in TABLES["programs"] else None
    )
    for name in ("node_rank", "node-rank", "master_addr", "master-addr", "master_port", "master-port"):
        options.take(name)
    workers = one("worker_num")
    origin = Origin("the launcher", launch.file)
    launch.known = nproc not in (None, "auto", "gpu")
    launch.nproc = scalar(nproc, origin, int) if nproc not in (None, "auto", "gpu") else 1
    launch.nodes = nodes or (scalar(str(count).split(":")[0], origin, int) if count is not None else 1)
    if workers is not None and not nodes:
        launch.nodes = max(1, scalar(workers, origin, int) // launch.nproc)


def write_environment(launch: Launch) -> None:
    """device.env from exported variables that a recipe takes; a row for each other one."""
    ledger = launch.ledger
    for name, value in launch.variables.items():
        if not value.exported or name in TABLES["environment"]:
            continue
        origin, text = Origin(name, launch.file, value.line), value.text
        if name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            name, text = "HF_HUB_OFFLINE", "1" if text.lower() in ("1", "true", "yes", "on") else "0"
        if name == "HCCL_DETERMINISTIC" and text.lower() == "true":
            ledger.write("train.deterministic", True, origin, text)
        elif name not in environment.VARIABLES:
            ledger.note("no effect", origin, text, "no variable that device.env knows")
        elif environment.VARIABLES[name].shell:
            ledger.note("no effect", origin, text, "read before a recipe is: set it in the shell")
        else:
            try:
                environment.check(name, text)
            except PolymodalError as error:
                ledger.note("unsupported", origin, text, str(error).split("\n")[0])
                continue
            ledger.write(f"device.env.{name}", text, origin)
