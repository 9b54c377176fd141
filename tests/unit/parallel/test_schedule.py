"""Schedules: complete and in order whatever ranks and micro-batches they allow; as published; what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

import abyssal.parallel.pipeline
from abyssal.parallel.pipeline.schedule import Action, Schedule, Work, schedule
from abyssal.parallel.pipeline.schedule_check import Deadlock, check, execution_order
from tests.support.pipeline_schedules import schedules

PACKAGE = Path(abyssal.parallel.pipeline.__file__).parent


def written(made: Schedule, rank: int) -> str:
    """A rank's list as its authors write theirs: stage, kind, micro-batch; a pair in brackets."""
    return " ".join(
        text if len(action.works) == 1 else f"({text})"
        for action in made.actions[rank]
        for text in [";".join(f"{work.stage}{work.kind}{work.micro_batch}" for work in action.works)]
    )


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_stage_takes_every_micro_batch_forward_once_and_backward_once(made: Schedule) -> None:
    """Counted here apart from ``check``, which must agree."""
    check(made)
    seen: dict[tuple[int, int], list[str]] = {}
    ranks: dict[tuple[int, int], set[int]] = {}
    for rank, actions in enumerate(made.actions):
        for action in actions:
            for work in action.works:
                assert made.chunks[rank][work.chunk] == work.stage
                seen.setdefault((work.stage, work.micro_batch), []).append(work.kind)
                ranks.setdefault((work.stage, work.micro_batch), set()).add(rank)
    assert set(seen) == {(s, m) for s in range(made.num_stages) for m in range(made.num_micro_batches)}
    assert all(kinds in (["F", "B"], ["F", "I", "W"]) for kinds in seen.values())
    for micro_batch in range(made.num_micro_batches):
        assert [{rank} for rank in made.route(micro_batch)] == [ranks[s, micro_batch] for s in range(made.num_stages)]


@settings(max_examples=50, deadline=None)
@given(schedules())
def test_micro_batches_of_a_chunk_keep_their_order(made: Schedule) -> None:
    for rank, actions in enumerate(made.actions):
        for chunk in range(len(made.chunks[rank])):
            for kinds in ("F", "BI"):
                works = [work for action in actions for work in action.works]
                order = [work.micro_batch for work in works if work.chunk == chunk and work.kind in kinds]
                assert order == sorted(order)


def test_1f1b_and_zb1p_of_four_ranks() -> None:
    assert written(schedule("1f1b", 4, 5), 3) == "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4"
    assert written(schedule("1f1b", 4, 5), 1) == "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1B3 1B4"
    assert written(schedule("zb1p", 4, 5), 3) == "3F0 3I0 3F1 3I1 3F2 3I2 3F3 3I3 3W0 3F4 3I4 3W1 3W2 3W3 3W4"
    assert written(schedule("zb1p", 4, 5), 0) == "0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4"
    assert written(schedule("gpipe", 2, 2), 1) == "1F0 1F1 1B0 1B1"


def test_dualpipe_of_two_ranks() -> None:
    made = schedule("dualpipe", 2, 6)
    assert made.chunks == ((0, 1), (1, 0))
    assert written(made, 0) == "0F0 1F3 0F1 1B3 (1F4;0B0) (0F2;1B4) (1F5;0B1) 1B5 0I2 0W2"
    assert written(made, 1) == "0F3 1F0 0F4 1B0 (1F1;0B3) (0F5;1B1) (1F2;0B4) 1B2 0I5 0W5"
    assert (made.route(2), made.route(3)) == ((0, 1), (1, 0))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (8, 20), (16, 32), (16, 50)])
def test_dualpipe_has_the_published_counts(ranks: int, micro_batches: int) -> None:
    """Step by step, rank by rank, from the table of its authors' code."""
    made = schedule("dualpipe", ranks, micro_batches)
    for rank, actions in enumerate(made.actions):
        half, place = ranks // 2, min(rank, ranks - 1 - rank)
        inward, main = half - place - 1, micro_batches // 2 - ranks + place + 1
        near = 0 if rank < half else 1
        kinds = ["".join(f"{work.kind}{work.chunk ^ near}" for work in action.works) for action in actions]
        first = ["F0B1"] if inward else ["F0", "B1"]
        last = ["B1", "B0"] * (place + 1)
        last[place + 1 :] = [text.replace("B", "I") for text in last[place + 1 :]]
        expected = ["F0"] * 2 * inward + ["F0", "F1"] * (place + 1) + ["I1", "W1", "F1"] * inward
        expected += [*first, "F1B0"] + ["F0B1", "F1B0"] * (main - 1)
        expected += ["B1", "F1B0"] * inward + last
        assert kinds[: len(expected)] == expected
        rest = ["W" if text[0] == "W" else text for text in kinds[len(expected) :]]
        assert rest == ["W", "I0"] * inward + ["W"] * (place + 1)


def test_dualpipev_of_two_ranks() -> None:
    made = schedule("dualpipev", 2, 4)
    assert written(made, 0) == (
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1) (3F2;0B0) 3B2 (3F3;0B1) 3B3 0I2 0W2 0I3 0W3"  # torch 2.13's
    )
    assert made.route(0) == (0, 1, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 4), (3, 7), (4, 8), (5, 16), (8, 20)])
def test_dualpipev_is_torchs(ranks: int, micro_batches: int) -> None:
    """Torch wrote its own; the lists are the same to the last action."""
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    theirs = object.__new__(ScheduleDualPipeV)
    theirs.pp_group_size, theirs._n_microbatches = ranks, micro_batches
    made = schedule("dualpipev", ranks, micro_batches)
    for rank in range(ranks):
        order = theirs._calculate_single_rank_operations(rank)
        text = " ".join(str(action).replace("OVERLAP_F_B", "") for action in order if action is not None)
        assert written(made, rank) == text


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_dualpipe_is_dualpipev_on_either_half(ranks: int) -> None:
    """With half the micro-batches, seen from the near end; so what is torch's of one is of the other."""
    both, folded = schedule("dualpipe", ranks, 2 * ranks + 6), schedule("dualpipev", ranks // 2, ranks + 3)
    for rank in range(ranks):
        upper, each = rank >= ranks // 2, ranks + 3
        seen = tuple(
            Action(
                tuple(
                    replace(work, chunk=work.chunk ^ upper, micro_batch=work.micro_batch % each)
                    for work in action.works
                )
            )
            for action in both.actions[rank]
        )
        assert seen == folded.actions[min(rank, ranks - 1 - rank)]


@pytest.mark.parametrize(
    ("name", "ranks", "micro_batches", "problem"),
    [
        ("dualpipes", 4, 8, "choose one of gpipe, 1f1b, zb1p, dualpipe, dualpipev"),
        ("dualpipe", 3, 8, "3 ranks.*even number of ranks.*dualpipev"),
        ("dualpipe", 4, 6, "6 micro-batches on 4 ranks.*even number, 8 or more"),
        ("dualpipe", 4, 9, "9 micro-batches on 4 ranks.*even number"),
        ("dualpipev", 4, 7, "7 micro-batches on 4 ranks.*give 8 or more"),
        ("1f1b", 0, 8, "0 ranks; give 1 or more"),
        ("zb1p", 4, 0, "0 micro-batches; give 1 or more"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(name: str, ranks: int, micro_batches: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        schedule(name, ranks, micro_batches)


def _changed(made: Schedule, rank: int, actions: tuple[Action, ...]) -> Schedule:
    return replace(made, actions=(*made.actions[:rank], actions, *made.actions[rank + 1 :]))


def test_check_names_what_is_missing_twice_misplaced_or_out_of_order() -> None:
    made = schedule("1f1b", 2, 2)
    first = made.actions[1]  # F0 B0 F1 B1
    for actions, problem in [
        (first[:-1], "stage 1, micro-batch 1: F on rank 1; it needs"),
        ((*first, first[-1]), "stage 1, micro-batch 1: F on rank 1, B on rank 1, B on rank 1"),
        (first[2:], "stage 1, micro-batch 0: nothing"),
        ((first[1], first[0], *first[2:]), "stage 1, micro-batch 0: B on rank 1, F on rank 1"),
        ((Action((Work("F", 0, 0, 0),)), *first), "rank 1: F of stage 0 for micro-batch 0 on chunk 0.*stages \\(1,\\)"),
        ((Action((Work("F", 1, 1, 0),)), *first), "on chunk 1"),
        ((*first, Action((Work("F", 0, 1, 2),))), "micro-batch 2 of 2"),
        ((Action(()), *first), "no work"),
        ((Action((*first[1].works, *first[2].works)),), r"\['B', 'F'\]"),
    ]:
        with pytest.raises(ValueError, match=problem):
            check(_changed(made, 1, actions))
    with pytest.raises(ValueError, match="actions of 1 ranks"):
        check(replace(made, actions=made.actions[:1]))
    with pytest.raises(ValueError, match="no forward of stage 1 for micro-batch 0 of 2"):
        _changed(made, 1, first[2:]).route(0)


def test_a_circle_between_ranks_is_found_and_named() -> None:
    """Rank 0 wants a gradient before it hands on what rank 1 makes it from."""
    made = schedule("1f1b", 2, 2)
    works = {(w.kind, w.micro_batch): Action((w,)) for action in made.actions[0] for w in action.works}
    order = (works["F", 0], works["B", 0], works["F", 1], works["B", 1])
    last = {(w.kind, w.micro_batch): Action((w,)) for action in made.actions[1] for w in action.works}
    crossed = replace(made, actions=(order, (last["F", 0], last["F", 1], last["B", 0], last["B", 1])))
    with pytest.raises(Deadlock) as caught:
        check(crossed)
    message = str(caught.value)
    assert "rank 0 waits at action 1 (B of stage 0 for micro-batch 0) for the input's gradient of stage 1" in message
    assert "rank 1 waits at action 1 (F of stage 1 for micro-batch 1) for the forward of stage 0" in message


def test_what_no_rank_runs_and_what_the_rank_runs_later_is_said() -> None:
    made = schedule("1f1b", 2, 1)
    forward, backward = made.actions[1]
    with pytest.raises(
        Deadlock, match=r"rank 0 waits at action 1 .* of stage 1 for micro-batch 0, which no rank runs$"
    ):
        execution_order(_changed(made, 1, (forward,)))
    with pytest.raises(Deadlock, match=r"rank 1 waits at action 0 .*, which the rank itself runs later$"):
        execution_order(_changed(made, 1, (backward, forward)))


def test_schedules_load_without_torch() -> None:
    starts = ("schedule", "simulate", "draw", "trace")
    names = [file.stem for file in PACKAGE.glob("*.py") if file.stem.startswith(starts)]
    modules = ", ".join(f"abyssal.parallel.pipeline.{name}" for name in names)
    heavy = "{'torch', 'matplotlib', 'numpy', 'rich'}"
    program = f"import sys, {modules}, abyssal.cli.schedule; sys.exit(bool({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parents[2])}
    assert subprocess.run([sys.executable, "-c", program], check=False, env=environment).returncode == 0
