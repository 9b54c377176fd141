"""Ranks' processes on this machine: told apart by more than a number, and their end noticed at once.

A *pidfd* (Linux 5.3) becomes readable when its process ends, and a signal sent through it cannot reach another process
that has got the same number.  Without them (macOS) a rank that ends is noticed when its heartbeat stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from abyssal.parallel.launch_meeting import Peer


def this_process(rank: int) -> Peer:
    """This rank's peer."""
    return Peer(rank, socket.gethostname(), os.getpid(), _machine())


def _machine() -> str:
    """The running kernel and, as containers number their processes anew, the namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class LocalPeers:
    """The other ranks on this machine.

    Attributes:
        descriptors: pidfd by rank, of those whose processes could be opened.
    """

    def __init__(self, me: Peer, peers: Iterable[Peer]) -> None:
        self.descriptors: dict[int, int] = {}
        for peer in peers:
            if peer.machine == me.machine and peer.rank != me.rank:
                descriptor = _open(peer.pid)
                if descriptor is not None:
                    self.descriptors[peer.rank] = descriptor

    def kill(self, rank: int) -> None:
        """End a rank that no longer listens; nothing where it is not here or has ended."""
        descriptor = self.descriptors.get(rank)
        if descriptor is not None and hasattr(signal, "pidfd_send_signal"):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def forget(self, rank: int) -> None:
        """Of a rank that has left: its end is no news."""
        descriptor = self.descriptors.pop(rank, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for rank in list(self.descriptors):
            self.forget(rank)


def _open(pid: int) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # it has ended already, or the kernel is older: its heartbeat tells
        return None
