"""The scheduler over a runner that hashes what it computes: whatever happens, each request gets its own tokens."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.cache.pages import PAGE
from abyssal.engine.limits import SchedulerConfig
from abyssal.engine.messages import Progress, Request, Sampled, SamplingParams, StepPlan
from tests.support.simulated_engine import VOCABULARY, DiskOfHashes, SimulatedEngine

FUZZ = settings(max_examples=8, deadline=None, database=None, derandomize=True)
LONG_FUZZ = settings(max_examples=300, deadline=None)


def config(**options: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"max_positions": 4096, "token_budget": 48, "max_sequences": 6, **options})


def request(number: int, length: int, max_tokens: int = 8, text: int = 0, n: int = 1, **options: Any) -> Request:
    """``length`` tokens that requests of the same ``text`` have in common."""
    prompt = tuple((text * 7 + position * position) % (VOCABULARY - 1) + 1 for position in range(length))
    params = SamplingParams(seed=number, max_tokens=max_tokens, n=n, ignore_eos=True)
    return Request(number, prompt, params, **options)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request), some of them sharing their beginnings."""
    drawn = []
    for number in range(draw(st.integers(1, 7))):
        made = request(
            number,
            length=draw(st.integers(1, 170)),
            max_tokens=draw(st.integers(1, 90)),
            text=draw(st.integers(0, 1)),
            n=draw(st.sampled_from([1, 1, 1, 3])),
            user=draw(st.sampled_from(["a", "b"])),
            priority=draw(st.sampled_from([0, 0, 1])),
        )
        drawn.append((draw(st.integers(0, 60)), made))
    return sorted(drawn, key=lambda pair: pair[0])


def run_arrivals(engine: SimulatedEngine, arrivals: list[tuple[int, Request]]) -> None:
    for step, arriving in arrivals:
        while engine.steps < step:
            engine.step()
        engine.add(arriving)
    engine.run()


def _run_disturbed_and_alone(
    arrivals: list[tuple[int, Request]],
    num_pages: int,
    budget: int,
    deterministic: bool,
    preemption: Any,
    num_drafts: int,
    prefix: bool,
    disk: bool,
    most_drafts: list[int | None],
) -> None:
    """The simulated engine checks the invariants at every step: pages, paths, budget, order of positions."""
    limits = config(
        token_budget=budget,
        deterministic=deterministic,
        preemption=preemption,
        num_drafts=num_drafts,
        draft_layers=num_drafts > 0,
        save_every=PAGE,
    )
    engine = SimulatedEngine(limits, num_pages, prefix, DiskOfHashes() if disk else None)
    turns = itertools.cycle(most_drafts)
    engine.most_drafts = lambda: next(turns)
    run_arrivals(engine, arrivals)
    alone = SimulatedEngine(config(token_budget=200, deterministic=deterministic), 100, prefix=False)
    for _, each in arrivals:
        alone.add(each)
        alone.run()
    assert engine.outputs == alone.outputs
    assert {end.finish_reason for end in engine.ends.values()} == {"length"}
    assert all(len(engine.outputs[each.request_id, 0]) == each.params.max_tokens for _, each in arrivals)
    engine.pool.check([])


disturbances = given(
    arrivals=requests(),
    num_pages=st.integers(5, 9),
    budget=st.integers(6, 70),
    deterministic=st.booleans(),
    preemption=st.sampled_from(["recompute", "offload"]),
    num_drafts=st.integers(0, 3),
    prefix=st.booleans(),
    disk=st.booleans(),
    most_drafts=st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=6),
)


@FUZZ
@disturbances
def test_a_request_gets_the_same_tokens_whatever_else_runs(**drawn: Any) -> None:
    _run_disturbed_and_alone(**drawn)


@pytest.mark.slow
@LONG_FUZZ
@disturbances
def test_a_request_gets_the_same_tokens_at_length(**drawn: Any) -> None:
    _run_disturbed_and_alone(**drawn)


@FUZZ
@given(
    arrivals=requests(),
    num_pages=st.integers(4, 8),
    cancels=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 7)), max_size=4),
    deadlines=st.lists(st.integers(0, 120), max_size=4),
    in_flight=st.booleans(),
    slow=st.booleans(),
)
def test_every_request_ends_for_a_stated_reason(
    arrivals: list[tuple[int, Request]],
    num_pages: int,
    cancels: list[tuple[int, int]],
    deadlines: list[int],
    in_flight: bool,
    slow: bool,
) -> None:
    limits = config(preemption="offload" if slow else "recompute", end_token_ids=(5,))
    disk = DiskOfHashes()
    engine = SimulatedEngine(limits, num_pages, disk=disk, slow_imports=slow)
    todo: list[tuple[int, Request | int]] = [
        (step, Request(r.request_id, r.prompt_ids, r.params, r.user, deadline=float(deadlines[0])))
        if deadlines and not r.request_id % 2
        else (step, Request(r.request_id, r.prompt_ids, SamplingParams(seed=r.request_id, max_tokens=40), r.user))
        for step, r in arrivals
    ]
    for step, what in sorted([*todo, *cancels], key=lambda pair: pair[0]):
        while engine.steps < step:
            _step_or_cancel(engine, None)
        if isinstance(what, Request):
            engine.add(what)
        elif in_flight:
            _step_or_cancel(engine, what)
        else:
            engine.scheduler.cancel(what)
    while engine.scheduler.unfinished:
        assert engine.steps < 3000
        _step_or_cancel(engine, None)
    for progress in engine.scheduler.take_progress():
        engine._take(progress)
    assert engine.ends.keys() == engine.outputs.keys()
    cancelled = {number for _, number in cancels}
    for (number, _), end in engine.ends.items():
        assert end.finish_reason in ("stop", "length", "cancelled", "deadline")
        assert end.finish_reason != "cancelled" or number in cancelled
        assert end.finish_reason != "deadline" or (deadlines and engine.now >= deadlines[0])
    engine.check()
    engine.pool.check([])


def _step_or_cancel(engine: SimulatedEngine, number: int | None) -> None:
    """A step, in the middle of which a request is cancelled; imports arrive every third step, at times in part."""
    engine.now = float(engine.steps)
    update = engine.scheduler.update

    def cancelling(plan: StepPlan, results: Any) -> list[Progress]:
        if number is not None:
            engine.scheduler.cancel(number)
        return update(plan, results)

    engine.scheduler.update = cancelling  # type: ignore[method-assign]
    engine.step()
    engine.scheduler.update = update  # type: ignore[method-assign]
    if engine.steps % 3 == 0:
        engine.deliver(None if engine.steps % 2 else 70)


def test_plans_are_a_function_of_the_calls() -> None:
    def plans() -> list[StepPlan]:
        engine = SimulatedEngine(config(num_drafts=2), 7)
        for number in range(6):
            engine.add(request(number, 40 * number + 3, 30, text=number % 2, user=str(number % 3)))
        found = []
        while engine.scheduler.unfinished:
            found.append(engine.step())
        return found

    assert plans() == plans()


def test_prompts_are_read_in_chunks_beside_decoding() -> None:
    engine = SimulatedEngine(config(token_budget=32), 40)
    engine.add(request(0, 10, max_tokens=30))
    engine.step()
    engine.add(request(1, 200, text=1))
    shares = [[(chunk.sequence, chunk.num_tokens, chunk.path) for chunk in engine.step().chunks] for _ in range(3)]
    assert shares == [[(0, 1, "decode"), (1, 31, "prompt")]] * 3


def test_forks_share_the_prompt_and_copy_what_they_write() -> None:
    engine = SimulatedEngine(config(), 40)
    engine.add(request(0, 100, max_tokens=5, n=4))
    plan = StepPlan()
    while not engine.outputs[0, 3]:
        plan = engine.step()
    assert plan.chunks[-1].forks == (1, 2, 3)
    assert engine.pool.num_pages - engine.pool.free == 2, "one prompt's pages"
    assert len(engine.step().copies) == 3, "the last to write keeps the original"
    assert engine.num_computed == 100 + 4
    engine.run()
    assert len({tuple(tokens) for tokens in engine.outputs.values()}) == 4


def test_a_hit_is_not_computed_and_is_counted() -> None:
    engine = SimulatedEngine(config(token_budget=300), 40)
    engine.add(request(0, 200))
    engine.run()
    engine.add(request(1, 200, 3))
    engine.add(request(2, 200, 3, namespace="another"))
    plan = engine.step()
    assert [(chunk.sequence, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [(1, 192, 8), (2, 0, 200)]
    engine.run()
    assert [engine.ends[number, 0].cached_tokens for number in range(3)] == [0, 192, 0]


def test_who_asks_about_the_prompt_has_it_computed_whole() -> None:
    engine = SimulatedEngine(config(), 40)
    engine.add(request(0, 100))
    engine.run()
    prompt = request(0, 100).prompt_ids
    engine.add(Request(1, prompt, SamplingParams(prompt_logprobs=0, max_tokens=3)))
    chunks = [chunk for _ in range(5) for chunk in engine.step().chunks]
    assert [(chunk.start, chunk.scores) for chunk in chunks] == [
        (0, True),
        (48, True),
        (96, True),
        (100, False),
        (101, False),
    ]


def test_pages_of_output_are_shared_but_not_in_deterministic_mode() -> None:
    for deterministic, hit in ((False, 192), (True, 128)):
        engine = SimulatedEngine(config(token_budget=300, deterministic=deterministic), 40)
        first = request(0, 130, 80)
        engine.add(first)
        engine.run()
        second = (*first.prompt_ids, *engine.outputs[0, 0], 3)
        engine.add(Request(1, second, SamplingParams(max_tokens=2)))
        engine.run()
        assert engine.ends[1, 0].cached_tokens == hit


def test_with_draft_layers_the_last_token_of_a_hit_is_computed_again_in_a_copy() -> None:
    engine = SimulatedEngine(config(token_budget=300, num_drafts=1, draft_layers=True), 40)
    engine.add(request(0, 200))
    engine.run()
    engine.add(request(1, 200))
    plan = engine.step()
    assert plan.chunks[0].start == 191 and len(plan.copies) == 1
    assert plan.copies[0][1] == plan.chunks[0].pages[2]


def test_the_disk_serves_what_memory_has_not() -> None:
    disk = DiskOfHashes()
    expected: Any = None
    for slow, arriving in ((False, None), (True, None), (True, 64), (True, 0)):
        engine = SimulatedEngine(config(token_budget=300), 40, disk=disk, slow_imports=slow)
        engine.add(request(0, 200, 4))
        plan = engine.step()
        if expected is None:  # the first of all
            engine.run()
            assert engine.ends[0, 0].cached_tokens == 0 and len(disk.pages) == 3
            expected = engine.outputs
            continue
        assert not plan.chunks and plan.imports[0].num_tokens == 192
        assert not engine.step().chunks, "it waits"
        engine.deliver(arriving)
        engine.run()
        assert engine.ends[0, 0].cached_tokens == (192 if arriving is None else arriving)
        assert engine.num_computed == 203 - engine.ends[0, 0].cached_tokens
        assert engine.outputs == expected


def test_prefill_and_decode_units() -> None:
    whole = SimulatedEngine(config(deterministic=True), 20)
    whole.add(request(0, 150, 20))
    whole.run()
    prefill, decode = (SimulatedEngine(config(deterministic=True), 20) for _ in range(2))
    first = request(0, 150, 20, prefill_only=True)
    prefill.add(first)
    prefill.run()
    end = prefill.ends[0, 0]
    assert end.finish_reason == "prefilled" and prefill.outputs[0, 0] == whole.outputs[0, 0][:1]
    transfer = prefill.scheduler.export(end.sequence)
    assert (transfer.num_tokens, len(transfer.pages)) == (150, 3)
    decode.remote[0] = prefill._read(transfer.pages, 150)
    prefill.scheduler.release(end.sequence)
    prefill.pool.check([])
    output = tuple(prefill.outputs[0, 0])
    decode.add(Request(0, first.prompt_ids, first.params, output_ids=output, imported_tokens=150))
    decode.run()
    assert decode.outputs == whole.outputs and decode.num_computed == 19


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    engine = SimulatedEngine(config(max_sequences=2), 6, prefix=False)
    engine.add(request(0, 60, 90))
    engine.add(request(1, 60, 90))
    for _ in range(10):
        engine.step()
    engine.add(request(2, 300, 4, priority=1))
    engine.run()
    assert engine.steps_to_end[2] < 25 < min(engine.steps_to_end[0], engine.steps_to_end[1])
    assert engine.scheduler.num_preemptions >= 2


def test_who_has_been_served_least_goes_first() -> None:
    """A user's single request does not wait for another user's hundred."""
    engine = SimulatedEngine(config(max_sequences=2), 20, prefix=False)
    for number in range(100):
        engine.add(request(number, 40, 5, user="busy"))
    for _ in range(30):
        engine.step()
    engine.add(request(100, 40, 5, user="rare"))
    engine.run()
    assert engine.steps_to_end[100] < 45


def test_an_endless_row_of_new_users_passes_nobody_for_ever() -> None:
    engine = SimulatedEngine(config(max_sequences=1, token_budget=16), 20, prefix=False)
    engine.add(request(0, 200, 20, user="patient"))
    engine.run()
    start = engine.steps
    engine.add(request(1, 10, 20, user="new"))
    engine.add(request(2, 30, 5, user="patient"))
    for number in range(3, 100):
        engine.add(request(number, 30, 5, user=f"new {number}"))
        for _ in range(5):
            engine.step()
    assert engine.steps_to_end[2] - start < 120, "it waited for a bounded time while more work came than fits"
    assert engine.scheduler.num_waiting > 0


def test_nobody_passes_a_waiting_request_that_does_not_fit_yet() -> None:
    """Small requests would otherwise keep the pages that a large one needs."""
    engine = SimulatedEngine(config(token_budget=100), 6, prefix=False)
    engine.add(request(0, 100, 20))
    engine.step()
    engine.add(request(1, 300, 4))
    for number in range(2, 40):
        engine.add(request(number, 20, 10))
        engine.step()
    assert engine.steps_to_end[1] < 40


def test_deadlines_and_cancelling_end_what_waits_and_what_runs() -> None:
    engine = SimulatedEngine(config(max_sequences=1), 10)
    for number, deadline in enumerate((5.0, 3.0, None)):
        engine.add(request(number, 20, 50, deadline=deadline))
    for step in range(8):
        engine.now = float(step)
        engine.step()
    ends = {number: end.finish_reason for (number, _), end in engine.ends.items()}
    assert ends == {0: "deadline", 1: "deadline"}
    assert len(engine.outputs[0, 0]) == 5 and not engine.outputs[1, 0], "what was sampled stands"
    assert engine.scheduler.cancel(2) and not engine.scheduler.cancel(2)
    assert [end.finish_reason for end in engine.scheduler.take_progress()] == ["cancelled"]
    assert not engine.scheduler.unfinished


def test_tokens_after_an_end_are_dropped() -> None:
    engine = SimulatedEngine(config(end_token_ids=(9,), num_drafts=3), 10)
    engine.add(Request(0, (1, 2, 3), SamplingParams(max_tokens=20, min_tokens=2)))
    engine.add(Request(1, (1, 2, 3), SamplingParams(max_tokens=2)))
    plan = engine.scheduler.plan()
    engine.scheduler.update(plan, {number: Sampled((7,), num_drafts=3) for number in range(2)})
    plan = engine.scheduler.plan()
    assert [chunk.num_drafts for chunk in plan.chunks] == [3, 0], "no drafts past max_tokens"
    progress = engine.scheduler.update(plan, {0: Sampled((9, 9, 5)), 1: Sampled((7,), stopped=True)})
    assert [(each.new_tokens, each.finish_reason) for each in progress] == [((9, 9), "stop"), ((7,), "stop")]
    engine.scheduler.add(Request(2, (1,), SamplingParams()))
    progress = engine.scheduler.update(engine.scheduler.plan(), {2: Sampled((), error="nothing fits the schema")})
    assert (progress[0].finish_reason, progress[0].detail) == ("error", "nothing fits the schema")
    engine.pool.check([])


def test_a_plan_verifies_no_more_drafts_than_it_may() -> None:
    """The simulated engine compares; here the sequence holds three drafts each time."""
    engine = SimulatedEngine(config(num_drafts=3), 10)
    engine.add(request(0, 5, max_tokens=60))
    verified: list[int] = []
    for most in (3, 3, 0, 3, 1, None, 3, 2):
        engine.most_drafts = lambda most=most: most
        verified += [chunk.num_drafts for chunk in engine.step().chunks]
    assert verified == [0, 3, 0, 0, 1, 1, 3, 2]


def test_a_step_that_failed_ends_its_requests_alone() -> None:
    engine = SimulatedEngine(config(max_sequences=3), 20)
    for number, n in enumerate((1, 2, 1)):
        engine.add(request(number, 30, n=n))
    plan = engine.scheduler.plan()
    for number in range(2):
        engine.scheduler.cancel(number, "error", "the device is gone")
    ends = engine.scheduler.update(plan, {})
    assert sorted((end.request_id, end.index, end.finish_reason) for end in ends) == [
        (0, 0, "error"),
        (1, 0, "error"),
        (1, 1, "error"),
    ]
    engine.run()
    assert engine.ends[2, 0].finish_reason == "length"


def test_new_weights_void_every_page() -> None:
    engine = SimulatedEngine(config(), 20)
    engine.add(request(0, 100, 30))
    engine.add(request(1, 100, 30, text=1))
    for _ in range(12):
        engine.step()
    engine.scheduler.drop_pages()
    engine.check()
    assert engine.pool.free == 20
    engine._seen.clear()
    engine.run()
    assert {len(tokens) for tokens in engine.outputs.values()} == {30}
    assert engine.ends[0, 0].cached_tokens == 0


@FUZZ
@given(arrivals=requests(), num_pages=st.integers(5, 30), until=st.integers(0, 60))
def test_skipping_is_the_same_as_stepping(arrivals: list[tuple[int, Request]], num_pages: int, until: int) -> None:
    """A simulator that skips uneventful steps sees the plans of one that does not, but for the numbers of pages."""

    def drive(skipping: bool) -> tuple[int, list[Any]]:
        engine = SimulatedEngine(config(token_budget=300, max_sequences=3), num_pages, prefix=False)
        for _, each in arrivals:
            engine.add(each)
        plans: list[Any] = []
        step = 0
        while (event := engine.scheduler.next_event()) is not None:
            assert event.time is None
            if skipping and event.steps:
                engine.scheduler.skip(event.steps, token=0)
                step += event.steps
                continue
            plan = engine.scheduler.plan()
            results = {c.sequence: Sampled((0,)) for c in plan.chunks if c.samples}
            results |= {fork: Sampled((0,)) for c in plan.chunks for fork in c.forks}
            engine.scheduler.update(plan, results)
            engine.check()
            rows = [(c.sequence, c.start, c.num_tokens, c.path, c.samples) for c in plan.chunks]
            plans.append((step, rows))
            step += 1
        return step, plans

    steps, plans = drive(False)
    skipped_steps, skipped_plans = drive(True)
    assert skipped_steps == steps
    assert all(plan in plans for plan in skipped_plans)


def test_most_steps_of_decoding_are_skipped() -> None:
    engine = SimulatedEngine(config(token_budget=300), 30)
    for number in range(3):
        engine.add(request(number, 20, 400, deadline=1000.0))
    engine.step()
    event = engine.scheduler.next_event()
    assert event is not None and (event.steps, event.time) == (398, 1000.0)


def test_an_empty_plan_is_a_plan() -> None:
    engine = SimulatedEngine(config(), 4)
    plan = engine.step()
    assert plan == StepPlan() and plan.split() == (StepPlan(), StepPlan()) and plan.num_tokens == 0
    assert engine.scheduler.next_event() is None


def test_the_scheduler_loads_without_torch() -> None:
    code = "import sys, abyssal.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
