"""Whether drafting pays, on a clock that says what steps cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from abyssal.engine.gain import FIRST_INTERVAL, LONGEST_INTERVAL, PROBE_STEPS, DraftGain, DraftStatistics
from abyssal.engine.messages import Chunk, Path, Sampled, StepPlan


def chunk(number: int, num_drafts: int = 0, tokens: int = 1, path: Path = "decode") -> Chunk:
    return Chunk(number, 9, tokens + num_drafts, (0,), (0,) * tokens, path, samples=True, num_drafts=num_drafts)


@dataclass
class Serving:
    """Steps of ``sequences`` that write, drafts accepted with probability ``acceptance`` after accepted ones."""

    cost: Callable[[int], float]
    """Of a step with drafts, by sequences, where one without costs 1."""
    acceptance: float
    sequences: int = 1
    most: int = 2
    noise: float = 0.05
    now: float = 0.0
    holds: int = 0
    """Drafts that each sequence holds."""
    drafted: list[bool] = field(default_factory=list)
    """Of each step."""

    def __post_init__(self) -> None:
        self.random = random.Random(0)
        self.gain = DraftGain(self.most, lambda: self.now)

    def run(self, steps: int) -> float:
        """Seconds a token meanwhile."""
        begin, tokens = self.now, 0
        for _ in range(steps):
            wanted = self.gain.begin(self.sequences)
            drafts = min(self.holds, wanted)
            chunks = tuple(chunk(number, drafts) for number in range(self.sequences))
            plan = StepPlan(chunks, wanted_drafts=wanted)
            seconds = self.cost(self.sequences) if wanted else 1.0
            self.now += seconds * self.random.uniform(1 - self.noise, 1 + self.noise)
            results = {number: Sampled((0,) * (1 + self.accepted(drafts))) for number in range(self.sequences)}
            tokens += sum(len(each.tokens) for each in results.values())
            self.gain.end(plan, results)
            self.holds = wanted
            self.drafted.append(drafts > 0)
        return (self.now - begin) / tokens

    def accepted(self, drafts: int) -> int:
        count = 0
        while count < drafts and self.random.random() < self.acceptance:
            count += 1
        return count

    def share(self, last: int) -> float:
        """Of the last steps, those that drafted."""
        return sum(self.drafted[-last:]) / last


def test_what_pays_stays_on() -> None:
    serving = Serving(lambda _: 1.3, acceptance=0.8)
    assert serving.run(6000) == pytest.approx(1.3 / (1 + 0.8 + 0.64), rel=0.05)
    assert serving.share(3000) > 0.97
    assert serving.gain.gains()[1] == pytest.approx(2.44 / 1.3, rel=0.2)


def test_what_does_not_pay_is_off_and_seldom_probed() -> None:
    serving = Serving(lambda _: 2.0, acceptance=0.2)
    serving.run(6000)
    pace = serving.run(6000)
    assert pace == pytest.approx(1.0, rel=0.02) and serving.share(6000) < 0.02
    assert serving.share(12000) > 0, "it is still looked at now and then"


def test_a_change_is_followed() -> None:
    serving = Serving(lambda _: 1.4, acceptance=0.8, sequences=4)
    serving.run(3000)
    serving.acceptance = 0.05  # other texts
    serving.run(FIRST_INTERVAL + 500)
    assert serving.share(300) < 0.2, "a way that falls behind is doubted at once"
    serving.acceptance = 0.8
    serving.run(LONGEST_INTERVAL + 2 * PROBE_STEPS + 1000)
    assert serving.share(500) > 0.9


def test_a_way_has_to_be_clearly_better_to_take_over() -> None:
    serving = Serving(lambda _: 2.04, acceptance=1.0, most=1, noise=0.0)  # half a step a token: 2% slower
    serving.run(2000)
    assert serving.share(500) > 0.9
    for cost, wanted in ((2.1, False), (1.96, False), (1.9, True)):
        serving.cost = lambda _, cost=cost: cost
        serving.run(2 * LONGEST_INTERVAL)
        assert (serving.share(500) > 0.5) is wanted, cost


def test_near_the_border_it_does_not_flutter() -> None:
    serving = Serving(lambda _: 1.78, acceptance=0.56, sequences=16, noise=0.1)  # a gain of 1.05
    serving.run(6000)
    flips = sum(a != b for a, b in zip(serving.drafted, serving.drafted[1:], strict=False))
    assert flips < 40


def test_each_number_of_sequences_is_judged_by_itself() -> None:
    serving = Serving(lambda count: 1.2 if count < 8 else 2.5, acceptance=0.5)
    for _ in range(20):
        for serving.sequences in (1, 32):
            serving.run(100)
    for serving.sequences, wanted in ((1, True), (32, False)):
        serving.run(1000)
        assert (serving.share(500) > 0.5) is wanted
    gains = serving.gain.gains()
    assert set(gains) == {1, 32} and gains[1] > 1 > gains[32]
    wanted = serving.gain.begin(1)  # expecting one sequence, and then many had to be written, none with drafts yet
    serving.now += 1e6
    plan = StepPlan(tuple(chunk(number) for number in range(32)), wanted_drafts=wanted)
    serving.gain.end(plan, {number: Sampled((0,)) for number in range(32)})
    assert wanted and serving.gain.gains() == gains, "neither way's step"


def test_steps_that_read_are_not_measured() -> None:
    now = [0.0]
    gain = DraftGain(1, lambda: now[0])
    for unlike in (chunk(1, tokens=5, path="prompt"), chunk(1, tokens=3), chunk(1, path="prompt")):
        for _ in range(10 * PROBE_STEPS):
            wanted = gain.begin(2)
            now[0] += 1.0
            gain.end(StepPlan((chunk(0, wanted), unlike), wanted_drafts=wanted), {0: Sampled((0,)), 1: Sampled((0,))})
            assert wanted == 1, "it goes on as it began"
    assert gain.gains() == {}


def test_a_clock_that_stands_still_decides_nothing() -> None:
    serving = Serving(lambda _: 2.0, acceptance=0.5)
    serving.gain = DraftGain(2, lambda: 0.0)
    serving.run(3000)
    assert serving.share(2000) > 0.9 and serving.gain.gains() == {}


def test_statistics_by_position() -> None:
    found = DraftStatistics((10, 10, 4), (8, 4, 1))
    assert found.acceptance == (0.8, 0.4, 0.25) and found.tokens_per_step == pytest.approx(2.3)
    assert DraftStatistics((), ()).tokens_per_step == DraftStatistics((0,), (0,)).tokens_per_step == 1.0
    assert DraftStatistics((0,), (0,)).acceptance == (0.0,)
