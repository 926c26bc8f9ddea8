"""docs/messages.md from the source: every PolymodalError with its hint, every warning and note.

`python -m tests.static.messages > docs/messages.md`. What a message names when it is made stands in braces;
a text that is there only sometimes, or one of two, in brackets.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "polymodal"
HEAD = """# Messages

All errors, and after them the warnings and notes, by the files that they come from. What a message names is in
braces, a part that is there only sometimes in brackets. `polymodal` prints an error as `error: <message> <hint>` and ends
with exit code 2; nothing is half-written. Made by `python -m tests.static.messages > docs/messages.md`.
"""


def pattern(node: ast.expr | None) -> str:
    """The text of an expression: constants as they are, everything else as the name that says most."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern, node.values))
    if isinstance(node, ast.FormattedValue):
        return pattern(node.value) if _has_text(node.value) else f"{{{named(node.value)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return pattern(node.left) + pattern(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _has_text(node.left):
        return f"[{pattern(node.left)}]"
    if isinstance(node, ast.IfExp) and _has_text(node):
        return f"[{' | '.join(filter(None, (pattern(node.body), pattern(node.orelse))))}]"
    return f"{{{named(node)}}}"


def _has_text(node: ast.expr) -> bool:
    """Whether a conditional or a repeated text has words of its own."""
    if isinstance(node, ast.IfExp):
        return any(isinstance(n, (ast.Constant, ast.JoinedStr)) for n in (node.body, node.orelse))
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def named(node: ast.AST) -> str:
    """The last name in an expression that is no function: of `format_bytes(left.free)` free."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        inside = node.slice
        if isinstance(inside, ast.Constant) and isinstance(inside.value, str):
            return inside.value
        return named(node.value)
    if isinstance(node, ast.Call):
        return named(node.args[0] if node.args else node.func)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
        return named(node.elt)
    found = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return named(found[0]) if found else "..."


def of_file(path: Path) -> Iterator[tuple[str, str, str]]:
    """("error", message, hint), ("warning", text, ""), in the file's order."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    for call in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        function = ast.unparse(call.func)
        arguments = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if re.fullmatch(r"(\w+\.)*PolymodalError", function) and (arguments or keywords):
            message = arguments[0] if arguments else keywords.get("message")
            hint = arguments[1] if len(arguments) > 1 else keywords.get("hint")
            yield "error", pattern(message), pattern(hint)
        elif arguments and function in ("warnings.warn", "log.warning"):
            yield "warning", pattern(arguments[0]), ""
        elif function in ("say", "terminal.say"):
            text = " ".join(map(pattern, arguments))
            if re.match("(warning|note)\\b", text):
                yield "warning", text, ""


def page() -> str:
    """The page, as Markdown."""
    errors, warnings = [], []
    for folder in sorted(path for path in PACKAGE.iterdir() if path.is_dir()):
        for path in sorted(folder.rglob("*.py")):
            found = list(of_file(path))
            for kind, out in (("error", errors), ("warning", warnings)):
                lines = [
                    f"- {_escaped(m)}{f' *{_escaped(h)}*' if h else ''}" for k, m, h in found if k == kind
                ]
                if lines:
                    out.append((folder.name, path.relative_to(PACKAGE).as_posix(), lines))
    parts, last = [HEAD], ""
    for folder, name, lines in errors:
        if folder != last:
            parts.append(f"\n## {folder}\n")
            last = folder
        parts.append(f"\n`{name}`\n\n" + "\n".join(lines) + "\n")
    parts.append("\n## Warnings and notes\n")
    parts += ["\n`{}`\n\n{}\n".format(name, "\n".join(lines)) for _, name, lines in warnings]
    return "".join(parts)


def _escaped(text: str) -> str:
    """Markdown that shows the text; code as an element, since what is in braces makes no command."""
    text = re.sub(r"([*_\[\]|\\])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


if __name__ == "__main__":
    print(page(), end="")
