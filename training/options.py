"""What the command lines of `train-draft` and `train-verifier` share."""

from __future__ import annotations

import argparse
import sys


def positive(text: str) -> int:
    """An argument that counts something. Raises argparse.ArgumentTypeError."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def say(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr)
