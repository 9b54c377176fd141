"""Decoding: tokens a second of 1, 8 and 32 sequences in lockstep, beside transformers' three ways with experts.

A step is timed from the return of the one before, so scheduling, sampling and the records of outputs are in it, as
transformers' ``generate`` is in theirs.  All prompts go through in one step first, so every later step decodes all.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from support.peer import DTYPES, load_ours, write_model
from support.record import interleaved

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, SamplingParams
from abyssal.model.transformer import Transformer

from .peers import generate_times, load_peers
from .setting import Case, Limits, Part, Setting, random_prompts
from .statistics import round_ratios, steady
from .touched import decode_bytes, decode_flops, distinct_experts

PROMPT, NEW = 128, 64
SKIPPED = 4
"""Steps after the prompt that are not counted."""
COPIED_BYTES = 6 << 30
"""``batched_mm`` copies the chosen experts' weights for each token of the prompts; beyond this it is left out."""


def engine_for(model: Transformer, batch: int, **options: Any) -> Engine:
    """An engine that takes ``batch`` prompts in one step and keeps nothing between requests."""
    budget = max(512, batch * PROMPT)
    config = EngineConfig(
        cache_tokens=2 * batch * (PROMPT + NEW) + 64, token_budget=budget, prefix_cache=False, **options
    )
    return Engine(model, config=config)


def step_times(engine: Engine, tokens_BS: torch.Tensor, new_tokens: int) -> list[float]:
    """When each step of greedy decoding was over."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for row, prompt in enumerate(tokens_BS.tolist()):
        engine.add(Request(row, tuple(prompt), params))
    times: list[float] = []
    while engine.unfinished:
        changed = engine.step()
        times.append(time.perf_counter())
        assert len(changed) == len(tokens_BS), "the sequences are not in lockstep"
    assert len(times) == new_tokens, (len(times), new_tokens)
    return times


def experts_touched(engine: Engine, tokens_BS: torch.Tensor, new_tokens: int) -> float:
    """Experts that a decoding step reads, over all layers, by the engine's own record of the routing."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, return_experts=True)
    for row, prompt in enumerate(tokens_BS.tolist()):
        engine.add(Request(row, tuple(prompt), params))
    finished = []
    while engine.unfinished:
        finished += [output for output in engine.step() if output.finished]
    return distinct_experts([output.outputs[0].experts for output in finished], tokens_BS.shape[1])


def fitting(peers: dict[str, Any], ours: Transformer, batch: int) -> dict[str, Any]:
    """The peers whose prefill of ``batch`` prompts fits into memory."""
    moe = ours.spec.moe
    weights = 0 if moe is None else moe.top_k * 2 * moe.expert_ffn_size * ours.spec.hidden_size
    copied = batch * PROMPT * weights * ours.embed.weight.element_size()
    return {form: model for form, model in peers.items() if form != "batched_mm" or copied <= COPIED_BYTES}


def _batch(ours: Transformer, peers: dict[str, Any], batch: int, setting: Setting) -> dict[str, Any]:
    new = 12 if setting.smoke else NEW
    peers = fitting(peers, ours, batch)
    tokens_BS = random_prompts(batch, PROMPT, ours.spec.vocab_size)
    engine = engine_for(ours, batch)
    rates = interleaved(
        {
            "abyssal": lambda: batch / steady(step_times(engine, tokens_BS, new), SKIPPED),
            **{
                form: lambda model=model: batch / steady(generate_times(model, tokens_BS, new), SKIPPED)
                for form, model in peers.items()
            },
        },
        setting.repeats,
    )
    best, ratio, each = round_ratios(rates["abyssal"], {form: rates[form] for form in peers})
    return {
        "batch": batch,
        "tokens_per_second": rates,
        "best_peer": best,
        "ratio": ratio,
        "ratio_of_rounds": each,
        "experts_a_step": experts_touched(engine, tokens_BS, new),
    }


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """All batch sizes of one preset in one dtype."""
    folder = write_model(case["preset"], setting.scratch)
    ours, peers, limits = load_ours(folder, case["dtype"]), load_peers(folder, case["dtype"]), Limits(case["dtype"])
    limits.look()
    batches = [_batch(ours, peers, batch, setting) for batch in setting.batches]
    limits.look()
    context = PROMPT + NEW // 2
    itemsize = DTYPES[case["dtype"]].itemsize
    for each in batches:
        steps = statistics.median(each["tokens_per_second"]["abyssal"]) / each["batch"]
        read = decode_bytes(ours.spec, each["experts_a_step"], each["batch"], context, itemsize)
        each["share_of_bandwidth"] = steps * read / limits.bytes_per_second
        each["share_of_peak"] = steps * decode_flops(ours.spec, each["batch"], context) / limits.flops_per_second
    return {**case, "prompt": PROMPT, "new": NEW, "limits": limits.values, "batches": batches}


def lines(row: dict[str, Any]) -> list[str]:
    """A table: tokens a second, ratio to the best peer, shares of this machine's limits."""
    head = f"{'batch':>5} {'abyssal':>9} {'best peer':>10} {'':<12} {'ratio':>6} {'of memory':>10} {'of peak':>8}"
    text = [f"{row['preset']} {row['dtype']}, prompt {row['prompt']}", head + "   (tokens/s, medians)"]
    for each in row["batches"]:
        medians = {name: statistics.median(values) for name, values in each["tokens_per_second"].items()}
        text.append(
            f"{each['batch']:5} {medians['abyssal']:9.1f} {medians[each['best_peer']]:10.1f} {each['best_peer']:<12} "
            f"{each['ratio']:6.2f} {each['share_of_bandwidth']:10.2f} {each['share_of_peak']:8.2f}"
        )
    return text


PART = Part("decode", "decoding beside transformers", Setting.cases, measure, lines)
