"""Where an output ends: stop texts, which may begin in one token and end in another, and stop tokens.

Text that could be the beginning of a stop text is held back until it is one or cannot be, so a reader of a stream never
sees a part of it.  The stop text that is complete first wins; of several that end at the same character, the longest.
That rule, unlike "the one that begins first", can be decided as the text comes, so the visible text is the same however
it is cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from abyssal.engine.detokenizer import Detokenizer
from abyssal.engine.messages import SamplingParams


class StopScanner:
    """Text in pieces in, text that may be shown out."""

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop text that was found; what is pushed after it is dropped."""

    def push(self, piece: str, may_stop: bool = True) -> str:
        """Text that becomes visible.  Stop texts that end inside ``piece`` count only if it ``may_stop``."""
        if self.stopped_by is not None or not piece:
            return ""
        text = self._held + piece
        if may_stop:
            found = self._first(text, len(self._held))
            if found is not None:
                self.stopped_by, end = found
                self._held = ""
                return text[: end if self._include_stop else end - len(self.stopped_by)]
        kept = self._begun(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back: the text has ended, and it is no stop text."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, old: int) -> tuple[str, int] | None:
        """The stop text that is complete first, past the ``old`` characters, and where it ends."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), -len(stop), stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[2], best[0])

    def _begun(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop text without completing it."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0


class OutputText:
    """The text of one completion, token by token, and why it ended where text or a token says so.

    Not here: ``max_tokens``, deadlines and cancellation, which end an output by :meth:`finish`.
    """

    def __init__(
        self, params: SamplingParams, byte_strings: Sequence[bytes] | None = None, ends: Collection[int] = ()
    ) -> None:
        """Without ``byte_strings`` (a model without a tokenizer) the text stays empty.

        Args:
            byte_strings: of the tokenizer, control tokens empty.
            ends: the model's own end tokens.

        Raises:
            ValueError: stop texts without a tokenizer.
        """
        if params.stop and byte_strings is None:
            raise ValueError(f"stop: {params.stop[0]!r} is text, and the model has no tokenizer; use stop_token_ids")
        self._params = params
        self._ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else ends)
        self._detokenizer = Detokenizer(byte_strings) if byte_strings is not None else None
        self._scanner = StopScanner(params.stop, params.include_stop)
        self._visible: list[str] = []
        self.num_tokens = 0
        """Tokens of the output; those after the end were not taken."""
        self.stop_reason: str | int | None = None
        """The stop text or token that ended it."""

    @property
    def text(self) -> str:
        """What is visible so far."""
        return "".join(self._visible)

    @property
    def num_pieces(self) -> int:
        """In how many pieces the visible text came, for :meth:`since`."""
        return len(self._visible)

    def since(self, piece: int) -> str:
        """What became visible after the first ``piece`` pieces."""
        return "".join(self._visible[piece:])

    def push(self, tokens: Sequence[int]) -> str:
        """Newly visible text.  Nothing after the token that ends the output is looked at."""
        shown = [self._push(int(token)) for token in tokens]
        return "".join(shown)

    def finish(self) -> str:
        """The output has ended: text that was held back."""
        piece = "" if self._detokenizer is None else self._detokenizer.finish()
        return self._show(self._scanner.push(piece, may_stop=False) + self._scanner.finish())

    def _push(self, token: int) -> str:
        if self.stop_reason is not None:
            return ""
        self.num_tokens += 1
        ended = token in self._ends and self.num_tokens > self._params.min_tokens
        if ended:
            self.stop_reason = token
            if not self._params.include_stop:
                return self.finish()
        piece = "" if self._detokenizer is None else self._detokenizer.push(token)
        shown = self._show(self._scanner.push(piece, may_stop=self.num_tokens >= self._params.min_tokens))
        if self._scanner.stopped_by is not None:
            self.stop_reason = self._scanner.stopped_by
        return shown + self.finish() if ended else shown

    def _show(self, text: str) -> str:
        if text:
            self._visible.append(text)
        return text
