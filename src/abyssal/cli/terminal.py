"""What a model wrote, safe to show on a terminal."""

from __future__ import annotations

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE = {**_PICTURES, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    """Control characters as pictures: a model may write escape sequences, which would move the cursor, rename the
    window or fill the clipboard."""
    return text.translate(_VISIBLE)
