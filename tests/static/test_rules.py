"""Rules of this project that no general linter knows: device names, model names, openings, imports, line widths.

One test a rule; a failure lists every offender.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "polymodal"
FILES = sorted(PACKAGE.rglob("*.py"))

WIDTH = 110
UNFORMATTED = {"runtime/device.py": 1}
"""`fmt: skip` in polymodal/: on tables of numbers alone (here peak FLOP/s of accelerators)."""

DEVICES = re.compile(r"\b(cuda|npu|nccl|hccl)\b")
ALLOWED = {"recipe/schema.py": {"cuda", "npu"}, "runtime/cann.py": {"npu"}}
"""`device.kind` must name what it allows; /usr/local/npu is a directory."""


def offenders(found: Callable[[Path], Any], files: list[Path] = FILES) -> str:
    """What a rule finds, a line a file; "" where all is well."""
    seen = {path: found(path) for path in files}
    return "\n".join(f"{path.relative_to(ROOT)}: {what}" for path, what in seen.items() if what)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def docstrings(tree: ast.AST) -> set[ast.expr]:
    """String expressions that are documentation, of attributes too: their words are not code."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def device_names(source: str) -> list[tuple[int, str]]:
    """(line, name) of devices or their backends in strings that are no documentation, attributes, names and imports."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            found += [(node.lineno, word) for word in DEVICES.findall(node.value)]
        elif isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu"):
            found.append((node.lineno, node.attr))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [
                (node.lineno, m) for m in modules if re.search(r"torch_npu|torch\.(cuda|npu)|^(cuda|npu)$", m)
            ]
        elif isinstance(node, ast.Name) and node.id in ("cuda", "npu", "torch_npu"):
            found.append((node.lineno, node.id))
    return found


def test_only_device_py_names_devices():
    def found(path: Path) -> list[tuple[int, str]]:
        allowed = ALLOWED.get(name(path), set())
        return [(line, word) for line, word in device_names(path.read_text()) if word not in allowed]

    files = [path for path in FILES if name(path) != "runtime/device.py"]
    assert not (seen := offenders(found, files)), f"ask runtime/device.py instead:\n{seen}"


@pytest.mark.parametrize(
    "code",
    ["x = torch.cuda.is_available()", "tensor.to('cuda:0')", "import torch_npu", "from torch.cuda import amp", "if kind == 'npu': pass", "backend = 'cpu:gloo,cuda:nccl'"],
)  # fmt: skip
def test_the_device_rule_finds_them(code):
    assert device_names(code)


def test_the_device_rule_leaves_prose_alone():
    assert not device_names('"""Runs on cuda and npu."""\nx = 1\n"""As npu does."""\n# cuda\n')


ROOTS = (
    "qwen",
    "internvl",
    "glm4",
    "deepseek",
    "llava",
    "janus",
    "wan2",
    "flux",
    "whisper",
    "cogvideo",
    "hunyuan",
    "sdxl",
    "cosyvoice",
)
"""What names of models begin with or hold."""


def model_branches(source: str) -> list[int]:
    """Lines with a comparison against the name of a model: `card.name == "qwen2-vl"`, `"qwen" in model_name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [
                side.value.lower()
                for side in sides
                if isinstance(side, ast.Constant) and isinstance(side.value, str)
            ]
            texts += [
                e.value.lower()
                for side in sides
                if isinstance(side, (ast.Tuple, ast.List, ast.Set))
                for e in side.elts
                if isinstance(e, ast.Constant) and isinstance(e.value, str)
            ]
            named = any(
                re.search(r"(name|model|model_type|architecture)\b", ast.unparse(side))
                for side in sides
                if not isinstance(side, ast.Constant)
            )
            if named and any(root in text for text in texts for root in ROOTS):
                found.append(node.lineno)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith")
            and node.args
        ):
            value = node.args[0]
            if (
                isinstance(value, ast.Constant)
                and isinstance(value.value, str)
                and any(root in value.value.lower() for root in ROOTS)
            ):
                found.append(node.lineno)
    return found


def test_no_branch_on_a_models_name_outside_models():
    files = [path for path in FILES if not name(path).startswith("models/")]
    seen = offenders(lambda path: model_branches(path.read_text()), files)
    assert not seen, f"make it a fact of the card; lines:\n{seen}"


@pytest.mark.parametrize(
    "code",
    [
        'if card.name == "qwen2-vl": pass',
        'x = "qwen3_vl" in model_type',
        'y = model_name in ("wan2.1", "flux")',
        'z = name.startswith("qwen")',
    ],
)
def test_the_model_rule_finds_them(code):
    assert model_branches(code)


def layout_branches(source: str) -> list[int]:
    """Lines where some `.layout` is compared with a string, or with strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any(isinstance(s, ast.Attribute) and s.attr == "layout" for s in sides)
            texts = [c for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)]
            if asked and any(isinstance(c.value, str) for c in texts):
                found.append(node.lineno)
        elif isinstance(node, ast.Match) and ast.unparse(node.subject).endswith(".layout"):
            found.append(node.lineno)
    return found


def test_no_branch_on_a_layouts_name_outside_of_layouts():
    files = [path for path in FILES if not name(path).startswith("train/layouts/")]
    seen = offenders(lambda path: layout_branches(path.read_text()), files)
    assert not seen, f"{seen}: ask the object of train.layouts.layout_of"


@pytest.mark.parametrize(
    "code",
    [
        'if family.layout == "packed": pass',
        'x = card.family.layout != "uniform"',
        'y = made.family.layout in ("packed", "padded")',
        'match family.layout:\n    case "packed": pass',
    ],
)
def test_the_layout_rule_finds_them(code):
    assert layout_branches(code)


def printing(source: str) -> list[tuple[int, str]]:
    """(line, what) of printing past core/terminal.py: print, typer.echo, streams' write, rich but its tables."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"^print$|\becho$|\bsys\.(__)?std(out|err)(__)?\.(buffer\.)?write(lines)?$", called):
                found.append((node.lineno, called))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            full = [f"{module}.{name}" for name in names] if module else names
            found += [
                (node.lineno, name)
                for name in full
                if re.match(r"rich\b", name) and name != "rich.table.Table"
            ]
    return found


def test_only_the_terminal_module_prints():
    """Text of users, data and libraries would be markup and escape codes elsewhere."""
    files = [path for path in FILES if name(path) != "core/terminal.py"]
    seen = offenders(lambda path: printing(path.read_text()), files)
    assert not seen, f"use say, say_lines, console or Bar of core/terminal.py:\n{seen}"


@pytest.mark.parametrize(
    "code",
    [
        "print(name)",
        "sys.stderr.write(name)",
        "sys.stdout.buffer.write(name)",
        "typer.echo(name)",
        "from rich.console import Console",
        "import rich",
        "from rich import print as show",
        "from rich.progress import Progress",
    ],
)
def test_the_printing_rule_finds_them(code):
    assert printing(code)


def test_files_begin_with_what_they_are():
    def found(path: Path) -> str:
        text = path.read_text()
        header = ast.get_docstring(ast.parse(text)) or ""
        return "does not begin with what it is" if text.strip() and len(header.split()) < 6 else ""

    assert not (seen := offenders(found)), seen


def test_no_unfinished_work_and_no_junk_drawers():
    junk = ("utils", "util", "helpers", "helper", "misc", "common", "manager")
    seen = offenders(
        lambda path: re.findall(r"\b(?:TODO|FIXME|XXX)\b", path.read_text()) or path.stem in junk
    )
    assert not seen, seen


OPENERS = {
    "core/inert_pickle.py": "the unpickler that runs no code",
    "convert/reading.py": "torch's files: weights_only, or that unpickler",
    "data/features.py": "torch's files: weights_only",
    "data/workers.py": "pipes between a process and the workers that it started",
    "models/nets/published.py": "torch's files: weights_only",
    "runtime/objects.py": "the unpickler of records; torch's files: weights_only",
    "runtime/rendezvous.py": "pickles that torch made in this process",
}
"""Who may load pickles, and what they load."""


def code_loaders(source: str) -> list[tuple[int, str]]:
    """(line, call) of what could run code of a file: pickles, torch.load, np.load with pickles, unsafe YAML, eval."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {module.partition(".")[0] for module in named}
            found += [
                (node.lineno, m) for m in roots & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
            ]
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            called == "torch.load"
            and options.get("weights_only") != "True"
            and "pickle_module" not in options
        ):
            found.append((node.lineno, "torch.load without weights_only=True"))
        if called == "torch.load":
            found.append((node.lineno, called))
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.append((node.lineno, f"{called} with pickles"))
        if called in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile") or called.endswith(
            "read_pickle"
        ):
            found.append((node.lineno, called))
        loader = " ".join([*options.values(), *map(ast.unparse, node.args[1:])])
        if called == "yaml.load" and not re.search("SafeLoader|_Yaml", loader):
            found.append((node.lineno, "yaml.load of any class"))
    return found


def test_only_known_places_open_what_could_run_code():
    def found(path: Path) -> list[tuple[int, str]]:
        allowed = ("pickle", "torch.load") if name(path) in OPENERS else ()
        return [(line, what) for line, what in code_loaders(path.read_text()) if what not in allowed]

    assert not (seen := offenders(found)), f"open it as data, see docs/security.md:\n{seen}"
    assert all(code_loaders((PACKAGE / path).read_text()) for path in OPENERS)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(p)",
        "x = torch.load(p, weights_only=False)",
        "x = np.load(p, allow_pickle=True)",
        "import joblib",
        "yaml.load(t, Loader=yaml.Loader)",
        "yaml.unsafe_load(t)",
        "pd.read_pickle(p)",
        "eval(t)",
    ],
)
def test_the_rule_of_openers_finds_them(code):
    assert code_loaders(code)


def test_no_line_is_wider_than_the_formatter_allows():
    def wide(path: Path) -> list[int]:
        lines = path.read_text().splitlines()
        return [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]

    assert not (seen := offenders(wide)), seen


def test_only_tables_of_numbers_escape_the_formatter():
    counts = {name(path): len(re.findall(r"fmt: (?:skip|off)", path.read_text())) for path in FILES}
    assert {path: count for path, count in counts.items() if count} == UNFORMATTED


BOUND = re.compile(r"\b(?:rtol|atol|rel|abs)=\s*\d\.?\d*e-1\d|<=?\s*\d\.?\d*e-1\d")


def test_no_bound_of_a_test_is_below_what_float64_keeps_on_every_processor():
    """1e-9 (tests/bounds.py); a tighter one holds on the machine where it was measured."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    seen = offenders(lambda path: BOUND.findall(path.read_text()), files)
    assert not seen, seen
    assert BOUND.search("assert error < 1e" + "-12") and BOUND.search("close(a, b, rtol=1e" + "-10)")


TEXT_FILES = [
    path
    for folder in ("polymodal", "tests", "recipes", "docs", "examples", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".toml", ".sh", ".html") or path.name == "run"
]


def test_nothing_of_this_machine_is_written_down():
    """No paths of a workplace in what is committed (tests make their own)."""
    files = [*TEXT_FILES, ROOT / "pyproject.toml", ROOT / "Makefile"]
    files = [path for path in files if path.is_file() and path != Path(__file__)]
    place = re.compile(r"(?<![\w.])/(?:work|home/\w+|Users/\w+|root)/\w")
    assert not (seen := offenders(lambda path: place.findall(path.read_text()), files)), seen


def test_who_imports_whom():
    """The contracts of pyproject.toml, by import-linter."""
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def floors(text: str) -> list[set[str]]:
    """The fenced block that begins with ```floors: top to bottom, one a line, folders of one floor parted by |."""
    (block,) = re.findall(r"^```floors\n(.*?)^```", text, re.S | re.M)
    return [{folder.strip() for folder in line.split("|")} for line in block.splitlines() if line.strip()]


def test_the_floors_of_the_architecture_page_are_those_that_imports_obey():
    """docs/architecture.md, the layers of pyproject.toml and the folders of polymodal/ are one list."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\nlayers = [\n")[2]
    layers = re.findall(r'^    "([^"]+)",', lines.partition("\n]")[0], re.M)
    held = [{folder.strip().removeprefix("polymodal.") for folder in layer.split("|")} for layer in layers]
    assert floors((ROOT / "docs/architecture.md").read_text(encoding="utf-8")) == held
    assert sum(map(len, held)) == len(set().union(*held))
    assert set().union(*held) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_static_tests_are_collected_without_the_heavy_libraries():
    code = """
import sys, pytest
ended = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "tests/static"])
loaded = [name for name in ("torch", "transformers", "diffusers") if name in sys.modules]
sys.exit(f"{ended} {loaded}" if ended or loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
