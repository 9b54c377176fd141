"""Structured output: text has the form, from where the reasoning ends, also along drafts; bad forms are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from abyssal.engine.messages import SamplingParams, StructuredOutput
from abyssal.engine.sampler import Row, sample_rows
from abyssal.engine.structured import REASONING_MARKS, Structure, StructureCompiler, open_reasoning
from abyssal.engine.verify import Drafted, verify
from abyssal.text.tokenizer import EOS, Tokenizer, train_bpe

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PADDING = 5
"""Logits past the tokenizer's vocabulary."""


@cache
def _tokenizer() -> Tokenizer:
    return train_bpe(['{"name": "é", "age": 42} true false null red green blue ' * 9], 330)


@cache
def _compiler() -> StructureCompiler:
    tokenizer = _tokenizer()
    assert tokenizer.eos_token_id is not None
    return StructureCompiler(tokenizer.to_json(), tokenizer.vocab_size + PADDING, (tokenizer.eos_token_id,))


def _tokens(mask: np.ndarray | None) -> set[int] | None:
    return None if mask is None else set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def _write(structure: Structure, seed: int, drafts: int, most: int = 60) -> list[int]:
    """Text of a model of random logits that favours text without end, verified against drafts that are often wrong."""
    tokenizer, rng = _tokenizer(), np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < most and tokens[-1:] != [tokenizer.eos_token_id]:
        here = [int(token) for token in rng.integers(0, tokenizer.vocab_size, drafts)]
        for index in range(drafts):  # most drafts may come
            may_come = _tokens(structure.masks(here[:index])[index])
            if may_come and rng.random() < 0.8:
                here[index] = int(rng.choice(sorted(may_come)))
        logits_TV = rng.standard_normal((drafts + 1, tokenizer.vocab_size + PADDING)).astype(np.float32)
        logits_TV[np.arange(drafts), here] += 6.0
        row = Row(SamplingParams(), seed, len(tokens), len(tokens))
        result = verify(logits_TV, [Drafted(row, tuple(here), None, structure.masks(here))])[0]
        assert result.error is None
        structure.advance(result.tokens)
        tokens += result.tokens
        if tokenizer.eos_token_id in tokens:
            del tokens[tokens.index(tokenizer.eos_token_id) + 1 :]
    return tokens


@pytest.mark.parametrize("drafts", [0, 3])
def test_sampled_text_has_the_form(drafts: int) -> None:
    tokenizer = _tokenizer()
    forms = {
        StructuredOutput("regex", "(red|green){2}[0-9]{1,3}é?"): lambda text: re.fullmatch(
            "(red|green){2}[0-9]{1,3}é?", text
        ),
        StructuredOutput("choice", ("red", 'a"\\\n|', "🙂")): lambda text: text in ("red", 'a"\\\n|', "🙂"),
        StructuredOutput("grammar", 'start: "(" (start | NUMBER) ")"\nNUMBER: /[0-9]/'): lambda text: re.fullmatch(
            r"(\(+)[0-9](\)+)", text
        ),
    }
    for seed in range(4):
        for form, fits in forms.items():
            structure = _compiler().compile(form)
            tokens = _write(structure, seed, drafts)
            if tokens[-1] == tokenizer.eos_token_id:
                assert fits(tokenizer.decode(tokens[:-1])), tokenizer.decode(tokens)
            else:
                assert form.kind == "grammar"
        structure = _compiler().compile(StructuredOutput("json_schema", SCHEMA))
        tokens = _write(structure, seed, drafts, most=400)
        if tokens[-1] == tokenizer.eos_token_id:  # white space between may go on for ever
            person = json.loads(tokenizer.decode(tokens[:-1]))
            assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120 and len(person["name"]) <= 4


def test_masks_along_drafts_are_those_of_going_there() -> None:
    tokenizer, form = _tokenizer(), StructuredOutput("json_schema", json.dumps(SCHEMA))
    drafts = tokenizer.encode('{"name": "é", "age": 42}')
    structure = _compiler().compile(form)
    along = structure.masks(drafts)
    for index, draft in enumerate(drafts):
        here = structure.masks()[0]
        assert _tokens(along[index]) == _tokens(here) != set()
        assert draft in (_tokens(here) or ())
        structure.advance([draft])
    assert structure.complete
    assert _tokens(along[-1]) == _tokens(structure.masks()[0]) == {tokenizer.eos_token_id}


def test_a_draft_that_may_not_come_ends_the_look_ahead() -> None:
    tokenizer = _tokenizer()
    structure = _compiler().compile(StructuredOutput("regex", "[0-9]+"))
    one, letter, end = *tokenizer.encode("1"), *tokenizer.encode("q"), tokenizer.token_id(EOS)
    before = _tokens(structure.masks()[0])
    assert [mask is None for mask in structure.masks([one, letter, one])] == [False, False, True, True]
    assert [mask is None for mask in structure.masks([one, end, one])] == [False, False, True, True]
    assert _tokens(structure.masks()[0]) == before
    with pytest.raises(ValueError, match="structured: the regex cannot be followed"):
        structure.fork().advance([letter])
    structure.advance([one, end, letter])  # what follows the end is not looked at
    assert structure.complete and _tokens(structure.fork().masks()[0]) == {end}


def test_the_structure_begins_where_the_reasoning_ends() -> None:
    tokenizer = _tokenizer()
    end = tokenizer.token_id("<｜fim▁end｜>")  # any control token will do
    digits = StructuredOutput("regex", "[0-9]{2}")
    structure = _compiler().compile(digits, reasoning_end=end)
    one, letter = *tokenizer.encode("1"), *tokenizer.encode("q")
    reasoning, digit = structure.masks()[0], _tokens(_compiler().compile(digits).masks()[0])
    assert _tokens(reasoning) == set(range(tokenizer.vocab_size + PADDING)) - {tokenizer.token_id(EOS)}
    along = structure.masks([letter, end, one, letter])
    assert [_tokens(mask) for mask in along[:3]] == [_tokens(reasoning), _tokens(reasoning), digit]
    assert along[3] is not None and along[4] is None
    assert [mask is None for mask in structure.masks([letter, tokenizer.token_id(EOS), end])] == [0, 0, 1, 1]
    structure.advance([letter, one])
    assert _tokens(structure.masks()[0]) == _tokens(reasoning) and not structure.complete
    fork = structure.fork()
    fork.advance([end, one, one])
    assert fork.complete and _tokens(structure.masks()[0]) == _tokens(reasoning)


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", REASONING_MARKS[1]])
def test_text_that_spells_a_control_token_is_text(name: str) -> None:
    """Also where the form leaves that text alone."""
    tokenizer = _tokenizer().with_control_tokens(REASONING_MARKS)
    control = set(map(tokenizer.token_id, tokenizer.control_tokens))
    end = tokenizer.token_id(EOS)
    compiler = StructureCompiler(tokenizer.to_json(), tokenizer.vocab_size, (end,))
    structure, tokens = compiler.compile(StructuredOutput("json_schema", {"enum": [name]})), []
    while not structure.complete:
        tokens.append(min(_tokens(structure.masks()[0]) or ()))
        structure.advance(tokens[-1:])
    assert json.loads(tokenizer.decode(tokens)) == name and not control & set(tokens)
    anything = compiler.compile(StructuredOutput("json_schema", {"type": "string"}))
    anything.advance(tokenizer.encode('"'))
    assert not control & (_tokens(anything.masks()[0]) or set())
    called = compiler.compile(StructuredOutput("grammar", f"start: <[{tokenizer.token_id(name)}]>"))
    assert _tokens(called.masks()[0]) == {tokenizer.token_id(name)}


def test_an_open_reasoning_part_is_found_in_the_prompt() -> None:
    assert open_reasoning(_tokenizer(), [1, 2]) is None
    tokenizer = _tokenizer().with_control_tokens(REASONING_MARKS)
    begin, end = map(tokenizer.token_id, REASONING_MARKS)
    cases = {(1, begin, 2): end, (begin, 2, end): None, (begin, end, begin): end, (1, 2): None, (): None, (end,): None}
    assert {prompt: open_reasoning(tokenizer, prompt) for prompt in cases} == cases


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema: minLength"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"if": {"type": "string"}}, r"Unimplemented keys: \[\"if\"\]"),
        ("json_schema", "{nope", "structured.value: not JSON"),
        ("json_schema", "[1]", "a JSON schema is an object, not list"),
        ("json_schema", {"$ref": "#/nowhere"}, "/nowhere"),
        ("regex", "(ab", "unclosed group"),
        ("regex", "a(?=b)", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", "(" * 5000 + ")" * 5000, "the regex cannot be used"),
        ("regex", "[^\\s\\S]", "the regex cannot be met"),
        ("regex", 3, "structured.value: a regex is text, not int"),
        ("grammar", 'start: "a" | other', 'unknown name: "other"'),
        ("choice", ("a", ""), "must be texts of at least one character"),
    ],
)
def test_forms_that_cannot_be_met_or_read_are_refused(kind: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        _compiler().compile(StructuredOutput(kind, value))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_a_form_needs_an_end_token() -> None:
    with pytest.raises(ValueError, match="the model names no end token"):
        StructureCompiler(_tokenizer().to_json(), 400, ()).compile(StructuredOutput("regex", "a"))


def test_an_impossible_step_is_that_rows_error() -> None:
    structure = _compiler().compile(StructuredOutput("choice", ("red",)))
    structure.advance(_tokenizer().encode("red"))
    end = _tokenizer().eos_token_id
    assert end is not None
    row = Row(SamplingParams(min_tokens=9), 0, 3, 3, ends=(end,), allowed=structure.masks()[0])
    logits = np.zeros((2, _tokenizer().vocab_size + PADDING), np.float32)
    assert list(sample_rows(logits, [row, Row(SamplingParams(), 0, 0)]).errors) == [0]


def test_llguidance_is_loaded_when_a_form_is_compiled() -> None:
    code = "import sys, abyssal.engine.structured; sys.exit('llguidance' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
