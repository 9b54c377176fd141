"""Formats of model families: prompts, what they say of reasoning, round trips, and folders told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.text.chat_format import FORMATS, ChatFormat, Prompt
from abyssal.text.output_parser import parse_output
from abyssal.text.reasoning import PromptEnd, prompt_end
from abyssal.text.template import ChatTemplate
from abyssal.text.template_parts import Part
from abyssal.text.tokenizer import EOS, Tokenizer, train_bpe
from abyssal.text.tool_syntax import V3_CALLS, V31_CALLS
from abyssal.text.tools import NO_PARAMETERS, ToolChoice, offered_tools, tool_choice_of
from tests.support.chat_outputs import CALL_BEGIN, NAMES, SEP, v3_call
from tests.support.templates import CALL, CHATML, TOOL, assistant, system, tool, user

TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
WITH_TOOLS = [name for name, (_, tools, _) in FORMATS.items() if tools is not None]
REASONING = [name for name, (_, _, reasoning) in FORMATS.items() if reasoning is not None]
CHATS = {name: ChatFormat.named(name) for name in FORMATS}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(["the user and the assistant talk about 12 tools\n" * 3], 280)


@pytest.fixture(scope="module")
def tokenizer(small: Tokenizer) -> Tokenizer:
    return small.with_control_tokens([token for name in CHATS for token in CHATS[name].template.format_tokens])


# ---- there and back

words = st.text(max_size=6)
spaced = st.lists(st.one_of(words, st.sampled_from(["\n", "\n\n", "```", "</", "<｜", "<", "{"])), max_size=4).map(
    "".join
)
arguments = st.dictionaries(words, st.one_of(words, st.integers(), st.lists(words, max_size=2)), max_size=2).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)
called = st.lists(st.tuples(st.sampled_from(NAMES), arguments), max_size=3)


def message(content: str, calls: list[tuple[str, str]]) -> dict[str, Any]:
    answer = assistant(content)
    if calls:
        answer["content"] = content or None
        answer["tool_calls"] = [
            {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ]
    return answer


def written(chat: ChatFormat, prompt: Prompt, answer: dict[str, Any], **options: Any) -> str:
    """What the model would have written, had it given this answer to the prompt."""
    whole = chat.prompt([system("Be brief."), user("2+2?"), answer], generate=False, **options).text
    assert whole.startswith(prompt.text) and whole.endswith(EOS)
    return whole[len(prompt.text) :].removesuffix(EOS)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20, deadline=None)
@given(content=spaced, calls=called, reasoning=spaced.filter(bool), thinks=st.booleans())
def test_what_is_rendered_parses_to_the_message(
    name: str, content: str, calls: list[tuple[str, str]], reasoning: str, thinks: bool
) -> None:
    chat, thinks = CHATS[name], thinks and name in REASONING
    tools = TOOLS if name in WITH_TOOLS else None
    answer = message(content, calls if tools else [])
    thinking = thinks if name in REASONING else None
    if thinks:
        answer["reasoning_content"] = reasoning
    prompt = chat.prompt([system("Be brief."), user("2+2?")], tools, thinking)
    text = written(chat, prompt, answer, tools=tools, thinking=thinking)
    assert parse_output(text, chat.parser(prompt, tools)).message() == answer


# ---- thinking


@pytest.mark.parametrize(
    ("name", "thinking", "tail", "end"),
    [
        ("deepseek-v2.5", None, "<｜Assistant｜>", PromptEnd.CLOSED),
        ("deepseek-v3", False, "<｜Assistant｜>", PromptEnd.CLOSED),
        ("deepseek-r1", None, "<｜Assistant｜><think>\n", PromptEnd.OPEN),
        ("deepseek-r1", True, "<｜Assistant｜><think>\n", PromptEnd.OPEN),
        ("deepseek-r1", False, "<｜Assistant｜><think>\n\n</think>\n\n", PromptEnd.CLOSED),
        ("deepseek-v3.1", None, "<｜Assistant｜></think>", PromptEnd.CLOSED),
        ("deepseek-v3.1", False, "<｜Assistant｜></think>", PromptEnd.CLOSED),
        ("deepseek-v3.1", True, "<｜Assistant｜><think>", PromptEnd.OPEN),
        ("plain", None, "\n\nAssistant:", PromptEnd.CLOSED),
    ],
)
def test_thinking_on_and_off(name: str, thinking: bool | None, tail: str, end: PromptEnd) -> None:
    prompt = CHATS[name].prompt([user("<think>2+2?")], thinking=thinking)
    assert prompt.text.endswith(tail) and prompt.end is end
    text = "hm</think>4"
    parsed = parse_output(text, CHATS[name].parser(prompt))
    assert (parsed.reasoning, parsed.content) == (("hm", "4") if end is PromptEnd.OPEN else ("", text))


@pytest.mark.parametrize("name", sorted(set(FORMATS) - set(REASONING)))
def test_thinking_that_a_format_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^thinking: .*\({name}@1\) has no reasoning"):
        CHATS[name].prompt([user("?")], thinking=True)


def test_reasoning_behind_a_tools_result() -> None:
    """No tag ends these prompts, and the model may open its reasoning itself."""
    messages = [user("?"), assistant("", tool_calls=[CALL]), tool("3")]
    for name, text in (("deepseek-r1", "<think>\nhm\n</think>\n\n3."), ("deepseek-v3.1", "<think>hm</think>3.")):
        prompt = CHATS[name].prompt(messages, [TOOL])
        assert prompt.end is PromptEnd.FREE
        parsed = parse_output(text, CHATS[name].parser(prompt, [TOOL]))
        assert (parsed.reasoning, parsed.content) == ("hm", "3.")
        assert parse_output("3.", CHATS[name].parser(prompt, [TOOL])).content == "3."


def test_reasoning_in_the_history_is_accepted() -> None:
    messages = [user("?"), assistant("4", reasoning_content="hm"), user("!")]
    for name in FORMATS:
        prompt = CHATS[name].prompt(messages)
        assert "hm" not in prompt.text and "4" in prompt.text


def test_reasoning_that_is_gone_on_with() -> None:
    unfinished = assistant("", reasoning_content="hm, ", prefix=True)
    for name in REASONING:
        prompt = CHATS[name].prompt([user("?"), unfinished], thinking=True)
        assert prompt.text.endswith("hm, ") and prompt.end is PromptEnd.OPEN
        assert parse_output("\nyes</think>4", CHATS[name].parser(prompt)).reasoning == "\nyes"
    going_on = CHATS["plain"].prompt([user("?"), assistant("fo", prefix=True)])
    assert going_on.text.endswith("Assistant: fo")
    assert parse_output(" ur", CHATS["plain"].parser(going_on)).content == " ur"


@pytest.mark.parametrize(
    ("parts", "end"),
    [
        ([], PromptEnd.FREE),
        ([Part("<think>")], PromptEnd.OPEN),
        ([Part("a</think>b<think>c")], PromptEnd.OPEN),
        ([Part("<think>"), Part("</think>", control=False)], PromptEnd.OPEN),
        ([Part("<think>a</think>"), Part("<think>", control=False)], PromptEnd.FREE),
        ([Part("<think>a</think>\n\n")], PromptEnd.CLOSED),
        ([Part("<think>a</think>"), Part("\n\n")], PromptEnd.CLOSED),
        ([Part("<think>a</think>b"), Part("\n\n")], PromptEnd.FREE),
    ],
)
def test_how_a_prompt_leaves_reasoning(parts: list[Part], end: PromptEnd) -> None:
    assert prompt_end(parts) is end


# ---- tools


def test_tools_that_a_format_does_not_have() -> None:
    plain = CHATS["plain"]
    with pytest.raises(ValueError, match=r"^tools: the model's chat format \(plain@1\) has no calls of tools"):
        plain.prompt([user("?")], [TOOL])
    with pytest.raises(ValueError, match=r"^messages: "):
        plain.prompt([user("?"), assistant("", tool_calls=[CALL]), tool("3")])
    assert plain.prompt([user("?")], []).text == plain.prompt([user("?")]).text


def results(*ids: str | None) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": f"of {one}", "tool_call_id": one} for one in ids]


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = assistant("", tool_calls=[{**CALL, "id": one} for one in "abc"])
    for name in WITH_TOOLS:
        chat = CHATS[name]
        shuffled = chat.prompt([user("?"), calls, *results("c", "a", "b")]).text
        assert shuffled == chat.prompt([user("?"), calls, *results("a", "b", "c")]).text
        assert shuffled.index("of a") < shuffled.index("of b") < shuffled.index("of c")
        unnamed = chat.prompt([user("?"), calls, *results(None, "b", "a")]).text
        assert unnamed.index("of None") < unnamed.index("of b") < unnamed.index("of a")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([*results("a")], "messages[1]: a tool's result has to follow"),
        ([assistant("b"), *results("a")], "messages[2]: a tool's result has to follow"),
        ([*results("a", "b", "d")], "messages[4].tool_call_id: 'd' is none of messages[1].tool_calls, which are ['a',"),
        ([*results("a", "b", "a")], "messages[4].tool_call_id: 'a' has a result already"),
        ([*results("a"), user("!")], "messages[1].tool_calls: no message of role tool answers 'b'"),
        ([], "messages[1].tool_calls: no message of role tool answers 'a'"),
    ],
)
def test_results_that_answer_no_call(messages: list[dict[str, Any]], said: str) -> None:
    calls = assistant("", tool_calls=[{**CALL, "id": one} for one in "ab"])
    before = [user("?")] if said.startswith(("messages[1]: ", "messages[2]: ")) else [user("?"), calls]
    with pytest.raises(ValueError) as caught:
        CHATS["deepseek-v3"].prompt([*before, *messages])
    assert str(caught.value).startswith(said)


def test_tools_are_read() -> None:
    strict = {"type": "function", "function": {"name": "a-b", "strict": True, "parameters": {"properties": {}}}}
    first, second = offered_tools([TOOLS[0], strict])
    assert (first.name, first.parameters, first.strict) == ("get", NO_PARAMETERS, False)
    assert (second.name, second.parameters, second.strict) == ("a-b", {"type": "object", "properties": {}}, True)
    assert offered_tools(None) == offered_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (7, "tools: 7 must be a list"),
        ([{"type": "function"}], r"tools\[0\]: .* must be"),
        ([{**TOOL, "type": "custom"}], r"tools\[0\].type: 'custom' is not supported"),
        ([{"function": {"name": ""}}], r"tools\[0\].function.name: '' must be 1 to 128 letters"),
        ([{"function": {"name": SEP}}], r"tools\[0\].function.name: "),
        ([{"function": {"name": "a" * 129}}], r"tools\[0\].function.name: "),
        ([TOOL, TOOL], r"tools\[1\].function.name: 'add' is offered twice"),
        ([{"function": {"name": "a", "strict": 1}}], r"tools\[0\].function.strict: 1 must be true or false"),
        ([{"function": {"name": "a", "parameters": 1}}], r"tools\[0\].function.parameters: "),
        ([{"function": {"name": "a", "parameters": {"type": "string"}}}], r"tools\[0\].function.parameters: "),
    ],
)
def test_what_is_no_tool(tools: object, said: str) -> None:
    with pytest.raises(ValueError, match="^" + said):
        offered_tools(tools)


def test_tool_choices_are_read() -> None:
    offered = offered_tools(TOOLS)
    named = {"type": "function", "function": {"name": "get"}}
    for choice, mode, name in (
        (None, "auto", None),
        ("none", "none", None),
        ("auto", "auto", None),
        ("required", "required", None),
        (named, "named", "get"),
    ):
        assert tool_choice_of(choice, offered) == ToolChoice(mode, name)
    assert tool_choice_of(None, ()) == tool_choice_of("none", ()) == ToolChoice("none")
    other = {"type": "function", "function": {"name": "other"}}
    for choice, tools, said in (
        ("any", offered, "tool_choice: 'any' must be none, auto, required or"),
        ({"type": "allowed_tools"}, offered, "tool_choice: {'type': 'allowed_tools'} must be"),
        (other, offered, "tool_choice.function.name: 'other' is not among the tools offered: get, get_time, function"),
        ({"type": "function"}, offered, "tool_choice.function.name: None is not among"),
        ("required", (), "tool_choice: there are no tools to choose from"),
    ):
        with pytest.raises(ValueError) as caught:
            tool_choice_of(choice, tools)
        assert str(caught.value).startswith(said)


# ---- folders

_SYSTEM = "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
_ENDED = "{{ m.content }}{{ eos_token }}"
_CALLS = {
    "v3": "{% for c in m.tool_calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n```json\n"
    "{{ c.function.arguments }}\n```<｜tool▁call▁end｜>{% endfor %}",
    "v3.1": "{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}",
}


def like_published(behind_assistant: str, calls: str = "v3", describe: bool = False, only_null: bool = True) -> str:
    """A template that does what DeepSeek's do: tools unseen, calls only where content is null."""
    answer = "{% if m.tool_calls %}" + _CALLS[calls] + "{% endif %}{% if m.content %}" + _ENDED + "{% endif %}"
    if only_null:
        answer = "{% if m.content is none %}" + _CALLS[calls] + "{% else %}" + _ENDED + "{% endif %}"
    return (
        _SYSTEM
        + ("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" if describe else "")
        + "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        + "{% elif m.role == 'assistant' %}<｜Assistant｜>"
        + answer
        + "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
        + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<｜Assistant｜>"
        + behind_assistant
        + "{% endif %}"
    )


SWITCHED = "{% if thinking %}<think>{% else %}</think>{% endif %}"
ENABLED = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"


def write(folder: Path, tokenizer: Tokenizer, template: str | None = None, architecture: str = "deepseek_v3") -> Path:
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": architecture}), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("template", "architecture", "name"),
    [
        (like_published(""), "deepseek_v3", "deepseek-v3"),
        (like_published(""), "deepseek_v2", "deepseek-v2.5"),
        (like_published("<think>\n"), "deepseek_v3", "deepseek-r1"),
        (like_published(ENABLED), "deepseek_v3", "deepseek-r1"),
        (like_published(SWITCHED, "v3.1"), "deepseek_v3", "deepseek-v3.1"),
    ],
)
def test_families_are_told_by_what_their_templates_do(
    template: str, architecture: str, name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, template, architecture))
    assert (chat.name, chat.label) == (name, f"{name}@1")
    own, builtin = ChatTemplate.from_folder(tmp_path), ChatTemplate.builtin(name, tokenizer)
    messages = [system("s"), user("a")]
    assert chat.prompt(messages).text == own.render(messages, add_generation_prompt=True)
    # what the template leaves out is rendered by the built-in one
    assert chat.prompt(messages, [TOOL]).text == builtin.render(messages, [TOOL], add_generation_prompt=True)
    history = [*messages, assistant("", tool_calls=[CALL]), tool("3")]
    assert chat.prompt(history).text == builtin.render(history, add_generation_prompt=True)
    assert f"leaves out tools or calls; where there are any, the built-in {name} is used" in chat.notes[0]


@pytest.mark.parametrize(("calls", "syntax"), [("v3", V3_CALLS), ("v3.1", V31_CALLS)])
def test_a_template_that_shows_tools_is_used_with_tools(
    calls: str, syntax: object, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = like_published(SWITCHED, calls, describe=True, only_null=False)
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, source))
    assert (chat.name, chat.tools, chat.notes) == ("deepseek-v3.1", syntax, ())
    assert chat.prompt([user("a")], [TOOL]).text == ChatTemplate.from_folder(tmp_path).render(
        [user("a")], [TOOL], add_generation_prompt=True
    )


def test_a_template_that_quotes_arguments_again_is_not_used_for_calls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = like_published("", describe=True, only_null=False).replace("arguments }}", "arguments | tojson }}")
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, source))
    assert '{\\"' not in chat.prompt([user("a"), assistant("", tool_calls=[CALL])], generate=False).text


def test_a_template_that_shows_calls_behind_text_alone_is_not_used_for_calls(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = like_published("", describe=True, only_null=False).replace("if m.tool_calls", "if m.content")
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, source))
    assert "add" in chat.prompt([user("a"), assistant("", tool_calls=[CALL])], generate=False).text


def test_reasoning_that_is_gone_on_with_in_a_folders_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, like_published("<think>\n")))
    unfinished = assistant("", reasoning_content="hm, ", prefix=True)
    assert chat.prompt([user("?"), unfinished]).text.endswith("<｜Assistant｜><think>\nhm, ")


def test_thinking_that_a_template_ignores(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatFormat.of_folder(write(tmp_path / "r1", tokenizer, like_published("<think>\n")))
    assert chat.prompt([user("?")], thinking=True).end is PromptEnd.OPEN
    with pytest.raises(ValueError, match=r"^thinking: .*\(deepseek-r1@1\) always reasons; leave it out"):
        chat.prompt([user("?")], thinking=False)
    chat = ChatFormat.of_folder(write(tmp_path / "closed", tokenizer, like_published("<think></think>")))
    assert chat.name == "deepseek-r1"
    with pytest.raises(ValueError, match=r"^thinking: .* ends reasoning in any case"):
        chat.prompt([user("?")], thinking=True)
    chat = ChatFormat.of_folder(write(tmp_path / "by itself", tokenizer, like_published(ENABLED)))
    prompt = chat.prompt([user("?")], thinking=True)
    assert prompt.end is PromptEnd.FREE
    assert parse_output("<think>\nhm\n</think>\n\n4", chat.parser(prompt)).reasoning == "hm"


def test_a_line_end_that_the_template_leaves_to_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatFormat.of_folder(write(tmp_path, tokenizer, like_published("<think>")))
    assert parse_output("\nhm\n</think>\n\n4", chat.parser(chat.prompt([user("?")]))).reasoning == "hm"


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_folder_with_a_built_in_template(name: str, small: Tokenizer, tmp_path: Path) -> None:
    attached = CHATS[name].template.attach(small)
    chat = ChatFormat.of_folder(write(tmp_path, attached))
    assert (chat.name, chat.notes) == (name, ())


def test_a_folder_without_a_template(small: Tokenizer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatFormat.of_folder(write(tmp_path / "v3", tokenizer))
    assert chat.label == "deepseek-v3@1" and "is taken for DeepSeek-V3" in chat.notes[0]
    for folder in (write(tmp_path / "tiny", small), write(tmp_path / "llama", tokenizer, architecture="llama")):
        chat = ChatFormat.of_folder(folder)
        assert chat.label == "plain@1" and "has no chat template" in chat.notes[0]
    prompt = chat.prompt([system("s"), user("a"), assistant("b"), user("c")])
    assert prompt.text.endswith(f"s\n\nUser: a\n\nAssistant: b{EOS}User: c\n\nAssistant:")


def test_a_template_of_no_known_family(small: Tokenizer, tmp_path: Path) -> None:
    chat = ChatFormat.of_folder(write(tmp_path, small, CHATML))
    assert chat.label == "plain@1" and "is of no known family" in chat.notes[0]
    prompt = chat.prompt([user("a")])
    assert prompt.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert parse_output(" a", chat.parser(prompt)).content == " a"


def test_tokens_that_a_tokenizer_lacks(small: Tokenizer, tmp_path: Path) -> None:
    few = small.with_control_tokens(["<｜User｜>", "<｜Assistant｜>"])
    chat = ChatFormat.of_folder(write(tmp_path, few, CHATS["deepseek-v3.1"].template.source))
    assert chat.tools is None and chat.reasoning is None
    assert [note.split(", ")[0] for note in chat.notes] == [
        "the tokenizer has no tokens for calls",
        "the tokenizer has no tokens for reasoning",
    ]


def test_text_shows_what_the_parser_reads(small: Tokenizer) -> None:
    """Tokens marked special are left out of an engine's text; DeepSeek's own for calls are not marked so."""
    chat = CHATS["deepseek-r1"]
    text = f"hm\n</think>\n\n{v3_call('get', '{}')}"
    ours = chat.template.attach(small)
    assert ours.decode(ours.encode(text + EOS, parse_control=True), skip_control=True) == text
    assert chat.shown(ours) is ours
    content = json.loads(ours.to_json())
    for added in content["added_tokens"]:
        added["special"] = True
    hidden = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    ids = hidden.encode(text + EOS, parse_control=True)
    assert CALL_BEGIN not in hidden.decode(ids, skip_control=True)
    shown = chat.shown(hidden)
    assert shown.encode(text + EOS, parse_control=True) == ids
    assert shown.decode(ids, skip_control=True) == text
    assert b"".join(shown.byte_strings(skip_control=True)[i] for i in ids).decode() == text
    assert (shown.bos_token_id, shown.eos_token_id) == (hidden.bos_token_id, hidden.eos_token_id)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"chat format: 'gpt-7' is unknown; give one of deepseek-v2.5, "):
        ChatFormat.named("gpt-7")


def test_formats_need_no_torch() -> None:
    script = (
        "import sys, abyssal.text.chat_format, abyssal.text.output_form\n"
        "assert not {'torch', 'llguidance'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
