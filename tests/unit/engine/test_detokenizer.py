"""Incremental text: put together it is the text of all tokens, and no piece ends inside a character."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.engine.detokenizer import Detokenizer
from abyssal.text.tokenizer import Tokenizer, train_bpe

TEXT = "naïve café 中文文本 emoji 🙂🙂 e\u0301 \ufffd plain words words words "


@cache
def _tokenizer() -> Tokenizer:
    return train_bpe([TEXT * 4], 300)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 310), max_size=30) | st.text(TEXT, max_size=30).map(lambda text: _tokenizer().encode(text))
)
def test_pieces_make_the_text_of_all_tokens(ids: list[int]) -> None:
    """Any ids: also bytes that are no UTF-8, control tokens, and ids past the vocabulary."""
    for skip_control in (False, True):
        detokenizer = Detokenizer(_tokenizer().byte_strings(skip_control=skip_control))
        pieces = [detokenizer.push(token) for token in ids]
        assert "".join(pieces) + detokenizer.finish() == _tokenizer().decode(ids, skip_control=skip_control)


@given(st.text("é中🙂a", min_size=1, max_size=10))
def test_no_piece_holds_half_a_character(text: str) -> None:
    byte_strings = [bytes([byte]) for byte in range(256)]
    detokenizer = Detokenizer(byte_strings)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer([b"a\xe4\xb8", b"\xad", b"b"])
    assert [detokenizer.push(0), detokenizer.finish()] == ["a", "\ufffd"]
    assert [detokenizer.push(0), detokenizer.push(2)] == ["a", "\ufffdb"]
    assert [detokenizer.push(0), detokenizer.push(1), detokenizer.finish()] == ["a", "中", ""]


def test_what_is_no_token_of_it_is_no_text() -> None:
    detokenizer = Detokenizer([b"a"])
    assert [detokenizer.push(token) for token in (1, -1, -9)] == [""] * 3
