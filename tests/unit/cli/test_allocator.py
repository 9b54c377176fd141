"""Freed memory is taken again without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from abyssal.cli.allocator import keep_freed_memory

PROGRAM = """
import resource, sys
from abyssal.cli.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("not glibc"); raise SystemExit
for round in range(11):
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(48 << 20)
    for page in range(0, len(block), 4096):
        block[page] = 1
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> str:
    command = [sys.executable, "-c", PROGRAM, mode]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_blocks_are_reused() -> None:
    kept = faults("keep")
    if kept == "not glibc":
        pytest.skip("the allocator is not glibc's")
    assert int(kept) < 0.1 * int(faults("plain"))


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
