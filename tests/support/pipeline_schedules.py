"""Any schedule that there is, with any ranks and micro-batches that it takes, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from abyssal.parallel.pipeline.schedule import SCHEDULES, Schedule, schedule


@st.composite
def schedules(draw: st.DrawFn, names: tuple[str, ...] = tuple(SCHEDULES)) -> Schedule:
    """Up to 16 ranks (DualPipeV: 8, which is 16 stages) and a few micro-batches more than the fewest."""
    name = draw(st.sampled_from(names))
    more = draw(st.integers(0, 12))
    if name == "dualpipe":
        ranks = 2 * draw(st.integers(1, 8))
        return schedule(name, ranks, 2 * ranks + 2 * more)
    if name == "dualpipev":
        ranks = draw(st.integers(1, 8))
        return schedule(name, ranks, 2 * ranks + more)
    return schedule(name, draw(st.integers(1, 16)), draw(st.integers(1, 20)) + more)
