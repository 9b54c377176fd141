"""What finished runs add up to: relative differences of the loss, seed by seed, beside what differs anyway.

The relative difference of an arm to BF16 at a step is (loss - loss of BF16) / loss of BF16, on the same rows from the
same initial weights.  Reported is its mean over the last steps of the run, signed, which is what remains when the noise
of single steps averages out, and that of its magnitude, which is what the two runs wander apart.  The goal is on the
signed mean of every seed [V3 section 3.3].

Two yardsticks.  Seeds of BF16 among themselves: how far apart the mean losses of the last steps lie when weights and
rows are others.  And ``bf16-halves``, where it was trained: what rounding alone makes of the same seed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ablation.intervals import interval

from .arms import ARMS, BASE, Scale

GOAL = 0.0025
"""Largest relative difference of the loss, as the paper found it."""

Results = dict[str, dict[int, dict[str, Any]]]
"""By arm and seed, what the run found."""


def relative_differences(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    """Step by step."""
    return [(loss - other) / other for loss, other in zip(losses, base, strict=True)]


def windows(values: Sequence[float], size: int) -> list[float]:
    """Means of ``size`` values at a time; what does not fill a last window is left over."""
    return [statistics.mean(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


def findings(results: Results, scale: Scale) -> dict[str, Any]:
    """Everything that is printed, drawn and saved, as JSON."""
    found: dict[str, Any] = {
        "title": "Training loss in FP8 and in BF16",
        "goal": GOAL,
        "last_steps": scale.last,
        "window": scale.window,
        "arms": {name: _arm(name, runs, scale) for name, runs in results.items()},
        "comparisons": [compare(name, results, scale) for name in results if name != BASE.name],
    }
    if len(results[BASE.name]) > 1:
        found["between_seeds"] = between_seeds(results[BASE.name], scale)
    return found


def _arm(name: str, runs: dict[int, dict[str, Any]], scale: Scale) -> dict[str, Any]:
    return {
        "label": ARMS[name].label,
        "commits": sorted({run["commit"] for run in runs.values()}),
        "step_seconds": statistics.median(run["step_seconds"] for run in runs.values()),
        "runs": {str(seed): _run(run, scale) for seed, run in sorted(runs.items())},
    }


def _run(run: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """A run with the means of windows in place of every step."""
    losses = run["losses"]
    return {
        **{name: value for name, value in run.items() if name != "losses"},
        "last_loss": statistics.mean(losses[-scale.last :]),
        "curve": [round(loss, 5) for loss in windows(losses, scale.window)],
    }


def compare(name: str, results: Results, scale: Scale) -> dict[str, Any]:
    """An arm against BF16, over the seeds that both have."""
    arm, base = results[name], results[BASE.name]
    by_seed = {str(seed): _pair(arm[seed], base[seed], scale) for seed in sorted(arm.keys() & base.keys())}
    signed = [pair["signed"] for pair in by_seed.values()]
    return {
        "arm": name,
        "against": BASE.name,
        "label": ARMS[name].label,
        "seeds": by_seed,
        "signed": statistics.mean(signed),
        "interval": asdict(interval(signed)) if len(signed) > 1 else None,
        "worst": max(signed, key=abs),
        "magnitude": statistics.mean(pair["magnitude"] for pair in by_seed.values()),
        "validation": statistics.mean(pair["validation"] for pair in by_seed.values()),
        "cost": statistics.mean(pair["cost"] for pair in by_seed.values()),
        "met": all(abs(value) <= GOAL for value in signed),
    }


def _pair(run: dict[str, Any], base: dict[str, Any], scale: Scale) -> dict[str, Any]:
    differences = relative_differences(run["losses"], base["losses"])
    last = differences[-scale.last :]
    return {
        "signed": statistics.mean(last),
        "magnitude": statistics.mean(map(abs, last)),
        "validation": run["validation_loss"] / base["validation_loss"] - 1,
        "cost": run["step_seconds"] / base["step_seconds"],
        "curve": [round(value, 6) for value in windows(differences, scale.window)],
    }


def between_seeds(runs: dict[int, dict[str, Any]], scale: Scale) -> dict[str, Any]:
    """How far the last losses of BF16 lie apart, relative to their mean, over all pairs of seeds."""
    losses = [statistics.mean(run["losses"][-scale.last :]) for run in runs.values()]
    validation = [run["validation_loss"] for run in runs.values()]
    return {name: _spread(values) for name, values in (("training", losses), ("validation", validation))}


def _spread(values: Sequence[float]) -> dict[str, float]:
    mean = statistics.mean(values)
    apart = [abs(a - b) / mean for a, b in itertools.combinations(values, 2)]
    return {"mean": statistics.mean(apart), "largest": max(apart), "deviation": statistics.stdev(values) / mean}


def described(found: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    last = found["last_steps"]
    lines = [f"== {found['title']}: relative difference to BF16 over the last {last} steps"]
    lines.append(
        f"{'':<28} {'seeds':>5}  {'mean':>9}  {'worst seed':>10}  {'of steps':>9}  {'held out':>9}  {'cost':>6}"
    )
    for each in found["comparisons"]:
        figures = (each[key] for key in ("signed", "worst", "magnitude", "validation"))
        signed, worst, magnitude, validation = (f"{100 * value:+.3f} %" for value in figures)
        lines.append(
            f"{each['label']:<28} {len(each['seeds']):>5}  {signed:>9}  {worst:>10}  {magnitude.replace('+', ' '):>9}  "
            f"{validation:>9}  {each['cost']:>5.2f}x"
        )
    if spread := found.get("between_seeds"):
        training, validation = (
            f"{100 * part['mean']:.3f} % on average and {100 * part['largest']:.3f} % at most"
            for part in (spread["training"], spread["validation"])
        )
        lines.append(f"two seeds of BF16 differ by {training}; on held-out text by {validation}")
    lines += _goal_described(found)
    return lines


def _goal_described(found: dict[str, Any]) -> list[str]:
    """Of the paper's recipe alone: the other arms are what it is compared with."""
    for each in found["comparisons"]:
        if each["arm"] == "fp8":
            verdict = "met" if each["met"] else "NOT MET"
            return [f"goal, in every seed: FP8 within {100 * found['goal']:g} % of BF16: {verdict}"]
    return []
