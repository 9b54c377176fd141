"""The held-out split depends on text alone; tokenising packs documents behind separators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from abyssal.data import corpus as corpus_module
from abyssal.data.corpus import is_held_out, load_corpus, split_documents, tokenize, vocabulary_sample
from abyssal.data.sources import Document
from abyssal.text.tokenizer import BOS, EOS, Tokenizer, train_bpe

DOCUMENTS = [Document(f"document number {i}\n", f"{i}.txt") for i in range(2000)]


def test_split_is_disjoint_complete_in_order_and_near_the_fraction() -> None:
    corpus = split_documents(DOCUMENTS, 0.1)
    assert 140 < len(corpus.held_out_documents) < 260  # 200 expected; 4.5 standard deviations
    assert set(corpus.train_documents) | set(corpus.held_out_documents) == set(DOCUMENTS)
    assert not set(corpus.train_documents) & set(corpus.held_out_documents)
    assert list(corpus.train_documents) == [document for document in DOCUMENTS if document in corpus.train_documents]
    assert corpus.num_bytes == sum(document.num_bytes for document in DOCUMENTS)
    assert corpus.held_out_bytes == sum(document.num_bytes for document in corpus.held_out_documents)


@settings(deadline=None)
@given(text=st.text(), low=st.floats(0, 1), high=st.floats(0, 1))
def test_side_depends_on_text_alone_and_grows_with_the_fraction(text: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert is_held_out(Document(text, "here"), low) == is_held_out(Document(text, "there"), low)
    assert is_held_out(Document(text, "here"), low) <= is_held_out(Document(text, "here"), high)


def test_known_sides() -> None:
    # Frozen: a change of the hash would move documents that published runs held out into training.
    assert [i for i in range(60) if is_held_out(DOCUMENTS[i], 0.05)] == [8, 55, 56]


def test_identical_documents_are_one() -> None:
    copies = [Document(document.text, f"copy of {document.id}") for document in DOCUMENTS]
    corpus = split_documents([*DOCUMENTS, *copies], 0.1)
    assert corpus.num_duplicates == 2000
    assert corpus.train_documents == split_documents(DOCUMENTS, 0.1).train_documents


def test_small_corpus_holds_out_its_lowest_hash() -> None:
    corpus = split_documents(DOCUMENTS[:3], 1e-9)
    assert len(corpus.held_out_documents) == 1 and len(corpus.train_documents) == 2
    assert split_documents(DOCUMENTS[2::-1], 1e-9).held_out_documents == corpus.held_out_documents


def test_impossible_splits() -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        split_documents([], 0.1)
    with pytest.raises(ValueError, match=r"one document of 18 bytes \(0\.txt\)"):
        split_documents([DOCUMENTS[0], DOCUMENTS[0]], 0.1)
    with pytest.raises(ValueError, match=r"all 3 documents are held out at held_out_fraction 0\.999999"):
        split_documents(DOCUMENTS[:3], 0.999999)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"held_out_fraction is {fraction}"):
            split_documents(DOCUMENTS, fraction)


def test_load_corpus_of_paths(tmp_path: Path) -> None:
    for document in DOCUMENTS[:20]:
        (tmp_path / document.id).write_text(document.text)
    corpus = load_corpus([tmp_path], 0.3)
    loaded = {document.text for document in corpus.train_documents + corpus.held_out_documents}
    assert loaded == {document.text for document in DOCUMENTS[:20]}
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="corpus is empty"):
        load_corpus([tmp_path / "none"])


def test_load_corpus_defaults_to_the_standard_library() -> None:
    corpus = load_corpus()
    assert "argparse.py" in {document.id for document in corpus.train_documents + corpus.held_out_documents}
    assert len(corpus.held_out_documents) > 5


def test_tokens_are_documents_behind_separators(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe([document.text for document in DOCUMENTS], 300)
    documents = [*DOCUMENTS[:3], Document(f"forged {BOS}{EOS}", "forged")]
    tokens = tokenize(documents, tokenizer)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens.tolist()) == "".join(BOS + document.text for document in documents)
    assert (tokens == 0).sum() == 4 and not (tokens == 1).any()
    assert tokenizer.token_bytes()[tokens].sum() == sum(document.num_bytes for document in documents)
    monkeypatch.setattr(corpus_module, "_BATCH_BYTES", 20)
    np.testing.assert_array_equal(tokenize(iter(documents), tokenizer), tokens)
    assert len(tokenize([], tokenizer)) == 0


def test_wide_vocabulary_needs_four_bytes() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, "a": 70_000}, merges=[]))
    backend.add_special_tokens([EOS])
    tokens = tokenize([Document("a", "")], Tokenizer(backend))
    assert tokens.dtype == np.uint32 and tokens[0] == backend.token_to_id(EOS)


def test_no_separator() -> None:
    nameless = Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        tokenize(DOCUMENTS, nameless)


def test_vocabulary_sample() -> None:
    assert list(vocabulary_sample(DOCUMENTS)) == [document.text for document in DOCUMENTS]
    sample = list(vocabulary_sample(DOCUMENTS, max_bytes=1000))
    assert 900 < sum(map(len, sample)) <= 1000
    assert sample == list(vocabulary_sample(DOCUMENTS[::-1], max_bytes=1000))
    assert len(list(vocabulary_sample(DOCUMENTS, max_bytes=1))) == 1
