"""The `slipstream` command: a table of sub-commands, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from engine.errors import ConfigError, SlipstreamError

# name -> ("module:function", what it does). The function takes the remaining arguments and returns the exit code.
# A name of two words is a group's: `slipstream bench` lists the group's commands.
COMMANDS = {
    "serve": ("server.launch:serve", "start the server: slipstream serve [MODEL] [--config FILE]"),
    "chat": ("server.client:chat", "talk to a running server"),
    "complete": ("server.client:complete", 'print how a running server continues a text: slipstream complete "text"'),
    "run-batch": ("server.batch.command:main", "answer a file of requests: slipstream run-batch IN.jsonl OUT.jsonl"),
    "top": ("server.top.command:main", "watch a running server in the terminal"),
    "print-config": ("server.launch:print_config", "print the configuration that `serve` would use"),
    "bench serve": ("benchmarks.serve:main", "load any OpenAI-compatible server and measure what its users would see"),
    "bench step": ("benchmarks.step:main", "time the engine's steps, without HTTP, beside what the machine allows"),
    "bench verifiers": ("benchmarks.verifiers:main", "what verifiers gain for a model and a draft, and what it costs"),
    "bench diffusion": ("benchmarks.diffusion:main", "a diffusion model's accuracy and speed by rule, cache and batch"),
    "train-draft": ("training.train_draft:main", "train a draft for a model on the model's own answers"),
    "train-verifier": (
        "training.train_verifier:main",
        "train the head of the verifier diversed, for a pair and a task",
    ),
    "train-diffusion": ("training.train_diffusion:main", "train a small masked-diffusion model on sheets of exercises"),
    "version": ("server.cli:version", "print the version"),
}
Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command. Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    name = "version" if name == "--version" else name
    group = name if any(command.startswith(f"{name} ") for command in COMMANDS) else ""
    if group:
        name, *rest = rest or [""]
    if name in ("-h", "--help", "help", ""):
        print(_usage(group), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    name = f"{group} {name}".strip()
    if name not in COMMANDS:
        print(f"slipstream: there is no command {name!r}\n\n{_usage(group)}", file=sys.stderr)
        return 2
    try:
        return _resolve(COMMANDS[name][0])(rest)
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has gone, as in `slipstream print-config | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def version(arguments: Sequence[str]) -> int:
    """Print the installed version."""
    if arguments:
        print("usage: slipstream version", file=sys.stderr)
        return 2
    from server import version as installed

    print(f"slipstream {installed.version()}")
    return 0


def _usage(group: str = "") -> str:
    """The commands of one group, or all of them."""
    shown = {name: text for name, (_, text) in COMMANDS.items() if name.startswith(group and f"{group} ")}
    width = max(map(len, shown))
    command = f"slipstream {group}".strip() + " COMMAND"
    lines = [f"  {name:<{width}}  {text}" for name, text in shown.items()]
    return "\n".join([f"usage: {command} ...", "", *lines, "", f"{command} --help tells more."])


def _resolve(target: str) -> Command:
    module, _, function = target.partition(":")
    return cast(Command, getattr(importlib.import_module(module), function))
