"""A conversation that a chat keeps: its messages, on disk and off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abyssal.text.messages import check_messages


class Conversation:
    """Messages in OpenAI's format; the first may be the system's."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None or an empty text removes it."""
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else self.messages[:1]

    def asked(self, text: str) -> list[dict[str, Any]]:
        """The messages with one more of the user."""
        return [*self.messages, {"role": "user", "content": text}]

    def answered(self, text: str, reasoning: str, answer: str) -> None:
        """The user's message and what the model made of it."""
        message: dict[str, Any] = {"role": "assistant", "content": answer}
        if reasoning:
            message["reasoning_content"] = reasoning
        self.messages = [*self.asked(text), message]

    def save(self, path: Path) -> None:
        """Write ``{"messages": [...]}``, a line that ``abyssal sft`` learns from as well.

        Raises:
            ValueError: the file is there and holds something else.
            OSError: it cannot be written.
        """
        if path.exists():
            try:
                _read(path)
            except (ValueError, OSError):
                raise ValueError(f"{path}: is there, and no conversation; give another name") from None
        line = json.dumps({"messages": self.messages}, ensure_ascii=False)
        path.write_text(line + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take the messages of a file that :meth:`save` wrote.

        Raises:
            ValueError: it holds no conversation.
            OSError: it cannot be read.
        """
        self.messages = _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if messages is None:
        raise ValueError(f'{path}: must be {{"messages": [...]}}, as /save writes it')
    try:
        return check_messages(messages) if messages else []
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
