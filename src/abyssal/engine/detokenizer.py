"""Text from tokens as they come, a character only when all of its bytes are there.

A token of byte-level BPE may end inside a character, so text is read from the bytes of the tokens by a decoder that
keeps an unfinished character back.  Cheaper and simpler than decoding a window of tokens twice, which is what
tokenizers without bytes need; all of DeepSeek's are byte-level, and Llama's pieces fall back on bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Over :meth:`~abyssal.text.tokenizer.Tokenizer.byte_strings`.  What it gives, put together, is ``decode`` of the
    tokens."""

    def __init__(self, byte_strings: Sequence[bytes]) -> None:
        self._bytes = byte_strings
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that ``token`` completes.  An id outside the vocabulary, as a padded one can give, stands for none."""
        return self._decoder.decode(self._bytes[token] if 0 <= token < len(self._bytes) else b"")

    def finish(self) -> str:
        """U+FFFD if the last character is unfinished.  Tokens may follow, as a new text."""
        return self._decoder.decode(b"", final=True)
