"""docs/messages.md is the list of the source, and what its hints name is there: keys, options and commands."""

import re
from pathlib import Path

import yaml

from tests.static import messages

ROOT = Path(__file__).parents[2]
HANDED_ON = re.compile(
    r"(?:[Rr]ank )?[{}\[\]\w .:|]*\{(?:message|messages|errors?|cause|measure|strip|failure|path|\.\.\.)\}\.?"
)
"""A message that is another one, with its hint in it."""


def everything() -> list[tuple[str, str, str]]:
    """(file, message, hint) of all errors."""
    found = []
    for path in sorted(messages.PACKAGE.rglob("*.py")):
        for kind, message, hint in messages.of_file(path):
            if kind == "error":
                found.append((path.relative_to(ROOT).as_posix(), message, hint))
    return found


def test_the_page_is_the_sources():
    page = (ROOT / "docs/messages.md").read_text(encoding="utf-8")
    assert page == messages.page(), "run: python -m tests.static.messages > docs/messages.md"
    assert page.count("\n") < 2500


def test_every_error_says_how_to_mend_it():
    lacking = [(file, m) for file, m, hint in everything() if not hint and not HANDED_ON.fullmatch(m)]
    assert not lacking, lacking


def known_keys() -> set[str]:
    """Dotted keys of a recipe, sections too, `*` in place of a list's numbers."""
    from pydantic import BaseModel

    from polymodal.recipe.schema import Recipe

    keys: set[str] = set()

    def visit(model: type, prefix: str) -> None:
        for name, field in model.model_fields.items():
            keys.add(prefix + name)
            for inner in re.findall(r"[\w.]+", str(field.annotation)):
                if (found := classes.get(inner.rpartition(".")[2])) is not None:
                    visit(found, f"{prefix}{name}.")

    import polymodal.recipe.generation as generation
    import polymodal.recipe.parallel as parallel
    import polymodal.recipe.schema as schema

    classes = {
        name: value
        for module in (schema, generation, parallel)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value is not Recipe
    }
    visit(Recipe, "")
    return keys


def test_keys_that_messages_name_are_in_the_recipe():
    keys = known_keys()
    sections = "|".join(sorted({key.partition(".")[0] for key in keys} - {"name", "base"}))
    named = re.compile(rf"(?<![\w./}}-])(?:{sections})(?:\.[a-z_0-9]+)+(?![\w(\[{{/-]|\.[{{\w])")
    strangers = {
        (file, key)
        for file, message, hint in everything()
        for key in named.findall(f"{message} {hint}")
        if key not in keys and not key.startswith(("model.config.", "device.env.")) and not FILES.search(key)
    }
    assert len(keys) > 100 and not strangers, sorted(strangers)


FILES = re.compile(r"\.(json|jsonl|mp4|tar|parquet|yaml|jinja|py)$")


def test_options_and_commands_that_messages_name_exist():
    table = yaml.safe_load((ROOT / "polymodal/cli/commands.yaml").read_text(encoding="utf-8"))
    options = {"--help", "--version"}
    for group in (table["shared"], *(facts.get("options", {}) for facts in table["commands"].values())):
        for name, facts in group.items():
            options |= {f"--{name.replace('_', '-')}", *(facts or {}).get("flags", ())}
    source = "".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "polymodal/convert").glob("*.y*ml"))
    )
    options |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^\s*(\w+):", source, re.M)}
    strangers = set()
    for file, message, hint in everything():
        pieces = f"{message} {hint}".split("`")  # code at odd places; other programs' commands are left out
        code = [piece for piece in pieces[1::2] if piece.startswith(("polymodal ", "--"))]
        text = " ".join([*pieces[::2], *code])
        text = re.sub(r"--cfg\.\S+", "", text)
        strangers |= {(file, o) for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)} - {
            (file, o) for o in options | FOREIGN
        }
        for command in re.findall(r"^polymodal ([a-z]+)", "\n".join(code), re.M):
            if not any(name.split()[0] == command for name in table["commands"]):
                strangers.add((file, command))
    assert not strangers, sorted(strangers)


FOREIGN = {"--ipc", "--shm-size", "--ntasks-per-node"}
"""Options of container engines and of SLURM."""
