"""A model's text taken apart: the same wherever it is cut, nothing lost, and calls only where there are calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abyssal.text.chat_format import FORMATS
from abyssal.text.output_delta import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Delta,
    ParsedOutput,
    Reasoning,
    ToolCall,
    collect,
    merge,
)
from abyssal.text.output_parser import OutputParser, parse_output
from abyssal.text.reasoning import PromptEnd
from tests.support.chat_outputs import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    NAMES,
    PIECES,
    SEP,
    read_whole,
    v3_call,
    v31_call,
)

MOST_HELD = 400
"""Characters that may be held back: a header of a long name with all its white space."""
V3, R1, V31 = "deepseek-v3", "deepseek-r1", "deepseek-v3.1"


def new_parser(name: str, end: PromptEnd = PromptEnd.CLOSED, names: Sequence[str] = NAMES, **options: object):
    _, tools, reasoning = FORMATS[name]
    return OutputParser(tools, names, reasoning, end, new_id=str, **options)  # pyright: ignore[reportArgumentType]


def parse(name: str, text: str, end: PromptEnd = PromptEnd.CLOSED, names: Sequence[str] = NAMES) -> ParsedOutput:
    """Of the whole text, and of its characters one by one."""
    whole = parse_output(text, new_parser(name, end, names))
    parser = new_parser(name, end, names)
    deltas = [delta for character in text for delta in parser.push(character)]
    assert collect([*deltas, *parser.finish()]) == whole
    return whole


def call(number: int, name: str, arguments: str, complete: bool = True) -> ToolCall:
    return ToolCall(str(number), name, arguments, complete)


# ---- published examples


def test_v3_calls_in_parallel() -> None:
    """The model card of V2.5."""
    tokyo, paris = '{"location": "Tokyo"}', '{"location": "Paris"}'
    text = f"{CALLS_BEGIN}{v3_call('get', tokyo)}\n{v3_call('get', paris)}{CALLS_END}"
    assert parse("deepseek-v2.5", text) == ParsedOutput(calls=(call(0, "get", tokyo), call(1, "get", paris)))


def test_v31_calls_in_parallel() -> None:
    now = '{"a": 1}'
    text = f"So:{CALLS_BEGIN}{v31_call('get', '{}')}{v31_call('get_time', now)}{CALLS_END}"
    assert parse(V31, text) == ParsedOutput("", "So:", (call(0, "get", "{}"), call(1, "get_time", now)))


def test_r1_reasons_and_calls() -> None:
    text = f"I should look.\n</think>\n\nLooking.{CALLS_BEGIN}{v3_call('get', '{}')}{CALLS_END}"
    assert parse(R1, text, PromptEnd.OPEN) == ParsedOutput("I should look.", "Looking.", (call(0, "get", "{}"),))


def test_v31_reasons() -> None:
    assert parse(V31, "\nhm\n</think>\n\n4", PromptEnd.OPEN) == ParsedOutput("\nhm\n", "\n\n4")
    assert parse(V31, "4 </think>", PromptEnd.CLOSED) == ParsedOutput("", "4 </think>")


def test_the_shape_of_a_stream() -> None:
    parser = new_parser(R1, PromptEnd.OPEN)
    text = [
        "hm",
        "\n</th",
        "ink>\n",
        "\nSo",
        ":<｜tool",
        "▁calls▁begin｜>",
        CALL_BEGIN,
        "function",
        SEP,
        "get",
        "\n```json\n",
    ]
    deltas = [parser.push(piece) for piece in text]
    begun: list[Delta] = [Reasoning("hm"), Content("So"), Content(":")]
    assert list(itertools.chain(*deltas)) == begun
    assert parser.push('{"a": "') == [CallBegin(0, "0", "get"), CallArguments(0, '{"a": "')]
    assert parser.push("x") == [CallArguments(0, "x")]
    assert parser.push('"}\n``') == [CallArguments(0, '"}')]
    assert parser.push(f"`{CALL_END}") == [CallEnd(0, True)]
    assert parser.push("\n") == []
    assert parser.push(CALLS_END) == []
    assert parser.push("more") == [Content("more")]
    assert parser.finish() == []


# ---- reasoning


@pytest.mark.parametrize(
    ("end", "text", "reasoning", "content"),
    [
        (PromptEnd.OPEN, "a\n\n</think>\n\n\nb", "a\n", "\nb"),
        (PromptEnd.OPEN, "a</think>b</think>c", "a", "b</think>c"),
        (PromptEnd.OPEN, "\n</think>\n\n", "", ""),
        (PromptEnd.OPEN, "a\n</thin", "a\n</thin", ""),
        (PromptEnd.OPEN, f"a{CALLS_BEGIN}{v3_call('get', '{}')}", f"a{CALLS_BEGIN}{v3_call('get', '{}')}", ""),
        (PromptEnd.FREE, "<think>\na\n</think>\n\nb", "a", "b"),
        (PromptEnd.FREE, "\n<think>a</think>b", "a", "b"),
        (PromptEnd.FREE, "b <think>a</think>", "", "b <think>a</think>"),
        (PromptEnd.FREE, "\n\n<thin", "", "\n\n<thin"),
        (PromptEnd.FREE, " " * 9 + "<think>a", "", " " * 9 + "<think>a"),
        (PromptEnd.CLOSED, "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_where_reasoning_lies(end: PromptEnd, text: str, reasoning: str, content: str) -> None:
    assert parse(R1, text, end) == ParsedOutput(reasoning, content)


def test_a_line_end_that_the_prompt_lacks() -> None:
    assert parse_output("\n\na", new_parser(R1, PromptEnd.OPEN, begun=False)).reasoning == "\na"
    assert parse_output("\n\na", new_parser(R1, PromptEnd.OPEN)).reasoning == "\n\na"


def test_a_format_without_reasoning_shows_its_tags() -> None:
    text = "<think>a</think>b"
    assert parse(V3, text, PromptEnd.OPEN) == parse(V3, text, PromptEnd.FREE) == ParsedOutput("", text)


def test_what_the_plain_format_puts_before_an_answer() -> None:
    assert parse_output("  a b", new_parser("plain", leading=" ")).content == " a b"
    assert parse_output("a b", new_parser("plain", leading=" ")).content == "a b"


# ---- calls that are none, and calls that are nearly


GOOD = {V3: v3_call("get", "{}"), V31: v31_call("get", "{}")}
NO_CALLS = {
    "unknown name": (v3_call("add", "{}"), v31_call("add", "{}")),
    "beginning of a name": (v3_call("get_t", "{}"), v31_call("get_t", "{}")),
    "longer than a name": (v3_call("get_times", "{}"), v31_call("get_times", "{}")),
    "no name": (v3_call("", "{}"), v31_call("", "{}")),
    "no arguments": (v3_call("get", ""), v31_call("get", "")),
    "arguments are no object": (v3_call("get", "[1]"), v31_call("get", "Tokyo")),
    "the other family's form": (v31_call("get", "{}"), v3_call("get", "{}")),
    "no separator": (f"{CALL_BEGIN}functionget\n```json\n{{}}\n```{CALL_END}", f"{CALL_BEGIN}get{{}}{CALL_END}"),
    "much space": (f"{CALL_BEGIN}{' ' * 9}function{SEP}get\n```json\n{{}}", f"{CALL_BEGIN}{' ' * 9}get{SEP}{{}}"),
    "another kind": (f"{CALL_BEGIN}tool{SEP}get\n```json\n{{}}\n```{CALL_END}", f"{CALL_BEGIN}<{SEP}{{}}{CALL_END}"),
    "no fence": (f"{CALL_BEGIN}function{SEP}get\n{{}}{CALL_END}", f"{CALL_BEGIN}get\n```json\n{{}}\n```{CALL_END}"),
    "cut off in the name": (f"{CALL_BEGIN}function{SEP}ge", f"{CALL_BEGIN}ge"),
    "cut off before the arguments": (f"{CALL_BEGIN}function{SEP}get\n```json\n", f"{CALL_BEGIN}get{SEP}"),
    "cut off in a marker": ("<｜tool▁call▁beg", "<｜tool▁call▁beg"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", [V3, V31])
@pytest.mark.parametrize("case", NO_CALLS)
def test_what_is_no_call_is_content_verbatim(name: str, case: str) -> None:
    bad = NO_CALLS[case][name == V31]
    for text in (f"a{CALLS_BEGIN}{bad}", f"a{CALLS_BEGIN}{bad}{CALLS_END}b"):
        assert parse(name, text) == ParsedOutput("", text)
    # beside good ones, which stay calls
    whole = parse(name, f"{CALLS_BEGIN}{GOOD[name]}{bad}{CALLS_END}")
    assert [one.name for one in whole.calls] == ["get"]
    assert bad in whole.content
    if "cut off" not in case:
        whole = parse(name, f"{CALLS_BEGIN}{bad}{GOOD[name]}{CALLS_END}")
        assert whole == ParsedOutput("", f"{CALLS_BEGIN}{bad}" if bad else "", (call(0, "get", "{}"),))


@pytest.mark.parametrize(
    "arguments", ['{"a": 1}}', '{"a": ', "{'a': 1} and", '{"a": "```\\n"}', '{"a": 1}\n```', '{"a": "<｜tool▁cal"}']
)
def test_arguments_stay_as_the_model_wrote_them(arguments: str) -> None:
    expected = ParsedOutput(calls=(call(0, "get", arguments),))
    assert parse(V3, f"{CALLS_BEGIN}{v3_call('get', arguments)}{CALLS_END}") == expected
    assert parse(V31, f"{CALLS_BEGIN}{v31_call('get', arguments)}{CALLS_END}") == expected


@pytest.mark.parametrize("tail", ["", '"x', "\n", "\n``", "\n```", "\n```<｜tool▁call▁e", "<｜tool"])
def test_arguments_cut_off_by_the_end(tail: str) -> None:
    text = f'{CALLS_BEGIN}{CALL_BEGIN}function{SEP}get\n```json\n{{"a": '
    assert parse(V3, text + tail).calls == (call(0, "get", '{"a": ' + tail, False),)


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD[V3]}{CALLS_END}",
        f"{CALLS_BEGIN}{GOOD[V3]}",
        f"{CALLS_BEGIN}\n{GOOD[V3]}\n{CALLS_END}",
        f"{CALLS_BEGIN}\r\n{CALL_BEGIN}\tfunction{SEP}get\r\n```json\r\n{{}}\n```{CALL_END}\r\n{CALLS_END}",
        f"{CALLS_BEGIN} {CALL_BEGIN} function\n{SEP} get ```json{{}}```\n{CALL_END}{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEP}get\n```json\n{{}}\n```{CALLS_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEP}get\n```json\n{{}}{CALL_END}{CALLS_END}",
    ],
)
def test_calls_whose_frame_is_not_quite_the_published_one(text: str) -> None:
    assert parse(V3, text) == ParsedOutput(calls=(call(0, "get", "{}"),))


def test_a_call_without_its_end_before_the_next() -> None:
    text = f"{CALLS_BEGIN}{CALL_BEGIN}get{SEP}{{}}{CALL_BEGIN}get_time{SEP}{{}}{CALLS_END}{CALLS_BEGIN}{GOOD[V31]}"
    assert [one.name for one in parse(V31, text).calls] == ["get", "get_time", "get"]


def test_a_tool_may_be_called_function() -> None:
    assert parse(V3, v3_call("function", "{}")).calls == (call(0, "function", "{}"),)
    assert parse(V31, v31_call("function", "{}")).calls == (call(0, "function", "{}"),)


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_nothing_is_a_call(name: str) -> None:
    text = f"a{CALLS_BEGIN}{GOOD[V3]}\n{GOOD[V31]}{CALLS_END}"
    assert parse(name, text, names=()) == ParsedOutput("", text)
    assert new_parser(name, names=()).push("a<｜tool") == [Content("a<｜tool")]


def test_a_message_of_an_output() -> None:
    message = ParsedOutput("hm", "", (call(0, "get", "{"),)).message()
    assert message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [{"id": "0", "type": "function", "function": {"name": "get", "arguments": "{"}}],
    }
    assert ParsedOutput().message() == {"role": "assistant", "content": ""}


def test_neighbours_of_one_kind_become_one() -> None:
    pieces: list[Delta] = [
        CallArguments(0, "a"),
        CallArguments(0, "b"),
        CallArguments(1, "c"),
        Content("d"),
        Content("e"),
    ]
    assert merge(pieces) == [CallArguments(0, "ab"), CallArguments(1, "c"), Content("de")]
    assert merge([]) == []


# ---- any text, cut anywhere

texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@st.composite
def nearly_good(draw: st.DrawFn) -> str:
    """Good outputs of one form or the other, with a few pieces lost, doubled, put elsewhere or put in."""
    made = draw(st.sampled_from([v3_call, v31_call]))
    calls = draw(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["{}", '{"a": "\\n```"}'])), max_size=3))
    joined = ("\n" if made is v3_call else "").join(made(*one) for one in calls)
    text = f"{draw(st.sampled_from(['', 'hm</think>', '<think>hm</think>']))}So:{CALLS_BEGIN}{joined}{CALLS_END}"
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 25)))
        text = text[:start] + draw(st.sampled_from(["", text[start:stop] * 2, *PIECES])) + text[stop:]
    return text


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(
    text=st.one_of(texts, nearly_good()),
    end=st.sampled_from(PromptEnd),
    begun=st.booleans(),
    seed=st.randoms(use_true_random=False),
)
def test_a_text_cut_anywhere_is_the_whole_text(name: str, text: str, end: PromptEnd, begun: bool, seed: object) -> None:
    def read(cuts: list[int]) -> list[Delta]:
        parser = new_parser(name, end, begun=begun)
        deltas: list[Delta] = []
        for start, stop in itertools.pairwise([0, *cuts, len(text)]):
            new = parser.push(text[start:stop])
            assert new == merge(new)
            deltas += new
            given = sum(len(delta.text) for delta in deltas if isinstance(delta, Reasoning | Content | CallArguments))
            calls = sum(isinstance(delta, CallBegin) for delta in deltas)
            assert given >= stop - MOST_HELD * (1 + calls)
        return merge([*deltas, *parser.finish()])

    whole = read([])
    assert read(list(range(len(text)))) == whole
    number = seed.randint(0, 6)  # pyright: ignore[reportAttributeAccessIssue]
    cuts = sorted(seed.randint(0, len(text)) for _ in range(number))  # pyright: ignore[reportAttributeAccessIssue]
    assert read(cuts) == whole
    ended = [delta.index for delta in whole if isinstance(delta, CallEnd)]
    assert ended == [delta.index for delta in whole if isinstance(delta, CallBegin)]


@pytest.mark.parametrize("name", [V3, R1, V31])
@settings(max_examples=60, deadline=None)
@given(text=st.one_of(texts, nearly_good()), opened=st.booleans())
@example(text=f"{CALLS_BEGIN}{CALLS_BEGIN}{GOOD[V3]}\n\n{GOOD[V3]} {CALLS_END}", opened=False)
def test_another_reader_reads_the_same(name: str, text: str, opened: bool) -> None:
    opened = opened and name != V3
    parser = new_parser(name, PromptEnd.OPEN if opened else PromptEnd.CLOSED)
    assert parse_output(text, parser) == read_whole(text, name != V31, NAMES, opened, name == R1)


def test_what_is_held_back_stays_short() -> None:
    """Texts that always look as if a call were about to begin."""
    for name in (V3, V31):
        for piece in (
            CALLS_BEGIN,
            "<｜tool▁call",
            CALLS_BEGIN + "\n" * 8,
            " ",
            "\n",
            "<",
            CALL_BEGIN + "function" + SEP,
        ):
            parser, given = new_parser(name, PromptEnd.FREE), 0
            for number in range(1, 300):
                given += sum(len(delta.text) for delta in parser.push(piece) if isinstance(delta, Content))
                assert given > number * len(piece) - MOST_HELD


def test_a_long_text_in_small_pieces_is_read_once() -> None:
    """The parser looks at each character a bounded number of times: what it is handed again is only what it held."""

    class Counted(OutputParser):
        looked = 0

        def _read(self, text: str, final: bool) -> list[Delta]:
            self.looked += len(text)
            return super()._read(text, final)

    _, tools, reasoning = FORMATS[V3]
    called = v3_call("get", '{"a": "``` b"}' * 5)
    for unit in ("text <｜tool", f"{CALLS_BEGIN}{called}{CALLS_END}", CALLS_BEGIN):
        text = unit * 200
        parser = Counted(tools, NAMES, reasoning, new_id=str)
        for character in text:
            parser.push(character)
        assert parser.looked < 60 * len(text)
