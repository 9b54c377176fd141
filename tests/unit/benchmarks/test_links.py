"""Emulated slow links: what leaves a node is counted and held back, what stays is not, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.support.limiter import Cables, LimitedLinks
from benchmarks.support.link import BURST_BYTES, LinksRefused, NamespaceLinks, open_links
from benchmarks.support.link_probe import measure_links

ROOT = Path(__file__).parents[3]


@pytest.fixture
def two_nodes() -> NamespaceLinks:
    links = NamespaceLinks(2, 0.05)
    try:
        with links:
            pass
    except LinksRefused as error:
        pytest.skip(f"namespaces are refused here: {error}")
    return links


def test_what_leaves_a_node_is_held_back_and_counted(two_nodes: NamespaceLinks) -> None:
    with two_nodes as links:
        inside, across = measure_links(links, connections=2, seconds=0.3)
        size = links.gigabits * 1e9 / 8 * 0.3
        assert across.gigabits < links.gigabits * size / (size - 2 * BURST_BYTES)  # both buckets began full
        assert inside.gigabits > 2 * across.gigabits
        assert all(size <= links.sent(node) < 1.05 * size for node in range(2))  # what stayed inside is not in it


KILLED = """
import sys, time
from benchmarks.support.link import open_links
with open_links(2, 1.0, "namespaces") as links:
    print(*(holder.pid for holder in links._holders), flush=True)
    time.sleep(60)
"""


def test_namespaces_end_with_the_process_even_when_it_is_killed(two_nodes: NamespaceLinks) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    holders = [Path("/proc", pid) for pid in process.stdout.readline().split()]
    assert len(holders) == 3 and all(holder.exists() for holder in holders)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(_is_alive, holders)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_is_alive, holders))


def _is_alive(process: Path) -> bool:
    """Neither gone nor waiting for a parent to ask how it ended."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_namespaces_are_refused_ranks_are_held_back_which_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_links(2, 1.0) as links:
        assert isinstance(links, LimitedLinks)
    assert "namespaces are refused" in capsys.readouterr().out
    with pytest.raises(LinksRefused, match="there is no program 'ip'"), open_links(2, 1.0, "namespaces"):
        pass


def test_a_link_needs_a_node_and_a_rate() -> None:
    for nodes, gigabits in ((0, 1.0), (2, 0.0)):
        with pytest.raises(ValueError, match="at least one node and a rate above 0"), open_links(nodes, gigabits):
            pass


def test_the_limiter_gives_each_message_its_turn() -> None:
    with LimitedLinks(3, 8e-9) as links:  # a byte takes a second: only booked, not waited for
        cables, start = Cables(links.cables), time.monotonic()
        first = cables.book(0, {1: 100, 2: 200}, 1.0)
        assert first == pytest.approx(start + 300, abs=20)
        assert cables.book(2, {0: 50}, 1.0) == pytest.approx(start + 50, abs=20)  # the other direction is free
        assert cables.book(1, {2: 10}, 1.0) == pytest.approx(first + 10)  # node 2 still receives from node 0
        assert cables.book(0, {1: 10}, 1.0) == pytest.approx(first + 10)  # node 0 still sends
        assert [links.sent(node) for node in range(3)] == [310, 10, 50]
