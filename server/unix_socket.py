"""A unix socket to listen on: its file, who may use it, and what an earlier server has left there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from engine.errors import SlipstreamError

MAX_PATH = 107  # bytes, by the kernel's struct sockaddr_un


@contextlib.contextmanager
def listening_at(path: Path, mode: int) -> Iterator[socket.socket]:
    """A socket that listens at `path`, whose file has `mode` and goes at the end. Raises SlipstreamError.

    A socket's file that nobody listens at is replaced; any other file is left alone.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise SlipstreamError(f"cannot listen on {path}: a socket's path has at most {MAX_PATH} bytes")
    try:
        _clear(path)
        bound = _bind(path, mode)
    except OSError as error:
        raise SlipstreamError(f"cannot listen on {path}: {error.strerror}; --uds changes it") from error
    own = os.lstat(path)
    try:
        yield bound
    finally:
        bound.close()
        with contextlib.suppress(OSError):
            now = os.lstat(path)
            if (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino):  # not another server's that has taken its place
                os.unlink(path)


def _clear(path: Path) -> None:
    """Remove a socket's file that is left over. Raises OSError where something else stands in the way."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, "there is a file which is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _bind(path: Path, mode: int) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~mode)  # never open to more than `mode`, not even for a moment
    try:
        bound.bind(os.fspath(path))
        os.chmod(path, mode)
        bound.listen(socket.SOMAXCONN)
    except OSError:
        bound.close()
        raise
    finally:
        os.umask(before)
    return bound
