"""Service under load: published traces scaled down, and synthetic load beside transformers' static batching.

What a server can do is measured first, by the same requests from a number of clients that wait for their answers.  Open
load is then put on at a share of that rate.  Arrivals are by the wall clock, and the same for both servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.peer import load_ours, write_model
from support.record import interleaved

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.model.transformer import Transformer

from .load import ClosedLoad, Job, OpenLoad, poisson, serve, summary, synthetic
from .peers import FORMS, continuous_batching_refusal, load_peers
from .servers import EngineServer, StaticServer
from .setting import Case, Part, Setting
from .traces import DIVISORS, FILES, at_rate, chosen, jobs_of, read_trace, scaled

LOAD = 0.7
"""Share of capacity."""
CLIENTS = 16
SYNTHETIC_PROMPT, SYNTHETIC_NEW = (32, 256), (16, 96)
"""Tokens, from and to."""
WARM_UP = 8
"""Requests that are served before anything is measured."""


def cases(setting: Setting) -> list[Case]:
    """Synthetic load, and each trace that is there."""
    there = [] if setting.traces is None else [name for name in FILES if (setting.traces / FILES[name]).is_file()]
    missing = sorted(FILES.keys() - set(there))
    if missing:
        where = "there is no shared/traces beside the repository" if setting.traces is None else f"{setting.traces}"
        files = ", ".join(FILES[name] for name in missing)
        print(f"traces left out: {files} (looked in: {where}); name their folder with --traces")
    return [{**case, "load": load} for case in setting.cases() for load in ("synthetic", *there)]


def _served(model: Transformer, jobs: Sequence[Job], clients: int | None = None) -> dict[str, Any]:
    """A load on a fresh engine: open, or of ``clients``."""
    server = EngineServer(Engine(model, config=EngineConfig()))
    served = serve(server, OpenLoad(jobs) if clients is None else ClosedLoad(jobs, clients))
    found = summary(served)
    return {**found, "preemptions": server.engine.scheduler.num_preemptions, "steps": server.steps}


def _trace(case: Case, setting: Setting, model: Transformer) -> dict[str, Any]:
    assert setting.traces is not None
    divisor = DIVISORS[case["load"]]
    requests = [scaled(request, divisor) for request in read_trace(case["load"], setting.traces)]
    requests = chosen(requests, setting.requests, model.spec.max_positions)
    vocab_size = model.spec.vocab_size
    jobs = jobs_of(requests, divisor, vocab_size)
    _served(model, jobs[:WARM_UP], CLIENTS)
    capacity = _served(model, jobs, CLIENTS)
    arrivals = at_rate(requests, LOAD * float(capacity["requests_per_second"]))
    loads = {
        f"{CLIENTS} clients": {"abyssal": capacity},
        f"its own arrivals, {LOAD:.0%} of capacity": {
            "abyssal": _served(model, jobs_of(arrivals, divisor, vocab_size))
        },
    }
    prompts = sum(request.prompt_tokens for request in requests) / len(requests)
    news = sum(request.new_tokens for request in requests) / len(requests)
    return {**case, "divisor": divisor, "mean_prompt": prompts, "mean_new": news, "loads": loads}


def _synthetic(case: Case, setting: Setting, model: Transformer, folder: Any) -> dict[str, Any]:
    jobs = synthetic(setting.requests, model.spec.vocab_size, SYNTHETIC_PROMPT, SYNTHETIC_NEW)
    peers = load_peers(folder, case["dtype"])
    refusal = continuous_batching_refusal(peers[FORMS[0]])
    _served(model, jobs[:WARM_UP], CLIENTS)
    few = jobs[: 2 * WARM_UP]
    trials = {
        form: lambda peer=peer: float(_static(peer, few, CLIENTS)["tokens_per_second"]) for form, peer in peers.items()
    }
    best = max((rates[0], form) for form, rates in interleaved(trials, 1).items())[1]
    name = f"transformers {best}, static"
    peer = peers[best]
    closed = {"abyssal": _served(model, jobs, CLIENTS), name: _static(peer, jobs, CLIENTS)}
    loads = {f"{CLIENTS} clients": closed}
    for whose, owner in ((name, "transformers'"), ("abyssal", "abyssal's")):
        arrivals = poisson(jobs, LOAD * float(closed[whose]["requests_per_second"]))
        loads[f"Poisson, {LOAD:.0%} of {owner} capacity"] = {
            "abyssal": _served(model, arrivals),
            name: _static(peer, arrivals),
        }
    return {
        **case,
        "mean_prompt": sum(len(job.prompt) for job in jobs) / len(jobs),
        "mean_new": sum(job.new_tokens for job in jobs) / len(jobs),
        "continuous_batching_of_transformers": refusal or "runs",
        "loads": loads,
    }


def _static(peer: Any, jobs: Sequence[Job], clients: int | None = None) -> dict[str, Any]:
    return summary(serve(StaticServer(peer, CLIENTS), OpenLoad(jobs) if clients is None else ClosedLoad(jobs, clients)))


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """One kind of load on one preset in one dtype."""
    folder = write_model(case["preset"], setting.scratch)
    model = load_ours(folder, case["dtype"])
    if case["load"] == "synthetic":
        return _synthetic(case, setting, model, folder)
    return _trace(case, setting, model)


def lines(row: dict[str, Any]) -> list[str]:
    """A table: who, under which load, got what."""
    means = f"{row['mean_prompt']:.0f} prompt and {row['mean_new']:.0f} new tokens in the mean"
    text = [f"{row['preset']} {row['dtype']}, {row['load']}: {means}"]
    if refusal := row.get("continuous_batching_of_transformers"):
        text.append(f"transformers' continuous batching (generate_batch): {refusal}")
    head = f"{'first token p50':>15} {'p90':>7} {'p99':>7} {'a token p50':>12} {'p99':>7}"
    text.append(f"{'':<64} {'out/s':>7} {'all/s':>8} {head} {'queue':>6} {'cached':>7} {'preempted':>9}")
    for load, servers in row["loads"].items():
        for name, found in servers.items():
            first, token = found["first_token_seconds"], found["seconds_a_token"]
            text.append(
                f"{load:<36} {name:<27} {found['output_tokens_per_second']:7.1f} {found['tokens_per_second']:8.1f} "
                f"{first['p50']:13.3f} s {first['p90']:7.3f} {first['p99']:7.3f} {token['p50'] * 1e3:9.1f} ms "
                f"{token['p99'] * 1e3:7.1f} {found['waiting_for_first_token']:6.2f} {found['cached_share']:7.1%} "
                f"{found.get('preemptions', '-'):>9}"
            )
    return text


PART = Part("traces", "service under load", cases, measure, lines)
