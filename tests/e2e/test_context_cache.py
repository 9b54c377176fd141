"""The context cache under fire: never a wrong token, never a failed request, and hits come back."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints import SMALL, random_model
from tests.support.forked import exit_status, fork
from tests.support.killed_engines import Asker
from tests.support.small_disk import mounted_disk

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def model():
    return random_model(replace(SMALL, max_positions=512))


@pytest.fixture
def asker(model, tmp_path: Path) -> Asker:
    return Asker(model, tmp_path / "cache", NUM_PROMPTS)


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").iterdir())


def _killed_again_and_again(model, folder: Path, num_prompts: int, kills: int, seed: int) -> None:
    """Each child asks new prompts, and old ones in between."""
    asker, generator = Asker(model, folder, num_prompts), random.Random(seed)
    each = num_prompts // kills
    for first in range(0, each * kills, each):
        new = list(range(first, first + each))
        numbers = [
            number for pair in zip(new, generator.choices(range(first + 1), k=each), strict=True) for number in pair
        ]
        beside = fork(lambda numbers=numbers[::-1]: asker.ask(numbers)) if generator.random() < 0.3 else None
        asker.killed(numbers, generator)
        if beside is not None:
            assert exit_status(beside) == 0, "another engine was disturbed"
    found = asker.ask(range(num_prompts))
    assert any(found), "nothing of the killed ones was left"
    assert asker.ask(range(num_prompts)) == asker.whole, "hits come back"


def test_engines_are_killed_while_they_write(model, tmp_path: Path) -> None:
    _killed_again_and_again(model, tmp_path / "cache", num_prompts=16, kills=4, seed=0)


@pytest.mark.slow
def test_engines_are_killed_during_200_writes(model, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    _killed_again_and_again(model, tmp_path / "cache", num_prompts=120, kills=30, seed=seed)  # two pages a prompt


def test_engines_share_a_folder_at_once(asker: Asker) -> None:
    children = [fork(lambda turn=turn: asker.ask([*range(turn, NUM_PROMPTS), *range(turn)])) for turn in range(3)]
    assert [exit_status(child) for child in children] == [0, 0, 0]
    assert asker.ask(range(NUM_PROMPTS)) == asker.whole


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "index", "nonsense"])
def test_damaged_files_are_misses(asker: Asker, tmp_path: Path, damage: str) -> None:
    folder, generator = tmp_path / "cache", random.Random(1)
    assert asker.ask(range(NUM_PROMPTS)) == [0] * NUM_PROMPTS
    for path in segments(folder):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            for _ in range(4):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
        elif damage == "nonsense":
            path.write_bytes(b"\xff" * len(content))
        elif damage == "cut":
            os.truncate(path, len(content) // 2)
        elif damage == "removed":
            path.unlink()
    if damage == "index":
        (folder / "index.sqlite").write_bytes(b"no index" * 1000)
    found = asker.ask(range(NUM_PROMPTS))
    assert all(0 <= tokens <= most for tokens, most in zip(found, asker.whole, strict=True))
    assert (found == asker.whole) == (damage == "index")
    assert asker.ask(range(NUM_PROMPTS)) == asker.whole, "what was lost has been written again"


def test_files_vanish_under_a_running_engine(asker: Asker, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    asker.ask(range(NUM_PROMPTS))
    asker.ask([*range(NUM_PROMPTS)] * 2, lambda cached: [path.unlink(missing_ok=True) for path in segments(folder)])
    asker.ask(range(NUM_PROMPTS), lambda cached: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "128k") as folder:
        yield folder


def test_a_full_disk_fails_no_request(model, small_disk: Path) -> None:
    asker = Asker(model, small_disk / "cache", NUM_PROMPTS)
    found = [asker.ask(range(NUM_PROMPTS)) for _ in range(3)]
    assert sum(found[-1]) < sum(asker.whole), "it was full"
