"""A jinja2 sandbox with bounds. Chat templates come from model files, which nobody has read.

jinja2's immutable sandbox keeps a template from reaching Python. It does not bound work or memory, so here:
every loop iteration and macro call is counted (and the thread's CPU time checked), every piece of output, in
macros too, is charged to a budget, and everything that can make a value much larger than its parts (`*`, `+`,
`~`, `%`, padding, replace, join, format, nested lists) is checked before or right after it happens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from engine.tokenizer import amplifiers
from engine.tokenizer.amplifiers import keep, keep_nested, number_of_items

MAX_STEPS = 2_000_000  # loop iterations and macro calls of one rendering
MAX_OUTPUT = 1 << 24  # characters that one rendering prints, in macros too
MAX_LITERALS = 1 << 28  # characters of template text inside loops and macros, times their runs
MAX_CPU_SECONDS = 3.0
_REMOVED_FILTERS = ("batch", "center", "filesizeformat", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.output = MAX_OUTPUT
        self.literals = MAX_LITERALS
        self.deadline = time.thread_time() + MAX_CPU_SECONDS

    def step(self, literals: int) -> None:
        self.steps -= 1
        self.literals -= literals
        if self.steps < 0 or self.literals < 0 or time.thread_time() > self.deadline:
            raise SecurityError("the chat template takes too many steps")

    def print(self, length: int) -> None:
        self.output -= length
        if self.output < 0:
            raise SecurityError("the chat template prints too much")


_BUDGET: ContextVar[Budget | None] = ContextVar("chat_template_budget", default=None)


@contextmanager
def budget() -> Iterator[None]:
    """A fresh budget for the rendering inside the block, in this thread."""
    token = _BUDGET.set(Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; for serving its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateNamespace(Namespace):
    """`namespace()` of the templates: no underscore names, and not printable."""

    def __init__(*args: object, **kwargs: object) -> None:  # as in jinja2, so that `self` may be a key
        instance, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            TemplateNamespace.check_name(name)
        Namespace.__init__(instance, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        TemplateNamespace.check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError("names that begin with an underscore are not allowed on a namespace")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates run in; white space is handled as transformers does."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, filters: Mapping[str, Callable[..., object]], names: Mapping[str, object]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing may be computed at compile time, where no budget holds
            finalize=_charge,
            extensions=[GenerationTag, loopcontrols],
        )
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {**amplifiers.FILTERS, **filters}
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        self.globals |= {"namespace": TemplateNamespace, "dict": _TemplateDict(), **names}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Rewriter().visit(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        amplifiers.check_operator(operator, left, right)
        return keep(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: object, /, *args: object, **kwargs: object) -> object:
        amplifiers.check_call(function, args, kwargs)
        return keep(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """jinja2 puts its own function in place of a text's `format`; this puts the check before that."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def bounded(*args: object, **kwargs: object) -> str:
            amplifiers.check_format(getattr(value, "__self__", ""), *args, *kwargs.values())
            return safe(*args, **kwargs)

        return bounded

    def count_step(self, literals: int) -> str:
        if (current := _BUDGET.get()) is not None:
            current.step(literals)
        return ""

    def join_text(self, values: list[object]) -> str:
        """`~`: the texts of all values in one."""
        for value in values:
            number_of_items(value)
        return amplifiers.join(values)

    def keep_value(self, value: object) -> object:
        return keep_nested(value)


class _TemplateDict:
    """`dict()` of the templates; the real class would offer more than calls."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        return keep_nested(dict(*args, **kwargs))


class _Rewriter(NodeTransformer):
    """Put the counting and checking calls into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("join_text", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("keep_value", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("keep_value", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("keep_value", node) if node.ctx == "load" else node

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literals = sum(len(data.data) for part in node.body for data in _all_text(part))
        self.generic_visit(node)
        count = _environment_call("count_step", nodes.Const(literals, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node


def _all_text(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    yield from node.find_all(nodes.TemplateData)


def _environment_call(name: str, argument: nodes.Expr) -> nodes.Call:
    line = argument.lineno
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), [argument], [], None, None, lineno=line)


def _charge(value: object) -> object:
    """Charge a printed value to the budget; jinja2 calls this for each."""
    if (current := _BUDGET.get()) is not None:
        current.print(len(value) if isinstance(value, str) else number_of_items(value))
    return value


def _checked(function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)  # keeps jinja2's marks for context arguments
    def checked(*args: object, **kwargs: object) -> object:
        return keep(function(*args, **kwargs))

    return checked
