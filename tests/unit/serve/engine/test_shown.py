"""A folder whose tokenizer hides the marks of reasoning: the engine shows them, and its pages stay the folder's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from abyssal.text.reasoning import THINK_END
from abyssal.text.tokenizer import Tokenizer
from tests.support.control_model import write_control_model
from tests.support.engine_service import RunningService, prepared

PROMPT = tuple(range(300, 500))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_control_model(tmp_path_factory.mktemp("control") / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Over a disk cache that the offline engine has filled."""
    pages = str(tmp_path_factory.mktemp("disk") / "pages")
    with LLM(folder, config=EngineConfig(disk_cache_folder=pages)) as llm:
        llm.generate([PROMPT], SamplingParams(max_tokens=1))
    running = RunningService(folder, disk_cache_folder=pages)
    running.ready()
    yield running
    running.close()


def test_marks_are_shown(running: RunningService, folder: Path) -> None:
    plain = Tokenizer.from_folder(folder)
    think_end = plain.token_id(THINK_END)
    assert plain.decode([think_end], skip_control=True) == ""
    served = running.service.served
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logit_bias={think_end: 100.0})
    answer = running.answer(prepared([PROMPT[:5]], params))[0]
    assert answer.text == THINK_END * 2 == served.decode(answer.token_ids)


def test_pages_are_those_of_the_offline_engine(running: RunningService) -> None:
    assert running.answer(prepared([PROMPT], SamplingParams(max_tokens=1)))[0].cached_tokens == 192
