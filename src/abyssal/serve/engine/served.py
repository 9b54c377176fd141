"""A model folder as the protocols know it: its text from the folder, its limits from the engine that loaded it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from abyssal.engine.wire import Ready
from abyssal.serve.protocol.served import ServedModel
from abyssal.text.chat_format import ChatFormat
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FolderText:
    """What a folder says of the model's text."""

    tokenizer: Tokenizer
    """As the engine has it: it shows the marks that the chat format reads."""
    chat: ChatFormat

    @classmethod
    def of(cls, folder: Path) -> FolderText:
        """
        Raises:
            ValueError, OSError: the folder holds no tokenizer that can be read, or a template that is none.
        """
        tokenizer = Tokenizer.from_folder(folder)
        chat = ChatFormat.of_folder(folder, tokenizer)
        return cls(chat.shown(tokenizer), chat)

    def served(self, name: str, ready: Ready) -> ServedModel:
        """The model under a name, as the engine has loaded it."""
        return ServedModel(
            name, self.tokenizer, self.chat, ready.max_length, ready.vocab_size, ready.ends, ready.fingerprint
        )
