"""A diffusion model's mask token, made impossible to write: its text in a prompt is text like any other.

Removing the token would move the ids of those behind it (an added token's id is where it stands in the list), so it
keeps its id and gets a name that nobody can know: 128 random bits, new in each process.
"""

from __future__ import annotations

import json
import secrets

from engine.errors import ModelLoadError


def hide_token(tokenizer_json: str, token_id: int) -> tuple[str, str | None]:
    """tokenizer.json with another name for this token, and the name that it had; None if the file has no such id.

    Raises ModelLoadError for a text that is no tokenizer.json.
    """
    try:
        values = json.loads(tokenizer_json)
        model, name = values["model"], f"mask {secrets.token_hex(16)}"
        added = [entry for entry in values.get("added_tokens") or () if entry["id"] == token_id]
        had = {entry["content"] for entry in added}
        for entry in added:
            entry |= {"content": name, "special": True, "normalized": False}
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            known = [text for text, number in vocabulary.items() if number == token_id]
            for text in known:
                del vocabulary[text]
                vocabulary[name] = token_id
        else:
            known = [vocabulary[token_id][0]] if token_id < len(vocabulary) else []
            if known:
                vocabulary[token_id] = [name, vocabulary[token_id][1]]
        had |= set(known)
        if known and "merges" in model:  # none may build what is no longer there
            model["merges"] = [pair for pair in model["merges"] if _built_by(pair) not in had]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"tokenizer.json can't be read: {str(error)[:200]}") from error
    return json.dumps(values), next(iter(had), None)


def _built_by(pair: object) -> str:
    """The token that a merge makes; merges are pairs, or texts with a space between two tokens."""
    return "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)  # type: ignore[arg-type]
