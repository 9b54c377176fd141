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
    "doctor": "what this machine has, and which implementation each operator uses",
    "info": "size, cost and memory of a model, from its name or its folder",
    "convert": "rewrite a model folder in BF16, FP8 or FP32",
    "prepare": "turn text into tokens that runs train on",
    "train": "train a model on text",
    "sft": "fine-tune a model on conversations",
    "schedule": "draw a pipeline schedule, and what it costs in time and memory",
    "report": "compare runs on one HTML page",
    "generate": "let a model write",
    "chat": "talk to a model",
    "cache": "what the context cache on disk holds, and forgetting it",
    "serve": "answer the OpenAI, DeepSeek and Anthropic APIs with a model",
    "keys": "who may use a server, and for how much",
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

    0 is success, 2 bad input or what the operating system refuses, such as room on a disk (one line on standard error
    says what and how to mend it), 130 an interrupt, 141 a pipe that was closed.  Whatever else a verb returns or raises
    is its own.
    """
    arguments = sys.argv[1:] if argv is None else argv
    where = "abyssal"
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            status = 0
        elif arguments[0] == "--version":
            import abyssal

            print(f"abyssal {abyssal.__version__}")
            status = 0
        else:
            verb, *rest = arguments
            if verb not in VERBS:
                return _fail(where, f"there is no verb {verb!r}: choose one of {', '.join(VERBS)}")
            where = f"abyssal {verb}"
            status = _verb(verb)(rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough: `abyssal info MODEL | head -1`
        _discard_output()
        return EXIT_PIPE_CLOSED
    except (ValueError, OSError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # standard output itself is what has no room
            _discard_output()
        return _fail(where, description(error))
    except KeyboardInterrupt:
        print(f"{where}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def description(error: Exception) -> str:
    """What the operating system refused, without its number; the message of any other error."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _discard_output() -> None:
    """Send what is still to be written to standard output nowhere, or the last flush at exit fails again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
