"""EleutherAI's lm-eval with a task of its own, through ``local-completions``: the score is the offline engine's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from tests.support.live_server import LiveServer
from tests.support.trained_model import TrainedModel

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
{more}
metadata:
  version: 1
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
DOCUMENTS = 12


@pytest.fixture(scope="module")
def tasks(trained_model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks: which of three ways a held-out text goes on, and writing on."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(document) for document in _documents(trained_model)]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, more in (("choices", CHOICES), ("writing", WRITING)):
        text = TASK.format(name=f"abyssal_{name}", data=folder / "data.jsonl", more=more)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def _documents(trained_model: TrainedModel) -> list[dict[str, Any]]:
    draw = random.Random(3)
    held_out = trained_model.data.held_out
    numbers = [number for number, length in enumerate(held_out.lengths.tolist()) if length > 100]
    text = trained_model.tokenizer.decode(held_out.document(numbers[0]).tolist())
    documents = []
    for _ in range(DOCUMENTS):
        start, answer = draw.randrange(0, len(text) - 200), draw.randrange(3)
        ending = text[start + 80 : start + 100]
        choices = [
            ending,
            "".join(draw.sample(ending, 20)),
            text[(other := draw.randrange(len(text) - 20)) : other + 20],
        ]
        choices[0], choices[answer] = choices[answer], choices[0]
        documents.append({"text": text[start : start + 80], "choices": choices, "answer": answer})
    return documents


def evaluate(server: LiveServer, tasks: Path, task: str, **arguments: Any) -> tuple[dict[str, Any], list[Any]]:
    """lm-eval's own figures, and its samples."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    model_args = {"model": "trained", "base_url": f"{server.api}/completions", "num_concurrent": 4, "max_retries": 1}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    evaluate: Any = lm_eval.simple_evaluate
    done = evaluate(
        "local-completions", {**model_args, **arguments}, tasks=[task], task_manager=manager, bootstrap_iters=0
    )
    return done["results"][task], done["samples"][task]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for on the network, and no key is of a real provider."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")


def test_the_score_of_choices_is_the_offline_engines(
    server: LiveServer, tasks: Path, trained_model: TrainedModel
) -> None:
    tokenizer = str(trained_model.folder)
    figures, samples = evaluate(server, tasks, "abyssal_choices", tokenizer_backend="huggingface", tokenizer=tokenizer)
    ours: dict[tuple[str, str], float] = {}
    with LLM(trained_model.model, tokenizer=trained_model.tokenizer) as llm:
        right = 0
        for sample in samples:
            scores = []
            for (context, ending), response in zip(sample["arguments"], sample["resps"], strict=True):
                ours[context, ending] = _score(llm, trained_model, context, ending)
                scores.append(ours[context, ending])
                assert float(response[0][0]) == pytest.approx(scores[-1], abs=1e-4)
            right += scores.index(max(scores)) == int(sample["target"])
    assert len(samples) == DOCUMENTS and len(ours) > DOCUMENTS
    assert figures["acc,none"] == right / DOCUMENTS > 1 / 3, "the model chooses by chance"


def test_what_it_writes_is_what_the_offline_engine_writes(
    server: LiveServer, tasks: Path, trained_model: TrainedModel
) -> None:
    _, samples = evaluate(server, tasks, "abyssal_writing", tokenizer_backend="none")
    params = SamplingParams(temperature=0, max_tokens=12, stop=("\n\n",))
    with LLM(trained_model.model, tokenizer=trained_model.tokenizer) as llm:
        outputs = llm.generate([sample["doc"]["text"] for sample in samples], params)
    assert [sample["resps"][0][0] for sample in samples] == [output.text for output in outputs]


def _score(llm: LLM, trained_model: TrainedModel, context: str, ending: str) -> float:
    """By the tokens that lm-eval makes: those of the whole text behind as many as the context alone has, whose spaces
    at its end it counts to the ending."""
    encode = trained_model.tokenizer.encode
    before = encode(context.rstrip())
    ids = [*before, *encode(context + ending)[len(before) :]]
    (scored,) = llm.score([ids])
    return sum(entry.logprob for entry in scored[len(before) :] if entry is not None)
