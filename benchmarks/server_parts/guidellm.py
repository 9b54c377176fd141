"""guidellm as an outside check: requests of the same lengths, on a server with the same settings, measured by somebody
else's client and clock.

Its prompts are text, made of its own words to the same number of tokens, so no two begin alike: what :mod:`.load` calls
``miss``.  It runs beside ours, one concurrency after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from engine_parts.setting import Case, Part, Setting

from abyssal.spec.presets import preset

from .clients import closed_load, load_summary
from .load import WARM_UP, WARM_UP_SEED, jobs, lengths, serve_options
from .models import servable_model
from .process import NAME, ServerProcess

ENVIRONMENT = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""One process for its clients: with its ten, they take the processor from the server that they measure."""
SECONDS = 900
"""After which a run is given up."""


def part(program: Path) -> Part:
    """The part that runs this program."""
    return Part("guidellm", "the same by guidellm", lambda setting: setting.cases(), partial(measure, program), lines)


def measure(program: Path, case: Case, setting: Setting) -> dict[str, Any]:
    """All concurrencies, ours and theirs in turns."""
    folder, vocab_size = servable_model(case["preset"], setting.scratch), preset(case["preset"]).vocab_size
    loads: list[dict[str, Any]] = []
    with ServerProcess(folder, *serve_options(case["dtype"], setting)) as server:
        closed_load(server.port, jobs(WARM_UP, setting, vocab_size, False, WARM_UP_SEED), WARM_UP)
        for clients in setting.batches:
            count = max(2 * clients, setting.requests if clients > 1 else setting.requests // 4)
            ours = load_summary(closed_load(server.port, jobs(count, setting, vocab_size, False, clients), clients))
            theirs = _run(program, folder, server.port, clients, count, setting)
            loads.append({"clients": clients, "ours": ours, "guidellm": theirs})
    return {**case, "version": _version(program), "loads": loads}


def _run(program: Path, folder: Path, port: int, clients: int, count: int, setting: Setting) -> dict[str, Any]:
    prefix, tail, new = lengths(setting)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        backend = f"kind=openai_http,target=http://127.0.0.1:{port},model={NAME},request_format=/v1/completions"
        command = [str(program), "run", "--disable-console", "--backend", backend]
        command += ["--profile", f"kind=concurrent,streams={clients}"]
        command += ["--constraint", f"kind=max_requests,count={count}"]
        command += ["--data", f"kind=synthetic_text,prompt_tokens={prefix + tail},output_tokens={new}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={folder}", "--output", f"kind=json,path={report}"]
        environment = {**os.environ, **ENVIRONMENT}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode or not report.exists():
            raise RuntimeError(f"guidellm failed:\n{done.stderr[-2000:]}")
        return _found(json.loads(report.read_text())["benchmarks"][0]["metrics"], count)


def _found(metrics: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Its figures by our names, in seconds."""
    totals = metrics["request_totals"]
    if totals["successful"] != count:
        raise RuntimeError(f"guidellm counts {totals} of {count} requests")

    def seconds(name: str) -> dict[str, float]:
        shares = metrics[name]["successful"]["percentiles"]
        return {share: shares[share] / 1e3 for share in ("p50", "p90", "p99")}

    return {
        "requests_per_second": metrics["requests_per_second"]["successful"]["mean"],
        "output_tokens_per_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "first_token_seconds": seconds("time_to_first_token_ms"),
        "seconds_a_token": seconds("inter_token_latency_ms"),
    }


def _version(program: Path) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()[-1]


def lines(row: dict[str, Any]) -> list[str]:
    """A table: what both found."""
    head = f"{'requests/s':>11} {'out tok/s':>10} {'first token p50':>16} {'p99':>8} {'a token p50':>12} {'p99':>8}"
    text = [f"{row['preset']} {row['dtype']}, guidellm {row['version']}", f"{'clients':>8} {'by':>9} {head}"]
    for load in row["loads"]:
        for who in ("ours", "guidellm"):
            found, clients = load[who], load["clients"]
            first, token = found["first_token_seconds"], found["seconds_a_token"]
            text.append(
                f"{clients:8d} {who:>9} {found['requests_per_second']:11.2f} {found['output_tokens_per_second']:10.1f} "
                f"{first['p50'] * 1e3:13.1f} ms {first['p99'] * 1e3:8.1f} "
                f"{token['p50'] * 1e3:9.2f} ms {token['p99'] * 1e3:8.2f}"
            )
    return text
