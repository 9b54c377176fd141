"""Text completions: prompts, echo with log-probabilities as lm-eval reads them, fill-in-the-middle, chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.completions import CompletionReply, CompletionRequest, prepare
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.protocol.logprobs import LEAST_LOGPROB, token_name
from abyssal.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE
from tests.support.serving import MODEL, events, scored, served

SERVED = served("plain")
TOKENIZER = SERVED.tokenizer


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "the user", **fields}


def refused(fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        prepare(fields, SERVED)
    return caught.value


def answer(fields: dict[str, Any], parts: list[EngineEvent]) -> dict[str, Any]:
    made = CompletionReply(prepare(fields, SERVED), SERVED, "cmpl-1", 17)
    for event in parts:
        assert made.push(event) == []
    return made.body()


def streamed(fields: dict[str, Any], parts: list[EngineEvent]) -> list[dict[str, Any]]:
    made = CompletionReply(prepare({**fields, "stream": True}, SERVED), SERVED, "cmpl-1", 17)
    return [chunk for event in parts for chunk in made.push(event)] + made.finish()


# ---- requests


def test_prompts_of_each_kind() -> None:
    ids = TOKENIZER.encode("the user", add_bos=True)
    for prompt in ("the user", ["the user"], ids, [ids]):
        assert prepare(body(prompt=prompt), SERVED).prompts == (tuple(ids),)
    several = prepare(body(prompt=["the user", "12"]), SERVED)
    assert several.prompts == (tuple(ids), tuple(TOKENIZER.encode("12", add_bos=True)))
    assert several.params.max_tokens == 16


def test_openais_schema_is_known_whole() -> None:
    names = """best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop
        stream stream_options suffix temperature top_p user"""
    assert set(names.split()) <= set(CompletionRequest.model_fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": [1, 10**9]}, "prompt[1]"),
        ({"prompt": [1], "suffix": "b"}, "suffix"),
        ({"suffix": "b", "echo": True}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(body(**fields))
    assert (error.status, error.param) == (422, param), error


def test_too_long_is_said_as_openai_says_it() -> None:
    assert refused(body(max_tokens=5000)).code == "context_length_exceeded"
    most = SERVED.max_length - len(TOKENIZER.encode("the user", add_bos=True))
    assert prepare(body(max_tokens=most), SERVED) and refused(body(max_tokens=most + 1)).status == 400


def test_suffix_makes_the_prompt_of_training() -> None:
    (ids,) = prepare(body(suffix=" tools"), SERVED).prompts
    begin, hole, end = map(TOKENIZER.token_id, (FIM_BEGIN, FIM_HOLE, FIM_END))
    encode = TOKENIZER.encode
    assert list(ids) == [TOKENIZER.bos_token_id, begin, *encode("the user"), hole, *encode(" tools"), end]


def test_control_tokens_in_a_text_are_text() -> None:
    (ids,) = prepare(body(prompt=FIM_HOLE), SERVED).prompts
    assert TOKENIZER.token_id(FIM_HOLE) not in ids


# ---- answers


def test_text_whole_and_in_chunks() -> None:
    parts = events(SERVED, "the user 12", "length", cached_tokens=1)
    whole = answer(body(), parts)
    (choice,) = whole["choices"]
    assert choice == {"index": 0, "text": "the user 12", "logprobs": None, "finish_reason": "length"}
    assert whole["object"] == "text_completion" and whole["usage"]["prompt_cache_hit_tokens"] == 1
    chunks = streamed({**body(), "stream_options": {"include_usage": True}}, parts)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "the user 12"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []


def test_usage_with_each_chunk_where_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed({**body(), "stream_options": options}, events(SERVED, "the user 12", "length", cached_tokens=1))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == counts[-2] == len(chunks) - 1 > 2


def test_echo_with_scores_as_lm_eval_reads_them() -> None:
    """It slices ``token_logprobs[context:-1]`` and compares each with the largest of ``top_logprobs``."""
    ids = TOKENIZER.encode("the user 12", add_bos=True)
    prompt_scores = (None, *(scored(token) for token in ids[1:]))
    fields = body(prompt=[ids, ids], echo=True, logprobs=1, max_tokens=1)
    prepared = prepare(fields, SERVED)
    assert prepared.params.prompt_logprobs == prepared.params.logprobs == 1
    parts = [
        replace(event, prompt=ordinal, prompt_logprobs=prompt_scores)
        for ordinal in (1, 0)
        for event in events(SERVED, "e", "length", scores=True)
    ]
    whole = answer(fields, parts)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    for choice in whole["choices"]:
        scores = choice["logprobs"]
        assert choice["text"] == "the user 12e"
        assert scores["token_logprobs"] == [None, *(-token / 8 for token in ids[1:]), scores["token_logprobs"][-1]]
        assert scores["top_logprobs"][0] is None
        for logprob, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True):
            assert max(top.values()) == logprob
        assert {len(values) for values in scores.values()} == {len(ids) + 1}
        for offset, name in list(zip(scores["text_offset"], scores["tokens"], strict=True))[1:]:
            assert choice["text"][offset:].startswith(name)
    chunks = streamed(fields, parts)
    own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 1]
    assert "".join(choice["text"] for choice in own) == "the user 12e"
    joined = [value for choice in own for value in choice["logprobs"]["token_logprobs"]]
    assert joined == whole["choices"][1]["logprobs"]["token_logprobs"]
    offsets = [value for choice in own for value in choice["logprobs"]["text_offset"]]
    assert offsets == whole["choices"][1]["logprobs"]["text_offset"]


def test_no_tokens_scores_the_prompt_alone() -> None:
    ids = TOKENIZER.encode("the", add_bos=True)
    fields = body(prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert prepare(fields, SERVED).params.max_tokens == 1
    (event,) = events(SERVED, "e", "stop", scores=True)
    whole = answer(fields, [replace(event, prompt_logprobs=(None, *map(scored, ids[1:])))])
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the", "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert whole["usage"]["completion_tokens"] == 0


def test_scores_list_the_token_besides_the_likeliest() -> None:
    token, other, third = TOKENIZER.encode("e") + TOKENIZER.encode("u") + TOKENIZER.encode("t")
    entry = TokenLogprobs(token, float("-inf"), 3, ((other, -0.5), (third, -1.0)))
    whole = answer(
        body(logprobs=2), [EngineEvent(text="e", token_ids=(token,), logprobs=(entry,), finish_reason="stop")]
    )
    scores = whole["choices"][0]["logprobs"]
    assert scores["top_logprobs"] == [{"u": -0.5, "t": -1.0, "e": LEAST_LOGPROB}]
    assert scores["token_logprobs"] == [LEAST_LOGPROB]


def test_tokens_that_are_no_characters_have_names_of_their_own() -> None:
    ids = TOKENIZER.encode("ü😀")
    names = [token_name(SERVED, token) for token in ids]
    assert len(set(names)) == len(names) and all("\ufffd" not in name for name in names)
    assert names[0] == "bytes:\\xc3"
    assert token_name(SERVED, 10**6) == ""


def test_usage_counts_a_prompt_once_and_discarded_completions() -> None:
    parts = [
        EngineEvent(
            choice=choice, text="e", token_ids=(9,), finish_reason="stop", cached_tokens=cached, discarded_tokens=more
        )
        for choice, cached, more in ((0, 1, 5), (1, 2, 0))
    ]
    usage = answer(body(n=2, best_of=3), parts)["usage"]
    num_prompt = len(TOKENIZER.encode("the user", add_bos=True))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, 7)
    assert usage["prompt_cache_hit_tokens"] == 2


def test_half_a_surrogate_pair_is_refused_by_name() -> None:
    assert refused(body(prompt="a\ud800", echo=True)).param == "prompt"
    assert refused(body(stop=["a", "\ud800"])).param == "stop"
    assert refused(body(**{"\udc00": 1})).param == "?"


def test_a_prompt_is_echoed_once() -> None:
    parts = events(SERVED, "the user 12", "length")
    assert len(parts) > 1
    assert answer(body(echo=True), parts)["choices"][0]["text"] == "the userthe user 12"


def test_completions_of_all_prompts_together_are_bounded() -> None:
    many = {"prompt": ["the user"] * 100, "n": 21}
    assert refused(body(**many)).param == "n"
    assert refused(body(**many | {"n": 1, "best_of": 21})).param == "best_of"
    assert prepare(body(**many | {"n": 20}), SERVED).num_choices == 2000


def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(SERVED), "encode_all", lambda *_: pytest.fail("it was"))
    most = max(map(len, SERVED.token_bytes))
    error = refused(body(prompt="é" * (SERVED.max_length * most)))
    assert (error.status, error.code) == (400, "context_length_exceeded")
