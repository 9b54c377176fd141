"""Anthropic's messages: requests become those of the chat API, answers blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol import chat
from abyssal.serve.protocol.anthropic import UNSUPPORTED, MessagesRequest, prepare
from abyssal.serve.protocol.anthropic_reply import MessagesReply
from abyssal.serve.protocol.errors import ApiError
from tests.support.serving import MODEL, events, served

USER = {"role": "user", "content": "the tools"}
SCHEMA = {"type": "object", "properties": {}}
TOOL = {"name": "add", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 9, "messages": [USER], **fields}


def test_a_conversation_is_that_of_the_chat_api() -> None:
    asked = body(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "so", "signature": "x"},
                    {"type": "text", "text": "12", "citations": None},
                    {"type": "tool_use", "id": "1", "name": "add", "input": {"a": "é"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "no", "is_error": True},
                    {"type": "text", "text": "and?"},
                ],
            },
        ],
        tools=[TOOL],
        stop_sequences=["x"],
        metadata={"user_id": "ada"},
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
    same = {
        "model": MODEL,
        "max_tokens": 9,
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": "12", "reasoning_content": "so", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "Error: no"},
            {"role": "user", "content": "and?"},
        ],
        "tools": [FUNCTION],
        "stop": ["x"],
        "user": "ada",
    }
    ours, theirs = prepare(asked, served()), chat.prepare(same, served())
    assert ours.prompts == theirs.prompts and ours.params == theirs.params and ours.user == theirs.user == "ada"


@pytest.mark.parametrize(
    ("choice", "same", "parallel"),
    [
        ({"type": "any"}, "required", True),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "none"}, "none", True),
    ],
)
def test_choices_of_tools(choice: dict[str, Any], same: Any, parallel: bool) -> None:
    ours = prepare(body(tools=[TOOL], tool_choice=choice), served())
    fields = {"tools": [FUNCTION], "tool_choice": same, "parallel_tool_calls": parallel}
    theirs = chat.prepare({"model": MODEL, "max_tokens": 9, "messages": [USER], **fields}, served())
    assert ours.params.structured == theirs.params.structured
    assert ours.params.structured is not None


def test_an_answer_at_the_end_is_gone_on_from() -> None:
    prepared = prepare(body(messages=[USER, {"role": "assistant", "content": "the user"}]), served())
    assert served().tokenizer.decode(prepared.prompts[0]).endswith("the user")


def test_the_schema_is_known_whole() -> None:
    names = """cache_control container context_management inference_geo max_tokens mcp_servers messages metadata model
        output_config service_tier stop_sequences stream system temperature thinking tool_choice tools top_k top_p"""
    assert set(names.split()) == set(MessagesRequest.model_fields) | set(UNSUPPORTED)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"container": "c"}, "container"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "type": "bash_20250124"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"system": [{"type": "text", "text": "x", "wish": 1}]}, "system[0].wish"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(body(**fields), served())
    assert (caught.value.status, caught.value.param) == (422, param), caught.value
    assert caught.value.anthropic()["error"]["type"] == "invalid_request_error"


def answered(parts: list[EngineEvent], **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = MessagesReply(prepare(body(**fields), served()), served(), "msg_1")
    stream = MessagesReply(prepare(body(**fields, stream=True), served()), served(), "msg_1")
    assert [sent for event in parts for sent in whole.push(event)] == []
    return whole.body(), [sent for event in parts for sent in stream.push(event)] + stream.finish()


def put_together(stream: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks, as a client adds them up."""
    assert [stream[0]["type"], stream[-2]["type"], stream[-1]["type"]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    blocks: list[dict[str, Any]] = []
    is_open, arguments = False, ""
    for sent in stream[1:-2]:
        match sent["type"]:
            case "content_block_start":
                assert not is_open and sent["index"] == len(blocks)
                blocks.append(dict(sent["content_block"]))
                is_open, arguments = True, ""
            case "content_block_delta":
                assert is_open and sent["index"] == len(blocks) - 1
                kind, piece = [
                    value for name, value in sorted(sent["delta"].items(), key=lambda item: item[0] != "type")
                ]
                if kind == "input_json_delta":
                    arguments += piece
                else:
                    blocks[-1][kind.removesuffix("_delta")] += piece
            case _:
                is_open = False
                if arguments:
                    blocks[-1]["input"] = json.loads(arguments)
    assert not is_open
    return blocks


def test_blocks_whole_and_streamed() -> None:
    parts = events(served(), "the user</think>12 " + CALL, cached_tokens=2)
    whole, stream = answered(parts, tools=[TOOL], thinking={"type": "enabled"})
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"a": 1}
    assert (whole["stop_reason"], whole["usage"]["cache_read_input_tokens"]) == ("tool_use", 2)
    without_ids = [[{**block, "id": ""} for block in blocks] for blocks in (put_together(stream), whole["content"])]
    assert without_ids[0] == without_ids[1]
    assert stream[-2]["delta"]["stop_reason"] == "tool_use" and stream[-2]["usage"] == whole["usage"]
    assert stream[0]["message"]["usage"]["cache_read_input_tokens"] == 2


def test_reasons() -> None:
    parts = events(served(), "12")
    for change, reason, sequence in (
        ({}, "end_turn", None),
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"stop_reason": "x"}, "stop_sequence", "x"),
        ({"stop_reason": 1}, "end_turn", None),
    ):
        whole, stream = answered([*parts[:-1], replace(parts[-1], **change)], stop_sequences=["x"])
        assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
        assert stream[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_call_that_is_no_json_is_text_and_not_lost() -> None:
    whole, _ = answered(events(served(), CALL.replace(" 1}", "")), tools=[TOOL])
    assert whole["content"] == [{"type": "text", "text": 'add({"a":)'}]
    assert whole["stop_reason"] == "end_turn"
