"""What must be alike on all ranks, compared before any work: the first difference is named, on every rank.

Ranks that differ in code, options, seeds or data train on without an error, and train something else.  Each rank sends
a digest of its facts; only where digests differ do the facts themselves travel.  The folder of the run must be one and
the same too, as every rank writes its part of a checkpoint there.
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from abyssal.parallel.launch_meeting import Meeting, Peer, listed_ranks

FILE_SECONDS = 10.0
"""How long a file may take to appear on the other machines of a network file system."""


def program_facts(version: str, device: str = "cpu") -> dict[str, Any]:
    """Of the program of this ``version`` that runs here: what changes a CPU's rounding, and every source file."""
    facts: dict[str, Any] = {
        "abyssal": version,
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    if device == "cpu":  # sums are cut by threads, and rounded by the instructions that add them
        facts["threads (OMP_NUM_THREADS)"] = torch.get_num_threads()
        facts["processor instructions (ATEN_CPU_CAPABILITY)"] = torch.backends.cpu.get_cpu_capability()
    return {**facts, "source file": source_digests(Path(__file__).parents[1])}


def source_digests(package: Path) -> dict[str, str]:
    """By name, of the Python files and native libraries in a package's folder."""
    found = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".so") and path.is_file())
    return {path.relative_to(package).as_posix(): _digest(path.read_bytes()) for path in found}


def compare_ranks(meeting: Meeting, facts: Mapping[str, Any], peers: Sequence[Peer]) -> None:
    """Return where all ranks call this with the same facts (JSON values, nested as one likes).

    Raises:
        ValueError: the first difference, on every rank: its name, and each value with its ranks.
    """
    own = json.dumps(facts)
    digest = _digest(own.encode())
    digests = meeting.gather(digest)
    if meeting.first(lambda: len(set(digests or [])) <= 1):
        return
    texts = meeting.gather(own)

    def refuse() -> None:
        raise ValueError(first_difference([json.loads(text) for text in texts or []], peers))

    meeting.first(refuse)


def first_difference(facts: Sequence[Mapping[str, Any]], peers: Sequence[Peer]) -> str:
    """Of facts by rank, which differ: the message."""
    flat = [dict(_flattened("", each)) for each in facts]
    for name in [name for each in flat for name in each]:
        values = [json.dumps(each[name]) if name in each else "nothing" for each in flat]
        if len(set(values)) > 1:
            said = "; ".join(_who_has(value, values, peers) for value, _ in Counter(values).most_common())
            return f"ranks differ in {name}: {said}; start all of them alike"
    raise AssertionError("facts whose digests differ differ")


def _who_has(value: str, values: Sequence[str], peers: Sequence[Peer]) -> str:
    ranks = [rank for rank, other in enumerate(values) if other == value]
    hosts = list(dict.fromkeys(peers[rank].host for rank in ranks))
    shown = ", ".join(hosts[:3]) + (", ..." if len(hosts) > 3 else "")
    return f"{listed_ranks(ranks)} ({shown}) {'has' if len(ranks) == 1 else 'have'} {value}"


def _flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flattened(f"{name}.{key}".lstrip("."), part)
    else:
        yield name, value


def check_shared_folder(meeting: Meeting, folder: Path) -> None:
    """Make ``folder`` and check that all ranks see the same one; what was not there before is removed if not.

    Raises:
        ValueError: ranks that do not find there what rank 0 wrote.
        OSError: rank 0 may not write there.
    """
    absent = [path for path in (folder, *folder.absolute().parents) if not path.exists()]

    def write() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        (folder / _token_name(token)).touch()
        return token

    token = meeting.first(write)
    try:
        meeting.together(lambda: _find(folder, token))
    except ValueError:
        if meeting.rank == 0:
            _remove(folder, token, absent)
        raise
    if meeting.rank == 0:
        _remove(folder, token, [])


def _find(folder: Path, token: str) -> None:
    path = folder / _token_name(token)
    deadline = time.monotonic() + FILE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{folder}: this machine does not see there what rank 0 wrote; give an --out on a file system that "
                "all machines share"
            )
        with contextlib.suppress(OSError):
            list(folder.iterdir())  # makes a network file system look again
        time.sleep(0.05)


def _remove(folder: Path, token: str, absent: Sequence[Path]) -> None:
    (folder / _token_name(token)).unlink(missing_ok=True)
    for path in absent:
        with contextlib.suppress(OSError):
            path.rmdir()


def _token_name(token: str) -> str:
    return f".shared-{token}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
