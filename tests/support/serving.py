"""A served model without weights, and events as an engine would send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.chat_format import FORMATS, ChatFormat
from abyssal.text.tokenizer import Tokenizer, train_bpe

MODEL = "abyssal-test"


@cache
def tokenizer() -> Tokenizer:
    """With the control tokens of every family."""
    small = train_bpe(["the user and the assistant talk about 12 tools, é and 深\n" * 3], 300)
    chats = [ChatFormat.named(name) for name in FORMATS]
    return small.with_control_tokens([token for chat in chats for token in chat.template.format_tokens])


@cache
def served(name: str = "deepseek-v3.1", max_length: int = 4096) -> ServedModel:
    """A model of the family."""
    chat = ChatFormat.named(name, tokenizer())
    shown = chat.shown(tokenizer())
    assert shown.eos_token_id is not None
    return ServedModel(MODEL, shown, chat, max_length, shown.vocab_size, (shown.eos_token_id,), "fp_1")


def events(
    model: ServedModel, text: str, reason: str = "stop", scores: bool = False, **fields: Any
) -> list[EngineEvent]:
    """One event a token of ``text``, the last with the reason."""
    ids = model.tokenizer.encode(text, parse_control=True)
    pieces = [model.tokenizer.decode([token], skip_control=True) for token in ids]
    assert "".join(pieces) == text, pieces
    made = [
        EngineEvent(text=piece, token_ids=(token,), logprobs=(scored(token),) if scores else (), **fields)
        for token, piece in zip(ids, pieces, strict=True)
    ]
    made[-1] = replace(made[-1], finish_reason=reason)  # pyright: ignore[reportArgumentType]
    return made


def scored(token: int, others: Sequence[int] = ()) -> TokenLogprobs:
    """A token with log-probability -token/8, the likeliest first."""
    return TokenLogprobs(token, -token / 8, 1, tuple((other, -other / 8) for other in (token, *others)))
