"""Held-out text takes part in nothing but validation: not in the tokenizer, not in a batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.data.batches import TokenStream
from abyssal.data.corpus import is_held_out
from abyssal.data.sources import Document
from abyssal.train import loop
from abyssal.train.evaluate import evaluate
from abyssal.train.step import Trainer
from abyssal.train.text import tokenise_corpus
from tests.unit.train.test_step import CONFIG, SPEC, small_text

FRACTION = 0.3
COMMON, OURS, THEIRS = "common", "trained", "withheld"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Documents in which one word marks the side of the split that they fall on."""
    lines = []
    for number in range(200):
        for word in (OURS, THEIRS):
            text = f"{number} {COMMON} {word} {word} {word}"
            if is_held_out(Document(text, ""), FRACTION) == (word == THEIRS):
                lines.append(json.dumps({"text": text}))
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_the_tokenizer_learns_from_the_training_side_alone(path: Path) -> None:
    text = tokenise_corpus([path], 400, held_out_fraction=FRACTION)
    assert len(text.tokenizer.encode(f" {COMMON}")) == len(text.tokenizer.encode(f" {OURS}")) == 1
    assert len(text.tokenizer.encode(f" {THEIRS}")) > 2


def test_each_side_has_its_own_tokens(path: Path) -> None:
    text = tokenise_corpus([path], 400, held_out_fraction=FRACTION)
    ours = text.tokenizer.decode(text.train_tokens.tolist())
    theirs = text.tokenizer.decode(text.held_out_tokens.tolist())
    assert ours.count(OURS) == 3 * len(text.corpus.train_documents) > 100 and THEIRS not in ours
    assert theirs.count(THEIRS) == 3 * len(text.corpus.held_out_documents) > 20 and OURS not in theirs
    assert text.train_bytes_per_token == text.corpus.train_bytes / len(text.train_tokens)


def test_a_given_tokenizer_is_taken_as_it_is(path: Path, tmp_path: Path) -> None:
    tokenizer = small_text().tokenizer
    tokenizer.save(tmp_path / "tokenizer")
    text = tokenise_corpus([path], 400, tmp_path / "tokenizer", FRACTION)
    assert text.tokenizer.content_hash() == tokenizer.content_hash()


def test_the_model_is_fitted_to_the_tokenizer() -> None:
    text = small_text()
    spec, tokenizer = text.fitted(SPEC), text.tokenizer
    assert spec.vocab_size == tokenizer.vocab_size
    assert (spec.bos_token_id, spec.eos_token_id, spec.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ) == (0, 1, 2)  # fmt: skip


def test_training_sees_training_batches_and_validation_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = small_text()
    batches: list[torch.Tensor] = []
    validated: list[tuple[np.ndarray, int | None]] = []
    plain_step = Trainer.step

    def step(self: Trainer, tokens_BX: torch.Tensor, number: int):
        batches.append(tokens_BX)
        return plain_step(self, tokens_BX, number)

    def watched(model, tokens, token_bytes, seq_len, batch_size, num_batches):
        validated.append((tokens, num_batches))
        return evaluate(model, tokens, token_bytes, seq_len, batch_size, num_batches)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(loop, "evaluate", watched)
    loop.train(text.fitted(SPEC), CONFIG, text)
    stream = TokenStream(text.train_tokens, CONFIG.seq_len, CONFIG.batch_size, CONFIG.seed, SPEC.mtp_depth)
    assert len(batches) == CONFIG.steps
    for number, tokens_BX in enumerate(batches):
        np.testing.assert_array_equal(tokens_BX.numpy(), stream.batch(number))
    assert [count for _, count in validated] == [CONFIG.validation_batches] * 2 + [None]  # steps 0, 2 and 4
    assert all(tokens is text.held_out_tokens for tokens, _ in validated)
