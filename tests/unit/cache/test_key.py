"""Keys of pages: whatever two engines do not have in common sets their pages apart; digests are computed once."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from abyssal.cache import key
from abyssal.cache.key import FileDigests, PageSpace, model_files
from abyssal.cache.pages import PAGE
from abyssal.cache.prefix import Path as ComputedBy

SPACE = PageSpace(weights="w", dtype="bfloat16", tokenizer="t", layout="27x576", implementation="1")
TOKENS = list(range(3 * PAGE + 5))


@pytest.mark.parametrize("name", [field.name for field in fields(PageSpace)])
def test_every_part_of_a_space_sets_it_apart(name: str) -> None:
    keys = SPACE.keys(TOKENS, "prompt")
    assert len(keys) == 3 and keys == replace(SPACE).keys(TOKENS, "prompt")
    assert not set(keys) & set(replace(SPACE, **{name: "other"}).keys(TOKENS, "prompt"))


def test_users_and_paths_have_nothing_in_common() -> None:
    spaces: list[tuple[ComputedBy, str]] = [("prompt", ""), ("decode", ""), ("prompt", "alice"), ("prompt", "bob")]
    keys = [key for path, namespace in spaces for key in SPACE.keys(TOKENS, path, namespace)]
    assert len(set(keys)) == 4 * 3
    moved = replace(SPACE, weights="wb", dtype="float16")  # fields are not run together
    assert moved.seed("prompt") != replace(SPACE, weights="w", dtype="bfloat16").seed("prompt")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder whose files have been as they are for a while."""
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "notes.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_a_digest_is_computed_once_and_follows_the_content(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key, "_SETTLED_NANOSECONDS", 0)
    computed = []
    digest = key.file_digest
    monkeypatch.setattr(key, "file_digest", lambda file, name: computed.append(file.name) or digest(file, name))
    memory = tmp_path / "cache" / "digests.json"
    first = FileDigests(memory).of(model_files(model))
    assert len(computed) == 3
    assert FileDigests(memory).of(reversed(model_files(model))) == first and len(computed) == 3

    weights = model / "model-2.safetensors"
    status = weights.stat()
    weights.write_text("model-3.safetensors")  # as long as before
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = FileDigests(memory).of(model_files(model))
    assert second != first and len(computed) == 4
    weights.rename(model / "model-3.safetensors")
    assert FileDigests(memory).of(model_files(model)) not in (first, second)

    memory.write_text("{")
    assert FileDigests(memory).of(model_files(model)) and len(computed) >= 7, "what was lost is computed again"


def test_no_more_digests_are_remembered_than_so_many(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key, "_SETTLED_NANOSECONDS", 0)
    monkeypatch.setattr(key, "MOST_REMEMBERED", 4)
    memory = tmp_path / "cache" / "digests.json"
    for version in range(5):
        (model / "model-1.safetensors").write_text(f"version {version}")
        FileDigests(memory).of(model_files(model))
    remembered = json.loads(memory.read_bytes())
    assert len(remembered) == 4 and set(key.identities(model_files(model))) <= remembered.keys()


def test_a_file_that_has_just_changed_is_not_remembered(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    FileDigests(memory).of(model_files(model))
    assert not memory.exists()


def test_a_memory_that_cannot_be_written_costs_time_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "_SETTLED_NANOSECONDS", 0)
    (model / "file").touch()
    digests = FileDigests(model / "file" / "digests.json")
    assert digests.of(model_files(model)) == digests.of(model_files(model))
