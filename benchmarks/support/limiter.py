"""Slow links in user space, where network namespaces are refused: a rank waits as long as its bytes would have taken.

Ranks are ordinary processes that talk over ``lo``.  :func:`hold_back` wraps the all-to-all that dispatchers use:
what it sends to ranks of other nodes takes its turn on its node's cable outwards and on the other's inwards, and is
sent when the last byte would have been through.  The cables' state, when each is free again and how many bytes went
through, lies in a file that all ranks share.

Against the real thing (``support/link.py``): other collectives and connections are not held back, and a message takes
its whole turn on a cable instead of sharing it packet by packet, so one that comes from several nodes at once may wait
a little longer.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .link import LinkKind, process_variables

FILE, NODE, RATE = "ABYSSAL_LIMITER_FILE", "ABYSSAL_LIMITER_NODE", "ABYSSAL_LIMITER_GIGABITS"
"""Variables by which a rank learns of its node's cable."""
_CABLE = struct.Struct("ddq")
"""When its outward and inward directions are free again (monotonic clock), and the bytes that left."""


class LimitedLinks:
    """The nodes of ``support/link.py``'s protocol.  A context manager."""

    kind: LinkKind = "limiter"

    def __init__(self, num_nodes: int, gigabits: float) -> None:
        self.num_nodes = num_nodes
        self.gigabits = gigabits
        self._folder = tempfile.TemporaryDirectory()
        self.cables = Path(self._folder.name, "cables")

    def __enter__(self) -> LimitedLinks:
        self.cables.write_bytes(bytes(_CABLE.size * self.num_nodes))
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """As the protocol says."""
        own = {FILE: str(self.cables), NODE: str(node), RATE: str(self.gigabits), "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen([*command], env=process_variables({**own, **environment}), text=True, **options)

    def address(self, node: int) -> str:
        """All are this machine."""
        return "127.0.0.1"

    def sent(self, node: int) -> int:
        """Bytes of tensors, without any headers."""
        return Cables(self.cables).sent(node)


class Cables:
    """What ranks share of the cables: a file that one at a time reads and writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def sent(self, node: int) -> int:
        with self._open() as cables:
            return _CABLE.unpack_from(cables, node * _CABLE.size)[2]

    def book(self, node: int, bytes_by_node: Mapping[int, int], seconds_a_byte: float) -> float:
        """A turn for what ``node`` sends to each other node, after all turns booked before; when the last ends."""
        now = end = time.monotonic()
        with self._open() as cables:
            for other, size in bytes_by_node.items():
                outward, inward, sent = _CABLE.unpack_from(cables, node * _CABLE.size)
                there = list(_CABLE.unpack_from(cables, other * _CABLE.size))
                end = max(now, outward, there[1]) + size * seconds_a_byte
                there[1] = end
                _CABLE.pack_into(cables, node * _CABLE.size, end, inward, sent + size)
                _CABLE.pack_into(cables, other * _CABLE.size, *there)
        return end

    @contextmanager
    def _open(self) -> Iterator[bytearray]:
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cables = bytearray(file.read())
            yield cables
            file.seek(0)
            file.write(cables)


def hold_back(nodes: Sequence[int]) -> None:
    """In a rank that :class:`LimitedLinks` started: from now on an all-to-all takes the time of the slow link.

    Anywhere else it does nothing.

    Args:
        nodes: of each rank of the world.
    """
    if FILE not in os.environ:
        return
    from torch import Tensor, distributed

    from abyssal.parallel import all_to_all

    cables, node = Cables(Path(os.environ[FILE])), int(os.environ[NODE])
    seconds_a_byte = 8 / (float(os.environ[RATE]) * 1e9)
    original = all_to_all.start
    senders: dict[Any, ThreadPoolExecutor] = {}  # one thread a group keeps its order

    def held_back(
        pieces: Sequence[tuple[Tensor, Tensor]], received: Sequence[int], sent: Sequence[int], group: Any
    ) -> Held:
        size = sum(rows[:1].nbytes for _, rows in pieces)
        crossing: dict[int, int] = {}
        for rank, count in zip(distributed.get_process_group_ranks(group), sent, strict=True):
            if nodes[rank] != node and count:
                crossing[nodes[rank]] = crossing.get(nodes[rank], 0) + count * size
        end = cables.book(node, crossing, seconds_a_byte)

        def send() -> None:
            time.sleep(max(0.0, end - time.monotonic()))
            original(pieces, received, sent, group).wait()

        if group not in senders:
            senders[group] = ThreadPoolExecutor(1)
        return Held(senders[group].submit(send))

    all_to_all.start = held_back


class Held:
    """A collective that begins when its bytes would have been through, so that no peer has them before."""

    def __init__(self, sent: Future[None]) -> None:
        self._sent = sent

    def wait(self) -> None:
        self._sent.result()
