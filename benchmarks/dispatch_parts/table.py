"""The results of a case as text."""

from __future__ import annotations

from .measure import Case, Row
from .rank import PHASES, PLAIN, TUNED


def name_of(way: str, chunk_tokens: int | None) -> str:
    """How a way is called in tables and pictures."""
    if way == PLAIN:
        return "plain"
    size = "whole" if chunk_tokens is None else f"{chunk_tokens} tokens"
    return f"hierarchical, {'tuned: ' if way == TUNED else ''}{size}"


def described(case: Case) -> list[str]:
    setting, nodes = case.setting, case.setting.nodes
    return [
        f"{setting}",
        f"links: {case.kind}, {case.gigabits:g} Gbit/s asked for; TCP gets {case.across.gigabits:.3f} across "
        f"({case.across.round_trip * 1e6:.0f} us there and back) and {case.inside.gigabits:.2f} inside "
        f"({case.inside.round_trip * 1e6:.0f} us)",
        f"copies of a token that should cross: K(N-1)/N = {setting.top_k * (nodes - 1) / nodes:g} plain, "
        f"at most M(N-1)/N = {setting.kept_nodes * (nodes - 1) / nodes:g} hierarchical",
        "",
        *_bytes(case),
        "",
        *_times(case),
    ]


def _bytes(case: Case) -> list[str]:
    lines = [
        f"{'bytes of a token':<36} {'copies':>7} {'stayed':>9} {'inside':>9} {'across':>9} {'by routing':>11}"
        f" {'plan':>6} {'link':>9}"
    ]
    for row in case.rows:
        counted = {link: _counted(row, link) for link in ("stayed", "inside", "across")}
        expected = sum(phase["across"] for phase in row.expected.values())
        sizes = " ".join(f"{size:>9,.0f}" for size in counted.values())
        plan = row.counted["plan"]["across"]
        lines.append(
            f"  {name_of(row.way, row.chunk_tokens):<34} {row.copies_across:>7.3f} {sizes} {expected:>11,.0f}"
            f" {plan:>6,.0f} {row.link_bytes:>9,.0f}"
        )
    return lines


def _counted(row: Row, link: str) -> float:
    return row.counted["dispatch"][link] + row.counted["combine"][link]


def _times(case: Case) -> list[str]:
    phases = " ".join(f"{phase:>9}" for phase in PHASES)
    lines = [f"{'milliseconds':<36} {phases} {'all':>9} {'cores':>7} {'Gbit/s':>8} {'of link':>8} {'speedup':>8}"]
    plain = case.rows[0].total
    for row in case.rows:
        times = " ".join(f"{row.median(phase):>9.1f}" for phase in PHASES)
        name, share = name_of(row.way, row.chunk_tokens), row.gigabits / case.across.gigabits
        lines.append(
            f"  {name:<34} {times} {row.total:>9.1f} {row.processor_ms:>7.1f} {row.gigabits:>8.3f} {share:>8.0%}"
            f" {plain / row.total:>7.2f}x"
        )
    return lines
