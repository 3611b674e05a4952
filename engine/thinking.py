"""How models think before they answer, and how long they may. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingForm:
    """The marks around a thinking span, as text. In most tokenizers each is one token, special or not.

    `label` may stand behind the beginning and is no part of the thought. `assumed`: the answer begins inside the span
    unless the prompt has closed it, for models that think always and never write the beginning.
    """

    begin: str
    end: str
    label: str = ""
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Most tokens between the marks of a thinking span, of all spans of an answer together; then its end is forced.

    `opened`: the answer begins inside the span. `around`: the two tokens that are its marks; filled by `validate` from
    the model's.
    """

    tokens: int
    opened: bool = False
    around: tuple[int, int] | None = None


_THINK = ThinkingForm("<think>", "</think>")

# By name, for `models.reasoning_parser`; `auto` takes the first whose marks the tokenizer or the chat template has.
# gpt-oss is not here: its channels are a format of their own.
FORMS: Mapping[str, ThinkingForm] = {
    "think": _THINK,  # Qwen3, DeepSeek, GLM, SmolLM3 and most others
    "think_always": ThinkingForm("<think>", "</think>", assumed=True),
    "thinking": ThinkingForm("<thinking>", "</thinking>"),
    "mistral": ThinkingForm("[THINK]", "[/THINK]"),
    "seed_oss": ThinkingForm("<seed:think>", "</seed:think>"),
    "cohere": ThinkingForm("<|START_THINKING|>", "<|END_THINKING|>"),
    "kimi_vl": ThinkingForm("◁think▷", "◁/think▷"),
    "minimax_m3": ThinkingForm("<mm:think>", "</mm:think>"),
    "gemma4": ThinkingForm("<|channel>", "<channel|>", label="thought\n"),
    "granite": ThinkingForm("Here is my thought process:", "Here is my response:"),
    # Names that other servers use:
    **dict.fromkeys(("qwen3", "glm45", "deepseek_v3", "hunyuan_a13b", "ernie45"), _THINK),
    "deepseek_r1": ThinkingForm("<think>", "</think>", assumed=True),
}
