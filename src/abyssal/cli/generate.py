"""``abyssal generate MODEL --prompt TEXT``: let a model write, token by token, to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from abyssal.cli.arguments import parse
from abyssal.cli.prompts import read_prompts
from abyssal.cli.sampling_options import EngineOptions, SamplingOptions
from abyssal.cli.statistics import Statistics
from abyssal.cli.terminal import visible
from abyssal.engine.messages import CompletionOutput, RequestOutput, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from abyssal.engine.llm import LLM


@dataclass(frozen=True)
class Options:
    """Let a model go on from prompts; of one prompt, the text appears as it is written."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model, with its tokenizer."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue, - for all of standard input; may be given several times."""
    prompt_file: str | None = None
    """File with a prompt a line, or JSON lines with a field "prompt" (*.jsonl); - for standard input."""
    json: bool = False
    """Print JSON lines and nothing else, an object for each completion: prompt_index, index, prompt, text, token_ids,
    finish_reason, stop_reason, prompt_tokens, cached_tokens, and logprobs and prompt_logprobs where asked for."""
    echo: bool = True
    """Print the prompt before the text."""
    verbose: bool = False
    """Say on standard error how fast it was and what the caches held."""
    n: int = 1
    """Completions of each prompt."""
    best_of: int | None = None
    """Completions to make, of which the n likeliest are printed."""
    logprobs: int | None = None
    """With --json: log-probabilities of each token and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """With --json: the same for the prompt's tokens."""
    sampling: Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=SamplingOptions)
    engine: Annotated[EngineOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=EngineOptions)


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or OSError."""
    options = parse(Options, argv, "generate")
    if not options.json:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is printed as JSON alone; add --json")
    params = options.sampling.params(
        n=options.n,
        best_of=options.best_of,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )
    prompts = read_prompts(options.prompt, options.prompt_file)
    with options.engine.load(options.model) as llm:
        statistics = Statistics()
        if len(prompts) == 1 and params.num_samples == 1 and not options.json:
            outputs = [_stream(llm, prompts[0], params, options.echo, statistics)]
        else:
            outputs = _write_all(llm, prompts, params, options)
        if options.verbose:
            sys.stdout.flush()
            print(statistics.line(outputs, llm.engine.draft_acceptance), file=sys.stderr)
    _raise_failures(outputs)
    return 0


def _stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool, statistics: Statistics) -> RequestOutput:
    """Write the text as it grows.  A prompt that is refused is not echoed."""
    show = visible if sys.stdout.isatty() else str
    written: int | None = None
    output = RequestOutput(0, (), ())
    try:
        for output in llm.stream(prompt, params):
            statistics.note(output)
            if written is None:
                sys.stdout.write(show(prompt) if echo else "")
                written = 0
            sys.stdout.write(show(output.text[written:]))
            sys.stdout.flush()
            written = len(output.text)
    finally:
        if written is not None:
            sys.stdout.write("\n")
    return output


def _write_all(llm: LLM, prompts: Sequence[str], params: SamplingParams, options: Options) -> list[RequestOutput]:
    """Write outputs in the order of the prompts, each as soon as those before it are written."""
    waiting: dict[int, RequestOutput] = {}
    outputs: list[RequestOutput] = []
    for number, output in llm.as_finished(prompts, params):
        waiting[number] = output
        while len(outputs) in waiting:
            output = waiting.pop(len(outputs))
            if options.json:
                _write_json(len(outputs), output, llm)
            elif output.error is None:
                _write_plain(len(outputs), output, options)
            outputs.append(output)
            sys.stdout.flush()
    return outputs


def _write_plain(number: int, output: RequestOutput, options: Options) -> None:
    show = visible if sys.stdout.isatty() else str
    for completion in output.outputs:
        which = f"prompt {number + 1}" + (f", completion {completion.index + 1}" if options.n > 1 else "")
        print(f"--- {which} ---")
        print(show((output.prompt if options.echo else "") + completion.text))


def _write_json(number: int, output: RequestOutput, llm: LLM) -> None:
    for record in _records(number, output, llm):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def _records(number: int, output: RequestOutput, llm: LLM) -> Iterator[dict[str, Any]]:
    """An object a completion; of a prompt that failed, one that says why."""
    about = {"prompt_index": number, "prompt": output.prompt}
    if output.error is not None:
        yield {**about, "error": output.error}
        return
    for completion in output.outputs:
        record = {**about, **_completion(completion, llm)}
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = [each and _logprobs(each, llm) for each in output.prompt_logprobs]
        yield record


def _completion(completion: CompletionOutput, llm: LLM) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [_logprobs(each, llm) for each in completion.logprobs]
    return record


def _logprobs(found: TokenLogprobs, llm: LLM) -> dict[str, Any]:
    assert llm.tokenizer is not None, "a model folder has its tokenizer"
    decode = llm.tokenizer.decode
    return {
        "token_id": found.token_id,
        "token": decode([found.token_id]),
        "logprob": found.logprob,
        "rank": found.rank,
        "top": [{"token_id": token, "token": decode([token]), "logprob": value} for token, value in found.top],
    }


def _raise_failures(outputs: Sequence[RequestOutput]) -> None:
    failures = [(number, output.error) for number, output in enumerate(outputs, 1) if output.error is not None]
    if not failures:
        return
    number, error = failures[0]
    if len(outputs) == 1:
        raise ValueError(error)
    raise ValueError(f"{len(failures)} of {len(outputs)} prompts failed; prompt {number}: {error}")
