"""Text made ready for training: a corpus, the tokenizer that belongs to it, and the ids of both sides of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from abyssal.data.corpus import Corpus, load_corpus, tokenize, vocabulary_sample
from abyssal.spec.model import ModelSpec
from abyssal.text.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class TokenisedCorpus:
    """A corpus as token ids."""

    corpus: Corpus
    tokenizer: Tokenizer
    train_tokens: np.ndarray
    held_out_tokens: np.ndarray

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token id stands for."""
        return self.tokenizer.token_bytes()

    @property
    def train_bytes_per_token(self) -> float:
        """Of the training text: what turns its loss into bits per byte."""
        return self.corpus.train_bytes / len(self.train_tokens)

    def fitted(self, spec: ModelSpec) -> ModelSpec:
        """``spec`` with this tokenizer's vocabulary and control tokens."""
        return replace(
            spec,
            vocab_size=self.tokenizer.vocab_size,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )


def tokenise_corpus(
    paths: Sequence[Path] | None,
    vocab_size: int,
    tokenizer_folder: Path | None = None,
    held_out_fraction: float = 0.05,
) -> TokenisedCorpus:
    """Read text, train a tokenizer on its training side (or read one), and tokenise both sides.

    Args:
        paths: files and folders; None reads the standard library's source.
        vocab_size: of the tokenizer to be trained; a small corpus may give fewer tokens.
        tokenizer_folder: a folder with ``tokenizer.json`` to use instead.

    Raises:
        ValueError: no text, or files that cannot be read.
    """
    corpus = load_corpus(paths, held_out_fraction)
    if tokenizer_folder is not None:
        tokenizer = Tokenizer.from_folder(tokenizer_folder)
    else:
        tokenizer = train_bpe(vocabulary_sample(corpus.train_documents), vocab_size)
    return TokenisedCorpus(
        corpus, tokenizer, tokenize(corpus.train_documents, tokenizer), tokenize(corpus.held_out_documents, tokenizer)
    )
