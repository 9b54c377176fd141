"""``abyssal quickstart``: train a tiny model on this machine, look at it, let it write.

Training and generation meet here and nowhere below: ``train`` and ``engine`` know nothing of each other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.cli.allocator import keep_freed_memory
from abyssal.cli.arguments import parse

if TYPE_CHECKING:
    from rich.console import Console

    from abyssal.engine.llm import LLM
    from abyssal.train.config import TrainConfig

EXIT_FAILED = 1
NEW_TOKENS = 96
SOURCES: tuple[Path, ...] | None = None
"""Text to train on; None is the standard library's source."""


@dataclass(frozen=True)
class Options:
    """Train a tiny DeepSeek-V3-architecture model on Python's own source, save it, reload it, let it write.

    Exits 1, saying which, unless the model beats predictors without learning, its drafts are worth something, its
    experts are balanced, and it writes the same after reloading.
    """

    out: Path = Path("runs/quickstart")
    """The run's folder: model, metrics.jsonl, quickstart.png. Replaced if an earlier quickstart made it."""
    steps: int | None = None
    """Training steps; by default as many as take three to five minutes on two CPU cores."""


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or FileNotFoundError."""
    options = parse(Options, argv, "quickstart")
    keep_freed_memory()
    from rich.console import Console

    from abyssal.train.plot import require_matplotlib
    from abyssal.train.quickstart import STEPS, claim_folder, quickstart_config

    require_matplotlib()
    config = quickstart_config(STEPS if options.steps is None else options.steps)
    claim_folder(options.out)
    try:
        found = _run(options.out, config, Console())
    except FloatingPointError as error:
        found = [str(error)]
    for failure in found:
        Console(stderr=True).print(f"abyssal quickstart: failed: {failure}", highlight=False, soft_wrap=True)
    return EXIT_FAILED if found else 0


def _run(out: Path, config: TrainConfig, console: Console) -> list[str]:
    """Everything in a row; what is not as it should be."""
    from abyssal.checkpoint.hf import load_model
    from abyssal.data.baselines import baselines_of
    from abyssal.data.prepare import PrepareConfig, prepare_paths
    from abyssal.engine.llm import LLM
    from abyssal.precision.recipe import Recipe
    from abyssal.train.data import fitted, pretraining_data
    from abyssal.train.folder import RunFolder
    from abyssal.train.history import History
    from abyssal.train.loop import with_recipe
    from abyssal.train.plot import plot_run
    from abyssal.train.quickstart import Figures, failures, quickstart_spec, result_table
    from abyssal.train.run import Run, run_training

    begin = time.perf_counter()
    spec = quickstart_spec()
    console.print("Reading Python's standard library and training a tokenizer on it ...")
    folder, history = RunFolder(out), History()
    prepared = prepare_paths(SOURCES, folder.data, spec.vocab_size, PrepareConfig(fim_rate=0.0))
    tokenizer = prepared.tokenizer()
    spec = fitted(spec, tokenizer)
    baselines = baselines_of(prepared)
    result = run_training(folder, Run(spec, config, pretraining_data([prepared], spec, config)), [history])
    before = _greedy_texts(LLM(with_recipe(result.model, Recipe()), tokenizer=tokenizer))
    reloaded = LLM(load_model(folder.model), tokenizer=tokenizer)
    after = _greedy_texts(reloaded)
    picture = out / "quickstart.png"
    title = f"tiny on Python's standard library: {result.tokens / 1e6:.2f}M tokens in {result.seconds:.0f} s"
    plot_run(picture, history, baselines, prepared.train.num_bytes / prepared.train.num_tokens, title)
    for written in (*after, _sampled_text(reloaded)):
        console.rule(style="dim")
        console.print(written.rstrip(), markup=False, highlight=False, soft_wrap=True)  # its line ends, no others
    console.rule(style="dim")
    seconds = time.perf_counter() - begin
    figures = Figures(spec, result.evaluation, baselines, result.tokens, result.seconds, seconds, before, after)
    console.print(result_table(figures))
    console.print(f"model {folder.model}   picture {picture}", highlight=False, soft_wrap=True)
    return failures(figures)


def _greedy_texts(llm: LLM) -> tuple[str, ...]:
    from abyssal.engine.messages import SamplingParams
    from abyssal.train.quickstart import PROMPTS

    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    return tuple(output.prompt + output.text for output in llm.generate(PROMPTS, params))


def _sampled_text(llm: LLM) -> str:
    from abyssal.engine.messages import SamplingParams
    from abyssal.train.quickstart import SAMPLED_PROMPT

    params = SamplingParams(temperature=0.7, top_p=0.95, seed=0, max_tokens=NEW_TOKENS)
    (output,) = llm.generate(SAMPLED_PROMPT, params)
    return output.prompt + output.text
