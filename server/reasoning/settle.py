"""What a chat request says of thinking: how much, for how long, and whether the client wants to see it.

Clients say it in several ways: OpenAI's `reasoning_effort`, the `reasoning` object of routers, `enable_thinking` as
Qwen's own API has it, `thinking_token_budget` of vLLM. All come to the same three things: variables of the chat
template, a budget, and how the answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.thinking import FORMS, ThinkingBudget
from engine.types import ModelInfo, SamplingParams
from server.contract import Tokenizer
from server.errors import invalid
from server.fragments import Manner
from server.reasoning.manner import Thinking, ThinkingManner
from server.reasoning.schemas import BudgetFields, TemplateThinking, ThinkingFields

SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch
_WORDS = {"minimal": "low", "xhigh": "high", "max": "high"}  # for templates that do not know these
_TAIL = 16  # tokens of a prompt that may belong to the opening of a span


def effort_of(fields: TemplateThinking) -> str | None:
    """The effort, "none" where thinking is switched off by another name. Raises ApiError for contradictions."""
    asked = fields.reasoning
    effort = fields.reasoning_effort
    if asked is not None and asked.effort is not None:
        if effort not in (None, asked.effort):
            raise invalid("reasoning.effort", f"contradicts reasoning_effort, which is {effort!r}")
        effort = asked.effort
    for name, switch in (
        ("enable_thinking", fields.enable_thinking),
        ("reasoning.enabled", None if asked is None else asked.enabled),
    ):
        if switch is not None and effort is not None and switch is (effort == "none"):
            raise invalid(name, f"contradicts the effort, which is {effort!r}")
        if switch is False:
            effort = "none"
    return effort


def template_variables(fields: TemplateThinking, tokenizer: Tokenizer) -> dict[str, object]:
    """What the chat template is told, in the words that it knows; the client's own chat_template_kwargs win."""
    given = dict(fields.chat_template_kwargs or {})
    effort = effort_of(fields)
    asked = fields.reasoning
    on = fields.enable_thinking is True or (asked is not None and asked.enabled is True)
    if effort is None and not on:
        return given
    found: dict[str, object] = {name: effort != "none" for name in SWITCHES if tokenizer.template_mentions(name)}
    if effort is not None and (effort != "none" or _knows(tokenizer, "none")):
        found["reasoning_effort"] = effort if _knows(tokenizer, effort) else _WORDS.get(effort, effort)
    return found | given


def _knows(tokenizer: Tokenizer, word: str) -> bool:
    """Does the template compare something with this word?"""
    return tokenizer.template_mentions(f"'{word}'") or tokenizer.template_mentions(f'"{word}"')


def budget_of(fields: BudgetFields, info: ModelInfo) -> int | None:
    """Most tokens to think. Raises ApiError for contradictions, and where the model has no thinking tokens."""
    named = {
        "thinking_token_budget": fields.thinking_token_budget,
        "max_thinking_tokens": fields.max_thinking_tokens,
        "thinking_budget": fields.thinking_budget,
    }
    if isinstance(fields, ThinkingFields) and fields.reasoning is not None:
        named["reasoning.max_tokens"] = fields.reasoning.max_tokens
    given = {name: value for name, value in named.items() if value is not None}
    if not given:
        return None
    name, budget = next(iter(given.items()))
    for other, value in given.items():
        if value != budget:
            raise invalid(other, f"contradicts {name}, which is {budget}")
    if info.thinking is None:
        raise invalid(name, "is of no use here: this model's tokenizer has no tokens around its thinking")
    if info.diffusion is not None:
        raise invalid(name, "is not supported for models that denoise")
    return budget


def thinking_of(info: ModelInfo, tokenizer: Tokenizer, ids: Sequence[int], prefilled: str = "") -> Thinking | None:
    """How the answer to this prompt begins; None where no thoughts are told apart.

    A prompt ends inside a span if its last words open one, as the templates of many models do, or if the end of the
    message that is to be continued, `prefilled`, does. What stands in earlier messages says nothing.
    """
    form = FORMS.get(info.reasoning_parser)
    if form is None:
        return None
    if prefilled:
        opened = prefilled.rfind(form.begin) > prefilled.rfind(form.end)
        return Thinking(form, opened, closed=not opened)
    tail = tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False).rstrip()
    opening = (form.begin, form.begin + form.label.rstrip())
    closed = tail.endswith(form.end)
    return Thinking(form, tail.endswith(opening) or (form.assumed and not closed), closed)


def chat_budget(
    fields: ThinkingFields, info: ModelInfo, tokenizer: Tokenizer, ids: Sequence[int], thinking: Thinking | None
) -> ThinkingBudget | None:
    """Of a chat. No thinking at all is a budget of nothing where the template has no switch for it."""
    if thinking is None:
        return text_budget(fields, info, ids)
    tokens = budget_of(fields, info)
    able = info.thinking is not None and info.diffusion is None
    if tokens is None and able and effort_of(fields) == "none":
        switch = any(map(tokenizer.template_mentions, SWITCHES)) or _knows(tokenizer, "none")
        tokens = None if switch else 0
    return None if tokens is None else ThinkingBudget(tokens, thinking.opened)


def text_budget(fields: BudgetFields, info: ModelInfo, ids: Sequence[int]) -> ThinkingBudget | None:
    """Of a completion: its prompt ends inside a span if the last mark in it opens one."""
    tokens, marks = budget_of(fields, info), info.thinking
    if tokens is None or marks is None:
        return None
    last = next((token for token in reversed(ids) if token in marks), None)
    return ThinkingBudget(tokens, last == marks[0])


def settle_chat(
    fields: ThinkingFields,
    info: ModelInfo,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: SamplingParams,
    prefilled: str = "",
) -> tuple[SamplingParams, Thinking | None]:
    """With all that the request says of thinking, and how its answer begins.

    A grammar holds from behind the thought, where the model's vocabulary has marks for it. Without them nobody could
    say where that is: then all of the answer is held to it, and there is no thought.
    """
    thinking, grammar, marks = thinking_of(info, tokenizer, ids, prefilled), sampling.grammar, info.thinking
    if grammar is not None and thinking is not None:
        if marks is None:
            thinking = None
        elif not thinking.closed:
            grammar = replace(grammar, begin=None if thinking.opened else marks[0], after=marks[1])
    sampling = replace(
        sampling,
        grammar=grammar,
        thinking=chat_budget(fields, info, tokenizer, ids, thinking),
        shown_token_ids=(*sampling.shown_token_ids, *shown_ids(info, tokenizer, thinking)),
    )
    return sampling, thinking


def manner_of(fields: ThinkingFields, thinking: Thinking | None, inner: Manner) -> Manner:
    """How the answers are read: thoughts apart, unless the client wants them where they stand."""
    if thinking is None or fields.separate_reasoning is False:
        return inner
    hidden = fields.include_reasoning is False or (fields.reasoning is not None and fields.reasoning.exclude is True)
    return ThinkingManner(thinking, inner, shown=not hidden, at_once=fields.stream_reasoning is False)


def shown_ids(info: ModelInfo, tokenizer: Tokenizer, thinking: Thinking | None) -> tuple[int, ...]:
    """Special tokens that must be text for thoughts to be told apart."""
    if thinking is None:
        return ()
    return tuple(token for token in info.thinking or () if tokenizer.is_special(token))
