"""Chat templates: what they render, what requests may not do, and what a hostile template cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.tokenizer import amplifiers, sandbox
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.tokenizer import Tokenizer
from tests.unit.chat_template_texts import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN
from tests.unit.demo_tokenizer import demo_tokenizer

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello "}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": "<b>"}}}


def _render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate({"default": source}, variables).render([USER] if messages is None else messages, **options)


def _refusal(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        _render(source, messages, **options)
    assert len(error.value.message) < 500 and "/" not in error.value.message.replace("/v1/", "")
    return error.value


def test_the_demo_models_chat() -> None:
    text = demo_tokenizer().render_chat([USER, ANSWER, USER])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello <|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert demo_tokenizer().encode_chat([USER, ANSWER, USER]) == demo_tokenizer().encode(text)


EXPECTED = {
    "llama3": (
        LLAMA3,
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen": (
        QWEN,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (GEMMA, "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"),
    "mistral": (MISTRAL, "<s>[INST] Be brief.\n\nHi[/INST]"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_templates_of_known_families(name: str) -> None:
    source, expected = EXPECTED[name]
    assert _render(source, [{"role": "system", "content": "Be brief."}, USER]) == expected


def test_the_prompt_for_the_answer_can_be_left_out() -> None:
    assert _render(CHATML, add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def test_the_final_message_can_be_continued() -> None:
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert _render(CHATML, [USER, ANSWER], **options).endswith("<|im_start|>assistant\nHello ")
    assert _render(MISTRAL, [USER, ANSWER], **options).endswith("[/INST] Hello")  # this template trims
    parts = [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image"}]}]
    assert _render(GEMMA, parts, **options) == "<s><start_of_turn>user\nA"
    assert _refusal(CHATML, [USER], continue_final_message=True).param == "continue_final_message"
    for messages, source in (
        ([{"role": "user"}], CHATML),
        ([USER], "{{ messages[0].content | length }}"),
        ([], CHATML),
    ):
        assert _refusal(source, messages, **options).param == "messages"


def test_tools_and_variables_reach_the_template() -> None:
    assert '"name": "f"' in _render(QWEN, tools=[TOOL]) and '{"a": "<b>"}' in _render(QWEN, tools=[TOOL])
    assert _render(QWEN, template={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert "Today Date: tomorrow" in _render(LLAMA3, template={"date_string": "tomorrow"})
    named = ChatTemplate({"default": "plain", "tool_use": "with tools"}, {})
    assert [named.render([USER]), named.render([USER], tools=[TOOL])] == ["plain", "with tools"]


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "_x"])
def test_a_request_cannot_override_what_the_server_sets(name: str) -> None:
    error = _refusal(CHATML, template={name: "x"})
    assert name in error.message and error.param == "chat_template_kwargs"


def test_null_fields_are_left_out_and_messages_stay_as_they_were() -> None:
    message = {"role": "assistant", "content": None, "reasoning": "so", "tool_calls": None}
    source = "{% set m = messages[0] %}{{ m.content }}|{{ m.reasoning_content }}|{{ 'tool_calls' in m }}"
    assert _render(source, [message]) == "|so|False"
    assert message == {"role": "assistant", "content": None, "reasoning": "so", "tool_calls": None}


def test_only_plain_data_reaches_a_template() -> None:
    class Thing:
        def secret(self) -> str:
            return "secret"

    assert _render("{{ messages[0].content }}{{ messages[0].content.secret }}", [{"content": Thing()}]) == "<Thing>"


@pytest.mark.parametrize(
    ("source", "messages", "says"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", None, "refused the messages: Roles must"),
        ("{{ messages[0].x.y }}", None, "has no attribute 'x'"),
        ("{{ messages[0]['content'] + 1 }}", None, "TypeError"),
        ("{{ 1 / 0 }}", None, "ZeroDivisionError"),
        (CHATML, [{"role": "user"}], "'content'"),
        (CHATML, ["text"], "must be an object"),
        (CHATML, [], "At least one message"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str, messages: Any, says: str) -> None:
    error = _refusal(source, messages)
    assert says in error.message and error.param == "messages"


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as error:
        Tokenizer(demo_tokenizer()._backend).render_chat([USER])
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequest, match="no default chat template"):
        ChatTemplate({"other": "x"}, {}).render([USER])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'a", "{% x %}", "{{ " + "(" * 3000 + ")" * 3000 + " }}", "x" * 2_000_000]
)
def test_a_template_that_cannot_be_compiled_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError):  # the message is jinja2's
        ChatTemplate({"default": source}, {})


GROW = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "multiplied text": "{{ 'a' * 1000000000 }}",
    "multiplied list": "{{ [1] * 1000000000 }}",
    "power": "{{ 10 ** 1000000 }}",
    "concatenation": GROW.replace("GROWN", "ns.x ~ ns.x"),
    "addition": GROW.replace("GROWN", "ns.x + ns.x"),
    "nested lists": GROW.replace("GROWN", "[ns.x, ns.x]"),
    "nested, not printed": GROW.replace("GROWN", "[ns.x, ns.x]").removesuffix("{{ ns.x }}"),
    "nested tuples": GROW.replace("GROWN", "(ns.x, ns.x)"),
    "nested dicts": GROW.replace("GROWN", "{1: ns.x, 2: ns.x}"),
    "dict calls": GROW.replace("GROWN", "dict(a=ns.x, b=ns.x)"),
    "macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW.replace("GROWN", "d(ns.x)"),
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "wide center": "{{ 'a'.center(1000000000) }}",
    "wide ljust": "{{ 'a'.ljust(1000000000) }}",
    "wide tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "width by argument": "{{ '%*d' % (1000000000, 1) }}",
    "wide format": "{{ '{:>1000000000}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%99999999s'|format('x') }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join": "{{ ('b' * 100000).join(['a'] * 1000) }}",
    "join filter": "{{ (['a'] * 1000)|join('b' * 100000) }}",
    "indent": "{{ ('\n' * 100000)|indent(100000) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "json indent": "{{ messages|tojson(indent=100000000) }}",
    "sum of lists": "{{ [[1], [2]]|sum(start=[]) }}",
    "giant range": "{{ range(1000000000)|list }}",
    "much output": "{% for i in range(90000) %}{% set x %}{{ 'a' * 10000 }}{% endset %}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "class": "{{ ().__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "underscore name": "{% set ns = namespace(__class__=1) %}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "include": "{% include 'x' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amplifiers, "MAX_ITEMS", 1 << 14)
    assert _refusal(HOSTILE[name]).param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(300) %}{% for j in range(300) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for i in range(4000) %}" + "x" * 9000 + "{% endfor %}",
        "{% macro f() %}" + "x" * 90_000 + "{% endmacro %}{% for i in range(4000) %}{% set x = f() %}{% endfor %}",
    ],
)
def test_work_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 5_000)
    monkeypatch.setattr(sandbox, "MAX_LITERALS", 1 << 24)
    assert "too many steps" in _refusal(source).message


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CPU_SECONDS", -1.0)
    assert "too many steps" in _refusal(CHATML).message
    assert _render("{{ messages[0].content }}") == "Hi"  # nothing that repeats, nothing to bound


def test_one_rendering_does_not_pay_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 3)
    template = ChatTemplate({"default": CHATML}, {})
    assert len({template.render([USER] * 3) for _ in range(5)}) == 1


def test_common_tools_of_templates_still_work() -> None:
    source = "{{ '%s-%02d' % ('a', 7) }} {{ '{}{}'.format(1, 'b') }} {{ 'ab' * 2 }} {{ 2 ** 3 }} {{ [1] + [2] }}"
    source += " {{ [1, 2]|join(',') }} {{ ' x '|trim|replace('x', 'yy')|indent }} {{ 'a,b'.split(',')|list }}"
    assert _render(source) == "a-07 1b abab 8 [1, 2] 1,2 yy ['a', 'b']"
