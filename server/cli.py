"""The `slipstream` command: a table of sub-commands, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from engine.errors import ConfigError, SlipstreamError

# name -> ("module:function", what it does). The function takes the remaining arguments and returns the exit code.
COMMANDS = {
    "serve": ("server.launch:serve", "start the server: slipstream serve [MODEL] [--config FILE]"),
    "chat": ("server.client:chat", "talk to a running server"),
    "complete": ("server.client:complete", 'print how a running server continues a text: slipstream complete "text"'),
    "print-config": ("server.launch:print_config", "print the configuration that `serve` would use"),
    "version": ("server.cli:version", "print the version"),
}
Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command. Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    name = "version" if name == "--version" else name
    if name in ("-h", "--help", "help", ""):
        print(_usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name not in COMMANDS:
        print(f"slipstream: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
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


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: slipstream COMMAND ...", "", *lines, "", "slipstream COMMAND --help tells more."])


def _resolve(target: str) -> Command:
    module, _, function = target.partition(":")
    return cast(Command, getattr(importlib.import_module(module), function))
