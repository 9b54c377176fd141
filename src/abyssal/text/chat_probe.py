"""What a checkpoint's own chat template does, found by running it.

Templates say nothing of themselves, and their texts differ where their output does not.  So a few short conversations
are rendered: does the prompt leave reasoning open, and is that switched by ``thinking``; are tools, calls and results
shown, and in which form?  DeepSeek's published templates show no tools, and those of V2.5, V3 and R1 show calls only
in messages whose content is null; others expect arguments as an object and quote text once more.  What a template
leaves out is found here, and not by a model that never heard of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abyssal.text.messages import Message
from abyssal.text.reasoning import THINK_END, PromptEnd, prompt_end
from abyssal.text.template import ChatTemplate
from abyssal.text.tool_syntax import CALL_BEGIN, SEPARATOR, V3_CALLS, V31_CALLS, ToolSyntax

ASSISTANT = "<｜Assistant｜>"

_NAME, _TEXT, _RESULT = "probed_tool", "probed text", "probed result"
_ARGUMENTS = '{"probed": 1}'
_QUESTION: Message = {"role": "user", "content": "probe"}
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": _NAME, "description": "Probes.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Probed:
    """Of one template."""

    deepseek: bool
    """Whether it writes V2.5's and later models' tokens."""
    reasons: bool
    switched: bool
    """Whether ``thinking`` turns reasoning on and off by the prompt's last tag."""
    calls: ToolSyntax | None
    """The form in which it shows calls; None where that is unknown, or where it leaves out tools, calls or results."""


def probe(template: ChatTemplate) -> Probed:
    """Run the template."""
    asked = _rendered(template, [_QUESTION])
    ends = {thinking: _prompt_end(template, thinking) for thinking in (None, True, False)}
    history = _history(template)
    described = _NAME in _rendered(template, [_QUESTION], [_TOOL])
    calls = _call_syntax(history)
    return Probed(
        deepseek=ASSISTANT in asked,
        reasons=PromptEnd.OPEN in ends.values() or THINK_END in template.source,
        switched=ends[True] is PromptEnd.OPEN and ends[False] is PromptEnd.CLOSED and ends[None] is PromptEnd.CLOSED,
        calls=calls if described and _TEXT in history and _RESULT in history else None,
    )


def _prompt_end(template: ChatTemplate, thinking: bool | None) -> PromptEnd:
    try:
        return prompt_end(template.render_prompt([_QUESTION], thinking=thinking))
    except ValueError:
        return PromptEnd.FREE


def _history(template: ChatTemplate) -> str:
    call = {"id": "1", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    answers = [{"role": "assistant", "content": text, "tool_calls": [call]} for text in (_TEXT, "")]
    result = {"role": "tool", "tool_call_id": "1", "content": _RESULT}
    texts = [_rendered(template, [_QUESTION, answer, result]) for answer in answers]
    return texts[0] if _NAME in texts[1] else ""


def _call_syntax(history: str) -> ToolSyntax | None:
    if f"{CALL_BEGIN}{_NAME}{SEPARATOR}{_ARGUMENTS}" in history:
        return V31_CALLS
    fenced = f"{CALL_BEGIN}function{SEPARATOR}{_NAME}\n```json\n{_ARGUMENTS}\n```" in history
    return V3_CALLS if fenced else None


def _rendered(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """The text, or none where the template refuses."""
    try:
        return template.render(messages, tools, add_generation_prompt=True)
    except ValueError:
        return ""
