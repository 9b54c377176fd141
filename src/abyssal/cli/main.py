"""The ``abyssal`` command: finds the verb, runs it, and turns bad input into one line.

A verb is a module ``abyssal.cli.<verb>`` with ``main(argv: list[str]) -> int``, imported only when it is called, so
that ``abyssal info`` never waits for torch.  To add one, write the module and add its line to :data:`VERBS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

VERBS: dict[str, str] = {
    "info": "size, cost and memory of a model, from its name or its folder",
    "convert": "rewrite a model folder in BF16, FP8 or FP32",
    "train": "train a model on text",
    "generate": "let a model write",
    "quickstart": "train a tiny model on this machine, look at it, let it write",
}
"""Verb and what it does, in the order of the help; ``abyssal.cli.<verb>`` implements it."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def _help() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [
        "usage: abyssal VERB ...",
        "",
        *(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()),
        "",
        "abyssal VERB --help describes one verb; abyssal --version prints the version.",
    ]
    return "\n".join(lines)


def _verb(name: str) -> Callable[[list[str]], int]:
    return import_module(f"abyssal.cli.{name}").main


def _fail(where: str, problem: object) -> int:
    """Print one line on standard error; the exit status of bad input."""
    print(f"{where}: {' '.join(str(problem).split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def main(argv: list[str] | None = None) -> int:
    """Run ``abyssal`` with ``argv`` (this process's arguments by default); the exit status.

    0 is success, 2 bad input (one line on standard error says what and how to mend it), 130 an interrupt,
    141 a pipe that was closed.  Whatever else a verb returns or raises is its own.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        import abyssal

        print(f"abyssal {abyssal.__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        return _fail("abyssal", f"there is no verb {verb!r}: choose one of {', '.join(VERBS)}")
    try:
        status = _verb(verb)(rest)
        sys.stdout.flush()
        return status
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _fail(f"abyssal {verb}", error)
    except BrokenPipeError:  # the reader has seen enough: `abyssal info MODEL | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush at exit complains again
        return EXIT_PIPE_CLOSED
    except KeyboardInterrupt:
        print(f"abyssal {verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
