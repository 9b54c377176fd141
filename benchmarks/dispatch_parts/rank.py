"""A rank of ``benchmarks/dispatch.py``: dispatches and combines its tokens in the way that it is asked for.

A request names the way; the answer has the seconds of each phase, which begin on all ranks together, and the bytes that
the dispatcher counted.  There are no experts: what dispatch brings goes back as it is, so that what returns is known,
each token K times over; the first time in each way it is compared.

Quantising and unpacking are not timed; they are the same in every way.  Processor time is that of the whole answer:
where many ranks share few cores it is a floor under the time, whatever the link.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from support.limiter import hold_back
from support.rank import serve
from torch import Tensor, distributed

from abyssal.kernels.fp8_tiles import quantise
from abyssal.parallel.dispatch.choose import RankDispatcher, open_dispatcher
from abyssal.parallel.mesh import Mesh
from abyssal.precision.wire import pack, unpack
from abyssal.spec.mesh import MeshSpec

from .setting import WIRE, Setting

PLAIN, TUNED = "plain", "tuned"
PHASES = ("plan", "dispatch", "combine")
LARGEST_ERROR = 3 * 2.0**-9
"""Of a combined token, relative to its largest value: BF16 rounds half a unit of 2^-8, at most three times."""


class Rank:
    """Tokens, and a dispatcher for each way asked for."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        mesh = MeshSpec(dp=setting.ranks, ep=setting.ranks, ranks_per_node=setting.ranks_per_node)
        hold_back([mesh.node_of(rank) for rank in range(setting.ranks)])
        self._mesh = Mesh(mesh, timeout=timedelta(seconds=120))
        self._ways: dict[str, RankDispatcher] = {}
        rank = self._mesh.rank
        x_TD = torch.randn(setting.tokens, setting.hidden, generator=setting.generator(rank))
        self._expert_ids_TK = setting.expert_ids(rank)
        self._weights_TK = torch.rand(setting.tokens, setting.top_k)
        codes = quantise(x_TD, WIRE)
        self._wire_TX = pack(codes)
        self._expected_TD = codes.values(torch.float32) * setting.top_k

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        way = request["way"]
        new = way not in self._ways
        if new:
            self._ways[way] = self._open(way)
        dispatcher = self._ways[way]
        if new:
            self._check(self._run(dispatcher)[1], way)
        before = time.process_time()
        seconds, _ = self._run(dispatcher)
        processor = time.process_time() - before
        traffic = {phase: asdict(getattr(dispatcher.traffic, phase)) for phase in PHASES}
        chunk_tokens = self._chunk_tokens(dispatcher)
        return {"seconds": seconds, "processor": processor, "traffic": traffic, "chunk_tokens": chunk_tokens}

    def _open(self, way: str) -> RankDispatcher:
        """``plain``, ``tuned``, or a number of tokens a chunk."""
        placements = {0: self._setting.placement}
        if way == PLAIN:
            return open_dispatcher("alltoall", placements, self._mesh)
        return open_dispatcher("hierarchical", placements, self._mesh, None if way == TUNED else int(way))

    def _run(self, dispatcher: RankDispatcher) -> tuple[dict[str, float], Tensor]:
        """Seconds of each phase, and the tokens that returned."""
        dispatcher.traffic.reset()
        seconds: dict[str, float] = {}

        def timed(phase: str, function: Callable[[], Any]) -> Any:
            distributed.barrier(self._mesh.control)
            start = time.perf_counter()
            result = function()
            seconds[phase] = time.perf_counter() - start
            return result

        def plan() -> Any:
            made = dispatcher.plan(0, self._expert_ids_TK)
            assert sum(made.counts) >= 0  # waits for it
            return made

        made = timed("plan", plan)
        bytes_AX, _ = timed("dispatch", lambda: dispatcher.start_dispatch(self._wire_TX, self._weights_TK, made).wait())
        rows_AD = unpack(bytes_AX, self._setting.hidden, WIRE).values(torch.bfloat16)
        returned_TD, _ = timed("combine", lambda: dispatcher.start_combine(rows_AD, None, made).wait())
        return seconds, returned_TD

    def _check(self, returned_TD: Tensor, way: str) -> None:
        error_T = (returned_TD.float() - self._expected_TD).abs().amax(1) / self._expected_TD.abs().amax(1)
        if error_T.max() > LARGEST_ERROR:
            raise AssertionError(f"{way}: a token came back with an error of {error_T.max():.2g}")

    def _chunk_tokens(self, dispatcher: RankDispatcher) -> int | None:
        found = getattr(dispatcher, "chunk_size", None)
        return None if found is None else found.tokens


if __name__ == "__main__":
    serve(lambda request: Rank(Setting(**request)).answer)
