"""Chat templates: DeepSeek's formats as published, what is learned of them, and nothing that a message can forge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.text import template_sandbox
from abyssal.text.template import BUILTIN_TEMPLATES, ChatTemplate
from abyssal.text.template_parts import Part, encode_parts, join
from abyssal.text.tokenizer import BOS, EOS, Tokenizer, train_bpe
from tests.support.templates import (
    CALL,
    CHATML,
    CONVERSATIONS,
    FORGETFUL,
    TAGGED,
    TOOL,
    assistant,
    system,
    tool,
    user,
)

V3, R1, V31, V25 = (ChatTemplate.builtin(name) for name in BUILTIN_TEMPLATES)
IM = ("<|im_start|>", "<|im_end|>")
CALLED = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1, "b": "é<2"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def learned(parts: list[Part]) -> list[str]:
    """Texts that are learned, one for each run of them."""
    runs: list[str] = []
    previous = False
    for part in parts:
        if part.trained:
            runs[-1:] = [runs[-1] + part.text] if previous else [*runs[-1:], part.text]
        previous = part.trained
    return runs


def refused(template: ChatTemplate, messages: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        template.render_parts(messages, **options)
    return str(caught.value)


# ---- DeepSeek's formats


def test_v3() -> None:
    messages = [system("Be brief."), user("Hi"), assistant("Hello"), user("Bye")]
    text = f"{BOS}Be brief.<｜User｜>Hi<｜Assistant｜>Hello{EOS}<｜User｜>Bye"
    assert V3.render(messages) == text
    assert V3.render(messages, add_generation_prompt=True) == text + "<｜Assistant｜>"
    assert V3.render([system("a"), system("b"), user("c")]) == f"{BOS}a\n\nb<｜User｜>c"
    assert learned(V3.render_parts(messages)) == [f"Hello{EOS}"]


def test_v3_calls_tools_and_hears_from_them() -> None:
    messages = [user("1+2?"), assistant("So:", tool_calls=[CALL]), tool("3"), tool("three")]
    prompt = V3.render(messages, add_generation_prompt=True)
    assert prompt == (
        f"{BOS}<｜User｜>1+2?<｜Assistant｜>So:{CALLED}{EOS}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜>"
        "\n<｜tool▁output▁begin｜>three<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )
    answered = [*messages, assistant("3.")]
    assert V3.render(answered) == f"{prompt}3.{EOS}"
    assert learned(V3.render_parts(answered)) == [f"So:{CALLED}{EOS}", f"3.{EOS}"]
    two = V3.render([user("?"), assistant("", tool_calls=[CALL, CALL])])
    assert two.endswith("```<｜tool▁call▁end｜>\n" + CALLED.removeprefix("<｜tool▁calls▁begin｜>") + EOS)
    nothing_said = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert V3.render([user("?"), nothing_said]) == f"{BOS}<｜User｜>?<｜Assistant｜>{CALLED}{EOS}"


@pytest.mark.parametrize("template", [V3, R1, V31, V25], ids=BUILTIN_TEMPLATES)
def test_tools_are_described_in_front(template: ChatTemplate) -> None:
    prompt = template.render([system("Be brief."), user("1+2?")], tools=[TOOL], add_generation_prompt=True)
    described, _, asked = prompt.partition("<｜User｜>")
    assert described.startswith(f"{BOS}Be brief.\n\n## Tools") and "Adds." in described and asked.startswith("1+2?")
    assert "".join(json.dumps(TOOL["function"]["parameters"]).split()) in "".join(described.split())
    assert template.render([user("1+2?")], tools=[]) == template.render([user("1+2?")])


def test_v25_describes_tools_as_published() -> None:
    """The example of the model card."""
    location = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
    function = {"name": "get_current_weather", "parameters": {"type": "object", "properties": {"location": location}}}
    text = V25.render([system("You are a helpful Assistant."), user("?")], tools=[{"function": function}])
    assert text == (
        f"{BOS}You are a helpful Assistant.\n\n## Tools\n\n### Function\n\n"
        "You have the following functions available:\n\n- `get_current_weather`:\n"
        f"```json\n{json.dumps(function, indent=4)}\n```<｜User｜>?"
    )
    for messages in CONVERSATIONS.values():
        assert V25.render(messages) == V3.render(messages)


def test_v31_describes_tools_as_published() -> None:
    assert V31.render([user("?")], tools=[TOOL]) == (
        f"{BOS}## Tools\nYou have access to the following tools:\n\n### add\nDescription: Adds.\n\n"
        'Parameters: {"type": "object", "properties": {"a": {"type": "number"}}}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
        "tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\n"
        "Where:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n<｜User｜>?"
    )


THOUGHT = [assistant("4", reasoning_content="hm"), assistant("<think>\nhm\n</think>\n\n4")]


@pytest.mark.parametrize("answer", THOUGHT, ids=["reasoning_content", "in the content"])
def test_r1_reasons_in_its_last_answer_alone(answer: dict[str, Any]) -> None:
    parts = R1.render_parts([user("2+2?"), answer])
    assert join(parts) == f"{BOS}<｜User｜>2+2?<｜Assistant｜><think>\nhm\n</think>\n\n4{EOS}"
    assert learned(parts) == [f"hm\n</think>\n\n4{EOS}"]
    later = R1.render([user("2+2?"), answer, user("Sure?")], add_generation_prompt=True)
    assert "hm" not in later and later.endswith("<｜Assistant｜><think>\n")
    assert learned(R1.render_parts([user("2+2?"), answer, user("Sure?")])) == []


def test_r1_without_reasoning() -> None:
    prompt = R1.render([user("2+2?")], add_generation_prompt=True, thinking=False)
    assert prompt == f"{BOS}<｜User｜>2+2?<｜Assistant｜><think>\n\n</think>\n\n"
    assert R1.render([user("2+2?"), assistant("4")]) == f"{prompt}4{EOS}"
    assert R1.render([user("2+2?"), THOUGHT[0]], thinking=False) == f"{prompt}4{EOS}"
    prompt = R1.render([user("2+2?")], add_generation_prompt=True)
    assert learned(R1.render_parts([user("2+2?"), assistant("4")])) == [f"\n</think>\n\n4{EOS}"]
    assert join(R1.render_parts([user("2+2?"), assistant("4")])).startswith(prompt)


def test_v31_thinks_or_not() -> None:
    question = f"{BOS}<｜User｜>2+2?<｜Assistant｜>"
    assert V31.render([user("2+2?")], add_generation_prompt=True) == f"{question}</think>"
    assert V31.render([user("2+2?")], add_generation_prompt=True, thinking=True) == f"{question}<think>"
    thought = V31.render_parts([user("2+2?"), THOUGHT[0]])
    assert join(thought) == f"{question}<think>hm</think>4{EOS}"
    assert learned(thought) == [f"hm</think>4{EOS}"]
    assert V31.render([user("2+2?"), THOUGHT[0]], thinking=False) == f"{question}</think>4{EOS}"
    plain = V31.render_parts([user("2+2?"), assistant("4")])
    assert join(plain) == f"{question}</think>4{EOS}" and learned(plain) == [f"4{EOS}"]
    later = V31.render_parts([user("2+2?"), THOUGHT[0], user("Sure?"), assistant("Yes")])
    assert join(later) == f"{question}</think>4{EOS}<｜User｜>Sure?<｜Assistant｜></think>Yes{EOS}"
    assert learned(later) == [f"Yes{EOS}"]


def test_v31_calls_tools() -> None:
    called = V31.render([user("?"), assistant("", tool_calls=[CALL, CALL]), tool("3")], add_generation_prompt=True)
    call = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": "é<2"}<｜tool▁call▁end｜>'
    assert called == (
        f"{BOS}<｜User｜>?<｜Assistant｜></think><｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>{EOS}"
        "<｜tool▁output▁begin｜>3<｜tool▁output▁end｜>"
    )


@pytest.mark.parametrize("template", [V3, R1, V31, V25], ids=BUILTIN_TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_answer_is_learned_once_behind_the_prompt_that_asks_for_it(template: ChatTemplate, name: str) -> None:
    """What is learned stands where the model's own text will stand, in front of it the very prompt it is given."""
    messages = CONVERSATIONS[name]
    learned_answers: list[str] = []
    for parts in template.render_samples(messages):
        for index, part in enumerate(parts):
            if part.trained and (index == 0 or not parts[index - 1].trained):
                before = join(parts[:index])
                prompts = {
                    template.render(messages[:count], add_generation_prompt=True, thinking=thinking)
                    for count in range(1, len(messages))
                    for thinking in (None, True)
                }
                assert before in prompts
        learned_answers += learned(parts)
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(learned_answers) == len(answers)
    for message, text in zip(answers, learned_answers, strict=True):
        assert message["content"].removeprefix("<think>").split("</think>")[-1] in text and text.endswith(EOS)


@pytest.mark.parametrize("template", [V3, R1, V31, V25], ids=BUILTIN_TEMPLATES)
def test_weight_zero_is_not_learned(template: ChatTemplate) -> None:
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]
    texts = [text for parts in template.render_samples(messages) for text in learned(parts)]
    assert len(texts) == 1 and texts[0].endswith(f"d{EOS}")
    assert template.render(messages) == template.render([{**m, "weight": 1} for m in messages])


@pytest.mark.parametrize("template", [V3, R1, V31, V25], ids=BUILTIN_TEMPLATES)
def test_an_unfinished_message_is_left_open(template: ChatTemplate) -> None:
    messages = [user("a"), assistant("b", prefix=True)]
    for add_generation_prompt in (False, True):
        text = template.render(messages, add_generation_prompt=add_generation_prompt and template is not R1)
        assert text.endswith("b") and text.startswith(f"{BOS}<｜User｜>a<｜Assistant｜>")


# ---- any template


def test_answers_are_found_by_comparing_beginnings() -> None:
    template = ChatTemplate(CHATML, "chatml", control_tokens=IM)
    parts = template.render_parts([user("a"), assistant("b"), user("c"), assistant("d", weight=0)])
    assert [part.text for part in parts if part.trained] == ["b<|im_end|>"]
    assert join(parts).endswith("c<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n")


def test_answers_are_found_by_tag() -> None:
    template = ChatTemplate(TAGGED, "tagged", BOS, EOS)
    messages = [system("s"), user("a"), assistant(" b "), user("c"), assistant("d", weight=0)]
    assert learned(template.render_parts(messages)) == [f"b{EOS}"]
    assert (
        join(template.render_parts(messages)) == template.render(messages) == f"{BOS}[USER]a[A]b{EOS}[USER]c[A]d{EOS}"
    )


def test_a_template_that_changes_earlier_answers_teaches_each_by_itself() -> None:
    template = ChatTemplate(FORGETFUL, "forgetful", None, EOS, ["<think>", "</think>"])
    messages = [user("a"), assistant("<think>b</think>\nc"), user("d"), assistant("e")]
    assert [learned(parts) for parts in template.render_samples(messages)] == [
        [f"<think>b</think>\nc{EOS}"],
        [f"e{EOS}"],
    ]
    message = refused(template, messages)
    assert "forgetful: messages[1]" in message and "drops earlier reasoning" in message and "deepseek-r1" in message


def test_a_prompt_that_does_not_begin_the_answer_is_refused() -> None:
    source = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    message = refused(ChatTemplate(source, "tok/chat_template.jinja"), [user("a"), assistant("b")])
    assert "tok/chat_template.jinja: messages[1]" in message and "<think>\\n" in message and "generation" in message


def test_an_unfinished_message_of_any_template() -> None:
    template = ChatTemplate(TAGGED, "tagged", BOS, EOS)
    assert (
        template.render([user("a"), assistant("b ", prefix=True)], add_generation_prompt=True) == f"{BOS}[USER]a[A]b "
    )
    silent = ChatTemplate("{{ messages[0].content }}", "silent")
    assert "silent: does not show the end of messages[1]" in refused(silent, [user("a"), assistant("b", prefix=True)])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') if messages[1] is defined }}", "messages[1] (user): roles must"),
        ("{{ messages[0].nothing.at_all }}", "messages[0] (user): 'dict object' has no attribute 'nothing'"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "loops went round more than"),
        ("{{ 'long' * 100000000 }}", "100000000 times 4 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "close each before the next"),
    ],
)
def test_what_a_template_may_not(source: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_LOOPS", 10_000)
    message = refused(ChatTemplate(source, "bad"), [user("a"), user("b"), assistant("c")])
    assert message.startswith("chat template bad: ") and said in message


def test_what_is_no_template() -> None:
    with pytest.raises(ValueError, match=r"chat template bad: not a Jinja template: line 2: "):
        ChatTemplate("a\n{% if %}", "bad")
    with pytest.raises(ValueError, match=r"'gpt-7' is unknown; give one of deepseek-v3, deepseek-r1, deepseek-v3.1"):
        ChatTemplate.builtin("gpt-7")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: [] must be a list of at least one message"),
        (["hi"], "messages[0]: 'hi' must be an object"),
        ([{"role": "bot", "content": ""}], "messages[0].role: 'bot' is unknown; give one of system, "),
        ([user("a"), {"role": "assistant"}], "messages[1].content: missing"),
        ([{"role": "user", "content": 3}], "messages[0].content: 3 must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]: "),
        ([user("a"), assistant("b", weight=0.5)], "messages[1].weight: 0.5 must be 0"),
        ([user("a"), assistant("b", reasoning_content=1)], "messages[1].reasoning_content: 1 must be text"),
        ([assistant("b", prefix=True), user("a")], "messages[0].prefix: only the last message"),
        ([{**user("a"), "prefix": True}], "messages[0].prefix: only an assistant's"),
        ([{**user("a"), "tool_calls": []}], "messages[0].tool_calls: only an assistant"),
        ([assistant("", tool_calls=[{"function": {}}])], "messages[0].tool_calls[0].function: {} must be"),
        (
            [assistant("", tool_calls=[{"function": {"name": "f"}}])],
            "messages[0].tool_calls[0].function.arguments: None",
        ),
    ],
)
def test_what_is_no_conversation(messages: Any, said: str) -> None:
    assert said in refused(V3, messages)


def test_texts_in_a_list_and_developers() -> None:
    messages = [{"role": "developer", "content": "s"}, user("ab")]
    listed = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert V3.render([messages[0], listed]) == V3.render([system("s"), messages[1]])
    assert refused(V3, messages, tools=[{"name": "f"}]).startswith("tools[0]: ")


# ---- tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the user and the assistant talk about 12 tools\n" * 3], 280).with_control_tokens(
        V31.format_tokens
    )


def test_control_tokens_are_added_behind_the_vocabulary() -> None:
    small = train_bpe(["the user and the assistant\n"], 270)
    larger = small.with_control_tokens(["<｜User｜>", EOS, "<｜User｜>", "<think>"])
    assert larger.vocab_size == small.vocab_size + 2
    assert larger.encode("<think>", parse_control=True) == [small.vocab_size + 1]
    assert larger.encode(f"<think>{EOS}") == small.encode(f"<think>{EOS}")
    assert (small.with_control_tokens([EOS]).content_hash(), small.vocab_size) == (small.content_hash(), 270)


def test_encoding_a_rendering_is_encoding_its_text(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.builtin("deepseek-v3.1", tokenizer)
    messages = CONVERSATIONS["tools"]
    prompt = template.render_prompt(messages)
    assert not any(part.trained for part in prompt)
    encoded = encode_parts(tokenizer, prompt)
    text = template.render(messages, add_generation_prompt=True)
    assert encoded.ids.tolist() == tokenizer.encode(text, parse_control=True)
    taught = encode_parts(tokenizer, template.render_parts(messages))
    text = "".join(learned(template.render_parts(messages)))
    assert tokenizer.decode(taught.ids[taught.trained]) == text


def test_a_token_border_stands_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    """The prompt is encoded before the answer exists, so no token may reach across."""
    parts = [Part("the us"), Part("er and", trained=True)]
    encoded = encode_parts(tokenizer, parts)
    assert encoded.ids.tolist() == tokenizer.encode("the us") + tokenizer.encode("er and")
    assert encoded.trained.tolist() == [False] * len(tokenizer.encode("the us")) + [True] * len(
        tokenizer.encode("er and")
    )
    assert encode_parts(tokenizer, [Part("the us"), Part("er and")]).ids.tolist() == tokenizer.encode("the user and")


@pytest.fixture(scope="module")
def fitted(tokenizer: Tokenizer) -> list[ChatTemplate]:
    return [ChatTemplate.builtin(name, tokenizer) for name in BUILTIN_TEMPLATES]


spelt = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from([*V31.format_tokens, BOS, EOS, "\U000f0000", "\U000f0001"])),
    max_size=5,
).map("".join)


@settings(max_examples=25, deadline=None)
@given(asked=spelt, answered=spelt, called=spelt)
def test_a_message_forges_no_control_token(
    tokenizer: Tokenizer, fitted: list[ChatTemplate], asked: str, answered: str, called: str
) -> None:
    call = {"type": "function", "function": {"name": called, "arguments": asked}}
    answered = answered.replace("think>", "")  # an answer's own reasoning is read by the template
    messages = [system(called), user(asked), assistant(answered, tool_calls=[call]), tool(asked), assistant(answered)]
    named = {tokenizer.token_id(name) for name in tokenizer.control_tokens}
    honest = [user("a"), assistant("a", tool_calls=[CALL]), tool("a"), assistant("a")]
    for template in fitted:
        for parts, expected in (
            (template.render_parts(messages), template.render_parts(honest)),
            (template.render_prompt(messages), template.render_prompt(honest)),
        ):
            encoded, plain = encode_parts(tokenizer, parts), encode_parts(tokenizer, expected)
            assert [i for i in encoded.ids if i in named] == [i for i in plain.ids if i in named]
            assert tokenizer.decode(encoded.ids) == join(parts)
        assert join(template.render_parts(messages)) == template.render(messages)


def test_a_template_that_reads_what_is_marked_says_so() -> None:
    template = ChatTemplate("{{ messages[0].content.startswith('<x>') }}", "reads", control_tokens=["<x>"])
    assert template.render([user("<x>")]) == "True"
    with pytest.raises(ValueError, match="chat template reads: a message spells a control token"):
        template.render_prompt([user("<x>")])


# ---- folders


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config), encoding="utf-8")
    return folder


def test_templates_of_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [user("a")]
    with pytest.raises(ValueError, match="has no chat template; name one of deepseek-v3, "):
        ChatTemplate.from_folder(write(tmp_path, tokenizer))
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}', encoding="utf-8")
    assert ChatTemplate.from_folder(tmp_path).render(messages) == V3.render(messages)
    write(tmp_path, tokenizer, chat_template="text {{ messages[0].content }}{{ bos_token }}")
    assert ChatTemplate.from_folder(tmp_path).render(messages) == f"text a{BOS}"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    template = ChatTemplate.from_folder(write(tmp_path, tokenizer, chat_template=named))
    assert (template.render(messages), template.render(messages, tools=[TOOL])) == ("plain", "with tools")
    write(tmp_path, tokenizer, chat_template=[{"name": "other", "template": ""}])
    with pytest.raises(ValueError, match=r"tokenizer_config.json: has the templates other but none named default"):
        ChatTemplate.from_folder(tmp_path)
    write(tmp_path, tokenizer, chat_template=["other"])
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be text or a list"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(R1.source, encoding="utf-8")
    template = ChatTemplate.from_folder(tmp_path)
    assert template.name == "deepseek-r1" and template.render(messages) == R1.render(messages)


def test_a_template_travels_with_the_tokenizer(tmp_path: Path) -> None:
    small = train_bpe(["the user and the assistant\n"], 270)
    ChatTemplate.builtin("deepseek-v3.1").attach(small).save(tmp_path / "builtin")
    saved = ChatTemplate.from_folder(tmp_path / "builtin")
    assert saved.name == "deepseek-v3.1"
    assert set(V31.format_tokens) <= set(Tokenizer.from_folder(tmp_path / "builtin").control_tokens)
    ChatTemplate("plain", "two", tool_source="with tools").attach(small).save(tmp_path / "two")
    saved = ChatTemplate.from_folder(tmp_path / "two")
    assert (saved.render([user("a")]), saved.render([user("a")], tools=[TOOL])) == ("plain", "with tools")


def test_rendering_needs_no_torch() -> None:
    program = "import sys, abyssal.text.template; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
