"""Chat templates: messages to prompt text, as transformers' apply_chat_template does, in a bounded sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from jinja2 import Template, TemplateError, meta

from engine.errors import InvalidRequest
from engine.tokenizer.amplifiers import number_of_items
from engine.tokenizer.files import TOKEN_NAMES
from engine.tokenizer.sandbox import BoundedEnvironment, budget

MAX_TEMPLATE = 1 << 20  # characters
_KWARGS = "chat_template_kwargs"
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is what templates read
_TEMPLATE_ARGUMENTS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
_GLOBALS = (
    "raise_exception",
    "strftime_now",
    "dict",
    "namespace",
    "range",
    "cycler",
    "joiner",
    "self",
    "loop",
    "caller",
)
_RESERVED = frozenset((*_TEMPLATE_ARGUMENTS, *_GLOBALS, *TOKEN_NAMES))


class ChatTemplate:
    """A model's templates by name, compiled. `variables` are the special tokens that they may print.

    Raises InvalidRequest (param "messages") whenever messages can't be rendered, and ValueError from the
    constructor for a template that can't be compiled. Safe to use from several threads.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        environment = BoundedEnvironment(
            {"tojson": _tojson}, {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        )
        self._variables = dict(variables)
        self._templates: dict[str, Template] = {}
        self._sources = tuple(sources.values())
        self._read: frozenset[str] = frozenset()
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE:
                raise ValueError(f"it is longer than {MAX_TEMPLATE} characters")
            try:
                self._templates[name] = environment.from_string(source)
                self._read |= meta.find_undeclared_variables(environment.parse(source))
            except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
                raise ValueError(_short(error)) from error

    def reads(self, variable: str) -> bool:
        """Is what a caller gives under this name looked at?"""
        return variable in self._read

    def mentions(self, text: str) -> bool:
        """Does any of the sources hold this text?"""
        return any(text in source for source in self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        template: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text. `template` holds a request's further variables; it may not override the others."""
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message can't both be true.", "continue_final_message"
            )
        for name in template or {}:
            if name in _RESERVED or name.startswith("_"):
                raise InvalidRequest(f"The template variable {name!r} can't be set by a request.", _KWARGS)
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest("This model has no default chat template; use /v1/completions instead.", "messages")
        try:
            chat = _chat(messages)
            final = _tag_final_message(chat) if continue_final_message else None
            variables: dict[str, object] = {"documents": None, **self._variables}
            variables |= {name: _plain(value) for name, value in (template or {}).items()}
            variables |= {
                "messages": chat,
                "tools": [_plain(tool) for tool in tools] if tools is not None else None,
                "add_generation_prompt": add_generation_prompt,
            }
            with budget():
                text = "".join(self._templates[name].generate(variables))
            return text if final is None else _cut_at_tag(text, final)
        except InvalidRequest:
            raise
        except TemplateError as error:
            message = f"The model's chat template refused the messages: {_short(error)}"
            raise InvalidRequest(message, "messages") from error
        except Exception as error:  # a template can raise anything: it is a program
            message = f"The model's chat template can't render these messages: {type(error).__name__}: {_short(error)}"
            raise InvalidRequest(message, "messages") from error


def _plain(value: object) -> object:
    """The value in JSON's types alone: objects with methods have no place in a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str | int | float) else f"<{type(value).__name__}>"


def _chat(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """A copy of the messages without empty fields, and with reasoning under all the names templates read it by."""
    if not messages:
        raise InvalidRequest("At least one message is needed.", "messages")
    chat = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InvalidRequest("Each message must be an object with a role and content.", "messages")
        # Many templates print the word None for a null content, but handle a missing one.
        copy = {str(key): _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((copy[key] for key in _REASONING if copy.get(key) is not None), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        chat.append(copy)
    return chat


def _tag_final_message(chat: list[dict[str, object]]) -> str:
    """Mark the end of the last message's text, so that it can be found in the rendering; returns that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(text := part.get("text"), str):
            part["text"] = text + _CONTINUE_TAG
            return text
    raise InvalidRequest("continue_final_message needs a last message with text to continue.", "messages")


def _cut_at_tag(text: str, final: str) -> str:
    """The rendering up to the end of the last message, without the white space that the template trimmed."""
    at = text.rfind(_CONTINUE_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise InvalidRequest(
            "continue_final_message: this model's chat template does not print the last message as it is.", "messages"
        )
    return text[:at] if text.startswith(_CONTINUE_TAG, at) else text[:at].rstrip()


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:200])


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does: jinja2's own filter would escape HTML."""
    number_of_items(value)
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 32:
        raise TemplateError("tojson: the indent is too wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
