"""Speculation by the MTP module of a really trained model: tokens a second with 0 to 3 drafts, and as it chooses.

Prompts are pieces of held-out documents, so that drafts are accepted as often as on text of its kind.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from support.record import interleaved

from abyssal.checkpoint.hf import load_model
from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.messages import Request, SamplingParams

from .setting import DTYPES, Case, Part, Setting
from .trained import trained_model

DRAFTS = (0, 1, 2, 3, "auto")
PROMPT, NEW = 32, 96
"""Together as long as what the model was trained on."""
BATCHES = (1, 8)
TEMPERATURES = (0.0, 0.7)


def cases(setting: Setting) -> list[Case]:
    """The trained model in each dtype, greedy and drawn."""
    return [
        {"preset": "quickstart", "dtype": dtype, "temperature": temperature}
        for dtype in setting.dtypes
        for temperature in TEMPERATURES
    ]


def tokens_per_second(engine: Engine, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> float:
    """After all have their first token, until the first has ended."""
    for number, prompt in enumerate(prompts):
        engine.add(Request(number, prompt, params))
    counts: dict[int, int] = {}
    begin, at_begin, end, at_end = 0.0, 0, 0.0, 0
    while engine.unfinished:
        finished = False
        for output in engine.step():
            counts[output.request_id] = len(output.token_ids)
            finished = finished or output.finished
        now, total = time.perf_counter(), sum(counts.values())
        if not begin and len(counts) == len(prompts):
            begin, at_begin = now, total
        if not end and begin:
            at_end = total
            end = now if finished else 0.0
    return (at_end - at_begin) / (end - begin)


def _engine(model: Any, drafts: Any) -> Engine:
    return Engine(
        model, config=EngineConfig(prefix_cache=False, token_budget=2 * PROMPT * max(BATCHES), num_drafts=drafts)
    )


def _batch(model: Any, prompts: Sequence[tuple[int, ...]], case: Case, repeats: int, new: int) -> dict[str, Any]:
    params = SamplingParams(temperature=case["temperature"], max_tokens=new, ignore_eos=True, seed=0)
    engines = {str(drafts): _engine(model, drafts) for drafts in DRAFTS}
    rates = interleaved(
        {name: lambda engine=engine: tokens_per_second(engine, prompts, params) for name, engine in engines.items()},
        repeats,
    )
    plain = statistics.median(rates["0"])
    return {
        "batch": len(prompts),
        "tokens_per_second": rates,
        "gain": {name: statistics.median(values) / plain for name, values in rates.items()},
        "acceptance": {name: engine.draft_statistics.acceptance for name, engine in engines.items()},
        "gains_that_auto_saw": engines["auto"].draft_gains,
    }


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """Both batches of the trained model."""
    trained = trained_model(setting.model, 8 if setting.smoke else None)
    model = load_model(trained.folder, dtype=DTYPES[case["dtype"]])
    new = 16 if setting.smoke else NEW
    prompts = trained.prompts(max(BATCHES), PROMPT)
    batches = [_batch(model, prompts[:batch], case, setting.repeats, new) for batch in BATCHES]
    return {**case, "prompt": PROMPT, "new": new, "batches": batches}


def lines(row: dict[str, Any]) -> list[str]:
    """A table: drafts, tokens a second, gain, acceptance by position."""
    text = [f"{row['preset']} {row['dtype']}, temperature {row['temperature']:g}, prompts of held-out text"]
    text.append(f"{'batch':>5} {'drafts':>6} {'tokens/s':>9} {'gain':>6}   accepted, by position")
    for each in row["batches"]:
        for name, values in each["tokens_per_second"].items():
            accepted = " ".join(f"{share:.1%}" for share in each["acceptance"][name]) or "-"
            rate, gain = statistics.median(values), each["gain"][name]
            text.append(f"{each['batch']:5} {name:>6} {rate:9.1f} {gain:6.2f}   {accepted}")
    return text


PART = Part("speculation", "speculation by a trained MTP module", cases, measure, lines)
