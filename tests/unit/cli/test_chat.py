"""``abyssal chat`` from a pipe: turns, commands, and what the model is given; on a pseudo-terminal in ``tests/e2e``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from abyssal.checkpoint.hf import save_model
from abyssal.cli.chat import _typed
from abyssal.cli.main import main
from abyssal.engine.llm import LLM
from abyssal.engine.messages import CompletionOutput, RequestOutput, SamplingParams
from abyssal.text.template import ChatTemplate
from abyssal.text.tokenizer import Tokenizer, train_bpe
from abyssal.train.config import TrainConfig
from abyssal.train.data import fitted
from abyssal.train.loop import build_model
from tests.unit.train.test_step import SPEC

PLAIN = train_bpe(["alpha beta gamma delta"], 300)


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    save_model(build_model(fitted(SPEC, tokenizer), TrainConfig()), folder, "fp32", tokenizer)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = ChatTemplate.builtin("deepseek-r1", PLAIN).attach(PLAIN)
    tokenizer = ChatTemplate.builtin("deepseek-v3.1", PLAIN).attach(tokenizer)
    return saved(tmp_path_factory.mktemp("chat") / "model", tokenizer)


@pytest.fixture
def asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model that says "one", "two" and so on; the prompts that it was given."""
    prompts: list[str] = []
    tokenizer = Tokenizer.from_folder(folder)

    def stream(llm: LLM, prompt_ids: list[int], params: SamplingParams) -> Any:
        prompts.append(tokenizer.decode(prompt_ids))
        text = ("one", "two", "three")[len(prompts) - 1]
        ids = tuple(tokenizer.encode(text))
        for reason in (None, "stop"):
            yield RequestOutput(0, tuple(prompt_ids), (CompletionOutput(0, ids, text, reason, len(prompt_ids)),))

    monkeypatch.setattr(LLM, "stream", stream)
    return prompts


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, lines: str, *options: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = main(["chat", str(folder), *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_each_turn_is_asked_with_those_before(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = chat(monkeypatch, capsys, folder, "hi\n\n//etc?\n", "--system", "be brief")
    assert found == (0, "one\ntwo\n", "")
    begin = "<｜begin▁of▁sentence｜>be brief<｜User｜>hi<｜Assistant｜></think>"
    assert asked[0] == begin
    assert asked[1] == begin + "one<｜end▁of▁sentence｜><｜User｜>/etc?<｜Assistant｜></think>"


def test_the_model_thinks_where_it_is_told_to(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, capsys, folder, "hi\n", "--thinking", "True")[1] == "\n", "all of it is reasoning"
    assert asked[0].endswith("<｜Assistant｜><think>")
    found = chat(monkeypatch, capsys, folder, "hi\n", "--template", "deepseek-r1", "--reasoning", "show")
    assert found[1] == "<think>\ntwo\n</think>\n"
    assert asked[1].endswith("<｜Assistant｜><think>\n")


def test_commands_change_what_is_asked(
    folder: Path,
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept.json"
    lines = f"hi\n/system be kind\n/save {kept}\n/save {kept}\n/reset\nho\n/load {kept}\nhey\n/help\n/quit\nnever\n"
    status, out, err = chat(monkeypatch, capsys, folder, lines)
    assert (status, out) == (0, "one\ntwo\nthree\n")
    said = ["system prompt set", f"3 messages written to {kept}", f"3 messages written to {kept}", "forgotten"]
    assert err.splitlines()[:5] == [*said, f"3 messages read from {kept}"] and "/load FILE" in err
    saved_messages = json.loads(kept.read_text())["messages"]
    assert [(each["role"], each["content"]) for each in saved_messages] == [
        ("system", "be kind"),
        ("user", "hi"),
        ("assistant", "one"),
    ]
    assert asked[1] == "<｜begin▁of▁sentence｜>be kind<｜User｜>ho<｜Assistant｜></think>", "the system prompt stays"
    assert "hi<｜Assistant｜></think>one" in asked[2] and asked[2].endswith("hey<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/nothing\n", "there is no command /nothing"),
        ("/save\n", "/save needs the name of a file"),
        ("/load nowhere.json\n", "nowhere.json: No such file"),
        (f"/load {__file__}\n", "not JSON"),
        (f"/save {__file__}\n", "is there, and no conversation"),
        ("x" * 5000 + "\n", "the conversation has 5004 tokens by now"),
    ],
)
def test_what_is_wrong_ends_a_pipe_with_one_line(
    folder: Path, lines: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = chat(monkeypatch, capsys, folder, lines)
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


def test_loading_what_is_no_conversation_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, message in (("[]", "must be {"), ('{"messages": [{"role": "cat"}]}', "messages[0].role: 'cat'")):
        (tmp_path / "c.json").write_text(content)
        status, _, err = chat(monkeypatch, capsys, folder, f"/load {tmp_path / 'c.json'}\n")
        assert status == 2 and err.count("\n") == 1 and message in err


def test_a_model_that_never_learned_to_talk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", PLAIN)
    status, out, err = chat(monkeypatch, capsys, base, "hi\n")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "its tokenizer lacks <｜Assistant｜>" in err and "abyssal sft" in err
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "has no chat template; name one of deepseek-v3" in chat(monkeypatch, capsys, base, "hi\n")[2]
    (base / "tokenizer.json").unlink()
    assert "a model folder needs its tokenizer.json" in chat(monkeypatch, capsys, base, "hi\n")[2]


def test_an_interrupt_drops_the_line_and_an_end_of_file_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str | type[BaseException]] = ["a \\", KeyboardInterrupt, "b \\", "c", "d", EOFError]

    def read(mark: str) -> str:
        line = typed.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    console = Console(file=io.StringIO())
    assert list(_typed(console)) == ["b \nc", "d"]
    assert "(Ctrl-D ends)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_second_turn_finds_the_pages_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-tokens", "2", "--temperature", "0", "--verbose", "--no-disk-cache")
    status, _, err = chat(monkeypatch, capsys, folder, f"{'alpha ' * 80}\nbeta\n", *options)
    first, second = (line for line in err.splitlines() if "from the cache" in line)
    assert status == 0 and "0 from the cache" in first
    assert int(second.split(" from the cache")[0].split()[-1]) >= 64
