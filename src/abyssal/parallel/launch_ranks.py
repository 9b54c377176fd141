"""From a process that a launcher started to a rank among others: the store, the roll call, the watch, the groups.

Each step has its own clear error before the next can fail obscurely: a store that cannot be reached is told with its
address, ranks that do not come by their numbers, ranks that differ by what differs; only then is the process group
made, whose own errors name neither.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import distributed

from abyssal.parallel.launch import Launch
from abyssal.parallel.launch_meeting import PROBLEMS, Meeting, OwnProblem, Peer, Store, describe
from abyssal.parallel.mesh import Mesh
from abyssal.parallel.startup import compare_ranks
from abyssal.parallel.watch import Watch, WatchOptions
from abyssal.parallel.watch_peers import this_process
from abyssal.spec.mesh import MeshSpec

Value = TypeVar("Value")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_BEGAN = "abyssal/began"
_REPORT_SECONDS = 5.0
LEAST_ARRIVAL = 60.0
"""Seconds: Python's start from a busy file system takes long, and not equally long."""


@dataclass(frozen=True)
class JoinedRanks:
    """This rank among all: where it stands, how it agrees with the others, and who watches over them."""

    launch: Launch
    mesh: Mesh
    meeting: Meeting
    watch: Watch
    peers: list[Peer]
    _store: Store
    """The launcher's, beyond this start of the ranks where the launcher keeps it."""

    @property
    def is_first(self) -> bool:
        return self.launch.is_first

    def first_alone(self, phase: str, function: Callable[[], Value]) -> Value:
        """What ``function`` returns on rank 0, JSON values, while the others wait, however long it takes.

        Raises:
            ValueError: as :meth:`~abyssal.parallel.launch_meeting.Meeting.first`.
        """
        with self.watch.patient(phase):
            return self.meeting.first(function)

    def together(self, phase: str, function: Callable[[], Value]) -> Value:
        """What ``function`` returns, called on every rank; where one fails, all fail with its message.

        Raises:
            ValueError: as :meth:`~abyssal.parallel.launch_meeting.Meeting.together`.
        """
        with self.watch.patient(phase):
            return self.meeting.together(function)

    def compare(self, facts: Mapping[str, Any]) -> None:
        """As :func:`~abyssal.parallel.startup.compare_ranks`."""
        compare_ranks(self.meeting, facts, self.peers)

    def began(self, what: str) -> None:
        """Note, for a later start by the same launcher, that these ranks began ``what``."""
        if self.is_first:
            self._store.set(_BEGAN, what)

    def began_before(self, what: str) -> bool:
        """Whether an earlier start by the same launcher began ``what``: it may then be gone on with unasked."""
        begun = self._store.check([_BEGAN]) and self._store.get(_BEGAN).decode() == what
        return self.launch.restarts > 0 and begun


@contextmanager
def open_ranks(
    launch: Launch,
    mesh_spec: MeshSpec,
    facts: Mapping[str, Any],
    timeout: float = 60.0,
    device: Literal["cpu", "cuda"] = "cpu",
    name: str = "abyssal",
    arrival: float | None = None,
) -> Iterator[JoinedRanks]:
    """Join the other ranks; on leaving, take everything down again.

    Args:
        mesh_spec: of as many ranks as there are.
        facts: must be the same on all ranks; see :func:`~abyssal.parallel.startup.compare_ranks`.
        timeout: seconds that :class:`~abyssal.parallel.watch.Watch` gives a rank.
        name: of the program, in messages.
        arrival: seconds that ranks have to come; ``timeout`` by default, and no less than a minute.

    Raises:
        OwnProblem: the store cannot be reached, or rank 0 did not come.
        ValueError: the mesh is of another number of ranks, other ranks do not come or differ, a device is missing;
            naming what and which.  Alike on all ranks, so that rank 0 alone need tell it.
    """
    _check_mesh(mesh_spec, launch)
    arrival = max(timeout, LEAST_ARRIVAL) if arrival is None else arrival
    root = open_store(launch, arrival)
    prefix = f"abyssal/{launch.restarts}"
    store = distributed.PrefixStore(prefix, root)
    meeting = Meeting(store, launch.rank, launch.world_size)  # pyright: ignore[reportArgumentType]
    me = this_process(launch.rank)
    try:
        on_device = _own_device(launch, device)
    except ValueError as problem:
        meeting.cannot_begin(_told(launch, problem))
        raise
    peers = meeting.roll_call(me, arrival, f"{launch.address}:{launch.port}")

    def beats_store() -> Store:
        return distributed.PrefixStore(prefix, _client(launch, timeout))  # pyright: ignore[reportReturnType]

    options = WatchOptions(timeout, name, on_gpu=device == "cuda")
    with Watch(beats_store, me, peers, options) as watch, ExitStack() as stack:
        with watch.patient("starting"):
            compare_ranks(meeting, facts, peers)
            _init_groups(launch, distributed.PrefixStore("groups", store), on_device, stack)
            mesh = Mesh(mesh_spec, on_device)
        stack.callback(mesh.close)
        yield JoinedRanks(launch, mesh, meeting, watch, peers, root)  # pyright: ignore[reportArgumentType]
        meeting.together(lambda: None)  # groups are taken down when nobody needs them any more
        stack.close()


def report_problem(launch: Launch, problem: Exception) -> bool:
    """Tell rank 0, which waits for all to come, why this one will not; whether it could be told."""
    try:
        store = distributed.PrefixStore(f"abyssal/{launch.restarts}", open_store(launch, _REPORT_SECONDS))
        meeting = Meeting(store, launch.rank, launch.world_size)  # pyright: ignore[reportArgumentType]
        meeting.cannot_begin(_told(launch, problem))
    except (*PROBLEMS, RuntimeError):
        return False
    return True


def _told(launch: Launch, problem: Exception) -> str:
    return f"rank {launch.rank} ({socket.gethostname()}): {describe(problem)}"


def _check_mesh(spec: MeshSpec, launch: Launch) -> None:
    if spec.world_size != launch.world_size:
        raise ValueError(
            f"mesh {spec} is of {spec.world_size} ranks and {launch.world_size} were started; give a mesh whose "
            f"pp x dp is {launch.world_size}, or start {spec.world_size}"
        )


def _own_device(launch: Launch, kind: Literal["cpu", "cuda"]) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if launch.local_rank >= found:
        raise ValueError(
            f"device is cuda and torch sees {found} GPUs here, for {launch.local_world_size} ranks; start at most as "
            "many ranks on a machine as it has GPUs (torchrun --nproc-per-node), or give --device cpu"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def open_store(launch: Launch, timeout: float) -> distributed.TCPStore:
    """The store that all ranks share; rank 0 makes it where the launcher has not.

    Raises:
        OwnProblem: it cannot be reached within ``timeout`` seconds, or its port is taken.
    """
    if launch.is_first and not launch.launcher_has_store:
        try:
            return distributed.TCPStore(launch.address, launch.port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise OwnProblem(
                f"port {launch.port} of {launch.address} cannot be listened on ({_first_line(error)}); set MASTER_PORT "
                "to one that is free, on all ranks"
            ) from error
    _await_port(launch, timeout)
    return _client(launch, timeout)


def _client(launch: Launch, timeout: float) -> distributed.TCPStore:
    try:
        return distributed.TCPStore(
            launch.address, launch.port, is_master=False, timeout=timedelta(seconds=max(timeout, 1.0))
        )
    except RuntimeError as error:
        raise OwnProblem(
            f"the ranks' store at {launch.address}:{launch.port} gives no answer ({_first_line(error)}); check "
            "MASTER_ADDR and MASTER_PORT"
        ) from error


def _await_port(launch: Launch, timeout: float) -> None:
    """Wait for somebody to listen: torch would wait too, and write a warning at each try."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=max(1.0, timeout / 4)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OwnProblem(
                    f"rank {launch.rank} of {launch.world_size} cannot reach the ranks' store at {launch.address}:"
                    f"{launch.port} for {timeout:g} s ({error.strerror or error}); check that the launcher or rank 0 "
                    "runs there and that this machine may connect (MASTER_ADDR, MASTER_PORT, firewalls)"
                ) from error
        time.sleep(0.1)


def _init_groups(launch: Launch, store: distributed.Store, device: torch.device, stack: ExitStack) -> None:
    if launch.address in _LOOPBACK:  # gloo would look up this machine's name, which need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=device if on_gpu else None,
    )
    stack.callback(distributed.destroy_process_group)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
