"""Verbs that may run on many ranks: one process each, started by torchrun, of which rank 0 alone speaks to the user.

The ranks join before anything is read.  Bad input is told once, as one line, whichever rank finds it; every rank then
ends with the exit status of bad input.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from abyssal.parallel.launch import TORCHRUN, Launch

if TYPE_CHECKING:
    from abyssal.parallel.launch_ranks import JoinedRanks
    from abyssal.train.config import TrainConfig

EXIT_BAD_INPUT = 2


class RunOptions(Protocol):
    """What the options of such a verb have in common."""

    @property
    def out(self) -> Path: ...

    @property
    def train(self) -> TrainConfig: ...


Options = TypeVar("Options", bound=RunOptions)


def on_ranks(
    verb: str,
    argv: list[str],
    parse: Callable[[list[str]], Options],
    work: Callable[[Options, JoinedRanks | None], int],
) -> int:
    """Parse ``argv`` and do ``work``: in this process alone, or as one of the ranks that a launcher started.

    Started again by the same launcher after a failure, the ranks go on with the run that they began, as if ``--resume``
    had been given.

    Raises:
        ValueError, OSError: bad input, on rank 0 or in a single process.
    """
    launch = Launch.from_environment()
    if launch is None:
        options = parse(argv)
        _check_alone(options, verb)
        return work(options, None)
    try:
        options = parse(argv)
        mesh_spec = options.train.parallel.mesh_spec(launch.world_size, launch.local_world_size)
    except (ValueError, OSError) as problem:
        return _cannot_begin(launch, problem)
    return _joined(verb, argv, parse, work, options, launch, mesh_spec)


def _check_alone(options: RunOptions, verb: str) -> None:
    mesh = options.train.parallel.mesh
    if mesh is None:
        return
    from abyssal.spec.mesh import MeshSpec

    spec = MeshSpec.parse(mesh)
    if spec.world_size > 1:
        raise ValueError(
            f"--mesh {mesh} is of {spec.world_size} ranks, and this process was started alone; start them with "
            f"{TORCHRUN.format(ranks=spec.world_size, verb=verb)}, or give --mesh dp=1 for this process alone"
        )


def _cannot_begin(launch: Launch, problem: ValueError | OSError) -> int:
    """Rank 0 tells the user; another rank tells rank 0, which may not have found the same problem."""
    if launch.is_first:
        raise problem
    from abyssal.parallel.launch_ranks import report_problem

    if not report_problem(launch, problem):
        raise problem
    return EXIT_BAD_INPUT


def _joined(
    verb: str,
    argv: list[str],
    parse: Callable[[list[str]], Options],
    work: Callable[[Options, JoinedRanks | None], int],
    options: Options,
    launch: Launch,
    mesh_spec: Any,
) -> int:
    import abyssal
    from abyssal.cli.run_options import as_json
    from abyssal.parallel.launch_meeting import OwnProblem
    from abyssal.parallel.launch_ranks import open_ranks
    from abyssal.parallel.startup import program_facts

    parallel, name = options.train.parallel, f"abyssal {verb}"
    facts = {**program_facts(abyssal.__version__, parallel.device), "option": as_json(options)}
    try:
        with open_ranks(launch, mesh_spec, facts, parallel.rank_timeout, parallel.device, name) as ranks:
            out = os.path.abspath(options.out)
            if ranks.first_alone("starting", lambda: ranks.began_before(out)):
                options = parse([*argv, "--resume"])
            return work(options, ranks)
    except OwnProblem:
        raise
    except (ValueError, OSError):
        if launch.is_first:
            raise
        return EXIT_BAD_INPUT


def take_folder(out: Path, resume: bool, check_free: Callable[[], None], ranks: JoinedRanks | None) -> None:
    """Refuse a run's folder that holds something, unless it is to be resumed; make it, and see that ranks share it.

    Raises:
        ValueError: as ``check_free``; a folder that ranks do not share.
    """
    if ranks is None:
        if not resume:
            check_free()
        return
    from abyssal.parallel.startup import check_shared_folder

    if not resume:
        ranks.first_alone("starting", check_free)
    check_shared_folder(ranks.meeting, out)
    ranks.began(os.path.abspath(out))
