"""``abyssal generate MODEL --prompt TEXT``: let a model write, token by token, to standard output."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from abyssal.cli.arguments import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateConfig:
    """Let a model write."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model, with its tokenizer."""
    prompt: str
    """Text to continue."""
    max_tokens: int = 128
    """New tokens at most; an end-of-sequence token ends the text earlier."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples as the model was trained."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probability adds up to this."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["checkpoint", "float32", "bfloat16"] = "checkpoint"
    """Dtype of weights and activations."""


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of new tokens as it becomes certain.  Byte-level tokens decode alone, so only a character whose bytes are
    not all there yet is held back."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_control=True)
        if not text.endswith("\ufffd"):
            yield text
            pending = []
    yield tokenizer.decode(pending, skip_control=True)


def main(argv: list[str]) -> int:
    config = parse(GenerateConfig, argv, "generate")
    if not 0 <= config.seed < 1 << 63:
        raise ValueError(f"--seed is {config.seed}; give 0 to {(1 << 63) - 1}")

    import torch

    from abyssal.checkpoint.hf import load_model
    from abyssal.engine.generate import generate
    from abyssal.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(config.model)
    dtype = None if config.dtype == "checkpoint" else getattr(torch, config.dtype)
    model = load_model(config.model, dtype=dtype, mtp=False)
    tokenizer.check_fits(model.spec)
    prompt_ids = tokenizer.encode(config.prompt, add_bos=True)
    generator = torch.Generator().manual_seed(config.seed)
    ids = generate(model, prompt_ids, config.max_tokens, config.temperature, config.top_p, generator)
    sys.stdout.write(config.prompt)
    for text in stream_text(tokenizer, ids):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
