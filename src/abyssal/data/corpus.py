"""A corpus: documents without duplicates, split into training and held-out text, and turned into token ids.

The split looks at the hash of a document's text and nothing else, so a document stays on its side whatever its path,
its neighbours, the machine or the run; and since identical documents are one document, no held-out text is also
trained on word for word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from abyssal.data.sources import Document, read_sources, standard_library
from abyssal.text.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 23


@dataclass(frozen=True)
class Corpus:
    """Two disjoint sets of documents."""

    train_documents: tuple[Document, ...]
    held_out_documents: tuple[Document, ...]
    num_duplicates: int = 0
    """Documents that were left out because their text had been seen."""

    @cached_property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training text."""
        return sum(document.num_bytes for document in self.train_documents)

    @cached_property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return sum(document.num_bytes for document in self.held_out_documents)

    @property
    def num_bytes(self) -> int:
        return self.train_bytes + self.held_out_bytes


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether the document's hash, read as a number in [0, 1), is below ``fraction``."""
    return _position(document) < fraction


def load_corpus(paths: str | Path | Iterable[str | Path] | None = None, held_out_fraction: float = 0.05) -> Corpus:
    """Read the paths (see :func:`read_sources`); None reads the standard library's source.

    ``held_out_fraction`` is the expected share of documents that are held out.  If a small corpus has no document below
    it, the one with the lowest hash is held out.

    Raises:
        ValueError: no text; only one distinct document, so none would be left for one side; every document held out;
            ``held_out_fraction`` outside (0, 1); and what :func:`read_sources` raises.
    """
    source = standard_library() if paths is None else read_sources(paths)
    return split_documents(source, held_out_fraction)


def split_documents(documents: Iterable[Document], held_out_fraction: float) -> Corpus:
    """Drop documents whose text came before, and split the rest; order is kept.  Errors as :func:`load_corpus`."""
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; give a share between 0 and 1, such as 0.05")
    distinct: dict[bytes, Document] = {}
    total = 0
    for document in documents:
        total += 1
        distinct.setdefault(document.digest, document)
    if not distinct:
        raise ValueError("the corpus is empty: no file given holds any text")
    if len(distinct) == 1:
        (only,) = distinct.values()
        raise ValueError(
            f"the corpus is one document of {only.num_bytes} bytes ({only.id}); none can be held out while training on "
            "the rest, so give more text, or the same text as several documents"
        )
    held_out = [document for document in distinct.values() if is_held_out(document, held_out_fraction)]
    held_out = held_out or [min(distinct.values(), key=_position)]
    if len(held_out) == len(distinct):
        raise ValueError(
            f"all {len(distinct)} documents are held out at held_out_fraction {held_out_fraction}; lower it"
        )
    left_out = {document.digest for document in held_out}
    train = (document for digest, document in distinct.items() if digest not in left_out)
    return Corpus(tuple(train), tuple(held_out), total - len(distinct))


def vocabulary_sample(documents: Sequence[Document], max_bytes: int = 64_000_000) -> Iterator[str]:
    """Texts to train a tokenizer on: all of them, or, of a larger corpus, the documents with the lowest hashes (a
    sample as good as random, and the same on every machine) until ``max_bytes``; at least one.
    """
    if sum(document.num_bytes for document in documents) <= max_bytes:
        yield from (document.text for document in documents)
        return
    taken = 0
    for document in sorted(documents, key=lambda document: document.digest):
        taken += document.num_bytes
        if taken > max_bytes and taken > document.num_bytes:
            return
        yield document.text


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of the documents one after another, each behind a separator: [num_tokens], uint16 or uint32.

    The separator is the beginning-of-sentence token, or where there is none the end-of-sentence token.  Text that
    spells a control token stays text.

    Raises:
        ValueError: the tokenizer names neither token.
    """
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is None:
        raise ValueError("the tokenizer names neither bos_token nor eos_token; set one in tokenizer_config.json")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts = [np.empty(0, dtype)]
    for texts in _batched_by_size(documents):
        parts.extend(np.array([separator, *ids], dtype) for ids in tokenizer.encode_batch(texts))
    return np.concatenate(parts)


def _position(document: Document) -> float:
    return int.from_bytes(document.digest[:8], "big") / 2**64


def _batched_by_size(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in lists of about ``_BATCH_BYTES``: enough to keep all cores busy, little enough to hold twice."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
