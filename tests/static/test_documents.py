"""README, docs and examples say what is so: commands parse, recipes validate, links and test files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from polymodal import cli, recipe
from polymodal.core.errors import PolymodalError
from polymodal.recipe import file

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "skills").glob("*/SKILL.md")),
]
BY_RUNS = {"docs/benchmarks.md", "docs/images/report.png"}
"""Pages and pictures that the benchmarks and `make demo` write: a fresh tree may lack them."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks whose opening line names one of the languages."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for kind, text in found if kind.split(" ")[0] in languages]


def commands(page: Path) -> list[str]:
    """Command lines of `polymodal` in blocks and in `inline code`, joined where a line ends in a backslash."""
    text = "\n".join(blocks(page, "bash", "sh", "")).replace("\\\n", " ")
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    inline = [found.strip("`") for found in re.findall(r"``?polymodal [^`]+`", prose)]
    lines = [line for line in text.splitlines() if re.match(r"(\w+=\S+ )*polymodal ", line)]
    return [*lines, *(line.replace("\n", " ") for line in inline)]


def parse(line: str) -> None:
    """Parse without running: sub-command, options and arguments. Words in capitals stand for any value."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    for stop in ("|", ">", "&&"):
        words = words[: words.index(stop)] if stop in words else words
    command, path = get_command(cli.app), words[0]
    rest = words[1:]
    while hasattr(command, "commands"):
        if not rest:
            return
        if rest[0].startswith("-"):
            assert rest[0] in ("--help", "-h", "--version"), f"{line}: {rest[0]}"
            return
        assert rest[0] in command.commands, f"{line}: `{path}` has no command {rest[0]}"
        command, path, rest = command.commands[rest[0]], f"{path} {rest[0]}", rest[1:]
    if not rest:  # `polymodal check` in a sentence names the command
        return
    if path == "polymodal models" and rest == ["NAME"]:
        return
    try:
        context = command.make_context(path, list(rest), resilient_parsing=False)
    except Exception as error:  # typer brings its own click, or not, by version
        raise AssertionError(f"{line}: {error}") from None
    overrides = context.params.get("overrides") or []
    for text in overrides:
        assert text.partition("=")[0] in [*recipe.all_keys(), "name"] or re.search(
            r"\.\d+\.|\.config\.", text
        ), f"{line}: {text} sets no key of a recipe"


def wrong(check, pages=PAGES) -> str:
    """What `check(page)` raises or returns, a line a page; "" where all is well."""
    seen = []
    for page in pages:
        try:
            found = check(page)
        except (AssertionError, PolymodalError) as error:
            found = str(error)
        seen += [f"{name(page)}: {found}"] if found else []
    return "\n".join(seen)


def test_commands_parse():
    def check(page: Path) -> None:
        for line in commands(page):
            parse(line)

    assert sum(len(commands(page)) for page in PAGES) > 100
    assert not (seen := wrong(check)), seen


@pytest.mark.parametrize(
    "line",
    [
        "polymodal trian a.yaml",
        "polymodal train",
        "polymodal chat x --imgae y",
        "polymodal train a.yaml optim.rl=1",
    ],
)
def test_a_wrong_command_is_found(line):
    if line == "polymodal train":
        line += " --nproc 8"
    with pytest.raises(AssertionError):
        parse(line)


def merged(under: dict, over: dict) -> dict:
    return {
        **under,
        **{k: merged(under.get(k, {}), v) if isinstance(v, dict) else v for k, v in over.items()},
    }


def test_recipes_in_pages_validate(tmp_path):
    def check(page: Path) -> None:
        for text in blocks(page, "yaml"):
            (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
            data, places = file.read(tmp_path / "recipe.yaml")
            recipe.validate(merged({"model": {"source": "x"}}, data), places, Path(name(page)))

    assert not (seen := wrong(check)), seen


def test_recipes_in_files_validate():
    def check(path: Path) -> str:
        loaded = recipe.load(path, ["model.source=x"] if path.name == "base.yaml" else [])
        again = recipe.validate(yaml.safe_load(recipe.dump(loaded)))
        return "" if again == loaded else "written and read again it is another"

    files = sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")])
    assert len(files) > 10
    assert not (seen := wrong(check, files)), seen


def test_relative_links_lead_somewhere():
    def check(page: Path) -> list[str]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", t)]
        there = {target: (page.parent / target).resolve() for target in targets}
        return [t for t, path in there.items() if not path.exists() and name(path) not in BY_RUNS]

    assert not (seen := wrong(check)), seen


def test_every_page_of_the_site_is_in_its_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = {f"docs/{found}" for found in re.findall(r"[\w/-]+\.md", text)}
    assert {name(page) for page in PAGES if page.parent == ROOT / "docs"} <= listed
    assert {page for page in listed if not (ROOT / page).exists()} <= BY_RUNS


def test_files_that_a_page_names_exist():
    folders = "tests|recipes|examples|benchmarks|polymodal"

    def check(page: Path) -> list[str]:
        paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text(encoding="utf-8"))
        return [path for path in paths if not (ROOT / path).exists()]

    assert not (seen := wrong(check)), seen


def test_every_row_of_troubleshooting_names_its_proof():
    rows = [
        line
        for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rows = [row.strip("|").split(" | ") for row in rows if not row.startswith(("| there", "|---"))]
    assert len(rows) > 30 and all(len(row) == 3 and row[2].strip() for row in rows)


@pytest.mark.parametrize("page", ["troubleshooting", "security"])
def test_tests_that_a_page_names_are_there(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (
            f"{path} has no {test}"
        )
    every = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in every]
