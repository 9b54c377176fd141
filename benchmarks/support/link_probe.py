"""What a link between nodes really gives: TCP throughput and round trip, inside a node and across.

Every node sends to the next at once, so that cables are full in both directions, as they are in an all-to-all.  What is
measured here, and not the rate that was asked for, is the limit of the machine that results are put beside: under load
a token bucket wakes up late, and its bytes of that time are lost.

Run as a program this module is one end of such a measurement, in a process on its node.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .link import Links

PIECE = 1 << 18
ROUND_TRIPS = 100


@dataclass(frozen=True)
class RawLink:
    """Of a node's cable, or inside a node: what TCP brings through."""

    gigabits: float
    """A second and direction, the payload alone; the mean of the nodes."""
    round_trip: float
    """Seconds there and back for one byte while nothing else is under way, the median; of the slowest node."""


def measure_links(links: Links, connections: int, seconds: float = 1.0) -> tuple[RawLink, RawLink]:
    """Inside a node, and across.  The limiter does not know these connections: its rate is what it lets through.

    Args:
        connections: between each pair of nodes at once, as many as ranks have.
        seconds: that the asked-for rate would take for what is sent.
    """
    size = max(PIECE, round(links.gigabits * 1e9 / 8 * seconds / connections))
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(_server(links, node)) for node in range(links.num_nodes)]
        inside = _measured(links, [(0, 0)], ports, size, connections)
        if links.kind == "limiter":
            return inside, RawLink(links.gigabits, inside.round_trip)
        ring = [(node, (node + 1) % links.num_nodes) for node in range(links.num_nodes)]
        return inside, _measured(links, ring, ports, size, connections)


def _measured(
    links: Links, pairs: Sequence[tuple[int, int]], ports: Sequence[int], size: int, connections: int
) -> RawLink:
    clients = []
    for sender, receiver in pairs:
        end = ["send", links.address(receiver), str(ports[receiver]), str(size), str(connections)]
        clients.append(links.start(sender, _command(*end), {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    for part in ("round trip", "throughput"):  # each begins when all ends are there
        del part
        for client in clients:
            assert client.stdin is not None and client.stdout is not None
            client.stdout.readline()
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
    found = [json.loads(client.communicate()[0]) for client in clients]
    rate = statistics.mean(each["bytes_a_second"] for each in found)
    return RawLink(rate * 8 / 1e9, max(each["round_trip"] for each in found))


@contextlib.contextmanager
def _server(links: Links, node: int) -> Iterator[int]:
    """The port of a server on ``node`` that ends with its input."""
    process = links.start(node, _command("serve"), {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.communicate()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "support.link_probe", *arguments]


def _serve() -> None:
    """Echo one byte at a time where asked to, else swallow everything and say how much it was."""
    listener = socket.create_server(("", 0))
    print(listener.getsockname()[1], flush=True)

    def answer(connection: socket.socket) -> None:
        with connection:
            if connection.recv(1) == b"e":
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while byte := connection.recv(1):
                    connection.sendall(byte)
                return
            buffer, total = bytearray(PIECE), 0
            while count := connection.recv_into(buffer):
                total += count
            connection.sendall(str(total).encode())

    def accept() -> None:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def _wait_for_others() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def _send(address: str, port: int, size: int, connections: int) -> None:
    trips = []
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"e")
        _wait_for_others()
        for _ in range(ROUND_TRIPS):
            start = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            trips.append(time.perf_counter() - start)
    sockets = [socket.create_connection((address, port)) for _ in range(connections)]
    threads = [threading.Thread(target=_pour, args=(each, size)) for each in sockets]
    _wait_for_others()
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    print(json.dumps({"bytes_a_second": size * connections / taken, "round_trip": statistics.median(trips)}))


def _pour(connection: socket.socket, size: int) -> None:
    """``size`` bytes, until the other end says that they are there."""
    piece = memoryview(bytes(PIECE))
    with connection:
        connection.sendall(b"p")
        for begin in range(0, size, PIECE):
            connection.sendall(piece[: min(PIECE, size - begin)])
        connection.shutdown(socket.SHUT_WR)
        arrived = int(connection.recv(64))
        assert arrived == size, (arrived, size)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve()
    else:
        _send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
