"""Whether drafting pays: measured while serving, decided anew as load and text change.

Verifying k drafts makes a step longer and an accepted draft makes it worth more; which wins depends on the machine, the
number of sequences (a full batch has no idle arithmetic to verify with) and the text.  None of it is predicted.  For
each band of sequence counts (1, 2-3, 4-7, ...) the time of a token is measured in steps that only write, with drafts
and without.  The better way runs; now and then the other is probed for a few steps: soon at first and after a change,
ever more rarely while the answer stays the same, and at once when the present way falls behind what the other was last
seen to do.  A way must be better by :data:`HYSTERESIS` to take over.

The trade-off not taken: a model of acceptance and step time that would tell without probing, which has to be right
about every machine.  A probe costs the difference of the two ways over 24 steps in a few thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from abyssal.engine.messages import Sampled, StepPlan

PROBE_STEPS = 24
"""Measured steps of a probe: about 40 tokens of one sequence, thousands of a batch."""
FIRST_INTERVAL = 256
"""Measured steps between probes after a change."""
LONGEST_INTERVAL = 4096
HYSTERESIS = 0.03
WINDOW = 64
"""Steps that a mean looks back over."""


@dataclass(frozen=True)
class DraftStatistics:
    """What became of drafts, by position: the first draft of a step, the second, and so on."""

    drafted: tuple[int, ...]
    """How often a draft at this position was verified."""
    accepted: tuple[int, ...]
    """How often it was accepted, and with it all before it."""

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share accepted at each position; 0 where none was verified."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a sequence got in a step that verified drafts, on average; 1 without any."""
        return 1.0 + sum(self.accepted) / self.drafted[0] if self.drafted and self.drafted[0] else 1.0


@dataclass
class _Pace:
    """Seconds a token: a mean whose past fades."""

    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self.fade(1.0 - 1.0 / WINDOW)
        self.seconds += seconds
        self.tokens += tokens

    def fade(self, share: float) -> None:
        self.seconds *= share
        self.tokens *= share

    @property
    def of_token(self) -> float | None:
        """None before anything was measured."""
        return self.seconds / self.tokens if self.tokens else None


@dataclass
class _Band:
    """One band of sequence counts."""

    drafting: bool = True
    """The better way, as far as known."""
    probing: bool = False
    """The other way is being looked at."""
    left: int = PROBE_STEPS
    """Measured steps to the next turn."""
    interval: int = FIRST_INTERVAL
    since: int = 0
    """Measured steps since the last probe."""
    paces: dict[bool, _Pace] = field(default_factory=lambda: {True: _Pace(), False: _Pace()})

    @property
    def drafts_now(self) -> bool:
        return self.drafting != self.probing

    def add(self, seconds: float, tokens: int) -> None:
        """A step of the present way."""
        self.paces[self.drafts_now].add(seconds, tokens)
        self.left -= 1
        self.since += 1
        if not self.probing and self.since >= FIRST_INTERVAL and self._falls_behind():
            self.left = 0
        if self.left <= 0:
            self._turn()

    def _falls_behind(self) -> bool:
        """Whether the other way, as it was last seen, would be better than the present one."""
        present, other = self.paces[self.drafting].of_token, self.paces[not self.drafting].of_token
        return present is not None and other is not None and other * (1.0 + HYSTERESIS) < present

    def _turn(self) -> None:
        if not self.probing:
            self.probing, self.left = True, PROBE_STEPS
            self.paces[self.drafts_now].fade(0.25)  # of older probes a little is kept, against chance
            return
        self.probing = False
        if self._falls_behind():
            self.drafting, self.interval = not self.drafting, FIRST_INTERVAL
        else:
            self.interval = min(2 * self.interval, LONGEST_INTERVAL)
        self.left, self.since = self.interval, 0


class DraftGain:
    """Turns drafting on and off.

    Args:
        most: drafts of a sequence and step while it is on.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._bands: dict[int, _Band] = {}
        self._begun = 0.0

    def begin(self, num_sequences: int) -> int:
        """A step of so many writing sequences begins: the most drafts that its plan may verify and ask for."""
        self._begun = self._clock()
        return self._most if self._band(num_sequences).drafts_now else 0

    def end(self, plan: StepPlan, results: Mapping[int, Sampled]) -> None:
        """It has ended.  Steps that read prompts are not measured, nor the first after drafting is turned on, which has
        no drafts to verify yet."""
        band = self._band(len(plan.chunks))
        writes = all(len(c.tokens) == 1 and c.samples and c.path == "decode" for c in plan.chunks)
        verifies = any(chunk.num_drafts for chunk in plan.chunks)
        if not plan.chunks or not writes or verifies != bool(plan.wanted_drafts) or verifies != band.drafts_now:
            return
        band.add(self._clock() - self._begun, sum(len(sampled.tokens) for sampled in results.values()))

    def gains(self) -> dict[int, float]:
        """By the least number of sequences of a band: how many times as fast a token comes with drafts as without,
        where both were measured."""
        found: dict[int, float] = {}
        for bits, band in sorted(self._bands.items()):
            drafted, plain = band.paces[True].of_token, band.paces[False].of_token
            if drafted and plain:
                found[1 << max(0, bits - 1)] = plain / drafted
        return found

    def _band(self, num_sequences: int) -> _Band:
        return self._bands.setdefault(num_sequences.bit_length(), _Band())
