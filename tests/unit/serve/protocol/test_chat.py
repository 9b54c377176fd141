"""Chat completions: what is taken, what is refused by name, and answers whole and in chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from abyssal.engine.messages import StructuredOutput
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.protocol.chat import MOST_TOOLS, UNSUPPORTED, ChatRequest, prepare
from abyssal.serve.protocol.chat_reply import ChatReply
from abyssal.serve.protocol.errors import ApiError
from abyssal.text.chat_format import ChatFormat
from abyssal.text.output_parser import parse_output
from abyssal.text.template_parts import encode_parts
from tests.support.serving import MODEL, events, served

USER = {"role": "user", "content": "the tools"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALLS = (
    'the <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
ANY_OBJECT = StructuredOutput("json_schema", {"type": "object"})
NAMED = {"type": "function", "function": {"name": "x"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], **fields}


def refused(fields: object, name: str = "deepseek-v3.1", **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        prepare(fields, served(name), **options)
    return caught.value


# ---- parameters


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 1}, "temperature", 1),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"presence_penalty": 1.0}, "presence_penalty", 1.0),
        ({"frequency_penalty": -1.0}, "frequency_penalty", -1.0),
        ({"logit_bias": {"7": -100}}, "logit_bias", {7: -100}),
        ({"seed": 5}, "seed", 5),
        ({"n": 3}, "n", 3),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "y"]}, "stop", ("x", "y")),
        ({}, "max_tokens", None),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 8}, "max_tokens", 8),
        ({"min_tokens": 2}, "min_tokens", 2),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"stop_token_ids": [3]}, "stop_token_ids", (3,)),
        ({"include_stop_str_in_output": True}, "include_stop", True),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 4}, "logprobs", 4),
        ({"logprobs": False}, "logprobs", None),
        ({"response_format": {"type": "text"}}, "structured", None),
        (
            {"response_format": {"type": "json_object"}},
            "structured",
            StructuredOutput("json_schema", {"type": "object"}),
        ),
        ({"tools": [TOOL]}, "structured", None),
    ],
)
def test_parameters_reach_the_engine(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(prepare(body(**fields), served()).params, name) == value


def test_every_parameter_of_the_schema_has_an_effect_or_a_name() -> None:
    """OpenAI's parameters, as its client 1.x-2.x sends them: none is unknown."""
    names = """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
        messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty
        prompt_cache_key prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier
        stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
        web_search_options"""
    known = set(ChatRequest.model_fields) | set(UNSUPPORTED)
    assert set(names.split()) <= known
    assert not set(ChatRequest.model_fields) & set(UNSUPPORTED)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_parameters_are_refused_by_name_unless_they_ask_for_nothing(name: str) -> None:
    error = refused(body(**{name: "wish"}))
    assert (error.status, error.param, error.code) == (422, name, "unsupported_parameter")
    assert name in error.message
    for harmless in (None, *UNSUPPORTED[name].harmless):
        assert prepare(body(**{name: harmless}), served()) is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"seed": 1 << 64}, "seed"),
        ({"top_k": 1 << 63}, "top_k"),
        ({"min_tokens": 1 << 63}, "min_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"wish": 1}}, "stream_options.wish"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"wish": 1}, "wish"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": ""}]}, "messages[0].role"),
        ({"messages": [{**USER, "name": "Ada"}]}, "messages[0].name"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}]},
            "messages[0].content[0].cache_control",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "x", "prefix": True}]}, "messages[1].prefix"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(body(**fields))
    assert (error.status, error.param) == (422, param), error
    assert error.openai()["error"]["message"]


def test_other_errors() -> None:
    assert refused([1]).status == 400
    assert refused({"messages": [USER]}).param == "model"
    assert refused({"model": MODEL}).param == "messages"
    unknown = refused(body(model="gpt-4"))
    assert (unknown.status, unknown.code) == (404, "model_not_found")
    long = refused(body(max_tokens=5000))
    assert (long.status, long.code) == (400, "context_length_exceeded")
    assert refused(body(messages=[{"role": "user", "content": "0 " * 5000}])).code == "context_length_exceeded"
    assert refused(body(thinking={"type": "enabled"}), "deepseek-v3").param == "thinking"
    assert refused(body(tools=[TOOL]), "plain").param == "tools"


# ---- prompts


def test_the_prompt_is_that_of_the_chat_format() -> None:
    model = served()
    history = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        USER,
        {"role": "assistant", "content": "12", "reasoning_content": "so", "refusal": None, "annotations": []},
        USER,
    ]
    for thinking in (None, True, False):
        fields = {} if thinking is None else {"thinking": {"type": "enabled" if thinking else "disabled"}}
        prepared = prepare(body(messages=history, tools=[TOOL], **fields), model)
        plain = [{name: value for name, value in message.items() if value} for message in history]
        expected = model.chat.prompt(plain, [TOOL], thinking)
        assert prepared.prompts == (tuple(encode_parts(model.tokenizer, expected.parts).ids.tolist()),)


def test_prefix_on_beta_goes_on_from_the_last_message() -> None:
    model = served()
    start = {"role": "assistant", "content": "the user", "prefix": True}
    prepared = prepare(body(messages=[USER, start]), model, beta=True)
    assert model.tokenizer.decode(prepared.prompts[0]).endswith("the user")
    assert refused(body(messages=[start, USER]), beta=True).param == "messages[0].prefix"
    formed = body(messages=[USER, start], response_format={"type": "json_object"})
    assert refused(formed, beta=True).param == "response_format", "the form would begin behind the prefix"


# ---- answers


def run(text: str, name: str = "deepseek-v3.1", **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same answer whole, and in chunks."""
    model = served(name)
    scores = bool(fields.get("logprobs"))
    whole = prepare(body(**fields), model)
    stream = prepare(body(**fields, stream=True, stream_options={"include_usage": True}), model)
    parts = events(model, text, scores=scores, cached_tokens=2)
    return reply(whole, parts, name).body(), chunks(stream, parts, name)


def reply(prepared: Prepared, parts: list[EngineEvent], name: str) -> ChatReply:
    made = ChatReply(prepared, served(name), "chatcmpl-1", 17)
    for event in parts:
        assert made.push(event) == []
    return made


def chunks(prepared: Prepared, parts: list[EngineEvent], name: str) -> list[dict[str, Any]]:
    made = ChatReply(prepared, served(name), "chatcmpl-1", 17)
    return [chunk for event in parts for chunk in made.push(event)] + made.finish()


def test_usage_with_each_chunk_where_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    prepared = prepare(body(stream=True, stream_options=options), served("deepseek-v3.1"))
    told = chunks(prepared, events(served("deepseek-v3.1"), "the user 12"), "deepseek-v3.1")
    counts = [chunk["usage"]["completion_tokens"] for chunk in told]
    assert counts == sorted(counts) and 1 <= counts[0] < counts[-1]


def put_together(stream: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]], str | None]:
    """Message, log-probabilities and reason of a stream, as a client adds them up."""
    message: dict[str, Any] = {}
    scores: dict[str, list[Any]] = {}
    reason = None
    for chunk in stream:
        for choice in chunk["choices"]:
            assert reason is None, "a chunk behind the last"
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    calls = message.setdefault("tool_calls", [])
                    for call in value:
                        if call["index"] == len(calls):
                            calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
                        else:
                            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
                else:
                    message[name] = message.get(name, "") + value
            for name, values in (choice["logprobs"] or {}).items():
                scores.setdefault(name, []).extend(values or [])
            reason = choice["finish_reason"]
    return message, scores, reason


def test_reasoning_is_split_from_content_and_counted() -> None:
    whole, stream = run("the user</think>12 tools", thinking={"type": "enabled"}, logprobs=True, top_logprobs=1)
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("the user", "12 tools")
    model = served()
    thought = model.tokenizer.encode("the user</think>", parse_control=True)
    answer = model.tokenizer.encode("12 tools")
    usage = whole["usage"]
    assert usage["completion_tokens"] == len(thought) + len(answer)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(thought)}
    scores = whole["choices"][0]["logprobs"]
    assert [entry["logprob"] for entry in scores["reasoning_content"]] == [-token / 8 for token in thought]
    assert [entry["logprob"] for entry in scores["content"]] == [-token / 8 for token in answer]
    assert b"".join(bytes(entry["bytes"]) for entry in scores["content"]) == b"12 tools"
    streamed, streamed_scores, reason = put_together(stream)
    assert (streamed["reasoning_content"], streamed["content"], reason) == ("the user", "12 tools", "stop")
    assert streamed_scores["content"] == scores["content"]
    assert streamed_scores["reasoning_content"] == scores["reasoning_content"]
    assert stream[-1]["choices"] == [] and stream[-1]["usage"] == usage
    assert all(chunk["usage"] is None for chunk in stream[:-1])


def test_usage_has_the_fields_of_both_apis() -> None:
    whole, _ = run("12")
    usage = whole["usage"]
    assert usage["prompt_cache_hit_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] > 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_calls_come_whole_and_in_pieces() -> None:
    whole, stream = run(CALLS, tools=[TOOL])
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "the "
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert functions == [{"name": "add", "arguments": '{"a": 1}'}, {"name": "add", "arguments": "{}"}]
    message, _, reason = put_together(stream)
    assert [call["function"] for call in message["tool_calls"]] == functions and reason == "tool_calls"
    ids = [call["id"] for call in (*message["tool_calls"], *choice["message"]["tool_calls"])]
    assert len(set(ids)) == 4


def test_without_tools_or_with_choice_none_calls_are_text() -> None:
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        whole, _ = run(CALLS, **fields)
        assert whole["choices"][0]["message"]["content"] == CALLS
        assert whole["choices"][0]["finish_reason"] == "stop"


def test_a_call_cut_off_is_kept_as_written() -> None:
    whole, _ = run(CALLS[: CALLS.index(" 1}")], tools=[TOOL])
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"a":'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("text", [CALLS, "the <｜tool▁calls▁beg", "so</think>x</think>", "<"])
def test_any_cut_of_the_text_gives_the_same_answer(text: str, size: int) -> None:
    """What is held back at the end of the output comes with its last event."""
    model = served()
    fields = body(tools=[TOOL])
    cuts = [text[start : start + size] for start in range(0, len(text), size)]
    parts = [EngineEvent(text=cut, token_ids=(9,)) for cut in cuts]
    parts.append(EngineEvent(finish_reason="stop"))
    whole = reply(prepare(fields, model), parts, "deepseek-v3.1").body()["choices"][0]
    expected = parse_output(text, model.chat.parser(model.chat.prompt([USER], [TOOL]), [TOOL])).message()
    streamed, _, reason = put_together(chunks(prepare({**fields, "stream": True}, model), parts, "deepseek-v3.1"))
    assert reason == whole["finish_reason"]
    for message in (whole["message"], streamed):
        assert (message["content"] or "") == (expected["content"] or "")
        assert message.get("reasoning_content") == expected.get("reasoning_content")
        functions = [call["function"] for call in message.get("tool_calls", [])]
        assert functions == [call["function"] for call in expected.get("tool_calls", [])]


def test_choices_do_not_mix() -> None:
    model = served("plain")
    prepared = prepare(body(n=2, stream=True), model)
    first, second = events(model, "the user", choice=0), events(model, "12 tools", "length", choice=1)
    mixed = [event for pair in zip(first, second, strict=False) for event in pair]
    mixed += first[len(second) :] + second[len(first) :]
    stream = chunks(prepared, mixed, "plain")
    for index, text, reason in ((0, "the user", "stop"), (1, "12 tools", "length")):
        own = [chunk for chunk in stream if chunk["choices"][0]["index"] == index]
        assert own[0]["choices"][0]["delta"]["role"] == "assistant"
        message, _, ended = put_together(own)
        assert (message["content"], ended) == (text, reason)
    assert all("usage" not in chunk for chunk in stream)


def test_failures_are_raised() -> None:
    model = served()
    made = ChatReply(prepare(body(), model), model, "chatcmpl-1", 17)
    with pytest.raises(ApiError, match="gone"):
        made.push(EngineEvent(error=ApiError(503, "gone")))
    with pytest.raises(ApiError) as caught:
        made.push(EngineEvent(finish_reason="error"))
    assert caught.value.status == 500


def test_answers_are_json() -> None:
    whole, stream = run("é深", logprobs=True, top_logprobs=1)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert json.loads(json.dumps(stream, allow_nan=False)) == stream
    assert whole["choices"][0]["message"]["content"] == "é深"


# ---- what would take long


def test_what_cannot_fit_or_would_hold_up_the_engine_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = {"type": "function", "function": {"name": "add", "strict": True}}
    wide = {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(9000)}}
    monkeypatch.setattr(ChatFormat, "prompt", lambda *_: pytest.fail("the conversation was written out"))
    text = "é" * 4 * 4096 * max(map(len, served().token_bytes))
    long = {"type": "function", "function": {"name": "add", "description": text}}
    for fields in ({"messages": [{**USER, "content": text}]}, {"tools": [long]}, {"messages": [USER] * 4097}):
        error = refused(body(**fields))
        assert (error.status, error.code) == (400, "context_length_exceeded")
    assert refused(body(tools=[tool] * (MOST_TOOLS + 1))).param == "tools"
    monkeypatch.undo()
    form = {"type": "json_schema", "json_schema": {"name": "wide", "schema": wide}}
    assert refused(body(response_format=form)).param == "response_format"
    forced = {"type": "function", "function": {"name": "add", "parameters": wide}}
    with pytest.raises(ApiError) as caught:
        prepare(body(tools=[forced], tool_choice="required"), served(max_length=1 << 20))
    assert caught.value.param == "tools"
