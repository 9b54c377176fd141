"""``abyssal sft`` as a command: a trained model learns to answer, resumes, and is written with its chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import abyssal
from abyssal.checkpoint.adapters import load_adapter
from abyssal.cli.main import main
from abyssal.model.lora import merge_lora
from abyssal.text.template import ChatTemplate
from abyssal.text.template_parts import encode_parts
from abyssal.text.tokenizer import EOS, Tokenizer
from tests.support.templates import assistant, system, user
from tests.support.trained_model import TrainedModel

ANSWERS = {"what purrs?": "a cat does.", "what barks?": "a dog does, <｜User｜>", "say no": "never in my life!"}
FAST = ["--seq-len", "128", "--batch-size", "1", "--held-out", "0.1", "--validate-every", "1000"]


def conversations(folder: Path) -> Path:
    path = folder / "chat.jsonl"
    records = (
        {"messages": [system(f"number {n}"), user(question), assistant(answer)]}
        for n in range(6)
        for question, answer in ANSWERS.items()
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def metrics(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == event]


def answer(folder: Path, question: str) -> str:
    tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
    messages = [system("number 7"), user(question)]
    prompt = encode_parts(tokenizer, template.render_prompt(messages)).ids.tolist()
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)
    assert theirs["input_ids"] == prompt
    params = abyssal.SamplingParams(temperature=0, max_tokens=24)
    return tokenizer.decode(abyssal.LLM(folder).generate([prompt], params)[0].token_ids)


def test_a_model_learns_to_answer(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["sft", str(trained_model.folder), "--data", str(conversations(tmp_path)), "--out", str(run)]
    assert main([*arguments, *FAST, "--lr", "4e-3", "--epochs", "10"]) == 0
    printed = capsys.readouterr().out
    assert "template deepseek-v3" in printed and "10 epochs" in printed and "tokens of the assistant" in printed
    losses = [line["loss"] for line in metrics(run, "step")]
    first, last = metrics(run, "validation")
    assert losses[-1] < 0.2 * losses[0] and last["loss"] < 0.2 * first["loss"]
    assert last["mtp_losses"][0] < 0.5 * first["mtp_losses"][0], "MTP is kept trained"
    for question, taught in ANSWERS.items():
        assert answer(run / "model", question) == taught + EOS
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["origin"]["folder"] == str(trained_model.folder)
    assert record["config"]["optimizer"]["lr_schedule"] == "cosine:1:0.2"


def test_adapters_and_their_merged_model_agree_and_resume(trained_model: TrainedModel, tmp_path: Path) -> None:
    data = str(conversations(tmp_path))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    arguments = ["sft", str(trained_model.folder), "--data", data, *FAST, "--lora", "--lora-rank", "4"]
    assert main([*arguments, "--steps", "6", "--out", str(whole)]) == 0
    merged = abyssal.load_model(whole / "model")
    model = abyssal.load_model(
        json.loads((whole / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    load_adapter(model, whole / "adapter")
    merge_lora(model)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert main([*arguments, "--steps", "6", "--out", str(parted), "--save-every", "2"]) == 0
    shutil.rmtree(parted / "checkpoints" / "step-00000006")
    assert main(["sft", "--resume", "--out", str(parted)]) == 0
    assert [line["step"] for line in metrics(parted, "resume")] == [4]
    again = abyssal.load_model(parted / "model")
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0.0; give a positive number"),
        (["--template", "deepseek-v4"], "deepseek-v4"),
        (["--lora", "--lora-rank", "0"], "lora.rank is 0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--seq-len", "9000"], "seq_len is 9000, past the model's max_positions 1024"),
    ],
)
def test_bad_arguments_end_in_one_line(
    trained_model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    data = [] if "--data" in arguments else ["--data", str(conversations(tmp_path))]
    assert main(["sft", str(trained_model.folder), *data, "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()
