"""``abyssal generate``: text as it becomes certain, and what reaches the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.checkpoint.hf import save_model
from abyssal.cli.generate import stream_text
from abyssal.cli.main import main
from abyssal.engine import generate as engine
from abyssal.text.tokenizer import BOS, EOS, Tokenizer, train_bpe
from abyssal.train.config import TrainConfig
from abyssal.train.data import fitted
from abyssal.train.loop import build_model
from tests.unit.train.test_step import SPEC

BYTES = train_bpe(["a"], 262)
"""A token for each byte, so that every character past ASCII is cut."""


@given(text=st.text())
def test_characters_come_whole_however_they_are_cut(text: str) -> None:
    pieces = list(stream_text(BYTES, iter(BYTES.encode(text))))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 261), max_size=12))
def test_any_tokens_give_the_text_of_the_whole(ids: list[int]) -> None:
    assert "".join(stream_text(BYTES, iter(ids))) == BYTES.decode(ids, skip_control=True)


def test_text_is_written_as_soon_as_it_is_certain() -> None:
    ids = BYTES.encode("aé東b")
    taken = []

    def tokens() -> Iterator[int]:
        for token in ids:
            taken.append(token)
            yield token

    seen = [(piece, len(taken)) for piece in stream_text(BYTES, tokens())]
    assert seen == [("a", 1), ("é", 3), ("東", 6), ("b", 7), ("", 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("generate") / "model", train_bpe(["alpha beta gamma delta"], 300)
    save_model(build_model(fitted(SPEC, tokenizer), TrainConfig()), folder, "fp32", tokenizer)
    return folder


def test_what_reaches_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt behind one bos; the names of control tokens in it are text; every option arrives."""
    given: list[Any] = []

    def generate(model, prompt_ids, max_tokens, temperature, top_p, generator) -> Iterator[int]:
        given.extend([prompt_ids, max_tokens, temperature, top_p, generator.initial_seed()])
        return iter(tokenizer.encode(" beta"))

    tokenizer = Tokenizer.from_folder(folder)
    monkeypatch.setattr(engine, "generate", generate)
    prompt = f"alpha{EOS}{BOS}"
    options = ["--max-tokens", "7", "--temperature", "0.5", "--top-p", "0.25", "--seed", "3"]
    assert main(["generate", str(folder), "--prompt", prompt, *options]) == 0
    ids = given[0]
    assert given[1:] == [7, 0.5, 0.25, 3]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == prompt
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert capsys.readouterr().out == f"{prompt} beta\n"


def test_a_tokenizer_larger_than_the_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    larger = train_bpe([Path(__file__).read_text(encoding="utf-8")], 320)
    larger.save(tmp_path)
    assert larger.vocab_size > Tokenizer.from_folder(folder).vocab_size
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert f"the tokenizer has {larger.vocab_size} token ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(1 << 64)], "--seed is 18446744073709551616"),
        (["--temperature", "nan"], "temperature: nan"),
        (["--top-p", "0"], "top_p: 0.0"),
        (["--max-tokens", "0"], "max_tokens: 0"),
        (["--max-tokens", "1000000"], "shorten the prompt or ask for fewer tokens"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), "--prompt", "a", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
