"""``abyssal generate``: what reaches the engine, and what is printed of what comes back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from abyssal.checkpoint.hf import save_model
from abyssal.cli.arguments import parse
from abyssal.cli.generate import Options
from abyssal.cli.main import main
from abyssal.cli.sampling_options import EngineOptions
from abyssal.engine import llm as llm_module
from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import CompletionOutput, RequestOutput, SamplingParams, StructuredOutput
from abyssal.text.tokenizer import BOS, EOS, Tokenizer, train_bpe
from abyssal.train.config import TrainConfig
from abyssal.train.data import fitted
from abyssal.train.loop import build_model
from tests.unit.train.test_step import SPEC


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("generate") / "model", train_bpe(["alpha beta gamma delta"], 300)
    save_model(build_model(fitted(SPEC, tokenizer), TrainConfig()), folder, "fp32", tokenizer)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["generate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def records(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_every_option_reaches_the_engine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt behind one bos, the names of control tokens in it being text."""
    given: list[Any] = []

    def stream(llm: LLM, prompt: str, params: SamplingParams) -> Any:
        given.extend([llm._ids(prompt), params])
        for text in (" be", " beta"):
            yield RequestOutput(0, (), (CompletionOutput(0, (1,), text, None, 3),))

    monkeypatch.setattr(LLM, "stream", stream)
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    options = "--max-tokens 7 --min-tokens 2 --temperature 0.5 --top-k 9 --top-p 0.25 --min-p 0.1 --seed 3"
    options += " --repetition-penalty 1.2 --presence-penalty 0.3 --frequency-penalty 0.4 --stop . --stop ! --ignore-eos"
    options += f" --json-schema {tmp_path / 'schema.json'}"
    prompt = f"alpha{EOS}{BOS}"
    assert run(capsys, str(folder), "--prompt", prompt, *options.split()) == (0, f"{prompt} beta\n", "")
    tokenizer = Tokenizer.from_folder(folder)
    ids = given[0]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == prompt
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    assert given[1] == SamplingParams(
        temperature=0.5,
        top_k=9,
        top_p=0.25,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        seed=3,
        max_tokens=7,
        min_tokens=2,
        stop=(".", "!"),
        ignore_eos=True,
        structured=StructuredOutput("json_schema", {"type": "integer"}),
    )
    assert run(capsys, str(folder), "--prompt", prompt, "--no-echo")[1] == " beta\n"
    assert given[3] == SamplingParams(temperature=0, seed=0, max_tokens=128)


def test_the_engine_is_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(llm_module, "LLM", lambda *arguments: given.extend(arguments))
    EngineOptions(
        dtype="bfloat16", num_drafts=1, cache_tokens=192, max_sequences=5, deterministic=True, page_dtype="fp8"
    ).load("m")
    config = EngineConfig(num_drafts=1, cache_tokens=192, max_sequences=5, deterministic=True, page_dtype="fp8")
    assert given == ["m", torch.bfloat16, config, None]
    given.clear()
    EngineOptions(disk_cache_folder=Path("pages"), disk_cache_bytes=7).load("m")
    EngineOptions(disk_cache=False).load("m")
    assert (given[2], given[6]) == (
        EngineConfig(disk_cache_folder="pages", disk_cache_bytes=7),
        EngineConfig(disk_cache=False),
    )
    given.clear()
    assert parse(Options, ["m", "--num-drafts", "auto"], "generate").engine.num_drafts == "auto"
    EngineOptions().load("m")
    assert given == ["m", None, EngineConfig(), None]
    EngineOptions(max_sequences=1000).load("m")
    assert given[6] == EngineConfig(max_sequences=1000, token_budget=1000), "a token a step for each"


def test_json_is_an_object_a_completion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled = ("--max-tokens", "4", "--temperature", "1", "--ignore-eos")
    found = records(
        capsys, str(folder), "--prompt", "alpha", "--prompt", "東é", *sampled, "--n", "2", "--logprobs", "1"
    )
    assert [(each["prompt_index"], each["index"], each["prompt"]) for each in found] == [
        (0, 0, "alpha"),
        (0, 1, "alpha"),
        (1, 0, "東é"),
        (1, 1, "東é"),
    ]
    assert found[0]["token_ids"] != found[1]["token_ids"]
    tokenizer = Tokenizer.from_folder(folder)
    for each in found:
        assert each["text"] == tokenizer.decode(each["token_ids"], skip_control=True)
        assert (each["finish_reason"], each["cached_tokens"]) == ("length", 0) and "prompt_logprobs" not in each
        assert [entry["token_id"] for entry in each["logprobs"]] == each["token_ids"]
        assert all(entry["logprob"] < 0 and len(entry["top"]) == 1 for entry in each["logprobs"])
    (scored,) = records(capsys, str(folder), "--prompt", "alpha", "--max-tokens", "1", "--prompt-logprobs", "0")
    assert scored["prompt_logprobs"][0] is None and scored["prompt_tokens"] == len(scored["prompt_logprobs"]) > 1
    best = records(capsys, str(folder), "--prompt", "alpha", *sampled, "--best-of", "3")
    assert len(best) == 1


def test_outputs_are_in_the_order_of_the_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever ends first."""

    def as_finished(llm: LLM, prompts: list[str], params: SamplingParams) -> Any:
        for number in (1, 2, 0):
            completion = CompletionOutput(0, (5,), f"text {number}", "stop", 3)
            yield number, RequestOutput(number, (), (completion,), prompts[number])

    monkeypatch.setattr(LLM, "as_finished", as_finished)
    given = [word for prompt in "abc" for word in ("--prompt", prompt)]
    found = [(each["prompt_index"], each["prompt"], each["text"]) for each in records(capsys, str(folder), *given)]
    assert found == [(0, "a", "text 0"), (1, "b", "text 1"), (2, "c", "text 2")]


def test_prompts_come_from_files_and_from_standard_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text('alpha\r\n\n{"prompt": 1} é\n', encoding="utf-8")
    objects.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "", "id": 7}\n')
    short = ("--max-tokens", "1")

    def prompts(*arguments: str, stdin: str = "") -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return [each["prompt"] for each in records(capsys, str(folder), *short, *arguments)]

    assert prompts("--prompt", "x", "--prompt-file", str(lines)) == ["x", "alpha", '{"prompt": 1} é']
    assert prompts("--prompt-file", str(objects)) == ["a\nb", ""]
    assert prompts("--prompt", "-", stdin="all\nof it\n") == ["all\nof it\n"]
    assert prompts("--prompt-file", "-", stdin="one\ntwo") == ["one", "two"]
    assert prompts("--prompt-file", "-", stdin='{"prompt": "one"}\n{"prompt": "two"}\n') == ["one", "two"]
    status, out, _ = run(capsys, str(folder), *short, "--prompt-file", str(lines))
    assert status == 0 and out.startswith("--- prompt 1 ---\nalpha") and "\n--- prompt 2 ---\n" in out


def test_one_bad_prompt_does_not_keep_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 5000
    status, out, err = run(
        capsys, str(folder), "--prompt", long, "--prompt", "alpha", "--max-tokens", "2", "--ignore-eos", "--json"
    )
    first, second = map(json.loads, out.splitlines())
    assert "max_positions" in first["error"] and "text" not in first and len(second["token_ids"]) == 2
    assert status == 2 and err.count("\n") == 1 and "1 of 2 prompts failed; prompt 1: prompt: its 5001 tokens" in err


def test_a_later_call_finds_what_an_earlier_one_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(folder), "--prompt", "東" * 60, "--max-tokens", "3", "--ignore-eos")
    kept = ("--disk-cache-folder", str(tmp_path / "pages"))
    first, again = (records(capsys, *arguments, *kept)[0] for _ in range(2))
    assert (first.pop("cached_tokens"), again.pop("cached_tokens")) == (0, 128) and first == again
    assert records(capsys, *arguments, "--no-disk-cache")[0]["cached_tokens"] == 0


def test_figures_are_told_on_standard_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(folder), "--prompt", "alpha", "--max-tokens", "3", "--ignore-eos", "--verbose")
    _, _, plain = run(capsys, *arguments)
    assert plain.startswith("3 tokens in ") and "first after" in plain and "0 from the cache" in plain
    _, out, drafted = run(capsys, *arguments, "--num-drafts", "1", "--json")
    assert len(out.splitlines()) == 1 and "of drafts accepted" in drafted


def test_a_tokenizer_larger_than_the_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    larger = train_bpe([Path(__file__).read_text(encoding="utf-8")], 320)
    larger.save(tmp_path)
    assert larger.vocab_size > Tokenizer.from_folder(folder).vocab_size
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert f"the tokenizer has {larger.vocab_size} token ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(1 << 64)], "--seed is 18446744073709551616"),
        (["--temperature", "nan"], "temperature: nan"),
        (["--top-p", "0"], "top_p: 0.0"),
        (["--max-tokens", "0"], "max_tokens: 0"),
        (["--n", "2"], "n: 2 completions at temperature 0 are all the same"),
        (["--n", "3", "--best-of", "2", "--temperature", "1"], "best_of: 2 completions are fewer than the n = 3"),
        (["--logprobs", "1"], "--logprobs is printed as JSON alone; add --json"),
        (["--prompt-logprobs", "1"], "--prompt-logprobs is printed as JSON alone"),
        (["--regex", "a+", "--choice", "b"], "--regex and --choice: the text can have one form"),
        (["--regex", "("], "structured: the regex cannot be used"),
        (["--json-schema", "nowhere.json"], "nowhere.json: No such file"),
        (["--json-schema", __file__], "not JSON"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt", "-", "--prompt-file", "-"], "standard input can be read once"),
        (["--prompt", "x" * 5000], "prompt: its 5001 tokens leave no room"),
        (["--prompt", "\ud800"], "lone surrogate"),
        (["--num-drafts", "-1"], "num_drafts: -1"),
        (["--cache-tokens", "0"], "cache needs memory for one page"),
        (["--no-disk-cache", "--disk-cache-bytes", "9"], "--no-disk-cache and a folder or a size for it contradict"),
        (["--disk-cache-folder", __file__], "is not a folder"),
        (["--max-sequences", "0"], "max_sequences: 0"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--prompt" in options else ["--prompt", "a"]
    status, out, err = run(capsys, str(folder), *prompt, *options)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b'{"prompt": "a"}\nx', "p.jsonl:2: not JSON"),
        (b'{"text": "a"}', 'p.jsonl:1: must be an object with "prompt"'),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_prompt_files_are_one_line(
    folder: Path, tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    status, out, err = run(capsys, str(folder), "--prompt-file", str(tmp_path / "p.jsonl"))
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


def test_without_a_prompt_it_says_how_to_give_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, str(folder))
    assert (status, out) == (2, "") and "no prompt; give --prompt TEXT, or --prompt-file FILE" in err
