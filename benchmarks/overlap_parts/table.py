"""What was found, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .measure import Found
from .overhead import Overhead
from .rank import WAYS
from .sleeping import RANKS, Slept

NAMES = {"serial": "one after the other", "overlapped": "overlapped", "none": "communication removed"}


def overlap(found: Found) -> list[str]:
    rounds = len(found.seconds["none"])
    lines = [
        f"{found.setting}",
        f"link: {found.kind}, {found.gigabits:.4f} Gbit/s asked for, TCP gets {found.across.gigabits:.4f}; a rank "
        f"sends {found.step_bytes / 1e6:.0f} MB a step",
        f"communication is {found.ratio:.2f} of computation; losses and gradients are the same in every step, bit for "
        f"bit (loss {found.loss:.6f})",
        "",
        f"{f'seconds of a step, medians of {rounds}':<32} {'step':>8} {'in pairs':>9} {'main thread':>12} "
        f"{'others':>8} {'interrupts':>11}",
    ]
    for way in WAYS:
        used = found.processor[way]
        lines.append(
            f"  {NAMES[way]:<30} {found.median(way):>8.3f} {statistics.median(found.pairs[way]):>9.3f} "
            f"{used['main_thread']:>12.3f} {used['other_threads']:>8.3f} {used['interrupts']:>11.3f}"
        )
    by_round = found.hidden(found.seconds)
    lines += [
        "",
        f"hidden, of the step   {found.hidden_of_step:6.1%}   rounds {min(by_round):.1%} to {max(by_round):.1%}; "
        f"{found.share_in_pairs:.1%} of the step's works are in pairs",
        f"hidden, of its pairs  {found.hidden_of_pairs:6.1%}",
        f"by the stopwatch      {statistics.median(found.hidden_share):6.1%}",
        f"not to be hidden      {found.processor_share:6.1%}   of communication is work of the rank's own core",
        "",
        *_waits(found),
    ]
    return lines


def _waits(found: Found) -> list[str]:
    """By move, what of communication was waited for in pairs."""
    added = found.median("serial") - found.median("none")
    lines = [f"{'waiting in overlapped pairs, by move':<38} {'seconds':>8} {'of communication':>17}"]
    lines += [f"  {move:<36} {seconds:>8.3f} {seconds / added:>17.1%}" for move, seconds in found.waits.items()]
    return lines


def overhead(found: Overhead) -> list[str]:
    plain, executor = (statistics.median(one) for one in (found.plain, found.executor))
    return [
        f"one rank, {found.micro_batches} micro-batches: plain {plain:.3f} s, through the executor {executor:.3f} s, "
        f"{found.share:+.1%}"
    ]


def sleeping(found: Sequence[Slept]) -> list[str]:
    one = found[0]
    lines = [
        f"{RANKS} ranks that sleep, {one.micro_batches} micro-batches, {1000 * one.unit:g} ms a unit",
        f"  {'schedule':<12} {'executor':>9} {'simulator':>10} {'more':>7}",
    ]
    lines += [
        f"  {one.name:<12} {statistics.median(one.executor):>7.3f} s {one.simulator:>8.3f} s {one.excess:>+7.1%}"
        for one in found
    ]
    return lines
