"""From a task's name, or its file, to the task."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from engine.errors import ConfigError
from training.tasks import worksheet
from training.tasks.builtin import TEMPLATES
from training.tasks.files import read, shuffled
from training.tasks.scoring import KINDS
from training.tasks.task import Task

_SHEETS = "worksheet"
NAMES = (*sorted(TEMPLATES), _SHEETS)


def load(name: str, kind: str = "", *, chat: bool = True, max_tokens: int = 256) -> Task:
    """A built-in task, or a JSON-lines file with `prompt`, `reference` and, for code, `tests` in each line.

    `kind` says how a file's answers are scored; by default `code` where all lines have tests, otherwise `number`.
    `chat` and `max_tokens` are for files. Raises ConfigError.
    """
    if kind and kind not in KINDS:
        raise ConfigError(f"--score {kind}: not one of {', '.join(KINDS)}")
    if name in TEMPLATES:
        template = TEMPLATES[name]
        kind = kind or template.kind
        return Task(name, kind, template.items, KINDS[kind], False, template.max_tokens, ("\n\n",))
    if name == _SHEETS:
        return Task(name, kind or _SHEETS, worksheet.items, KINDS[kind or _SHEETS], True, max_tokens)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--task {name}: there is no such file, and no task of that name ({', '.join(NAMES)})")
    items = read(path)
    kind = kind or ("code" if all(item.tests for item in items) else "number")
    missing = [item for item in items if not (item.tests if kind == "code" else item.reference)]
    if missing:
        raise ConfigError(f"{name}: the prompt {missing[0].prompt[:40]!r} has nothing to be scored with ({kind})")
    return Task(path.stem, kind, partial(shuffled, items), KINDS[kind], chat, max_tokens)
