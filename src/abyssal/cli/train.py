"""``abyssal train --model PRESET --data PATH... --out RUN --steps N``: train a model on text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from abyssal.cli.allocator import keep_freed_memory
from abyssal.cli.arguments import parse
from abyssal.train.config import TrainConfig, width_init_std


@dataclass(frozen=True)
class Options:
    """Train a model on text; RUN/model is a Hugging Face folder with its tokenizer, RUN/metrics.jsonl the figures."""

    out: Path
    """The run's folder; it must be empty or not exist."""
    model: str = "tiny"
    """A preset (tiny, small, medium, deepseek-v2-lite, ...); its vocabulary becomes the tokenizer's."""
    data: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="PATH [PATH ...]")] = None
    """Text files, .jsonl with a field "text", or folders of them. Without: the Python standard library's source."""
    tokenizer: Path | None = None
    """A folder with tokenizer.json. Without: one is trained on the text."""
    vocab_size: int | None = None
    """Tokens of the tokenizer to be trained; the preset's by default."""
    held_out: float = 0.05
    """Share of the documents to validate on."""
    init_std: float | None = None
    """Standard deviation of the initial weights; 0.5 / sqrt(hidden size) by default, which is V3's 0.006 at 7168."""
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainConfig)


def main(argv: list[str]) -> int:
    """Run the verb; bad input raises ValueError or FileNotFoundError."""
    options = parse(Options, argv, "train")
    keep_freed_memory()
    from abyssal.spec.presets import preset
    from abyssal.train.folder import RunFolder

    if options.tokenizer is not None and options.vocab_size is not None:
        raise ValueError("--vocab-size is of a tokenizer to be trained; leave it out beside --tokenizer")
    if options.data == ():
        raise ValueError("--data names no file; leave it out to train on the Python standard library's source")
    folder = RunFolder(options.out)
    folder.check_free()
    spec = preset(options.model)
    init_std = width_init_std(spec.hidden_size) if options.init_std is None else options.init_std
    spec = replace(spec, init_std=init_std)
    options.train.check_fits(spec)

    from abyssal.train.run import run_training
    from abyssal.train.text import tokenise_corpus

    vocab_size = spec.vocab_size if options.vocab_size is None else options.vocab_size
    text = tokenise_corpus(options.data, vocab_size, options.tokenizer, options.held_out)
    try:
        result = run_training(folder, text.fitted(spec), options.train, text)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    evaluation = result.evaluation
    print(
        f"{folder.model}: {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({result.tokens / result.seconds:,.0f} tokens/s), held-out loss {evaluation.loss:.3f}, "
        f"{evaluation.bits_per_byte:.3f} bits per byte, MaxVio {evaluation.max_violation:.2f}"
    )
    return 0
