"""Prompts from the command line, from a file, or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

STDIN = "-"


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The prompts of ``--prompt`` and ``--prompt-file``, in this order.

    A prompt of ``-`` is the whole of standard input.  A file (``-``: standard input) has a prompt a line, or is JSON
    lines with a field ``prompt``: one named ``*.jsonl``, or standard input whose first line is such an object.

    Raises:
        ValueError: no prompt, standard input asked for twice, or a line without a prompt.
        OSError: a file that cannot be read.
    """
    if not given and file is None:
        raise ValueError("no prompt; give --prompt TEXT, or --prompt-file FILE (- is standard input)")
    if [*given, file].count(STDIN) > 1:
        raise ValueError("standard input can be read once; give one -")
    prompts = [_stdin() if prompt == STDIN else prompt for prompt in given]
    if file is not None:
        prompts += _prompts_of(file)
    return prompts


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 ({error.reason} at byte {error.start})") from error


def _prompts_of(file: str) -> list[str]:
    if file == STDIN:
        name, text = "standard input", _stdin()
        as_json = _is_record(text.partition("\n")[0])
    else:
        name, as_json = file, file.endswith(".jsonl")
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name}: holds no prompt")
    return [_prompt(name, number, line) if as_json else line.removesuffix("\r") for number, line in lines]


def _is_record(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and "prompt" in value


def _prompt(name: str, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}:{number}: not JSON ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{name}:{number}: must be an object with "prompt", a text')
    return prompt
