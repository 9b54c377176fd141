"""Many prompts through the engine at once: how sure the model is of each answer, and what the caches saved.

    python examples/offline.py runs/mine/model prompts.txt --samples 4

For each line of the file it prints the likeliest of some sampled completions.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import abyssal


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder with its tokenizer")
    parser.add_argument("prompts", type=Path, help="file with a prompt a line")
    parser.add_argument("--samples", type=int, default=4, help="completions to choose from")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args(argv)
    llm = abyssal.LLM(options.model)
    params = abyssal.SamplingParams(
        temperature=1.0, seed=0, best_of=options.samples, max_tokens=options.max_tokens, logprobs=0
    )
    for output in llm.generate(options.prompts.read_text(encoding="utf-8").splitlines(), params):
        if output.error is not None:
            print(f"{output.prompt!r}: {output.error}")
            continue
        logprobs = [each.logprob for each in output.logprobs or ()]
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        cached = f"{output.cached_tokens} of {len(output.prompt_ids)} prompt tokens cached"
        print(f"{output.prompt!r} -> {output.text!r}  (perplexity {perplexity:.2f}, {cached})")


if __name__ == "__main__":
    main()
