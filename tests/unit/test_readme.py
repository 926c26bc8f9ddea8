"""README, docs and examples say what is so: commands parse, recipes validate, links and test files exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from polymodal import cli, recipe
from polymodal.data.formats import RowReader
from polymodal.models import catalog
from polymodal.recipe import file
from polymodal.tools import model_table, models_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page):
    for line in commands(page):
        parse(line)


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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_recipes_in_pages_validate(page, tmp_path):
    for text in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        data, places = file.read(tmp_path / "recipe.yaml")
        recipe.validate(merged({"model": {"source": "x"}}, data), places, Path(name(page)))


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("examples/**/*.yaml")]), ids=name
)
def test_recipes_in_files_validate(path):
    loaded = recipe.load(path, ["model.source=x"] if path.name == "base.yaml" else [])
    assert recipe.validate(yaml.safe_load(recipe.dump(loaded))) == loaded


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"\w+:", target):
            there = (page.parent / target).resolve()
            assert there.exists() or name(there) in BY_RUNS, f"{name(page)} points to {target}"


def test_every_page_of_the_site_is_in_its_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = {f"docs/{found}" for found in re.findall(r"[\w/-]+\.md", text)}
    assert {name(page) for page in PAGES} - {"README.md"} <= listed
    assert {page for page in listed if not (ROOT / page).exists()} <= BY_RUNS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(
        r"`((?:tests|recipes|examples|benchmarks|polymodal)/[\w./-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


def test_every_row_of_troubleshooting_says_what_shows_it():
    rows = [
        line
        for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rows = [row.strip("|").split(" | ") for row in rows if not row.startswith(("| there", "|---"))]
    assert len(rows) > 30 and all(len(row) == 3 and row[2].strip() for row in rows)
    for row in rows:
        for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[2]):
            assert (ROOT / path).is_file(), f"{row[0].strip()}: {path}"
            assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (
                f"{path} has no {test}"
            )


def test_the_table_of_models_is_the_cards():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| (?:full).*\|$", text, re.M)
    assert sorted(rows) == sorted(
        model_table.readme_row(card, models_command.why_not) for card in catalog.cards().values()
    )


def test_the_committed_page_of_models_is_up_to_date():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page == models_command.page(), "run: polymodal models --markdown > docs/models.md"


def test_the_rows_of_the_data_page_are_read():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    found = re.findall(r"^```json (\w+)\n(.*?)^```", text, re.S | re.M)
    assert {kind for kind, _ in found} == {
        "mllm",
        "llava",
        "sharegpt",
        "alpaca",
        "openai",
        "asr",
        "text",
        "attr",
    }
    fields = next(
        data["data"]["attr"]
        for data in map(yaml.safe_load, blocks(ROOT / "docs/data.md", "yaml"))
        if "attr" in data["data"]
    )
    for kind, row in found:
        for format in ("auto",) if kind == "attr" else (kind, "auto"):
            own = recipe.Attr(**fields) if kind == "attr" else recipe.Attr()
            record = RowReader(format, own, "docs/data.md", "").record(json.loads(row), kind)
            assert record.messages[-1].role == "assistant" and record.messages[-1].content[-1]
            assert bool(record.media) == (kind in ("mllm", "llava", "openai", "asr", "attr"))
