"""What the protocols know of the model that is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from abyssal.serve.events import ThinkTokens
from abyssal.text.chat_format import ChatFormat, Prompt
from abyssal.text.reasoning import THINK_BEGIN, THINK_END, PromptEnd
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model's name, text and limits."""

    name: str
    tokenizer: Tokenizer
    """The engine's own: ``ChatFormat.shown`` of the folder's, so that token texts and output texts agree."""
    chat: ChatFormat
    max_length: int
    """Tokens of prompt and output together."""
    vocab_size: int
    """Ids of the model, which may be more than the tokenizer's."""
    ends: tuple[int, ...] = ()
    """Tokens that end an output."""
    fingerprint: str = ""
    """Names weights and configuration, as ``system_fingerprint``."""

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Of each token, control tokens by name."""
        return self.tokenizer.byte_strings()

    @cached_property
    def shown_bytes(self) -> tuple[bytes, ...]:
        """Of each token, as an output's text has them: control tokens that it does not show are empty."""
        return self.tokenizer.byte_strings(skip_control=True)

    def encode(self, text: str) -> tuple[int, ...]:
        """A text as a prompt, as the offline API reads one."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], begin: bool = True) -> list[tuple[int, ...]]:
        """Texts as prompts, or with ``begin`` false as parts of one.  Unlike an encoder of one text, the library's of
        many lets other threads run meanwhile, which a long text needs."""
        add_bos = begin and self.tokenizer.bos_token_id is not None
        return [tuple(ids) for ids in self.tokenizer.encode_batch(texts, add_bos)]

    def least_tokens(self, num_bytes: int) -> int:
        """As which a text of so many bytes can be written."""
        return -(-num_bytes // self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.token_bytes), default=1) or 1

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that an output of these tokens would show."""
        return self.tokenizer.decode(tokens, skip_control=True)

    def think_tokens(self, prompt: Prompt) -> ThinkTokens | None:
        """By what reasoning in an answer to ``prompt`` is told; None where the format has none."""
        if self.chat.reasoning is None or prompt.end is PromptEnd.CLOSED:
            return None
        ids = map(self.tokenizer.token_id, (THINK_BEGIN, THINK_END))
        return ThinkTokens(*ids, open=prompt.end is PromptEnd.OPEN)
