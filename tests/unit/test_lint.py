"""Rules of the house that no general linter knows: device names, model names, sizes, openings, who imports whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "polymodal"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 500
"""Lines of a file; more asks to be two."""

DEVICES = re.compile(r"\b(cuda|npu|nccl|hccl)\b")
ALLOWED = {"recipe/schema.py": {"cuda", "npu"}, "runtime/cann.py": {"npu"}}
"""`device.kind` must name what it allows; /usr/local/npu is a directory."""


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


@pytest.mark.parametrize("path", [path for path in FILES if name(path) != "runtime/device.py"], ids=name)
def test_only_device_py_names_devices(path):
    allowed = ALLOWED.get(name(path), set())
    found = [(line, word) for line, word in device_names(path.read_text()) if word not in allowed]
    assert not found, f"{name(path)}: {found}; ask device.py instead"


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


@pytest.mark.parametrize("path", [path for path in FILES if not name(path).startswith("models/")], ids=name)
def test_no_branch_on_a_models_name_outside_models(path):
    lines = model_branches(path.read_text())
    assert not lines, f"{name(path)}, lines {lines}: make it a fact of the card"


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


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short_and_begin_by_saying_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= LIMIT, f"{name(path)} has {text.count(chr(10))} lines; {LIMIT} is the limit"
    if text.strip():
        said = ast.get_docstring(ast.parse(text))
        assert said and len(said.split()) >= 6, (
            f"{name(path)} does not begin with what it is and what it may touch"
        )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_unfinished_work_and_no_junk_drawers(path):
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), name(path)
    assert path.stem not in ("utils", "util", "helpers", "helper", "misc", "common", "manager"), name(path)


TEXT_FILES = [
    path
    for folder in ("polymodal", "tests", "recipes", "docs", "examples", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".yaml", ".toml", ".sh", ".html") or path.name == "run"
]


def test_nothing_of_this_machine_is_written_down():
    """No paths of a workplace in what is committed (tests make their own)."""
    for path in [*TEXT_FILES, ROOT / "pyproject.toml", ROOT / "Makefile"]:
        if path.is_file() and path != Path(__file__):
            assert not re.search(r"(?<![\w.])/(work|home/\w+|Users/\w+|root)/\w", path.read_text()), path


def test_who_imports_whom():
    """The contracts of pyproject.toml, by import-linter."""
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr
