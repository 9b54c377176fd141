"""Prefill: seconds from a request to its first token, and prompt tokens a second, beside transformers.

Twice for the engine: with the default budget of tokens a step, which lets others write in between, and with the prompt
in one step.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from support.peer import load_ours, write_model
from support.record import interleaved

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, SamplingParams
from abyssal.model.transformer import Transformer
from abyssal.spec.arithmetic import prefill_flops_per_token

from .peers import load_peers, prefill_seconds
from .setting import Case, Limits, Part, Setting, random_prompts
from .statistics import round_ratios

LENGTHS = (512, 2048)
CHUNKED, WHOLE = "abyssal", "abyssal, one step"


def first_token_seconds(engine: Engine, prompt: tuple[int, ...]) -> float:
    """From adding a request to an otherwise idle engine until its one token is there."""
    start = time.perf_counter()
    engine.add(Request(0, prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    while engine.unfinished:
        engine.step()
    return time.perf_counter() - start


def _length(ours: Transformer, peers: dict[str, Any], length: int, repeats: int) -> dict[str, Any]:
    tokens_1S = random_prompts(1, length, ours.spec.vocab_size)
    prompt = tuple(tokens_1S[0].tolist())
    chunked = Engine(ours, config=EngineConfig(prefix_cache=False))
    whole = Engine(ours, config=EngineConfig(prefix_cache=False, token_budget=length))
    seconds = interleaved(
        {
            CHUNKED: lambda: first_token_seconds(chunked, prompt),
            WHOLE: lambda: first_token_seconds(whole, prompt),
            **{form: lambda model=model: prefill_seconds(model, tokens_1S) for form, model in peers.items()},
        },
        repeats,
    )
    rates = {name: [length / value for value in values] for name, values in seconds.items()}
    best, ratio, each = round_ratios(rates[CHUNKED], {form: rates[form] for form in peers})
    _, whole_ratio, _ = round_ratios(rates[WHOLE], {form: rates[form] for form in peers})
    return {
        "prompt": length,
        "seconds": seconds,
        "best_peer": best,
        "ratio": ratio,
        "ratio_of_rounds": each,
        "ratio_in_one_step": whole_ratio,
    }


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Both lengths of one preset in one dtype."""
    folder = write_model(case["preset"], setting.scratch)
    ours, peers, limits = load_ours(folder, case["dtype"]), load_peers(folder, case["dtype"]), Limits(case["dtype"])
    limits.look()
    lengths = [_length(ours, peers, length, setting.repeats) for length in ((128,) if setting.smoke else LENGTHS)]
    limits.look()
    for each in lengths:
        flops = prefill_flops_per_token(ours.spec, each["prompt"]) * each["prompt"]
        fastest = min(statistics.median(each["seconds"][name]) for name in (CHUNKED, WHOLE))
        each["share_of_peak"] = flops / fastest / limits.flops_per_second
    return {**case, "limits": limits.values, "lengths": lengths}


def lines(row: dict[str, Any]) -> list[str]:
    """A table: time to first token and tokens a second."""
    text = [
        f"{row['preset']} {row['dtype']}",
        f"{'prompt':>6} {'':<20} {'first token':>12} {'tokens/s':>9} {'ratio':>6}   (medians; best peer in front)",
    ]
    for each in row["lengths"]:
        ratios = {CHUNKED: each["ratio"], WHOLE: each["ratio_in_one_step"], each["best_peer"]: 1.0}
        for name in sorted(ratios, key=lambda name: (name != each["best_peer"], name)):
            seconds = statistics.median(each["seconds"][name])
            rate = each["prompt"] / seconds
            text.append(f"{each['prompt']:6} {name:<20} {seconds * 1e3:9.1f} ms {rate:9,.0f} {ratios[name]:6.2f}")
        text.append(f"{'':6} {'of matmul peak':<20} {each['share_of_peak']:12.2f}")
    return text


PART = Part("prefill", "prefill beside transformers", Setting.cases, measure, lines)
