"""Log-probabilities in the shapes of the two APIs.

Chat: ``{"content": [{"token", "logprob", "bytes", "top_logprobs": [...]}], "refusal": null}``, with DeepSeek's
``reasoning_content`` beside ``content``.  Text completions: ``{"tokens", "token_logprobs", "top_logprobs",
"text_offset"}``, lists with one entry a token, where the first token of an echoed prompt has none (``null``).

A token that is not whole characters is named by its bytes (``bytes:\\xe2\\x82``), as OpenAI does; else those that share
a replacement character could not be told apart.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.protocol.served import ServedModel

LEAST_LOGPROB = -9999.0
"""For tokens that cannot be: JSON has no infinity.  OpenAI's own value."""


def token_name(served: ServedModel, token: int) -> str:
    """How a token is shown; ids past the tokenizer's, which a padded vocabulary has, stand for nothing."""
    piece = _bytes(served.token_bytes, token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprob(served: ServedModel, entry: TokenLogprobs) -> dict[str, Any]:
    """One token in chat's shape."""
    top = [_chat_entry(served, token, logprob) for token, logprob in entry.top]
    return {**_chat_entry(served, entry.token_id, entry.logprob), "top_logprobs": top}


class TextLogprobs:
    """Text completions' shape for one choice, piece by piece: offsets go on from piece to piece."""

    def __init__(self, served: ServedModel, num_top: int) -> None:
        """``num_top``: how many of the likeliest tokens each position lists; the token itself comes besides."""
        self._served = served
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def piece(self, tokens: Sequence[int], entries: Iterable[TokenLogprobs | None]) -> dict[str, Any]:
        """Of consecutive tokens.

        Args:
            entries: one a token; None where nothing is known of it.
        """
        body: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, entries, strict=True):
            body["tokens"].append(token_name(self._served, token))
            body["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            body["top_logprobs"].append(None if entry is None else self._top(entry))
            body["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(_bytes(self._served.shown_bytes, token)))
        return body

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """By name, likeliest first; of tokens with one name the likelier."""
        named: dict[str, float] = {}
        for token, logprob in (*entry.top[: self._num_top], (entry.token_id, entry.logprob)):
            named.setdefault(token_name(self._served, token), _finite(logprob))
        return named


def join(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several pieces in either shape as one."""
    joined: dict[str, Any] = {}
    for piece in pieces:
        for name, values in piece.items():
            if values is None:
                joined.setdefault(name, None)
            else:
                joined[name] = [*(joined.get(name) or []), *values]
    return joined


def _chat_entry(served: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    piece = _bytes(served.token_bytes, token)
    return {"token": token_name(served, token), "logprob": _finite(logprob), "bytes": list(piece)}


def _bytes(pieces: Sequence[bytes], token: int) -> bytes:
    return pieces[token] if token < len(pieces) else b""


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
