"""The disk cache of a model folder: on by default, found again after a restart, and nobody else's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.cache.folder import default_folder
from abyssal.cache.key import FileDigests, Stopped, model_files
from abyssal.checkpoint.hf import save_model
from abyssal.engine import disk
from abyssal.engine import opening as opening_module
from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import RequestOutput, SamplingParams
from abyssal.text.tokenizer import train_bpe
from tests.support.checkpoints import SMALL, random_model

SPEC = replace(SMALL, vocab_size=300, max_positions=512)
PARAMS = SamplingParams(temperature=0.9, seed=1, max_tokens=6, logprobs=0, ignore_eos=True)
PROMPT = [(position * position + 3) % 290 for position in range(200)]
TEXTS = ("hello world", "hello there, world")


def make_model(folder: Path, seed: int = 0) -> Path:
    save_model(random_model(SPEC, seed=seed), folder, "fp32", train_bpe(TEXTS, 262))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(deterministic=True, disk_cache_folder=str(tmp_path / "cache"))


def ask(model: Path, config: EngineConfig, **options: Any) -> RequestOutput:
    with LLM(model, config=config, **options) as llm:
        assert llm.stored is None or llm.stored.wait(20)
        return llm.generate([PROMPT], PARAMS)[0]


def test_hits_after_a_restart(model: Path, config: EngineConfig) -> None:
    outputs = [ask(model, config) for _ in range(2)]
    assert [output.cached_tokens for output in outputs] == [0, 192]
    off = ask(model, EngineConfig(deterministic=True, disk_cache=False))
    assert off.cached_tokens == 0
    assert len({(output.token_ids, output.logprobs) for output in (*outputs, off)}) == 1
    code = (
        "import sys, abyssal; from tests.unit.engine.test_disk import PARAMS, PROMPT\n"
        "config = abyssal.EngineConfig(deterministic=True, disk_cache_folder=sys.argv[2])\n"
        "llm = abyssal.LLM(sys.argv[1], config=config)\n"
        "assert llm.stored.wait(20)\n"
        "for prompt in (PROMPT, PROMPT[::-1]): print(llm.generate([prompt], PARAMS)[0].cached_tokens)"
    )  # that is not closed, so that the end of the process has to write what it took
    command = [sys.executable, "-c", code, str(model), str(config.disk_cache_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["192", "0"]
    with LLM(model, config=config) as llm:
        assert llm.stored is not None and llm.stored.wait(20)
        assert llm.generate([PROMPT[::-1]], PARAMS)[0].cached_tokens == 192


def test_everything_that_pages_depend_on_sets_them_apart(
    model: Path, config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(model, config)
    others = {
        "weights": dict(model=make_model(tmp_path / "other weights", seed=1)),
        "dtype": dict(dtype=torch.bfloat16),
        "drafts": dict(config=replace(config, num_drafts=1)),
        "pages": dict(config=replace(config, page_dtype="fp8")),
    }
    for name, different in others.items():
        assert ask(**{"model": model, "config": config, **different}).cached_tokens == 0, name
    other = shutil.copytree(model, tmp_path / "other tokenizer")
    train_bpe([*TEXTS, "other"], 263).save(other)
    assert ask(other, config).cached_tokens == 0
    copy = shutil.copytree(model, tmp_path / "copy")
    assert ask(copy, config).cached_tokens == 192, "the same model elsewhere"
    program = tmp_path / "kernel.py"
    program.write_text("changed")
    monkeypatch.setattr(disk, "program_files", lambda: [program])
    assert ask(model, config).cached_tokens == 0, "another program"


@pytest.mark.parametrize("moment", ["while it is loaded", "before it is digested"])
def test_files_that_change_under_a_load_are_nobodys(
    model: Path, config: EngineConfig, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are of the weights that were read, and the digest would be of the new ones."""
    changed, new = shutil.copytree(model, tmp_path / "changed"), make_model(tmp_path / "new", seed=1)
    load, digest = opening_module.load_model, FileDigests.of

    def replace_files() -> None:
        for file in model_files(new):
            os.replace(shutil.copy(file, tmp_path / "partial"), changed / file.name)

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        replace_files()
        return found

    def of(self: FileDigests, files: Any, stopped: Any) -> str:
        replace_files()
        return digest(self, files, stopped)

    with monkeypatch.context() as patch:
        if moment == "while it is loaded":
            patch.setattr(opening_module, "load_model", loaded)
        else:
            patch.setattr(FileDigests, "of", of)
        with LLM(changed, config=config) as llm:
            assert llm.stored is not None and not llm.stored.wait(20)
            llm.generate([PROMPT], PARAMS)
    outputs = [ask(folder, config) for folder in (changed, new)]
    assert [output.cached_tokens for output in outputs] == [0, 192] and outputs[0].logprobs == outputs[1].logprobs


def test_the_programs_own_files_are_known() -> None:
    names = {path.name for path in disk.program_files()}
    assert {"attention.py", "fp8_entries.py", "rope.py", "recipe.py"} <= names and "core.py" not in names
    assert "_native.so" in names or disk.native.isa_name() is None


def test_the_default_is_the_users_own_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with LLM(model) as llm:
        assert llm.stored is not None and llm.stored.wait(20)
    assert default_folder() == tmp_path / "home" / "abyssal" / "pages" and default_folder().is_dir()
    assert (default_folder().stat().st_mode & 0o777) == 0o700


def test_a_default_folder_that_cannot_be_used_turns_it_off_with_a_warning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask(model, EngineConfig()).error is None
    assert len(caplog.records) == 1 and "pages are not kept on disk" in caplog.text


def test_a_folder_that_was_named_and_cannot_be_used_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk_cache_folder: .*holds files that are not a cache's"):
        LLM(model, config=EngineConfig(disk_cache_folder=str(model)))
    with pytest.raises(ValueError, match="disk_cache_bytes: 0 must be above 0"):
        LLM(model, config=EngineConfig(disk_cache_folder=str(tmp_path / "c"), disk_cache_bytes=0))
    with pytest.raises(ValueError, match="disk_cache_folder: the weights of a model in memory"):
        LLM(random_model(SPEC), config=EngineConfig(disk_cache_folder=str(tmp_path / "c")))
    assert LLM(random_model(SPEC)).stored is None


def test_its_size_is_kept(model: Path, config: EngineConfig) -> None:
    config = replace(config, disk_cache_bytes=40_000, deterministic=False)  # about two pages
    with LLM(model, config=config) as llm:
        for turn in range(6):
            llm.generate([[*PROMPT[turn:], *PROMPT]], PARAMS)
    segments = Path(str(config.disk_cache_folder)) / "segments"
    assert sum(path.stat().st_size for path in segments.iterdir()) <= 80_000


def test_a_large_models_digest_delays_nothing_and_is_given_up_at_the_end(
    model: Path, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def endless(self: FileDigests, files: object, is_stopped: Any) -> str:
        begun.set()
        while not is_stopped():
            time.sleep(1e-3)
        stopped.set()
        raise Stopped

    monkeypatch.setattr(FileDigests, "of", endless)
    llm = LLM(model, config=config)
    assert llm.generate([PROMPT], PARAMS)[0].cached_tokens == 0
    assert begun.is_set() and not stopped.is_set()
    llm.close()
    assert stopped.is_set()
    assert llm.generate([PROMPT], PARAMS)[0].error is None, "it goes on without the disk"


def test_a_digest_that_is_stopped_keeps_what_was_read(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("abyssal.cache.key._SETTLED_NANOSECONDS", 0)
    files = model_files(model)
    digests = FileDigests(tmp_path / "digests.json", num_threads=1)
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2  # in the second file: the first is one block and its end

    with pytest.raises(Stopped):
        digests.of(files, stopped)
    memory = tmp_path / "digests.json"
    assert memory.read_text().count(":") and os.stat(memory).st_mode & 0o777 == 0o600
    assert digests.of(files) == FileDigests(tmp_path / "other.json").of(files)
