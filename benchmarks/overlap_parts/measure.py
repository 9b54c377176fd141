"""The three ways in turn over a link as fast as communication shall be slow, and what of it was hidden."""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from support.link import LinkKind, Links, open_links
from support.link_probe import RawLink, measure_links
from support.rank_group import RankGroup

from .rank import KEEP, NONE, OVERLAPPED, SERIAL, WAYS
from .setting import RANKS, Setting

FAST = 10.0
"""Gbit/s of the link over which the bytes of a step are counted and its computation is timed."""
LEAST, MOST = 0.8, 1.2
"""Communication over computation that is accepted."""
BURST = 1 << 16
"""Bytes that a bucket lets through at once: little beside what one dispatch sends, so that each takes its time."""
TRIAL = 6
"""Micro-batches with which the rate is found."""
Answers = list[dict[str, Any]]
"""By rank."""


@dataclass(frozen=True)
class Found:
    """Of one setting.  Seconds are a round each, of the slower rank."""

    setting: Setting
    kind: LinkKind
    gigabits: float
    """Asked for."""
    across: RawLink
    step_bytes: float
    """That left a rank in one step, by the link's counter."""
    seconds: dict[str, list[float]]
    """By way, of a step."""
    pairs: dict[str, list[float]]
    """By way, of a step's pairs."""
    communicating: list[float]
    """That the serial step waits for communication."""
    hidden_share: list[float]
    """Of the overlapped step, as the stopwatch has it."""
    waits: dict[str, float]
    """By move of the interleaving that waits, seconds of an overlapped step; median of rounds, mean of ranks."""
    processor: dict[str, dict[str, float]]
    """By way: seconds of the main thread, of a rank's other threads, and of interrupts on its core; likewise."""
    loss: float

    def median(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    @property
    def ratio(self) -> float:
        """Communication over computation."""
        return statistics.median(self.communicating) / self.median(NONE)

    def hidden(self, of: dict[str, list[float]]) -> list[float]:
        """Round by round, what of communication's time is gone: of steps, or of their pairs."""
        return [_hidden(*each) for each in zip(*(of[way] for way in WAYS), strict=True)]

    @property
    def hidden_of_step(self) -> float:
        return _hidden(*(self.median(way) for way in WAYS))

    @property
    def hidden_of_pairs(self) -> float:
        return _hidden(*(statistics.median(self.pairs[way]) for way in WAYS))

    @property
    def share_in_pairs(self) -> float:
        """Of a step's works, those that have one to overlap with."""
        return (2 * self.setting.micro_batches - 3) / (2 * self.setting.micro_batches)

    @property
    def processor_share(self) -> float:
        """Of the time that communication adds, what its threads and interrupts take from the core: not to be hidden."""
        used = self.processor[OVERLAPPED]
        return (used["other_threads"] + used["interrupts"]) / (self.median(SERIAL) - self.median(NONE))

    def as_json(self) -> dict[str, Any]:
        names = ("ratio", "hidden_of_step", "hidden_of_pairs", "share_in_pairs", "processor_share")
        rounds = {"hidden_by_round": self.hidden(self.seconds)}
        return {**asdict(self), **{name: getattr(self, name) for name in names}, **rounds}


def _hidden(serial: float, overlapped: float, none: float) -> float:
    return (serial - overlapped) / (serial - none)


def cores() -> list[int]:
    """One a rank; the same for all where there is but one."""
    own = sorted(os.sched_getaffinity(0))
    return [own[rank % len(own)] for rank in range(RANKS)]


def measure(
    setting: Setting, ratio: float, kind: LinkKind | None, repeats: int, gigabits: float | None = None
) -> tuple[Found, list[dict[str, Any]]]:
    """Of a rate that makes communication ``ratio`` of computation, or of ``gigabits``; and the notes of a step by rank.

    The rate is found with few micro-batches, from the bytes that they send and the time that they compute.
    """
    if gigabits is None:
        gigabits = _rate(replace(setting, micro_batches=min(setting.micro_batches, TRIAL)), ratio, kind)
    found, notes = _over(setting, gigabits, kind, repeats)
    if not LEAST <= found.ratio <= MOST:
        print(f"communication is {found.ratio:.2f} of computation, not {LEAST} to {MOST}: give another --gigabits")
    return found, notes


def _rate(setting: Setting, ratio: float, kind: LinkKind | None) -> float:
    with open_links(RANKS, FAST, kind, BURST) as links, _ranks(links, setting) as ranks:
        size = _step_bytes(links, ranks)
        computing = min(_slower(ranks.ask({"way": NONE}), "seconds") for _ in range(2))
    return size * 8 / 1e9 / (ratio * computing)


def _over(setting: Setting, gigabits: float, kind: LinkKind | None, repeats: int) -> tuple[Found, list[dict[str, Any]]]:
    with open_links(RANKS, gigabits, kind, BURST) as links:
        _, across = measure_links(links, 1)
        with _ranks(links, setting) as ranks:
            size = _step_bytes(links, ranks)
            rounds: dict[str, list[Answers]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way in WAYS:
                    rounds[way].append(ranks.ask({"way": way}))
            noted = ranks.ask({"way": OVERLAPPED, "notes": True})
        _check_same([*rounds[SERIAL], *rounds[OVERLAPPED], *rounds[NONE], noted])
        found = Found(
            setting=setting,
            kind=links.kind,
            gigabits=gigabits,
            across=across,
            step_bytes=size,
            seconds={way: [_slower(one, "seconds") for one in rounds[way]] for way in WAYS},
            pairs={way: [_slower(one, "pairs") for one in rounds[way]] for way in WAYS},
            communicating=[_slower(one, "waiting") for one in rounds[SERIAL]],
            hidden_share=[statistics.mean(_share(each) for each in one) for one in rounds[OVERLAPPED]],
            waits={move: _typical([[r["waits"][move] for r in one] for one in rounds[OVERLAPPED]])
                   for move in noted[0]["waits"]},
            processor={way: {name: _typical([[r[name] for r in one] for one in rounds[way]])
                             for name in ("main_thread", "other_threads", "interrupts")} for way in WAYS},
            loss=sum(float.fromhex(each["loss"]) for each in noted),
        )  # fmt: skip
    return found, [each["notes"] for each in noted]


def _ranks(links: Links, setting: Setting) -> RankGroup:
    request = {"setting": setting.as_json(), "cores": cores()}
    return RankGroup(links, 1, "overlap_parts.rank", request, timeout=300.0)


def _step_bytes(links: Links, ranks: RankGroup) -> float:
    """Of the step whose communication is kept, the first."""
    before = [links.sent(node) for node in range(RANKS)]
    ranks.ask({"way": KEEP})
    return max(links.sent(node) - sent for node, sent in enumerate(before))


def _slower(answers: Answers, name: str) -> float:
    return max(each[name] for each in answers)


def _share(answer: dict[str, Any]) -> float:
    return answer["hidden"] / answer["communicating"]


def _typical(rounds: list[list[float]]) -> float:
    return statistics.median(statistics.mean(ranks) for ranks in rounds)


def _check_same(steps: list[Answers]) -> None:
    """Losses and gradients of all steps are those of the first, on each rank, bit for bit."""
    for step in steps:
        for rank, (one, first) in enumerate(zip(step, steps[0], strict=True)):
            for what in ("loss", "gradients"):
                if one[what] != first[what]:
                    raise AssertionError(f"rank {rank}: {what} differ between the ways: {one[what]}, {first[what]}")
