"""Start scripts read without running them: the subset of bash that says what is launched, and with which
words.

Assignments, quotes, `$NAME`, `${NAME...}`, `$(( ))`, `if`, `for` over the script's own arguments, and
sourced files are followed. Of commands inside `$( )` only those that are known to be harmless are computed
(pwd, dirname, basename, echo, lines of a host file); every other one is an unknown value, an error only
where the launch needs it."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from polymodal.core.errors import PolymodalError
from polymodal.core.files import open_file

LAUNCHERS = (
    "torchrun",
    "msrun",
    "accelerate",
    "deepspeed",
    "python",
    "python3",
    "polymodal",
    "llamafactory-cli",
    "lmf",
    "swift",
    "trl",
    "simpletuner",
)
MOST = 1 << 20  # bytes of a script
DEPTH = 20  # of sourced files, and of lists within lists
_JOINED = "\x01"  # where a backslash and a line break stood inside quotes: keeps the count of lines
_UNKNOWN = "\x02"  # encloses the number of an unknown value
_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_SUBSHELL = re.compile(r"\s*cd\s+(.*?)\s*(?:&&|;)\s*pwd\s*$")


class Word(NamedTuple):
    """A word of the launch, and the line of the script that it comes from."""

    text: str
    line: int


@dataclass
class Value:
    """A variable: its text (line breaks and _JOINED kept) and the line that it begins on."""

    text: str
    line: int
    exported: bool = False


class Part(NamedTuple):
    """A piece of a word: kind is text, variable, arithmetic or command."""

    kind: str
    text: str
    quoted: bool


@dataclass
class Token:
    """A word (parts) or an operator (op)."""

    line: int
    parts: list[Part] = field(default_factory=list)
    op: str = ""

    @property
    def bare(self) -> str:
        """The word where it is plain text without quotes, else ""."""
        return self.parts[0].text if [p[::2] for p in self.parts] == [("text", False)] else ""


@dataclass
class Script:
    """What was read: the launch's words, the variables at that moment, and what was left aside."""

    path: Path
    words: list[Word]
    variables: dict[str, Value]
    directory: str  # that the launch runs in, relative to the call's
    notes: list[str]
    unknown: list[tuple[str, int]]

    def exported(self) -> dict[str, Value]:
        return {name: value for name, value in self.variables.items() if value.exported}

    def known(self, word: Word) -> str:
        """The word's text. Raises PolymodalError where it holds a value that only the shell knows."""
        found = re.search(f"{_UNKNOWN}(\\d+){_UNKNOWN}", word.text)
        if found is None:
            return word.text
        expression, line = self.unknown[int(found[1])]
        name = next((n for n, value in self.variables.items() if found[0] in value.text), None)
        raise PolymodalError(
            f"{self.path}:{line}: {expression} is known only to the shell that runs the script, and the "
            f"launch on line {word.line} needs it.",
            "Give it on the command line: "
            + ("--nodes N." if name == "NNODES" else f"--set {name or 'NAME'}=VALUE."),
        )


class _Launch(Exception):
    def __init__(self, words: list[Word]):
        self.words = words


def read(
    path: Path,
    arguments: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
    is_launch: Callable[[list[Word]], bool] = lambda words: True,
) -> Script:
    """The first launch of a script that `is_launch` accepts.

    arguments: the script's own, `$*`. given: variables whose assignments in the script do not count. Raises
    PolymodalError, with file and line, for syntax that is not read and for a script without a launch.
    """
    reader = _Reader(path, arguments, dict(given or {}), is_launch)
    try:
        reader.run(_parse(_text(path), path))
    except _Launch as found:
        return Script(path, found.words, reader.variables, reader.directory, reader.notes, reader.unknown)
    except RecursionError:
        raise PolymodalError(f"{path}: its lists are nested too deep.", "Write it flatter.") from None
    raise PolymodalError(
        f"{path}: no command of it starts a training program that is known here.",
        f"It wants a line that begins with one of {', '.join(LAUNCHERS)}; `polymodal translate --help` lists "
        "what is read.",
    )


def _text(path: Path) -> str:
    with open_file(path) as file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise PolymodalError(f"{path}: it is larger than a start script.", "Name the script itself.")
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


# ---- words and operators ---------------------------------------------------


class _Lexer:
    def __init__(self, text: str, path: Path):
        self.text, self.path, self.at, self.line = text, path, 0, 1

    def fail(self, what: str, line: int | None = None) -> PolymodalError:
        return PolymodalError(
            f"{self.path}:{line or self.line}: {what}.",
            "Write it without, or give the config files and flags to `polymodal translate` directly.",
        )

    def tokens(self) -> Iterator[Token]:
        text = self.text
        while self.at < len(text):
            char = text[self.at]
            if char in " \t":
                self.at += 1
            elif text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
            elif char == "#":
                self.at = (text + "\n").index("\n", self.at)
            elif char == "\n":
                yield Token(self.line, op="\n")
                self.at, self.line = self.at + 1, self.line + 1
            elif text.startswith("<<", self.at) and not text.startswith("<<<", self.at):
                raise self.fail("a here-document is not read")
            elif found := re.compile(r"\d*(?:&>>?|>>|>&|<<<|<&|[<>])").match(text, self.at):
                yield Token(self.line, op=">")
                self.at = found.end()
            elif found := re.compile(r"&&|\|\||;;|[;&|()]").match(text, self.at):
                yield Token(self.line, op=found[0])
                self.at = found.end()
            else:
                yield Token(self.line, self.parts(until=" \t\n;&|<>()"))

    def parts(self, until: str = "", quoted: bool = False) -> list[Part]:
        """A word, or (quoted) what double quotes hold."""
        text, out = self.text, list[Part]()

        def add(piece: str, is_quoted: bool) -> None:
            if out and out[-1].kind == "text" and out[-1].quoted == is_quoted:
                out[-1] = Part("text", out[-1].text + piece, is_quoted)
            else:
                out.append(Part("text", piece, is_quoted))

        while self.at < len(text):
            char = text[self.at]
            if (char == '"') if quoted else (char in until):
                break
            if char == "\\":
                following = text[self.at + 1 : self.at + 2]
                if following == "\n":
                    self.line += 1
                    if quoted:
                        add(_JOINED, True)
                elif quoted and following not in '$`"\\':
                    add("\\" + following, True)
                else:
                    add(following, True)
                self.at += 2
            elif char == "'" and not quoted:
                end = self._find("'", self.at + 1)
                add(text[self.at + 1 : end], True)
                self.line += text.count("\n", self.at, end)
                self.at = end + 1
            elif char == '"':
                self.at += 1
                begun, inner = self.line, self.parts(quoted=True)
                if self.at >= len(text):
                    raise self.fail('a " is not closed', begun)
                self.at += 1
                out += inner or [Part("text", "", True)]
            elif char == "`":
                end = self._find("`", self.at + 1)
                out.append(Part("command", text[self.at + 1 : end], quoted))
                self.at = end + 1
            elif char == "$":
                out.append(self._dollar(quoted))
            else:
                if char == "\n":
                    self.line += 1
                add(char, quoted)
                self.at += 1
        return out

    def _find(self, char: str, start: int) -> int:
        end = self.text.find(char, start)
        if end < 0:
            raise self.fail(f"a {char} is not closed")
        return end

    def _dollar(self, quoted: bool) -> Part:
        text, start = self.text, self.at
        if text.startswith("$((", start):
            self.at = end = self._closed(start + 1, "(", ")")
            return Part("arithmetic", text[start + 3 : end - 2], quoted)
        if text.startswith("$(", start):
            self.at = end = self._closed(start + 1, "(", ")")
            return Part("command", text[start + 2 : end - 1], quoted)
        if text.startswith("${", start):
            self.at = end = self._closed(start + 1, "{", "}")
            return Part("variable", text[start + 2 : end - 1], quoted)
        found = re.compile(r"[A-Za-z_]\w*|[0-9*@#?$!]").match(text, start + 1)
        self.at = found.end() if found else start + 1
        return Part("variable", found[0], quoted) if found else Part("text", "$", quoted)

    def _closed(self, start: int, opening: str, closing: str) -> int:
        """Behind the bracket that closes the one at `start`; quotes inside are skipped."""
        depth, at = 0, start
        while at < len(self.text):
            char = self.text[at]
            if char == "\\":
                at += 1
            elif char == "'" and opening == "(":
                at = self._find("'", at + 1)
            elif char == opening:
                depth += 1
            elif char == closing:
                depth -= 1
                if depth == 0:
                    self.line += self.text.count("\n", start, at)
                    return at + 1
            at += 1
        raise self.fail(f"a {opening} is not closed")


# ---- lists, if, for --------------------------------------------------------


@dataclass
class Simple:
    line: int
    words: list[Token]


@dataclass
class If:
    branches: list[tuple[list, list]]  # condition, body
    otherwise: list


@dataclass
class For:
    name: str
    words: list[Token]
    body: list


@dataclass
class Skipped:
    """What is not followed: while, until, case, functions, subshells."""

    line: int
    what: str


class _Parser:
    def __init__(self, text: str, path: Path):
        self.lexer = _Lexer(text, path)
        self.tokens = list(self.lexer.tokens())
        self.at = 0

    def peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def block(self, ends: tuple[str, ...] = ()) -> list:
        """Commands up to one of the reserved words `ends`, which stays."""
        out: list = []
        while (token := self.peek()) is not None:
            if token.op in ("\n", ";", "&", ";;"):
                self.at += 1
            elif token.bare in ends and not token.op:
                return out
            elif token.op in ("(", ")"):
                out.append(Skipped(token.line, "( )"))
                self.at += 1
            else:
                out.append(self.command(token))
        if ends:
            raise self.lexer.fail(f"{' or '.join(ends)} is missing at the end of the file")
        return out

    def expect(self, word: str) -> None:
        token = self.peek()
        if token is None or token.bare != word:
            raise self.lexer.fail(f"{word} is missing", token.line if token else None)
        self.at += 1

    def command(self, token: Token) -> object:
        if token.bare == "if":
            branches, otherwise = [], list[object]()
            self.at += 1
            condition = self.block(("then",))
            self.at += 1
            while True:
                body = self.block(("elif", "else", "fi"))
                branches.append((condition, body))
                end = self.tokens[self.at].bare
                self.at += 1
                if end == "elif":
                    condition = self.block(("then",))
                    self.at += 1
                    continue
                if end == "else":
                    otherwise = self.block(("fi",))
                    self.at += 1
                return If(branches, otherwise)
        if token.bare == "for":
            self.at += 1
            words = self.line_of_words()
            names = [word.bare for word in words]
            while (following := self.peek()) is not None and following.op in ("\n", ";"):
                self.at += 1
            self.expect("do")
            body = self.block(("done",))
            self.at += 1
            if not names or not _NAME.fullmatch(names[0]) or (len(names) > 1 and names[1] != "in"):
                raise self.lexer.fail("this for is not read", token.line)
            return For(names[0], words[2:] or [Token(token.line, [Part("variable", "@", True)])], body)
        if token.bare in ("while", "until"):
            self.at += 1
            self.block(("do",))
            self.at += 1
            self.block(("done",))
            self.at += 1
            return Skipped(token.line, token.bare)
        if token.bare == "case":
            depth = 0
            while (following := self.peek()) is not None:
                depth += (following.bare == "case") - (following.bare == "esac")
                self.at += 1
                if depth == 0:
                    return Skipped(token.line, "case")
            raise self.lexer.fail("esac is missing at the end of the file", token.line)
        words = self.line_of_words()
        following = self.peek()
        if following is not None and following.op == "(" and len(words) == 1:
            raise self.lexer.fail("a function is not read", token.line)
        if following is not None and following.op in ("|", "||", "&&"):
            self.at += 1
            if following.op != "&&":  # what a pipe leads to is not started here
                self.skip_newlines()
                if self.peek() is not None:
                    self.command(self.tokens[self.at])
        return Simple(token.line, words)

    def skip_newlines(self) -> None:
        while (token := self.peek()) is not None and token.op == "\n":
            self.at += 1

    def line_of_words(self) -> list[Token]:
        words = []
        while (token := self.peek()) is not None:
            if token.op == ">":
                self.at += 2  # and where it leads
            elif token.op:
                break
            else:
                words.append(token)
                self.at += 1
        return words


def _parse(text: str, path: Path) -> list:
    return _Parser(text, path).block()


# ---- values ----------------------------------------------------------------


class _Reader:
    def __init__(
        self,
        path: Path,
        arguments: Sequence[str],
        given: dict[str, str],
        is_launch: Callable[[list[Word]], bool],
    ):
        self.path, self.arguments, self.given, self.is_launch = path, list(arguments), given, is_launch
        self.variables: dict[str, Value] = {name: Value(text, 0) for name, text in given.items()}
        self.directory, self.notes, self.depth = "", list[str](), 0
        self.unknown: list[tuple[str, int]] = []

    # -- commands --

    def run(self, nodes: list) -> None:
        for node in nodes:
            if isinstance(node, Simple):
                self.simple(node)
            elif isinstance(node, If):
                self.branch(node)
            elif isinstance(node, For):
                for value in self.fields(node.words):
                    self.assign(node.name, value.text, value.line)
                    self.run(node.body)
            elif node.what != "( )":
                self.notes.append(f"line {node.line}: `{node.what}` is not followed")

    def simple(self, node: Simple) -> None:
        words = list(node.words)
        while words and self.assigned(words[0]):
            words.pop(0)
        command = words[0].bare if words else ""
        if command in ("export", "declare", "typeset", "readonly", "local"):
            for word in words[1:]:
                if word.bare.startswith("-"):
                    continue
                name = self.assigned(word) or word.bare
                if name in self.variables and command == "export":
                    self.variables[name].exported = True
        elif command in ("source", "."):
            self.source(words, node.line)
        elif command == "cd" and len(words) > 1:
            self.directory = os.path.join(self.directory, self.fields(words[1:2])[0].text)
        elif command == "unset":
            for word in words[1:]:
                self.variables.pop(word.bare, None)
        elif words:
            fields = self.fields(words)
            if fields and any(os.path.basename(word.text) in LAUNCHERS for word in fields[:6]):
                if self.is_launch(fields):
                    raise _Launch(fields)

    def source(self, words: list[Token], line: int) -> None:
        name = self.fields(words[1:2])[0].text if len(words) > 1 else ""
        places = [Path(name), self.path.parent / name]
        found = next((place for place in places if _UNKNOWN not in name and place.is_file()), None)
        if found is None or found.name == "set_env.sh":
            self.notes.append(
                f"line {line}: {name} is not read; `polymodal doctor` says whether CANN is set up"
            )
            return
        self.depth += 1
        if self.depth > DEPTH:
            raise PolymodalError(
                f"{self.path}:{line}: {found} is sourced again and again.", "Remove the circle."
            )
        self.run(_parse(_text(found), found))
        self.depth -= 1

    def assigned(self, word: Token) -> str:
        """Carry out NAME=value; its name, "" for another word."""
        if not word.parts or word.parts[0].kind != "text" or word.parts[0].quoted:
            return ""
        found = _ASSIGNED.match(word.parts[0].text)
        if found is None:
            return ""
        first = Part("text", word.parts[0].text[found.end() :], False)
        text = "".join(self.value(part, word.line) for part in (first, *word.parts[1:]))
        before = self.variables[found[1]].text if found[2] and found[1] in self.variables else ""
        self.assign(found[1], before + text, word.line)
        return found[1]

    def assign(self, name: str, text: str, line: int) -> None:
        if name not in self.given:
            exported = name in self.variables and self.variables[name].exported
            self.variables[name] = Value(text, line, exported)

    def branch(self, node: If) -> None:
        for condition, body in node.branches:
            holds = self.holds(condition)
            if holds is None:
                line = getattr(condition[0], "line", 0) if condition else 0
                self.notes.append(
                    f"line {line}: this `if` depends on what only the shell knows; it is not followed"
                )
                return
            if holds:
                self.run(body)
                return
        self.run(node.otherwise)

    def holds(self, condition: list) -> bool | None:
        if len(condition) != 1 or not isinstance(condition[0], Simple):
            return None
        tokens = condition[0].words
        if not tokens or tokens[0].bare not in ("[", "[[", "test"):
            return None
        globbed = tokens[0].bare == "[["
        inner = [token for token in tokens[1:] if token.bare not in ("]", "]]")]
        words = ["".join(self.value(part, token.line) for part in token.parts) for token in inner]
        return self.tested(words, globbed)

    def tested(self, words: list[str], globbed: bool) -> bool | None:
        if any(_UNKNOWN in word for word in words):
            return None
        if words[:1] == ["!"]:
            other = self.tested(words[1:], globbed)
            return None if other is None else not other
        if len(words) == 1:
            return words[0] != ""
        if len(words) == 2 and words[0] in ("-z", "-n"):
            return (words[1] == "") == (words[0] == "-z")
        if len(words) == 2 and words[0] in ("-f", "-d", "-e", "-L", "-h"):
            path = Path(self.directory) / words[1]
            checks = {"-f": path.is_file, "-d": path.is_dir, "-e": path.exists}
            return checks.get(words[0], path.is_symlink)()
        if len(words) != 3:
            return None
        left, operator, right = words
        if operator in ("=", "==", "!="):
            equal = fnmatch.fnmatchcase(left, right) if globbed else left == right
            return equal == (operator != "!=")
        numeric = {"-eq": "==", "-ne": "!=", "-gt": ">", "-ge": ">=", "-lt": "<", "-le": "<="}
        if operator in numeric and re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right):
            a, b = int(left), int(right)
            return {"==": a == b, "!=": a != b, ">": a > b, ">=": a >= b, "<": a < b, "<=": a <= b}[
                numeric[operator]
            ]
        return None

    # -- words --

    def fields(self, tokens: Sequence[Token]) -> list[Word]:
        """Words after expansion: what stands in no quotes is split at blanks, and may vanish."""
        out = list[Word]()
        for token in tokens:
            out += self.fields_of(token)
        return out

    def fields_of(self, token: Token) -> list[Word]:
        out = list[Word]()
        text: str | None = None  # of the word that is being put together
        line = token.line
        for part in token.parts:
            if part.kind == "variable" and part.text in ("@", "*"):
                out += [Word(argument, token.line) for argument in self.arguments]
                continue
            value = self.value(part, token.line)
            if part.quoted or part.kind == "text":
                text = (text or "") + value
                continue
            start = self.line_of(part, token.line)
            for piece in re.finditer(r"[^ \t\n]+|[ \t\n]+", value):
                bare = piece[0].replace(_JOINED, "")
                if bare and not bare.isspace():
                    if text is None:
                        line = start + len(re.findall(f"[\n{_JOINED}]", value[: piece.start()]))
                    text = (text or "") + bare
                elif text is not None and bare:
                    out.append(Word(text, line))
                    text = None
        if text is not None:
            out.append(Word(text.replace(_JOINED, ""), line))
        return out

    def line_of(self, part: Part, line: int) -> int:
        found = self.variables.get(part.text) if part.kind == "variable" else None
        multi = found is not None and ("\n" in found.text or _JOINED in found.text)
        return found.line if found is not None and multi else line

    def value(self, part: Part, line: int) -> str:
        if part.kind == "text":
            return part.text
        if part.kind == "variable":
            return self.variable(part.text, line)
        return self.arithmetic(part.text, line) if part.kind == "arithmetic" else self.output(part.text, line)

    def unknown_value(self, expression: str, line: int) -> str:
        self.unknown.append((expression.strip(), line))
        return f"{_UNKNOWN}{len(self.unknown) - 1}{_UNKNOWN}"

    def variable(self, expression: str, line: int) -> str:
        if expression in ("@", "*"):
            return " ".join(self.arguments)
        if expression == "0":
            return str(self.path)
        if expression == "#":
            return str(len(self.arguments))
        if expression.isdigit():
            return self.arguments[int(expression) - 1] if int(expression) <= len(self.arguments) else ""
        found = _NAME.match(expression)
        if found is None:
            return self.unknown_value("${" + expression + "}", line)
        name, rest = found[0], expression[found.end() :]
        text = self.variables[name].text if name in self.variables else os.environ.get(name, "")
        if not rest:
            return text
        if operator := re.match(r":?([-=+?])", rest):
            other = self.expanded(rest[operator.end() :], line)
            if operator[1] == "+":
                return other if text else ""
            return text or other
        if operator := re.match(r"##|#|%%|%", rest):
            return _trimmed(text, operator[0], self.expanded(rest[operator.end() :], line))
        return self.unknown_value("${" + expression + "}", line)

    def expanded(self, text: str, line: int) -> str:
        parts = _Lexer(text, self.path).parts()
        return "".join(self.value(part, line) for part in parts)

    def arithmetic(self, expression: str, line: int) -> str:
        text = self.expanded(expression, line)
        if _UNKNOWN in text:
            return self.unknown_value(f"$(({expression}))", line)

        def number(node: ast.AST) -> int:
            if isinstance(node, ast.Constant) and isinstance(node.value, int):
                return node.value
            if isinstance(node, ast.Name):
                inner = self.variables[node.id].text if node.id in self.variables else "0"
                return int(inner.strip() or 0)
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                return -number(node.operand)
            if isinstance(node, ast.BinOp):
                a, b = number(node.left), number(node.right)
                if isinstance(node.op, (ast.Div, ast.FloorDiv, ast.Mod)):
                    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
                    return a - quotient * b if isinstance(node.op, ast.Mod) else quotient
                simple = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}
                if type(node.op) in simple:
                    return simple[type(node.op)]
            raise ValueError

        try:
            return str(number(ast.parse(text.strip().lstrip("0") or "0", mode="eval").body))
        except (ZeroDivisionError, SyntaxError):
            raise PolymodalError(
                f"{self.path}:{line}: $(({expression})) is {text.strip() or 'empty'}, which the shell "
                "refuses too.",
                "A variable in it is not set: set it there, or with --set NAME=VALUE.",
            ) from None
        except (ValueError, RecursionError):
            return self.unknown_value(f"$(({expression}))", line)

    def output(self, command: str, line: int) -> str:
        """What a command inside $( ) prints, for those that are known."""
        text = command.strip()
        words = [word.text for word in self.fields([t for t in _Lexer(text, self.path).tokens() if not t.op])]
        name = os.path.basename(words[0]) if words else ""
        piped = "|" in text
        if text == "pwd":
            return os.path.normpath(os.path.join(os.getcwd(), self.directory))
        if name in ("echo", "printf") and not piped:
            return " ".join(words[1:])
        if name in ("dirname", "basename") and len(words) == 2 and not piped:
            return (os.path.dirname(words[1]) or ".") if name == "dirname" else os.path.basename(words[1])
        if name == "expr" and not piped:
            return str(self.arithmetic(" ".join(words[1:]), line))
        if (found := _SUBSHELL.match(text)) is not None:
            return os.path.abspath(os.path.join(self.directory, self.expanded(found[1].strip('"'), line)))
        if name == "date":
            return "date"
        hosts = self.host_file(words)
        if hosts is not None:
            if re.search(r"\bwc\s+-l", text) or name == "wc":
                return str(len(hosts))
            if name == "head":
                return hosts[0] if hosts else ""
            if name == "awk" and "FNR" in text:
                return "0"  # this node's rank: the launcher's own question
        if name == "hostname":
            return hosts[0] if hosts else "localhost"
        return self.unknown_value(f"$({text})", line)

    def host_file(self, words: list[str]) -> list[str] | None:
        """Lines of the file that a command names, where it is there."""
        for word in words[1:]:
            for path in (Path(self.directory) / word, self.path.parent / word):
                if _UNKNOWN not in word and "\n" not in word and len(word) < 256 and path.is_file():
                    return [line.split()[0] for line in _text(path).splitlines() if line.split()]
        return None


def _trimmed(text: str, operator: str, pattern: str) -> str:
    """${text#pattern} and its kin: the shortest (longest, doubled) beginning (#) or end (%) that fits is
    cut."""
    cuts = range(len(text) + 1)
    if (operator in ("##", "%")) if operator[0] == "%" else operator == "##":
        cuts = range(len(text), -1, -1)
    for cut in cuts:
        piece = text[:cut] if operator[0] == "#" else text[cut:]
        if fnmatch.fnmatchcase(piece, pattern):
            return text[cut:] if operator[0] == "#" else text[:cut]
    return text
