"""In which form a model calls tools: what its chat template says of it."""

from __future__ import annotations

from collections.abc import Callable

OWN_PROMPT = "hermes"  # the form that is asked for where the template knows of no tools, or of none that is known here


def tool_form(wanted: str, reads_tools: bool, mentions: Callable[[str], bool]) -> tuple[str, bool]:
    """The name of the form (empty: no tools), and whether the template itself tells the model of them.

    `wanted`: a value of `models.tool_parser`. `reads_tools`: the template has a variable of that name. `mentions`: does
    its source hold a text?
    """
    if wanted != "auto":
        return ("", False) if wanted == "none" else (wanted, reads_tools)
    if not reads_tools:
        return OWN_PROMPT, False
    if mentions("[TOOL_CALLS]"):
        return "mistral", True
    if mentions("<tool_call>") and not mentions("<function=") and not mentions("<arg_key>"):
        return "hermes", True
    if mentions("<|python_start|>") or mentions("func_name1("):
        return "pythonic", True
    if mentions('"parameters": ') and (mentions("<|python_tag|>") or mentions("ipython")):
        return "llama3_json", True
    return OWN_PROMPT, False
