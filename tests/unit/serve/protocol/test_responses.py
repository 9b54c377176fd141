"""The responses API: requests become those of the chat API, answers items."""

from __future__ import annotations

import json
from typing import Any

import pytest

from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol import chat
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.protocol.responses import UNSUPPORTED, ResponsesRequest, prepare
from abyssal.serve.protocol.responses_reply import ResponsesReply
from tests.support.serving import MODEL, events, served

SCHEMA = {"type": "object", "properties": {}}
TOOL = {"type": "function", "name": "add", "parameters": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "the tools", **fields}


def test_a_conversation_is_that_of_the_chat_api() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "the tools"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "12", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
    ]
    text = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    asked = body(input=items, instructions="Be brief.", tools=[TOOL], max_output_tokens=9, text=text)
    calls = [{"id": id, "type": "function", "function": {"name": "add", "arguments": "{}"}} for id in "12"]
    same = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "the tools"},
            {"role": "assistant", "content": "12", "reasoning_content": "so", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "tool", "tool_call_id": "2", "content": "y"},
        ],
        "tools": [FUNCTION],
        "max_tokens": 9,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    }
    ours, theirs = prepare(asked, served()), chat.prepare(same, served())
    assert ours.prompts == theirs.prompts and ours.params == theirs.params
    assert ours.params.structured is not None


def test_the_schema_is_known_whole() -> None:
    names = """background context_management conversation include input instructions max_output_tokens max_tool_calls
        metadata model moderation parallel_tool_calls previous_response_id prompt prompt_cache_key
        prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options temperature text
        tool_choice tools top_logprobs top_p truncation user"""
    assert set(names.split()) | {"thinking"} == set(ResponsesRequest.model_fields) | set(UNSUPPORTED)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_parameters_are_refused_by_name_unless_they_ask_for_nothing(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(body(**{name: "wish"}), served())
    assert (caught.value.status, caught.value.param) == (422, name)
    for harmless in (None, *UNSUPPORTED[name].harmless):
        assert prepare(body(**{name: harmless}), served()) is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "add"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": "x", "phase": "y"}]}, "input[0].phase"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(body(**fields), served())
    assert (caught.value.status, caught.value.param) == (422, param), caught.value


def answered(parts: list[EngineEvent], **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = ResponsesReply(prepare(body(**fields), served()), served(), "resp_1", 17)
    stream = ResponsesReply(prepare(body(**fields, stream=True), served()), served(), "resp_1", 17)
    assert [sent for event in parts for sent in whole.push(event)] == []
    sent = [json.loads(json.dumps(sent)) for event in parts for sent in stream.push(event)]
    return whole.body(), sent + stream.finish()


def without_call_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name != "call_id"} for item in items]


def test_items_whole_and_streamed() -> None:
    parts = events(served(), "the user</think>12 " + CALL, cached_tokens=2)
    whole, stream = answered(parts, tools=[TOOL], thinking={"type": "enabled"})
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][0]["content"][0]["text"] == "the user"
    assert whole["output"][1]["content"][0]["text"] == "12 "
    assert whole["output"][2]["arguments"] == '{"a": 1}'
    assert whole["status"] == "completed" and whole["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert [sent["sequence_number"] for sent in stream] == list(range(len(stream)))
    assert [sent["type"] for sent in stream[:2]] == ["response.created", "response.in_progress"]
    assert stream[-1]["type"] == "response.completed"
    final = stream[-1]["response"]
    assert without_call_ids(final["output"]) == without_call_ids(whole["output"])
    assert final["usage"] == whole["usage"]
    done = [sent["item"] for sent in stream if sent["type"] == "response.output_item.done"]
    assert done == final["output"]
    for index, kind in enumerate(("reasoning_text", "output_text", "function_call_arguments")):
        pieces = [sent["delta"] for sent in stream if sent["type"] == f"response.{kind}.delta"]
        (end,) = [sent for sent in stream if sent["type"] == f"response.{kind}.done"]
        assert "".join(pieces) == end.get("text", end.get("arguments")) and end["output_index"] == index
        assert len(pieces) > 1


def test_a_response_cut_off_is_incomplete() -> None:
    whole, stream = answered(events(served(), "12", "length"), max_output_tokens=2)
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert stream[-1]["type"] == "response.incomplete"
    assert whole["output"][0]["status"] == "incomplete"
