"""Batches: each target once an epoch, a function of seed and step, and bytes counted exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.batches import TokenStream, bits_per_byte, held_out_batches, target_bytes
from abyssal.data.corpus import tokenize
from abyssal.data.sources import Document
from abyssal.text.tokenizer import train_bpe

sizes = {"seq_len": st.integers(1, 9), "batch_size": st.integers(1, 5), "extra": st.integers(0, 2)}


@settings(deadline=None)
@given(**sizes, spare=st.integers(0, 60), seed=st.integers(0, 3))
def test_rows_are_slices_and_an_epoch_sees_each_target_at_most_once(
    seq_len: int, batch_size: int, extra: int, spare: int, seed: int
) -> None:
    tokens = np.arange(seq_len + 1 + extra + spare, dtype=np.uint16)
    stream = TokenStream(tokens, seq_len, batch_size, seed, extra)
    steps = -(-2 * stream.rows_per_epoch // batch_size)
    rows = np.concatenate([stream.batch(step) for step in range(steps)])
    assert rows.dtype == np.int64 and rows.shape == (steps * batch_size, seq_len + 1 + extra)
    assert (np.diff(rows) == 1).all()
    for epoch in range(2):
        seen = rows[epoch * stream.rows_per_epoch : (epoch + 1) * stream.rows_per_epoch, 1 : seq_len + 1]
        assert len(np.unique(seen)) == seen.size
        assert seen.size > len(tokens) - 1 - extra - 2 * seq_len  # less than a row lost at either end
    assert stream.tokens_per_batch == batch_size * seq_len
    assert stream.epoch(steps) == steps * batch_size / stream.rows_per_epoch


def test_batch_depends_on_seed_and_step_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    stream = TokenStream(tokens, 8, 4, seed=1)
    in_order = [stream.batch(step) for step in range(70)]  # more than two epochs
    fresh = TokenStream(tokens, 8, 4, seed=1)
    for step in (69, 0, 31, 30, 5):
        np.testing.assert_array_equal(fresh.batch(step), in_order[step])
    assert not np.array_equal(TokenStream(tokens, 8, 4, seed=2).batch(0), in_order[0])
    first, second = (np.concatenate(in_order[a:b])[:, 0] for a, b in ((0, 31), (31, 62)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.sort(first))


@settings(deadline=None)
@given(**sizes, spare=st.integers(0, 60))
def test_held_out_targets_are_all_there_once_in_order(seq_len: int, batch_size: int, extra: int, spare: int) -> None:
    tokens = np.arange(seq_len + 1 + extra + spare, dtype=np.uint32)
    batches = list(held_out_batches(tokens, seq_len, batch_size, extra=extra))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 0 < len(batches[-1]) <= batch_size
    rows = np.concatenate(batches)
    assert rows.shape[1] == seq_len + 1 + extra and (np.diff(rows) == 1).all()
    targets = rows[:, 1 : seq_len + 1].ravel()
    np.testing.assert_array_equal(targets, np.arange(1, len(targets) + 1))
    assert len(tokens) - 1 - len(targets) < seq_len + extra


def test_fewer_held_out_batches_spread_over_the_text() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    batches = list(held_out_batches(tokens, 10, 2, num_batches=2))
    np.testing.assert_array_equal(np.concatenate(batches)[:, 0], [0, 250, 500, 750])
    assert sum(map(len, held_out_batches(tokens, 10, 2, num_batches=99))) == 100


def test_worked_example_of_bits_per_byte() -> None:
    token_bytes = np.array([0, 1, 5])
    (batch,) = held_out_batches(np.array([0, 1, 2], np.uint16), seq_len=2, batch_size=8)
    assert target_bytes(batch, 2, token_bytes) == len("héllo".encode()) == 6
    assert bits_per_byte(1.5 + 2.2, 6) == pytest.approx(0.8897, abs=1e-4)


def test_uniform_guess_costs_log2_of_the_vocabulary_a_token() -> None:
    # With bytes as tokens and one document, guessing uniformly over 256 bytes is 8 bits per byte exactly.
    tokenizer = train_bpe(["é"], 262)
    text = "Straße, 東京; " * 20
    tokens = tokenize([Document(text, "")], tokenizer)
    nats = num_bytes = 0.0
    for batch in held_out_batches(tokens, seq_len=1, batch_size=64):
        nats += math.log(256) * batch[:, 1].size
        num_bytes += target_bytes(batch, 1, tokenizer.token_bytes())
    assert num_bytes == len(text.encode())
    assert bits_per_byte(nats, int(num_bytes)) == pytest.approx(8, abs=1e-12)


def test_bad_sizes_are_named() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    with pytest.raises(ValueError, match=r"training text has 10 tokens, fewer than one sequence of 9 .* \(11\)"):
        TokenStream(tokens, 9, 1, seed=0, extra=1)
    with pytest.raises(ValueError, match=r"held-out text has 10 tokens"):
        held_out_batches(tokens, 10, 1)
    for arguments, message in (((0, 1), "seq_len is 0"), ((1, 0), "batch_size is 0")):
        with pytest.raises(ValueError, match=message):
            TokenStream(tokens, *arguments, seed=0)
    with pytest.raises(ValueError, match="extra is -1"):
        held_out_batches(tokens, 1, 1, extra=-1)
    with pytest.raises(ValueError, match="num_batches is 0"):
        held_out_batches(tokens, 1, 1, num_batches=0)
    with pytest.raises(ValueError, match="step is -1"):
        TokenStream(tokens, 2, 1, seed=0).batch(-1)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, 0)
