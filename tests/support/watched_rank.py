"""A rank that adds numbers over all ranks at each step, and misbehaves as it is told.

python -m tests.support.watched_rank TIMEOUT STEPS [RANK MISCHIEF STEP]...
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from torch import distributed

from abyssal.parallel.launch import Launch
from abyssal.parallel.launch_meeting import OwnProblem
from abyssal.parallel.launch_ranks import JoinedRanks, open_ranks
from abyssal.spec.mesh import MeshSpec


def stand_here() -> None:
    time.sleep(600)


def misbehave(mischief: str, ranks: JoinedRanks) -> None:
    if mischief == "raise":
        raise KeyError("the missing expert")
    if mischief == "problem":
        raise ValueError("the text ends too soon")
    if mischief == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mischief == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mischief == "hang":
        stand_here()
    if mischief == "skip":  # its next collective is another than the others'
        distributed.barrier(ranks.mesh.control)
    if mischief == "patience":
        with ranks.watch.patient("resting"):
            time.sleep(4)


def run(arguments: list[str]) -> int:
    """Exit status of a rank that was told so."""
    timeout, steps, *words = arguments
    told = [(int(rank), what, int(step)) for rank, what, step in zip(*[iter(words)] * 3, strict=True)]
    launch = Launch.from_environment()
    assert launch is not None
    facts: dict[str, Any] = {"option": {"seed": os.environ.get("SEED", "0"), "deep": {"same": 1}}}
    spec, arrival = MeshSpec(dp=launch.world_size), float(os.environ.get("ARRIVAL", "60"))
    try:
        with open_ranks(launch, spec, facts, float(timeout), name="the run", arrival=arrival) as ranks:
            work(ranks, int(steps), told)
    except OwnProblem as problem:
        print(f"the run: {problem}", file=sys.stderr)
        return 2
    except ValueError as problem:
        if launch.is_first:
            print(f"the run: {problem}", file=sys.stderr)
        return 2
    return 0


def work(ranks: JoinedRanks, steps: int, mischiefs: list[tuple[int, str, int]]) -> None:
    ranks.watch.mark("adding")
    for step in range(steps):
        begin = time.perf_counter()
        for rank, mischief, at in mischiefs:
            if rank == ranks.launch.rank and mischief == "slow":
                time.sleep(0.1)
            elif rank == ranks.launch.rank and at == step:
                misbehave(mischief, ranks)
        own = time.perf_counter() - begin
        value = torch.ones(4)
        distributed.all_reduce(value)
        assert value[0] == ranks.launch.world_size
        ranks.watch.step_done(step + 1, own)
        for slow, peer in ranks.watch.slow_ranks():
            print(f"slow: {peer.rank} {slow.times:.0f}", flush=True)
        time.sleep(0.01)
