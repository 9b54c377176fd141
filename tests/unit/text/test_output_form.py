"""Forms of outputs: what llguidance then takes and refuses, and what the parser reads of the same text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from abyssal.engine.messages import StructuredOutput
from abyssal.engine.structured import StructureCompiler, open_reasoning
from abyssal.text.chat_format import FORMATS, ChatFormat
from abyssal.text.output_form import OutputForm, output_form, response_schema
from abyssal.text.output_parser import parse_output
from abyssal.text.template_parts import encode_parts
from abyssal.text.tokenizer import EOS, Tokenizer, train_bpe
from tests.support.chat_outputs import CALL_BEGIN, CALLS_BEGIN, CALLS_END, v3_call, v31_call
from tests.support.templates import user

NUMBER = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "parameters": NUMBER}}
STRICT = {"type": "function", "function": {"name": "add", "parameters": NUMBER, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
JSON = {"type": "json_object"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}
NAMED = {"type": "function", "function": {"name": "now"}}
FAMILIES = [name for name, (_, tools, _) in FORMATS.items() if tools is not None]


def all_tokens(small: Tokenizer) -> Tokenizer:
    return small.with_control_tokens(
        [token for name in FAMILIES for token in ChatFormat.named(name).template.format_tokens]
    )


@pytest.fixture(scope="module", params=["plain", "special"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Control tokens marked special, or not."""
    plain = all_tokens(train_bpe(['{"name": "é", "age": 42} function add now ```json\n true false null' * 9], 330))
    if request.param == "plain":
        return plain
    content = json.loads(plain.to_json())
    for added in content["added_tokens"]:
        added["special"] = True
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


class Family:
    """One format, and texts in it."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.chat, self.tokenizer = ChatFormat.named(name, tokenizer), tokenizer
        self.between = "" if name == "deepseek-v3.1" else "\n"
        self._call = v31_call if name == "deepseek-v3.1" else v3_call
        self._guide = LLTokenizer(
            tokenizer.to_json(), n_vocab=tokenizer.vocab_size + 3, eos_token=[tokenizer.token_id(EOS)]
        )

    def calls(self, *calls: tuple[str, str]) -> str:
        return CALLS_BEGIN + self.between.join(self._call(*call) for call in calls) + CALLS_END

    def form(self, thinking: bool | None = None, **request: Any) -> OutputForm | None:
        prompt = self.chat.prompt([user("?")], request.get("tools"), thinking)
        return output_form(self.chat, prompt, self.tokenizer, **request)

    def takes(self, form: OutputForm | None, text: str, end: bool = True) -> bool:
        """Whether a model held to the form may write the text, and then end."""
        assert form is not None
        StructuredOutput(form.kind, form.value)  # pyright: ignore[reportArgumentType]
        read = LLMatcher.grammar_from_lark
        grammar = read(form.value) if form.kind == "grammar" else LLMatcher.grammar_from_json_schema(form.value)
        matcher = LLMatcher(self._guide, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer.encode(text, parse_control=True)
        if matcher.validate_tokens(ids) < len(ids) or not matcher.consume_tokens(ids):
            return False
        return matcher.is_accepting() or not end


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Family:
    return Family(request.param, tokenizer)


def test_forced_calls(family: Family) -> None:
    form = family.form(tools=[ADD, NOW], tool_choice="required")
    one, two = family.calls(("add", '{"a": 1}')), family.calls(("now", "{}"), ("add", '{"a": 2.5}'))
    for text in (one, two):
        assert family.takes(form, text)
        prompt = family.chat.prompt([user("?")], [ADD, NOW], False if family.chat.reasoning else None)
        parsed = parse_output(text, family.chat.parser(prompt, [ADD, NOW]))
        assert parsed.content == "" and len(parsed.calls) == text.count(CALL_BEGIN)
    for text in ("so", "", f"so{one}", one + "so", family.calls(), family.calls(("add", '{"b": 1}'))):
        assert not family.takes(form, text)
    for text in (family.calls(("add", "1")), family.calls(("sub", "{}")), family.calls(("now", '{"a": 1}'))):
        assert not family.takes(form, text)
    assert not family.takes(family.form(tools=[ADD, NOW], tool_choice="required", parallel=False), two)
    assert family.takes(family.form(tools=[ADD, NOW], tool_choice="required", parallel=False), one)


def test_a_named_tool(family: Family) -> None:
    form = family.form(tools=[ADD, NOW], tool_choice=NAMED)
    assert family.takes(form, family.calls(("now", "{}")))
    assert not family.takes(form, family.calls(("add", '{"a": 1}')))
    assert not family.takes(form, family.calls(("now", "{}"), ("now", "{}")))


def test_no_calls_wanted(family: Family) -> None:
    form = family.form(tools=[ADD], tool_choice="none")
    assert family.takes(form, "any é text {") and family.takes(form, "")
    for marker in (CALLS_BEGIN, CALL_BEGIN):
        assert not family.takes(form, f"any{marker}", end=False)
    assert family.form(tool_choice="none") is None


def test_calls_as_the_model_likes(family: Family) -> None:
    assert family.form(tools=[ADD, NOW]) is None
    assert family.form(tools=[ADD, NOW], tool_choice="auto") is None
    assert family.form() is None


def test_strict_tools(family: Family) -> None:
    form = family.form(tools=[STRICT, NOW])
    good = family.calls(("add", '{"a": 1}'), ("now", '{"anything": [1, "é"]}'))
    for text in ("text", "", good, f"so: {good}"):
        assert family.takes(form, text)
    for text in (family.calls(("add", "{}")), family.calls(("now", "[]")), f"so: {CALLS_BEGIN}", good + "more"):
        assert not family.takes(form, text)


def test_one_call_at_most(family: Family) -> None:
    form = family.form(tools=[ADD, NOW], parallel=False)
    one = family.calls(("add", '{"b": 1}'))
    assert family.takes(form, f"so{one}") and family.takes(form, "so")
    assert not family.takes(form, family.calls(("now", "{}"), ("now", "{}")))


def test_json_or_calls(family: Family) -> None:
    form = family.form(tools=[ADD], response_format=JSON)
    assert family.takes(form, '{"x": 1}') and family.takes(form, family.calls(("add", "{}")))
    assert not family.takes(form, "text") and not family.takes(form, '{"x": 1}' + family.calls(("add", "{}")))
    form = family.form(tools=[ADD], tool_choice="none", response_format=JSON)
    assert family.takes(form, '{"x": 1}') and not family.takes(form, family.calls(("add", "{}")))


def test_json(family: Family) -> None:
    form = family.form(response_format=JSON, thinking=False if family.chat.reasoning else None)
    assert form is not None and form.kind == "json_schema"
    assert family.takes(form, '{"x": [1]}') and not family.takes(form, "[1]")
    form = family.form(response_format=SCHEMA)
    assert family.takes(form, '{"a": 1}') and not family.takes(form, '{"x": 1}')


def test_r1_puts_line_ends_before_its_answer(tokenizer: Tokenizer) -> None:
    family = Family("deepseek-r1", tokenizer)
    requests: list[tuple[dict[str, Any], str]] = [
        ({"response_format": JSON}, '{"x": 1}'),
        ({"tools": [ADD], "tool_choice": "required"}, family.calls(("add", '{"a": 1}'))),
        ({"tools": [ADD], "response_format": JSON}, family.calls(("add", "{}"))),
    ]
    for request, text in requests:
        form = family.form(**request)
        assert all(family.takes(form, lead + text) for lead in ("", "\n", "\n\n"))
        assert not family.takes(form, "\n\n\n" + text)
        assert not family.takes(family.form(thinking=False, **request), "\n\n" + text)
    prompt = family.chat.prompt([user("?")], [ADD])
    form = output_form(family.chat, prompt, tokenizer, [ADD], "required")
    assert form is not None and family.takes(form, "\n\n" + family.calls(("add", '{"a": 1}')))


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_an_engine_held_to_a_form_writes_is_calls(seed: int, thinking: bool, tokenizer: Tokenizer) -> None:
    """Any tokens that the engine's masks let through, as a model of random logits would choose them."""
    family = Family("deepseek-v3.1" if seed % 2 else "deepseek-r1", tokenizer)
    level = {"type": "object", "properties": {"level": {"enum": ["é", 7]}}, "required": ["level"]}
    tools = [NOW, {"function": {"name": "set", "parameters": {**level, "additionalProperties": False}}}]
    prompt = family.chat.prompt([user("?")], tools, thinking)
    form = output_form(family.chat, prompt, tokenizer, tools, "required", parallel=seed != 2)
    assert form is not None
    end, vocab_size = tokenizer.token_id(EOS), tokenizer.vocab_size + 3
    compiler = StructureCompiler(tokenizer.to_json(), vocab_size, [end])
    reasoning_end = open_reasoning(tokenizer, encode_parts(tokenizer, prompt.parts).ids.tolist())
    assert (reasoning_end is not None) is thinking
    structure, rng = compiler.compile(StructuredOutput(*form), reasoning_end), np.random.default_rng(seed)  # pyright: ignore[reportArgumentType]
    ids = tokenizer.encode("name age null <think> ```json") if thinking else []
    ids += [reasoning_end] if reasoning_end is not None else []
    structure.advance(ids)
    while ids[-1:] != [end] and len(ids) < 400:
        mask = structure.masks()[0]
        assert mask is not None
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        visible = [i for i in allowed.tolist() if tokenizer.decode([i]).strip()]  # white space could go on without end
        ids.append(int(rng.choice(visible or allowed)))
        structure.advance(ids[-1:])
    text = family.chat.shown(tokenizer).decode(ids[:-1], skip_control=True)
    parsed = parse_output(text, family.chat.parser(prompt, tools))
    assert ids[-1] == end and parsed.content == "" and bool(parsed.reasoning) is thinking
    assert parsed.calls and all(one.complete for one in parsed.calls) and (seed != 2 or len(parsed.calls) == 1)
    for one in parsed.calls:
        arguments = json.loads(one.arguments)
        assert arguments == {} if one.name == "now" else arguments in ({"level": "é"}, {"level": 7})


@pytest.mark.parametrize("strict", [True, False])
def test_keywords_that_llguidance_does_not_know(strict: bool, tokenizer: Tokenizer) -> None:
    """Refused where the schema has to be followed, left out where it is a wish."""
    schema = {**NUMBER, "dependentSchemas": {"a": {}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": schema, "strict": strict}}
    wished = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}
    family = Family("deepseek-v3.1", tokenizer)
    for form, text in (
        (family.form(tools=[tool], tool_choice="required"), family.calls(("add", '{"a": 1}'))),
        (family.form(response_format=wished), '{"a": 1}'),
    ):
        if strict:
            with pytest.raises(AssertionError, match="Unimplemented keys"):
                family.takes(form, text)
        else:
            assert family.takes(form, text) and not family.takes(form, text.replace('"a"', '"b"'))


def test_texts_that_spell_a_marker_are_no_marker(tokenizer: Tokenizer) -> None:
    family = Family("deepseek-v3", tokenizer)
    form = family.form(tools=[ADD], tool_choice="required")
    assert form is not None
    spelt = tokenizer.encode(family.calls(("add", '{"a": 1}')))
    matcher = LLMatcher(family._guide, LLMatcher.grammar_from_lark(form.value), log_level=0)
    assert matcher.validate_tokens(spelt) == 0


def test_ends_are_no_text(tokenizer: Tokenizer) -> None:
    family = Family("deepseek-v3", tokenizer)
    chat, prompt = family.chat, family.chat.prompt([user("?")], [ADD])
    form = output_form(chat, prompt, tokenizer, [ADD], "none", ends=[5, 1])
    marks = [tokenizer.token_id(marker) for marker in (CALLS_BEGIN, CALL_BEGIN)]
    assert form is not None and f"<[^{','.join(map(str, sorted([1, 5, *marks])))}]>*" in form.value


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"response_format": "json"}, "response_format.type: None must be text, json_object or json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type: 'xml' must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: give"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}, "response_format.json_schema: "),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 7}}},
            "response_format.json_schema.strict: 7 must be",
        ),
        ({"tools": [ADD], "tool_choice": "required", "response_format": JSON}, "response_format: an answer that has"),
        ({"tool_choice": "required"}, "tool_choice: there are no tools"),
        ({"tools": [STRICT, {"function": {"name": "x", "parameters": {"a": {1}}, "strict": True}}]}, "a JSON schema"),
    ],
)
def test_what_is_no_form(request_: dict[str, Any], said: str, tokenizer: Tokenizer) -> None:
    chat = ChatFormat.named("deepseek-v3", tokenizer)
    with pytest.raises(ValueError) as caught:
        output_form(chat, chat.prompt([user("?")]), tokenizer, **request_)
    assert str(caught.value).startswith(said)


def test_formats_without_calls() -> None:
    small = train_bpe(["text and text\n"], 270)
    chat = ChatFormat.named("plain", small)
    prompt = chat.prompt([user("?")])
    with pytest.raises(ValueError, match=r"tools: the model's chat format \(plain@1\) has no calls of tools"):
        output_form(chat, prompt, small, [ADD])
    assert output_form(chat, prompt, small, response_format=JSON) == OutputForm("json_schema", {"type": "object"})
    r1 = ChatFormat.named("deepseek-r1", small)
    with pytest.raises(ValueError, match="the tokenizer has no token </think>"):
        output_form(r1, r1.prompt([user("?")]), small, response_format=JSON)


def test_response_formats() -> None:
    assert response_schema(None) is None and response_schema({"type": "text"}) is None
    assert response_schema(JSON) == {"type": "object"}
    assert response_schema(SCHEMA) == NUMBER
    wished = {"type": "json_schema", "json_schema": {"schema": NUMBER}}
    assert response_schema(wished) == {**NUMBER, "x-guidance": {"lenient": True}}
    assert response_schema({"type": "json_schema", "json_schema": {"schema": True}}) is True
