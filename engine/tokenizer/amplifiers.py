"""Checks on operations that can make a value much larger than its parts, for the template sandbox.

A value may hold up to MAX_TEXT characters or MAX_ITEMS nested items; more is a SecurityError. What is estimated
before an operation is only what the operation could blow up by itself; results are measured after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from jinja2 import Environment, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import do_format, do_indent, do_replace, do_round, sync_do_join, sync_do_sum
from jinja2.nodes import EvalContext
from markupsafe import soft_str

MAX_TEXT = 1 << 24
MAX_ITEMS = 1 << 18
_MAX_BITS = 4096  # of whole numbers
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")
_FORMATS = re.compile(r"\d{5}|\{[^{}]*\{|%[^a-zA-Z%]*\*")  # wide fields, and widths that come from arguments


def keep(value: object) -> object:
    """`value` itself, if it is of bearable length."""
    if isinstance(value, str | bytes):
        _require(len(value) <= MAX_TEXT)
    elif isinstance(value, list | tuple | dict | set):
        _require(len(value) <= MAX_ITEMS)
    return value


def keep_nested(value: object) -> object:
    """`value` itself, if it is of bearable size with all that it holds; for whatever nests values in a new one."""
    number_of_items(value)
    return value


def number_of_items(value: object) -> int:
    """Nested items and characters of a value, with shared parts counted as often as they would be printed."""
    if isinstance(value, str):
        return len(value)
    waiting, count, characters = [value], 0, 0
    while waiting:
        current = waiting.pop()
        count += 1
        if isinstance(current, str):
            characters += len(current)
        elif isinstance(current, dict):
            waiting += current
            waiting += current.values()
        elif isinstance(current, list | tuple | set | frozenset):
            waiting += current
        _require(count + len(waiting) <= MAX_ITEMS and characters <= MAX_TEXT)
    return count + characters


def check_operator(operator: str, left: object, right: object) -> None:
    """Before `left operator right`."""
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                _require(len(value) * times <= MAX_TEXT)
        _require(_bits(left) + _bits(right) <= _MAX_BITS)
    elif operator == "**":
        exponent = right if isinstance(right, int) else 1
        _require(_bits(left) * exponent <= _MAX_BITS)
    elif operator == "%" and isinstance(left, str):
        check_format(left, right)


def check_call(function: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Before a method of a text is called."""
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    if name in _PADDING:
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        _require(max(numbers, default=8) * (text.count("\t") if name == "expandtabs" else 1) <= MAX_TEXT)
    elif name == "replace" and len(args) > 1:
        _check_replace(text, str(args[0]), str(args[1]))
    elif name == "join" and args:
        _check_join(text, args[0])
    elif name == "translate":
        raise SecurityError("translate is not available in chat templates")


def check_format(form: str, *values: object) -> None:
    """Before `form` is filled in."""
    _require(_FORMATS.search(form) is None)
    for value in values:
        number_of_items(value)


def join(values: Iterable[object], separator: str = "") -> str:
    texts = [value if isinstance(value, str) else str(value) for value in values]
    _require(sum(map(len, texts)) + len(separator) * len(texts) <= MAX_TEXT)
    return separator.join(texts)


def _check_join(separator: str, values: object) -> None:
    if isinstance(values, list | tuple):
        _require(number_of_items(values) + len(separator) * len(values) <= MAX_TEXT)


def _check_replace(text: str, old: str, new: str) -> None:
    _require(len(text) + text.count(old) * len(new) <= MAX_TEXT)


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _require(condition: bool) -> None:
    if not condition:
        raise SecurityError("the chat template makes a value that is too large")


@pass_eval_context
def _join_filter(context: EvalContext, value: Iterable[object], d: str = "", attribute: str | None = None) -> str:
    values = list(value)
    _check_join(str(d), values)
    result: str = sync_do_join(context, values, d, attribute)
    return result


@pass_eval_context
def _replace_filter(context: EvalContext, s: str, old: str, new: str, count: int | None = None) -> str:
    _check_replace(str(s), str(old), str(new))
    return do_replace(context, s, old, new, count)


def _indent_filter(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _require((width if isinstance(width, int) else len(width)) * (s.count("\n") + 1) <= MAX_TEXT)
    return do_indent(s, width, first, blank)


def _format_filter(value: str, *args: object, **kwargs: object) -> str:
    check_format(str(value), *args, *kwargs.values())
    return do_format(value, *args, **kwargs)


def _round_filter(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    _require(abs(precision) <= 100)
    return do_round(value, precision, method)


def _string_filter(value: object) -> str:
    number_of_items(value)
    return soft_str(value)


@pass_environment
def _sum_filter(
    environment: Environment, iterable: Iterable[object], attribute: str | int | None = None, start: float = 0
) -> object:
    _require(isinstance(start, int | float))  # lists and texts would grow without a check
    return sync_do_sum(environment, iterable, attribute, start)


FILTERS: Mapping[str, Callable[..., object]] = {
    "join": _join_filter,
    "replace": _replace_filter,
    "indent": _indent_filter,
    "format": _format_filter,
    "round": _round_filter,
    "string": _string_filter,
    "sum": _sum_filter,
}
