"""A model's text taken apart as it comes: reasoning, content and calls of tools.

:meth:`OutputParser.push` takes text in any pieces and gives what is certain; :meth:`OutputParser.finish` gives the
rest.  Put together, the deltas do not depend on where the text was cut.  Nothing is ever taken back:

- **A call begins** when its header is whole: markers, a name that is offered, and the ``{`` of its arguments.  What
  turns out to be no header (an unknown name, another structure, a marker cut off by the end of the output) is content,
  verbatim.  No part of a marker is shown before that is known.
- **Arguments** are shown as they come, verbatim, up to the next marker.  If they are not JSON, or the output ends
  before they do, they stay the call's arguments as written (OpenAI: "the model does not always generate valid JSON"),
  and :class:`~abyssal.text.output_delta.CallEnd` says whether the model ended them.
- **Reasoning** ends at its end tag alone; calls inside are reasoning.

The time is linear in the text, and less is held back than a header's length.  The text is not told from its tokens:
arguments that spell a marker end there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from abyssal.text.output_delta import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Delta,
    ParsedOutput,
    Reasoning,
    collect,
    merge,
)
from abyssal.text.reasoning import THINK_BEGIN, THINK_END, PromptEnd, ReasoningSyntax
from abyssal.text.scan import Verdict, after_literal, length_held, skip_space
from abyssal.text.tool_syntax import CALL_END, MARKERS, SECTION_END, TRIGGER, Header, ToolSyntax

_State = Callable[[str, int, bool], int]


class OutputParser:
    """One output.  Each state reads a text from a place and returns where it stopped; what is behind is held back."""

    def __init__(
        self,
        tools: ToolSyntax | None = None,
        names: Collection[str] = (),
        reasoning: ReasoningSyntax | None = None,
        prompt_end: PromptEnd = PromptEnd.CLOSED,
        begun: bool = True,
        leading: str = "",
        new_id: Callable[[int], str] = "call_{}".format,
    ) -> None:
        """
        Args:
            tools, reasoning: the family's; None where it has none, whose marks are then content.
            names: of the tools offered; without any, nothing is a call.
            begun: of an open prompt, whether it ends behind the line ends that follow its tag.
            leading: one character that the format, and not the model, puts before content; empty for none.
            new_id: of a call, by its index; ids should be unique over a conversation.
        """
        self._tools, self._names = (tools if names else None), frozenset(names)
        self._reasoning_syntax = reasoning or ReasoningSyntax()
        self._new_id = new_id
        self._calls = 0
        self._in_call = False
        self._held = ""
        self._state: _State = self._content
        self._skipped, self._most_skipped = "", 0
        self._after_skipped: _State = self._content
        self._deltas: list[Delta] = []
        self._skip(leading, 1, self._content)
        if reasoning is not None and prompt_end is PromptEnd.OPEN:
            self._skip("\n", 0 if begun else reasoning.after_begin, self._reasoning)
        elif reasoning is not None and prompt_end is PromptEnd.FREE:
            self._state = self._beginning

    def push(self, text: str) -> list[Delta]:
        """What ``text``, which follows that of earlier calls, makes certain."""
        return self._read(self._held + text, False)

    def finish(self) -> list[Delta]:
        """The rest, at the end of the output."""
        deltas = self._read(self._held, True)
        if self._in_call:
            self._in_call = False
            deltas.append(CallEnd(self._calls - 1, False))
        return deltas

    def _read(self, text: str, final: bool) -> list[Delta]:
        self._deltas = []
        at, before = 0, None
        while at < len(text) and before != (at, self._state):
            before = (at, self._state)
            at = self._state(text, at, final)
        assert at == len(text) or not final, (self._state, text[at:])
        self._held = text[at:]
        return merge(self._deltas) if len(self._deltas) > 1 else self._deltas

    def _emit(self, kind: Callable[[str], Delta], text: str) -> None:
        if text:
            self._deltas.append(kind(text))

    # ---- reasoning

    def _beginning(self, text: str, at: int, final: bool) -> int:
        """Reasoning that the output opens by itself."""
        found = after_literal(text, skip_space(text, at), THINK_BEGIN)
        if found is Verdict.UNFINISHED and not final:
            return at
        if isinstance(found, Verdict):
            self._state = self._content
            return at
        self._skip("\n", self._reasoning_syntax.after_begin, self._reasoning)
        return found

    def _skip(self, character: str, most: int, then: _State) -> None:
        self._skipped, self._most_skipped, self._after_skipped = character, most, then
        self._state = self._skipping if character and most else then

    def _skipping(self, text: str, at: int, final: bool) -> int:
        if text[at] != self._skipped:
            self._state = self._after_skipped
            return at
        self._skip(self._skipped, self._most_skipped - 1, self._after_skipped)
        return at + 1

    def _reasoning(self, text: str, at: int, final: bool) -> int:
        tag = text.find(THINK_END, at)
        if tag < 0:
            held = 0 if final else length_held(text, at, self._reasoning_syntax.tails)
            self._emit(Reasoning, text[at : len(text) - held])
            return len(text) - held
        newline = self._reasoning_syntax.before_end and text.endswith("\n", at, tag)
        self._emit(Reasoning, text[at : tag - 1 if newline else tag])
        self._skip("\n", self._reasoning_syntax.after_end, self._content)
        return tag + len(THINK_END)

    # ---- content

    def _content(self, text: str, at: int, final: bool) -> int:
        if self._tools is None:
            self._emit(Content, text[at:])
            return len(text)
        begin = text.find(TRIGGER, at)
        if begin < 0:
            held = 0 if final else length_held(text, at, self._tools.content_tails)
            self._emit(Content, text[at : len(text) - held])
            return len(text) - held
        self._emit(Content, text[at:begin])
        found = self._tools.opening(text, begin, self._names)
        if isinstance(found, Header):
            return self._begin_call(found)
        if found is Verdict.UNFINISHED and not final:
            return begin
        self._emit(Content, TRIGGER)
        return begin + len(TRIGGER)

    # ---- calls

    def _begin_call(self, header: Header) -> int:
        self._deltas.append(CallBegin(self._calls, self._new_id(self._calls), header.name))
        self._calls += 1
        self._in_call = True
        self._state = self._arguments
        return header.end

    def _arguments(self, text: str, at: int, final: bool) -> int:
        assert self._tools is not None
        index = self._calls - 1
        place = at
        while (place := text.find(TRIGGER, place)) >= 0:
            marker = next((marker for marker in MARKERS if text.startswith(marker, place)), None)
            if marker is None:
                place += 1
                continue
            end = self._tools.end_of_arguments(text, at, place)
            self._emit(lambda piece: CallArguments(index, piece), text[at:end])
            self._deltas.append(CallEnd(index, True))
            self._in_call = False
            self._state = self._content if marker == SECTION_END else self._behind_call
            return place + len(marker) if marker in (CALL_END, SECTION_END) else place
        held = 0 if final else length_held(text, at, self._tools.argument_tails)
        self._emit(lambda piece: CallArguments(index, piece), text[at : len(text) - held])
        return len(text) - held

    def _behind_call(self, text: str, at: int, final: bool) -> int:
        assert self._tools is not None
        found = self._tools.following(text, at, self._names)
        if isinstance(found, Header):
            return self._begin_call(found)
        if found is Verdict.UNFINISHED and not final:
            return at
        self._state = self._content
        return found if isinstance(found, int) else at


def parse_output(text: str, parser: OutputParser) -> ParsedOutput:
    """A whole output, by a parser that has read nothing yet."""
    return collect([*parser.push(text), *parser.finish()])
