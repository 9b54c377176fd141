"""What FP8 pages change: a model's log-probabilities and greedy output over them, beside those over pages of values.

    python -m tests.support.page_error [MODEL DATA]

MODEL is a model folder and DATA a folder that ``abyssal prepare`` wrote, whose held-out part is read; without them, the
small model of ``tests/support/trained_model.py``, trained on the spot.

Legend: T tokens, X cached values of a token.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from abyssal.cache.paged import PagedBatch, PagedCache, PagedTokens
from abyssal.cache.pages import PAGE
from abyssal.checkpoint.hf import load_model
from abyssal.data.shards import PreparedData
from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from abyssal.kernels.fp8_entries import dequantise_entries, quantise_entries
from abyssal.model.transformer import Transformer

MODEL, FP8 = EngineConfig(deterministic=True), EngineConfig(deterministic=True, page_dtype="fp8")
READ, WRITTEN = 256, 48
"""Tokens of a row of held-out text, and tokens written after a quarter of it."""


@dataclass(frozen=True)
class PageError:
    """Over held-out texts."""

    tokens: int
    loss: float
    """Mean negative log-probability of a token over pages of values, in nats."""
    loss_difference: float
    """That over FP8 pages, less the former."""
    mean_logprob_difference: float
    """Mean magnitude over the tokens read."""
    largest_logprob_difference: float
    same_likeliest: float
    """Share of tokens before which both find the same one likeliest."""
    written_alike: float
    """Share of greedy tokens before the first that differs."""
    largest_written_difference: float
    """Of log-probabilities of those: absorbed attention, where the above are expanded."""
    latent_error: float
    """Root mean square of the codes' error, over that of the values."""
    rotary_error: float
    """The same of the plain values."""


def held_out_texts(data: PreparedData, count: int) -> list[list[int]]:
    """Rows of the held-out documents, laid end to end: at most ``count``."""
    documents = data.held_out
    tokens = np.concatenate([documents.document(index) for index in range(documents.num_documents)])
    rows = tokens[: len(tokens) // READ * READ].reshape(-1, READ)
    return rows[:count].tolist()


def page_error(model: Transformer, texts: Sequence[list[int]]) -> PageError:
    """Measure it.  ``model`` has latent attention."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    read = [LLM(model, config=config).generate(list(texts), params) for config in (MODEL, FP8)]
    pairs = [
        (ours, theirs)
        for outputs in zip(*read, strict=True)
        for ours, theirs in zip(*(output.prompt_logprobs or () for output in outputs), strict=True)
        if ours is not None and theirs is not None
    ]
    plain, fp8 = (np.array([pair[side].logprob for pair in pairs]) for side in (0, 1))
    alike, written = _written(model, [text[: READ // 4] for text in texts])
    latent, rotary = _entry_errors(model, torch.tensor(texts[0]))
    return PageError(
        tokens=len(pairs),
        loss=-plain.mean(),
        loss_difference=plain.mean() - fp8.mean(),
        mean_logprob_difference=np.abs(plain - fp8).mean(),
        largest_logprob_difference=np.abs(plain - fp8).max(),
        same_likeliest=float(np.mean([ours.top[0][0] == theirs.top[0][0] for ours, theirs in pairs])),
        written_alike=alike,
        largest_written_difference=written,
        latent_error=latent,
        rotary_error=rotary,
    )


def _written(model: Transformer, prompts: list[list[int]]) -> tuple[float, float]:
    """Share of greedy tokens before the first that differs, and the largest difference of their log-probabilities."""
    params = SamplingParams(temperature=0, max_tokens=WRITTEN, logprobs=0, ignore_eos=True)
    plain, fp8 = ([output.logprobs or () for output in _outputs(model, c, prompts, params)] for c in (MODEL, FP8))
    alike, largest = 0, 0.0
    for ours, theirs in zip(plain, fp8, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            if mine.token_id != other.token_id:
                break
            alike, largest = alike + 1, max(largest, abs(mine.logprob - other.logprob))
    return alike / (WRITTEN * len(prompts)), largest


def _outputs(model: Transformer, config: EngineConfig, prompts: list[list[int]], params: SamplingParams):
    return LLM(model, config=config).generate(list(prompts), params)


@torch.inference_mode()
def _entry_errors(model: Transformer, tokens_T: Tensor) -> tuple[float, float]:
    """Of the entries of all layers but the MTP modules'."""
    cache = PagedCache(model.spec, -(-len(tokens_T) // PAGE), torch.float32)
    entry = model.spec.attention.fp8_entry
    context = PagedBatch(cache, [PagedTokens(0, len(tokens_T), tuple(range(cache.num_pages)), False)])
    model.hidden(tokens_T, model.step(context))
    slots_T = context.positions_T // PAGE * (cache.entries_PLSX.shape[1] * PAGE) + context.positions_T % PAGE
    values_TX = torch.cat([cache.load(layer, slots_T) for layer in range(model.spec.num_layers)])
    error_TX = dequantise_entries(quantise_entries(values_TX, entry), entry, torch.float32) - values_TX
    parts = zip(*(each.split([entry.num_codes, entry.plain_values], 1) for each in (error_TX, values_TX)), strict=True)
    latent, rotary = (float(error.norm() / value.norm()) for error, value in parts)
    return latent, rotary


def main(arguments: list[str]) -> None:
    if arguments:
        model, data = load_model(arguments[0], mtp=False), PreparedData.open(arguments[1])
        error = page_error(model, held_out_texts(data, 32))
    else:
        from tests.support.trained_model import train_small_model  # it trains; not for whoever brings a model

        with tempfile.TemporaryDirectory() as folder:
            trained = train_small_model(Path(folder) / "run")
            error = page_error(trained.model, held_out_texts(trained.data, 32))
    for field in fields(error):
        print(f"{field.name:27} {getattr(error, field.name):.6g}")


if __name__ == "__main__":
    main(sys.argv[1:])
