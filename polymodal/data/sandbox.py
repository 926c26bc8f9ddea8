"""Bounds for chat templates, which are programs that others wrote: how much work one rendering may do.

transformers renders them in jinja2's sandbox, where they reach nothing but could run or grow for ever. Here
every loop round, call and made character is counted, before it is made where its size is known, and a
rendering that counts more than MOST is an error. The count depends on the template and the messages alone,
not on the machine.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from string import Formatter
from typing import Any

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from polymodal.core.errors import PolymodalError

MOST = 100_000_000
"""Characters made in one rendering; a loop round or a call counts as STEP of them."""
STEP = 100
SOURCE = 1 << 20  # characters of a template
BITS = 100_000  # of a whole number that is computed
PRODUCTS = frozenset({"replace", "join", "indent", "wordwrap", "expandtabs", "tojson", "batch", "slice"})
"""Filters and methods whose result may be as long as the product of their arguments."""
SIZED = frozenset({"center", "indent", "truncate", "wordwrap", "batch", "slice", "tojson"})
"""Filters that take lengths: whole numbers among their arguments count."""
_WIDTH = re.compile(r"%(\(\w*\))?[-+ #0-9.]*(\*|\d{6})")  # of a format: huge, or taken from an argument


class TooMuchWork(SecurityError):
    """A rendering counted more than MOST."""


class BoundedTemplate(Template):
    """Counts from 0 at each rendering."""

    def new_context(self, *args: Any, **kwargs: Any) -> Any:
        self.environment.work = 0  # type: ignore[attr-defined]
        return super().new_context(*args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, counting. Raises SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.work = 0
        self.call_weight = STEP  # of the heaviest macro or block of the template
        self.finalize = self._output
        self.filters.pop("urlize")
        self.globals.pop("lipsum")

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if len(source) > SOURCE:
            raise SecurityError(f"the template has {len(source)} characters, more than {SOURCE}")
        self.filters = {name: self._counting(name, function) for name, function in self.filters.items()}
        self.filters |= {"_rounds": _rounds, "_concat": _concat}
        return super().from_string(source, *args, **kwargs)

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        bodies = source.find_all((nodes.Macro, nodes.CallBlock, nodes.Block, nodes.For))
        self.call_weight = max([STEP, *map(_weight, bodies)])
        source = _Counting().visit(source)
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts what it is given and makes."""
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.check_format("%" if name == "format" else "", args[first])
            self.spend(_cost(name, (*args[first:], *kwargs.values()), numbers=name in SIZED))
            made = function(*args, **kwargs)
            self.spend(_length(made))
            return made

        return call

    def spend(self, amount: int) -> None:
        """Raises TooMuchWork when the rendering has done too much."""
        self.work += amount
        if self.work > MOST:
            raise TooMuchWork("it does too much work: endless loops, or text that grows without end")

    def check_format(self, name: str, text: Any) -> None:
        """Raises SecurityError for a format of huge width. name: % or that of the method."""
        huge = name == "%" and _WIDTH.search(str(text)) is not None
        if name in ("format", "format_map"):
            specs = [spec for _, _, spec, _ in Formatter().parse(str(text)) if spec]
            huge = any("{" in spec or re.search(r"\d{6}", spec) for spec in specs)
        if huge:
            raise SecurityError("it formats text to a width that is huge, or not a number of the template")

    def _output(self, value: Any) -> Any:
        if type(value) is str:
            self.work += len(value)
            if self.work <= MOST:
                return value
        self.spend(STEP + _size(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            made = left + right
            self.spend(STEP + _length(made))
            return made
        if operator == "%" and isinstance(left, str):
            self.check_format("%", left)
            self.spend(STEP + _size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int) and operator != "%":
            bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if bits > BITS:
                raise SecurityError(f"it computes a number of more than {BITS} bits")
        elif operator == "*":
            times, length = (x if isinstance(x, int) else _length(x) for x in (left, right))
            self.spend(STEP + abs(times * length))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, (Macro, BlockReference, LoopContext)):
            __self.spend(__self.call_weight + sum(map(_length, args)))
            return super().call(__context, __obj, *args, **kwargs)
        own = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # what it is a method of
        name = getattr(__obj, "__name__", "")
        __self.check_format(name, own)
        given = (own if isinstance(own, (str, bytes, int)) else "", *args, *kwargs.values())
        __self.spend(_cost(name, given, numbers=given[0] != ""))
        made = super().call(__context, __obj, *args, **kwargs)
        __self.spend(_length(made))
        return made


class _Counting(NodeTransformer):
    """Every loop counts its rounds, every concatenation its characters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        weight = nodes.Const(_weight(node), lineno=node.lineno)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_rounds", [weight], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno)


def _weight(node: nodes.Node) -> int:
    """What a run through a body counts at least: its literal text, and its instructions."""
    text = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
    text += sum(len(part.value) for part in node.find_all(nodes.Const) if isinstance(part.value, str))
    return STEP + text + 10 * sum(1 for _ in node.find_all(nodes.Node))


def _length(value: Any) -> int:
    """Of a string or a list, else 0."""
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range)) else 0


def _size(value: Any) -> int:
    """Characters of a value as text, about; of lists within lists only so many that MOST is exceeded."""
    if isinstance(value, (str, bytes)):
        return len(value)
    total, waiting = 0, [value]
    while waiting and total <= MOST:
        item = waiting.pop()
        total += STEP
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, range):
            total += STEP * len(item)
    return total


def _cost(name: str, given: tuple[Any, ...], numbers: bool) -> int:
    """What a call counts, by its arguments. numbers: whole numbers among them are sizes of the result."""
    sizes = [
        (abs(value) if numbers and place else 20) if isinstance(value, int) else _size(value)
        for place, value in enumerate(given)
    ]
    if name not in PRODUCTS:
        return STEP + sum(sizes)
    product = 1
    for size in sizes:
        product *= 1 + size
    return STEP + product


@pass_context
def _rounds(context: Any, values: Any, weight: int) -> Any:
    """What a loop goes over, its rounds counted: at once where their number is known."""
    spend = context.environment.spend
    if isinstance(values, (str, list, tuple, dict, range)):
        spend(weight * len(values))
        return values
    return values if isinstance(values, Undefined) else _counted(values, weight, spend)


def _counted(values: Iterable[Any], weight: int, spend: Callable[[int], None]) -> Iterator[Any]:
    for value in values:
        spend(weight)
        yield value


@pass_context
def _concat(context: Any, parts: list[Any]) -> str:
    context.environment.spend(STEP + sum(map(_size, parts)))
    return "".join(map(str, parts))


def bound_templates() -> None:
    """Make transformers render every chat template of this process in the bounded sandbox.

    The library makes the environment inside a function and takes no other; its name there is replaced.
    """
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
        chat_template_utils._compile_jinja_template.cache_clear()


def compiled(template: str) -> Any:
    """A chat template with transformers' filters and functions, bounded; remembered by the library."""
    from transformers.utils import chat_template_utils

    bound_templates()
    return chat_template_utils._compile_jinja_template(template)


def plain_data(value: Any) -> Any:
    """Objects of rows (arrays, dates) as plain values: a template must not reach their methods."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._plain_template_data(value)


@contextlib.contextmanager
def template_errors(hint: str = "Give another template as data.chat_template.") -> Iterator[None]:
    """Whatever a chat template raises becomes a PolymodalError."""
    import jinja2

    try:
        yield
    except PolymodalError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise PolymodalError(f"the chat template is not rendered: {_cause(error)}.", hint) from None
    except jinja2.TemplateSyntaxError as error:
        raise PolymodalError(
            f"the chat template, line {error.lineno}: {_cause(error)}.", "Correct the template."
        ) from None
    except jinja2.TemplateError as error:
        raise PolymodalError(
            f"the chat template refuses this conversation: {_cause(error)}.",
            "Correct the order of roles, or give another template as data.chat_template.",
        ) from None
    except Exception as error:  # a template is a program of others: it may raise anything
        cause = f"{type(error).__name__}: {_cause(error)}"
        raise PolymodalError(f"the chat template fails on this conversation: {cause}.", hint) from None


def _cause(error: Exception) -> str:
    return " ".join(str(error)[:200].split()).rstrip(".")
