"""Slow links between "nodes" on one machine: what runs on one node talks at full speed, what leaves it is held back.

    with open_links(2, gigabits=1.0) as links:
        process = links.start(0, ["python", ...])     on node 0
        links.sent(0)                                  bytes that left node 0 so far

Each node is a network namespace with one interface, ``link0``, and a bridge in a namespace of its own joins them.  A
token bucket (``tc``'s tbf) at both ends of each node's cable lets through so many bits a second in each direction, as a
network card does.  Traffic to the node's own address never leaves it: the kernel takes it through ``lo``.  Queues are
long enough that nothing is lost, as nothing is on InfiniBand.  One rank a node makes every link a slow one.

A namespace here has no name.  It lives as long as a process does that waits for the end of its input, so however this
one ends, namespaces, interfaces and queues go with it, and nobody else's are touched.

Where namespaces are refused (they need root), ``support/limiter.py`` holds ranks back in user space.

The trade-off not taken: named namespaces, which are handier to look into and are left behind by whoever is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Protocol

LinkKind = Literal["namespaces", "limiter"]
INTERFACE = "link0"
FRAME_BYTES = 9000
"""The largest frame; large ones cost the processor less."""
BURST_BYTES = 1 << 18
"""What a bucket lets through at once after a pause, and what it makes good when the machine woke it late."""
QUEUE_BYTES = 1 << 28
"""Of a bucket that is empty: more than TCP has under way."""


class LinksRefused(RuntimeError):
    """This machine does not let us make the links; the message says what was refused."""


class Links(Protocol):
    """Nodes and the slow links between them."""

    kind: LinkKind
    num_nodes: int
    gigabits: float

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """A process on ``node`` with these variables beside ours, which finds the modules of benchmarks/.

        ``options`` are those of ``subprocess.Popen``.
        """
        ...

    def address(self, node: int) -> str:
        """Where other nodes reach it."""
        ...

    def sent(self, node: int) -> int:
        """Bytes that have left ``node`` so far, as the link counts them."""
        ...


def process_variables(more: Mapping[str, str]) -> dict[str, str]:
    """Ours, with the folder of the benchmarks on the path of modules, and ``more``."""
    folders = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **more}


@contextlib.contextmanager
def open_links(
    num_nodes: int, gigabits: float, kind: LinkKind | None = None, burst: int = BURST_BYTES
) -> Iterator[Links]:
    """The links while the context lasts; whoever started processes on them ends these first.

    Args:
        gigabits: a second, each direction of each node's cable.
        kind: by default namespaces, or the limiter where they are refused, which is said.
        burst: bytes that a bucket lets through at once after a pause; the limiter has none.

    Raises:
        LinksRefused: ``kind`` is "namespaces" and this machine refuses them.
        ValueError: fewer than one node or a rate that is not positive.
    """
    if num_nodes < 1 or gigabits <= 0:
        raise ValueError(f"{num_nodes} nodes and {gigabits} Gbit/s: give at least one node and a rate above 0")
    from .limiter import LimitedLinks

    with contextlib.ExitStack() as stack:
        links: Links
        if kind == "limiter":
            links = stack.enter_context(LimitedLinks(num_nodes, gigabits))
        else:
            try:
                links = stack.enter_context(NamespaceLinks(num_nodes, gigabits, burst))
            except LinksRefused as error:
                if kind is not None:
                    raise
                print(f"network namespaces are refused ({error}); ranks are held back in user space instead")
                links = stack.enter_context(LimitedLinks(num_nodes, gigabits))
        yield links


class NamespaceLinks:
    """Network namespaces joined by a bridge; see the module.  A context manager."""

    kind: LinkKind = "namespaces"

    def __init__(self, num_nodes: int, gigabits: float, burst: int = BURST_BYTES) -> None:
        self.num_nodes = num_nodes
        self.gigabits = gigabits
        self._burst = burst
        self._holders: list[subprocess.Popen[str]] = []

    def __enter__(self) -> NamespaceLinks:
        for program in ("ip", "tc", "unshare", "nsenter"):
            if shutil.which(program) is None:
                raise LinksRefused(f"there is no program {program!r}")
        try:
            for _ in range(self.num_nodes + 1):
                self._holders.append(_hold_namespace())
            self._wire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self._holders:
            with contextlib.suppress(subprocess.TimeoutExpired):
                holder.communicate(timeout=5)  # closes its input, which ends it
            holder.kill()
        self._holders.clear()

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """As the protocol says.  gloo is told which interface to use."""
        variables = process_variables({"GLOO_SOCKET_IFNAME": INTERFACE, **environment})
        return subprocess.Popen([*_inside(self._holders[node]), *command], env=variables, text=True, **options)

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def sent(self, node: int) -> int:
        """As the interface's own counter has it: whole frames, with the headers of TCP, IP and Ethernet."""
        lines = Path(f"/proc/{self._holders[node].pid}/net/dev").read_text().splitlines()
        counters = {name.strip(): fields.split() for name, _, fields in (line.partition(":") for line in lines)}
        return int(counters[INTERFACE][8])

    def _wire(self) -> None:
        """Cables from the last namespace, which is the switch, to the others."""
        *nodes, switch = self._holders
        bucket = f"root tbf rate {round(self.gigabits * 1e9)}bit burst {self._burst} limit {QUEUE_BYTES}"
        _batch(switch, "ip", ["link add bridge0 type bridge", "link set bridge0 up"])
        for number, node in enumerate(nodes):
            port = f"port{number}"
            frame = f"mtu {FRAME_BYTES}"
            cable = f"link add {port} {frame} type veth peer name {INTERFACE} {frame} netns {node.pid}"
            _batch(switch, "ip", [cable, f"link set {port} master bridge0", f"link set {port} up"])
            _batch(switch, "tc", [f"qdisc add dev {port} {bucket}"])
            address = f"address add {self.address(number)}/24 dev {INTERFACE}"
            _batch(node, "ip", ["link set lo up", address, f"link set {INTERFACE} up"])
            _batch(node, "tc", [f"qdisc add dev {INTERFACE} {bucket}"])


def _hold_namespace() -> subprocess.Popen[str]:
    """A process in a network namespace of its own, which ends with its input, and so with this process."""
    holder = subprocess.Popen(
        ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stdin, stdout, stderr = (_pipe(pipe) for pipe in (holder.stdin, holder.stdout, holder.stderr))
    try:
        stdin.write("there\n")
        stdin.flush()
        there = stdout.readline()  # cat runs, so the namespace is there
    except BrokenPipeError:
        there = ""
    if not there:
        reason = stderr.read().strip()
        with contextlib.suppress(BrokenPipeError):
            holder.communicate()
        raise LinksRefused(reason or "unshare --net failed")
    return holder


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _inside(holder: subprocess.Popen[str]) -> list[str]:
    return ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]


def _batch(holder: subprocess.Popen[str], program: str, commands: Sequence[str]) -> None:
    """Commands of ``ip`` or ``tc`` in a namespace."""
    done = subprocess.run(
        [*_inside(holder), program, "-batch", "-"], input="\n".join(commands) + "\n", capture_output=True, text=True
    )
    if done.returncode:
        raise LinksRefused(f"{program}: {done.stderr.strip()}")
