"""Results of tools in the order of their calls.

DeepSeek's formats name no ids: the model takes the first result for that of the first call.  Clients send results in
the order in which tools finished, with ``tool_call_id``, so they are put in order here; and a result of no call, or a
call that nothing answers, is refused, as OpenAI's and DeepSeek's servers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def in_order_of_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with the results behind each answer in the order of its calls.

    Calls without ids, and results without them, stay as they are.

    Raises:
        ValueError: a result that answers no call, twice the same call, or stands behind no call; a call without result.
    """
    ordered: list[dict[str, Any]] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        ordered.append(message)
        end = index + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        if message["role"] == "tool":
            raise ValueError(f"messages[{index}]: a tool's result has to follow the message that called the tool")
        if message.get("tool_calls"):
            ordered += _answers(index, message["tool_calls"], messages[index + 1 : end])
            index = end
        else:
            index += 1
    return ordered


def _answers(index: int, calls: Sequence[Mapping[str, Any]], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = [call.get("id") for call in calls]
    given = [result.get("tool_call_id") for result in results]
    if None in wanted or None in given or len(set(wanted)) < len(wanted):
        return list(results)
    for offset, name in enumerate(given):
        where = f"messages[{index + 1 + offset}].tool_call_id"
        if name not in wanted:
            raise ValueError(f"{where}: {name!r} is none of messages[{index}].tool_calls, which are {wanted}")
        if name in given[:offset]:
            raise ValueError(f"{where}: {name!r} has a result already; give one for each call")
    for name in wanted:
        if name not in given:
            raise ValueError(f"messages[{index}].tool_calls: no message of role tool answers {name!r}; add it behind")
    return sorted(results, key=lambda result: wanted.index(result["tool_call_id"]))
