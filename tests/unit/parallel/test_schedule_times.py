"""Schedules in time: bubbles beside the closed forms, activations within bounds, no deadlock whatever the delays."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.parallel.pipeline.schedule import Action, Schedule, Work, schedule
from abyssal.parallel.pipeline.schedule_check import Deadlock
from abyssal.parallel.pipeline.schedule_figures import activations, closed_form
from abyssal.parallel.pipeline.simulate import Timeline, Times, simulate
from tests.support.pipeline_schedules import schedules

DURATIONS = st.sampled_from([0.25, 0.5, 1.0, 1.75, 3.0])


def played(made: Schedule, times: Times) -> Iterator[tuple[float, float, int]]:
    """The same in another way: ranks that wake by a clock, and letters that arrive in any order.  Yields each action's
    start, end and rank as it ends; stops when nothing more can happen."""
    letters: list[set[tuple[str, int, int]]] = [set() for _ in range(made.num_ranks)]
    places, running = [0] * made.num_ranks, [False] * made.num_ranks
    events: list[tuple[float, int, int, float, tuple[str, int, int] | None]] = []
    count = 0

    def wake(rank: int, now: float) -> None:
        nonlocal count
        if running[rank] or places[rank] == len(made.actions[rank]):
            return
        action = made.actions[rank][places[rank]]
        if all((part, stage, w.micro_batch) in letters[rank] for w in action.works for part, stage in made.needs(w)):
            running[rank], count = True, count + 1
            heapq.heappush(events, (now + times.of(action, rank), count, rank, now, None))

    for rank in range(made.num_ranks):
        wake(rank, 0.0)
    while events:
        now, _, rank, start, letter = heapq.heappop(events)
        if letter is not None:
            letters[rank].add(letter)
        else:
            yield start, now, rank
            action, running[rank] = made.actions[rank][places[rank]], False
            places[rank] += 1
            for work in action.works:
                part = "I" if work.kind == "B" else work.kind
                letters[rank].add((part, work.stage, work.micro_batch))
                to = work.stage + {"F": 1, "I": -1}.get(part, made.num_stages)
                if 0 <= to < made.num_stages:
                    count += 1
                    reader = made.route(work.micro_batch)[to]
                    late = 0.0 if reader == rank else times.of_message(work, rank)
                    mail = (part, work.stage, work.micro_batch)
                    heapq.heappush(events, (now + late, count, reader, 0.0, mail))
        wake(rank, now)


def sure(made: Schedule, seed: int) -> Times:
    """Times drawn once for each work and message, some of them nothing and some very long."""

    def drawn(work: object, rank: int) -> float:
        return random.Random(f"{seed} {work} {rank}").choice([0.0, 0.1, 1.0, 2.5, 40.0])

    return Times(drawn, drawn, drawn, drawn, lambda work, rank: drawn(("letter", work), rank))


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 2**32))
def test_no_deadlock_under_any_delays(made: Schedule, seed: int) -> None:
    """And the simulator has every start and end of ranks that wake by a clock."""
    times = sure(made, seed)
    timeline = simulate(made, times)
    ended = sorted(played(made, times))
    spans = [(span.start, span.end, rank) for rank, spans in enumerate(timeline.spans) for span in spans]
    assert len(spans) == sum(map(len, made.actions))
    assert ended == sorted(spans)


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_bubbles_are_the_closed_forms(made: Schedule) -> None:
    """Of every rank, with F = I = W and F&B = F + B.  ZB1P with fewer micro-batches than ranks never gets to its
    rhythm."""
    bubbles = simulate(made).bubbles()
    expected = closed_form(made).bubble
    if made.name == "zb1p" and made.num_micro_batches < made.num_ranks:
        assert min(bubbles) > expected
    else:
        assert set(bubbles) == {expected}


@settings(max_examples=60, deadline=None)
@given(schedules(("gpipe", "1f1b", "zb1p")), DURATIONS, DURATIONS, DURATIONS)
def test_bubbles_of_one_chunk_a_rank_at_any_times(made: Schedule, forward: float, input: float, weight: float) -> None:
    if made.name == "zb1p" and (weight > min(forward, input) or made.num_micro_batches < made.num_ranks):
        return
    bubbles = simulate(made, Times(forward, input, weight)).bubbles()
    assert set(bubbles) == {closed_form(made, forward, input, weight).bubble}


@pytest.mark.parametrize(("name", "ranks"), [("dualpipe", 8), ("dualpipev", 4)])
def test_a_faster_pair_shortens_the_bubble_in_the_middle_as_the_form_has_it(name: str, ranks: int) -> None:
    """Ranks at the ends run fewer pairs alone, and wait less."""
    made = schedule(name, ranks, 20)
    bubbles = simulate(made, Times(pair=2.5)).bubbles()
    assert max(bubbles) == closed_form(made, pair=2.5).bubble == 4.5
    assert bubbles[0] == 3.5


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_activations_are_within_the_bound(made: Schedule) -> None:
    held = activations(made)
    bound = closed_form(made).activations
    assert max(held) <= bound
    if made.num_micro_batches >= made.num_ranks:
        assert max(held) == bound
    assert all(less <= full for less, full in zip(activations(made, 0.5), held, strict=True))


@settings(max_examples=30, deadline=None)
@given(schedules(), st.integers(0, 2**32))
def test_activations_are_what_a_timeline_holds(made: Schedule, seed: int) -> None:
    """Counted along a timeline: from the start of a forward to the end of the last part of its backward."""
    timeline = simulate(made, sure(made, seed))
    assert tuple(_held(timeline, rank) for rank in range(made.num_ranks)) == activations(made)


def _held(timeline: Timeline, rank: int) -> float:
    held = most = 0
    for span in timeline.spans[rank]:
        held += sum(work.kind == "F" for work in span.action.works)
        most = max(most, held)
        held -= sum(work.kind in "BW" for work in span.action.works)
    assert held == 0
    return most


def test_figures_of_the_papers_example() -> None:
    """Eight ranks and twenty micro-batches [V3 figure 5]."""
    rows = {}
    for name in ("1f1b", "zb1p", "dualpipe"):
        made = schedule(name, 8, 20)
        timeline = simulate(made)
        rows[name] = timeline.makespan, timeline.bubbles()[0], max(activations(made))
    assert rows == {"1f1b": (81, 21, 8), "zb1p": (67, 7, 8), "dualpipe": (66, 6, 9)}


def test_what_a_chunk_keeps_between_its_two_backwards_is_the_callers() -> None:
    made = schedule("zb1p", 4, 8)
    assert activations(made) == (4, 4, 4, 4)
    assert activations(made, kept_for_weights=0.5) == (4, 3.5, 3, 2.5)
    assert activations(made, kept_for_weights=0) == activations(schedule("1f1b", 4, 8)) == (4, 3, 2, 1)


def test_messages_travel_between_ranks_only_and_hold_nobody_up() -> None:
    made = schedule("1f1b", 2, 1)
    (forward, backward), (forward_1, backward_1) = simulate(made, Times(send=0.5)).spans
    assert (forward.end, forward_1.start, backward_1.start, backward_1.end, backward.start) == (1, 1.5, 2.5, 4.5, 5)
    assert simulate(schedule("dualpipev", 1, 4), Times(send=100)).bubbles() == (0,)


def test_times_may_depend_on_the_work_and_its_rank_and_starts_be_late() -> None:
    made = schedule("1f1b", 2, 2)

    def slow(work: Work, rank: int) -> float:
        return 5.0 if rank == 1 and work.micro_batch == 0 else 1.0

    def late(action: Action, rank: int) -> float:
        return 0.25 if rank == 1 else 0.0

    last = simulate(made, Times(forward=slow), late).spans[1]
    assert [(span.start, span.end) for span in last] == [(1.25, 6.25), (6.5, 8.5), (8.75, 9.75), (10, 12)]


def test_a_schedule_that_never_ends_is_not_simulated() -> None:
    made = schedule("gpipe", 2, 2)
    turned = Schedule(made.name, 2, 2, 2, made.chunks, (tuple(reversed(made.actions[0])), made.actions[1]))
    with pytest.raises(Deadlock, match="never ends"):
        simulate(turned)


def test_a_schedule_of_ones_own_has_no_closed_form() -> None:
    made = schedule("gpipe", 2, 2)
    with pytest.raises(ValueError, match="'mine'"):
        closed_form(Schedule("mine", 2, 2, 2, made.chunks, made.actions))
