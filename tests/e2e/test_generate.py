"""``abyssal generate`` and ``abyssal convert`` on a model that was trained here; transformers reads the same folder."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abyssal.cli.main import main
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from tests.support.trained_model import TrainedModel

PROMPT = "def read(self):\n    "


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def written(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    arguments = ("generate", str(folder), "--prompt", PROMPT, "--max-tokens", "24", *options)
    status, text, error = run(capsys, *arguments)
    assert status == 0, error
    assert text.startswith(PROMPT) and text.endswith("\n")
    return text


def test_greedy_text_is_that_of_the_model_in_memory(
    trained_model: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(trained_model.model, tokenizer=trained_model.tokenizer)
    text = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))[0].text
    assert written(capsys, trained_model.folder) == PROMPT + text + "\n"
    assert written(capsys, trained_model.folder, "--num-drafts", "1", "--deterministic") == PROMPT + text + "\n"


def test_sampling_follows_its_seed(trained_model: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.0", "--top-p", "0.95", "--seed")
    first, again, other = (written(capsys, trained_model.folder, *options, seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_transformers_writes_the_same(trained_model: TrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_model.folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(trained_model.folder, dtype=torch.float32)
    ids = trained_model.tokenizer.encode(PROMPT, add_bos=True)
    assert tokenizer(PROMPT, add_special_tokens=False)["input_ids"] == ids[1:]
    tokens_BS = torch.tensor([ids])
    # Without a mask of ours, tokens that are equal to the padding would be masked.
    expected = theirs.generate(tokens_BS, attention_mask=torch.ones_like(tokens_BS), max_new_tokens=24, do_sample=False)
    output = LLM(trained_model.model).generate([ids], SamplingParams(temperature=0, max_tokens=24))[0]
    assert list(output.token_ids) == expected[0, len(ids) :].tolist()


def test_converted_to_fp8_it_still_writes(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, "convert", str(trained_model.folder), str(tmp_path / "fp8"), "--dtype", "fp8")
    assert status == 0, error
    written(capsys, tmp_path / "fp8", "--dtype", "float32")


def test_the_offline_example_runs(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n" + "def read(self):" * 400 + "\nclass Reader:\n")
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "offline.py"))
    example["main"]([str(trained_model.folder), str(prompts), "--samples", "2", "--max-tokens", "6"])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("'import os' -> ") and third.startswith("'class Reader:' -> ") and "perplexity" in third
    assert "max_positions" in second


def test_without_a_tokenizer_one_line_says_so(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(trained_model.folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    status, text, error = run(capsys, "generate", str(bare), "--prompt", PROMPT)
    assert (status, text) == (2, "")
    assert error.count("\n") == 1 and "tokenizer.json" in error


def test_a_prompt_past_the_model_is_refused(trained_model: TrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", str(trained_model.folder), "--prompt", PROMPT * 200)
    status, text, error = run(capsys, *arguments)
    assert (status, text) == (2, "")
    assert error.count("\n") == 1 and "max_positions" in error
