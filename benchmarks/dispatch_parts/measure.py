"""One setting on links of one rate: all ways in turn, round by round, and what was counted beside what had to be."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from support.link import LinkKind, Links, open_links
from support.link_probe import RawLink, measure_links
from support.rank_group import RankGroup

from abyssal.parallel.dispatch.tune import candidates

from .expected import LINKS, Copies, hierarchical_copies, plain_copies
from .rank import PHASES, PLAIN, TUNED
from .setting import Setting

Bytes = dict[str, float]
"""Of a token, by link."""


@dataclass(frozen=True)
class Row:
    """One way."""

    way: str
    chunk_tokens: int | None
    """Tokens of a chunk; None for plain, and where there is nothing to be cut."""
    milliseconds: dict[str, list[float]]
    """Of each phase on its slowest rank, a round each."""
    counted: dict[str, Bytes]
    """Of each phase, by the dispatcher."""
    expected: dict[str, Bytes]
    """Of dispatch and combine, from the routing."""
    copies_across: float
    """Of a token in dispatch, from the routing."""
    link_bytes: float
    """That left the nodes by the links' own counters, a token."""
    processor_ms: float
    """Processor time of all ranks over the machine's cores, unpacking included: a floor under the time."""
    busiest_bytes: float
    """That the node which sent most sent across in dispatch and combine, by the dispatcher's count."""

    @property
    def total(self) -> float:
        """Milliseconds of all phases, the median of the rounds."""
        return statistics.median(map(sum, zip(*self.milliseconds.values(), strict=True)))

    def median(self, phase: str) -> float:
        return statistics.median(self.milliseconds[phase])

    @property
    def gigabits(self) -> float:
        """A second across the busiest node's cable while dispatch and combine lasted."""
        return self.busiest_bytes * 8 / 1e6 / (self.median("dispatch") + self.median("combine"))

    def across(self) -> float:
        """Bytes of a token across, of all phases."""
        return sum(phase["across"] for phase in self.counted.values())


@dataclass(frozen=True)
class Case:
    """A setting on links of one rate."""

    setting: Setting
    kind: LinkKind
    gigabits: float
    """Asked for."""
    inside: RawLink
    across: RawLink
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                **asdict(row),
                "total": row.total,
                "gigabits": row.gigabits,
                "share_of_link": row.gigabits / self.across.gigabits,
                "speedup": self.rows[0].total / row.total,
            }
            for row in self.rows
        ]
        return {**asdict(self), "setting": self.setting.as_json(), "rows": rows}


def measure(setting: Setting, gigabits: float, kind: LinkKind | None, repeats: int) -> Case:
    """Raw links first, then rounds of all ways; the first round, in which chunk sizes are found, is not counted."""
    sizes = candidates(setting.tokens)
    if min(setting.nodes, setting.ranks_per_node) == 1:
        sizes = sizes[:1]  # one hop alone: nothing overlaps
    ways = [PLAIN, *map(str, sizes), *([TUNED] if len(sizes) > 1 else [])]
    with open_links(setting.nodes, gigabits, kind) as links:
        inside, across = measure_links(links, setting.ranks_per_node)
        rounds: dict[str, list[Round]] = {way: [] for way in ways}
        with RankGroup(links, setting.ranks_per_node, "dispatch_parts.rank", setting.as_json()) as ranks:
            for number in range(repeats + 1):
                for way in ways:
                    found = _round(ranks, links, way)
                    if number:
                        rounds[way].append(found)
        copies = {PLAIN: plain_copies(setting)}
        copies |= dict.fromkeys(ways[1:], hierarchical_copies(setting))
        rows = [_row(setting, way, rounds[way], copies[way]) for way in ways]
        return Case(setting, links.kind, gigabits, inside, across, rows)


@dataclass(frozen=True)
class Round:
    """One way once."""

    answers: list[dict[str, Any]]
    link_bytes: int


def _round(ranks: RankGroup, links: Links, way: str) -> Round:
    before = [links.sent(node) for node in range(links.num_nodes)]
    answers = ranks.ask({"way": way})
    return Round(answers, sum(links.sent(node) - sent for node, sent in enumerate(before)))


def _row(setting: Setting, way: str, rounds: list[Round], copies: Copies) -> Row:
    tokens = setting.tokens * setting.ranks
    answers = rounds[-1].answers
    counted = {
        phase: {link: sum(each["traffic"][phase][link] for each in answers) / tokens for link in LINKS}
        for phase in PHASES
    }
    by_phase = {"dispatch": copies.dispatch_bytes(setting), "combine": copies.combine_bytes(setting)}
    milliseconds = {
        phase: [1000 * max(each["seconds"][phase] for each in one.answers) for one in rounds] for phase in PHASES
    }
    return Row(
        way=way,
        chunk_tokens=answers[0]["chunk_tokens"] if way == TUNED else None if way == PLAIN else int(way),
        milliseconds=milliseconds,
        counted=counted,
        expected={phase: {link: size / tokens for link, size in sizes.items()} for phase, sizes in by_phase.items()},
        copies_across=copies.rows["across"] / tokens,
        link_bytes=statistics.median(one.link_bytes for one in rounds) / tokens,
        processor_ms=statistics.median(map(_processor_ms, rounds)),
        busiest_bytes=max(_sent_across(setting, answers, node) for node in range(setting.nodes)),
    )


def _processor_ms(one: Round) -> float:
    return 1000 * sum(each["processor"] for each in one.answers) / (os.cpu_count() or 1)


def _sent_across(setting: Setting, answers: list[dict[str, Any]], node: int) -> int:
    own = answers[node * setting.ranks_per_node : (node + 1) * setting.ranks_per_node]
    return sum(each["traffic"][phase]["across"] for each in own for phase in ("dispatch", "combine"))
