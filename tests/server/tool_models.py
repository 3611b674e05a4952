"""Fake engines that call tools in every form, whose grammars are checked by one process."""

from __future__ import annotations

from dataclasses import replace

from engine.grammar import Grammar
from engine.structured.check import GrammarCheck
from engine.structured.wire import Words
from engine.tokenizer.tokenizer import Tokenizer
from tests.server.fake_engine import TEMPLATE as PLAIN_TEMPLATE
from tests.server.fake_engine import FakeEngine, make_tokenizer
from tests.server.harness import CHAT, Json

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "clock"}}
BODY: Json = {**CHAT, "tools": [WEATHER, CLOCK]}
NAMED: Json = {"type": "function", "function": {"name": "weather"}}
OSLO, NOTHING = '{"city": "Oslo"}', "{}"

CALLS = "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.id }} {{ c.function | tojson }}]{% endfor %}{% endif %}"
TEMPLATE = (
    "{# MARKS #}{% if tools %}SAYS{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}{{ m.tool_call_id }}>{{ m.content }}" + CALLS + "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What a template says, by which its form is known; the special tokens; and an answer with two calls.
FORMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "hermes": (
        "<tool_call>",
        ("<tool_call>", "</tool_call>"),
        f'<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    ),
    "llama3_json": (
        '"parameters": ipython',
        ("<|python_tag|>",),
        f'<|python_tag|>{{"name": "weather", "parameters": {OSLO}}}; {{"name": "clock", "parameters": {{}}}}',
    ),
    "mistral": (
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]", "[ARGS]"),
        f"[TOOL_CALLS]weather[ARGS]{OSLO}[TOOL_CALLS]clock[ARGS]{{}}",
    ),
    "pythonic": (
        "<|python_start|>",
        ("<|python_start|>", "<|python_end|>"),
        "<|python_start|>[weather(city='Oslo'), clock()]<|python_end|>",
    ),
}


MARKS = [mark for _, marks, _ in FORMS.values() for mark in marks]


class Shared:
    """One process that checks grammars, for many engines with the same vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._check = GrammarCheck(lambda: Words.of(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids))

    async def admit(self, grammar: Grammar, param: str) -> None:
        await self._check.admit(grammar, param)

    def close(self) -> None:
        """Engines come and go."""

    def end(self) -> None:
        self._check.close()


def engine_of(shared: Shared, form: str = "", answer: str = "", special: bool = True) -> FakeEngine:
    """One whose template tells of tools in this form; without a form, of none."""
    says, marks, text = FORMS.get(form, ("", (), ""))
    own = TEMPLATE.replace("SAYS", says).replace("MARKS", " ".join(marks))
    template = own if form else PLAIN_TEMPLATE
    tokenizer = make_tokenizer(template=template, marks=MARKS if special else ())
    engine = FakeEngine(answer=answer or text, max_model_len=4096, tokenizer=tokenizer)
    engine.info = replace(engine.info, vocab_size=tokenizer.vocab_size)
    engine.grammars = shared  # type: ignore[assignment]  # as far as it is used
    return engine
