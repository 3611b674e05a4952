"""Runs a program that a model wrote, to see whether its tests pass.

A process of its own with a new session, an empty working folder, an empty environment, `python -I`, and limits on
time, memory and file size; what reaches for the network finds its socket module broken. That stops
accidents: endless loops, full memory, a stray `os.remove`. It is no wall against a program that means harm, for it
runs as the same user: score code only for models and prompts that you would also run by hand, or in a container.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile

SECONDS = 5.0
MEMORY = 1 << 30  # bytes of address space
_FILES = 1 << 20  # bytes of the largest file
_GUARD = """\
import socket as _socket
def _refuse(*_, **__):
    raise OSError("no network here")
_socket.socket = _socket.create_connection = _socket.getaddrinfo = _refuse
del _socket
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Does a Python program, with its tests in it, end by itself and without an error?

    The last line of its output must be ours: a program that ends early, by `exit` for example, has passed nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        mark = os.urandom(16).hex()
        text = f"{_GUARD}\n{program}\nprint()\nprint({mark!r})\n"
        arguments = [sys.executable, "-I", "-B", "-"]
        with subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        ) as process:
            try:
                _limit(process.pid, seconds)
                output, _ = process.communicate(text.encode(), timeout=seconds)
            except (subprocess.TimeoutExpired, OSError):
                return False
            finally:
                _end(process.pid)
        return process.returncode == 0 and output.rstrip().endswith(mark.encode())


def _limit(pid: int, seconds: float) -> None:
    """Before the program is sent: the interpreter waits for it on its standard input."""
    if not hasattr(resource, "prlimit"):  # Linux only
        return
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: _FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.prlimit(pid, kind, (most, most))


def _end(pid: int) -> None:
    """End it and whatever it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
