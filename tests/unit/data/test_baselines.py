"""Baselines against hand-computed values."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest

from abyssal.data.baselines import (
    byte_bigram_bits_per_byte,
    gzip_bits_per_byte,
    measure_baselines,
    token_unigram_bits_per_byte,
)
from abyssal.data.corpus import Corpus
from abyssal.data.sources import Document


def documents(*texts: str) -> tuple[Document, ...]:
    return tuple(Document(text, str(number)) for number, text in enumerate(texts))


def test_byte_bigram_by_hand() -> None:
    # Trained on "aab" and "b": start a 1, start b 1, aa 1, ab 1.  Held out "ab", "bb":
    # start a 2/258, ab 2/258, start b 2/258, bb 1/256 (b has no successor).
    expected = (3 * math.log2(258 / 2) + math.log2(256)) / 4
    assert byte_bigram_bits_per_byte(documents("aab", "b"), documents("ab", "bb")) == pytest.approx(expected, rel=1e-12)


def test_byte_bigram_counts_bytes_of_utf8_and_knows_nothing_untrained() -> None:
    assert byte_bigram_bits_per_byte((), documents("é東")) == pytest.approx(8, rel=1e-12)


def test_byte_bigram_of_repetition_tends_to_zero() -> None:
    assert byte_bigram_bits_per_byte(documents("ab" * 10**6), documents("ab" * 1000)) < 0.02


def test_token_unigram_by_hand() -> None:
    # Counts with one added, over 4 tokens: 3, 2, 1, 2 of 8.  Held out 0 1 2: log2 of 8/3, 4, 8; bytes 0 + 1 + 4.
    bits = token_unigram_bits_per_byte(
        np.array([0, 0, 1, 3], np.uint16), np.array([0, 1, 2], np.uint16), token_bytes=np.array([0, 1, 4, 2])
    )
    assert bits == pytest.approx((math.log2(8 / 3) + 2 + 3) / 5, rel=1e-12)


def test_gzip_is_the_gzip_of_the_concatenation() -> None:
    texts = "the same words " * 50, "and the same words again é"
    data = "".join(texts).encode()
    size = len(gzip.compress(data, 9))
    assert gzip_bits_per_byte(documents(*texts)) == size * 8 / len(data)


def test_all_of_them_together() -> None:
    corpus = Corpus(documents("aab", "b"), documents("ab", "bb"))
    tokens, table = np.array([0, 1, 1, 2], np.uint16), np.array([0, 1, 2])
    measured = measure_baselines(corpus, tokens, tokens[:2], table)
    assert measured.byte_bigram == byte_bigram_bits_per_byte(corpus.train_documents, corpus.held_out_documents)
    assert measured.token_unigram == token_unigram_bits_per_byte(tokens, tokens[:2], table)
    assert measured.gzip == gzip_bits_per_byte(corpus.held_out_documents)


def test_nothing_held_out_is_an_error() -> None:
    nothing, table = np.array([], np.uint16), np.array([0, 1])
    with pytest.raises(ValueError, match="no held-out text"):
        byte_bigram_bits_per_byte(documents("a"), ())
    with pytest.raises(ValueError, match="no held-out text"):
        token_unigram_bits_per_byte(np.array([1]), nothing, table)
    with pytest.raises(ValueError, match="no held-out text"):
        gzip_bits_per_byte(())
